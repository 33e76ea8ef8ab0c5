"""The spike-rejecting Kalman filter against a scalar reference, and what it promises."""

import math
import statistics

import numpy as np
import pytest
from numpy.typing import NDArray

from rtfmri.errors import ConfigError, VolumeError
from rtfmri.stages.kalman import MAX_HELD, KalmanFilter

Floats = NDArray[np.float64]

GAIN = 0.3904
"""K, once settled: the root of K^2 / (1 - K) = 0.25."""
N_VOLUMES, N_ROIS, AT = 160, 500, 100


def noise(n_rois: int = N_ROIS, seed: int = 0) -> Floats:
    """White noise of standard deviation 1, (n_volumes, n_rois)."""
    return np.random.default_rng(seed).normal(size=(N_VOLUMES, n_rois))


def push_all(roi_filter: KalmanFilter, series: Floats) -> Floats:
    return np.array([roi_filter.push(signals) for signals in series])


def filtered(series: Floats) -> Floats:
    return push_all(KalmanFilter(series.shape[1]), series)


def change(size: float, when: slice | int, base: Floats | None = None) -> Floats:
    """By how much the filtered noise changes when *size* is added to it."""
    base = noise() if base is None else base
    changed = base.copy()
    changed[when] += size
    return filtered(changed) - filtered(base)


# --- against a scalar reference


def one_region(series: Floats, usable: NDArray[np.bool_]) -> tuple[list[float], int]:
    """The filter of one region, step by step, and the number of its spikes."""
    level = variance = r = newest = math.nan
    n_differences = n_held = n_spikes = 0
    levels, early = [], []
    for y, good in zip(series.tolist(), usable.tolist(), strict=True):
        if not math.isnan(level):
            variance += 0.25
        if good and math.isfinite(y):
            warm = n_differences >= 10
            error = abs(y - level)
            if math.isnan(level):
                level, variance, r, newest = y, 1.0, 0.0, y
            else:
                spike = warm and error > 4 * math.sqrt(r * (variance + 1))
                half = (y - newest) ** 2 / 2
                n_differences += 1
                if not warm:
                    early.append(half)
                    most = 9 * statistics.median(early) / 0.4549
                    r = statistics.fmean(min(each, most) for each in early)
                else:
                    weight = max(1 / n_differences, 0.05)
                    r = (1 - weight) * r + weight * (min(half, 9 * r) if r > 0 else half)
                if spike and n_held < 2:
                    n_held += 1
                    n_spikes += 1
                elif spike:
                    n_spikes -= n_held
                    level, variance, newest, n_held = y, 1.0, y, 0
                else:
                    kalman_gain = variance / (variance + 1)
                    level = (1 - kalman_gain) * level + kalman_gain * y
                    variance = (1 - kalman_gain) * variance
                    newest, n_held = y, 0
        levels.append(level)
    return levels, n_spikes


def test_it_is_the_scalar_reference() -> None:
    rng = np.random.default_rng(3)
    series = 500 + noise(40) + np.linspace(0, 10, N_VOLUMES)[:, None]
    series[rng.random(series.shape) < 0.05] += 15
    series[80:] += rng.choice([0, 3, 8, 30], 40)
    series[120:, :10] *= 1.1
    series[rng.random(series.shape) < 0.03] = np.nan
    series[:3, :5] = np.nan
    series[:30, 5] = series[0, 5]
    series[rng.random(series.shape) < 0.01] = np.inf
    usable = rng.random(N_VOLUMES) > 0.1
    roi_filter = KalmanFilter(40)
    got = np.array(
        [roi_filter.push(y, usable=bool(u)) for y, u in zip(series, usable, strict=True)]
    )
    wanted, n_spikes = zip(*(one_region(y, usable) for y in series.T), strict=True)
    np.testing.assert_allclose(got, np.array(wanted).T, rtol=1e-12)
    assert roi_filter.n_spikes.tolist() == list(n_spikes)
    assert np.median(n_spikes) >= 3
    assert got.dtype == np.float64
    assert roi_filter.n_spikes.dtype == np.int64


# --- noise


def test_white_noise_keeps_a_quarter_of_its_variance() -> None:
    settled = filtered(noise())[20:]
    assert settled.var() == pytest.approx(GAIN / (2 - GAIN), rel=0.03)


def test_good_volumes_are_seldom_called_spikes() -> None:
    roi_filter = KalmanFilter(N_ROIS)
    push_all(roi_filter, noise())
    assert roi_filter.n_spikes.sum() < 3e-4 * N_VOLUMES * N_ROIS


def test_the_noise_is_that_of_the_run_whatever_its_drift_and_spikes() -> None:
    series = 3 * noise() + 0.5 * np.arange(N_VOLUMES)[:, None]
    series[::25] += 60
    roi_filter = KalmanFilter(N_ROIS)
    push_all(roi_filter, series[1:])
    assert np.sqrt(np.median(roi_filter.state.noise)) == pytest.approx(3, rel=0.2)


# --- spikes


@pytest.mark.parametrize("size", [10, -10, 1000])
def test_a_spike_changes_next_to_nothing(size: float) -> None:
    effect = np.abs(change(size, AT))
    assert effect[AT].mean() < 0.4
    assert np.quantile(effect[AT:], 0.99) < 1.2
    assert effect[AT + 10 :].max() < 0.1


def test_two_spikes_in_a_row_change_next_to_nothing() -> None:
    effect = np.abs(change(15, slice(AT, AT + 2)))
    assert effect[AT : AT + 2].mean() < 0.5
    assert np.quantile(effect[AT:], 0.99) < 1.5


def test_spikes_are_counted_where_they_are() -> None:
    series = noise(4)
    series[[40, 60, 61], 1] += 20
    series[90, 3] -= 20
    roi_filter = KalmanFilter(4)
    push_all(roi_filter, series)
    assert roi_filter.n_spikes.tolist() == [0, 3, 0, 1]


def test_a_spike_is_held_at_the_prediction() -> None:
    series = noise(1)
    roi_filter = KalmanFilter(1)
    before = push_all(roi_filter, series[:AT])[-1]
    assert roi_filter.push([50.0]) == before
    assert roi_filter.push(series[AT]) != before


# --- true changes


def test_a_small_step_is_followed_exponentially() -> None:
    effect = change(1, slice(AT, None)).mean(1)[AT : AT + 30]
    np.testing.assert_allclose(effect[:10], 1 - (1 - GAIN) ** np.arange(1, 11), atol=0.02)
    delay = (1 - effect).sum()
    assert delay == pytest.approx((1 - GAIN) / GAIN, abs=0.1)  # 1.56 volumes


@pytest.mark.parametrize("size", [3, 5, 6, 7, 8, 15, 100])
def test_no_step_is_late_by_much_more_than_two_volumes(size: float) -> None:
    effect = change(size, slice(AT, None)).mean(1)[AT : AT + 30] / size
    assert (1 - effect).sum() < 2.6
    assert effect[MAX_HELD + 2] > 0.8


def test_a_large_step_is_taken_whole_and_is_no_spike() -> None:
    series = noise(3)
    series[AT:] += 50
    roi_filter = KalmanFilter(3)
    got = push_all(roi_filter, series)
    assert (got[AT + MAX_HELD - 1] == got[AT - 1]).all()
    assert (got[AT + MAX_HELD] == series[AT + MAX_HELD]).all()
    assert (np.abs(got[AT + MAX_HELD :] - 50) < 3).all()
    assert (roi_filter.n_spikes == 0).all()


@pytest.mark.parametrize("amplitude", [1, 5, 20])
def test_a_task_is_followed_with_little_delay(amplitude: float) -> None:
    second = np.arange(0, 30.0, 2)
    response = second**5 * np.exp(-second)
    blocks = (np.arange(N_VOLUMES) // 10 % 2).astype(float)
    task = np.convolve(blocks, response / response.sum())[:N_VOLUMES]
    got = filtered(noise() + amplitude * task[:, None]).mean(1)[20:]
    times, delays = np.arange(N_VOLUMES), np.linspace(0, 4, 81)
    misfits = [
        ((got - amplitude * np.interp(times - d, times, task)[20:]) ** 2).sum() for d in delays
    ]
    assert 1.2 <= delays[np.argmin(misfits)] <= 1.5
    assert np.ptp(got) == pytest.approx(amplitude, rel=0.1)


def test_a_drift_is_followed_at_its_delay() -> None:
    slope = 0.3
    got = filtered(noise() + slope * np.arange(N_VOLUMES)[:, None]).mean(1)
    late = (slope * np.arange(N_VOLUMES) - got)[20:]
    np.testing.assert_allclose(late, slope * (1 - GAIN) / GAIN, atol=0.15)


def test_after_the_noise_rises_nothing_is_locked_out() -> None:
    series = noise()
    series[60:] *= 10
    roi_filter = KalmanFilter(N_ROIS)
    push_all(roi_filter, series[:100])
    n_before = roi_filter.n_spikes
    push_all(roi_filter, series[100:])
    assert (roi_filter.n_spikes - n_before).mean() < 0.01 * (N_VOLUMES - 100)


# --- the first volumes, and those that say nothing


def test_it_starts_at_the_first_observation() -> None:
    roi_filter = KalmanFilter(2)
    assert np.isnan(roi_filter.push([7, 8], usable=False)).all()
    np.testing.assert_array_equal(roi_filter.push([7, np.nan]), [7, np.nan])
    got = roi_filter.push([10, 9])
    assert got[1] == 9
    assert got[0] == pytest.approx(7 + 3 * 1.25 / 2.25)


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_a_spike_at_the_start_is_soon_forgotten(at: int) -> None:
    effect = np.abs(change(100, at))
    assert effect[at + 20 :].max(0).mean() < 0.1
    series = noise()
    series[[at, 30]] += 100
    assert (np.abs(filtered(series)[30]) < 4).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_looked_at(bad: float) -> None:
    series = noise(2)
    series[50, 1] = bad
    got = filtered(series)
    assert got[50, 1] == got[49, 1]
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[:, 0], filtered(noise(2))[:, 0])


def test_an_unusable_volume_is_not_looked_at() -> None:
    roi_filter, other = KalmanFilter(2), KalmanFilter(2)
    series = noise(2)
    before = push_all(roi_filter, series[:50])[-1]
    push_all(other, series[:50])
    np.testing.assert_array_equal(roi_filter.push([900, -900], usable=False), before)
    other.push([np.nan, np.nan])
    np.testing.assert_array_equal(push_all(roi_filter, series[50:]), push_all(other, series[50:]))
    assert roi_filter.n_spikes.tolist() == other.n_spikes.tolist()


def test_an_unusable_volume_is_no_spike_and_ends_no_row_of_them() -> None:
    roi_filter = KalmanFilter(1)
    before = push_all(roi_filter, noise(1)[:50])[-1]
    assert roi_filter.push([90.0]) == before
    assert roi_filter.push([91.0], usable=False) == before
    assert roi_filter.push([92.0]) == before
    assert roi_filter.push([93.0]) == 93


def test_a_constant_signal_stays_and_a_spike_in_it_does_not() -> None:
    series = np.full((60, 1), 42.0)
    roi_filter = KalmanFilter(1)
    assert (push_all(roi_filter, series) == 42).all()
    assert roi_filter.push([43.0]) == 42
    assert (push_all(roi_filter, series) == 42).all()
    assert roi_filter.n_spikes.tolist() == [1]


def test_after_a_constant_start_the_noise_is_learnt() -> None:
    series = noise()
    series[:40] = 0
    roi_filter = KalmanFilter(N_ROIS)
    push_all(roi_filter, series[:80])
    n_before = roi_filter.n_spikes
    assert push_all(roi_filter, series[80:]).var() == pytest.approx(GAIN / (2 - GAIN), rel=0.05)
    assert (roi_filter.n_spikes - n_before).mean() < 0.01 * (N_VOLUMES - 80)


# --- units and shapes


@pytest.mark.parametrize("factor", [1000, 1e-6, -1])
def test_the_unit_does_not_matter(factor: float) -> None:
    series = 200 + noise()
    series[AT] += 12
    scaled, plain = KalmanFilter(N_ROIS), KalmanFilter(N_ROIS)
    got, wanted = push_all(scaled, factor * series), factor * push_all(plain, series)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    np.testing.assert_array_equal(scaled.n_spikes, plain.n_spikes)


def test_nor_does_where_the_signal_lies() -> None:
    np.testing.assert_allclose(filtered(noise() + 1000) - 1000, filtered(noise()), atol=1e-10)


def test_regions_do_not_mix() -> None:
    series = noise(8)
    alone = np.concatenate([filtered(series[:, [i]]) for i in range(8)], axis=1)
    np.testing.assert_array_equal(filtered(series), alone)


def test_what_is_returned_is_the_callers() -> None:
    roi_filter = KalmanFilter(1)
    signals = np.array([1.0])
    got, spikes = roi_filter.push(signals), roi_filter.n_spikes
    got[:], spikes[:], signals[:] = 99, 99, 99
    assert roi_filter.push([1.0]) == 1
    assert roi_filter.n_spikes == 0


def test_no_regions() -> None:
    assert KalmanFilter(0).push([]).shape == (0,)


def test_errors_name_the_rule() -> None:
    with pytest.raises(ConfigError, match=r"n_rois must be 0 or more, got -1"):
        KalmanFilter(-1)
    roi_filter = KalmanFilter(3)
    with pytest.raises(VolumeError, match=r"signals must have shape \(3,\).*got \(2,\)"):
        roi_filter.push([1, 2])
    assert np.isnan(roi_filter.state.level).all()

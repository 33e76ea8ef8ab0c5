"""Running moments and what is subtracted from them, on every backend, against two-pass float64."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import U, moments_error, subtraction, weighted_moments
from rtfmri.backends import Array, Backend, Contrast, Moments, Subtraction, open_backend

SIZES = (1, 31, 256, 257, 20_011)
every_dtype = pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])


def a_run(dtype: str, n_volumes: int, n_voxels: int, seed: int = 0) -> NDArray[Any]:
    """Noisy voxels around means of 300 to 3000, of which the first keeps still."""
    rng = np.random.default_rng(seed)
    volumes = rng.uniform(300, 3000, n_voxels) + rng.normal(0, 20, (n_volumes, n_voxels))
    volumes[:, 0] = 700
    return volumes.astype(dtype)


def new_moments(backend: Backend, n_voxels: int) -> Moments:
    return Moments(backend.zeros(n_voxels), backend.zeros(n_voxels))


def new_out(backend: Backend, n_voxels: int) -> Subtraction:
    return Subtraction(*(backend.zeros(n_voxels) for _ in range(3)))


def on_host(backend: Backend, arrays: tuple[Array, ...]) -> list[NDArray[Any]]:
    return [backend.download(array) for array in arrays]


def fold_all(backend: Backend, volumes: NDArray[Any], gains: list[float]) -> Moments:
    moments = new_moments(backend, volumes.shape[1])
    for volume, gain in zip(volumes, gains, strict=True):
        backend.fold(backend.upload(volume), moments, gain=gain)
    return moments


def cumulative(n_volumes: int) -> list[float]:
    return [1 / n for n in range(1, n_volumes + 1)]


def assert_within(got: NDArray[Any], wanted: NDArray[Any], bound: Any) -> None:
    assert got.dtype == np.float32
    excess = np.abs(got - wanted) - bound
    assert excess.max() <= 0, f"beyond its bound by {excess.max()} at voxel {excess.argmax()}"


# --- one volume against a given baseline: only the operation's own rounding is left


@every_dtype
@pytest.mark.parametrize("n_voxels", SIZES)
def test_subtract_against_a_given_baseline(backend: Backend, dtype: str, n_voxels: int) -> None:
    rng = np.random.default_rng(1)
    volume = a_run(dtype, 1, n_voxels)[0]
    mean = rng.uniform(300, 3000, n_voxels).astype(np.float32)
    variance = rng.uniform(1, 500, n_voxels).astype(np.float32)
    baseline = Moments(backend.copy(mean), backend.copy(variance))
    out = new_out(backend, n_voxels)
    backend.subtract(backend.upload(volume), baseline, out, bessel=1.25, into=None, gain=0.7)
    # Roundings in a row: 1 for the difference, 2 more for PSC; z has variance * bessel (1, half
    # of it after the root), root and quotient: 3.5. All inputs are exact.
    for got, wanted, roundings in zip(
        on_host(backend, out), subtraction(volume, mean, variance, 1.25), (1, 3, 3.5), strict=True
    ):
        assert_within(got, wanted, 1.01 * roundings * U * np.abs(wanted))
    # into=None leaves the baseline alone, whatever the gain.
    assert np.array_equal(backend.download(baseline.mean), mean)
    assert np.array_equal(backend.download(baseline.variance), variance)


def test_still_empty_and_negative_voxels(backend: Backend) -> None:
    volumes = np.zeros((9, 3), np.int16)
    volumes[:, 0] = 700
    volumes[:, 2] = [-90, -110] * 4 + [-80]
    moments = fold_all(backend, volumes[:8], cumulative(8))
    out = new_out(backend, 3)
    backend.subtract(backend.upload(volumes[8]), moments, out, bessel=8 / 7, into=None, gain=0)
    difference, psc, z = on_host(backend, out)
    assert backend.download(moments.variance)[:2].tolist() == [0, 0]
    assert difference[:2].tolist() == psc[:2].tolist() == z[:2].tolist() == [0, 0]
    # Mean -100, variance 100: a percentage of it would mislead, so there is none. Small integers
    # round only where 1/n does.
    assert difference[2] == pytest.approx(20, rel=1e-5)
    assert psc[2] == 0
    assert z[2] == pytest.approx(20 / math.sqrt(100 * 8 / 7), rel=1e-5)


def test_a_bessel_of_zero_makes_z_zero(backend: Backend) -> None:
    moments, out = Moments(*(backend.copy(np.full(2, 9, np.float32)),) * 2), new_out(backend, 2)
    volume = backend.upload(np.array([3, 30], np.int16))
    backend.subtract(volume, moments, out, bessel=0.0, into=None, gain=0)
    assert backend.download(out.z).tolist() == [0, 0]


# --- moments that run


@every_dtype
@pytest.mark.parametrize("n_voxels", SIZES)
def test_cumulative_baseline(backend: Backend, dtype: str, n_voxels: int) -> None:
    volumes = a_run(dtype, 12, n_voxels)
    moments, out = new_moments(backend, n_voxels), new_out(backend, n_voxels)
    for n, volume in enumerate(volumes, start=1):
        bessel = (n - 1) / (n - 2) if n > 2 else 0.0
        backend.subtract(
            backend.upload(volume), moments, out, bessel=bessel, into=moments, gain=1 / n
        )
    mean, variance = on_host(backend, moments)
    mean_error, variance_error = moments_error(volumes, cumulative(12))
    assert_within(mean, volumes.mean(0, dtype=np.float64), mean_error)
    assert_within(variance, volumes.var(0, dtype=np.float64), variance_error)
    # The last volume was compared with the eleven before it.
    before = volumes[:-1].astype(np.float64)
    m, v = before.mean(0), before.var(0)
    e, f = moments_error(before, cumulative(11))
    d, psc, z = subtraction(volumes[-1], m, v, 11 / 10)
    got = on_host(backend, out)
    assert_within(got[0], d, e + U * abs(d))
    assert_within(got[1], psc, 101 * (e / m + abs(d) * e / m**2) + 4 * U * abs(psc))
    v[v == 0] = 1  # a still voxel: z is 0, and its mean may be off all the same
    assert_within(got[2], z, 1.01 * (e / np.sqrt(v) + abs(z) * (f / v + 4 * U)))


@every_dtype
def test_exponential_baseline(backend: Backend, dtype: str) -> None:
    volumes = a_run(dtype, 60, 257)
    gains = [max(1 / n, 0.1) for n in range(1, 61)]
    mean, variance = on_host(backend, fold_all(backend, volumes, gains))
    wanted = weighted_moments(volumes, gains)
    bounds = moments_error(volumes, gains)
    assert_within(mean, wanted[0], bounds[0])
    assert_within(variance, wanted[1], bounds[1])


@every_dtype
def test_fixed_baseline_keeps_its_bits(backend: Backend, dtype: str) -> None:
    volumes = a_run(dtype, 20, 257)
    moments, out = fold_all(backend, volumes[:8], cumulative(8)), new_out(backend, 257)
    before = on_host(backend, moments)
    for volume in volumes[8:]:
        backend.subtract(
            backend.upload(volume), moments, out, bessel=8 / 7, into=moments, gain=0.0
        )
    for got, wanted in zip(on_host(backend, moments), before, strict=True):
        assert np.array_equal(got, wanted)


@every_dtype
def test_a_volume_can_count_for_another_condition(backend: Backend, dtype: str) -> None:
    volumes = a_run(dtype, 10, 257)
    baseline, out = fold_all(backend, volumes[:5], cumulative(5)), new_out(backend, 257)
    task = new_moments(backend, 257)
    before = on_host(backend, baseline)
    for n, volume in enumerate(volumes[5:], start=1):
        backend.subtract(
            backend.upload(volume), baseline, out, bessel=5 / 4, into=task, gain=1 / n
        )
    for got, wanted in zip(on_host(backend, baseline), before, strict=True):
        assert np.array_equal(got, wanted)
    folded = fold_all(backend, volumes[5:], cumulative(5))
    for got, wanted in zip(on_host(backend, task), on_host(backend, folded), strict=True):
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("int16", -32768, 32767), ("uint16", 0, 65535)]
)
def test_the_ends_of_the_integer_types(backend: Backend, dtype: str, low: int, high: int) -> None:
    volumes = np.array([[low, low, high], [high, low, high]] * 8, dtype)
    mean, variance = on_host(backend, fold_all(backend, volumes, cumulative(16)))
    mean_error, variance_error = moments_error(volumes, cumulative(16))
    assert_within(mean, volumes.mean(0, dtype=np.float64), mean_error)
    assert_within(variance, volumes.var(0, dtype=np.float64), variance_error)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_voxel_stays_alone(backend: Backend, bad: float) -> None:
    clean = a_run("float32", 8, 300)
    dirty = clean.copy()
    dirty[4, 150] = bad
    others = np.arange(300) != 150
    results = []
    for volumes in (clean, dirty):
        moments, out = new_moments(backend, 300), new_out(backend, 300)
        for n, volume in enumerate(volumes, start=1):
            backend.subtract(
                backend.upload(volume), moments, out, bessel=1.0, into=moments, gain=1 / n
            )
        results.append(on_host(backend, (*moments, *out)))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert np.array_equal(got[others], wanted[others])
    assert not np.isfinite(results[1][0][150])


few_backends = pytest.mark.parametrize(
    "backend", ["cpu", CUDA_BACKENDS[0], CUDA_BACKENDS[-1]], indirect=True
)


@few_backends
def test_ten_thousand_volumes(backend: Backend) -> None:
    n = 10_000
    volumes = np.random.default_rng(3).normal(1000, 10, (n, 16)).astype(np.float32)
    mean, variance = on_host(backend, fold_all(backend, volumes, cumulative(n)))
    # The rounding of step k is later shrunk to k/n of itself, so roundings of standard deviation s
    # add up to s * sqrt(n / 3) if independent (Higham and Mary 2019, SIAM J. Sci. Comput.
    # 41:A2815). A mean near 1000 is rounded to steps of 2**-14: s = 2**-14 / sqrt(12). The
    # variance has 3 relative roundings a step, U / sqrt(3) each: s = U. Six deviations.
    growth = 6 * math.sqrt(n / 3)
    wanted = volumes.astype(np.float64)
    assert_within(mean, wanted.mean(0), growth * 2**-14 / math.sqrt(12))
    assert_within(variance, wanted.var(0), growth * U * wanted.var(0))


@few_backends
def test_ten_thousand_volumes_of_integers(backend: Backend) -> None:
    n = 10_000
    volumes = np.rint(np.random.default_rng(3).normal(1000, 10, (n, 16))).astype(np.int16)
    mean, variance = on_host(backend, fold_all(backend, volumes, cumulative(n)))
    # Where 1/k is a multiple of 2**-14, all integers round alike: not independent, so what holds
    # is the worst case. It is 0.3 in the mean; seen was 0.006.
    mean_error, variance_error = moments_error(volumes, cumulative(n))
    assert_within(mean, volumes.mean(0, dtype=np.float64), mean_error)
    assert_within(variance, volumes.var(0, dtype=np.float64), variance_error)


# --- the sliding window


@every_dtype
@pytest.mark.parametrize("n_voxels", [1, 257])
def test_sliding_baseline(backend: Backend, dtype: str, n_voxels: int) -> None:
    window, volumes = 8, a_run(dtype, 50, n_voxels)
    moments, out = new_moments(backend, n_voxels), new_out(backend, n_voxels)
    ring = backend.zeros((window, n_voxels), dtype)
    spread, high = float(np.ptp(volumes, axis=0).max()), float(volumes.max())
    # Between two refreshes, window steps: each rounds the mean (U high) and its step (3U spread /
    # window); each adds to the variance step * (two deviations), a product of numbers that are
    # off by the mean's error, and rounds it and the sum. A refresh sums window deviations from the
    # first volume, and then their squares about a mean that is off by its own rounding.
    mean_error = (window + 1) * U * (high + 4 * spread)
    variance_error = (window + 1) * (2 * spread * mean_error / window + 8 * U * spread**2)
    for i, volume in enumerate(volumes):
        n = min(i + 1, window)
        backend.slide(
            backend.upload(volume), moments, ring, i % window, out,
            bessel=1.0, gain=1 / n, full=i >= window,
        )  # fmt: skip
        if i >= window:
            part = [n_voxels * (i % window + k) // window for k in (0, 1)]
            backend.refresh(ring, moments, *part)
        mean, variance = on_host(backend, moments)
        inside = volumes[i + 1 - n : i + 1].astype(np.float64)
        assert_within(mean, inside.mean(0), mean_error)
        assert_within(variance, inside.var(0), variance_error)
    # The last volume was compared with the window before it.
    before = volumes[-1 - window : -1].mean(0, dtype=np.float64)
    assert_within(backend.download(out.difference), volumes[-1] - before, 1.01 * mean_error)
    rows = backend.download(ring)
    assert np.array_equal(rows, np.roll(volumes[-window:], len(volumes) % window, axis=0))


@every_dtype
def test_refresh_leaves_other_voxels_alone(backend: Backend, dtype: str) -> None:
    volumes = a_run(dtype, 6, 600)
    ring, old = backend.copy(volumes), np.full(600, 5, np.float32)
    moments = Moments(backend.copy(old), backend.copy(old))
    backend.refresh(ring, moments, 100, 403)
    mean, variance = on_host(backend, moments)
    # Two passes over six values: sums of 5 or 6 terms, a quotient and the mean's last rounding.
    wanted = volumes[:, 100:403].astype(np.float64)
    m, v, spread = wanted.mean(0), wanted.var(0), np.ptp(wanted, axis=0)
    assert_within(mean[100:403], m, U * (m + 8 * spread))
    assert_within(variance[100:403], v, (U * (m + 8 * spread)) ** 2 + 12 * U * (v + spread**2))
    for values in (mean, variance):
        assert np.all(values[:100] == 5)
        assert np.all(values[403:] == 5)
    backend.refresh(ring, moments, 7, 7)
    assert np.array_equal(backend.download(moments.mean), mean)


def test_a_bad_voxel_leaves_with_its_volume(backend: Backend) -> None:
    window, volumes = 4, a_run("float32", 12, 5)
    volumes[2, 3] = np.nan
    moments, out = new_moments(backend, 5), new_out(backend, 5)
    ring = backend.zeros((window, 5))
    for i, volume in enumerate(volumes):
        backend.slide(
            backend.upload(volume), moments, ring, i % window, out,
            bessel=1.0, gain=1 / min(i + 1, window), full=i >= window,
        )  # fmt: skip
    assert np.isnan(backend.download(moments.mean)[3])
    backend.refresh(ring, moments, 0, 5)
    inside = volumes[-window:].astype(np.float64)
    np.testing.assert_allclose(backend.download(moments.mean), inside.mean(0), rtol=1e-6)
    assert np.isfinite(backend.download(moments.variance)).all()


# --- one condition against another


@every_dtype
@pytest.mark.parametrize("n_voxels", SIZES)
def test_contrast_is_welchs_t(backend: Backend, dtype: str, n_voxels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    task, rest = a_run(dtype, 7, n_voxels, seed=5), a_run(dtype, 11, n_voxels, seed=6)
    for condition in (task, rest):  # scipy has no t for still voxels
        condition[:, 0] += np.arange(len(condition), dtype=dtype)
    out = Contrast(*(backend.zeros(n_voxels) for _ in range(3)))
    backend.contrast(
        fold_all(backend, task, cumulative(7)), 7, fold_all(backend, rest, cumulative(11)), 11, out
    )
    effect, psc, t = on_host(backend, out)
    a, b = task.astype(np.float64), rest.astype(np.float64)
    wanted = stats.ttest_ind(a, b, equal_var=False).statistic
    (ea, fa), (eb, fb) = moments_error(a, cumulative(7)), moments_error(b, cumulative(11))
    difference, base = a.mean(0) - b.mean(0), b.mean(0)
    off = 1.01 * (ea + eb) + U * abs(difference)
    assert_within(effect, difference, off)
    wanted_psc = 100 * difference / base
    assert_within(
        psc, wanted_psc, 101 * (off + abs(difference) * eb / base) / base + 4 * U * abs(wanted_psc)
    )
    # t = effect / sqrt(w): its relative error is the effect's, half of w's, and 5 roundings.
    w = a.var(0) / 6 + b.var(0) / 10
    w_off = (fa / 6 + fb / 10) / w + 4 * U
    assert_within(t, wanted, 1.01 * (off / np.sqrt(w) + abs(wanted) * (w_off / 2 + 5 * U)))


def test_contrast_of_still_and_negative_voxels(backend: Backend) -> None:
    def moments(mean: list[float], variance: list[float]) -> Moments:
        return Moments(*(backend.copy(np.array(v, np.float32)) for v in (mean, variance)))

    out = Contrast(*(backend.zeros(3) for _ in range(3)))
    backend.contrast(
        moments([700, 5, -50], [0, 0, 4]), 5.0, moments([700, 0, -100], [0, 0, 4]), 5.0, out
    )
    effect, psc, t = on_host(backend, out)
    assert effect.tolist() == [0, 5, 50]
    assert psc.tolist() == [0, 0, 0]
    assert t[:2].tolist() == [0, 0]
    assert t[2] == pytest.approx(50 / math.sqrt(2), rel=5 * U)


# --- all backends agree to the last bit


def every_operation(backend: Backend, volumes: NDArray[Any]) -> list[NDArray[Any]]:
    n_voxels, window = volumes.shape[1], 5
    moments, task = new_moments(backend, n_voxels), new_moments(backend, n_voxels)
    out, ring = new_out(backend, n_voxels), backend.zeros((window, n_voxels), volumes.dtype)
    sliding, contrast = new_moments(backend, n_voxels), Contrast(*new_out(backend, n_voxels))
    results = []
    for i, raw in enumerate(volumes):
        volume, n = backend.upload(raw), i + 1
        into = (moments, task, None)[i % 3]
        backend.subtract(volume, moments, out, bessel=1.3, into=into, gain=1 / (i // 3 + 1))
        results += on_host(backend, out)
        backend.fold(volume, task, gain=0.2)
        backend.slide(
            volume, sliding, ring, i % window, out,
            bessel=1.1, gain=1 / min(n, window), full=i >= window,
        )  # fmt: skip
        results += on_host(backend, out)
    backend.refresh(ring, sliding, n_voxels // 3, n_voxels)
    backend.contrast(task, 9.5, moments, 4.0, contrast)
    return results + on_host(backend, (*moments, *task, *sliding, *contrast, ring))


@every_dtype
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(backend: Backend, dtype: str) -> None:
    volumes = a_run(dtype, 13, 513)
    if dtype == "float32":
        volumes[4, 7], volumes[6, 9] = np.nan, np.inf
    wanted = every_operation(open_backend("cpu"), volumes)
    for got, array in zip(every_operation(backend, volumes), wanted, strict=True):
        np.testing.assert_array_equal(got, array, strict=True)


# --- volumes that are not usable


@pytest.mark.parametrize("value", [1500.0, np.nan])
def test_a_volume_that_is_not_usable_is_compared_and_leaves_no_trace(
    backend: Backend, value: float
) -> None:
    volumes = a_run("float32", 8, 300)
    refused, accepted = (backend.copy(np.full(1, flag, np.float32)) for flag in (0, 1))
    moments, other = fold_all(backend, volumes, cumulative(8)), new_moments(backend, 300)
    ring, out = backend.copy(volumes.copy()), new_out(backend, 300)
    before = on_host(backend, (*moments, *other, ring))
    bad = backend.upload(np.full(300, value, np.float32))
    scalars = {"bessel": 8 / 7, "gain": 1 / 9}
    backend.subtract(bad, moments, out, into=moments, usable=refused, **scalars)
    difference = backend.download(out.difference)
    np.testing.assert_array_equal(difference, np.float32(value) - before[0])
    backend.subtract(bad, moments, out, into=other, usable=refused, **scalars)
    backend.fold(bad, moments, gain=1 / 9, usable=refused)
    backend.slide(bad, moments, ring, 0, out, full=True, usable=refused, **scalars)
    np.testing.assert_array_equal(backend.download(out.difference), difference)
    backend.slide(bad, moments, ring, 0, out, full=False, usable=refused, **scalars)
    for was, now in zip(before, on_host(backend, (*moments, *other, ring)), strict=True):
        np.testing.assert_array_equal(was, now)
    backend.fold(bad, moments, gain=1 / 9, usable=accepted)
    assert not np.array_equal(before[0], backend.download(moments.mean))

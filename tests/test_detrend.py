"""Drift taken out volume by volume, on every backend, against float64 on all volumes at once."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import U, moments_error, weighted_moments
from rtfmri.backends import Backend, open_backend
from rtfmri.config import DetrendSettings
from rtfmri.design import Design, GlmSettings
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Event, Paradigm
from rtfmri.stages.detrend import DetrendStage

Floats = NDArray[np.float64]

TR_S, N_PLANNED = 2.0, 200
BLOCKS = Paradigm([Event(onset, 20.0, "task") for onset in np.arange(20.0, 400.0, 40.0)])
REST = Paradigm()
METHODS = ("exponential", "linear", "cosine")
every_method = pytest.mark.parametrize("method", METHODS)
fits = pytest.mark.parametrize("method", METHODS[1:])
few_backends = pytest.mark.parametrize(
    "backend", ["cpu", CUDA_BACKENDS[0], CUDA_BACKENDS[-1]], indirect=True
)


def a_stage(
    backend: Backend, method: str, n_voxels: int, paradigm: Paradigm = BLOCKS, **options: Any
) -> DetrendStage:
    settings = DetrendSettings(method=method)
    options = {"n_volumes": N_PLANNED} | options
    return DetrendStage(backend, n_voxels, settings, paradigm, TR_S, **options)


def pushed(
    backend: Backend, stage: DetrendStage, volumes: NDArray[Any], usable: Sequence[bool] = ()
) -> NDArray[Any]:
    """Take the volumes through the stage, and return what comes out."""
    out = []
    for index, volume in enumerate(volumes.astype(np.float32)):
        good = usable[index] if len(usable) else True
        told = backend.upload(stage.told(index))
        gate = backend.copy(np.array([good], np.float32)) if len(usable) else None
        out.append(backend.download(stage.push(backend.upload(volume), told, gate)))
        stage.settle(good)
    return np.array(out)


def detrended(
    volumes: NDArray[Any], method: str, paradigm: Paradigm = BLOCKS, **options: Any
) -> NDArray[Any]:
    backend = open_backend("cpu")
    return pushed(
        backend, a_stage(backend, method, volumes.shape[1], paradigm, **options), volumes
    )


def a_run(n_volumes: int, n_voxels: int, seed: int = 0) -> NDArray[np.float32]:
    """Voxels around 300 to 3000 with drift and noise of standard deviation 20."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(0, 1, n_volumes)[:, None] * rng.normal(0, 60, n_voxels)
    volumes = rng.uniform(300, 3000, n_voxels) + drift + rng.normal(0, 20, (n_volumes, n_voxels))
    return volumes.astype(np.float32)


def columns(method: str, paradigm: Paradigm, n_volumes: int) -> tuple[Floats, int]:
    """The design's rows, drift scaled to mean squares of 1 and 0 at the start; how many drift."""
    settings = GlmSettings(drift=method, motion=False)
    rows, planned = (
        Design(paradigm, settings, TR_S, n_volumes=N_PLANNED).rows(n)
        for n in (n_volumes, N_PLANNED)
    )
    n_drift = 1 if method == "linear" else 6  # floor(2 * 400 s / 128 s)
    drift = slice(1, 1 + n_drift)
    rows[:, drift] = (rows[:, drift] - planned[0, drift]) / planned[:, drift].std(axis=0)
    return rows, n_drift


def ridge(rows: Floats, n_drift: int, y: Floats) -> tuple[Floats, float]:
    """Drift of the last row, (n_voxels,), and its standard error in those of the noise.

    Least squares with a row for each drift column that says "1 times it is 0".
    """
    penalty = np.eye(rows.shape[1])[1 : 1 + n_drift]
    augmented, nothing = np.concatenate([penalty, rows]), np.zeros((n_drift, y.shape[1]))
    inverse = np.linalg.pinv(augmented, rcond=1e-12)
    now = np.zeros(rows.shape[1])
    now[1 : 1 + n_drift] = rows[-1, 1 : 1 + n_drift]
    weights = now @ inverse
    return weights @ np.concatenate([nothing, y]), float(np.linalg.norm(weights))


# --- against float64


@every_method
def test_first_volume_and_still_voxels_are_as_they_were(backend: Backend, method: str) -> None:
    # Ends of uint16, the largest integers of float32, and what no scanner sends.
    still = np.array([0, -1, 65535, 2**24 - 1, -(2.0**24), 1e30, 1e-30], np.float32)
    usable = [True, True, False] * 30
    got = pushed(backend, a_stage(backend, method, 7), np.tile(still, (90, 1)), usable)
    np.testing.assert_array_equal(got, np.tile(still, (90, 1)), strict=True)
    volumes = a_run(1, 300)
    np.testing.assert_array_equal(
        pushed(backend, a_stage(backend, method, 300), volumes), volumes, strict=True
    )


@pytest.mark.parametrize("n_voxels", [1, 257, 1500])
def test_exponential_is_its_recursion(backend: Backend, n_voxels: int) -> None:
    n_volumes, gain = 100, 1 - math.exp(-TR_S / 128)
    volumes = a_run(n_volumes, n_voxels)
    usable = np.arange(n_volumes) % 7 != 3
    got = pushed(backend, a_stage(backend, "exponential", n_voxels), volumes, usable)
    for i in (1, 5, 30, 70, 77, 90, 99):
        before = volumes[:i][usable[:i]]
        plain = [1 / n for n in range(1, len(before) + 1)]
        gains = [max(g, gain) for g in plain], [g if g >= gain else 0.0 for g in plain]
        slow, level = (weighted_moments(before, g)[0] for g in gains)
        if gains[0] == gains[1]:  # of the first 128 s, nothing is changed
            np.testing.assert_array_equal(got[i], volumes[i])
        # The two means' errors, and a rounding of their difference and of the result.
        off = moments_error(before, gains[0])[0] + moments_error(before, gains[1])[0]
        off += U * (abs(slow - level) + abs(volumes[i]))
        assert np.all(abs(got[i] - (volumes[i] - (slow - level))) <= 1.01 * off)
    assert not np.array_equal(got[-1], volumes[-1])


@fits
@pytest.mark.parametrize("paradigm", [BLOCKS, REST], ids=["task", "rest"])
@pytest.mark.parametrize("n_voxels", [1, 257])
def test_fits_equal_ridge_regression(
    backend: Backend, method: str, paradigm: Paradigm, n_voxels: int
) -> None:
    n_volumes = N_PLANNED + 20  # the run is longer than planned
    volumes = a_run(n_volumes, n_voxels)
    usable = np.arange(n_volumes) % 7 != 3
    got = pushed(backend, a_stage(backend, method, n_voxels, paradigm), volumes, usable)
    rows, n_drift = columns(method, paradigm, n_volumes)
    for i in (1, 2, 4, 9, 12, 40, 41, 100, 199, 219):
        seen = np.flatnonzero(usable[: i + 1])
        y = volumes[seen].astype(np.float64) - volumes[0]
        drift, error = ridge(rows[seen], n_drift, y)
        # A rotation rounds its cosine and sine, two products and a sum: 3 U of the pair at most
        # in each of two numbers, so 3 sqrt(2) U of y's length, which the others keep. Then p
        # products and sums of rounded weights with coordinates of that length.
        p, length = rows.shape[1], np.linalg.norm(y, axis=0)
        off = U * error * length * (3 * math.sqrt(2) * p * len(seen) + p + 4)
        off += U * (abs(drift) + abs(volumes[i]))
        assert np.all(abs(got[i] - (volumes[i] - drift)) <= 1.01 * off)
    assert not np.array_equal(got[-1], volumes[-1])


@fits
def test_drift_is_found_too_small_by_one_in_n(method: str) -> None:
    rows, _ = columns(method, REST, N_PLANNED)
    drift = 1000 + 50 * rows[:, [1]]
    left = detrended(drift, method, REST)[-1] - 1000
    # What is left has roundings of 1000 and of the drift, which the bounds above cover.
    assert left[0] == pytest.approx((drift[-1, 0] - 1000) / (N_PLANNED + 1), rel=1e-3)


def test_remove_fit(backend: Backend) -> None:
    rng = np.random.default_rng(2)
    volume, coordinates = rng.normal(500, 50, 300), rng.normal(0, 9, (5, 300))
    directions = np.array([0, 0.5, -0.7, 0, 0.5])
    single = [array.astype(np.float32) for array in (volume, coordinates, directions)]
    single[1][3] = np.nan  # where a direction is 0, nothing is read
    out, scale = backend.zeros(300), backend.copy(np.array([0.3]))
    backend.remove_fit(*(backend.copy(array) for array in single), scale, out)
    x, z, w = (array.astype(np.float64) for array in single)
    z[3] = 0
    drift, size = 0.3 * (w @ z), 0.3 * (abs(w) @ abs(z))
    # Per term a product and 2 more sums; then the scale, its product, and the difference.
    off = 1.01 * U * (5 * size + abs(x - drift))
    assert np.all(abs(backend.download(out) - (x - drift)) <= off)


@every_method
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(backend: Backend, method: str) -> None:
    volumes = a_run(80, 513)
    volumes[:, 300:400] -= volumes[0, 300:400]  # where no difference of two values is exact
    volumes[30, 7], volumes[75, 9] = np.nan, np.inf
    usable = np.arange(80) % 9 != 4
    cpu = open_backend("cpu")
    wanted = pushed(cpu, a_stage(cpu, method, 513), volumes, usable)
    got = pushed(backend, a_stage(backend, method, 513), volumes, usable)
    np.testing.assert_array_equal(got, wanted, strict=True)


# --- what it does to drift, to the task and to noise


def share_left(method: str, signal: Floats) -> float:
    """Return the share of the variance over the run that is left of a signal, (n_volumes,)."""
    got = detrended(1000 + signal[:, None], method).astype(np.float64)
    return float(got.var() / signal.var())


SLOW = 3 * np.cos(np.pi * (2.3 * np.arange(N_PLANNED) / N_PLANNED) + 0.4)
LINE = 10 * np.arange(N_PLANNED) / N_PLANNED
"""Ten and three standard deviations of a noise of 1."""


@pytest.mark.parametrize(
    ("method", "of_line", "of_both"),
    [("exponential", 1 / 4, 1 / 2.5), ("linear", 1 / 80, 1 / 6), ("cosine", 1 / 300, 1 / 200)],
)
def test_drift_falls(method: str, of_line: float, of_both: float) -> None:
    # Measured: 1/4.6, 1/104, 1/468 of the line, 1/3.1, 1/7.3, 1/290 with the cosine.
    assert share_left(method, LINE) < of_line
    assert share_left(method, LINE + SLOW) < of_both


def amplitude(got: NDArray[Any], response: Floats) -> float:
    return float(np.polyfit(response, got[:, 0].astype(np.float64), 1)[0])


@every_method
def test_the_task_stays(method: str) -> None:
    response = columns("linear", BLOCKS, N_PLANNED)[0][:, -1]
    task, drift = 20 * response[:, None], (LINE + SLOW)[:, None]
    # A fit that has the task in it leaves it as it is, but for roundings of 1000. Two means over
    # whole blocks hold the same share of it: 0.2 % were measured.
    assert amplitude(detrended(1000 + task, method), response) == pytest.approx(
        20, rel=0.01 if method == "exponential" else 1e-4
    )
    # With drift, what is left of that is told apart from the task as well or as badly as ever.
    left = detrended(1000 + drift, method).astype(np.float64) - 1000
    both = detrended(1000 + task + drift, method)
    assert amplitude(both, response) == pytest.approx(20 + amplitude(left, response), rel=0.01)
    assert abs(amplitude(left, response)) < 1


@fits
def test_a_response_that_is_not_as_expected_stays(method: str) -> None:
    late = np.roll(columns("linear", BLOCKS, N_PLANNED)[0][:, -1], 1)
    got = detrended(1000 + 20 * late[:, None], method)
    # A TR of 2 s late: 4 % too large with a line, 11 % with cosines; what is in the model is not.
    assert amplitude(got, late) == pytest.approx(20, rel=0.06 if method == "linear" else 0.14)
    got = detrended(1000 + 20 * late[:, None], method, hrf="spm + derivative")
    assert amplitude(got, late) == pytest.approx(20, rel=0.02)


@every_method
@pytest.mark.parametrize("paradigm", [BLOCKS, REST], ids=["task", "rest"])
def test_first_volumes_are_stable(method: str, paradigm: Paradigm) -> None:
    noise = np.random.default_rng(4).normal(size=(N_PLANNED, 2000))
    got = detrended(1000 + 10 * noise, method, paradigm).astype(np.float64)
    spread = (got / 10 - 100).std(axis=1)
    # Measured: at most 1.02 in the first 10 volumes, 1.35 when the first block begins.
    assert spread[:10].max() < 1.1
    assert spread.max() < 1.5
    assert abs(got[:10] - 1000).max() < 1.3 * 10 * abs(noise[:10]).max()


@every_method
def test_the_level_stays(method: str) -> None:
    """A line that rises through the run, whose level is that of the start all along."""
    got = detrended(1000 + LINE[:, None] + SLOW[:, None], method).astype(np.float64)[:, 0]
    start = 1000 + SLOW[0]
    limit = {"exponential": 6, "linear": 6, "cosine": 1}[method]
    assert abs(got - start).max() < limit


@every_method
def test_a_mean_over_voxels_can_be_taken_before_or_after(backend: Backend, method: str) -> None:
    volumes = a_run(70, 40)
    mean = volumes.mean(axis=1, keepdims=True, dtype=np.float64)
    together = pushed(backend, a_stage(backend, method, 41), np.hstack([volumes, mean]))
    # float32 of values below 4000, a few roundings each.
    np.testing.assert_allclose(together[:, :40].mean(axis=1), together[:, 40], atol=20 * U * 4000)


# --- what must not matter


@every_method
@pytest.mark.parametrize("value", [5000.0, np.nan])
def test_unusable_volumes_leave_no_trace(backend: Backend, method: str, value: float) -> None:
    volumes = a_run(90, 300)
    others = volumes.copy()
    usable = np.ones(90, np.bool_)
    usable[[0, 1, 20, 21, 80]] = False
    others[~usable] = value
    got, wanted = (
        pushed(backend, a_stage(backend, method, 300), run, usable) for run in (others, volumes)
    )
    np.testing.assert_array_equal(got[usable], wanted[usable])
    # They come out themselves, less the drift of the volume before.
    assert np.isnan(got[80]).all() if math.isnan(value) else np.isfinite(got[80]).all()
    np.testing.assert_array_equal(wanted[:2], volumes[:2])
    if method != "exponential":
        lost = [wanted[i] - volumes[i] for i in (19, 20, 21)]
        np.testing.assert_allclose(lost[1], lost[0], atol=2 * U * 4000)
        np.testing.assert_allclose(lost[2], lost[0], atol=2 * U * 4000)


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_voxel_stays_alone(backend: Backend, method: str, bad: float) -> None:
    clean = a_run(8, 300)
    dirty = clean.copy()
    dirty[4, 150] = bad
    got, wanted = (pushed(backend, a_stage(backend, method, 300), run) for run in (dirty, clean))
    others = np.arange(300) != 150
    np.testing.assert_array_equal(got[:, others], wanted[:, others])


@every_method
def test_it_goes_on_beyond_the_planned_length(method: str) -> None:
    noise = np.random.default_rng(5).normal(1000, 1, (400, 500))
    got = detrended(noise, method, n_volumes=100).astype(np.float64)
    assert abs(got - 1000).max() < 10
    assert got[300:].std() < 1.3


@fits
def test_a_run_of_unknown_length(method: str) -> None:
    volumes = 1000 + np.random.default_rng(6).normal(0, 1, (N_PLANNED, 300)) + LINE[:, None]
    for paradigm in (REST, BLOCKS):
        got = detrended(volumes, method, paradigm, n_volumes=None).astype(np.float64)
        assert got.mean(axis=1)[100:].std() < 0.5
        assert volumes.mean(axis=1)[100:].std() > 1.4


def test_a_run_too_short_for_a_cosine_stays_as_it_is() -> None:
    volumes = a_run(30, 50)
    np.testing.assert_array_equal(detrended(volumes, "cosine", n_volumes=30), volumes)


@every_method
def test_a_volume_costs_no_memory_on_the_backend(method: str) -> None:
    backend = open_backend("cpu")
    stage, volume = a_stage(backend, method, 30), np.ones(30, np.float32)
    first = stage.push(volume, stage.told(0))
    assert stage.push(volume, stage.told(1)) is first
    assert first is not volume
    assert stage.told(2).ndim == 2  # not the shape of anything else that is uploaded


# --- settings


def test_off_is_no_method_of_detrending() -> None:
    with pytest.raises(ConfigError, match=r"detrend\.method must not be 'off'"):
        a_stage(open_backend("cpu"), "off", 1)


def test_too_many_cosines_are_refused() -> None:
    with pytest.raises(ConfigError, match="detrend: a design has at most 128 columns"):
        a_stage(open_backend("cpu"), "cosine", 1, n_volumes=10_000)


def test_settings_are_checked() -> None:
    assert DetrendSettings().method == "off"
    with pytest.raises(ConfigError, match="method should be"):
        DetrendSettings(method="quadratic")
    with pytest.raises(ConfigError, match="period_s should be"):
        DetrendSettings(period_s=5)

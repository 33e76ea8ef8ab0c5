"""Slices moved in time on every backend, against polynomials in float64 and a known sinusoid."""

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import U
from rtfmri.backends import Backend, open_backend
from rtfmri.errors import ConfigError
from rtfmri.stages.slice_timing import N_POINTS, SliceTimingStage, time_weights

Method = Literal["linear", "cubic"]
SHAPES = [(12, 9, 7), (33, 1, 5), (1, 1, 1), (5, 3, 1), (40, 20, 11)]
TR_S = 1.5
every_dtype = pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
every_method = pytest.mark.parametrize("method", ["linear", "cubic"])
every_shape = pytest.mark.parametrize("shape", SHAPES)


def interleaved_s(n_slices: int) -> NDArray[np.float64]:
    """Odd slices first, from the start of the volume to just before its end."""
    order = np.r_[0:n_slices:2, 1:n_slices:2]
    times_s = np.empty(n_slices)
    times_s[order] = np.arange(n_slices) * TR_S / n_slices
    return times_s


def a_run(shape: tuple[int, int, int], dtype: str, n_volumes: int = 7) -> NDArray[Any]:
    """Return volumes of noise, (n_volumes, n_voxels)."""
    rng = np.random.default_rng(0)
    return rng.uniform(500, 1500, (n_volumes, int(np.prod(shape)))).astype(dtype)


def retimed(
    backend: Backend,
    run: NDArray[Any],
    shape: tuple[int, int, int],
    method: Method,
    indices: list[int] | None = None,
) -> NDArray[np.float32]:
    times_s = interleaved_s(shape[2]).tolist()
    stage = SliceTimingStage(backend, shape, TR_S, times_s, method, run.dtype)
    return np.stack(
        [
            backend.download(stage.push(backend.upload(volume), index))
            for index, volume in zip(indices or range(len(run)), run, strict=True)
        ]
    )


def reference(run: NDArray[Any], shape: tuple[int, int, int], n_points: int) -> NDArray[Any]:
    """Solve for the polynomial through the last *n_points* volumes; its constant is the value."""
    slices = run[-n_points:].astype(np.float64).reshape(n_points, shape[2], -1)
    taken = np.arange(1 - n_points, 1) + interleaved_s(shape[2])[:, None] / TR_S
    powers = taken[:, :, None] ** np.arange(n_points)
    return np.linalg.solve(powers, slices.swapaxes(0, 1))[:, 0].ravel()


def error_bound(run: NDArray[Any], n_points: int) -> float:
    """Each term rounds its weight and its product, and is part of n_points - 1 roundings more.

    Weights add up to 1, and for the cubic to at most 1.64 without their signs.
    """
    return 1.01 * (n_points + 1) * U * 1.64 * float(np.abs(run).max())


@every_dtype
@every_method
@every_shape
def test_it_is_the_polynomial_through_the_newest_volumes(
    backend: Backend, shape: tuple[int, int, int], method: Method, dtype: str
) -> None:
    run = a_run(shape, dtype)
    got = retimed(backend, run, shape, method)
    assert got.dtype == np.float32
    for n in range(1, len(run) + 1):
        n_points = min(n, N_POINTS[method])
        wanted = reference(run[:n], shape, n_points)
        assert np.abs(got[n - 1] - wanted).max() <= error_bound(run, n_points)
    # The first volume, and slices taken at the start, are as they came.
    assert np.array_equal(got[0], run[0].astype(np.float32))
    n_plane = shape[0] * shape[1]
    assert np.array_equal(got[:, :n_plane], run[:, :n_plane].astype(np.float32))


@every_dtype
@every_method
@every_shape
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(
    backend: Backend, shape: tuple[int, int, int], method: Method, dtype: str
) -> None:
    run = a_run(shape, dtype)
    wanted = retimed(open_backend("cpu"), run, shape, method)
    assert np.array_equal(retimed(backend, run, shape, method), wanted)


@pytest.mark.parametrize(("method", "factorial"), [("linear", 2), ("cubic", 24)])
def test_a_sinusoid_comes_out_as_it_was_when_the_volumes_began(
    backend: Backend, method: Method, factorial: int
) -> None:
    shape, n_volumes, omega = (3, 2, 10), 30, 2 * np.pi / 14  # a period of 14 s

    def signal(time_s: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1000 + 100 * np.sin(omega * time_s)

    starts_s, times_s = np.arange(n_volumes) * TR_S, interleaved_s(shape[2])
    run = signal(starts_s[:, None] + times_s).astype(np.float32).repeat(6, axis=1)
    n_points = N_POINTS[method]
    got = retimed(backend, run, shape, method)[n_points - 1 :]
    error = np.abs(got - signal(starts_s)[n_points - 1 :, None]).reshape(len(got), -1, 6)
    # Interpolation: |product of the distances to the points| * |n-th derivative| / n!, the points
    # being 0, 1, 2, 3 TR before the newest; then rounding, of the signal too.
    distances_s = np.abs(times_s[:, None] - np.arange(n_points) * TR_S)
    bound = distances_s.prod(1) * 100 * omega**n_points / factorial
    assert (error <= bound[:, None] + 2 * error_bound(run, n_points)).all()
    # Without it, errors are larger than that wherever a slice was late.
    before = np.abs(run - signal(starts_s)[:, None]).max(0).reshape(-1, 6)[:, 0]
    assert (before[1:] > 2 * bound[1:]).all()


@every_method
def test_after_a_gap_it_begins_anew(backend: Backend, method: Method) -> None:
    shape = (12, 9, 7)
    run = a_run(shape, "int16", 11)
    got = retimed(backend, run, shape, method, [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 12])
    for first, last in ((0, 5), (5, 10), (10, 11)):
        wanted = retimed(backend, run[first:last], shape, method)
        assert np.array_equal(got[first:last], wanted)


def test_what_is_not_a_number_leaves_with_the_memory(backend: Backend) -> None:
    shape = (3, 3, 5)
    run = a_run(shape, "float32", 7)
    clean = retimed(backend, run, shape, "cubic")
    run[1, 13] = np.nan
    got = retimed(backend, run, shape, "cubic")
    others = np.arange(45) != 13
    assert np.array_equal(got[:, others], clean[:, others])
    assert np.isnan(got[1:5, 13]).all()
    assert np.array_equal(got[5:], clean[5:])
    # After a gap nothing of it is read, however recent.
    assert np.isfinite(retimed(backend, run[:3], shape, "cubic", [0, 1, 5])[2]).all()


def test_a_3d_readout_has_one_time_for_all_slices(backend: Backend) -> None:
    stage = SliceTimingStage(backend, (1, 1, 3), 2.0, [1.0] * 3, "linear", np.int16)
    stage.push(backend.upload(np.array([100, 200, 300], np.int16)), 0)
    got = stage.push(backend.upload(np.array([110, 180, 300], np.int16)), 1)
    assert backend.download(got).tolist() == [105, 190, 300]


def test_the_number_of_threads_changes_nothing() -> None:
    shape = (40, 40, 30)
    run = a_run(shape, "int16")
    try:
        one = open_backend("cpu", 1)
        expected = retimed(one, run, shape, "cubic")
        assert np.array_equal(retimed(open_backend("cpu"), run, shape, "cubic"), expected)
    finally:
        open_backend("cpu")


def test_weights_are_textbook() -> None:
    fractions = np.array([0.0, 0.5, 1.0])
    assert time_weights(fractions, 1).tolist() == [[1, 1, 1]]
    assert time_weights(fractions, 2).tolist() == [[1, 0.5, 0], [0, 0.5, 1]]
    # Half-way, the cubic's are those of the midpoint at an end: (5, 15, -5, 1) / 16.
    assert time_weights([0.5], 4).ravel().tolist() == [0.3125, 0.9375, -0.3125, 0.0625]
    many = time_weights(np.linspace(0, 1, 101), 4)
    assert many.dtype == np.float32
    np.testing.assert_allclose(many.sum(0, dtype=np.float64), 1, rtol=0, atol=4 * U)


@pytest.mark.parametrize(
    ("times_s", "words"),
    [
        (None, "headers have none.*SliceTiming"),
        ([0.0, 0.5], "each of 3 slices, got 2"),
        ([0.0, 0.5, 2.1], "from 0 to the TR of 2 s, got 0 to 2.1 s"),
        ([0.0, 0.5, -0.1], "from 0 to the TR"),
        ([0.0, 0.5, float("nan")], "from 0 to the TR"),
    ],
)
def test_unusable_slice_times_are_refused(times_s: list[float] | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SliceTimingStage(open_backend("cpu"), (2, 2, 3), 2.0, times_s, "cubic", np.int16)

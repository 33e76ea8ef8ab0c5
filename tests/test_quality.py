"""Inspecting, comparing, judging and tracking volumes on every backend, against exact sums."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import U, moments_error
from rtfmri.backends import SLICE_FIELDS, Backend, Moments, open_backend

U64 = 2.0**-53
SHAPES = [(1, 1, 1), (33, 1, 5), (70, 65, 3)]  # the last has two chunks a slice
SIZES = (1, 31, 257, 20_011)
every_dtype = pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_size = pytest.mark.parametrize("n_voxels", SIZES)


def a_volume(shape: tuple[int, int, int], dtype: str, seed: int = 0) -> NDArray[Any]:
    """Few different values, so that many are the largest; floats have some that are no numbers."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(0, 40, math.prod(shape)).astype(dtype)
    if dtype == "float32":
        volume = (volume * np.float32(33.3)).astype(np.float32)
        if volume.size > 9:
            volume[rng.integers(0, volume.size, volume.size // 9)] = np.nan
            volume[3], volume[7] = np.inf, -np.inf
    return volume


def voxels(n_voxels: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(1000, 100, n_voxels).astype(np.float32)


def inspected(
    backend: Backend, volume: NDArray[Any], shape: tuple[int, int, int]
) -> NDArray[np.float64]:
    slices = backend.copy(np.full((shape[2] + 1, len(SLICE_FIELDS)), 77.0))
    backend.inspect(backend.upload(volume), shape, slices)
    return backend.download(slices)


def compared(
    backend: Backend, volume: NDArray[np.float32], previous: NDArray[np.float32]
) -> NDArray[np.float64]:
    sums = backend.copy(np.full(2, 77.0))
    backend.compare(backend.copy(volume), backend.copy(previous), sums)
    return backend.download(sums)


def sum_error(terms: list[float]) -> float:
    """Bound the error of a float64 sum: every addition is off by U64 of at most the sum of sizes.

    16 additions in a lane of a chunk, 8 in the tree, as many as there are chunks.
    """
    n_chunks = -(-len(terms) // 4096)
    return 1.01 * (24 + 8 + n_chunks) * U64 * math.fsum(abs(term) for term in terms)


# --- inspect


@every_dtype
@every_shape
def test_each_slice_and_the_whole_volume(
    backend: Backend, shape: tuple[int, int, int], dtype: str
) -> None:
    check_inspected(backend, a_volume(shape, dtype), shape)


def test_more_slices_than_threads_in_a_block(backend: Backend) -> None:
    check_inspected(backend, a_volume((2, 1, 270), "float32"), (2, 1, 270))


def check_inspected(backend: Backend, volume: NDArray[Any], shape: tuple[int, int, int]) -> None:
    got = inspected(backend, volume, shape)
    for row, values in zip(got, [*volume.reshape(shape[2], -1), volume], strict=True):
        finite = values[np.isfinite(values)].astype(np.float64)
        largest = finite.max(initial=-np.inf)
        counts = (finite == largest).sum(), values.size - finite.size
        assert row[1:].tolist() == [largest, *counts]
        wanted, error = math.fsum(finite), sum_error(finite.tolist())
        assert abs(row[0] - wanted) <= (error if volume.dtype == np.float32 else 0)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("int16", -32768, 32767), ("uint16", 0, 65535)]
)
def test_the_ends_of_the_integer_types(backend: Backend, dtype: str, low: int, high: int) -> None:
    n_plane = 80 * 60
    volume = np.repeat(np.array([low, high], dtype), n_plane)
    got = inspected(backend, volume, (80, 60, 2))
    wanted = [
        [low * n_plane, low, n_plane, 0],
        [high * n_plane, high, n_plane, 0],
        [(low + high) * n_plane, high, n_plane, 0],
    ]
    assert got.tolist() == wanted


def test_a_slice_without_a_number_has_no_largest(backend: Backend) -> None:
    volume = np.array([np.nan, np.inf, 5, 5], np.float32)
    got = inspected(backend, volume, (2, 1, 2))
    assert got.tolist() == [[0, -np.inf, 0, 2], [10, 5, 2, 0], [10, 5, 2, 2]]


def test_every_volume_is_inspected_anew(backend: Backend) -> None:
    shape = (70, 65, 3)
    for seed in (1, 2, 1):
        volume = a_volume(shape, "int16", seed)
        assert inspected(backend, volume, shape)[-1, 0] == volume.sum(dtype=np.int64)


# --- compare


@every_size
def test_compare_sums_up(backend: Backend, n_voxels: int) -> None:
    volume, previous = voxels(n_voxels), voxels(n_voxels, seed=1)
    total, squares = compared(backend, volume, previous)
    x, before = volume.astype(np.float64), previous.astype(np.float64)
    assert abs(total - math.fsum(x)) <= sum_error(x.tolist())
    # Differences of two float32 are off by U64, their squares by 3 of them at most.
    terms = ((x - before) ** 2).tolist()
    wanted = math.fsum(terms)
    assert abs(squares - wanted) <= sum_error(terms) + 4 * U64 * wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_compare_leaves_out_what_is_not_finite(backend: Backend, bad: float) -> None:
    volume = np.array([5, bad, 7], np.float32)
    assert compared(backend, volume, np.array([2, 3, 3], np.float32)).tolist() == [12, 25]


# --- judge


@pytest.mark.parametrize("n", [1, 256, 1000])
@pytest.mark.parametrize(
    ("value", "low", "high", "wanted"),
    [
        (3.0, 3.0, 3.0, 1),
        (3.0, -np.inf, np.inf, 1),
        (-np.inf, -np.inf, np.inf, 1),
        (3.0, np.nextafter(3.0, 4.0), np.inf, 0),
        (3.0, -np.inf, np.nextafter(3.0, 2.0), 0),
        (np.nan, -np.inf, np.inf, 0),
    ],
)
def test_one_value_beyond_its_limits_is_enough(
    backend: Backend, n: int, value: float, low: float, high: float, wanted: int
) -> None:
    values, limits = np.zeros(n), np.array([np.full(n, -1.0), np.full(n, 1.0)])
    for place in {0, n // 2, n - 1}:
        these, within = values.copy(), limits.copy()
        these[place], within[:, place] = value, (low, high)
        usable = backend.copy(np.full(1, 0.5, np.float32))
        backend.judge(backend.copy(these), backend.copy(within), usable)
        assert backend.download(usable).tolist() == [wanted]


# --- track


class Tracked:
    """The arrays that `track` keeps."""

    def __init__(self, backend: Backend, n_voxels: int) -> None:
        self.backend = backend
        self.previous, self.successive = backend.zeros(n_voxels), backend.zeros(n_voxels)
        self.moments = Moments(backend.zeros(n_voxels), backend.zeros(n_voxels))

    def push(
        self, volume: NDArray[np.float32], gain: float, successive_gain: float, usable: float = 1
    ) -> None:
        self.backend.track(
            self.backend.copy(volume),
            self.previous,
            self.moments,
            self.successive,
            usable=self.backend.copy(np.full(1, usable, np.float32)),
            gain=gain,
            successive_gain=successive_gain,
        )

    def arrays(self) -> list[NDArray[np.float32]]:
        kept = (self.previous, *self.moments, self.successive)
        return [self.backend.download(array) for array in kept]


@every_size
def test_track_keeps_moments_and_successive_differences(backend: Backend, n_voxels: int) -> None:
    volumes = np.stack([voxels(n_voxels, seed) for seed in range(9)])
    tracked = Tracked(backend, n_voxels)
    for n, volume in enumerate(volumes):
        tracked.push(volume, 1 / (n + 1), 1 / n if n else 0.0)
    previous, mean, variance, successive = tracked.arrays()
    assert np.array_equal(previous, volumes[-1])
    x = volumes.astype(np.float64)
    mean_error, variance_error = moments_error(volumes, [1 / n for n in range(1, 10)])
    assert (np.abs(mean - x.mean(0)) <= mean_error).all()
    assert (np.abs(variance - x.var(0)) <= variance_error).all()
    squares = np.diff(x, axis=0) ** 2
    # A step of the mean rounds the difference (twice in its square), the square, the step (weight,
    # subtraction, product) and the sum: 7 roundings of at most the largest square, 8 steps.
    error = 1.01 * 8 * 7 * U * squares.max(0)
    assert (np.abs(successive - squares.mean(0)) <= error).all()


def test_what_is_not_usable_only_becomes_the_previous(backend: Backend) -> None:
    tracked = Tracked(backend, 300)
    tracked.push(voxels(300, 0), 1.0, 0.0)
    tracked.push(voxels(300, 1), 0.5, 1.0)
    before = tracked.arrays()
    tracked.push(voxels(300, 2), 1 / 3, 0.5, usable=0)
    after = tracked.arrays()
    assert np.array_equal(after[0], voxels(300, 2))
    for got, wanted in zip(after[1:], before[1:], strict=True):
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize("usable", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_voxel_stays_as_it_was(backend: Backend, bad: float, usable: float) -> None:
    tracked = Tracked(backend, 300)
    tracked.push(voxels(300, 0), 1.0, 0.0)
    tracked.push(voxels(300, 1), 0.5, 1.0)
    before = tracked.arrays()
    dirty = voxels(300, 2)
    dirty[17] = bad
    tracked.push(dirty, 1 / 3, 0.5, usable)
    for got, was in zip(tracked.arrays(), before, strict=True):
        assert got[17] == was[17]
        assert np.isfinite(got).all()
    assert np.array_equal(np.delete(tracked.arrays()[0], 17), np.delete(dirty, 17))


def test_a_gain_of_zero_leaves_a_volume_out(backend: Backend) -> None:
    tracked = Tracked(backend, 2)
    tracked.push(np.array([1e30, -1e30], np.float32), 0.0, 0.0)  # its square would be infinite
    assert [array.tolist() for array in tracked.arrays()[1:]] == [[0, 0]] * 3


# --- all backends agree to the last bit


def every_operation(backend: Backend) -> list[NDArray[Any]]:
    shape, n_voxels = (70, 65, 11), 9001
    results = [inspected(backend, a_volume(shape, d), shape) for d in ("uint16", "float32")]
    tracked = Tracked(backend, n_voxels)
    for n in range(4):
        volume = voxels(n_voxels, n)
        volume[n * 1000] = np.nan
        tracked.push(volume, 1 / (n + 1), 1 / n if n else 0.0, usable=float(n != 2))
        results += [*tracked.arrays(), compared(backend, volume, tracked.arrays()[0][::-1].copy())]
    return results


@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(backend: Backend) -> None:
    wanted = every_operation(open_backend("cpu"))
    for got, array in zip(every_operation(backend), wanted, strict=True):
        np.testing.assert_array_equal(got, array, strict=True)


def test_the_number_of_threads_changes_nothing() -> None:
    try:
        wanted = every_operation(open_backend("cpu", 1))
        for got, array in zip(every_operation(open_backend("cpu")), wanted, strict=True):
            np.testing.assert_array_equal(got, array, strict=True)
    finally:
        open_backend("cpu")

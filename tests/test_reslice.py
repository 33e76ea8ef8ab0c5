"""Reslicing and gathering on every backend, against float64 and scipy."""

import functools
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import Floats, U
from rtfmri.backends import Backend, Region, Shape, open_backend
from rtfmri.config import Interpolation
from rtfmri.stages.region import bounding_box, copied_to, region_of

ndimage = pytest.importorskip("scipy.ndimage")
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
# The last is longer than what the cpu backend keeps of a line.
SHAPES = [(20, 17, 12), (35, 1, 5), (1, 9, 7), (9, 7, 1), (1, 1, 1), (2, 2, 2), (600, 3, 2)]
RANGES = {"int16": (-30_000, 30_000), "uint16": (0, 65_000), "float32": (-1.5, 1.5)}
MOTIONS = {
    "none": ((0, 0, 0), (0, 0, 0)),
    "small": ((0.3, -0.2, 0.4), (0.31, 0.22, -0.43)),
    "large": ((30, -30, 30), (1.3, 2.7, -0.6)),
    "upside-down": ((179, 90, -91), (0.5, 0.5, 0.5)),
    "far": ((3, 2, 1), (1e5, -1e30, 3)),
}
every_dtype = pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
every_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def a_volume(shape: Shape, dtype: str) -> NDArray[Any]:
    return np.random.default_rng(0).uniform(*RANGES[dtype], shape).astype(dtype, order="F")


def a_matrix(shape: Shape, motion: str) -> Floats:
    """Rotations about x, y, z (degrees) and then a translation (voxels), about the centre."""
    degrees, shift = MOTIONS[motion]
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        cos, sin = np.cos(angle), np.sin(angle)
        about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        rotation = np.roll(about_x, axis, (0, 1)) @ rotation
    centre = (np.array(shape) - 1) / 2
    return np.column_stack([rotation, centre - rotation @ centre + shift])


def resliced(
    backend: Backend,
    volume: NDArray[Any],
    matrix: Floats,
    interpolation: Interpolation,
    region: Region | None = None,
    n_out: int | None = None,
) -> NDArray[np.float32]:
    """Flat where there is a region; what it does not write is nan."""
    whole = region_of(np.ones(volume.shape, np.bool_))
    out = backend.copy(np.full(n_out or volume.size, np.nan, np.float32))
    backend.reslice(
        backend.upload(volume.reshape(-1, order="F")),
        volume.shape,
        backend.copy(matrix.reshape(-1)),
        interpolation,
        copied_to(backend, region or whole),
        out,
    )
    got = backend.download(out)
    assert got.dtype == np.float32
    return got if region else got.reshape(volume.shape, order="F")


def places(shape: Shape, matrix: Floats) -> Floats:
    """Where each voxel comes from, (3, x, y, z), kept inside."""
    moved = np.tensordot(matrix[:, :3], np.indices(shape), 1) + matrix[:, 3, None, None, None]
    last = np.array(shape)[:, None, None, None] - 1
    return np.clip(moved, 0, last)


def catmull_rom(volume: NDArray[Any], at: Floats) -> Floats:
    """Cubic convolution with a = -1/2, from the two branches of its kernel (Keys 1981)."""

    def kernel(distance: Floats) -> Floats:
        s = np.abs(distance)
        near = 1.5 * s**3 - 2.5 * s**2 + 1
        far = -0.5 * s**3 + 2.5 * s**2 - 4 * s + 2
        return np.where(s <= 1, near, np.where(s <= 2, far, 0))

    padded = np.pad(volume.astype(np.float64), 3, mode="symmetric")
    whole = np.floor(at).astype(int)
    total = np.zeros(at.shape[1:])
    for steps in product((-1, 0, 1, 2), repeat=3):
        i = whole + np.reshape(steps, (3, 1, 1, 1))
        total += kernel(at - i).prod(0) * padded[tuple(i + 3)]
    return total


def reference(volume: NDArray[Any], matrix: Floats, interpolation: Interpolation) -> Floats:
    at = places(volume.shape, matrix)
    if interpolation == "catmull-rom":
        return catmull_rom(volume, at)
    order = 1 if interpolation == "trilinear" else 3
    exact = volume.astype(np.float64)
    return ndimage.map_coordinates(exact, at, order=order, mode="reflect", prefilter=False)


def error_bound(volume: NDArray[Any], matrix: Floats, interpolation: Interpolation) -> float:
    """Bound the error of float32 places, weights and sums.

    A displacement d = b + s x is off by the rounding of b and s, of the product and of the sum;
    what is clamped is exact, and no displacement inside exceeds the grid. A place that is off
    matters as much as the sum of the weights' absolute slopes along its axis, at most `steepest`.
    The errors of an axis's weights add up to 3 U a weight at most (8 U of 12 U for catmull-rom,
    7 U of 12 U for bspline, 1 U of 6 U for trilinear), and a sum of n products takes n roundings
    of each. All of it grows along each other axis by the sum of absolute weights, `total`.
    """
    taps, steepest, total = {
        "trilinear": (2, 2.0, 1.0),
        "catmull-rom": (4, 3.0, 1.25),
        "bspline": (4, 1.5, 1.0),
    }[interpolation]
    size, largest = np.array(volume.shape), float(np.abs(volume.astype(np.float64)).max())
    base = np.abs(matrix - np.eye(3, 4)) @ [0, *(size[1:] - 1), 1]
    line = np.abs(matrix[:, 0] - [1, 0, 0]) * (size[0] - 1)
    free = base + line
    # A base beyond the grid by more than the line can bring back is clamped, however rounded.
    inside = np.minimum(base, size + line)
    off = U * (inside + 2 * line + np.minimum(free, size + line)).sum()
    of_places = off * steepest * total**2
    of_weights = 3 * taps * 3 * U * total**2
    of_sums = 3 * taps * U * total**3
    return 1.01 * largest * (of_places + of_weights + of_sums)


@functools.cache
def _expected(interpolation: Interpolation, shape: Shape, motion: str) -> Floats:
    return reference(a_volume(shape, "float32"), a_matrix(shape, motion), interpolation)


@every_shape
@every_interpolation
def test_it_is_what_float64_gives(
    backend: Backend, interpolation: Interpolation, shape: Shape
) -> None:
    volume = a_volume(shape, "float32")
    for motion in MOTIONS:
        matrix = a_matrix(shape, motion)
        got = resliced(backend, volume, matrix, interpolation)
        off = got - _expected(interpolation, shape, motion)
        assert np.abs(off).max() <= error_bound(volume, matrix, interpolation), motion


@every_dtype
@pytest.mark.parametrize("interpolation", ["trilinear", "catmull-rom"])
def test_every_type_of_voxel(backend: Backend, interpolation: Interpolation, dtype: str) -> None:
    volume, matrix = a_volume((20, 17, 12), dtype), a_matrix((20, 17, 12), "small")
    got = resliced(backend, volume, matrix, interpolation)
    wanted = reference(volume, matrix, interpolation)
    assert np.abs(got - wanted).max() <= error_bound(volume, matrix, interpolation)


def test_a_spline_goes_through_its_voxels_again(backend: Backend) -> None:
    volume = a_volume((20, 17, 12), "float32")
    exact = ndimage.spline_filter(volume.astype(np.float64), order=3, mode="reflect")
    coefficients = np.asfortranarray(exact, np.float32)
    matrix = np.eye(3, 4)
    got = resliced(backend, coefficients, matrix, "bspline")
    # The coefficients were rounded, too.
    bound = error_bound(coefficients, matrix, "bspline") + U * float(np.abs(exact).max())
    assert np.abs(got - volume).max() <= bound


# --- what must be exact


@every_dtype
@every_shape
@pytest.mark.parametrize("interpolation", ["trilinear", "catmull-rom"])
def test_without_motion_voxels_stay_what_they_are(
    backend: Backend, interpolation: Interpolation, shape: Shape, dtype: str
) -> None:
    volume = a_volume(shape, dtype)
    assert np.array_equal(resliced(backend, volume, np.eye(3, 4), interpolation), volume)


@pytest.mark.parametrize("interpolation", ["trilinear", "catmull-rom"])
@pytest.mark.parametrize("shift", [(1, 0, 0), (-2, 3, 1), (5, -4, -7), (25, -25, 2)])
def test_whole_voxels_are_exact(
    backend: Backend, interpolation: Interpolation, shift: tuple[int, int, int]
) -> None:
    volume, matrix = a_volume((20, 17, 12), "int16"), np.eye(3, 4)
    matrix[:, 3] = shift
    x, y, z = places(volume.shape, matrix).astype(int)
    assert np.array_equal(resliced(backend, volume, matrix, interpolation), volume[x, y, z])


def test_a_constant_stays_constant(backend: Backend) -> None:
    volume = np.full((20, 17, 12), 1000, np.float32, order="F")
    for interpolation, motion in product(INTERPOLATIONS, MOTIONS):
        matrix = a_matrix(volume.shape, motion)
        got = resliced(backend, volume, matrix, interpolation)
        assert np.abs(got - 1000).max() <= error_bound(volume, np.eye(3, 4), interpolation)


def test_places_are_as_precise_at_the_end_of_a_line_as_at_its_start(backend: Backend) -> None:
    # Between a 0 and a 1, the result is the place itself.
    volume = np.zeros((500, 2, 2), np.float32, order="F")
    volume[1::2] = 1
    matrix = np.eye(3, 4)
    matrix[0, 0], matrix[0, 3] = 1 - 1e-3 / 3, 2.3
    at = places(volume.shape, matrix)[0]
    wanted = np.where(np.floor(at) % 2 == 0, at % 1, 1 - at % 1)
    got = resliced(backend, volume, matrix, "trilinear")
    # Two voxels are a base of 2.3, rounded, and two roundings of less; weights and sums add 8.
    assert np.abs(got - wanted).max() <= (4 + 2 + 2 + 8) * U


# --- regions, backends, threads


def every_result(backend: Backend, shape: Shape, motion: str) -> list[NDArray[np.float32]]:
    """Short runs of a mask into a box, by each interpolation."""
    mask = np.random.default_rng(1).random(shape) < 0.7
    mask[0, 0, 0] = True
    mask[:, : shape[1] // 2] = True
    box = bounding_box(mask)
    region, matrix = region_of(mask, targets=box), a_matrix(shape, motion)
    return [
        resliced(backend, a_volume(shape, dtype), matrix, interpolation, region, box.n_voxels)
        for interpolation, dtype in (*product(INTERPOLATIONS[:2], RANGES), ("bspline", "float32"))
    ]


@every_shape
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(backend: Backend, shape: Shape) -> None:
    for motion in MOTIONS:
        wanted = every_result(open_backend("cpu"), shape, motion)
        for got, array in zip(every_result(backend, shape, motion), wanted, strict=True):
            np.testing.assert_array_equal(got, array, strict=True)


def test_the_number_of_threads_changes_nothing() -> None:
    shape = (40, 40, 30)
    try:
        expected = every_result(open_backend("cpu", 1), shape, "small")
        for got, array in zip(
            every_result(open_backend("cpu"), shape, "small"), expected, strict=True
        ):
            assert np.array_equal(got, array, equal_nan=True)
    finally:
        open_backend("cpu")


@every_interpolation
def test_a_region_is_resliced_as_the_whole_is(
    backend: Backend, interpolation: Interpolation
) -> None:
    volume, matrix = a_volume((20, 17, 12), "float32"), a_matrix((20, 17, 12), "small")
    whole = resliced(backend, volume, matrix, interpolation)
    mask = np.random.default_rng(1).random(volume.shape) < 0.3
    box = bounding_box(mask)
    got = resliced(backend, volume, matrix, interpolation, region_of(mask, targets=box), 99_999)
    wanted = np.where(mask, whole, np.nan)[box.slices].reshape(-1, order="F")
    assert np.array_equal(got[: box.n_voxels], wanted, equal_nan=True)
    assert np.isnan(got[box.n_voxels :]).all()


@every_dtype
@every_shape
@pytest.mark.parametrize("scaled", [False, True])
def test_gather(backend: Backend, shape: Shape, dtype: str, scaled: bool) -> None:
    volume, rng = a_volume(shape, dtype), np.random.default_rng(1)
    mask = rng.random(shape) < 0.6
    mask[0, 0, 0] = True
    factors = rng.uniform(0.5, 2, mask.sum()).astype(np.float32) if scaled else None
    box = bounding_box(mask)
    boxed, compact = (np.full(box.n_voxels, np.nan, np.float32) for _ in range(2))
    raw = np.asfortranarray(volume[box.slices]).reshape(-1, order="F")
    for flat, region, wanted in (
        (volume.reshape(-1, order="F"), region_of(mask, targets=box), boxed),
        (raw, region_of(mask, sources=box), compact),
    ):
        out = backend.copy(np.full(wanted.size, np.nan, np.float32))
        on_backend = copied_to(backend, region)
        scale = None if factors is None else backend.copy(factors)
        backend.gather(backend.upload(flat), on_backend, scale, out)
        values = flat[region.sources].astype(np.float32)
        wanted[region.targets] = values if factors is None else values * factors
        np.testing.assert_array_equal(backend.download(out), wanted, strict=True)


def test_an_empty_region_changes_nothing(backend: Backend) -> None:
    region = copied_to(backend, region_of(np.zeros((3, 4, 5), np.bool_)))
    volume, out = backend.copy(np.ones(60, np.int16)), backend.zeros(3)
    matrix = backend.copy(np.eye(3, 4).reshape(-1))
    backend.reslice(volume, (3, 4, 5), matrix, "trilinear", region, out)
    backend.gather(volume, region, None, out)
    assert backend.download(out).tolist() == [0, 0, 0]

"""Volume and Grid: axes, affine and clocks, said once.

Axes
    Public arrays are ``(x, y, z)`` with x fastest in memory (Fortran order), so that a scanner's
    buffer is used as it came. ``Volume.flat`` is the same memory in one dimension.
Affine
    ``Grid.affine`` maps a voxel index ``(i, j, k)`` to scanner millimetres, RAS+ (x grows to the
    participant's right, y to the front, z to the top), as in nibabel.
    DICOM's LPS+ is turned by the reader.
Clocks
    ``arrived_s`` and ``decoded_s`` are `time.perf_counter` seconds of this process;
    ``acquired_s`` is the scanner's own time of day, in seconds since its midnight.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfmri.errors import GridError, VolumeError

VOXEL_DTYPES = (np.dtype(np.int16), np.dtype(np.uint16), np.dtype(np.float32))
"""The voxel types a volume may have; they go to the kernels unconverted."""

AFFINE_TOLERANCE_MM = 1e-3
"""Grids whose corners differ by less than this are one grid (headers are rounded to text)."""


OTHER_SHAPE = "another shape or position than the run's first volume"
TR_TOLERANCE_S = 1e-4
"""TRs that differ by less are one TR."""


@dataclass(frozen=True, eq=False, slots=True)
class Grid:
    """Shape and position of a volume.

    Parameters
    ----------
    shape : (int, int, int)
        Number of voxels along x, y, z.
    affine : (4, 4) float64
        Voxel index to scanner mm, RAS+.

    Raises
    ------
    GridError
        If the shape is not three positive numbers or the affine is not finite and invertible.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GridError(f"shape must be three positive numbers, got {shape}")
        affine = np.array(self.affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GridError(f"affine must be 4x4 and finite, got {affine.tolist()}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise GridError(f"affine must be invertible, got {affine.tolist()}")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def n_voxels(self) -> int:
        """Number of voxels."""
        return int(np.prod(self.shape))

    @property
    def voxel_size_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel along x, y, z, in mm."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        return float(x), float(y), float(z)

    def matches(self, other: "Grid") -> bool:
        """Tell whether *other* has the same shape and all its corners within 1 micrometre."""
        if self is other:
            return True
        if self.shape != other.shape:
            return False
        if np.array_equal(self.affine, other.affine):
            return True
        corners = np.array(np.meshgrid(*((0, n - 1) for n in self.shape))).reshape(3, -1)
        moved = (self.affine - other.affine) @ np.vstack([corners, np.ones(corners.shape[1])])
        return bool(np.abs(moved).max() < AFFINE_TOLERANCE_MM)

    def __str__(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        size = "x".join(f"{s:.3g}" for s in self.voxel_size_mm)
        return f"{shape} voxels of {size} mm"


@dataclass(frozen=True, eq=False, slots=True)
class Volume:
    """One 3-D image as the scanner delivered it.

    Parameters
    ----------
    data : (x, y, z) int16, uint16 or float32
        Fortran-ordered, in scanner units.
    grid : Grid
        Its shape and position.
    index : int
        Position in the run, from 0, as the scanner counts it (not as it arrived).
    tr_s : float
        Time between volumes in seconds.
    acquired_s : float or None
        Scanner's time of day of this volume in seconds since midnight, where the header has it.
    slice_times_s : tuple of float, or None
        Acquisition start of each slice along the third axis, in seconds after the volume's, where
        the header has them.
    arrived_s, decoded_s : float
        `time.perf_counter` when its last byte was here, and when it became this object; both now
        by default.

    Raises
    ------
    VolumeError
        If dtype, memory order, shape, index, TR or slice times break the rules above.
    """

    data: NDArray[Any]
    grid: Grid
    index: int
    tr_s: float
    acquired_s: float | None = None
    slice_times_s: tuple[float, ...] | None = None
    arrived_s: float = field(default_factory=time.perf_counter)
    decoded_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.data.dtype not in VOXEL_DTYPES:
            names = ", ".join(str(d) for d in VOXEL_DTYPES)
            raise VolumeError(f"dtype must be one of {names}, got {self.data.dtype}")
        if self.data.shape != self.grid.shape:
            raise VolumeError(f"data is {self.data.shape} but its grid is {self.grid.shape}")
        if not self.data.flags.f_contiguous:
            raise VolumeError("data must be x fastest in memory (Fortran order)")
        if self.index < 0:
            raise VolumeError(f"index must be 0 or more, got {self.index}")
        if not self.tr_s > 0:
            raise VolumeError(f"tr_s must be above 0, got {self.tr_s}")
        if self.slice_times_s is not None:
            if len(self.slice_times_s) != self.grid.shape[2]:
                raise VolumeError(
                    f"slice_times_s must have one time for each of {self.grid.shape[2]} slices, "
                    f"got {len(self.slice_times_s)}"
                )
            if not all(0 <= time_s < math.inf for time_s in self.slice_times_s):
                raise VolumeError(
                    f"slice_times_s must be finite and 0 or more, got {self.slice_times_s}"
                )

    def check_like(self, grid: Grid, dtype: DTypeLike, tr_s: float | None = None) -> None:
        """Check that this volume can belong to a run of such volumes.

        Raises
        ------
        VolumeError
            If its shape, position, voxel type or TR is another.
        """
        if not self.grid.matches(grid):
            raise VolumeError(OTHER_SHAPE)
        if self.data.dtype != dtype:
            raise VolumeError("another voxel type than the run's first volume")
        if tr_s is not None and abs(self.tr_s - tr_s) > TR_TOLERANCE_S:
            raise VolumeError("another TR than the run's first volume")

    @property
    def flat(self) -> NDArray[Any]:
        """The voxels in memory order, shape (n_voxels,), without a copy."""
        return self.data.reshape(-1, order="F")

    @property
    def time_s(self) -> float:
        """Start of its acquisition, in seconds after the start of volume 0."""
        return self.index * self.tr_s


def as_voxels(array: NDArray[Any]) -> NDArray[Any]:
    """Return *array* (x, y, z) as a volume's data: a permitted dtype, native bytes, x fastest.

    Integer types that fit are kept as integers; everything else becomes float32.
    """
    dtype = array.dtype.newbyteorder("=")
    if dtype not in VOXEL_DTYPES:
        fits = dtype.kind in "iub" and dtype.itemsize == 1
        dtype = np.dtype(np.int16) if fits else np.dtype(np.float32)
    return np.asfortranarray(array, dtype=dtype)


def as_slice_times(times_s: Sequence[float | None], n_slices: int) -> tuple[float, ...] | None:
    """Return a header's slice times as a volume's, rounded to microseconds.

    Returns
    -------
    slice_times_s : tuple of float, or None
        None if they are not one for each slice, or cannot be times, or are all 0, which headers
        have where nothing is known.
    """
    known = [round(float(time_s), 6) for time_s in times_s if time_s is not None]
    usable = len(known) == len(times_s) == n_slices and all(0 <= t < math.inf for t in known)
    return tuple(known) if usable and any(known) else None


def unflatten(flat: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return a flat map as ``(x, y, z)`` with x fastest, without a copy."""
    return flat.reshape(tuple(shape), order="F")


def tiled(data: NDArray[Any]) -> NDArray[Any]:
    """Return *data* (x, y, z) as a Siemens mosaic's pixels, (rows, columns).

    The slices lie row by row in a square of tiles, the last ones of which may be empty.
    """
    n_x, n_y, n_z = data.shape
    n_tiles = math.ceil(math.sqrt(n_z))
    tiles = np.zeros((n_tiles**2, n_y, n_x), data.dtype)
    tiles[:n_z] = data.T
    image = tiles.reshape(n_tiles, n_tiles, n_y, n_x).swapaxes(1, 2)
    return image.reshape(n_tiles * n_y, n_tiles * n_x)


def untiled(pixels: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return the volume (x, y, z) of *shape* in a mosaic's *pixels*, x fastest."""
    n_x, n_y, n_z = shape
    tiles = pixels.reshape(-1, n_y, pixels.shape[1] // n_x, n_x).swapaxes(1, 2)
    return tiles.reshape(-1, n_y, n_x)[:n_z].T

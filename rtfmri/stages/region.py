"""Regions: which voxels an operation works on, and where their results go.

Voxels are taken in memory order, x fastest, so an array of a mask's voxels alone has them by
increasing flat index.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend, Region, Shape
from rtfmri.errors import GridError

Mask = NDArray[np.bool_]


class Box(NamedTuple):
    """A part of a grid: first voxel, and number of voxels along x, y, z."""

    start: Shape
    shape: Shape

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """What cuts the box out of an ``(x, y, z)`` array."""
        x, y, z = (slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))
        return x, y, z

    @property
    def n_voxels(self) -> int:
        """Number of voxels."""
        x, y, z = self.shape
        return x * y * z


def bounding_box(mask: Mask, margin: Shape = (0, 0, 0)) -> Box:
    """Return the smallest box with all voxels of *mask*, and *margin* voxels more on each side.

    Parameters
    ----------
    mask : (x, y, z) bool
        Voxels of a grid, at least one.
    margin : (int, int, int)
        Voxels along x, y, z; the box ends where the grid does.

    Raises
    ------
    GridError
        If *mask* is empty.
    """
    spans = []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis})))
        if not inside.size:
            raise GridError("mask must have at least one voxel, got none")
        first = max(int(inside[0]) - margin[axis], 0)
        last = min(int(inside[-1]) + margin[axis], mask.shape[axis] - 1)
        spans.append((first, last - first + 1))
    x, y, z = spans
    return Box((x[0], y[0], z[0]), (x[1], y[1], z[1]))


def dilated(mask: Mask, radius: Shape) -> Mask:
    """Return the voxels at most *radius* voxels from one of *mask*, along x, y and z each.

    A separable filter of this radius reads these voxels to be right on *mask*.

    Parameters
    ----------
    mask : (x, y, z) bool
        Voxels of a grid.
    radius : (int, int, int)
        Voxels along x, y, z.

    Returns
    -------
    (x, y, z) bool
        Fortran-ordered.
    """
    grown = np.array(mask, order="F")
    for axis, r in enumerate(radius):
        line = np.moveaxis(grown, axis, 0)
        done, reach = 0, min(r, line.shape[0] - 1)
        while done < reach:
            # Grown by `done` so far, at an edge to one side only: a longer step would leave gaps.
            step = min(done + 1, reach - done)
            before = line.copy(order="K")
            line[step:] |= before[:-step]
            line[:-step] |= before[step:]
            done += step
    return grown


def region_of(mask: Mask, sources: Box | None = None, targets: Box | None = None) -> Region:
    """Return the voxels of *mask* as a region, in NumPy arrays.

    Parameters
    ----------
    mask : (x, y, z) bool
        Voxels of the whole grid.
    sources : Box, optional
        What the source array holds of the grid; all of it by default.
    targets : Box, optional
        What the target array holds of the grid; by default the mask's voxels alone, (n,).

    Raises
    ------
    GridError
        If a voxel of *mask* lies outside a box.
    """
    source = _flat_indices(mask, sources)
    target = np.arange(source.size) if targets is None else _flat_indices(mask, targets)
    line = mask.shape[0] if sources is None else sources.shape[0]
    starts = np.flatnonzero((np.diff(source, prepend=-2) != 1) | (source % line == 0))
    lengths = np.diff(starts, append=source.size)
    runs = np.column_stack([source[starts], target[starts], lengths])
    return Region(*(np.ascontiguousarray(a, np.int32) for a in (runs, source, target)))


def copied_to(backend: Backend, region: Region) -> Region:
    """Return *region* in arrays of *backend*."""
    return Region(*(backend.copy(array) for array in region))


def _flat_indices(mask: Mask, box: Box | None) -> NDArray[np.intp]:
    inside = mask if box is None else mask[box.slices]
    indices = np.flatnonzero(inside.reshape(-1, order="F"))
    if box is not None and indices.size < np.count_nonzero(mask):
        raise GridError(f"mask must lie within {box}, got a voxel outside")
    return indices

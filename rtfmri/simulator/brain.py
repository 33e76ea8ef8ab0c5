"""A head to be scanned: anatomy, active regions and one that takes no part, on an EPI grid.

The anatomy is the MNI152 average that ships with nilearn (Fonov 2011, NeuroImage 54:313), with the
contrast of a T2*-weighted echo-planar image instead of its own.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.volume import Grid

FIELD_OF_VIEW_MM = (208.0, 208.0, 144.0)
CENTRE_MM = (0.0, -17.0, 12.0)
"""From the crown to the cerebellum, whatever the number of voxels."""

GREY, WHITE, CSF = 1000.0, 870.0, 1190.0
"""Scanner units. The ratios are those of a spoiled gradient echo, ``density sin(a) (1 - E) / (1 -
E cos(a)) exp(-TE/T2*)`` with ``E = exp(-TR/T1)``, at TR 2 s, TE 30 ms and flip angle a = 75
degrees, with T1 and T2* at 3 T of grey 1331 and 52 ms, white 832 and 45 ms (Wansapura 1999, JMRI
9:531), CSF about 4 s and 1 s; densities .83, .70 and 1."""
SOFT_TISSUE, SKULL, SCALP = 350.0, 120.0, 450.0
HULL_MM, SKULL_MM, SCALP_MM = 25.0, 6.0, 11.0
"""Radius of the closing that makes the brain's hull, and distances from that hull at which skull
and scalp end. Fat is suppressed, so scalp is dim."""

DROPOUT = (((0.0, 38.0, -24.0), 13.0), ((-54.0, -22.0, -34.0), 12.0), ((54.0, -22.0, -34.0), 12.0))
"""Where air near the brain dephases the signal, above the sinuses and the ear canals (Ojemann
1997, NeuroImage 6:156): centre and standard deviation of the loss in mm."""
DROPOUT_DEPTH = 0.75


@dataclass(frozen=True, slots=True)
class Region:
    """A ball in MNI space whose grey matter is a region; strength multiplies its response."""

    name: str
    centre_mm: tuple[float, float, float]
    radius_mm: float
    strength: float


ACTIVE = (
    Region("left_hand", (-38.0, -26.0, 56.0), 12.0, 1.25),
    Region("right_hand", (38.0, -24.0, 56.0), 12.0, 1.25),
    Region("supplementary_motor", (0.0, -6.0, 58.0), 10.0, 1.0),
    Region("left_cerebellum", (-18.0, -52.0, -22.0), 9.0, 1.0),
    Region("right_cerebellum", (18.0, -52.0, -22.0), 9.0, 1.0),
)
"""What finger tapping with both hands involves: hand areas, supplementary motor area and lobule V
of the cerebellum (Witt 2008, NeuroImage 42:343; hand knob: Yousry 1997, Brain 120:141)."""
INACTIVE = Region("inactive", (0.0, -88.0, 4.0), 14.0, 0.0)
"""Medial occipital cortex: nothing is seen in this task."""


@dataclass(frozen=True, eq=False, slots=True)
class Brain:
    """Maps on one grid, all (x, y, z), x fastest, read-only.

    ``anatomy`` float32 in scanner units; ``grey`` and ``csf`` float32, fractions of the voxel;
    ``mask`` bool, the brain; ``regions`` bool for each of `ACTIVE`; ``inactive`` bool;
    ``strength`` float32, the fraction of grey matter times the strength of its region.
    """

    grid: Grid
    anatomy: NDArray[np.float32]
    grey: NDArray[np.float32]
    csf: NDArray[np.float32]
    mask: NDArray[np.bool_]
    regions: dict[str, NDArray[np.bool_]]
    inactive: NDArray[np.bool_]
    strength: NDArray[np.float32]


@lru_cache(maxsize=4)
def build_brain(shape: tuple[int, int, int]) -> Brain:
    """Return the head on a grid of *shape*; the voxel size follows from the field of view."""
    from nilearn.datasets import (
        load_mni152_brain_mask,
        load_mni152_gm_template,
        load_mni152_wm_template,
    )

    size_mm = np.divide(FIELD_OF_VIEW_MM, shape)
    affine = np.diag([*size_mm, 1.0])
    affine[:3, 3] = CENTRE_MM - size_mm * (np.array(shape) - 1) / 2
    grid = Grid(shape, affine)
    grey = _to_grid(load_mni152_gm_template(resolution=1), grid)
    white = _to_grid(load_mni152_wm_template(resolution=1), grid)
    inside = _to_grid(load_mni152_brain_mask(resolution=1), grid)
    mask = inside > 0.5
    csf = np.clip(inside - grey - white, 0, 1)
    coordinates_mm = _coordinates_mm(grid)

    anatomy = GREY * grey + WHITE * white + CSF * csf
    anatomy += (1 - np.clip(grey + white + csf, 0, 1)) * _shell(mask, grid)
    for centre_mm, sd_mm in DROPOUT:
        square_mm2 = _distance_mm(coordinates_mm, centre_mm) ** 2
        anatomy *= 1 - DROPOUT_DEPTH * np.exp(-square_mm2 / (2 * sd_mm**2))

    regions = {r.name: _region(r, grey, coordinates_mm, grid) for r in ACTIVE}
    strength = np.zeros(shape, np.float32, order="F")
    for region in ACTIVE:
        inside_region = regions[region.name]
        strength[inside_region] = region.strength * grey[inside_region]
    brain = Brain(
        grid=grid,
        anatomy=np.asfortranarray(anatomy, np.float32),
        grey=grey,
        csf=csf,
        mask=mask,
        regions=regions,
        inactive=_region(INACTIVE, grey, coordinates_mm, grid),
        strength=strength,
    )
    for array in (brain.anatomy, grey, csf, mask, *regions.values(), brain.inactive, strength):
        array.setflags(write=False)
    return brain


def _to_grid(image: Any, grid: Grid) -> NDArray[np.float32]:
    """Average a 1 mm template over each voxel of *grid* (a box filter, then sampling)."""
    from scipy.ndimage import affine_transform, uniform_filter

    box = [max(1, round(size)) for size in grid.voxel_size_mm]
    averaged = uniform_filter(np.asarray(image.dataobj, np.float32), box)
    step = np.linalg.inv(image.affine) @ grid.affine
    sampled = affine_transform(
        averaged, np.diag(step)[:3], step[:3, 3], output_shape=grid.shape, order=1
    )
    return np.asfortranarray(sampled / averaged.max())


def _coordinates_mm(grid: Grid) -> tuple[NDArray[np.float32], ...]:
    """Return x, y and z of the voxel centres, to be broadcast against each other."""
    axes = (
        grid.affine[a, a] * np.arange(n, dtype=np.float32) + grid.affine[a, 3]
        for a, n in enumerate(grid.shape)
    )
    return tuple(np.ix_(*axes))


def _distance_mm(
    coordinates_mm: tuple[NDArray[np.float32], ...], centre_mm: tuple[float, float, float]
) -> NDArray[np.float32]:
    x, y, z = (c - m for c, m in zip(coordinates_mm, centre_mm, strict=True))
    return np.asarray(np.sqrt(x**2 + y**2 + z**2), np.float32)


def _region(
    region: Region,
    grey: NDArray[np.float32],
    coordinates_mm: tuple[NDArray[np.float32], ...],
    grid: Grid,
) -> NDArray[np.bool_]:
    """Return the voxels of the ball with at least half the grey matter of its greyest voxel.

    The ball is never smaller than half a voxel's diagonal, so that there is always one.
    """
    radius_mm = max(region.radius_mm, float(np.linalg.norm(grid.voxel_size_mm)) / 2)
    ball = _distance_mm(coordinates_mm, region.centre_mm) <= radius_mm
    return np.asfortranarray(ball & (grey >= grey[ball].max() / 2))


def _shell(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.float32]:
    """Return what lies around the brain, in scanner units: soft tissue, skull, scalp.

    The skull follows the brain's hull, a morphological closing made of two distance maps.
    """
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    size_mm = grid.voxel_size_mm
    margin = [math.ceil(HULL_MM / size) + 1 for size in size_mm]
    padded = np.pad(mask, [(m, m) for m in margin])
    near = distance_transform_edt(~padded, sampling=size_mm) <= HULL_MM
    hull = distance_transform_edt(near, sampling=size_mm) > HULL_MM
    hull = hull[tuple(slice(m, -m) for m in margin)]
    distance_mm = distance_transform_edt(~hull, sampling=size_mm)
    shell = np.select(
        [hull, distance_mm <= SKULL_MM, distance_mm <= SCALP_MM], [SOFT_TISSUE, SKULL, SCALP], 0.0
    )
    return np.asarray(gaussian_filter(shell, 0.5), np.float32)

"""What to look at in a map: the brain, the peak, an active and an inactive region."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.volume import Grid

Mask = NDArray[np.bool_]

THRESHOLD_T = 3.1
"""Display threshold: p < 0.001 one-sided of a normal variate, the usual one for drawing blobs."""
MAX_REGION_VOXELS = 50
_MARGIN_VOXELS = 3


def peak(t: NDArray[Any], grid: Grid, brain: Mask) -> tuple[float, tuple[float, float, float]]:
    """Return the largest *t* inside the brain and its place in scanner mm (RAS+)."""
    voxel = largest(t, brain)
    x, y, z = (grid.affine @ [*voxel, 1])[:3]
    return float(t[voxel]), (float(x), float(y), float(z))


def largest(t: NDArray[Any], inside: Mask) -> tuple[int, int, int]:
    """Return the voxel of the largest *t* within *inside*."""
    i, j, k = np.unravel_index(np.argmax(np.where(inside & np.isfinite(t), t, -np.inf)), t.shape)
    return int(i), int(j), int(k)


def active_region(t: NDArray[Any], brain: Mask, threshold: float = THRESHOLD_T) -> Mask:
    """Return the cluster around the largest *t*: at most its 50 voxels of the largest t.

    Neighbours share a face. A map that stays below *threshold* has its cluster above half of its
    largest value.
    """
    from scipy.ndimage import label

    voxel = largest(t, brain)
    clusters, _ = label(brain & (t >= min(threshold, t[voxel] / 2)))
    cluster = clusters == clusters[voxel] if clusters[voxel] else np.zeros(t.shape, bool)
    cluster[voxel] = True
    return _best(t, cluster)


def inactive_region(
    ts: Sequence[NDArray[Any]], brain: Mask, threshold: float = THRESHOLD_T
) -> Mask:
    """Return the 50 voxels whose t is nearest to 0 in all maps, away from any cluster."""
    from scipy.ndimage import binary_dilation

    worst = np.max(np.abs(np.nan_to_num(ts)), axis=0)
    near = binary_dilation(brain & (worst >= threshold), iterations=_MARGIN_VOXELS)
    away = brain & ~near
    return _best(-worst, away if away.any() else brain)


def _best(score: NDArray[Any], inside: Mask) -> Mask:
    voxels = np.flatnonzero(inside)
    chosen = voxels[np.argsort(score.ravel()[voxels], kind="stable")[-MAX_REGION_VOXELS:]]
    region = np.zeros(score.size, bool)
    region[chosen] = True
    return region.reshape(score.shape)

"""Smoothing: each volume blurred with a Gaussian, so that neighbours share their noise."""

import math

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, Backend
from rtfmri.volume import Grid

_SIGMAS = 4.0
"""The Gaussian is cut off here, as scipy and nilearn do: 6e-5 of its weight lies beyond."""


class SmoothingStage:
    """Convolves each volume with a Gaussian of the same width in mm along every axis.

    Edges are mirrored about the outer faces of the outer voxels, so that a constant volume stays
    constant and nothing is lost over the edge; it is what `nilearn.image.smooth_img` does.

    Parameters
    ----------
    backend : Backend
        What executes it.
    grid : Grid
        Of the volumes; its voxel sizes turn mm into voxels.
    fwhm_mm : float
        Full width at half maximum, above 0.
    """

    def __init__(self, backend: Backend, grid: Grid, fwhm_mm: float) -> None:
        sigma_mm = fwhm_mm / math.sqrt(8 * math.log(2))
        x, y, z = (backend.copy(gaussian_taps(sigma_mm / mm)) for mm in grid.voxel_size_mm)
        self._taps = x, y, z
        self._backend = backend
        self._shape = grid.shape
        self._scratch = backend.zeros(grid.n_voxels)
        self._smoothed = backend.zeros(grid.n_voxels)

    def push(self, volume: Array) -> Array:
        """Return *volume* smoothed, (n_voxels,) float32, valid until the next push."""
        self._backend.smooth(volume, self._shape, self._taps, self._scratch, self._smoothed)
        return self._smoothed


def gaussian_taps(sigma: float) -> NDArray[np.float32]:
    """Return a Gaussian of *sigma* voxels with sum 1, from its middle to 4 sigma."""
    radius = int(_SIGMAS * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    normalised: NDArray[np.float32] = (taps / (2 * taps.sum() - taps[0])).astype(np.float32)
    return normalised

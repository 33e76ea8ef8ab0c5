"""Smoothing: each volume blurred with a Gaussian, so that neighbours share their noise."""

import math

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, Backend, Shape
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
        Of the volumes, or of a box cut out of them; its voxel sizes turn mm into voxels.
    fwhm_mm : float
        Full width at half maximum, above 0.
    """

    def __init__(self, backend: Backend, grid: Grid, fwhm_mm: float) -> None:
        x, y, z = (backend.copy(taps) for taps in _taps_of(grid, fwhm_mm))
        self._taps = x, y, z
        self._backend = backend
        self._shape = grid.shape
        self._scratch = backend.zeros(grid.n_voxels)
        self._smoothed = backend.zeros(grid.n_voxels)

    def push(self, volume: Array) -> Array:
        """Return *volume* smoothed, (n_voxels,) float32, valid until the next push."""
        self._backend.smooth(volume, self._shape, self._taps, self._scratch, self._smoothed)
        return self._smoothed

    def scale_within(self, mask: NDArray[np.bool_]) -> Array:
        """Return what makes smoothed voxels the means of the mask's voxels around them alone.

        A volume that is 0 outside *mask*, smoothed and multiplied by this, is the normalised
        convolution of Knutsson & Westin (1993, CVPR: 515): each voxel of the mask has the mean of
        the mask's voxels, weighted by the Gaussian, and nothing from outside blurs into it.

        Parameters
        ----------
        mask : (x, y, z) bool
            On the stage's grid.

        Returns
        -------
        scale : (n,) float32
            On the backend, of the mask's voxels in memory order, x fastest.
        """
        inside = mask.reshape(-1, order="F")
        share = self._backend.download(self.push(self._backend.copy(inside.astype(np.float32))))
        return self._backend.copy((1 / share[inside].astype(np.float64)).astype(np.float32))


def smoothing_radius(grid: Grid, fwhm_mm: float) -> Shape:
    """Return how many voxels of *grid* along x, y, z a Gaussian of *fwhm_mm* reaches."""
    x, y, z = (taps.size - 1 for taps in _taps_of(grid, fwhm_mm))
    return x, y, z


def gaussian_taps(sigma: float) -> NDArray[np.float32]:
    """Return a Gaussian of *sigma* voxels with sum 1, from its middle to 4 sigma."""
    radius = int(_SIGMAS * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    normalised: NDArray[np.float32] = (taps / (2 * taps.sum() - taps[0])).astype(np.float32)
    return normalised


def _taps_of(grid: Grid, fwhm_mm: float) -> list[NDArray[np.float32]]:
    sigma_mm = fwhm_mm / math.sqrt(8 * math.log(2))
    return [gaussian_taps(sigma_mm / size_mm) for size_mm in grid.voxel_size_mm]

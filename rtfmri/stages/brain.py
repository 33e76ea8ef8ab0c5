"""From the scanner's grid to the brain: resliced, smoothed, and the mask's voxels alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, Backend, Pose
from rtfmri.config import Config
from rtfmri.stages.motion import bspline_taps
from rtfmri.stages.region import Mask, bounding_box, copied_to, dilated, region_of
from rtfmri.stages.smoothing import SmoothingStage, smoothing_radius
from rtfmri.volume import Grid, unflatten


class BrainStage:
    """Brings each volume's brain voxels to where they are in the reference, and smooths them.

    All later stages work on these voxels only, a fifth to a third of a volume. Smoothing works on
    a box around the mask, larger by what the Gaussian reaches, so that the mask's voxels come out
    as if it were done on the whole volume.

    Parameters
    ----------
    backend : Backend
        What executes it.
    grid : Grid
        Of the volumes.
    mask : (x, y, z) bool
        The brain, one voxel at least.
    config : Config
        Its motion and smoothing settings.

    Attributes
    ----------
    mask : (x, y, z) bool
    n_voxels : int
        Voxels in the mask.
    """

    def __init__(self, backend: Backend, grid: Grid, mask: Mask, config: Config) -> None:
        self.mask = mask
        self.n_voxels = int(np.count_nonzero(mask))
        self._backend, self._grid = backend, grid
        self._interpolation = config.motion.interpolation
        self._taps = (backend.copy(bspline_taps()),) * 3
        n_resliced = grid.n_voxels if config.motion.mode == "correct" else 0
        self._scratch, self._readable = backend.zeros(n_resliced), backend.zeros(n_resliced)
        if self._interpolation != "bspline":
            self._everything = copied_to(backend, region_of(np.ones(grid.shape, np.bool_)))
        self._brain = backend.zeros(self.n_voxels)
        self._smoothing, self._scale = None, None
        smoothing = config.smoothing
        if not smoothing.fwhm_mm:
            self._region, self._resliced = copied_to(backend, region_of(mask)), self._brain
            return
        radius = smoothing_radius(grid, smoothing.fwhm_mm)
        needed = mask if smoothing.within_mask else dilated(mask, radius)
        box = bounding_box(needed)
        self._region = copied_to(backend, region_of(needed, targets=box))
        self._resliced = backend.zeros(box.n_voxels)
        self._smoothing = SmoothingStage(backend, Grid(box.shape, grid.affine), smoothing.fwhm_mm)
        self._to_brain = copied_to(backend, region_of(mask, sources=box))
        if smoothing.within_mask:
            self._scale = self._smoothing.scale_within(mask[box.slices])

    def reslice(self, volume: Array, pose: Pose | None) -> None:
        """Take the brain out of *volume*, (n_all,), from where *pose* says that it is."""
        backend = self._backend
        if pose is None:
            backend.gather(volume, self._region, None, self._resliced)
            return
        # Kernels of reslicing take long to compile: they read float32 alone.
        if self._interpolation == "bspline":
            arrays = self._scratch, self._readable
            backend.smooth(volume, self._grid.shape, self._taps, *arrays)
        else:
            backend.gather(volume, self._everything, None, self._readable)
        backend.reslice(
            self._readable,
            self._grid.shape,
            pose.matrix,
            self._interpolation,
            self._region,
            self._resliced,
        )

    def smooth(self) -> Array:
        """Return the resliced voxels smoothed, (n_voxels,) float32, valid until the next volume.

        As they are where no smoothing is asked for.
        """
        if self._smoothing:
            smoothed = self._smoothing.push(self._resliced)
            self._backend.gather(smoothed, self._to_brain, self._scale, self._brain)
        return self._brain

    def spread(self, voxels: NDArray[np.float32], fwhm_mm: float) -> NDArray[np.float32]:
        """Return a map of the mask's voxels, (n_voxels,) on the host, smoothed within the mask."""
        backend = self._backend
        stage = SmoothingStage(backend, self._grid, fwhm_mm)
        scale = backend.download(stage.scale_within(self.mask))
        smoothed = stage.push(backend.copy(self.image(voxels).reshape(-1, order="F")))
        inside = backend.download(smoothed)[self.mask.reshape(-1, order="F")]
        return np.asarray(inside * scale)

    def image(self, voxels: NDArray[Any]) -> NDArray[np.float32]:
        """Return the map of the mask's *voxels*, (n_voxels,), as (x, y, z); 0 elsewhere."""
        flat = np.zeros(self._grid.n_voxels, np.float32)
        flat[self.mask.reshape(-1, order="F")] = voxels
        image: NDArray[np.float32] = unflatten(flat, self._grid.shape)
        return image

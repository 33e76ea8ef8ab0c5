"""ROI means in numba: the twin of ``kernels/roi.cu``."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001

import numpy as np
from numba import njit

from rtfmri.backends import Array, RoiTable
from rtfmri.backends.cpu._threads import Threads


@njit(cache=True, error_model="numpy")
def roi_means(volume, offsets, voxels, weights, means) -> None:
    """See `rtfmri.backends.Backend.roi_means`; *means* (n_rois,) float64 is overwritten."""
    for roi in range(means.size):
        total = 0.0
        for entry in range(offsets[roi], offsets[roi + 1]):
            total += np.float64(weights[entry]) * np.float64(volume[voxels[entry]])
        means[roi] = total


class RoiOperations(Threads):
    """The operation of `rtfmri.backends.Backend` on regions of interest."""

    def roi_means(self, volume: Array, rois: RoiTable, means: Array) -> None:
        """See `rtfmri.backends.Backend.roi_means`."""
        roi_means(volume, *rois, means)

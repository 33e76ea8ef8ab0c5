"""ROI means on the GPU: launches ``kernels/roi.cu``."""

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, RoiTable
from rtfmri.backends.cuda._launch import Launcher


class RoiOperations(Launcher):
    """The operation of `rtfmri.backends.Backend` on regions of interest."""

    def roi_means(self, volume: Array, rois: RoiTable) -> NDArray[np.float32]:
        """See `rtfmri.backends.Backend.roi_means`; the per-TR path's one wait for the GPU."""
        n_rois = rois.offsets.size - 1
        if not n_rois:
            return np.zeros(0, np.float32)
        with self._staging.stream:
            means = self._xp.empty(n_rois, np.float32)
        self._launch("roi.cu", "roi_means", volume.dtype, n_rois, volume, *rois, means)
        return self._staging.fetch(means)

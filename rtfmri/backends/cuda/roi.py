"""ROI means on the GPU: launches ``kernels/roi.cu``."""

from rtfmri.backends import Array, RoiTable
from rtfmri.backends.cuda._launch import Launcher


class RoiOperations(Launcher):
    """The operation of `rtfmri.backends.Backend` on regions of interest."""

    def roi_means(self, volume: Array, rois: RoiTable, means: Array) -> None:
        """See `rtfmri.backends.Backend.roi_means`."""
        self._launch("roi.cu", "roi_means", volume.dtype, means.size, volume, *rois, means)

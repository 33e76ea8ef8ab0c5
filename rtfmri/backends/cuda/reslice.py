"""Reslicing and gathering on the GPU: launches ``kernels/reslice.cu``."""

from typing import Any

import numpy as np

from rtfmri.backends import Array, Region, Shape
from rtfmri.backends.cuda._launch import Launcher, blocks_for
from rtfmri.config import Interpolation


class ResliceOperations(Launcher):
    """The operations of `rtfmri.backends.Backend` on voxels that move."""

    def reslice(
        self,
        volume: Array,
        shape: Shape,
        matrix: Array,
        interpolation: Interpolation,
        region: Region,
        out: Array,
    ) -> None:
        """See `rtfmri.backends.Backend.reslice`."""
        kernel = "reslice_" + interpolation.replace("-", "_")
        sizes = (np.int32(n) for n in shape)
        self._per_target(kernel, volume, region, matrix, out, *sizes)

    def gather(self, volume: Array, region: Region, scale: Array | None, out: Array) -> None:
        """See `rtfmri.backends.Backend.gather`."""
        if scale is None:
            self._per_target("gather", volume, region, out)
        else:
            self._per_target("gather_scaled", volume, region, scale, out)

    def _per_target(self, kernel: str, of: Array, region: Region, *args: Any) -> None:
        """Launch *kernel* with a thread for each voxel of *region*, for the dtype of *of*."""
        n = region.sources.size
        args = of, region.sources, region.targets, *args, np.int32(n)
        self._launch("reslice.cu", kernel, of.dtype, blocks_for(n), *args)

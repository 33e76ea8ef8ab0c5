"""Smoothing on the GPU: launches ``kernels/smooth.cu``, once an axis."""

import numpy as np

from rtfmri.backends import Array
from rtfmri.backends.cuda._launch import Launcher, blocks_for


class SmoothOperations(Launcher):
    """The operation of `rtfmri.backends.Backend` on neighbouring voxels."""

    def smooth(
        self,
        volume: Array,
        shape: tuple[int, int, int],
        taps: tuple[Array, Array, Array],
        scratch: Array,
        out: Array,
    ) -> None:
        """See `rtfmri.backends.Backend.smooth`."""
        nx, ny, nz = shape
        passes = (
            (volume, taps[2], out, nx * ny, nz),
            (out, taps[1], scratch, nx, ny),
            (scratch, taps[0], out, 1, nx),
        )
        n_blocks = blocks_for(volume.size)
        for source, weights, target, stride, n in passes:
            sizes = (np.int32(i) for i in (weights.size - 1, stride, n, volume.size))
            args = (source, weights, target, *sizes)
            self._launch("smooth.cu", "smooth_axis", source.dtype, n_blocks, *args)

"""Slice timing on the GPU: launches ``kernels/slice_timing.cu``."""

import numpy as np

from rtfmri.backends import Array, Shape
from rtfmri.backends.cuda._launch import Launcher, blocks_for


class SliceTimingOperations(Launcher):
    """The operation of `rtfmri.backends.Backend` that moves slices in time."""

    def retime(
        self, volume: Array, ring: Array, slot: int, shape: Shape, weights: Array, out: Array
    ) -> None:
        """See `rtfmri.backends.Backend.retime`."""
        nx, ny, nz = shape
        sizes = (np.int32(n) for n in (len(ring), slot, len(weights), nz, nx * ny, volume.size))
        arrays = volume, ring, weights, out
        n_blocks = blocks_for(volume.size)
        self._launch("slice_timing.cu", "retime", volume.dtype, n_blocks, *arrays, *sizes)

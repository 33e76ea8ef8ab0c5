"""Detrending on the GPU: launches ``kernels/detrend.cu``."""

import numpy as np

from rtfmri.backends import Array
from rtfmri.backends.cuda._launch import Launcher, blocks_for


class DetrendOperations(Launcher):
    """The operations of `rtfmri.backends.Backend` that take out drift."""

    def remove_slow(
        self,
        volume: Array,
        slow: Array,
        level: Array,
        gains: Array,
        out: Array,
        *,
        usable: Array | None = None,
    ) -> None:
        """See `rtfmri.backends.Backend.remove_slow`."""
        gate, n = self._gate(usable), np.int32(volume.size)
        args = (volume, slow, level, gains, gate, out, n)
        self._launch("detrend.cu", "remove_slow", np.float32, blocks_for(volume.size), *args)

    def remove_fit(
        self, volume: Array, coordinates: Array, directions: Array, scales: Array, out: Array
    ) -> None:
        """See `rtfmri.backends.Backend.remove_fit`."""
        sizes = (np.int32(n) for n in coordinates.shape)
        args = (volume, coordinates, directions, scales, out, *sizes)
        self._launch("detrend.cu", "remove_fit", np.float32, blocks_for(volume.size), *args)

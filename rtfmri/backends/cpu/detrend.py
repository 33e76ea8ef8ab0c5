"""Detrending in numba: the twin of ``kernels/detrend.cu``.

The same float32 operations in the same order, so that both give the same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001

import numpy as np
from numba import njit, prange

from rtfmri.backends import Array
from rtfmri.backends.cpu._threads import Threads
from rtfmri.backends.cpu.moments import refused

_CHUNK = 2048  # voxels; their sums stay in the L1 cache
_ZERO = np.float32(0)

_kernel = njit(parallel=True, cache=True, error_model="numpy")


@_kernel
def remove_slow(volume, slow, level, out, gain, level_gain, usable, threads) -> None:
    """See `rtfmri.backends.Backend.remove_slow`."""
    n = volume.size
    for thread in prange(threads):
        part = slice(n * thread // threads, n * (thread + 1) // threads)
        x, s, m, y = volume[part], slow[part], level[part], out[part]
        for i in range(x.size):
            y[i] = x[i] - (s[i] - m[i])
        if usable:
            for i in range(x.size):
                s[i] = s[i] + gain * (x[i] - s[i])
            if level_gain > _ZERO:
                for i in range(x.size):
                    m[i] = m[i] + level_gain * (x[i] - m[i])


@_kernel
def remove_fit(volume, coordinates, directions, scale, out, threads) -> None:
    """See `rtfmri.backends.Backend.remove_fit`."""
    n = volume.size
    for thread in prange(threads):
        stop = n * (thread + 1) // threads
        for start in range(n * thread // threads, stop, _CHUNK):
            part = slice(start, min(start + _CHUNK, stop))
            x, score = volume[part], out[part]
            for i in range(x.size):
                score[i] = _ZERO
            for column in range(directions.size):
                weight = directions[column]
                if weight != _ZERO:
                    z = coordinates[column, part]
                    for i in range(x.size):
                        score[i] = score[i] + weight * z[i]
            for i in range(x.size):
                score[i] = x[i] - scale * score[i]


class DetrendOperations(Threads):
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
        gain, level_gain = (np.float32(gain) for gain in gains)
        share = self._share(volume.size)
        remove_slow(volume, slow, level, out, gain, level_gain, not refused(usable), share)

    def remove_fit(
        self, volume: Array, coordinates: Array, directions: Array, scales: Array, out: Array
    ) -> None:
        """See `rtfmri.backends.Backend.remove_fit`."""
        scale, share = np.float32(scales[0]), self._share(volume.size)
        remove_fit(volume, coordinates, directions, scale, out, share)

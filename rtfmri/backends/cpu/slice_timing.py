"""Slice timing in numba: the twin of ``kernels/slice_timing.cu``.

The same sums in the same order. A slice is summed up volume by volume: it stays in the cache, and
loops over two arrays vectorise.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

import numpy as np
from numba import njit, prange

from rtfmri.backends import Array, Shape
from rtfmri.backends.cpu._threads import Threads

_CHUNK = 4096  # voxels; their sums stay in the L1 cache

_inner = njit(error_model="numpy")


@_inner
def _start(total, weight, values):
    for i in range(total.size):
        total[i] = weight * np.float32(values[i])


@_inner
def _add(total, weight, values):
    for i in range(total.size):
        total[i] += weight * np.float32(values[i])


@_inner
def _store(row, values):
    for i in range(row.size):
        row[i] = values[i]


@njit(parallel=True, cache=True, error_model="numpy")
def retime(volume, ring, slot, n_slices, weights, out, threads) -> None:
    """See `rtfmri.backends.Backend.retime`; *threads* is at most *n_slices*."""
    n_plane = volume.size // n_slices
    n_before = ring.shape[0]
    for thread in prange(threads):
        for z in range(n_slices * thread // threads, n_slices * (thread + 1) // threads):
            for start in range(z * n_plane, (z + 1) * n_plane, _CHUNK):
                part = slice(start, min(start + _CHUNK, (z + 1) * n_plane))
                newest, total = volume[part], out[part]
                _start(total, weights[0, z], newest)
                for k in range(1, weights.shape[0]):
                    _add(total, weights[k, z], ring[(slot - k) % n_before, part])
                _store(ring[slot, part], newest)


class SliceTimingOperations(Threads):
    """The operation of `rtfmri.backends.Backend` that moves slices in time."""

    def retime(
        self, volume: Array, ring: Array, slot: int, shape: Shape, weights: Array, out: Array
    ) -> None:
        """See `rtfmri.backends.Backend.retime`."""
        threads = min(self._share(volume.size), shape[2])
        retime(volume, ring, slot, shape[2], weights, out, threads)

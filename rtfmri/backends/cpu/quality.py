"""Quality measures in numba: the twin of ``kernels/quality.cuh`` and ``kernels/quality.cu``.

Sums are float64 and in the order of a block of 256 threads there: so many running sums over a
chunk, then a tree, then the chunks. That is also the order which vectorises, and it does not
depend on the number of threads here.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

import numpy as np
from numba import njit, prange

from rtfmri.backends import Array, Moments, Shape
from rtfmri.backends.cpu._threads import Threads

_LANES = 256
_CHUNK = 4096
_LARGEST_FLOAT = np.finfo(np.float32).max
_ZERO = np.float32(0)
_ONE = np.float32(1)

_inner = njit(error_model="numpy")
_kernel = njit(parallel=True, cache=True, error_model="numpy")


@_inner
def _is_finite(x):
    return abs(x) <= _LARGEST_FLOAT


@_inner
def _tree(lanes):
    half = _LANES // 2
    while half:
        low, high = lanes[:half], lanes[half : 2 * half]
        for i in range(half):
            low[i] += high[i]
        half //= 2
    return lanes[0]


@_inner
def _clear(lanes):
    for i in range(_LANES):
        lanes[i] = 0.0


@_inner
def _sum_of(values, lanes):
    _clear(lanes)
    for i in range(values.size):
        lanes[i % _LANES] += values[i]
    return _tree(lanes)


@_inner
def _add_row(x, totals, largest):
    n_not_finite = 0
    for i in range(x.size):
        value = np.float32(x[i])
        finite = _is_finite(value)
        totals[i] += np.float64(value if finite else _ZERO)
        largest[i] = value if finite and value > largest[i] else largest[i]
        n_not_finite += not finite
    return n_not_finite


@_inner
def _count(x, wanted):
    n = 0
    for i in range(x.size):
        n += np.float32(x[i]) == wanted
    return n


@_inner
def _inspect_slice(plane, totals, largest, fields):
    total, top, n_top, n_not_finite = 0.0, np.float32(-np.inf), 0, 0
    for start in range(0, plane.size, _CHUNK):
        chunk = plane[start : start + _CHUNK]
        _clear(totals)
        for i in range(_LANES):
            largest[i] = top
        for row in range(0, chunk.size, _LANES):
            n_not_finite += _add_row(chunk[row : row + _LANES], totals, largest)
        total += _tree(totals)
        before = top
        for i in range(_LANES):
            top = max(top, largest[i])
        if top > before:
            n_top = 0
        n_top += _count(chunk, top)
    fields[0], fields[1], fields[2], fields[3] = total, top, n_top, n_not_finite


@_kernel
def inspect(volume, n_plane, n_slices, slices, threads) -> None:
    """See `rtfmri.backends.Backend.inspect`; *threads* is at most *n_slices*."""
    for thread in prange(threads):
        totals, largest = np.empty(_LANES, np.float64), np.empty(_LANES, np.float32)
        for z in range(n_slices * thread // threads, n_slices * (thread + 1) // threads):
            plane = volume[z * n_plane : (z + 1) * n_plane]
            _inspect_slice(plane, totals, largest, slices[z])
    whole, rows = slices[n_slices], slices[:n_slices]
    whole[0] = _sum_of(rows[:, 0], np.empty(_LANES, np.float64))
    whole[1], whole[2], whole[3] = rows[:, 1].max(), 0.0, rows[:, 3].sum()
    for z in range(n_slices):
        if rows[z, 1] == whole[1]:
            whole[2] += rows[z, 2]


@_inner
def _add_differences(x, before, totals, squares):
    for i in range(x.size):
        finite = _is_finite(x[i])
        value = np.float64(x[i]) if finite else 0.0
        d = value - np.float64(before[i]) if finite else 0.0
        totals[i] += value
        squares[i] += d * d


@_kernel
def compare(volume, previous, chunks, sums, threads) -> None:
    """See `rtfmri.backends.Backend.compare`; *chunks* (2, n_chunks) float64 is scratch."""
    n_chunks = chunks.shape[1]
    for thread in prange(threads):
        totals, squares = np.empty(_LANES, np.float64), np.empty(_LANES, np.float64)
        for chunk in range(n_chunks * thread // threads, n_chunks * (thread + 1) // threads):
            part = slice(chunk * _CHUNK, (chunk + 1) * _CHUNK)
            x, before = volume[part], previous[part]
            _clear(totals)
            _clear(squares)
            for start in range(0, x.size, _LANES):
                row = slice(start, start + _LANES)
                _add_differences(x[row], before[row], totals, squares)
            chunks[0, chunk], chunks[1, chunk] = _tree(totals), _tree(squares)
    lanes = np.empty(_LANES, np.float64)
    sums[0], sums[1] = _sum_of(chunks[0], lanes), _sum_of(chunks[1], lanes)


@njit(cache=True, error_model="numpy")
def judge(values, limits, usable) -> None:
    """See `rtfmri.backends.Backend.judge`."""
    inside = True
    for i in range(values.size):
        inside &= values[i] >= limits[0, i] and values[i] <= limits[1, i]
    usable[0] = 1 if inside else 0


@_inner
def _fold_finite(x, mean, variance, gain):
    for i in range(x.size):
        d = x[i] - mean[i]
        step = gain * d
        folded = (_ONE - gain) * (variance[i] + step * d)
        finite = _is_finite(x[i])
        mean[i] = mean[i] + step if finite else mean[i]
        variance[i] = folded if finite else variance[i]


@_kernel
def track(
    volume, previous, mean, variance, successive, usable, gain, successive_gain, threads
) -> None:
    """See `rtfmri.backends.Backend.track`."""
    n = volume.size
    counts = usable[0] > _ZERO
    for thread in prange(threads):
        stop = n * (thread + 1) // threads
        for start in range(n * thread // threads, stop, _CHUNK):
            part = slice(start, min(start + _CHUNK, stop))
            x, before, q = volume[part], previous[part], successive[part]
            if counts and gain > _ZERO:
                _fold_finite(x, mean[part], variance[part], gain)
            if counts and successive_gain > _ZERO:
                for i in range(x.size):
                    d = x[i] - before[i]
                    moved = q[i] + successive_gain * (d * d - q[i])
                    q[i] = moved if _is_finite(x[i]) else q[i]
            for i in range(x.size):
                before[i] = x[i] if _is_finite(x[i]) else before[i]


class QualityOperations(Threads):
    """The operations of `rtfmri.backends.Backend` that judge volumes."""

    def inspect(self, volume: Array, shape: Shape, slices: Array) -> None:
        """See `rtfmri.backends.Backend.inspect`."""
        share = min(self._share(volume.size), shape[2])
        inspect(volume, shape[0] * shape[1], shape[2], slices, share)

    def compare(self, volume: Array, previous: Array, sums: Array) -> None:
        """See `rtfmri.backends.Backend.compare`."""
        chunks = np.empty((2, -(-volume.size // _CHUNK)))
        compare(volume, previous, chunks, sums, self._share(volume.size))

    def judge(self, values: Array, limits: Array, usable: Array) -> None:
        """See `rtfmri.backends.Backend.judge`."""
        judge(values, limits, usable)

    def track(
        self,
        volume: Array,
        previous: Array,
        moments: Moments,
        successive: Array,
        *,
        usable: Array,
        gain: float,
        successive_gain: float,
    ) -> None:
        """See `rtfmri.backends.Backend.track`."""
        scalars = np.float32(gain), np.float32(successive_gain), self._share(volume.size)
        track(volume, previous, *moments, successive, usable, *scalars)

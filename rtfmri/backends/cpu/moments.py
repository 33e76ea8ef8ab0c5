"""Baseline moments in numba: the twin of ``kernels/moments.cuh`` and ``kernels/moments.cu``.

The same float32 operations in the same order, so that both give the same bits. Each thread loops
over a contiguous slice of every array: that is the form which vectorises.
"""

# numba infers the types; annotations here would only repeat rtfmri.backends.Backend.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

import math

import numpy as np
from numba import njit, prange

from rtfmri.backends import Array, Contrast, Moments, Subtraction
from rtfmri.backends.cpu._threads import Threads

_ZERO = np.float32(0)
_ONE = np.float32(1)
_HUNDRED = np.float32(100)

_voxel = njit(inline="always", error_model="numpy")
_chunk = njit(error_model="numpy")
_kernel = njit(parallel=True, cache=True, error_model="numpy")
_alone = njit(cache=True, error_model="numpy")


@_voxel
def _psc(difference, mean):
    return _HUNDRED * difference / mean if mean > _ZERO else _ZERO


@_voxel
def _over_root(difference, variance):
    return difference / math.sqrt(variance) if variance > _ZERO else _ZERO


@_chunk
def _subtract_only(x, mean, variance, difference, psc, z, bessel):
    for i in range(x.size):
        d = np.float32(x[i]) - mean[i]
        difference[i] = d
        psc[i] = _psc(d, mean[i])
        z[i] = _over_root(d, variance[i] * bessel)


@_chunk
def _subtract_and_fold(x, mean, variance, difference, psc, z, bessel, gain):
    for i in range(x.size):
        m, s = mean[i], variance[i]
        d = np.float32(x[i]) - m
        difference[i] = d
        psc[i] = _psc(d, m)
        z[i] = _over_root(d, s * bessel)
        step = gain * d
        mean[i] = m + step
        variance[i] = (_ONE - gain) * (s + step * d)


@_chunk
def _subtract_and_fold_other(
    x, mean, variance, difference, psc, z, other_mean, other_variance, bessel, gain
):
    for i in range(x.size):
        value = np.float32(x[i])
        d = value - mean[i]
        difference[i] = d
        psc[i] = _psc(d, mean[i])
        z[i] = _over_root(d, variance[i] * bessel)
        d = value - other_mean[i]
        step = gain * d
        other_mean[i] = other_mean[i] + step
        other_variance[i] = (_ONE - gain) * (other_variance[i] + step * d)


@_chunk
def _subtract_part(x, m, s, d, p, q, other_m, other_s, bessel, gain, same):
    # Only where the arrays are known to be apart, or the same, does the loop vectorise.
    if gain == _ZERO:
        _subtract_only(x, m, s, d, p, q, bessel)
    elif same:
        _subtract_and_fold(x, m, s, d, p, q, bessel, gain)
    else:
        _subtract_and_fold_other(x, m, s, d, p, q, other_m, other_s, bessel, gain)


@_kernel
def subtract(
    volume, mean, variance, difference, psc, z, into_mean, into_variance, bessel, gain, threads
) -> None:
    """See `rtfmri.backends.Backend.subtract`; no *into* is said by gain 0."""
    n = volume.size
    same = mean.ctypes.data == into_mean.ctypes.data
    for thread in prange(threads):
        part = slice(n * thread // threads, n * (thread + 1) // threads)
        x, m, s = volume[part], mean[part], variance[part]
        d, p, q = difference[part], psc[part], z[part]
        other_m, other_s = into_mean[part], into_variance[part]
        _subtract_part(x, m, s, d, p, q, other_m, other_s, bessel, gain, same)


@_alone
def subtract_few(
    volume, mean, variance, difference, psc, z, into_mean, into_variance, bessel, gain
) -> None:
    """Do `subtract` on this thread: to wake another one takes longer."""
    same = mean.ctypes.data == into_mean.ctypes.data
    arrays = volume, mean, variance, difference, psc, z, into_mean, into_variance
    _subtract_part(*arrays, bessel, gain, same)


@_chunk
def _fold_part(x, m, s, gain):
    for i in range(x.size):
        d = np.float32(x[i]) - m[i]
        step = gain * d
        m[i] = m[i] + step
        s[i] = (_ONE - gain) * (s[i] + step * d)


@_kernel
def fold(volume, mean, variance, gain, threads) -> None:
    """See `rtfmri.backends.Backend.fold`."""
    n = volume.size
    for thread in prange(threads):
        part = slice(n * thread // threads, n * (thread + 1) // threads)
        _fold_part(volume[part], mean[part], variance[part], gain)


@_alone
def fold_few(volume, mean, variance, gain) -> None:
    """Do `fold` on this thread."""
    _fold_part(volume, mean, variance, gain)


@_kernel
def slide(volume, mean, variance, slot, difference, psc, z, bessel, gain, full, threads) -> None:
    """See `rtfmri.backends.Backend.slide`; *slot* is the ring's row, (n_voxels,)."""
    n = volume.size
    for thread in prange(threads):
        part = slice(n * thread // threads, n * (thread + 1) // threads)
        x, m, s, oldest = volume[part], mean[part], variance[part], slot[part]
        d, p, q = difference[part], psc[part], z[part]
        if full:
            _subtract_only(x, m, s, d, p, q, bessel)
            for i in range(x.size):
                value, old = np.float32(x[i]), np.float32(oldest[i])
                step = gain * (value - old)
                mean_after = m[i] + step
                s_after = s[i] + step * ((value - mean_after) + (old - m[i]))
                s[i] = s_after if s_after > _ZERO else _ZERO
                m[i] = mean_after
                oldest[i] = x[i]
        else:
            _subtract_and_fold(x, m, s, d, p, q, bessel, gain)
            for i in range(x.size):
                oldest[i] = x[i]


@_kernel
def refresh(ring, mean, variance, start, stop, threads) -> None:
    """See `rtfmri.backends.Backend.refresh`."""
    window = np.float32(ring.shape[0])
    n = stop - start
    for thread in prange(threads):
        part = slice(start + n * thread // threads, start + n * (thread + 1) // threads)
        first, m, s = ring[0, part], mean[part], variance[part]
        for i in range(m.size):
            m[i] = _ZERO
        for row in range(1, ring.shape[0]):
            x = ring[row, part]
            for i in range(m.size):
                m[i] += np.float32(x[i]) - np.float32(first[i])
        for i in range(m.size):
            m[i] = np.float32(first[i]) + m[i] / window
            s[i] = _ZERO
        for row in range(ring.shape[0]):
            x = ring[row, part]
            for i in range(m.size):
                d = np.float32(x[i]) - m[i]
                s[i] += d * d
        for i in range(m.size):
            s[i] = s[i] / window


@_kernel
def contrast(
    mean_a, variance_a, mean_b, variance_b, effect, psc, t, per_dof_a, per_dof_b, threads
) -> None:
    """See `rtfmri.backends.Backend.contrast`; per_dof is 1 / (n - 1)."""
    n = mean_a.size
    for thread in prange(threads):
        part = slice(n * thread // threads, n * (thread + 1) // threads)
        ma, sa, mb, sb = mean_a[part], variance_a[part], mean_b[part], variance_b[part]
        e, p, q = effect[part], psc[part], t[part]
        for i in range(ma.size):
            d = ma[i] - mb[i]
            e[i] = d
            p[i] = _psc(d, mb[i])
            q[i] = _over_root(d, sa[i] * per_dof_a + sb[i] * per_dof_b)


class MomentsOperations(Threads):
    """The operations of `rtfmri.backends.Backend` on the baseline."""

    def subtract(
        self,
        volume: Array,
        baseline: Moments,
        out: Subtraction,
        *,
        bessel: float,
        into: Moments | None,
        gain: float,
        usable: Array | None = None,
    ) -> None:
        """See `rtfmri.backends.Backend.subtract`."""
        if into is None or refused(usable):
            into, gain = baseline, 0.0
        share = self._share(volume.size)
        args = (volume, *baseline, *out, *into, np.float32(bessel), np.float32(gain))
        if share == 1:
            subtract_few(*args)
        else:
            subtract(*args, share)

    def fold(
        self, volume: Array, into: Moments, *, gain: float, usable: Array | None = None
    ) -> None:
        """See `rtfmri.backends.Backend.fold`."""
        if refused(usable):
            return
        share = self._share(volume.size)
        if share == 1:
            fold_few(volume, *into, np.float32(gain))
        else:
            fold(volume, *into, np.float32(gain), share)

    def slide(
        self,
        volume: Array,
        baseline: Moments,
        ring: Array,
        slot: int,
        out: Subtraction,
        *,
        bessel: float,
        gain: float,
        full: bool,
        usable: Array | None = None,
    ) -> None:
        """See `rtfmri.backends.Backend.slide`."""
        if refused(usable):
            self.subtract(volume, baseline, out, bessel=bessel, into=None, gain=0.0)
            return
        scalars = np.float32(bessel), np.float32(gain), full, self._share(volume.size)
        slide(volume, *baseline, ring[slot], *out, *scalars)

    def refresh(self, ring: Array, baseline: Moments, start: int, stop: int) -> None:
        """See `rtfmri.backends.Backend.refresh`."""
        refresh(ring, *baseline, start, stop, self._share(stop - start))

    def contrast(
        self,
        condition: Moments,
        n_condition: float,
        baseline: Moments,
        n_baseline: float,
        out: Contrast,
    ) -> None:
        """See `rtfmri.backends.Backend.contrast`."""
        per_dof = np.float32(1 / (n_condition - 1)), np.float32(1 / (n_baseline - 1))
        share = self._share(baseline.mean.size)
        contrast(*condition, *baseline, *out, *per_dof, share)


def refused(usable: Array | None) -> bool:
    """Tell whether a volume is not to leave a trace, from its *usable* as operations get it."""
    return usable is not None and not usable[0]

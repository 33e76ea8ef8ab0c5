"""The cpu backend: numba kernels on NumPy arrays."""

import os
from typing import Any

# Threads that spin for milliseconds while they wait fight with whatever else runs, readers and
# writers of this very process included; threads that sleep at once wake too late for the next
# kernel. Measured on 2 cores, 64x64x36: a volume every 10 ms took 5.9 ms (p99 11 ms) as OpenMP
# comes, 0.2 ms (p99 0.4 ms) with these; kernels one after the other 21 us, against 77 us without
# any spinning. OpenMP reads both once, when it is loaded, which is later than this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numba
import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, Contrast, Moments, RoiTable, Subtraction, exercise
from rtfmri.backends.cpu import moments, roi, smooth
from rtfmri.errors import DeviceError

_SMALLEST_SHARE = 4096
"""Voxels below which another thread costs more than it saves."""


class CpuBackend:
    """The operations of `rtfmri.backends.Backend` on this machine's processor.

    Parameters
    ----------
    threads : int, optional
        Threads of the kernels; by default all processors this process may use.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        available = numba.config.NUMBA_NUM_THREADS
        if threads is not None and threads > available:
            raise DeviceError(
                f"threads must be at most {available} on this machine, got {threads}"
            )
        self.threads = threads or available
        numba.set_num_threads(self.threads)

    def upload(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.upload`."""
        return host

    def copy(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.copy`."""
        return np.array(host)

    def download(self, array: Array) -> NDArray[Any]:
        """See `rtfmri.backends.Backend.download`."""
        return np.array(array)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
        """See `rtfmri.backends.Backend.zeros`."""
        return np.zeros(shape, dtype)

    def warm(self, dtype: Any) -> None:
        """See `rtfmri.backends.Backend.warm`."""
        exercise(self, dtype)

    def synchronize(self) -> None:
        """See `rtfmri.backends.Backend.synchronize`; nothing is ever pending here."""

    def subtract(
        self,
        volume: Array,
        baseline: Moments,
        out: Subtraction,
        *,
        bessel: float,
        into: Moments | None,
        gain: float,
    ) -> None:
        """See `rtfmri.backends.Backend.subtract`."""
        target, gain = (baseline, 0.0) if into is None else (into, gain)
        scalars = np.float32(bessel), np.float32(gain), self._share(volume.size)
        moments.subtract(volume, *baseline, *out, *target, *scalars)

    def fold(self, volume: Array, into: Moments, *, gain: float) -> None:
        """See `rtfmri.backends.Backend.fold`."""
        moments.fold(volume, *into, np.float32(gain), self._share(volume.size))

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
    ) -> None:
        """See `rtfmri.backends.Backend.slide`."""
        scalars = np.float32(bessel), np.float32(gain), full, self._share(volume.size)
        moments.slide(volume, *baseline, ring[slot], *out, *scalars)

    def refresh(self, ring: Array, baseline: Moments, start: int, stop: int) -> None:
        """See `rtfmri.backends.Backend.refresh`."""
        moments.refresh(ring, *baseline, start, stop, self._share(stop - start))

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
        moments.contrast(*condition, *baseline, *out, *per_dof, share)

    def roi_means(self, volume: Array, rois: RoiTable) -> NDArray[np.float32]:
        """See `rtfmri.backends.Backend.roi_means`."""
        means = np.empty(rois.offsets.size - 1, np.float32)
        roi.roi_means(volume, *rois, means)
        return means

    def smooth(
        self,
        volume: Array,
        shape: tuple[int, int, int],
        taps: tuple[Array, Array, Array],
        scratch: Array,
        out: Array,
    ) -> None:
        """See `rtfmri.backends.Backend.smooth`."""
        share = min(self._share(volume.size), shape[2])
        smooth.smooth(volume, *shape, *taps, scratch, out, share)

    def _share(self, n_voxels: int) -> int:
        return max(1, min(self.threads, n_voxels // _SMALLEST_SHARE))

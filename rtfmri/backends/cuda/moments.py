"""Baseline moments on the GPU: launches ``kernels/moments.cu``."""

from typing import Any

import numpy as np

from rtfmri.backends import Array, Contrast, Moments, Subtraction
from rtfmri.backends.cuda._launch import Launcher, blocks_for


class MomentsOperations(Launcher):
    """The operations of `rtfmri.backends.Backend` on running moments."""

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
        target, gain = (baseline, 0.0) if into is None else (into, gain)
        scalars = np.float32(bessel), np.float32(gain)
        arrays = (volume, *baseline, *out, *target, self._gate(usable))
        self._per_voxel("subtract", volume, *arrays, *scalars)

    def fold(
        self, volume: Array, into: Moments, *, gain: float, usable: Array | None = None
    ) -> None:
        """See `rtfmri.backends.Backend.fold`."""
        arrays = (volume, *into, self._gate(usable))
        self._per_voxel("fold", volume, *arrays, np.float32(gain))

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
        scalars = np.float32(bessel), np.float32(gain), np.int32(full)
        gate = self._gate(usable)
        self._per_voxel("slide", volume, volume, *baseline, ring[slot], *out, gate, *scalars)

    def refresh(self, ring: Array, baseline: Moments, start: int, stop: int) -> None:
        """See `rtfmri.backends.Backend.refresh`."""
        window, n_voxels = ring.shape
        sizes = (np.int32(n) for n in (window, start, stop, n_voxels))
        self._launch(
            "moments.cu", "refresh", ring.dtype, blocks_for(stop - start), ring, *baseline, *sizes
        )

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
        # It reads no raw voxels; float32 is what it does read.
        self._per_voxel("contrast", baseline.mean, *condition, *baseline, *out, *per_dof)

    def _per_voxel(self, kernel: str, of: Array, *args: Any) -> None:
        """Launch *kernel* with a thread for each element of *of*, for its dtype."""
        self._launch("moments.cu", kernel, of.dtype, blocks_for(of.size), *args, np.int32(of.size))

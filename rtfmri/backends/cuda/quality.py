"""Quality measures on the GPU: launches ``kernels/quality.cu``."""

from functools import cached_property

import numpy as np

from rtfmri.backends import SLICE_FIELDS, Array, Moments, Shape
from rtfmri.backends.cuda._launch import Launcher, blocks_for

_CHUNK = 4096
"""Voxels a block sums up: QUALITY_CHUNK of ``kernels/quality.cuh``."""


class QualityOperations(Launcher):
    """The operations of `rtfmri.backends.Backend` that judge volumes."""

    def inspect(self, volume: Array, shape: Shape, slices: Array) -> None:
        """See `rtfmri.backends.Backend.inspect`."""
        n_plane, n_slices = shape[0] * shape[1], shape[2]
        per_slice = -(-n_plane // _CHUNK)
        n_blocks = per_slice * n_slices
        sizes = (np.int32(n) for n in (n_plane, per_slice, n_slices))
        args = (volume, *self._scratch_for(n_blocks), slices, *sizes)
        self._launch("quality.cu", "inspect", volume.dtype, n_blocks, *args)

    def compare(self, volume: Array, previous: Array, sums: Array) -> None:
        """See `rtfmri.backends.Backend.compare`."""
        n_blocks = -(-volume.size // _CHUNK)
        args = (volume, previous, *self._scratch_for(n_blocks), sums, np.int32(volume.size))
        self._launch("quality.cu", "compare", np.float32, n_blocks, *args)

    def judge(self, values: Array, limits: Array, usable: Array) -> None:
        """See `rtfmri.backends.Backend.judge`."""
        args = (values, limits, usable, np.int32(values.size))
        self._launch("quality.cu", "judge", np.float32, 1, *args)

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
        scalars = np.float32(gain), np.float32(successive_gain), np.int32(volume.size)
        args = (volume, previous, *moments, successive, usable, *scalars)
        self._launch("quality.cu", "track", np.float32, blocks_for(volume.size), *args)

    @cached_property
    def _scratches(self) -> dict[int, tuple[Array, Array]]:
        return {}

    def _scratch_for(self, n_blocks: int) -> tuple[Array, Array]:
        """Return what *n_blocks* keep their sums in, and their counter; allocated once a size."""
        if n_blocks not in self._scratches:
            with self._staging.stream:
                chunks = self._xp.empty(n_blocks * len(SLICE_FIELDS), np.float64)
                self._scratches[n_blocks] = chunks, self._xp.zeros(1, np.int32)
        return self._scratches[n_blocks]

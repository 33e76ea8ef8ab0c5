"""Smoothing on the GPU: launches ``kernels/smooth.cu``, once an axis."""

import numpy as np

from rtfmri.backends import Array, Shape
from rtfmri.backends.cuda._launch import Launcher, blocks_for


class SmoothOperations(Launcher):
    """The operation of `rtfmri.backends.Backend` on neighbouring voxels."""

    def smooth(
        self,
        volume: Array,
        shape: Shape,
        taps: tuple[Array, Array, Array],
        scratch: Array,
        out: Array,
        *,
        step: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        """See `rtfmri.backends.Backend.smooth`."""
        nx, ny, nz = shape
        mx, my, mz = (-(-n // s) for n, s in zip(shape, step, strict=True))
        # Where no axis is thinned out, the result's own memory holds what is on its way, too.
        first = out if step == (1, 1, 1) else scratch
        second = scratch if step == (1, 1, 1) else scratch[nx * ny * mz :]
        passes = (
            (volume, taps[2], first, nx * ny, nz, step[2], mz, nx * ny * mz),
            (first, taps[1], second, nx, ny, step[1], my, nx * my * mz),
            (second, taps[0], out, 1, nx, step[0], mx, mx * my * mz),
        )
        for source, weights, target, *sizes in passes:
            scalars = (np.int32(i) for i in (weights.size - 1, *sizes))
            args = (source, weights, target, *scalars)
            n_blocks = blocks_for(sizes[-1])
            self._launch("smooth.cu", "smooth_axis", source.dtype, n_blocks, *args)

"""Separable smoothing in numba: the twin of ``kernels/smooth.cu``.

The same sums in the same order, z then y then x, but all three for a slice while it is in the
cache: the volume is read once and the result written once.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

import numpy as np
from numba import njit, prange

from rtfmri.backends import Array, Shape
from rtfmri.backends.cpu._threads import Threads

_inner = njit(error_model="numpy")


@_inner
def _mirror(i, n):
    i %= 2 * n
    return i if i < n else 2 * n - 1 - i


@_inner
def _start(total, weight, values):
    for i in range(total.size):
        total[i] = weight * np.float32(values[i])


@_inner
def _add(total, weight, before, after):
    for i in range(total.size):
        total[i] += weight * (np.float32(before[i]) + np.float32(after[i]))


@_inner
def _line(lines, i, n, size):
    start = _mirror(i, n) * size
    return lines[start : start + size]


@_inner
def _along(target, taps, row):
    radius, n = taps.size - 1, target.size
    _start(target, taps[0], row[radius : radius + n])
    for k in range(1, radius + 1):
        before = row[radius - k : radius - k + n]
        _add(target, taps[k], before, row[radius + k : radius + k + n])


@_inner
def _along_every(target, taps, row, phases):
    """Filter every step-th voxel: those the same distance from one are side by side in *phases*.

    So that the sums vectorise as they do without a step.
    """
    radius, step = taps.size - 1, phases.shape[0]
    for p in range(step):
        phase, values = phases[p], row[p::step]
        for i in range(values.size):
            phase[i] = values[i]
    _start(target, taps[0], phases[radius % step, radius // step :])
    for k in range(1, radius + 1):
        low, high = radius - k, radius + k
        before = phases[low % step, low // step :]
        _add(target, taps[k], before, phases[high % step, high // step :])


@njit(parallel=True, cache=True, error_model="numpy")
def smooth(
    volume, nx, ny, nz, taps_x, taps_y, taps_z, step_x, step_y, step_z, scratch, out, threads
) -> None:
    """See `rtfmri.backends.Backend.smooth`; *threads* is at most the slices of *out*."""
    n_plane = nx * ny
    mx, my, mz = (nx - 1) // step_x + 1, (ny - 1) // step_y + 1, (nz - 1) // step_z + 1
    rx, ry, rz = taps_x.size - 1, taps_y.size - 1, taps_z.size - 1
    for thread in prange(threads):
        plane = scratch[thread * n_plane : (thread + 1) * n_plane]
        row = np.empty(nx + 2 * rx, np.float32)
        middle = row[rx : rx + nx]
        phases = np.empty((step_x, (row.size - 1) // step_x + 1), np.float32)
        for z in range(mz * thread // threads, mz * (thread + 1) // threads):
            at = z * step_z
            _start(plane, taps_z[0], _line(volume, at, nz, n_plane))
            for k in range(1, rz + 1):
                before = _line(volume, at - k, nz, n_plane)
                _add(plane, taps_z[k], before, _line(volume, at + k, nz, n_plane))
            for y in range(my):
                at = y * step_y
                _start(middle, taps_y[0], _line(plane, at, ny, nx))
                for k in range(1, ry + 1):
                    before = _line(plane, at - k, ny, nx)
                    _add(middle, taps_y[k], before, _line(plane, at + k, ny, nx))
                for i in range(rx):
                    row[i] = middle[_mirror(i - rx, nx)]
                    row[rx + nx + i] = middle[_mirror(nx + i, nx)]
                target = _line(out, z * my + y, mz * my, mx)
                if step_x == 1:
                    _along(target, taps_x, row)
                else:
                    _along_every(target, taps_x, row, phases)


class SmoothOperations(Threads):
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
        share = min(self._share(volume.size), -(-shape[2] // step[2]))
        smooth(volume, *shape, *taps, *step, scratch, out, share)

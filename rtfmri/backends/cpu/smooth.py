"""Separable smoothing in numba: the twin of ``kernels/smooth.cu``.

The same sums in the same order, z then y then x, but all three for a slice while it is in the
cache: the volume is read once and the result written once.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

import numpy as np
from numba import njit, prange

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


@njit(parallel=True, cache=True, error_model="numpy")
def smooth(volume, nx, ny, nz, taps_x, taps_y, taps_z, scratch, out, threads) -> None:
    """See `rtfmri.backends.Backend.smooth`; *threads* is at most *nz*."""
    n_plane = nx * ny
    rx, ry, rz = taps_x.size - 1, taps_y.size - 1, taps_z.size - 1
    for thread in prange(threads):
        plane = scratch[thread * n_plane : (thread + 1) * n_plane]
        row = np.empty(nx + 2 * rx, np.float32)
        middle = row[rx : rx + nx]
        for z in range(nz * thread // threads, nz * (thread + 1) // threads):
            _start(plane, taps_z[0], _line(volume, z, nz, n_plane))
            for k in range(1, rz + 1):
                before = _line(volume, z - k, nz, n_plane)
                _add(plane, taps_z[k], before, _line(volume, z + k, nz, n_plane))
            for y in range(ny):
                _start(middle, taps_y[0], _line(plane, y, ny, nx))
                for k in range(1, ry + 1):
                    before = _line(plane, y - k, ny, nx)
                    _add(middle, taps_y[k], before, _line(plane, y + k, ny, nx))
                for i in range(rx):
                    row[i] = middle[_mirror(i - rx, nx)]
                    row[rx + nx + i] = middle[_mirror(nx + i, nx)]
                target = _line(out, z * ny + y, nz * ny, nx)
                _start(target, taps_x[0], middle)
                for k in range(1, rx + 1):
                    _add(target, taps_x[k], row[rx - k : rx - k + nx], row[rx + k : rx + k + nx])

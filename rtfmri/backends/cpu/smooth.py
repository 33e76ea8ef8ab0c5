"""Separable smoothing in numba: the twin of ``kernels/smooth.cu``.

The same sums in the same order, z then y then x, but all three for a slice while it is in the
cache: the volume is read once and the result written once. Several rows are filtered as one long
line, and a sum stays in its register for four pairs of neighbours.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

import numpy as np
from numba import njit, prange

from rtfmri.backends import Array, Shape
from rtfmri.backends.cpu._threads import Threads

_RUN = 1536  # voxels filtered at once, about; their sums stay in the L1 cache
_LANES = 16  # of the widest vector registers there are; runs are filled up to a multiple

# A slice counts references, atomically, and an index that might be negative keeps a loop from
# being vectorised: hence whole arrays, and unsigned offsets into them.
_inner = njit(error_model="numpy", forceinline=True)


@_inner
def _mirror(i, n):
    i %= 2 * n
    return i if i < n else 2 * n - 1 - i


@_inner
def _filled_up(n):
    return (n + _LANES - 1) // _LANES * _LANES


@_inner
def _copy(n, values, start, out, place):
    n, start, place = np.uint64(n), np.uint64(start), np.uint64(place)
    for i in range(n):
        out[place + i] = values[start + i]


@_inner
def _pair(lines, shift, taps, k):
    """Return the weight of the k-th pair of neighbours, and where they are."""
    radius = taps.size - 1
    k = min(k, radius)
    return taps[k], np.uint64(lines[radius - k] + shift), np.uint64(lines[radius + k] + shift)


@_inner
def _four(lines, shift, taps, k):
    return (
        _pair(lines, shift, taps, k),
        _pair(lines, shift, taps, k + 1),
        _pair(lines, shift, taps, k + 2),
        _pair(lines, shift, taps, k + 3),
    )


@_inner
def _plus(total, pair, values, i):
    weight, before, after = pair
    return total + weight * (np.float32(values[before + i]) + np.float32(values[after + i]))


@_inner
def _plus2(total, pairs, values, i):
    return _plus(_plus(total, pairs[0], values, i), pairs[1], values, i)


@_inner
def _plus3(total, pairs, values, i):
    return _plus(_plus2(total, pairs, values, i), pairs[2], values, i)


@_inner
def _plus4(total, pairs, values, i):
    return _plus(_plus3(total, pairs, values, i), pairs[3], values, i)


@njit(error_model="numpy")
def _filter(n, values, lines, shift, taps, out, place):
    """Filter *n* voxels; *lines* are the places of the first one's neighbours, itself included."""
    radius, weight = taps.size - 1, taps[0]
    n, place = np.uint64(n), np.uint64(place)
    middle, pairs = np.uint64(lines[radius] + shift), _four(lines, shift, taps, 1)
    first = radius % 4  # so many pairs at first, and then always four
    if first == 0:
        for i in range(n):
            out[place + i] = weight * np.float32(values[middle + i])
    elif first == 1:
        for i in range(n):
            out[place + i] = _plus(weight * np.float32(values[middle + i]), pairs[0], values, i)
    elif first == 2:
        for i in range(n):
            out[place + i] = _plus2(weight * np.float32(values[middle + i]), pairs, values, i)
    else:
        for i in range(n):
            out[place + i] = _plus3(weight * np.float32(values[middle + i]), pairs, values, i)
    for k in range(first + 1, radius + 1, 4):
        pairs = _four(lines, shift, taps, k)
        for i in range(n):
            out[place + i] = _plus4(out[place + i], pairs, values, i)


@njit(parallel=True, cache=True, error_model="numpy")
def smooth(
    volume, nx, ny, nz, taps_x, taps_y, taps_z, step_x, step_y, step_z, out, threads
) -> None:
    """See `rtfmri.backends.Backend.smooth`; *threads* is at most the slices of *out*."""
    n_plane = nx * ny
    mx, my, mz = (nx - 1) // step_x + 1, (ny - 1) // step_y + 1, (nz - 1) // step_z + 1
    rx, ry, rz = taps_x.size - 1, taps_y.size - 1, taps_z.size - 1
    most = min(max(_RUN // nx, 1), my)  # rows at a time
    side_by_side = most if step_y == 1 else 1
    pitch = (nx + 2 * rx - 1) // step_x + 1
    n_phase = most * pitch + 2 * rx + _LANES
    for thread in prange(threads):
        lines_z = np.empty(2 * rz + 1, np.int64)
        lines_y, lines_x = np.arange(2 * ry + 1) * nx, np.arange(2 * rx + 1)
        lines_x = lines_x % step_x * n_phase + lines_x // step_x
        plane = np.zeros((ny + 2 * ry) * nx + _LANES, np.float32)
        rows = np.empty(most * nx + _LANES, np.float32)
        mirrored = np.zeros(step_x * n_phase, np.float32)
        phases = mirrored if step_x == 1 else np.zeros(step_x * n_phase, np.float32)
        sums = np.empty(most * pitch + _LANES, np.float32)
        for z in range(mz * thread // threads, mz * (thread + 1) // threads):
            for k in range(2 * rz + 1):
                lines_z[k] = _mirror(z * step_z + k - rz, nz) * n_plane
            for i in range(0, n_plane, _RUN):
                n = min(_RUN, n_plane - i)
                _filter(n, volume, lines_z, i, taps_z, plane, ry * nx + i)
            for k in range(ry):
                _copy(nx, plane, (ry + k) * nx, plane, (ry - 1 - k) * nx)
                _copy(nx, plane, (ry + ny - 1 - k) * nx, plane, (ry + ny + k) * nx)
            for y in range(0, my, most):
                n_rows = min(most, my - y)
                for row in range(0, n_rows, side_by_side):
                    n, shift = min(side_by_side, n_rows) * nx, (y + row) * step_y * nx
                    _filter(_filled_up(n), plane, lines_y, shift, taps_y, rows, row * nx)
                for row in range(n_rows):
                    start = row * pitch * step_x + rx
                    end = start + nx
                    _copy(nx, rows, row * nx, mirrored, start)
                    for k in range(rx):
                        mirrored[start - 1 - k] = mirrored[start + k]
                        mirrored[end + k] = mirrored[end - 1 - k]
                if step_x > 1:
                    # Voxels a step apart are put side by side: so their sums vectorise, too.
                    for p in range(step_x):
                        for i in range(n_rows * pitch):
                            phases[p * n_phase + i] = mirrored[i * step_x + p]
                _filter(_filled_up(n_rows * pitch), phases, lines_x, 0, taps_x, sums, 0)
                for row in range(n_rows):
                    _copy(mx, sums, row * pitch, out, (z * my + y + row) * mx)


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
        """See `rtfmri.backends.Backend.smooth`; *scratch* is left as it was."""
        share = min(self._share(volume.size), -(-shape[2] // step[2]))
        smooth(volume, *shape, *taps, *step, out, share)

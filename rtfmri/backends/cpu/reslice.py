"""Reslicing and gathering in numba: the twin of ``kernels/interpolate.cuh`` and ``reslice.cu``.

The same float32 operations in the same order. A rigid motion displaces neighbours along x by
nearly the same, so a run is cut into segments in which the whole voxels of the displacement are
constant: the neighbours of a segment's voxels are then lines side by side, and one loop without
any gathering computes its weights and sums. The loop reads the lines from a small cache, where
they are float32 already, their edges mirrored, neighbouring ones always the same distance apart.
"""

# numba infers the types; annotations here would only repeat rtfmri.backends.Backend.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

from functools import cached_property

import numpy as np
from numba import njit, prange

from rtfmri.backends import Array, Region, Shape
from rtfmri.backends.cpu._threads import Threads
from rtfmri.config import Interpolation

_ONE, _TWO, _THREE, _HALF = (np.float32(v) for v in (1, 2, 3, 0.5))
_MINUS_HALF, _SIXTH, _TWO_THIRDS = (np.float32(v) for v in (-0.5, 1 / 6, 2 / 3))

_LANES = 16  # of the widest vector registers there are; segments are filled up to a multiple
_TILE = 256  # places along x of a cached line
_LEAD = 16  # a line's first place lies here, aligned; the neighbour before it just before
_LINE = _LEAD + _TILE + 2 * _LANES  # the last vector reads beyond the tile's end
_SLOTS = 16  # lines of the cache along y and z each, by the last bits of their indices
_LAST_SLOT = _SLOTS - 1
_PLANE = (_SLOTS + 3) * _LINE  # the first three once more at the end: four lines never wrap
_U1, _U2, _U3, _U_LINE = (np.uint64(v) for v in (1, 2, 3, _LINE))
_TRILINEAR, _CATMULL_ROM, _BSPLINE = range(3)
_KINDS: dict[Interpolation, int] = {
    "trilinear": _TRILINEAR,
    "catmull-rom": _CATMULL_ROM,
    "bspline": _BSPLINE,
}

# A call that is left in a loop keeps it from being vectorised, and so does an index that might be
# negative: hence unsigned ones. A slice would do, too, but counts references, atomically.
_inner = njit(error_model="numpy", forceinline=True)
_kernel = njit(parallel=True, cache=True, error_model="numpy")


@_inner
def _linear(f):
    return _ONE - f, f


@_inner
def _catmull_rom(f):
    """Return the weights of cubic convolution, a = -1/2 (Keys 1981, IEEE Trans. ASSP 29:1153)."""
    g = _ONE - f
    n = (_MINUS_HALF * f) * g
    t = _THREE * f
    return n * g, g - n * (_TWO - t), f - n * (t - _ONE), n * f


@_inner
def _bspline(f):
    """Return the weights of the cubic B-spline (Unser 1999, IEEE Signal Proc. Mag. 16(6):22)."""
    g = _ONE - f
    f2, g2 = f * f, g * g
    return (
        _SIXTH * (g2 * g),
        _TWO_THIRDS - (_HALF * f2) * (_TWO - f),
        _TWO_THIRDS - (_HALF * g2) * (_TWO - g),
        _SIXTH * (f2 * f),
    )


@_inner
def _row2(v, i, x):
    return x[0] * v[i] + x[1] * v[i + _U1]


@_inner
def _plane2(v, i, x, y):
    return y[0] * _row2(v, i, x) + y[1] * _row2(v, i + _U_LINE, x)


@_inner
def _cube2(v, corners, i, x, y, z):
    return z[0] * _plane2(v, corners[0] + i, x, y) + z[1] * _plane2(v, corners[1] + i, x, y)


@_inner
def _row4(v, i, x):
    return ((x[0] * v[i] + x[1] * v[i + _U1]) + x[2] * v[i + _U2]) + x[3] * v[i + _U3]


@_inner
def _plane4(v, i, x, y):
    total = y[0] * _row4(v, i, x) + y[1] * _row4(v, i + _U_LINE, x)
    total = total + y[2] * _row4(v, i + _U2 * _U_LINE, x)
    return total + y[3] * _row4(v, i + _U3 * _U_LINE, x)


@_inner
def _cube4(v, corners, i, x, y, z):
    total = z[0] * _plane4(v, corners[0] + i, x, y) + z[1] * _plane4(v, corners[1] + i, x, y)
    total = total + z[2] * _plane4(v, corners[2] + i, x, y)
    return total + z[3] * _plane4(v, corners[3] + i, x, y)


@_inner
def _displacement(base, slope, low, high, x):
    return min(max(base + slope * x, low), high)


@_inner
def _floor(d):
    whole = np.int64(d)
    return whole - 1 if d < whole else whole


@_inner
def _whole(base, slope, low, high, x):
    return _floor(_displacement(base, slope, low, high, np.float32(x)))


@_inner
def _end(base, slope, low, high, x, stop):
    """Return the first voxel after *x*, up to *stop*, displaced by other whole voxels.

    A rounded product plus a constant, rounded and clamped, is monotone in x: as soon as the
    displacement at *stop* is another, one change lies between.
    """
    whole = _whole(base, slope, low, high, x)
    if _whole(base, slope, low, high, stop - 1) == whole:
        return stop
    edge = whole + 1 if slope > 0 else whole
    guess = x + (edge - (base + slope * x)) / slope
    end = int(min(max(guess, x + 1), stop - 1))
    while _whole(base, slope, low, high, end) == whole:
        end += 1
    while _whole(base, slope, low, high, end - 1) != whole:
        end -= 1
    return end


@_inner
def _mirror(i, n):
    if i < 0:
        return -1 - i
    return i if i < n else max(2 * n - 1 - i, 0)


@_inner
def _copy(n, values, start, out, place):
    start, place = np.uint64(start), np.uint64(place)
    for i in range(n):
        out[place + np.uint64(i)] = np.float32(values[start + np.uint64(i)])


@_inner
def _copy_scaled(n, values, start, scale, first, out, place):
    start, first, place = np.uint64(start), np.uint64(first), np.uint64(place)
    for i in range(n):
        value = np.float32(values[start + np.uint64(i)])
        out[place + np.uint64(i)] = value * scale[first + np.uint64(i)]


@_inner
def _fetch(volume, start, nx, first, cache, place):
    """Copy what a tile needs of the line of *volume* from *start* on, edges mirrored."""
    n = min(_TILE, nx - first)
    _copy(n, volume, start + first, cache, place)
    cache[place - 1] = np.float32(volume[start + _mirror(first - 1, nx)])
    cache[place + n] = np.float32(volume[start + _mirror(first + n, nx)])
    cache[place + n + 1] = np.float32(volume[start + _mirror(first + n + 1, nx)])


@_inner
def _provide(volume, nx, ny, nz, tile, y, z, taps, cache, tags):
    """See that the lines from (y, z) on are in the cache; beyond the edges they are mirrored."""
    for k in range(taps):
        slot_z = (z + k) & _LAST_SLOT
        for j in range(taps):
            slot_y = (y + j) & _LAST_SLOT
            tag = (tile * (nz + 3) + z + k + 1) * (ny + 3) + y + j + 1
            if tags[slot_z, slot_y] != tag:
                tags[slot_z, slot_y] = tag
                start = (_mirror(z + k, nz) * ny + _mirror(y + j, ny)) * nx
                place = slot_z * _PLANE + slot_y * _LINE + _LEAD
                _fetch(volume, start, nx, tile * _TILE, cache, place)
                if slot_y < taps - 1:
                    _fetch(volume, start, nx, tile * _TILE, cache, place + _SLOTS * _LINE)


@_inner
def _fractions(along_x, along_y, along_z, x):
    bx, sx, ox, last = along_x
    by, sy, oy, ly, hy = along_y
    bz, sz, oz, lz, hz = along_z
    fx = _displacement(bx, sx, -x, last - x, x) - ox
    fy = _displacement(by, sy, ly, hy, x) - oy
    return fx, fy, _displacement(bz, sz, lz, hz, x) - oz


@_inner
def _segment(cache, corners, kind, x, n, along_x, along_y, along_z, line, place):
    """Interpolate *n* voxels from *x* on, and what is beyond them in the last vector."""
    place = np.uint64(place)
    n_padded = (n + _LANES - 1) // _LANES * _LANES
    if kind == _TRILINEAR:
        for i in range(n_padded):
            fx, fy, fz = _fractions(along_x, along_y, along_z, np.float32(x + i))
            wx, wy, wz = _linear(fx), _linear(fy), _linear(fz)
            line[place + np.uint64(i)] = _cube2(cache, corners, np.uint64(i), wx, wy, wz)
    elif kind == _CATMULL_ROM:
        for i in range(n_padded):
            fx, fy, fz = _fractions(along_x, along_y, along_z, np.float32(x + i))
            wx, wy, wz = _catmull_rom(fx), _catmull_rom(fy), _catmull_rom(fz)
            line[place + np.uint64(i)] = _cube4(cache, corners, np.uint64(i), wx, wy, wz)
    else:
        for i in range(n_padded):
            fx, fy, fz = _fractions(along_x, along_y, along_z, np.float32(x + i))
            wx, wy, wz = _bspline(fx), _bspline(fy), _bspline(fz)
            line[place + np.uint64(i)] = _cube4(cache, corners, np.uint64(i), wx, wy, wz)


@_inner
def _run(volume, nx, ny, nz, m, kind, source, length, cache, tags, line):
    """Reslice *length* voxels along x from *source* on into *line*."""
    x, y, z = source % nx, source // nx % ny, source // (nx * ny)
    bx, sx = np.float32((m[1] * y + m[2] * z) + m[3]), np.float32(m[0] - 1.0)
    by, sy = np.float32(((m[5] - 1.0) * y + m[6] * z) + m[7]), np.float32(m[4])
    bz, sz = np.float32((m[9] * y + (m[10] - 1.0) * z) + m[11]), np.float32(m[8])
    ly, hy = np.float32(-y), np.float32(ny - 1 - y)
    lz, hz = np.float32(-z), np.float32(nz - 1 - z)
    taps = 2 if kind == _TRILINEAR else 4
    before = taps // 2 - 1
    first, end = x, x + length
    while x < end:
        free = bx + sx * np.float32(x)
        dx = min(max(free, np.float32(-x)), np.float32(nx - 1 - x))
        ox, oy, oz = _floor(dx), _whole(by, sy, ly, hy, x), _whole(bz, sz, lz, hz, x)
        tile = (x + ox) // _TILE
        stop = x + 1  # outside along x, each voxel has a displacement of its own
        if dx == free:
            stop = min(end, min((tile + 1) * _TILE, nx) - ox)
            stop = _end(bx, sx, np.float32(-np.inf), np.float32(np.inf), x, stop)
            stop = _end(by, sy, ly, hy, x, stop)
            stop = _end(bz, sz, lz, hz, x, stop)
        py, pz = y + oy - before, z + oz - before
        _provide(volume, nx, ny, nz, tile, py, pz, taps, cache, tags)
        corner = (py & _LAST_SLOT) * _LINE + _LEAD + x + ox - before - tile * _TILE
        corners = (
            np.uint64((pz & _LAST_SLOT) * _PLANE + corner),
            np.uint64((pz + 1 & _LAST_SLOT) * _PLANE + corner),
            np.uint64((pz + 2 & _LAST_SLOT) * _PLANE + corner),
            np.uint64((pz + 3 & _LAST_SLOT) * _PLANE + corner),
        )
        along_x = bx, sx, np.float32(ox), np.float32(nx - 1)
        along_y, along_z = (by, sy, np.float32(oy), ly, hy), (bz, sz, np.float32(oz), lz, hz)
        n, place = stop - x, x - first
        _segment(cache, corners, kind, x, n, along_x, along_y, along_z, line, place)
        x = stop


@_kernel
def reslice(
    volume, nx, ny, nz, matrix, kind, runs, n_voxels, out, all_caches, all_tags, threads
) -> None:
    """See `rtfmri.backends.Backend.reslice`; a run belongs to the thread that its start does."""
    for thread in prange(threads):
        cache, tags = all_caches[thread], all_tags[thread]
        for slot in range(_SLOTS):
            for other in range(_SLOTS):
                tags[slot, other] = -1
        line = np.empty(nx + _LANES, np.float32)
        begin = 0
        for r in range(runs.shape[0]):
            source, target, length = runs[r, 0], runs[r, 1], runs[r, 2]
            if n_voxels * thread <= begin * threads < n_voxels * (thread + 1):
                _run(volume, nx, ny, nz, matrix, kind, source, length, cache, tags, line)
                _copy(length, line, 0, out, target)
            begin += length


@_kernel
def gather(volume, runs, n_voxels, scale, scaled, out, threads) -> None:
    """See `rtfmri.backends.Backend.gather`."""
    for thread in prange(threads):
        begin = 0
        for r in range(runs.shape[0]):
            source, target, length = runs[r, 0], runs[r, 1], runs[r, 2]
            if n_voxels * thread <= begin * threads < n_voxels * (thread + 1):
                if scaled:
                    _copy_scaled(length, volume, source, scale, begin, out, target)
                else:
                    _copy(length, volume, source, out, target)
            begin += length


class ResliceOperations(Threads):
    """The operations of `rtfmri.backends.Backend` on voxels that move."""

    def reslice(
        self,
        volume: Array,
        shape: Shape,
        matrix: Array,
        interpolation: Interpolation,
        region: Region,
        out: Array,
    ) -> None:
        """See `rtfmri.backends.Backend.reslice`."""
        n, kind = region.sources.size, _KINDS[interpolation]
        args = (matrix, kind, region.runs, n, out, *self._line_caches, self._share(n))
        reslice(volume, *shape, *args)

    def gather(self, volume: Array, region: Region, scale: Array | None, out: Array) -> None:
        """See `rtfmri.backends.Backend.gather`."""
        n, scaled = region.sources.size, scale is not None
        gather(volume, region.runs, n, scale if scaled else out, scaled, out, self._share(n))

    @cached_property
    def _line_caches(self) -> tuple[Array, Array]:
        """Return each thread's cache of lines, and what is in it; kept from volume to volume."""
        # The last vector of a line is computed beyond its end, from what lies there: where that
        # happened to be denormal numbers, it took up to five times as long.
        caches = np.zeros((self.threads, _SLOTS * _PLANE), np.float32)
        return caches, np.empty((self.threads, _SLOTS, _SLOTS), np.int64)

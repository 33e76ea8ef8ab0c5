"""Rigid registration in numba: the twin of ``kernels/register.cu``.

The same operations in the same order, so that both find the same pose to the last bit: a point's
value in float32, sums in float64 over chunks of 256 points, which do not depend on the threads.
"""

# numba infers the types; annotations here would only repeat rtfmri.backends.Backend.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# ruff: noqa: ANN001, ANN202

import math

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from rtfmri.backends import Array, Pose, Shape, Template
from rtfmri.backends.cpu._threads import Threads

_CHUNK = 256
_N_SUMS = 11
_ZERO, _ONE, _THREE, _FOUR, _SIX = (np.float32(n) for n in (0, 1, 3, 4, 6))
_SIXTH = np.float32(1 / 6)
_LARGEST = np.finfo(np.float32).max

# Places in Pose.fields, as POSE_FIELDS has them, and in what Pose.sums keeps from step to step:
# the pose before and the one on trial, how many volumes were found, where the pose on trial takes
# the coefficient grid, whether the last step was taken. The sums of the chunks follow.
_FD_POWER, _FD_JENKINSON, _INSIDE, _RESIDUAL, _N_ITERATIONS, _CONVERGED = 8, 9, 10, 11, 12, 13
_BEFORE, _TRIAL, _N_FOUND, _PLACE, _DONE, _N_STATE = 0, 8, 16, 17, 29, 30

_RADIUS_MM = 50.0
_JENKINSON_RADIUS_MM = 80.0
_MIN_INSIDE = 0.5
_MAX_SQUARED_RESIDUAL = 0.5
_MIN_SCALE, _MAX_SCALE = 0.3, 3.0
_LOW, _HIGH = 0.03, 30.0
_SCALE_TOLERANCE = 0.01

_inline = njit(inline="always", error_model="numpy")
_inner = njit(error_model="numpy")


@_inner
def _place(x, y, z, a, b, c, d, end, index, weights, inside):
    """Move points along one axis of the grid; weigh the four neighbours of each with B-splines."""
    for i in range(x.size):
        q = a * x[i] + b * y[i] + c * z[i] + d
        # `&`, unlike `and`, leaves the loop one that vectorises.
        within = (q >= _ONE) & (q < end)
        q = q if within else _ONE
        at = np.int32(q)
        t = q - np.float32(at)
        u = _ONE - t
        index[i] = at - 1
        weights[i] = u * u * u * _SIXTH
        weights[_CHUNK + i] = (_FOUR + t * t * (_THREE * t - _SIX)) * _SIXTH
        weights[2 * _CHUNK + i] = (_FOUR + u * u * (_THREE * u - _SIX)) * _SIXTH
        weights[3 * _CHUNK + i] = t * t * t * _SIXTH
        inside[i] = inside[i] & within


@intrinsic
def _sum_of_taps(context, coefficients, first, nx, plane, wx, wy, wz):
    """Weigh the 4 x 4 x 4 coefficients from *first* on: four neighbours along x at a time.

    The neighbours along x stay apart until the end, and so are one vector: LLVM, which may not
    change the order of float32 sums, does not find that by itself (11.7 ns a point; 4.3 so).
    """

    def code(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        first, nx, plane = args[1:4]
        wx, wy, wz = ([builder.extract_value(w, i) for i in range(4)] for w in args[4:])
        lane = ir.IntType(32)
        four = ir.VectorType(ir.FloatType(), 4)
        nothing = ir.Constant(four, ir.Undefined)
        all_first = ir.Constant(ir.VectorType(lane, 4), [0] * 4)

        def weigh(weight, values, total):
            weights = builder.insert_element(nothing, weight, lane(0))
            term = builder.fmul(builder.shuffle_vector(weights, nothing, all_first), values)
            return builder.fadd(total, term) if total is not None else term

        total = None
        for z in range(4):
            row, part = first, None
            for y in range(4):
                address = builder.bitcast(builder.gep(array.data, [row]), four.as_pointer())
                part = weigh(wy[y], builder.load(address, align=4), part)
                row = builder.add(row, nx)
            total = weigh(wz[z], part, total)
            first = builder.add(first, plane)
        columns = [builder.fmul(wx[x], builder.extract_element(total, lane(x))) for x in range(4)]
        value = columns[0]
        for column in columns[1:]:
            value = builder.fadd(value, column)
        return value

    return types.float32(coefficients, first, nx, plane, wx, wy, wz), code


@_inline
def _four(weights, i):
    second, third, fourth = _CHUNK + i, 2 * _CHUNK + i, 3 * _CHUNK + i
    return weights[i], weights[second], weights[third], weights[fourth]


@_inner
def _values(coefficients, nx, ny, index, weights, out):
    row, plane = np.int64(nx), np.int64(nx * ny)
    x, y, z = index[0], index[1], index[2]
    wx, wy, wz = weights[0], weights[1], weights[2]
    for i in range(out.size):
        first = z[i] * plane + y[i] * row + x[i]
        four_x, four_y, four_z = _four(wx, i), _four(wy, i), _four(wz, i)
        out[i] = _sum_of_taps(coefficients, first, row, plane, four_x, four_y, four_z)


@_inner
def _terms(f, inside, scale, values, jacobian, terms):
    for i in range(f.size):
        e = f[i] / scale - values[i]
        # A value that is not finite is left out, as a place outside is.
        use = inside[i] & (abs(e) <= _LARGEST)
        e = e if use else _ZERO
        r = values[i] if use else _ZERO
        f[i] = e
        terms[7, i] = np.float64(e) * np.float64(e)
        terms[8, i] = 1.0 if use else 0.0
        terms[9, i] = np.float64(r)
        terms[10, i] = np.float64(r) * np.float64(r)
    j0, j1, j2, j3 = jacobian[0], jacobian[1], jacobian[2], jacobian[3]
    j4, j5, j6 = jacobian[4], jacobian[5], jacobian[6]
    for i in range(f.size):
        e = np.float64(f[i])
        terms[0, i] = np.float64(j0[i]) * e
        terms[1, i] = np.float64(j1[i]) * e
        terms[2, i] = np.float64(j2[i]) * e
        terms[3, i] = np.float64(j3[i]) * e
        terms[4, i] = np.float64(j4[i]) * e
        terms[5, i] = np.float64(j5[i]) * e
        terms[6, i] = np.float64(j6[i]) * e
    for k in range(_N_SUMS):
        for i in range(f.size, _CHUNK):
            terms[k, i] = 0.0


@_inner
def _add_halves(low, high):
    for i in range(low.size):
        low[i] += high[i]


@_inner
def _tree(terms, sums):
    for k in range(_N_SUMS):
        term = terms[k]
        half = _CHUNK // 2
        while half:
            _add_halves(term[:half], term[half : 2 * half])
            half //= 2
        sums[k] = term[0]


@_inner
def _compose(q, p, out):
    """Quaternion product: first *p*, then *q*."""
    w = q[0] * p[0] - q[1] * p[1] - q[2] * p[2] - q[3] * p[3]
    x = q[0] * p[1] + q[1] * p[0] + q[2] * p[3] - q[3] * p[2]
    y = q[0] * p[2] - q[1] * p[3] + q[2] * p[0] + q[3] * p[1]
    z = q[0] * p[3] + q[1] * p[2] - q[2] * p[1] + q[3] * p[0]
    out[0], out[1], out[2], out[3] = w, x, y, z


@_inner
def _rotation(q, r):
    w, x, y, z = q[0], q[1], q[2], q[3]
    r[0], r[1], r[2] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    r[3], r[4], r[5] = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    r[6], r[7], r[8] = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)


@_inner
def _map_voxels(pose, to_mm, from_mm, out):
    """Write the pose as a map of voxels: to mm, moved, and back."""
    r, moved = np.empty(9), np.empty(3)
    _rotation(pose, r)
    for j in range(4):
        for k in range(3):
            a, b, c = r[3 * k], r[3 * k + 1], r[3 * k + 2]
            moved[k] = a * to_mm[0, j] + b * to_mm[1, j] + c * to_mm[2, j]
            if j == 3:
                moved[k] += pose[4 + k]
        for i in range(3):
            a, b, c = from_mm[i, 0], from_mm[i, 1], from_mm[i, 2]
            out[4 * i + j] = a * moved[0] + b * moved[1] + c * moved[2]
            if j == 3:
                out[4 * i + j] += from_mm[i, 3]


@_inner
def _angle(y, x):
    """Angle of (x, y): halved four times, where its series needs few terms.

    Basic operations alone round alike everywhere; a library's atan2 does not.
    """
    u = y / (x + math.sqrt(x * x + y * y))
    for _ in range(3):
        u = u / (1 + math.sqrt(1 + u * u))
    square, s = u * u, 0.0
    for k in range(25, -1, -2):
        s = 1.0 / k - square * s
    return 16 * u * s


@_inner
def euler(q, out) -> None:
    """Angles about x, y, z of a rotation Rz Ry Rx, in radians."""
    r = np.empty(9)
    _rotation(q, r)
    out[0] = _angle(r[7], r[8])
    out[1] = _angle(-r[6], math.sqrt(r[7] * r[7] + r[8] * r[8]))
    out[2] = _angle(r[3], r[0])


@_inner
def _advance(trial, step):
    """Follow *trial* after the inverse of the template's *step*."""
    turn = np.empty(4)
    turn[0], turn[1], turn[2], turn[3] = 1.0, -0.5 * step[3], -0.5 * step[4], -0.5 * step[5]
    _compose(trial, turn, trial)
    w, x, y, z = trial[0], trial[1], trial[2], trial[3]
    norm = math.sqrt(w * w + x * x + y * y + z * z)
    for i in range(4):
        trial[i] /= norm
    r = np.empty(9)
    _rotation(trial, r)
    for i in range(3):
        trial[4 + i] -= r[3 * i] * step[0] + r[3 * i + 1] * step[1] + r[3 * i + 2] * step[2]
    # Far beyond the limits for a result, so that a first step may overshoot.
    scale = trial[7] * (1.0 + step[6])
    trial[7] = (scale if scale < _HIGH else _HIGH) if scale > _LOW else _LOW


@_inner
def _displace(fields, before, trial):
    old, new, turn = np.empty(3), np.empty(3), np.empty(4)
    euler(before, old)
    euler(trial, new)
    shifts = turns = squares = 0.0
    for i in range(3):
        d = trial[4 + i] - before[4 + i]
        shifts += abs(d)
        squares += d * d
        turns += abs(new[i] - old[i])
    fields[_FD_POWER] = shifts + _RADIUS_MM * turns
    turn[0], turn[1], turn[2], turn[3] = before[0], -before[1], -before[2], -before[3]
    _compose(turn, trial, turn)
    sine = turn[1] * turn[1] + turn[2] * turn[2] + turn[3] * turn[3]
    # Over a sphere of radius r, mean squares are r^2 / 5 tr(A'A), here with A'A = 8 sine / 3.
    squares += 1.6 * _JENKINSON_RADIUS_MM * _JENKINSON_RADIUS_MM * sine
    fields[_FD_JENKINSON] = math.sqrt(squares)


@_inner
def _judge(step, totals, n_points, state, fields, iteration, last, tolerance_mm):
    """Judge the pose on trial after a step; return whether it is the volume's.

    Where the step was the last one, for better or worse, the fields say what came out.
    """
    before, trial = state[_BEFORE:_TRIAL], state[_TRIAL:_N_FOUND]
    n, mean = totals[8], totals[9] / totals[8]
    spread = totals[10] / n - mean * mean
    squared_residual = totals[7] / n / spread
    shift = math.sqrt(step[0] * step[0] + step[1] * step[1] + step[2] * step[2])
    turn = math.sqrt(step[3] * step[3] + step[4] * step[4] + step[5] * step[5])
    inside = n / n_points
    # Each is false of what is not a number.
    still = shift + _RADIUS_MM * turn <= tolerance_mm and abs(step[6]) <= _SCALE_TOLERANCE
    sane = inside >= _MIN_INSIDE and shift <= _LARGEST and turn <= _LARGEST
    sane = sane and trial[7] > _LOW and trial[7] < _HIGH
    fits = squared_residual <= _MAX_SQUARED_RESIDUAL
    good = still and sane and fits and trial[7] >= _MIN_SCALE and trial[7] <= _MAX_SCALE
    done = still or not sane or last
    state[_DONE] = 1.0 if done else 0.0
    if not done:
        return False
    fields[_FD_POWER] = fields[_FD_JENKINSON] = 0.0
    fields[_INSIDE] = inside
    fields[_RESIDUAL] = math.sqrt(squared_residual)
    fields[_N_ITERATIONS] = iteration + 1
    fields[_CONVERGED] = 1.0 if good else 0.0
    if good:
        if state[_N_FOUND] > 0.0:
            _displace(fields, before, trial)
        state[_N_FOUND] += 1.0
    for i in range(8):
        if good:
            before[i] = trial[i]
        else:
            trial[i] = before[i]
        fields[i] = before[i]
    return good


@njit(parallel=True, cache=True, error_model="numpy")
def register(
    coefficients,
    nx,
    ny,
    nz,
    points,
    values,
    jacobian,
    inverse_hessian,
    to_mm,
    from_mm,
    fields,
    matrix,
    sums,
    max_iterations,
    tolerance_mm,
    threads,
) -> None:
    """See `rtfmri.backends.Backend.register`."""
    n = values.size
    n_chunks = (n + _CHUNK - 1) // _CHUNK
    state = sums[:_N_STATE]
    totals, step = np.empty(_N_SUMS), np.empty(7)
    end = np.float32(nx - 2), np.float32(ny - 2), np.float32(nz - 2)
    for iteration in range(max_iterations):
        scale = np.float32(state[_TRIAL + 7])
        for thread in prange(threads):
            place = np.empty(12, np.float32)
            for i in range(12):
                place[i] = np.float32(state[_PLACE + i])
            index = np.empty((3, _CHUNK), np.int32)
            weights = np.empty((3, 4 * _CHUNK), np.float32)
            inside = np.empty(_CHUNK, np.bool_)
            f = np.empty(_CHUNK, np.float32)
            terms = np.empty((_N_SUMS, _CHUNK))
            for chunk in range(n_chunks * thread // threads, n_chunks * (thread + 1) // threads):
                a, b = chunk * _CHUNK, min((chunk + 1) * _CHUNK, n)
                x, y, z = points[0, a:b], points[1, a:b], points[2, a:b]
                for i in range(_CHUNK):
                    inside[i] = True
                for k in range(3):
                    m = place[4 * k : 4 * k + 4]
                    _place(x, y, z, m[0], m[1], m[2], m[3], end[k], index[k], weights[k], inside)
                _values(coefficients, nx, ny, index, weights, f[: b - a])
                _terms(f[: b - a], inside, scale, values[a:b], jacobian[:, a:b], terms)
                first = _N_STATE + chunk * _N_SUMS
                _tree(terms, sums[first : first + _N_SUMS])
        for k in range(_N_SUMS):
            s = 0.0
            for chunk in range(n_chunks):
                s += sums[_N_STATE + chunk * _N_SUMS + k]
            totals[k] = s
        for i in range(7):
            s = 0.0
            for k in range(7):
                s += inverse_hessian[i, k] * totals[k]
            step[i] = s
        trial = state[_TRIAL:_N_FOUND]
        _advance(trial, step)
        last = iteration + 1 == max_iterations
        if _judge(step, totals, n, state, fields, iteration, last, tolerance_mm):
            _map_voxels(state[_BEFORE:_TRIAL], to_mm[1], from_mm[1], matrix)
        _map_voxels(trial, to_mm[0], from_mm[0], state[_PLACE:_DONE])
        if state[_DONE] > 0.0:
            break


class RegisterOperations(Threads):
    """The operation of `rtfmri.backends.Backend` that finds where the head is."""

    def register(
        self,
        coefficients: Array,
        shape: Shape,
        template: Template,
        pose: Pose,
        *,
        max_iterations: int,
        tolerance_mm: float,
    ) -> None:
        """See `rtfmri.backends.Backend.register`."""
        n_taps = 64 * template.values.size
        fields, matrix, sums, _ = pose
        scalars = max_iterations, tolerance_mm, self._share(n_taps)
        register(coefficients, *shape, *template, fields, matrix, sums, *scalars)

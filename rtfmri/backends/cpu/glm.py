"""The general linear model in numba: the twin of ``kernels/glm.cuh`` and ``kernels/glm.cu``.

The same operations in the same order, float64 on the design and float32 on voxels, so that both
give the same bits. Voxels are taken in parts of one noise class that stay in the innermost cache.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202

import math

import numpy as np
from numba import njit, prange

from rtfmri.backends import PART_VOXELS, Array, Contrasts, DesignState, DesignStep, GlmState
from rtfmri.backends.cpu._threads import Threads
from rtfmri.backends.cpu.moments import refused
from rtfmri.backends.cpu.register import euler

_NEW_DIRECTION, _ESTIMABLE, _INDEPENDENT = 1e-24, 1e-6, 1e-12
_GAIN, _CARRY, _PER_DOF, _FIRST = range(4)
_ZERO = np.float32(0)
_ONE = np.float32(1)

_inner = njit(error_model="numpy")
_kernel = njit(parallel=True, cache=True, error_model="numpy")


@_inner
def _solve(factor, contrast, w):
    estimable = True
    for j in range(w.size):
        total = contrast[j]
        size = abs(total)
        for i in range(j):
            term = factor[i, j] * w[i]
            total -= term
            size += abs(term)
        r = factor[j, j]
        w[j] = total / r if r > 0 else 0.0
        if not r > 0 and abs(total) > _ESTIMABLE * size:
            estimable = False
    return estimable


@_inner
def _orthonormalise(rows, at, first):
    w = rows[at]
    before = after = 0.0
    for j in range(w.size):
        before += w[j] * w[j]
    for k in range(first, at):
        unit = rows[k]
        dot = 0.0
        for j in range(w.size):
            dot += unit[j] * w[j]
        for j in range(w.size):
            w[j] -= dot * unit[j]
    for j in range(w.size):
        after += w[j] * w[j]
    length = math.sqrt(after) if after > _INDEPENDENT * before else 0.0
    for j in range(w.size):
        w[j] = w[j] / length if length > 0 else 0.0
    return length


@_inner
def _enter(x, factor, squares, rotations):
    """Rotate the row *x* into *factor*, and return the factor's rank."""
    rank = 0.0
    for i in range(x.size):
        r, xi = factor[i, i], x[i]
        if xi == 0 or (r == 0 and xi * xi <= _NEW_DIRECTION * squares[i]):
            c, s = 1.0, 0.0
        else:
            h = math.sqrt(r * r + xi * xi)
            c, s = r / h, xi / h
        if r > 0 or s != 0:
            rank += 1
        for t in range(i, x.size):
            rt, xt = factor[i, t], x[t]
            factor[i, t] = c * rt + s * xt
            x[t] = c * xt - s * rt
        rotations[i, 0] = c
        rotations[i, 1] = s
    return rank


@njit(cache=True, error_model="numpy")
def update_design(
    known,
    pose,
    whitening,
    weights,
    offsets,
    row,
    factor,
    squares,
    previous,
    counts,
    solved,
    scales,
    rotations,
    directions,
    scalars,
    motion_at,
    usable,
) -> None:
    """See `rtfmri.backends.Backend.update_design`."""
    p = row.size
    for t in range(p):
        row[t] = known[t]
    if motion_at >= 0:
        angles = np.empty(3)
        euler(pose, angles)
        for axis in range(3):
            row[motion_at + axis] = pose[4 + axis]
            row[motion_at + 3 + axis] = angles[axis]
    if not usable:
        return
    x = np.empty(p)
    for g in range(factor.shape[0]):
        gain, carry = whitening[2 * g], whitening[2 * g + 1]
        for t in range(p):
            x[t] = gain * row[t] - carry * previous[g, t]
            previous[g, t] = row[t]
            squares[g, t] += x[t] * x[t]
        rank = _enter(x, factor[g], squares[g], rotations[g])
        n = counts[g, 0] + 1
        dof = n - rank
        counts[g, 0] = n
        counts[g, 1] = rank
        scalars[g, _GAIN] = gain
        scalars[g, _CARRY] = carry
        scalars[g, _PER_DOF] = 1 / dof if dof > 0 else 0.0
        scalars[g, _FIRST] = 1.0 if n == 1 else 0.0
        for k in range(offsets.size - 1):
            estimable = True
            first, stop = offsets[k], offsets[k + 1]
            for at in range(first, stop):
                estimable &= _solve(factor[g], weights[at], solved[g, at])
                scales[g, at] = _orthonormalise(solved[g], at, first)
                estimable &= scales[g, at] > 0
            for at in range(first, stop):
                if not estimable:
                    scales[g, at] = 0.0
                for j in range(p):
                    directions[g, at, j] = solved[g, at, j] if estimable else 0.0


@_inner
def _rotate(coordinate, rest, c, s):
    for i in range(rest.size):
        z, y = coordinate[i], rest[i]
        coordinate[i] = c * z + s * y
        rest[i] = c * y - s * z


@_inner
def _add_score(score, coordinate, weight):
    for i in range(score.size):
        score[i] += weight * coordinate[i]


@_inner
def _update_parts(
    first_part,
    stop_part,
    volume,
    coordinates,
    squares,
    origin,
    previous,
    order,
    parts,
    rotations,
    directions,
    scalars,
    offsets,
    kinds,
    statistics,
    whitened,
    first_column,
):
    """Take voxels into the fit, part by part."""
    p = coordinates.shape[0]
    scratch = np.empty((3, PART_VOXELS), np.float32)
    for part in range(first_part, stop_part):
        g, start, stop = parts[part, 0], parts[part, 1], parts[part, 2]
        rest, score, total = scratch[0][: stop - start], scratch[1], scratch[2]
        gain, carry = scalars[g, _GAIN], scalars[g, _CARRY]
        per_dof, first = scalars[g, _PER_DOF], scalars[g, _FIRST]
        from_here, q = origin[start:stop], squares[start:stop]
        where = order[start:stop]
        if whitened:
            for i in range(rest.size):
                rest[i] = volume[where[i]]
        else:
            x = volume[start:stop]
            for i in range(rest.size):
                rest[i] = x[i]
        if first > _ZERO:
            for i in range(rest.size):
                from_here[i] = rest[i]
        for i in range(rest.size):
            rest[i] = rest[i] - from_here[i]
        if whitened:
            before = previous[start:stop]
            for i in range(rest.size):
                y = rest[i]
                rest[i] = gain * y - carry * before[i]
                before[i] = y
        for column in range(p):
            c, s = rotations[g, column, 0], rotations[g, column, 1]
            if s != _ZERO:
                _rotate(coordinates[column, start:stop], rest, c, s)
        for i in range(rest.size):
            q[i] = q[i] + rest[i] * rest[i]
        for k in range(kinds.size):
            n_rows = offsets[k + 1] - offsets[k]
            sums = total[: rest.size]
            for i in range(rest.size):
                sums[i] = _ZERO
            for row in range(offsets[k], offsets[k + 1]):
                scores = score[: rest.size]
                for i in range(rest.size):
                    scores[i] = _ZERO
                for column in range(first_column, p):
                    weight = directions[g, row, column]
                    _add_score(scores, coordinates[column, start:stop], weight)
                if kinds[k]:
                    for i in range(rest.size):
                        sums[i] += scores[i] * scores[i]
                else:
                    for i in range(rest.size):
                        sums[i] += scores[i]
            if kinds[k]:
                for i in range(rest.size):
                    size = np.float32(n_rows) * (q[i] * per_dof)
                    sums[i] = sums[i] / size if size > _ZERO else _ZERO
            else:
                for i in range(rest.size):
                    size = math.sqrt(q[i] * per_dof)
                    sums[i] = sums[i] / size if size > _ZERO else _ZERO
            if whitened:
                out = statistics[k]
                for i in range(rest.size):
                    out[where[i]] = sums[i]
            else:
                out = statistics[k, start:stop]
                for i in range(rest.size):
                    out[i] = sums[i]


# Arguments one by one: as tuples they cost a parallel kernel 50 us a call.
@_kernel
def update_glm(
    volume,
    coordinates,
    squares,
    origin,
    previous,
    order,
    parts,
    rotations,
    directions,
    scalars,
    offsets,
    kinds,
    statistics,
    whitened,
    first_column,
    threads,
) -> None:
    """See `rtfmri.backends.Backend.update_glm`; *parts* (n, 3) are class, start, stop."""
    n = parts.shape[0]
    for thread in prange(threads):
        _update_parts(
            n * thread // threads,
            n * (thread + 1) // threads,
            volume,
            coordinates,
            squares,
            origin,
            previous,
            order,
            parts,
            rotations,
            directions,
            scalars,
            offsets,
            kinds,
            statistics,
            whitened,
            first_column,
        )


@njit(cache=True, error_model="numpy")
def update_glm_of_few(
    volume,
    coordinates,
    squares,
    origin,
    previous,
    order,
    parts,
    rotations,
    directions,
    scalars,
    offsets,
    kinds,
    statistics,
    whitened,
    first_column,
) -> None:
    """Do the same without threads: so few voxels are done before another one would wake up."""
    _update_parts(
        0,
        parts.shape[0],
        volume,
        coordinates,
        squares,
        origin,
        previous,
        order,
        parts,
        rotations,
        directions,
        scalars,
        offsets,
        kinds,
        statistics,
        whitened,
        first_column,
    )


class GlmOperations(Threads):
    """The operations of `rtfmri.backends.Backend` on the general linear model."""

    def update_design(
        self,
        known: Array,
        pose: Array,
        whitening: Array,
        contrasts: Contrasts,
        state: DesignState,
        step: DesignStep,
        row: Array,
        *,
        motion_at: int,
        usable: Array | None = None,
    ) -> None:
        """See `rtfmri.backends.Backend.update_design`."""
        given = (known, pose, whitening, contrasts.weights, contrasts.offsets, row)
        update_design(*given, *state, *step, motion_at, not refused(usable))

    def update_glm(
        self,
        volume: Array,
        state: GlmState,
        contrasts: Contrasts,
        step: DesignStep,
        statistics: Array,
        *,
        whitened: bool,
        first_column: int,
        usable: Array | None = None,
    ) -> None:
        """See `rtfmri.backends.Backend.update_glm`."""
        if refused(usable):
            return
        coordinates, squares, origin, previous, order, _, parts = state
        told = (step.rotations, step.directions, step.scalars)
        share = self._share(volume.size)
        args = (
            *(volume, coordinates, squares, origin, previous, order, parts, *told),
            *(contrasts.offsets, contrasts.kinds, statistics, whitened, first_column),
        )
        if share == 1:
            update_glm_of_few(*args)
        else:
            update_glm(*args, share)

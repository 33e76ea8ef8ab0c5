"""What the operations ought to give, in float64 and two passes, and how far float32 may be off."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtfmri.backends import RoiTable

U = 2.0**-24
"""Unit roundoff of float32: one operation is off by at most U times its result."""

Floats = NDArray[np.float64]


def weighted_moments(volumes: ArrayLike, gains: Sequence[float]) -> tuple[Floats, Floats]:
    """Mean and population variance of (n_volumes, n_voxels) that were folded in with *gains*."""
    x = np.asarray(volumes, np.float64)
    kept = np.cumprod([1.0, *(1.0 - np.array(gains[:0:-1]))])[::-1]  # by the gains that follow
    weights = np.array(gains) * kept
    mean = weights @ x
    return mean, weights @ (x - mean) ** 2


def moments_error(volumes: ArrayLike, gains: Sequence[float]) -> tuple[Floats, Floats]:
    """Bound the error of mean and variance after the float32 recursion.

    Running error analysis (Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.3). With
    errors e, f of mean m and variance v before, one step computes, g rounded and all else too,

        d = x - m          off by e + U|d|
        m' = m + g d       off by (1-g) e + 3U g|d| + U|m'|
        v + g d^2          off by f + 2g|d|e + g e^2 + 5U g d^2, and U of the sum
        v' = (1-g) times that, where 1-g is off by U g + U(1-g), and U of the product.

    Higher orders of U are covered by the last 1 %.
    """
    x = np.asarray(volumes, np.float64)
    m, v, e, f = np.zeros((4, x.shape[1]))
    for row, g in zip(x, gains, strict=True):
        d = row - m
        total = v + g * d**2
        f = (1 - g) * (f + 2 * g * abs(d) * e + g * e**2 + 5 * U * g * d**2)
        m, v = m + g * d, (1 - g) * total
        f += 3 * U * v + U * g * total
        e = (1 - g) * e + U * (3 * g * abs(d) + abs(m))
    return 1.01 * e, 1.01 * f


def subtraction(
    volume: ArrayLike, mean: ArrayLike, variance: ArrayLike, bessel: float
) -> tuple[Floats, Floats, Floats]:
    """Difference, PSC and z of one volume."""
    m, v = np.asarray(mean, np.float64), np.asarray(variance, np.float64) * bessel
    d = np.asarray(volume, np.float64) - m
    zero = np.zeros_like(d)
    psc = np.divide(100 * d, m, out=zero.copy(), where=m > 0)
    return d, psc, np.divide(d, np.sqrt(v), out=zero.copy(), where=v > 0)


def roi_means(volume: NDArray[Any], rois: RoiTable) -> Floats:
    """Weighted mean of each ROI."""
    offsets, voxels, weights = rois
    x, w = volume[voxels].astype(np.float64), weights.astype(np.float64)
    return np.array([w[a:b] @ x[a:b] for a, b in pairwise(offsets)])


def least_squares(rows: ArrayLike, y: ArrayLike, weights: ArrayLike) -> tuple[Floats, Floats, int]:
    """Effects (n_rows, n_voxels), t or F (n_voxels,) and degrees of freedom, from one batch fit.

    Columns that depend on others are dealt with by the pseudo-inverse; *weights* (n_rows,
    n_columns) must be estimable. One row makes t.
    """
    x, y = np.asarray(rows, np.float64), np.asarray(y, np.float64)
    size = np.linalg.norm(x, axis=0)
    size[size == 0] = 1
    x, c = x / size, np.atleast_2d(np.asarray(weights, np.float64)) / size
    inverse, rank = np.linalg.pinv(x, rcond=1e-12), np.linalg.matrix_rank(x, tol=1e-12)
    beta, dof = inverse @ y, len(x) - rank
    variance = ((y - x @ beta) ** 2).sum(0) / dof
    effect = c @ beta
    covariance = c @ inverse @ inverse.T @ c.T
    if len(c) == 1:
        return effect, effect[0] / np.sqrt(variance * covariance[0, 0]), int(dof)
    explained = np.einsum("rv,rs,sv->v", effect, np.linalg.inv(covariance), effect)
    return effect, explained / len(c) / variance, int(dof)

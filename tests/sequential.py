"""Runs that are looked at after every volume: what a t-test and an e-value then say, in float64.

All noise is Gaussian, independent, and of standard deviation 1: effects are in units of it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.anytime import MixtureTest, e_bh

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TR_S, BLOCK_S, N_VOLUMES, N_COSINES = 2.0, 20.0, 200, 3


class Looks(NamedTuple):
    """The t contrast of the task after each volume; nan where it cannot be tested yet."""

    t: Floats
    """(n_volumes, n_runs)."""
    effect: Floats
    """(n_volumes, n_runs), in the data's units."""
    standard_error: Floats
    """(n_volumes, n_runs), of the effect."""
    tests: list[MixtureTest]
    """One per volume."""

    def log_e(self) -> Floats:
        """Return the logarithms of the e-values, (n_volumes, n_runs)."""
        return np.stack([test.log_e_value(t) for test, t in zip(self.tests, self.t, strict=True)])


def block_design(n_volumes: int = N_VOLUMES) -> Floats:
    """Return an intercept, cosines, and blocks of 20 s after as much rest; the task comes last.

    The response to a block is that to a stimulus, t^5 exp(-t) with t in s (it peaks at 5 s),
    folded with the block and scaled to peak at 1. The array is (n_volumes, 5).
    """
    second = np.arange(0, 30.0, TR_S)
    times, response = np.arange(n_volumes), second**5 * np.exp(-second)
    blocks = (times * TR_S // BLOCK_S) % 2
    task = np.convolve(blocks, response / response.sum())[:n_volumes]
    phase = np.pi * (times + 0.5) / n_volumes
    cosines = [np.cos(order * phase) for order in range(N_COSINES + 1)]
    return np.stack([*cosines, task / task.max()], axis=1)


def simulate(
    design: Floats, n_runs: int, seed: int, *, effect: float | Floats = 0.0, shared: float = 0.0
) -> Floats:
    """Return runs of noise, (n_volumes, n_runs), in which the task has *effect* (one, or each).

    The noise of any two runs correlates by *shared*, 0 to 1: they are then voxels of one head.
    """
    rng = np.random.default_rng(seed)
    own, common = rng.normal(size=(len(design), n_runs)), rng.normal(size=(len(design), 1))
    noise = np.sqrt(1 - shared) * own + np.sqrt(shared) * common
    return np.asarray(noise + design[:, -1:] * np.asarray(effect))


def looks(design: Floats, data: Floats, prior_sd: float = 1.0) -> Looks:
    """Test the last column of *design* (n, p) in *data* (n, n_runs) after each volume.

    With X[:n] = Q R and the task last, its effect is (Q'y)_p / R_pp, its variance the noise's over
    R_pp^2, and the residual sum of squares y'y - (Q'y)'(Q'y) (Golub & Van Loan 2013, ch. 5.3).
    """
    n_columns, power = design.shape[1], np.cumsum(data**2, axis=0)
    t, effect, standard_error = (np.full(data.shape, np.nan) for _ in range(3))
    tests = []
    for i in range(len(design)):
        n, dof, information = i + 1, i + 1 - n_columns, 0.0
        if dof >= 1:
            q, r = np.linalg.qr(design[:n])
            information = r[-1, -1] ** 2 if abs(r[-1, -1]) > 1e-9 else 0.0
        if information:
            scores = q.T @ data[:n]
            sd = np.sqrt((power[i] - (scores**2).sum(0)) / dof)
            effect[i] = scores[-1] / r[-1, -1]
            standard_error[i] = sd / abs(r[-1, -1])
            t[i] = effect[i] / standard_error[i]
        tests.append(MixtureTest(dof, information, prior_sd))
    return Looks(t, effect, standard_error, tests)


def share_ever(event: NDArray[np.bool_]) -> float:
    """Return the share of runs in which *event*, (n_volumes, n_runs), happens at least once."""
    return float(event.any(0).mean())


def stopping_volumes(log_e: Floats, alpha: float) -> Floats:
    """Return after how many volumes e first reaches 1 / alpha, (n_runs,); inf where it never does.

    *log_e* is (n_volumes, n_runs).
    """
    reached = log_e >= -np.log(alpha)
    return np.where(reached.any(0), reached.argmax(0) + 1.0, np.inf)


def first_rejections(log_e: Floats, alpha: float) -> NDArray[np.bool_]:
    """Stop each map at the first volume at which e-BH rejects any voxel; return which it rejects.

    With ``log_e = -log(p)`` this is the procedure of Benjamini & Hochberg 1995 (JRSS B 57:289),
    which rejects the k smallest p with the largest k whose greatest is at most ``k alpha / m``;
    but 1 / p is no e-value.

    Parameters
    ----------
    log_e : (n_volumes, n_maps, n_voxels) float64
        Logarithms of e-values.
    alpha : float
        The false discovery rate asked for.

    Returns
    -------
    (n_maps, n_voxels) bool
        All False where no volume had a rejection.
    """
    rejected = np.zeros(log_e.shape[1:], bool)
    for i in range(log_e.shape[1]):
        for looked_at in log_e[:, i]:
            rejected[i] = looked_at >= e_bh(looked_at, alpha)
            if rejected[i].any():
                break
    return rejected


def false_discovery_rate(rejected: NDArray[np.bool_], is_null: NDArray[np.bool_]) -> float:
    """Return the mean over maps of the share of *is_null* (n_voxels,) in what is *rejected*."""
    return float(((rejected & is_null).sum(1) / np.maximum(rejected.sum(1), 1)).mean())

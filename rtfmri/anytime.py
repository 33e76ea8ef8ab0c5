"""A t-test that may be looked at after every volume: e-values by mixture, and their FDR.

Who looks at |t| > 3.1 at every TR and stops at the first success is wrong far more often than
p < 0.001 promises. An e-value does not have this fault: with no effect, the chance that it *ever*
reaches 1/alpha, however long one looks, is at most alpha (Ville 1939; Ramdas 2023, Stat. Sci.
38:576). So one may look at every TR and stop when the map says enough.

The e-value here is the Bayes factor of a linear model whose effect, in standard deviations of the
noise, is drawn from a normal distribution, against one without the effect; all other regressors
have flat priors and the noise its right Haar prior, of which neither enters the result. It is a
martingale under the null because it is a likelihood ratio of what does not depend on them (Lindon,
Ham, Tingley & Bojinov 2022, arXiv:2210.08589; Perez-Ortiz, Lardy, de Heide & Gruenwald 2024, Ann.
Stat. 52:1410; for a mean alone: Lai 1976, Ann. Stat. 4:265). It asks of the noise what the t-test
asks: Gaussian, and independent from volume to volume (or prewhitened).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MixtureTest:
    """The test of one t contrast after the volumes so far.

    Parameters
    ----------
    dof : float
        Residual degrees of freedom. Below 1 nothing is known: every e-value is 1.
    information : float
        1 / (c' (X'X)^-1 c): the inverse variance of the effect, in units of the noise's; 0 as long
        as the effect cannot be estimated, when every e-value is 1.
    prior_sd : float
        Standard deviation of the effects that are looked for, in standard deviations of the noise.
        Any number is valid; effects of about this size are found soonest.
    """

    dof: float
    information: float
    prior_sd: float = 1.0

    @property
    def _shrinkage(self) -> float:
        """Prior precision over posterior precision, in (0, 1]."""
        return 1 / (1 + self.prior_sd**2 * self.information)

    def log_e_value(self, t: ArrayLike) -> Floats:
        """Return the natural logarithm of the e-value of each *t*, the contrast's statistic."""
        t = np.asarray(t, np.float64)
        if not (self.dof >= 1 and self.information > 0):
            return np.zeros(t.shape)
        c = self._shrinkage
        # (1 + c u) / (1 + u), with u = t^2 / dof; this way an infinite t has its limit, c.
        with np.errstate(over="ignore"):
            remains = c + (1 - c) / (1 + t**2 / self.dof)
        return np.asarray(0.5 * np.log(c) - 0.5 * (self.dof + 1) * np.log(remains))

    def critical_t(self, log_e: ArrayLike) -> Floats:
        """Return the |t| at which the e-value is exp(*log_e*); inf where no t is large enough.

        With ``log_e = -log(alpha)``, ``effect -+ critical_t * standard_error`` is a confidence
        sequence: the chance that it ever misses the true effect is at most alpha.
        """
        log_e = np.asarray(log_e, np.float64)
        if not (self.dof >= 1 and self.information > 0):
            return np.full(log_e.shape, np.inf)
        c = self._shrinkage
        # (1 + u) / (1 + c u) = a, with u = t^2 / dof, has its solution below 1 / c alone.
        with np.errstate(over="ignore"):
            a = np.exp((2 * log_e - np.log(c)) / (self.dof + 1))
        reachable = c * a < 1
        u = np.divide(a - 1, 1 - c * a, out=np.full(log_e.shape, np.inf), where=reachable)
        return np.asarray(np.sqrt(self.dof * np.maximum(u, 0)))


def e_bh(log_e_values: ArrayLike, alpha: float) -> float:
    """Return the smallest logarithm of an e-value that e-BH rejects; inf if it rejects none.

    Of m e-values the k largest are rejected, with the largest k whose smallest is at least
    ``m / (k alpha)``. The false discovery rate is at most *alpha*, whatever the dependence between
    the voxels (Wang & Ramdas 2022, JRSS B 84:822), also of a map that was looked at after every
    volume and kept when it was found good enough. One that is nan is not rejected, but counts.
    """
    largest_first = -np.sort(-np.asarray(log_e_values, np.float64).ravel())  # nan comes last
    m = largest_first.size
    rejected = largest_first >= -np.log(alpha * np.arange(1, m + 1) / m)
    return float(largest_first[np.flatnonzero(rejected)[-1]]) if rejected.any() else np.inf

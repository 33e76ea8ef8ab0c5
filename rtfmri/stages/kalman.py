"""A Kalman filter for ROI signals that smooths noise and leaves spikes out.

The signal of each region is a random walk seen through white noise: ``x[t] = x[t-1] + w`` and
``y[t] = x[t] + v`` (Kalman 1960, J. Basic Eng. 82:35). Feedback filtered so, without its spikes,
has a better contrast to noise (Koush, Zvyagintsev, Dyck, Mathiak & Mathiak 2012, NeuroImage
59:478); the rules and numbers here are this module's own.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtfmri.errors import ConfigError, VolumeError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

PROCESS_SHARE = 0.25
"""Variance of the random walk's steps, relative to that of the noise. The gain settles at
K = 0.39, where ``K^2 / (1 - K) = PROCESS_SHARE``."""
SPIKE_SD = 4.0
"""An observation further than this from its prediction, in standard deviations of their
difference, is a spike."""
MAX_HELD = 2
"""Spikes in a row that are left out; a third is believed to be a true change."""
WARM_UP = 10
"""Differences before the noise is known well enough to call anything a spike."""
MEMORY = 0.05
"""Weight of the newest difference in the noise's variance, once ``1 / MEMORY`` were seen; before
that they weigh the same."""
WINSOR_SD = 3.0
"""A difference counts as at most this many standard deviations of the differences before."""
_MEDIAN_CHI2 = 0.4549
"""Median of the square of a standard normal variable."""


@dataclass(slots=True)
class KalmanState:
    """What is known of each region; every array is (n_rois,) but for ``early``.

    Attributes
    ----------
    level : float64
        The filtered signal, in the signal's units; nan until there was an observation.
    variance : float64
        Variance of the level's error, in units of ``noise``.
    noise : float64
        Variance of the noise, in the signal's units squared; 0 until `WARM_UP` differences.
    early : float64
        The first `WARM_UP` differences, squared and halved, (WARM_UP, n_rois).
    newest : float64
        The observation that was taken last.
    n_differences : int64
        Differences that ``noise`` was estimated from.
    n_held : int64
        Spikes that were left out in a row, up to now.
    n_spikes : int64
        Spikes that were left out, in all.
    """

    level: Floats
    variance: Floats
    noise: Floats
    early: Floats
    newest: Floats
    n_differences: Counts
    n_held: Counts
    n_spikes: Counts

    @classmethod
    def empty(cls, n_rois: int) -> Self:
        """Return the state before the first volume."""
        return cls(
            level=np.full(n_rois, np.nan),
            variance=np.zeros(n_rois),
            noise=np.zeros(n_rois),
            early=np.zeros((WARM_UP, n_rois)),
            newest=np.full(n_rois, np.nan),
            n_differences=np.zeros(n_rois, np.int64),
            n_held=np.zeros(n_rois, np.int64),
            n_spikes=np.zeros(n_rois, np.int64),
        )


class KalmanFilter:
    """Filters the signal of each region, volume by volume, at constant cost.

    The noise's variance is estimated from the run: half the running mean of the squared
    differences between an observation and the one taken before it. That is the variance of white
    noise, whatever its slow drift (von Neumann 1941, Ann. Math. Stat. 12:367). Differences are
    winsorised at `WINSOR_SD`, by the variance so far and at first by their median, so that spikes
    hardly enter it. The gain does not depend on it, only what is a spike does. The filter's
    answers scale and shift with the signal.

    Once it has settled, with K = 0.39 (measured on white noise of standard deviation 1):

    - The noise keeps K / (2 - K) = 0.24 of its variance, half its standard deviation.
    - A step of up to 2 is shown by 39 % in its own volume, then by 63 %, 77 % and 86 %: on average
      (1 - K) / K = 1.6 volumes late. Larger ones look like spikes more and more often, and are 2.5
      volumes late at most (at 6 to 8); one of 10 is shown by 95 % in its third volume.
    - A task block's response, which rises over some volumes, is 1.3 volumes late, whether its
      amplitude is 1 or 20; the steps of its edges count as noise, and so are no spikes.
    - One or two spikes in a row leave the filtered signal where it was: one of 10 changes it by
      0.35 on average, below 1.2 in 99 % of cases. Beyond ``SPIKE_SD / sqrt(1 - K)`` = 5.1 most
      are found; of good volumes 1 in 8000 is called one.

    Parameters
    ----------
    n_rois : int
        Regions, 0 or more.

    Raises
    ------
    ConfigError
        If *n_rois* is negative.
    """

    def __init__(self, n_rois: int) -> None:
        if n_rois < 0:
            raise ConfigError(f"n_rois must be 0 or more, got {n_rois}")
        self.state = KalmanState.empty(n_rois)

    @property
    def n_spikes(self) -> Counts:
        """Spikes left out so far, (n_rois,) int64; what proved a true change is not counted."""
        return self.state.n_spikes.copy()

    def push(self, signals: ArrayLike, usable: bool = True) -> Floats:
        """Filter one volume.

        Parameters
        ----------
        signals : (n_rois,) float
            Each region's signal, in any unit. One that is not finite is not looked at.
        usable : bool
            Whether the volume is good; if not, no signal is looked at.

        Returns
        -------
        (n_rois,) float64
            The filtered signals, in the same unit. A region that was not looked at keeps its
            value; it is nan before the first observation.

        Raises
        ------
        VolumeError
            If *signals* has another shape; the state is as it was before.
        """
        state, observed = self.state, np.asarray(signals, np.float64)
        if observed.shape != state.level.shape:
            raise VolumeError(
                f"signals must have shape {state.level.shape}, one per ROI, got {observed.shape}"
            )
        seen = np.isfinite(observed) & usable
        observed = np.where(seen, observed, np.nan)
        first = seen & np.isnan(state.level)

        state.variance += PROCESS_SHARE
        innovation = observed - state.level
        far = innovation**2 > SPIKE_SD**2 * state.noise * (state.variance + 1)
        surprising = far & (state.n_differences >= WARM_UP)
        changed = surprising & (state.n_held == MAX_HELD)
        held = surprising & ~changed
        self._learn_noise(observed - state.newest, seen & ~first)

        taken, anew = seen & ~held, first | changed
        gain = np.where(anew, 1, state.variance / (state.variance + 1))
        level = np.where(anew, observed, state.level + gain * innovation)
        np.copyto(state.level, level, where=taken)
        np.copyto(state.variance, gain, where=taken)  # in units of the noise, they are the same
        np.copyto(state.newest, observed, where=taken)
        state.n_spikes += held - changed * state.n_held
        state.n_held += held
        state.n_held[taken] = 0
        return state.level.copy()

    def _learn_noise(self, difference: Floats, counted: NDArray[np.bool_]) -> None:
        """Fold half of the squared *difference* into the variance of the noise."""
        state, half = self.state, difference**2 / 2
        early = counted & (state.n_differences < WARM_UP)
        late = counted & ~early
        state.early[state.n_differences[early], early] = half[early]
        most = np.where(state.noise > 0, WINSOR_SD**2 * state.noise, np.inf)
        weight = np.maximum(1 / (state.n_differences + 1), MEMORY)
        change = weight * (np.minimum(half, most) - state.noise)
        np.add(state.noise, change, out=state.noise, where=late)
        state.n_differences += counted
        warm = early & (state.n_differences == WARM_UP)
        state.noise[warm] = _winsorised_mean(state.early[:, warm])


def _winsorised_mean(squares: Floats) -> Floats:
    """Return the mean along axis 0 of *squares*; what is far above their median counts as less."""
    typical = np.median(squares, axis=0) / _MEDIAN_CHI2
    return np.asarray(np.minimum(squares, WINSOR_SD**2 * typical).mean(0))

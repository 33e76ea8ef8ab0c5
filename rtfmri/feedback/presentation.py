"""From a signal to what the participant sees: filtered, scaled to 0 ... 1, when it is due."""

import math
from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

from rtfmri.config import FeedbackSettings, ScaleSettings
from rtfmri.feedback.sham import Sham
from rtfmri.pipeline import Result
from rtfmri.stages.kalman import KalmanFilter

MOST_VALUES = 10_000
"""Newest values of which percentiles are told: of a longer run, the oldest are forgotten."""
_LEAST = 2
"""Values before a mean and a standard deviation, or percentiles, say anything."""


class Presentation:
    """Makes what is shown of one signal's values, volume by volume.

    The value is filtered, if that is asked for, scaled, left out where no feedback is due,
    averaged over its block if presentation is intermittent, clipped to 0 ... 1, and passed
    through the sham. Conditions are those that a volume counts for (`Result.conditions`): the
    haemodynamic delay is taken care of, and volumes in transition count for none. A volume that
    is not usable has no value.

    Parameters
    ----------
    settings : FeedbackSettings
    conditions : tuple of str
        The baseline first.
    sham : Sham, optional
    """

    def __init__(
        self, settings: FeedbackSettings, conditions: tuple[str, ...], sham: Sham | None = None
    ) -> None:
        baseline = conditions[0]
        self._filter = KalmanFilter(1) if settings.filter == "kalman" else None
        self._scale = _Scale(settings.scale, baseline)
        self._during = frozenset(settings.during)
        self._blocks = _Blocks(self._during, baseline) if settings.mode == "intermittent" else None
        self._sham = sham
        if sham:
            sham.begin()

    def push(self, value: float, result: Result) -> float:
        """Return what is shown after a volume, from 0 to 1; nan is no value.

        Parameters
        ----------
        value : float
            The signal's, in its own units; nan is no value, and is shown as none.
        result : Result
            The volume's.
        """
        if not result.quality.usable:
            value = math.nan
        if self._filter:
            (filtered,) = self._filter.push([value])
            value = float(filtered) if math.isfinite(value) else math.nan
        shown = self._scale.push(value, result)
        if self._during and self._during.isdisjoint(result.conditions):
            shown = math.nan
        if self._blocks:
            shown = self._blocks.push(shown, result)
        shown = float(np.clip(shown, 0, 1))
        return self._sham.push(shown, result.index) if self._sham else shown


class _Scale:
    """Brings values between limits to 0 ... 1; they are given, or learned from values so far."""

    def __init__(self, settings: ScaleSettings, baseline: str) -> None:
        self._settings, self._baseline = settings, baseline
        kept = settings.window_volumes if settings.kind == "running" else MOST_VALUES
        self._values: deque[float] = deque(maxlen=kept)
        self._sorted: list[float] = []
        self._limits = (math.nan, math.nan)

    def push(self, value: float, result: Result) -> float:
        match self._settings.kind:
            case "fixed":
                self._limits = self._settings.low, self._settings.high
            case "percentile":
                self._take_sorted(value)
            case "baseline":
                self._take_baseline(value, result)
            case "running":
                if math.isfinite(value):
                    self._values.append(value)
                    self._limits = self._around(self._values)
        low, high = self._limits
        if not (high > low and math.isfinite(value)):
            return math.nan
        return (value - low) / (high - low)

    def _take_sorted(self, value: float) -> None:
        if not math.isfinite(value):
            return
        if len(self._values) == MOST_VALUES:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        self._values.append(value)
        insort(self._sorted, value)
        if len(self._sorted) >= _LEAST:
            first, last = self._settings.percentiles
            self._limits = _percentile(self._sorted, first), _percentile(self._sorted, last)

    def _take_baseline(self, value: float, result: Result) -> None:
        """Collect a block of the baseline; its limits are those of what comes after it."""
        if not result.quality.usable:
            return
        if self._baseline in result.conditions:
            if math.isfinite(value):
                self._values.append(value)
        elif self._values:
            if len(self._values) >= _LEAST:
                self._limits = self._around(self._values)
            self._values.clear()

    def _around(self, values: "deque[float]") -> tuple[float, float]:
        if len(values) < _LEAST:
            return math.nan, math.nan
        # Relative to one of them: where all are equal, their deviation is 0 and no rounding.
        with np.errstate(over="ignore", invalid="ignore"):
            away: NDArray[np.float64] = np.array(values) - values[0]
            mean, sd = values[0] + float(away.mean()), float(away.std(ddof=1))
        return mean - self._settings.sd * sd, mean + self._settings.sd * sd


class _Blocks:
    """Shows the mean of a block's values, once, at the first volume that is not of it.

    A volume that is not usable, or is missing, does not end a block. The mean is of what is not
    clipped yet, which noise beyond the display's ends would draw to its middle.
    """

    def __init__(self, during: frozenset[str], baseline: str) -> None:
        self._during, self._baseline = during, baseline
        self._block: frozenset[str] = frozenset()
        self._values: list[float] = []

    def push(self, value: float, result: Result) -> float:
        if not result.quality.usable:
            return math.nan
        block = frozenset(result.conditions) - {self._baseline}
        if self._during:
            block = frozenset(result.conditions) & self._during
        shown = math.nan
        if block != self._block:
            if self._values:
                shown = float(np.mean(self._values))
            self._block, self._values = block, []
        if block and math.isfinite(value):
            self._values.append(value)
        return shown


def _percentile(values: list[float], percent: float) -> float:
    """Return a percentile of sorted *values* by linear interpolation, as NumPy does by default."""
    place = percent / 100 * (len(values) - 1)
    below = min(int(place), len(values) - 2)
    return values[below] + (place - below) * (values[below + 1] - values[below])

"""Latency in constant memory: percentiles of as many volumes as there will be."""

import math

import numpy as np

_LOWEST_MS = 1e-3
_RATIO = 1.02
_N_BINS = 1 + math.ceil(math.log(1e9) / math.log(_RATIO))


class LatencyHistogram:
    """Counts times in logarithmic bins of 2 %, from 1 microsecond to 1000 seconds.

    Percentiles are exact to that 2 %, whatever the number of values; memory does not grow.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_N_BINS, np.int64)
        self.count = 0
        self.max_ms = 0.0

    def add(self, value_ms: float) -> None:
        """Count one time in milliseconds."""
        steps = math.log(max(value_ms, _LOWEST_MS) / _LOWEST_MS) / math.log(_RATIO)
        self._counts[min(int(steps), _N_BINS - 1)] += 1
        self.count += 1
        self.max_ms = max(self.max_ms, value_ms)

    def percentile_ms(self, percent: float) -> float:
        """Return the time that *percent* of the values do not exceed; nan before the first.

        Parameters
        ----------
        percent : float
            From 0 to 100.
        """
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(self.count * percent / 100))
        bin_index = int(np.searchsorted(np.cumsum(self._counts), rank))
        return float(min(_LOWEST_MS * _RATIO ** (bin_index + 1), self.max_ms))

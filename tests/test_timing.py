import math

import numpy as np
import pytest

from rtfmri.timing import LatencyHistogram


def test_percentiles_agree_with_sorting_within_a_bin() -> None:
    values = np.random.default_rng(0).lognormal(0, 1.5, 5000)
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(float(value))
    for percent in (1, 50, 95, 99, 100):
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert exact <= histogram.percentile_ms(percent) * 1.0001 <= exact * 1.021
    assert histogram.max_ms == values.max()
    assert histogram.count == 5000


def test_extremes_stay_inside() -> None:
    histogram = LatencyHistogram()
    assert math.isnan(histogram.percentile_ms(50))
    for value in (0.0, 1e-9, 1e12):
        histogram.add(value)
    assert histogram.percentile_ms(1) == pytest.approx(1e-3, rel=0.03)
    assert histogram.max_ms == 1e12

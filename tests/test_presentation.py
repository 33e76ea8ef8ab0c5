"""What is shown of a signal: scales, moments, blocks."""

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rtfmri.config import FeedbackSettings, ScaleSettings
from rtfmri.errors import ConfigError
from rtfmri.feedback import presentation
from rtfmri.feedback.presentation import Presentation
from rtfmri.stages.kalman import KalmanFilter

NAN = math.nan
CONDITIONS = ("rest", "up", "down")


def shown(
    values: Iterable[float],
    conditions: Iterable[str] | None = None,
    *,
    unusable: Iterable[int] = (),
    **settings: Any,
) -> np.ndarray:
    """Push values; conditions are words, "" is a transition."""
    values = list(values)
    names = list(conditions) if conditions else ["up"] * len(values)
    pushed = Presentation(FeedbackSettings(**settings), CONDITIONS)
    got = []
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        usable = i not in set(unusable)
        result: Any = SimpleNamespace(
            index=i,
            conditions=(name,) if name and usable else (),
            quality=SimpleNamespace(usable=usable),
        )
        got.append(pushed.push(value, result))
    return np.array(got)


def scale(kind: str, **settings: Any) -> ScaleSettings:
    return ScaleSettings(kind=kind, **settings)


def test_fixed_limits_are_clipped_to_0_and_1() -> None:
    got = shown([-3, -1, 0, 1, 3, NAN, math.inf], scale=scale("fixed", low=-1, high=1))
    np.testing.assert_equal(got, [0, 0, 0.5, 1, 1, NAN, NAN])


def test_percentiles_are_those_of_all_values_so_far() -> None:
    values = np.random.default_rng(0).normal(5, 2, 300)
    got = shown(values, scale=scale("percentile", percentiles=(10, 90)))
    assert math.isnan(got[0])
    for t in range(1, 300):
        low, high = np.percentile(values[: t + 1], [10, 90])
        assert got[t] == pytest.approx(np.clip((values[t] - low) / (high - low), 0, 1))


def test_of_very_many_values_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presentation, "MOST_VALUES", 50)
    values = np.random.default_rng(1).normal(0, 1, 200) + np.arange(200) // 100
    got = shown(values, scale=scale("percentile"))
    low, high = np.percentile(values[150:], [5, 95])
    assert got[-1] == pytest.approx(np.clip((values[-1] - low) / (high - low), 0, 1))


def test_running_scale_is_that_of_the_newest_values() -> None:
    values = np.random.default_rng(2).normal(0, 1, 100)
    got = shown(values, scale=scale("running", window_volumes=10, sd=1.5))
    for t in range(1, 100):
        part = values[max(0, t - 9) : t + 1]
        low, high = part.mean() + np.array([-1.5, 1.5]) * part.std(ddof=1)
        assert got[t] == pytest.approx(np.clip((values[t] - low) / (high - low), 0, 1))


def test_baseline_scale_is_that_of_the_newest_block_that_is_over() -> None:
    names = ["rest"] * 5 + [""] + ["up"] * 4 + ["", *["rest"] * 4, "", *["up"] * 3]
    values = np.random.default_rng(3).normal(0, 1, len(names))
    got = shown(values, names, scale=scale("baseline", sd=3))
    assert np.isnan(got[:5]).all()
    first, second = values[:5], values[11:15]
    for block, after in ((first, range(5, 15)), (second, range(15, 19))):
        low, high = block.mean() + np.array([-3, 3]) * block.std(ddof=1)
        for t in after:
            assert got[t] == pytest.approx(np.clip((values[t] - low) / (high - low), 0, 1))


def test_an_unusable_volume_does_not_end_a_baseline_block_nor_enter_any_scale() -> None:
    values = [1.0, 2.0, 1000.0, 3.0, 2.5]
    names = ["rest"] * 4 + ["up"]
    got = shown(values, names, unusable=[2], scale=scale("baseline", sd=1))
    low, high = np.mean([1, 2, 3]) + np.array([-1, 1]) * np.std([1, 2, 3], ddof=1)
    assert got[4] == pytest.approx((2.5 - low) / (high - low))
    for kind in ("running", "percentile"):
        got = shown(values, names, unusable=[2], scale=scale(kind, percentiles=(0, 100)))
        assert 0 < got[4] < 1


@pytest.mark.parametrize("kind", ["percentile", "running", "baseline"])
@pytest.mark.parametrize("value", [2.0, 0.1, 1 / 3, 123.456])
def test_where_nothing_varies_there_is_no_value(kind: str, value: float) -> None:
    names = ["rest"] * 11 + ["up"] * 9
    assert np.isnan(shown([value] * 60, names * 3, scale=scale(kind))).all()


@pytest.mark.parametrize("settings", [{}, {"filter": "kalman"}, {"scale": scale("running")}])
def test_an_unusable_volume_has_no_value(settings: dict[str, Any]) -> None:
    got = shown([0.1, 0.4, 0.2, 0.7, 0.3], unusable=[3], **settings)
    assert math.isnan(got[3])
    assert math.isfinite(got[4])


def test_numbers_beyond_measure_are_no_value() -> None:
    got = shown([1e200, -1e200, 1e308, -1e308, 1.0], scale=scale("running"))
    assert np.isnan(got).all()


def test_feedback_is_shown_during_its_conditions_alone() -> None:
    names = ["rest", "up", "", "down", "up"]
    np.testing.assert_equal(shown([0.5] * 5, names, during=("up",)), [NAN, 0.5, NAN, NAN, 0.5])
    np.testing.assert_equal(
        shown([0.5] * 5, names, during=("up", "down")), [NAN, 0.5, NAN, 0.5, 0.5]
    )


def test_intermittent_feedback_is_a_blocks_mean_once_it_is_over() -> None:
    names = ["rest", "up", "up", "up", "", "rest", "down", "down", "rest", "up"]
    values = [0.9, 0.1, 0.2, 0.6, 0.9, 0.9, 0.4, NAN, 0.9, 0.3]
    got = shown(values, names, mode="intermittent")
    wanted = [NAN] * 10
    wanted[4], wanted[8] = 0.3, 0.4
    np.testing.assert_allclose(got, wanted)
    got = shown(values, names, mode="intermittent", during=("up",))
    wanted[8] = NAN
    np.testing.assert_allclose(got, wanted)


def test_a_blocks_mean_is_that_of_values_beyond_the_displays_ends_too() -> None:
    got = shown([-0.6, 0.8, 1.4, -0.4, 0.0], ["up"] * 4 + [""], mode="intermittent")
    assert got[4] == pytest.approx(0.3)
    assert shown([2.0, 3.0, 0.0], ["up", "up", ""], mode="intermittent")[2] == 1


def test_a_bad_volume_does_not_end_a_block_and_two_conditions_are_two() -> None:
    names = ["up", "up", "up", "down", "down", ""]
    values = [0.2, 0.9, 0.4, 0.5, 0.7, 0.0]
    got = shown(values, names, unusable=[1], mode="intermittent")
    np.testing.assert_allclose(got, [NAN, NAN, NAN, 0.3, NAN, 0.6])


def test_the_filter_is_that_of_the_regions() -> None:
    values = np.random.default_rng(4).normal(0.5, 0.05, 60)
    values[40] = 30.0
    got = shown(values, filter="kalman", unusable=[10])
    theirs = KalmanFilter(1)
    wanted = [float(theirs.push([v], i != 10)[0]) for i, v in enumerate(values)]
    wanted[10] = NAN
    np.testing.assert_allclose(got, np.clip(wanted, 0, 1))
    assert got[40] < 0.7
    assert math.isnan(shown([NAN, 0.5], filter="kalman")[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"low": 1, "high": 1}, "high must be above low"),
        ({"percentiles": (90, 10)}, "percentiles must be two from 0 to 100"),
        ({"sd": 0}, "sd"),
        ({"sd": math.inf}, "sd should be a finite number"),
        ({"high": math.inf}, "high should be a finite number"),
        ({"low": -math.inf}, "low should be a finite number"),
        ({"window_volumes": 1}, "window_volumes"),
    ],
)
def test_scales_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ScaleSettings(**settings)

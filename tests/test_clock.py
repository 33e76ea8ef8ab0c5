"""Where volume 0 stands on the run's clock."""

import logging
import math
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from memory import volumes
from rtfmri.clock import RunClock, start_clock
from rtfmri.config import ClockSettings, Config
from rtfmri.errors import ConfigError
from rtfmri.volume import Volume

TR_S = 2.0
(FIRST,) = volumes(1)


def arrived(at_s: float, index: int = 0) -> Volume:
    return replace(FIRST, index=index, arrived_s=at_s)


def test_by_default_it_starts_with_volume_0() -> None:
    clock = start_clock("first volume", arrived(1000.0), [990.0])
    assert (clock.start, clock.offset_s, clock.zero_s) == ("first volume", 0.0, 998.0)
    late = start_clock("first volume", arrived(1000.0, index=4))
    assert (late.offset_s, late.zero_s) == (0.0, 990.0)


@pytest.mark.parametrize("delivery_s", [0.01, 1.0, 1.99])
@pytest.mark.parametrize("n_dummies", [0, 1, 5])
@pytest.mark.parametrize("index", [0, 3])
def test_dummies_between_trigger_and_volume_0_are_counted(
    n_dummies: int, delivery_s: float, index: int
) -> None:
    """The scanner gives the trigger at 100 s, then the dummies, then volume 0."""
    at_s = 100 + (n_dummies + index + 1) * TR_S + delivery_s
    clock = start_clock("trigger", arrived(at_s, index), [100.0])
    assert (clock.start, clock.offset_s) == ("trigger", n_dummies * TR_S)
    assert clock.zero_s == 100 + n_dummies * TR_S


def test_a_trigger_a_volume_is_one_acquisition_and_an_earlier_one_another() -> None:
    before = [20.0 + i * TR_S for i in range(5)]
    ours = [100.0 + i * TR_S for i in range(3)]
    later = [100.0 + i * TR_S for i in range(3, 6)]
    clock = start_clock("trigger", arrived(105.5), [*before, *ours, *later])
    assert (clock.offset_s, clock.zero_s) == (2.0, 102.0)


def test_who_joins_late_hears_no_first_trigger() -> None:
    """Volume 5 is the first that comes, and its trigger the first that is heard."""
    clock = start_clock("trigger", arrived(112.5, index=5), [110.0])
    assert (clock.start, clock.offset_s, clock.zero_s) == ("trigger", 0.0, 100.5)


def test_a_trigger_that_is_late_itself_starts_the_clock_all_the_same() -> None:
    clock = start_clock("trigger", arrived(102.01), [100.02])
    assert (clock.start, clock.offset_s) == ("trigger", 0.0)
    assert clock.zero_s == pytest.approx(100.01)


@pytest.mark.parametrize("triggers_s", [[], [101.0], [30.0]])
def test_without_a_trigger_of_this_run_it_starts_with_volume_0(
    triggers_s: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """None, one that came after the first volume, or one of another acquisition."""
    clock = start_clock("trigger", arrived(100.5), triggers_s)
    assert (clock.start, clock.offset_s) == ("first volume", 0.0)
    assert "no trigger came" in caplog.text


def test_a_time_is_compared_with_the_wall_clock(caplog: pytest.LogCaptureFixture) -> None:
    now_s, start = time.perf_counter(), datetime.now(UTC) - timedelta(seconds=100)
    clocks = [
        start_clock(form, arrived(now_s + TR_S))
        for form in (
            start,
            start.astimezone(timezone(timedelta(hours=5))),
            start.astimezone().replace(tzinfo=None),
        )
    ]
    for clock in clocks:
        assert clock.offset_s == pytest.approx(100, abs=0.1)  # two clocks are read after another
        assert clock.zero_s == pytest.approx(now_s, abs=1e-6)
    assert clocks[0].start == start.isoformat()
    assert not caplog.text
    start_clock(start - timedelta(hours=1), arrived(now_s))
    assert "is its time zone right?" in caplog.text


def test_the_offsets_between_clocks_are_kept() -> None:
    clock = start_clock("first volume", arrived(3.0), lsl_minus_perf_s=0.25)
    assert clock.unix_minus_perf_s == pytest.approx(time.time() - time.perf_counter(), abs=0.1)
    assert clock.lsl_minus_perf_s == 0.25
    assert math.isnan(RunClock().lsl_minus_perf_s)


def test_the_setting(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "run.toml"
    for text, start in (
        ('"trigger"', "trigger"),
        ("2026-11-25T10:15:00+01:00", datetime(2026, 11, 25, 9, 15, tzinfo=UTC)),
        ("2026-11-25T10:15:00", datetime(2026, 11, 25, 10, 15)),
    ):
        file.write_text(f"[clock]\nstart = {text}\n")
        config = Config.from_toml(file)
        assert config.clock.start == start
        assert Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ConfigError, match=r"clock\.start.*got 'soon'"):
        Config(clock={"start": "soon"})
    assert ClockSettings().start == "first volume"

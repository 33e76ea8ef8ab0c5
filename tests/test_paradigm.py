from pathlib import Path

import numpy as np
import pytest

from rtfmri.config import BaselineSettings, ParadigmSettings
from rtfmri.errors import EventsError
from rtfmri.paradigm import MAX_ANNOUNCED, Announced, Event, Paradigm, read_events

BLOCKS = (Event(20, 20, "tap"), Event(60, 20, "tap"))
NO_DELAY = ParadigmSettings(haemodynamic_delay_s=0, transition_s=0)


def conditions(paradigm: Paradigm, n: int, tr_s: float = 2.0) -> list[str]:
    return [
        "+".join(paradigm.conditions[c] for c in paradigm.members(i * tr_s, tr_s))
        for i in range(n)
    ]


def test_reads_bids_events(tmp_path: Path) -> None:
    file = tmp_path / "events.tsv"
    file.write_text("onset\tduration\ttrial_type\textra\n1.5\t2\tleft hand\tx\n\n-3\t0\trest\ty\n")
    assert read_events(file) == (Event(1.5, 2, "left hand"), Event(-3, 0, "rest"))


def test_without_trial_type_every_event_is_the_task(tmp_path: Path) -> None:
    file = tmp_path / "events.tsv"
    file.write_text("\ufeffonset\tduration\r\n0\t10\r\n", encoding="utf-8")
    assert read_events(file) == (Event(0, 10, "task"),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing onset and duration"),
        ("onset\ttrial_type\n0\ttap\n", "missing duration"),
        ("onset,duration\n0,1\n", "tab-separated"),
        ("onset\tduration\n", "no events"),
        ("onset\tduration\n0\t-1\n", "line 2: duration must be 0 or more, got -1"),
        ("onset\tduration\n0\t1\nsoon\t1\n", "line 3: onset must be seconds, got 'soon'"),
        ("onset\tduration\n0\tn/a\n", "line 2: duration must be seconds"),
        ("onset\tduration\n0\tinf\n", "line 2: duration must be seconds"),
        ("onset\tduration\n0\n", "line 2: 2 cells expected, got 1"),
    ],
)
def test_bad_events_are_refused_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "events.tsv"
    file.write_text(text)
    with pytest.raises(EventsError, match=words):
        read_events(file)


def test_a_binary_or_missing_events_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("b.tsv", "none.tsv"):
        with pytest.raises(EventsError, match="cannot read"):
            read_events(tmp_path / name)


def test_every_volume_is_baseline_without_events() -> None:
    assert set(conditions(Paradigm(), 5)) == {"baseline"}


def test_the_middle_of_a_volume_decides() -> None:
    assert conditions(Paradigm([Event(3, 4, "tap")], NO_DELAY), 5) == [
        "baseline",
        "tap",
        "tap",
        "baseline",
        "baseline",
    ]


def test_delay_and_transition_shift_and_trim_the_blocks() -> None:
    # Blocks at 20-40 s, 5 s later 25-45 s, less 2 s at each end: middles in 27-43 s count.
    got = conditions(Paradigm(BLOCKS, ParadigmSettings()), 25)
    middles = np.arange(25) * 2.0 + 1
    expected = np.where((middles >= 27) & (middles < 43), "tap", "baseline")
    expected[(abs(middles - 25) < 2) | (abs(middles - 45) < 2)] = ""
    # Both ends are closed on the left, as blocks are.
    expected[middles == 23] = ""
    expected[middles == 43] = ""
    assert got == expected.tolist()


def test_a_block_counts_while_the_response_is_up() -> None:
    """Independent check of the defaults: the volumes kept see most of the modelled response."""
    glm = pytest.importorskip("nilearn.glm.first_level")
    times = np.arange(0, 100, 0.5)
    events = np.array([[20.0, 60.0], [20.0, 20.0], [1.0, 1.0]])
    response = glm.compute_regressor(events, "spm", times)[0][:, 0]
    response = response / response.max()
    paradigm = Paradigm(BLOCKS)
    kept = [response[t == times][0] for t in times if paradigm.members(t, 0.0) == (1,)]
    rest = [response[t == times][0] for t in times if paradigm.members(t, 0.0) == (0,)]
    assert np.mean(kept) > 0.9
    assert min(kept) > 0.7
    assert abs(np.mean(rest)) < 0.05
    assert max(rest) < 0.25


def test_overlapping_events_count_for_both() -> None:
    paradigm = Paradigm([Event(0, 6, "visual"), Event(4, 6, "auditory")], NO_DELAY)
    assert paradigm.conditions == ("baseline", "auditory", "visual")
    assert conditions(paradigm, 6) == [
        "visual",
        "visual",
        "auditory+visual",
        "auditory",
        "auditory",
        "baseline",
    ]


def test_touching_events_of_one_type_are_one_block() -> None:
    paradigm = Paradigm([Event(0, 10, "tap"), Event(10, 10, "tap")], ParadigmSettings())
    assert "" not in conditions(paradigm, 10)[4:12]


def test_a_named_baseline_is_taken_from_the_events_alone() -> None:
    events = [Event(0, 10, "rest"), Event(10, 10, "tap")]
    paradigm = Paradigm(events, NO_DELAY, BaselineSettings(condition="rest"))
    assert paradigm.conditions == ("rest", "tap")
    assert conditions(paradigm, 12) == ["rest"] * 5 + ["tap"] * 5 + [""] * 2


def test_more_than_a_recording_holds_is_refused() -> None:
    with pytest.raises(EventsError, match="at most 64 values"):
        Paradigm([Event(20.0 * i, 10, f"face {i}") for i in range(64)])
    with pytest.raises(EventsError, match="at most 256 bytes"):
        Paradigm([Event(0, 10, "x" * 257)])


def test_conditions_that_no_volume_can_reach_are_named() -> None:
    paradigm = Paradigm([Event(0, 3, "flash"), Event(10, 20, "tap"), Event(5, 0, "press")])
    assert paradigm.unreachable == ("flash", "press")


def test_an_announced_event_counts_from_the_volume_that_knew_of_it() -> None:
    settings = ParadigmSettings(haemodynamic_delay_s=0, transition_s=0, conditions=("up", "down"))
    paradigm = Paradigm((), settings)
    assert paradigm.conditions == ("baseline", "down", "up")
    assert paradigm.unreachable == ()
    assert conditions(paradigm, 3) == ["baseline"] * 3
    paradigm.add(Announced(Event(2, 4, "up"), 4.0))
    paradigm.add(Announced(Event(8, 4, "down"), 8.0))
    expected = ["baseline", "baseline", "up", "baseline", "down", "down", "baseline"]
    for _ in range(2):  # as a run and as its replay
        assert conditions(paradigm, 7) == expected
    assert paradigm.events == ()
    assert paradigm.announced[0] == (Event(2, 4, "up"), 4.0)


def test_what_may_not_be_announced_is_refused() -> None:
    paradigm = Paradigm(BLOCKS, ParadigmSettings())
    with pytest.raises(EventsError, match=r"paradigm\.conditions, none; got 'tap'"):
        paradigm.add(Announced(BLOCKS[0], 0.0))
    paradigm = Paradigm((), ParadigmSettings(conditions=("up",)))
    with pytest.raises(EventsError, match=r"paradigm\.conditions, up; got 'x{40}'"):
        paradigm.add(Announced(Event(0, 1, "x" * 1000), 0.0))
    for i in range(MAX_ANNOUNCED):
        paradigm.add(Announced(Event(i, 0.5, "up"), 0.0))
    with pytest.raises(EventsError, match=f"at most {MAX_ANNOUNCED} events"):
        paradigm.add(Announced(Event(0, 1, "up"), 0.0))


def test_a_paradigm_can_be_moved() -> None:
    named = BaselineSettings(condition="rest")
    moved = Paradigm([Event(0, 10, "rest"), Event(10, 10, "tap")], NO_DELAY, named).moved(4)
    assert moved.events == (Event(4, 10, "rest"), Event(14, 10, "tap"))
    assert conditions(moved, 4) == ["", "", "rest", "rest"]

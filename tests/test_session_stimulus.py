"""A run in step with its stimulus program: the clock's start, and blocks as they are announced."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory import ACTIVE, EVENTS, GRID, TR_S, MemoryReader, plain, volumes
from rtfmri.config import (
    BaselineSettings,
    ClockSettings,
    Config,
    DetrendSettings,
    ParadigmSettings,
)
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Event
from rtfmri.pipeline import Result
from rtfmri.readers import RunEnd, open_reader
from rtfmri.readers.plain import TcpReader
from rtfmri.recording import Recording, open_recording, recover
from rtfmri.session import Session
from rtfmri.simulator.streams import STREAM_TARGETS
from rtfmri.stimulus import Said, Stimulus, open_stimulus
from rtfmri.volume import Volume
from stream_runs import background

ANNOUNCED = ParadigmSettings(conditions=("tap",))
ROI = np.zeros(GRID.shape, np.float32)
ROI[ACTIVE] = 1
Say = Callable[..., None]


def wait_for(there: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


@contextmanager
def program() -> Iterator[tuple[Stimulus, Say]]:
    """A stimulus program on TCP; what it says has been heard when it goes on."""
    with closing(open_stimulus("tcp://127.0.0.1:0")) as link:
        assert link.address
        where = (link.address.host, link.address.port)
        with socket.create_connection(where) as connection:

            def say(*messages: object) -> None:
                counts = link.counts
                n = counts.heard + counts.malformed + len(messages)
                for message in messages:
                    text = message if isinstance(message, str) else json.dumps(message)
                    connection.sendall(text.encode() + b"\n")
                wait_for(lambda: counts.heard + counts.malformed == n)

            yield link, say


def block(onset_s: float | None = None, duration_s: float = 20.0, name: str = "tap") -> object:
    fields = {"trial_type": name, "duration": duration_s}
    return fields if onset_s is None else {**fields, "onset": onset_s}


class Earlier(Stimulus):
    """Says what a link does as if it had come *by_s* earlier."""

    def __init__(self, link: Stimulus, by_s: float) -> None:
        super().__init__()
        self._link, self._by_s = link, by_s
        self.counts = link.counts

    def said(self) -> list[Said]:
        return [one._replace(came_s=one.came_s - self._by_s) for one in self._link.said()]


def drive(session: Session, say: Say, sayings: Mapping[int, object]) -> list[Result]:
    """Run a session; *sayings* are said before the volume of that index is processed."""
    results, iterator = [], iter(session)
    while True:
        if len(results) in sayings:
            say(sayings[len(results)])
        try:
            results.append(next(iterator))
        except StopIteration:
            return results


@contextmanager
def announcing(n: int, out: Path, **given: Any) -> Iterator[tuple[Session, Say]]:
    """Begin a recorded run of *n* volumes, and connect a program that announces its blocks."""
    with (
        program() as (link, say),
        Session(
            MemoryReader(volumes(n), live=True),
            config=plain(paradigm=ANNOUNCED),
            stimulus=link,
            out=out,
            **given,
        ) as session,
    ):
        yield session, say


def conditions(results: list[Result]) -> list[tuple[str, ...]]:
    return [result.conditions for result in results]


def with_events(events: tuple[Event, ...], run: list[Volume], **settings: Any) -> list[Result]:
    with Session(MemoryReader(run), events=events, rois={"m": ROI}, config=plain(**settings)) as s:
        return list(s)


def replayed(recording: Recording) -> list[tuple[str, ...]]:
    pipeline = recording.pipeline()
    return [pipeline.push(volume).conditions for volume in recording.volumes()]


def recorded(recording: Recording) -> list[tuple[str, ...]]:
    names = np.array(recording.conditions)
    return [tuple(names[row].tolist()) for row in recording.members()]


def test_a_trigger_starts_the_clock_and_dummies_are_counted(tmp_path: Path) -> None:
    """The trigger comes 25 s before the first volume is there: its own 10, and those of a dummy.

    So the run may be late by 5 s without another count.
    """
    run = [replace(one, tr_s=10.0) for one in volumes(10)]
    events = (Event(20.0, 30.0, "tap"), Event(70.0, 20.0, "tap"))
    moved = tuple(replace(event, onset_s=event.onset_s - 10) for event in events)
    config = plain(clock=ClockSettings(start="trigger"))
    out = tmp_path / "run.h5"
    with program() as (link, say):
        say("trigger")
        with Session(
            MemoryReader(run, live=True),
            events=events,
            rois={"m": ROI},
            config=config,
            stimulus=Earlier(link, 25.0),
            out=out,
        ) as session:
            results = drive(session, say, {3: {"trigger": True}})
    expected = with_events(moved, run)
    assert session.paradigm.events == moved
    assert conditions(results) == conditions(expected)
    assert ("tap",) in conditions(results)
    np.testing.assert_array_equal(
        [result.design for result in results], [result.design for result in expected]
    )
    summary = json.loads(json.dumps(session.summary()))
    assert summary["clock"] == {"start": "trigger", "offset_s": 10.0}
    assert summary["stimulus"] == {
        "triggers": 2,
        "blocks": 0,
        "late": 0,
        "ignored": 0,
        "malformed": 0,
    }
    with open_recording(out) as recording:
        assert recording.events == moved
        assert (recording.clock.start, recording.clock.offset_s) == ("trigger", 10.0)
        arrived_s = recording.results["arrived_s"][0]
        assert 5 <= arrived_s - recording.clock.zero_s - 10 < 10
        triggers = [note for note in recording.journal if note.kind == "trigger"]
        assert triggers[0] == (0, "trigger", "at 0.000 s")
        assert triggers[1].before_row == 3
        assert recorded(recording) == replayed(recording) == conditions(results)


@pytest.mark.parametrize("early", [False, True])
def test_without_a_trigger_the_first_volume_starts_the_clock(
    early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It never came, or so long before that it was another acquisition's."""
    with program() as (link, say):
        if early:
            say("trigger")
        with Session(
            MemoryReader(volumes(40), live=True),
            events=EVENTS,
            config=plain(clock=ClockSettings(start="trigger")),
            stimulus=Earlier(link, 300.0),
        ) as session:
            results = list(session)
    assert "no trigger came" in caplog.text
    assert session.summary()["clock"] == {"start": "first volume", "offset_s": 0.0}
    assert conditions(results) == conditions(with_events(EVENTS, volumes(40)))


@pytest.mark.parametrize("zone", [UTC, None])
def test_the_clock_may_start_at_a_time(zone: Any, tmp_path: Path) -> None:
    """The task begins 100 s before the first volume's acquisition, whose TR is over at once."""
    start = datetime.now(UTC) - timedelta(seconds=100)
    given = start.astimezone() if zone is UTC else start.astimezone().replace(tzinfo=None)
    events = tuple(replace(event, onset_s=event.onset_s + 100) for event in EVENTS)
    out = tmp_path / "run.h5"
    with Session(
        MemoryReader(volumes(40), live=True),
        events=events,
        config=plain(clock=ClockSettings(start=given)),
        out=out,
    ) as session:
        results = list(session)
    passed_s = time.time() - start.timestamp()
    with open_recording(out) as recording:
        clock = recording.clock
        assert clock.start == given.isoformat()
        assert 100 - TR_S - 0.1 <= clock.offset_s <= passed_s - TR_S + 0.1
        assert recording.events == tuple(
            replace(event, onset_s=event.onset_s - clock.offset_s) for event in events
        )
        assert clock.unix_minus_perf_s == pytest.approx(time.time() - time.perf_counter(), abs=0.1)
        assert np.isnan(clock.lsl_minus_perf_s)
        assert recording.config.clock.start == given
        assert recorded(recording) == replayed(recording) == conditions(results)


def test_announced_blocks_count_as_those_of_a_file(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    with announcing(50, out, rois={"m": ROI}) as (session, say):
        assert session.paradigm.conditions == ("baseline", "tap")
        results = drive(session, say, {10: block(20.0), 30: block(60.0)})
    expected = with_events(EVENTS, volumes(50))
    assert conditions(results) == conditions(expected)
    np.testing.assert_equal([r.roi["m"].psc for r in results], [r.roi["m"].psc for r in expected])
    assert session.maps()["tap"].t[ACTIVE].min() > 8
    assert all(result.design is None for result in results)
    summary = session.summary()
    assert (summary["stimulus"]["blocks"], summary["stimulus"]["late"]) == (2, 0)
    assert summary["glm"] == {}
    with open_recording(out) as recording:
        assert recording.closed
        assert recording.events == EVENTS
        assert recording.columns == recording.contrasts() == ()
        assert recorded(recording) == replayed(recording) == conditions(results)
        pipeline = recording.pipeline()
        for one in recording.volumes():
            pipeline.push(one)
        np.testing.assert_array_equal(pipeline.maps()["tap"].t, session.maps()["tap"].t)


def test_a_block_begins_when_it_is_announced(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    with announcing(20, out) as (session, say):
        results = iter(session)
        next(results)
        before_s = time.perf_counter()
        say(block(duration_s=7.0))
        after_s = time.perf_counter()
        list(results)
    with open_recording(out) as recording:
        (event,) = recording.events
        assert recording.results["arrived_s"][0] - recording.clock.zero_s == pytest.approx(TR_S)
        onset_s = event.onset_s + recording.clock.zero_s
        assert before_s - 1e-6 < onset_s < after_s + 1e-6
        assert event == Event(event.onset_s, 7.0, "tap")
        assert recorded(recording) == replayed(recording)


def test_onsets_are_told_on_the_runs_clock(tmp_path: Path) -> None:
    """The clock started one dummy of 10 s before volume 0."""
    run = [replace(one, tr_s=10.0) for one in volumes(8)]
    config = plain(paradigm=ANNOUNCED, clock=ClockSettings(start="trigger"))
    with program() as (link, say):
        say("trigger", block(40.0))
        with Session(
            MemoryReader(run, live=True),
            config=config,
            stimulus=Earlier(link, 25.0),
            out=tmp_path / "run.h5",
        ) as session:
            list(session)
    assert session.summary()["clock"]["offset_s"] == 10.0
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.events == (Event(30.0, 20.0, "tap"),)


def test_a_late_block_changes_nothing_that_was_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Announced 14 s after it began, so that the first volumes counted for the baseline."""
    out = tmp_path / "run.h5"
    with announcing(30, out) as (session, say):
        results = drive(session, say, {17: block(20.0)})
    on_time = conditions(with_events(EVENTS[:1], volumes(30)))
    assert conditions(results)[:17] == [("baseline",)] * 17
    assert conditions(results)[17:] == on_time[17:]
    assert on_time[16] == on_time[17] == ("tap",)
    assert session.summary()["stimulus"]["late"] == 1
    assert "a block from 20.0 s on was announced too late" in caplog.text
    with open_recording(out) as recording:
        assert recorded(recording) == replayed(recording) == conditions(results)


def test_a_baseline_may_be_announced_too(tmp_path: Path) -> None:
    config = plain(
        paradigm=ParadigmSettings(
            conditions=("rest", "tap"), haemodynamic_delay_s=0, transition_s=0
        ),
        baseline=BaselineSettings(condition="rest"),
    )
    with (
        program() as (link, say),
        Session(
            MemoryReader(volumes(30), live=True),
            config=config,
            stimulus=link,
            out=tmp_path / "run.h5",
        ) as session,
    ):
        say(block(10.0, 10.0, "rest"))
        results = drive(session, say, {10: block(20.0, 10.0)})
    assert session.paradigm.conditions == ("rest", "tap")
    assert conditions(results) == [
        *[()] * 5,
        *[("rest",)] * 5,
        *[("tap",)] * 5,
        *[()] * 15,
    ]
    with open_recording(tmp_path / "run.h5") as recording:
        assert recorded(recording) == replayed(recording) == conditions(results)


def test_what_is_no_event_of_the_run_is_counted_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with program() as (link, say):
        say("hello")  # before the run, and none of its business
        with Session(
            MemoryReader(volumes(20), live=True),
            config=plain(paradigm=ANNOUNCED),
            stimulus=link,
            out=tmp_path / "run.h5",
        ) as session:
            say(block(-60.0, 50.0), block(4.0, name="tpa"), block(4.0, name="baseline"))
            say('{"trial_type": "tap"}', "trigger")
            results = list(session)
    assert session.summary()["stimulus"] == {
        "triggers": 1,
        "blocks": 0,
        "late": 0,
        "ignored": 3,
        "malformed": 1,
    }
    assert set(conditions(results)) == {("baseline",)}
    assert "it was over before the run began" in caplog.text
    assert "tpa" not in caplog.text  # said once
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.events == ()
        assert [note.kind for note in recording.journal] == ["trigger", "end"]


def test_an_unknown_condition_is_named_with_those_that_are_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with program() as (link, say):
        say(block(4.0, name="tpa"))
        with Session(
            MemoryReader(volumes(3), live=True), config=plain(paradigm=ANNOUNCED), stimulus=link
        ) as session:
            list(session)
    assert "must be one of paradigm.conditions, tap; got 'tpa'" in caplog.text


def test_with_events_of_a_file_nothing_can_be_announced() -> None:
    with program() as (link, say):
        say(block(0.0))
        with Session(
            MemoryReader(volumes(40), live=True), events=EVENTS, config=plain(), stimulus=link
        ) as session:
            results = list(session)
    assert session.summary()["stimulus"]["ignored"] == 1
    assert conditions(results) == conditions(with_events(EVENTS, volumes(40)))


def test_two_runs_on_one_link(tmp_path: Path) -> None:
    """Each hears what was said since the other's last volume."""
    reader = MemoryReader(
        [*volumes(20), RunEnd("the scanner said so"), *volumes(20, seed=1)], live=True
    )
    found = []
    with program() as (link, say):
        for number, onset_s in enumerate((8.0, 14.0)):
            out = tmp_path / f"run-{number}.h5"
            say("trigger", block(onset_s))
            with Session(
                reader,
                config=plain(paradigm=ANNOUNCED),
                stimulus=link,
                out=out,
                more_runs=number == 0,
            ) as session:
                results = drive(session, say, {10: block(30.0, 5.0)})
            assert len(results) == 20
            assert session.summary()["stimulus"]["blocks"] == 2
            assert session.summary()["stimulus"]["triggers"] == 1
            with open_recording(out) as recording:
                found.append(recording.events)
                assert recorded(recording) == replayed(recording) == conditions(results)
    assert found == [
        (Event(onset_s, 20.0, "tap"), Event(30.0, 5.0, "tap")) for onset_s in (8.0, 14.0)
    ]


def test_a_recording_that_grows_shows_what_was_announced_and_can_be_recovered(
    tmp_path: Path,
) -> None:
    out, broken, mended = (tmp_path / name for name in ("run.h5", "broken.h5", "mended.h5"))
    with announcing(30, out) as (session, say):
        results = iter(session)
        first = [next(results) for _ in range(5)]
        wait_for(lambda: session.n_recorded == 5)
        with open_recording(out) as growing:
            assert growing.events == ()
            say("trigger", block(12.0))
            first += [next(results) for _ in range(10)]
            wait_for(lambda: session.n_recorded == 15)
            assert growing.events == (Event(12.0, 20.0, "tap"),)
            clock = growing.clock
        shutil.copy(out, broken)  # as a kill leaves it
        list(results)
    assert recover(broken, mended) == 15
    with open_recording(mended) as recording:
        assert recording.closed
        np.testing.assert_equal(asdict(recording.clock), asdict(clock))
        assert recording.events == (Event(12.0, 20.0, "tap"),)
        assert recorded(recording) == replayed(recording) == conditions(first)
        assert recording.maps()["tap"].n_volumes > 0


def test_a_whole_run_with_a_scanner_a_trigger_and_blocks(tmp_path: Path) -> None:
    """Volumes over TCP at the pace of their TR of 0.1 s, and what is said meanwhile."""
    out, n = tmp_path / "run.h5", 40
    run = [replace(one, tr_s=0.1) for one in volumes(n)]
    config = plain(
        paradigm=ParadigmSettings(conditions=("up",), haemodynamic_delay_s=0.2, transition_s=0.1),
        clock=ClockSettings(start="trigger"),
    )
    reader = open_reader(f"tcp://127.0.0.1:0?count={n}")
    assert isinstance(reader, TcpReader)
    with program() as (link, say):

        def scan() -> None:
            target = STREAM_TARGETS["tcp"](reader.address)
            say("trigger")
            start_s = time.perf_counter()
            for index in range(n):
                time.sleep(max(0.0, start_s + 0.1 * (index + 1) - time.perf_counter()))
                target.send(run[index])
                if index in (8, 24):
                    say(block(duration_s=0.8, name="up"))
            target.close()

        with (
            Session(reader, config=config, stimulus=link, out=out) as session,
            background(scan),
        ):
            results = list(session)
    assert len(results) == n
    summary = session.summary()
    assert summary["clock"]["start"] == "trigger"
    assert (summary["stimulus"]["triggers"], summary["stimulus"]["blocks"]) == (1, 2)
    assert [set(r.conditions) <= {"baseline", "up"} for r in results] == [True] * n
    assert conditions(results).count(("up",)) > 2
    with open_recording(out) as recording:
        first, second = recording.events
        assert first.onset_s < second.onset_s
        assert recorded(recording) == replayed(recording) == conditions(results)


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        ({"paradigm": ANNOUNCED}, {"events": EVENTS}, "give one of the two, got both"),
        ({"paradigm": ANNOUNCED}, {"stimulus": None}, "paradigm.conditions needs a stimulus"),
        (
            {"clock": ClockSettings(start="trigger")},
            {"stimulus": None},
            "clock.start 'trigger' needs a stimulus program",
        ),
        ({}, {"live": False}, "at the pace of their TR"),
        ({}, {"live": False, "speed": 2.0}, "at the pace of their TR"),
    ],
)
def test_what_cannot_be_starts_no_run(
    settings: dict[str, Any], given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    out = tmp_path / "run.h5"
    with program() as (link, _):
        reader = MemoryReader(volumes(3), live=given.get("live", True))
        others = {key: value for key, value in given.items() if key != "live"}
        with pytest.raises(ConfigError, match=words):
            Session(
                reader, **{"config": plain(**settings), "stimulus": link, "out": out, **others}
            )
    assert not out.exists()


def test_a_replay_at_the_scanners_pace_may_be_accompanied() -> None:
    with program() as (link, say):
        say("trigger")
        with Session(
            MemoryReader(volumes(3)), config=plain(), stimulus=link, speed=1.0
        ) as session:
            list(session)
    assert session.summary()["stimulus"]["triggers"] == 1


def test_what_is_played_back_starts_with_its_first_volume(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = ClockSettings(start=datetime(2020, 1, 1, tzinfo=UTC))
    with Session(
        MemoryReader(volumes(40)), events=EVENTS, config=plain(clock=settings)
    ) as session:
        results = list(session)
    assert "what is played back starts with its first volume" in caplog.text
    assert session.summary()["clock"] == {"start": "first volume", "offset_s": 0.0}
    assert session.summary()["stimulus"] is None
    assert conditions(results) == conditions(with_events(EVENTS, volumes(40)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"paradigm": ParadigmSettings(conditions=("tap",), haemodynamic_delay_s=1.0)},
            "haemodynamic_delay_s (1 s) is below transition_s (2 s)",
        ),
        (
            {"paradigm": ANNOUNCED, "detrend": DetrendSettings(method="linear")},
            "'linear' knows nothing of blocks that are announced",
        ),
    ],
)
def test_what_does_not_go_well_with_announcing_is_said(
    settings: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with program() as (link, _):
        reader = MemoryReader(volumes(2), live=True)
        with Session(reader, config=plain(**settings), stimulus=link) as session:
            list(session)
    assert words in caplog.text


def test_an_empty_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"paradigm\.conditions\.0"):
        Config(paradigm={"conditions": [""]})


@pytest.mark.parametrize(
    ("uri", "words"),
    [("tcp://127.0.0.1:0", "--speed 1"), ("udp://127.0.0.1:1", "one of tcp:, zmq:, lsl:")],
)
def test_the_command_line_has_the_option(uri: str, words: str) -> None:
    source = "simulator:finger-tapping?volumes=4&shape=24x24x12"
    done = subprocess.run(
        [sys.executable, "-m", "rtfmri", "run", source, "--stimulus", uri],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr

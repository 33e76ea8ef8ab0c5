"""The player: what is sent, in which order and when; and the faults it plays."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import typer

from dicom_files import oblique_grid, voxels
from rtfmri.cli import app
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.simulator import Fault, parse_faults, play, player
from rtfmri.simulator.faults import KINDS, TIMED
from rtfmri.volume import Volume

TR_S = 2.0


def _run(n_volumes: int = 3) -> list[Volume]:
    grid = oblique_grid()
    return [Volume(voxels(grid, i, np.int16), grid, i, TR_S) for i in range(n_volumes)]


class _Reader(list):
    """A run whose length is known."""

    @property
    def n_volumes(self) -> int:
        return len(self)


@dataclass
class _Target:
    """Remembers what it was told, as words; ends as a process would that fails or is stopped."""

    fails_at: int | None = None
    error: BaseException = field(default_factory=lambda: RecordingError("the receiver went away"))
    told: list[str] = field(default_factory=list)
    volumes: list[Volume] = field(default_factory=list)

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        if volume.index == self.fails_at:
            raise self.error
        words = [str(volume.index), "stranger" * stranger, "cut" * (share < 1)]
        if volume.grid.shape != oblique_grid().shape:
            words.append("shape")
        self.told.append(" ".join(filter(None, words)))
        self.volumes.append(volume)

    def die(self) -> None:
        self.told.append("dies")

    def close(self) -> None:
        self.told.append("close")


class _Clock:
    """Stands in for the time module: sleeping moves it on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds


class _TimedTarget(_Target):
    """Remembers when."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self.clock = clock
        self.when_s: list[tuple[object, float]] = []

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        self.when_s.append((volume.index, self.clock.now_s - 100))

    def die(self) -> None:
        self.when_s.append(("dies", self.clock.now_s - 100))


def _told(*faults: str, n_volumes: int = 5) -> list[str]:
    target = _Target()
    play(_Reader(_run(n_volumes)), target, speed=None, faults=parse_faults(faults))
    return target.told


def test_without_faults_all_is_sent_and_then_closed():
    target, seen = _Target(), []
    run = _run()
    assert play(run, target, speed=None, on_volume=seen.append) == 3
    assert target.told == ["0", "1", "2", "close"]
    assert target.volumes == run
    assert seen == [0, 1, 2]


def test_what_is_no_volume_is_ignored():
    target = _Target()
    assert play(["a gap", *_run(1), None], target, speed=None) == 1
    assert target.told == ["0", "close"]


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_a_volume_is_sent_when_its_acquisition_has_ended(monkeypatch, speed):
    clock = _Clock()
    monkeypatch.setattr(player, "time", clock)
    target = _TimedTarget(clock)
    play([_run(4)[i] for i in (0, 1, 3)], target, speed=speed)
    # Volume 2 is missing, and its time passes all the same.
    expected = [(i, (i + 1) * TR_S / speed) for i in (0, 1, 3)]
    assert target.when_s == [(i, pytest.approx(due_s)) for i, due_s in expected]


def test_without_a_speed_nothing_waits(monkeypatch):
    def refuse(_: float) -> None:
        raise AssertionError("slept")

    monkeypatch.setattr(player, "time", SimpleNamespace(sleep=refuse, perf_counter=lambda: 0.0))
    assert play(_run(), _Target(), speed=None, faults=parse_faults(["late@1", "dies@2"])) == 3


@pytest.mark.parametrize(
    ("fault", "speed", "expected"),
    [
        ("late@1", 1.0, [(0, 2), (1, 6), (2, 6), (3, 8)]),
        ("late@1:1.5", 1.0, [(0, 2), (1, 5.5), (2, 6), (3, 8)]),
        ("late@1:4.5", 1.0, [(0, 2), (1, 8.5), (2, 8.5), (3, 8.5)]),
        ("late@1:1.5", 2.0, [(0, 1), (1, 2.75), (2, 3), (3, 4)]),
        ("dies@2:3", 1.0, [(0, 2), (1, 4), ("dies", 6), (2, 9), (3, 9)]),
        ("dies@2", 1.0, [(0, 2), (1, 4), ("dies", 6), (2, 8), (3, 8)]),
        ("swapped@1", 1.0, [(0, 2), (2, 6), (1, 6), (3, 8)]),
    ],
)
def test_faults_keep_their_time(monkeypatch, fault, speed, expected):
    clock = _Clock()
    monkeypatch.setattr(player, "time", clock)
    target = _TimedTarget(clock)
    assert play(_run(4), target, speed=speed, faults=parse_faults([fault])) == 4
    assert target.when_s == [(what, pytest.approx(when_s)) for what, when_s in expected]


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (["late@2"], "0, 1, 2, 3, 4"),
        (["doubled@2"], "0, 1, 2, 2, 3, 4"),
        (["swapped@2"], "0, 1, 3, 2, 4"),
        (["missing@2"], "0, 1, 3, 4"),
        (["truncated@2"], "0, 1, 2 cut, 3, 4"),
        (["wrong-series@2"], "0, 1, 2 stranger, 2, 3, 4"),
        (["wrong-shape@2"], "0, 1, 2 shape, 2, 3, 4"),
        (["dies@2"], "0, 1, dies, 2, 3, 4"),
        (["missing@1-3"], "0, 4"),
        (["missing@0", "doubled@4"], "1, 2, 3, 4, 4"),
        (["missing@2", "wrong-shape@2"], "0, 1, 2 shape, 3, 4"),
        (["truncated@2", "doubled@2"], "0, 1, 2 cut, 2, 3, 4"),
        (["swapped@1", "swapped@2"], "0, 3, 2, 1, 4"),
        (["swapped@1", "missing@2"], "0, 3, 1, 4"),
        (["swapped@1", "doubled@1", "wrong-series@1"], "0, 2, 1 stranger, 1, 1, 3, 4"),
        (["swapped@3", "missing@4"], "0, 1, 2, 3"),
        (["dies@0", "dies@4"], "dies, 0, 1, 2, 3, dies, 4"),
    ],
)
def test_a_fault_is_exactly_what_it_says(faults, told):
    assert ", ".join(_told(*faults)) == f"{told}, close"


@pytest.mark.parametrize(
    ("faults", "indices"),
    [
        (["doubled@2", "dies@1", "late@0", "wrong-series@3", "wrong-shape@4"], [0, 1, 2, 3, 4]),
        (["missing@2"], [0, 1, 3, 4]),
        (["truncated@2"], [0, 1, 3, 4]),
        (["truncated@2", "doubled@2"], [0, 1, 2, 3, 4]),
        (["swapped@0"], [1, 0, 2, 3, 4]),
    ],
)
def test_volumes_of_the_run_are_counted_when_they_are_there(faults, indices):
    seen, begun = [], []
    played = parse_faults(faults)
    n_sent = play(
        _run(5), _Target(), speed=None, faults=played, on_volume=seen.append, on_fault=begun.append
    )
    assert seen == indices
    assert n_sent == len(indices)
    assert set(begun) == set(played)
    assert len(begun) == len(played)


def test_another_shape_is_another_grid_and_nothing_else():
    target = _Target()
    (volume,) = _run(1)
    volume = replace(volume, slice_times_s=(0.1,) * 7)
    play([volume], target, speed=None, faults=[Fault("wrong-shape", 0)])
    other, same = target.volumes
    assert same is volume
    assert other.grid.shape == (24, 10, 7)
    assert not other.grid.matches(volume.grid)
    assert (other.index, other.tr_s, other.data.dtype) == (0, TR_S, np.int16)


def test_a_fault_of_a_volume_that_never_comes_is_not_begun():
    begun = []
    run = [_run(4)[i] for i in (0, 1, 3)]
    play(run, _Target(), speed=None, faults=parse_faults(["late@2", "late@9", "late@3"]),
         on_fault=begun.append)  # fmt: skip
    assert begun == [Fault("late", 3)]


def test_faults_are_read_from_text():
    texts = ["missing@3-5", "late@7:1.5", "dies@0:10", "wrong-series@12", "late@8"]
    faults = parse_faults(texts)
    assert faults == (
        *(Fault("missing", i) for i in (3, 4, 5)),
        Fault("late", 7, 1.5),
        Fault("dies", 0, 10.0),
        Fault("wrong-series", 12),
        Fault("late", 8),
    )
    assert [str(fault) for fault in faults[3:]] == ["late@7:1.5", "dies@0:10", *texts[3:]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_written_and_only_some_take_seconds(kind):
    assert parse_faults([f"{kind}@1"]) == (Fault(kind, 1),)
    if kind in TIMED:
        assert parse_faults([f"{kind}@1:0"]) == (Fault(kind, 1, 0.0),)
    else:
        with pytest.raises(ConfigError, match="only late and dies take :SECONDS"):
            parse_faults([f"{kind}@1:2"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("late", r"must be KIND@INDEX, such as .*; got 'late'"),
        ("", "must be KIND@INDEX"),
        ("late@", "must be KIND@INDEX"),
        ("late@x", "must be KIND@INDEX"),
        ("late@-1", "must be KIND@INDEX"),
        ("late@1.5", "must be KIND@INDEX"),
        ("late@1-", "must be KIND@INDEX"),
        ("late@1234567", "must be KIND@INDEX"),
        ("late@٣", "must be KIND@INDEX"),
        ("burnt@1", "must be one of late, doubled, .*, dies; got 'burnt@1'"),
        ("Late@1", "must be one of late"),
        ("late@1:", "must be a number like 1.5; got 'late@1:'"),
        ("late@1:-2", "must be a number like 1.5"),
        ("late@1:nan", "must be a number like 1.5"),
        ("late@1:inf", "must be a number like 1.5"),
        ("late@1:1e9", "must be a number like 1.5"),
        ("late@1:2s", "must be a number like 1.5"),
        ("late@9-7", "must be FIRST-LAST, in this order; got 'late@9-7'"),
    ],
)
def test_a_fault_that_is_none_is_refused_in_words(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_faults(["missing@1", text])


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([Fault("late", 5)], "must be one of 0 to 4, got late@5"),
        ([Fault("swapped", 4)], "the last volume cannot be swapped with the next, got swapped@4"),
        ([Fault("late", 1, 2.0), Fault("late", 1)], "each fault once; got late@1 twice"),
        ([Fault("burnt", 1)], "must be one of late, .* got 'burnt'"),
    ],
)
def test_a_fault_that_cannot_be_played_stops_before_anything_is_sent(tmp_path, faults, words):
    target = _Target()
    with pytest.raises(ConfigError, match=words):
        play(_Reader(_run(5)), target, speed=None, faults=faults)
    assert target.told == []
    with pytest.raises(ConfigError, match=words):
        play(_Reader(_run(5)), f"folder:{tmp_path / 'export'}", faults=faults)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_speed_must_be_above_zero(speed):
    with pytest.raises(ConfigError, match="speed must be above 0"):
        play(_run(1), _Target(), speed=speed)


@pytest.mark.parametrize("error", [RecordingError("gone"), KeyboardInterrupt()])
def test_the_target_is_closed_whatever_happens(error):
    target, seen = _Target(fails_at=2, error=error), []
    with pytest.raises(type(error)):
        play(_run(5), target, speed=None, on_volume=seen.append)
    assert target.told == ["0", "1", "close"]
    assert seen == [0, 1]


def test_the_target_is_closed_when_the_source_fails():
    def source():
        yield from _run(2)
        raise RecordingError("the source broke")

    target = _Target()
    with pytest.raises(RecordingError, match="the source broke"):
        play(source(), target, speed=None)
    assert target.told == ["0", "1", "close"]


def test_a_target_may_be_named(tmp_path):
    assert play(_run(2), f"folder:{tmp_path}", speed=None) == 2
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ConfigError, match="target must be folder:DIR"):
        play(_run(1), "tape:1", speed=None)


SMALL = "simulator:finger-tapping?volumes=8&shape=16x16x8"


def _simulate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rtfmri", "simulate", SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_tells_what_it_played(tmp_path):
    faults = ("--fault", "missing@2-3", "--fault", "late@5:1.5", "--fault", "doubled@7")
    done = _simulate("--to", f"folder:{tmp_path}", "--speed", 1000, *faults)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"6 volumes sent to folder:{tmp_path}; faults: missing@2, missing@3, late@5:1.5, "
        "doubled@7\n"
    )
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize(
    ("fault", "words"),
    [("burnt@1", "a fault must be one of late"), ("late@8", "must be one of 0 to 7, got late@8")],
)
def test_the_command_refuses_a_fault_before_it_writes(tmp_path, fault, words):
    done = _simulate("--to", f"folder:{tmp_path / 'export'}", "--fault", fault)
    assert done.returncode == 1
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_command_politely(tmp_path):
    command = [sys.executable, "-m", "rtfmri", "simulate", SMALL, "--to", f"folder:{tmp_path}"]
    command += ["--fault", "late@1:3600", "--fault", "missing@4"]
    with subprocess.Popen(
        [*command, "--speed", "100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as scanner:
        until_s = time.monotonic() + 60
        while not list(tmp_path.glob("*.dcm")) and time.monotonic() < until_s:
            time.sleep(0.05)
        scanner.send_signal(signal.SIGINT)
        out, err = scanner.communicate(timeout=60)
    assert scanner.returncode == 0
    assert "stopped by the operator" in err
    assert "Traceback" not in err
    assert re.match(rf"[01] volumes? sent to folder:{tmp_path}; .*not played: .*missing@4\n", out)


def test_the_command_knows_all_faults():
    (option,) = (
        option
        for option in typer.main.get_command(app).commands["simulate"].params
        if option.name == "fault"
    )
    assert all(kind in option.help for kind in KINDS)

"""The PsychoPy example: what it reads off LSL, and, where PsychoPy is, the whole of it."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import messages
from lsl_peers import Listener, taking_turns
from messages import RUN, message
from rtfmri.feedback.outputs import Outputs

pytest.importorskip("pylsl", reason="pylsl is not installed (pip install 'rtfmri[lsl]')")

EXAMPLE = Path(messages.__file__).parents[1] / "examples" / "psychopy_thermometer.py"
N = 30
READER = """
import importlib.util, json, sys, time

spec = importlib.util.spec_from_file_location("example", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
assert "psychopy" not in sys.modules
stream = example.FeedbackStream()
assert stream.poll() == [] and stream.newest is None
end = time.monotonic() + 60
while not stream.connected and time.monotonic() < end:
    stream.poll()
    time.sleep(1 / 60)
print("connected", flush=True)
n = 0
while n < int(sys.argv[2]) and time.monotonic() < end:
    time.sleep(1 / 60)
    for sample in stream.poll():
        print(json.dumps(sample), flush=True)
        n += 1
    if n:
        assert stream.newest == sample
"""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("psychopy_thermometer", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a NamedTuple looks for its annotations
    spec.loader.exec_module(module)
    return module


@contextmanager
def process(*command: str, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_its_lsl_part_gets_every_volume_of_the_real_output() -> None:
    with (
        taking_turns(),
        process(sys.executable, "-c", READER, str(EXAMPLE), str(N)) as reader,
        Outputs(["lsl:"]) as out,
    ):
        assert reader.stdout
        assert reader.stdout.readline() == "connected\n"  # before the run begins
        out.begin(RUN)
        sent = [message(index, missing=index == 5) for index in range(N)]
        for one in sent:
            out.send(one)
            out.settle()
        got = [json.loads(line) for line in reader.stdout]
    for one, (index, time_s, condition, feedback, sure, _) in zip(sent, got, strict=True):
        assert (index, time_s, condition) == (one.index, one.time_s, one.condition)
        assert feedback == (None if one.index == 3 else one.feedback)
        assert sure == (one.index not in (3, 5))


def test_events_and_what_is_on(example: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "events.tsv"
    file.write_text("onset\tduration\ttrial_type\n30\t10\tdown\n10.5\t10\tup\n15\t1\tblink\n")
    blocks = example.read_events(file)
    assert [block.trial_type for block in blocks] == ["up", "blink", "down"]
    at = {now_s: example.block_at(blocks, now_s) for now_s in (0, 10.5, 15.5, 16, 20.5, 30, 40)}
    names = {now_s: block and block.trial_type for now_s, block in at.items()}
    assert names == {
        **{0: None, 10.5: "up", 15.5: "blink", 16: "up"},
        **{20.5: None, 30: "down", 40: None},
    }


def test_its_log_is_never_written_over(example: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    log = example.Log(file)
    log.write(1.5, example.Sample(3, 6.0, "up", None, False, 12.25), "IMAGINE")
    line = file.read_text().splitlines()[1]  # it is there before it is closed
    log.close()
    assert line.startswith("1.5000,")
    assert line.endswith(",12.2500,3,6.0,up,n/a,IMAGINE")
    with pytest.raises(FileExistsError):
        example.Log(file)


@contextmanager
def screen() -> Iterator[str]:
    """Give a display of its own, without a screen."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x800x24", "-nolisten", "tcp"]
    with process(*command, pass_fds=(write,), stderr=subprocess.DEVNULL):
        os.close(write)
        with os.fdopen(read) as told:
            yield f":{told.readline().strip()}"


@pytest.fixture
def experiment(tmp_path: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Give a display, a command, and its environment; no other test has LSL streams open."""
    pytest.importorskip("psychopy", reason="PsychoPy is not installed")
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb, a display without a screen, is not installed")
    (tmp_path / "events.tsv").write_text("onset\tduration\ttrial_type\n1\t3\tup\n")
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "events.tsv")]
    command += ["--csv", str(tmp_path / "log.csv"), "--cue", "up=IMAGINE"]
    home = tmp_path / "home"
    home.mkdir()
    with taking_turns(), screen() as display:
        yield display, command, {**os.environ, "DISPLAY": display, "HOME": str(home)}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_experiment_under_a_virtual_display(
    experiment: tuple[str, list[str], dict[str, str]], tmp_path: Path
) -> None:
    _, command, environment = experiment
    with (
        Outputs(["lsl:"]) as out,
        process(*command, "--trigger", "--announce", env=environment) as psychopy,
        closing(Listener("PsychoPy", 1)) as markers,
    ):
        out.begin(RUN)
        index = 0
        while psychopy.poll() is None and index < 1000:
            out.send(message(index % N))
            index += 1
            time.sleep(0.1)
        assert psychopy.returncode == 0
        ((told,), *_) = markers.samples()[0]
    assert told in ("trigger", json.dumps({"trial_type": "up", "duration": 3.0}))
    logged = rows(tmp_path)
    assert len(logged) > 10
    numbers = [int(row["index"]) for row in logged]
    assert all(after == (before + 1) % N for before, after in pairwise(numbers))
    for row in logged:
        expected = message(int(row["index"]))
        if row["index"] == "3":
            assert row["feedback"] == "n/a"
        else:
            assert float(row["feedback"]) == expected.feedback
        assert row["condition"] == expected.condition
        assert row["cue"] == ("IMAGINE" if 1 <= float(row["seconds"]) < 4 else "")
        assert 0 <= float(row["lsl_s"]) - float(row["sent_s"]) < 60


def press(display: str, key: str) -> None:
    from Xlib import XK, X
    from Xlib.display import Display
    from Xlib.ext import xtest

    link = Display(display)
    code = link.keysym_to_keycode(XK.string_to_keysym(key))
    for kind in (X.KeyPress, X.KeyRelease):
        xtest.fake_input(link, kind, code)
    link.sync()
    link.close()


def test_keys_start_and_end_it(
    experiment: tuple[str, list[str], dict[str, str]], tmp_path: Path
) -> None:
    pytest.importorskip("Xlib", reason="python-xlib, which presses keys, is not installed")
    display, command, environment = experiment
    with Outputs(["lsl:"]) as out, process(*command, env=environment) as psychopy:
        out.begin(RUN)
        index = 0
        while index < 300:  # it is up some time; then it waits for the trigger
            out.send(message(index % N))
            index += 1
            time.sleep(0.1)
            if (tmp_path / "log.csv").exists() and rows(tmp_path):
                break
            press(display, "5")
        assert psychopy.poll() is None
        while psychopy.poll() is None and index < 600:
            press(display, "Escape")
            time.sleep(0.1)
            index += 1
        assert psychopy.returncode == 0
    assert float(rows(tmp_path)[-1]["seconds"]) < 4.0  # long before the last block's end

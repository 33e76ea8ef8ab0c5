"""Lab Streaming Layer: what an independent pylsl gets, and that it stays on this machine."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import messages
from lsl_peers import Listener, taking_turns
from messages import RUN, message
from rtfmri.errors import ConfigError
from rtfmri.feedback.outputs import WAITING, Outputs, open_output

pylsl = pytest.importorskip("pylsl", reason="pylsl is not installed (pip install 'rtfmri[lsl]')")

N = 30


@pytest.fixture(autouse=True)
def turns() -> Iterator[None]:
    with taking_turns():
        yield


def python(script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run something in a process whose LSL has not been loaded yet."""
    path = os.pathsep.join(map(str, (Path(messages.__file__).parent, *sys.path)))
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_both_streams_bring_every_volume() -> None:
    with (
        closing(Listener("rtfmri", N)) as values,
        closing(Listener("rtfmri-events", N)) as events,
        Outputs(["lsl:"]) as out,
    ):
        told, labels, _ = events.info()  # it is there before the run
        assert told == ["rtfmri-events", "Markers", 0.0, pylsl.cf_string]
        out.begin(RUN)
        sent = [message(index) for index in range(N)]
        for one in sent:
            out.send(one)
            out.settle()  # as fast as this, no output gets everything
        told, labels, _ = values.info()
        assert told == ["rtfmri", "Feedback", 0.0, pylsl.cf_double64]
        assert labels == ["feedback", "difference", "link"]
        out.end()
        got, texts = values.samples(), events.samples()
    assert [text for (text,), *_ in texts] == [one.json.decode() for one in sent]
    for one, (sample, stamp, arrived) in zip(sent, got, strict=True):
        expected = [one.feedback, one.signals["difference"], one.signals["link"]]
        for value, right in zip(sample, expected, strict=True):
            assert value == right or (math.isnan(value) and math.isnan(right))
        assert stamp < arrived  # both on LSL's clock, which is this machine's
    assert math.isnan(got[3][0][0])
    assert json.loads(texts[3][0][0])["feedback"] is None


def test_a_run_with_other_signals_has_other_channels() -> None:
    with Outputs(["lsl:"]) as out:
        for signals in (("link",), ("link",), ("link", "difference")):
            with closing(Listener("rtfmri", 1)) as values:
                out.begin(RUN._replace(signals=signals))
                out.settle()
                _, labels, source = values.info()
                assert labels == ["feedback", *signals]
                out.send(message(7))
                ((sample, *_),) = values.samples()
                assert sample == [0.07, *(message(7).signals[name] for name in signals)]
                out.end()
    assert source.startswith("rtfmri-")


def test_who_is_late_gets_what_comes_from_then_on() -> None:
    with Outputs(["lsl:"]) as out:
        out.begin(RUN)
        with closing(Listener("rtfmri", 1)) as first:
            out.send(message(0))
            assert [sample[1] for sample, *_ in first.samples()] == [1.0]
        with closing(Listener("rtfmri", 2)) as late:
            late.info()
            index = 0
            while not late.satisfied:  # when it begins to listen it does not say
                index += 1
                out.send(message(index))
                out.settle()
                time.sleep(0.01)
            (here, *_), (there, *_) = late.samples()
    assert 2.0 <= here[1] == there[1] - 1.0 <= index


def test_no_socket_is_open_to_other_machines() -> None:
    if not shutil.which("ss"):
        pytest.skip("ss, which lists sockets, is not installed")
    with Outputs(["lsl:"]) as out:
        out.begin(RUN)
        out.settle()
        listed = subprocess.run(["ss", "-lntupH"], capture_output=True, text=True, check=True)
    ours = [line.split() for line in listed.stdout.splitlines() if f"pid={os.getpid()}," in line]
    assert len(ours) >= 5  # two for each stream, and the guide's
    for kind, _, _, _, here, *_ in ours:
        assert re.fullmatch(r"127\.0\.0\.1:\d+|(0\.0\.0\.0|\*)%lo:\d+", here), (kind, here)


def test_a_client_that_hangs_holds_nothing_up() -> None:
    n = 5000  # more than are kept for a client
    with Outputs(["lsl:"]) as out:
        out.begin(RUN)
        with closing(Listener("rtfmri-events", 2)) as stuck, closing(Listener("rtfmri", 2)) as ok:
            stuck.info()
            out.send(message(0))
            out.settle()
            stuck.pause()
            for index in range(1, n):
                out.send(message(index))
                if index % WAITING == 0:
                    out.settle()
            assert len(ok.samples()) == 2
        out.settle()
        counts = out.counts()["lsl:"]
    assert (counts.sent, counts.dropped, counts.failed) == (n, 0, 0)


def test_a_port_that_somebody_keeps_for_himself_is_said() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as selfish:
        selfish.bind(("127.0.0.1", 16571))
        with pytest.raises(ConfigError, match="16571 cannot be had"):
            open_output("lsl:")


SETTINGS = """
from rtfmri.feedback.outputs.lsl import import_lsl
lsl = import_lsl({network})
outlet = lsl.StreamOutlet(lsl.StreamInfo("s", "Markers", 1, 0, "string", "s"))
import os
print(outlet.get_info().session_id(), os.environ.get("LSLAPICFG"))
"""


def test_settings_of_the_lab_hold_on_the_network_alone(tmp_path: Path) -> None:
    lab = tmp_path / "lab.cfg"
    lab.write_text("[lab]\nSessionID = scanner\n")
    for network, session in ((True, "scanner"), (False, "default"), (None, "default")):
        done = python(SETTINGS.format(network=network), LSLAPICFG=str(lab))
        assert done.stdout.split() == [session, str(lab)], done.stderr


def test_one_process_has_one_network() -> None:
    with closing(open_output("lsl:?network=0")):
        pass
    with pytest.raises(ConfigError, match="network must be the same for all that use LSL in a pr"):
        open_output("lsl:?network=1")


def test_lsl_that_was_loaded_without_us_cannot_be_confined() -> None:
    script = """
import pylsl
outlet = pylsl.StreamOutlet(pylsl.StreamInfo("s", "Markers", 1, 0, "string", "s"))
from rtfmri.feedback.outputs import open_output
print("v6 is off" if "<v6data_port>0<" in outlet.get_info().as_xml() else "v6 is on", flush=True)
open_output("lsl:")
"""
    done = python(script, HOME="/nowhere")
    if "v6 is off" in done.stdout:
        pytest.skip("this machine has no IPv6, by which it is told")
    assert "ConfigError: output lsl:: LSL was used in this process before" in done.stderr


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("lsl:rtfmri", "nothing follows lsl: but .network=1, got 'rtfmri'"),
        ("lsl:?network=yes", "network must be 0 or 1, got 'yes'"),
        ("lsl:?scope=site", "'scope' is not a key of 'lsl:.scope=site'; allowed are network"),
    ],
)
def test_malformed_uris(uri: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        open_output(uri)


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("pylsl.py", "raise ImportError('no module')"),
        ("pylsl.py", "raise RuntimeError('LSL binary library file was not found')"),
    ],
)
def test_without_lsl_it_says_what_to_install(tmp_path: Path, folder: str, text: str) -> None:
    (tmp_path / folder).write_text(text)
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from rtfmri.feedback.outputs import open_output; open_output('lsl:')"
    )
    assert done.returncode
    assert "ConfigError: output lsl:: LSL needs the packages pylsl and liblsl: pip" in done.stderr

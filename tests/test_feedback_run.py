"""From the command line to independent clients: every volume's feedback arrives, as recorded."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import feedback_clients
from dicom_files import real_data
from lsl_peers import taking_turns
from rtfmri.recording import Recording, open_recording

CLIENTS = Path(feedback_clients.__file__)


class Client:
    """A process that prints what it gets."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENTS), *arguments], stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line == "ready\n":
                self._ready.set()
            else:
                self.lines.append(line)

    def wait_until_ready(self) -> None:
        assert self._ready.wait(60)

    def messages(self) -> list[dict[str, Any]]:
        """Return what came, once the last volume did."""
        self.process.wait(60)
        self._thread.join(60)
        return [json.loads(line) for line in self.lines]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join(10)
        assert self.process.stdout
        self.process.stdout.close()


@contextmanager
def clients(*wanted: Sequence[str]) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        started = []
        for arguments in wanted:
            started.append(Client(*arguments))
            stack.callback(started[-1].close)
        for client in started:
            client.wait_until_ready()
        yield started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "rtfmri", "run", *arguments, "--device", "cpu", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(CLIENTS.parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    for counts in summary["outputs"].values():
        assert (counts["dropped"], counts["failed"]) == (0, 0)


def check(messages: list[dict[str, Any]], recording: Recording) -> None:
    """Compare what a client got with what is recorded."""
    n = recording.n_volumes
    assert [message["index"] for message in messages] == list(range(n))
    psc, members = recording.roi[:, :, 2], recording.members()
    for row, message in enumerate(messages):
        signals = dict(zip(recording.signal_names, recording.signals[row], strict=True))
        assert list(message["signals"]) == list(recording.signal_names)
        for name, value in signals.items():
            assert message["signals"][name] == (None if math.isnan(value) else value)
        shown = recording.shown[row]
        assert message["feedback"] == (None if math.isnan(shown) else shown)
        for roi, value in zip(recording.roi_names, psc[row], strict=True):
            assert message["roi"][roi] == (None if math.isnan(value) else value)
        conditions = np.array(recording.conditions)[members[row]]
        assert message["condition"] == "+".join(conditions)
        assert message["quality"]["usable"] == recording.results["usable"][row]


def has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def test_simulated_run_reaches_zmq_and_tcp_clients(tmp_path: Path) -> None:
    pytest.importorskip("zmq", reason="pyzmq is not installed (pip install 'rtfmri[zmq]')")
    ports = free_port(), free_port()
    out, last = tmp_path / "run.h5", "29"
    region = tmp_path / "region.nii"
    write_region(region)
    feed, log = f"tcp://127.0.0.1:{ports[1]}", tmp_path / "feedback.jsonl"
    with clients(["zmq", str(ports[0]), last]) as (zmq,):
        late: list[Client] = []

        def connect() -> None:
            """Connect as soon as there is somebody; some volumes may be over."""
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", ports[1])) == 0:
                        break
                time.sleep(0.1)
            late.append(Client("tcp", str(ports[1]), last))

        thread = threading.Thread(target=connect)
        thread.start()
        run(
            "simulator:finger-tapping?volumes=30&shape=24x24x14",
            *("--roi", f"hand={region}", "--out", str(out)),
            *("--speed", "10", "--output", f"zmq://127.0.0.1:{ports[0]}"),
            *("--output", feed, "--output", f"file:{log}"),
        )
        thread.join()
        try:
            with open_recording(out) as recording:
                check(zmq.messages(), recording)
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                check([line for line in lines if "index" in line], recording)
            by_index = {message["index"]: message for message in zmq.messages()}
            got = [m for m in late[0].messages() if "index" in m]
            assert got[-1]["index"] == 29
            assert all(message == by_index[message["index"]] for message in got)
        finally:
            late[0].close()


def write_region(path: Path) -> None:
    """Write a region of the simulated head."""
    from rtfmri.simulator.scanner import Scanner

    scanner = Scanner(n_volumes=2, shape=(24, 24, 14))
    import nibabel

    image = scanner.truth.regions["left_hand"].astype(np.uint8)
    nibabel.Nifti1Image(image, scanner.grid.affine).to_filename(path)


@pytest.mark.skipif(not has("zmq", "pylsl"), reason="pyzmq and pylsl are not both installed")
def test_real_run_reaches_zmq_and_lsl_clients(tmp_path: Path) -> None:
    folder = real_data("siemens_mosaic_psc")
    port, out = free_port(), tmp_path / "run.h5"
    with (
        taking_turns(),
        clients(["zmq", str(port), "154"], ["lsl", "rtfmri-events", "154"]) as (zmq, lsl),
    ):
        run(
            str(folder),
            *("--events", str(folder / "events.tsv"), "--out", str(out), "--speed", "40"),
            *("--roi", f"left={folder / 'lROI_1.nii'}"),
            *("--roi", f"right={folder / 'rROI_2.nii'}"),
            *("--output", f"zmq://127.0.0.1:{port}", "--output", "lsl:"),
        )
        with open_recording(out) as recording:
            assert recording.n_volumes == 155
            check(zmq.messages(), recording)
            check(lsl.messages(), recording)

"""AFNI's receiver protocol, as the afniRTI package receives it in another process."""

import json
import math
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest
from numpy.testing import assert_allclose

from messages import RUN, message
from rtfmri.errors import ConfigError
from rtfmri.feedback.outputs import Output, Outputs, open_output
from rtfmri.feedback.outputs.afni import BEGIN, END, to_afni

N = 30
RECEIVER = """
import json, sys
import afniRTI

receiver = afniRTI.ReceiverInterface(port=int(sys.argv[1]))
def tell(motion, extra):
    print(json.dumps([motion, extra]), flush=True)
    return [1]

receiver.compute_TR_data = tell
assert receiver.RTI.open_incoming_socket() == 0
print("ready", flush=True)
for _ in range(2):
    receiver.process_one_run()
    print(json.dumps(["run", receiver.RTI.nextra, receiver.RTI.nread]), flush=True)
    receiver.close_data_ports()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def listener(timeout_s: float = 60.0) -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(timeout_s)
        yield server, f"afni://127.0.0.1:{server.getsockname()[1]}"


def test_afnirti_gets_every_volume_of_each_run() -> None:
    pytest.importorskip("afniRTI", reason="afniRTI, AFNI's receiver, is not installed")
    port = free_port()
    receiver = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert receiver.stdout
        assert receiver.stdout.readline() == "ready\n"
        sent = [message(i, motion=(0.1 * i, 0, 0, 0, 0, 0) if i else None) for i in range(N)]
        with Outputs([f"afni://127.0.0.1:{port}"]) as out:
            for run in (RUN, RUN._replace(signals=("link",), rois=())):
                out.begin(run)
                for one in sent:
                    out.send(one)
                    out.settle()
                out.end()
                out.settle()
            counts = out.counts()[f"afni://127.0.0.1:{port}"]
            assert (counts.sent, counts.failed) == (2 * N, 0)
        told = [json.loads(line) for line in receiver.stdout]
    finally:
        receiver.kill()
        receiver.communicate()
    first, second = told[:N], told[N + 1 : -1]
    assert told[N] == ["run", 5, N]
    assert told[-1] == ["run", 2, N]
    for one, (motion, extra) in zip(sent, first, strict=True):
        expected = [one.feedback, *one.signals.values(), *one.roi.values()]
        assert_allclose(extra, np.float32(expected), rtol=0, equal_nan=True)
        head = one.motion or (0,) * 6
        assert_allclose(motion, np.float32([0, head[0], 0, 0, 0, 0]), rtol=0)
    for one, (_, extra) in zip(sent, second, strict=True):
        assert_allclose(extra, np.float32([one.feedback, one.signals["link"]]), rtol=0)


def turned(axis: int, degrees: float) -> np.ndarray:
    """Return the rotation about an axis, counter-clockwise for who looks against it."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def test_motion_is_what_moves_the_head_back() -> None:
    """Points of a head that went somewhere are brought back as 3dvolreg's help says."""
    rng = np.random.default_rng(5)
    rest = rng.normal(scale=60, size=(20, 3))  # from the centre, to right, anterior, superior
    for _ in range(20):
        shift_mm, angles = rng.uniform(-10, 10, 3), rng.uniform(-20, 20, 3)
        x, y, z = (turned(axis, angles[axis]) for axis in range(3))
        there = rest @ (z @ y @ x).T + shift_mm
        up, left, back, roll, pitch, yaw = to_afni((*shift_mm, *angles))
        lps = there * [-1, -1, 1]
        lps = lps @ turned(2, roll).T  # about the axis to superior, first
        lps = lps @ turned(0, pitch).T
        lps = lps @ turned(1, yaw).T + np.array([left, back, up])
        # a few ulp of float64 at 100 mm, after seven products
        assert_allclose(lps * [-1, -1, 1], rest, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("motion", "expected"),
    [
        ((1, 2, 3, 0, 0, 0), (-3, 1, 2, 0, 0, 0)),  # right, anterior, up; back: down, left, back
        ((0, 0, 0, 5, 0, 0), (0, 0, 0, 0, 5, 0)),  # nodded up about the axis to right
        ((0, 0, 0, 0, 5, 0), (0, 0, 0, 0, 0, 5)),
        ((0, 0, 0, 0, 0, 5), (0, 0, 0, -5, 0, 0)),
    ],
)
def test_motion_along_and_about_one_axis(
    motion: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    assert_allclose(to_afni(motion), expected, rtol=0, atol=1e-12)


def test_what_is_on_the_wire() -> None:
    with listener() as (server, uri), Outputs([uri]) as out:
        out.begin(RUN)
        out.send(message(3))
        out.end()
        connection, _ = server.accept()
        with connection:
            connection.settimeout(60)
            got = b"".join(iter(lambda: connection.recv(4096), b""))
    assert got[:8] == BEGIN + struct.pack("<i", 5) == bytes.fromhex("ABCDEFAC 05000000")
    assert got[-4:] == END == bytes.fromhex("DEADDEAD")
    values = struct.unpack("<11f", got[8:-4])
    assert_allclose(values, [*[0] * 6, np.nan, 4.0, np.nan, 0.5, np.nan])


def test_a_receiver_that_is_not_there_fails_each_message_of_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with listener() as (server, uri):
        server.close()
        with Outputs([uri]) as out:
            out.begin(RUN)
            for index in range(5):
                out.send(message(index))
            out.end()
            out.settle()
            counts = out.counts()[uri]
    assert (counts.sent, counts.failed) == (0, 5)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith(f"output {uri}: no receiver at 127.0.0.1:")


def test_a_receiver_that_goes_away_gets_the_next_run() -> None:
    with listener() as (server, uri), Outputs([uri]) as out:
        out.begin(RUN)
        server.accept()[0].close()
        index = 0
        while not out.counts()[uri].failed:  # the first ones may go out before that is noticed
            out.send(message(index))
            out.settle()
            index += 1
        out.end()
        out.begin(RUN)
        out.send(message(0))
        connection, _ = server.accept()
        with connection:
            connection.settimeout(60)
            assert connection.recv(4, socket.MSG_WAITALL) == BEGIN


def send_much(output: Output) -> None:
    for index in range(10_000):
        output.send(message(index))


def test_a_receiver_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtfmri.feedback.outputs.afni._PATIENCE_S", 0.1)
    names = tuple(f"signal {i}" for i in range(20_000))
    with listener() as (server, uri), closing(open_output(uri)) as output:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        output.begin(RUN._replace(signals=names))
        connection, _ = server.accept()
        with connection, pytest.raises(ConnectionError, match="the receiver is gone: timed out"):
            send_much(output)
        with pytest.raises(ConnectionError, match="there is no receiver in this run"):
            output.send(message(0))


@pytest.mark.parametrize(
    "uri", ["afni://127.0.0.1:0", "afni://127.0.0.1:70000", "afni://a b", "afni:///x"]
)
def test_malformed_addresses(uri: str) -> None:
    with pytest.raises(ConfigError, match="an address is //HOST:PORT, such as"):
        open_output(uri)

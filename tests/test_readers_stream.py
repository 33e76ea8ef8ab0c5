"""What all streams do: whole runs, broken ones, two in a row, strangers, and nobody's name."""

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

from dicom_files import PATIENT
from rtfmri.errors import ConfigError, RecordingError, SourceError
from rtfmri.readers import RunEnd, Skipped, open_reader, stream
from rtfmri.readers.network import Address, Allowed
from rtfmri.readers.plain import PullReader, TcpReader
from rtfmri.simulator import streams
from rtfmri.simulator.streams import STREAM_TARGETS, canonical
from stream_runs import (
    GRID,
    SCHEMES,
    TR_S,
    background,
    indices,
    received,
    skipped,
    volume,
    volumes,
)

SAY_GOODBYE = ("afni", "mrd", "tcp", "zmq")
ON_TCP = ("afni", "mrd", "murfi", "tcp")
DOCS = Path(__file__).parents[1] / "docs"


@contextmanager
def listening(
    scheme: str, query: str = "", tr_s: float | None = None
) -> Iterator[stream.RunReader]:
    reader = open_reader(f"{scheme}://:0?{query}", tr_s=tr_s)
    assert isinstance(reader, stream.RunReader)
    try:
        yield reader
    finally:
        reader.close()


def send(target: streams.StreamTarget, which: range, dtype: str = "int16") -> None:
    for index in which:
        target.send(volume(index, dtype))


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_arrives_bit_for_bit(scheme, dtype):
    with listening(scheme, "count=8") as reader:
        target = STREAM_TARGETS[scheme](reader.address)
        before_s = time.perf_counter()
        items = received(reader, lambda: send(target, range(8), dtype))
        target.close()
    assert indices(items) == list(range(8))
    assert items[8:] == [RunEnd("all 8 volumes are there")]
    for got in volumes(items):
        sent = volume(got.index, dtype)
        data, affine = sent.data, sent.grid.affine
        if scheme == "pyneal":  # it wants axes near RAS+
            data, affine = canonical(sent)
        kept = "int16" if (scheme, dtype) == ("afni", "uint16") else dtype
        assert got.data.dtype == kept
        np.testing.assert_array_equal(got.data, data)
        np.testing.assert_allclose(got.grid.affine, affine, rtol=0, atol=2e-5)
        assert got.tr_s == pytest.approx(TR_S)
        assert before_s < got.arrived_s < got.decoded_s < time.perf_counter()


@pytest.mark.parametrize("scheme", ["afni", "tcp", "zmq"])
def test_slice_times_arrive(scheme):
    times_s = (0.0, 0.05, 0.01, 0.06, 0.02, 0.07, 0.03)
    with listening(scheme, "count=1") as reader:
        target = STREAM_TARGETS[scheme](reader.address)
        sent = volume(0)
        object.__setattr__(sent, "slice_times_s", times_s)
        (got, _) = received(reader, lambda: target.send(sent))
        target.close()
    assert got.slice_times_s == times_s


@pytest.mark.parametrize("scheme", SAY_GOODBYE)
def test_a_goodbye_ends_the_run(scheme):
    with listening(scheme) as reader:
        target = STREAM_TARGETS[scheme](reader.address)
        items = received(reader, lambda: (send(target, range(2)), target.close()))
    assert indices(items) == [0, 1]
    assert items[-1] == RunEnd("the scanner said so")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_volume_that_breaks_off_is_cut_short_and_the_run_goes_on(scheme):
    with listening(scheme, "count=5") as reader:
        target = STREAM_TARGETS[scheme](reader.address)

        def run() -> None:
            send(target, range(2))
            target.send(volume(2), share=0.5)
            # AFNI's protocol numbers nothing: what comes at once on another connection may be
            # read before the first one's end is.
            time.sleep(0.5)
            send(target, range(3, 5))

        items = received(reader, run)
        target.close()
    assert sorted(indices(items)) == [0, 1, 3, 4]
    assert skipped(items) == [Skipped("volume 2", "is cut short")]
    np.testing.assert_array_equal(
        {got.index: got for got in volumes(items)}[3].data,
        canonical(volume(3))[0] if scheme == "pyneal" else volume(3).data,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scanner_that_dies_comes_back_into_the_same_run(scheme):
    with listening(scheme, "count=6") as reader:
        target = STREAM_TARGETS[scheme](reader.address)

        def run() -> None:
            send(target, range(3))
            target.die()
            send(target, range(3, 6))

        items = received(reader, run)
        target.close()
    assert sorted(indices(items)) == list(range(6))
    assert skipped(items) == []
    assert items[-1] == RunEnd("all 6 volumes are there")


@pytest.mark.parametrize("goodbye", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_runs_one_after_the_other(scheme, goodbye):
    with listening(scheme, "count=3") as reader:
        for _ in range(2):
            target = STREAM_TARGETS[scheme](reader.address)
            finish = target.close if goodbye else target.die
            items = received(reader, lambda t=target, f=finish: (send(t, range(3)), f()))
            assert indices(items) == [0, 1, 2]
            assert items[-1] == RunEnd("all 3 volumes are there")
            target.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_silence_ends_a_run_and_the_next_one_begins_at_0(scheme):
    with listening(scheme, "timeout_s=0.3") as reader:
        for _ in range(2):
            target = STREAM_TARGETS[scheme](reader.address)
            items = received(reader, lambda t=target: (send(t, range(2)), t.die()))
            assert indices(items) == [0, 1]
            assert items[-1] == RunEnd("no volume came for 0.3 s")
            target.close()


@pytest.mark.parametrize("scheme", ["mrd", "murfi", "tcp", "zmq"])
def test_volumes_of_another_series_are_skipped(scheme):
    with listening(scheme, "count=3") as reader:
        target = STREAM_TARGETS[scheme](reader.address)

        def run() -> None:
            for index in range(3):
                target.send(volume(index))
                target.send(volume(index), stranger=True)

        items = received(reader, run)
        target.close()
    assert indices(items) == [0, 1, 2]
    assert set(skipped(items)) <= {
        Skipped(f"volume {i}", "belongs to another series") for i in range(3)
    }
    assert len(skipped(items)) >= 2


GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: scanner\r\n\r\n" + b"\0" * 700,
    b"\xff" * 2000,
    bytes(range(256)) * 8,
    struct.pack("<I", 0xFFFFFFF0) + b"{" * 2000,
    struct.pack("<I", 2000) + b"[" * 2000,
    struct.pack("<HI", 3, 5) + b"<a/>\0" + b"\0" * 2000,
)


def throw(address: Address, data: bytes) -> None:
    """Send what a stranger might, and wait until he is thrown out."""
    with socket.create_connection((address.host, address.port)) as connection:
        connection.settimeout(20)
        try:
            connection.sendall(data)
            while connection.recv(1000):
                pass
        except ConnectionError:
            pass


@pytest.mark.parametrize("scheme", ON_TCP)
def test_strangers_are_thrown_out_and_the_scanner_is_served(scheme, monkeypatch):
    monkeypatch.setattr(stream, "INTRODUCTION_S", 0.4)
    with listening(scheme, "count=2") as reader:
        target = STREAM_TARGETS[scheme](reader.address)

        def run() -> None:
            for data in (*GARBAGE, b"\1"):
                throw(reader.address, data)
            send(target, range(2))

        items = received(reader, run)
        target.close()
    assert indices(items) == [0, 1]
    assert skipped(items) == [Skipped("a connection", "does not speak this protocol")] * 7


@pytest.mark.parametrize("scheme", ON_TCP)
def test_silent_connections_make_room(scheme):
    with listening(scheme, "count=2") as reader, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connected(reader))
        target = STREAM_TARGETS[scheme](reader.address)
        items = received(reader, lambda: send(target, range(2)))
        target.close()
    assert indices(items) == [0, 1]


@pytest.mark.parametrize("scheme", ["zmq", "pyneal"])
def test_strangers_at_a_zeromq_socket(scheme, monkeypatch):
    monkeypatch.setattr("rtfmri.readers.pyneal.INTRODUCTION_S", 0.3)
    messages = [[b"\xff" * 2000], [b"{}"], [b'{"rtfmri": 1, "volIdx": 0}', b""]]
    with listening(scheme, "count=2") as reader:
        target = STREAM_TARGETS[scheme](reader.address)
        where = f"tcp://{reader.address.host}:{reader.address.port}"

        def run() -> None:
            for data in GARBAGE:
                throw(reader.address, data)
            with zmq.Context() as context:
                stranger = context.socket(zmq.PUSH if scheme == "zmq" else zmq.PAIR)
                stranger.connect(where)
                for frames in messages:
                    stranger.send_multipart(frames)
                stranger.close(linger=5000)
            send(target, range(2))

        items = received(reader, run)
        target.close()
    assert indices(items) == [0, 1]
    assert Skipped("a connection", "does not speak this protocol") in skipped(items)


def test_who_holds_a_pair_and_says_nothing_is_thrown_out(monkeypatch):
    monkeypatch.setattr("rtfmri.readers.pyneal.INTRODUCTION_S", 0.3)
    with listening("pyneal", "count=2") as reader, ExitStack() as stack:
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        stranger = context.socket(zmq.PAIR)
        monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        stranger.setsockopt(zmq.RECONNECT_IVL, -1)
        stranger.connect(f"tcp://{reader.address.host}:{reader.address.port}")
        assert monitor.poll(10_000)
        target = STREAM_TARGETS["pyneal"](reader.address)
        items = received(reader, lambda: send(target, range(2)))
        target.close()
    assert indices(items) == [0, 1]
    assert Skipped("a connection", "does not speak this protocol") in skipped(items)


def test_a_huge_claim_takes_no_memory_before_its_bytes_come():
    import resource

    with listening("tcp") as reader:
        header = (
            b'{"rtfmri": 1, "shape": [256, 256, 256], "dtype": "float32", "affine": 0, "index": 0}'
        )
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with ExitStack() as stack:
            for _ in range(8):
                connection = stack.enter_context(connected(reader))
                connection.sendall(struct.pack("<I", len(header)) + header + b"\1" * 100)
            stream_of_items = iter(reader)
            connection.close()
            assert next(stream_of_items) == Skipped("volume 0", "is cut short")
            grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        assert grown_kb < 8 * 64 * 1024 / 4  # of 64 MB each


class Nobody(Allowed):
    """Allows not even this machine."""

    def admits(self, host: str) -> bool:
        return False


@pytest.mark.parametrize("kind", [TcpReader, PullReader])
def test_who_is_not_allowed_is_not_heard(kind, caplog, monkeypatch):
    monkeypatch.setattr(streams, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(streams, "_TRIES", 1)
    scheme = "tcp" if kind is TcpReader else "zmq"
    reader = kind(Address("127.0.0.1", 0), None, allow=Nobody(), timeout_s=0.1)
    target = STREAM_TARGETS[scheme](reader.address)
    items: list[object] = []

    def insist() -> None:
        for index in range(100):
            target.send(volume(index))
            time.sleep(0.01)

    with background(lambda: items.extend(reader)):
        with pytest.raises(RecordingError, match="nobody listens"):
            insist()
        reader.close()
    target.close()
    assert items == []
    assert "which allow does not name" in caplog.text or "that allow does not name" in caplog.text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_port_in_use_is_named(scheme):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SourceError, match=f"127.0.0.1:{port}"):
            open_reader(f"{scheme}://:{port}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_nobody_listens_a_target_says_so(scheme, monkeypatch):
    monkeypatch.setattr(streams, "_TRIES", 2)
    monkeypatch.setattr(streams, "_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    target = STREAM_TARGETS[scheme](Address("127.0.0.1", port))
    with pytest.raises(RecordingError, match=f"nobody listens on 127.0.0.1:{port}"):
        target.send(volume(0))
    target.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_logs_where_it_listens_and_closes_at_once(scheme, caplog):
    caplog.set_level("INFO")
    with listening(scheme) as reader:
        assert f"listening on 127.0.0.1:{reader.address.port}" in caplog.text
        items: list[object] = []
        with background(lambda: items.extend(reader)):
            reader.close()
            reader.close()
        assert items == []
        with listening(scheme.replace("afni", "tcp")):
            pass
    assert not [t for t in threading.enumerate() if str(reader.address.port) in t.name]


@pytest.mark.parametrize("scheme", ["zmq", "pyneal"])
def test_without_pyzmq_both_sides_say_how_to_install_it(scheme, monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(SourceError, match=r"pip install 'rtfmri\[zmq\]'"):
        open_reader(f"{scheme}://:0")
    with pytest.raises(ConfigError, match=r"pip install 'rtfmri\[zmq\]'"):
        STREAM_TARGETS[scheme](Address("127.0.0.1", 1))


def connected(reader: stream.RunReader) -> socket.socket:
    return socket.create_connection((reader.address.host, reader.address.port))


def plain_message(**fields: object) -> bytes:
    import json

    text = json.dumps({"rtfmri": 1, **fields}).encode()
    return struct.pack("<I", len(text)) + text


def plain_volume(number: int, **fields: object) -> bytes:
    whole = {
        "shape": GRID.shape,
        "dtype": "int16",
        "affine": GRID.affine.tolist(),
        "tr_s": TR_S,
        "index": number,
        **fields,
    }
    return plain_message(**whole) + volume(number).flat.tobytes()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"affine": np.zeros((4, 4)).tolist()}, "has no usable geometry"),
        ({"affine": [[float("nan")] * 4] * 4}, "has no usable geometry"),
        ({"affine": [1, 2]}, "has no usable geometry"),
        ({"affine": [[1e300] * 4] * 4}, "has no usable geometry"),
        ({"tr_s": None}, "has no usable repetition time"),
        ({"tr_s": -1}, "has no usable repetition time"),
    ],
)
def test_a_volume_that_cannot_be_used_is_skipped_and_the_next_one_read(fields, reason):
    with listening("tcp", "count=2") as reader, connected(reader) as connection:
        connection.sendall(plain_volume(0) + plain_volume(7, **fields) + plain_volume(1))
        items = list(reader)
    assert indices(items) == [0, 1]
    assert skipped(items) == [Skipped("volume 7", reason)]


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [0, 1, 1]},
        {"shape": [4096, 4096, 2]},
        {"shape": [2.5, 2, 2]},
        {"shape": "abc"},
        {"dtype": "int64"},
        {"dtype": "object"},
        {"index": -1},
        {"index": 10**30},
        {"affine": [[1], [2, 3]]},
        {"rtfmri": 2},
    ],
)
def test_a_header_that_breaks_the_protocol_closes_the_connection(fields):
    with listening("tcp", "count=2") as reader:
        with connected(reader) as connection:
            connection.sendall(plain_volume(0) + plain_volume(7, **fields))
            stream_of_items = iter(reader)
            assert next(stream_of_items).index == 0
            assert next(stream_of_items) == Skipped("a connection", "broke the protocol")
        with connected(reader) as connection:
            connection.sendall(plain_volume(1))
            assert next(stream_of_items).index == 1


def test_without_a_repetition_time_one_is_asked_for():
    with listening("tcp") as reader, connected(reader) as connection:
        connection.sendall(plain_volume(0, tr_s=None))
        with pytest.raises(SourceError, match="--tr"):
            list(reader)
    with listening("tcp", "count=1", tr_s=2.5) as reader, connected(reader) as connection:
        connection.sendall(plain_volume(0, tr_s=None))
        assert next(iter(reader)).tr_s == 2.5


def test_nobodys_name_gets_out(caplog):
    caplog.set_level("DEBUG")
    named = {"series": PATIENT, "PatientName": PATIENT}
    data = (
        plain_volume(0, **named)
        + plain_volume(1, **named, affine=0)
        + plain_volume(1, **named)
        + plain_message(shape=PATIENT)
    )
    with listening("tcp", "timeout_s=0.3") as reader:
        with connected(reader) as connection:
            connection.sendall(data)
            items = list(reader)
        throw(reader.address, plain_message(end=PATIENT))
    assert len(items) == 5
    assert "DOE" not in caplog.text + repr(items)


def test_the_sender_of_the_documentation(tmp_path):
    text = (DOCS / "protocol.md").read_text()
    program = tmp_path / "sender.py"
    program.write_text(text.split("```python\n")[1].split("```")[0])
    with listening("tcp") as reader:
        where = [reader.address.host, str(reader.address.port)]
        items = received(
            reader, lambda: subprocess.run([sys.executable, program, *where], check=True)
        )
    assert indices(items) == list(range(10))
    assert items[10:] == [RunEnd("the scanner said so")]
    for got in volumes(items):
        sent = np.random.default_rng(got.index).integers(0, 1000, (64, 64, 36), np.int16)
        np.testing.assert_array_equal(got.data, sent)
        assert got.grid.voxel_size_mm == (3, 3, 3)

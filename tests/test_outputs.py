"""Delivery to outputs: none delays another, drops are counted; and each plain transport."""

import json
import math
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from messages import RUN, message
from rtfmri.errors import ConfigError
from rtfmri.feedback import outputs
from rtfmri.feedback.message import Message, Run
from rtfmri.feedback.outputs import WAITING, Outputs, Scheme
from rtfmri.feedback.outputs import tcp as tcp_output


class Fake:
    """Keeps what it gets; may be blocked, or raise."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def begin(self, run: Run) -> None:
        self.got.append(run)

    def send(self, one: Message) -> None:
        self.entered.set()
        assert self.open_gate.wait(60)
        if self.error:
            raise self.error
        self.got.append(one.index)

    def end(self) -> None:
        self.got.append("end")

    def close(self) -> None:
        self.got.append("closed")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    made: dict[str, Fake] = {}

    def open_fake(target: str) -> Fake:
        return made.setdefault(target, Fake())

    monkeypatch.setitem(outputs.SCHEMES, "fake", Scheme(open_fake, {}))
    return made


def test_each_output_gets_everything_in_order(fakes: dict[str, Fake]) -> None:
    with Outputs(["fake:a", "fake:b"]) as out:
        for _ in range(2):
            out.begin(RUN)
            for index in range(WAITING):
                out.send(message(index))
            out.end()
            out.settle()
        assert {uri: counts.sent for uri, counts in out.counts().items()} == {
            "fake:a": 2 * WAITING,
            "fake:b": 2 * WAITING,
        }
    for fake in fakes.values():
        assert fake.got == [*([RUN, *range(WAITING), "end"] * 2), "closed"]


def test_one_that_blocks_delays_nobody_and_gets_the_newest(fakes: dict[str, Fake]) -> None:
    with Outputs(["fake:stuck", "fake:free"]) as out:
        stuck, free = fakes["stuck"], fakes["free"]
        stuck.open_gate.clear()
        out.begin(RUN)
        out.send(message(0))
        assert stuck.entered.wait(60)
        for index in range(1, 101):
            out.send(message(index))
            while index not in free.got:  # it comes although the other is stuck
                time.sleep(0.001)
        assert stuck.got == [RUN]
        out.end()
        stuck.open_gate.set()
        out.settle()
        newest = range(101 - WAITING, 101)
        assert stuck.got == [RUN, 0, *newest, "end"]
        counts = out.counts()["fake:stuck"]
        assert (counts.sent, counts.dropped, counts.failed) == (1 + WAITING, 100 - WAITING, 0)
        assert out.counts()["fake:free"].sent == 101


def test_one_that_blocks_for_ever_is_left_behind(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outputs, "_FAREWELL_S", 0.1)
    with Outputs(["fake:stuck"]) as out:
        fakes["stuck"].open_gate.clear()
        out.send(message(0))
        out.settle()
    assert "fake:stuck: it blocks, and is left behind" in caplog.text
    fakes["stuck"].open_gate.set()


def test_one_that_raises_is_tried_again_and_counted(
    fakes: dict[str, Fake], caplog: pytest.LogCaptureFixture
) -> None:
    with Outputs(["fake:bad"]) as out:
        bad = fakes["bad"]
        bad.error = RuntimeError("nobody there")
        for index in range(3):
            out.send(message(index))
        out.settle()
        bad.error = None
        out.send(message(3))
        out.settle()
        assert bad.got == [3]
        counts = out.counts()["fake:bad"]
        assert (counts.sent, counts.failed) == (1, 3)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "output fake:bad: nobody there"
    ]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("feedback.jsonl", "an output must begin with one of afni:, file:, lsl:, tcp:"),
        ("osc://127.0.0.1:1", "an output must begin with one of"),
        ("tcp://127.0.0.1:99999", "an address is //HOST:PORT"),
        ("tcp://127.0.0.1:0?alow=1", "'alow' is not a key"),
        ("tcp://0.0.0.0:0", "open to other machines"),
        ("zmq://0.0.0.0:0", "open to other machines"),
        ("udp://127.0.0.1", "an address is //HOST:PORT"),
        ("udp://127.0.0.1:0", "an address is //HOST:PORT"),
        ("file:", "a file must have a name"),
        ("file:/no/such/folder/a.jsonl", "cannot write"),
    ],
)
def test_what_is_wrong_is_said_at_once(uri: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Outputs([uri])
    assert uri in str(caught.value)


def test_given_twice_or_a_port_in_use(fakes: dict[str, Fake]) -> None:
    with pytest.raises(ConfigError, match="must be given once"):
        Outputs(["fake:a", "fake:a"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for scheme in ("tcp", "zmq"):
            with pytest.raises(ConfigError, match="cannot listen"):
                Outputs(["fake:b", f"{scheme}://127.0.0.1:{port}"])
    assert fakes["b"].got[-1] == "closed"


def test_a_file_has_the_run_and_a_line_a_volume(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    with Outputs([f"file:{path}"]) as out:
        out.begin(RUN)
        for index in range(5):
            out.send(message(index))
        out.settle()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines[0]["run"]["signals"] == ["difference", "link"]
        assert lines[1:] == [json.loads(message(index).json) for index in range(5)]
        assert lines[4]["feedback"] is None
        assert lines[4]["signals"] == {"difference": 4.0, "link": None}
    with pytest.raises(ConfigError, match="exists already"):
        Outputs([f"file:{path}"])


def test_udp_is_a_big_endian_float() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(30)
        with Outputs([f"udp://127.0.0.1:{receiver.getsockname()[1]}"]) as out:
            out.begin(RUN)
            for index in range(5):
                out.send(message(index))
            got = [receiver.recv(100) for _ in range(5)]
    values = [struct.unpack(">f", datagram)[0] for datagram in got]
    assert math.isnan(values[3])
    del values[3]
    assert values == pytest.approx([0, 0.01, 0.02, 0.04])


SUBSCRIBER = """
import sys, zmq
context = zmq.Context()
socket = context.socket(zmq.SUB)
socket.setsockopt(zmq.RCVTIMEO, 30000)
socket.connect(sys.argv[1])
socket.subscribe(b"rtfmri")
while True:
    topic, text = socket.recv_multipart()
    print(topic.decode(), text.decode(), flush=True)
    if b'"index":29,' in text:
        break
socket.close()
context.term()
"""


def test_zmq_subscribers_in_other_processes_get_every_message() -> None:
    pytest.importorskip("zmq", reason="pyzmq is not installed")
    with Outputs(["zmq://127.0.0.1:0"]) as out:
        endpoint = f"tcp://{out.addresses()['zmq://127.0.0.1:0']}"
        command = [sys.executable, "-c", SUBSCRIBER, endpoint]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as subscriber:
            assert subscriber.stdout
            out.begin(RUN)
            stop = threading.Event()

            def send_until_heard() -> None:
                """A subscriber hears from when its subscription has come; so say 0 till then."""
                while not stop.is_set():
                    out.send(message(0))
                    time.sleep(0.01)

            sender = threading.Thread(target=send_until_heard)
            sender.start()
            first = subscriber.stdout.readline()
            stop.set()
            sender.join()
            for index in range(1, 30):
                out.send(message(index))
                time.sleep(0.002)
            rest = subscriber.stdout.read().splitlines()
    assert first.split(" ", 1) == ["rtfmri", message(0).json.decode() + "\n"]
    rest = [line for line in rest if '"index":0,' not in line]
    assert rest == [f"rtfmri {message(index).json.decode()}" for index in range(1, 30)]


@contextmanager
def tcp(n: int = 0) -> Iterator[tuple[Outputs, Callable[[], socket.socket]]]:
    """A TCP output that has sent *n* volumes, and what connects to it."""
    with Outputs(["tcp://127.0.0.1:0"]) as out:
        host, _, port = out.addresses()["tcp://127.0.0.1:0"].partition(":")
        out.begin(RUN)
        for index in range(n):
            out.send(message(index))
            if index % WAITING == WAITING - 1:
                out.settle()
        out.settle()
        yield out, lambda: socket.create_connection((host, int(port)), timeout=30)


def test_tcp_clients_get_lines_as_they_come() -> None:
    with tcp(3) as (out, connect), connect() as one, connect() as other:
        one.sendall(b"0\n")
        lines, others = one.makefile("rb"), other.makefile("rb")
        assert lines.readline() == message(0).json + b"\n"
        for index in range(3, 10):
            out.send(message(index))
        for reader in (lines, others):
            got = [reader.readline() for _ in range(7)]
            assert got == [message(index).json + b"\n" for index in range(3, 10)]
            reader.close()


def test_tcp_answers_for_any_volume_of_the_run() -> None:
    with tcp(6) as (out, connect), connect() as client:
        lines = client.makefile("rb")
        client.sendall(b"0005\n")  # as Pyneal's MATLAB client does it
        assert json.loads(lines.readline()) == {
            "foundResults": True,
            "average": 0.5,
            **json.loads(message(5).json),
        }
        client.sendall(b'{"index": 4}\n2\n{"index": 99}\nwhat?\n')
        assert lines.readline() == message(4).json + b"\n"
        assert lines.readline() == message(2).json + b"\n"
        assert json.loads(lines.readline()) == {"index": 99, "found": False}
        assert "error" in json.loads(lines.readline())
        out.begin(RUN)  # of the next run nothing is there yet
        out.settle()
        client.sendall(b"4\n")
        assert json.loads(lines.readline()) == {"index": 4, "found": False}
        lines.close()


@pytest.mark.parametrize(("request_", "found"), [(b"0004", True), (b"0031", False)])
def test_tcp_answers_pyneals_request(request_: bytes, found: bool) -> None:
    """As Pyneal's client does it: four digits, then a length, then so many bytes of JSON."""
    with tcp(6) as (out, connect), connect() as client:
        client.sendall(request_)
        out.send(message(6))  # does not come between
        answer = b""
        while chunk := client.recv(4096):  # and the connection ends
            answer += chunk
    length, _, text = answer.partition(b"\n")
    assert int(length) == len(text)
    told = json.loads(text)
    assert told["foundResults"] is found
    if found:
        assert told["index"] == 4
        assert told["average"] == told["roi"]["left"] == 0.5


def test_tcp_ends_what_does_not_behave_and_serves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_output, "MAX_WAITING_BYTES", 20_000)
    with tcp() as (out, connect), ExitStack() as stack:

        def client() -> socket.socket:
            return stack.enter_context(connect())

        good = client()
        good.sendall(b"0\n")
        lines = stack.enter_context(good.makefile("rb"))
        lines.readline()
        garbage, long, loris, deaf = (client() for _ in range(4))
        idle = [client() for _ in range(100)]
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"0\n")
        loris.sendall(b'{"ind')
        send_all_that_is_taken(garbage, bytes(range(256)) * 20 + b"\n" * 20)
        send_all_that_is_taken(long, b"x" * 10_000_000)
        assert ends(long)
        assert ends(garbage)
        assert ends(idle[0])  # more than there is room for
        for index in range(3000):
            out.send(message(index))
            assert json.loads(lines.readline())["index"] == index
        assert ends(deaf)
        output: Any = out._lanes["tcp://127.0.0.1:0"]._output
        assert output.n_refused >= 3 + 100 - tcp_output.MAX_CLIENTS


def send_all_that_is_taken(client: socket.socket, data: bytes) -> None:
    try:
        client.sendall(data)
    except OSError:
        return


def ends(client: socket.socket) -> bool:
    """Tell whether the other side ends a connection, whatever it sends before."""
    client.settimeout(30)
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_open_output_imports_what_it_needs_late() -> None:
    command = (
        "import sys, rtfmri.feedback.outputs;"
        "print({'zmq', 'pylsl', 'websockets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"

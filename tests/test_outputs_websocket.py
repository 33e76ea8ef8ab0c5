"""WebSocket and the little web server beside it: who gets what, and who gets nothing."""

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from messages import RUN, message
from rtfmri.errors import ConfigError
from rtfmri.feedback.outputs import Outputs, open_output

pytest.importorskip("websockets", reason="websockets is not installed (rtfmri[web])")

from websockets.exceptions import ConnectionClosed, InvalidHandshake, WebSocketException
from websockets.sync.client import ClientConnection, connect

from rtfmri.feedback.outputs.websocket import MAX_CLIENTS, WAITING, WebSocketOutput

PATIENCE_S = 60


@contextmanager
def serving(query: str = "") -> Iterator[tuple[WebSocketOutput, str]]:
    with closing(open_output(f"ws://127.0.0.1:0{query}")) as output:
        assert isinstance(output, WebSocketOutput)
        output.begin(RUN)
        yield output, f"127.0.0.1:{output.address.port}"


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def indices(client: ClientConnection, n: int) -> list[int]:
    return [json.loads(client.recv(timeout=PATIENCE_S))["index"] for _ in range(n)]


def get(where: str, path: str = "/", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://{where}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def raw(where: str, data: bytes) -> bytes:
    """Send bytes, and return all that comes until the other side ends it."""
    host, _, port = where.partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        got = b""
        try:
            connection.sendall(data)
            while chunk := connection.recv(4096):
                got += chunk
        except ConnectionError:  # it does not want to hear the rest
            pass
        return got


def test_each_client_gets_each_message() -> None:
    uri = "ws://127.0.0.1:0"
    with Outputs([uri]) as out, ExitStack() as stack:
        out.begin(RUN)
        out.send(message(0))
        out.settle()
        where = f"ws://{out.addresses()[uri]}"
        clients = [stack.enter_context(connect(where)) for _ in range(3)]
        for client in clients:
            assert indices(client, 1) == [0]  # the newest, at once
        sent = [message(index) for index in range(1, 31)]
        for one in sent:
            out.send(one)
            for client in clients:
                assert client.recv(timeout=PATIENCE_S) == one.json.decode()
        out.end()
        assert out.counts()[uri].sent == 31


def test_a_new_run_forgets_the_newest_of_the_last_one() -> None:
    with serving() as (output, where):
        output.send(message(29))
        output.begin(RUN)
        with connect(f"ws://{where}") as client:
            with pytest.raises(TimeoutError):
                client.recv(timeout=0.2)
            output.send(message(0))
            assert indices(client, 1) == [0]


def test_what_waits_is_sent_before_it_closes() -> None:
    with ExitStack() as stack:
        with serving() as (output, where):
            client = stack.enter_context(connect(f"ws://{where}"))
            output.send(message(0))
            assert indices(client, 1) == [0]
            for index in range(1, WAITING):
                output.send(message(index))
        assert indices(client, WAITING - 1) == list(range(1, WAITING))
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=PATIENCE_S)


def test_a_client_that_does_not_read_loses_the_oldest_and_holds_nobody_up() -> None:
    n, quality = 400, {"usable": True, "problems": ["x" * 100_000], "fd_mm": None}
    with serving() as (output, where), ExitStack() as stack:
        slow = stack.enter_context(connect(f"ws://{where}", max_queue=1, ping_interval=None))
        quick = stack.enter_context(connect(f"ws://{where}"))
        output.send(message(0))
        assert indices(slow, 1) == indices(quick, 1) == [0]
        for index in range(1, n):
            output.send(message(index, quality=quality))
            assert indices(quick, 1) == [index]  # 40 MB in all, more than sockets hold
        (waiting,) = [client.waiting for client in output._clients if client.waiting]
        assert len(waiting) == WAITING
        got = []
        while not got or got[-1] < n - 1:
            got += indices(slow, 1)
        assert got == sorted(set(got))
        assert len(got) < n - 1
        assert got[-WAITING:] == list(range(n - WAITING, n))


def test_clients_that_never_read_are_left_when_it_closes() -> None:
    request = (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    quality = {"usable": True, "problems": ["x" * 1_000_000], "fd_mm": None}
    uri = "ws://127.0.0.1:0"
    with ExitStack() as stack, Outputs([uri]) as out:
        host, _, port = out.addresses()[uri].partition(":")
        for _ in range(5):
            deaf = stack.enter_context(socket.create_connection((host, int(port))))
            deaf.sendall(request)
            assert deaf.recv(12) == b"HTTP/1.1 101"
        for index in range(50):
            out.send(message(index, quality=quality))
            out.settle()
        assert out.counts()[uri].sent == 50
    assert not [thread for thread in threading.enumerate() if thread.name == "rtfmri-ws"]


def test_the_page_asks_for_nothing_elsewhere() -> None:
    with serving() as (_, where):
        status, headers, page = get(where)
        assert status == 200
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        policy = dict(
            part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == f"'self' ws://{where}"
        assert policy["script-src"] == policy["style-src"] == "'self'"
        assert headers["X-Content-Type-Options"] == "nosniff"
        for path, kind in (
            ("/thermometer.js", "text/javascript"),
            ("/thermometer.css", "text/css"),
        ):
            status, headers, content = get(where, path)
            assert status == 200
            assert headers["Content-Type"].startswith(kind)
            assert b"://" not in content.replace(b"ws://${location.host}", b"")
        assert b"://" not in page


@pytest.mark.parametrize(
    "path", ["/favicon.ico", "/../message.py", "/%2e%2e/message.py", "//", "/index.html"]
)
def test_there_is_nothing_else_to_be_had(path: str) -> None:
    with serving() as (_, where):
        assert get(where, path)[0] == 404


@pytest.mark.parametrize(
    ("host", "welcome"),
    [
        ("127.0.0.1:8765", True),
        ("localhost:9000", True),  # through a tunnel, say
        ("LOCALHOST", True),
        ("[::1]:8765", True),
        ("evil.example:8765", False),  # a name that was bent to 127.0.0.1
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("127.0.0.1; script-src *", False),
        ("", False),
    ],
)
def test_hosts(host: str, welcome: bool) -> None:
    with serving() as (output, where):
        assert get(where, Host=host)[0] == (200 if welcome else 403)
        assert output.n_refused == (0 if welcome else 1)


def test_without_a_host_or_with_two_there_is_nothing() -> None:
    with serving() as (_, where):
        for lines in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
            answer = raw(where, b"GET / HTTP/1.1\r\n" + lines + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("query", "origin", "welcome"),
    [
        ("", None, True),  # no browser
        ("", "http://{where}", True),
        ("", "http://localhost", False),
        ("", "https://{where}", False),
        ("", "null", False),
        ("", "https://task.example.org", False),
        ("?origin=https://task.example.org", "https://task.example.org", True),
        ("?origin=https://task.example.org", "http://{where}", True),
        ("?origin=https://task.example.org", "https://task.example.org.evil.example", False),
        ("?origin=http://a.org:8080,https://b.org", "https://b.org", True),
    ],
)
def test_origins(query: str, origin: str | None, welcome: bool) -> None:
    with serving(query) as (output, where):
        output.send(message(7))
        given = origin and origin.format(where=where)
        if welcome:
            with connect(f"ws://{where}", origin=given) as client:  # type: ignore[arg-type]
                assert indices(client, 1) == [7]
        else:
            with (
                pytest.raises(InvalidHandshake, match="HTTP 403"),
                connect(f"ws://{where}", origin=given),  # type: ignore[arg-type]
            ):
                pass
            assert output.n_refused == 1


def say(client: ClientConnection, said: str | bytes) -> None:
    client.send(said)
    client.recv(timeout=PATIENCE_S)


def test_who_says_something_is_sent_away() -> None:
    with serving() as (output, where):
        for said in ("hello", b"\x00" * 100, "x" * 10_000_000):
            with connect(f"ws://{where}") as client, pytest.raises(ConnectionClosed):
                say(client, said)
        with connect(f"ws://{where}") as client:
            output.send(message(1))
            assert indices(client, 1) == [1]


HOSTILE = {
    "garbage": os.urandom(10_000),
    "line of 10 MB": b"GET /" + b"x" * 10_000_000 + b" HTTP/1.1\r\n\r\n",
    "header of 10 MB": b"GET / HTTP/1.1\r\nHost: " + b"x" * 10_000_000 + b"\r\n\r\n",
    "headers without end": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "a body": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nrun=stop!",
    "not quite WebSocket": b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_clients_change_nothing_for_others(name: str) -> None:
    with serving() as (output, where), connect(f"ws://{where}") as client:
        for index in range(5):
            assert not raw(where, HOSTILE[name]).startswith(b"HTTP/1.1 101")
            output.send(message(index))
            assert indices(client, 1) == [index]
        until(lambda: len(output._open) == 1)


def test_too_many_clients_are_refused_until_some_leave() -> None:
    with serving() as (output, where), ExitStack() as stack:
        host, _, port = where.partition(":")
        for _ in range(MAX_CLIENTS):  # which say nothing, for as long as they are let
            stack.enter_context(socket.create_connection((host, int(port))))
        until(lambda: len(output._open) == MAX_CLIENTS)
        with (
            pytest.raises((OSError, EOFError, WebSocketException)),
            connect(f"ws://{where}", open_timeout=PATIENCE_S),
        ):
            pass
        assert output.n_refused == 1
        stack.close()
        until(lambda: not output._open)
        with connect(f"ws://{where}") as client:
            output.send(message(1))
            assert indices(client, 1) == [1]


def test_who_never_finishes_asking_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtfmri.feedback.outputs.websocket._HANDSHAKE_S", 0.2)
    with serving() as (output, where):
        assert raw(where, b"GET / HTTP/1.1\r\nHost: loc") == b""
        until(lambda: not output._open)


def test_a_port_in_use_and_other_machines_are_refused() -> None:
    with serving() as (_, where), pytest.raises(ConfigError, match=r"port \d+ is in use"):
        open_output(f"ws://{where}")
    with pytest.raises(ConfigError, match="open to other machines; name those that may connect"):
        open_output("ws://0.0.0.0:0")
    with pytest.raises(ConfigError, match="origin must be origins of web pages, such as https:"):
        open_output("ws://127.0.0.1:0?origin=task.example.org/")


def test_without_websockets_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.asyncio.server", None)
    with pytest.raises(ConfigError, match="needs the package websockets, version 14 or newer"):
        open_output("ws://127.0.0.1:0")

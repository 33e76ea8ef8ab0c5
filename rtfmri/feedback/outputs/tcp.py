"""TCP: a JSON line a volume to everybody who listens, and answers to who asks for one again.

A client that connects gets each volume's line from then on. It may ask for any volume of the run
by a line of its own, ``{"index": 12}`` or ``12``: the answer is that volume's line once more, or
``{"index":12,"found":false}`` if there is none (yet).

Pyneal's request is answered, too (resultsServer.py of github.com/jeffmacinnes/pyneal): four
digits. The answer is the length of a JSON object in digits, an end of line, and the object: the
message's entries and ``foundResults``, with ``average`` for the first region's PSC; then the
connection is closed. Where an end of line follows the four digits, as from MATLAB's fprintf, the
answer is the object on a line. So that nothing comes before it, a client gets no line in its first
half second, unless it has sent one; what it missed by that it gets then.
"""

import json
import logging
import re
import selectors
import socket
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rtfmri.feedback.message import Message, Run
from rtfmri.readers.network import Address, Allowed, listen, parse_address

_log = logging.getLogger(__name__)

PORT = 5557
MAX_CLIENTS = 64
"""With more, the one is disconnected that has been silent for longest, if one has said nothing."""
MAX_KEPT = 20_000
"""Volumes of a run that can be asked for again: the newest."""
MAX_WAITING_BYTES = 1 << 20
"""A client that lets more than this wait for it is disconnected."""
MAX_LINE_BYTES = 4096
MAX_MISTAKES = 10
"""Lines that are no request, after which a client is disconnected."""
GRACE_S = 0.5
_PYNEAL, _PYNEAL_PAUSE_S = re.compile(rb"[0-9]{4}"), 0.05
_LOOK_S = 0.02
_SYSTEM_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 14


def open_tcp(target: str, allow: Allowed | None = None) -> "TcpOutput":
    """Open ``tcp://HOST:PORT``.

    Raises
    ------
    SourceError
        If the address is malformed, is not of this machine alone and nobody is allowed by name,
        or one cannot listen there.
    """
    allow = allow or Allowed()
    return TcpOutput(parse_address(target, PORT, allow), allow)


@dataclass(eq=False, slots=True)
class _Client:
    connection: socket.socket
    since_s: float
    listens: bool = False
    """Whether it gets lines as they come: it asked by line, or its time to ask is over."""
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)
    missed: list[bytes] = field(default_factory=list)
    heard_s: float = 0.0
    n_mistakes: int = 0
    leaves: bool = False
    """Whether it is to be disconnected once it has got what waits for it."""


class TcpOutput:
    """Serves any number of clients in one thread; `send` never waits for them.

    Attributes
    ----------
    address : Address
        With the port that the operating system chose, if any could be.
    n_refused : int
        Connections that were not taken, or ended because the client did not behave.
    """

    def __init__(self, address: Address, allow: Allowed) -> None:
        self._listener = listen(address)
        self._listener.setblocking(False)
        self.address = Address(address.host, self._listener.getsockname()[1])
        self.n_refused = 0
        self._allow = allow
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Message] = OrderedDict()
        self._new: list[bytes] = []
        self._clients: dict[socket.socket, _Client] = {}
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="rtfmri-tcp", daemon=True)
        self._thread.start()

    def begin(self, run: Run) -> None:
        """See `Output.begin`: volumes of the run before cannot be asked for any longer."""
        with self._lock:
            self._kept.clear()

    def send(self, message: Message) -> None:
        """See `Output.send`."""
        line = message.json + b"\n"
        with self._lock:
            self._kept[message.index] = message
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            self._new.append(line)
        self._rouse()

    def end(self) -> None:
        """See `Output.end`: its volumes can still be asked for."""

    def close(self) -> None:
        """See `Output.close`: clients get what waits for them, if they take it at once."""
        self._closing = True
        self._rouse()
        self._thread.join()

    def _rouse(self) -> None:
        with suppress(BlockingIOError):  # it is roused already
            self._wake.send(b"!")

    def _serve(self) -> None:
        while True:
            for key, events in self._selector.select(_LOOK_S if self._anybody_undecided() else 1):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    with suppress(BlockingIOError):
                        self._woken.recv(_CHUNK_BYTES)
                else:
                    self._hear(self._clients[key.data], events)
            self._pass_on()
            if self._closing:
                break
        for client in list(self._clients.values()):
            self._drop(client)
        for open_socket in (self._listener, self._wake, self._woken):
            open_socket.close()
        self._selector.close()

    def _anybody_undecided(self) -> bool:
        return any(not client.listens for client in self._clients.values())

    def _accept(self) -> None:
        try:
            connection, (host, *_) = self._listener.accept()
        except OSError:
            return
        silent = (client for client in self._clients.values() if not client.heard_s)
        full = len(self._clients) >= MAX_CLIENTS
        if full and (longest := next(silent, None)):
            self._refuse(longest)  # else whoever only connects could keep all others out
            full = False
        if full or not self._allow.admits(str(host)):
            connection.close()
            self._count_refused("refused a connection")
            return
        self._pass_on()  # what came before it is not for it
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Else the system keeps megabytes for a client that does not read.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SYSTEM_BYTES)
        self._clients[connection] = _Client(connection, time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ, connection)

    def _hear(self, client: _Client, events: int) -> None:
        if events & selectors.EVENT_READ:
            try:
                chunk = client.connection.recv(_CHUNK_BYTES)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            if not chunk:
                self._drop(client)
                return
            client.heard_s = time.monotonic()
            client.incoming += chunk
            self._read(client)

    def _read(self, client: _Client) -> None:
        *lines, rest = bytes(client.incoming).split(b"\n")
        client.incoming[:] = rest
        if lines:
            client.listens = True
        for line in lines:
            client.outgoing += self._answer_to(line, client)
            if len(client.outgoing) > MAX_WAITING_BYTES:
                break
        if client.n_mistakes > MAX_MISTAKES or len(rest) > MAX_LINE_BYTES:
            self._refuse(client)

    def _answer_to(self, line: bytes, client: _Client) -> bytes:
        if _PYNEAL.fullmatch(line.rstrip()):
            return self._pyneals_answer(int(line)) + b"\n"
        index = _asked(line)
        if index is None:
            client.n_mistakes += 1
            return b'{"error":"a request is {\\"index\\": 12} or 12"}\n'
        with self._lock:
            message = self._kept.get(index)
        return message.json + b"\n" if message else b'{"index":%d,"found":false}\n' % index

    def _pyneals_answer(self, index: int) -> bytes:
        with self._lock:
            message = self._kept.get(index)
        answer: dict[str, Any] = {"foundResults": message is not None}
        if message:
            answer |= json.loads(message.json)
            if message.roi:
                answer["average"] = next(iter(answer["roi"].values()))
        return json.dumps(answer).encode()

    def _pass_on(self) -> None:
        """Bring what is new to all that listen, and decide of those that have not asked yet."""
        with self._lock:
            lines, self._new = self._new, []
        now_s = time.monotonic()
        for client in list(self._clients.values()):
            if not client.listens:
                self._decide(client, now_s)
            client.missed += lines
            if client.listens:
                client.outgoing += b"".join(client.missed)
                client.missed = []
            self._write(client)

    def _decide(self, client: _Client, now_s: float) -> None:
        if _PYNEAL.fullmatch(client.incoming):
            # Without an end of line, which would be there by now.
            if now_s - client.heard_s >= _PYNEAL_PAUSE_S and not client.leaves:
                text = self._pyneals_answer(int(client.incoming))
                client.outgoing += b"%d\n%b" % (len(text), text)
                client.leaves = True
        elif now_s - client.since_s > GRACE_S:
            client.listens = True

    def _write(self, client: _Client) -> None:
        waiting = len(client.outgoing) + sum(map(len, client.missed))
        if client.outgoing:
            try:
                sent = client.connection.send(client.outgoing)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._drop(client)
                return
            del client.outgoing[:sent]
            waiting -= sent
        if client.leaves and not client.outgoing:
            self._drop(client)
        elif waiting > MAX_WAITING_BYTES:
            self._refuse(client)
        else:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outgoing else 0)
            self._selector.modify(client.connection, events, client.connection)

    def _refuse(self, client: _Client) -> None:
        self._count_refused("disconnected a client that did not read, or sent no requests")
        self._drop(client)

    def _count_refused(self, what: str) -> None:
        self.n_refused += 1
        _log.log(logging.DEBUG if self.n_refused > 1 else logging.WARNING, "tcp output: %s", what)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection, None):
            self._selector.unregister(client.connection)
            client.connection.close()


def _asked(line: bytes) -> int | None:
    """Return the volume that a line asks for; None if it is no request."""
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(asked, dict):
        asked = asked.get("index")
    return asked if isinstance(asked, int) and not isinstance(asked, bool) else None

"""WebSocket: a text frame a volume for browser tasks, and the thermometer's page.

``ws://127.0.0.1:8765`` sends each message's JSON; a browser that opens http://127.0.0.1:8765 gets
the page of `rtfmri/feedback/page`. A client that comes late gets the newest message at once; one
that does not keep up loses what is older than the newest `WAITING`. Clients are not to send
anything.

Any web page a user has open may try to connect to 127.0.0.1, so a browser's Origin must be the
page served here, or named by ``?origin=https://task.example.org``; and the Host that it asked for
must be an address or localhost, since a name could have been bent to us (DNS rebinding).
"""

import asyncio
import logging
import re
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from rtfmri.errors import ConfigError
from rtfmri.feedback.message import Message, Run
from rtfmri.readers.network import Address, Allowed, listen, parse_address

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

_log = logging.getLogger(__name__)

PORT = 8765
MAX_CLIENTS = 32
WAITING = 16
"""Messages that wait for a client; then the oldest is dropped for the newest."""
_HANDSHAKE_S = 5.0
_FAREWELL_S = 0.5
_MAX_BYTES = 1024
_PAGE = Path(__file__).parents[1] / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/thermometer.css": ("thermometer.css", "text/css; charset=utf-8"),
    "/thermometer.js": ("thermometer.js", "text/javascript; charset=utf-8"),
}


def open_websocket(
    target: str, allow: Allowed | None = None, origin: tuple[str, ...] = ()
) -> "WebSocketOutput":
    """Open ``ws://HOST:PORT``.

    Raises
    ------
    ConfigError
        If websockets is not installed.
    SourceError
        If the address is malformed, is not of this machine alone and nobody is allowed by name,
        or one cannot listen there.
    """
    try:
        import_module("websockets.asyncio.server")
    except ImportError as error:
        raise ConfigError(
            "ws: needs the package websockets, version 14 or newer: pip install 'rtfmri[web]'"
        ) from error
    allow = allow or Allowed()
    return WebSocketOutput(parse_address(target, PORT, allow), allow, origin)


@dataclass(eq=False, slots=True)
class _Client:
    waiting: deque[str]
    some: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, text: str) -> None:
        self.waiting.append(text)
        self.some.set()


class WebSocketOutput:
    """Serves all clients in one thread; `send` never waits for them.

    Attributes
    ----------
    address : Address
        With the port that the operating system chose, if any could be.
    n_refused : int
        Connections that were not taken, or ended because the client did not behave.
    """

    def __init__(self, address: Address, allow: Allowed, origins: tuple[str, ...]) -> None:
        self._listener = listen(address)
        self.address = Address(address.host, self._listener.getsockname()[1])
        self.n_refused = 0
        self._allow, self._origins = allow, origins
        self._open: set[ServerConnection] = set()
        self._clients: set[_Client] = set()
        self._new: deque[str | None] = deque(maxlen=WAITING)
        self._newest: str | None = None
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="rtfmri-ws", daemon=True)
        self._thread.start()

    def begin(self, run: Run) -> None:
        """See `Output.begin`: who comes from now on gets nothing of the run before."""
        self._put(None)

    def send(self, message: Message) -> None:
        """See `Output.send`."""
        self._put(message.json.decode())

    def end(self) -> None:
        """See `Output.end`."""

    def close(self) -> None:
        """See `Output.close`: clients get what waits for them, if they take it at once."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _put(self, text: str | None) -> None:
        self._new.append(text)
        self._loop.call_soon_threadsafe(self._spread)

    def _spread(self) -> None:
        """Bring what is new to all clients; None is a new run."""
        while self._new:
            text = self._new.popleft()
            self._newest = text
            if text is not None:
                for client in self._clients:
                    client.put(text)

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        from websockets.asyncio.server import ServerConnection, serve

        output = self

        class Guarded(ServerConnection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                if not output._admit(self):
                    self.transport.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                output._open.discard(self)

        silent = logging.getLogger(f"{__name__}.clients")
        silent.setLevel(logging.CRITICAL)  # what they do wrong is counted
        async with serve(
            self._attend,
            sock=self._listener,
            create_connection=Guarded,
            process_request=self._judge,
            compression=None,
            open_timeout=_HANDSHAKE_S,
            close_timeout=_FAREWELL_S,
            max_size=_MAX_BYTES,
            logger=silent,
        ) as server:
            await self._closing.wait()
            until_s = time.monotonic() + _FAREWELL_S
            while any(client.waiting for client in self._clients) and time.monotonic() < until_s:
                await asyncio.sleep(0.01)
            server.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(server.wait_closed()), _FAREWELL_S)
            for connection in self._open:
                connection.transport.abort()

    def _admit(self, connection: "ServerConnection") -> bool:
        host = connection.remote_address[0]
        if len(self._open) >= MAX_CLIENTS or not self._allow.admits(host):
            self._refuse()
            return False
        self._open.add(connection)
        return True

    def _refuse(self) -> None:
        if not self.n_refused:
            _log.warning("ws output: refused a connection, or ended one that did not behave")
        self.n_refused += 1

    def _judge(self, connection: "ServerConnection", request: "Request") -> "Response | None":
        """Return None for a WebSocket that may be opened, else the answer of an HTTP server."""
        host, origins = request.headers.get_all("Host"), request.headers.get_all("Origin")
        if len(host) != 1 or not self._is_here(host[0]):
            self._refuse()
            return _answer(403, "Forbidden", b"ask for this machine's address, or localhost\n")
        if "upgrade" in request.headers:
            if all(one in (f"http://{host[0]}", *self._origins) for one in origins):
                return None
            self._refuse()
            return _answer(403, "Forbidden", b"this page may not listen; see ?origin=\n")
        name, kind = _FILES.get(request.path.partition("?")[0], ("", ""))
        if not name:
            return _answer(404, "Not Found", b"there is a page at / alone\n")
        return _answer(200, "OK", (_PAGE / name).read_bytes(), kind, host[0])

    def _is_here(self, host: str) -> bool:
        """Tell whether a Host header's name is an address, localhost, or the host we listen on."""
        parts = re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?", host)
        if parts is None:
            return False
        name = parts[1].strip("[]").lower()
        with suppress(ValueError):
            return bool(ip_address(name))
        return name in ("localhost", self.address.host.lower())

    async def _attend(self, connection: "ServerConnection") -> None:
        from websockets.exceptions import ConnectionClosed

        client = _Client(deque(maxlen=WAITING))
        if self._newest is not None:
            client.put(self._newest)
        self._clients.add(client)
        feeding = asyncio.create_task(_feed(connection, client))
        try:
            await connection.recv()  # nobody has anything to say
            await connection.close(1008, "clients only listen")
        except ConnectionClosed:
            pass
        finally:
            self._clients.discard(client)
            feeding.cancel()
            with suppress(asyncio.CancelledError, ConnectionClosed):
                await feeding


async def _feed(connection: "ServerConnection", client: _Client) -> None:
    while True:
        await client.some.wait()
        client.some.clear()
        while client.waiting:
            await connection.send(client.waiting.popleft())


def _answer(
    status: int,
    reason: str,
    body: bytes,
    kind: str = "text/plain; charset=utf-8",
    host: str = "",
) -> "Response":
    from websockets.datastructures import Headers
    from websockets.http11 import Response

    own = "script-src 'self'; style-src 'self'; connect-src 'self' ws://" + host
    policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"
    headers = {
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Connection": "close",
    }
    return Response(status, reason, Headers(headers), body)

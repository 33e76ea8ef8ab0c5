"""What the stimulus program says while a run goes on: triggers, and blocks as they begin.

Where it is listened to is a URI::

    tcp://127.0.0.1:5560        TCP, a message a line
    zmq://127.0.0.1:5561        ZeroMQ PULL, one each
    lsl:NAME                    markers of a Lab Streaming Layer stream with this name or type

A message is the word ``trigger``, or JSON: ``{"trigger": true}`` when the scanner's trigger came
(a TTL pulse, or a key press of the box that translates it), or a block, ``{"trial_type": "up",
"duration": 20.0}``, with ``"onset"`` in seconds on the run's clock unless it begins now. Whatever
else comes is counted, said once, and ignored.

Each message gets the time of its arrival from the thread that listens, so nothing waits for a
volume; a marker gets the time of its own stamp, corrected by LSL.
"""

import json
import logging
import math
import re
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

from rtfmri.errors import ConfigError, RtfmriError, SourceError
from rtfmri.feedback.outputs import SCHEMES as OUTPUTS
from rtfmri.feedback.outputs.lsl import import_lsl
from rtfmri.readers import Option, parse_query
from rtfmri.readers.network import Address, Allowed, listen, parse_address, parse_allowed
from rtfmri.readers.zeromq import answer_the_door, bind, import_zmq, open_door

_log = logging.getLogger(__name__)

TCP_PORT = 5560
ZMQ_PORT = 5561
MAX_MESSAGE_BYTES = 1 << 16
MAX_WAITING = 2048
"""Messages that wait for a volume; then the oldest is dropped for the newest."""
MAX_CLIENTS = 8
MAX_PER_SECOND = 4096
"""Messages; whoever says more would keep the pipeline from its work."""
_MAX_STRANGE = 100
"""Messages of one client that make no sense, before it is closed."""
_MAX_S = 1e6
_MAX_NAME = 256
_LOOK_S = 0.1
_CONNECT_S = 5.0
_MAX_AGE_S = 60.0
"""A marker that says it is older, or of the future, is not stamped by LSL's clock."""
TOO_MANY = "comes with too many others"
_BROWSER = re.compile(rb"[A-Z]+ \S+ HTTP/")


class Trigger(NamedTuple):
    """The scanner's trigger."""

    came_s: float
    """On `time.perf_counter`."""


class Block(NamedTuple):
    """A block that is announced."""

    came_s: float
    trial_type: str
    duration_s: float
    onset_s: float | None = None
    """On the run's clock; None is when it came."""


Said = Trigger | Block


@dataclass(slots=True)
class Counts:
    """What became of all messages."""

    heard: int = 0
    malformed: int = 0
    dropped: int = 0
    """Of those that were heard, too many to wait for a volume."""


def parse(message: bytes, came_s: float) -> Said:
    """Read one message.

    Raises
    ------
    ValueError
        In words without the message's text.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise ValueError("is longer than 64 kB")
    text = message.strip()
    if text == b"trigger":
        return Trigger(came_s)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is neither JSON nor the word trigger") from None
    if not isinstance(fields, dict):
        raise ValueError("is JSON, but no object")  # noqa: TRY004 (of the message, not of a call)
    if fields.get("trigger") is True:
        return Trigger(came_s)
    trial_type = fields.get("trial_type")
    if not (isinstance(trial_type, str) and 0 < len(trial_type) <= _MAX_NAME):
        raise ValueError("has neither a trigger nor a trial_type")
    duration_s = _seconds(fields, "duration")
    if duration_s < 0:
        raise ValueError("has a duration below 0")
    onset_s = None if fields.get("onset") is None else _seconds(fields, "onset")
    return Block(came_s, trial_type, duration_s, onset_s)


def _seconds(fields: Mapping[str, Any], key: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_S:
        raise ValueError(f"has no {key} in seconds")
    return float(value)


class Stimulus:
    """A link to the stimulus program; one may serve several runs, one after the other.

    Attributes
    ----------
    address : Address or None
        Where it listens, with the port that the operating system chose, if any could be; None
        for LSL.
    counts : Counts
    lsl_minus_perf_s : float
        What LSL's clock says more than `time.perf_counter`, in seconds; nan without LSL.
    """

    address: Address | None = None
    lsl_minus_perf_s = math.nan

    def __init__(self) -> None:
        self.counts = Counts()
        self._said: deque[Said] = deque(maxlen=MAX_WAITING)
        self._closed = threading.Event()

    def said(self) -> list[Said]:
        """Return what came since the last call, in its order; never waits."""
        return [self._said.popleft() for _ in range(len(self._said))]

    def close(self) -> None:
        """Stop listening; may be called twice."""

    def _hear(self, message: bytes, came_s: float) -> bool:
        """Take a message; tell whether it made sense."""
        try:
            said = parse(message, came_s)
        except ValueError as error:
            self._ignore(str(error))
            return False
        if len(self._said) == MAX_WAITING:
            if not self.counts.dropped:
                _log.warning("the stimulus program says more than can wait for a volume")
            self.counts.dropped += 1
        self._said.append(said)
        self.counts.heard += 1
        return True

    def _rest(self) -> None:
        """Leave those who say too much waiting for a second."""
        self._ignore(TOO_MANY)
        self._closed.wait(1.0)

    def _ignore(self, reason: str) -> None:
        level = logging.DEBUG if self.counts.malformed else logging.WARNING
        self.counts.malformed += 1
        _log.log(level, "ignored a message of the stimulus program: it %s", reason)


class _Rate:
    """Counts messages, second by second."""

    def __init__(self) -> None:
        self._since_s, self._n = 0.0, 0

    def allows(self, n: int, now_s: float) -> bool:
        """Count *n* more; tell whether those of this second are not too many."""
        if now_s - self._since_s > 1:
            self._since_s, self._n = now_s, 0
        self._n += n
        return self._n <= MAX_PER_SECOND


class _Client:
    """A connection of a stimulus program."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rest = b""
        self.rate = _Rate()
        self.n_strange = 0
        self.spoke_s = 0.0
        """When it last said something that made sense."""


class TcpStimulus(Stimulus):
    """Listens on TCP, with one thread for all.

    Whoever has been silent for longest, or never made sense, makes room for the next. Who says
    too much is closed, and a browser is at once: any page it shows could speak here.

    Parameters
    ----------
    address : Address
    allow : Allowed
        Who may connect.

    Raises
    ------
    SourceError
        If one cannot listen there.
    """

    def __init__(self, address: Address, allow: Allowed) -> None:
        super().__init__()
        self._allow = allow
        self._refused = False
        self._listener = listen(address)
        self._listener.setblocking(False)
        self.address = Address(address.host, self._listener.getsockname()[1])
        self._clients: list[_Client] = []
        self._selector = selectors.DefaultSelector()
        self._bell, self._bell_rings = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._bell_rings, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._work, name="rtfmri-stimulus", daemon=True)
        self._thread.start()
        _log.info("listening to the stimulus program on %s:%d", address.host, self.address.port)

    def close(self) -> None:
        """See `Stimulus.close`."""
        self._bell.close()
        self._thread.join(timeout=2)

    def _work(self) -> None:
        with self._selector, self._listener, self._bell_rings:
            while True:
                for key, _ in self._selector.select():
                    came_s = time.perf_counter()
                    if key.fileobj is self._bell_rings:
                        for client in self._clients:
                            client.connection.close()
                        return
                    if key.fileobj is self._listener:
                        self._admit()
                    elif key.data in self._clients:  # none that has just made room
                        self._read(key.data, came_s)

    def _admit(self) -> None:
        try:
            connection, (host, *_) = self._listener.accept()
        except OSError:
            time.sleep(0.05)  # too many files are open
            return
        if not self._allow.admits(host):
            connection.close()
            if not self._refused:
                _log.warning("refused a connection from %s, which allow does not name", host)
            self._refused = True
            return
        if len(self._clients) == MAX_CLIENTS:
            self._leave(min(self._clients, key=lambda client: client.spoke_s))
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _read(self, client: _Client, came_s: float) -> None:
        try:
            data = client.connection.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        # The last line needs no end if the connection has one.
        *lines, client.rest = (client.rest + (data or b"\n")).split(b"\n")
        if not client.rate.allows(len(lines), came_s):
            self._ignore(TOO_MANY)
            self._leave(client)
            return
        for line in filter(bytes.strip, lines):
            if _BROWSER.match(line):
                self._ignore("is a browser's")
                self._leave(client)
                return
            if self._hear(line, came_s):
                client.spoke_s = came_s
            else:
                client.n_strange += 1
        if len(client.rest) > MAX_MESSAGE_BYTES:
            self._hear(client.rest, came_s)
            data = b""
        if not data or client.n_strange > _MAX_STRANGE:
            self._leave(client)

    def _leave(self, client: _Client) -> None:
        self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.connection.close()


class ZmqStimulus(Stimulus):
    """Takes ZeroMQ messages (PUSH to PULL); who may connect is asked at the door (ZAP, RFC 27).

    Parameters
    ----------
    address : Address
    allow : Allowed
        Who may connect.

    Raises
    ------
    SourceError
        If pyzmq is not installed, or one cannot listen there.
    """

    def __init__(self, address: Address, allow: Allowed) -> None:
        super().__init__()
        self._zmq, self._allow = import_zmq(), allow
        self._context = self._zmq.Context()
        self._door = open_door(self._context)
        try:
            self._socket, self.address = self._bind(address)
        except SourceError:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._work, name="rtfmri-stimulus", daemon=True)
        self._thread.start()
        _log.info("listening to the stimulus program on %s:%d", address.host, self.address.port)

    def close(self) -> None:
        """See `Stimulus.close`."""
        self._closed.set()
        self._thread.join(timeout=2)

    def _bind(self, address: Address) -> tuple[Any, Address]:
        zmq = self._zmq
        bound = self._context.socket(zmq.PULL)
        bound.setsockopt(zmq.ZAP_DOMAIN, b"rtfmri")  # without one, nobody asks at the door
        bound.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        bound.setsockopt(zmq.RCVHWM, MAX_WAITING)
        bound.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        bound.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        return bound, bind(bound, address)

    def _work(self) -> None:
        poller, rate = self._zmq.Poller(), _Rate()
        poller.register(self._door, self._zmq.POLLIN)
        poller.register(self._socket, self._zmq.POLLIN)
        while not self._closed.is_set():
            ready = dict(poller.poll(1e3 * _LOOK_S))
            came_s = time.perf_counter()
            if self._door in ready:
                answer_the_door(self._door, self._allow)
            if self._socket in ready:
                message, *more = self._socket.recv_multipart()
                if not rate.allows(1, came_s):
                    self._rest()
                elif more:
                    self._ignore("has more than one frame")
                else:
                    self._hear(message, came_s)
        self._context.destroy(linger=0)


class LslStimulus(Stimulus):
    """Takes the markers of an LSL stream of text, as soon as there is one, and when it is back.

    Parameters
    ----------
    name : str
        The stream's name, or its type.
    network : bool, optional
        Whether streams of other machines are looked for; by default as this process's LSL is
        loaded already, or else not.

    Raises
    ------
    ConfigError
        If pylsl is not installed, or is loaded otherwise already.
    """

    def __init__(self, name: str, network: bool | None = None) -> None:
        super().__init__()
        self._lsl = import_lsl(network)
        self._query = f"(name='{name}' or type='{name}') and channel_format='string'"
        self._name = name
        self.lsl_minus_perf_s = self._lsl.local_clock() - time.perf_counter()
        self._thread = threading.Thread(target=self._work, name="rtfmri-stimulus", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """See `Stimulus.close`."""
        self._closed.set()
        self._thread.join(timeout=_CONNECT_S + 1)

    def _work(self) -> None:
        _log.info("waiting for LSL's stream %s", self._name)
        while not self._closed.is_set():
            with suppress(RuntimeError):  # what pylsl raises: nobody answers, or it is lost
                if (inlet := self._find()) is not None:
                    self._follow(inlet)

    def _find(self) -> Any:
        """Return the stream as soon as there is one; None if this is closed before."""
        # Not pylsl.resolve_bypred: without multicast it takes 5 s more than it is given.
        resolver = self._lsl.ContinuousResolver(pred=self._query)
        while not self._closed.wait(_LOOK_S):
            for stream in resolver.results():
                # What is lost is looked for anew: LSL finds only streams that have a source_id.
                return self._lsl.StreamInlet(stream, max_buflen=MAX_WAITING // 100, recover=False)
        return None

    def _follow(self, inlet: Any) -> None:
        """Take a stream's markers until it is lost."""
        inlet.open_stream(timeout=_CONNECT_S)
        with suppress(RuntimeError):  # where a firewall keeps the clocks apart, arrival counts
            inlet.time_correction(timeout=_CONNECT_S)
        _log.info("listening to the stimulus program: LSL's stream %s", self._name)
        rate = _Rate()
        while not self._closed.is_set():
            try:
                sample, stamp_s = inlet.pull_sample(timeout=_LOOK_S)
            except UnicodeDecodeError:
                self._ignore("is no text")
                continue
            if sample and not rate.allows(1, time.perf_counter()):
                self._rest()
            elif sample:
                self._hear(sample[0].encode(errors="replace"), self._came_s(inlet, stamp_s))

    def _came_s(self, inlet: Any, stamp_s: float) -> float:
        """Return a marker's time on `time.perf_counter`."""
        now_s, age_s = time.perf_counter(), float(self._lsl.local_clock() - stamp_s)
        with suppress(RuntimeError):
            age_s -= float(inlet.time_correction(timeout=0.0))
            if 0 <= age_s < _MAX_AGE_S:
                return now_s - age_s
        return now_s


class _Scheme(NamedTuple):
    open: Callable[..., Stimulus]
    options: Mapping[str, Option]


def open_stimulus(uri: str) -> Stimulus:
    """Listen to a stimulus program.

    Parameters
    ----------
    uri : str
        See the top of this module; beyond this machine with ``?allow=192.0.2.7``, or, for LSL,
        ``?network=1``.

    Raises
    ------
    ConfigError
        If there is no such scheme, its query is not understood, an address is malformed or in
        use, or a package is missing.
    """
    parts = re.match(r"([A-Za-z]+):", uri)
    scheme = _SCHEMES.get(parts[1]) if parts else None
    if not (parts and scheme):
        known = ", ".join(f"{name}:" for name in _SCHEMES)
        raise ConfigError(f"a stimulus program is heard by one of {known}; got {uri!r}")
    target, _, query = uri[parts.end() :].partition("?")
    try:
        return scheme.open(unquote(target), **parse_query(query, scheme.options, uri))
    except RtfmriError as error:
        raise ConfigError(f"stimulus {uri}: {error}") from error


def _open_tcp(target: str, allow: Allowed | None = None) -> TcpStimulus:
    return TcpStimulus(parse_address(target, TCP_PORT, allow), allow or Allowed())


def _open_zmq(target: str, allow: Allowed | None = None) -> ZmqStimulus:
    return ZmqStimulus(parse_address(target, ZMQ_PORT, allow), allow or Allowed())


def _open_lsl(target: str, network: bool | None = None) -> LslStimulus:
    if not re.fullmatch(r"[\w .:+-]{1,64}", target):
        raise ConfigError(
            "lsl: needs the name or type of a stream, of letters, digits and - _ . : +, such as "
            f"lsl:PsychoPy or lsl:Markers; got {target!r}"
        )
    return LslStimulus(target, network)


_SCHEMES = {
    "tcp": _Scheme(_open_tcp, {"allow": parse_allowed}),
    "zmq": _Scheme(_open_zmq, {"allow": parse_allowed}),
    "lsl": _Scheme(_open_lsl, OUTPUTS["lsl"].options),
}

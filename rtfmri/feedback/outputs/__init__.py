"""Where feedback goes: the Output protocol, the grammar that names outputs, and their delivery.

An output is a URI::

    zmq://127.0.0.1:5556                      ZeroMQ PUB, topic rtfmri, one JSON a volume
    tcp://127.0.0.1:5557                      JSON lines; answers requests by volume number
    lsl:                                      Lab Streaming Layer
    udp://127.0.0.1:1234                      one big-endian float32 a volume
    afni://127.0.0.1:53214                    what AFNI sends to its receivers (afniRTI)
    ws://127.0.0.1:8765                       WebSocket for browsers, with the thermometer's page
    file:feedback.jsonl                       JSON lines

A new transport is one module and one entry in `SCHEMES`; one of somebody else's is an entry point
of the group ``rtfmri.outputs``, named like its scheme, that is a `Scheme`.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol, Self
from urllib.parse import unquote

from rtfmri.errors import ConfigError, RtfmriError
from rtfmri.feedback.message import Message, Run
from rtfmri.readers import Option, find_scheme, parse_query
from rtfmri.readers.network import parse_allowed

_log = logging.getLogger(__name__)

WAITING = 16
"""Messages that wait for an output that blocks; then the oldest is dropped for the newest."""
_FAREWELL_S = 2.0
"""How long an output may take to send what waits, and to close, when all is over."""


class Output(Protocol):
    """A way out of the machine.

    It is opened before anything else, so that what is wrong with it is said at once. Everything
    below is called from one thread of its own, so it may block, and may raise: that is counted,
    said once, and the next message is tried again.
    """

    def begin(self, run: Run) -> None:
        """Take note that a run begins."""
        ...

    def send(self, message: Message) -> None:
        """Send one volume's message."""
        ...

    def end(self) -> None:
        """Take note that the run is over."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Scheme(NamedTuple):
    """What stands behind ``scheme:target?key=value``."""

    open: Callable[..., Output]
    """Called as ``open(target, **options)``."""
    options: Mapping[str, Option]


def open_output(uri: str) -> Output:
    """Open an output.

    Raises
    ------
    ConfigError
        If there is no such scheme, its query is not understood, an address is malformed or in
        use, or a package is missing.
    """
    parts = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", uri)
    scheme = find_scheme(parts[1], SCHEMES, "rtfmri.outputs") if parts else None
    if not (parts and scheme):
        known = ", ".join(f"{name}:" for name in sorted(SCHEMES))
        raise ConfigError(f"an output must begin with one of {known}; got {uri!r}")
    target, _, query = uri[parts.end() :].partition("?")
    try:
        options = parse_query(query, scheme.options, uri)
        return scheme.open(unquote(target), **options)
    except RtfmriError as error:
        raise ConfigError(f"output {uri}: {error}") from error


@dataclass(slots=True)
class Counts:
    """What became of an output's messages."""

    sent: int = 0
    dropped: int = 0
    """Taken back for newer ones, since the output blocked."""
    failed: int = 0
    """Not sent, since the output raised an error."""


class Outputs:
    """Delivers messages to any number of outputs; none of them delays another, or the caller.

    Parameters
    ----------
    uris : iterable of str

    Raises
    ------
    ConfigError
        As `open_output`; those that were opened before are closed.
    """

    def __init__(self, uris: Iterable[str] = ()) -> None:
        self._lanes: dict[str, _Lane] = {}
        uris = tuple(uris)
        for uri in uris:
            if uris.count(uri) > 1:
                raise ConfigError(f"an output must be given once, got {uri} twice")
        try:
            for uri in uris:
                self._lanes[uri] = _Lane(uri, open_output(uri))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._lanes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, run: Run) -> None:
        """Tell all that a run begins."""
        for lane in self._lanes.values():
            lane.put(lambda output: output.begin(run))

    def send(self, message: Message) -> None:
        """Hand a message to all; takes some microseconds."""
        for lane in self._lanes.values():
            lane.put_message(message)

    def end(self) -> None:
        """Tell all that the run is over."""
        for lane in self._lanes.values():
            lane.put(lambda output: output.end())

    def settle(self) -> None:
        """Wait until all that do not block have sent what waits."""
        until_s = time.monotonic() + _FAREWELL_S
        for lane in self._lanes.values():
            lane.settle(until_s - time.monotonic())

    def addresses(self) -> dict[str, str]:
        """Return where those outputs listen that do, by output: "127.0.0.1:5556"."""
        return {uri: lane.address for uri, lane in self._lanes.items() if lane.address}

    def counts(self) -> dict[str, Counts]:
        """Return what became of the messages so far, by output."""
        return {uri: lane.counts for uri, lane in self._lanes.items()}

    def close(self) -> None:
        """Send what waits and close all, as far as they do not block."""
        for lane in self._lanes.values():
            lane.stop()
        for lane in self._lanes.values():
            lane.join()


class _Lane:
    """One output's queue and thread."""

    def __init__(self, uri: str, output: Output) -> None:
        self.counts = Counts()
        self._uri, self._output = uri, output
        address = getattr(output, "address", None)
        self.address = f"{address.host}:{address.port}" if address else ""
        self._jobs: deque[Message | Callable[[Output], None] | None] = deque()
        self._n_messages = 0
        self._some = threading.Condition()
        self._failing = self._busy = False
        self._thread = threading.Thread(target=self._work, name=f"rtfmri {uri}", daemon=True)
        self._thread.start()

    def put_message(self, message: Message) -> None:
        with self._some:
            if self._n_messages >= WAITING:
                self._drop_oldest()
            self._n_messages += 1
            self._jobs.append(message)
            self._some.notify_all()

    def put(self, job: Callable[[Output], None] | None) -> None:
        with self._some:
            self._jobs.append(job)
            self._some.notify_all()

    def settle(self, timeout_s: float) -> None:
        with self._some:
            self._some.wait_for(lambda: not (self._jobs or self._busy), timeout_s)

    def stop(self) -> None:
        self.put(None)

    def join(self) -> None:
        self._thread.join(_FAREWELL_S)
        if self._thread.is_alive():
            _log.warning("output %s: it blocks, and is left behind", self._uri)

    def _drop_oldest(self) -> None:
        oldest = next(job for job in self._jobs if isinstance(job, Message))
        self._jobs.remove(oldest)
        self._n_messages -= 1
        self.counts.dropped += 1

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                if isinstance(job, Message):
                    self._output.send(job)
                    self.counts.sent += 1
                else:
                    job(self._output)
                self._failing = False
            except Exception as error:  # an output may be somebody else's, and raise anything
                self.counts.failed += isinstance(job, Message)
                level = logging.DEBUG if self._failing else logging.WARNING
                _log.log(level, "output %s: %s", self._uri, error)
                self._failing = True
        try:
            self._output.close()
        except Exception as error:
            _log.warning("output %s: %s", self._uri, error)

    def _next(self) -> Message | Callable[[Output], None] | None:
        with self._some:
            self._busy = False
            self._some.notify_all()
            self._some.wait_for(lambda: self._jobs)
            self._busy = True
            job = self._jobs.popleft()
            self._n_messages -= isinstance(job, Message)
            return job


def _opener(module: str, name: str) -> Callable[..., Output]:
    """Return an opener that imports its module when it is needed."""

    def open_it(target: str, **options: Any) -> Output:
        opener = getattr(import_module(f"rtfmri.feedback.outputs.{module}"), name)
        output: Output = opener(target, **options)
        return output

    return open_it


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(text.split(","))
    if not all(re.fullmatch(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?", one) for one in origins):
        raise ValueError("origins of web pages, such as https://task.example.org")
    return origins


SCHEMES: dict[str, Scheme] = {
    "zmq": Scheme(_opener("zeromq", "open_zmq"), {}),
    "tcp": Scheme(_opener("tcp", "open_tcp"), {"allow": parse_allowed}),
    "lsl": Scheme(_opener("lsl", "open_lsl"), {"network": _switch}),
    "udp": Scheme(_opener("udp", "open_udp"), {}),
    "afni": Scheme(_opener("afni", "open_afni"), {}),
    "ws": Scheme(
        _opener("websocket", "open_websocket"), {"allow": parse_allowed, "origin": _origins}
    ),
    "file": Scheme(_opener("file", "open_file"), {}),
}
"""The URIs there are: scheme to opener and query keys."""

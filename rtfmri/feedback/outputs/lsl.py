"""Lab Streaming Layer: a stream of numbers and a stream of markers.

- ``rtfmri``, of type Feedback: float64 channels ``feedback`` and every signal, a sample a volume
  at an irregular rate; nan is no value.
- ``rtfmri-events``, of type Markers: text, one JSON a volume, which has everything.

Samples bear the time at which they were sent, on LSL's clock. The markers' stream is there as soon
as the output is open, so that programs may connect before the run begins; the other one is there
when the run has begun, and the signals are known. What is sent in the first `PATIENCE_S` of a run
waits that long for somebody to listen.

LSL is made to be found: a stream announces itself by multicast, and is open to everybody who can
reach the machine. Here all that stays on this machine, unless ``lsl:?network=1`` asks for it:

- LSL's settings, which it reads once in a process, name no multicast address. A stream is then
  found by nobody; `_Guide` takes what other programs of this machine ask at 127.0.0.1 to all
  streams there.
- Its sockets are bound to the loopback interface, where the system has that (Linux).
"""

import logging
import math
import os
import platform
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from rtfmri.errors import ConfigError
from rtfmri.feedback.message import Message, Run
from rtfmri.readers.network import LOOPBACK

_log = logging.getLogger(__name__)

PATIENCE_S = 2.0
_MAX_WAITING = 1000
_MAX_BUFFERED = 36
"""In hundreds of samples, as LSL counts where there is no rate: kept for each client."""
_LAST_S, _LOOK_S = 0.1, 0.1
_MAX_BYTES = 4096
_VARIABLE = "LSLAPICFG"
_PORTS = range(16572, 16572 + 32)
"""At which LSL's streams answer, and programs wait for the answer."""
_ASK_PORT = 16571
_SETTINGS = f"""\
[log]
level = -1
[ports]
IPv6 = disable
BasePort = {_PORTS.start}
PortRange = {len(_PORTS)}
[multicast]
ResolveScope = machine
AddressesOverride = {{::1}}
TTLOverride = 0
[lab]
KnownPeers = {{{LOOPBACK}}}
"""
"""Without IPv6, no address is left at which to be asked; we ask every port of this machine."""
_loading = threading.Lock()
_confined: bool | None = None
"""Whether this process's LSL stays on this machine; None until it is loaded."""


def open_lsl(target: str, network: bool = False) -> "LslOutput":
    """Open ``lsl:``, or ``lsl:?network=1`` for other machines, too.

    Raises
    ------
    ConfigError
        If something follows the colon, LSL is not installed, or this process has loaded it for
        this machine alone, or for others, before.
    """
    if target:
        raise ConfigError(f"nothing follows lsl: but ?network=1, got {target!r}")
    return LslOutput(import_lsl(network), confined=not network)


def import_lsl(network: bool | None = None) -> ModuleType:
    """Return pylsl.

    Parameters
    ----------
    network : bool, optional
        Whether other machines are to be seen, and to see us; by default as this process's LSL is
        loaded already, or else not. With True, LSL's own settings hold (lsl_api.cfg).

    Raises
    ------
    ConfigError
        If LSL is not installed, or is loaded otherwise already: it reads its settings once.
    """
    global _confined
    with _loading:
        if _confined is None:
            lsl = _load() if network else _load_confined()
            _confined = not network
            return lsl
        if network is not None and network is _confined:
            raise ConfigError(
                "network must be the same for all that use LSL in a process; it has been loaded "
                f"with {int(not _confined)}"
            )
        return _load()


def _load() -> ModuleType:
    try:
        lsl = import_module("pylsl")
        lsl.StreamInfo(source_id="rtfmri")  # for this it reads its settings
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            "LSL needs the packages pylsl and liblsl: pip install 'rtfmri[lsl]', and, if that "
            f"brings no liblsl for this system, conda install -c conda-forge liblsl ({error})"
        ) from error
    return lsl


def _load_confined() -> ModuleType:
    given = os.environ.get(_VARIABLE)
    with TemporaryDirectory() as folder:
        file = Path(folder, "lsl_api.cfg")
        file.write_text(_SETTINGS)
        os.environ[_VARIABLE] = str(file)
        try:
            return _load()
        finally:
            del os.environ[_VARIABLE]
            if given is not None:
                os.environ[_VARIABLE] = given


class LslOutput:
    """Two outlets; neither waits for anybody."""

    def __init__(self, lsl: ModuleType, *, confined: bool) -> None:
        self._lsl, self._confined = lsl, confined
        self._guide = _Guide() if confined else None
        try:
            self._events = self._open("rtfmri-events", "Markers", ("json",), "string")
        except BaseException:
            if self._guide:
                self._guide.close()
            raise
        self._values: _Stream | None = None
        self._names: tuple[str, ...] = ()

    def begin(self, run: Run) -> None:
        """See `Output.begin`."""
        names = ("feedback", *run.signals)
        if self._values is None or names != self._names:
            if self._values:
                self._values.close()
            self._values = self._open("rtfmri", "Feedback", names, "double64")
            self._names = names
        self._values.wait()
        self._events.wait()

    def send(self, message: Message) -> None:
        """See `Output.send`."""
        self._events.push([message.json.decode()])
        if self._values:
            signals = (message.signals.get(name, math.nan) for name in self._names[1:])
            self._values.push([message.feedback, *signals])

    def end(self) -> None:
        """See `Output.end`."""

    def close(self) -> None:
        """See `Output.close`."""
        time.sleep(_LAST_S)  # a closed outlet forgets what is still under way
        for stream in (self._events, self._values, self._guide):
            if stream:
                stream.close()

    def _open(self, name: str, kind: str, labels: Sequence[str], format: str) -> "_Stream":
        """Open a stream; a program that has lost it finds it again by its source_id."""
        source = f"{name}-{platform.node()}"
        info = self._lsl.StreamInfo(
            name, kind, len(labels), self._lsl.IRREGULAR_RATE, format, source
        )
        info.desc().append_child_value("manufacturer", "rtfmri")
        channels = info.desc().append_child("channels")
        for label in labels:
            channel = channels.append_child("channel")
            channel.append_child_value("label", label)
            channel.append_child_value("type", kind)
        return _Stream(self._lsl, info, self._confined)


class _Stream:
    """An outlet."""

    def __init__(self, lsl: ModuleType, info: Any, confined: bool) -> None:
        self._clock = lsl.local_clock
        self._outlet: Any = lsl.StreamOutlet(info, max_buffered=_MAX_BUFFERED)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[list[Any], float]] = deque(maxlen=_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._patient = False
        if confined:
            xml = self._outlet.get_info().as_xml()
            if "<v6data_port>0<" not in xml:
                self._outlet = None
                raise ConfigError(
                    "LSL was used in this process before, with settings of its own: open this "
                    "output first, or ask for lsl:?network=1"
                )
            _keep_on_loopback(set(map(int, re.findall(r"<v4(?:data|service)_port>(\d+)<", xml))))

    def wait(self) -> None:
        """Keep samples, until somebody listens or the patience is over."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="rtfmri-lsl", daemon=True)
            self._patient = True
            self._thread.start()

    def push(self, sample: list[Any]) -> None:
        with self._lock:
            if self._patient:
                self._waiting.append((sample, self._clock()))
            else:
                self._outlet.push_sample(sample)

    def close(self) -> None:
        self._closing.set()
        if self._thread:
            self._thread.join()
        self._outlet = None

    def _look(self) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not self._closing.is_set() and time.monotonic() < until_s:
            if self._outlet.wait_for_consumers(_LOOK_S):
                break
        with self._lock:
            self._patient = False
            while self._waiting:
                self._outlet.push_sample(*self._waiting.popleft())


class _Guide:
    """Takes questions of this machine's programs to all its streams.

    Of several sockets at 127.0.0.1:16571 only one would get a question, so LSL alone would show
    only one of our streams there. Answers need no help: the question says where they go.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.settimeout(_LOOK_S)
        try:
            self._socket.bind((LOOPBACK, _ASK_PORT))
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"LSL's port {LOOPBACK}:{_ASK_PORT} cannot be had ({error.strerror}): end the "
                "program that keeps it for itself"
            ) from error
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="rtfmri-lsl-guide", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close()

    def _work(self) -> None:
        while not self._closing:
            with suppress(OSError):  # mostly: nobody has asked
                question = self._socket.recv(_MAX_BYTES)
                if question.startswith(b"LSL:shortinfo"):
                    for port in _PORTS:
                        self._socket.sendto(question, (LOOPBACK, port))


def _keep_on_loopback(ports: set[int]) -> None:
    """Bind this process's sockets at these ports, which LSL has opened, to loopback."""
    n_bound = 0
    if hasattr(socket, "SO_BINDTODEVICE"):
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # it is closed by now, or the system does not want that
                if str(entry.readlink()).startswith("socket:"):
                    with socket.socket(fileno=os.dup(int(entry.name))) as found:
                        if found.family == socket.AF_INET and found.getsockname()[1] in ports:
                            found.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                            n_bound += 1
    if n_bound < len(ports):
        told = " and ".join(map(str, sorted(ports)))
        _log.warning("other machines can reach LSL's ports %s; let a firewall close them", told)

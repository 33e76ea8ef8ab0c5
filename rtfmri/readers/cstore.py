"""A DICOM node to which the scanner sends its images (C-STORE).

A process of its own listens, see `rtfmri.readers.listener`; here its objects are taken and
decoded. Each storage class that pynetdicom knows is accepted, and each object that was understood
is answered with success: what is no volume of the run is skipped here and is no concern of the
scanner's, which would send it again, or stop sending. Success is said when this process has the
object. When too many wait to be taken, they are refused as "out of resources" (0xA700).
"""

import logging
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple

from rtfmri.errors import RtfmriError, SourceError
from rtfmri.readers import CUT_SHORT, RunEnd, Skipped
from rtfmri.readers.dicom import Assembly
from rtfmri.readers.listener import (
    CUT,
    OBJECT,
    PEER,
    READY,
    REFUSED,
    Listener,
    Settings,
    tls_context,
)
from rtfmri.readers.live import DEFAULT_TIMEOUT_S, LiveReader
from rtfmri.readers.network import Address, Allowed, listen, parse_address
from rtfmri.volume import Volume

_log = logging.getLogger(__name__)

DEFAULT_PORT = 11112
"""Registered for DICOM (IANA); 104 needs privileges."""
RESTARTED = "the DICOM listener died and was started again"

_WAITING_BYTES = 256 << 20
"""Objects that may wait for somebody who iterates: a minute of any scanner."""
_PATIENCE_S = 10.0
"""A sender waits for as long while too much waits, then it is refused; its own patience is
usually 30 s or more."""
_START_S = 30.0
_PAUSE_S = 0.2
_OVERHEAD_BYTES = 1 << 10
"""What an item costs beside its data, roughly."""
_MAX_PEERS = 256
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,16}")
_TLS_FILES = {
    "certificate": "a certificate in PEM",
    "key": "the certificate's private key in PEM, without a passphrase",
    "authority": "an authority's certificates in PEM",
}
_REFUSALS = {
    "address": "its address is not among those of allow",
    "called": "it calls another AE title than {ae}",
    "caller": "its AE title is not among callers",
    "request": "it did not ask for a DICOM association",
    "tls": "it did not agree on TLS",
    "amount": "it sends more at once than can be held",
}


def open_cstore(
    target: str,
    tr_s: float | None,
    *,
    count: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    allow: Allowed | None = None,
    ae: str = "RTFMRI",
    callers: tuple[str, ...] = (),
    certificate: Path | None = None,
    key: Path | None = None,
    authority: Path | None = None,
    **assembly_options: Any,
) -> "CstoreReader":
    """Listen for a scanner that sends DICOM objects.

    Parameters
    ----------
    target : str
        Where to listen, such as ``//127.0.0.1:11112``; see `parse_address`.
    tr_s : float, optional
        Repetition time in seconds; the headers' by default.
    count, timeout_s
        When a run ends, see `LiveReader`.
    allow : Allowed, optional
        The addresses that may connect, beside this machine's own.
    ae : str
        Our AE title, which peers have to call.
    callers : tuple of str
        The AE titles that may call; all by default.
    certificate, key : Path, optional
        PEM files for TLS; the key may be in the certificate's file.
    authority : Path, optional
        PEM file; peers then need a certificate of this authority.
    **assembly_options
        As for `Assembly`.

    Raises
    ------
    SourceError
        If pynetdicom is not installed, the address is malformed or taken, or a file of TLS cannot
        be used.
    """
    address = parse_address(target, DEFAULT_PORT, allow)
    if find_spec("pynetdicom") is None:
        raise SourceError(
            "dicom: needs pynetdicom, which is not installed; pip install 'rtfmri[dicom]'"
        )
    _check_tls(certificate, key, authority)
    settings = Settings(
        ae=ae,
        callers=callers,
        allow=",".join(str(network) for network in allow.networks) if allow else "",
        certificate=_text(certificate),
        key=_text(key),
        authority=_text(authority),
    )
    assembly = Assembly(tr_s, **assembly_options)
    return CstoreReader(address, assembly, settings, count=count, timeout_s=timeout_s)


class CstoreReader(LiveReader):
    """Reader of what peers send to a DICOM listener.

    The listener is there from the beginning until `close`, also between two runs. When its
    process dies it is started again, and a `Skipped` tells so; peers lose their associations.

    Parameters
    ----------
    address : Address
        Where to listen.
    assembly : Assembly
        What makes volumes of objects.
    settings : Settings
        The listener's; its two sockets are filled in here.
    count, timeout_s
        See `LiveReader`.

    Attributes
    ----------
    address : Address
        Where it listens, with the port that was chosen if 0 was asked for.
    """

    def __init__(
        self,
        address: Address,
        assembly: Assembly,
        settings: Settings,
        *,
        count: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__(count=count, timeout_s=timeout_s)
        self.numbers_tell_runs = False  # the series' UID does
        self._inbox = _Inbox(assembly)
        self._items = self._inbox
        self._listening = listen(address)
        self.address = Address(address.host, self._listening.getsockname()[1])
        self._settings = settings
        self._listener: Listener | None = None
        self._n_objects = 0
        self._peers: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._answering = threading.Lock()
        self._ready = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="rtfmri-dicom", daemon=True)
        self._thread.start()
        self._ready.wait(_START_S)
        if self.listener_pid is None:
            self.close()
            raise SourceError("the DICOM listener could not be started")
        _log.info(
            "listening on %s:%d for DICOM, as %s%s",
            self.address.host,
            self.address.port,
            settings.ae,
            ", with TLS" if settings.certificate else "",
        )

    @property
    def listener_pid(self) -> int | None:
        """Process id of the listener, for those who watch it; None while there is none."""
        listener = self._listener
        return listener.pid if listener and self._ready.is_set() else None

    def close(self) -> None:
        """End the iteration and the listener, with whatever it is receiving."""
        super().close()
        self._stopped.set()
        with self._lock, self._answering:
            if self._listener:
                self._listener.hang_up()
        self._thread.join()
        self._listening.close()

    def __iter__(self) -> Iterator[Volume | Skipped | RunEnd]:
        """Give one run's items as they come."""
        self._inbox.next_run()
        return super().__iter__()

    def _keep(self) -> None:
        """Have a listener, and another one when it dies, unless it has never been ready."""
        while self._serve() and self._ready.is_set():
            _log.warning(RESTARTED)
            self.put(Skipped("listener", RESTARTED))
            self._stopped.wait(_PAUSE_S)
        self._ready.set()

    def _serve(self) -> bool:
        """Have a listener, and take what it gives; return whether it died."""
        with self._lock:
            if self._stopped.is_set():
                return False
            try:
                self._listener = listener = Listener(self._settings, self._listening)
            except OSError:
                return True
        with suppress(OSError):
            self._take_all(listener)
        with self._lock:
            self._listener = None
        listener.close()
        return not self._stopped.is_set()

    def _take_all(self, listener: Listener) -> None:
        while True:
            message = listener.receive()
            if message.kind == OBJECT:
                self._n_objects += 1
                item = _Object(f"object {self._n_objects}", message.data, message.arrived_s)
                with self._answering:  # who has sent the last volume is told so, too
                    listener.answer(self._offer(item))
            elif message.kind == CUT:
                self.put(Skipped("an object", CUT_SHORT))
            elif message.kind == READY:
                self._ready.set()
            elif message.kind == PEER:
                self._say_who(message.data)
            elif message.kind == REFUSED:
                self._say_why_not(message.data)

    def _offer(self, item: "_Object") -> bool:
        """Let an object wait for whoever iterates; return False if too much waits for too long."""
        until_s = time.monotonic() + _PATIENCE_S
        while not self._closed and time.monotonic() < until_s:
            with suppress(Full):
                self._inbox.put(item, timeout=0.1)
                return True
        _log.warning("an object was refused: nobody takes those that wait")
        return False

    def _say_who(self, words: bytes) -> None:
        """Log an association, loudly for the first one of a peer."""
        peer = _words(words)
        level = logging.DEBUG
        if peer not in self._peers and len(self._peers) < _MAX_PEERS:
            self._peers.add(peer)
            level = logging.INFO
        _log.log(level, "association from %s, implementation %s", peer[0], peer[1] or "unknown")

    def _say_why_not(self, words: bytes) -> None:
        host, key = _words(words)
        reason = _REFUSALS.get(key, "").format(ae=self._settings.ae)
        _log.warning("%s was refused: %s", host, reason)


class _Object(NamedTuple):
    """What a peer has sent."""

    name: str
    data: bytes
    arrived_s: float


class _Inbox(Queue[Any]):
    """Objects go in and volumes come out, decoded only where one iterates.

    So what arrives for the next run before this one is over is not judged by this one's rules.
    What may wait is limited in bytes.
    """

    def __init__(self, assembly: Assembly) -> None:
        super().__init__(_WAITING_BYTES)
        self._assembly = assembly
        self._n_bytes = 0
        self._decoded: deque[Any] = deque()
        self._used = False

    def next_run(self) -> None:
        """Let what comes out next belong to the next run; the first time, to the first."""
        if self._used:
            self._decoded.extend(self._assembly.next_run())
        self._used = True

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next item; see `Queue.get`."""
        until_s = None if timeout is None else time.monotonic() + timeout
        while not self._decoded:
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            item = super().get(block, left_s)
            self._decoded.extend(self._decode(item) if isinstance(item, _Object) else [item])
        return self._decoded.popleft()

    def _decode(self, item: _Object) -> list[Volume | Skipped | RunEnd]:
        try:
            return self._assembly.add(item.data, item.name, item.arrived_s)
        except RtfmriError as error:
            # Also one without a repetition time: it may be a localiser's, and the run yet to come.
            return [Skipped(item.name, str(error))]

    def _qsize(self) -> int:
        return self._n_bytes

    def _put(self, item: Any) -> None:
        super()._put(item)
        self._n_bytes += _cost_bytes(item)

    def _get(self) -> Any:
        item = super()._get()
        self._n_bytes -= _cost_bytes(item)
        return item


def _cost_bytes(item: Any) -> int:
    return _OVERHEAD_BYTES + (len(item.data) if isinstance(item, _Object) else 0)


def _words(words: bytes) -> tuple[str, str]:
    """Return the address and the word that the listener says; nothing else may get into a log."""
    host, _, word = words.decode("ascii", "replace").partition(" ")
    try:
        ip_address(host)
    except ValueError:
        host = "a peer"
    return host, word if _WORD.fullmatch(word) else ""


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _check_tls(certificate: Path | None, key: Path | None, authority: Path | None) -> None:
    """Raise a SourceError that names the option whose file cannot be used."""
    if certificate is None:
        for name, file in {"key": key, "authority": authority}.items():
            if file is not None:
                raise SourceError(f"{name} is of no use without certificate, got {file}")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    checks: list[tuple[str, Path, Callable[[], object]]] = [
        ("certificate", certificate, lambda: context.load_verify_locations(certificate)),
        ("key", key or certificate, lambda: tls_context(certificate, key, None)),
    ]
    if authority:
        checks.append(("authority", authority, lambda: context.load_verify_locations(authority)))
    for name, file, check in checks:
        try:
            check()
        except (OSError, ValueError):
            raise SourceError(f"{name} must be {_TLS_FILES[name]}, got {file}") from None

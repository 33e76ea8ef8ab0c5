"""What all streams share: runs told from their headers, and listeners that trust nobody at first.

A scanner that breaks off in the middle of a run may connect again and go on: only an end message,
the expected number of volumes, or a long silence ends a run. Every connection that is allowed may
send; volumes of another series than the run's first are skipped where the protocol tells series,
and whatever comes twice is for the session to judge.
"""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtfmri.errors import GridError, RtfmriError, SourceError, VolumeError
from rtfmri.readers import CUT_SHORT, OTHER_SERIES, RunEnd, Skipped
from rtfmri.readers.live import DEFAULT_TIMEOUT_S, LiveReader
from rtfmri.readers.network import Address, Allowed, listen
from rtfmri.readers.replay import checked_tr
from rtfmri.volume import Grid, Volume, as_slice_times, as_voxels

_log = logging.getLogger(__name__)

MAX_VOXELS = 1 << 24
"""Of one volume: 256 x 256 x 256."""
MAX_HEADER_BYTES = 1 << 20
MAX_INDEX = (1 << 31) - 1
INTRODUCTION_S = 5.0
"""For how long a connection may be open before its first valid header."""
_MAX_CONNECTIONS = 32
_MAX_STRANGERS_WAITING = 16
_CHUNK_BYTES = 1 << 16
_MAX_MM = 1e6
_MIDNIGHT_S = 86400.0

STRANGER = "does not speak this protocol"
BROKEN = "broke the protocol"
NO_GEOMETRY = "has no usable geometry"
SAID_SO = "the scanner said so"

Item = Volume | Skipped | RunEnd


class NotOurs(Exception):
    """What came is not in the protocol, so nothing after it can be understood."""


class CutShort(Exception):
    """The connection broke off within the volume that is named."""


@contextmanager
def parsing() -> Iterator[None]:
    """Turn whatever a parser makes of a stranger's bytes into `NotOurs`, without their text."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (RtfmriError, NotOurs):
        raise
    except Exception:
        raise NotOurs from None


def checked_shape(numbers: Any) -> tuple[int, int, int]:
    """Return a header's shape.

    Raises
    ------
    NotOurs
        If it is not three whole numbers above 0, or more voxels than a volume may have.
    """
    with parsing():
        x, y, z = (int(n) for n in numbers)
        if [x, y, z] == list(numbers) and min(x, y, z) > 0 and x * y * z <= MAX_VOXELS:
            return x, y, z
    raise NotOurs


def make_volume(
    voxels: NDArray[Any],
    affine: ArrayLike,
    *,
    index: int,
    tr_s: float,
    arrived_s: float,
    acquired_s: float | None = None,
    slice_times_s: list[float | None] | None = None,
) -> Volume:
    """Return a volume of what a header says.

    Raises
    ------
    VolumeError
        In words without the header's values.
    """
    with np.errstate(all="ignore"):
        matrix = np.asarray(affine, np.float64)
        if matrix.shape != (4, 4) or not (np.abs(matrix) < _MAX_MM).all():
            raise VolumeError(NO_GEOMETRY)
        if not 0 <= index <= MAX_INDEX:
            raise VolumeError("has a number that cannot be")
        if acquired_s is not None and not 0 <= acquired_s < _MIDNIGHT_S:
            acquired_s = None
        shape = voxels.shape
        try:
            return Volume(
                data=as_voxels(voxels),
                grid=Grid((shape[0], shape[1], shape[2]), matrix),
                index=index,
                tr_s=tr_s,
                acquired_s=acquired_s,
                slice_times_s=as_slice_times(slice_times_s or [], shape[2]),
                arrived_s=arrived_s,
            )
        except GridError:
            raise VolumeError(NO_GEOMETRY) from None


class RunReader(LiveReader):
    """A live reader that remembers what the connections of one run have in common.

    Parameters
    ----------
    tr_s : float, optional
        Repetition time in seconds; the headers' by default.
    count, timeout_s
        As for `LiveReader`.
    allow : Allowed, optional
        Who may connect; this machine by default.
    """

    def __init__(
        self,
        tr_s: float | None,
        *,
        count: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        allow: Allowed | None = None,
    ) -> None:
        super().__init__(count=count, timeout_s=timeout_s)
        self._tr_s = tr_s
        self._allow = allow or Allowed()
        self._lock = threading.RLock()
        self._forget_run()

    def __iter__(self) -> Iterator[Item]:
        """Give one run's items as they come."""
        taken: set[int] = set()
        for item in super().__iter__():
            if isinstance(item, Volume):
                taken.add(item.index)
            # An end that senders caused is known to their threads, and the next run may be coming
            # in already; that of silence is known here alone.
            if isinstance(item, RunEnd) and not (
                item.reason == SAID_SO or len(taken) == self.n_volumes
            ):
                self._forget_run()
            yield item

    def _forget_run(self) -> None:
        """Let the next volume be the first of a run."""
        with self._lock:
            self._series: object = None
            self._indices: set[int] = set()
            self._begun = False

    def _next_index(self) -> int:
        """Return the number of the next volume, where the protocol has none, and keep it."""
        with self._lock:
            index = max(self._indices, default=-1) + 1
            self._indices.add(index)
            return index

    def _checked_tr(self, header_s: float | None) -> float:
        """Return the repetition time in seconds.

        Raises
        ------
        SourceError
            If there is none, before the first volume of a run.
        VolumeError
            If there is none later.
        """
        if self._tr_s is not None:
            return self._tr_s
        try:
            return checked_tr(header_s, "the stream")
        except SourceError:
            if self._begun:
                raise VolumeError("has no usable repetition time") from None
            raise

    def _offer(
        self, volume: Volume, *, series: object = None, announced: int | None = None
    ) -> Iterator[Item]:
        """Yield a volume if it is the run's, and the end if it is the last that is *announced*."""
        with self._lock:
            if self._series is None:
                self._series = series
            ours = series == self._series
            if ours:
                self._indices.add(volume.index)
                self._begun = True
            complete = len(self._indices) == announced
            if len(self._indices) == self.n_volumes:
                self._forget_run()
        if not ours:
            yield Skipped(f"volume {volume.index}", OTHER_SERIES)
            return
        yield volume
        if complete:
            yield self._end()

    def _end(self) -> RunEnd:
        self._forget_run()
        return RunEnd(SAID_SO)

    def _tell_of_stranger(self) -> None:
        """Count a stranger, unless so many wait to be counted that they would hold up volumes."""
        if self._items.qsize() < _MAX_STRANGERS_WAITING:
            self.put(Skipped("a connection", STRANGER))


class Incoming:
    """A sender's connection.

    Until it is `welcome` its time is limited, and every header's length is, always. Whatever
    reads raises EOFError or OSError when the connection ends; ``gone`` is set when all that came
    by it is handed over.
    """

    def __init__(self, connection: socket.socket, host: str) -> None:
        self.host = host
        self.introduced = False
        self.said_something = False
        self.gone = threading.Event()
        self._socket = connection
        self._deadline_s = time.monotonic() + INTRODUCTION_S

    def welcome(self) -> None:
        """Take it for a sender: from now on it may be silent for as long as it likes."""
        self.introduced = True
        self._socket.settimeout(None)

    def exactly(self, n_bytes: int) -> bytes:
        """Return the next bytes, of a header; memory grows no faster than they come."""
        if n_bytes > MAX_HEADER_BYTES:
            raise NotOurs
        data = bytearray()
        while len(data) < n_bytes:
            data += self._some(n_bytes - len(data))
        return bytes(data)

    def until_nul(self) -> bytes:
        """Return the next bytes up to a NUL, without it."""
        data = bytearray()
        while len(data) <= MAX_HEADER_BYTES:
            piece = self._some(_CHUNK_BYTES, socket.MSG_PEEK)
            length = piece.find(b"\0") + 1
            data += self.exactly(length or len(piece))
            if length:
                return bytes(data[:-1])
        raise NotOurs

    def voxels(self, name: str, buffer: NDArray[Any]) -> float:
        """Fill *buffer* (n,), and return when its last byte was there.

        Raises
        ------
        CutShort
            If the connection ends before it is full; *name* is the volume's.
        """
        view = buffer.view(np.uint8).data
        try:
            while view:
                view = view[self._socket.recv_into(view) or self._ended() :]
        except (EOFError, OSError):
            raise CutShort(name) from None
        return time.perf_counter()

    def skip(self, n_bytes: int) -> None:
        """Read past bytes that are of no use."""
        while n_bytes:
            n_bytes -= len(self._some(min(n_bytes, _CHUNK_BYTES)))

    def reply(self, data: bytes) -> None:
        """Send an answer."""
        self._socket.sendall(data)

    def close(self) -> None:
        """Break off, from any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _some(self, n_bytes: int, flags: int = 0) -> bytes:
        if not self.introduced:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)
        data = self._socket.recv(min(n_bytes, _CHUNK_BYTES), flags)
        if not data:
            self._ended()
        self.said_something = True
        return data

    def _ended(self) -> int:
        raise EOFError


class StreamReader(RunReader):
    """Listens on TCP; subclasses say in `_read` what a connection means.

    A connection that has not sent a valid header after 5 s, or sends anything else, is closed and
    counted; so many are open at once at most, and a silent stranger makes room for whoever comes
    next. Peers that are not allowed are closed at once.

    Parameters
    ----------
    address : Address
        Where to listen.
    tr_s, **options
        As for `RunReader`.

    Attributes
    ----------
    address : Address
        With the port that the operating system chose, if any could be.

    Raises
    ------
    SourceError
        If one cannot listen there.
    """

    def __init__(self, address: Address, tr_s: float | None, **options: Any) -> None:
        super().__init__(tr_s, **options)
        self._refused: set[str] = set()
        self._connections: list[Incoming] = []
        self._listeners: dict[int, tuple[socket.socket, threading.Thread]] = {}
        self.address = self._listen(address)

    def _read(self, incoming: Incoming) -> Iterator[Item]:
        """Yield what a connection brings; ends, or raises, where the connection does.

        Raises
        ------
        NotOurs, CutShort, EOFError, OSError, SourceError
        """
        raise NotImplementedError

    def _listen(self, address: Address) -> Address:
        listener = listen(address)
        port = listener.getsockname()[1]
        thread = threading.Thread(
            target=self._accept_all, args=(listener,), name=f"rtfmri-port-{port}", daemon=True
        )
        self._listeners[port] = listener, thread
        thread.start()
        _log.info("listening on %s:%d", address.host, port)
        return Address(address.host, port)

    def close(self) -> None:
        """Stop listening, break off what is connected, and end the iteration."""
        self._closed = True
        with self._lock:
            listeners, connections = list(self._listeners.values()), list(self._connections)
        for listener, thread in listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # a thread in accept() wakes up
            thread.join(timeout=1)
            listener.close()
        for incoming in connections:
            incoming.close()
        super().close()

    def _accept_all(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                connection, (host, *_) = listener.accept()
            except OSError:
                time.sleep(0.05)  # it was closed, or too many files are open
                continue
            if not self._allow.admits(host):
                connection.close()
                self._note_refusal(host)
                continue
            incoming = Incoming(connection, host)
            if not self._make_room_for(incoming):
                incoming.close()
                continue
            _keep_alive(connection)
            threading.Thread(
                target=self._serve, args=(incoming,), name="rtfmri-sender", daemon=True
            ).start()

    def _note_refusal(self, host: str) -> None:
        if host not in self._refused and len(self._refused) < _MAX_CONNECTIONS:
            self._refused.add(host)
            _log.warning("refused a connection from %s, which allow does not name", host)

    def _make_room_for(self, incoming: Incoming) -> bool:
        with self._lock:
            if len(self._connections) >= _MAX_CONNECTIONS:
                silent = [other for other in self._connections if not other.introduced]
                if not silent:
                    _log.warning("too many connections: refused one more")
                    return False
                silent[0].close()
                self._connections.remove(silent[0])
            self._connections.append(incoming)
            return True

    def _serve(self, incoming: Incoming) -> None:
        with closing(incoming):
            try:
                for item in self._read(incoming):
                    if not self.put(item):
                        break
            except SourceError as error:
                self.put(error)
            except CutShort as error:
                self.put(Skipped(str(error), CUT_SHORT))
            except (NotOurs, EOFError, OSError) as error:
                if incoming.introduced and isinstance(error, NotOurs):
                    self.put(Skipped("a connection", BROKEN))
                elif not incoming.introduced and (
                    incoming.said_something or isinstance(error, TimeoutError)
                ):
                    self._tell_of_stranger()
        with self._lock, suppress(ValueError):
            self._connections.remove(incoming)
        incoming.gone.set()


def _keep_alive(connection: socket.socket) -> None:
    """Find out within half a minute that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

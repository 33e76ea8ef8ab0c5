"""What the ZeroMQ transports share: one thread, one socket, and a doorkeeper.

ZeroMQ connects, reconnects and frames by itself. Who may connect is asked at the door (ZAP, ZeroMQ
RFC 27); a message's length is limited before it is read. It gathers a message before anybody sees
it, so a volume that is cut off on the way never comes.
"""

import logging
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from rtfmri.errors import SourceError
from rtfmri.readers.network import Address, Allowed
from rtfmri.readers.stream import (
    INTRODUCTION_S,
    MAX_HEADER_BYTES,
    MAX_VOXELS,
    Item,
    NotOurs,
    RunReader,
)

_log = logging.getLogger(__name__)

_LOOK_MS = 100
_MAX_MESSAGE_BYTES = MAX_VOXELS * 8 + MAX_HEADER_BYTES
_MESSAGES_AHEAD = 4


def import_zmq() -> ModuleType:
    """Return pyzmq.

    Raises
    ------
    SourceError
        If it is not installed, saying how to.
    """
    try:
        import zmq
    except ImportError:
        raise SourceError("ZeroMQ is not installed: pip install 'rtfmri[zmq]'") from None
    return zmq


def bind(socket: Any, address: Address) -> Address:
    """Let a ZeroMQ socket listen; return where, with the port that was chosen if any could be.

    Raises
    ------
    SourceError
        If that is not possible; the socket is closed then.
    """
    zmq, host = import_zmq(), address.host
    socket.setsockopt(zmq.IPV6, ":" in host)
    name = f"[{host}]" if ":" in host else host.replace("localhost", "127.0.0.1")
    try:
        socket.bind(f"tcp://{name}:{address.port or '*'}")
    except zmq.ZMQError as error:
        socket.close()
        raise SourceError(f"cannot listen on {host}:{address.port}: {error.strerror}") from error
    port = int(socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").rpartition(b":")[2])
    return Address(host, port)


def open_door(context: Any) -> Any:
    """Return the socket at which *context* is asked who may connect (ZAP, ZeroMQ RFC 27)."""
    door = context.socket(import_zmq().REP)
    door.bind("inproc://zeromq.zap.01")
    return door


def answer_the_door(door: Any, allow: Allowed) -> None:
    """Let somebody in, or not, who waits at the door."""
    version, request, _domain, host, *_ = door.recv_multipart()
    allowed = allow.admits(host.decode("ascii", "replace"))
    if not allowed:
        _log.warning("refused a connection from an address that allow does not name")
    status = (b"200", b"OK") if allowed else (b"400", b"not allowed")
    door.send_multipart([version, request, *status, b"", b""])


class ZmqReader(RunReader):
    """Takes ZeroMQ messages; subclasses say in `_read` what one means.

    Parameters
    ----------
    address : Address
        Where to listen.
    kind : str
        Of the socket: "PULL" or "PAIR".
    tr_s, **options
        As for `RunReader`.

    Attributes
    ----------
    address : Address
        With the port that the operating system chose, if any could be.

    Raises
    ------
    SourceError
        If pyzmq is not installed, or one cannot listen there.
    """

    def __init__(self, address: Address, kind: str, tr_s: float | None, **options: Any) -> None:
        self._zmq = import_zmq()
        super().__init__(tr_s, **options)
        self._context = self._zmq.Context()
        self._door = open_door(self._context)
        self.address = address
        self._kind = kind
        try:
            self._socket = self._bind()
        except SourceError:
            self._context.destroy(linger=0)
            raise
        _log.info("listening on %s:%d", address.host, self.address.port)
        self._thread = threading.Thread(target=self._work, name="rtfmri-zmq", daemon=True)
        self._thread.start()

    def _read(self, frames: list[Any]) -> Iterator[Item]:
        """Yield what a message brings.

        Raises
        ------
        NotOurs, SourceError
        """
        raise NotImplementedError

    def _look_after(self) -> None:
        """Do what is to be done every now and then."""

    def close(self) -> None:
        """Stop listening, and end the iteration."""
        self._closed = True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2)
        super().close()

    def _bind(self) -> Any:
        zmq = self._zmq
        bound = self._context.socket(getattr(zmq, self._kind))
        bound.setsockopt(zmq.ZAP_DOMAIN, b"rtfmri")  # without one, nobody asks at the door
        bound.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        bound.setsockopt(zmq.RCVHWM, _MESSAGES_AHEAD)
        bound.setsockopt(zmq.LINGER, 0)
        bound.setsockopt(zmq.HANDSHAKE_IVL, int(INTRODUCTION_S * 1000))
        bound.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self.address = bind(bound, self.address)
        return bound

    def _work(self) -> None:
        zmq = self._zmq
        while not self._closed:
            poller = zmq.Poller()
            poller.register(self._door, zmq.POLLIN)
            poller.register(self._socket, zmq.POLLIN)
            ready = dict(poller.poll(_LOOK_MS))
            if self._door in ready:
                answer_the_door(self._door, self._allow)
            if self._socket in ready:
                try:
                    for item in self._read(self._socket.recv_multipart(copy=False)):
                        self.put(item)
                except NotOurs:
                    self._tell_of_stranger()
                except SourceError as error:
                    self.put(error)
            self._look_after()
        self._context.destroy(linger=0)

"""The DICOM listener's process: pynetdicom, fenced in; see `rtfmri.readers.listener`.

pynetdicom alone gives each connection two threads before it has said anything, reads a PDU of any
length and an object of any size. So connections wait here until their association request is there
and makes sense, what they may send is bounded, and so is the memory of it all.
"""

import gc
import json
import logging
import os
import re
import selectors
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import AE, AllStoragePresentationContexts, _config, build_context, evt
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.sop_class import Verification
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler

from rtfmri.readers.child import limit_child
from rtfmri.readers.listener import (
    CUT,
    HEADER,
    MAX_OBJECT_BYTES,
    OBJECT,
    PEER,
    READY,
    REFUSED,
    TAKEN,
    Settings,
    tls_context,
)
from rtfmri.readers.network import Allowed, parse_allowed

_MEMORY_BYTES = 2 << 30
"""What this process may allocate; some 50 MB are its own, and `_MAX_HELD_BYTES` can be there twice
for a moment, while a buffer grows."""
_MAX_HELD_BYTES = 512 << 20
"""Of all associations together."""
_MAX_PDU_BYTES = 128 << 10
"""What peers are told; dcmtk sends no larger ones. Up to twice as much is read."""
_MAX_VISITORS = 256
"""Connections that have not asked for an association yet."""
_MAX_ASSOCIATIONS = 32
"""A scanner has one or two. Each has two threads that look for work every millisecond."""
_MAX_TOLD = 256
_REQUEST_S = 5.0
"""Time to ask for an association."""
_PDU_S = 30.0
"""Time to send a PDU, once it has begun."""
_FAREWELL_S = 1.0
"""Time to answer what is to be answered, when this process is to end."""
_POLL_S = 0.005
"""Some times what pynetdicom's threads need to notice that they have something to send."""
_NAME = re.compile(r"[A-Z0-9_.-]{1,16}")

_TRANSFER_SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLSLossless,
    JPEGLosslessSV1,
    JPEGLossless,
    JPEG2000Lossless,
]
"""In the order of preference: what need not be decompressed first. A deflated object could become
a thousand times larger in the run's process, so none is taken."""


class _Channel:
    """The way to the reader."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._notes: deque[tuple[bytes, str]] = deque()

    def deliver(self, event: Any) -> int:
        """Hand over a C-STORE request's object; return the status to answer with."""
        arrived_s = event.assoc.dul.socket.last_s
        with self._lock:
            self._send(OBJECT, event.encoded_dataset(), arrived_s)
            taken = self._connection.recv(1) == TAKEN
            self._send_notes()
        return 0x0000 if taken else 0xA700  # success; out of resources (PS3.4, table B.2-1)

    def tell(self, kind: bytes, *words: str) -> None:
        """Say something short, now or after the object that the reader is being offered."""
        self._notes.append((kind, " ".join(words)))
        if self._lock.acquire(blocking=False):
            try:
                self._send_notes()
            finally:
                self._lock.release()

    def _send_notes(self) -> None:
        while self._notes:
            kind, text = self._notes.popleft()
            self._send(kind, text.encode(), time.perf_counter())

    def _send(self, kind: bytes, data: bytes, arrived_s: float) -> None:
        self._connection.sendall(HEADER.pack(kind, arrived_s, len(data)))
        self._connection.sendall(data)


class _Connection(AssociationSocket):  # type: ignore[misc]
    """Takes the place of a socket of pynetdicom's, which would read a PDU of 4 GB, for ever."""

    def __init__(self, plain: AssociationSocket, received: bytearray) -> None:
        self.__dict__.update(plain.__dict__)
        self._received = received
        self.last_s = time.perf_counter()
        """When something was last read."""

    @property
    def ready(self) -> bool:
        """Whether there is something to read."""
        return bool(self._received) or bool(super().ready)

    def recv(self, nr_bytes: int) -> bytearray:
        """Read that many bytes; fewer where the peer has closed the connection."""
        if nr_bytes > 2 * _MAX_PDU_BYTES:
            raise OSError("the PDU is too long")
        data = self._received[:nr_bytes]
        del self._received[:nr_bytes]
        until_s = time.monotonic() + _PDU_S
        while len(data) < nr_bytes:
            self.socket.settimeout(max(until_s - time.monotonic(), 1e-3))
            chunk = self.socket.recv(nr_bytes - len(data))
            if not chunk:
                break
            data += chunk
        self.last_s = time.perf_counter()
        return data


class _Messages(DIMSEServiceProvider):  # type: ignore[misc]
    """Puts messages together, with a limit to what that may hold in memory."""

    def __init__(self, assoc: Any) -> None:
        super().__init__(assoc)
        self.held_bytes = 0
        self._n_requests = self._n_answers = 0

    def receive_primitive(self, primitive: Any) -> None:
        """Take a piece of a message.

        Nobody may send the next request before the last one is answered: that would have to be
        negotiated as asynchronous operations (PS3.7, D.3.3.3), and never is.
        """
        self.held_bytes += sum(len(data) for _, data in primitive.presentation_data_value_list)
        too_much = self.held_bytes > MAX_OBJECT_BYTES or self.assoc._server.is_full()
        if self.owes_an_answer or too_much:
            self.message = None
            self.dul.event_queue.put("Evt19")  # as for an invalid PDU: the association is aborted
            self.assoc._server.refuse(_host(self.assoc), "amount")
            return
        super().receive_primitive(primitive)
        if self.message is None:
            self._n_requests += 1

    def send_msg(self, primitive: Any, context_id: int) -> None:
        """Answer."""
        self._n_answers += 1
        self.held_bytes = 0
        super().send_msg(primitive, context_id)

    @property
    def owes_an_answer(self) -> bool:
        """Whether a request is not answered yet."""
        return self._n_requests > self._n_answers

    def forget(self) -> None:
        """Let go of all that was received."""
        self.held_bytes = 0
        self.message = None
        self.msg_queue.queue.clear()


@dataclass(eq=False, slots=True)
class _Visitor:
    """A connection that has not yet asked for an association."""

    connection: socket.socket
    address: Any
    until_s: float
    """When it will have had time enough."""
    received: bytearray = field(default_factory=bytearray)

    @property
    def host(self) -> str:
        """Its numerical address."""
        return str(self.address[0])

    def read(self) -> None:
        """Read until the request is there, and no further.

        Raises
        ------
        ValueError
            If this becomes no request.
        OSError
            If there is nothing to read as yet (`BlockingIOError`, `ssl.SSLWantReadError`), or
            any more.
        """
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.do_handshake()  # does nothing when it is over
        while n_missing := self._n_missing():
            chunk = self.connection.recv(n_missing)
            if not chunk:
                raise ConnectionAbortedError
            self.received += chunk
        _check_request(bytes(self.received))

    def _n_missing(self) -> int:
        if len(self.received) < 6:
            return 6 - len(self.received)
        kind, length = struct.unpack(">BxI", self.received[:6])
        if kind != 1 or length > 2 * _MAX_PDU_BYTES:
            raise ValueError("no request")
        return int(6 + length - len(self.received))


def _check_request(pdu: bytes) -> None:
    """Raise a ValueError for an association request that cannot be decoded."""
    try:
        request = A_ASSOCIATE_RQ()
        request.decode(pdu)
        request.to_primitive()
    except Exception:
        raise ValueError("malformed request") from None


class _Handler(RequestHandler):  # type: ignore[misc]
    """Makes an association of a visitor."""

    def setup(self) -> None:
        """Take the visitor apart."""
        visitor: Any = self.request
        self.request: socket.socket = visitor.connection
        self._received = visitor.received

    def _create_association(self) -> Any:
        association = super()._create_association()
        association.dul.socket = _Connection(association.dul.socket, self._received)
        association.dimse = _Messages(association)
        self.server.add(association)
        return association


class _Contexts(list[Any]):
    """What we accept; pynetdicom copies it, deeply and in 10 ms, for each association."""

    def __deepcopy__(self, memo: object) -> "_Contexts":
        return self


class _Server(AssociationServer):  # type: ignore[misc]
    """What associations have in common; connections come from the `_Lobby`."""

    def __init__(self, settings: Settings, listening: socket.socket, channel: _Channel) -> None:
        self._listening = listening
        self._settings = settings
        self._channel = channel
        self._associations: list[Any] = []
        self._n_dead = 0
        self._told: set[tuple[str, str]] = set()
        ae = AE(settings.ae)
        ae.require_called_aet = True
        ae.require_calling_aet = settings.callers
        ae.maximum_associations = 200
        ae.maximum_pdu_size = _MAX_PDU_BYTES
        ae.acse_timeout = _REQUEST_S
        ae.network_timeout = None  # an association may be idle between two runs
        storage = [context.abstract_syntax for context in AllStoragePresentationContexts]
        contexts = [build_context(uid, _TRANSFER_SYNTAXES) for uid in storage]
        super().__init__(
            ae,
            listening.getsockname(),
            settings.ae,
            _Contexts([build_context(Verification), *contexts]),
            evt_handlers=[
                (evt.EVT_C_STORE, channel.deliver),
                (evt.EVT_ACCEPTED, self._say_who),
                (evt.EVT_REJECTED, self._say_why_not),
                (evt.EVT_CONN_CLOSE, self._say_what_was_cut),
            ],
            request_handler=_Handler,
        )

    def server_bind(self) -> None:
        """Use the socket that is there."""
        self.socket.close()
        self.socket: socket.socket = self._listening
        self.server_address = self._listening.getsockname()

    def server_activate(self) -> None:
        """Do nothing; it listens already."""

    def is_full(self) -> bool:
        """Tell whether all associations together hold too much."""
        held_bytes: int = sum(one.dimse.held_bytes for one in self._associations)
        return held_bytes > _MAX_HELD_BYTES

    def add(self, association: Any) -> None:
        """Take notice of a new association."""
        self._associations = [*self._associations, association]

    def forget_the_dead(self) -> None:
        """Let go of the associations that have ended, and of what they held."""
        alive = [one for one in self._associations if one.is_alive() or one.dul.is_alive()]
        self._n_dead += len(self._associations) - len(alive)
        for dead in set(self._associations) - set(alive):
            dead.dimse.forget()
        self._associations = alive
        if self._n_dead > _MAX_ASSOCIATIONS:
            gc.collect()  # they refer to themselves
            self._n_dead = 0

    def finish(self) -> None:
        """Let answers go out that are due: the reader may have what it wants, and end the run."""
        until_s = time.monotonic() + _FAREWELL_S
        while any(one.dimse.owes_an_answer for one in self._associations):
            if time.monotonic() > until_s:
                return
            time.sleep(_POLL_S)
        if self._associations:
            time.sleep(10 * _POLL_S)

    def admit(self, visitor: _Visitor) -> None:
        """Let a visitor have its association; when there are too many, another one loses it."""
        alive = self._associations
        if len(alive) >= 2 * _MAX_ASSOCIATIONS:  # those that have lost theirs need a moment
            visitor.connection.close()
            return
        if len(alive) >= _MAX_ASSOCIATIONS:
            crowd = _crowd(alive, _host)
            idlest = min(crowd, key=lambda one: (one.is_established, one.dul.socket.last_s))
            with suppress(OSError, AttributeError):  # it may just have closed its socket
                socket.socket.shutdown(idlest.dul.socket.socket, socket.SHUT_RDWR)
        try:
            _Handler(visitor, visitor.address, self)
        except Exception:
            visitor.connection.close()

    def refuse(self, host: str, reason: str) -> None:
        """Tell the reader that a host was refused, once."""
        if (host, reason) not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add((host, reason))
            self._channel.tell(REFUSED, host, reason)

    def _say_who(self, event: Any) -> None:
        name = event.assoc.requestor.implementation_version_name or ""
        self._channel.tell(PEER, _host(event.assoc), name if _NAME.fullmatch(name) else "")

    def _say_what_was_cut(self, event: Any) -> None:
        if event.assoc.dimse.message is not None:
            self._channel.tell(CUT)

    def _say_why_not(self, event: Any) -> None:
        request = event.assoc.requestor.primitive
        callers = self._settings.callers
        if request.called_ae_title != self._settings.ae:
            self.refuse(_host(event.assoc), "called")
        elif callers and request.calling_ae_title not in callers:
            self.refuse(_host(event.assoc), "caller")


def _host(association: Any) -> str:
    return str(association.requestor.address_info.address)


def _crowd(many: list[Any], host: Callable[[Any], str]) -> list[Any]:
    """Return those of the host that has the most of them."""
    ((most, _),) = Counter(map(host, many)).most_common(1)
    return [one for one in many if host(one) == most]


class _Lobby:
    """Where connections wait until their association request is there, at no cost of threads.

    Those that send nothing for 5 s, or what is no request, are closed. If there are too many, the
    host that has the most loses its oldest.
    """

    def __init__(
        self,
        listening: socket.socket,
        allowed: Allowed,
        tls: ssl.SSLContext | None,
        server: _Server,
    ) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._allowed = allowed
        self._tls = tls
        self._server = server
        self._visitors: dict[_Visitor, None] = {}
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serve until standard input ends."""
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._selector.register(self._listening, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is self._listening:
                    self._welcome()
                elif key.data in self._visitors:
                    self._attend(key.data)
            self._server.forget_the_dead()
            now_s = time.monotonic()
            for visitor in [one for one in self._visitors if one.until_s < now_s]:
                self._dismiss(visitor, "request")

    def _welcome(self) -> None:
        try:
            connection, address = self._listening.accept()
        except OSError:  # it has gone again
            return
        if not self._allowed.admits(address[0]):
            connection.close()
            self._server.refuse(address[0], "address")
            return
        if len(self._visitors) >= _MAX_VISITORS:
            self._dismiss(_crowd(list(self._visitors), lambda one: one.host)[0], "request")
        try:
            connection.setblocking(False)
            # A peer whose power has failed would otherwise keep its association for ever.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._tls:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
        except OSError:
            connection.close()
            return
        visitor = _Visitor(connection, address, time.monotonic() + _REQUEST_S)
        self._visitors[visitor] = None
        self._selector.register(connection, selectors.EVENT_READ, visitor)

    def _attend(self, visitor: _Visitor) -> None:
        try:
            visitor.read()
        except ssl.SSLWantWriteError:
            self._selector.modify(visitor.connection, selectors.EVENT_WRITE, visitor)
        except (BlockingIOError, ssl.SSLWantReadError):
            self._selector.modify(visitor.connection, selectors.EVENT_READ, visitor)
        except ssl.SSLError:
            self._dismiss(visitor, "tls")
        except (OSError, ValueError):
            self._dismiss(visitor, "request")
        else:
            self._forget(visitor)
            visitor.connection.setblocking(True)
            self._server.admit(visitor)

    def _forget(self, visitor: _Visitor) -> None:
        del self._visitors[visitor]
        self._selector.unregister(visitor.connection)

    def _dismiss(self, visitor: _Visitor, reason: str) -> None:
        self._forget(visitor)
        visitor.connection.close()
        self._server.refuse(visitor.host, reason)


def main() -> None:
    """Serve until standard input ends."""
    settings = Settings(**json.loads(sys.argv[1]))
    limit_child(_MEMORY_BYTES)
    threading.stack_size(512 << 10)  # counts as memory, twice for each association
    logging.disable()
    _config.LOG_HANDLER_LEVEL = "none"
    listening = socket.socket(fileno=settings.listening)
    channel = _Channel(socket.socket(fileno=settings.channel))
    tls = None
    if settings.certificate is not None:
        tls = tls_context(settings.certificate, settings.key, settings.authority)
    allowed = parse_allowed(settings.allow) if settings.allow else Allowed()
    server = _Server(settings, listening, channel)
    gc.collect()
    gc.freeze()
    channel.tell(READY)
    _Lobby(listening, allowed, tls, server).run()
    server.finish()


if __name__ == "__main__":
    try:
        main()
    finally:
        os._exit(0)  # not to wait for threads that wait for peers

"""The DICOM listener as the reader sees it: a process, and the messages that come from it.

The process, `rtfmri.readers.scp`, meets the network, so that the run's process never waits for a
peer, never runs out of memory and never sees a malformed message: it gets whole objects, unread.
It inherits two sockets: the one that listens, which stays open when the process dies, so that
peers wait and are not refused until there is another; and the channel to the reader. It ends when
its standard input does, that is when the reader's process is gone, however that ended.

On the channel, the listener sends messages of a `HEADER` and bytes, and waits after each object
for one byte that tells whether it was taken.
"""

import json
import socket
import ssl
import struct
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rtfmri.readers.child import start_child

HEADER = struct.Struct("!cdQ")
"""Kind of message, when its last byte was here, number of bytes that follow.

The time is `time.perf_counter`'s, which on Linux and macOS is a clock of the machine, not of the
process (CLOCK_MONOTONIC, mach_absolute_time).
"""
READY, OBJECT, CUT, PEER, REFUSED = b"R", b"O", b"C", b"P", b"X"
TAKEN, NOT_TAKEN = b"1", b"0"
MAX_OBJECT_BYTES = 256 << 20
"""Four times a volume of 256 x 256 x 256 float32."""
_MAX_MESSAGE_BYTES = MAX_OBJECT_BYTES + 4096
"""An object comes with its file's header."""
_END_S = 2.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a listener is told."""

    ae: str
    callers: tuple[str, ...] = ()
    """AE titles that may call; empty for all."""
    allow: str = ""
    """Addresses, as `parse_allowed` reads them; empty for this machine's own."""
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    listening: int = -1
    """Descriptor of the socket that listens."""
    channel: int = -1
    """Descriptor of the socket to the reader."""

    def to_json(self) -> str:
        """Return them as text; ``Settings(**json.loads(text))`` reads it."""
        return json.dumps(asdict(self))


class Message(NamedTuple):
    """What a listener says."""

    kind: bytes
    arrived_s: float
    data: bytes


class Listener:
    """A process that listens.

    Parameters
    ----------
    settings : Settings
        Without the two sockets.
    listening : socket
        Is bound and listens.
    """

    def __init__(self, settings: Settings, listening: socket.socket) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            sockets = {"listening": listening.fileno(), "channel": theirs.fileno()}
            told = Settings(**{**asdict(settings), **sockets})
            try:
                self._process = start_child(
                    "rtfmri.readers.scp", told.to_json(), pass_fds=list(sockets.values())
                )
            except OSError:
                self._channel.close()
                raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def receive(self) -> Message:
        """Wait for the next message.

        Raises
        ------
        OSError
            If there will be none any more, or it is none.
        """
        kind, arrived_s, n_bytes = HEADER.unpack(self._read(HEADER.size))
        if n_bytes > _MAX_MESSAGE_BYTES:
            raise OSError(f"a message must be at most {_MAX_MESSAGE_BYTES} bytes, got {n_bytes}")
        return Message(kind, arrived_s, self._read(n_bytes))

    def answer(self, taken: bool) -> None:
        """Tell whether the last object was taken."""
        self._channel.sendall(TAKEN if taken else NOT_TAKEN)

    def hang_up(self) -> None:
        """Let `receive` raise; from any thread."""
        self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the process."""
        self._channel.close()
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, n_bytes: int) -> bytes:
        data = bytearray(n_bytes)
        view = memoryview(data)
        while view:
            n_read = self._channel.recv_into(view)
            if not n_read:
                raise ConnectionAbortedError("the listener has ended")
            view = view[n_read:]
        return bytes(data)


def tls_context(
    certificate: str | Path, key: str | Path | None, authority: str | Path | None
) -> ssl.SSLContext:
    """Return the server's side of TLS; with an *authority*, clients need a certificate of it.

    Raises
    ------
    OSError
        If a file is not there, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key, password=lambda: "-")  # or else it would ask for one
    if authority is not None:
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    return context

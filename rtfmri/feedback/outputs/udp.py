"""UDP: what is shown, as one big-endian float32 a volume; no value is nan.

A datagram goes where the URI says, and may get lost; nobody has to be there. One to another
machine leaves this one unencrypted.
"""

import re
import socket
import struct

from rtfmri.errors import ConfigError
from rtfmri.feedback.message import Message, Run

_VALUE = struct.Struct(">f")


def open_udp(target: str) -> "UdpOutput":
    """Open ``udp://HOST:PORT``.

    Raises
    ------
    ConfigError
        If the address is malformed, or the host is not known.
    """
    parts = re.fullmatch(r"//(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})/?", target)
    if parts is None or not 0 < int(parts[2]) < 65536:
        raise ConfigError(f"an address is //HOST:PORT, such as //127.0.0.1:1234; got {target!r}")
    try:
        info = socket.getaddrinfo(parts[1].strip("[]"), int(parts[2]), type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise ConfigError(f"host {parts[1]!r} is not known: {error}") from error
    return UdpOutput(info[0], info[4])


class UdpOutput:
    """Sends a datagram a volume."""

    def __init__(self, family: socket.AddressFamily, to: tuple[object, ...]) -> None:
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._to = to

    def begin(self, run: Run) -> None:
        """See `Output.begin`."""

    def send(self, message: Message) -> None:
        """See `Output.send`."""
        self._socket.sendto(_VALUE.pack(message.feedback), self._to)

    def end(self) -> None:
        """See `Output.end`."""

    def close(self) -> None:
        """See `Output.close`."""
        self._socket.close()

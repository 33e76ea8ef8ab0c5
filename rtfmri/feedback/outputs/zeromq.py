"""ZeroMQ: a PUB socket, to which any number of programs subscribe.

Each volume is a message of two frames: the topic ``rtfmri`` and the JSON. A subscriber that does
not read loses what is beyond 1000 messages; one that comes late gets what comes from then on.
"""

from typing import Any

from rtfmri.feedback.message import Message, Run
from rtfmri.readers.network import Address, parse_address
from rtfmri.readers.zeromq import bind, import_zmq

PORT = 5556
TOPIC = b"rtfmri"
_LINGER_MS = 500
_WAITING = 1000


def open_zmq(target: str) -> "ZmqOutput":
    """Open ``zmq://HOST:PORT``.

    Raises
    ------
    SourceError
        If pyzmq is not installed, the address is malformed or is not of this machine alone, or
        one cannot listen there.
    """
    return ZmqOutput(parse_address(target, PORT))


class ZmqOutput:
    """Publishes a message a volume; never waits for anybody.

    Attributes
    ----------
    address : Address
        With the port that the operating system chose, if any could be.
    """

    def __init__(self, address: Address) -> None:
        zmq = import_zmq()
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, _WAITING)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 16)  # of subscriptions
        try:
            self.address = bind(self._socket, address)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def begin(self, run: Run) -> None:
        """See `Output.begin`."""

    def send(self, message: Message) -> None:
        """See `Output.send`."""
        self._socket.send_multipart([TOPIC, message.json])

    def end(self) -> None:
        """See `Output.end`."""

    def close(self) -> None:
        """See `Output.close`."""
        self._socket.close()
        self._context.term()

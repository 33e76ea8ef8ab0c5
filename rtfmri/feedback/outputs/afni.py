"""AFNI's receiver protocol: what AFNI's real-time plugin sends while it registers a run.

A program that listens for it, such as one made with the afniRTI package, is connected to when a
run begins. All numbers are little-endian, as AFNI sends them from a PC (plug_realtime.c):

- the beginning: bytes AB CD EF AC, and an int32, how many extra values each volume has;
- a volume: float32, six of motion and that many more;
- the end: bytes DE AD DE AD.

Motion is what 3dvolreg reports, in the plugin's order: how the head must be moved *back* to where
it was, to superior, left and posterior in mm, after it was turned about the axes to superior
(roll), left (pitch) and posterior (yaw), in this order, by degrees counter-clockwise for who looks
against the axis. It is 0 where there is none. The extra values are the feedback, every signal, and
every region's PSC, in the run's order. nan is no value; afniRTI hands it on as it is. A volume
that is missing is sent, too, so that volumes can be counted.
"""

import math
import re
import socket
import struct
from collections.abc import Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from rtfmri.errors import ConfigError
from rtfmri.feedback.message import Message, Run
from rtfmri.readers.network import LOOPBACK

PORT = 53214
BEGIN, END = bytes.fromhex("ABCDEFAC"), bytes.fromhex("DEADDEAD")
_PATIENCE_S = 2.0
_LPS = np.diag([-1.0, -1.0, 1.0])
"""From axes to right, anterior and superior to those of DICOM and AFNI, and back."""


def open_afni(target: str) -> "AfniOutput":
    """Open ``afni://HOST:PORT``; nobody has to be there before the run begins.

    Raises
    ------
    ConfigError
        If the address is malformed.
    """
    parts = re.fullmatch(r"(//)?(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]*)(:([0-9]{1,5}))?/?", target)
    port = int(parts[4] or PORT) if parts else 0
    if parts is None or not 0 < port < 65536:
        raise ConfigError(f"an address is //HOST:PORT, such as //127.0.0.1:{PORT}; got {target!r}")
    return AfniOutput(parts[2].strip("[]") or LOOPBACK, port)


class AfniOutput:
    """Sends each run to the receiver by a connection of its own.

    A receiver that is not there, is gone, or does not read for 2 s, has lost the run: it would not
    know where to go on.
    """

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self._connection: socket.socket | None = None

    def begin(self, run: Run) -> None:
        """See `Output.begin`.

        Raises
        ------
        ConnectionError
            If nobody listens.
        """
        self.close()
        try:
            self._connection = socket.create_connection(self._to, timeout=_PATIENCE_S)
        except OSError as error:
            raise ConnectionError(f"no receiver at {self._to[0]}:{self._to[1]}: {error}") from None
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        n_extra = 1 + len(run.signals) + len(run.rois)
        self._put(BEGIN + struct.pack("<i", n_extra))
        self._names = run.signals, run.rois

    def send(self, message: Message) -> None:
        """See `Output.send`.

        Raises
        ------
        ConnectionError
            If there is no receiver.
        """
        signals, rois = self._names if self._connection else ((), ())
        values = (
            *(to_afni(message.motion) if message.motion else (0.0,) * 6),
            message.feedback,
            *(message.signals.get(name, math.nan) for name in signals),
            *(message.roi.get(name, math.nan) for name in rois),
        )
        self._put(struct.pack(f"<{len(values)}f", *values))

    def end(self) -> None:
        """See `Output.end`."""
        if self._connection:
            self._put(END)
        self.close()

    def close(self) -> None:
        """See `Output.close`."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def _put(self, data: bytes) -> None:
        if self._connection is None:
            raise ConnectionError("there is no receiver in this run")
        try:
            self._connection.sendall(data)
        except OSError as error:
            self.close()
            raise ConnectionError(f"the receiver is gone: {error}") from None


def to_afni(motion: Sequence[float]) -> tuple[float, ...]:
    """Return a pose as AFNI has it.

    Parameters
    ----------
    motion : sequence of six float
        As `MotionValue.parameters`: where the head went, on axes to right, anterior and superior.

    Returns
    -------
    tuple of six float
        How to move it back: to superior, left, posterior (mm), roll, pitch, yaw (degrees).
    """
    there = Rotation.from_euler("xyz", motion[3:], degrees=True)
    back = Rotation.from_matrix(_LPS @ there.inv().as_matrix() @ _LPS)
    left, posterior, superior = -_LPS @ there.inv().apply(motion[:3])
    roll, pitch, yaw = back.as_euler("zxy", degrees=True)
    return float(superior), float(left), float(posterior), float(roll), float(pitch), float(yaw)

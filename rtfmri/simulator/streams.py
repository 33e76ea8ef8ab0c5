"""Sends a run over the network as scanners and their software do, for whoever listens.

The formats are those of the readers of the same names; each is written as its own receiver demands
it: AFNI, an MRD reconstruction server, murfi2, Pyneal, or ours.
"""

import json
import math
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from rtfmri.errors import ConfigError, RecordingError, SourceError
from rtfmri.readers import afni, mrd, murfi, plain, pyneal
from rtfmri.readers.network import Address
from rtfmri.readers.zeromq import import_zmq
from rtfmri.volume import Volume, tiled

_TRIES = 10
_RETRY_S = 0.1
_PATIENCE_S = 5.0
_TO_LPS = np.diag([-1.0, -1, 1, 1])
_HELLO = b"hello from rtfmri"
_OURS, _STRANGERS = 1, 2
"""Series numbers: of the run, and of what does not belong to it."""


class StreamTarget:
    """Where a run is sent; connects when its first volume is.

    Parameters
    ----------
    address : Address
        Where somebody listens; port 0 stands for the protocol's usual one.
    """

    _usual_port = 0

    def __init__(self, address: Address) -> None:
        self._address = Address(address.host, address.port or self._usual_port)

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume.

        Parameters
        ----------
        volume : Volume
            Float32, or an integer type that the protocol has.
        stranger : bool
            Send it as of another series, where the protocol tells series.
        share : float
            Send only so much of its voxels, and break off then.

        Raises
        ------
        RecordingError
            If nobody listens there, or nobody does any longer.
        ConfigError
            If the protocol has no such voxel type.
        """
        raise NotImplementedError

    def die(self) -> None:
        """Break off without a word; the next `send` connects again."""

    def close(self) -> None:
        """Say that the run is over, where the protocol can."""

    @property
    def _name(self) -> str:
        return f"{self._address.host}:{self._address.port}"


class _TcpTarget(StreamTarget):
    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._socket: socket.socket | None = None

    def die(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def close(self) -> None:
        """Say goodbye, and wait until the other side has closed, too."""
        if self._socket is not None:
            with suppress(OSError):
                self._say_goodbye(self._socket)
                self._socket.shutdown(socket.SHUT_WR)
                self._socket.settimeout(_PATIENCE_S)
                while self._socket.recv(1 << 16):
                    pass
        self.die()

    def _say_goodbye(self, connection: socket.socket) -> None:
        """Send what ends a run."""

    def _open(self, volume: Volume) -> socket.socket:
        """Connect, and send what goes before a connection's first volume."""
        return self._connect(self._address.port)

    def _write(self, volume: Volume, header: bytes, voxels: NDArray[Any], share: float) -> None:
        try:
            if self._socket is None:
                self._socket = self._open(volume)
            self._socket.sendall(header)
            self._socket.sendall(_bytes(voxels, share))
        except RecordingError:
            raise
        except OSError as error:
            self.die()
            raise RecordingError(f"nobody listens on {self._name} any longer") from error
        if share < 1:
            self.die()

    def _connect(self, port: int) -> socket.socket:
        for attempt in range(_TRIES):
            time.sleep(_RETRY_S if attempt else 0)
            with suppress(OSError):
                connection = socket.create_connection((self._address.host, port), _PATIENCE_S)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
        raise RecordingError(f"nobody listens on {self._address.host}:{port}")


class TcpTarget(_TcpTarget):
    """Sends by our own protocol over TCP."""

    _usual_port = plain.TCP_PORT

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume."""
        header = plain.pack_header(volume, _series(stranger))
        self._write(volume, plain.LENGTH.pack(len(header)) + header, volume.flat, share)

    def _say_goodbye(self, connection: socket.socket) -> None:
        end = plain.pack_end()
        connection.sendall(plain.LENGTH.pack(len(end)) + end)


class AfniTarget(_TcpTarget):
    """Sends as AFNI's Dimon does: whole volumes, to the port below that of *address*."""

    _usual_port = afni.CONTROL_PORT
    _n_bytes = 0
    _said: tuple[str, ...] = ()
    """What the connection has been told of its volumes: it can be told but once."""

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume; uint16 goes as int16, for AFNI has nothing else."""
        voxels = volume.flat
        if voxels.dtype == np.uint16:
            if voxels.max() > np.iinfo(np.int16).max:
                raise ConfigError(
                    f"AFNI has no uint16, and volume {volume.index} has values above 32767; "
                    "use another target"
                )
            voxels = voxels.view(np.int16)
        if tuple(_afni_commands(volume)) != self._said:
            self.die()
        self._n_bytes = voxels.nbytes
        self._write(volume, b"", voxels, share)

    def _open(self, volume: Volume) -> socket.socket:
        port = self._address.port - 1
        with self._connect(self._address.port) as control:
            control.sendall(f"tcp:{self._address.host}:{port}\0".encode())
        connection = self._connect(port)
        self._said = tuple(_afni_commands(volume))
        connection.sendall("\n".join(self._said).encode() + b"\n\0")
        return connection

    def _say_goodbye(self, connection: socket.socket) -> None:
        connection.sendall(afni.MARKER.ljust(self._n_bytes, b"\0"))


def _afni_commands(volume: Volume) -> list[str]:
    """Return what AFNI has to know before the voxels (README.realtime)."""
    grid, lps = volume.grid, _TO_LPS @ volume.grid.affine
    fov_mm = [f"{n * size:.9g}" for n, size in zip(grid.shape, grid.voxel_size_mm, strict=True)]
    ends = orientations.aff2axcodes(grid.affine)
    axes = [f"{_OPPOSITE[end]}-{end}" for end in ends]
    sides = []
    for end in ends:
        axis = "LPS".find(end) if end in "LPS" else "RAI".find(end)
        place_mm = lps[axis, 3]
        sides.append(f"{abs(place_mm):.9g}{('RAI' if place_mm < 0 else 'LPS')[axis]}")
    commands = [
        f"ACQUISITION_TYPE {'3D+timing' if volume.slice_times_s else '3D+t'}",
        "NAME rtfmri",
        f"TR {volume.tr_s:.9g}",
        f"XYFOV {' '.join(fov_mm)}",
        f"XYMATRIX {' '.join(str(n) for n in grid.shape)}",
        f"DATUM {'float' if volume.data.dtype == np.float32 else 'short'}",
        f"XYZAXES {' '.join(axes)}",
        f"XYZFIRST {' '.join(sides)}",
        "BYTEORDER LSB_FIRST",
    ]
    if volume.slice_times_s:
        times = " ".join(f"{time_s:.6f}" for time_s in volume.slice_times_s)
        commands.append(f"TPATTERN explicit {times}")
    if np.count_nonzero(np.abs(lps[:3, :3]) > _PARALLEL_MM) > 3:
        numbers = " ".join(f"{number:.9g}" for number in lps.ravel())
        commands.append(f"OBLIQUE_XFORM {numbers}")
    return commands


_PARALLEL_MM = 1e-5
_OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "I": "S", "S": "I"}


class MrdTarget(_TcpTarget):
    """Sends MRD images, as a scanner does to a reconstruction server."""

    _usual_port = mrd.PORT

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume as one image."""
        header = mrd.KIND.pack(mrd.IMAGE) + _mrd_head(volume, stranger).tobytes()
        self._write(volume, header + mrd.ATTRIBUTES_LENGTH.pack(0), volume.flat, share)

    def _open(self, volume: Volume) -> socket.socket:
        connection = self._connect(self._address.port)
        config = b"savedataonly".ljust(mrd.CONFIG_FILE_BYTES, b"\0")
        connection.sendall(mrd.KIND.pack(mrd.CONFIG_FILE) + config)
        text = _mrd_xml(volume).encode()
        length = mrd.TEXT_LENGTH.pack(len(text))
        connection.sendall(mrd.KIND.pack(mrd.HEADER) + length + text)
        return connection

    def _say_goodbye(self, connection: socket.socket) -> None:
        connection.sendall(mrd.KIND.pack(mrd.CLOSE))


def _mrd_head(volume: Volume, stranger: bool) -> NDArray[Any]:
    head = np.zeros(1, mrd.IMAGE_HEADER)
    shape, lps = np.array(volume.grid.shape), _TO_LPS @ volume.grid.affine
    sizes_mm = np.array(volume.grid.voxel_size_mm)
    head["version"], head["channels"], head["image_type"] = 1, 1, mrd.MAGNITUDE
    head["data_type"] = next(
        code for code, dtype in mrd.DATA_TYPES.items() if dtype == volume.data.dtype
    )
    head["measurement_uid"] = 1
    head["matrix_size"], head["field_of_view"] = shape, shape * sizes_mm
    head["position"] = lps[:3, :3] @ ((shape - 1) / 2) + lps[:3, 3]
    for i, name in enumerate(("read_dir", "phase_dir", "slice_dir")):
        head[name] = lps[:3, i] / sizes_mm[i]
    head["repetition"] = volume.index
    head["image_index"] = volume.index + 1
    head["image_series_index"] = _STRANGERS if stranger else _OURS
    return head


def _mrd_xml(volume: Volume) -> str:
    """Return the least that the schema of MRD's header demands, and the repetition time."""
    shape = np.array(volume.grid.shape)
    fov_mm = shape * volume.grid.voxel_size_mm
    matrix = "".join(f"<{axis}>{n}</{axis}>" for axis, n in zip("xyz", shape, strict=True))
    fov = "".join(f"<{axis}>{mm:.9g}</{axis}>" for axis, mm in zip("xyz", fov_mm, strict=True))
    space = f"<matrixSize>{matrix}</matrixSize><fieldOfView_mm>{fov}</fieldOfView_mm>"
    return (
        '<?xml version="1.0" encoding="utf-8"?>'
        '<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        "<experimentalConditions><H1resonanceFrequency_Hz>123200000</H1resonanceFrequency_Hz>"
        "</experimentalConditions>"
        f"<encoding><encodedSpace>{space}</encodedSpace><reconSpace>{space}</reconSpace>"
        "<encodingLimits><slice><minimum>0</minimum><maximum>0</maximum><center>0</center></slice>"
        "</encodingLimits><trajectory>epi</trajectory></encoding>"
        f"<sequenceParameters><TR>{volume.tr_s * 1000:.9g}</TR></sequenceParameters>"
        "</ismrmrdHeader>"
    )


class MurfiTarget(_TcpTarget):
    """Sends mosaics by vSend, each in a connection of its own, as Siemens scanners do."""

    _usual_port = murfi.PORT

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume, and close the connection."""
        info = np.zeros(1, murfi.IMAGE_INFO)
        info["magic"], info["version"] = murfi.MAGIC, murfi.VERSION
        info["series_uid"] = _series(stranger).encode()
        info["scan_type"], info["image_type"] = b"EPI", b"3Dt"
        info["data_type"] = f"{volume.data.dtype.name}_t".encode()
        info["is_little_endian"] = info["is_mosaic"] = True
        info["spacing_mm"], info["shape"] = volume.grid.voxel_size_mm, volume.grid.shape
        info["voxel_to_world"] = volume.grid.affine
        info["repetition_time_ms"] = round(volume.tr_s * 1000)
        info["current_tr"] = volume.index + 1
        self._write(volume, info.tobytes(), tiled(volume.data).reshape(-1), share)
        self.close()


class ZmqTarget(StreamTarget):
    """Sends by our own protocol over ZeroMQ."""

    _usual_port = plain.ZMQ_PORT
    _kind = "PUSH"

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        try:
            self._zmq = import_zmq()
        except SourceError as error:
            raise ConfigError(str(error)) from None
        self._context: Any = None
        self._socket: Any = None

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume; a share of it goes as a message that is too short."""
        header = plain.pack_header(volume, _series(stranger))
        self._speak([header, _bytes(volume.flat, share)])
        if share < 1:
            self.die()

    def die(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close(linger=int(_PATIENCE_S * 1000))
        self._socket = None

    def close(self) -> None:
        """Say goodbye, and wait until all is sent."""
        if self._socket is not None:
            with suppress(RecordingError):
                self._say_goodbye()
        self.die()
        if self._context is not None:
            self._context.term()
        self._context = None

    def _say_goodbye(self) -> None:
        self._speak([plain.pack_end()])

    def _speak(self, frames: list[Any], *, answered: bool = False) -> bytes:
        """Send a message, and return its answer, if there is to be one."""
        if self._socket is None:
            self._socket = self._connected()
        try:
            self._socket.send_multipart(frames)
            return bytes(self._socket.recv()) if answered else b""
        except self._zmq.Again:
            self._socket.close(linger=0)
            self._socket = None
            raise RecordingError(f"nobody listens on {self._name}") from None

    def _connected(self) -> Any:
        zmq, host = self._zmq, self._address.host
        self._context = self._context or zmq.Context()
        connection = self._context.socket(getattr(zmq, self._kind))
        connection.setsockopt(zmq.IMMEDIATE, True)  # without a listener, sending waits
        connection.setsockopt(zmq.SNDTIMEO, int(_PATIENCE_S * 1000))
        connection.setsockopt(zmq.RCVTIMEO, int(_PATIENCE_S * 1000))
        connection.setsockopt(zmq.IPV6, ":" in host)
        name = f"[{host}]" if ":" in host else host
        connection.connect(f"tcp://{name}:{self._address.port}")
        return connection


class PynealTarget(ZmqTarget):
    """Sends as Pyneal's scanner side does: turned to RAS+, and waiting for every answer."""

    _usual_port = pyneal.PORT
    _kind = "PAIR"

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume and wait for the answer."""
        voxels, affine = canonical(volume)
        header = {
            "volIdx": volume.index,
            "TR": volume.tr_s,
            "dtype": volume.data.dtype.name,
            "shape": voxels.shape,
            "affine": json.dumps(affine.tolist()),
        }
        data = _bytes(voxels.reshape(-1), share)
        self._speak([json.dumps(header).encode(), data], answered=True)
        if share < 1:
            self.die()

    def _say_goodbye(self) -> None:
        """Say nothing: the protocol has no word for it."""

    def _connected(self) -> Any:
        wait_ms = int(_PATIENCE_S * 1000 / _TRIES)
        for _ in range(_TRIES):
            # A PAIR that has another peer takes a connection, and drops it with the words in it.
            connection = super()._connected()
            if connection.poll(wait_ms, self._zmq.POLLOUT):
                connection.send(_HELLO)
                if connection.poll(wait_ms) and connection.recv() == _HELLO:
                    return connection
            connection.close(linger=0)
        raise RecordingError(f"nobody listens on {self._name}")


def canonical(volume: Volume) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return a volume's voxels with its axes nearest to RAS+, z fastest in memory, and its affine.

    Returns
    -------
    voxels : (x, y, z)
    affine : (4, 4) float64
    """
    order = orientations.io_orientation(volume.grid.affine)
    voxels = orientations.apply_orientation(volume.data, order)
    turn = orientations.inv_ornt_aff(order, volume.grid.shape)
    return np.ascontiguousarray(voxels), volume.grid.affine @ turn


STREAM_TARGETS: dict[str, Callable[[Address], StreamTarget]] = {
    "afni": AfniTarget,
    "mrd": MrdTarget,
    "murfi": MurfiTarget,
    "pyneal": PynealTarget,
    "tcp": TcpTarget,
    "zmq": ZmqTarget,
}
"""By scheme."""


def _series(stranger: bool) -> str:
    return f"1.{_STRANGERS if stranger else _OURS}"


def _bytes(voxels: NDArray[Any], share: float) -> memoryview:
    """Return so much of some voxels (n,), without a copy on little-endian machines."""
    data = voxels.astype(voxels.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
    return data[: math.floor(len(data) * share)]

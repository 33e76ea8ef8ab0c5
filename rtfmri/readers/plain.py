"""Our own protocol, for those who write a sender themselves; docs/protocol.md tells it.

A message is a JSON header and a volume's voxels. On TCP the header's length goes before it, as
uint32; over ZeroMQ (PUSH to PULL) the two are the frames of one message.
"""

import hashlib
import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtfmri.errors import VolumeError
from rtfmri.readers import CUT_SHORT, Skipped
from rtfmri.readers.network import Address, Allowed, parse_address
from rtfmri.readers.stream import (
    MAX_HEADER_BYTES,
    MAX_INDEX,
    Incoming,
    Item,
    NotOurs,
    RunReader,
    StreamReader,
    checked_shape,
    make_volume,
    parsing,
)
from rtfmri.readers.zeromq import ZmqReader
from rtfmri.volume import VOXEL_DTYPES, Volume, unflatten

TCP_PORT = 5678
ZMQ_PORT = 5679
VERSION = 1
LENGTH = struct.Struct("<I")
_DTYPES = {dtype.name: dtype.newbyteorder("<") for dtype in VOXEL_DTYPES}


@dataclass(frozen=True, slots=True)
class Header:
    """What goes before a volume's voxels."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    affine: Any
    index: int
    tr_s: float | None
    acquired_s: float | None
    slice_times_s: list[float | None] | None
    series: bytes | None

    @property
    def name(self) -> str:
        """Of the volume, for whoever counts what is skipped."""
        return f"volume {self.index}"

    @property
    def n_voxels(self) -> int:
        """How many voxels follow."""
        return self.shape[0] * self.shape[1] * self.shape[2]


def pack_header(volume: Volume, series: str) -> bytes:
    """Return the header of *volume*."""
    fields: dict[str, Any] = {
        "rtfmri": VERSION,
        "shape": volume.grid.shape,
        "dtype": volume.data.dtype.name,
        "affine": volume.grid.affine.tolist(),
        "tr_s": volume.tr_s,
        "index": volume.index,
        "series": series,
    }
    for name in ("acquired_s", "slice_times_s"):
        if getattr(volume, name) is not None:
            fields[name] = getattr(volume, name)
    return json.dumps(fields).encode()


def pack_end() -> bytes:
    """Return the header that ends a run."""
    return json.dumps({"rtfmri": VERSION, "end": True}).encode()


def parse_header(data: bytes) -> Header | None:
    """Read a header; None is the end of the run.

    Raises
    ------
    NotOurs
        If it is no header, or does not tell how many voxels follow.
    """
    if len(data) > MAX_HEADER_BYTES:
        raise NotOurs
    with parsing():
        fields = json.loads(data)
        if fields["rtfmri"] != VERSION:
            raise NotOurs
        if fields.get("end") is True:
            return None
        acquired_s, times_s = fields.get("acquired_s"), fields.get("slice_times_s")
        series, index = fields.get("series"), int(fields["index"])
        if not 0 <= index <= MAX_INDEX:
            raise NotOurs
        return Header(
            shape=checked_shape(fields["shape"]),
            dtype=_DTYPES[fields["dtype"]],
            affine=np.array(fields["affine"], np.float64),
            index=index,
            tr_s=None if fields.get("tr_s") is None else float(fields["tr_s"]),
            acquired_s=None if acquired_s is None else float(acquired_s),
            slice_times_s=None if times_s is None else [float(time_s) for time_s in times_s],
            series=None if series is None else _digest(str(series)),
        )


def open_tcp(
    target: str, tr_s: float | None, *, allow: Allowed | None = None, **options: Any
) -> "TcpReader":
    """Open a listener for the plain protocol over TCP; *options* are those of `StreamReader`."""
    return TcpReader(parse_address(target, TCP_PORT, allow), tr_s, allow=allow, **options)


def open_zmq(
    target: str, tr_s: float | None, *, allow: Allowed | None = None, **options: Any
) -> "PullReader":
    """Open a listener for the plain protocol over ZeroMQ; *options* are those of `ZmqReader`."""
    return PullReader(parse_address(target, ZMQ_PORT, allow), tr_s, allow=allow, **options)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class _PlainReader(RunReader):
    def _volume(self, header: Header, flat: Any, arrived_s: float) -> Iterator[Item]:
        try:
            volume = make_volume(
                unflatten(flat, header.shape),
                header.affine,
                index=header.index,
                tr_s=self._checked_tr(header.tr_s),
                arrived_s=arrived_s,
                acquired_s=header.acquired_s,
                slice_times_s=header.slice_times_s,
            )
        except VolumeError as error:
            yield Skipped(header.name, str(error))
            return
        yield from self._offer(volume, series=header.series)


class TcpReader(_PlainReader, StreamReader):
    """Reader of the plain protocol over TCP."""

    def _read(self, incoming: Incoming) -> Iterator[Item]:
        while True:
            (n_bytes,) = LENGTH.unpack(incoming.exactly(LENGTH.size))
            header = parse_header(incoming.exactly(n_bytes))
            incoming.welcome()
            if header is None:
                yield self._end()
                continue
            flat = np.empty(header.n_voxels, header.dtype)
            yield from self._volume(header, flat, incoming.voxels(header.name, flat))


class PullReader(_PlainReader, ZmqReader):
    """Reader of the plain protocol over ZeroMQ."""

    def __init__(self, address: Address, tr_s: float | None, **options: Any) -> None:
        super().__init__(address, "PULL", tr_s, **options)

    def _read(self, frames: list[Any]) -> Iterator[Item]:
        arrived_s = time.perf_counter()
        header = parse_header(frames[0].bytes)
        if header is None:
            yield self._end()
            return
        if len(frames) != 2:
            raise NotOurs
        data = frames[1].buffer
        if len(data) < header.n_voxels * header.dtype.itemsize:
            yield Skipped(header.name, CUT_SHORT)
            return
        flat = np.frombuffer(data, header.dtype, header.n_voxels)
        yield from self._volume(header, np.require(flat, requirements=["A", "W"]), arrived_s)

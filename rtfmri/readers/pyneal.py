"""Pyneal's protocol: a JSON header and raw voxels over a ZeroMQ PAIR, each answered.

Pyneal's scanner side says some words first, and goes on when they come back (src/scanReceiver.py
and pyneal_scanner of Pyneal). Voxels come z fastest; the affine is to RAS+.
"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from rtfmri.errors import SourceError, VolumeError
from rtfmri.readers import CUT_SHORT, Skipped
from rtfmri.readers.network import Address, Allowed, parse_address
from rtfmri.readers.stream import (
    INTRODUCTION_S,
    MAX_HEADER_BYTES,
    MAX_INDEX,
    Item,
    NotOurs,
    checked_shape,
    make_volume,
    parsing,
)
from rtfmri.readers.zeromq import ZmqReader

PORT = 5555
_HELLO_BYTES = 1024
_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64")


def open_pyneal(
    target: str, tr_s: float | None, *, allow: Allowed | None = None, **options: Any
) -> "PynealReader":
    """Open a listener for Pyneal's protocol; *options* are those of `ZmqReader`."""
    return PynealReader(parse_address(target, PORT, allow), tr_s, allow=allow, **options)


class PynealReader(ZmqReader):
    """Reader of Pyneal's protocol.

    A PAIR talks to one peer at a time; who connects and says nothing for 5 s is thrown out.
    """

    def __init__(self, address: Address, tr_s: float | None, **options: Any) -> None:
        self._header: dict[str, Any] | None = None
        self._monitor: Any = None
        self._peer: int | None = None
        self._deadline_s: float | None = None
        super().__init__(address, "PAIR", tr_s, **options)

    def _bind(self) -> Any:
        zmq, pair = self._zmq, super()._bind()
        self._monitor = pair.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        return pair

    def _look_after(self) -> None:
        from zmq.utils.monitor import recv_monitor_message

        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            begins, peer = event["event"] == self._zmq.EVENT_ACCEPTED, event["value"]
            if begins and self._peer is None:
                # Whoever connects besides will be sent away by ZeroMQ.
                self._peer, self._deadline_s = peer, time.monotonic() + INTRODUCTION_S
            elif not begins and peer == self._peer:
                self._peer = self._deadline_s = None
                if self._header is not None:
                    self.put(Skipped(f"volume {self._header['index']}", CUT_SHORT))
                self._header = None
        if self._deadline_s is not None and time.monotonic() > self._deadline_s:
            self._throw_out()

    def _throw_out(self) -> None:
        """Get rid of the peer: a PAIR can only do that by beginning anew."""
        self._tell_of_stranger()
        self._peer = self._deadline_s = self._header = None
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        for _ in range(50):
            try:
                self._socket = self._bind()
            except SourceError as error:  # the old one is not quite gone
                problem = error
                time.sleep(0.02)
            else:
                return
        self.put(problem)

    def _read(self, frames: list[Any]) -> Iterator[Item]:
        arrived_s = time.perf_counter()
        for frame in frames:
            if self._header is not None:
                header, self._header = self._header, None
                yield from self._volume(header, frame.buffer, arrived_s)
                self._reply(self._answer(header["index"]).encode())
            elif frame.bytes[:1] == b"{":
                self._header = _parse(frame.bytes)
                self._deadline_s = None
            elif len(frame) <= _HELLO_BYTES:
                self._reply(frame.bytes)
                self._deadline_s = None
            else:
                raise NotOurs

    def _reply(self, text: bytes) -> None:
        with suppress(self._zmq.Again):  # it is gone
            self._socket.send(text, self._zmq.NOBLOCK)

    def _answer(self, index: int) -> str:
        return f"Received vol {index}" + " - STOP" * (index + 1 == self.n_volumes)

    def _volume(self, header: dict[str, Any], data: Any, arrived_s: float) -> Iterator[Item]:
        name, shape, dtype = f"volume {header['index']}", header["shape"], header["dtype"]
        n_voxels = shape[0] * shape[1] * shape[2]
        if len(data) < n_voxels * dtype.itemsize:
            yield Skipped(name, CUT_SHORT)
            return
        try:
            volume = make_volume(
                np.frombuffer(data, dtype, n_voxels).reshape(shape),
                header["affine"],
                index=header["index"],
                tr_s=self._checked_tr(header["tr_s"]),
                arrived_s=arrived_s,
            )
        except VolumeError as error:
            yield Skipped(name, str(error))
            return
        yield from self._offer(volume)


def _parse(data: bytes) -> dict[str, Any]:
    """Read a header, whose affine is JSON within JSON."""
    if len(data) > MAX_HEADER_BYTES:
        raise NotOurs
    with parsing():
        fields = json.loads(data)
        affine, index = fields["affine"], int(fields["volIdx"])
        if fields["dtype"] not in _DTYPES or not 0 <= index <= MAX_INDEX:
            raise NotOurs
        return {
            "index": index,
            "shape": checked_shape(fields["shape"]),
            "dtype": np.dtype(fields["dtype"]).newbyteorder("<"),
            "affine": np.array(json.loads(affine) if isinstance(affine, str) else affine, float),
            "tr_s": float(fields["TR"]) if "TR" in fields else None,
        }

"""A program that listens to feedback, as a stimulus program does, and stamps what comes.

Run as a script of its own: ``python listener.py KIND ADDRESS N``. It knows nothing of rtfmri. It
prints ``ready``, and at the end, for each message, its number and `time.perf_counter`.
"""

import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_PATIENCE_S = 20.0


def zmq(address: str) -> Iterator[int]:
    """Yield the numbers of a PUB socket's messages."""
    import zmq

    subscriber: Any = zmq.Context.instance().socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVTIMEO, int(1e3 * _PATIENCE_S))
    subscriber.connect(f"tcp://{address}")
    subscriber.subscribe(b"rtfmri")
    _say_ready()
    while True:
        yield int(json.loads(subscriber.recv_multipart()[1])["index"])


def tcp(address: str) -> Iterator[int]:
    """Yield the numbers of the lines that a TCP output sends."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=_PATIENCE_S) as connection:
        connection.sendall(b"0\n")
        lines = connection.makefile("rb")
        lines.readline()
        _say_ready()
        for line in lines:
            yield int(json.loads(line)["index"])


def udp(address: str) -> Iterator[int]:
    """Yield the numbers of datagrams, which are told by their order."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        host, _, port = address.partition(":")
        receiver.bind((host, int(port)))
        receiver.settimeout(_PATIENCE_S)
        _say_ready()
        while True:
            yield round(struct.unpack(">f", receiver.recv(64))[0])


def ws(address: str) -> Iterator[int]:
    """Yield the numbers of a WebSocket's messages."""
    from websockets.sync.client import connect

    with connect(f"ws://{address}/") as connection:
        _say_ready()
        while True:
            yield int(json.loads(connection.recv(timeout=_PATIENCE_S))["index"])


def lsl(name: str) -> Iterator[int]:
    """Yield the numbers of an LSL stream of markers."""
    import pylsl

    (found,) = pylsl.resolve_byprop("name", name, timeout=_PATIENCE_S)
    inlet = pylsl.StreamInlet(found)
    inlet.open_stream(timeout=_PATIENCE_S)
    _say_ready()
    while True:
        sample, _ = inlet.pull_sample(timeout=_PATIENCE_S)
        if sample is None:
            return
        yield int(json.loads(sample[0])["index"])


def _say_ready() -> None:
    print("ready", flush=True)


def main() -> None:
    """Listen until the last message, or a long silence."""
    kinds: dict[str, Callable[[str], Iterator[int]]] = {
        "zmq": zmq,
        "tcp": tcp,
        "udp": udp,
        "ws": ws,
        "lsl": lsl,
    }
    kind, address, n = sys.argv[1:]
    stamps: dict[int, float] = {}
    try:
        for index in kinds[kind](address):
            stamps.setdefault(index, time.perf_counter())
            if index == int(n) - 1:
                break
    except Exception as error:  # silence, in the words of whatever is listened to
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    print(json.dumps(list(stamps.items())), flush=True)


if __name__ == "__main__":
    main()

"""From a result to a stimulus program: every output, to a listener in another process.

`time.perf_counter` is one clock for all processes of a machine on Linux (CLOCK_MONOTONIC).
"""

import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .measure import Plan, Row, Tables, percentiles_ms
from .tables import Layout, number, text

N, PACE_S = 520, 0.02
FIRST = 20
"""Messages left out of the percentiles."""
_N_DEAF = 4
_LISTENER = Path(__file__).with_name("listener.py")


class Way(NamedTuple):
    """An output, its listener, and what both need."""

    name: str
    uri: str
    kind: str
    package: str | None = None
    deaf: bool = False
    """Whether there are also clients that never read."""


WAYS = (
    Way("ZeroMQ", "zmq://127.0.0.1:0", "zmq", "zmq"),
    Way("LSL", "lsl:", "lsl", "pylsl"),
    Way("TCP", "tcp://127.0.0.1:0", "tcp"),
    Way("TCP, beside clients that never read", "tcp://127.0.0.1:0", "tcp", deaf=True),
    Way("WebSocket", "ws://127.0.0.1:0", "ws", "websockets"),
    Way("UDP", "udp://127.0.0.1:{port}", "udp"),
)


LAYOUTS = {
    "outputs": Layout(
        "From a volume's result to a stimulus program, in another process",
        (
            ("output", text("output")),
            ("n", number(0, "n")),
            ("lost", number(0, "lost")),
            *(
                (f"{p} ms" if p == "p50" else p, number(3, "latency", f"{p}_ms"))
                for p in ("p50", "p95", "p99", "max")
            ),
            *(
                (f"handing over, {p} ms" if p == "p50" else p, number(4, "send", f"{p}_ms"))
                for p in ("p50", "p99")
            ),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``outputs``; they do not depend on backend or grid."""
    rows: list[Row] = []
    for way in WAYS:
        plan.progress(f"outputs, {way.name}")
        if way.package and not find_spec(way.package):
            rows.append({"skipped": f"{way.name}: {way.package} is not installed"})
            continue
        rows.append(_row(way))
    return {"outputs": rows}


def _row(way: Way) -> Row:
    from rtfmri.feedback.message import Run
    from rtfmri.feedback.outputs import Outputs

    port = _free_port()
    uri = way.uri.format(port=port)
    sent_s, handed_s = [], []
    with Outputs([uri]) as outputs, ExitStack() as stack:
        outputs.begin(Run(PACE_S, N, ("baseline",), ("left",), ("left",)))
        outputs.send(_message(0))  # what is asked for, so that a listener knows it is heard
        outputs.settle()
        address = outputs.addresses().get(uri, f"127.0.0.1:{port}")
        for _ in range(_N_DEAF if way.deaf else 0):
            host, _, where = address.partition(":")
            deaf = stack.enter_context(socket.create_connection((host, int(where))))
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(b"0\n")
        listener = _start(way.kind, "rtfmri-events" if way.kind == "lsl" else address)
        start_s = time.perf_counter()
        for index in range(N):
            time.sleep(max(0.0, start_s + index * PACE_S - time.perf_counter()))
            message = _message(index)
            before_s = time.perf_counter()
            outputs.send(message)
            handed_s.append(time.perf_counter() - before_s)
            sent_s.append(before_s)
        stamps = _end(listener)
    latencies_s = [at_s - sent_s[i] for i, at_s in stamps.items() if i >= FIRST]
    return {
        "output": way.name,
        "n": len(latencies_s),
        "lost": N - FIRST - len(latencies_s),
        "latency": percentiles_ms(latencies_s),
        "send": percentiles_ms(handed_s[FIRST:]),
    }


def _start(kind: str, address: str) -> "subprocess.Popen[str]":
    command: Sequence[str] = [sys.executable, str(_LISTENER), kind, address, str(N)]
    listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert listener.stdout
    listener.stdout.readline()
    time.sleep(0.5)  # a subscription needs some time to get there
    return listener


def _end(listener: "subprocess.Popen[str]") -> dict[int, float]:
    told, _ = listener.communicate(timeout=60)
    return {int(index): at_s for index, at_s in json.loads(told.splitlines()[-1])}


def _message(index: int) -> Any:
    from rtfmri.feedback.message import Message

    return Message(
        index=index,
        time_s=PACE_S * index,
        condition="up",
        feedback=float(index),  # UDP has no other place for the number
        signals={"left": 0.1, "right": math.nan},
        roi={"left": 0.1, "right": math.nan},
        quality={"usable": True, "problems": [], "fd_mm": 0.1},
        missing=False,
        latency_ms=2.0,
    )


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

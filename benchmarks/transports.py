"""From the scanner's side to a decoded volume: one table of transports, one of decoding alone.

A second process sends, as a scanner would, through the simulator's own targets. On Linux
`time.perf_counter` is one clock for all processes of a machine (CLOCK_MONOTONIC), so that what the
sender stamps and what the reader stamps can be subtracted.
"""

import errno
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from rtfmri.errors import RtfmriError
from rtfmri.volume import Volume, as_voxels, untiled

from .measure import Plan, Tables, grid_name
from .tables import Layout, number, text

SHAPES = ((64, 64, 48), (104, 104, 72))
"""384 KB, and a multiband volume."""
N_VOLUMES = 100
PACE_S = 0.05
FIRST = 5
"""Volumes left out of the percentiles: connections are made, headers read for the first time."""
N_DECODED = 200


_NO_EVENTS = mock.patch(
    "watchdog.observers.api.BaseObserver.start",
    side_effect=OSError(errno.ENOSPC, "left out, as on a network share"),
)


class _Transport(NamedTuple):
    name: str
    source: str
    target: str
    polled: bool = False
    """Whether file-system events are kept away, as they are on a network share."""


TRANSPORTS = (
    _Transport("folder, local", "folder:{folder}", "folder:{folder}"),
    _Transport("folder, polled as on a share", "folder:{folder}", "folder:{folder}", polled=True),
    _Transport("C-STORE, one association", "dicom://:0", "dicom://{address}"),
    _Transport("MRD", "mrd://:0", "mrd://{address}"),
    _Transport("AFNI", "afni://:0", "afni://{address}"),
    _Transport("murfi vSend", "murfi://:0", "murfi://{address}"),
    _Transport("Pyneal, ZeroMQ", "pyneal://:0", "pyneal://{address}"),
    _Transport("ours, TCP", "tcp://:0", "tcp://{address}"),
    _Transport("ours, ZeroMQ", "zmq://:0", "zmq://{address}"),
)


LAYOUTS = {
    "transports": Layout(
        "From the scanner's side, in another process, to a decoded volume",
        (
            ("transport", text("transport")),
            ("grid", text("grid")),
            ("KB", number(0, "kb")),
            ("n", number(0, "n")),
            ("lost", number(0, "lost")),
            ("from first byte, p50 ms", number(2, "first_byte", "p50_ms")),
            ("p95", number(2, "first_byte", "p95_ms")),
            ("from last byte, p50 ms", number(2, "last_byte", "p50_ms")),
            ("p95", number(2, "last_byte", "p95_ms")),
        ),
    ),
    "decode": Layout(
        "Decoding a Siemens mosaic, against reading the file and cutting it up alone",
        (
            ("grid", text("grid")),
            ("read + cut ms", number(3, "bare_ms")),
            ("decode ms", number(3, "median_ms")),
            ("times", number(2, "times")),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the tables ``transports`` and ``decode``.

    Volumes have sizes of their own: what a transport costs does not depend on the backend.
    """
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for transport in TRANSPORTS:
            plan.progress(f"transports, {transport.name}, {grid_name(shape)}")
            folder = transport.source.startswith("folder:")
            try:
                sent_s, returned_s, volumes = _transfer(transport, shape)
            except (RtfmriError, ImportError) as error:
                rows.append({"skipped": f"{transport.name}: {error}"})
                continue
            rows.append(
                {
                    "transport": transport.name,
                    "grid": grid_name(shape),
                    "kb": 2 * int(np.prod(shape)) / 1024,
                    "n": len(volumes) - FIRST,
                    "lost": N_VOLUMES - len(volumes),
                    "first_byte": _percentiles([v.decoded_s - sent_s[v.index] for v in volumes]),
                    # A file's last byte is there when its writer is done, which may be before the
                    # reader looks; a connection's, when the reader has it.
                    "last_byte": _percentiles(
                        [
                            v.decoded_s
                            - (min(returned_s[v.index], v.arrived_s) if folder else v.arrived_s)
                            for v in volumes
                        ]
                    ),
                }
            )
    plan.progress("decode")
    try:
        decoded = [_decode(shape) for shape in SHAPES]
    except ImportError as error:
        decoded = [{"skipped": str(error)}]
    return {"transports": rows, "decode": decoded}


def _percentiles(values_s: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values_s[FIRST:], [50, 95, 99])
    return {"p50_ms": 1e3 * p50, "p95_ms": 1e3 * p95, "p99_ms": 1e3 * p99}


def _transfer(
    transport: _Transport, shape: tuple[int, int, int]
) -> tuple[list[float], list[float], list[Volume]]:
    """Return when each volume began to be sent, when sending returned, and what arrived."""
    from rtfmri.readers import open_reader

    with tempfile.TemporaryDirectory() as folder:
        with _NO_EVENTS if transport.polled else nullcontext():
            source = transport.source.format(folder=folder)
            reader: Any = open_reader(f"{source}?count={N_VOLUMES}&timeout_s=10", tr_s=PACE_S)
        where = getattr(reader, "address", None)
        target = transport.target.format(
            folder=folder, address=where and f"{where.host}:{where.port}"
        )
        script = Path(__file__).with_name("sender.py")
        command = [sys.executable, str(script), target, grid_name(shape)]
        command += [str(N_VOLUMES), str(PACE_S)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
            try:
                # A sender that cannot send must not be waited for.
                watch = threading.Thread(target=_close_after, args=(sender, reader))
                watch.start()
                volumes = [item for item in reader if isinstance(item, Volume)]
                watch.join(timeout=60)
            finally:
                reader.close()
                sender.kill()
            assert sender.stdout is not None
            found = json.loads(sender.stdout.read())
    if isinstance(found, str):
        raise RtfmriError(found)
    return *found, volumes


def _close_after(sender: "subprocess.Popen[str]", reader: Any) -> None:
    """Close the reader some time after the sender has ended, if it still waits."""
    sender.wait()
    time.sleep(1.0)
    reader.close()


def _decode(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return what decoding a Siemens mosaic costs beside reading and cutting it up alone."""
    from rtfmri.readers.dicom import Assembly
    from rtfmri.simulator.targets import open_target

    from .sender import volumes

    with tempfile.TemporaryDirectory() as folder:
        target = open_target(f"folder:{folder}")
        for volume in volumes(shape, 20, PACE_S):
            target.send(volume)
        target.close()
        files = sorted(Path(folder).iterdir())
        tiles = int(np.ceil(np.sqrt(shape[2])))
        n_bytes = 2 * shape[0] * shape[1] * tiles**2
        bare_s, whole_s = [], []
        assembly = Assembly(PACE_S)
        for i in range(N_DECODED):
            path = files[i % len(files)]
            start_s = time.perf_counter()
            data = path.read_bytes()
            pixels = np.frombuffer(data[-n_bytes:], np.int16).reshape(tiles * shape[1], -1)
            as_voxels(untiled(pixels, shape))
            middle_s = time.perf_counter()
            assembly.add(path.read_bytes(), path.name, middle_s)
            bare_s.append(middle_s - start_s)
            whole_s.append(time.perf_counter() - middle_s)
    bare_ms, whole_ms = (1e3 * float(np.median(values[FIRST:])) for values in (bare_s, whole_s))
    return {
        "grid": grid_name(shape),
        "bare_ms": bare_ms,
        "median_ms": whole_ms,
        "times": whole_ms / bare_ms,
    }

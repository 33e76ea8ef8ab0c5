"""From the scanner's side to a decoded volume, on every transport.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from rtfmri.errors import RtfmriError
from rtfmri.volume import Grid, Volume

from .measure import Plan, Tables, grid_name, percentiles_ms
from .sender import save_images
from .tables import Layout, number, text

SHAPES = ((64, 64, 48), (104, 104, 72))
"""384 KB, and a multiband volume."""
N_VOLUMES = 100
PACE_S = 0.05
FIRST = 5
"""Volumes left out of the percentiles: connections are made, headers read for the first time."""
_SILENCE_S = 10
"""That long without a volume ends a run of which volumes were lost."""
_PATIENCE_S = 60.0

_NO_EVENTS = mock.patch(
    "watchdog.observers.api.BaseObserver.start",
    side_effect=OSError(errno.ENOSPC, "left out, as on a network share"),
)


class Transport(NamedTuple):
    """A name, and the two ends as `open_reader` and `open_target` name them."""

    name: str
    source: str
    target: str
    polled: bool = False
    """Whether file-system events are kept away, as they are on a network share."""


TRANSPORTS = (
    Transport("folder, local", "folder:{folder}", "folder:{folder}"),
    Transport("folder, polled as on a share", "folder:{folder}", "folder:{folder}", polled=True),
    Transport("C-STORE, one association", "dicom://:0", "dicom://{address}"),
    Transport("MRD", "mrd://:0", "mrd://{address}"),
    Transport("AFNI", "afni://:0", "afni://{address}"),
    Transport("murfi vSend", "murfi://:0", "murfi://{address}"),
    Transport("Pyneal, ZeroMQ", "pyneal://:0", "pyneal://{address}"),
    Transport("ours, TCP", "tcp://:0", "tcp://{address}"),
    Transport("ours, ZeroMQ", "zmq://:0", "zmq://{address}"),
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
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``transports``.

    Volumes have sizes of their own: what a transport costs does not depend on the backend.
    """
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder) / "noise.npz"
            _save_noise(images, shape)
            for transport in TRANSPORTS:
                plan.progress(f"transports, {transport.name}, {grid_name(shape)}")
                try:
                    rows.append(_row(transport, shape, images))
                except (RtfmriError, ImportError) as error:
                    rows.append({"skipped": f"{transport.name}: {error}"})
    return {"transports": rows}


def _row(transport: Transport, shape: tuple[int, int, int], images: Path) -> dict[str, Any]:
    folder = transport.source.startswith("folder:")
    sent_s, returned_s, volumes = _transfer(transport, images)
    return {
        "transport": transport.name,
        "grid": grid_name(shape),
        "kb": 2 * int(np.prod(shape)) / 1024,
        "n": len(volumes) - FIRST,
        "lost": N_VOLUMES - len(volumes),
        "first_byte": percentiles_ms([v.decoded_s - sent_s[v.index] for v in volumes[FIRST:]]),
        # A file's last byte is there when its writer is done, which may be before the reader
        # looks; a connection's, when the reader has it.
        "last_byte": percentiles_ms(
            [
                v.decoded_s - (min(returned_s[v.index], v.arrived_s) if folder else v.arrived_s)
                for v in volumes[FIRST:]
            ]
        ),
    }


class Feed:
    """A scanner in a process of its own, and the reader that it sends to: see `feeding`.

    Attributes
    ----------
    reader : Reader
    """

    def __init__(self, reader: Any, command: Sequence[str]) -> None:
        self.reader = reader
        self._sender = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._sender.stdin is not None
        assert self._sender.stdout is not None
        self._to_sender, self._from_sender = self._sender.stdin, self._sender.stdout
        self._problem: str | None = None
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._close_reader)
        self._watch.start()

    def ask(self) -> None:
        """Let the next volume come, of those that come when they are asked for."""
        with suppress(BrokenPipeError):  # then `stamps` says why
            self._to_sender.write(b"\n")

    def stamps(self) -> tuple[list[float], list[float]]:
        """Return when each volume began to be sent and when that was done, once all are sent.

        Raises
        ------
        RtfmriError
            If the scanner could not send.
        """
        self._over.set()
        self.reader.close()
        self._to_sender.close()
        self._watch.join()
        if self._problem:
            raise RtfmriError(self._problem)
        before_s, after_s = json.loads(self._from_sender.read())
        return before_s, after_s

    def close(self) -> None:
        """End both."""
        self._over.set()
        self.reader.close()
        with self._sender:
            self._sender.kill()
        self._watch.join()

    def _close_reader(self) -> None:
        """Close the reader when nothing will come: it waits for its first volume for ever."""
        said = self._from_sender.readline() or b'"the sender broke off"'
        self._problem = json.loads(said)
        if self._problem or not self._over.wait(_PATIENCE_S):
            self.reader.close()


@contextmanager
def feeding(
    transport: Transport,
    images: Path,
    n_volumes: int,
    pace_s: float,
    *,
    tr_s: float,
    n_asked: int = 1,
) -> Iterator[Feed]:
    """Start a scanner and open the reader that it sends to, and end both.

    Parameters
    ----------
    transport : Transport
    images : Path
        What is sent in turn, as `sender.save_images` wrote it.
    n_volumes : int
    pace_s : float
        Seconds from one volume to the next.
    tr_s : float
        What the reader takes for the TR.
    n_asked : int
        How many of the first volumes come only when they are asked for; at least 1.

    Raises
    ------
    RtfmriError, ImportError
        If the reader cannot be had.
    """
    from rtfmri.readers import open_reader

    with tempfile.TemporaryDirectory() as folder:
        with _NO_EVENTS if transport.polled else nullcontext():
            source = f"{transport.source.format(folder=folder)}?timeout_s={_SILENCE_S}"
            reader: Any = open_reader(source, tr_s=tr_s)
        where = getattr(reader, "address", None)
        address = where and f"{where.host}:{where.port}"
        target = transport.target.format(folder=folder, address=address)
        script = Path(__file__).with_name("sender.py")
        numbers = (n_volumes, pace_s, n_asked)
        feed = Feed(reader, [sys.executable, str(script), target, str(images), *map(str, numbers)])
        try:
            yield feed
        finally:
            feed.close()


def _transfer(transport: Transport, images: Path) -> tuple[list[float], list[float], list[Volume]]:
    """Return when each volume began to be sent, when that was done, and what arrived."""
    with feeding(transport, images, N_VOLUMES, PACE_S, tr_s=PACE_S) as feed:
        feed.ask()
        volumes = []
        for item in feed.reader:
            if isinstance(item, Volume):
                volumes.append(item)
                if item.index == N_VOLUMES - 1:
                    break
        return *feed.stamps(), volumes


def _save_noise(path: Path, shape: tuple[int, int, int]) -> None:
    """Write a few images of noise, so that nothing can be compressed."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 4000, shape, np.int16) for _ in range(4)]
    save_images(path, images, Grid(shape, np.diag([3.0, 3.0, 3.0, 1.0])))

"""Volumes without a pause for as long as one likes: whether anything grows, or slows down."""

import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from rtfmri.timing import LatencyHistogram
from rtfmri.volume import Volume

from .latency import HEADER_TR_S, N_FIRST, lacking, open_session, quiet, work
from .measure import Plan, Row, Tables, grid_name
from .phantom import Phantom, drifting
from .tables import Layout, number, text

ONE_RUN, RECORDED = "one run", "recorded runs"
"""One run that is not recorded, or one recorded run after another."""
WARM_UP = 100
"""Volumes before the watch begins: each condition takes its memory when it first comes."""
RECORDING_BYTES = 1 << 30
"""Most of what the volumes of a recording take; it is removed before the next one begins."""
N_PARTS, N_SAMPLES = 10, 200
"""Parts of the time that have percentiles of their own; looks at the memory."""
_PROCESS = Path("/proc/self")


def _both(what: str) -> Callable[[Row], str]:
    return lambda row: f"{row['start'][what]}, {row['end'][what]}"


LAYOUTS = {
    "soak": Layout(
        "Volumes without a pause",
        (
            ("grid", text("grid")),
            ("what", text("what")),
            ("minutes", number(1, "minutes")),
            ("runs", number(0, "runs")),
            ("volumes", number(0, "n")),
            ("a second", number(1, "volumes_per_s")),
            ("first tenth, p50 ms", number(2, "first", "p50_ms")),
            ("p99", number(2, "first", "p99_ms")),
            ("last tenth, p50 ms", number(2, "last", "p50_ms")),
            ("p99", number(2, "last", "p99_ms")),
            ("last / first, p50", number(2, "last_to_first", "p50_ms")),
            ("p99", number(2, "last_to_first", "p99_ms")),
            ("memory at start, MB", number(0, "start", "resident_mb")),
            ("end", number(0, "end", "resident_mb")),
            ("most", number(0, "most_resident_mb")),
            ("KiB / 1000 volumes", number(1, "kib_per_1000")),
            ("files", _both("files")),
            ("threads", _both("threads")),
            ("GPU pool, MB", number(0, "end", "gpu_pool_mb")),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``soak``, two a grid, each of half of the plan's minutes."""
    if lacks := lacking():
        return {"soak": [lacks]}
    if not _PROCESS.exists():
        return {"soak": [{"skipped": "what a process holds stands in /proc, which is not here"}]}
    rows = []
    for shape in plan.grids:
        for what in (ONE_RUN, RECORDED):
            plan.progress(f"soak, {grid_name(shape)}, {what}")
            rows.append({"grid": grid_name(shape), "what": what, **_soak(plan, shape, what)})
    return {"soak": rows}


def _soak(plan: Plan, shape: tuple[int, int, int], what: str) -> Row:
    flood, watch = Flood(shape), Watch(plan.minutes / 2, plan.backend.name)
    over, n_runs, most = False, 0, math.inf
    with tempfile.TemporaryDirectory() as folder, quiet():
        out = None
        if what == RECORDED:
            out = Path(folder) / "run.h5"
            room = min(RECORDING_BYTES, shutil.disk_usage(folder).free // 4)
            most = max(2 * WARM_UP, room // (2 * math.prod(shape)))
        while not over:
            with open_session(plan, shape, flood.again(), HEADER_TR_S, out=out) as session:
                for result in session:
                    if n_runs or result.index >= WARM_UP:
                        over = watch.add(result.latency_ms, counts=result.index >= N_FIRST)
                    if over or result.index + 1 >= most:
                        break
                done = work(session.pipeline)
            if out:
                out.unlink()
            n_runs += 1
    return {**done, "runs": n_runs, **watch.row()}


class Flood:
    """A reader whose next volume is always there: a head that drifts.

    Parameters
    ----------
    shape : (int, int, int)
        x, y, z of its volumes.
    """

    live = False
    n_volumes: int | None = None

    def __init__(self, shape: tuple[int, int, int]) -> None:
        phantom = Phantom(shape)
        self._grid, self._images = phantom.grid, drifting(phantom)
        self._closed = threading.Event()

    def again(self) -> "Flood":
        """Return the same, to be iterated from its first volume on by another session."""
        self._closed = threading.Event()
        return self

    def __iter__(self) -> Iterator[Volume]:
        """Give volumes until it is closed."""
        closed = self._closed
        for i in count():
            if closed.is_set():
                return
            yield Volume(self._images[i % len(self._images)], self._grid, i, HEADER_TR_S)

    def close(self) -> None:
        """End the iteration."""
        self._closed.set()


class Watch:
    """Looks at volumes' times and at what the process holds, in memory that does not grow.

    Parameters
    ----------
    minutes : float
        For how long, from the first volume on.
    device : str
        "cuda" looks at the GPU's memory, too.

    Attributes
    ----------
    n_volumes : int
        How many there were.
    """

    def __init__(self, minutes: float, device: str) -> None:
        self._whole_s, self._device = 60 * minutes, device
        self._parts = [LatencyHistogram() for _ in range(N_PARTS)]
        self._samples = np.zeros((N_SAMPLES + 1, 2))
        self.n_volumes = self._n_samples = 0
        self._started_s = self._passed_s = 0.0
        self._start: Row = {}
        self._end: Row = {}

    def add(self, latency_ms: float, *, counts: bool = True) -> bool:
        """Take a volume, whose time *counts* or not; tell whether it has watched long enough."""
        if not self.n_volumes:
            self._start, self._started_s = held(self._device), time.perf_counter()
        self.n_volumes += 1
        self._passed_s = time.perf_counter() - self._started_s
        part = self._passed_s / self._whole_s
        if counts:
            self._parts[min(int(N_PARTS * part), N_PARTS - 1)].add(latency_ms)
        if self._n_samples <= min(1.0, part) * N_SAMPLES:
            self._samples[self._n_samples] = self.n_volumes, resident_mb()
            self._n_samples += 1
        if part >= 1:
            self._end = held(self._device)
        return part >= 1

    def row(self) -> Row:
        """Return what it saw, once it has watched long enough."""
        n_volumes, memory_mb = self._samples[: self._n_samples].T
        parts = [part for part in self._parts if part.count]
        medians_ms = [part.percentile_ms(50) for part in parts]
        first, last = (
            {"p50_ms": part.percentile_ms(50), "p99_ms": part.percentile_ms(99)}
            for part in (parts[0], parts[-1])
        )
        return {
            "minutes": self._passed_s / 60,
            "n": self.n_volumes,
            "volumes_per_s": self.n_volumes / self._passed_s,
            "first": first,
            "last": last,
            "last_to_first": {name: last[name] / first[name] for name in first},
            "max_ms": max(part.max_ms for part in parts),
            "noise": (max(medians_ms) - min(medians_ms)) / 2 / float(np.median(medians_ms)),
            "start": self._start,
            "end": self._end,
            "most_resident_mb": float(memory_mb.max()),
            "kib_per_1000": 1e9 / 1024 * float(np.polyfit(n_volumes, memory_mb, 1)[0]),
        }


def held(device: str) -> Row:
    """Return what this process holds: memory in MB, open files, threads."""
    holds: Row = {
        "resident_mb": resident_mb(),
        "files": _count("fd"),
        "threads": _count("task"),
    }
    if device == "cuda":
        import cupy

        holds["gpu_pool_mb"] = 1e-6 * cupy.get_default_memory_pool().total_bytes()
    return holds


def _count(what: str) -> int:
    return sum(1 for _ in (_PROCESS / what).iterdir())


def resident_mb() -> float:
    """Return the memory that this process has in RAM, in 1e6 bytes."""
    pages = int((_PROCESS / "statm").read_text(encoding="ascii").split()[1])
    return 1e-6 * pages * os.sysconf("SC_PAGE_SIZE")

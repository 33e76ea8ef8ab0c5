"""From the scanner's side, in another process, to the result: every transport, many TRs.

Once with the machine to itself, once beside a process that keeps one of its processors busy, and
once with that processor left to it.
"""

import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from rtfmri.config import Config, GlmSettings, MaskSettings, OrderSettings, SmoothingSettings
from rtfmri.errors import RtfmriError
from rtfmri.machine import usable_threads
from rtfmri.paradigm import Event

from .measure import Plan, Row, Tables, grid_name, percentiles_ms
from .phantom import Phantom, drifting
from .sender import save_images
from .tables import Layout, number, text
from .transports import TRANSPORTS, Feed, Transport, feeding

TRS_S = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Paces of the scanner, over `TCP`."""
COMMON_S = 0.5
"""The pace at which the other transports are compared."""
TCP = next(transport for transport in TRANSPORTS if transport.name == "ours, TCP")
COMPARED = tuple(
    transport
    for transport in TRANSPORTS
    if transport.name in ("folder, local", "C-STORE, one association", "MRD")
)
N_FIRST = 5
"""Volumes that come one by one, each when the one before it is done, and are left out: at the very
first the brain is found and the reference made, which the next ones would have to wait for."""
N_PER_MINUTE = 5
"""Volumes of a run, for each minute of the plan and divided by the square root of the TR in s."""
_FEWEST = 3
MOST_VOXELS_PER_S = 8e6
"""More at a pace is several times what the fastest sequences give."""
PERCENTS = (*range(100), 99.5, 99.9, 100)
"""What `quantiles_ms` are the quantiles for."""
HEADER_TR_S = 1.0
"""What paradigm and design take for the TR, so that they are the same at every pace."""
_FWHM_MM = 6.0
_TASKS, _BLOCK_S, _TASK_S = ("left", "right"), 15.0, 400.0
IDLE, BUSY, SPARED = "idle", "busy", "busy, a thread fewer"
NO_PINNING = "a busy neighbour: this system pins no process to a processor"
_SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""


LAYOUTS = {
    "latency": Layout(
        "From the scanner's side, in another process, to the result",
        (
            ("grid", text("grid")),
            ("transport", text("transport")),
            ("TR ms", number(0, "tr_ms")),
            ("neighbour", text("neighbour")),
            ("n", number(0, "n")),
            ("lost", number(0, "lost")),
            ("late", number(0, "missed")),
            *(
                (f"{'from last byte, ' if p == 'p50' else ''}{p} ms", number(1, f"{p}_ms"))
                for p in ("p50", "p95", "p99", "max")
            ),
            *(
                (
                    f"{'from first byte, ' if p == 'p50' else ''}{p} ms",
                    number(1, "sent", f"{p}_ms"),
                )
                for p in ("p50", "p99")
            ),
            ("first volume", number(0, "first_ms")),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``latency``, one a grid, transport, TR and neighbour."""
    if lacks := lacking():
        return {"latency": [lacks]}
    rows: list[Row] = [] if can_pin() else [{"skipped": NO_PINNING}]
    for shape in plan.grids:
        with saved_phantom(shape) as images:
            for transport, tr_s in (
                *((TCP, tr_s) for tr_s in TRS_S),
                *((transport, COMMON_S) for transport in COMPARED),
            ):
                what = f"{grid_name(shape)}, {transport.name}, every {tr_s:g} s"
                if math.prod(shape) / tr_s > MOST_VOXELS_PER_S:
                    most = f"{MOST_VOXELS_PER_S / 1e6:g} million voxels a second"
                    rows.append({"skipped": f"{what}: no scanner gives more than {most}"})
                    continue
                spared = (transport, tr_s) == (TCP, COMMON_S) and can_spare(plan)
                for neighbour in (*neighbours(), *((SPARED,) if spared else ())):
                    plan.progress(f"latency, {what}, neighbour {neighbour}")
                    try:
                        rows.append(_row(plan, shape, images, transport, tr_s, neighbour))
                    except (RtfmriError, ImportError) as error:
                        rows.append({"skipped": f"{what}: {error}"})
                        break
    return {"latency": rows}


def _row(
    plan: Plan,
    shape: tuple[int, int, int],
    images: Path,
    transport: Transport,
    tr_s: float,
    neighbour: str,
) -> Row:
    n = max(_FEWEST, round(N_PER_MINUTE * plan.minutes / math.sqrt(tr_s)))
    with (
        tempfile.TemporaryDirectory() as folder,
        with_neighbour(neighbour),
        _threads(neighbour) as threads,
        quiet(),
        feeding(transport, images, N_FIRST + n, tr_s, tr_s=HEADER_TR_S, n_asked=N_FIRST) as feed,
    ):
        out = Path(folder) / "run.h5"
        session = open_session(plan, shape, feed.reader, tr_s, out=out, threads=threads)
        try:
            with session:
                taken = list(results(feed, session, N_FIRST + n))
                pipeline = session.pipeline
        except RtfmriError:
            feed.stamps()  # if it could not send, it says why
            raise
        sent_s, _ = feed.stamps()
    first_ms, taken = 1e3 * taken[0].latency_s, [t for t in taken if t.index >= N_FIRST]
    latencies_s = [t.latency_s for t in taken]
    return {
        "grid": grid_name(shape),
        "transport": transport.name,
        "tr_ms": 1e3 * tr_s,
        "neighbour": neighbour,
        **work(pipeline),
        "n": len(taken),
        "lost": n - len(taken),
        "missed": sum(t.missed for t in taken),
        "first_ms": first_ms,
        **percentiles_ms(latencies_s),
        "quantiles_ms": quantiles_ms(latencies_s),
        "sent": percentiles_ms([t.done_s - sent_s[t.index] for t in taken]),
    }


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a volume: from its last byte to its result, when that was there, if late."""

    index: int
    latency_s: float
    done_s: float
    missed: bool


def results(feed: Feed, session: Any, n_volumes: int) -> Iterator[Taken]:
    """Give what becomes of each volume of a run of *n_volumes*, the first `N_FIRST` one by one."""
    feed.ask()
    for result in session:
        done_s = time.perf_counter()
        if result.index + 1 < N_FIRST:
            feed.ask()
        if not result.missing:
            yield Taken(result.index, 1e-3 * result.latency_ms, done_s, result.deadline_missed)
        if result.index == n_volumes - 1:
            return


def lacking() -> Row | None:
    """Return a row that names what a `Session` needs and is not there, if anything is."""
    absent = (name for name in ("h5py", "nibabel") if not find_spec(name))
    return next(({"skipped": f"{name} is not installed"} for name in absent), None)


def open_session(
    plan: Plan,
    shape: tuple[int, int, int],
    reader: Any,
    pace_s: float,
    *,
    out: Path | None = None,
    threads: int | None = None,
) -> Any:
    """Return a `Session` as a neurofeedback run has it: two regions, two tasks, a GLM.

    Parameters
    ----------
    plan : Plan
    shape : (int, int, int)
    reader : Reader
    pace_s : float
        Seconds between two volumes, which is how long each may take.
    out : Path, optional
        Where it is recorded.
    threads : int, optional
        Of the kernels; all that there are by default.
    """
    from rtfmri.session import Session

    device: Any = plan.backend.name
    # A bare GPU machine has no nilearn, which finds the brain and convolves the events.
    known = find_spec("nilearn") is not None
    config = Config(
        device=device,
        threads=threads,
        deadline_s=pace_s,
        order=OrderSettings(wait_s=pace_s / 2),
        mask=MaskSettings(source="auto" if known else "none"),
        smoothing=SmoothingSettings(fwhm_mm=_FWHM_MM),
        glm=GlmSettings(noise="ols" if known else "off"),
    )
    onsets_s = np.arange(_BLOCK_S, _TASK_S, 2 * _BLOCK_S).tolist()
    events = [Event(onset_s, _BLOCK_S, task) for onset_s, task in zip(onsets_s, cycle(_TASKS))]
    rois = {"left": _box(shape, 0.3), "right": _box(shape, 0.7)}
    return Session(reader, events=events, rois=rois, config=config, out=out)


def _box(shape: tuple[int, int, int], place: float) -> NDArray[np.float32]:
    """Return a region of a tenth of the grid's length each way, inside the head."""
    weights = np.zeros(shape, np.float32)
    starts = [int(part * n) for part, n in zip((place, 0.5, 0.5), shape, strict=True)]
    weights[tuple(slice(a, a + 1 + n // 10) for a, n in zip(starts, shape, strict=True))] = 1
    return weights


def work(pipeline: Any) -> Row:
    """Return how much a session computed: voxels of the brain, columns of the GLM (0: none)."""
    design = pipeline.design
    return {
        "brain_voxels": int(np.count_nonzero(pipeline.brain)),
        "columns": len(design.columns) if design else 0,
    }


def quantiles_ms(seconds: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Return the quantiles for `PERCENTS`, in ms to a microsecond."""
    values: list[float] = np.round(1e3 * np.percentile(seconds, PERCENTS), 3).tolist()
    return values


@contextmanager
def saved_phantom(shape: tuple[int, int, int]) -> Iterator[Path]:
    """Give a file with a head that drifts, for a sender."""
    phantom = Phantom(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phantom.npz"
        save_images(path, drifting(phantom), phantom.grid)
        yield path


def can_pin() -> bool:
    """Tell whether this system can pin a process to a processor."""
    return hasattr(os, "sched_setaffinity")


def can_spare(plan: Plan) -> bool:
    """Tell whether a processor can be left to a busy neighbour."""
    return can_pin() and plan.backend.name == "cpu" and usable_threads() > 1


def neighbours() -> tuple[str, ...]:
    """Return what `with_neighbour` can give here."""
    return (IDLE, BUSY) if can_pin() else (IDLE,)


@contextmanager
def _threads(neighbour: str) -> Iterator[int | None]:
    """Give how many threads a session is to have, and give those that it took back."""
    before = numba.get_num_threads()
    try:
        yield before - 1 if neighbour == SPARED else None
    finally:
        numba.set_num_threads(before)


@contextmanager
def _busy() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", _SPIN]) as child:
        try:
            os.sched_setaffinity(child.pid, {max(os.sched_getaffinity(0))})
            yield child.pid
        finally:
            child.kill()


def with_neighbour(neighbour: str) -> Any:
    """Return a context in which one spins on one of our processors, or none does.

    It gives the neighbour's process id.
    """
    return nullcontext() if neighbour == IDLE else _busy()


@contextmanager
def quiet() -> Iterator[None]:
    """Let no session say that a volume is late: the table does."""
    log = logging.getLogger("rtfmri")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)

"""How the cost of a volume grows with the run, the grid, the design, the regions, the threads."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rtfmri.backends import Backend
from rtfmri.config import BaselineKind, BaselineSettings, Config
from rtfmri.pipeline import Pipeline
from rtfmri.volume import Volume

from .measure import Plan, Tables, grid_name
from .phantom import Phantom, drifting
from .tables import Layout, number, text

FLAT_AT = (10, 100, 1_000, 10_000)
"""Volumes at which the cost is told, each a median over some around it."""
_FLAT_WINDOW = 5
"""Short, so that a sliding window is full, and a fixed baseline frozen, before volume 10."""

LAYOUTS = {
    "flat": Layout(
        "Cost of Pipeline.push as a run grows",
        (
            ("grid", text("grid")),
            ("baseline", text("baseline")),
            *((f"ms at {n}", number(4, "push_ms", n)) for n in ("10", "100", "1000", "10000")),
            ("last / first", number(2, "last_to_first")),
            ("memory grown KiB", lambda row: f"{row['memory_growth_bytes'] / 1024:.0f}"),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``flat``, for the first grid."""
    flat = []
    for kind in get_args(BaselineKind):
        plan.progress(f"cost per volume, {kind} baseline, {grid_name(plan.grids[0])}")
        flat.append(cost_per_volume(plan.backend, plan.grids[0], kind))
    return {"flat": flat}


def cost_per_volume(backend: Backend, shape: Sequence[int], kind: BaselineKind) -> dict[str, Any]:
    """Push as many volumes as `FLAT_AT` ends with, and tell the cost around each of its numbers.

    Returns
    -------
    dict
        ``push_ms`` by volume number (each the median over 9 to 201 volumes around it), and by how
        much the process's memory grew from the second number to the last.
    """
    device: Any = backend.name
    phantom = Phantom((shape[0], shape[1], shape[2]))
    images, grid = drifting(phantom), phantom.grid
    settings = BaselineSettings(kind=kind, window_volumes=_FLAT_WINDOW)
    roi = np.zeros(grid.shape, np.float32)
    roi[: shape[0] // 2] = 1
    config = Config(device=device, baseline=settings)
    pipeline = Pipeline(grid, config, rois={"half": roi}, mask=phantom.mask())
    seconds = np.zeros(FLAT_AT[-1])
    memory_at = {}
    for i in range(FLAT_AT[-1]):
        volume = Volume(images[i % len(images)], grid, i, tr_s=1.0)
        started_s = time.perf_counter()
        pipeline.push(volume)
        seconds[i] = time.perf_counter() - started_s
        if i + 1 in FLAT_AT:
            memory_at[i + 1] = _resident_bytes()
    push_ms = {}
    for n in FLAT_AT:
        half = min(100, max(4, n // 10))
        push_ms[str(n)] = 1e3 * float(np.median(seconds[n - half - 1 : n + half]))
    return {
        "grid": grid_name(shape),
        "baseline": kind,
        "push_ms": push_ms,
        "last_to_first": push_ms[str(FLAT_AT[-1])] / push_ms[str(FLAT_AT[0])],
        "memory_growth_bytes": memory_at[FLAT_AT[-1]] - memory_at[FLAT_AT[1]],
    }


def _resident_bytes() -> int:
    """Return the memory that this process holds; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")

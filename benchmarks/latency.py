"""Arrival to result in a session that is fed at a steady pace, with and without recording."""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rtfmri.backends import Backend
from rtfmri.config import Config, MaskSettings
from rtfmri.volume import Volume

from .measure import Plan, Tables, grid_name
from .phantom import Phantom, drifting
from .tables import Layout, number, text

PACE_S = 0.02
N_VOLUMES = 100
"""Volumes a session; there are two sessions of each kind, in turn."""
_FIRST = 15
"""Volumes left out of the percentiles: the first, at which the brain is found, is told apart, and
the next ones wait behind it at this pace."""
_LARGEST_BYTES = 2 << 20
"""Larger volumes at this pace would be more data than any scanner's."""


class Memory:
    """A reader, live, whose volumes lie ready: one every `PACE_S` seconds.

    Parameters
    ----------
    shape : sequence of int
        x, y, z of its volumes: a head that drifts.
    """

    live = True

    def __init__(self, shape: Sequence[int]) -> None:
        self.n_volumes: int | None = N_VOLUMES
        phantom = Phantom((shape[0], shape[1], shape[2]))
        self._grid, self._images = phantom.grid, drifting(phantom)
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Volume]:
        """Give the volumes at their pace."""
        started_s = time.perf_counter()
        for i in range(N_VOLUMES):
            if self._closed.wait(max(0.0, started_s + i * PACE_S - time.perf_counter())):
                return
            yield Volume(self._images[i % len(self._images)], self._grid, i, PACE_S)

    def close(self) -> None:
        """End the iteration."""
        self._closed.set()


LAYOUTS = {
    "latency": Layout(
        "Arrival to result in a session",
        (
            ("grid", text("grid")),
            ("recorded", lambda row: "yes" if row["recorded"] else "no"),
            ("a volume every ms", number(0, "pace_ms")),
            ("p50 ms", number(2, "p50_ms")),
            ("p95", number(2, "p95_ms")),
            ("p99", number(2, "p99_ms")),
            ("max", number(2, "max_ms")),
            ("first volume", number(1, "first_ms")),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``latency``."""
    if not find_spec("h5py"):
        return {"latency": [{"skipped": "h5py is not installed"}]}
    rows = []
    for shape in plan.grids:
        if 2 * np.prod(shape) > _LARGEST_BYTES:
            continue
        plan.progress(f"latency, {grid_name(shape)}")
        latencies_ms: dict[bool, list[float]] = {False: [], True: []}
        first_ms: dict[bool, float] = {}
        for recorded in (False, True, False, True):
            values = _session(plan.backend, shape, recorded)
            first_ms.setdefault(recorded, values[0])
            latencies_ms[recorded] += values[min(_FIRST, len(values) // 2) :]
        for recorded, values in latencies_ms.items():
            p50, p95, p99 = np.percentile(values, [50, 95, 99])
            rows.append(
                {
                    "grid": grid_name(shape),
                    "recorded": recorded,
                    "pace_ms": 1e3 * PACE_S,
                    "n": len(values),
                    "first_ms": first_ms[recorded],
                    "p50_ms": float(p50),
                    "p95_ms": float(p95),
                    "p99_ms": float(p99),
                    "max_ms": max(values),
                }
            )
    return {"latency": rows}


def _session(backend: Backend, shape: Sequence[int], recorded: bool) -> list[float]:
    from rtfmri.session import Session

    device: Any = backend.name
    roi = np.zeros(tuple(shape), np.float32)
    roi[: shape[0] // 2] = 1
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.h5" if recorded else None
        source: Any = "auto" if find_spec("nilearn") else "none"
        config = Config(device=device, mask=MaskSettings(source=source))
        with Session(Memory(shape), config=config, out=out, rois={"half": roi}) as session:
            return [result.latency_ms for result in session]

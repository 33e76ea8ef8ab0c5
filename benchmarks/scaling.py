"""How the cost of a volume grows with the grid, the run, the design, the regions, the threads.

The pipeline is the one of `chain`; each axis changes one thing of it. As there, on a GPU only
``total`` tells how long a step takes.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend, open_backend
from rtfmri.config import BaselineKind, BaselineSettings, GlmSettings
from rtfmri.machine import usable_threads
from rtfmri.paradigm import Paradigm
from rtfmri.pipeline import Pipeline
from rtfmri.volume import Volume

from .chain import FIRST, TOTAL, TR_S, Waves, new_pipeline, resident_bytes, use_threads_of
from .measure import Plan, Row, Tables, grid_name, percentiles_ms
from .phantom import Phantom, drifting
from .tables import Layout, number, text

FLAT_AT = (10, 30, 100, 300, 1_000, 3_000, 10_000)
"""Volumes at which the cost is told, each a median over some around it."""
SHAPES = ((48, 48, 27), (64, 64, 36), (80, 80, 45), (96, 96, 54), (128, 128, 72))
"""Grids of one field of view and of voxels of one form."""
COLUMNS = (2, 5, 10, 20, 40)
CONTRASTS = (1, 4, 16, 64)
ROIS = (1, 10, 100, 1000)
TURN = 20
"""Volumes a turn that are timed, after one that is not."""

_FLAT_WINDOW = 5
"""Short, so that a sliding window is full, and a fixed baseline frozen, before volume 10."""
_N_WAVES = 10
_ROI_VOXELS = (5, 5, 4)
_LEAST_POINTS = 3
"""Of a line, for it to be fitted: two tell nothing of how well it fits."""
_SHOWN = (TOTAL, "motion", "reslice", "smooth", "quality", "glm", "baseline", "roi", "fetch")


def exponents_cell(step: str) -> Any:
    """Return what shows a step's exponent and its standard error; - for none."""

    def cell(row: Row) -> str:
        fit = row["steps"].get(step)
        return f"{fit['exponent']:.2f} ± {fit['standard_error']:.2f}" if fit else "-"

    return cell


_SETTLE_S = 0.1
"""The linear algebra at a pipeline's start leaves threads that spin for some 20 ms, which would be
in the next volumes' way."""


LAYOUTS = {
    "scaling": Layout(
        "What Pipeline.push costs as one thing grows: median ms, of all and of each step",
        (
            ("what grows", text("axis")),
            ("grid", text("grid")),
            ("to", text("size")),
            *((step, number(3, "steps", step, "p50_ms")) for step in _SHOWN),
            ("efficiency", number(2, "steps", TOTAL, "efficiency")),
        ),
    ),
    "exponents": Layout(
        "Exponents of that growth: cost ~ size^exponent, ± standard error",
        (
            ("what grows", text("axis")),
            ("grid", text("grid")),
            ("from", text("smallest")),
            ("to", text("largest")),
            ("points", text("n_points")),
            *((step, exponents_cell(step)) for step in _SHOWN),
        ),
    ),
    "flat": Layout(
        "Cost of Pipeline.push as a run grows",
        (
            ("grid", text("grid")),
            ("baseline", text("baseline")),
            *((f"ms at {n}", number(3, "push_ms", str(n))) for n in FLAT_AT),
            *((f"{n} / young", number(2, "times_young", str(n))) for n in FLAT_AT),
            ("exponent", number(3, "exponent")),
            ("±", number(3, "standard_error")),
            ("memory grown KiB", lambda row: f"{row['memory_growth_bytes'] / 1024:.0f}"),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of ``scaling``, one an axis, grid and size, ``exponents`` and ``flat``."""
    rows: list[Row] = []
    for axis, cases in _axes(plan):
        plan.progress(f"cost against {axis}, {grid_name(cases[0].phantom.grid.shape)}")
        rows += measured(axis, cases, plan.rounds)
        use_threads_of(plan.backend)
    if plan.backend.name != "cpu":
        rows.append({"skipped": "threads are the CPU's"})
    flat = []
    for kind in get_args(BaselineKind):
        plan.progress(f"cost against volumes, {kind} baseline, {grid_name(plan.grids[0])}")
        flat.append(cost_per_volume(plan.backend, plan.grids[0], kind))
    return {"scaling": rows, "exponents": fitted(rows), "flat": flat}


class Case:
    """A pipeline that gets one volume after the other.

    Parameters
    ----------
    size : int
        What grows is as large as this.
    backend : Backend
    phantom : Phantom
    images : sequence of (x, y, z) int16
        Of the phantom; they are its volumes in turn.
    **changes
        As for `new_pipeline`.
    """

    def __init__(
        self,
        size: int,
        backend: Backend,
        phantom: Phantom,
        images: Sequence[NDArray[np.int16]],
        **changes: Any,
    ) -> None:
        self.size, self.phantom = size, phantom
        self._backend, self._images = backend, images
        given = {"mask": head(phantom), "design": Waves(_N_WAVES), **changes}
        self.pipeline: Pipeline = new_pipeline(backend, phantom, **given)
        self._n = 0

    def push(self) -> dict[str, float]:
        """Push a volume, and return the seconds of each step, and in all."""
        image = self._images[self._n % len(self._images)]
        volume = Volume(image, self.phantom.grid, self._n, tr_s=TR_S)
        self._n += 1
        started_s = time.perf_counter()
        result = self.pipeline.push(volume)
        total_s = time.perf_counter() - started_s
        return {TOTAL: total_s} | {step: 1e-3 * ms for step, ms in result.stage_ms.items()}

    def turn(self, n: int) -> list[dict[str, float]]:
        """Push *n* volumes one after the other, on the threads of this backend."""
        use_threads_of(self._backend)
        return [self.push() for _ in range(n)]


def measured(axis: str, cases: Sequence[Case], rounds: int) -> list[Row]:
    """Let *cases* take turns, and return a row for each.

    Returns
    -------
    list of dict
        ``axis``, ``size``, ``grid``, ``brain_voxels``, ``n`` volumes, and ``steps``: the
        `percentiles_ms` of each, of which threads have their ``efficiency``, too.
    """
    seconds: list[dict[str, list[float]]] = [{} for _ in cases]
    for case in cases:
        case.turn(FIRST)
    for _ in range(rounds):
        for case, so_far in zip(cases, seconds, strict=True):
            for steps in case.turn(1 + TURN)[1:]:  # the first finds another's caches
                for step, s in steps.items():
                    so_far.setdefault(step, []).append(s)
    rows: list[Row] = []
    for case, so_far in zip(cases, seconds, strict=True):
        brain = case.pipeline.brain
        assert brain is not None
        row: Row = {
            "axis": axis,
            "size": case.size,
            "grid": grid_name(case.phantom.grid.shape),
            "brain_voxels": int(np.count_nonzero(brain)),
            "n": len(so_far[TOTAL]),
            "steps": {
                step: percentiles_ms(values) for step, values in so_far.items() if min(values) > 0
            },
        }
        if axis == "threads":
            for step, cost in row["steps"].items():
                alone_ms = (rows or [row])[0]["steps"][step]["p50_ms"]
                cost["efficiency"] = alone_ms / cost["p50_ms"] / case.size
        rows.append(row)
    return rows


def fitted(rows: Sequence[Row]) -> list[Row]:
    """Return the exponents of each axis, and on threads and the like of each grid.

    Returns
    -------
    list of dict
        ``axis``, ``grid`` ("all", where it is what grows), ``smallest`` and ``largest`` size,
        ``n_points``, and ``steps``: ``exponent`` and ``standard_error`` of each.
    """
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "skipped" not in row:
            grid = "all" if row["axis"] == "voxels" else row["grid"]
            lines.setdefault((row["axis"], grid), []).append(row)
    found = []
    for (axis, grid), line in lines.items():
        if len(line) < _LEAST_POINTS:
            continue
        sizes = [row["size"] for row in line]
        steps = {}
        for step in line[0]["steps"]:
            if all(step in row["steps"] for row in line):
                costs = [row["steps"][step]["p50_ms"] for row in line]
                slope, error = exponent(sizes, costs)
                steps[step] = {"exponent": slope, "standard_error": error}
        found.append(
            {
                "axis": axis,
                "grid": grid,
                "smallest": min(sizes),
                "largest": max(sizes),
                "n_points": len(sizes),
                "steps": steps,
            }
        )
    return found


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Return the exponent with which *costs* grow with *sizes*, and its standard error.

    It is the slope of the line of least squares through the logarithms of both; the error is that
    of a line's slope, from what the points are off it.
    """
    x, y = np.log(sizes), np.log(costs)
    x, y = x - x.mean(), y - y.mean()
    slope = x @ y / (x @ x)
    off = y - slope * x
    return float(slope), float(np.sqrt(off @ off / (len(x) - 2) / (x @ x)))


def thread_counts(most: int) -> list[int]:
    """Return the powers of two below *most*, and *most*."""
    return [*(2**k for k in range((most - 1).bit_length())), most]


def head(phantom: Phantom) -> NDArray[np.bool_]:
    """Return where the phantom's head is, (x, y, z): the brain of all, with or without nilearn."""
    signal = phantom.signal(np.zeros(6))
    inside: NDArray[np.bool_] = signal > signal.max() / 4
    return inside


def regions(inside: NDArray[np.bool_], n: int) -> dict[str, NDArray[np.bool_]]:
    """Return *n* boxes of up to 100 voxels at random places, as far as they are *inside*."""
    places = np.argwhere(inside)
    rng = np.random.default_rng(0)
    rois = {}
    for k, place in enumerate(places[rng.integers(len(places), size=n)]):
        box = tuple(slice(at, at + size) for at, size in zip(place, _ROI_VOXELS, strict=True))
        roi = np.zeros(inside.shape, np.bool_, order="F")
        roi[box] = inside[box]
        rois[f"region_{k}"] = roi
    return rois


def _axes(plan: Plan) -> Iterator[tuple[str, list[Case]]]:
    """Yield what grows and its cases, of which one axis at a time is in memory."""
    yield "voxels", [_on_grid(plan.backend, shape) for shape in SHAPES]
    phantom = Phantom(plan.grids[0])
    scene = phantom, drifting(phantom)
    plain = GlmSettings(drift="none", motion=False)
    yield (
        "regressors",
        [Case(n, plan.backend, *scene, design=Waves(n - 1, settings=plain)) for n in COLUMNS],
    )
    yield (
        "contrasts",
        [Case(n, plan.backend, *scene, design=Waves(_N_WAVES, n)) for n in CONTRASTS],
    )
    yield (
        "regions",
        [Case(n, plan.backend, *scene, rois=regions(head(phantom), n)) for n in ROIS],
    )
    if plan.backend.name == "cpu":
        for shape in plan.grids[:2]:
            phantom = Phantom(shape)
            scene = phantom, drifting(phantom)
            counts = thread_counts(usable_threads())
            yield "threads", [Case(n, open_backend("cpu", n), *scene) for n in counts]


def _on_grid(backend: Backend, shape: tuple[int, int, int]) -> Case:
    phantom = Phantom(shape)
    return Case(phantom.grid.n_voxels, backend, phantom, drifting(phantom))


def cost_per_volume(backend: Backend, shape: tuple[int, int, int], kind: BaselineKind) -> Row:
    """Push as many volumes as `FLAT_AT` ends with, and tell the cost around each of its numbers.

    There it takes turns with a pipeline that has just begun, volume by volume: what the machine
    does in the meantime is in both.

    Returns
    -------
    dict
        ``push_ms`` by volume number (each the median over 9 to 101 volumes around it),
        ``young_ms`` of the one that has just begun, ``times_young``, the ``exponent`` with which
        that grows and its ``standard_error``, and by how much the process's memory grew between
        the last two numbers.
    """
    phantom = Phantom(shape)
    images = drifting(phantom)

    def begun() -> Case:
        baseline = BaselineSettings(kind=kind, window_volumes=_FLAT_WINDOW)
        case = Case(0, backend, phantom, images, baseline=baseline, paradigm=Paradigm())
        case.turn(_FLAT_WINDOW)
        return case

    case, n_pushed = begun(), _FLAT_WINDOW
    push_ms, young_ms, growth = {}, {}, 0
    for n in FLAT_AT:
        half = min(50, max(4, n // 10))
        before = resident_bytes()
        for _ in range(n_pushed, n - half - 1):
            case.push()
        growth = resident_bytes() - before
        young = begun()
        time.sleep(_SETTLE_S)
        pairs = [(case.push()[TOTAL], young.push()[TOTAL]) for _ in range(2 * half + 1)]
        n_pushed = n + half
        push_ms[str(n)], young_ms[str(n)] = (1e3 * np.median(pairs, axis=0)).tolist()
    times_young = {n: push_ms[n] / young_ms[n] for n in push_ms}
    slope, error = exponent(FLAT_AT, list(times_young.values()))
    return {
        "grid": grid_name(shape),
        "baseline": kind,
        "push_ms": push_ms,
        "young_ms": young_ms,
        "times_young": times_young,
        "exponent": slope,
        "standard_error": error,
        "memory_growth_bytes": growth,
    }

"""Every operation of the backend: time, bytes a second, and the share of what memory allows."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfmri.backends import (
    POSE_FIELDS,
    SLICE_FIELDS,
    Array,
    Backend,
    Contrast,
    Contrasts,
    Moments,
    RoiTable,
    Subtraction,
    Template,
    new_design,
    new_fit,
)
from rtfmri.config import Interpolation
from rtfmri.stages.motion import MotionStage
from rtfmri.stages.region import copied_to, region_of
from rtfmri.stages.smoothing import gaussian_taps
from rtfmri.volume import VOXEL_DTYPES

from .measure import (
    COLD_TURN,
    Call,
    Clock,
    Listener,
    Plan,
    Row,
    Stream,
    Tables,
    gb_per_s,
    grid_name,
    statistics_ms,
    take_turns,
)
from .peers.glm import N_COLUMNS, central
from .phantom import Phantom, rigid
from .tables import Layout, number, percent, text

WINDOW = 20
_GAIN = 1e-3
"""Weight of the volume that is folded in again and again: too small to make a variance vanish."""
_SMOOTHING_SIGMA = 1.0
"""In voxels: a FWHM of 7 mm at voxels of 3 mm."""
_STEP = 2
"""Of the smoothing that leaves voxels out."""
_MOTION = np.array([0.4, -0.3, 0.2, 0.3, -0.2, 0.4])
"""Of the volume that is resliced and registered, in mm and degrees."""
N_STEPS = 3
"""Of a registration; it takes two or three as a rule."""
_N_BEFORE = 3
"""Volumes before the newest that slice timing looks at, for the cubic polynomial."""
_SCALARS = {"bessel": 1.001, "gain": _GAIN}
N_CLASSES = 20
"""Of noise, where the GLM whitens."""
_MOTION_AT = 3
_CARRY = 0.3
MEMORY_BOUND = (
    *("subtract", "fold", "slide", "contrast", "gather", "retime", "compare", "track"),
    *("remove_slow", "remove_fit", "update_glm"),
)
"""Operations with about one floating-point operation a byte, or less."""
LEAST_SHARE = 0.7
"""Of the stream's rate, that they should reach."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on arrays of one size.

    ``n`` is the number of voxels it works on (of ROI entries for ``roi_means``, of points for
    ``register``, of numbers for ``judge``, of elements of the design's factors for
    ``update_design``); ``reads`` and ``writes`` are the arrays it goes through, each once.
    """

    operation: str
    dtype: str
    n: int
    reads: tuple[Array, ...]
    writes: tuple[Array, ...]
    call: Call

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: an array that is updated counts twice."""
        return sum(int(array.nbytes) for array in (*self.reads, *self.writes))

    @property
    def memory_bound(self) -> bool:
        """Whether memory, and not arithmetic, should set its pace."""
        return re.split("[ ,]", self.operation)[0] in MEMORY_BOUND

    @property
    def held_bytes(self) -> int:
        """Bytes of the arrays, each counted once: what must fit a cache to stay there."""
        return sum(
            {id(array): int(array.nbytes) for array in (*self.reads, *self.writes)}.values()
        )


class _Arrays:
    """Random arrays of one size on a backend."""

    def __init__(self, backend: Backend, shape: Sequence[int], seed: int) -> None:
        self.backend = backend
        self.shape = (shape[0], shape[1], shape[2])
        self.n = int(np.prod(shape))
        self.rng = np.random.default_rng(seed)

    def voxels(self, dtype: DTypeLike, *rows: int) -> Array:
        """Return volumes of *dtype*."""
        return self.backend.copy(self.rng.integers(500, 1500, (*rows, self.n)).astype(dtype))

    def near(self, mean: float) -> Array:
        """Return a map of float32 whose values are around *mean*."""
        return self.backend.copy(self.rng.normal(mean, mean / 20, self.n).astype(np.float32))

    def normal(self, *shape: int, dtype: DTypeLike = np.float64) -> Array:
        """Return numbers around 0, of standard deviation 1."""
        return self.backend.copy(self.rng.normal(size=shape).astype(dtype))

    def moments(self) -> Moments:
        """Return the moments of volumes."""
        return Moments(self.near(1000.0), self.near(400.0))


def cases(backend: Backend, shape: Sequence[int], seed: int = 0) -> Iterator[Case]:
    """Yield every operation of *backend* on random volumes of *shape*.

    `Backend.register` is left out where the grid is too small for it.
    """
    arrays = _Arrays(backend, shape, seed)
    yield from _baseline_cases(arrays)
    yield from _space_cases(arrays)
    yield from _quality_cases(arrays)
    yield from _drift_cases(arrays)
    yield from _glm_cases(arrays, 1)
    yield from _glm_cases(arrays, N_CLASSES)
    yield from _register_case(backend, arrays.shape)


def _baseline_cases(arrays: _Arrays) -> Iterator[Case]:
    """Yield what keeps moments and compares with them."""
    do: Any = arrays.backend  # partial() of a typed method would need its every keyword told apart
    n, near = arrays.n, arrays.near
    baseline, other = arrays.moments(), arrays.moments()
    out = Subtraction(near(1.0), near(1.0), near(1.0))
    for dtype in VOXEL_DTYPES:
        volume = arrays.voxels(dtype)
        call = partial(do.subtract, volume, baseline, out, into=baseline, **_SCALARS)
        reads, writes = (volume, *baseline), (*out, *baseline)
        yield Case("subtract + fold", dtype.name, n, reads, writes, call)
    volume = arrays.voxels(np.int16)
    subtract = partial(do.subtract, volume, baseline, out, **_SCALARS)
    reads = (volume, *baseline)
    yield Case("subtract", "int16", n, reads, out, partial(subtract, into=None))
    call = partial(subtract, into=other)
    name = "subtract + fold elsewhere"
    yield Case(name, "int16", n, (*reads, *other), (*out, *other), call)
    call = partial(do.fold, volume, other, gain=_GAIN)
    yield Case("fold", "int16", n, (volume, *other), other, call)

    ring = arrays.voxels(np.int16, WINDOW)
    slot = ring[0]
    call = partial(do.slide, volume, baseline, ring, 0, out, full=True, **_SCALARS)
    yield Case("slide", "int16", n, (*reads, slot), (*out, *baseline, slot), call)
    stop = max(1, n // WINDOW)
    part = tuple(array[:stop] for array in baseline)
    call = partial(do.refresh, ring, baseline, 0, stop)
    yield Case("refresh", "int16", stop, (ring[:, :stop],), part, call)
    call = partial(do.contrast, other, 60.0, baseline, 80.0, Contrast(*out))
    yield Case("contrast", "-", n, (*other, *baseline), out, call)
    rois = _sphere(arrays.backend, arrays.shape)
    entries = rois.voxels.size
    # The voxels it reads are a part of the volume; an array of their size stands for them.
    read, means = (volume[:entries], rois.voxels, rois.weights), do.zeros(1, np.float64)
    call = partial(do.roi_means, volume, rois, means)
    yield Case("roi_means", "int16", entries, read, (means,), call)


def _space_cases(arrays: _Arrays) -> Iterator[Case]:
    """Yield what changes a volume's voxels, or takes some of them."""
    do: Any = arrays.backend
    n, shape = arrays.n, arrays.shape
    volume, values, out = arrays.voxels(np.int16), arrays.near(1000.0), arrays.near(1.0)
    taps = tuple(do.copy(gaussian_taps(_SMOOTHING_SIGMA)) for _ in range(3))
    smooth = partial(do.smooth, volume, shape, taps, arrays.near(1.0))
    yield Case("smooth", "int16", n, (volume,), (out,), partial(smooth, out))
    coarse = do.zeros(int(np.prod([-(-size // _STEP) for size in shape])))
    call = partial(smooth, coarse, step=(_STEP,) * 3)
    yield Case("smooth, every 2nd voxel", "int16", n, (volume,), (coarse,), call)

    grid = Phantom(shape).grid
    matrix = np.linalg.inv(grid.affine) @ rigid(_MOTION) @ grid.affine
    place = do.copy(matrix[:3].ravel())
    region = copied_to(do, region_of(np.ones(shape, np.bool_)))
    # The processor goes by runs of voxels, the GPU by single ones.
    where = (region.runs,) if do.name == "cpu" else (region.sources, region.targets)
    for interpolation in get_args(Interpolation):
        moving = values if interpolation == "bspline" else volume
        call = partial(do.reslice, moving, shape, place, interpolation, region, out)
        name = f"reslice {interpolation}"
        yield Case(name, moving.dtype.name, n, (moving, *where), (out,), call)
    scale = arrays.near(1.0)
    call = partial(do.gather, values, region, scale, out)
    yield Case("gather", "float32", n, (values, *where, scale), (out,), call)

    rows = arrays.voxels(np.int16, _N_BEFORE)
    weights = np.full((_N_BEFORE + 1, shape[2]), 1 / (_N_BEFORE + 1), np.float32)
    ring, weights = tuple(rows), do.copy(weights)
    call = partial(do.retime, volume, rows, 0, shape, weights, out)
    yield Case("retime", "int16", n, (volume, *ring, weights), (ring[0], out), call)


def _quality_cases(arrays: _Arrays) -> Iterator[Case]:
    """Yield what measures how good a volume is."""
    do: Any = arrays.backend
    n, n_slices = arrays.n, arrays.shape[2]
    volume, values, previous = arrays.voxels(np.int16), arrays.near(1000.0), arrays.near(1000.0)
    slices = do.zeros((n_slices + 1, len(SLICE_FIELDS)), np.float64)
    call = partial(do.inspect, volume, arrays.shape, slices)
    yield Case("inspect", "int16", n, (volume,), (slices,), call)
    sums = do.zeros(2, np.float64)
    call = partial(do.compare, values, previous, sums)
    yield Case("compare", "float32", n, (values, previous), (sums,), call)
    measured = do.zeros(len(POSE_FIELDS) + 2 + slices.size, np.float64)
    limits = do.copy(np.stack([np.full(measured.size, -1.0), np.full(measured.size, 1.0)]))
    usable = do.zeros(1)
    call = partial(do.judge, measured, limits, usable)
    yield Case("judge", "-", measured.size, (measured, limits), (usable,), call)
    usable, moments, successive = (
        do.copy(np.ones(1, np.float32)),
        arrays.moments(),
        arrays.near(1.0),
    )
    call = partial(
        do.track,
        values,
        previous,
        moments,
        successive,
        usable=usable,
        gain=_GAIN,
        successive_gain=_GAIN,
    )
    state = (previous, *moments, successive)
    yield Case("track", "float32", n, (values, *state, usable), state, call)


def _drift_cases(arrays: _Arrays) -> Iterator[Case]:
    """Yield what takes drift out of a volume."""
    do: Any = arrays.backend
    n, volume, out = arrays.n, arrays.near(1000.0), arrays.near(1.0)
    slow, level = arrays.near(1000.0), arrays.near(1000.0)
    gains = do.copy(np.full(2, _GAIN))
    call = partial(do.remove_slow, volume, slow, level, gains, out)
    yield Case("remove_slow", "float32", n, (volume, slow, level, gains), (slow, level, out), call)
    fit = (
        arrays.normal(N_COLUMNS, n, dtype=np.float32),
        arrays.normal(N_COLUMNS, dtype=np.float32),
        arrays.normal(1),
    )
    call = partial(do.remove_fit, volume, *fit, out)
    yield Case("remove_fit", "float32", n, (volume, *fit), (out,), call)


def _glm_cases(arrays: _Arrays, n_classes: int) -> Iterator[Case]:
    """Yield a step of the GLM with one t contrast; it whitens if there are classes of noise."""
    do: Any = arrays.backend
    n, p, whitened = arrays.n, N_COLUMNS, n_classes > 1
    name = f", {n_classes} classes" if whitened else ""
    weights = do.copy(np.eye(p)[-1:])
    asked = Contrasts(weights, do.copy(np.array([0, 1], np.int32)), do.zeros(1, np.int32))
    design, step = new_design(do, n_classes, 1, p)
    whitening = do.copy(np.tile([1.0, _CARRY if whitened else 0.0], n_classes))
    pose, row = arrays.normal(len(POSE_FIELDS)), do.zeros(p, np.float64)
    given = (pose, whitening, asked, design, step, row)
    for _ in range(2 * p):  # until no column is new, and each needs its rotation
        known = arrays.normal(p)
        do.update_design(known, *given, motion_at=-1)
    call = partial(do.update_design, known, *given, motion_at=_MOTION_AT)
    reads = (known, pose, whitening, *asked, *design)
    n_elements = n_classes * p * p
    yield Case(f"update_design{name}", "-", n_elements, reads, (*design, *step, row), call)

    fit = new_fit(do, p, in_classes(arrays.shape, n_classes), whitened=whitened)._replace(
        coordinates=arrays.normal(p, n, dtype=np.float32),
        squares=arrays.near(1e5),
        origin=arrays.near(1000.0),
        previous=arrays.near(20.0),
    )
    volume, statistics = arrays.near(1000.0), do.zeros((1, n))
    options = {"whitened": whitened, "first_column": p - 1}
    call = partial(do.update_glm, volume, fit, asked, step, statistics, **options)
    updated = (fit.coordinates, fit.squares, *((fit.previous,) if whitened else ()))
    # The processor goes by parts of a class, the GPU by the voxels' labels.
    where = (fit.parts,) if do.name == "cpu" else (fit.labels,) if whitened else ()
    where = (*((fit.order,) if whitened else ()), *where)
    reads = (volume, *updated, fit.origin, *where, *step[2:], asked.offsets, asked.kinds)
    yield Case(f"update_glm{name}", "float32", n, reads, (*updated, statistics), call)


def in_classes(shape: Sequence[int], n_classes: int) -> NDArray[np.int32]:
    """Return each voxel's class of noise, (n_voxels,); they vary smoothly in space."""
    return (n_classes * central(shape)).astype(np.int32)


def _register_case(backend: Backend, shape: tuple[int, int, int]) -> Iterator[Case]:
    """Yield `N_STEPS` steps towards a volume that moved; with no tolerance none is the last.

    So each call fails, and the next begins where it began.
    """
    phantom = Phantom(shape)
    if not MotionStage.possible(phantom.grid):
        return
    heard = Listener(backend, "register")
    stage = MotionStage(heard, phantom.grid)
    stage.set_reference(phantom.volume(0, np.zeros(6)).reshape(-1, order="F"))
    stage.push(backend.copy(phantom.volume(1, _MOTION).reshape(-1, order="F")))
    call = heard.call
    template: Template = call.args[2]
    read = (template.points, template.values, template.jacobian) * N_STEPS
    steps = partial(call.func, *call.args, max_iterations=N_STEPS, tolerance_mm=0.0)
    yield Case(f"register, {N_STEPS} steps", "-", template.values.size, read, (), steps)


def _sphere(backend: Backend, shape: Sequence[int]) -> RoiTable:
    centred = [np.arange(size) - (size - 1) / 2 for size in shape]
    x, y, z = np.meshgrid(*centred, indexing="ij")
    inside = x**2 + y**2 + z**2 <= max(1.0, min(shape) / 4) ** 2
    voxels = np.flatnonzero(inside.ravel(order="F")).astype(np.int32)
    weights = np.full(voxels.size, 1 / voxels.size, np.float32)
    offsets = np.array([0, voxels.size], np.int32)
    return RoiTable(*(backend.copy(part) for part in (offsets, voxels, weights)))


def _below(row: Row) -> str:
    """Return with which caches a row is below `LEAST_SHARE`, although memory should bound it."""
    if not row["memory_bound"]:
        return "-"
    below = [caches for caches in ("hot", "cold") if row[caches]["share"] < LEAST_SHARE]
    return ", ".join(below) or "no"


LAYOUTS = {
    "kernels": Layout(
        "Operations, against a stream of the same size, with hot and with cold caches",
        (
            ("grid", text("grid")),
            ("operation", text("operation")),
            ("voxels", text("dtype")),
            ("B/voxel", number(0, "bytes_per_voxel")),
            ("hot ms", number(4, "hot", "median_ms")),
            ("min", number(4, "hot", "min_ms")),
            ("p95", number(4, "hot", "p95_ms")),
            ("GB/s", number(1, "hot", "gb_s")),
            ("stream GB/s", number(1, "hot", "stream_gb_s")),
            ("share", percent("hot", "share")),
            ("cold ms", number(4, "cold", "median_ms")),
            ("GB/s", number(1, "cold", "gb_s")),
            ("stream GB/s", number(1, "cold", "stream_gb_s")),
            ("share", percent("cold", "share")),
            ("memory GB/s", number(1, "memory_gb_s")),
            (f"memory-bound, below {LEAST_SHARE:.0%}", _below),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``kernels``, one an operation and grid."""
    for dtype in VOXEL_DTYPES:
        plan.backend.warm(dtype)
    rows = []
    for shape in plan.grids:
        plan.progress(f"kernels, {grid_name(shape)}")
        for case in cases(plan.backend, shape):
            rows.append({"grid": grid_name(shape), **_row(case, plan.clock, plan.rounds)})
    return {"kernels": rows}


def _row(case: Case, clock: Clock, rounds: int) -> Row:
    same_size = clock.stream(case.held_bytes)
    timers = {"operation": clock.timer(case.call, cold=False)}
    timers["stream"] = clock.timer(same_size, cold=False)
    hot = take_turns(timers, rounds, cold=False)
    memory: list[float] = []
    calls: list[float] = []
    streams: list[float] = []
    for _ in range(COLD_TURN * rounds):
        for call, seconds in ((case.call, calls), (same_size, streams)):
            memory_s, call_s = clock.after_largest(call)
            memory.append(memory_s)
            seconds.append(call_s)
    return {
        "operation": case.operation,
        "dtype": case.dtype,
        "n": case.n,
        "bytes_per_voxel": case.moved_bytes / case.n,
        "held_bytes": case.held_bytes,
        "memory_bound": case.memory_bound,
        "hot": _against(case, hot["operation"], same_size, hot["stream"]),
        "cold": _against(case, calls, same_size, streams),
        "memory_gb_s": gb_per_s(clock.largest.n_bytes, memory),
    }


def _against(
    case: Case, seconds: Sequence[float], stream: Stream, stream_seconds: Sequence[float]
) -> dict[str, float]:
    """Return an operation's times and its rate, beside the stream's that took turns with it."""
    rate = gb_per_s(case.moved_bytes, seconds)
    stream_rate = gb_per_s(stream.n_bytes, stream_seconds)
    return {
        **statistics_ms(seconds),
        "gb_s": rate,
        "stream_gb_s": stream_rate,
        "share": rate / stream_rate,
    }

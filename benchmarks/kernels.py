"""Every operation of the backend: time, bytes a second, and the share of what memory allows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfmri.backends import Array, Backend, Contrast, Moments, RoiTable, Subtraction
from rtfmri.stages.smoothing import gaussian_taps
from rtfmri.volume import VOXEL_DTYPES

from .measure import Call, Clock, gb_per_s, grid_name, statistics_ms, take_turns

WINDOW = 20
_GAIN = 1e-3
"""Weight of the volume that is folded in again and again: too small to make a variance vanish."""
_SMOOTHING_SIGMA = 1.0
"""In voxels: a FWHM of 7 mm at voxels of 3 mm."""
_SCALARS = {"bessel": 1.001, "gain": _GAIN}


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on arrays of one size.

    ``n`` is the number of voxels it works on (of ROI entries for ``roi_means``), ``reads`` and
    ``writes`` are the arrays it goes through, each once.
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
    def held_bytes(self) -> int:
        """Bytes of the arrays, each counted once: what must fit a cache to stay there."""
        return sum(
            {id(array): int(array.nbytes) for array in (*self.reads, *self.writes)}.values()
        )


def cases(backend: Backend, shape: Sequence[int], seed: int = 0) -> Iterator[Case]:
    """Yield every operation of *backend* on random volumes of *shape*."""
    n = int(np.prod(shape))
    rng = np.random.default_rng(seed)

    def voxels(dtype: DTypeLike, *rows: int) -> NDArray[Any]:
        return rng.integers(500, 1500, (*rows, n)).astype(dtype)

    def new(mean: float) -> Array:
        return backend.copy(rng.normal(mean, mean / 20, n).astype(np.float32))

    def moments() -> Moments:
        return Moments(new(1000.0), new(400.0))

    do: Any = backend  # partial() of a typed method would need its every keyword told apart
    baseline, other = moments(), moments()
    out = Subtraction(new(1.0), new(1.0), new(1.0))
    for dtype in VOXEL_DTYPES:
        volume = backend.copy(voxels(dtype))
        call = partial(do.subtract, volume, baseline, out, into=baseline, **_SCALARS)
        reads, writes = (volume, *baseline), (*out, *baseline)
        yield Case("subtract + fold", dtype.name, n, reads, writes, call)
    volume = backend.copy(voxels(np.int16))
    subtract = partial(do.subtract, volume, baseline, out, **_SCALARS)
    reads = (volume, *baseline)
    yield Case("subtract", "int16", n, reads, out, partial(subtract, into=None))
    call = partial(subtract, into=other)
    name = "subtract + fold elsewhere"
    yield Case(name, "int16", n, (*reads, *other), (*out, *other), call)
    call = partial(do.fold, volume, other, gain=_GAIN)
    yield Case("fold", "int16", n, (volume, *other), other, call)

    ring = backend.copy(voxels(np.int16, WINDOW))
    slot = ring[0]
    call = partial(do.slide, volume, baseline, ring, 0, out, full=True, **_SCALARS)
    yield Case("slide", "int16", n, (*reads, slot), (*out, *baseline, slot), call)
    stop = max(1, n // WINDOW)
    part = tuple(array[:stop] for array in baseline)
    call = partial(do.refresh, ring, baseline, 0, stop)
    yield Case("refresh", "int16", stop, (ring[:, :stop],), part, call)

    taps = tuple(backend.copy(gaussian_taps(_SMOOTHING_SIGMA)) for _ in range(3))
    scratch, blurred = new(1.0), new(1.0)
    call = partial(do.smooth, volume, tuple(shape), taps, scratch, blurred)
    yield Case("smooth", "int16", n, (volume,), (blurred,), call)
    call = partial(do.contrast, other, 60.0, baseline, 80.0, Contrast(*out))
    yield Case("contrast", "-", n, (*other, *baseline), out, call)
    rois = _sphere(backend, shape)
    entries = rois.voxels.size
    # The voxels it reads are a part of the volume; an array of their size stands for them.
    stand_in = volume[:entries]
    call = partial(do.roi_means, volume, rois)
    yield Case("roi_means", "int16", entries, (stand_in, rois.voxels, rois.weights), (), call)


def _sphere(backend: Backend, shape: Sequence[int]) -> RoiTable:
    centred = [np.arange(size) - (size - 1) / 2 for size in shape]
    x, y, z = np.meshgrid(*centred, indexing="ij")
    inside = x**2 + y**2 + z**2 <= max(1.0, min(shape) / 4) ** 2
    voxels = np.flatnonzero(inside.ravel(order="F")).astype(np.int32)
    weights = np.full(voxels.size, 1 / voxels.size, np.float32)
    offsets = np.array([0, voxels.size], np.int32)
    return RoiTable(*(backend.copy(part) for part in (offsets, voxels, weights)))


def run(
    backend: Backend,
    clock: Clock,
    grids: Sequence[tuple[int, int, int]],
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the table ``kernels``, one an operation and grid."""
    for dtype in VOXEL_DTYPES:
        backend.warm(dtype)
    rows = []
    for shape in grids:
        progress(f"kernels, {grid_name(shape)}")
        for case in cases(backend, shape):
            rows.append({"grid": grid_name(shape), **_row(case, clock, rounds)})
    return {"kernels": rows}


def _row(case: Case, clock: Clock, rounds: int) -> dict[str, Any]:
    same_size = clock.stream(case.held_bytes)
    row: dict[str, Any] = {
        "operation": case.operation,
        "dtype": case.dtype,
        "n": case.n,
        "bytes_per_voxel": case.moved_bytes / case.n,
        "held_bytes": case.held_bytes,
    }
    for caches, stream in (("hot", same_size), ("cold", clock.largest)):
        cold = caches == "cold"
        timers = {
            "operation": clock.timer(case.call, cold=cold),
            "stream": clock.timer(stream, cold=cold),
        }
        seconds = take_turns(timers, rounds, cold=cold)
        rate = gb_per_s(case.moved_bytes, seconds["operation"])
        stream_rate = gb_per_s(stream.n_bytes, seconds["stream"])
        row[caches] = {
            **statistics_ms(seconds["operation"]),
            "gb_s": rate,
            "stream_gb_s": stream_rate,
            "share": rate / stream_rate,
        }
    return row

"""The GLM: a volume's step against OpenNFT's incremental GLM and a refit by nilearn, and AR(1)."""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import POSE_FIELDS, Array, Backend
from rtfmri.config import Config, GlmSettings
from rtfmri.design import Contrast, Design
from rtfmri.paradigm import Paradigm
from rtfmri.stages.brain import BrainStage
from rtfmri.stages.glm import MEMORY_FWHM_MM, GlmStage

from ..measure import (
    Clock,
    Listener,
    Plan,
    Tables,
    Timer,
    gb_per_s,
    grid_name,
    peers_clock,
    statistics_ms,
    take_turns,
)
from ..phantom import Phantom, walk
from ..tables import Layout, number, text

N_VOLUMES = 100
"""Of the run; the last one is what is taken in again and again."""
N_COLUMNS = 12
"""A constant, 2 cosines, 6 of motion, 3 conditions."""
MOST_SERIES_BYTES = 1_000_000_000
"""Larger series of volumes, of which nilearn makes three more arrays, are not refitted."""

_TR_S = 1.0
_CONDITIONS = ("left", "right", "rest")
_BLOCK_VOLUMES = 8
_SIGNAL, _NOISE_SD = 1000.0, 20.0
_LEAST_MEMORY, _MOST_MEMORY = 0.1, 0.5
_N_LOOKED_AT = 20_000
"""Voxels, evenly spaced, whose t is compared with a batch fit."""
_ONE_THREAD = "on one thread: "

_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]


class Blocks(Design):
    """A design of `N_COLUMNS` columns, whose conditions take turns; it needs no nilearn.

    Parameters
    ----------
    contrasts : tuple of Contrast
    """

    def __init__(self, contrasts: tuple[Contrast, ...]) -> None:
        settings = GlmSettings(high_pass_s=N_VOLUMES * _TR_S)
        super().__init__(Paradigm(), settings, _TR_S, n_volumes=N_VOLUMES)
        self.columns = (*self.columns, *_CONDITIONS)
        self.contrasts = contrasts

    def row(self, index: int) -> _F64:
        """Return the row of volume *index*, motion 0; a response is a wave over its blocks."""
        turn, n = index / _BLOCK_VOLUMES, len(_CONDITIONS)
        waves = np.cos(2 * np.pi * (turn - np.arange(n)) / n)
        return np.concatenate([super().row(index), np.maximum(waves, 0.0)])


def contrasts_of(columns: Sequence[str]) -> tuple[Contrast, ...]:
    """Return a t contrast of each condition, and an F contrast of all."""
    weights = np.array([[float(column == name) for column in columns] for name in _CONDITIONS])
    each = (Contrast(n, "t", w[None]) for n, w in zip(_CONDITIONS, weights, strict=True))
    return (*each, Contrast("any", "F", weights))


def needed_bytes(n_contrasts: int) -> int:
    """Return a voxel's bytes that any such step must move, all float32.

    The coordinates and the residuals' sum of squares are read and written, the volume and what it
    is counted from read, a map for each contrast written.
    """
    return 8 * N_COLUMNS + 8 + 4 + 4 + 4 * n_contrasts


class Iglm:
    """The incremental GLM of OpenNFT, written from the published formulas in NumPy float64.

    Bagarinao, Matsuo, Nakai & Sato (2003, NeuroImage 19:422); Koush et al. (2017, NeuroImage
    156:489). Kept are the design's covariance C = X'X / n, its products with the signal D = Y'X,
    and the signal's sum of squares. After each volume C = N N' is decomposed (Cholesky); then
    B = D N^-T / n are coordinates in an orthonormal basis, ``b = B N^-1`` the coefficients, and
    ``(y'y / n - sum(B^2)) n / (n - p)`` the residual variance. It is written as the formulas are,
    with a new array for each.

    Parameters
    ----------
    n_voxels : int
    contrast : (n_columns,) float64
    """

    def __init__(self, n_voxels: int, contrast: _F64) -> None:
        p = contrast.size
        self._contrast, self._n = contrast, 0
        self._covariance = np.zeros((p, p))
        self._products = np.zeros((n_voxels, p))
        self._squares = np.zeros(n_voxels)

    def take(self, volume: _F64, row: _F64) -> None:
        """Take a volume, (n_voxels,), and its row of the design into the sums."""
        self._count(row)
        self._products += np.outer(volume, row)
        self._squares += volume**2

    def t(self) -> _F64:
        """Return the contrast's t after the volumes so far, (n_voxels,)."""
        inverse, scale = self._solved()
        scores = self._products @ inverse.T / self._n
        coefficients = scores @ inverse
        variance = self._squares / self._n - np.sum(scores**2, axis=1)
        return np.asarray(coefficients @ self._contrast / np.sqrt(scale * variance))

    def effect(self) -> _F64:
        """Return the contrast of the coefficients, (n_voxels,)."""
        inverse, _ = self._solved()
        return np.asarray(self._products @ (inverse.T @ (inverse @ self._contrast)) / self._n)

    def _count(self, row: _F64) -> None:
        self._n += 1
        self._covariance += (np.outer(row, row) - self._covariance) / self._n

    def _solved(self) -> tuple[_F64, float]:
        """Return N^-1, and the contrast's variance over y'y / n - sum(B^2)."""
        inverse = np.linalg.inv(np.linalg.cholesky(self._covariance))
        scale = ((inverse @ self._contrast) ** 2).sum() / (self._n - self._contrast.size)
        return inverse, scale


class InPlaceIglm(Iglm):
    """The same as one writes it who has only speed in mind: no array is made."""

    def __init__(self, n_voxels: int, contrast: _F64) -> None:
        super().__init__(n_voxels, contrast)
        self._scores, self._coefficients = np.empty((2, n_voxels, contrast.size))
        self._variance, self._t = np.empty((2, n_voxels))

    def take(self, volume: _F64, row: _F64) -> None:
        """See `Iglm.take`."""
        self._count(row)
        self._products += np.multiply.outer(volume, row, out=self._scores)
        self._squares += np.multiply(volume, volume, out=self._t)

    def t(self) -> _F64:
        """See `Iglm.t`; valid until the next call."""
        inverse, scale = self._solved()
        scores, variance, t = self._scores, self._variance, self._t
        np.matmul(self._products, inverse.T / self._n, out=scores)
        np.matmul(scores, inverse, out=self._coefficients)
        np.multiply(self._squares, 1 / self._n, out=variance)
        variance -= np.einsum("vp,vp->v", scores, scores, out=t)
        variance *= scale
        np.matmul(self._coefficients, self._contrast, out=t)
        t /= np.sqrt(variance, out=variance)
        return t


class Rls:
    """Recursive least squares in NumPy float64, written from the formulas: no array is made.

    With P the inverse of the design's products so far, the gain ``k = P x / (1 + x' P x)`` is the
    same for all voxels: ``e = y - x' b``, ``b += k e``, ``P -= k x' P``, and the residuals' sum of
    squares grows by ``e^2 / (1 + x' P x)`` (Plackett 1950, Biometrika 37:149). Begun with
    P = 1e8, which is next to no prior, for columns of a size of about 1.

    Parameters
    ----------
    n_voxels : int
    contrast : (n_columns,) float64
    """

    def __init__(self, n_voxels: int, contrast: _F64) -> None:
        p = contrast.size
        self._contrast, self._n = contrast, 0
        self._inverse = 1e8 * np.eye(p)
        self._coefficients = np.zeros((p, n_voxels))
        self._squares, self._error, self._scratch = np.zeros((3, n_voxels))

    def take(self, volume: _F64, row: _F64) -> None:
        """Take in a volume, (n_voxels,), and its row of the design."""
        self._n += 1
        reached = self._inverse @ row
        more = 1 + row @ reached
        error, scratch = self._error, self._scratch
        np.matmul(row, self._coefficients, out=error)
        np.subtract(volume, error, out=error)
        for coefficient, gain in zip(self._coefficients, reached / more, strict=True):
            coefficient += np.multiply(error, gain, out=scratch)
        self._inverse -= np.outer(reached / more, reached)
        np.multiply(error, error, out=error)
        error /= more
        self._squares += error

    def t(self) -> _F64:
        """Return the contrast's t after the volumes so far; valid until the next call."""
        t, scratch = self._error, self._scratch
        np.matmul(self._contrast, self._coefficients, out=t)
        scale = self._contrast @ self._inverse @ self._contrast / (self._n - self._contrast.size)
        np.multiply(self._squares, scale, out=scratch)
        t /= np.sqrt(scratch, out=scratch)
        return t


def refit(series: _F64, rows: _F64, contrast: _F64) -> _F64:
    """Return the contrast's t by nilearn, from all volumes at once.

    Parameters
    ----------
    series : (n, n_voxels) float64
    rows : (n, n_columns) float64
        Of the design.
    contrast : (n_columns,) float64
    """
    from nilearn.glm.contrasts import compute_contrast
    from nilearn.glm.first_level import run_glm

    labels, results = run_glm(series, rows, noise_model="ols")
    return np.asarray(compute_contrast(labels, results, contrast, stat_type="t").stat())


class Fit:
    """A `GlmStage` in a run.

    Parameters
    ----------
    backend : Backend
        What executes it.
    shape : (int, int, int)
        Of the volumes, of which all voxels count.
    n_contrasts : int
        How many of `contrasts_of`.
    noise : {"ols", "ar1"}
        As in `GlmSettings`.

    Attributes
    ----------
    design : Blocks
    rows : list of (n_columns,) float64
        The design's rows of the volumes taken, motion filled in.
    longest_catch_up_ms : float
        The longest `GlmStage.catch_up` so far: with ar1, at the end of the warm-up.
    """

    def __init__(
        self,
        backend: Backend,
        shape: tuple[int, int, int],
        n_contrasts: int,
        noise: Literal["ols", "ar1"] = "ols",
    ) -> None:
        grid = Phantom(shape).grid
        brain = BrainStage(backend, grid, np.ones(shape, np.bool_), Config())
        self.design = Blocks(contrasts_of(Blocks(()).columns)[:n_contrasts])
        self.rows: list[_F64] = []
        self.longest_catch_up_ms = 0.0
        self._backend, self._heard = backend, Listener(backend, "update_design")
        self._stage = GlmStage(
            self._heard,
            grid.n_voxels,
            self.design,
            GlmSettings(noise=noise),
            lambda voxels: brain.spread(voxels, MEMORY_FWHM_MM),
        )
        self._row = backend.zeros(N_COLUMNS, np.float64)
        self._last: tuple[Array, ...] = ()

    def take(self, volume: Array, pose: Array) -> None:
        """Take in the next volume, (n_voxels,) float32 on the backend."""
        backend, stage = self._backend, self._stage
        self._last = volume, backend.copy(stage.told(len(self.rows))), self._row, pose
        self.push()
        row = backend.download(self._row)
        stage.settle(row)
        backend.synchronize()
        started_s = time.perf_counter()
        stage.catch_up()
        backend.synchronize()
        catch_up_ms = 1e3 * (time.perf_counter() - started_s)
        self.longest_catch_up_ms = max(self.longest_catch_up_ms, catch_up_ms)
        self.rows.append(row)

    def push(self) -> None:
        """Do `GlmStage.push` of the last volume once more."""
        self._stage.push(*self._last)

    def update_design(self) -> None:
        """Do the part of it that works on the design alone."""
        self._heard.call()

    def told(self) -> None:
        """Do what the host does before the volume comes."""
        self._stage.told(len(self.rows))

    def statistics(self) -> _F32:
        """Return the statistic of each contrast, (n_contrasts, n_voxels)."""
        return np.asarray(self._backend.download(self._stage.statistics))

    def n_classes(self) -> int:
        """Return how many noise classes the voxels are in."""
        return len(np.unique(self._stage.memory()))


class Peers:
    """What else there is, with the same volumes: `Iglm` and, where it is installed, nilearn.

    Parameters
    ----------
    n_voxels : int
    contrast : (n_columns,) float64
    """

    def __init__(self, n_voxels: int, contrast: _F64) -> None:
        self._contrast, self._iglm = contrast, InPlaceIglm(n_voxels, contrast)
        self._rls = Rls(n_voxels, contrast)
        self._rows: list[_F64] = []
        refits = find_spec("nilearn") and 8 * N_VOLUMES * n_voxels <= MOST_SERIES_BYTES
        self._series = np.empty((N_VOLUMES, n_voxels)) if refits else None

    def take(self, volume: _F32, row: _F64) -> None:
        """Take in the next volume, (n_voxels,)."""
        self._volume = volume.astype(np.float64)
        self._iglm.take(self._volume, row)
        self._rls.take(self._volume, row)
        if self._series is not None:
            self._series[len(self._rows)] = volume
        self._rows.append(row)

    def calls(self) -> dict[str, Callable[[], _F64]]:
        """Return by name what takes the last volume in once more, and tells t."""
        calls: dict[str, Callable[[], _F64]] = {
            "iglm": partial(self._step, Iglm),
            "iglm_in_place": partial(self._step, InPlaceIglm),
            "rls": self._rls_step,
        }
        if self._series is not None:
            calls["nilearn"] = partial(refit, self._series, np.array(self._rows), self._contrast)
        return calls

    def t(self) -> dict[str, _F64]:
        """Return by name the t of all volumes so far, which no call has taken in again."""
        t = {"iglm": self._iglm.t().copy(), "rls": self._rls.t().copy()}
        if self._series is not None:
            t["nilearn"] = refit(self._series, np.array(self._rows), self._contrast)
        return t

    def _rls_step(self) -> _F64:
        self._rls.take(self._volume, self._rows[-1])
        return self._rls.t()

    def _step(self, form: type[Iglm]) -> _F64:
        # Both forms go on with the same sums.
        form.take(self._iglm, self._volume, self._rows[-1])
        return form.t(self._iglm)


def t_by_least_squares(series: _F64, rows: _F64, contrast: _F64) -> _F64:
    """Return the contrast's t of a batch fit by singular values (LAPACK), arrays as in `refit`."""
    coefficients, squares, rank, _ = np.linalg.lstsq(rows, series)
    scale = contrast @ np.linalg.inv(rows.T @ rows) @ contrast
    return np.asarray(contrast @ coefficients / np.sqrt(squares / (len(rows) - rank) * scale))


def volumes(shape: Sequence[int], n: int) -> Iterator[_F32]:
    """Yield *n* volumes, (n_voxels,), of noise whose memory of the volume before varies smoothly.

    It is largest in the grid's middle, and least in its corners.
    """
    rng = np.random.default_rng(0)
    spread = _MOST_MEMORY - _LEAST_MEMORY
    memory = np.float32(_LEAST_MEMORY) + np.float32(spread) * central(shape)
    share_of_new = np.sqrt(1 - memory**2)
    noise = rng.standard_normal(memory.size, np.float32)
    for _ in range(n):
        yield np.float32(_SIGNAL) + np.float32(_NOISE_SD) * noise
        noise = memory * noise + share_of_new * rng.standard_normal(memory.size, np.float32)


def central(shape: Sequence[int]) -> _F32:
    """Return a smooth map, (n_voxels,): 1 in the grid's middle, 0 in its corners."""
    waves = [np.sin(np.pi * (np.arange(size) + 0.5) / size) for size in shape]
    x, y, z = np.meshgrid(*waves, indexing="ij", sparse=True)
    return np.asarray(((x + y + z) / 3).ravel(order="F"), np.float32)


def poses(n: int) -> Iterator[_F64]:
    """Yield *n* poses of a head that wanders, as `POSE_FIELDS`."""
    for motion in walk(n):
        fields = np.zeros(len(POSE_FIELDS))
        fields[1:4] = np.sin(np.deg2rad(motion[3:]) / 2)
        fields[0] = np.sqrt(1 - (fields[1:4] ** 2).sum())
        fields[4:7] = motion[:3]
        yield fields


def on_one_blas_thread(timer: Timer) -> Timer:
    """Return *timer* on one thread of NumPy's BLAS, where threadpoolctl is there to set it."""
    if not find_spec("threadpoolctl"):
        return timer
    threads = importlib.import_module("threadpoolctl").ThreadpoolController()

    def once() -> float:
        with threads.limit(limits=1, user_api="blas"):
            return timer()

    return once


LAYOUTS = {
    "glm": Layout(
        "A step of the GLM with 12 columns against NumPy's incremental GLM and nilearn's refit",
        (
            ("grid", text("grid")),
            ("caches", text("caches")),
            ("contrasts", text("contrasts")),
            ("ms", number(4, "median_ms")),
            ("min", number(4, "min_ms")),
            ("p95", number(4, "p95_ms")),
            ("stream GB/s", number(1, "stream_gb_s")),
            ("B/voxel", number(0, "bytes_per_voxel")),
            ("they allow ms", number(4, "allowed_ms")),
            ("ours / allowed", number(2, "of_allowed")),
            ("NumPy ms", number(1, "iglm_ms")),
            ("times", number(0, "times_faster", "iglm")),
            ("in place ms", number(1, "iglm_in_place_ms")),
            ("times", number(0, "times_faster", "iglm_in_place")),
            ("RLS ms", number(1, "rls_ms")),
            ("times", number(0, "times_faster", "rls")),
            ("nilearn ms", number(0, "nilearn_ms")),
            ("times", number(0, "times_faster", "nilearn")),
            *(
                (f"largest error of t: {name}", number(6, "t_error", key))
                for name, key in (("ours", "ours"), ("NumPy", "iglm"), ("RLS", "rls"))
            ),
        ),
    ),
    "glm_cost": Layout(
        "What a step of the GLM is made of, with independent (OLS) and with AR(1) noise",
        (
            ("grid", text("grid")),
            ("caches", text("caches")),
            *(
                (f"{noise} {heading}", number(digits, noise.lower(), key))
                for noise in ("OLS", "AR1")
                for heading, digits, key in (
                    ("told µs", 1, "told_us"),
                    ("update_design µs", 1, "design_us"),
                    ("push ms", 4, "push_ms"),
                )
            ),
            ("AR1 / OLS", number(2, "times_ols")),
            ("noise classes", number(0, "n_classes")),
            ("end of warm-up ms", number(0, "warm_up_end_ms")),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the tables ``glm`` and ``glm_cost``."""
    step: list[dict[str, Any]] = []
    cost: list[dict[str, Any]] = []
    for shape in plan.grids:
        plan.progress(f"the GLM against its peers, {grid_name(shape)}")
        n_voxels = int(np.prod(shape))
        one, four, ar1 = fits = (
            Fit(plan.backend, shape, 1),
            Fit(plan.backend, shape, 4),
            Fit(plan.backend, shape, 1, "ar1"),
        )
        contrast = one.design.contrasts[0].weights[0]
        peers, some = Peers(n_voxels, contrast), slice(None, None, -(-n_voxels // _N_LOOKED_AT))
        series = []
        for host, pose in zip(volumes(shape, N_VOLUMES), poses(N_VOLUMES), strict=True):
            volume, place = plan.backend.upload(host), plan.backend.copy(pose)
            for fit in fits:
                fit.take(volume, place)
            peers.take(host, one.rows[-1])
            series.append(host[some].astype(np.float64))
        expected = t_by_least_squares(np.array(series), np.array(one.rows), contrast)
        found = {"ours": one.statistics()[0], **peers.t()}
        errors = {name: float(np.abs(t[some] - expected).max()) for name, t in found.items()}
        for cold in (False, True):
            where = {"grid": grid_name(shape), "caches": "cold" if cold else "hot"}
            for fit, calls in ((one, peers.calls()), (four, {})):
                row = _against_peers(plan.clock, fit, n_voxels, calls, plan.rounds, cold)
                step.append({**where, **row, **({"t_error": errors} if calls else {})})
            cost.append({**where, **_cost(plan.clock, one, ar1, plan.rounds, cold)})
    return {"glm": step, "glm_cost": cost}


def _against_peers(
    clock: Clock,
    fit: Fit,
    n_voxels: int,
    peers: dict[str, Callable[[], _F64]],
    rounds: int,
    cold: bool,
) -> dict[str, Any]:
    kinds = [contrast.kind for contrast in fit.design.contrasts]
    moved = needed_bytes(len(kinds))
    held = moved - 4 * N_COLUMNS - 4  # what is updated in place is there once
    stream = clock.largest if cold else clock.stream(held * n_voxels)
    host = peers_clock(clock)
    theirs = {name: host.timer(call, cold=cold) for name, call in peers.items()}
    timers = {
        "ours": clock.timer(fit.push, cold=cold),
        "stream": clock.timer(stream, cold=cold),
        **theirs,
        **{_ONE_THREAD + name: on_one_blas_thread(timer) for name, timer in theirs.items()},
    }
    slow = [name for name in timers if name not in ("ours", "stream")]
    seconds = take_turns(timers, rounds, cold=cold, slow=slow)
    median_ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    for name in peers:
        median_ms[name] = min(median_ms[name], median_ms[_ONE_THREAD + name])
    stream_gb_s = gb_per_s(stream.n_bytes, seconds["stream"])
    allowed_ms = 1e-6 * moved * n_voxels / stream_gb_s
    return {
        "contrasts": " + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        **statistics_ms(seconds["ours"]),
        "bytes_per_voxel": moved,
        "stream_gb_s": stream_gb_s,
        "allowed_ms": allowed_ms,
        "of_allowed": median_ms["ours"] / allowed_ms,
        **{f"{name}_ms": median_ms[name] for name in peers},
        "times_faster": {name: median_ms[name] / median_ms["ours"] for name in peers},
    }


def _cost(clock: Clock, ols: Fit, ar1: Fit, rounds: int, cold: bool) -> dict[str, Any]:
    host, timers = peers_clock(clock), {}
    for noise, fit in (("ols", ols), ("ar1", ar1)):
        timers[noise, "push"] = clock.timer(fit.push, cold=cold)
        timers[noise, "design"] = clock.timer(fit.update_design, cold=cold)
        timers[noise, "told"] = host.timer(fit.told, cold=cold)
    seconds = take_turns(timers, rounds, cold=cold)
    row: dict[str, Any] = {}
    for noise in ("ols", "ar1"):
        push, design, told = (
            statistics.median(seconds[noise, part]) for part in ("push", "design", "told")
        )
        row[noise] = {"push_ms": 1e3 * push, "design_us": 1e6 * design, "told_us": 1e6 * told}
    return {
        **row,
        "times_ols": row["ar1"]["push_ms"] / row["ols"]["push_ms"],
        "n_classes": ar1.n_classes(),
        "warm_up_end_ms": ar1.longest_catch_up_ms,
    }

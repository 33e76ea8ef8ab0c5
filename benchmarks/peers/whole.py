"""The whole way of a volume: ours beside python-rtspm and an incremental GLM in NumPy."""

import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend

from ..chain import FWHM_MM, Chain
from ..measure import Plan, Row, Tables, grid_name, statistics_ms
from ..phantom import DRIFT, deviation_mm, rigid
from ..tables import Layout, number, text
from .glm import Iglm, InPlaceIglm, on_one_blas_thread
from .motion import Rtspm

MOST_VOLUMES, FEWEST_VOLUMES = 30, 6
_MOST_VOXELS = 6_000_000
"""Of all volumes of a grid that are timed: large ones take python-rtspm more than a second."""
_N_BEFORE = 24
"""Volumes that the GLMs have seen before: more than columns."""

PEER_STAGES = ("realign", "reslice", "smooth", "glm")

LAYOUTS = {
    "whole": Layout(
        "From a mosaic's pixels to the ROIs' values and a t map, against python-rtspm's "
        "realign + reslice + smooth and an incremental GLM in NumPy float64",
        (
            ("grid", text("grid")),
            ("volumes", number(0, "n")),
            ("ours ms", number(2, "median_ms")),
            ("p95", number(2, "p95_ms")),
            ("motion error rms mm", number(4, "rms_mm")),
            *((f"{stage} ms", number(1, f"{stage}_ms")) for stage in PEER_STAGES),
            ("their sum ms", number(1, "peer_ms")),
            ("motion error rms mm", number(4, "peer_rms_mm")),
            ("times", number(1, "times")),
        ),
    ),
}


class RtspmChain:
    """python-rtspm's realign, reslice and smooth, then `Iglm` as it is fastest here.

    Its design has as many columns as ours, but of noise: the phantom drifts along and about all
    axes alike, so that the columns of motion are multiples of each other, which the normal
    equations cannot solve.

    Parameters
    ----------
    chain : Chain
        Whose images it gets, against the first as the reference.
    n_columns : int
        Of the GLM.
    """

    def __init__(self, chain: Chain, n_columns: int) -> None:
        grid = chain.phantom.grid
        self._spm = importlib.import_module("rtspm")
        self._motion = Rtspm(grid, chain.images[0])
        self._kernel = FWHM_MM / np.array(grid.voxel_size_mm)
        self._glm = InPlaceIglm(grid.n_voxels, np.eye(n_columns)[-1])
        self._n_columns, self._rng = n_columns, np.random.default_rng(0)
        self._volume: NDArray[np.float64] = np.zeros(0)

    def begin(self, image: NDArray[np.int16]) -> None:
        """Take a volume, as it is, into the GLM alone."""
        self._glm.take(image.reshape(-1, order="F").astype(np.float64), self._row())

    def load(self, image: NDArray[np.int16]) -> None:
        """Take the next volume; this is not timed."""
        self._motion.load(image)

    def realign(self) -> None:
        """Find the head."""
        self._motion.estimate()

    def reslice(self) -> None:
        """Sample the volume where the head is."""
        self._resliced = self._motion.reslice()

    def smooth(self) -> None:
        """Smooth what was resliced."""
        self._volume = self._spm.spm_smooth(self._resliced, self._kernel)

    def glms(self) -> list[Callable[[], object]]:
        """Return what takes the smoothed volume into the GLM and tells t, in both forms."""
        volume = np.asarray(self._volume, np.float64).reshape(-1, order="F")
        volume[~np.isfinite(volume)] = 0.0  # so SPM marks what came from outside the picture
        return [partial(self._step, form, volume) for form in (Iglm, InPlaceIglm)]

    def _step(self, form: type[Iglm], volume: NDArray[np.float64]) -> None:
        # Both forms go on with the same sums.
        form.take(self._glm, volume, self._row())
        form.t(self._glm)

    def _row(self) -> NDArray[np.float64]:
        return np.append(self._rng.normal(size=self._n_columns - 1), 1.0)

    def error_mm(self, motion: NDArray[np.float64]) -> float:
        """Return the error of the motion that was found."""
        return deviation_mm(self._motion.transform(), rigid(motion))


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``whole``, one a grid."""
    if not find_spec("rtspm"):
        return {"whole": [{"skipped": "python-rtspm is not installed"}]}
    rows = []
    for shape in plan.grids:
        plan.progress(f"the whole way against its peers, {grid_name(shape)}")
        if Rtspm.takes(shape):
            rows.append(compare(plan.backend, shape))
        else:
            rows.append({"skipped": f"{grid_name(shape)}: {Rtspm.LIMIT}"})
    return {"whole": rows}


def compare(backend: Backend, shape: tuple[int, int, int]) -> Row:
    """Return the row of one grid: the same volumes to both, in turn."""
    chain = Chain(backend, shape)
    chain.begin()
    design = chain.pipeline.design
    assert design is not None
    peer, n_images = RtspmChain(chain, len(design.columns)), len(chain.images)
    n_timed = min(MOST_VOLUMES, max(FEWEST_VOLUMES, _MOST_VOXELS // chain.phantom.grid.n_voxels))
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", "sum", *PEER_STAGES)}
    errors_mm: dict[str, list[float]] = {"ours": [], "peer": []}

    for i in range(_N_BEFORE + n_timed):
        index = chain.n_pushed % n_images
        result = chain.push()
        image = chain.images[index]
        if i < _N_BEFORE:
            peer.begin(image)
            continue
        motion = np.full(6, DRIFT * min(index, n_images - index) / (n_images // 2))
        peer.load(image)
        marks = [timed(call) for call in (peer.realign, peer.reslice, peer.smooth)]
        glms = [on_one_blas_thread(partial(timed, call))() for call in peer.glms()]
        stages = [*marks, min(glms)]
        for name, value in zip(
            ("ours", *PEER_STAGES), (1e-3 * result.latency_ms, *stages), strict=True
        ):
            seconds[name].append(value)
        seconds["sum"].append(sum(stages))
        assert result.motion is not None
        errors_mm["ours"].append(deviation_mm(result.motion.affine, rigid(motion)))
        errors_mm["peer"].append(peer.error_mm(motion))
    median_ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "grid": grid_name(shape),
        "n": n_timed,
        **statistics_ms(seconds["ours"]),
        "rms_mm": _rms(errors_mm["ours"]),
        **{f"{stage}_ms": median_ms[stage] for stage in PEER_STAGES},
        "peer_ms": median_ms["sum"],
        "peer_rms_mm": _rms(errors_mm["peer"]),
        "times": median_ms["sum"] / median_ms["ours"],
    }


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that *call* takes."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))

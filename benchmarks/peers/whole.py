"""The whole way of a volume: ours beside python-rtspm and an incremental GLM in NumPy."""

import importlib
import statistics
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend
from rtfmri.config import BaselineSettings, GlmSettings, ParadigmSettings, QualitySettings
from rtfmri.design import Confounds, Design
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import Pipeline, Result
from rtfmri.volume import Volume, tiled, untiled

from ..chain import FWHM_MM, TR_S, new_pipeline
from ..measure import Plan, Row, Tables, grid_name, rms, seconds_of, statistics_ms
from ..phantom import DRIFT, Phantom, deviation_mm, rigid, walk
from ..tables import Layout, number, text
from .glm import Iglm, InPlaceIglm, on_one_blas_thread
from .motion import Rtspm
from .smoothing import exactly_smoothed

MOST_VOLUMES, FEWEST_VOLUMES = 48, 22
_MOST_VOXELS = 24_000_000
"""Of all volumes of a grid: large ones take python-rtspm two seconds."""
N_BEFORE = 16
"""Volumes that are not timed: by then there are more than columns, and both tasks have come."""
_TASKS, _BLOCK_S = ("left", "right"), 5.0
"""A block of each, then one of rest. The region that is active with the second is known."""
_N_CONFOUNDS = 4
"""Columns of noise, which stand for physiology: there are 15 columns, as in the chain."""
_ALL_COUNT = QualitySettings(fd_limit_mm=5.0)
"""The peers leave out no volume either."""

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
            ("error of motion, rms mm", number(4, "rms_mm")),
            ("of activation, rms %", number(3, "effect_error")),
            *((f"{stage} ms", number(1, f"{stage}_ms")) for stage in PEER_STAGES),
            ("their sum ms", number(1, "peer_ms")),
            ("error of motion, rms mm", number(4, "peer_rms_mm")),
            ("of activation, rms %", number(3, "peer_effect_error")),
            ("by noise alone", number(3, "still_effect_error")),
            ("times", number(1, "times")),
            ("their GLM of the brain alone ms", number(1, "brain_glm_ms")),
            ("times", number(1, "times_of_brain")),
        ),
    ),
}


class Run:
    """A head that wanders, in two tasks in turn with rest between; in the second, it is active.

    Parameters
    ----------
    shape : (int, int, int)
    n : int
        Volumes.

    Attributes
    ----------
    phantom : Phantom
    paradigm : Paradigm
    design : Design
        Motion is still to be filled in.
    motion : (n, 6) float64
        As for `phantom.rigid`.
    reference : (x, y, z) int16
        The first volume, at rest.
    """

    def __init__(self, shape: tuple[int, int, int], n: int) -> None:
        self.phantom = Phantom(shape)
        tasks = range(1, int(n * TR_S / _BLOCK_S))
        events = [Event(i * _BLOCK_S, _BLOCK_S, _TASKS[i % 3 - 1]) for i in tasks if i % 3]
        self.paradigm = Paradigm(events, ParadigmSettings(), BaselineSettings())
        self.design = Design(
            self.paradigm,
            GlmSettings(high_pass_s=n * TR_S),
            TR_S,
            n_volumes=n,
            confounds=Confounds(
                np.random.default_rng(0).normal(size=(n, _N_CONFOUNDS)),
                tuple(f"noise_{i}" for i in range(_N_CONFOUNDS)),
            ),
        )
        self.contrast = self.design.contrasts[-1]
        response = self.design.rows(n) @ self.contrast.weights[0]
        self._largest = response.max()
        self._active = response / self._largest
        self.motion = DRIFT * walk(n)
        self.reference = self.phantom.volume(0, np.zeros(6))

    def volumes(self) -> Iterator[NDArray[np.int16]]:
        """Yield each volume, (x, y, z)."""
        yield self.reference
        for i in range(1, len(self.motion)):
            yield self.phantom.volume(i, self.motion[i], active=self._active[i])

    def row(self, index: int, transform: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a volume's row of the design, once *transform*, 4x4, says where the head is."""
        row, at = self.design.row(index), self.design.motion_at
        row[at : at + 3] = transform[:3, 3]
        row[at + 3 : at + 6] = transform[[2, 0, 1], [1, 2, 0]]  # small angles are their sines
        return row

    def still_effect(self) -> NDArray[np.float64]:
        """Return the effect, (x, y, z), were the head held still: what is wrong is the noise's."""
        rows = np.array([self.row(i, rigid(motion)) for i, motion in enumerate(self.motion)])
        effect = np.zeros(self.phantom.grid.shape)
        for i, weight in enumerate(self.contrast.weights[0] @ np.linalg.pinv(rows)):
            effect += weight * self.phantom.volume(i, np.zeros(6), active=self._active[i])
        return exactly_smoothed(effect, self.phantom.grid)

    def effect_error(self, effect: NDArray[np.floating[Any]]) -> float:
        """Return by how much an *effect*, (x, y, z), is wrong where the region is active.

        That is the root mean square, in percent of the signal, over the voxels with at least half
        of the largest change, of what was found less what a head without noise and motion has.
        """
        rest, active = (
            exactly_smoothed(self.phantom.signal(np.zeros(6), active=on), self.phantom.grid)
            for on in (0.0, 1.0)
        )
        change = active - rest
        inside = change > change.max() / 2
        wrong = (effect * self._largest - change)[inside] / rest[inside]
        return 100 * rms(wrong)


class Ours:
    """The chain's pipeline.

    Parameters
    ----------
    backend : Backend
    run : Run
    """

    def __init__(self, backend: Backend, run: Run) -> None:
        self._run, self._n = run, 0
        self.pipeline: Pipeline = new_pipeline(
            backend, run.phantom, design=run.design, paradigm=run.paradigm, quality=_ALL_COUNT
        )

    def push(self, mosaic: NDArray[np.int16]) -> Result:
        """Take a mosaic's pixels all the way; then do, as a `Session` does, what could wait."""
        grid, arrived_s = self._run.phantom.grid, time.perf_counter()
        data = untiled(mosaic, grid.shape)
        volume = Volume(data, grid, self._n, tr_s=TR_S, arrived_s=arrived_s)
        self._n += 1
        result = self.pipeline.push(volume)
        self.pipeline.catch_up()
        return result

    def effect(self) -> NDArray[np.float32]:
        """Return the effect of the run's contrast so far, (x, y, z)."""
        effect = self.pipeline.glm_maps()[self._run.contrast.name].effect
        assert effect is not None
        return effect


class Theirs:
    """python-rtspm's realign, reslice and smooth, then the incremental GLM.

    The two forms of it take turns from volume to volume, with the same sums.

    Parameters
    ----------
    run : Run
        Whose first volume is the reference.
    brain : (x, y, z) bool
        Of which the GLM is done once more.
    """

    def __init__(self, run: Run, brain: NDArray[np.bool_]) -> None:
        grid, weights = run.phantom.grid, run.contrast.weights[0]
        self._spm = importlib.import_module("rtspm")
        self._run, self._brain = run, np.flatnonzero(brain.reshape(-1, order="F"))
        self._motion = Rtspm(grid, run.reference)
        self._kernel = FWHM_MM / np.array(grid.voxel_size_mm)
        self._of_all = InPlaceIglm(grid.n_voxels, weights)
        self._of_brain = InPlaceIglm(self._brain.size, weights)

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
        self._smoothed = self._spm.spm_smooth(self._resliced, self._kernel)

    def fit(self, index: int, form: type[Iglm]) -> tuple[float, float]:
        """Take volume *index* into the GLM, tell t, and return the seconds of it.

        Of all voxels, and of the brain's alone; on one thread of BLAS, which is faster.
        """
        row = self._run.row(index, self.transform())
        volume = np.asarray(self._smoothed, np.float64).reshape(-1, order="F")
        volume[~np.isfinite(volume)] = 0.0  # so SPM marks what came from outside the picture

        def step(glm: Iglm, voxels: NDArray[np.float64]) -> None:
            form.take(glm, voxels, row)
            if index >= N_BEFORE:
                form.t(glm)

        of_all = partial(seconds_of, partial(step, self._of_all, volume))
        of_brain = partial(seconds_of, partial(step, self._of_brain, volume[self._brain]))
        return on_one_blas_thread(of_all)(), on_one_blas_thread(of_brain)()

    def effect(self) -> NDArray[np.float64]:
        """Return the effect of the run's contrast so far, (x, y, z)."""
        return self._of_all.effect().reshape(self._run.phantom.grid.shape, order="F")

    def transform(self) -> NDArray[np.float64]:
        """Return where the head was found: see `motion.Corrector.transform`."""
        return self._motion.transform()


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``whole``, one a grid."""
    for package, name in (("rtspm", "python-rtspm"), ("nilearn", "nilearn")):
        if not find_spec(package):
            return {"whole": [{"skipped": f"{name} is not installed"}]}
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
    n = min(MOST_VOLUMES, max(FEWEST_VOLUMES, _MOST_VOXELS // int(np.prod(shape))))
    head = Run(shape, n)
    ours, theirs = Ours(backend, head), None
    seconds: dict[str, list[float]] = {}
    steps_ms: dict[str, list[float]] = {}
    errors_mm: dict[str, list[float]] = {"ours": [], "peer": []}

    for i, image in enumerate(head.volumes()):
        result = ours.push(tiled(image))
        if theirs is None:
            brain = ours.pipeline.brain
            assert brain is not None
            theirs = Theirs(head, brain)
        theirs.load(image)
        told = {"ours": 1e-3 * result.latency_ms}
        for stage in (theirs.realign, theirs.reslice, theirs.smooth):
            told[stage.__name__] = seconds_of(stage)
        form = Iglm if i >= N_BEFORE and i % 2 else InPlaceIglm
        told[f"glm {form}"], told[f"brain_glm {form}"] = theirs.fit(i, form)
        if i < N_BEFORE:
            continue
        for name, value in told.items():
            seconds.setdefault(name, []).append(value)
        for name, value in result.stage_ms.items():
            steps_ms.setdefault(name, []).append(value)
        assert result.motion is not None
        true = rigid(head.motion[i])
        errors_mm["ours"].append(deviation_mm(result.motion.affine, true))
        errors_mm["peer"].append(deviation_mm(theirs.transform(), true))
    assert theirs is not None
    all_ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    median_ms = {
        stage: min(ms for name, ms in all_ms.items() if name.split()[0] == stage)
        for stage in (*PEER_STAGES, "brain_glm")
    }
    peer_ms = sum(median_ms[stage] for stage in PEER_STAGES)
    of_brain_ms = peer_ms - median_ms["glm"] + median_ms["brain_glm"]
    return {
        "grid": grid_name(shape),
        "n": n - N_BEFORE,
        **statistics_ms(seconds["ours"]),
        "steps_ms": {step: statistics.median(values) for step, values in steps_ms.items()},
        "rms_mm": rms(errors_mm["ours"]),
        "effect_error": head.effect_error(ours.effect()),
        **{f"{stage}_ms": ms for stage, ms in median_ms.items()},
        "peer_ms": peer_ms,
        "peer_rms_mm": rms(errors_mm["peer"]),
        "peer_effect_error": head.effect_error(theirs.effect()),
        "still_effect_error": head.effect_error(head.still_effect()),
        "times": peer_ms / all_ms["ours"],
        "times_of_brain": of_brain_ms / all_ms["ours"],
    }

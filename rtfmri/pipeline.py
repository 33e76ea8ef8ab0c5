"""The per-TR path, in order: one volume in, one result out."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from weakref import WeakMethod

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfmri.backends import Array, Backend, open_backend
from rtfmri.config import Config
from rtfmri.design import Confounds, Design, check_design, design_of, slice_time
from rtfmri.errors import ConfigError, VolumeError
from rtfmri.paradigm import Paradigm
from rtfmri.stages.baseline import BaselineStage
from rtfmri.stages.brain import BrainStage
from rtfmri.stages.detrend import DetrendStage, with_derivative
from rtfmri.stages.glm import MEMORY_FWHM_MM, ContrastMaps, GlmStage
from rtfmri.stages.mask import brain_mask, load_nilearn
from rtfmri.stages.motion import MotionStage, MotionValue
from rtfmri.stages.quality import QualityStage, QualityValue, report_parts
from rtfmri.stages.readout import Readout, ReadoutStage, n_numbers
from rtfmri.stages.region import Mask
from rtfmri.stages.roi import RoiContrast, RoiStage, RoiValue, roi_table
from rtfmri.stages.slice_timing import SliceTimingStage
from rtfmri.volume import Grid, Volume

_log = logging.getLogger(__name__)

STAGES = (
    *("decode", "wait", "begin", "upload", "slice_timing", "motion", "reslice", "smooth"),
    *("quality", "glm", "detrend", "baseline", "roi", "fetch"),
)
"""The steps of the path, as `Result.stage_ms` names them."""

MAX_START_UP = 10
"""Volumes within which the magnetisation has become steady; later, a change has other reasons."""
_STEADY, _FAULT = 0.015, 5.0
"""Two volumes agree if their means differ by less than 1.5 %, which is above what breathing,
motion and drift do within one TR; a factor of 5 is a fault and no relaxation."""
_NOTHING = np.zeros(0)
_LOST = {"not registered", "out of view"}
"""Problems of two volumes of which one was the reference: nobody can tell whose they are."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What the signals make of one volume (`rtfmri.feedback`).

    Attributes
    ----------
    signals : mapping of str to float
        Each in its own units; nan is no value.
    shown : float
        What the participant is to see, from 0 to 1; nan is no value.
    """

    signals: Mapping[str, float]
    shown: float


@dataclass(frozen=True, slots=True)
class Result:
    """What one volume gave.

    Attributes
    ----------
    index : int
        The volume's position in the run, from 0.
    time_s : float
        Start of its acquisition, in seconds after the start of volume 0.
    conditions : tuple of str
        The conditions it counted for; empty in a transition, and if it was not usable.
    roi : dict of str to RoiValue
        One value a region; nan where there is none.
    motion : MotionValue or None
        Where the head is; None without motion correction.
    quality : QualityValue
        How good the volume is, and whether it was usable.
    design : (n_columns,) float64 or None
        The volume's row of the design matrix, motion filled in; None without a GLM.
    begins : bool
        Whether the run began with this volume: it is the first, or those before it turned out to
        be of the scanner's start-up, or no good, and count for nothing.
    baseline_ready : bool
        Whether there was a baseline to subtract; else PSC and z are nan.
    stage_ms : dict of str to float
        Time in each of `STAGES`, in their order, in ms. On a GPU the steps run on their own; what
        was waited for at the end is under fetch.
    latency_ms : float
        From the arrival of the volume's last byte to this result, in ms.
    deadline_missed : bool
        Whether that is more than `Config.deadline_s`.
    readouts : dict of str to (n,) float64
        What was asked of single voxels; nan where there is no baseline.
    feedback : Feedback or None
        What a `Session`'s signals make of it; a `Pipeline` alone leaves it None.
    """

    index: int
    time_s: float
    conditions: tuple[str, ...]
    roi: dict[str, RoiValue]
    motion: MotionValue | None
    quality: QualityValue
    design: NDArray[np.float64] | None
    begins: bool
    baseline_ready: bool
    stage_ms: dict[str, float]
    latency_ms: float
    deadline_missed: bool
    readouts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    feedback: Feedback | None = None

    @property
    def missing(self) -> bool:
        """Whether the volume never came: then only index, time_s and feedback say something."""
        return "missing" in self.quality.problems


class ConditionMaps(NamedTuple):
    """One condition over the run, (x, y, z) float32 maps.

    ``mean`` is its mean image; ``effect`` (scanner units), ``psc`` (percent) and ``t`` (Welch)
    compare it with the baseline, and are 0 for the baseline and while either has fewer than two
    volumes. Outside the mask all are 0.
    """

    n_volumes: int
    mean: NDArray[np.float32]
    effect: NDArray[np.float32]
    psc: NDArray[np.float32]
    t: NDArray[np.float32]


class RunMaps(NamedTuple):
    """All that a run has found so far; (x, y, z) maps, 0 outside the mask.

    ``conditions`` by condition, ``contrasts`` of the GLM by contrast (empty without one),
    ``quality`` by name: mask, tsnr, snr and memory, the noise's lag-1 autocorrelation that the GLM
    has taken out.
    """

    conditions: dict[str, ConditionMaps]
    contrasts: dict[str, ContrastMaps]
    quality: dict[str, NDArray[np.float32]]


class _Parts(NamedTuple):
    """Which part of a volume's report holds what the quality stage does not measure."""

    pose: slice
    design: slice
    roi: slice
    roi_detrended: slice
    readouts: slice


@dataclass(slots=True)
class _Run:
    """What begins with the first good volume: all that depends on the reference and the brain."""

    brain: BrainStage
    quality: QualityStage
    glm: GlmStage | None
    detrend: DetrendStage | None
    baseline: BaselineStage
    roi: RoiStage
    readout: ReadoutStage
    report: Array
    parts: "_Parts"
    prepare: Callable[[], None] | None = None


class _Laps:
    """The time that each step of one volume takes."""

    def __init__(self, decode_s: float, arrived_s: float) -> None:
        self._last_s = time.perf_counter()
        self.ms = dict.fromkeys(STAGES, 0.0)
        self.ms["decode"] = 1e3 * decode_s
        self.ms["wait"] = 1e3 * (self._last_s - arrived_s - decode_s)

    def __call__(self, stage: str) -> float:
        """Count the time since the last call for *stage*; return the clock's seconds."""
        now_s = time.perf_counter()
        self.ms[stage] += 1e3 * (now_s - self._last_s)
        self._last_s = now_s
        return now_s


class Pipeline:
    """The path of a volume, without any input or output.

    Parameters
    ----------
    grid : Grid
        Shape and position of every volume.
    config : Config, optional
        Settings.
    paradigm : Paradigm, optional
        Conditions by time; by default every volume is baseline.
    rois : mapping of str to (x, y, z) array, optional
        Weights of each region on *grid*; 0 is outside. Its voxels count as brain.
    readouts : mapping of str to Readout, optional
        What is asked of single voxels, on *grid*.
    mask : (x, y, z) bool, optional
        The brain; needed if `MaskSettings.source` is a file, which others read.
    reference : (x, y, z) array, optional
        What to register to; needed if `MotionSettings.reference` is a file.
    confounds : Confounds, optional
        The user's regressors; needed if `GlmSettings.confounds` is a file.
    tr_s : float, optional
        Seconds between volumes; by default the first volume tells. The design needs it.
    n_volumes : int, optional
        The run's planned length, which decides how many cosines model the drift.
    dtype : dtype
        Of the volumes: int16, uint16 or float32. Kernels for it are compiled here, not later.
    backend : Backend, optional
        One that is open already, instead of the one that *config* names.

    Raises
    ------
    ConfigError
        If a region, mask or reference does not fit the grid, or is empty or missing, or a
        contrast names what is no column of the design.
    DeviceError
        If the device cannot be had.
    """

    def __init__(
        self,
        grid: Grid,
        config: Config | None = None,
        *,
        paradigm: Paradigm | None = None,
        rois: Mapping[str, NDArray[Any]] | None = None,
        readouts: Mapping[str, Readout] | None = None,
        mask: NDArray[np.bool_] | None = None,
        reference: NDArray[Any] | None = None,
        confounds: Confounds | None = None,
        tr_s: float | None = None,
        n_volumes: int | None = None,
        dtype: DTypeLike = np.int16,
        backend: Backend | None = None,
    ) -> None:
        self._config = config = config or Config()
        self._rois, self._readouts = dict(rois or {}), dict(readouts or {})
        _check_images(grid, config, self._rois, self._readouts, mask, reference)
        roi_table(self._rois)
        self.grid = grid
        self.dtype = np.dtype(dtype)
        self.paradigm = paradigm or Paradigm((), config.paradigm, config.baseline)
        self._confounds, self._n_planned = confounds, n_volumes
        if confounds is None and config.glm.confounds is not None:
            raise ConfigError(
                "confounds must be given, since the settings name a file and a Pipeline reads "
                "none; use a Session"
            )
        if tr_s is None:
            check_design(self.paradigm, config, confounds, n_volumes)
        self._backend = backend or open_backend(config.device, config.threads)
        for voxel in {self.dtype, np.dtype(np.float32)}:
            self._backend.warm(voxel)
        self._mask = mask
        self._reference = None if reference is None else reference.astype(np.float32, order="F")
        if mask is None and config.mask.source == "auto":
            load_nilearn()
        self._motion = self._new_motion()
        self.design = None if tr_s is None else self._new_design(tr_s)
        self._slice_timing: SliceTimingStage | None = None
        self._run: _Run | None = None
        self._last: Result | None = None
        self._tr_s = 0.0
        self._n_pushed = self._n_start_up = 0
        self._steady, self._level = False, 0.0
        self._holes: NDArray[np.bool_] | None = None
        self._raw: Array = None
        self._voxels: Array = None
        self._brain_voxels: Array = None
        self._lap = _Laps(0.0, time.perf_counter())

    @property
    def device(self) -> str:
        """The backend that executes this pipeline: cpu or cuda."""
        return self._backend.name

    @property
    def brain(self) -> Mask | None:
        """The mask, (x, y, z) bool; None before the run has begun."""
        return self._run.brain.mask if self._run else None

    @property
    def n_start_up(self) -> int:
        """Volumes before the signal was steady, which count for nothing."""
        return self._n_start_up

    def push(self, volume: Volume) -> Result:
        """Take one volume through all steps.

        Raises
        ------
        VolumeError
            If shape, position or dtype differ from the run's, or the run has not begun and this
            volume is no reference to begin with; the state is as it was before.
        ConfigError
            At the first volume, if its header lacks what the settings ask for.
        """
        with self._backend.undisturbed():
            result = self._take(volume)
        self._n_pushed += 1
        self._last = result
        return result

    def _take(self, volume: Volume) -> Result:
        self._lap = _Laps(volume.decoded_s - volume.arrived_s, volume.arrived_s)
        self._tr_s = volume.tr_s
        volume.check_like(self.grid, self.dtype)
        begins = self._begins(volume)
        if begins:
            self._begin(volume)
        self._lap("begin")
        result = self._process(volume, begins)
        if not begins and self._may_be_the_references(result):
            with suppress(VolumeError):
                self._begin(volume)
                self._lap("begin")
                result = self._process(volume, begins=True)
        return result

    def miss(self, index: int) -> Result:
        """Return the result of volume *index*, which is not waited for any longer.

        No stage learns of it. Its ROI values are nan, or with `OrderSettings.feedback` "hold"
        those of the volume before.

        Raises
        ------
        VolumeError
            If the run has not begun.
        """
        if self._run is None or self._last is None:
            raise VolumeError("the run has not begun")
        last = self._last
        hold = self._config.order.feedback == "hold"
        return Result(
            index=index,
            time_s=index * self._tr_s,
            conditions=(),
            roi=last.roi if hold else {name: value.none() for name, value in last.roi.items()},
            motion=None,
            quality=self._run.quality.missing(),
            design=None,
            begins=False,
            baseline_ready=last.baseline_ready and hold,
            stage_ms=dict.fromkeys(STAGES, 0.0),
            latency_ms=math.nan,
            deadline_missed=False,
            readouts={name: np.full_like(found, np.nan) for name, found in last.readouts.items()},
        )

    def catch_up(self) -> None:
        """Do what may wait until a result is out; else the next volume has to wait for it.

        That is the end of ar1's warm-up, and what quality learns of a volume; a `Session` leaves
        it for the time between volumes.
        """
        if self._run is None:
            return
        self._run.quality.catch_up()
        if self._run.glm:
            self._run.glm.catch_up()
            self._run.roi.catch_up()

    def _process(self, volume: Volume, begins: bool) -> Result:
        run, members = self._run, self.paradigm.members(volume.time_s, volume.tr_s)
        assert run is not None
        limits, known, drift = self._tell(run, volume.index)
        self._raw = self._voxels = self._backend.upload(self._patched(volume.flat))
        self._lap("upload")
        if self._slice_timing:
            self._voxels = self._slice_timing.push(self._raw, volume.index)
            self._lap("slice_timing")
        if run.prepare:
            run.prepare()
        else:
            run.prepare = self._backend.record(_without_holding(self._prepare))
        run.quality.push(self._brain_voxels, limits)
        self._lap("quality")
        if run.glm:
            pose = run.report[run.parts.pose] if run.glm.design.motion_at >= 0 else None
            row = run.report[run.parts.design]
            run.glm.push(self._brain_voxels, known, row, pose, run.quality.usable)
            self._lap("glm")
        voxels = self._brain_voxels
        if run.detrend:
            voxels = run.detrend.push(voxels, drift, run.quality.usable)
            run.roi.push(voxels, run.report[run.parts.roi_detrended])
            self._lap("detrend")
        run.baseline.push(voxels, members, run.quality.usable)
        run.readout.push(run.baseline.subtraction, run.report[run.parts.readouts])
        self._lap("baseline")
        run.roi.push(self._brain_voxels, run.report[run.parts.roi])
        self._lap("roi")
        report = self._backend.fetch(run.report)
        motion = self._motion.result(report) if self._motion else None
        quality = run.quality.result(report)
        run.baseline.settle(quality.usable)
        design = report[run.parts.design] if run.glm else None
        if run.glm and design is not None:
            run.glm.settle(design, quality.usable)
        if run.detrend:
            run.detrend.settle(quality.usable)
        if self._slice_timing and not quality.usable:
            self._slice_timing.forget()
        roi = run.roi.compare(
            report[run.parts.roi],
            members,
            quality.usable,
            detrended=report[run.parts.roi_detrended] if run.detrend else None,
            index=volume.index,
            row=design,
        )
        done_s = self._lap("fetch")
        counted = members if quality.usable else ()
        return Result(
            index=volume.index,
            time_s=volume.time_s,
            conditions=tuple(self.paradigm.conditions[c] for c in counted),
            roi=roi,
            motion=motion,
            quality=quality,
            design=design,
            begins=begins,
            baseline_ready=run.baseline.ready,
            stage_ms=self._lap.ms,
            latency_ms=1e3 * (done_s - volume.arrived_s),
            deadline_missed=done_s - volume.arrived_s > (self._config.deadline_s or volume.tr_s),
            readouts=run.readout.values(report[run.parts.readouts], run.baseline.ready),
        )

    def _tell(self, run: _Run, index: int) -> tuple[Array, Array, Array]:
        """Upload all that the stages know of a volume before it comes, in one piece."""
        told = [
            run.quality.limits,
            run.glm.told(index) if run.glm else _NOTHING,
            run.detrend.told(index) if run.detrend else _NOTHING,
        ]
        array = self._backend.upload(np.concatenate([part.ravel() for part in told]))
        ends = accumulate((part.size for part in told), initial=0)
        limits, known, drift = (
            array[a:b].reshape(part.shape)
            for part, (a, b) in zip(told, pairwise(ends), strict=True)
        )
        return limits, known, drift

    def _prepare(self) -> None:
        """Find the head, and bring its brain to where it is in the reference.

        The same operations on the same arrays for every volume: on a GPU, one graph.
        """
        run, pose = self._run, None
        assert run is not None
        run.quality.inspect(self._raw)
        self._lap("quality")
        if self._motion:
            self._motion.push(self._voxels)
            self._lap("motion")
            if self._config.motion.mode == "correct":
                pose = self._motion.pose
        run.brain.reslice(self._voxels, pose)
        self._lap("reslice")
        self._brain_voxels = run.brain.smooth()
        self._lap("smooth")

    def _begins(self, volume: Volume) -> bool:
        """Tell whether the run begins, or begins anew, with this volume.

        The first volumes of a run are too bright, as long as the magnetisation has not met its
        steady state (T1 relaxation). So it begins anew until a volume is as bright as the one
        before it.
        """
        if self._steady:
            return False
        level, before = float(np.mean(_finite(volume.data))), self._level
        if self._run is None:
            self._level = level
            return True
        ratio = level / before if before > 0 else 1.0
        if not 1 / _FAULT < ratio < _FAULT:
            return False
        self._level = level
        self._steady = abs(ratio - 1) < _STEADY or self._n_pushed >= MAX_START_UP
        return not self._steady

    def _may_be_the_references(self, result: Result) -> bool:
        """Tell whether what is wrong with a volume may be the fault of the reference.

        So it may be as long as no other volume was found to be good.
        """
        return (
            self._reference is None
            and result.quality.n_usable <= 1
            and self._n_pushed < MAX_START_UP
            and not _LOST.isdisjoint(result.quality.problems)
        )

    def _begin(self, volume: Volume) -> None:
        """Take *volume* for the first good one: find the brain, and forget what was before."""
        backend, config = self._backend, self._config
        data = _finite(volume.data)
        if data.min() == data.max():
            raise VolumeError("all voxels are equal, so no run can begin with it")
        if config.slice_timing.method != "off" and self._slice_timing is None:
            self._slice_timing = SliceTimingStage(
                backend,
                self.grid.shape,
                volume.tr_s,
                volume.slice_times_s,
                config.slice_timing.method,
                self.dtype,
            )
        reference = data if self._reference is None else self._reference
        holes = ~np.isfinite(volume.data)
        brain = BrainStage(backend, self.grid, self._find_brain(reference, holes), config)
        if self.design is None:
            self.design = self._new_design(volume.tr_s)
        parts = self._parts(self.design)
        report = backend.zeros(parts.readouts.stop, np.float64)
        if self._motion:
            self._motion.set_reference(reference.reshape(-1, order="F"), report[parts.pose])
        n_conditions, inside = len(self.paradigm.conditions), brain.mask.reshape(-1, order="F")
        self._run = _Run(
            brain,
            QualityStage(
                backend,
                self.grid.shape,
                brain.n_voxels,
                config.quality,
                volume.tr_s,
                report=report,
                has_motion=self._motion is not None,
            ),
            self._new_glm(brain),
            self._new_detrend(brain, volume.tr_s),
            BaselineStage(backend, brain.n_voxels, n_conditions, config.baseline, np.float32),
            RoiStage(
                backend,
                {name: w.reshape(-1, order="F")[inside] for name, w in self._rois.items()},
                n_conditions,
                config,
                self.design,
            ),
            ReadoutStage(backend, self._readouts, inside),
            report,
            parts,
        )
        self._n_start_up = self._n_pushed
        self._holes = holes.reshape(-1, order="F") if holes.any() else None

    def _parts(self, design: Design | None) -> _Parts:
        """Lay out the report: first what quality knows of, then the design's row, then ROIs."""
        measured = report_parts(self.grid.shape[2], self._motion is not None)
        n_columns = len(design.columns) if design else 0
        n_rois, n_asked = len(self._rois), n_numbers(self._readouts)
        ends = np.cumsum([measured.slices.stop, n_columns, n_rois, n_rois, n_asked]).tolist()
        return _Parts(measured.pose, *(slice(a, b) for a, b in pairwise(ends)))

    def _new_design(self, tr_s: float) -> Design | None:
        design = design_of(
            self.paradigm,
            self._config,
            tr_s,
            n_volumes=self._n_planned,
            confounds=self._confounds,
            has_motion=self._motion is not None,
        )
        for condition in design.silent if design else ():
            _log.warning("condition %r: nothing of it falls into the run", condition)
        return design

    def _new_glm(self, brain: BrainStage) -> GlmStage | None:
        if self.design is None:
            return None
        return GlmStage(
            self._backend,
            brain.n_voxels,
            self.design,
            self._config.glm,
            lambda voxels: brain.spread(voxels, MEMORY_FWHM_MM),
        )

    def _new_detrend(self, brain: BrainStage, tr_s: float) -> DetrendStage | None:
        if self._config.detrend.method == "off":
            return None
        return DetrendStage(
            self._backend,
            brain.n_voxels,
            self._config.detrend,
            self.paradigm,
            tr_s,
            n_volumes=self._n_planned,
            # What the model of the response misses would be taken for drift.
            hrf=with_derivative(self._config.glm.hrf),
            slice_time=slice_time(self._config),
        )

    def _find_brain(self, reference: NDArray[Any], holes: Mask) -> Mask:
        """Return the mask, without holes, and with all voxels of all regions in it."""
        mask = np.ones(self.grid.shape, bool, order="F")
        if self._mask is not None:
            mask = np.array(self._mask, bool, order="F")
        elif self._config.mask.source == "auto":
            mask = brain_mask(reference, self.grid)
        mask &= ~holes
        for weights in self._rois.values():
            mask |= weights > 0
        return mask

    def _new_motion(self) -> MotionStage | None:
        if self._config.motion.mode == "off":
            return None
        if not MotionStage.possible(self.grid):
            _log.warning("motion is not looked at: %s is too small a grid", self.grid)
            return None
        motion = MotionStage(self._backend, self.grid)
        if self._reference is not None:
            try:
                motion.set_reference(self._reference.reshape(-1, order="F"))
            except VolumeError as error:
                raise ConfigError(f"motion.reference: {error}") from None
        return motion

    def subtraction(self) -> dict[str, NDArray[np.float32]]:
        """Return the newest volume against the baseline before it.

        Returns
        -------
        dict of str to (x, y, z) float32
            ``difference`` in scanner units, ``psc`` in percent, ``z`` in baseline standard
            deviations; all 0 while there is no baseline (`Result.baseline_ready`), and outside
            the mask. Empty before the run has begun.
        """
        if not self._run:
            return {}
        baseline = self._run.baseline
        maps = {name: self._image(m) for name, m in baseline.subtraction._asdict().items()}
        if not baseline.ready:
            for image in maps.values():
                image.fill(0)
        return maps

    def maps(self) -> dict[str, ConditionMaps]:
        """Return what the volumes so far say of each condition, the baseline first.

        Empty before the run has begun.
        """
        maps: dict[str, ConditionMaps] = {}
        if not self._run:
            return maps
        for i, name in enumerate(self.paradigm.conditions):
            state = self._run.baseline.conditions[i]
            contrast = self._run.baseline.contrast(i) if i else None
            flats = contrast or (self._backend.zeros(self._run.brain.n_voxels),) * 3
            effect, psc, t = (self._image(flat) for flat in flats)
            mean = self._image(state.moments.mean)
            maps[name] = ConditionMaps(state.n_volumes, mean, effect, psc, t)
        return maps

    def glm_maps(self) -> dict[str, ContrastMaps]:
        """Return what the GLM says of each contrast after the volumes so far, as (x, y, z) maps.

        Empty before the run has begun, and without a GLM.
        """
        run = self._run
        if not (run and run.glm):
            return {}
        return {name: maps.each(run.brain.image) for name, maps in run.glm.maps().items()}

    def quality_maps(self) -> dict[str, NDArray[np.float32]]:
        """Return (x, y, z) maps of the usable volumes so far; empty before the run has begun.

        ``mask`` is 0 or 1, ``tsnr`` and ``snr`` are the signal's, ``memory`` is the noise's lag-1
        autocorrelation as far as the GLM takes it out.
        """
        if not self._run:
            return {}
        brain, glm = self._run.brain, self._run.glm
        maps = {
            "mask": np.ones(brain.n_voxels, np.float32),
            **self._run.quality.maps(),
            "memory": glm.memory() if glm else np.zeros(brain.n_voxels, np.float32),
        }
        return {name: brain.image(voxels) for name, voxels in maps.items()}

    def run_maps(self) -> RunMaps:
        """Return all maps of the volumes so far."""
        return RunMaps(self.maps(), self.glm_maps(), self.quality_maps())

    def roi_t(self) -> dict[str, dict[str, float]]:
        """Return Welch's t of the ROI signals, each condition against the baseline."""
        conditions = enumerate(self.paradigm.conditions) if self._run else ()
        return {name: self._run.roi.t(i) for i, name in conditions if i and self._run}

    def roi_contrasts(self) -> dict[str, dict[str, RoiContrast]]:
        """Return what the GLM says of the ROI signals, by contrast and region."""
        return self._run.roi.contrasts() if self._run else {}

    def _image(self, voxels: Array) -> NDArray[np.float32]:
        assert self._run is not None
        return self._run.brain.image(self._backend.download(voxels))

    def _patched(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Return a volume with 0 in the holes that the first good one had, too.

        Some programs write what is no number outside the brain; elsewhere it is a fault, which is
        left for the quality stage to see.
        """
        if self._holes is None:
            return flat
        return np.where(self._holes & ~np.isfinite(flat), np.float32(0), flat)


def _without_holding(method: Callable[[], None]) -> Callable[[], None]:
    """Return what calls *method* but does not keep its object.

    A pipeline that kept itself would stay in memory, with all of its arrays, until Python looks
    for circles.
    """
    weak = WeakMethod(method)

    def call() -> None:
        alive = weak()
        assert alive is not None
        alive()

    return call


def _finite(voxels: NDArray[Any]) -> NDArray[Any]:
    """Return *voxels* with 0 where there is no number."""
    if voxels.dtype.kind != "f":
        return voxels
    finite: NDArray[Any] = np.nan_to_num(voxels, posinf=0.0, neginf=0.0)
    return finite


def _check_images(
    grid: Grid,
    config: Config,
    rois: Mapping[str, NDArray[Any]],
    readouts: Mapping[str, Readout],
    mask: NDArray[np.bool_] | None,
    reference: NDArray[Any] | None,
) -> None:
    """Check that every image is there and fits the grid."""
    images = {f"ROI {name!r}": weights for name, weights in rois.items()}
    images |= {f"signal {name!r}": readout.image for name, readout in readouts.items()}
    for name, image, source in (
        ("mask", mask, config.mask.source not in ("auto", "none")),
        ("reference", reference, config.motion.reference is not None),
    ):
        if image is not None:
            images[name] = image
        elif source:
            raise ConfigError(
                f"{name} must be given as an array, since the settings name a file and a "
                "Pipeline reads none; use a Session"
            )
    for name, image in images.items():
        if image.shape != grid.shape:
            raise ConfigError(f"{name} must have the run's shape {grid.shape}, got {image.shape}")
    if mask is not None and not mask.any():
        raise ConfigError("mask must have at least one voxel, got none")

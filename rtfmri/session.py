"""A session: volumes from a reader through the pipeline, recorded, counted and timed.

Three threads, so that reading, processing and recording overlap: a reader thread keeps the next
volumes ready, the caller's thread (who iterates) computes, a writer thread records.
"""

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rtfmri.anytime import e_bh
from rtfmri.backends import open_backend
from rtfmri.config import Config
from rtfmri.design import Confounds, check_design, read_confounds
from rtfmri.errors import ConfigError, SourceError, VolumeError
from rtfmri.feedback import Neurofeedback, prepare
from rtfmri.feedback.message import Message, Run
from rtfmri.feedback.outputs import Outputs
from rtfmri.ordering import FAR, Gap, Ordering, Stray
from rtfmri.paradigm import Announced, Event, Paradigm, read_events
from rtfmri.pipeline import ConditionMaps, Pipeline, Result, RunMaps
from rtfmri.readers import Reader, RunEnd, Skipped, open_reader
from rtfmri.readers.nifti import read_mask, read_reference, read_roi
from rtfmri.recording import NoteKind, Recorder, reserve
from rtfmri.stages.glm import ContrastMaps
from rtfmri.stages.mask import load_nilearn
from rtfmri.stimulus import Stimulus
from rtfmri.synchronisation import Synchronisation
from rtfmri.timing import LatencyHistogram
from rtfmri.volume import VOXEL_DTYPES, Volume

_log = logging.getLogger(__name__)

_READ_AHEAD = 2
_WRITE_BEHIND = 32
_Item = Volume | Skipped | RunEnd | BaseException | None
EVIDENT = 0.05
"""False discovery rate of the voxels that are called evident."""


@dataclass(slots=True)
class Counters:
    """What became of everything that arrived.

    ``arrived`` counts volumes and everything else the reader met; each is ``processed`` or
    ``skipped`` (by reason). ``missing`` volumes never came, or too late, although later ones did;
    ``before_start`` were over when the run was joined; ``reordered`` ones came after a later one,
    and in time. ``missed_deadlines`` counts results that came late. Of the processed volumes,
    ``start_up`` came before the magnetisation was steady, and ``unusable`` ones had ``problems``
    (by kind).
    """

    arrived: int = 0
    processed: int = 0
    missing: int = 0
    before_start: int = 0
    reordered: int = 0
    missed_deadlines: int = 0
    start_up: int = 0
    unusable: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


class Session:
    """One run: iterate to get a `Result` per volume; use as a context manager.

    Parameters
    ----------
    source : str or Reader
        Where volumes come from: a path or URI for `open_reader`, or a reader.
    events : path or sequence of Event, optional
        The task. Without, every volume is baseline.
    rois : mapping of str to path or (x, y, z) array, optional
        Regions; images on another grid are resampled.
    config : Config, optional
        Settings.
    out : path, optional
        The recording to write; it must not exist.
    outputs : sequence of str or Outputs, optional
        Where each volume's message goes as soon as its result is there: URIs for `open_output`,
        or outputs that are open, and stay so.
    stimulus : Stimulus, optional
        The stimulus program, which may pass on the scanner's trigger and announce blocks; whoever
        opened it closes it.
    speed : float, optional
        For recorded sources: 1 plays at the pace of the TR, None as fast as it goes.
    more_runs : bool
        Whether another session will go on with the (live) reader: then it is not closed when its
        run has ended.

    Attributes
    ----------
    paradigm : Paradigm
    counters : Counters
    latency : LatencyHistogram
        From arrival to result.
    end : str
        How the end of the run was recognised, in words; empty before it.
    pipeline : Pipeline or None
        None before the first volume, which fixes the grid.

    Raises
    ------
    RtfmriError
        If the source, the events, a region, a setting or the output cannot be used.
    """

    def __init__(
        self,
        source: str | Reader,
        *,
        events: str | Path | Iterable[Event] | None = None,
        rois: Mapping[str, str | Path | NDArray[Any]] | None = None,
        config: Config | None = None,
        out: str | Path | None = None,
        outputs: Sequence[str] | Outputs = (),
        stimulus: Stimulus | None = None,
        speed: float | None = None,
        more_runs: bool = False,
    ) -> None:
        self._config = config or Config()
        task = read_events(events) if isinstance(events, str | Path) else tuple(events or ())
        self.paradigm = Paradigm(task, self._config.paradigm, self._config.baseline)
        for condition in self.paradigm.unreachable:
            _log.warning(
                "condition %r: every event is shorter than twice transition_s (%g s), so no "
                "volume will count for it",
                condition,
                self._config.paradigm.transition_s,
            )
        self._rois = dict(rois or {})
        for name, image in self._rois.items():
            if isinstance(image, str | Path) and not Path(image).is_file():
                raise ConfigError(f"ROI {name!r}: no such file: {image}")
        self._prepared = prepare(self._config, tuple(self._rois), self.paradigm.conditions)
        self._feedback: Neurofeedback | None = None
        self._mask_file, self._reference_file = _files(self._config)
        table = self._config.glm.confounds
        self._confounds = None if table is None else read_confounds(table)
        if isinstance(source, str):
            source = open_reader(source, tr_s=self._config.tr_s, speed=speed)
        self._reader = source
        _check_length(self._confounds, source.n_volumes)
        check_design(self.paradigm, self._config, self._confounds, source.n_volumes)
        self._synchronisation = Synchronisation(
            self._config,
            stimulus,
            live=source.live,
            paced=source.live or speed == 1,
            has_events=bool(task),
        )
        self._out = None if out is None else Path(out)
        self._backend = open_backend(self._config.device, self._config.threads)
        for dtype in VOXEL_DTYPES:
            self._backend.warm(dtype)
        if self._config.mask.source == "auto":
            load_nilearn()
        with ExitStack() as stack:
            self._outputs = (
                outputs if isinstance(outputs, Outputs) else stack.enter_context(Outputs(outputs))
            )
            if self._out:
                reserve(self._out)
            self._own = stack.pop_all()
        self.counters = Counters()
        self.latency = LatencyHistogram()
        self.pipeline: Pipeline | None = None
        self.end = ""
        self._more_runs = more_runs
        self._first: Volume | None = None
        # What is played back is in order already: what lacks will not come.
        self._ordering = Ordering(0, None)
        self._problems: tuple[str, ...] = ()
        self._last: Result | None = None
        self._fd_mm = self._fd_max_mm = 0.0
        self._late = False
        self._writer: _Writer | None = None
        self._has_a_clock = self._reader.live or speed is not None
        self._early_notes: list[tuple[NoteKind, str]] = []
        self._closed = False
        self._read: queue.Queue[_Item] = queue.Queue(_READ_AHEAD)
        self._thread = threading.Thread(target=self._read_all, name="rtfmri-reader", daemon=True)
        self._thread.start()
        _log.info("ready on %s, waiting for the first volume", self._backend.name)

    @property
    def n_recorded(self) -> int:
        """Volumes that are safe in the recording, as of now."""
        return self._writer.n_recorded if self._writer else 0

    @property
    def n_volumes(self) -> int | None:
        """How many volumes the source says it will give, where it knows."""
        return self._reader.n_volumes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Result]:
        """Yield a result per usable volume, until the source ends.

        A volume that lacks, and is not waited for any longer (`OrderSettings`), gives a result
        that says so (`Result.missing`).

        Raises
        ------
        SourceError
            If the source breaks, or ends without one usable volume.
        """
        while not self.end and not self._closed:
            try:
                item = self._read.get(timeout=self._patience_s())
            except queue.Empty:
                yield from self._process_ready()
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None or isinstance(item, RunEnd):
                yield from self._process_ready(ended=True)
                self._note_end(item.reason if item else "the source ended")
            else:
                self.counters.arrived += 1
                self._accept(item)
                yield from self._process_ready()
        if not self.counters.processed and not self._closed:
            reasons = "; ".join(f"{n}x {why}" for why, n in self.counters.skipped.items())
            raise SourceError(f"the source held no usable volume ({reasons or 'nothing came'})")

    def close(self) -> None:
        """Stop reading, record what was processed with its maps, and close the recording."""
        if self._closed:
            return
        self._closed = True
        if not (self._more_runs and self.end):
            self._reader.close()
        while self._thread.is_alive():
            # The reader may be waiting for room to hand over a volume that nobody will take.
            try:
                self._read.get(timeout=0.01)
            except queue.Empty:
                continue
        if self._feedback:
            self._outputs.end()
        if self._writer and self.pipeline:
            self._writer.close(self.pipeline.run_maps())
        elif self._out:
            self._out.unlink(missing_ok=True)
        self._outputs.settle()
        self._own.close()

    def maps(self) -> dict[str, ConditionMaps]:
        """Return each condition's maps as of now; empty before the first volume."""
        return self.pipeline.maps() if self.pipeline else {}

    def evident_voxels(self) -> dict[str, int]:
        """Return how many voxels of each t contrast are evident as of now.

        They are those that e-BH finds with a false discovery rate of 5 % (`EVIDENT`), however
        often one looks: the run may be stopped as soon as they are enough. It takes some ms for
        50,000 voxels.
        """
        if not self.pipeline or self.pipeline.brain is None:
            return {}
        maps = self.pipeline.glm_maps()
        found = {name: _n_evident(values, self.pipeline.brain) for name, values in maps.items()}
        return {name: n for name, n in found.items() if n is not None}

    def summary(self) -> dict[str, Any]:
        """Return what the run came to, ready for JSON.

        For each condition but the baseline: Welch's t of every region (None where there are too
        few volumes for one), and the largest t inside the brain with its place in scanner mm.
        """
        from rtfmri.report import peak

        maps, contrasts = self.maps(), {}
        clock = self._synchronisation.clock
        if self.pipeline and self.pipeline.brain is not None and len(maps) > 1:
            grid, brain = self.pipeline.grid, self.pipeline.brain
            for condition, t in self.pipeline.roi_t().items():
                peak_t, peak_mm = peak(maps[condition].t, grid, brain)
                roi_t = {name: None if math.isnan(value) else value for name, value in t.items()}
                contrasts[condition] = {"roi_t": roi_t, "peak_t": peak_t, "peak_mm": peak_mm}
        return {
            "volumes": self.counters.processed,
            "recorded": self.n_recorded,
            "conditions": {name: values.n_volumes for name, values in maps.items()},
            "missing": self.counters.missing,
            "before_start": self.counters.before_start,
            "reordered": self.counters.reordered,
            "end": self.end,
            "skipped": dict(self.counters.skipped),
            "missed_deadlines": self.counters.missed_deadlines,
            "quality": self._quality_summary(),
            "latency_ms": {f"p{p}": self.latency.percentile_ms(p) for p in (50, 95, 99)},
            "device": self.pipeline.device if self.pipeline else None,
            "contrasts": contrasts,
            "glm": self._glm_summary(),
            "outputs": {uri: asdict(counts) for uri, counts in self._outputs.counts().items()},
            "failed_signals": {name: n for name, n in self._failed_signals().items() if n},
            "clock": {"start": clock.start, "offset_s": clock.offset_s},
            "stimulus": self._synchronisation.summary(),
        }

    def _failed_signals(self) -> dict[str, int]:
        return self._feedback.n_failed if self._feedback else {}

    def _glm_summary(self) -> dict[str, Any]:
        """Return what the GLM says: for each contrast its peak, and each region's effect.

        An e-value of 100 is strong evidence, below 1 there is none.
        """
        from rtfmri.report import peak

        if not self.pipeline or self.pipeline.brain is None:
            return {}
        summary: dict[str, Any] = {}
        brain = self.pipeline.brain
        regions = self.pipeline.roi_contrasts()
        for name, maps in self.pipeline.glm_maps().items():
            largest, place_mm = peak(maps.statistic, self.pipeline.grid, brain)
            summary[name] = {
                "kind": maps.kind,
                "dof": maps.dof,
                "peak": largest,
                "peak_mm": place_mm,
                "evident_voxels": _n_evident(maps, brain),
                "roi": {roi: asdict(value) for roi, value in regions.get(name, {}).items()},
            }
        return summary

    def _quality_summary(self) -> dict[str, Any]:
        """Return how good the run is: counts, minutes, FD in mm, DVARS in percent, median tSNR."""
        n = self.counters.processed
        summary: dict[str, Any] = {
            "usable": n - self.counters.unusable - self.counters.start_up,
            "usable_min": self._last.quality.usable_min if self._last else 0.0,
            "forecast_min": self._last.quality.forecast_min if self._last else None,
            "start_up": self.counters.start_up,
            "problems": dict(self.counters.problems),
            "fd_mm": None,
            "tsnr_median": None,
        }
        if self._last and self._last.motion:
            summary["fd_mm"] = {"mean": self._fd_mm / n, "max": self._fd_max_mm}
        if self.pipeline and n:
            tsnr = self.pipeline.quality_maps()["tsnr"]
            summary["tsnr_median"] = float(np.median(tsnr[tsnr > 0])) if tsnr.any() else None
        return summary

    def _read_all(self) -> None:
        try:
            for item in self._reader:
                self._read.put(item)
                if self._closed:
                    return
            self._read.put(None)
        except BaseException as error:  # it is raised again where somebody looks
            self._read.put(error)

    def _arrived(self, volume: Volume) -> Volume:
        """Let a volume of a replay without a clock arrive now, when there is room for it."""
        if self._has_a_clock:
            return volume
        late_s = time.perf_counter() - volume.decoded_s
        return replace(
            volume, arrived_s=volume.arrived_s + late_s, decoded_s=volume.decoded_s + late_s
        )

    def _patience_s(self) -> float | None:
        """Return for how long the next item may be waited for; None is for ever."""
        due_s = self._ordering.due_s()
        return None if due_s is None else max(0.0, due_s - time.perf_counter())

    def _accept(self, item: Volume | Skipped) -> None:
        """Take what came into the order of the run, or say why it is none of it."""
        if isinstance(item, Skipped):
            self._skip(item.label, item.reason)
            return
        volume = self._arrived(item)
        if self._first is None:
            self._first = volume
            if self._reader.live:
                order = self._config.order
                wait_s = volume.tr_s / 2 if order.wait_s is None else order.wait_s
                self._ordering = Ordering(order.window_volumes, wait_s)
        try:
            first = self._first
            volume.check_like(first.grid, first.data.dtype, first.tr_s)
            self._ordering.put(volume)
        except VolumeError as error:
            self._skip(f"volume {volume.index}", str(error))
        if self._ordering.n_reordered > self.counters.reordered:
            self.counters.reordered = self._ordering.n_reordered
            self._note("reordered", f"volume {volume.index} came after a later one")

    def _process_ready(self, ended: bool = False) -> Iterator[Result]:
        """Yield the results of all that need not wait for anything else."""
        for item in self._ordering.ready(time.perf_counter(), ended=ended):
            if isinstance(item, Gap):
                yield from self._miss(item)
            elif isinstance(item, Stray):
                self._skip(f"volume {item.number}", "its number is far from the others'")
            elif (result := self._process(item)) is not None:
                yield result
                if self.pipeline:
                    self.pipeline.catch_up()

    def _process(self, volume: Volume) -> Result | None:
        if self.pipeline is None:
            self.pipeline = self._start(volume)
        self._hear(volume)
        try:
            result = self.pipeline.push(volume)
        except VolumeError as error:
            self._skip(f"volume {volume.index}", str(error))
            return None
        result = self._send(result)
        self._count(result)
        if self._writer:
            self._writer.append(volume, result)
        return result

    def _hear(self, volume: Volume) -> None:
        """Take in what the stimulus program has said by now."""
        for said in self._synchronisation.take(volume, self.paradigm):
            if not isinstance(said, Announced):
                self._note("trigger", f"at {said:.3f} s", f"the scanner's trigger: {said:.3f} s")
            elif self._writer:
                self._writer.event(said)

    def _send(self, result: Result) -> Result:
        """Return a result with its feedback, which is on its way out then."""
        if self._feedback and self._feedback.names:
            result = replace(result, feedback=self._feedback.push(result))
        if self._outputs:
            self._outputs.send(Message.of(result))
        return result

    def _miss(self, gap: Gap) -> Iterator[Result]:
        """Yield what is to be said of volumes that never came."""
        if gap.at_start:
            self.counters.before_start += len(gap.indices)
            self._note("start", f"the run was joined after {gap}")
            return
        self.counters.missing += len(gap.indices)
        self._note("missing", f"{gap} never came")
        # Nobody needs a hundred values for what is long over.
        if len(gap.indices) <= FAR and self.pipeline and self.counters.processed:
            yield from map(self._send, map(self.pipeline.miss, gap.indices))

    def _start(self, first: Volume) -> Pipeline:
        """Freeze the run's shape, position, voxel type and TR."""
        _log.info("%s, TR %g s", first.grid, first.tr_s)
        arrived = self._first or first
        if abs(arrived.index - first.index) > FAR:
            arrived = first  # the other's number was a fault
        self.paradigm = self._synchronisation.begin(arrived, self.paradigm)
        rois = {
            name: read_roi(image, first.grid) if isinstance(image, str | Path) else image
            for name, image in self._rois.items()
        }
        mask = None if self._mask_file is None else read_mask(self._mask_file, first.grid)
        reference = (
            None
            if self._reference_file is None
            else read_reference(self._reference_file, first.grid)
        )
        self._feedback = feedback = Neurofeedback(
            self._config, self._prepared, first.grid, rois, self.paradigm.conditions
        )
        pipeline = Pipeline(
            first.grid,
            self._config,
            paradigm=self.paradigm,
            rois=rois,
            readouts=feedback.readouts,
            mask=mask,
            reference=reference,
            confounds=self._confounds,
            tr_s=first.tr_s,
            n_volumes=self._reader.n_volumes,
            dtype=first.data.dtype,
            backend=self._backend,
        )
        if self._out:
            recorder = Recorder(
                self._out,
                grid=first.grid,
                tr_s=first.tr_s,
                dtype=first.data.dtype,
                config=self._config,
                paradigm=self.paradigm,
                rois=rois,
                mask=mask,
                reference=reference,
                confounds=self._confounds,
                design=pipeline.design,
                clock=self._synchronisation.clock,
                signals=feedback.names,
                sham_seal=feedback.sham_seal,
                n_planned=self._reader.n_volumes,
                slice_times_s=first.slice_times_s,
                device=pipeline.device,
            )
            # Nothing is lost if a replay waits for the disk; a scanner does not wait.
            self._writer = _Writer(recorder, limit=0 if self._has_a_clock else _WRITE_BEHIND)
            for kind, text in self._early_notes:
                self._writer.note(kind, text)
        conditions, n = self.paradigm.conditions, self._reader.n_volumes
        self._outputs.begin(Run(first.tr_s, n, conditions, tuple(rois), feedback.names))
        return pipeline

    def _count(self, result: Result) -> None:
        self.counters.processed += 1
        self._judge(result)
        self.latency.add(result.latency_ms)
        if result.deadline_missed:
            self.counters.missed_deadlines += 1
            level = logging.DEBUG if self._late else logging.WARNING
            _log.log(level, "volume %d: late, %.0f ms", result.index, result.latency_ms)
        self._late = result.deadline_missed

    def _judge(self, result: Result) -> None:
        """Count what is wrong with a volume, and say it unless that was said of the one before."""
        self._last = result
        quality = result.quality
        if result.begins and self.counters.processed > 1:
            self.counters.start_up = self.counters.processed - 1
            self.counters.unusable = 0
            self.counters.problems.clear()
            _log.info("volume %d: the run begins anew, without those before", result.index)
        if result.motion:
            self._fd_mm += result.motion.fd_mm
            self._fd_max_mm = max(self._fd_max_mm, result.motion.fd_mm)
        self.counters.problems.update(quality.problems)
        self.counters.unusable += not quality.usable
        if quality.problems and quality.problems != self._problems:
            _log.warning("volume %d: %s", result.index, ", ".join(quality.problems))
        self._problems = quality.problems

    def _skip(self, name: str, reason: str) -> None:
        self.counters.skipped[reason] += 1
        self._note("skipped", reason, f"skipped {name}: {reason}")

    def _note_end(self, reason: str) -> None:
        self.end = reason
        self._note("end", reason, f"the run has ended: {reason}")

    def _note(self, kind: NoteKind, text: str, said: str | None = None) -> None:
        """Write something down in the log and in the recording."""
        level = logging.INFO if kind in ("trigger", "end") else logging.WARNING
        _log.log(level, said or text)
        if self._writer:
            self._writer.note(kind, text)
        else:
            self._early_notes.append((kind, text))


class _Writer:
    """Records in a thread of its own; a recording that fails never stops a run."""

    def __init__(self, recorder: Recorder, limit: int) -> None:
        self._recorder = recorder
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(limit)
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="rtfmri-writer", daemon=True)
        self._thread.start()

    @property
    def n_recorded(self) -> int:
        """Volumes that are safe."""
        return self._recorder.n_volumes

    def append(self, volume: Volume, result: Result) -> None:
        self._jobs.put(lambda: self._recorder.append(volume, result))

    def note(self, kind: NoteKind, text: str) -> None:
        self._jobs.put(lambda: self._recorder.note(kind, text))

    def event(self, announced: Announced) -> None:
        self._jobs.put(lambda: self._recorder.event(announced))

    def close(self, maps: RunMaps) -> None:
        self._jobs.put(lambda: self._recorder.close(maps))
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._failed:
                continue
            try:
                job()
            except (OSError, RuntimeError, ValueError) as error:
                self._failed = True
                _log.error(
                    "recording stopped after %d volumes, the run goes on: %s",
                    self.n_recorded,
                    error,
                )


def _n_evident(maps: ContrastMaps, brain: NDArray[np.bool_]) -> int | None:
    """Return how many voxels of a t contrast are evident; None for F."""
    if maps.log_e is None:
        return None
    log_e = maps.log_e[brain]
    return int(np.count_nonzero(log_e >= e_bh(log_e, EVIDENT)))


def _check_length(confounds: Confounds | None, n_volumes: int | None) -> None:
    if confounds and n_volumes and len(confounds.values) < n_volumes:
        raise ConfigError(
            f"glm.confounds must have a line for each of the run's {n_volumes} volumes, "
            f"got {len(confounds.values)}"
        )


def _files(config: Config) -> tuple[Path | None, Path | None]:
    """Return the files of mask and reference that the settings name."""
    source, reference = config.mask.source, config.motion.reference
    mask = source if isinstance(source, Path) else None
    for name, path in (("mask.source", mask), ("motion.reference", reference)):
        if path is not None and not path.is_file():
            raise ConfigError(f"{name} must be a file, or be left out; no such file: {path}")
    return mask, reference

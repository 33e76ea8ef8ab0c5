"""The recording: one HDF5 file a run, readable while it grows, whole after a crash.

Layout (h5py; every dataset is chunked, every string has a fixed length)::

    /                    attributes: format, version, tr_s, n_planned (0: not known), affine
                         (4, 4), device, conditions, rois, slice_times_s (n_slices,) or none,
                         design and confounds (names of columns), contrasts, contrast_rows (how
                         many rows each has; for t it is 0), signals (names of the feedback's),
                         sham_seal (see `rtfmri.feedback.sham`; empty without a sham),
                         clock_start, clock_offset_s, clock_zero_s, unix_minus_perf_s,
                         lsl_minus_perf_s (see `RunClock`)
    /volumes             (n, z, y, x), as the scanner sent them; transposed it is (x, y, z)
    /results             (n,) compound: index, clocks, conditions, motion, quality, latency, one
                         time a stage
    /roi                 (n, n_rois, 5) float64: signal, filtered, psc, z, adjusted
    /roi_t               (n, n_rois, n_contrasts) float64: t or F
    /design              (n, n_columns) float64: each volume's row of the design matrix
    /signals             (n, n_signals) float64: each signal of the feedback; nan is no value
    /shown               (n,) float64: what the participant was shown, 0 to 1; nan is no value
    /roi_weights         (n_rois, z, y, x) float32
    /events              (n_events,) compound: onset_s, duration_s, trial_type, from_s: -inf, or
                         the first volume that knew of one that was announced during the run
    /config              the settings as JSON bytes, uint8
    /given/mask, reference       (1, z, y, x) what the run was given of these, else (0, z, y, x)
    /given/confounds             (n_lines, n_confounds) float64
    /maps/mean, effect, psc, t   (n_conditions, z, y, x) float32; /maps/n_volumes (n_conditions,)
    /maps/mask, tsnr, snr, memory                   (z, y, x) float32
    /glm/statistic, effect, variance, log_e         (n_contrasts, z, y, x) float32; /glm/dof
                                                    (n_contrasts,)
    /journal             (m,) compound: before_row, kind, text: what else happened, see `Note`
    /n_complete          (1,) int64: rows of volumes, results, roi, roi_t, design, signals and
                         shown that are safe
    /closed              (1,) uint8: 1 once the run has ended and the maps are in

The file is in HDF5's single-writer-multiple-reader mode from its first volume on. `n_complete` is
written last and flushed: a volume is *acknowledged* when `Recorder.append` returns, and no kill of
the process loses an acknowledged volume (the data is with the operating system by then; a power
cut is another matter).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

import rtfmri
from rtfmri.clock import RunClock
from rtfmri.config import Config
from rtfmri.design import MOTION_COLUMNS, Confounds, Contrast, Design, design_of
from rtfmri.errors import RecordingError
from rtfmri.paradigm import MAX_NAME_BYTES, Announced, Event, Paradigm
from rtfmri.pipeline import STAGES, ConditionMaps, Feedback, Pipeline, Result, RunMaps
from rtfmri.stages.glm import ContrastMaps
from rtfmri.stages.quality import PROBLEMS
from rtfmri.stages.readout import Readout
from rtfmri.volume import Grid, Volume

FORMAT = "rtfmri-recording-5"
_MAPS = ("mean", "effect", "psc", "t")
_QUALITY_MAPS = ("mask", "tsnr", "snr", "memory")
_GLM_MAPS = ("statistic", "effect", "variance", "log_e")
MOTION = (*(f"trans_{axis}_mm" for axis in "xyz"), *(f"rot_{axis}_deg" for axis in "xyz"))
_PROBLEMS = tuple(PROBLEMS)
_DISPLACEMENT = ("fd_mm", "fd_jenkinson_mm")
_QUALITY = ("dvars", "dvars_std", "global_signal", "usable_min")
_ROI = ("signal", "filtered", "psc", "z", "adjusted")
_ROWS = ("volumes", "results", "roi", "roi_t", "design", "signals", "shown")
"""What a volume adds a row to."""
_NAME = f"S{MAX_NAME_BYTES}"
_NOTE = np.dtype([("before_row", np.int64), ("kind", "S16"), ("text", "S160")])
_EVENT = np.dtype(
    [
        ("onset_s", np.float64),
        ("duration_s", np.float64),
        ("from_s", np.float64),
        ("trial_type", _NAME),
    ]
)
_RESULT = np.dtype(
    [
        ("index", np.int64),
        ("time_s", np.float64),
        ("acquired_s", np.float64),
        ("arrived_s", np.float64),
        ("conditions", np.uint64),
        ("baseline_ready", np.bool_),
        ("begins", np.bool_),
        ("usable", np.bool_),
        ("problems", np.uint64),
        *((name, np.float64) for name in (*MOTION, *_DISPLACEMENT, *_QUALITY)),
        ("n_slice_outliers", np.int64),
        ("deadline_missed", np.bool_),
        ("latency_ms", np.float64),
        *((f"{stage}_ms", np.float64) for stage in STAGES),
    ]
)


NoteKind = Literal["skipped", "missing", "reordered", "start", "trigger", "end"]


class Note(NamedTuple):
    """Something that happened in a run and is no volume."""

    before_row: int
    """The row of the next volume."""
    kind: NoteKind
    """skipped: something came and was not used; missing: it never came; reordered: it came after a
    later one; start: the run was joined when it had begun; trigger: the scanner gave one, told on
    the run's clock; end: how its end was recognised."""
    text: str


class Recorder:
    """Writes a recording; not for use from two threads at once.

    Parameters
    ----------
    path : path
        Overwritten if it exists: who must not lose a file asks `reserve` first.
    grid, tr_s, dtype
        Of every volume.
    config, paradigm, rois, mask, reference, confounds, n_planned, slice_times_s
        Of the run; they are written into the file, so that it can be replayed.
    design : Design, optional
        Of the run's GLM.
    clock : RunClock, optional
        Of the run.
    signals : sequence of str
        Names of the feedback's signals.
    sham_seal : str
        Of the sham's arm; empty without one.
    device : str
        What computes the results.

    Raises
    ------
    RecordingError
        If the file cannot be created.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        grid: Grid,
        tr_s: float,
        dtype: DTypeLike,
        config: Config,
        paradigm: Paradigm,
        rois: Mapping[str, NDArray[Any]] | None = None,
        mask: NDArray[np.bool_] | None = None,
        reference: NDArray[np.float32] | None = None,
        confounds: Confounds | None = None,
        design: Design | None = None,
        clock: RunClock | None = None,
        signals: Sequence[str] = (),
        sham_seal: str = "",
        n_planned: int | None = None,
        slice_times_s: Sequence[float] | None = None,
        device: str = "cpu",
    ) -> None:
        rois = rois or {}
        confounds = confounds or Confounds(np.zeros((0, 0)), ())
        columns, contrasts = (design.columns, design.contrasts) if design else ((), ())
        self._conditions = paradigm.conditions
        self._rois = tuple(rois)
        self._contrasts = tuple(contrast.name for contrast in contrasts)
        self._signals = tuple(signals)
        self.n_volumes = 0
        zyx = grid.shape[::-1]
        try:
            self._file = h5py.File(path, "w", libver="latest")
        except OSError as error:
            raise RecordingError(f"cannot write the recording {path}: {error}") from error
        file = self._file
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["version"] = np.bytes_(rtfmri.__version__)
        file.attrs["device"] = np.bytes_(device)
        file.attrs["tr_s"] = tr_s
        file.attrs["affine"] = grid.affine
        file.attrs["slice_times_s"] = np.array(slice_times_s or (), np.float64)
        file.attrs["conditions"] = _names(self._conditions)
        file.attrs["rois"] = _names(self._rois)
        file.attrs["signals"] = _names(self._signals)
        file.attrs["sham_seal"] = np.bytes_(sham_seal)
        file.attrs["n_planned"] = n_planned or 0
        clock = clock or RunClock()
        file.attrs["clock_start"] = np.bytes_(clock.start)
        file.attrs["clock_offset_s"] = clock.offset_s
        file.attrs["clock_zero_s"] = clock.zero_s
        file.attrs["unix_minus_perf_s"] = clock.unix_minus_perf_s
        file.attrs["lsl_minus_perf_s"] = clock.lsl_minus_perf_s
        file.attrs["design"] = _names(columns)
        file.attrs["confounds"] = _names(confounds.names)
        file.attrs["contrasts"] = _names(self._contrasts)
        file.attrs["contrast_rows"] = [
            len(contrast.weights) if contrast.kind == "F" else 0 for contrast in contrasts
        ]
        known = [_event_row(Announced(event, -np.inf)) for event in paradigm.events]
        events = np.array(known, _EVENT)
        settings = np.frombuffer(config.model_dump_json().encode(), np.uint8)
        n_rois, n_conditions = len(self._rois), len(self._conditions)
        n_contrasts = len(contrasts)
        self._create("volumes", (0, *zyx), dtype)
        self._create("results", (0,), _RESULT, rows=64)
        self._create("roi", (0, n_rois, len(_ROI)), np.float64, rows=64)
        self._create("roi_t", (0, n_rois, n_contrasts), np.float64, rows=64)
        self._create("design", (0, len(columns)), np.float64, rows=64)
        self._create("signals", (0, len(self._signals)), np.float64, rows=64)
        self._create("shown", (0,), np.float64, rows=64)
        self._create("journal", (0,), _NOTE, rows=16)
        weights = self._create("roi_weights", (n_rois, *zyx), np.float32)
        for row, image in enumerate(rois.values()):
            weights[row] = np.asarray(image, np.float32).T
        for name, given in (("mask", mask), ("reference", reference)):
            images = np.zeros((0, *zyx)) if given is None else given.T[None]
            self._create(f"given/{name}", images.shape, np.float32)[...] = images
        values = confounds.values
        self._create("given/confounds", values.shape, np.float64)[...] = values
        self._create("events", events.shape, _EVENT)[:] = events
        self._create("config", settings.shape, np.uint8, rows=settings.size)[:] = settings
        for name in _MAPS:
            self._create(f"maps/{name}", (n_conditions, *zyx), np.float32)
        for name in _QUALITY_MAPS:
            self._create(f"maps/{name}", zyx, np.float32, rows=zyx[0])
        self._create("maps/n_volumes", (n_conditions,), np.int64)
        for name in _GLM_MAPS:
            self._create(f"glm/{name}", (n_contrasts, *zyx), np.float32)
        self._create("glm/dof", (n_contrasts,), np.int64)
        self._n_complete = self._create("n_complete", (1,), np.int64)
        self._closed = self._create("closed", (1,), np.uint8)
        file.swmr_mode = True

    def append(self, volume: Volume, result: Result) -> None:
        """Write one volume and its result; on return no kill of the process can lose them."""
        row = np.zeros((), _RESULT)
        row["index"], row["time_s"] = volume.index, volume.time_s
        row["acquired_s"] = np.nan if volume.acquired_s is None else volume.acquired_s
        row["arrived_s"] = volume.arrived_s
        row["conditions"] = sum(1 << self._conditions.index(c) for c in result.conditions)
        row["baseline_ready"] = result.baseline_ready
        row["begins"], row["usable"] = result.begins, result.quality.usable
        row["problems"] = sum(1 << _PROBLEMS.index(problem) for problem in result.quality.problems)
        for name in _QUALITY:
            row[name] = getattr(result.quality, name)
        row["n_slice_outliers"] = result.quality.n_slice_outliers
        for name in (*MOTION, *_DISPLACEMENT):
            row[name] = np.nan
        if result.motion:
            for name, value in zip(MOTION, result.motion.parameters, strict=True):
                row[name] = value
            for name in _DISPLACEMENT:
                row[name] = getattr(result.motion, name)
        row["deadline_missed"] = result.deadline_missed
        row["latency_ms"] = result.latency_ms
        for stage in STAGES:
            row[f"{stage}_ms"] = result.stage_ms[stage]
        values = [result.roi[name] for name in self._rois]
        feedback = result.feedback or Feedback(dict.fromkeys(self._signals, np.nan), np.nan)
        self._append(
            volume.data.T,
            row,
            np.array([[getattr(v, name) for name in _ROI] for v in values]).reshape(-1, len(_ROI)),
            np.array([[v.t[name] for name in self._contrasts] for v in values]).reshape(
                len(values), len(self._contrasts)
            ),
            np.zeros(0) if result.design is None else result.design,
            np.array([feedback.signals[name] for name in self._signals]),
            np.array(feedback.shown),
        )

    def note(self, kind: NoteKind, text: str) -> None:
        """Write down what happened before the next volume."""
        self._note(Note(self.n_volumes, kind, text))

    def event(self, announced: Announced) -> None:
        """Write down an event that has become known; only where none was at the start."""
        row = np.array(_event_row(announced), _EVENT)
        self._put("events", self._file["events"].shape[0], row)
        self._file.flush()

    def close(self, maps: RunMaps) -> None:
        """Write the run's maps, mark the recording as whole, and close it."""
        for name, image in maps.quality.items():
            self._file[f"maps/{name}"][...] = image.T
        for condition, values in maps.conditions.items():
            row = self._conditions.index(condition)
            for name in _MAPS:
                self._file[f"maps/{name}"][row] = getattr(values, name).T
            self._file["maps/n_volumes"][row] = values.n_volumes
        for contrast, found in maps.contrasts.items():
            row = self._contrasts.index(contrast)
            for name in _GLM_MAPS:
                if (image := getattr(found, name)) is not None:
                    self._file[f"glm/{name}"][row] = image.T
            self._file["glm/dof"][row] = found.dof
        self._file.flush()
        self._closed[0] = 1
        self._file.close()

    def _note(self, note: Note) -> None:
        text = note.text.encode("ascii", "replace")
        entry = np.array((note.before_row, note.kind.encode(), text), _NOTE)
        self._put("journal", self._file["journal"].shape[0], entry)
        self._file.flush()

    def _append(self, *values: NDArray[Any]) -> None:
        """Write one row of each of `_ROWS`."""
        for name, value in zip(_ROWS, values, strict=True):
            self._put(name, self.n_volumes, value)
        self._file.flush()
        self._n_complete[0] = self.n_volumes + 1
        self._n_complete.flush()
        self.n_volumes += 1

    def _put(self, name: str, row: int, value: NDArray[Any]) -> None:
        dataset = self._file[name]
        dataset.resize(row + 1, axis=0)
        dataset[row] = value

    def _create(
        self, name: str, shape: Sequence[int], dtype: DTypeLike, rows: int = 1
    ) -> h5py.Dataset:
        """Create a dataset in chunks of *rows*; an axis of length 0 can grow.

        One empty or contiguous dataset breaks the readers of a growing file (HDFGroup/hdf5#5251).
        """
        chunks = (rows, *(max(1, n) for n in shape[1:]))
        maxshape = tuple(n or None for n in shape)
        return self._file.create_dataset(name, shape, dtype, chunks=chunks, maxshape=maxshape)


class Recording:
    """A recording, read; it may still be growing. Use as a context manager.

    Attributes
    ----------
    grid : Grid
    tr_s : float
    device, version : str
        What computed the results, and rtfmri's version then.
    config : Config
    conditions, roi_names : tuple of str
        The baseline condition first.
    columns, contrast_names : tuple of str
        Of the GLM's design; empty without one.
    signal_names : tuple of str
        Of the feedback.
    sham_seal : str
        Of the sham's arm (`rtfmri.feedback.sham`); empty without one.
    confounds : Confounds or None
        Where the run was given them.
    n_planned : int or None
        How many volumes were planned, where that was known.
    clock : RunClock
    slice_times_s : tuple of float or None
    mask : (x, y, z) bool or None
    reference : (x, y, z) float32 or None
        Where the run was given them.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            _check_start(Path(path))
            self._file = h5py.File(path, "r", swmr=True)
        except OSError as error:
            raise RecordingError(f"cannot read the recording {path}: {error}") from error
        attributes = self._file.attrs
        if attributes.get("format") != FORMAT.encode():
            self._file.close()
            raise RecordingError(f"{path} is HDF5, but no recording: its format is not {FORMAT}")
        self.grid = Grid(self._file["volumes"].shape[:0:-1], attributes["affine"])
        self.tr_s = float(attributes["tr_s"])
        self.device = attributes["device"].decode()
        self.version = attributes["version"].decode()
        self.config = Config(**json.loads(self._file["config"][:].tobytes()))
        self.conditions = tuple(name.decode() for name in attributes["conditions"])
        self.roi_names = tuple(name.decode() for name in attributes["rois"])
        self.columns = tuple(name.decode() for name in attributes["design"])
        self.contrast_names = tuple(name.decode() for name in attributes["contrasts"])
        self.signal_names = tuple(name.decode() for name in attributes["signals"])
        self.sham_seal = attributes["sham_seal"].decode()
        self._contrast_rows = [int(n) for n in attributes["contrast_rows"]]
        self.n_planned = int(attributes["n_planned"]) or None
        self.clock = RunClock(
            attributes["clock_start"].decode(),
            float(attributes["clock_offset_s"]),
            float(attributes["clock_zero_s"]),
            float(attributes["unix_minus_perf_s"]),
            float(attributes["lsl_minus_perf_s"]),
        )
        confounds = tuple(name.decode() for name in attributes["confounds"])
        values = self._file["given/confounds"][...]
        self.confounds = Confounds(values, confounds) if confounds else None
        self.slice_times_s = tuple(attributes["slice_times_s"].tolist()) or None
        mask = self._given("mask")
        self.mask = None if mask is None else mask > 0
        self.reference = self._given("reference")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rows(self, name: str) -> Any:
        dataset = self._file[name]
        dataset.refresh()
        return dataset

    @property
    def events(self) -> tuple[Event, ...]:
        """The task, in seconds after the start of volume 0, as far as it is known by now."""
        return tuple(one.event for one in self._announced())

    @property
    def n_volumes(self) -> int:
        """Volumes that are safe, as of now."""
        return int(self._rows("n_complete")[0])

    @property
    def closed(self) -> bool:
        """Whether the run has ended properly and its maps are in."""
        return bool(self._rows("closed")[0])

    @property
    def results(self) -> NDArray[Any]:
        """One row a volume, (n_volumes,), with the fields that the module describes."""
        return np.asarray(self._rows("results")[: self.n_volumes])

    def problems(self) -> list[tuple[str, ...]]:
        """Return what was wrong with each volume, in the words of `QualityValue.problems`."""
        return [
            tuple(problem for i, problem in enumerate(_PROBLEMS) if bits >> i & 1)
            for bits in self.results["problems"].tolist()
        ]

    @property
    def roi_values(self) -> tuple[str, ...]:
        """What `roi` has of each region, along its last axis."""
        return _ROI

    @property
    def roi(self) -> NDArray[np.float64]:
        """Each region's signal, filtered, psc, z and adjusted, (n_volumes, n_rois, 5)."""
        return np.asarray(self._rows("roi")[: self.n_volumes])

    @property
    def roi_t(self) -> NDArray[np.float64]:
        """Each contrast's t or F of each region, (n_volumes, n_rois, n_contrasts)."""
        return np.asarray(self._rows("roi_t")[: self.n_volumes])

    @property
    def design(self) -> NDArray[np.float64]:
        """The design matrix, (n_volumes, n_columns)."""
        return np.asarray(self._rows("design")[: self.n_volumes])

    @property
    def signals(self) -> NDArray[np.float64]:
        """Each signal of the feedback, (n_volumes, n_signals); nan is no value."""
        return np.asarray(self._rows("signals")[: self.n_volumes])

    @property
    def shown(self) -> NDArray[np.float64]:
        """What the participant was shown, 0 to 1, (n_volumes,); nan is no value."""
        return np.asarray(self._rows("shown")[: self.n_volumes])

    @property
    def roi_weights(self) -> dict[str, NDArray[np.float32]]:
        """Each region's weights, (x, y, z)."""
        return {name: self._file["roi_weights"][i].T for i, name in enumerate(self.roi_names)}

    @property
    def journal(self) -> list[Note]:
        """What happened besides volumes that were processed, in its order."""
        rows = self._rows("journal")[:].tolist()
        return [Note(int(row), kind.decode(), text.decode()) for row, kind, text in rows]

    def members(self) -> NDArray[np.bool_]:
        """Tell which volume counted for which condition, (n_volumes, n_conditions).

        What came before the run began (start-up volumes) counted for none.
        """
        bits, rows = np.arange(len(self.conditions), dtype=np.uint64), self.results
        members = (rows["conditions"][:, None] >> bits & np.uint64(1)).astype(bool)
        members[: self.n_start_up] = False
        return members

    @property
    def n_start_up(self) -> int:
        """Volumes before the last one with which the run began."""
        return int(np.flatnonzero(self.results["begins"]).max(initial=0))

    def volume(self, row: int) -> Volume:
        """Return the volume in *row*, from 0 to n_volumes - 1, as it was recorded."""
        entry = self._rows("results")[row]
        return Volume(
            self._rows("volumes")[row].T,
            self.grid,
            int(entry["index"]),
            self.tr_s,
            acquired_s=None if np.isnan(entry["acquired_s"]) else float(entry["acquired_s"]),
            slice_times_s=self.slice_times_s,
        )

    def volumes(self) -> Iterator[Volume]:
        """Return the volumes that are safe as of now, in the order of their processing."""
        return (self.volume(row) for row in range(self.n_volumes))

    @property
    def paradigm(self) -> Paradigm:
        """The task as the run knew it, event by event."""
        events = self._announced()
        given = [event for event, from_s in events if from_s == -np.inf]
        paradigm = Paradigm(given, self.config.paradigm, self.config.baseline)
        for announced in events[len(given) :]:
            paradigm.add(announced)
        return paradigm

    def _announced(self) -> list[Announced]:
        """Return all events with the volume that knew of them first; those given are first."""
        return [
            Announced(Event(onset_s, duration_s, name.decode()), from_s)
            for onset_s, duration_s, from_s, name in self._rows("events")[:].tolist()
        ]

    def contrasts(self) -> tuple[Contrast, ...]:
        """Return what was asked of the GLM; empty without one."""
        design = design_of(
            self.paradigm,
            self.config,
            self.tr_s,
            n_volumes=self.n_planned,
            confounds=self.confounds,
            has_motion=MOTION_COLUMNS[0] in self.columns,
        )
        return design.contrasts if design else ()

    def pipeline(
        self,
        device: str | None = None,
        rois: Mapping[str, NDArray[Any]] | None = None,
        readouts: Mapping[str, Readout] | None = None,
        **changes: Any,
    ) -> Pipeline:
        """Return a fresh pipeline as that of this run.

        With its regions or with *rois*, with *readouts*, and with *changes* of its settings, by
        their names.
        """
        return Pipeline(
            self.grid,
            self.config.with_changes(device=device, **changes),
            paradigm=self.paradigm,
            rois=self.roi_weights if rois is None else rois,
            readouts=readouts,
            mask=self.mask,
            reference=self.reference,
            confounds=self.confounds,
            tr_s=self.tr_s,
            n_volumes=self.n_planned,
            dtype=self._file["volumes"].dtype,
        )

    def _given(self, name: str) -> NDArray[np.float32] | None:
        images = self._file[f"given/{name}"]
        return images[0].T if len(images) else None

    @cached_property
    def _replayed(self) -> Pipeline:
        """The pipeline after all volumes, for a run that did not end properly."""
        pipeline = self.pipeline(device="cpu")
        for volume in self.volumes():
            pipeline.push(volume)
        return pipeline

    def maps(self) -> dict[str, ConditionMaps]:
        """Return each condition's maps; of a run that did not end properly, by replaying it."""
        if not self.closed:
            return self._replayed.maps()
        counts = self._file["maps/n_volumes"][:]
        return {
            condition: ConditionMaps(
                int(counts[i]), *(self._file[f"maps/{name}"][i].T for name in _MAPS)
            )
            for i, condition in enumerate(self.conditions)
        }

    def contrast_maps(self) -> dict[str, ContrastMaps]:
        """Return each contrast's maps, as `maps` does; empty without a GLM."""
        if not self.closed:
            return self._replayed.glm_maps()
        return {
            contrast: self._contrast_maps(i, n_rows)
            for i, (contrast, n_rows) in enumerate(
                zip(self.contrast_names, self._contrast_rows, strict=True)
            )
        }

    def _contrast_maps(self, i: int, n_rows: int) -> ContrastMaps:
        glm, dof = self._file["glm"], int(self._file["glm/dof"][i])
        if n_rows:
            return ContrastMaps("F", dof, n_rows, glm["statistic"][i].T)
        return ContrastMaps("t", dof, 1, *(glm[name][i].T for name in _GLM_MAPS))

    def quality_maps(self) -> dict[str, NDArray[np.float32]]:
        """Return mask, tSNR, SNR and the noise's memory, (x, y, z); 0 where there is none."""
        if not self.closed:
            return self._replayed.quality_maps()
        return {name: self._file[f"maps/{name}"][...].T for name in _QUALITY_MAPS}


def open_recording(path: str | Path) -> Recording:
    """Open a recording, finished, growing, or left behind by a crash.

    Raises
    ------
    RecordingError
        If the file cannot be read or is none.
    """
    return Recording(path)


def reserve(path: str | Path) -> None:
    """Create *path* as an empty file, so that a run cannot end with nowhere to write.

    Raises
    ------
    RecordingError
        If it exists already or cannot be created.
    """
    try:
        Path(path).open("xb").close()
    except FileExistsError:
        raise RecordingError(
            f"the recording {path} exists already; name another file, or remove it"
        ) from None
    except OSError as error:
        raise RecordingError(f"cannot write the recording {path}: {error}") from error


def recover(path: str | Path, out: str | Path) -> int:
    """Copy every acknowledged volume of a broken recording into *out* and make its maps again.

    Returns
    -------
    int
        Number of volumes in *out*.

    Raises
    ------
    RecordingError
        If *path* cannot be read or holds no complete volume, or *out* exists or cannot be written.
    """
    with open_recording(path) as broken:
        if not broken.n_volumes:
            raise RecordingError(f"{path} holds no complete volume")
        reserve(out)
        pipeline = broken.pipeline(device="cpu")
        recorder = Recorder(
            out,
            grid=broken.grid,
            tr_s=broken.tr_s,
            dtype=pipeline.dtype,
            config=broken.config,
            paradigm=pipeline.paradigm,
            rois=broken.roi_weights,
            mask=broken.mask,
            reference=broken.reference,
            confounds=broken.confounds,
            design=pipeline.design,
            clock=broken.clock,
            signals=broken.signal_names,
            sham_seal=broken.sham_seal,
            n_planned=broken.n_planned,
            slice_times_s=broken.slice_times_s,
            device=broken.device,
        )
        rows = (
            *(broken.results, broken.roi, broken.roi_t, broken.design),
            *(broken.signals, broken.shown),
        )
        for volume, *values in zip(broken.volumes(), *rows, strict=False):
            pipeline.push(volume)
            recorder._append(volume.data.T, *values)
        for announced in pipeline.paradigm.announced:
            recorder.event(announced)
        for note in broken.journal:
            recorder._note(note)
        recorder.close(pipeline.run_maps())
        return recorder.n_volumes


def _check_start(path: Path) -> None:
    """Refuse what is no HDF5 with superblock version 3, or shorter than that says.

    Opened for SWMR reading, such a file would be read again and again for hours, as if a writer
    were about to complete it (HDF5 file format specification 3.0, section II.A).
    """
    with path.open("rb") as file:
        start = file.read(48)
    if start[:9] != b"\x89HDF\r\n\x1a\n\x03" or len(start) < 48:
        raise OSError("it is not HDF5 as this program writes it")
    size, expected = path.stat().st_size, int.from_bytes(start[28:36], "little")
    if size < expected:
        raise OSError(f"it is cut short, {size} bytes of at least {expected}")


def _event_row(announced: Announced) -> tuple[float, float, float, bytes]:
    event, from_s = announced
    return event.onset_s, event.duration_s, from_s, event.trial_type.encode()


def _names(names: Sequence[str]) -> NDArray[np.bytes_]:
    return np.array([name.encode() for name in names], _NAME)

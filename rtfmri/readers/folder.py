"""Folders of volumes: played back as they lie there, or watched while a scanner fills them."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray
from watchdog.events import (
    FileClosedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from rtfmri.errors import RtfmriError, SourceError, VolumeError
from rtfmri.readers import OTHER_SERIES, RunEnd, Skipped
from rtfmri.readers.assembly import Complete, Piece, Run
from rtfmri.readers.dicom import Assembly, Item
from rtfmri.readers.live import DEFAULT_TIMEOUT_S, Progress
from rtfmri.readers.nifti import SUFFIXES, load_volume, replay_3d
from rtfmri.readers.parrec import is_par, read_par, rec_of
from rtfmri.readers.pieces import NOT_DICOM, Decoder, Unwanted, plain_errors
from rtfmri.readers.replay import Replay, Step, checked_tr, natural_key, stamped
from rtfmri.volume import OTHER_SHAPE, Volume

logger = logging.getLogger(__name__)

POLL_S = 0.025
"""Time between two looks at a live folder; a file that no event tells of takes one to two."""


def replay_folder(path: Path, tr_s: float | None, speed: float | None) -> Replay:
    """Open a folder of DICOM files or PAR/REC pairs, or else of 3-D NIfTI files.

    Volumes come in the order of their headers; those of NIfTI files, and of pairs that do not say
    which volume they are, in the natural order of their names (``vol2`` before ``vol10``). Of
    several series the one with the most volumes is given, the original rather than what was
    derived from it. Everything else comes first, as `Skipped`. Voxels are read when their turn
    comes, and no more than one file's are kept.

    Raises
    ------
    SourceError
        If it holds none of these, or there is no repetition time and none is given.
    """
    names = sorted(_names(path), key=natural_key)
    found, skipped = _find_series(path, names)
    if not found:
        images = [path / name for name in names if name.endswith(SUFFIXES)]
        refused = [item.reason for item in skipped if item.reason != NOT_DICOM]
        if refused:
            raise SourceError(
                f"no usable volume among {len(refused)} files in {path}: {refused[0]}"
            )
        if not images:
            raise SourceError(f"no DICOM and no NIfTI files in the folder {path}")
        others = [Skipped(name, "is not NIfTI") for name in names if not name.endswith(SUFFIXES)]
        return replay_3d(images, others, tr_s, speed)
    ours = max(found, key=lambda series: (len(series.complete), not series.first.derived))
    skipped += [
        Skipped(name, OTHER_SERIES)
        for series in found
        if series is not ours
        for _, name in series.files
    ]
    if not ours.complete:
        raise SourceError(
            f"no usable volume among {len(ours.files)} files in {path}: {ours.skipped[0].reason}"
        )
    run_tr_s = tr_s or checked_tr(ours.first.tr_s, f"the series in {path}")

    def steps() -> Iterator[Step | Skipped]:
        yield from skipped
        yield from ours.skipped
        for complete in ours.complete:
            volume = replace(complete, tr_s=run_tr_s).volume
            yield Step(complete.name, complete.index, volume)

    return Replay(steps(), n_volumes=len(ours.complete), tr_s=run_tr_s, speed=speed)


class SeriesSummary(NamedTuple):
    """What a folder holds of one series."""

    number: int | None
    """SeriesNumber, as ``series=`` takes it."""
    n_files: int
    n_volumes: int
    """Complete ones."""
    shape: tuple[int, int, int] | None
    """Of a volume, (x, y, z); None where none is complete."""
    tr_s: float | None
    echo_times_ms: tuple[float, ...]
    derived: bool
    """Whether it was computed from other images."""


def list_series(path: Path) -> list[SeriesSummary]:
    """Return the series of DICOM files and PAR/REC pairs in a folder, by their numbers.

    Raises
    ------
    SourceError
        If there is no such folder.
    """
    found, _ = _find_series(path, sorted(_names(path), key=natural_key))
    return sorted((series.summary() for series in found), key=lambda one: one.number or 0)


def _find_series(path: Path, names: list[str]) -> tuple[list["_Found"], list[Skipped]]:
    """Look into all files; return the series, put together, and what belongs to none."""
    survey = _survey_with(Decoder())
    skipped: list[Skipped] = []
    found: dict[str, _Found] = {}
    for name in names:
        try:
            pieces = survey(path / name)
        except VolumeError as error:
            skipped.append(Skipped(name, str(error)))
        else:
            found.setdefault(pieces[0].series, _Found()).files.append((pieces, name))
    for series in found.values():
        series.put_together()
    return list(found.values()), skipped


class _Found:
    """A series in a folder."""

    def __init__(self) -> None:
        self.files: list[tuple[list[Piece], str]] = []
        self.complete: list[Complete] = []
        self.skipped: list[Skipped] = []

    @property
    def first(self) -> Piece:
        return self.files[0][0][0]

    def put_together(self) -> None:
        """Find the volumes and their order, without their voxels."""
        run = Run(tr_s=1.0)  # which it is matters when it is known whether this is the run
        for pieces, name in sorted(self.files, key=_order):
            for item in (item for piece in pieces for item in run.add(piece, name, 0.0)):
                if isinstance(item, Skipped):
                    self.skipped.append(item)
                else:
                    self.complete.append(item)
        self.skipped += run.end()
        self.complete.sort(key=lambda complete: complete.index)

    def summary(self) -> SeriesSummary:
        times_ms = {piece.echo_time_ms for pieces, _ in self.files for piece in pieces}
        echoes = self.complete[0].echoes if self.complete else ()
        n_slices = sum(piece.shape[0] for piece in echoes[0]) if echoes else 0
        return SeriesSummary(
            number=self.first.series_number,
            n_files=len(self.files),
            n_volumes=len(self.complete),
            shape=(self.first.shape[2], self.first.shape[1], n_slices) if echoes else None,
            tr_s=self.first.tr_s,
            echo_times_ms=tuple(sorted(time_ms for time_ms in times_ms if time_ms)),
            derived=self.first.derived,
        )


def _order(file: tuple[list[Piece], str]) -> tuple[int, int]:
    piece = file[0][0]
    return piece.index or 0, piece.instance or 0


def _survey_with(decoder: Decoder) -> Callable[[Path], list[Piece]]:
    """Return what looks into a file; its voxels are read from it when they are wanted."""

    @lru_cache(maxsize=1)  # once for all the volumes in it
    def read(path: Path) -> list[Piece]:
        with plain_errors():
            data = path.read_bytes()
        return decoder.read(data)

    def load(path: Path, number: int) -> NDArray[Any]:
        return read(path)[number].load()

    def survey(path: Path) -> list[Piece]:
        if is_par(path.name):
            return read_par(path)
        pieces = decoder.read(path, voxels=False)
        return [replace(p, load=partial(load, path, i)) for i, p in enumerate(pieces)]

    return survey


def open_live(target: str, tr_s: float | None, **options: Any) -> "LiveFolder":
    """Open a folder that a scanner is filling; *options* are those of `LiveFolder`."""
    return LiveFolder(Path(target), tr_s, **options)


def _names(folder: Path) -> list[str]:
    """Return the names of the folder's files without hidden and temporary ones.

    A PAR/REC pair is one file, called like its PAR.
    """
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
        raise SourceError(f"cannot read the folder {folder}: {error.strerror}") from error
    pairs = {rec_of(Path(name)).name for name in names if is_par(name)}
    return [name for name in names - pairs if _is_visible(name)]


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and not name.endswith((".tmp", ".part"))


@dataclass(slots=True)
class _Arrival:
    """A file that has arrived, but perhaps not all of it."""

    state: tuple[int, int]
    """Size and time of change: equal for a file that has not changed."""
    since_s: float
    """When it was first seen in this state."""
    problem: str | None = None
    """Why it could not be decoded in this state; None before the first try."""


class LiveFolder:
    """Reader of a folder that a scanner fills with DICOM files, PAR/REC pairs or NIfTI files.

    File-system events tell of files on this machine within a millisecond, but do not cross
    network shares; so the folder is also looked at every 25 ms, always, unless that would take
    more than half the time. A file is tried once its writer has closed it or moved it in, or when
    it has not changed between two looks, and again whenever it changes, until it can be decoded.
    `Assembly` says which series is read and what makes a volume; NIfTI files are one volume each,
    numbered as they come. Hidden files, ``*.tmp`` and ``*.part`` are ignored.

    Iterate once for each run: the next iteration goes on where the last one ended.

    Parameters
    ----------
    path : Path
        The folder; it must exist.
    tr_s : float, optional
        Repetition time in seconds; the headers' by default.
    count : int, optional
        A run ends when this many different volumes are there.
    timeout_s : float
        A run ends when, after its first volume, none has come for this many seconds.
    existing : {"skip", "use"}
        Whether files that are there already are ignored (unless an event tells that they were
        written again), or are the beginning of the run.
    patience_s : float
        A file that cannot be decoded and has not changed for this many seconds is skipped.
    **assembly_options
        As for `Assembly`.

    Raises
    ------
    SourceError
        If there is no such folder; when iterated, if the first volume has no usable repetition
        time and none is given.
    """

    live = True

    def __init__(
        self,
        path: Path,
        tr_s: float | None = None,
        *,
        count: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        existing: Literal["skip", "use"] = "skip",
        patience_s: float = 3.0,
        **assembly_options: Any,
    ) -> None:
        self.n_volumes = count
        self._path = path
        self._tr_s = tr_s
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._assembly = Assembly(tr_s, **assembly_options)
        self._items: deque[Item] = deque()
        self._used = False
        self._begun = False
        self._kind: str | None = None
        self._n_nifti = 0
        self._shape: tuple[int, ...] | None = None
        there = _names(path)
        self._ignored = set(there) if existing == "skip" else set()
        self._is_away = False
        self._done: set[str] = set()
        self._arrivals: dict[str, _Arrival] = {}
        self._look_at_s = 0.0
        self._closed = Event()
        self._reports: SimpleQueue[str] = SimpleQueue()
        self._observer = Observer()
        self._observer.schedule(
            _Reporter(self._reports), str(path), event_filter=[FileClosedEvent, FileMovedEvent]
        )
        try:
            self._observer.start()
        except OSError as error:
            logger.warning("no file-system events (%s); polling only", error.strerror)

    def close(self) -> None:
        """End the iteration within moments."""
        self._closed.set()
        self._reports.put("")
        self._observer.stop()

    def __iter__(self) -> Iterator[Item]:
        """Give one run's volumes as their files are complete."""
        if self._used:
            self._begun, self._kind, self._n_nifti, self._shape = False, None, 0, None
            self._items.extendleft(reversed(self._assembly.next_run()))
        self._used = True
        progress = Progress(self.n_volumes, self._timeout_s)
        while not self._closed.is_set():
            while self._items:
                item = self._items.popleft()
                if isinstance(item, RunEnd):
                    if progress.begun:
                        yield from self._end(item)
                        return
                    continue
                yield item
                if isinstance(item, Volume):
                    progress.take(item)
                if self._closed.is_set():
                    return
                if progress.complete:
                    yield from self._end(progress.end())
                    return
            for name in self._look(self._wait(progress.left_s)):
                self._take(name)
            if not self._items and progress.left_s == 0:
                yield from self._end(progress.end())
                return

    def _end(self, end: RunEnd) -> Iterator[Item]:
        """Account for what the run leaves behind."""
        yield from self._assembly.end()
        for name, arrival in self._arrivals.items():
            if arrival.problem:
                yield Skipped(name, f"incomplete when the run ended: {arrival.problem}")
        yield end

    def _look(self, reported: set[str]) -> list[str]:
        """Return the files to be tried now, DICOM before NIfTI, oldest first."""
        now_s = time.perf_counter()
        self._ignored -= reported
        is_due = now_s >= self._look_at_s
        names = self._reachable_names() if is_due else list(reported)
        arrivals = {} if is_due else dict(self._arrivals)
        ready = []
        for name in names:
            if name in self._done or name in self._ignored:
                continue
            state = _state(self._path / name)
            if state is None:
                continue
            known = self._arrivals.get(name)
            unchanged = known is not None and known.state == state
            arrivals[name] = known if known and unchanged else _Arrival(state, now_s)
            impatient = now_s - arrivals[name].since_s > self._patience_s
            untried = arrivals[name].problem is None
            if name in reported or (unchanged and (untried or impatient)):
                ready.append(name)
        self._arrivals = arrivals
        if is_due:
            took_s = time.perf_counter() - now_s
            self._look_at_s = now_s + took_s + max(POLL_S, took_s)

        def age(name: str) -> tuple[object, ...]:
            # Masks and templates may lie beside DICOM files; they must not decide what is read.
            return name.endswith(SUFFIXES), arrivals[name].state[1], natural_key(name)

        return sorted(ready, key=age)

    def _reachable_names(self) -> list[str]:
        """Return the folder's files; none while a share is away, which must not end a run."""
        try:
            names = _names(self._path)
        except SourceError as error:
            if not self._is_away:
                logger.warning("%s; trying on", error)
            self._is_away = True
            return []
        self._is_away = False
        return names

    def _take(self, name: str) -> None:
        """Decode a file; if it cannot be decoded, it may yet be complete."""
        arrival = self._arrivals[name]
        try:
            items = self._decode(name, arrival.since_s)
        except RtfmriError as error:
            if isinstance(error, SourceError) and not self._begun:
                raise
            arrival.problem = str(error)
            if time.perf_counter() - arrival.since_s <= self._patience_s:
                return
            items = [Skipped(name, f"incomplete or no volume: {error}")]
        del self._arrivals[name]
        self._done.add(name)
        self._items.extend(items)

    def _decode(self, name: str, arrived_s: float) -> list[Item]:
        """Return what a file gives; its last byte was there when it was first seen like this."""
        path, is_nifti = self._path / name, name.endswith(SUFFIXES)
        kind = "NIfTI" if is_nifti else "DICOM"
        if self._kind not in (None, kind):
            return [Skipped(name, OTHER_SERIES)]
        items: list[Item]
        if is_nifti:
            items = [self._numbered(load_volume(path, self._n_nifti, self._tr_s), name, arrived_s)]
        elif is_par(name):
            try:
                items = self._assembly.take(read_par(path), name, arrived_s)
            except Unwanted as error:
                items = [Skipped(name, str(error))]
        else:
            with plain_errors():
                data = path.read_bytes()
            items = self._assembly.add(data, name, arrived_s)
        gives = any(isinstance(item, Volume) for item in items)
        self._begun |= gives
        if gives or not items:
            self._kind = kind
        return items

    def _numbered(self, volume: Volume, name: str, arrived_s: float) -> Volume | Skipped:
        """Count a NIfTI volume; a stranger must not, since all after it would move."""
        self._shape = self._shape or volume.grid.shape
        if volume.grid.shape != self._shape:
            return Skipped(name, OTHER_SHAPE)
        self._n_nifti += 1
        return stamped(volume, arrived_s)

    def _wait(self, left_s: float | None) -> set[str]:
        """Wait until the next look and return the files whose writers reported them meanwhile."""
        names = set()
        wait_s = max(0.0, self._look_at_s - time.perf_counter())
        with suppress(Empty):
            names.add(self._reports.get(timeout=wait_s if left_s is None else min(wait_s, left_s)))
            while True:
                names.add(self._reports.get_nowait())
        return {_called(name) for name in names if _is_visible(name)}


def _called(name: str) -> str:
    """Return what a file is called here: a REC like its PAR."""
    path = Path(name)
    suffix = {".rec": ".par", ".REC": ".PAR"}.get(path.suffix)
    return path.with_suffix(suffix).name if suffix else name


class _Reporter(FileSystemEventHandler):
    """Passes on the names of files that were closed after writing, or renamed."""

    def __init__(self, reports: SimpleQueue[str]) -> None:
        self._reports = reports

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Take the place a file has now: an event of closing has no destination."""
        path = event.dest_path or event.src_path
        self._reports.put(Path(os.fsdecode(path)).name)


def _state(path: Path) -> tuple[int, int] | None:
    """Return size and time of change, of a pair's files both; None for a file that is gone."""
    sizes, times = [], []
    for part in (path, rec_of(path)) if is_par(path.name) else (path,):
        try:
            status = part.stat()
        except OSError:
            if part == path:
                return None
            continue
        sizes.append(status.st_size)
        times.append(status.st_mtime_ns)
    return sum(sizes), max(times)

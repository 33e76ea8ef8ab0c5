"""Folders of volumes: played back as they lie there, or watched while a scanner fills them."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import Literal

from watchdog.events import (
    FileClosedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from rtfmri.errors import RtfmriError, SourceError, VolumeError
from rtfmri.readers import Skipped
from rtfmri.readers.dicom import Decoded, Place, decode, locate
from rtfmri.readers.nifti import SUFFIXES, load_volume, replay_3d
from rtfmri.readers.replay import Replay, Step, natural_key, stamped
from rtfmri.volume import Volume

logger = logging.getLogger(__name__)

POLL_S = 0.05
"""Time between two looks at a live folder."""

NIFTI = "NIfTI"
"""Stands for the series of files that name none."""
OTHER_SERIES = "belongs to another series"


def replay_folder(path: Path, tr_s: float | None, speed: float | None) -> Replay:
    """Open a folder of DICOM files, one file a volume, or else of 3-D NIfTI files.

    DICOM volumes come in the order of their headers, NIfTI volumes in the natural order of their
    names (``vol2`` before ``vol10``). A folder with DICOM files of several series gives the one
    with the most files. Everything else comes first, as `Skipped`.

    Raises
    ------
    SourceError
        If it holds neither, or there is no repetition time and none is given.
    """
    paths = [path / name for name in sorted(_names(path), key=natural_key)]
    places: dict[Path, Place] = {}
    skipped: list[Skipped] = []
    for file in paths:
        try:
            places[file] = locate(file)
        except VolumeError as error:
            skipped.append(Skipped(file.name, str(error)))
    if not places:
        images = [file for file in paths if file.name.endswith(SUFFIXES)]
        if not images:
            raise SourceError(f"no DICOM and no NIfTI files in the folder {path}")
        others = [Skipped(file.name, "is not NIfTI") for file in paths if file not in images]
        return replay_3d(images, others, tr_s, speed)
    series = Counter(place.series for place in places.values()).most_common(1)[0][0]
    ours = [file for file, place in places.items() if place.series == series]
    ours.sort(key=lambda file: places[file].index)
    skipped += [
        Skipped(file.name, OTHER_SERIES)
        for file, place in places.items()
        if place.series != series
    ]

    def steps() -> Iterator[Step | Skipped]:
        yield from skipped
        for file in ours:
            yield Step(file.name, places[file].index, partial(_load, file, tr_s))

    return Replay(steps(), n_volumes=len(ours), tr_s=tr_s or _first_tr_s(path, ours), speed=speed)


def _load(path: Path, tr_s: float | None) -> Volume:
    return decode(path, tr_s=tr_s).volume


def _first_tr_s(folder: Path, paths: list[Path]) -> float:
    """Return the repetition time of the first volume that can be decoded."""
    reasons: list[str] = []
    for path in paths:
        try:
            return _load(path, None).tr_s
        except VolumeError as error:
            reasons.append(str(error))
    raise SourceError(f"no usable volume among {len(paths)} files in {folder}: it {reasons[0]}")


def _names(folder: Path) -> list[str]:
    """Return the names of the folder's files without hidden and temporary ones."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and not entry.name.endswith((".tmp", ".part"))
                and entry.is_file()
            ]
    except OSError as error:
        raise SourceError(f"cannot read the folder {folder}: {error.strerror}") from error


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
    """Reader of a folder that a scanner is filling, one file a volume.

    File-system events tell of files on this machine within a millisecond, but do not cross
    network shares; so the folder is also looked at every 50 ms, always. A file is tried once its
    writer has closed it or moved it in, or when it has not changed between two looks, and again
    whenever it changes, until it can be decoded. The first volume decides which series is read,
    or that NIfTI files are, numbered as they come. Hidden files, ``*.tmp`` and ``*.part`` are
    ignored.

    Parameters
    ----------
    path : Path
        The folder; it must exist.
    tr_s : float, optional
        Repetition time in seconds; the headers' by default.
    count : int, optional
        The run ends after this many volumes.
    timeout_s : float
        The run ends when, after the first volume, no new file has come for this many seconds.
    existing : {"skip", "use"}
        Whether files that are there already are ignored (unless an event tells that they were
        written again), or are the beginning of the run.
    patience_s : float
        A file that cannot be decoded and has not changed for this many seconds is skipped.

    Raises
    ------
    SourceError
        If there is no such folder; when iterated, if the first volume has no repetition time and
        none is given.
    """

    live = True

    def __init__(
        self,
        path: Path,
        tr_s: float | None = None,
        *,
        count: int | None = None,
        timeout_s: float = 30.0,
        existing: Literal["skip", "use"] = "skip",
        patience_s: float = 3.0,
    ) -> None:
        self.n_volumes = count
        self._path = path
        self._tr_s = tr_s
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        there = _names(path)
        self._ignored = set(there) if existing == "skip" else set()
        self._series: str | None = None
        self._n_taken = 0
        self._is_away = False
        self._done: set[str] = set()
        self._arrivals: dict[str, _Arrival] = {}
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

    def __iter__(self) -> Iterator[Volume | Skipped]:
        """Give volumes as their files are complete."""
        try:
            yield from self._take_all()
            for name, arrival in self._arrivals.items():
                yield Skipped(name, f"incomplete when the run ended: {arrival.problem or 'new'}")
        finally:
            self.close()

    def _take_all(self) -> Iterator[Volume | Skipped]:
        last_s = time.perf_counter()
        reported: set[str] = set()
        while not self._closed.is_set():
            n_seen = len(self._done) + len(self._arrivals)
            for name in self._look(reported):
                item = self._try(name)
                if item is not None:
                    del self._arrivals[name]
                    self._done.add(name)
                    yield item
                if self._closed.is_set() or self._n_taken == self.n_volumes:
                    return
            now_s = time.perf_counter()
            if not self._n_taken or len(self._done) + len(self._arrivals) != n_seen:
                last_s = now_s
            if now_s - last_s > self._timeout_s:
                return
            reported = self._wait()

    def _look(self, reported: set[str]) -> list[str]:
        """Return the files to be tried now, DICOM before NIfTI, oldest first."""
        now_s = time.perf_counter()
        arrivals: dict[str, _Arrival] = {}
        ready = []
        self._ignored -= reported
        for name in self._reachable_names():
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

        def age(name: str) -> tuple[object, ...]:
            # Masks and templates may lie beside DICOM files; they must not decide the series.
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

    def _try(self, name: str) -> Volume | Skipped | None:
        """Return the file as a volume, or why it is none; None if it may yet be complete."""
        if name.endswith(SUFFIXES) and self._series not in (None, NIFTI):
            return Skipped(name, OTHER_SERIES)
        arrival = self._arrivals[name]
        try:
            volume, series = self._decode(name)
        except RtfmriError as error:
            if isinstance(error, SourceError) and not self._n_taken:
                raise
            arrival.problem = str(error)
            if time.perf_counter() - arrival.since_s > self._patience_s:
                return Skipped(name, f"incomplete or no volume: {error}")
            return None
        if self._series not in (None, series):
            return Skipped(name, OTHER_SERIES)
        self._series = series
        self._n_taken += 1
        # Its last byte was there when it was first seen like this, not when it was tried.
        return stamped(volume, arrival.since_s)

    def _decode(self, name: str) -> Decoded:
        path = self._path / name
        if name.endswith(SUFFIXES):
            return Decoded(load_volume(path, self._n_taken, self._tr_s), NIFTI)
        return decode(path, tr_s=self._tr_s)

    def _wait(self) -> set[str]:
        """Wait until the next look and return the files whose writers reported them meanwhile."""
        names = set()
        with suppress(Empty):
            names.add(self._reports.get(timeout=POLL_S))
            while True:
                names.add(self._reports.get_nowait())
        return names


class _Reporter(FileSystemEventHandler):
    """Passes on the names of files that were closed after writing, or renamed."""

    def __init__(self, reports: SimpleQueue[str]) -> None:
        self._reports = reports

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Take the place a file has now: an event of closing has no destination."""
        path = event.dest_path or event.src_path
        self._reports.put(Path(os.fsdecode(path)).name)


def _state(path: Path) -> tuple[int, int] | None:
    """Return size and time of change; None for a file that is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns

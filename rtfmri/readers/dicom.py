"""DICOM files to volumes: one file alone, or the files of a run as they arrive."""

import time
from collections import deque
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rtfmri.errors import RtfmriError, SourceError, VolumeError
from rtfmri.readers import OTHER_SERIES, RunEnd, Skipped
from rtfmri.readers.assembly import T2STAR_MS, Complete, Piece, Run
from rtfmri.readers.pieces import Decoder, Unwanted
from rtfmri.readers.replay import checked_tr
from rtfmri.volume import Volume

DERIVED = "is a derived image; give series=N to read it"

_SILENCES = 2.5
"""The next run may begin when this one's volumes have failed to come for so many intervals."""
_LEAST_SILENCE_S = 0.25
"""What is sent in bulk, long after its acquisition, has no pauses that tell of anything."""
_MOST_CANDIDATES = 8

Item = Volume | Skipped | RunEnd


class Decoded(NamedTuple):
    """A volume and the series it belongs to."""

    volume: Volume
    series: str
    """Digest of the SeriesInstanceUID: equal for files of one series, otherwise opaque."""


_decoder = Decoder()


def decode(
    source: bytes | Path, *, tr_s: float | None = None, decoder: Decoder = _decoder
) -> Decoded:
    """Decode one DICOM file that holds one volume.

    Parameters
    ----------
    source : bytes or Path
        The whole file.
    tr_s : float, optional
        Repetition time in seconds; the header's by default.
    decoder : Decoder
        Digests of series compare between files that the same decoder has read.

    Returns
    -------
    Decoded
        The volume's voxels keep the integers as stored, unless the header asks for a rescaling
        (then float32). Its axes are column, row and slice of the images; its affine is RAS+.

    Raises
    ------
    VolumeError
        If it is not DICOM, is cut short, holds no magnitude image, one slice of many, or more than
        one volume, or is compressed in a way that no installed decoder knows.
    SourceError
        If it has no usable repetition time and none is given.

    Notes
    -----
    The index is AcquisitionNumber - 1, or InstanceNumber - 1 where that is missing.
    """
    pieces = decoder.read(source)
    piece = pieces[0]
    if len(pieces) > 1:
        raise VolumeError("holds more than one volume; one file a volume is needed")
    if piece.shape[0] != piece.n_slices:
        raise VolumeError("holds one slice; a whole volume is needed")
    tr_s = tr_s or checked_tr(piece.tr_s, "the series")
    complete = Complete(_index(piece), ((piece,),), tr_s, time.perf_counter(), T2STAR_MS, "")
    return Decoded(complete.volume(), piece.series)


def _index(piece: Piece) -> int:
    index = piece.instance if piece.index is None else piece.index
    if index is None:
        raise VolumeError("has no AcquisitionNumber and no InstanceNumber")
    return index


class Assembly:
    """DICOM files, in whatever order they come, to the volumes of one series at a time.

    The first series that completes a volume is read, unless its images are derived from others;
    as long as it has no second volume, another series that has one may take its place. When it
    has fallen silent and another original one of the same shape begins, that is the next run.
    Series that come along with it, such as a scanner's own motion-corrected twin, are not.

    Parameters
    ----------
    tr_s : float, optional
        Repetition time in seconds; the headers' by default.
    series : int, optional
        SeriesNumber of the series to read; there is no next run then.
    echo, echoes, slices, t2star_ms
        As for `Run`.
    """

    def __init__(
        self,
        tr_s: float | None = None,
        *,
        series: int | None = None,
        echo: int | None = None,
        echoes: int | None = None,
        slices: int | None = None,
        t2star_ms: float = T2STAR_MS,
    ) -> None:
        self._number = series
        self._new_run = partial(
            Run, tr_s, echo=echo, echoes=echoes, slices=slices, t2star_ms=t2star_ms
        )
        self._decoder = Decoder()
        self._ours: _Series | None = None
        self._next: _Series | None = None
        self._candidates: dict[str, _Series] = {}
        self._past: set[str] = set()

    def add(self, data: bytes, name: str, arrived_s: float) -> list[Item]:
        """Take one file's content; return what it completes.

        Parameters
        ----------
        data : bytes
            The whole file.
        name : str
            What a `Skipped` is to call it.
        arrived_s : float
            `time.perf_counter` when its last byte was here.

        Returns
        -------
        items : list of Volume, Skipped or RunEnd
            A `RunEnd` if it belongs to the next run; it is kept for `next_run`.

        Raises
        ------
        VolumeError
            If it cannot be decoded (as yet: a file that is being written may be given again).
        SourceError
            If the series has no usable repetition time and none is given, or no echo of that
            number.
        """
        try:
            pieces = self._decoder.read(data)
        except Unwanted as error:
            return [Skipped(name, str(error))]
        return self.take(pieces, name, arrived_s)

    def take(self, pieces: list[Piece], name: str, arrived_s: float) -> list[Item]:
        """Take what a file holds, all of one series; as `add` otherwise."""
        head = pieces[0]
        for series in (self._ours, self._next):
            if series and series.name == head.series:
                return self._given(series, series.feed(pieces, name, arrived_s))
        if self._number is not None:
            if self._ours or head.series_number != self._number or head.series in self._past:
                return [Skipped(name, OTHER_SERIES)]
            self._ours = _Series(head.series, self._new_run())
            return list(self._ours.feed(pieces, name, arrived_s))
        if head.series in self._past or self._next:
            self._past.add(head.series)
            return [Skipped(name, OTHER_SERIES)]
        if head.derived:
            return [Skipped(name, OTHER_SERIES if self._ours else DERIVED)]
        if self._ours:
            return self._take_other(self._ours, pieces, name, arrived_s)
        return self._take_first(pieces, name, arrived_s)

    def next_run(self) -> list[Volume | Skipped]:
        """Begin anew with the run that has begun, or will; return what is there of it.

        What was incomplete of the last one comes first.
        """
        items: list[Volume | Skipped] = [*self.end()]
        if self._ours:
            self._past.add(self._ours.name)
        self._ours, self._next = self._next, None
        if self._ours:
            items += self._ours.items
        return items

    def end(self) -> list[Skipped]:
        """Forget what is incomplete, and return it."""
        if self._ours:
            return [*self._ours.run.end(), *self._drop(list(self._candidates))]
        return [item for series in self._candidates.values() for item in series.run.end()]

    def _given(self, series: "_Series", items: list[Volume | Skipped]) -> list[Item]:
        """Return what our series gave; what the next one gave waits for its turn."""
        if series is self._next:
            series.items += items
            return []
        return [*items, *(self._drop(list(self._candidates)) if series.n_volumes > 1 else [])]

    def _take_first(self, pieces: list[Piece], name: str, arrived_s: float) -> list[Item]:
        """Take a piece while it is open which series to read."""
        series = self._candidate(pieces[0].series)
        try:
            items = series.feed(pieces, name, arrived_s)
        except SourceError as error:
            # A localiser may have a repetition time that no run has, but it has no second volume.
            if pieces[0].tr_s and series.run.newest_index < 1:
                return [Skipped(name, str(error))]
            raise
        if series.n_volumes:
            self._ours = self._candidates.pop(series.name)
            return self._given(series, items)
        series.names += [] if items else [name]
        return [*items, *self._drop(list(self._candidates)[:-_MOST_CANDIDATES])]

    def _take_other(
        self, ours: "_Series", pieces: list[Piece], name: str, arrived_s: float
    ) -> list[Item]:
        """Take an original image of another series than ours: of the next run, or of no use."""
        head = pieces[0]
        is_silent = ours.has_been_silent(arrived_s)
        begins = ours.run.looks_like(head) and self._new_run().index_of(head) in (0, None)
        if ours.n_volumes > 1 and not (is_silent and begins):
            if not is_silent:
                self._past.add(head.series)
            return [Skipped(name, OTHER_SERIES)]
        series = self._candidate(head.series)
        series.items += series.feed(pieces, name, arrived_s)
        series.names.append(name)
        if is_silent and (begins or series.run.newest_index > 0):
            self._next = self._candidates.pop(head.series)
            return [RunEnd("the next run began"), *self._drop(list(self._candidates))]
        return list(self._drop(list(self._candidates)[:-_MOST_CANDIDATES]))

    def _candidate(self, name: str) -> "_Series":
        return self._candidates.setdefault(name, _Series(name, self._new_run()))

    def _drop(self, names: list[str]) -> list[Skipped]:
        """Forget candidates for good, and account for their files."""
        self._past.update(names)
        dropped = [self._candidates.pop(name) for name in names]
        return [Skipped(name, OTHER_SERIES) for series in dropped for name in series.names]


class _Series:
    """A series that is, or may be, a run."""

    def __init__(self, name: str, run: Run) -> None:
        self.name = name
        self.run = run
        self.items: list[Volume | Skipped] = []
        """What it gave before its turn."""
        self.names: list[str] = []
        """Of the files that are kept until it is decided whether it is read."""
        self.n_volumes = 0
        self._last_s = 0.0
        self._arrivals_s: deque[float] = deque(maxlen=16)
        self._tr_s = 0.0

    def feed(self, pieces: list[Piece], name: str, arrived_s: float) -> list[Volume | Skipped]:
        """Take a file's pieces, all or none; return what they complete."""
        loaded = [piece.loaded() for piece in pieces]
        items = [_made(item) for piece in loaded for item in self.run.add(piece, name, arrived_s)]
        self._last_s = arrived_s
        for item in items:
            if isinstance(item, Volume):
                self.n_volumes += 1
                self._tr_s = item.tr_s
                self._arrivals_s.append(item.arrived_s)
        return items

    def has_been_silent(self, now_s: float) -> bool:
        """Tell whether volumes have been missing for longer than their usual intervals explain."""
        arrivals = list(self._arrivals_s)
        gaps = [b - a for a, b in pairwise(arrivals) if b > a]
        usual_s = median(gaps) if gaps else self._tr_s
        return now_s - self._last_s >= max(_LEAST_SILENCE_S, _SILENCES * usual_s)


def _made(item: Complete | Skipped) -> Volume | Skipped:
    if isinstance(item, Skipped):
        return item
    try:
        return item.volume()
    except RtfmriError as error:
        return Skipped(item.name, str(error))

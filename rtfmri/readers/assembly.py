"""Slices and echoes to volumes, in whatever order they come; knows nothing of files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import SourceError, VolumeError
from rtfmri.readers import Skipped
from rtfmri.readers.replay import checked_tr
from rtfmri.volume import OTHER_SHAPE, Grid, Volume, as_slice_times, as_voxels

T2STAR_MS = 47.0
"""Of grey matter at 3 T: the mean of its frontal (51.8) and occipital (41.6 ms) lobe, as Wansapura
et al. measured it (J Magn Reson Imaging 9:531, 1999)."""

TWICE = "came twice"
LATE = "came after its volume was given up"
OTHER_PLANE = "lies in another plane than the first slice"
LACKS_SLICES = "lacks slices"
UNKNOWN_SIZE = "is of a volume of unknown size; give slices=N"

_DAY_S = 86400.0
_LATER = 3
"""A volume that lacks slices is given up when so many later ones are complete since its last."""
_MOST_OPEN = 64
"""Volumes that may be incomplete at a time; slices that come one volume after another need 2."""
_MOST_UNNUMBERED = 4096
"""Slices that are kept until it is known how many make a volume."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Parallel slices of one volume and echo: one of them, or all."""

    series: str
    """Equal for the pieces of one series, otherwise opaque."""
    shape: tuple[int, int, int]
    """(slices, rows, columns)."""
    affine: NDArray[np.float64]
    """From (column, row, slice) to RAS+ mm; the third axis of a single slice is its normal."""
    load: Callable[[], NDArray[Any]]
    """Returns the voxels, of `shape`, in scanner units."""
    index: int | None = None
    """Of the volume in the run, from 0, where the header counts volumes."""
    instance: int | None = None
    """Of the file in the series, from 0, where the header counts files."""
    n_slices: int | None = None
    """Of a volume, where it is known."""
    n_echoes: int | None = None
    echo_time_ms: float | None = None
    tr_s: float | None = None
    """As the header has it."""
    acquired_s: float | None = None
    """Time of day."""
    times_s: tuple[float, ...] = ()
    """Acquisition start of each slice after the volume's; empty if not known."""
    series_number: int | None = None
    derived: bool = False
    """Whether it was computed from other images."""

    @property
    def height_mm(self) -> float:
        """Of its first slice, as `height_mm`."""
        return height_mm(self.affine)

    def loaded(self) -> "Piece":
        """Return it with its voxels in memory."""
        voxels = self.load()
        return replace(self, load=lambda: voxels)


_slice_times = lru_cache(maxsize=4)(as_slice_times)
"""They are the same from volume to volume, or nearly so."""


class _Image(NamedTuple):
    slices: NDArray[Any]
    """(slices, rows, columns)."""
    affine: NDArray[np.float64]
    times_s: Sequence[float | None]
    acquired_s: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Complete:
    """All pieces of a volume; `volume` puts them together."""

    index: int
    echoes: tuple[tuple[Piece, ...], ...]
    """The pieces of each echo, in the order of the echo times."""
    tr_s: float
    arrived_s: float
    t2star_ms: float
    name: str
    """Of its file, where there is but one."""

    def volume(self) -> Volume:
        """Return the volume: one echo as it is, several as a weighted sum.

        Raises
        ------
        VolumeError, GridError
            If slices do not make an evenly spaced stack, or echoes do not fit each other.
        """
        with np.errstate(all="ignore"):  # a stranger's numbers may be of any size
            images = [_stack(pieces) for pieces in self.echoes]
            slices, affine, times_s, acquired_s = images[0]
            if len(images) > 1:
                times_ms = [pieces[0].echo_time_ms for pieces in self.echoes]
                slices = _combined([image.slices for image in images], times_ms, self.t2star_ms)
        return Volume(
            data=as_voxels(slices.T),
            grid=Grid(slices.T.shape, affine),
            index=self.index,
            tr_s=self.tr_s,
            acquired_s=acquired_s,
            slice_times_s=_slice_times(tuple(times_s), len(slices)),
            arrived_s=self.arrived_s,
        )


def _stack(pieces: Sequence[Piece]) -> _Image:
    """Sort slices along the normal of their plane, row direction x column direction."""
    clocks = [piece.acquired_s for piece in pieces]
    starts_s = [] if None in clocks else _after_first([c for c in clocks if c is not None])
    acquired_s = clocks[starts_s.index(0.0)] if starts_s else None
    first = pieces[0]
    if len(pieces) == 1:
        return _Image(first.load(), first.affine, first.times_s, acquired_s)
    order = np.argsort([piece.height_mm for piece in pieces])
    affine = stacked([pieces[i].affine for i in order])
    slices = np.concatenate([pieces[i].load() for i in order])
    known = [time_s for i in order for time_s in pieces[i].times_s]
    times_s = known or [starts_s[i] for i in order if starts_s]
    return _Image(slices, affine, times_s, acquired_s)


def height_mm(affine: NDArray[np.float64]) -> float:
    """Return where a slice lies along the normal of its plane, to 0.01 mm.

    The normal is row direction x column direction.
    """
    # By hand: numpy takes ten times as long for so few numbers, and every piece comes by here.
    (a, d, _, x), (b, e, _, y), (c, f, _, z), _ = affine.tolist()
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    height = sum(n * at for n, at in zip(normal, (x, y, z), strict=True)) / math.hypot(*normal)
    return round(float(height), 2)


def stacked(affines: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the affine of parallel slices that are sorted.

    Raises
    ------
    VolumeError
        If their distances differ by more than rounding does.
    """
    affine = affines[0].copy()
    if len(affines) > 1:
        corners = np.array([affine[:3, 3] for affine in affines])
        gaps_mm = np.linalg.norm(np.diff(corners, axis=0), axis=1)
        if not gaps_mm.min() > 0.9 * gaps_mm.max():
            raise VolumeError("has slices at uneven distances")
        affine[:3, 2] = (corners[-1] - corners[0]) / (len(affines) - 1)
    return affine


def _after_first(clocks_s: list[float]) -> list[float]:
    """Return times of day as seconds after the first of them, also about midnight."""
    if max(clocks_s) - min(clocks_s) > _DAY_S / 2:
        clocks_s = [clock + _DAY_S * (clock < _DAY_S / 2) for clock in clocks_s]
    return [clock - min(clocks_s) for clock in clocks_s]


def _combined(
    images: list[NDArray[Any]], echo_times_ms: list[float | None], t2star_ms: float
) -> NDArray[np.float32]:
    """Sum echoes, each weighted with TE exp(-TE / T2*) (Posse et al., Magn Reson Med 42:87, 1999).

    That is how strongly the signal at TE depends on a change of T2*, so the sum has the most BOLD
    contrast for its noise. The weights add up to 1.
    """
    times_ms = np.array([time_ms or math.nan for time_ms in echo_times_ms])
    weights = times_ms * np.exp(-times_ms / t2star_ms)
    if not weights.min() > 0:
        raise VolumeError("has echoes without their times; choose one with echo=N")
    if len({image.shape for image in images}) > 1:
        raise VolumeError("has echoes of different shapes")
    total = np.zeros(images[0].shape, np.float32)
    for image, weight in zip(images, (weights / weights.sum()).astype(np.float32), strict=True):
        total += image * weight
    return total


class _Part(NamedTuple):
    piece: Piece
    name: str
    arrived_s: float


class _Open:
    """A volume that is not complete."""

    def __init__(self) -> None:
        self.parts: dict[tuple[float, float], _Part] = {}
        self.n_later = 0
        """Later volumes that were completed since the last piece."""

    @property
    def n_slices(self) -> int:
        return sum(part.piece.shape[0] for part in self.parts.values())

    @property
    def any_piece(self) -> Piece:
        return next(iter(self.parts.values())).piece


class Run:
    """The pieces of one series, put together.

    A volume is complete when it has as many slices and echoes as the header says, or the user, or
    else as many as the first one had when a piece of a later one came.

    Parameters
    ----------
    tr_s : float, optional
        Repetition time in seconds; the headers' by default.
    echo : int, optional
        The echo to read, from 1 in the order of the echo times; their weighted sum by default.
    echoes, slices : int, optional
        How many there are of each in a volume; as the headers say by default.
    t2star_ms : float
        For the weights of the echoes.
    """

    def __init__(
        self,
        tr_s: float | None = None,
        *,
        echo: int | None = None,
        echoes: int | None = None,
        slices: int | None = None,
        t2star_ms: float = T2STAR_MS,
    ) -> None:
        self._tr_s = tr_s
        self._echo = echo
        self._n_echoes = echoes
        self._n_slices = slices
        self._t2star_ms = t2star_ms
        self._learned: int | None = None
        self._first: Piece | None = None
        self._unnumbered: list[_Part] = []
        self._open: dict[int, _Open] = {}
        self._done: set[int] = set()
        self._given_up: set[int] = set()
        self.newest_index = -1
        """Of the pieces that have come."""

    def looks_like(self, piece: Piece) -> bool:
        """Tell whether a piece of another series has the shape of this one's."""
        ours = self._first
        return (
            ours is not None
            and piece.shape == ours.shape
            and self._per_volume(piece) == self._per_volume(ours)
        )

    def index_of(self, piece: Piece) -> int | None:
        """Return the volume that a piece belongs to; None if that cannot be told yet."""
        if piece.index is not None:
            return piece.index
        if piece.instance is None:  # the volumes come one after another
            newest = self._open.get(self.newest_index)
            is_next = newest is None or _key(piece) in newest.parts
            return self.newest_index + is_next
        per_volume = self._per_volume(piece)
        return piece.instance // max(1, per_volume // piece.shape[0]) if per_volume else None

    def add(self, piece: Piece, name: str, arrived_s: float) -> list[Complete | Skipped]:
        """Take a piece; return what it completes, and what is given up because of it.

        Raises
        ------
        SourceError
            If there is no usable repetition time, or no echo of that number.
        """
        self._first = self._first or piece
        if not _fits(piece, self._first):  # it must not take the place of the volume of its number
            return [Skipped(name, OTHER_SHAPE)]
        index = self.index_of(piece)
        self.newest_index = max(self.newest_index, -1 if index is None else index)
        if not self._tr_s:
            self._tr_s = checked_tr(piece.tr_s, "the series")
        n_echoes = self._n_echoes or piece.n_echoes
        if self._echo and n_echoes and self._echo > n_echoes:
            raise SourceError(
                f"echo must be at most {n_echoes}, as many are there; got {self._echo}"
            )
        part = _Part(piece, name, arrived_s)
        return self._number(part) if index is None else self._place(index, part)

    def end(self) -> list[Skipped]:
        """Give up what is incomplete, and return it."""
        waiting = [Skipped(part.name, LACKS_SLICES) for part in self._unnumbered]
        self._unnumbered = []
        return waiting + [self._give_up(index) for index in sorted(self._open)]

    def _per_volume(self, piece: Piece) -> int | None:
        """Return the number of slices in a volume, those of all echoes."""
        whole = piece.shape[0] if piece.shape[0] == piece.n_slices else None
        n_slices = whole or self._n_slices or piece.n_slices
        n_echoes = self._n_echoes or piece.n_echoes
        return n_slices * n_echoes if n_slices and n_echoes else self._learned

    def _number(self, part: _Part) -> list[Complete | Skipped]:
        """Keep pieces until a slice comes again: the files between are a volume."""
        number, key = part.piece.instance or 0, _key(part.piece)
        again = [p.piece.instance or 0 for p in self._unnumbered if _key(p.piece) == key]
        if not again and len(self._unnumbered) < _MOST_UNNUMBERED:
            self._unnumbered.append(part)
            return []
        waiting, self._unnumbered = [*self._unnumbered, part], []
        period = abs(number - again[0]) if again else 0
        if period < max(2, len(waiting) - 1):
            return [Skipped(other.name, UNKNOWN_SIZE) for other in waiting]
        self._learned = period * part.piece.shape[0]
        return [item for other in waiting for item in self.add(*other)]

    def _place(self, index: int, part: _Part) -> list[Complete | Skipped]:
        if index in self._done:
            return [Skipped(part.name, TWICE)]
        if index in self._given_up:
            return [Skipped(part.name, LATE)]
        items: list[Complete | Skipped] = []
        per_volume = self._per_volume(part.piece)
        if per_volume is None and self._open and index > min(self._open):
            first = min(self._open)
            if self._open[first].n_slices < 2:
                self._done.add(first)
                items += [
                    Skipped(p.name, UNKNOWN_SIZE) for p in self._open.pop(first).parts.values()
                ]
            else:
                per_volume = self._learned = self._open[first].n_slices
                items += self._complete(first)
        volume = self._open.setdefault(index, _Open())
        key = _key(part.piece)
        if key in volume.parts:
            return [*items, Skipped(part.name, TWICE)]
        if volume.parts and not _same_plane(part.piece, volume.any_piece):
            return [*items, Skipped(part.name, OTHER_PLANE)]
        volume.parts[key] = part
        volume.n_later = 0
        if per_volume and volume.n_slices >= per_volume:
            items += self._complete(index)
        elif len(self._open) > _MOST_OPEN:
            items.append(self._give_up(min(self._open)))
        return items

    def _complete(self, index: int) -> list[Complete | Skipped]:
        parts = self._open.pop(index).parts
        self._done.add(index)
        echoes = [
            tuple(part.piece for (time_ms, _), part in parts.items() if time_ms == echo)
            for echo in sorted({time_ms for time_ms, _ in parts})
        ]
        if self._echo:
            echoes = echoes[self._echo - 1 : self._echo]
        late = [self._give_up(i) for i in sorted(self._open) if self._is_stale(i, index)]
        names = {part.name for part in parts.values()}
        name = names.pop() if len(names) == 1 else f"volume {index}"
        if not echoes:
            return [Skipped(name, "has no echo of that number"), *late]
        complete = Complete(
            index,
            tuple(echoes),
            self._tr_s or math.nan,
            max(part.arrived_s for part in parts.values()),
            self._t2star_ms,
            name,
        )
        return [complete, *late]

    def _is_stale(self, index: int, completed: int) -> bool:
        volume = self._open[index]
        volume.n_later += completed > index
        return volume.n_later >= _LATER

    def _give_up(self, index: int) -> Skipped:
        volume = self._open.pop(index)
        self._given_up.add(index)
        of = self._per_volume(volume.any_piece) or "an unknown number of"
        return Skipped(f"volume {index} ({volume.n_slices} of {of} slices)", LACKS_SLICES)


def _key(piece: Piece) -> tuple[float, float]:
    return piece.echo_time_ms or 0.0, piece.height_mm


def _fits(one: Piece, other: Piece) -> bool:
    """Tell whether pieces can be of one run: planes of one size, and whole volumes alike."""
    both_whole = one.shape[0] == one.n_slices and other.shape[0] == other.n_slices
    return one.shape[1:] == other.shape[1:] and (one.shape == other.shape or not both_whole)


def _same_plane(one: Piece, other: Piece) -> bool:
    return one.shape[1:] == other.shape[1:] and np.allclose(
        one.affine[:3, :2], other.affine[:3, :2], rtol=0, atol=1e-3
    )

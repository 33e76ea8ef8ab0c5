"""Volumes as they come, brought into the scanner's order; and those that never come."""

from collections.abc import Iterator
from typing import NamedTuple

from rtfmri.errors import VolumeError
from rtfmri.volume import Volume

FAR = 100
"""A gap above this many volumes is believed when two volumes beyond it agree: one number alone
may be a fault."""


class Gap(NamedTuple):
    """Volumes that are not waited for any longer."""

    first: int
    last: int
    at_start: bool
    """Whether the run begins after them."""

    def __str__(self) -> str:
        if self.first == self.last:
            return f"volume {self.first}"
        return f"volumes {self.first} to {self.last}"

    @property
    def indices(self) -> range:
        """Of the volumes."""
        return range(self.first, self.last + 1)


class Stray(NamedTuple):
    """A volume whose number has nothing to do with the run's."""

    number: int


class Ordering:
    """Holds a volume until those before it are there, but neither too many nor for too long.

    Parameters
    ----------
    window : int
        How many volumes are held; with one more, the gap before them is given up.
    wait_s : float or None
        Seconds for which they are held, from the arrival of the first of them; None is for ever.

    Attributes
    ----------
    n_reordered : int
        Volumes that came after a later one, and were in time.
    """

    def __init__(self, window: int, wait_s: float | None) -> None:
        self.n_reordered = 0
        self._window, self._wait_s = window, wait_s
        self._held: dict[int, Volume] = {}
        self._next = 0
        self._gaps: list[Gap] = []

    def put(self, volume: Volume) -> None:
        """Take a volume.

        Raises
        ------
        VolumeError
            If it came before, or is not waited for any longer.
        """
        index = volume.index
        if any(index in gap.indices for gap in self._gaps):
            raise VolumeError("came after it was given up")
        if index < self._next or index in self._held:
            raise VolumeError("came twice")
        self.n_reordered += any(0 < later - index <= FAR for later in self._held)
        self._held[index] = volume

    def ready(self, now_s: float, *, ended: bool = False) -> Iterator[Volume | Gap | Stray]:
        """Yield what is next, in order; a `Gap` where volumes are given up.

        Parameters
        ----------
        now_s : float
            The time on the clock of `Volume.arrived_s`.
        ended : bool
            Whether nothing more will come.
        """
        while self._held:
            first = min(self._held)
            if first > self._next:
                if not (ended or self._is_over(first, now_s)):
                    return
                gap = Gap(self._next, first - 1, at_start=self._next == 0)
                self._gaps.append(gap)
                yield gap
            volume = self._held.pop(first)
            self._next = first + 1
            yield volume
            yield from self._strays(volume)

    def due_s(self) -> float | None:
        """Return when `ready` has to be asked again; None if only another volume can help."""
        if not self._held or self._wait_s is None or self._is_doubtful(min(self._held)):
            return None
        return min(volume.arrived_s for volume in self._held.values()) + self._wait_s

    def _is_over(self, first: int, now_s: float) -> bool:
        """Tell whether the gap before *first* has been waited for long enough."""
        if self._is_doubtful(first):
            return False
        due_s = self.due_s()
        return len(self._held) > self._window or (due_s is not None and now_s >= due_s)

    def _is_doubtful(self, index: int) -> bool:
        """Tell whether *index* is far ahead, and no other volume there agrees."""
        others = (abs(other - index) for other in self._held if other != index)
        return index - self._next > FAR and min(others, default=FAR) >= FAR

    def _strays(self, volume: Volume) -> Iterator[Stray]:
        """Let go what is far ahead of a volume that came later, and in its place."""
        for index in sorted(self._held):
            if self._is_doubtful(index) and self._held[index].arrived_s < volume.arrived_s:
                del self._held[index]
                yield Stray(index)

"""Volumes that are already there, given out as fast as it goes or at the pace of the TR."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from threading import Event

from rtfmri.errors import RtfmriError, SourceError, VolumeError
from rtfmri.readers import Skipped
from rtfmri.volume import Volume

SHORTEST_TR_S, LONGEST_TR_S = 0.05, 60.0
"""A header's repetition time outside these is taken for a mistake (milliseconds called seconds),
or for that of a single excitation, many of which make a volume."""


@dataclass(frozen=True, slots=True)
class Step:
    """One volume that waits to be decoded."""

    name: str
    index: int
    load: Callable[[], Volume]


class EndOfSource(VolumeError):
    """A volume that cannot be read, and after which there is nothing to be read."""


class Replay:
    """Reader of what is there already.

    Parameters
    ----------
    steps : iterable of Step or Skipped
        In the order of the run; consumed lazily.
    n_volumes : int
        How many volumes are expected of them.
    tr_s : float
        Repetition time in seconds.
    speed : float, optional
        Volume i leaves i * tr_s / speed seconds after volume 0; None waits for nothing.
    made_ahead : bool
        Make each volume before it is due, and let it arrive when it is: a scanner that is not
        there must not look like a slow decoder.
    """

    live = False

    def __init__(
        self,
        steps: Iterable[Step | Skipped],
        *,
        n_volumes: int,
        tr_s: float,
        speed: float | None,
        made_ahead: bool = False,
    ) -> None:
        self.n_volumes: int | None = n_volumes
        self._steps = steps
        self._interval_s = tr_s / speed if speed else 0.0
        self._made_ahead = made_ahead
        self._zero_s: float | None = None
        self._closed = Event()

    def __iter__(self) -> Iterator[Volume | Skipped]:
        """Give the volumes in order."""
        self._zero_s = None
        for step in self._steps:
            if self._closed.is_set():
                return
            if isinstance(step, Skipped):
                yield step
                continue
            try:
                volume = self._take(step)
            except RtfmriError as error:
                yield Skipped(step.name, str(error))
                if isinstance(error, EndOfSource):
                    return
                continue
            if self._closed.is_set():
                return
            yield volume

    def _take(self, step: Step) -> Volume:
        if self._made_ahead:
            volume = step.load()
            self._wait(step)
            return stamped(volume, time.perf_counter())
        self._wait(step)
        arrived_s = time.perf_counter()
        return stamped(step.load(), arrived_s)

    def _wait(self, step: Step) -> None:
        due_s = step.index * self._interval_s
        if self._zero_s is None:
            self._zero_s = time.perf_counter() - due_s
        self._closed.wait(self._zero_s + due_s - time.perf_counter())

    def close(self) -> None:
        """Let the iteration end before its next volume."""
        self._closed.set()


def stamped(volume: Volume, arrived_s: float) -> Volume:
    """Return *volume* with its arrival and, as of now, its decoding stamped."""
    return replace(volume, arrived_s=arrived_s, decoded_s=time.perf_counter())


def checked_tr(header_s: float | None, where: str) -> float:
    """Return a header's repetition time in seconds.

    Raises
    ------
    SourceError
        If it is missing, not positive, shorter than 50 ms, or longer than a minute.
    """
    if header_s is None or not header_s > 0:
        raise SourceError(f"{where} has no repetition time in its header; give it with --tr")
    if not SHORTEST_TR_S <= header_s <= LONGEST_TR_S:
        raise SourceError(
            f"the repetition time in the header of {where} must be {SHORTEST_TR_S:g} to "
            f"{LONGEST_TR_S:g} s, got {header_s:g} s; give the right one with --tr"
        )
    return header_s


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sorting key that puts ``vol2`` before ``vol10``."""
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name)
    return tuple((int(digits), "") if digits else (-1, text) for digits, text in parts)

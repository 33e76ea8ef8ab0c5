"""What all live sources share: items come from a thread, runs end, and the next one may follow."""

import time
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue

from rtfmri.readers import RunEnd, Skipped
from rtfmri.volume import Volume

DEFAULT_TIMEOUT_S = 30.0
_STRAGGLER_TRS = 2.0
PAUSE_TRS = 2.5
"""Between two runs there are more TRs than this without a volume."""
_WAITING = 64
"""Items that may wait to be taken: some tens of MB; then whoever sends has to wait, too."""


class Progress:
    """Tells when a live run is over: its volumes are all there, or none has come for long.

    Parameters
    ----------
    count : int or None
        How many volumes the run has, where that is known.
    timeout_s : float
        The silence that ends it, in seconds.
    """

    def __init__(self, count: int | None, timeout_s: float) -> None:
        self._count, self._timeout_s = count, timeout_s
        self._indices: set[int] = set()
        self._largest = -1
        self._tr_s = self._last_s = 0.0

    def take(self, volume: Volume) -> None:
        """Count a volume; one that comes twice is one."""
        self._indices.add(volume.index)
        self._largest = max(self._largest, volume.index)
        self._tr_s = volume.tr_s
        self._last_s = volume.arrived_s

    def begins_next(self, volume: Volume) -> bool:
        """Tell whether *volume* is the first of the next run: it is number 0, after a pause."""
        pause_s = volume.arrived_s - self._last_s
        return self.begun and volume.index == 0 and pause_s > PAUSE_TRS * self._tr_s

    @property
    def begun(self) -> bool:
        """Whether there was a volume."""
        return bool(self._indices)

    @property
    def complete(self) -> bool:
        """Whether all volumes that were expected are there."""
        return len(self._indices) == self._count

    @property
    def _patience_s(self) -> float:
        """Seconds without a volume that end the run.

        Once the last of the expected volumes is there, those that lack have two TRs to come.
        """
        if self._count and self._largest >= self._count - 1:
            return min(self._timeout_s, _STRAGGLER_TRS * self._tr_s)
        return self._timeout_s

    @property
    def left_s(self) -> float | None:
        """Seconds until the run is over if no volume comes; None before its first one."""
        if not self._indices:
            return None
        return max(0.0, self._last_s + self._patience_s - time.perf_counter())

    def end(self) -> RunEnd:
        """Return why the run is over."""
        if self.complete:
            return RunEnd(f"all {self._count} volumes are there")
        return RunEnd(f"no volume came for {self._patience_s:g} s")


class LiveReader:
    """Reader of what other threads `put`.

    Iterate once for each run: the next iteration goes on where the last one ended, so that nothing
    that arrives between two runs is lost.

    Parameters
    ----------
    count : int, optional
        A run ends when this many different volumes are there.
    timeout_s : float
        A run ends when, after its first volume, none has come for this many seconds.
    """

    live = True
    numbers_tell_runs = True
    """Whether a volume 0 after a pause begins the next run; not where the protocol says so."""

    def __init__(self, *, count: int | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.n_volumes = count
        self._timeout_s = timeout_s
        self._items: Queue[Volume | Skipped | RunEnd | BaseException | None] = Queue(_WAITING)
        self._kept: Volume | None = None
        self._closed = False

    def put(self, item: Volume | Skipped | RunEnd | BaseException) -> bool:
        """Hand over what has come, from any thread; an exception is raised where one iterates.

        Waits while too much waits already: so a sender is slowed down, and memory is bounded. A
        `RunEnd` ends the run, if it has begun. Returns False if nobody will take it any more.
        """
        while not self._closed:
            try:
                self._items.put(item, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def close(self) -> None:
        """End the iteration; subclasses stop listening first."""
        self._closed = True
        with suppress(Full):  # then whoever iterates has something to take, and looks after it
            self._items.put_nowait(None)

    def __iter__(self) -> Iterator[Volume | Skipped | RunEnd]:
        """Give one run's items as they come."""
        progress = Progress(self.n_volumes, self._timeout_s)
        if self._kept:
            progress.take(self._kept)
            yield self._kept
            self._kept = None
        while not self._closed:
            try:
                item = self._items.get(timeout=progress.left_s)
            except Empty:
                yield progress.end()
                return
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, RunEnd) and not progress.begun:
                continue
            if isinstance(item, Volume):
                if self.numbers_tell_runs and progress.begins_next(item):
                    self._kept = item
                    item = RunEnd("the next run began")
                else:
                    progress.take(item)
            yield item
            if isinstance(item, RunEnd):
                return
            if progress.complete:
                yield progress.end()
                return

"""How things are timed: taking turns, with hot and with cold caches, against a memory stream."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend
from rtfmri.machine import Triad, beyond_caches_bytes

Call = Callable[[], object]
Timer = Callable[[], float]
"""Does something once and returns the seconds it took."""
_Name = TypeVar("_Name", bound=Hashable)
Row = dict[str, Any]
Tables = dict[str, list[Row]]
"""Rows by the name of their table."""

_N_PARTS = 4
HOT_TURN, COLD_TURN = 10, 2
"""Timed calls a turn; with hot caches one more comes before them, to make the caches its own."""


class Stream(Protocol):
    """Moves memory as fast as the device can; call it to run it once."""

    n_bytes: int
    """Read and written by a call."""

    def __call__(self) -> None:
        """Run it once."""
        ...


class Clock(Protocol):
    """Times calls on one device.

    Attributes
    ----------
    name : str
    largest : Stream
        Works on more memory than any cache holds.
    """

    name: str
    largest: Stream

    def timer(self, call: Call, *, cold: bool) -> Timer:
        """Return what runs *call* once and times it; *cold* empties the caches before."""
        ...

    def after_largest(self, call: Call) -> tuple[float, float]:
        """Run `largest`, then *call*; return the seconds of each. The caches are cold for both."""
        ...

    def stream(self, n_bytes: int) -> Stream:
        """Return a stream whose arrays take *n_bytes* together."""
        ...


class HostClock:
    """`time.perf_counter` around calls that are done when they return.

    Parameters
    ----------
    within : context manager, optional
        What calls are made in: `Backend.undisturbed` of the backend that is timed.
    largest : Stream, optional
        One that is there already.
    """

    name = "perf_counter"

    def __init__(
        self,
        within: AbstractContextManager[None] | None = None,
        largest: Stream | None = None,
    ) -> None:
        self._within = within or nullcontext()
        self.largest = largest or self.stream(beyond_caches_bytes())

    def timer(self, call: Call, *, cold: bool) -> Timer:
        """See `Clock.timer`."""

        def once() -> float:
            with self._within:
                if cold:
                    self.largest()
                started_s = time.perf_counter()
                call()
                return time.perf_counter() - started_s

        return once

    def after_largest(self, call: Call) -> tuple[float, float]:
        """See `Clock.after_largest`."""
        with self._within:
            started_s = time.perf_counter()
            self.largest()
            emptied_s = time.perf_counter()
            call()
            return emptied_s - started_s, time.perf_counter() - emptied_s

    def stream(self, n_bytes: int) -> Stream:
        """See `Clock.stream`."""
        return Triad(n_bytes)


class CudaClock:
    """CUDA events around calls that are queued on a backend's stream.

    A long copy goes before each measurement: while it runs the host queues what is timed, so that
    the GPU never waits for the host between the events; it also empties the cache.
    """

    name = "CUDA events"
    _CALLS = 10
    """Hot calls between two events, which tell times only to about a microsecond."""
    _LARGEST = 2 << 30

    def __init__(self, backend: Any) -> None:
        import cupy

        self._cupy = cupy
        self._stream = backend._staging.stream
        self._events = tuple(cupy.cuda.Event() for _ in range(3))
        free, _ = cupy.cuda.Device().mem_info
        self.largest: Stream = self.stream(min(self._LARGEST, free // 4))

    def timer(self, call: Call, *, cold: bool) -> Timer:
        """See `Clock.timer`."""
        calls = 1 if cold else self._CALLS
        start, stop, _ = self._events

        def once() -> float:
            self.largest()
            if not cold:
                call()
            start.record(self._stream)
            for _ in range(calls):
                call()
            stop.record(self._stream)
            return self._seconds(start, stop) / calls

        return once

    def after_largest(self, call: Call) -> tuple[float, float]:
        """See `Clock.after_largest`."""
        start, emptied, stop = self._events
        self.largest()
        start.record(self._stream)
        self.largest()
        emptied.record(self._stream)
        call()
        stop.record(self._stream)
        return self._seconds(start, emptied), self._seconds(emptied, stop)

    def _seconds(self, start: Any, stop: Any) -> float:
        stop.synchronize()
        return 1e-3 * float(self._cupy.cuda.get_elapsed_time(start, stop))

    def stream(self, n_bytes: int) -> Stream:
        """See `Clock.stream`."""
        return _DeviceCopy(self._cupy, self._stream, n_bytes)


class _DeviceCopy:
    def __init__(self, cupy: Any, stream: Any, n_bytes: int) -> None:
        self._stream = stream
        with stream:
            self._from, self._to = (cupy.ones(max(1, n_bytes // 8), np.float32) for _ in range(2))
        self.n_bytes = 2 * self._from.nbytes

    def __call__(self) -> None:
        self._to.data.copy_from_device_async(self._from.data, self._from.nbytes, self._stream)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the suites are to measure, and on what.

    Attributes
    ----------
    backend : Backend
    clock : Clock
        For what the backend does.
    grids : sequence of (int, int, int)
        Shapes x, y, z of the volumes.
    rounds : int
        How often the things to compare take turns.
    minutes : float
        How long what is to go well for long must go well.
    progress : callable
        Called with a few words before each step.
    """

    backend: Backend
    clock: Clock
    grids: Sequence[tuple[int, int, int]]
    rounds: int
    minutes: float
    progress: Callable[[str], None]


def open_clock(backend: Backend) -> Clock:
    """Return the clock for what *backend* does."""
    return CudaClock(backend) if backend.name == "cuda" else HostClock(backend.undisturbed())


def peers_clock(clock: Clock) -> HostClock:
    """Return the clock for what others do beside *clock*'s backend: on the host, as they like."""
    return HostClock(largest=clock.largest if isinstance(clock, HostClock) else None)


class Listener:
    """A backend that keeps the last call of one of its operations, to be made again.

    Parameters
    ----------
    backend : Backend
    operation : str
        The operation's name.
    """

    call: "partial[None]"

    def __init__(self, backend: Backend, operation: str) -> None:
        self._backend, self._operation = backend, operation

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._backend, name)
        return partial(self._keep, asked) if name == self._operation else asked

    def _keep(self, operation: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self.call = partial(operation, *args, **kwargs)
        self.call()


def take_turns(
    timers: Mapping[_Name, Timer], rounds: int, *, cold: bool, slow: Sequence[_Name] = ()
) -> dict[_Name, list[float]]:
    """Run every timer in turn, *rounds* times round, and return the seconds of each.

    So a change of the machine's speed meets all alike. Those in *slow* have one timed call, in
    every second round.
    """
    seconds: dict[_Name, list[float]] = {name: [] for name in timers}
    for i in range(rounds):
        for name, timer in timers.items():
            if name in slow and i % 2:
                continue
            if not cold:
                timer()
            n_calls = 1 if name in slow else COLD_TURN if cold else HOT_TURN
            seconds[name] += [timer() for _ in range(n_calls)]
    return seconds


def statistics_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and 95th percentile in ms, and the median's `noise`."""
    times_ms = 1e3 * np.array(seconds)
    return {
        "median_ms": float(np.median(times_ms)),
        "min_ms": float(times_ms.min()),
        "p95_ms": float(np.percentile(times_ms, 95)),
        "noise": noise(seconds),
    }


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99, maximum and minimum in ms, and the median's `noise`."""
    times_ms = 1e3 * np.array(seconds)
    p50, p95, p99 = np.percentile(times_ms, [50, 95, 99])
    return {
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "max_ms": float(times_ms.max()),
        "min_ms": float(times_ms.min()),
        "noise": noise(seconds),
    }


def noise(values: Sequence[float]) -> float:
    """Return by how much a median of *values* wanders during a run, as a part of it.

    It is half the range of the medians of `_N_PARTS` parts of the run, in their order; 0 where
    there are too few values to tell.
    """
    if len(values) < 2 * _N_PARTS:
        return 0.0
    medians = [float(np.median(part)) for part in np.array_split(values, _N_PARTS)]
    return (max(medians) - min(medians)) / 2 / statistics.median(values)


def seconds_of(call: Call) -> float:
    """Return the seconds that *call*, which is done when it returns, takes."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def rms(values: Sequence[float] | NDArray[np.floating[Any]]) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def gb_per_s(n_bytes: float, seconds: Sequence[float]) -> float:
    """Return the rate of the median time, in 1e9 bytes a second."""
    return 1e-9 * n_bytes / statistics.median(seconds)


def grid_name(shape: Sequence[int]) -> str:
    """Return a shape as 64x64x36."""
    return "x".join(str(n) for n in shape)

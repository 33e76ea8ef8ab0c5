"""How tools that do the same to a whole volume take turns, and the rows that tell of it."""

import statistics
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from numpy.typing import NDArray

from ..measure import Call, Clock, Row, gb_per_s, peers_clock, statistics_ms, take_turns

OURS = "rtfmri"
NEEDED_BYTES = 6
"""A voxel's bytes that any such step must move: int16 in, float32 out."""

Work = Callable[[], NDArray[Any]]
"""Does it once, and returns the volume, (x, y, z)."""
Makers = Mapping[str, tuple[str, Callable[[], Work]]]
"""By a tool's name the package that it needs, and what makes it."""


def compare_cold(
    clock: Clock,
    where: Row,
    n_voxels: int,
    ours: tuple[Call, Work],
    makers: Makers,
    errors: Callable[[NDArray[Any]], Row],
    rounds: int,
) -> list[Row]:
    """Return a row a tool, ours first; all work in turn, with caches cold.

    Parameters
    ----------
    clock : Clock
        Of our backend.
    where : dict
        What begins each row.
    n_voxels : int
    ours : (callable, callable)
        What is timed, and what also brings the volume to the host.
    makers : mapping
        Of the peers. One whose package is missing has a row that says so.
    errors : callable
        Returns what a row tells of a volume's error.
    rounds : int
        As in `take_turns`.
    """
    timed, work = ours
    works = {OURS: work}
    timers = {
        OURS: clock.timer(timed, cold=True),
        "stream": clock.timer(clock.largest, cold=True),
    }
    host, missing = peers_clock(clock), []
    for name, (package, make) in makers.items():
        if find_spec(package):
            works[name] = make()
            timers[name] = host.timer(works[name], cold=True)
        else:
            missing.append({**where, "tool": f"{name.split(',')[0]} is not installed"})
    slow = [name for name in works if name != OURS]
    seconds = take_turns(timers, rounds, cold=True, slow=slow)
    stream_gb_s = gb_per_s(clock.largest.n_bytes, seconds.pop("stream"))
    ours_s = statistics.median(seconds[OURS])
    allowed_ms = 1e-6 * NEEDED_BYTES * n_voxels / stream_gb_s
    rows: list[Row] = [
        {
            **where,
            "tool": name,
            **statistics_ms(values),
            "times_ours": statistics.median(values) / ours_s,
            **errors(works[name]()),
        }
        for name, values in seconds.items()
    ]
    rows[0] |= {
        "stream_gb_s": stream_gb_s,
        "allowed_ms": allowed_ms,
        "of_allowed": 1e3 * ours_s / allowed_ms,
    }
    return [*rows, *missing]

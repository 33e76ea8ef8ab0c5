"""The smallest TR at which no volume is late for a long time.

Volumes come from another process over our TCP protocol: so the way into the machine is in it, and
the sender's pace does not depend on us. They are not recorded: at these paces that would be tens
of GB.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import RtfmriError

from .latency import (
    HEADER_TR_S,
    N_FIRST,
    NO_PINNING,
    TCP,
    can_pin,
    lacking,
    neighbours,
    open_session,
    quantiles_ms,
    quiet,
    results,
    saved_phantom,
    with_neighbour,
    work,
)
from .measure import Plan, Row, Tables, grid_name, percentiles_ms
from .soak import Flood
from .tables import Layout, number, text
from .transports import feeding

STEP = 1.25
"""From one TR that is tried to the next."""
MARGIN = 1.1
"""After a volume that was late when a trial would have been over, the next TR is that much more
than what it took: what held it up is rare, and will come again."""
TRIAL = 1 / 20
"""Length of a trial, as a part of the time for which the TR is to be kept."""
LONGEST = 3
"""How much time all attempts to keep a TR may take, as a multiple of it."""
_FEWEST, _MOST_TRIALS, _N_ESTIMATE = 30, 20, 50


class Attempt(NamedTuple):
    """A run at one pace, which ended with the first volume that was late."""

    tr_s: float
    latencies_s: NDArray[np.float64]
    late_s: float | None
    """What that volume took; None if there was none."""
    work: Row

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.tr_s * len(self.latencies_s)


Try = Callable[[float, float], Attempt]
"""Makes an attempt at a TR for so many seconds."""


LAYOUTS = {
    "sustained": Layout(
        "The smallest TR at which no volume is late",
        (
            ("grid", text("grid")),
            ("neighbour", text("neighbour")),
            ("TR ms", number(1, "tr_ms")),
            ("minutes", number(1, "minutes")),
            ("volumes", number(0, "n")),
            ("late", number(0, "missed")),
            ("p50 ms", number(2, "p50_ms")),
            ("p99", number(2, "p99_ms")),
            ("max", number(2, "max_ms")),
            (
                "given up: TR ms (after s)",
                lambda row: (
                    ", ".join(
                        f"{failed['tr_ms']:.1f} ({failed['seconds']:.0f})"
                        for failed in row["failed"]
                    )
                    or "-"
                ),
            ),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``sustained``, one a grid and neighbour."""
    if lacks := lacking():
        return {"sustained": [lacks]}
    rows: list[Row] = [] if can_pin() else [{"skipped": NO_PINNING}]
    for shape in plan.grids:
        start_s = 2 * _estimate_s(plan, shape)
        with saved_phantom(shape) as images:
            attempt = partial(_attempt, plan, shape, images)
            for neighbour in neighbours():
                case = {"grid": grid_name(shape), "neighbour": neighbour}
                plan.progress(f"sustained, {grid_name(shape)}, neighbour {neighbour}")
                try:
                    with with_neighbour(neighbour), quiet():
                        attempts = search(attempt, start_s, 60 * plan.minutes)
                except RtfmriError as error:
                    rows.append({"skipped": f"{grid_name(shape)}: {error}"})
                    break
                rows.append(_row(case, attempts))
                # Beside a neighbour it will hardly be smaller.
                start_s = attempts[-1].tr_s
    return {"sustained": rows}


def search(attempt: Try, start_s: float, seconds: float) -> list[Attempt]:
    """Return attempts to keep a TR for so long; the last one's is the smallest that was kept.

    Short trials go down from *start_s* by `STEP`, or up if need be. What they find is attempted
    for the whole time; where a volume is late, a larger one is, as long as `LONGEST` allows. If
    the last attempt has a late volume, no TR was kept.
    """
    tr_s = _try(attempt, start_s, TRIAL * seconds)
    attempts = [attempt(tr_s, seconds)]
    for _ in range(_MOST_TRIALS):
        last, used_s = attempts[-1], sum(a.seconds for a in attempts)
        if last.late_s is None or used_s + seconds > LONGEST * seconds:
            break
        tr_s *= STEP
        if last.seconds > TRIAL * seconds:
            tr_s = max(tr_s, MARGIN * last.late_s)
        attempts.append(attempt(tr_s, seconds))
    return attempts


def _try(attempt: Try, tr_s: float, seconds: float) -> float:
    """Return the smallest TR that is kept in trials, or the largest that was tried."""
    kept = attempt(tr_s, seconds).late_s is None
    for _ in range(_MOST_TRIALS):
        next_s = tr_s / STEP if kept else tr_s * STEP
        kept_too = attempt(next_s, seconds).late_s is None
        if kept_too or not kept:
            tr_s = next_s
        if kept_too != kept:
            break
    return tr_s


def _row(case: Row, attempts: Sequence[Attempt]) -> Row:
    found = attempts[-1]
    if found.late_s is not None:
        most = f"no TR up to {1e3 * found.tr_s:.0f} ms was kept for long enough"
        return {"skipped": f"{case['grid']}, neighbour {case['neighbour']}: {most}"}
    return {
        **case,
        **found.work,
        "tr_ms": 1e3 * found.tr_s,
        "minutes": found.seconds / 60,
        "n": len(found.latencies_s),
        "missed": 0,
        **percentiles_ms(found.latencies_s.tolist()),
        "quantiles_ms": quantiles_ms(found.latencies_s),
        "failed": [
            {"tr_ms": 1e3 * a.tr_s, "seconds": a.seconds, "late_ms": 1e3 * a.late_s}
            for a in attempts
            if a.late_s is not None
        ],
    }


def _attempt(
    plan: Plan, shape: tuple[int, int, int], images: Path, tr_s: float, seconds: float
) -> Attempt:
    """Run at a pace until so much time is over, or a volume is late."""
    n_volumes = max(_FEWEST, math.ceil(seconds / tr_s))
    latencies_s, n, late_s = np.empty(n_volumes), 0, None
    with (
        feeding(TCP, images, N_FIRST + n_volumes, tr_s, tr_s=HEADER_TR_S, n_asked=N_FIRST) as feed,
        open_session(plan, shape, feed.reader, tr_s) as session,
    ):
        for taken in results(feed, session, N_FIRST + n_volumes):
            if taken.index < N_FIRST:
                continue
            latencies_s[n] = taken.latency_s
            n += 1
            if taken.missed:
                late_s = taken.latency_s
                break
        done = work(session.pipeline)
    if n < n_volumes and late_s is None:
        raise RtfmriError(f"{n_volumes - n} volumes were lost at a TR of {1e3 * tr_s:.1f} ms")
    return Attempt(tr_s, latencies_s[:n], late_s, done)


def _estimate_s(plan: Plan, shape: tuple[int, int, int]) -> float:
    """Return the 99th percentile of a volume's time where one comes after another."""
    with quiet(), open_session(plan, shape, Flood(shape), HEADER_TR_S) as session:
        latencies_ms = [result.latency_ms for result in islice(session, N_FIRST + _N_ESTIMATE)]
    return 1e-3 * float(np.percentile(latencies_ms[N_FIRST:], 99))

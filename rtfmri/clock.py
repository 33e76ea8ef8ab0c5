"""The run's clock: where volume 0 stands on it, and on the other clocks of this machine.

Everything inside is in seconds after the start of volume 0. Events may be told on another clock
(`ClockSettings.start`); they are moved once, when the first volume is there.
"""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from rtfmri.volume import Volume

_log = logging.getLogger(__name__)

_PAUSE_TRS = 2.5
"""Triggers further apart are of two acquisitions: many scanners give one for each volume."""
_LONG_AGO_S = 60.0
"""A trigger that long before the first volume was another acquisition's."""
_FAR_S = 600.0
"""A given time that far from the first volume may be a mistake."""


@dataclass(frozen=True, slots=True)
class RunClock:
    """When a run's clock started, and how others differ from `time.perf_counter`.

    Attributes
    ----------
    start : str
        ``first volume``, ``trigger``, or the time it was given, in ISO form.
    offset_s : float
        The start of volume 0 on the run's clock, in seconds.
    zero_s : float
        The start of volume 0 on `time.perf_counter`, as far as its arrival or a trigger tells;
        nan where no clock ran.
    unix_minus_perf_s, lsl_minus_perf_s : float
        What is to be added to times of `time.perf_counter` to get seconds since 1970, and times
        of LSL's clock; nan without LSL.
    """

    start: str = "first volume"
    offset_s: float = 0.0
    zero_s: float = math.nan
    unix_minus_perf_s: float = field(default_factory=lambda: time.time() - time.perf_counter())
    lsl_minus_perf_s: float = math.nan


def start_clock(
    start: Literal["first volume", "trigger"] | datetime,
    first: Volume,
    triggers_s: Iterable[float] = (),
    lsl_minus_perf_s: float = math.nan,
) -> RunClock:
    """Return the clock of the run to which *first* belongs.

    A volume arrives when its TR is over, and its delivery, which takes less than a TR. So the
    volumes that were acquired since the trigger can be counted, and those that were not delivered
    are known: dummies.

    Parameters
    ----------
    start
        As `ClockSettings.start`.
    first : Volume
        The first that arrived.
    triggers_s : iterable of float
        When triggers came, on `time.perf_counter`; those after *first* do not matter.
    lsl_minus_perf_s : float
        Where LSL is used.
    """
    clock = RunClock(
        zero_s=first.arrived_s - (first.index + 1) * first.tr_s, lsl_minus_perf_s=lsl_minus_perf_s
    )
    if isinstance(start, datetime):
        offset_s = clock.zero_s + clock.unix_minus_perf_s - start.timestamp()
        clock = replace(clock, start=start.isoformat(), offset_s=offset_s)
        if abs(offset_s) > _FAR_S:
            _log.warning(
                "clock.start: the first volume began %.0f s after %s; is its time zone right?",
                offset_s,
                clock.start,
            )
    elif start == "trigger":
        trigger_s = _begin(triggers_s, first)
        if trigger_s is None:
            _log.warning("no trigger came: the run's clock starts with its first volume")
            return clock
        n_dummies = math.floor((first.arrived_s - trigger_s) / first.tr_s) - 1 - first.index
        offset_s = max(0, n_dummies) * first.tr_s
        # Less than 0: it is not volume 0's trigger, or came late; arrival tells more.
        zero_s = clock.zero_s if n_dummies < 0 else trigger_s + offset_s
        clock = replace(clock, start=start, offset_s=offset_s, zero_s=zero_s)
    _log.info("the run's clock: %s; volume 0 began at %g s", clock.start, clock.offset_s)
    return clock


def _begin(triggers_s: Iterable[float], first: Volume) -> float | None:
    """Return the trigger with which the acquisition of *first* began."""
    before = sorted((s for s in triggers_s if s <= first.arrived_s), reverse=True)
    if not before or first.arrived_s - before[0] > _LONG_AGO_S:
        return None
    begin_s = before[0]
    for trigger_s in before:
        if begin_s - trigger_s > _PAUSE_TRS * first.tr_s:
            break
        begin_s = trigger_s
    return begin_s

"""Events, and which condition each volume counts for."""

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rtfmri.config import BaselineSettings, ParadigmSettings
from rtfmri.errors import EventsError

MAX_CONDITIONS = 64
MAX_NAME_BYTES = 256
"""Both are what a recording has room for."""
MAX_ANNOUNCED = 2048
"""Events that become known while one run goes on."""

_Blocks = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Event:
    """One row of a BIDS events file: times in seconds after the start of volume 0."""

    onset_s: float
    duration_s: float
    trial_type: str


def read_events(path: str | Path) -> tuple[Event, ...]:
    """Read a BIDS ``events.tsv`` (columns onset, duration and, optionally, trial_type).

    Parameters
    ----------
    path : path
        Tab-separated file. Without a trial_type column every event is called ``task``.

    Raises
    ------
    EventsError
        If the file cannot be read, a column is missing, a number is none, or a duration is
        negative; the message has the line.

    Notes
    -----
    BIDS 1.10, "Task events": onsets may be negative, durations are 0 or more.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EventsError(f"cannot read the events in {path}: {error}") from error
    header = [name.strip() for name in rows[0]] if rows else []
    missing = [name for name in ("onset", "duration") if name not in header]
    if missing:
        raise EventsError(
            f"{path}: events need tab-separated columns onset and duration; "
            f"missing {' and '.join(missing)} in the header {header}"
        )
    events = []
    for line, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise EventsError(f"{path}, line {line}: {len(header)} cells expected, got {len(row)}")
        cells = dict(zip(header, row, strict=True))
        onset_s = _seconds(cells["onset"], "onset", path, line)
        duration_s = _seconds(cells["duration"], "duration", path, line)
        if duration_s < 0:
            raise EventsError(f"{path}, line {line}: duration must be 0 or more, got {duration_s}")
        events.append(Event(onset_s, duration_s, cells.get("trial_type", "task").strip()))
    if not events:
        raise EventsError(f"{path}: no events below the header")
    return tuple(events)


def _seconds(text: str, column: str, path: str | Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise EventsError(f"{path}, line {line}: {column} must be seconds, got {text!r}")
    return value


class Announced(NamedTuple):
    """An event that was not known before the run."""

    event: Event
    from_s: float
    """Start of the first volume that knew of it, in seconds after the start of volume 0."""


class Paradigm:
    """Tells which conditions a volume counts for, from its time alone.

    Parameters
    ----------
    events : iterable of Event
        None at all means that every volume is baseline (monitoring).
    settings : ParadigmSettings
        Haemodynamic delay and transition time, and conditions that will be announced.
    baseline : BaselineSettings
        Names the baseline condition.

    Raises
    ------
    EventsError
        If there are more than 64 conditions, or a name is longer than 256 bytes.

    Attributes
    ----------
    events : tuple of Event
        Those that were known from the start.
    announced : list of Announced
        Those that were not, in the order in which they came.
    conditions : tuple of str
        The baseline first, then the others in alphabetical order.
    unreachable : tuple of str
        Conditions whose events are all too short for a volume to count: they stay empty.
    """

    def __init__(
        self,
        events: Iterable[Event] = (),
        settings: ParadigmSettings | None = None,
        baseline: BaselineSettings | None = None,
    ) -> None:
        self._settings = settings = settings or ParadigmSettings()
        self._baseline = baseline = baseline or BaselineSettings()
        name = baseline.condition
        self.events = tuple(events)
        self.announced: list[Announced] = []
        self._delay_s = settings.haemodynamic_delay_s
        self._transition_s = settings.transition_s
        named = {*(event.trial_type for event in self.events), *settings.conditions}
        self.conditions = (name, *sorted(named - {name}))
        if len(self.conditions) > MAX_CONDITIONS:
            raise EventsError(
                f"trial_type must have at most {MAX_CONDITIONS} values, the baseline included; "
                f"got {len(self.conditions)}"
            )
        for condition in self.conditions:
            if len(condition.encode()) > MAX_NAME_BYTES:
                raise EventsError(
                    f"trial_type must be at most {MAX_NAME_BYTES} bytes, got {condition!r}"
                )
        self._named_baseline = name in named
        self._n_known = 0
        self._blocks = self._find_blocks(self.events)
        self.unreachable = tuple(
            condition
            for condition, blocks in self._blocks.items()
            if condition not in settings.conditions
            and not (np.diff(blocks, axis=1) > 2 * self._transition_s).any()
        )

    def moved(self, by_s: float) -> "Paradigm":
        """Return the same paradigm with all its events later by *by_s*."""
        events = (replace(event, onset_s=event.onset_s + by_s) for event in self.events)
        return Paradigm(events, self._settings, self._baseline)

    def add(self, announced: Announced) -> None:
        """Take an event that became known while the run goes on, in the order of `from_s`.

        What volumes before counted for stays as it was: so a replay, which knows all events from
        its start, gives the same conditions.

        Raises
        ------
        EventsError
            If its condition is none of `ParadigmSettings.conditions`, or there are 2048 already.
        """
        name, declared = announced.event.trial_type, self._settings.conditions
        if name not in declared:
            raise EventsError(
                f"trial_type must be one of paradigm.conditions, {', '.join(declared) or 'none'}; "
                f"got {name[:40]!r}"
            )
        if len(self.announced) >= MAX_ANNOUNCED:
            raise EventsError(f"at most {MAX_ANNOUNCED} events may be announced in a run")
        self.announced.append(announced)

    def members(self, time_s: float, tr_s: float) -> tuple[int, ...]:
        """Return the conditions that a volume counts for, as indices into `conditions`.

        Parameters
        ----------
        time_s : float
            Start of the volume's acquisition in seconds after the start of volume 0.
        tr_s : float
            Its length; the middle of the volume decides.

        Returns
        -------
        tuple of int
            Empty for a volume in transition; more than one where events overlap.
        """
        n_known = bisect_right(self.announced, time_s, key=lambda one: one.from_s)
        if n_known != self._n_known:
            known = (one.event for one in self.announced[:n_known])
            self._n_known, self._blocks = n_known, self._find_blocks((*self.events, *known))
        moment_s = time_s + tr_s / 2 - self._delay_s
        return tuple(
            i
            for i, condition in enumerate(self.conditions)
            if _inside(self._blocks[condition], moment_s, self._transition_s)
        )

    def _find_blocks(self, events: Sequence[Event]) -> dict[str, _Blocks]:
        """Return when each condition is on."""
        blocks = {
            condition: _merge(e for e in events if e.trial_type == condition)
            for condition in self.conditions
        }
        if not self._named_baseline:
            blocks[self.conditions[0]] = _gaps(_merge(events))
        return blocks


def _merge(events: Iterable[Event]) -> _Blocks:
    """Return the union of the events' times as sorted, disjoint rows (start, stop)."""
    rows: list[list[float]] = []
    for event in sorted(events, key=lambda e: e.onset_s):
        stop_s = event.onset_s + event.duration_s
        if rows and event.onset_s <= rows[-1][1]:
            rows[-1][1] = max(rows[-1][1], stop_s)
        else:
            rows.append([event.onset_s, stop_s])
    return np.array(rows, np.float64).reshape(-1, 2)


def _gaps(blocks: _Blocks) -> _Blocks:
    edges = np.concatenate([[-np.inf], blocks.ravel(), [np.inf]])
    return edges.reshape(-1, 2)


def _inside(blocks: _Blocks, moment_s: float, margin_s: float) -> bool:
    return bool(
        ((blocks[:, 0] + margin_s <= moment_s) & (moment_s < blocks[:, 1] - margin_s)).any()
    )

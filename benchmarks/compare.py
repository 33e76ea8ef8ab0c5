"""What became slower from one report to the next, beyond the noise of both.

Judged is each median that has its `noise` beside it. It became slower if it grew by more than
`FLOOR` and both noises allow, as it is and also relative to the memory streams of the two runs,
and if the fastest call grew by more than `FLOOR`, too: a busy neighbour leaves some calls alone.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtfmri.errors import ConfigError

from .measure import Row
from .peers.turns import OURS
from .tables import FORMAT

if TYPE_CHECKING:
    from rich.table import Table

FLOOR = 0.10
"""Of a time: so much two runs of the same code differ now and then, by where their arrays lie."""
_MEDIANS = ("median_ms", "p50_ms")
_SIZES = {"scaling": "size", "latency": "tr_ms"}
"""By what a table's rows are known beside their words."""
_HEADINGS = ("", "new / old", "noise", "memory", "old ms", "new ms", "what")

What = tuple[str, ...]
"""A table, the words of a row of it, and where in the row a time stands."""
Kind = Literal["slower", "faster", "new", "gone"]
_KINDS: tuple[Kind, ...] = ("slower", "faster", "new", "gone")


@dataclass(frozen=True, slots=True)
class Change:
    """A time that changed, or that one report alone has.

    Attributes
    ----------
    kind : {"slower", "faster", "new", "gone"}
    what : tuple of str
        The table, the words of a row of it, and where in the row the time stands.
    old_ms, new_ms : float, optional
        The medians.
    ratio : float, optional
        New / old.
    noise : float, optional
        That of both medians together, as a part of them.
    machine : float, optional
        The memory stream's rate, old / new, in the same row or else in the whole reports: above
        1 the machine itself was slower.
    """

    kind: Kind
    what: What
    old_ms: float | None = None
    new_ms: float | None = None
    ratio: float | None = None
    noise: float | None = None
    machine: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` finds.

    Attributes
    ----------
    changes : list of Change
        What is slower, the most so first, then what is faster, new, gone.
    n_judged : int
        Times that both reports have, with their noise.
    n_unjudged : int
        Times of too few calls to tell their noise.
    machine : float, optional
        Median of the memory streams' rates, old / new; None if the reports have no stream.
    """

    changes: list[Change]
    n_judged: int
    n_unjudged: int
    machine: float | None

    @property
    def slower(self) -> bool:
        """Whether anything is."""
        return any(change.kind == "slower" for change in self.changes)


def read_report(path: Path) -> dict[str, Any]:
    """Return the report in a file.

    Raises
    ------
    ConfigError
        If the file cannot be read, or holds no report of this `FORMAT`.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the report in {path}: {error}") from error
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path} must hold a report of format {FORMAT}, got {found}")
    return dict(report)


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compare two reports of one machine.

    Parameters
    ----------
    old, new : dict
        As `run` returns them.

    Raises
    ------
    ConfigError
        If machine, threads or device differ, or two rows of a table have the same words.
    """
    _refuse_unlike(old, new)
    before, after = dict(_times(old)), dict(_times(new))
    both = [what for what in before if what in after]
    streams = {what: _machine(before[what], after[what]) for what in both}
    known = [ratio for ratio in streams.values() if ratio]
    machine = statistics.median(known) if known else None
    judged = [what for what in both if before[what]["noise"] and after[what]["noise"]]
    changes = [
        change
        for what in judged
        if (change := _judged(what, before[what], after[what], streams[what] or machine))
    ]
    changes += [Change("new", what) for what in _absent(after, before)]
    changes += [Change("gone", what) for what in _absent(before, after)]
    changes.sort(key=_most_first)
    return Comparison(changes, len(judged), len(both) - len(judged), machine)


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as `json.dump` takes it."""
    return asdict(found) | {"slower": found.slower}


def conclusion(found: Comparison) -> str:
    """Return in one line what a comparison says."""
    counts = {kind: sum(c.kind == kind for c in found.changes) for kind in _KINDS}
    told = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    memory = f"; memory, old / new: {found.machine:.2f}" if found.machine else ""
    few = f"; {found.n_unjudged} timed too rarely to tell their noise" if found.n_unjudged else ""
    return f"{told}, of {found.n_judged} times judged{few}{memory}"


def lines(found: Comparison) -> list[list[str]]:
    """Return headings, then the cells of a line for each change."""
    return [list(_HEADINGS), *(_cells(change) for change in found.changes)]


def table(found: Comparison) -> "Table":
    """Return a comparison's table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    colours = {"slower": "red", "faster": "green"}
    shown = Table(title="What changed", title_justify="left")
    headings, *rows = lines(found)
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("", "what") else "right")
    for row in rows:
        shown.add_row(Text(row[0], style=colours.get(row[0], "")), *map(Text, row[1:]))
    return shown


def _refuse_unlike(old: dict[str, Any], new: dict[str, Any]) -> None:
    def host(report: dict[str, Any]) -> dict[str, Any]:
        machine = report["machine"]
        names = ("cpu", "threads")
        gpu = (machine["gpu"] or {}).get("name")
        return {name: machine[name] for name in names} | {"gpu": gpu, "device": report["device"]}

    before, after = host(old), host(new)
    unlike = [
        f"{name} {before[name]} and {after[name]}"
        for name in before
        if before[name] != after[name]
    ]
    if unlike:
        raise ConfigError(f"reports must be of one machine and device, got {'; '.join(unlike)}")


def _times(report: dict[str, Any]) -> Iterator[tuple[What, Row]]:
    """Yield the parts of all rows that have a median of ours and its noise."""
    seen = set()
    for name, rows in report["tables"].items():
        for row in rows:
            if row.get("tool", OURS) != OURS:
                continue
            words = [value for value in row.values() if isinstance(value, str)]
            if name in _SIZES and _SIZES[name] in row:
                words.append(f"{_SIZES[name]} {row[_SIZES[name]]:g}")
            for place, part in _parts(row):
                what = (name, *words, *place)
                if what in seen:
                    raise ConfigError(f"rows must differ by their words, got {what} twice")
                seen.add(what)
                yield what, part


def _parts(row: Row, place: What = ()) -> Iterator[tuple[What, Row]]:
    if "noise" in row and any(name in row for name in _MEDIANS):
        yield place, row
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _parts(value, (*place, key))


def _median(part: Row) -> float:
    return float(next(part[name] for name in _MEDIANS if name in part))


def _machine(old: Row, new: Row) -> float | None:
    """Return the old rate of the memory stream over the new one, where both parts have one."""
    if "stream_gb_s" in old and "stream_gb_s" in new:
        return float(old["stream_gb_s"] / new["stream_gb_s"])
    return None


def _absent(times: Iterable[What], others: Iterable[What]) -> list[What]:
    """Return what is not among *others*, as little of its words as tell it: a table, a grid."""
    known = {what[:n] for what in others for n in range(1, len(what) + 1)}
    return list(
        dict.fromkeys(
            next(what[:n] for n in range(1, len(what) + 1) if what[:n] not in known)
            for what in times
            if what not in known
        )
    )


def _judged(what: What, old: Row, new: Row, machine: float | None) -> Change | None:
    old_ms, new_ms, noise = _median(old), _median(new), math.hypot(old["noise"], new["noise"])
    ratio, least = new_ms / old_ms, new["min_ms"] / old["min_ms"]
    machine = machine or 1.0
    limit = 1 + FLOOR + noise
    told = old_ms, new_ms, ratio, noise, machine
    if min(ratio, ratio / machine) > limit and least > 1 + FLOOR:
        return Change("slower", what, *told)
    if max(ratio, ratio / machine) < 1 / limit and least < 1 / (1 + FLOOR):
        return Change("faster", what, *told)
    return None


def _most_first(change: Change) -> tuple[int, float]:
    ratio = change.ratio or 1.0
    return _KINDS.index(change.kind), ratio if change.kind == "faster" else -ratio


def _cells(change: Change) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        change.kind,
        shown(change.ratio, ".2f"),
        shown(change.noise, ".0%"),
        shown(change.machine, ".2f"),
        shown(change.old_ms, ".4g"),
        shown(change.new_ms, ".4g"),
        ", ".join(change.what),
    ]

"""What can go wrong between a scanner and its reader, played on purpose."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from rtfmri.errors import ConfigError
from rtfmri.volume import Grid, Volume

KINDS = {
    "late": "comes :SECONDS late, and those after it not before it",
    "doubled": "comes twice",
    "swapped": "comes after the next one",
    "missing": "never comes",
    "truncated": "breaks off in the middle, and never comes whole",
    "wrong-series": "comes after one of another series",
    "wrong-shape": "comes after one of another shape",
    "dies": "comes :SECONDS after the scanner has broken off",
}
"""The faults there are, and what becomes of the volume."""
TIMED = ("late", "dies")
"""Those that take ``:SECONDS``, one TR by default."""
GRAMMAR = "KIND@INDEX, such as missing@7, missing@7-9 or late@7:1.5"
TRUNCATED_SHARE = 0.5
"""How much of a truncated volume is sent."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one volume."""

    kind: str
    """A key of `KINDS`."""
    index: int
    """Of the volume in the run, from 0."""
    delay_s: float | None = None
    """For those that are `TIMED`, at the TR's pace; None is one TR."""

    def __str__(self) -> str:
        delay = "" if self.delay_s is None else f":{self.delay_s:g}"
        return f"{self.kind}@{self.index}{delay}"


def parse_faults(texts: Iterable[str]) -> tuple[Fault, ...]:
    """Read faults as the command line has them.

    Parameters
    ----------
    texts : iterable of str
        ``KIND@INDEX`` or ``KIND@FIRST-LAST``, with ``:SECONDS`` for those that take it.

    Raises
    ------
    ConfigError
        If one is malformed, or of a kind there is not.
    """
    return tuple(fault for text in texts for fault in _parse(text))


def _parse(text: str) -> list[Fault]:
    parts = re.fullmatch(r"([^@]*)@([0-9]{1,6})(?:-([0-9]{1,6}))?(?::(.*))?", text)
    if parts is None:
        raise ConfigError(f"a fault must be {GRAMMAR}; got {text!r}")
    kind, first, last, seconds = parts.groups()
    if kind not in KINDS:
        raise ConfigError(f"a fault must be one of {', '.join(KINDS)}; got {text!r}")
    if seconds is not None:
        if kind not in TIMED:
            raise ConfigError(f"only {' and '.join(TIMED)} take :SECONDS; got {text!r}")
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", seconds):
            raise ConfigError(f"a fault's seconds must be a number like 1.5; got {text!r}")
    indices = range(int(first), int(last or first) + 1)
    if not indices:
        raise ConfigError(f"a fault's volumes must be FIRST-LAST, in this order; got {text!r}")
    delay_s = None if seconds is None else float(seconds)
    return [Fault(kind, index, delay_s) for index in indices]


def check_faults(faults: Iterable[Fault], n_volumes: int | None) -> None:
    """Check that all of these can be played, where the run's length is known.

    Raises
    ------
    ConfigError
        If a kind is unknown, a volume is not in the run, or has the same fault twice.
    """
    seen = set()
    for fault in faults:
        if fault.kind not in KINDS:
            raise ConfigError(f"a fault must be one of {', '.join(KINDS)}; got {fault.kind!r}")
        if (fault.kind, fault.index) in seen:
            raise ConfigError(f"a volume has each fault once; got {fault} twice")
        seen.add((fault.kind, fault.index))
        if n_volumes is not None and fault.index >= n_volumes:
            raise ConfigError(f"a fault's volume must be one of 0 to {n_volumes - 1}, got {fault}")
        if fault.kind == "swapped" and fault.index + 1 == n_volumes:
            raise ConfigError(f"the last volume cannot be swapped with the next, got {fault}")


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that the scanner does."""

    due_s: float
    """Not before this many seconds after the run's start, at the TR's pace."""
    volume: Volume | None
    """What is sent; None: it breaks off."""
    stranger: bool = False
    share: float = 1.0
    counts: bool = False
    """Whether a volume of the run is thereby there."""


def script(
    volumes: Iterable[Volume],
    faults: Iterable[Fault],
    on_fault: Callable[[Fault], None] | None = None,
) -> Iterator[Act]:
    """Give what the scanner does, one thing after the other.

    A volume may have several faults. What comes before a missing one still comes: ``missing@7``
    with ``wrong-shape@7`` is a volume of another shape in place of volume 7. One that is
    truncated and doubled comes whole after all.

    Parameters
    ----------
    volumes : iterable of Volume
        The run; consumed lazily.
    faults : iterable of Fault
        Those of volumes that never come have no effect.
    on_fault : callable, optional
        Called with each fault when it begins.
    """
    found: dict[int, dict[str, Fault]] = {}
    for fault in faults:
        found.setdefault(fault.index, {})[fault.kind] = fault
    held: list[Act] = []
    for volume in volumes:
        mine = found.get(volume.index, {})
        for fault in mine.values():
            if on_fault is not None:
                on_fault(fault)
        acts = list(_acts(volume, mine))
        if "swapped" in mine:
            held = acts + held
            continue
        yield from acts
        if "missing" not in mine:
            yield from held
            held = []
    yield from held


def _acts(volume: Volume, faults: dict[str, Fault]) -> Iterator[Act]:
    due_s = (volume.index + 1) * volume.tr_s
    if "dies" in faults:
        yield Act(due_s, None)
    for kind in TIMED:
        if kind in faults:
            delay_s = faults[kind].delay_s
            due_s += volume.tr_s if delay_s is None else delay_s
    if "wrong-series" in faults:
        yield Act(due_s, volume, stranger=True)
    if "wrong-shape" in faults:
        yield Act(due_s, _twice_as_wide(volume))
    if "missing" in faults:
        return
    if "truncated" in faults:
        yield Act(due_s, volume, share=TRUNCATED_SHARE)
    else:
        yield Act(due_s, volume, counts=True)
    if "doubled" in faults:
        yield Act(due_s, volume, counts="truncated" in faults)


def _twice_as_wide(volume: Volume) -> Volume:
    data = np.asfortranarray(np.concatenate([volume.data, volume.data]))
    return replace(volume, data=data, grid=Grid(data.shape, volume.grid.affine))

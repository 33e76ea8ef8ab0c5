"""The simulated scanner as a source."""

from functools import partial
from typing import Any

from rtfmri.errors import ConfigError, SourceError
from rtfmri.readers.replay import Replay, Step
from rtfmri.simulator import Scanner
from rtfmri.volume import Volume


def replay_simulator(
    paradigm: str, tr_s: float | None, speed: float | None, **options: Any
) -> Replay:
    """Open a simulated run of *paradigm*; *options* are the URI's.

    Raises
    ------
    SourceError
        If there is no such paradigm, or an option is out of its range.
    """
    if "volumes" in options:
        options["n_volumes"] = options.pop("volumes")
    if tr_s:
        options["tr_s"] = tr_s
    try:
        scanner = Scanner(paradigm, **options)
    except ConfigError as error:
        raise SourceError(str(error)) from error
    return replay_scanner(scanner, speed)


def replay_scanner(scanner: Scanner, speed: float | None) -> Replay:
    """Return a reader of *scanner*'s run."""
    slice_times_s = (scanner.tr_s / 2,) * scanner.grid.shape[2]

    def load(index: int) -> Volume:
        data = scanner.volume(index)
        return Volume(data, scanner.grid, index, scanner.tr_s, slice_times_s=slice_times_s)

    n_volumes = scanner.n_volumes
    steps = (Step(f"volume {i}", i, partial(load, i)) for i in range(n_volumes))
    return Replay(steps, n_volumes=n_volumes, tr_s=scanner.tr_s, speed=speed, made_ahead=True)

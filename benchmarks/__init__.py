"""What rtfmri costs, measured: suites that `run` runs and whose report `table` shows.

``rtfmri bench`` runs them from an installed package, ``python -m benchmarks`` from a checkout.
How each number comes about stands in README.md beside this file.
"""

import datetime
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import rtfmri
from rtfmri import machine
from rtfmri.backends import open_backend
from rtfmri.config import Device
from rtfmri.errors import ConfigError

from . import chain, kernels, latency, outputs, peers, scaling, soak, sustained, transports
from .measure import Plan, Tables, open_clock
from .tables import FORMAT, rich_tables

if TYPE_CHECKING:
    from rich.table import Table

GRIDS = ((64, 64, 36), (104, 104, 72), (192, 192, 84))

SUITES = {
    "kernels": "every operation of the backend: time, GB/s, share of the memory bandwidth",
    "chain": "a volume's whole way, from a mosaic's pixels to the ROIs' values, step by step",
    "peers": "each stage, and all together, beside whatever else does the same work",
    "scaling": "what a volume costs as the run, the grid, the design, the regions grow",
    "latency": "from the scanner's side to the result, through every transport, at any TR",
    "outputs": "from the result to a stimulus program, through every output",
    "soak": "volumes without a pause for as long as one likes: what grows, what slows down",
}
_MODULES = {
    "kernels": (kernels,),
    "chain": (chain,),
    "peers": (peers,),
    "scaling": (scaling,),
    "latency": (latency, sustained, transports),
    "outputs": (outputs,),
    "soak": (soak,),
}
LAYOUTS = {
    name: layout
    for modules in _MODULES.values()
    for module in modules
    for name, layout in module.LAYOUTS.items()
}


def run(
    *,
    device: str,
    grids: Sequence[tuple[int, int, int]] = GRIDS,
    suites: Sequence[str] = tuple(SUITES),
    progress: Callable[[str], None] = lambda _: None,
    finished: Callable[[dict[str, Any]], None] = lambda _: None,
    rounds: int = 8,
    minutes: float = 1.0,
) -> dict[str, Any]:
    """Run benchmark suites on this machine.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        As for `rtfmri.backends.open_backend`.
    grids : sequence of (int, int, int)
        Shapes x, y, z of the volumes.
    suites : sequence of str
        Names in `SUITES`.
    progress : callable
        Called with a few words before each step.
    finished : callable
        Called with the report so far after each suite.
    rounds : int
        How often the things to compare take turns; times are medians over the turns.
    minutes : float
        How long a TR must be sustained, and the soak lasts.

    Returns
    -------
    dict
        Of what `json.dump` takes: machine, date, revision, and the rows of each suite's tables.

    Raises
    ------
    ConfigError
        If a suite is none.
    DeviceError
        If the device cannot be had.
    """
    if unknown := set(suites) - set(SUITES):
        raise ConfigError(f"suites must be of {', '.join(SUITES)}; got {', '.join(unknown)}")
    backend = open_backend(cast(Device, device))
    backend.warm("int16")
    plan = Plan(backend, open_clock(backend), grids, rounds, minutes, progress)
    tables: Tables = {}
    report = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rtfmri": rtfmri.__version__,
        "revision": _revision(),
        "device": backend.name,
        "machine": machine.describe(),
        "tables": tables,
    }
    for suite in suites:
        for module in _MODULES[suite]:
            try:
                tables |= module.run(plan)
            except ModuleNotFoundError as error:
                skipped = {"skipped": f"{error.name} is not installed"}
                tables |= {name: [skipped] for name in module.LAYOUTS}
        finished(report)
    return report


def table(report: dict[str, Any]) -> "list[Table]":
    """Return a report's tables for the terminal."""
    return rich_tables(report, LAYOUTS)


def _revision() -> str | None:
    """Return the commit of the checkout this runs from, marked if changed; None if installed."""
    root = Path(rtfmri.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

"""Every fault on every transport: what a run makes of it, in words for docs/faults.md."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np

from memory import plain
from rtfmri.config import OrderSettings
from rtfmri.readers import Reader, RunEnd, Skipped, open_reader
from rtfmri.session import Session
from rtfmri.simulator import play
from rtfmri.simulator.faults import KINDS, parse_faults
from rtfmri.volume import Grid, Volume

N_VOLUMES, TR_S = 8, 0.1
PAUSE_S = 0.5
"""Between two runs: five TRs, which scanners need for more than that."""
GRID = Grid((12, 10, 6), np.array([[-3, 0, 0, 17], [0, 3, 0, -15], [0, 0, 4, -9], [0, 0, 0, 1.0]]))


class Transport(NamedTuple):
    """The two ends of a transport: what is read, and what is played to."""

    source: str
    target: str
    needs_count: bool = False
    """Whether nothing but `count` can tell that a run is over."""


TRANSPORTS = {
    "folder": Transport("folder:{where}", "folder:{where}"),
    "folder, written in place": Transport("folder:{where}", "folder:{where}?write=chunked"),
    "folder, a file a slice": Transport("folder:{where}", "folder:{where}?format=slices"),
    "folder, NIfTI": Transport("folder:{where}", "folder:{where}?format=nifti", True),
    "C-STORE": Transport("dicom://:0", "dicom:{where}"),
    "MRD": Transport("mrd://:0", "mrd:{where}"),
    "AFNI": Transport("afni://:0", "afni:{where}"),
    "murfi": Transport("murfi://:0", "murfi:{where}"),
    "Pyneal": Transport("pyneal://:0", "pyneal:{where}"),
    "ours, TCP": Transport("tcp://:0", "tcp:{where}"),
    "ours, ZeroMQ": Transport("zmq://:0", "zmq:{where}"),
}
_TIMES = {"late": ":0.25", "dies": ":0.25"}
FAULTS = {
    "none": "nothing goes wrong",
    **{kind: f"a volume {text}" for kind, text in KINDS.items()},
    "joined": "the run has begun before we listen",
    "two runs": f"the next run follows after {PAUSE_S / TR_S:.0f} TRs",
}
"""The rows: those that `simulate --fault` plays, and what is no fault of a volume."""


def run(seed: int = 0) -> list[Volume]:
    """Return a run of bright noise."""
    rng = np.random.default_rng(seed)
    shape = GRID.shape
    return [
        Volume(np.asfortranarray(rng.integers(900, 1100, shape, np.int16)), GRID, index, TR_S)
        for index in range(N_VOLUMES)
    ]


def observe(transport: str, fault: str, folder: Path) -> str:
    """Play a run of `N_VOLUMES` with *fault* over *transport*, and say what became of it."""
    ends = TRANSPORTS[transport]
    query = f"timeout_s={1 if fault == 'two runs' else 5}"
    if fault != "two runs" or ends.needs_count:
        query += f"&count={N_VOLUMES}"
    source = f"{ends.source.format(where=folder)}?{query}"
    reader = open_reader(source, tr_s=TR_S)
    address = getattr(reader, "address", None)
    target = ends.target.format(where=f"//{address.host}:{address.port}" if address else folder)
    runs = [run()]
    if fault == "joined":
        runs = [runs[0][3:]]
    if fault == "two runs":
        runs.append(run(seed=1))
    faults = [f"{fault}@3{_TIMES.get(fault, '')}"] if fault in KINDS else []
    broken: list[Exception] = []

    def send() -> None:
        try:
            _play(runs, target, faults, folder)
        except Exception as error:
            broken.append(error)
            reader.close()

    player = threading.Thread(target=send)
    # Whatever a fault does, the test comes to an end.
    watchdog = threading.Timer(30, reader.close)
    player.start()
    watchdog.start()
    try:
        outcome = "; then ".join(_sessions(reader, runs))
        outcome += " (needs `count`)" * (len(runs) > 1 and ends.needs_count)
    finally:
        watchdog.cancel()
        reader.close()
        player.join(timeout=60)
        assert not player.is_alive()
        if broken:
            raise broken[0]
    return outcome


def _play(
    runs: Sequence[Sequence[Volume]], target: str, faults: Sequence[str], folder: Path
) -> None:
    play(runs[0], target, faults=parse_faults(faults))
    for volumes in runs[1:]:
        time.sleep(PAUSE_S)
        if not target.startswith("folder:"):
            play(volumes, target)
            continue
        # A folder takes a file of each name once, so the next run has other names.
        aside = folder / ".next"

        def move(index: int, aside: Path = aside) -> None:
            for file in sorted(aside.iterdir()):
                file.replace(folder / f"next_{file.name}")

        play(volumes, target.replace(str(folder), str(aside)), on_volume=move)


class _Tee:
    """A reader that remembers the first volume of each number that came."""

    def __init__(self, reader: Reader) -> None:
        self.live, self.n_volumes, self.close = reader.live, reader.n_volumes, reader.close
        self.voxels: dict[int, np.ndarray] = {}
        self._reader = reader

    def __iter__(self) -> Iterator[Volume | Skipped | RunEnd]:
        for item in self._reader:
            if isinstance(item, Volume) and item.grid.shape == GRID.shape:
                self.voxels.setdefault(item.index, _canonical(item))
            yield item


def _canonical(volume: Volume) -> np.ndarray:
    """Return the voxels as RAS, since Pyneal's protocol has no other."""
    image = nibabel.Nifti1Image(volume.data, volume.grid.affine)
    return np.asanyarray(nibabel.as_closest_canonical(image).dataobj)


def _sessions(reader: Reader, runs: Sequence[Sequence[Volume]]) -> Iterator[str]:
    config = plain(order=OrderSettings(wait_s=10))
    for number, sent in enumerate(runs, start=1):
        more = number < len(runs)
        tee = _Tee(reader)
        with Session(tee, config=config, more_runs=more) as session:
            results = [result for result in session if not result.missing]
        counters = session.counters
        truth = {volume.index: _canonical(volume) for volume in sent}
        n_wrong = sum(
            not np.array_equal(tee.voxels[result.index], truth.get(result.index))
            for result in results
        )
        said = [f"{len(results)} of {len(sent)} results"]
        for n, words in (
            (n_wrong, "of them under the number of another"),
            (counters.missing, "missing"),
            (counters.reordered, "brought into order"),
            (counters.before_start, "before the start"),
        ):
            said += [f"{n} {words}"] * (n > 0)
        said += [f"{n} skipped: {why}" for why, n in sorted(counters.skipped.items())]
        yield ", ".join(said)


def table(cells: dict[tuple[str, str], str]) -> str:
    """Return the cells, (fault, transport) to what happens, as a table in Markdown."""
    lines = ["| fault | on | what happens |", "| --- | --- | --- |"]
    for fault, words in FAULTS.items():
        outcomes: dict[str, list[str]] = {}
        for transport in TRANSPORTS:
            if (fault, transport) in cells:
                outcomes.setdefault(cells[fault, transport], []).append(transport)
        for number, (outcome, names) in enumerate(outcomes.items()):
            where = "all" if len(names) == len(TRANSPORTS) else " · ".join(names)
            title = "" if number else f"**{fault}**: {words}"
            lines.append(f"| {title} | {where} | {outcome} |")
    return "\n".join(lines) + "\n"


def read_table(text: str) -> dict[tuple[str, str], str]:
    """Return the cells of what `table` made."""
    cells: dict[tuple[str, str], str] = {}
    fault = ""
    for title, where, outcome in re.findall(r"^\| (.*?) \| (.*?) \| (.*) \|$", text, re.M)[2:]:
        fault = title.removeprefix("**").partition("**")[0] or fault
        names = TRANSPORTS if where == "all" else where.split(" · ")
        cells |= {(fault, name): outcome for name in names}
    return cells

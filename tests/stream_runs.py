"""Runs to be sent over the network, and what became of them at the other end."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dicom_files import oblique_grid, voxels
from rtfmri.readers import RunEnd, Skipped
from rtfmri.readers.live import LiveReader
from rtfmri.volume import Volume

SCHEMES = ("afni", "mrd", "murfi", "pyneal", "tcp", "zmq")
TR_S = 0.1
GRID = oblique_grid()
Items = list[Volume | Skipped | RunEnd]


def volume(index: int, dtype: str = "int16", tr_s: float = TR_S) -> Volume:
    """Return random voxels; those of uint16 fit into int16, for there are protocols without it."""
    if dtype == "float32":
        data = voxels(GRID, index, np.int16) / np.float32(7)
    else:
        data = voxels(GRID, index, np.dtype(dtype).type)
    return Volume(data & 0x7FFF if dtype == "uint16" else data, GRID, index, tr_s)


@contextmanager
def background(work: Callable[[], object]) -> Iterator[None]:
    """Do something in another thread; what goes wrong there is raised here."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=30)
    assert not thread.is_alive()
    if problems:
        raise problems[0]


def received(reader: LiveReader, work: Callable[[], object]) -> Items:
    """Return one run's items, that come of *work*; it has to succeed."""

    def try_it() -> None:
        try:
            work()
        except BaseException:
            reader.close()
            raise

    with background(try_it):
        return list(reader)


def volumes(items: Items) -> list[Volume]:
    return [item for item in items if isinstance(item, Volume)]


def indices(items: Items) -> list[int]:
    return [item.index for item in volumes(items)]


def skipped(items: Items) -> list[Skipped]:
    return [item for item in items if isinstance(item, Skipped)]

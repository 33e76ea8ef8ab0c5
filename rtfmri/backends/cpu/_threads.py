"""How many threads a kernel gets, and where they run."""

# mypy: disable-error-code="untyped-decorator"

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numba
import numpy as np
from numba import njit, prange, types
from numba.core.typing import signature

_SMALLEST_SHARE = 4096
"""Voxels below which another thread costs more than it saves."""

_own_id = types.ExternalFunction("gettid", signature(types.int32))


class Threads:
    """What the families of operations share: the number of threads, set once."""

    threads: int

    def _share(self, n_voxels: int) -> int:
        return max(1, min(self.threads, n_voxels // _SMALLEST_SHARE))


class Apart:
    """Within it, the calling thread and the workers of its kernels have a processor each.

    After a pause between two volumes, Linux wakes a worker on the processor of the thread that
    wakes it, and there it waits until that one has had enough of waiting for it: measured on 2
    cores, a volume of 64x64x36 every 20 ms took 4.9 ms so, and 2.8 ms apart. The calling thread
    stays where it is, for there it runs; the workers get the others. Outside, it may go where it
    likes, and so may whatever it starts.

    Parameters
    ----------
    workers : list of int
        The operating system's numbers of these threads.
    processors : list of int
        One more.
    """

    def __init__(self, workers: list[int], processors: list[int]) -> None:
        self._workers, self._processors = workers, processors
        self._here = -1
        self._before: list[set[int]] = []
        self._current = ctypes.CDLL(None).sched_getcpu

    def __enter__(self) -> None:
        """Stay here."""
        self._before.append(os.sched_getaffinity(0))
        here = self._current()
        if here not in self._processors:
            return
        os.sched_setaffinity(0, {here})
        if here != self._here:
            self._here = here
            others = (processor for processor in self._processors if processor != here)
            for worker, processor in zip(self._workers, others, strict=True):
                os.sched_setaffinity(worker, {processor})

    def __exit__(self, *exception: object) -> None:
        """Go where the thread was let before."""
        os.sched_setaffinity(0, self._before.pop())


def keep_apart(threads: int) -> AbstractContextManager[None]:
    """Return what the calling thread is to call kernels in.

    It does nothing where there is not one processor a thread, or kernels' threads are not
    OpenMP's on Linux.
    """
    if not sys.platform.startswith("linux") or threads < 2:
        return nullcontext()
    processors = sorted(os.sched_getaffinity(0))
    ids = np.zeros(threads, np.int32)
    _tell_ids(ids)
    each = threads == len(processors) == len(set(ids.tolist()))
    if not each or numba.threading_layer() != "omp":
        return nullcontext()
    return Apart(ids[1:].tolist(), processors)


@njit(parallel=True, cache=True)
def _tell_ids(ids: Any) -> None:
    for i in prange(ids.size):
        ids[i] = _own_id()

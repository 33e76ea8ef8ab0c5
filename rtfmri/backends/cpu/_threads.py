"""How many threads a kernel gets, and which processors they keep to."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

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
    """Keeps the calling thread, within it, to a processor that no worker of its kernels is on.

    After a pause between two volumes, Linux wakes a worker on the processor of the thread that
    wakes it, and there it waits until that one has had enough of waiting for it: measured on 2
    cores, a volume of 64x64x36 every 20 ms took 4.9 ms so, and 2.8 ms apart. Outside, the calling
    thread, and with it whatever it starts, may run where it likes.

    Parameters
    ----------
    processor : int
    """

    def __init__(self, processor: int) -> None:
        self._processor = {processor}
        self._before: list[set[int]] = []

    def __enter__(self) -> None:
        """Go there."""
        self._before.append(os.sched_getaffinity(0))
        os.sched_setaffinity(0, self._processor)

    def __exit__(self, *exception: object) -> None:
        """Go back to where the thread was let before."""
        os.sched_setaffinity(0, self._before.pop())


def keep_apart(threads: int) -> AbstractContextManager[None]:
    """Give each of the calling thread's workers a processor of its own, where each can have one.

    Returns
    -------
    context manager
        What that thread is to call kernels in.
    """
    if not sys.platform.startswith("linux") or threads < 2:
        return nullcontext()
    processors = sorted(os.sched_getaffinity(0))
    ids = np.zeros(threads, np.int32)
    _tell_ids(ids)
    each = threads == len(processors) == len(set(ids.tolist()))
    if not each or numba.threading_layer() != "omp":
        return nullcontext()
    for worker, processor in zip(ids[1:].tolist(), processors[1:], strict=True):
        os.sched_setaffinity(worker, {processor})
    return Apart(processors[0])


@njit(parallel=True, cache=True)
def _tell_ids(ids: Any) -> None:
    for i in prange(ids.size):
        ids[i] = _own_id()

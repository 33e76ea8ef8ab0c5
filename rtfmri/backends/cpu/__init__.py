"""The cpu backend: numba kernels on NumPy arrays."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

# Threads that spin for milliseconds while they wait fight with whatever else runs, readers and
# writers of this very process included; threads that sleep at once wake too late for the next
# kernel. With these, a thread spins for some 0.2 to 0.6 ms, which is the gap between two kernels:
# on 2 cores a volume of 64x64x36 took 2.2 ms, and 2.8 ms with a tenth of it. OpenMP reads both
# once, when it is loaded, which is later than this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numba
import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, exercise
from rtfmri.backends.cpu._threads import keep_apart
from rtfmri.backends.cpu.detrend import DetrendOperations
from rtfmri.backends.cpu.glm import GlmOperations
from rtfmri.backends.cpu.moments import MomentsOperations
from rtfmri.backends.cpu.quality import QualityOperations
from rtfmri.backends.cpu.register import RegisterOperations
from rtfmri.backends.cpu.reslice import ResliceOperations
from rtfmri.backends.cpu.roi import RoiOperations
from rtfmri.backends.cpu.slice_timing import SliceTimingOperations
from rtfmri.backends.cpu.smooth import SmoothOperations
from rtfmri.errors import DeviceError


class CpuBackend(
    DetrendOperations,
    GlmOperations,
    MomentsOperations,
    QualityOperations,
    RegisterOperations,
    ResliceOperations,
    RoiOperations,
    SliceTimingOperations,
    SmoothOperations,
):
    """The operations of `rtfmri.backends.Backend` on this machine's processor.

    Parameters
    ----------
    threads : int, optional
        Threads of the kernels; by default all processors this process may use.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        available = numba.config.NUMBA_NUM_THREADS
        if threads is not None and threads > available:
            raise DeviceError(
                f"threads must be at most {available} on this machine, got {threads}"
            )
        self.threads = threads or available
        numba.set_num_threads(self.threads)
        self._apart = keep_apart(self.threads)

    def undisturbed(self) -> AbstractContextManager[None]:
        """See `rtfmri.backends.Backend.undisturbed`."""
        return self._apart

    def upload(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.upload`."""
        return host

    def copy(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.copy`."""
        return np.array(host, order="C")

    def download(self, array: Array) -> NDArray[Any]:
        """See `rtfmri.backends.Backend.download`."""
        return np.array(array)

    def fetch(self, array: Array) -> NDArray[Any]:
        """See `rtfmri.backends.Backend.fetch`."""
        return np.array(array)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
        """See `rtfmri.backends.Backend.zeros`."""
        return np.zeros(shape, dtype)

    def warm(self, dtype: Any) -> None:
        """See `rtfmri.backends.Backend.warm`."""
        exercise(self, dtype)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `rtfmri.backends.Backend.record`."""
        work()
        return work

    def synchronize(self) -> None:
        """See `rtfmri.backends.Backend.synchronize`; nothing is ever pending here."""

"""The cuda backend: CuPy arrays, and the kernels in ``kernels/``."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfmri.backends import Array, exercise
from rtfmri.backends.cuda._launch import PinnedStaging
from rtfmri.backends.cuda.detrend import DetrendOperations
from rtfmri.backends.cuda.glm import GlmOperations
from rtfmri.backends.cuda.moments import MomentsOperations
from rtfmri.backends.cuda.quality import QualityOperations
from rtfmri.backends.cuda.register import RegisterOperations
from rtfmri.backends.cuda.reslice import ResliceOperations
from rtfmri.backends.cuda.roi import RoiOperations
from rtfmri.backends.cuda.slice_timing import SliceTimingOperations
from rtfmri.backends.cuda.smooth import SmoothOperations


class CudaBackend(
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
    """The operations of `rtfmri.backends.Backend` on one NVIDIA GPU.

    Everything is queued on one stream, in the order asked for; only `fetch`, `download`, `copy`
    and `synchronize` wait for it. Arrays must be C-contiguous; sizes are not checked.
    """

    name = "cuda"

    def upload(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.upload`."""
        return self._staging.upload(host)

    def copy(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.copy`."""
        return self._staging.copy(host)

    def download(self, array: Array) -> NDArray[Any]:
        """See `rtfmri.backends.Backend.download`."""
        return self._staging.download(array)

    def fetch(self, array: Array) -> NDArray[Any]:
        """See `rtfmri.backends.Backend.fetch`; the per-TR path's one wait for the GPU."""
        return self._staging.fetch(array)

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """See `rtfmri.backends.Backend.zeros`."""
        with self._staging.stream:
            return self._xp.zeros(shape, dtype)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `rtfmri.backends.Backend.record`."""
        return self._staging.record(work)

    def synchronize(self) -> None:
        """See `rtfmri.backends.Backend.synchronize`."""
        self._staging.synchronize()

    def undisturbed(self) -> AbstractContextManager[None]:
        """See `rtfmri.backends.Backend.undisturbed`."""
        return nullcontext()

    def warm(self, dtype: DTypeLike) -> None:
        """See `rtfmri.backends.Backend.warm`."""
        exercise(self, dtype)


def compile_options(defines: Mapping[str, str]) -> tuple[str, ...]:
    """Return NVRTC's options: without fused multiply-add, for the cpu backend's bits.

    CuPy appends ``-ftz=true``: subnormal floats (below 1.2e-38) count as zero. The cpu backend
    keeps them, so elementwise results can differ there, and nowhere else; no scanner's signal
    comes near.
    """
    macros = (f"-D{name}={value}" for name, value in defines.items())
    return ("--std=c++17", "-lineinfo", "--fmad=false", *macros)


def open_cuda() -> CudaBackend:
    """Return a backend for the current GPU (``CUDA_VISIBLE_DEVICES`` chooses another)."""
    import cupy

    def compile_module(source: str, defines: Mapping[str, str]) -> Any:
        return cupy.RawModule(code=source, options=compile_options(defines))

    return CudaBackend(cupy, compile_module, PinnedStaging(cupy))

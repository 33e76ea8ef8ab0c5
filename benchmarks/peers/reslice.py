"""A volume sampled where the head is known to be: time, and error against the head at rest."""

import importlib
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend, Pose
from rtfmri.config import Config
from rtfmri.stages.brain import BrainStage
from rtfmri.volume import Grid

from ..measure import Clock, Plan, Row, Tables, grid_name
from ..phantom import Phantom, rigid
from ..tables import Layout, number, text
from .motion import Rtspm
from .turns import Makers, Work, compare_cold

MOTION = np.array([0.7, -0.4, 0.5, 0.6, -0.8, 0.5])
"""As for `phantom.rigid`."""
_LEAST_SIGNAL = 500.0
"""Of a voxel that counts for the error: one within the head."""

LAYOUTS = {
    "reslice": Layout(
        "Reslicing a whole volume without noise, caches cold, with the motion that there is; "
        "how far it is from the head at rest, of a signal of 1000",
        (
            ("grid", text("grid")),
            ("tool", text("tool")),
            ("ms", number(3, "median_ms")),
            ("min", number(3, "min_ms")),
            ("times ours", number(1, "times_ours")),
            ("error, rms", number(2, "error")),
        ),
    ),
}


class Peers:
    """What else reslices, each from the form of the volume that it takes best.

    Parameters
    ----------
    grid : Grid
    volume : (x, y, z) int16
        Of a head that has moved.
    transform : (4, 4) float64
        From the head at rest to the head in the volume, RAS+ mm.
    """

    def __init__(
        self, grid: Grid, volume: NDArray[np.int16], transform: NDArray[np.float64]
    ) -> None:
        self._grid, self._volume, self._transform = grid, volume, transform

    def present(self) -> Makers:
        """Return by name the package that a peer needs, and what makes it."""
        return {
            "scipy.ndimage, cubic": ("scipy", self._scipy),
            "SimpleITK, cubic": ("SimpleITK", self._simpleitk),
            **(
                {"python-rtspm, quartic": ("rtspm", self._rtspm)}
                if Rtspm.takes(self._grid.shape)
                else {}
            ),
        }

    def _scipy(self) -> Work:
        from scipy.ndimage import affine_transform

        matrix = place_of(self._grid, self._transform)
        out = np.empty(self._grid.shape, np.float32)

        def reslice() -> NDArray[Any]:
            affine_transform(self._volume, matrix, output=out, order=3, mode="nearest")
            return out

        return reslice

    def _simpleitk(self) -> Work:
        itk = importlib.import_module("SimpleITK")
        image = itk.GetImageFromArray(self._volume.T.astype(np.float32))
        image.SetSpacing([float(size) for size in self._grid.voxel_size_mm])
        image.SetOrigin([float(mm) for mm in self._grid.affine[:3, 3]])
        transform = itk.AffineTransform(3)
        transform.SetMatrix(self._transform[:3, :3].ravel().tolist())
        transform.SetTranslation(self._transform[:3, 3].tolist())
        resample = itk.ResampleImageFilter()
        resample.SetReferenceImage(image)
        resample.SetInterpolator(itk.sitkBSpline)
        resample.SetTransform(transform)
        kept: list[Any] = []

        def reslice() -> NDArray[Any]:
            kept[:] = [resample.Execute(image)]  # for the array is a view of it
            return np.asarray(itk.GetArrayViewFromImage(kept[0])).T

        return reslice

    def _rtspm(self) -> Work:
        spm = Rtspm(self._grid, self._volume)
        spm.place(self._transform)
        return lambda: np.asarray(spm.reslice())


def place_of(grid: Grid, transform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where a voxel of the head at rest is in the volume, in voxels, 4x4."""
    return np.asarray(np.linalg.inv(grid.affine) @ transform @ grid.affine)


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``reslice``, one a tool and grid."""
    rows: list[Row] = []
    for shape in plan.grids:
        plan.progress(f"reslicing, {grid_name(shape)}")
        rows += compare(plan.backend, plan.clock, shape, plan.rounds)
    return {"reslice": rows}


def compare(backend: Backend, clock: Clock, shape: tuple[int, int, int], rounds: int) -> list[Row]:
    """Return a row a tool; all reslice the same volume, in turn."""
    phantom, transform = Phantom(shape), rigid(MOTION)
    grid, where = phantom.grid, {"grid": grid_name(shape)}
    at_rest = phantom.signal(np.zeros(6))
    volume = np.rint(phantom.signal(MOTION)).astype(np.int16)
    brain = BrainStage(backend, grid, np.ones(shape, np.bool_), Config())
    voxels = backend.copy(volume.reshape(-1, order="F"))
    # Of a pose, reslicing needs no more than this.
    matrix = backend.copy(place_of(grid, transform)[:3].ravel())
    pose = Pose(*(matrix,) * len(Pose._fields))

    def ours() -> NDArray[Any]:
        brain.reslice(voxels, pose)
        return brain.image(backend.download(brain.smooth()))

    def errors(resliced: NDArray[Any]) -> Row:
        return {"error": float(np.sqrt(np.mean((resliced - at_rest)[inside] ** 2)))}

    inside, makers = at_rest > _LEAST_SIGNAL, Peers(grid, volume, transform).present()
    timed = partial(brain.reslice, voxels, pose)
    return compare_cold(clock, where, grid.n_voxels, (timed, ours), makers, errors, rounds)

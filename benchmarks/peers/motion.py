"""Motion correction against python-rtspm and SimpleITK on heads whose motion is known.

Neither peer is needed: `pip install 'rtfmri[bench]'` brings them.
"""

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend
from rtfmri.config import Config
from rtfmri.stages.brain import BrainStage
from rtfmri.stages.motion import MotionStage
from rtfmri.volume import Grid

from ..measure import Plan, Tables, grid_name, rms, seconds_of
from ..phantom import Phantom, deviation_mm, jumps, rigid, walk
from ..tables import Layout, number, text
from .turns import OURS

MOST_VOLUMES, FEWEST_VOLUMES = 40, 8
_MOST_VOXELS = 12_000_000
"""Of all volumes of a grid together: there are fewer of large ones, which take peers seconds."""
_N_ACTIVE = 5

_ITK_FWHM_MM, _ITK_POINTS = 5.0, 8_000
_ITK_STEP, _ITK_LEAST_STEP, _ITK_MOST_STEPS, _ITK_RELAXATION = 0.2, 1e-3, 50, 0.3
_ITK_LEVER_MM = 30.0
"""A radian about an axis counts as this many mm, about the mean distance from it."""


class Corrector(Protocol):
    """Something that estimates motion against the volume it was made with, and undoes it."""

    def load(self, volume: NDArray[np.int16]) -> None:
        """Take the next volume (x, y, z), x fastest, in the form it wants; this is not timed."""
        ...

    def estimate(self) -> None:
        """Find the head in it."""
        ...

    def reslice(self) -> None:
        """Sample it where the head is."""
        ...

    def transform(self) -> NDArray[np.float64]:
        """Return the 4x4 transform from the head at rest to the head in the volume, RAS+ mm."""
        ...


class Rtfmri:
    """Ours, from a volume in the host's memory to a pose and a volume on the device."""

    def __init__(self, backend: Backend, grid: Grid, reference: NDArray[np.int16]) -> None:
        self._backend = backend
        self._stage = MotionStage(backend, grid)
        self._stage.set_reference(reference.reshape(-1, order="F"))
        self._brain = BrainStage(backend, grid, np.ones(grid.shape, np.bool_), Config())

    def load(self, volume: NDArray[np.int16]) -> None:
        """See `Corrector.load`."""
        self._host = volume.reshape(-1, order="F")

    def estimate(self) -> None:
        """See `Corrector.estimate`; the way to the device is part of it."""
        self._voxels = self._backend.upload(self._host)
        self._stage.push(self._voxels)
        self._backend.synchronize()

    def reslice(self) -> None:
        """See `Corrector.reslice`: the whole volume, as the settings have it by default."""
        self._brain.reslice(self._voxels, self._stage.pose)
        self._backend.synchronize()

    def transform(self) -> NDArray[np.float64]:
        """See `Corrector.transform`."""
        return self._stage.result(self._backend.download(self._stage.pose.fields)).affine


class Rtspm:
    """SPM's realignment as OpenNFT runs it: 4th-degree B-splines, from the template each time.

    Parameters
    ----------
    fwhm_mm, separation_mm : float
        Of the Gaussian before, and between the points; OpenNFT has 5 and 4.
    """

    LIMIT = "python-rtspm reslices only what is as wide as it is high"

    def __init__(
        self,
        grid: Grid,
        reference: NDArray[np.int16],
        fwhm_mm: float = 5.0,
        separation_mm: float = 4.0,
    ) -> None:
        self._spm = importlib.import_module("rtspm")
        # SPM counts voxels from 1.
        self._affine = grid.affine @ np.block([[np.eye(3), -np.ones((3, 1))], [np.zeros(3), 1.0]])
        self._flags = {
            "quality": 0.9,
            "fwhm": fwhm_mm,
            "sep": separation_mm,
            "interp": 4,
            "wrap": np.zeros((3, 1)),
            "lkp": np.arange(6),
            "mask": 1,
            "mean": 0,
            "which": 2,
        }
        self._images = [{"mat": self._affine.copy(), "dim": np.array(grid.shape)} for _ in "01"]
        self._template: Sequence[Any] = ([],) * 6
        self._images[0]["Vol"] = _float64(reference)
        self._first = True
        self.load(reference)
        self.estimate()
        self._first = False

    @staticmethod
    def takes(shape: Sequence[int]) -> bool:
        """Tell whether a volume has a shape that it can reslice."""
        return shape[0] == shape[1]

    def load(self, volume: NDArray[np.int16]) -> None:
        """See `Corrector.load`."""
        self._images[1]["Vol"] = _float64(volume)

    def estimate(self) -> None:
        """See `Corrector.estimate`."""
        self._images[1]["mat"] = self._affine.copy()
        index = 0 if self._first else 1
        with np.errstate(invalid="ignore"):  # of a volume that is the reference itself
            found = self._spm.spm_realign_rt(self._images, self._flags, index, 0, *self._template)
        self._images, self._template = found[0], found[1:7]

    def place(self, transform: NDArray[np.float64]) -> None:
        """Take a *transform*, as that below, for what was estimated."""
        self._images[1]["mat"] = np.linalg.inv(transform) @ self._affine

    def reslice(self) -> Any:
        """See `Corrector.reslice`; return the volume, (x, y, z) float64."""
        return self._spm.spm_reslice_rt(self._images, self._flags)

    def transform(self) -> NDArray[np.float64]:
        """See `Corrector.transform`."""
        return np.asarray(self._affine @ np.linalg.inv(self._images[1]["mat"]))


class SimpleItk:
    """Mean squares at 8000 points, linear, by gradient descent with a step that shrinks.

    Of the metrics, optimisers, steps, numbers of points and gradients tried, this was the fastest
    whose error is not far from the smallest. Smoothed before, warm start; cubic B-spline after.
    """

    def __init__(self, grid: Grid, reference: NDArray[np.int16], threads: int = 0) -> None:
        self._itk = itk = importlib.import_module("SimpleITK")
        self._grid = grid
        itk.ProcessObject.GlobalWarningDisplayOff()
        all_threads = itk.ProcessObject.GetGlobalDefaultNumberOfThreads()
        self._threads = threads or all_threads
        registration = self._registration = itk.ImageRegistrationMethod()
        registration.SetMetricAsMeanSquares()
        registration.SetMetricSamplingStrategy(registration.RANDOM)
        registration.SetMetricSamplingPercentage(min(1.0, _ITK_POINTS / grid.n_voxels), 1)
        registration.SetMetricUseFixedImageGradientFilter(False)
        registration.SetMetricUseMovingImageGradientFilter(False)
        registration.SetInterpolator(itk.sitkLinear)
        registration.SetOptimizerAsRegularStepGradientDescent(
            _ITK_STEP, _ITK_LEAST_STEP, _ITK_MOST_STEPS, _ITK_RELAXATION, 1e-8
        )
        registration.SetOptimizerScales([_ITK_LEVER_MM**2] * 3 + [1.0] * 3)
        registration.SetNumberOfThreads(self._threads)
        self._pose = itk.Euler3DTransform()
        self._reference = self._image(reference)
        self._smoothed_reference = self._smoothed(self._reference)

    def load(self, volume: NDArray[np.int16]) -> None:
        """See `Corrector.load`."""
        self._moving = self._image(volume)

    def estimate(self) -> None:
        """See `Corrector.estimate`."""
        self._registration.SetInitialTransform(self._pose, inPlace=True)
        self._registration.Execute(self._smoothed_reference, self._smoothed(self._moving))

    def reslice(self) -> None:
        """See `Corrector.reslice`."""
        resample = self._itk.ResampleImageFilter()
        resample.SetNumberOfThreads(self._threads)
        resample.SetReferenceImage(self._reference)
        resample.SetInterpolator(self._itk.sitkBSpline)
        resample.SetTransform(self._pose)
        resample.Execute(self._moving)

    def transform(self) -> NDArray[np.float64]:
        """See `Corrector.transform`."""
        transform = np.eye(4)
        transform[:3, :3] = np.reshape(self._pose.GetMatrix(), (3, 3))
        transform[:3, 3] = self._pose.GetTranslation()
        return transform

    def _image(self, volume: NDArray[np.int16]) -> Any:
        # Its axes are named otherwise, which changes nothing as long as all images agree.
        image = self._itk.GetImageFromArray(volume.T.astype(np.float32))
        image.SetSpacing([float(size) for size in self._grid.voxel_size_mm])
        image.SetOrigin([float(mm) for mm in self._grid.affine[:3, 3]])
        return image

    def _smoothed(self, image: Any) -> Any:
        smooth = self._itk.SmoothingRecursiveGaussianImageFilter()
        smooth.SetNumberOfThreads(self._threads)
        smooth.SetSigma(_ITK_FWHM_MM / math.sqrt(8 * math.log(2)))
        return smooth.Execute(image)


def _float64(volume: NDArray[np.int16]) -> NDArray[np.float64]:
    return np.asfortranarray(volume, np.float64)


class Tool(NamedTuple):
    """A corrector's name in the table, the package it needs, and what makes it.

    ``below_mm`` is the voxel size below which it takes part; one that takes part ``for_time``
    alone sees no jumps and no activation.
    """

    name: str
    package: str
    make: Callable[[Grid, NDArray[np.int16]], Corrector]
    below_mm: float = math.inf
    for_time: bool = False


PEERS = (
    Tool("python-rtspm", "rtspm", Rtspm),
    Tool(
        "python-rtspm, FWHM 3 mm, points 3 mm apart",
        "rtspm",
        lambda grid, reference: Rtspm(grid, reference, 3.0, 3.0),
        below_mm=1.5,
    ),
    Tool("SimpleITK", "SimpleITK", SimpleItk),
    Tool(
        "SimpleITK, 1 thread",
        "SimpleITK",
        lambda grid, reference: SimpleItk(grid, reference, threads=1),
        for_time=True,
    ),
)


LAYOUTS = {
    "motion": Layout(
        "Motion correction of the same volumes: error over a sphere of 50 mm, time of a volume",
        (
            ("grid", text("grid")),
            ("tool", text("tool")),
            ("volumes", number(0, "n_volumes")),
            ("error rms mm", number(4, "rms_mm")),
            ("largest", number(4, "max_mm")),
            ("after 6 mm, 6 degrees", number(4, "jump_mm")),
            ("with activation", number(4, "active_mm")),
            ("estimate ms", number(2, "estimate_ms")),
            ("reslice ms", number(2, "reslice_ms")),
            ("together ms", number(2, "together_ms")),
            ("times ours", number(1, "times_ours")),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``motion``."""
    motion = []
    for shape in plan.grids:
        plan.progress(f"motion correction, {grid_name(shape)}")
        motion += compare_correctors(plan.backend, shape)
    return {"motion": motion}


def compare_correctors(backend: Backend, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Return a row a tool; all see the same volumes, and take turns at each."""
    phantom = Phantom(shape)
    if not MotionStage.possible(phantom.grid):
        return [{"skipped": f"{grid_name(shape)} is too small a grid"}]
    backend.warm(np.int16)
    n_volumes = min(MOST_VOLUMES, max(FEWEST_VOLUMES, _MOST_VOXELS // phantom.grid.n_voxels))
    reference = phantom.volume(0, np.zeros(6))
    peers = [
        peer
        for peer in PEERS
        if min(phantom.grid.voxel_size_mm) < peer.below_mm
        and (peer.package != "rtspm" or Rtspm.takes(shape))
    ]
    present = {peer.name: peer for peer in peers if find_spec(peer.package)}
    walked = _Trial({OURS: Rtfmri(backend, phantom.grid, reference)})
    for name, peer in present.items():
        walked.correctors[name] = peer.make(phantom.grid, reference)
    accurate = {
        name: corrector
        for name, corrector in walked.correctors.items()
        if name == OURS or not present[name].for_time
    }
    motion = walk(n_volumes + 1)
    for i in range(1, n_volumes + 1):
        walked.push(phantom.volume(i, motion[i]), motion[i], timed=True)
    jumped, active = _Trial(accurate), _Trial(accurate)
    at_rest = phantom.volume(n_volumes + 1, np.zeros(6))
    for i, jump in enumerate(jumps(), start=n_volumes + 2):
        jumped.push(at_rest)
        jumped.push(phantom.volume(i, jump), jump)
    jumped.push(at_rest)
    for i in range(1, min(_N_ACTIVE, n_volumes) + 1):
        active.push(phantom.volume(i, motion[i], active=True), motion[i])
    rows = []
    for name, errors_mm in walked.errors_mm.items():
        estimate_ms, reslice_ms = (1e3 * statistics.median(s) for s in walked.seconds[name])
        row: dict[str, Any] = {
            "grid": grid_name(shape),
            "tool": name,
            "n_volumes": n_volumes,
            "rms_mm": rms(errors_mm),
            "max_mm": max(errors_mm),
            "estimate_ms": estimate_ms,
            "reslice_ms": reslice_ms,
            "together_ms": estimate_ms + reslice_ms,
        }
        if name in accurate:
            row["jump_mm"] = max(jumped.errors_mm[name])
            row["active_mm"] = rms(active.errors_mm[name])
        rows.append(row)
    for row in rows:
        row["times_ours"] = row["together_ms"] / rows[0]["together_ms"]
    missing = {peer.package: None for peer in peers if peer.name not in present}
    rows += [{"grid": grid_name(shape), "tool": f"{name} is not installed"} for name in missing]
    return rows


class _Trial:
    """Takes volumes through all correctors in turn, and keeps their errors and times."""

    def __init__(self, correctors: dict[str, Corrector]) -> None:
        self.correctors = correctors
        self.errors_mm: dict[str, list[float]] = {}
        self.seconds: dict[str, tuple[list[float], list[float]]] = {}

    def push(
        self,
        volume: NDArray[np.int16],
        motion: NDArray[np.float64] | None = None,
        *,
        timed: bool = False,
    ) -> None:
        """Register *volume* by each; its error counts if *motion* is given."""
        for name, corrector in self.correctors.items():
            corrector.load(volume)
            estimate_s = seconds_of(corrector.estimate)
            if timed:
                estimates_s, reslices_s = self.seconds.setdefault(name, ([], []))
                estimates_s.append(estimate_s)
                reslices_s.append(seconds_of(corrector.reslice))
            if motion is not None:
                error_mm = deviation_mm(corrector.transform(), rigid(motion))
                self.errors_mm.setdefault(name, []).append(error_mm)

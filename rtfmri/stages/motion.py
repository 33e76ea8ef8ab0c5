"""Motion: where the head is in each volume, against a reference.

Convention, for all that speaks of motion here. A *pose* maps a point of the head from where it is
in the reference to where it is in a volume, both in scanner mm, RAS+:

    T(p) = R (p - c) + c + t        R = Rz Ry Rx

with c the centre of the reference grid, t the translation, and rotations about the scanner's x
axis first, then y, then z, each counter-clockwise for who looks against the axis. A volume is put
back by sampling it at T(p).

Method. Inverse-compositional Gauss-Newton (Baker & Matthews 2004, IJCV 56:221): the derivatives
are those of the reference, taken once. Volumes are read through cubic B-splines (Unser 1999, IEEE
Signal Process. Mag. 16(6):22) whose coefficients are the volume itself after a short Gaussian,
thinned out where voxels are small; together with the B-spline, which is nearly a Gaussian of
variance 1/3, it smooths by `SMOOTHING_MM`. They are compared at the points of a lattice about as
fine as what is left, where the reference changes.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import POSE_FIELDS, Array, Backend, Pose, Template
from rtfmri.errors import ConfigError, VolumeError
from rtfmri.stages.smoothing import gaussian_taps
from rtfmri.volume import Grid

SMOOTHING_MM = 4.0
"""Full width at half maximum, and distance of the points: what finds the pose best and at least
cost where the noise of volumes of 1.1 to 3.5 mm decides."""
MAX_ITERATIONS = 15
"""Steps; a head at rest takes two, one that has moved by 6 mm and 6 degrees up to seven."""
TOLERANCE_MM = 0.01
"""Step at which it is over: the next would be smaller by a factor of ten at least."""

_MIN_POINTS = 200
_MIN_COEFFICIENTS = 8
_MARGIN = 2
"""Coefficients at the edge without points, so that small motion keeps all points inside."""
_MIN_SLOPE = 0.1
"""Steepness, of that of the steepest 1 %, at which a point is worth its time."""
_MAX_CONDITION = 1e6
_NOBLE = np.array([0.1459, 0.2764, 0.3820, 0.6180, 0.7236, 0.8541])

_CHUNK = 256
_N_SUMS = 11

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class MotionValue:
    """Where the head is in one volume, by the convention of this module.

    Attributes
    ----------
    translation_mm, rotation_deg : (float, float, float)
        t, and the angles about x, y, z.
    affine : (4, 4) float64
        T, scanner mm to scanner mm.
    fd_mm : float
        Framewise displacement from the volume before that was found: sum of the absolute changes
        of the six, angles on a radius of 50 mm (Power 2012, NeuroImage 59:2142). 0 for the first.
    fd_jenkinson_mm : float
        The same as the root mean square displacement of a sphere of 80 mm around the grid's
        centre (Jenkinson 1999, FMRIB TR99MJ1; FSL has the centre of gravity). 0 for the first.
    scale : float
        Intensity of the volume over that of the reference.
    inside : float
        Share of the points that are inside the volume.
    residual : float
        Root mean square difference from the reference at the points, over the reference's
        standard deviation there; nan if no point is inside.
    n_iterations : int
        Steps taken.
    converged : bool
        Whether the head was found. If not, the pose is that of the volume before, and both
        displacements are 0.
    """

    translation_mm: tuple[float, float, float]
    rotation_deg: tuple[float, float, float]
    affine: Floats
    fd_mm: float
    fd_jenkinson_mm: float
    scale: float
    inside: float
    residual: float
    n_iterations: int
    converged: bool

    @property
    def parameters(self) -> tuple[float, float, float, float, float, float]:
        """Translations along x, y, z in mm, then rotations about x, y, z in degrees."""
        return (*self.translation_mm, *self.rotation_deg)


class MotionStage:
    """Finds the pose of each volume, starting from that of the volume before.

    A volume counts as not found when the steps do not come to rest within `MAX_ITERATIONS`, fewer
    than half of the points are inside it, its intensity is not within 0.3 to 3 times that of the
    reference, or half of the reference's variance is left unexplained (a residual above 0.71).
    Voxels that are not finite are as good as outside.

    Parameters
    ----------
    backend : Backend
        What executes it.
    grid : Grid
        Of the volumes and of the reference.

    Attributes
    ----------
    pose : Pose
        Of the newest volume, on the backend; there from `set_reference` on.

    Raises
    ------
    ConfigError
        If the grid is not `possible`.
    """

    pose: Pose
    _template: Template

    def __init__(self, backend: Backend, grid: Grid) -> None:
        if not self.possible(grid):
            raise ConfigError(
                f"motion needs a grid of at least {_MIN_COEFFICIENTS} voxels along each axis, "
                f"got {grid}; set motion.mode to 'off'"
            )
        self._backend = backend
        self._shape = grid.shape
        size_mm = np.array(grid.voxel_size_mm)
        # A field of view smaller than a head's gets as many points.
        self._distance_mm = min(SMOOTHING_MM, float(np.cbrt(grid.n_voxels * size_mm.prod() / 4e4)))
        x, y, z = (
            max(1, min(int(0.75 * self._distance_mm / mm), n // _MIN_COEFFICIENTS))
            for mm, n in zip(size_mm, grid.shape, strict=True)
        )
        self._step = x, y, z
        nx, ny, nz = (-(-n // step) for n, step in zip(grid.shape, self._step, strict=True))
        self._coarse = nx, ny, nz
        x, y, z = (
            backend.copy(_prefilter(self._distance_mm / mm, step))
            for mm, step in zip(size_mm, self._step, strict=True)
        )
        self._taps = x, y, z
        self._scratch = backend.zeros(2 * grid.n_voxels)
        self._coefficients = backend.zeros(nx * ny * nz)
        self._centre = grid.affine[:3] @ np.append((np.array(grid.shape) - 1) / 2, 1)
        fine = grid.affine[:3].copy()
        fine[:, 3] -= self._centre
        coarse = fine.copy()
        coarse[:, :3] *= self._step
        self._to_mm = np.stack([coarse, fine])
        self._from_mm = np.stack([_inverse(coarse), _inverse(fine)])

    @staticmethod
    def possible(grid: Grid) -> bool:
        """Tell whether *grid* is large enough for all six parameters to be found."""
        return min(grid.shape) >= _MIN_COEFFICIENTS

    def set_reference(self, voxels: Array, fields: Array | None = None) -> None:
        """Take *voxels* as the reference, and the head to be where it is in them.

        Parameters
        ----------
        voxels : (n_voxels,) int16, uint16 or float32
            On the host or on the backend.
        fields : (14,) float64, optional
            On the backend: where each volume's `POSE_FIELDS` are to be written.

        Raises
        ------
        VolumeError
            If there is too little in it to tell where it is. The reference before stays.
        """
        backend = self._backend
        if isinstance(voxels, np.ndarray):
            voxels = backend.upload(voxels)
        self._smooth(voxels)
        coefficients = backend.download(self._coefficients).astype(np.float64)
        coefficients = coefficients.reshape(self._coarse, order="F")
        points = self._choose(coefficients)
        values, slopes = _sample(coefficients, points)
        usable = np.isfinite(values)
        points, values, slopes = points[:, usable], values[usable], slopes[:, usable]
        places = self._to_mm[0, :, :3] @ points + self._to_mm[0, :, 3:]
        slopes = self._from_mm[0, :, :3].T @ slopes
        jacobian = np.vstack([slopes, np.cross(places, slopes, axis=0), values])
        n = values.size
        hessian = jacobian @ jacobian.T
        size = np.sqrt(np.diag(hessian))
        if n < _MIN_POINTS or np.linalg.cond(hessian / np.outer(size, size)) > _MAX_CONDITION:
            raise VolumeError(
                f"the reference must have contrast in at least {_MIN_POINTS} places that tell all "
                f"directions apart, got {n}; is it an image of a head?"
            )
        single = (part.astype(np.float32) for part in (points, values, jacobian))
        parts = (*single, np.linalg.inv(hessian), self._to_mm, self._from_mm)
        self._template = Template(*(backend.copy(part) for part in parts))
        self.pose = _new_pose(backend, n, fields)

    def push(self, volume: Array) -> None:
        """Find the pose of *volume*, (n_voxels,) on the backend; nothing waits for it."""
        self._smooth(volume)
        self._backend.register(
            self._coefficients,
            self._coarse,
            self._template,
            self.pose,
            max_iterations=MAX_ITERATIONS,
            tolerance_mm=TOLERANCE_MM,
        )

    def result(self, fields: Floats) -> MotionValue:
        """Return what *fields* say, a copy of ``pose.fields`` on the host."""
        said = dict(zip(POSE_FIELDS, fields.tolist(), strict=False))
        rotation, translation = _rotation(fields[:4]), fields[4:7]
        affine = np.eye(4)
        affine[:3, :3] = rotation
        affine[:3, 3] = translation + self._centre - rotation @ self._centre
        (r00, _, _), (r10, _, _), (r20, r21, r22) = rotation.tolist()
        about_x, about_z = math.atan2(r21, r22), math.atan2(r10, r00)
        about_y = math.atan2(-r20, math.hypot(r21, r22))
        return MotionValue(
            translation_mm=(said["x_mm"], said["y_mm"], said["z_mm"]),
            rotation_deg=(math.degrees(about_x), math.degrees(about_y), math.degrees(about_z)),
            affine=affine,
            fd_mm=said["fd_power_mm"],
            fd_jenkinson_mm=said["fd_jenkinson_mm"],
            scale=said["scale"],
            inside=said["inside"],
            residual=said["residual"],
            n_iterations=int(said["n_iterations"]),
            converged=said["converged"] == 1,
        )

    def _smooth(self, volume: Array) -> None:
        self._backend.smooth(
            volume, self._shape, self._taps, self._scratch, self._coefficients, step=self._step
        )

    def _choose(self, coefficients: Floats) -> Floats:
        """Return the places (3, n) in the coefficient grid where the reference changes.

        They are those of a regular lattice, in the order of memory. Multiples of a noble number
        fall most evenly between the voxels (Weyl 1916; Hurwitz 1891), so that what is peculiar to
        one place between voxels cancels out; random jitter does that less well.
        """
        size_mm = np.sqrt((self._to_mm[0, :, :3] ** 2).sum(0))
        x, y, z = (
            np.arange(_MARGIN, n - 1 - _MARGIN, _noble(self._distance_mm / mm))
            for n, mm in zip(coefficients.shape, size_mm, strict=True)
        )
        lattice = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1]).reshape(3, -1)
        slopes = self._from_mm[0, :, :3].T @ _slopes(coefficients).reshape(3, -1)
        steepness = np.nan_to_num(np.sqrt((slopes**2).sum(0)), nan=0.0, posinf=0.0)
        steepness = steepness.reshape(coefficients.shape)
        i, j, k = np.rint(lattice).astype(np.intp)
        chosen = steepness[i, j, k] > _MIN_SLOPE * np.percentile(steepness, 99)
        # What the backends read, so that the derivatives are those of the very same places.
        return lattice[:, chosen].astype(np.float32).astype(np.float64)


def bspline_taps() -> NDArray[np.float32]:
    """Return the filter from values to cubic B-spline coefficients, from its middle outwards.

    The inverse of (1, 4, 1) / 6, ``-6 z / (1 - z^2) z^|k|`` with z = sqrt(3) - 2 (Unser 1999,
    IEEE Signal Process. Mag. 16(6):22), as far as float32 sees it, with sum 1.
    """
    taps = (math.sqrt(3) - 2) ** np.arange(14)
    normalised: NDArray[np.float32] = (taps / (2 * taps.sum() - taps[0])).astype(np.float32)
    return normalised


def _prefilter(fwhm: float, step: int) -> NDArray[np.float32]:
    """Return the filter that makes *fwhm* voxels with a B-spline of *step* voxels.

    Variances of filters add; where the B-spline's alone is too large, that is a negative one, and
    the filter sharpens.
    """
    variance = fwhm**2 / (8 * math.log(2)) - step**2 / 3
    if abs(variance) < 0.02:
        return np.ones(1, np.float32)
    if variance < 0.3:
        return np.array([1 - variance, variance / 2], np.float32)
    taps = gaussian_taps(math.sqrt(variance))[: int(3 * math.sqrt(variance) + 0.5) + 1]
    normalised: NDArray[np.float32] = taps / (2 * taps.sum() - taps[0])
    return normalised


def _noble(wanted: float) -> float:
    """Return a number close to *wanted* whose multiples fall evenly between whole numbers."""
    candidates = (np.arange(math.ceil(wanted) + 1)[:, None] + _NOBLE).ravel()
    return float(candidates[np.abs(np.log(candidates / wanted)).argmin()])


def _inverse(affine: Floats) -> Floats:
    inverse = np.linalg.inv(affine[:, :3])
    return np.hstack([inverse, -inverse @ affine[:, 3:]])


def _rotation(quaternion: Floats) -> Floats:
    w, x, y, z = quaternion.tolist()
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _new_pose(backend: Backend, n_points: int, fields: Array | None) -> Pose:
    """Return the pose of a head at rest; what the kernels keep and add up is known to them."""
    at_rest, still = [1, 0, 0, 0, 0, 0, 0, 1], np.eye(3, 4).ravel()
    n_sums = -(-n_points // _CHUNK) * _N_SUMS
    sums = np.array([*at_rest, *at_rest, 0, *still, 0, *[0] * n_sums], np.float64)
    if fields is None:
        fields = backend.zeros(len(POSE_FIELDS), np.float64)
    counter = backend.zeros(1, np.int32)
    return Pose(fields, backend.copy(still), backend.copy(sums), counter)


def _slopes(coefficients: Floats) -> Floats:
    """Return the derivatives (3, x, y, z) of a B-spline at its knots; 0 at the edges."""
    parts = []
    for axis in range(3):
        part = coefficients
        for other in range(3):
            low, middle, high = (np.roll(part, shift, other) for shift in (1, 0, -1))
            part = (high - low) / 2 if other == axis else (low + 4 * middle + high) / 6
        parts.append(part)
    return np.stack(parts)


def _sample(coefficients: Floats, places: Floats) -> tuple[Floats, Floats]:
    """Return a cubic B-spline (n,) and its derivatives (3, n) at *places* (3, n)."""
    below = places.astype(np.intp)
    t = places - below
    u = 1 - t
    weights = np.stack([u**3, 4 - 6 * t**2 + 3 * t**3, 4 - 6 * u**2 + 3 * u**3, t**3]) / 6
    changes = np.stack([-(u**2), 3 * t**2 - 4 * t, 4 * u - 3 * u**2, t**2]) / 2
    nx, ny, _ = coefficients.shape
    flat = coefficients.reshape(-1, order="F")
    x, y, z = below - 1
    first = (z * ny + y) * nx + x
    total = np.zeros((4, t.shape[1]))
    for k in range(4):
        plane = np.zeros((3, t.shape[1]))
        for j in range(4):
            row = np.stack([flat[first + (k * ny + j) * nx + i] for i in range(4)])
            along = (weights[:, 0] * row).sum(0)
            plane[0] += weights[j, 1] * along
            plane[1] += weights[j, 1] * (changes[:, 0] * row).sum(0)
            plane[2] += changes[j, 1] * along
        total[:3] += weights[k, 2] * plane
        total[3] += changes[k, 2] * plane[0]
    return total[0], total[1:]

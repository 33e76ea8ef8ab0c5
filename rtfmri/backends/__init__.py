"""The operations of the per-TR path, and the choice of what executes them.

Arrays are flat, in a volume's memory order: voxel state is float32 of shape (n_voxels,). Each
operation reads each of its inputs once and writes each of its outputs once. An operation exists
three times: in numba (`backends.cpu`), in CUDA (`backends.cuda` and ``kernels/``), and in float64
NumPy in the tests.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rtfmri.config import Device, Interpolation
from rtfmri.errors import DeviceError

_log = logging.getLogger(__name__)

Array: TypeAlias = Any
"""A NumPy array on the cpu backend, a CuPy array on the cuda backend."""

Shape: TypeAlias = tuple[int, int, int]
"""Voxels along x, y, z."""


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


class Region(NamedTuple):
    """Voxels of one array and their places in another, as runs that are contiguous in both.

    ``runs`` (n_runs, 3) int32 holds the flat index of the first source voxel, that of the first
    target voxel, and the length of each run, which never leaves its line along x. ``sources`` and
    ``targets`` (n,) int32 say the same voxel by voxel.
    """

    runs: Array
    sources: Array
    targets: Array


class Template(NamedTuple):
    """What volumes are registered to: points of the reference, and how it changes with motion.

    ``points`` (3, n) float32 are positions in the coefficient grid, ``values`` (n,) float32 the
    reference there, ``jacobian`` (7, n) float32 its derivatives by translation along x, y, z (mm),
    rotation about x, y, z (radians) and intensity scale, ``inverse_hessian`` (7, 7) float64.
    ``to_mm`` and ``from_mm`` (2, 3, 4) float64 are affines between voxels and scanner mm about the
    centre of rotation: of the coefficient grid first, then of the volumes.
    """

    points: Array
    values: Array
    jacobian: Array
    inverse_hessian: Array
    to_mm: Array
    from_mm: Array


class Pose(NamedTuple):
    """Where the head is, kept on the backend from volume to volume.

    ``fields`` float64 are the `POSE_FIELDS`; ``matrix`` (12,) float64 maps a voxel of the
    reference to its place in the volume, row by row; ``sums`` and ``counter`` are the kernels'
    own.
    """

    fields: Array
    matrix: Array
    sums: Array
    counter: Array


class Contrasts(NamedTuple):
    """What is asked of a design with p columns: contrast k has rows offsets[k] to offsets[k + 1].

    ``weights`` (n_rows, p) float64, ``offsets`` (n_contrasts + 1,) int32, ``kinds`` (n_contrasts,)
    int32: 0 for t, which has one row, 1 for F.
    """

    weights: Array
    offsets: Array
    kinds: Array


class DesignState(NamedTuple):
    """The design so far, once for each class of noise: (n_classes, ...) float64.

    ``factor`` (p, p) is the upper triangular R of its QR decomposition, with rows of zeros where
    columns depend on those before; ``squares`` (p,) are the columns' sums of squares, ``previous``
    (p,) the newest row, ``counts`` (2,) the number of rows and the rank.
    """

    factor: Array
    squares: Array
    previous: Array
    counts: Array


class DesignStep(NamedTuple):
    """What a new row of the design means for voxels, once for each class of noise.

    ``solved`` (n_rows, p) float64 are the contrasts' unit directions among the coordinates,
    ``scales`` (n_rows,) float64 their standard error in standard deviations of the noise (0 where
    a contrast cannot be estimated), ``rotations`` (p, 2) float32 cosines and sines, ``directions``
    the unit directions in float32, all 0 where they cannot be estimated, ``scalars`` (4,) float32
    the weights of the volume and of the one before, 1 / degrees of freedom (0 if there are none),
    and whether it is the first.
    """

    solved: Array
    scales: Array
    rotations: Array
    directions: Array
    scalars: Array


class GlmState(NamedTuple):
    """What is known of n voxels, in an order in which those of a noise class are neighbours.

    ``coordinates`` (p, n) float32 are Q'y, ``squares`` (n,) float32 the residual sum of squares,
    ``origin`` (n,) float32 the first volume, from which y is counted, ``previous`` (n,) float32
    the newest, ``order`` (n,) int32 each voxel's place in a volume, ``labels`` (n,) int32 its
    class, ``parts`` (n_parts, 3) int32 class, start and stop of at most 1024 voxels of one class.
    """

    coordinates: Array
    squares: Array
    origin: Array
    previous: Array
    order: Array
    labels: Array
    parts: Array


PART_VOXELS = 1024
"""The most voxels that a part of a `GlmState` has."""

POSE_FIELDS = (
    *("quaternion_w", "quaternion_x", "quaternion_y", "quaternion_z"),
    *("x_mm", "y_mm", "z_mm"),
    *("scale", "fd_power_mm", "fd_jenkinson_mm"),
    *("inside", "residual", "n_iterations", "converged"),
)
"""What `Backend.register` leaves: rotation, translation (mm), intensity scale; framewise
displacement from the volume before (mm); share of the template's points inside the volume; root
mean square residual over that of the template's values about their mean; iterations; 0 or 1."""

SLICE_FIELDS = ("total", "largest", "n_largest", "n_not_finite")
"""What `Backend.inspect` says of a slice: sum of the finite voxels, largest of them, how many are
as large, how many are not finite."""


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

    def fetch(self, array: Array) -> NDArray[Any]:
        """Return a copy of a small *array* by the shortest way; for the per-TR path alone."""
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

    def undisturbed(self) -> AbstractContextManager[None]:
        """Return what the thread that opened the backend takes a volume through the steps in.

        The cpu backend's threads keep out of each other's way in it; else it does nothing.
        """
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do *work*, and return what does it again: the same operations on the same arrays.

        The cuda backend captures a CUDA graph, so *work* may not upload, download or wait.
        """
        ...

    def smooth(
        self,
        volume: Array,
        shape: Shape,
        taps: tuple[Array, Array, Array],
        scratch: Array,
        out: Array,
        *,
        step: tuple[int, int, int] = (1, 1, 1),
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
        scratch : (n_voxels,) float32, with a step (2 * n_voxels,)
            Overwritten.
        out : (n_out,) float32
            Overwritten with the result. Neither may be *volume*.
        step : (int, int, int)
            Only every step-th voxel along x, y, z is computed, the first one included: *out* is of
            a grid of ``ceil(shape / step)``.
        """
        ...

    def register(
        self,
        coefficients: Array,
        shape: Shape,
        template: Template,
        pose: Pose,
        *,
        max_iterations: int,
        tolerance_mm: float,
    ) -> None:
        """Find the pose of a volume: Gauss-Newton from the pose before, all on the backend.

        Parameters
        ----------
        coefficients : (n,) float32
            Cubic B-spline coefficients of the smoothed volume, on a grid of *shape*.
        template : Template
            The reference.
        pose : Pose
            Of the volume before; overwritten. Where the iteration fails, the pose stays as it was
            and ``converged`` is 0.
        max_iterations : int
            Steps before it counts as failed.
        tolerance_mm : float
            The iteration has converged when a step moves no point 50 mm from the centre by more.
        """
        ...

    def reslice(
        self,
        volume: Array,
        shape: Shape,
        matrix: Array,
        interpolation: Interpolation,
        region: Region,
        out: Array,
    ) -> None:
        """Sample *volume* at the places that *matrix* gives for the region's source voxels.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            Of a grid of *shape*; for ``bspline`` its cubic B-spline coefficients, float32.
        matrix : (12,) float64
            Voxel of the reference to place in *volume*, in voxels, row by row.
        interpolation : str
            trilinear, catmull-rom or bspline.
        region : Region
            Its sources are voxels of the reference, whose grid is of *shape* too.
        out : (n_out,) float32
            The region's targets are overwritten. Places outside *volume* take the nearest place
            inside; neighbours beyond its edge are mirrored about the outer faces.
        """
        ...

    def gather(self, volume: Array, region: Region, scale: Array | None, out: Array) -> None:
        """Copy the region's sources in *volume* to its targets in *out*, as float32.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            Where the sources are.
        scale : (n,) float32, optional
            Factor of each voxel, in the order of the region.
        out : (n_out,) float32
            Where the targets are.
        """
        ...

    def retime(
        self, volume: Array, ring: Array, slot: int, shape: Shape, weights: Array, out: Array
    ) -> None:
        """Add up *volume* and those before it, each slice with weights of its own; keep *volume*.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            The newest, of a grid of *shape*.
        ring : (n_before, n_voxels), the dtype of *volume*
            The volumes before it; row *slot* is overwritten with *volume*.
        slot : int
            Row of the oldest; the one before *volume* is in the row before, the last row comes
            before the first.
        weights : (n_points, n_slices) float32
            Of *volume* first, then of the one before it, and so on; n_points is at most
            n_before + 1. Rows of the ring beyond that are not read.
        out : (n_voxels,) float32
            Overwritten.
        """
        ...

    def inspect(self, volume: Array, shape: Shape, slices: Array) -> None:
        """Say of each slice of *volume* what `SLICE_FIELDS` names.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            As the scanner sent it.
        slices : (n_slices + 1, 4) float64
            Overwritten; the last row is the whole volume's. Where no voxel is finite, ``largest``
            is -inf and ``n_largest`` 0.
        """
        ...

    def compare(self, volume: Array, previous: Array, sums: Array) -> None:
        """Sum up *volume*, and its squared differences from the one before.

        Parameters
        ----------
        volume, previous : (n,) float32
            The same voxels of two volumes; those of *volume* that are not finite count 0.
        sums : (2,) float64
            Overwritten with both sums.
        """
        ...

    def judge(self, values: Array, limits: Array, usable: Array) -> None:
        """Tell whether every value is within its limits; one that is not a number never is.

        Parameters
        ----------
        values : (n,) float64
            What was measured of a volume.
        limits : (2, n) float64
            Lowest and highest value allowed.
        usable : (1,) float32
            Overwritten with 1 or 0.
        """
        ...

    def track(
        self,
        volume: Array,
        previous: Array,
        moments: Moments,
        successive: Array,
        *,
        usable: Array,
        gain: float,
        successive_gain: float,
    ) -> None:
        """Fold a usable *volume* into the moments of the run, then make it the previous one.

        Parameters
        ----------
        volume : (n,) float32
            Scanner units.
        previous : (n,) float32
            The volume before; overwritten where *volume* is finite, usable or not.
        moments : Moments
            Of the usable volumes.
        successive : (n,) float32
            Mean squared difference of successive volumes.
        usable : (1,) float32
            0 leaves moments and *successive* as they are.
        gain, successive_gain : float
            Weights of this volume and of this difference; 0 leaves them out.
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
        usable: Array | None = None,
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
        usable : (1,) float32, optional
            0 leaves *into* as it is; None says 1.
        """
        ...

    def fold(
        self, volume: Array, into: Moments, *, gain: float, usable: Array | None = None
    ) -> None:
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
        usable: Array | None = None,
    ) -> None:
        """Compare *volume* with a sliding baseline, then let it into the window, in one pass.

        Parameters
        ----------
        volume, baseline, out, bessel, usable
            As for `subtract`; a volume that is not usable leaves *ring* as it is, too.
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

    def update_design(
        self,
        known: Array,
        pose: Array,
        whitening: Array,
        contrasts: Contrasts,
        state: DesignState,
        step: DesignStep,
        row: Array,
        *,
        motion_at: int,
        usable: Array | None = None,
    ) -> None:
        """Take a volume's row into the design, by Givens rotations.

        Parameters
        ----------
        known : (p,) float64
            The row, as far as it was known before the volume.
        pose : (8,) float64 or longer
            As `POSE_FIELDS`: where motion is from.
        whitening : (2 * n_classes,) float64
            For each class the weights of this row and, to be subtracted, of the one before.
        contrasts : Contrasts
        state : DesignState
            Updated.
        step : DesignStep
            Overwritten: what `update_glm` needs.
        row : (p,) float64
            Overwritten with the row, motion filled in, whether it is usable or not.
        motion_at : int
            The first of six columns of motion (mm along, radians about x, y, z), or -1.
        usable : (1,) float32, optional
            0 leaves state and step as they are; None says 1.
        """
        ...

    def update_glm(
        self,
        volume: Array,
        state: GlmState,
        contrasts: Contrasts,
        step: DesignStep,
        statistics: Array,
        *,
        whitened: bool,
        first_column: int,
        usable: Array | None = None,
    ) -> None:
        """Take a volume into the fit, and test all contrasts, in one pass.

        Parameters
        ----------
        volume : (n,) float32
            Scanner units.
        state : GlmState
            Updated.
        contrasts, step
            As `update_design` left them for this volume.
        statistics : (n_contrasts, n) float32
            Overwritten with t or F, in a volume's order; 0 where a contrast cannot be estimated,
            there are no degrees of freedom, or the residuals are 0.
        whitened : bool
            Whether to whiten, and whether voxels have classes and an order of their own.
        first_column : int
            No contrast weighs a column before it.
        usable : (1,) float32, optional
            0 leaves everything as it is; None says 1.
        """
        ...

    def remove_slow(
        self,
        volume: Array,
        slow: Array,
        level: Array,
        gains: Array,
        out: Array,
        *,
        usable: Array | None = None,
    ) -> None:
        """Subtract the slow mean from *volume* and add its level; then fold *volume* into both.

        Parameters
        ----------
        volume : (n,) float32
            Scanner units.
        slow, level : (n,) float32
            Means of the volumes before; updated as ``mean += gain * (volume - mean)``.
        gains : (2,) float64
            Weights of this volume in the two; 0 leaves the level as it is.
        out : (n,) float32
            Overwritten with ``volume - (slow - level)``.
        usable : (1,) float32, optional
            0 leaves both means as they are; None says 1.
        """
        ...

    def remove_fit(
        self, volume: Array, coordinates: Array, directions: Array, scales: Array, out: Array
    ) -> None:
        """Subtract from *volume* the part of a fit that a t contrast stands for.

        Parameters
        ----------
        volume : (n,) float32
            Scanner units.
        coordinates : (p, n) float32
            Of a `GlmState`, as `update_glm` left them.
        directions : (p,) float32
            Of the contrast, in a `DesignStep`.
        scales : (1,) float64
            Of the contrast, in a `DesignStep`; 0 where it cannot be estimated.
        out : (n,) float32
            Overwritten with ``volume - scales[0] * (directions @ coordinates)``; may not be
            *volume*.
        """
        ...

    def roi_means(self, volume: Array, rois: RoiTable, means: Array) -> None:
        """Write the weighted mean of *volume* in each ROI into *means*, (n_rois,) float64."""
        ...


def new_design(
    backend: Backend, n_classes: int, n_rows: int, n_columns: int
) -> tuple[DesignState, DesignStep]:
    """Return a design without a row yet, of contrasts with *n_rows* rows in all."""
    new, p = backend.zeros, n_columns
    state = DesignState(
        *(new((n_classes, *shape), np.float64) for shape in ((p, p), (p,), (p,), (2,)))
    )
    step = DesignStep(
        *(new((n_classes, *shape), np.float64) for shape in ((n_rows, p), (n_rows,))),
        *(new((n_classes, *shape)) for shape in ((p, 2), (n_rows, p), (4,))),
    )
    return state, step


def new_fit(
    backend: Backend, n_columns: int, labels: NDArray[np.int32], *, whitened: bool = False
) -> GlmState:
    """Return a fit without a volume yet; voxel v of a volume is of noise class *labels[v]*."""
    new, n = backend.zeros, labels.size
    order = np.argsort(labels, kind="stable").astype(np.int32)
    where = (backend.copy(a) for a in (order, labels[order], _parts_of(labels[order])))
    previous = new(n if whitened else 1)  # not read else
    return GlmState(new((n_columns, n)), new(n), new(n), previous, *where)


def _parts_of(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return class, start and stop of runs of one label, each at most `PART_VOXELS` long."""
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    stops = np.append(starts[1:], len(labels))
    return np.array(
        [
            (labels[start], first, min(first + PART_VOXELS, stop))
            for start, stop in zip(starts, stops, strict=True)
            for first in range(start, stop, PART_VOXELS)
        ],
        np.int32,
    ).reshape(-1, 3)


def exercise(backend: Backend, dtype: Any) -> None:
    """Take one voxel through every operation: what `Backend.warm` does.

    In a pipeline, volumes of *dtype* meet `smooth`, `retime`, `gather` and `inspect`; all others
    get float32.
    """
    raw, one = backend.upload(np.zeros(1, dtype)), (1, 1, 1)
    region = Region(*(backend.zeros(n, np.int32) for n in ((1, 3), 1, 1)))
    voxel, out = backend.zeros(1), backend.zeros(1)
    for volume in (raw, voxel):
        for step in (one, (2, 2, 2)):
            backend.smooth(volume, one, (voxel,) * 3, backend.zeros(2), out, step=step)
        backend.gather(volume, region, None, out)
    backend.gather(voxel, region, backend.zeros(1), out)
    backend.retime(raw, backend.zeros((1, 1), dtype), 0, one, backend.zeros((2, 1)), out)
    backend.inspect(raw, one, backend.zeros((2, 4), np.float64))
    singles = [backend.zeros(shape) for shape in ((3, 1), 1, (7, 1))]
    doubles = [backend.zeros(shape, np.float64) for shape in ((7, 7), (2, 3, 4), (2, 3, 4))]
    fields, places, sums = (backend.zeros(n, np.float64) for n in (len(POSE_FIELDS), 12, 64))
    pose = Pose(fields, places, sums, backend.zeros(1, np.int32))
    template = Template(*singles, *doubles)
    backend.register(voxel, one, template, pose, max_iterations=1, tolerance_mm=1.0)
    for interpolation in get_args(Interpolation):
        backend.reslice(voxel, one, places, interpolation, region, out)
    sums, usable = backend.zeros(2, np.float64), backend.zeros(1)
    moments = Moments(backend.zeros(1), backend.zeros(1))
    backend.compare(voxel, backend.zeros(1), sums)
    backend.judge(sums, backend.zeros((2, 2), np.float64), usable)
    gains = {"usable": usable, "gain": 1.0, "successive_gain": 1.0}
    backend.track(voxel, backend.zeros(1), moments, backend.zeros(1), **gains)
    maps, ring = Subtraction(*(backend.zeros(1) for _ in range(3))), backend.zeros((2, 1))
    backend.slide(voxel, moments, ring, 0, maps, bessel=0.0, gain=1.0, full=False)
    backend.refresh(ring, moments, 0, 1)
    backend.contrast(moments, 2.0, moments, 2.0, Contrast(*maps))
    contrasts = Contrasts(
        backend.zeros((1, 1), np.float64), *(backend.zeros(n, np.int32) for n in (2, 1))
    )
    state, told = new_design(backend, n_classes=1, n_rows=1, n_columns=1)
    row, whitening = backend.zeros(1, np.float64), backend.zeros(2, np.float64)
    given = row, fields, whitening, contrasts, state, told
    backend.update_design(*given, backend.zeros(1, np.float64), motion_at=-1)
    for n in (1, 8 * PART_VOXELS):  # few voxels and many may have kernels of their own
        many, means, variances, *others = (backend.zeros(n) for _ in range(6))
        each = Moments(means, variances)
        backend.subtract(many, each, Subtraction(*others), bessel=0.0, into=None, gain=0.0)
        backend.fold(many, each, gain=1.0)
        fit = new_fit(backend, 1, np.zeros(n, np.int32))
        asked = fit, contrasts, told, backend.zeros((1, n))
        backend.update_glm(backend.zeros(n), *asked, whitened=False, first_column=0)
    backend.remove_fit(voxel, backend.zeros((1, 1)), told.directions[0, 0], told.scales[0], out)
    backend.remove_slow(voxel, backend.zeros(1), backend.zeros(1), whitening, out)
    offsets, voxels = (backend.copy(np.arange(n, dtype=np.int32)) for n in (2, 1))
    means = backend.zeros(1, np.float64)
    backend.roi_means(voxel, RoiTable(offsets, voxels, backend.zeros(1)), means)


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

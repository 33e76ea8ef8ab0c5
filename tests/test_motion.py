"""Motion estimation: synthetic heads with known motion, float64, python-rtspm, a real run."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from epi import Floats, a_grid, centre, deviation_mm, epi, rigid
from reference import U
from rtfmri.backends import POSE_FIELDS, Backend, Pose, Template, open_backend
from rtfmri.errors import ConfigError, VolumeError
from rtfmri.readers import open_reader
from rtfmri.stages.motion import MAX_ITERATIONS, MotionStage, MotionValue, bspline_taps
from rtfmri.volume import Grid, Volume

GRID = a_grid()
SLAB = a_grid((26, 26, 18))  # inside the head, for what takes long
PARAMETERS = ("x", "y", "z", "rx", "ry", "rz")


def a_stage(backend: Backend | None = None, grid: Grid = GRID) -> MotionStage:
    stage = MotionStage(backend or open_backend("cpu"), grid)
    stage.set_reference(epi(grid))
    return stage


def pushed(
    stage: MotionStage, volume: NDArray[Any], backend: Backend | None = None
) -> MotionValue:
    backend = backend or open_backend("cpu")
    stage.push(backend.upload(volume))
    return stage.result(backend.fetch(stage.pose.fields))


def state(stage: MotionStage, backend: Backend) -> list[NDArray[Any]]:
    return [backend.download(array) for array in (stage.pose.fields, stage.pose.matrix)]


# --- where the head is


def test_a_known_motion_is_found(backend: Backend) -> None:
    stage = MotionStage(backend, SLAB)
    stage.set_reference(epi(SLAB, noise_sd=4))
    motion = rigid(SLAB, (0.4, -0.7, 0.3), (0.5, -0.2, 0.6))
    value = pushed(stage, epi(SLAB, motion, noise_sd=4, seed=1), backend)
    assert value.converged
    assert deviation_mm(value.affine, motion, SLAB) < 0.02
    assert value.inside > 0.95
    assert value.residual < 0.1
    # The matrix for reslicing is the same, in voxels.
    matrix = backend.download(stage.pose.matrix).reshape(3, 4)
    wanted = np.linalg.inv(SLAB.affine) @ value.affine @ SLAB.affine
    assert matrix == pytest.approx(wanted[:3], abs=1e-9)


@pytest.mark.parametrize("parameter", range(6), ids=PARAMETERS)
def test_each_parameter_is_the_one_it_is_called(parameter: int) -> None:
    true = np.zeros(6)
    true[parameter] = 1.5
    value = pushed(a_stage(), epi(GRID, rigid(GRID, true[:3], true[3:]), seed=1))
    assert value.parameters == pytest.approx(true, abs=0.02)
    assert deviation_mm(value.affine, rigid(GRID, true[:3], true[3:]), GRID) < 0.02


def test_a_point_of_the_head_is_where_the_affine_says() -> None:
    # A bright voxel-sized spot, found by its centre of gravity: no convention is assumed.
    motion = rigid(GRID, (3, -2, 1), (2, 3, -4))
    value = pushed(a_stage(), epi(GRID, motion, seed=1))
    spot = np.append(centre(GRID) + np.array([20, -30, 15]), 1)
    voxels = np.vstack([np.indices(GRID.shape).reshape(3, -1), np.ones(GRID.n_voxels)])

    def seen_at(truth: Floats) -> Floats:
        places = GRID.affine @ voxels
        there = truth @ spot
        weights = np.exp(-((places - there[:, None]) ** 2).sum(0) / (2 * 6.0**2))
        centre_of_gravity: Floats = places @ weights / weights.sum()
        return centre_of_gravity

    assert value.affine @ seen_at(np.eye(4)) == pytest.approx(seen_at(motion), abs=0.05)


@pytest.mark.parametrize("signs", [(1, 1, 1, 1, 1, 1), (-1, 1, -1, 1, -1, -1)])
def test_a_jump_of_6_mm_and_6_degrees_is_found_at_once(signs: tuple[int, ...]) -> None:
    jump = 6.0 * np.array(signs)
    motion = rigid(GRID, jump[:3], jump[3:])
    value = pushed(a_stage(), epi(GRID, motion, seed=1))
    assert value.converged
    assert value.n_iterations < MAX_ITERATIONS
    assert deviation_mm(value.affine, motion, GRID) < 0.02


def test_activation_is_not_taken_for_motion() -> None:
    motion = rigid(GRID, (0.5, -0.3, 0.2), (0.4, 0.3, -0.5))
    value = pushed(a_stage(), epi(GRID, motion, blob_percent=4, seed=1))
    assert deviation_mm(value.affine, motion, GRID) < 0.03


def test_the_signal_may_change_as_a_whole() -> None:
    motion = rigid(GRID, (0.5, -0.3, 0.2), (0.4, 0.3, -0.5))
    value = pushed(a_stage(), epi(GRID, motion, scale=1.8, seed=1))
    assert value.converged
    assert value.scale == pytest.approx(1.8, rel=2e-3)
    assert deviation_mm(value.affine, motion, GRID) < 0.02


@pytest.mark.parametrize("size_mm", [(3.0, 3.0, 6.0), (2.2, 2.2, 2.2), (1.4, 4.0, 1.4)])
def test_other_voxels(size_mm: tuple[float, float, float]) -> None:
    shape = tuple(int(150 / mm) for mm in size_mm)
    grid = a_grid((shape[0], shape[1], shape[2]), size_mm)
    stage = a_stage(grid=grid)
    motion = rigid(grid, (0.4, -0.7, 0.3), (0.5, -0.2, 0.6))
    value = pushed(stage, epi(grid, motion, seed=1))
    assert value.converged
    assert deviation_mm(value.affine, motion, grid) < 0.03


def test_the_type_of_the_voxels_changes_nothing() -> None:
    motion = rigid(GRID, (0.5, -0.3, 0.2), (0.4, 0.3, -0.5))
    poses = []
    for dtype in ("int16", "uint16", "float32"):
        stage = a_stage()
        pushed(stage, epi(GRID, motion, dtype=dtype, seed=1))
        poses.append(stage.pose.fields)
    assert np.array_equal(poses[0], poses[1])
    assert np.array_equal(poses[0], poses[2])


# --- displacement


def power_mm(before: MotionValue, after: MotionValue) -> float:
    """Power 2012: absolute changes, rotations as arcs of 50 mm."""
    shift = np.subtract(after.translation_mm, before.translation_mm)
    turn = np.radians(np.subtract(after.rotation_deg, before.rotation_deg))
    return float(np.abs(shift).sum() + 50 * np.abs(turn).sum())


def test_displacement_is_from_the_last_volume_that_was_found() -> None:
    stage = a_stage()
    steps = [
        ((0, 0, 0), (0, 0, 0)),
        ((0.3, -0.5, 0.8), (0.6, -0.4, 0.2)),
        ((2, 1, -1), (-3, 2, 4)),
    ]
    values = [pushed(stage, epi(GRID, rigid(GRID, *step), seed=i)) for i, step in enumerate(steps)]
    assert values[0].fd_mm == values[0].fd_jenkinson_mm == 0
    for before, after in itertools.pairwise(values):
        assert after.fd_mm == pytest.approx(power_mm(before, after), rel=1e-9)
        moved = deviation_mm(after.affine, before.affine, GRID, radius_mm=80)
        assert after.fd_jenkinson_mm == pytest.approx(moved, rel=1e-9)
    lost = pushed(stage, np.zeros(GRID.n_voxels, np.int16))
    assert lost.fd_mm == lost.fd_jenkinson_mm == 0
    again = pushed(stage, epi(GRID, rigid(GRID, *steps[1]), seed=9))
    assert again.fd_mm == pytest.approx(power_mm(values[2], again), rel=1e-9)


def test_the_first_volume_has_no_displacement_wherever_it_is() -> None:
    value = pushed(a_stage(), epi(GRID, rigid(GRID, (3, 2, 1), (1, 2, 3)), seed=1))
    assert value.converged
    assert value.fd_mm == value.fd_jenkinson_mm == 0


# --- volumes that cannot be registered


def bad_volume(kind: str) -> NDArray[Any]:
    match kind:
        case "zeros":
            return np.zeros(GRID.n_voxels, np.int16)
        case "flat":
            return np.full(GRID.n_voxels, 700, np.int16)
        case "saturated":
            return np.full(GRID.n_voxels, 32767, np.int16)
        case "not a number":
            return np.full(GRID.n_voxels, np.nan, np.float32)
        case "infinite":
            return np.full(GRID.n_voxels, np.inf, np.float32)
        case "noise":
            return np.random.default_rng(3).integers(0, 2000, GRID.n_voxels, dtype=np.int16)
        case "outside":
            return epi(GRID, rigid(GRID, (0, 0, 150), (0, 0, 0)))
        case "too bright":
            return epi(GRID, scale=5)
        case _:
            return epi(GRID, noise_sd=1500)


@pytest.mark.parametrize(
    "kind",
    [
        *("zeros", "flat", "saturated", "not a number", "infinite"),
        *("noise", "outside", "too bright", "buried in noise"),
    ],
)
def test_a_bad_volume_is_flagged_and_leaves_no_trace(kind: str) -> None:
    cpu = open_backend("cpu")
    first, second = (rigid(GRID, (k, -0.5, 0.3), (0.5, k, -0.4)) for k in (0.4, 0.7))
    stage, undisturbed = a_stage(), a_stage()
    for each in (stage, undisturbed):
        before = pushed(each, epi(GRID, first, seed=1))
    bad = pushed(stage, bad_volume(kind))
    assert not bad.converged
    assert bad.fd_mm == bad.fd_jenkinson_mm == 0
    assert np.array_equal(bad.affine, before.affine)
    assert bad.scale == before.scale
    assert np.array_equal(stage.pose.matrix, undisturbed.pose.matrix)
    for each in (stage, undisturbed):
        after = pushed(each, epi(GRID, second, seed=2))
        assert after.converged
    for one, other in zip(state(stage, cpu), state(undisturbed, cpu), strict=True):
        assert np.array_equal(one, other)


def test_a_few_voxels_that_are_not_numbers_do_no_harm() -> None:
    motion = rigid(GRID, (0.5, -0.3, 0.2), (0.4, 0.3, -0.5))
    volume = epi(GRID, motion, dtype=np.float32, seed=1)
    volume[np.random.default_rng(0).integers(0, volume.size, 20)] = np.nan
    value = pushed(a_stage(), volume)
    assert value.converged
    assert value.inside < 1
    assert deviation_mm(value.affine, motion, GRID) < 0.02


# --- references


@pytest.mark.parametrize("value", [0, 1000, np.nan])
def test_a_reference_without_contrast_is_refused(value: float) -> None:
    stage = a_stage()
    motion = rigid(GRID, (0.5, -0.3, 0.2), (0.4, 0.3, -0.5))
    with pytest.raises(VolumeError, match="reference must have contrast in at least 200 places"):
        stage.set_reference(np.full(GRID.n_voxels, value, np.float32))
    assert deviation_mm(pushed(stage, epi(GRID, motion)).affine, motion, GRID) < 0.02


def test_a_reference_that_looks_alike_along_an_axis_is_refused() -> None:
    x, _, _ = np.indices(GRID.shape)
    rods = (1000 + 300 * np.sin(x)).astype(np.float32).reshape(-1, order="F")
    with pytest.raises(VolumeError, match="tell all directions apart"):
        a_stage().set_reference(rods)


@pytest.mark.parametrize("shape", [(64, 64, 1), (7, 64, 36), (1, 1, 1)])
def test_grids_that_are_too_small_are_refused(shape: tuple[int, int, int]) -> None:
    grid = a_grid(shape)
    assert not MotionStage.possible(grid)
    with pytest.raises(ConfigError, match="at least 8 voxels along each axis"):
        MotionStage(open_backend("cpu"), grid)


def test_a_new_reference_starts_anew() -> None:
    stage = a_stage()
    pushed(stage, epi(GRID, rigid(GRID, (2, 1, 0), (0, 0, 2)), seed=1))
    moved = epi(GRID, rigid(GRID, (1, -1, 1), (1, 0, 0)), seed=2)
    stage.set_reference(moved)
    value = pushed(stage, moved)
    assert value.fd_mm == 0
    assert deviation_mm(value.affine, np.eye(4), GRID) < 1e-4


def test_the_inverse_of_the_b_spline() -> None:
    taps = bspline_taps().astype(np.float64)
    whole = np.convolve(np.concatenate([taps[:0:-1], taps]), np.array([1, 4, 1]) / 6)
    # Taps are rounded to float32 and cut off where they are 1.3e-8 of the middle one.
    assert whole == pytest.approx(np.eye(whole.size)[whole.size // 2], abs=2 * U)


# --- the operation itself


def spline(t: Floats) -> Floats:
    """Cubic B-spline: the third convolution of a box with itself."""
    t = np.abs(t)
    near, far = 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, near, far)


def spline_at(coefficients: NDArray[Any], points: NDArray[Any]) -> Floats:
    """Value of the B-spline with *coefficients* (x, y, z) at *points* (3, n)."""
    knots = [
        spline(np.arange(m)[:, None] - q)
        for m, q in zip(coefficients.shape, points.astype(np.float64), strict=True)
    ]
    value: Floats = np.einsum("ijk,in,jn,kn->n", coefficients.astype(np.float64), *knots)
    return value


def a_problem(n: int, seed: int = 0) -> tuple[NDArray[np.float32], tuple[int, int, int], Template]:
    """Return coefficients, their shape, and *n* points, one of which is outside after the move."""
    rng = np.random.default_rng(seed)
    shape = (9, 8, 7)
    coefficients = rng.uniform(500, 1500, shape).astype(np.float32)
    points = rng.uniform(2, np.array(shape)[:, None] - 3, (3, n)).astype(np.float32)
    points[:, n // 2] = 50
    jacobian = rng.normal(0, 1, (7, n)).astype(np.float32)
    values = (spline_at(coefficients, points) + rng.normal(0, 30, n)).astype(np.float32)
    j = jacobian.astype(np.float64)
    fine = np.hstack([np.diag([3.0, 2.0, 4.0]), [[-12.0], [-7.0], [-11.0]]])
    back = np.hstack([np.diag([1 / 3, 1 / 2, 1 / 4]), [[4.0], [3.5], [2.75]]])
    hessian = np.linalg.inv(j @ j.T + np.eye(7)) * 1e-3  # small steps
    template = Template(
        points, values, jacobian, hessian, np.stack([fine] * 2), np.stack([back] * 2)
    )
    return coefficients.reshape(-1, order="F"), shape, template


def solved(
    backend: Backend, problem: Any, max_iterations: int, tolerance_mm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    coefficients, shape, template = problem
    n = template.values.size
    at_rest = [1, 0, 0, 0, 0, 0, 0, 1]
    still = np.eye(3, 4).ravel()
    sums = np.array([*at_rest, *at_rest, 1, *still, 0, *[0] * 11 * -(-n // 256)], np.float64)
    fields, counter = backend.zeros(len(POSE_FIELDS), np.float64), backend.zeros(1, np.int32)
    pose = Pose(fields, backend.copy(still), backend.copy(sums), counter)
    backend.register(
        backend.copy(coefficients),
        shape,
        Template(*(backend.copy(part) for part in template)),
        pose,
        max_iterations=max_iterations,
        tolerance_mm=tolerance_mm,
    )
    return backend.download(pose.fields), backend.download(pose.matrix)


@pytest.mark.parametrize("n", [1, 31, 700])
def test_one_step_is_that_of_float64(backend: Backend, n: int) -> None:
    coefficients, shape, template = problem = a_problem(n)
    fields, _ = solved(backend, problem, 1, 1e9)
    got = dict(zip(POSE_FIELDS, fields, strict=False))
    inside = np.arange(n) != n // 2
    if n == 1:
        assert got["inside"] == got["converged"] == 0
        assert fields[:8].tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
        return
    c = coefficients.reshape(shape, order="F")
    f = spline_at(c, template.points[:, inside])
    e = f - template.values[inside]
    j = template.jacobian[:, inside].astype(np.float64)
    step = template.inverse_hessian @ j @ e
    # The place of a point has five roundings of terms of at most 3 * 9 voxels together, and no
    # slope exceeds half the largest difference of coefficients along each axis; a weight has
    # eight, on which 4 coefficients along an axis depend; the sums have 16; e has one more.
    largest = float(np.abs(c).max())
    slope = 3 * float(c.max() - c.min())
    error = U * (5 * 27 * slope + (16 + 3 * 4 * 8) * largest + np.abs(e))
    bound = 1.01 * np.abs(template.inverse_hessian @ j) @ error
    turn = np.array([1, *(-step[3:6] / 2)])
    assert fields[:4] == pytest.approx(turn / np.linalg.norm(turn), abs=bound[3:6].max())
    turned = step[:3] + np.cross(-step[3:6], step[:3])  # to first order in the angles
    second = np.linalg.norm(step[3:6]) ** 2 * np.linalg.norm(step[:3])
    assert np.abs(fields[4:7] + turned).max() <= bound[:3].max() + second
    assert got["scale"] == pytest.approx(1 + step[6], abs=bound[6])
    assert got["inside"] == inside.mean()
    residual = np.sqrt((e**2).mean()) / template.values[inside].std(dtype=np.float64)
    assert got["residual"] == pytest.approx(
        residual, rel=float(1.01 * error.max() / np.abs(e).mean())
    )
    assert got["n_iterations"] == 1


@pytest.mark.parametrize("n", [1, 256, 257, 700])
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(backend: Backend, n: int) -> None:
    problem = a_problem(n)
    for iterations, tolerance_mm in ((1, 1e9), (4, 1e-9)):
        wanted = solved(open_backend("cpu"), problem, iterations, tolerance_mm)
        for got, expected in zip(
            solved(backend, problem, iterations, tolerance_mm), wanted, strict=True
        ):
            assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_a_run_has_the_bits_of_numba(backend: Backend) -> None:
    cpu = open_backend("cpu")
    stages = a_stage(cpu, SLAB), a_stage(backend, SLAB)
    good = [epi(SLAB, rigid(SLAB, (k, 0.2, 0), (0, k, 0.3)), seed=1) for k in (0.3, 0.6)]
    for volume in (good[0], np.zeros_like(good[0]), good[1]):
        for stage, where in zip(stages, (cpu, backend), strict=True):
            pushed(stage, volume, where)
        for one, other in zip(state(stages[0], cpu), state(stages[1], backend), strict=True):
            assert np.array_equal(one, other)


def test_the_number_of_threads_changes_nothing() -> None:
    poses = []
    try:
        for threads in (1, None):
            backend = open_backend("cpu", threads)
            stage = a_stage(backend)
            pushed(stage, epi(GRID, rigid(GRID, (1, 2, 0), (1, 0, 1)), seed=1), backend)
            poses.append(stage.pose.fields)
        assert np.array_equal(*poses)
    finally:
        open_backend("cpu")


# --- others


def spm_realign(volumes: list[NDArray[Any]], affine: Floats) -> list[Floats]:
    """Return python-rtspm's pose T of each volume (x, y, z), the first being the reference."""
    rtspm = pytest.importorskip("rtspm")
    one_based = affine.copy()
    one_based[:3, 3] -= affine[:3, :3].sum(1)
    flags = {"quality": 1, "fwhm": 5, "sep": 4, "interp": 4, "wrap": np.zeros((3, 1))}
    shape = np.array(volumes[0].shape)

    def image(volume: NDArray[Any]) -> dict[str, Any]:
        voxels = np.asarray(volume, np.float64, order="F")
        return {"mat": one_based.copy(), "dim": shape, "Vol": voxels}

    reference, kept, poses = image(volumes[0]), [[]] * 6, []
    with np.errstate(invalid="ignore"):  # it compares the first volume with itself
        for i, volume in enumerate(volumes):
            pair = [reference, image(volume)]
            pair, *kept, _ = rtspm.spm_realign_rt(
                pair, {**flags, "lkp": np.arange(6)}, i, 0, *kept
            )
            # Its matrix takes voxels of this volume to mm of the reference.
            poses.append(one_based @ np.linalg.inv(pair[1]["mat"]))
    return poses


def test_it_is_no_less_accurate_than_spm() -> None:
    motions = [rigid(GRID, (0.5, -0.3, k), (0.4, k, -0.5)) for k in (0.1, 0.3, -0.2, -0.4)]
    volumes = [epi(GRID), *(epi(GRID, motion, seed=i) for i, motion in enumerate(motions, 1))]
    stage = a_stage()
    ours = [pushed(stage, volume).affine for volume in volumes[1:]]
    theirs = spm_realign([v.reshape(GRID.shape, order="F") for v in volumes], GRID.affine)[1:]
    errors = np.array(
        [
            [
                deviation_mm(found, motion, GRID)
                for found, motion in zip(poses, motions, strict=True)
            ]
            for poses in (ours, theirs)
        ]
    )
    mine, spms = np.sqrt((errors**2).mean(1))
    assert mine <= 1.1 * spms  # four volumes' noise


def test_it_agrees_with_spm_on_a_real_run() -> None:
    if not (root := os.environ.get("RTFMRI_TEST_DATA")):
        pytest.skip("RTFMRI_TEST_DATA is not set")
    folder = Path(root) / "siemens_mosaic_psc"
    items = (item for item in open_reader(str(folder)) if isinstance(item, Volume))
    volumes = list(itertools.islice(items, 0, 50, 6))
    grid = volumes[0].grid
    stage = MotionStage(open_backend("cpu"), grid)
    stage.set_reference(volumes[0].flat)
    theirs = spm_realign([volume.data for volume in volumes], grid.affine)
    for volume, affine in zip(volumes, theirs, strict=True):
        value = pushed(stage, volume.flat)
        assert value.converged
        apart = np.linalg.inv(affine) @ value.affine
        middle = np.append(centre(grid), 1)
        assert np.linalg.norm((apart @ middle - middle)[:3]) < 0.05
        angle_deg = np.degrees(np.linalg.norm(apart[:3, :3] - apart[:3, :3].T) / np.sqrt(8))
        assert angle_deg < 0.05

import numpy as np
import pytest

from rtfmri.errors import GridError, VolumeError
from rtfmri.volume import Grid, Volume, as_slice_times, as_voxels, unflatten

AFFINE = np.array([[-3.0, 0, 0, 90], [0, 2.9, -1, -80], [0, 0.8, 3.6, -70], [0, 0, 0, 1]])


def test_grid_knows_its_voxels() -> None:
    grid = Grid((64, 63, 36), AFFINE)
    assert grid.n_voxels == 64 * 63 * 36
    assert grid.voxel_size_mm == pytest.approx((3, np.hypot(2.9, 0.8), np.hypot(1, 3.6)))
    assert str(grid).startswith("64x63x36 voxels of 3x3.01x3.74 mm")


@pytest.mark.parametrize(
    ("shape", "affine", "words"),
    [
        ((64, 64), AFFINE, "three positive"),
        ((64, 0, 3), AFFINE, "three positive"),
        ((4, 4, 4), np.eye(3), "4x4"),
        ((4, 4, 4), np.full((4, 4), np.nan), "finite"),
        ((4, 4, 4), np.diag([1.0, 1, 0, 1]), "invertible"),
    ],
)
def test_grid_refuses_what_cannot_be(shape: tuple[int, ...], affine: object, words: str) -> None:
    with pytest.raises(GridError, match=words):
        Grid(shape, affine)  # type: ignore[arg-type]


def test_grids_match_within_header_rounding_only() -> None:
    grid = Grid((64, 64, 36), AFFINE)
    rounded, moved = AFFINE.copy(), AFFINE.copy()
    rounded[0, 0] += 1e-6
    moved[0, 0] += 1e-3
    assert grid.matches(Grid((64, 64, 36), rounded))
    assert not grid.matches(Grid((64, 64, 36), moved))
    assert not grid.matches(Grid((64, 64, 35), AFFINE))


def test_a_grid_cannot_be_changed() -> None:
    grid = Grid((4, 4, 4), AFFINE)
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 1


def test_flat_is_the_same_memory_x_fastest() -> None:
    data = np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    volume = Volume(data, Grid((2, 3, 4), AFFINE), 3, 2.0)
    assert np.shares_memory(volume.flat, data)
    assert volume.flat[1] == data[1, 0, 0]
    assert np.array_equal(unflatten(volume.flat, data.shape), data)
    assert volume.time_s == 6.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data": np.zeros((2, 3, 4), np.float64, order="F")},
            "int16, uint16, float32, got float",
        ),
        ({"data": np.zeros((2, 3, 4), np.int16)}, "Fortran"),
        ({"data": np.zeros((2, 3, 5), np.int16, order="F")}, r"\(2, 3, 5\).*\(2, 3, 4\)"),
        ({"data": np.zeros((2, 3, 4), ">i2", order="F")}, "dtype"),
        ({"index": -1}, "index"),
        ({"tr_s": 0.0}, "tr_s"),
        ({"tr_s": float("nan")}, "tr_s"),
        ({"slice_times_s": (0.0, 1.0)}, "each of 4 slices, got 2"),
        ({"slice_times_s": (0.0, 1.0, -0.1, 0.5)}, "slice_times_s must be finite and 0 or more"),
        ({"slice_times_s": (0.0, 1.0, 0.5, float("nan"))}, "slice_times_s must be finite"),
        ({"slice_times_s": (0.0, 1.0, 0.5, float("inf"))}, "slice_times_s must be finite"),
    ],
)
def test_volume_names_the_rule_it_breaks(changes: dict[str, object], words: str) -> None:
    good: dict[str, object] = {
        "data": np.zeros((2, 3, 4), np.int16, order="F"),
        "grid": Grid((2, 3, 4), AFFINE),
        "index": 0,
        "tr_s": 2.0,
    }
    with pytest.raises(VolumeError, match=words):
        Volume(**{**good, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ((0.0, 0.75, 0.37249999999), (0.0, 0.75, 0.3725)),
        ((0.0, 0.75), None),
        ((0.0, None, 0.75), None),
        ((0.0, 0.75, -0.1), None),
        ((0.0, 0.75, float("nan")), None),
        ((0.0, 0.0, 0.0), None),
        ((), None),
    ],
)
def test_as_slice_times_keeps_what_can_be(
    header: tuple[float | None, ...], kept: tuple[float, ...] | None
) -> None:
    assert as_slice_times(header, 3) == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("<i2", "int16"),
        (">i2", "int16"),
        (">u2", "uint16"),
        ("u1", "int16"),
        ("<f4", "float32"),
        ("f8", "float32"),
        ("i4", "float32"),
    ],
)
def test_as_voxels_keeps_what_kernels_take(given: str, kept: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(given)
    voxels = as_voxels(array)
    assert voxels.dtype == np.dtype(kept)
    assert voxels.dtype.isnative
    assert voxels.flags.f_contiguous
    assert np.array_equal(voxels, array)

"""Regions of a localiser: the best voxels, or the best cluster, within an anatomical mask."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import recordings
from rtfmri.config import GlmSettings
from rtfmri.errors import ConfigError, GridError, RecordingError
from rtfmri.export import to_nifti
from rtfmri.localiser import choose_region, localize, write_region
from rtfmri.readers.nifti import read_roi
from rtfmri.volume import Grid

SHAPE = (9, 8, 7)


def a_map() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def a_mask(seed: int = 1) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(SHAPE) < 0.4


@pytest.mark.parametrize("k", [1, 2, 30])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_largest_values_inside(k: int, order: Any) -> None:
    values, inside = np.array(a_map(), order=order), np.array(a_mask(), order=order)
    region = choose_region(values, inside, top_voxels=k)
    assert region.dtype == np.bool_
    assert region.sum() == k
    assert not (region & ~inside).any()
    assert values[region].min() > values[inside & ~region].max()


def test_all_voxels_inside() -> None:
    inside = a_mask()
    region = choose_region(a_map(), inside, top_voxels=int(inside.sum()))
    assert np.array_equal(region, inside)


@pytest.mark.parametrize("order", ["C", "F"])
def test_ties_are_broken_by_place(order: Any) -> None:
    """In the order of x, then y, then z, however the map lies in memory."""
    values = np.ones(SHAPE, np.float32, order=order)
    values[8, 7, 6] = 2
    inside = np.array(a_mask(), order=order)
    inside[8, 7, 6] = True
    region = choose_region(values, inside, top_voxels=5)
    assert np.array_equal(np.argwhere(region), np.argwhere(inside)[[0, 1, 2, 3, -1]])


def test_what_is_no_number_is_never_chosen() -> None:
    values, inside = a_map(), a_mask()
    values[inside & (a_mask(2) | a_mask(3))] = np.nan
    values[tuple(np.argwhere(inside)[0])] = np.inf
    n_known = int((inside & np.isfinite(values)).sum())
    region = choose_region(values, inside, top_voxels=n_known)
    assert np.isfinite(values[region]).all()
    with pytest.raises(ConfigError, match=f"top_voxels must be 1 to {n_known}, .*{n_known + 1}"):
        choose_region(values, inside, top_voxels=n_known + 1)
    region = choose_region(values, inside, above=~(values < 1))
    assert np.isfinite(values[region]).all()


def test_the_cluster_with_the_largest_peak() -> None:
    """Not the largest cluster, nor the one with the largest peak outside, nor a negative one."""
    values = np.zeros(SHAPE, np.float32)
    values[0:3, 0:3, 0:3] = 4
    values[5, 5, 2], values[6, 6, 3], values[7, 7, 4] = 5, 6, 4.5
    values[7, 0:4, 6] = 9
    values[5, 6, 3] = -20
    inside = np.ones(SHAPE, bool)
    inside[7, :, 6] = inside[7, 7, 4] = False
    region = choose_region(values, inside, above=np.abs(values) >= 3)
    assert np.argwhere(region).tolist() == [[5, 5, 2], [6, 6, 3]]


def test_of_equal_clusters_the_first() -> None:
    values = np.zeros(SHAPE, np.float32)
    values[6, 1, 1] = values[2, 5, 5] = 5
    region = choose_region(values, np.ones(SHAPE, bool), above=values > 3)
    assert np.argwhere(region).tolist() == [[2, 5, 5]]


@pytest.mark.parametrize("k", [0, -1, 10**6])
def test_numbers_of_voxels_that_cannot_be(k: int) -> None:
    inside = a_mask()
    with pytest.raises(ConfigError, match=f"1 to {inside.sum()}, .* inside the mask, got {k}"):
        choose_region(a_map(), inside, top_voxels=k)


def test_nothing_above() -> None:
    inside = a_mask()
    for values, above in (
        (a_map(), np.zeros(SHAPE, bool)),
        (a_map(), ~inside),
        (-np.abs(a_map()), np.ones(SHAPE, bool)),
    ):
        with pytest.raises(ConfigError, match="above must have a positive voxel inside the mask"):
            choose_region(values, inside, above=above)


def test_one_way_to_choose() -> None:
    with pytest.raises(ConfigError, match=r"either top_voxels or above .* got neither"):
        choose_region(a_map(), a_mask())
    with pytest.raises(ConfigError, match=r"either top_voxels or above .* got both"):
        choose_region(a_map(), a_mask(), top_voxels=3, above=a_mask(2))


def test_shapes_must_agree() -> None:
    small = np.ones((2, 2, 2), bool)
    with pytest.raises(GridError, match=r"inside must be of shape .* got \(2, 2, 2\)"):
        choose_region(a_map(), small, top_voxels=3)
    with pytest.raises(GridError, match=r"above must be of shape .* got \(2, 2, 2\)"):
        choose_region(a_map(), a_mask(), above=small)
    with pytest.raises(GridError, match=r"region must be of shape \(9, 8, 7\), got \(2, 2, 2\)"):
        write_region("region.nii", small, Grid(SHAPE, np.eye(4)))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_region_is_read_back_as_it_was(tmp_path: Path, suffix: str) -> None:
    affine = np.array([[-2, 0.3, 0, 9], [0.2, 2, -0.4, -20], [0, 0.5, 3, 4], [0, 0, 0, 1]])
    grid, region = Grid(SHAPE, affine), choose_region(a_map(), a_mask(), top_voxels=20)
    write_region(tmp_path / f"motor{suffix}", region, grid)
    assert np.array_equal(read_roi(tmp_path / f"motor{suffix}", grid), region)


def test_a_region_is_a_nifti_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in .nii or .nii.gz, got .*motor.mat"):
        write_region(tmp_path / "motor.mat", a_mask(), Grid(SHAPE, np.eye(4)))


# --- out of a recording


@pytest.mark.parametrize("broken", [False, True])
def test_a_recording_gives_a_region(tmp_path: Path, broken: bool) -> None:
    # A run that goes on, or was cut off, will do.
    run = recordings.volumes(40)
    pipeline = recordings.record(tmp_path / "r.h5", run, broken=broken)
    name, n = localize(tmp_path / "r.h5", tmp_path / "roi.nii", top_voxels=20)
    assert (name, n) == ("left hand", 20)
    region = read_roi(tmp_path / "roi.nii", recordings.GRID) > 0
    t = pipeline.glm_maps()["left hand"].statistic
    assert t[region].min() >= np.sort(t.ravel())[-20]
    assert (region & (recordings.roi() > 0)).sum() >= 18
    name, n = localize(tmp_path / "r.h5", tmp_path / "blob.nii.gz", method="bonferroni")
    cluster = read_roi(tmp_path / "blob.nii.gz", recordings.GRID) > 0
    assert n == cluster.sum()
    assert (cluster & (recordings.roi() > 0)).sum() >= 0.8 * n


def test_an_anatomical_mask_bounds_the_region(tmp_path: Path) -> None:
    recordings.record(tmp_path / "r.h5", recordings.volumes(40))
    half = recordings.roi()
    half[4:] = 0
    to_nifti(half, recordings.GRID).to_filename(tmp_path / "half.nii.gz")
    localize(tmp_path / "r.h5", tmp_path / "roi.nii", inside=tmp_path / "half.nii.gz")
    region = read_roi(tmp_path / "roi.nii", recordings.GRID) > 0
    assert region.any()
    assert not (region & ~(half > 0)).any()


def test_what_no_region_can_be_made_of(tmp_path: Path) -> None:
    settings = GlmSettings(
        contrasts={"left": "left hand"}, f_contrasts={"any": ("left hand", "drift_1")}
    )
    recordings.record(tmp_path / "r.h5", recordings.volumes(80), glm=settings)
    recordings.record(tmp_path / "rest.h5", recordings.volumes(10), events=())
    out = tmp_path / "roi.nii"
    for path, given, words in (
        ("r.h5", {"contrast": "right"}, "contrast must be one of left, any; got 'right'"),
        ("r.h5", {"contrast": "any"}, "contrast must be of kind t, 'any' is F"),
        ("rest.h5", {}, "has no contrasts"),
        ("r.h5", {"method": "z", "level": 19}, "got none: lower the threshold"),
        ("r.h5", {"top_voxels": 10**6}, "top_voxels must be 1 to"),
    ):
        with pytest.raises(ConfigError, match=words):
            localize(tmp_path / path, out, **given)
        assert not out.exists()
    out.write_text("mine")
    with pytest.raises(RecordingError, match="exists already"):
        localize(tmp_path / "r.h5", out, top_voxels=5)
    with pytest.raises(RecordingError, match="cannot write the region"):
        localize(tmp_path / "r.h5", tmp_path / "no" / "roi.nii", top_voxels=5)
    assert out.read_text() == "mine"

"""NIfTI runs and ROI images: voxels, order, repetition time, grids, and broken files."""

import gzip
import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dicom_files import mosaic, oblique_grid, real_data, to_bytes, voxels
from rtfmri.errors import ConfigError, SourceError
from rtfmri.readers import Skipped, open_reader
from rtfmri.readers.dicom import decode
from rtfmri.readers.nifti import read_mask, read_reference, read_roi
from rtfmri.volume import Grid, Volume

GRID = oblique_grid()


def run_of(n_volumes: int, dtype: type = np.int16) -> np.ndarray:
    return np.stack([voxels(GRID, i, dtype) for i in range(n_volumes)], axis=-1)


def write(path: Path, data: np.ndarray, tr: float = 2.0, unit: str = "sec") -> Path:
    image = nibabel.Nifti1Image(data, GRID.affine)
    if data.ndim == 4:
        image.header.set_zooms((*GRID.voxel_size_mm, tr))
        image.header.set_xyzt_units("mm", unit)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_4d_file_gives_its_volumes_as_stored(tmp_path, suffix, dtype):
    data = run_of(5).astype(dtype)
    reader = open_reader(str(write(tmp_path / f"run{suffix}", data)))
    assert (reader.live, reader.n_volumes) == (False, 5)
    volumes = list(reader)
    for i, volume in enumerate(volumes):
        np.testing.assert_array_equal(volume.data, data[..., i])
        assert volume.data.dtype == dtype
        assert volume.data.flags.writeable
        assert (volume.index, volume.tr_s) == (i, 2.0)
        # The file keeps the affine in float32: 6e-8 of 50 mm.
        assert volume.grid.matches(GRID)
        assert volume.arrived_s <= volume.decoded_s
    assert len(volumes) == 5


def test_big_endian_and_scaled_files(tmp_path):
    data = run_of(2)
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(data, GRID.affine, header)
    image.header.set_zooms((*GRID.voxel_size_mm, 2.0))
    nibabel.save(image, tmp_path / "big.nii")
    volumes = list(open_reader(str(tmp_path / "big.nii")))
    np.testing.assert_array_equal(volumes[1].data, data[..., 1])
    assert volumes[1].data.dtype.isnative
    image.header.set_slope_inter(0.5, 3.0)
    nibabel.save(image, tmp_path / "scaled.nii")
    stored = nibabel.load(tmp_path / "scaled.nii")
    volumes = list(open_reader(str(tmp_path / "scaled.nii")))
    assert volumes[1].data.dtype == np.float32
    expected = stored.get_fdata()[..., 1].astype(np.float32)
    np.testing.assert_array_equal(volumes[1].data, expected)


@pytest.mark.parametrize(("tr", "unit"), [(2.5, "sec"), (2500.0, "msec"), (2.5e6, "usec")])
def test_tr_in_each_unit(tmp_path, tr, unit):
    source = str(write(tmp_path / "run.nii", run_of(2), tr, unit))
    assert [v.tr_s for v in open_reader(source)] == [2.5, 2.5]
    assert [v.tr_s for v in open_reader(source, tr_s=0.5)] == [0.5, 0.5]


@pytest.mark.parametrize(("tr", "unit"), [(0.0, "sec"), (2500.0, "sec"), (2.5, "hz")])
def test_unusable_tr_must_be_given(tmp_path, tr, unit):
    source = str(write(tmp_path / "run.nii", run_of(2), tr, unit))
    with pytest.raises(SourceError, match="--tr"):
        open_reader(source)
    assert len(list(open_reader(source, tr_s=1.0))) == 2


TIMES_S = (0.0, 1.0, 0.25, 1.25, 0.5, 1.5, 0.75)


def write_timed(path: Path, data: np.ndarray, per_second: float, unit: str) -> Path:
    """Write a run whose header says that odd slices were taken first, 0.25 s each."""
    image = nibabel.Nifti1Image(data, GRID.affine)
    image.header.set_zooms((*GRID.voxel_size_mm, 2.0 * per_second)[: data.ndim])
    image.header.set_xyzt_units("mm", unit)
    image.header.set_dim_info(slice=2)
    image.header.set_slice_duration(0.25 * per_second)
    image.header["slice_code"] = 3  # alternating, increasing
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize(("per_second", "unit"), [(1.0, "sec"), (1e3, "msec"), (1e6, "usec")])
def test_slice_times_of_a_header(tmp_path, per_second, unit):
    run = write_timed(tmp_path / "run.nii", run_of(2), per_second, unit)
    assert [v.slice_times_s for v in open_reader(str(run))] == [TIMES_S] * 2
    (tmp_path / "run.json").write_text('{"SliceTiming": [0, 0, 0, 1, 1, 1, 1]}')
    assert [v.slice_times_s for v in open_reader(str(run))] == [TIMES_S] * 2
    (tmp_path / "folder").mkdir()
    for i in range(2):
        write_timed(tmp_path / "folder" / f"{i}.nii", run_of(1)[..., 0], per_second, unit)
    volumes = open_reader(str(tmp_path / "folder"), tr_s=2.0)
    assert [v.slice_times_s for v in volumes] == [TIMES_S] * 2


def test_slices_along_another_axis_have_no_times(tmp_path):
    path = write_timed(tmp_path / "run.nii", run_of(2), 1.0, "sec")
    image = nibabel.load(path)
    image.header.set_dim_info(slice=1)
    nibabel.save(image, tmp_path / "other.nii")
    assert [v.slice_times_s for v in open_reader(str(tmp_path / "other.nii"))] == [None] * 2


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("sidecar", "wanted"),
    [
        ({"SliceTiming": list(TIMES_S)}, TIMES_S),
        ({"SliceTiming": list(TIMES_S), "SliceEncodingDirection": "k"}, TIMES_S),
        ({"SliceTiming": list(TIMES_S), "SliceEncodingDirection": "k-"}, TIMES_S[::-1]),
        ({"SliceTiming": list(TIMES_S), "SliceEncodingDirection": "j"}, None),
        ({"SliceTiming": list(TIMES_S[1:])}, None),
        ({"SliceTiming": [*TIMES_S[1:], -1]}, None),
        ({"SliceTiming": [*TIMES_S[1:], "late"]}, None),
        ({"SliceTiming": "late"}, None),
        ({"SliceTiming": 1.0}, None),
        ({"SliceTiming": [0] * 7}, None),
        ({}, None),
        ([], None),
    ],
)
def test_slice_times_of_a_sidecar(tmp_path, sidecar, wanted, suffix):
    source = str(write(tmp_path / f"sub-01_bold{suffix}", run_of(2)))
    assert [v.slice_times_s for v in open_reader(source)] == [None] * 2
    (tmp_path / "sub-01_bold.json").write_text(json.dumps(sidecar))
    assert [v.slice_times_s for v in open_reader(source)] == [wanted] * 2
    (tmp_path / "sub-01_bold.json").write_bytes(b"\xff no JSON")
    assert [v.slice_times_s for v in open_reader(source)] == [None] * 2


def test_folder_of_3d_files_comes_in_natural_order(tmp_path):
    data = run_of(11)
    for i in range(11):
        write(tmp_path / f"vol{i + 1}.nii{'.gz' if i % 2 else ''}", data[..., i])
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / ".hidden.nii").write_text("nothing")
    with pytest.raises(SourceError, match="--tr"):
        open_reader(str(tmp_path))
    reader = open_reader(str(tmp_path), tr_s=2.0)
    skipped, *volumes = reader
    assert skipped == Skipped("notes.txt", "is not NIfTI")
    assert reader.n_volumes == len(volumes) == 11
    for i, volume in enumerate(volumes):
        assert volume.index == i
        np.testing.assert_array_equal(volume.data, data[..., i])


def test_broken_file_in_a_folder_is_skipped_in_its_place(tmp_path):
    for i in range(3):
        write(tmp_path / f"vol{i}.nii", run_of(1)[..., 0])
    whole = (tmp_path / "vol1.nii").read_bytes()
    for length in (0, 100, 348, len(whole) - 1):
        (tmp_path / "vol1.nii").write_bytes(whole[:length])
        first, broken, last = open_reader(str(tmp_path), tr_s=1.0)
        assert (first.index, last.index) == (0, 2)
        assert broken == Skipped("vol1.nii", "is cut short or no NIfTI file")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_4d_file_gives_what_is_whole(tmp_path, suffix):
    path = write(tmp_path / f"run{suffix}", run_of(6))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    *volumes, last = open_reader(str(path))
    assert 1 < len(volumes) < 6
    assert isinstance(last, Skipped)
    assert last.reason == f"the file ends after {len(volumes)} of 6 volumes"


def test_what_is_no_run_is_refused(tmp_path):
    write(tmp_path / "3d.nii", run_of(1)[..., 0])
    with pytest.raises(SourceError, match="must be 4-D"):
        open_reader(str(tmp_path / "3d.nii"))
    (tmp_path / "text.nii").write_text("nothing" * 100)
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"nothing" * 100))
    for name in ("text.nii", "text.nii.gz"):
        with pytest.raises(SourceError, match="NIfTI"):
            open_reader(str(tmp_path / name))
    write(tmp_path / "complex.nii", run_of(2).astype(np.complex64))
    with pytest.raises(SourceError, match="complex"):
        open_reader(str(tmp_path / "complex.nii"))
    (tmp_path / "4d").mkdir()
    write(tmp_path / "4d" / "run.nii", run_of(2))
    with pytest.raises(SourceError, match="give the file"):
        open_reader(str(tmp_path / "4d"))


def save_roi(path: Path, weights: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(weights, affine), path)
    return path


def a_mask(grid: Grid) -> np.ndarray:
    """Return a mask that touches every face of the grid."""
    mask = np.zeros(grid.shape, np.uint8)
    mask[0, :, 1] = mask[-1, 2, :] = mask[:, 0, 3] = mask[3, -1, 2:] = 1
    return mask


def test_roi_on_the_runs_grid_is_taken_as_it_is(tmp_path, caplog):
    weights = np.random.default_rng(0).random(GRID.shape).astype(np.float32)
    roi = read_roi(save_roi(tmp_path / "roi.nii", weights, GRID.affine), GRID)
    np.testing.assert_array_equal(roi, weights)
    assert roi.dtype == np.float32
    assert roi.flags.f_contiguous
    assert not caplog.records


def test_roi_with_flipped_and_swapped_axes_loses_no_voxel(tmp_path, caplog):
    mask = a_mask(GRID)
    flip = np.eye(4)
    flip[1, 1], flip[1, 3] = -1, GRID.shape[1] - 1
    path = save_roi(tmp_path / "flip.nii", mask[:, ::-1], GRID.affine @ flip)
    np.testing.assert_array_equal(read_roi(path, GRID), mask)
    path = save_roi(tmp_path / "swap.nii", mask.transpose(2, 0, 1), GRID.affine[:, [2, 0, 1, 3]])
    np.testing.assert_array_equal(read_roi(path, GRID), mask)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mask_on_another_grid_goes_to_the_nearest_voxel(tmp_path, caplog, dtype):
    fine = GRID.affine @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] += fine[:3, :3] @ [-0.5, -0.5, -0.5]  # eight fine voxels to each coarse one
    mask = np.zeros(GRID.shape, dtype)
    mask[3:6, 4:7, 2:5] = 1
    doubled = mask.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    with caplog.at_level(logging.WARNING):
        roi = read_roi(save_roi(tmp_path / "roi.nii", doubled, fine), GRID)
    np.testing.assert_array_equal(roi, mask)
    assert "27 of its 216 voxels" in caplog.text


def test_weights_on_another_grid_are_interpolated_linearly(tmp_path):
    # Half a voxel along x: each weight is the mean of two neighbours (float32 sums: 2 ulp).
    shifted = GRID.affine.copy()
    shifted[:3, 3] += GRID.affine[:3, 0] / 2
    weights = np.random.default_rng(1).random(GRID.shape).astype(np.float32)
    roi = read_roi(save_roi(tmp_path / "roi.nii", weights, shifted), GRID)
    inner = (slice(1, -1), slice(1, -1), slice(1, -1))
    expected = ((weights[:-1] + weights[1:]) / 2)[:-1, 1:-1, 1:-1]
    # The file rounds the affine to float32, which moves voxels by 1e-6 of their size.
    np.testing.assert_allclose(roi[inner], expected, rtol=0, atol=1e-5)
    assert roi.min() >= 0


def test_unusable_rois_are_refused(tmp_path):
    weights = np.ones(GRID.shape, np.float32)
    far = GRID.affine.copy()
    far[:3, 3] += 1000
    negative, not_a_number = weights.copy(), weights.copy()
    negative[1, 1, 1], not_a_number[1, 1, 1] = -0.1, np.nan
    (tmp_path / "text.nii").write_text("nothing" * 100)
    for path, reason in [
        (save_roi(tmp_path / "far.nii", weights, far), "no voxel"),
        (save_roi(tmp_path / "empty.nii", weights * 0, GRID.affine), "no voxel"),
        (save_roi(tmp_path / "negative.nii", negative, GRID.affine), "0 or more"),
        (save_roi(tmp_path / "nan.nii", not_a_number, GRID.affine), "finite"),
        (save_roi(tmp_path / "4d.nii", run_of(2), GRID.affine), "3-D"),
        (tmp_path / "text.nii", "readable"),
        (tmp_path / "gone.nii", "readable"),
    ]:
        for read, what in ((read_roi, "ROI"), (read_mask, "mask")):
            with pytest.raises(ConfigError, match=f"{what} {path}.*{reason}"):
                read(path, GRID)


def test_a_mask_is_where_the_file_is_not_zero(tmp_path, caplog):
    inside = a_mask(GRID) > 0
    weights = inside * np.random.default_rng(0).uniform(0.1, 1, GRID.shape).astype(np.float32)
    mask = read_mask(save_roi(tmp_path / "mask.nii", weights, GRID.affine), GRID)
    assert mask.dtype == np.bool_
    assert mask.flags.f_contiguous
    np.testing.assert_array_equal(mask, inside)
    swapped = weights.transpose(2, 0, 1)
    path = save_roi(tmp_path / "swap.nii", swapped, GRID.affine[:, [2, 0, 1, 3]])
    np.testing.assert_array_equal(read_mask(path, GRID), inside)
    assert not caplog.records


def test_a_mask_on_another_grid_goes_to_the_nearest_voxel(tmp_path, caplog):
    fine = GRID.affine @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] += fine[:3, :3] @ [-0.5, -0.5, -0.5]  # eight fine voxels to each coarse one
    mask = np.zeros(GRID.shape, np.float32)
    mask[3:6, 4:7, 2:5] = 0.25
    doubled = mask.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    path = save_roi(tmp_path / "mask.nii", doubled, fine)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_mask(path, GRID), mask > 0)
    assert f"mask {path} is on another grid and was resampled (nearest)" in caplog.text


def test_a_reference_comes_as_it_is_without_what_is_not_finite(tmp_path, caplog):
    image = np.random.default_rng(0).normal(100, 200, GRID.shape)
    image[3, 4, 5], image[4, 4, 5], image[5, 4, 5] = np.nan, np.inf, -np.inf
    wanted = np.where(np.isfinite(image), image, 0).astype(np.float32)
    reference = read_reference(save_roi(tmp_path / "image.nii", image, GRID.affine), GRID)
    assert reference.dtype == np.float32
    assert reference.flags.f_contiguous
    np.testing.assert_array_equal(reference, wanted)
    flip = np.diag([1.0, -1, 1, 1])
    flip[1, 3] = GRID.shape[1] - 1
    path = save_roi(tmp_path / "flip.nii", image[:, ::-1], GRID.affine @ flip)
    np.testing.assert_array_equal(read_reference(path, GRID), wanted)
    assert not caplog.records


def test_a_reference_on_another_grid_is_interpolated_linearly(tmp_path, caplog):
    # A linear ramp in scanner space comes out as itself within the finer grid, which is larger.
    affine = GRID.affine @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] -= affine[:3, :3].sum(1)
    fine = Grid((26, 22, 16), affine)

    def ramp(grid: Grid) -> np.ndarray:
        voxels = np.indices(grid.shape).reshape(3, -1)
        x, y, z = grid.affine[:3, :3] @ voxels + grid.affine[:3, 3:]
        return (1000 + 2 * x - 3 * y + z).reshape(grid.shape)

    with caplog.at_level(logging.WARNING):
        path = save_roi(tmp_path / "image.nii", ramp(fine).astype(np.float32), fine.affine)
        reference = read_reference(path, GRID)
    # The file has affine and voxels in float32: 1e-6 of 60 mm, 6e-8 of 1500.
    np.testing.assert_allclose(reference, ramp(GRID), rtol=0, atol=1e-3)
    assert f"reference {path} is on another grid and was resampled (linear)" in caplog.text


def test_unusable_references_are_refused(tmp_path):
    image = np.ones(GRID.shape, np.float32)
    far = GRID.affine.copy()
    far[:3, 3] += 1000
    colours = np.zeros(GRID.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for path, reason in [
        (save_roi(tmp_path / "far.nii", image, far), "no voxel"),
        (save_roi(tmp_path / "4d.nii", run_of(2), GRID.affine), "3-D"),
        (save_roi(tmp_path / "colours.nii", colours, GRID.affine), "numbers"),
        (tmp_path / "gone.nii", "readable"),
    ]:
        with pytest.raises(ConfigError, match=f"reference {path}.*{reason}"):
            read_reference(path, GRID)


def test_real_4d_files():
    haxby = open_reader(str(real_data("nifti_haxby") / "bold.nii.gz"))
    volumes = list(haxby)
    stored = nibabel.load(real_data("nifti_haxby") / "bold.nii.gz")
    assert haxby.n_volumes == len(volumes) == 1452
    assert {v.tr_s for v in volumes} == {2.5}
    data = np.stack([v.data for v in volumes], axis=-1)
    np.testing.assert_array_equal(data, np.asanyarray(stored.dataobj))
    feeds = open_reader(str(real_data("nifti_fsl_feeds") / "bold.nii.gz"), tr_s=3.0)
    volumes = [v for v in feeds if isinstance(v, Volume)]
    assert (len(volumes), volumes[-1].grid.shape, volumes[-1].tr_s) == (64, (64, 64, 21), 3.0)


def test_real_rois_lose_no_voxel(caplog):
    folder = real_data("siemens_mosaic_psc")
    grid = decode(folder / "001_000007_000001.dcm").volume.grid
    for name, n_voxels in (("lROI_1.nii", 83), ("rROI_2.nii", 106)):
        roi = read_roi(folder / name, grid)
        assert np.count_nonzero(roi) == roi.sum() == n_voxels
        # The same places in scanner space, found without turning any array.
        image = nibabel.load(folder / name)
        stored = nibabel.affines.apply_affine(
            np.linalg.inv(grid.affine) @ image.affine, np.argwhere(image.dataobj)
        )
        assert roi[tuple(stored.round().astype(int).T)].sum() == n_voxels
    assert not caplog.records


def test_roi_fits_a_mosaic_as_decoded(tmp_path):
    volume, _ = decode(to_bytes(mosaic()))
    mask = a_mask(GRID)
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(mask, GRID.affine))
    nibabel.save(turned, tmp_path / "roi.nii")
    np.testing.assert_array_equal(read_roi(tmp_path / "roi.nii", volume.grid), mask)

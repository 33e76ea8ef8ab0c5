import subprocess
import warnings
from pathlib import Path

import dcm2niix
import nibabel
import numpy as np
import pydicom
import pytest

from dicom_files import oblique_grid, real_data, voxels
from rtfmri.errors import GridError, VolumeError
from rtfmri.simulator import Scanner
from rtfmri.simulator.dicom import mosaic_dataset, write_mosaic
from rtfmri.volume import Grid

UID = "1.2.826.0.1.3680043.8.498.7"

with warnings.catch_warnings():
    # nibabel says at import that its DICOM readers are experimental.
    warnings.simplefilter("ignore")
    from nibabel.nicom import csareader, dicomwrappers


def _grid(*columns: tuple[float, float, float], shape: tuple[int, int, int]) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = [-31.25, 20.5, -7.125]
    return Grid(shape, affine)


GRIDS = {
    "ras": _grid((3, 0, 0), (0, 3.5, 0), (0, 0, 4), shape=(14, 12, 10)),
    "las": _grid((-3, 0, 0), (0, 3, 0), (0, 0, 4), shape=(12, 12, 9)),
    "coronal": _grid((-3, 0, 0), (0, 0, -3), (0, 4, 0), shape=(12, 16, 5)),
    "oblique": oblique_grid(),
}


def _canonical(data: np.ndarray, affine: np.ndarray) -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(data.astype(np.int32), affine)
    return nibabel.as_closest_canonical(image)


def _dcm2niix(folder: Path) -> nibabel.Nifti1Image:
    out = folder / "nifti"
    out.mkdir()
    command = [dcm2niix.bin, "-z", "n", "-f", "run", "-o", out, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stdout + done.stderr
    assert [path.name for path in out.glob("*.nii")] == ["run.nii"]
    return nibabel.load(out / "run.nii")


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_dcm2niix_gives_back_the_run(name, dtype, tmp_path):
    grid = GRIDS[name]
    run = [voxels(grid, seed, dtype) for seed in range(3)]
    for i, volume in enumerate(run):
        write_mosaic(tmp_path / f"{i}.dcm", volume, grid, index=i, tr_s=1.5, series_uid=UID)
    image = _dcm2niix(tmp_path)
    found = nibabel.as_closest_canonical(image)
    expected = _canonical(np.stack(run, -1), grid.affine)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)
    assert image.header.get_zooms()[3] == pytest.approx(1.5)


@pytest.mark.parametrize("name", GRIDS)
def test_nibabel_gives_back_the_volume(name, tmp_path):
    grid = GRIDS[name]
    volume = voxels(grid, dtype=np.int16)
    write_mosaic(tmp_path / "a.dcm", volume, grid, index=0, tr_s=2.0, series_uid=UID)
    wrapper = dicomwrappers.wrapper_from_file(tmp_path / "a.dcm")
    assert type(wrapper) is dicomwrappers.MosaicWrapper
    found = _canonical(wrapper.get_data(), np.diag([-1, -1, 1, 1]) @ wrapper.affine)
    expected = _canonical(volume, grid.affine)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)


def test_simulated_run_survives_dcm2niix(tmp_path):
    scanner = Scanner(shape=(32, 32, 18))
    for i in range(2):
        write_mosaic(
            tmp_path / f"{i}.dcm", scanner.volume(i), scanner.grid, index=i, tr_s=2.0,
            series_uid=UID,
        )  # fmt: skip
    found = nibabel.as_closest_canonical(_dcm2niix(tmp_path))
    expected = np.stack([scanner.volume(i) for i in range(2)], -1)
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
    np.testing.assert_allclose(found.affine, scanner.grid.affine, atol=1e-3)


def test_real_mosaic_is_written_as_its_scanner_wrote_it():
    path = sorted(real_data("siemens_mosaic_psc").glob("*.dcm"))[0]
    with warnings.catch_warnings():
        # The file's own oddities are not under test.
        warnings.simplefilter("ignore")
        real = pydicom.dcmread(path)
        wrapper = dicomwrappers.wrapper_from_data(real)
        data = wrapper.get_data().transpose(1, 0, 2)
        pixels = real.pixel_array
    affine = np.diag([-1, -1, 1, 1]) @ wrapper.affine
    grid = Grid(data.shape, affine[:, [1, 0, 2, 3]])
    volume = np.asfortranarray(data.astype(np.uint16))
    made = mosaic_dataset(volume, grid, index=0, tr_s=1.97, series_uid=UID)
    np.testing.assert_array_equal(made.pixel_array, pixels)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        np.testing.assert_allclose(made[name].value, real[name].value, atol=1e-3)
    for name in ("SOPClassUID", "Rows", "Columns", "RepetitionTime", "EchoTime"):
        assert made[name].value == real[name].value
    mine, theirs = (csareader.get_csa_header(d, "image")["tags"] for d in (made, real))
    assert mine["NumberOfImagesInMosaic"]["items"] == theirs["NumberOfImagesInMosaic"]["items"]
    np.testing.assert_allclose(
        mine["SliceNormalVector"]["items"], theirs["SliceNormalVector"]["items"], atol=1e-5
    )
    for tag in mine.keys() & theirs.keys():
        assert mine[tag]["vr"] == theirs[tag]["vr"]
        assert mine[tag]["syngodt"] == theirs[tag]["syngodt"]


def test_header_says_what_it_is():
    grid = GRIDS["ras"]
    first, later = (
        mosaic_dataset(voxels(grid), grid, index=i, tr_s=2.5, series_uid=UID) for i in (0, 30)
    )
    assert list(first.ImageType) == ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    assert (first.Manufacturer, first.Modality) == ("SIEMENS", "MR")
    assert (first.Rows, first.Columns) == (4 * 12, 4 * 14)
    assert (first.RepetitionTime, first.EchoTime) == (2500, 30)
    assert (first.AcquisitionNumber, later.AcquisitionNumber, later.InstanceNumber) == (1, 31, 31)
    assert (first.AcquisitionTime, later.AcquisitionTime) == ("120000.000000", "120115.000000")
    assert later.ContentTime == "120117.500000"
    assert first.SeriesInstanceUID == later.SeriesInstanceUID == UID
    assert first.StudyInstanceUID == later.StudyInstanceUID
    assert first.SOPInstanceUID != later.SOPInstanceUID
    tags = csareader.get_csa_header(first, "image")["tags"]
    assert tags["NumberOfImagesInMosaic"]["items"] == [10]
    assert tags["MosaicRefAcqTimes"]["items"] == [1250.0] * 10
    assert csareader.get_csa_header(first, "series")["n_tags"] == 1


def test_same_run_has_the_same_bytes(tmp_path):
    grid = GRIDS["oblique"]
    for name in ("a", "b"):
        write_mosaic(tmp_path / name, voxels(grid), grid, index=4, tr_s=2.0, series_uid=UID)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_person_is_in_it():
    dataset = mosaic_dataset(voxels(GRIDS["ras"]), GRIDS["ras"], index=0, tr_s=2, series_uid=UID)
    persons = {str(e.value) for e in dataset if e.tag.group == 0x0010 or e.VR == "PN"}
    assert persons == {"ANONYMOUS", ""}


def test_time_goes_past_midnight():
    grid = GRIDS["ras"]
    dataset = mosaic_dataset(voxels(grid), grid, index=30000, tr_s=2.0, series_uid=UID)
    assert dataset.AcquisitionTime == "044000.000000"


def test_float_voxels_are_refused():
    grid = GRIDS["ras"]
    volume = np.zeros(grid.shape, np.float32)
    with pytest.raises(VolumeError, match="int16 or uint16, got float32"):
        mosaic_dataset(volume, grid, index=0, tr_s=2.0, series_uid=UID)


def test_volume_must_fit_its_grid():
    with pytest.raises(VolumeError, match="but its grid is"):
        mosaic_dataset(
            np.zeros((3, 3, 3), np.int16), GRIDS["ras"], index=0, tr_s=2.0, series_uid=UID
        )


def test_sheared_grid_is_refused():
    grid = _grid((3, 0, 0), (0.5, 3, 0), (0, 0, 4), shape=(12, 12, 9))
    with pytest.raises(GridError, match="perpendicular axes"):
        mosaic_dataset(voxels(grid), grid, index=0, tr_s=2.0, series_uid=UID)

"""One DICOM file to one volume: voxels, geometry, clocks, and what may be wrong with a file."""

import json
import os
import signal
import subprocess
import threading
from dataclasses import fields
from datetime import datetime, timedelta
from functools import partial
from io import BytesIO
from pathlib import Path

import dcm2niix
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from dicom_files import (
    PATIENT,
    PHILIPS_SCALES,
    SERIES_UID,
    enhanced,
    ge_slices,
    mosaic,
    oblique_grid,
    philips_enhanced,
    philips_slices,
    real_data,
    to_bytes,
    voxels,
    xa_frames,
    xa_slices,
)
from rtfmri.errors import SourceError, VolumeError
from rtfmri.readers.dicom import Assembly, decode
from rtfmri.readers.mosaic import Mosaics
from rtfmri.readers.pieces import Decoder
from rtfmri.readers.unpacking import Unpacker
from rtfmri.simulator.dicom import mosaic_dataset
from rtfmri.volume import Volume


def assert_same_image(
    volume: Volume, image: nibabel.Nifti1Image, rounding_mm: float = 0.0
) -> None:
    """Compare in the orientation closest to RAS, as dcm2niix stores other axes than DICOM."""
    ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.data, volume.grid.affine))
    theirs = nibabel.as_closest_canonical(image)
    np.testing.assert_array_equal(np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj))
    # NIfTI keeps the affine in float32: 1e-4 mm is 6 ulp at 250 mm.
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=0, atol=1e-4 + rounding_mm)


def assert_same_slice_times(volume: Volume, image: nibabel.Nifti1Image, folder: Path) -> None:
    """Compare with the sidecar's, slices in the direction that *image* has them."""
    theirs = json.loads((folder / "out" / "run.json").read_text())["SliceTiming"]
    same_way = volume.grid.affine[:3, 2] @ image.affine[:3, 2] > 0
    # Scanners count in steps of 2.5 ms, and which volume dcm2niix reads is its own affair.
    np.testing.assert_allclose(
        volume.slice_times_s, theirs if same_way else theirs[::-1], rtol=0, atol=0.00251
    )


def assert_close_image(volume: Volume, image: nibabel.Nifti1Image, atol_mm: float) -> None:
    """Compare images that are scaled, by us in float32, by nibabel from dcm2niix's factors."""
    ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.data, volume.grid.affine))
    theirs = nibabel.as_closest_canonical(image)
    # dcm2niix takes for a slope the difference of what stored 1 and 0 stand for, in float32, which
    # counts for every stored value; beside it there are five roundings of ours and of theirs.
    slope, intercept, scale = PHILIPS_SCALES
    at_one = (slope + intercept) / (slope * scale) * (volume.data.dtype == np.float32)
    eps = np.finfo(np.float32).eps
    limit = eps * (at_one * np.iinfo(np.uint16).max + 5 * np.abs(ours.get_fdata()).max())
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), rtol=0, atol=limit)
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=0, atol=atol_mm)


def convert(files: list[Path], folder: Path) -> nibabel.Nifti1Image:
    """Convert *files* with dcm2niix; its sidecar is ``out/run.json``."""
    for name in ("in", "out"):
        (folder / name).mkdir()
    for number, file in enumerate(files):
        (folder / "in" / f"{number:04d}{file.suffix}").symlink_to(file)
    command = [
        dcm2niix.bin,
        "-z",
        "n",
        "-b",
        "y",
        "-f",
        "run",
        "-o",
        folder / "out",
        folder / "in",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = (folder / "out").glob("*.nii")
    return nibabel.load(path)


@pytest.mark.parametrize("make", [mosaic, enhanced])
def test_voxels_geometry_and_clocks(make):
    grid = oblique_grid()
    volume, _ = decode(to_bytes(make(4)))
    np.testing.assert_array_equal(volume.data, voxels(grid, 4))
    assert volume.data.dtype == np.uint16
    assert volume.data.flags.f_contiguous
    assert volume.data.flags.writeable
    # Decimal strings have 10 or more digits of at most 60 mm, the slice normal of the mosaic 8
    # after the point; over 12 voxels that is far below 1 micrometre.
    assert volume.grid.matches(grid)
    assert (volume.index, volume.tr_s) == (4, 1.5)
    expected_s = 12 * 3600 + 4 * 1.5 if make is mosaic else 3 * 3600 + 4 * 60 + 5.250004
    assert volume.acquired_s == pytest.approx(expected_s, abs=1e-6)


TIMES_S = (0.8, 0.0, 1.0, 0.2, 1.2, 0.4, 1.4)


def timed_mosaic(times_s: tuple[float, ...] | None) -> pydicom.Dataset:
    grid = oblique_grid()
    return mosaic_dataset(
        voxels(grid), grid, index=0, tr_s=1.5, series_uid=SERIES_UID, slice_times_s=times_s
    )


def timed_frames(order: list[int]) -> pydicom.Dataset:
    """Return an enhanced image whose slices were taken about midnight."""
    dataset = enhanced(order=order)
    start = datetime(2020, 1, 2, 23, 59, 59, 500_000)
    for position, frame in zip(order, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        taken = start + timedelta(seconds=TIMES_S[position])
        content = frame.FrameContentSequence[0]
        content.FrameAcquisitionDateTime = taken.strftime("%Y%m%d%H%M%S.%f")
    return dataset


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5]])
def test_enhanced_slices_are_sorted_by_position(order):
    straight, _ = decode(to_bytes(enhanced()))
    volume, _ = decode(to_bytes(enhanced(order=order)))
    np.testing.assert_array_equal(volume.data, straight.data)
    assert volume.grid.matches(straight.grid)


def test_slice_times_of_a_mosaic():
    assert decode(to_bytes(timed_mosaic(TIMES_S))).volume.slice_times_s == TIMES_S
    assert decode(to_bytes(timed_mosaic((0.0,) * 7))).volume.slice_times_s is None
    # What is said of no slice in particular holds for a 3-D readout: the middle of the TR.
    assert decode(to_bytes(timed_mosaic(None))).volume.slice_times_s == (0.75,) * 7
    with pytest.raises(VolumeError, match="each of 7 slices, got 2"):
        timed_mosaic((0.0, 0.5))


def test_a_mosaic_may_know_no_slice_times():
    dataset = timed_mosaic(TIMES_S)
    csa = dataset[0x0029, 0x1010]
    csa.value = csa.value.replace(b"MosaicRefAcqTimes", b"SomethingElsewise")
    assert decode(to_bytes(dataset)).volume.slice_times_s is None


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5]])
def test_slice_times_of_frames_go_with_them(order):
    dataset = timed_frames(order)
    assert decode(to_bytes(dataset)).volume.slice_times_s == TIMES_S
    frames = dataset.PerFrameFunctionalGroupsSequence
    frames[3].FrameContentSequence[0].FrameAcquisitionDateTime = ""
    assert decode(to_bytes(dataset)).volume.slice_times_s is None
    frames[3].FrameContentSequence[0]["FrameAcquisitionDateTime"]._value = "no time"
    assert decode(to_bytes(dataset)).volume.slice_times_s is None
    assert decode(to_bytes(enhanced(order=order))).volume.slice_times_s is None


def test_slice_times_are_those_of_dcm2niix(tmp_path):
    (tmp_path / "one.dcm").write_bytes(to_bytes(timed_mosaic(TIMES_S)))
    image = convert([tmp_path / "one.dcm"], tmp_path)
    assert_same_slice_times(decode(tmp_path / "one.dcm").volume, image, tmp_path)


def test_mosaic_agrees_with_dcm2niix(tmp_path):
    (tmp_path / "one.dcm").write_bytes(to_bytes(mosaic()))
    image = convert([tmp_path / "one.dcm"], tmp_path)
    # dcm2niix makes int16 of uint16 where the values allow, float32 or uint16 where they do not.
    assert_same_image(decode(tmp_path / "one.dcm").volume, image)


@pytest.mark.parametrize(
    "make",
    [
        ge_slices,
        xa_slices,
        xa_frames,
        philips_slices,
        lambda index: [philips_enhanced(1, 1, phase=False)] if index == 0 else [],
    ],
)
def test_every_vendors_files_agree_with_dcm2niix(make, tmp_path):
    datasets = [dataset for index in range(2) for dataset in make(index)]
    files, assembly, volumes = [], Assembly(), []
    for number, dataset in enumerate(datasets):
        dataset.SOPInstanceUID = f"{SERIES_UID}.{number}"
        files.append(tmp_path / f"{number}.dcm")
        files[-1].write_bytes(to_bytes(dataset))
        volumes += assembly.add(files[-1].read_bytes(), "file", 0.0)
    image = convert(files, tmp_path)
    assert len(volumes) == (2 if len(datasets) > 1 else 1)
    for volume in volumes:
        # dcm2niix writes no more than 5 digits of a position after the point.
        assert_close_image(
            volume, image.slicer[..., volume.index] if image.ndim == 4 else image, 1e-4
        )


@pytest.mark.parametrize("make", [mosaic, enhanced])
def test_enhanced_and_mosaic_agree_with_nibabel(make):
    from nibabel.nicom.dicomwrappers import wrapper_from_data

    dataset = make()
    volume, _ = decode(to_bytes(dataset))
    wrapper = wrapper_from_data(pydicom.dcmread(BytesIO(to_bytes(dataset))))
    image = nibabel.Nifti1Image(
        wrapper.get_data(), np.diag([-1, -1, 1, 1]) @ np.array(wrapper.affine)
    )
    assert_same_image(volume, image)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_other_transfer_syntaxes_give_the_same_native_voxels(syntax):
    dataset = mosaic(2)
    if syntax is RLELossless:
        dataset.compress(RLELossless)
    else:
        pixels = np.frombuffer(dataset.PixelData, "<u2")
        dataset["PixelData"].VR = "OW"
        order = ">u2" if syntax is ExplicitVRBigEndian else "<u2"
        dataset.PixelData = pixels.astype(order).tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
    volume, _ = decode(to_bytes(dataset))
    np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), 2))
    assert volume.data.dtype.isnative


def test_signed_voxels_stay_signed():
    grid = oblique_grid()
    data = voxels(grid, 3, np.int16)
    dataset = mosaic_dataset(data, grid, index=0, tr_s=2.0, series_uid=SERIES_UID)
    volume, _ = decode(to_bytes(dataset))
    assert volume.data.dtype == np.int16
    np.testing.assert_array_equal(volume.data, data)


def test_rescaling_gives_float32():
    dataset = mosaic(1)
    dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-10"
    volume, _ = decode(to_bytes(dataset))
    assert volume.data.dtype == np.float32
    # 16-bit integers times 0.5 minus 10 are exact in float32.
    np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), 1) * 0.5 - 10)


def test_index_falls_back_on_the_instance_number():
    dataset = mosaic(1)
    dataset.AcquisitionNumber = None
    dataset.InstanceNumber = 8
    assert decode(to_bytes(dataset)).volume.index == 7


@pytest.mark.parametrize("time", ["", "no time", None])
def test_acquisition_time_may_be_unusable(time):
    dataset = mosaic()
    del dataset.AcquisitionTime
    if time is not None:
        dataset.add(pydicom.DataElement("AcquisitionTime", "LO", time))
    assert decode(to_bytes(dataset)).volume.acquired_s is None


def test_tr_is_taken_from_the_argument_the_header_or_asked_for():
    dataset = mosaic()
    assert decode(to_bytes(dataset), tr_s=0.7).volume.tr_s == 0.7
    dataset.RepetitionTime = None
    assert decode(to_bytes(dataset), tr_s=0.7).volume.tr_s == 0.7
    with pytest.raises(SourceError, match="--tr"):
        decode(to_bytes(dataset))


def test_series_are_told_apart_without_their_identity():
    first, second = decode(to_bytes(mosaic(0))), decode(to_bytes(mosaic(1)))
    other = decode(to_bytes(mosaic(0, series_uid=SERIES_UID + ".9")))
    assert first.series == second.series != other.series
    assert SERIES_UID not in first.series


def test_the_header_alone_tells_what_the_whole_file_does(tmp_path):
    decoder = Decoder()
    for make in (mosaic, enhanced):
        (tmp_path / "a.dcm").write_bytes(to_bytes(make(3)))
        (place,) = decoder.read(tmp_path / "a.dcm", voxels=False)
        decoded = decode(tmp_path / "a.dcm", decoder=decoder)
        assert (place.index, place.series) == (decoded.volume.index, decoded.series)


@pytest.mark.parametrize("make", [mosaic, enhanced])
def test_truncated_anywhere_is_refused(make):
    data = to_bytes(make())
    for length in np.linspace(0, len(data) - 1, 20).astype(int):
        with pytest.raises(VolumeError):
            decode(data[:length])


def test_a_mosaic_without_its_private_header_is_refused():
    dataset = mosaic()
    del dataset[0x0029, 0x1010]
    with pytest.raises(VolumeError, match="mosaic without the private header"):
        decode(to_bytes(dataset))


def test_one_slice_is_refused():
    with pytest.raises(VolumeError, match="one slice"):
        decode(to_bytes(ge_slices()[0]))
    with pytest.raises(VolumeError, match="one slice"):
        decode(to_bytes(enhanced(grid=oblique_grid((12, 10, 1)))))


def test_several_volumes_in_a_file_are_refused():
    with pytest.raises(VolumeError, match="more than one volume"):
        decode(to_bytes(philips_enhanced(2, 1, phase=False)))


def test_a_frame_that_repeats_anothers_place_is_refused():
    dataset = enhanced()
    frames = dataset.PerFrameFunctionalGroupsSequence
    frames[1].PlanePositionSequence = frames[0].PlanePositionSequence
    with pytest.raises(VolumeError, match="uneven distances"):
        decode(to_bytes(dataset))


def test_no_image_no_number_and_no_geometry_are_refused():
    dataset = mosaic()
    del dataset.PixelData
    with pytest.raises(VolumeError, match="no image"):
        decode(to_bytes(dataset))
    dataset = mosaic()
    del dataset.AcquisitionNumber, dataset.InstanceNumber
    with pytest.raises(VolumeError, match="InstanceNumber"):
        decode(to_bytes(dataset))
    dataset = mosaic()
    del dataset.ImagePositionPatient
    with pytest.raises(VolumeError):
        decode(to_bytes(dataset))


def test_text_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("onset\tduration\n" * 50)
    for read in (decode, partial(Decoder().read, voxels=False)):
        with pytest.raises(VolumeError, match="is not DICOM"):
            read(tmp_path / "notes.txt")
    with pytest.raises(VolumeError, match="cannot be read"):
        decode(tmp_path / "gone.dcm")


def test_errors_do_not_quote_the_header():
    dataset = enhanced()
    dataset["AcquisitionNumber"]._value = PATIENT
    with pytest.raises(VolumeError) as caught:
        decode(to_bytes(dataset))
    assert PATIENT not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "shape", "tr_s"),
    [
        ("siemens_mosaic_psc", (74, 74, 36), 1.97),
        ("siemens_mosaic_mb", (104, 104, 72), 0.8),
        ("siemens_xa30_enhanced", (64, 64, 33), 1.0),
    ],
)
def test_real_files_agree_with_dcm2niix(folder, shape, tr_s, tmp_path):
    files = sorted(real_data(folder).glob("*.dcm"))[:2]
    image = convert(files, tmp_path)
    for i, file in enumerate(files):
        volume, _ = decode(file)
        assert (volume.grid.shape, volume.index, volume.tr_s) == (shape, i, tr_s)
        assert (volume.acquired_s is None) == (folder == "siemens_mosaic_mb")
        assert_same_image(volume, image.slicer[..., i])
        assert_same_slice_times(volume, image, tmp_path)


@pytest.mark.parametrize("folder", ["siemens_mosaic_psc", "siemens_mosaic_mb"])
def test_real_mosaics_are_read_the_fast_way_and_just_the_same(folder):
    files = sorted(real_data(folder).glob("*.dcm"))[:24]
    assert_fast_and_same([file.read_bytes() for file in files])


def test_mosaics_are_read_the_fast_way_and_just_the_same():
    assert_fast_and_same([to_bytes(mosaic(index)) for index in range(5)])
    assert_fast_and_same([to_bytes(timed_mosaic(TIMES_S)), to_bytes(timed_mosaic(TIMES_S[::-1]))])
    grid = oblique_grid()
    signed = [
        mosaic_dataset(voxels(grid, i, np.int16), grid, index=i, tr_s=2.0, series_uid=SERIES_UID)
        for i in range(2)
    ]
    assert_fast_and_same([to_bytes(dataset) for dataset in signed])


def assert_fast_and_same(files: list[bytes]) -> None:
    """Read the first file thoroughly, and the others both ways."""
    mosaics = Mosaics()
    mosaics.learn(files[0], Decoder().read(files[0])[0])
    for data in files:
        fast, (thorough,) = mosaics.read(data), Decoder().read(data)
        assert fast is not None
        np.testing.assert_array_equal(fast.load(), thorough.load())
        assert fast.load().dtype == thorough.load().dtype
        np.testing.assert_array_equal(fast.affine, thorough.affine)
        others = {f.name for f in fields(fast)} - {"affine", "load", "series"}
        assert all(getattr(fast, name) == getattr(thorough, name) for name in others)
        assert all(mosaics.read(data[:n]) is None for n in (0, 100, len(data) // 2, len(data) - 1))


def test_what_makes_another_image_is_not_read_the_fast_way():
    first = to_bytes(mosaic(0))
    mosaics = Mosaics()
    mosaics.learn(first, Decoder().read(first)[0])
    for name, value in {
        "ImagePositionPatient": ["1", "2", "3"],
        "RescaleSlope": "2",
        "RepetitionTime": "900",
        "EchoTime": "31",
        "SeriesInstanceUID": "1.2.3",
        "ImageType": ["ORIGINAL", "PRIMARY", "P", "MOSAIC"],
        "PixelRepresentation": 1,
        "ImageComments": "Single-band reference",
        "AcquisitionDateTime": "20200102030405",
    }.items():
        dataset = mosaic(1)
        setattr(dataset, name, value)
        assert mosaics.read(to_bytes(dataset)) is None, name
    dataset = mosaic(1)
    csa = dataset[0x0029, 0x1010]
    for name in (b"SliceNormalVector", b"NumberOfImagesInMosaic"):
        dataset[0x0029, 0x1010].value = csa.value.replace(name, b"X" + name[1:])
        assert mosaics.read(to_bytes(dataset)) is None


def test_rescaled_mosaics_are_not_read_the_fast_way():
    dataset = mosaic(0)
    dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-10"
    mosaics = Mosaics()
    mosaics.learn(to_bytes(dataset), Decoder().read(to_bytes(dataset))[0])
    assert mosaics.read(to_bytes(dataset)) is None


def test_real_slices_agree_with_dcm2niix(tmp_path):
    files = sorted(
        real_data("ge_slices").glob("*.MRDC.*"), key=lambda f: int(f.name.split(".")[-1])
    )
    image = convert(files, tmp_path)
    assembly = Assembly()
    volumes = [item for file in files for item in assembly.add(file.read_bytes(), file.name, 0.0)]
    assert [volume.index for volume in volumes] == list(range(60))
    for volume in volumes:
        assert (volume.grid.shape, volume.tr_s) == ((64, 64, 18), 1.0)
        # The header says that slices are 3.8 mm apart, and so do their places, whose 6 digits
        # leave 0.001 mm open over 17 of them; dcm2niix makes it 3.80013 mm.
        assert_same_image(volume, image.slicer[..., volume.index], rounding_mm=1e-3 / 17)
        assert_same_slice_times(volume, image, tmp_path)


def test_real_transfer_syntaxes_agree():
    files = sorted(real_data("siemens_transfer_syntaxes").glob("*.dcm"))
    volumes = [decode(file).volume for file in files]
    assert len({pydicom.dcmread(file).file_meta.TransferSyntaxUID for file in files}) == 7
    for volume in volumes[1:]:
        np.testing.assert_array_equal(volume.data, volumes[0].data)
        assert volume.grid.matches(volumes[0].grid)


def jpeg_ls_mosaic(index: int = 0) -> pydicom.Dataset:
    pytest.importorskip("jpeg_ls", reason="no encoder of JPEG-LS is installed")
    dataset = mosaic(index)
    dataset.compress(JPEGLSLossless)
    return dataset


def test_a_compressed_file_gives_the_same_voxels():
    volume, _ = decode(to_bytes(jpeg_ls_mosaic(3)))
    np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), 3))


def test_a_compression_that_nobody_knows_is_said():
    dataset = jpeg_ls_mosaic()
    dataset.file_meta.TransferSyntaxUID = HTJ2KLossless
    with pytest.raises(VolumeError, match=r"pip install 'rtfmri\[dicom\]'"):
        decode(to_bytes(dataset))


def test_a_decoder_that_takes_its_process_down_costs_one_file():
    unpacker = Unpacker()
    dataset = jpeg_ls_mosaic(1)
    expected = unpacker.unpack(dataset)
    pid = unpacker.pid
    assert pid not in (None, os.getpid())
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(VolumeError, match="is cut short"):
        unpacker.unpack(dataset)
    np.testing.assert_array_equal(unpacker.unpack(dataset), expected)
    assert unpacker.pid != pid
    unpacker.close()


def test_a_file_that_is_deflated_as_a_whole_is_refused():
    dataset = mosaic()
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with pytest.raises(VolumeError, match="deflated"):
        decode(to_bytes(dataset))


def test_a_compressed_image_does_not_claim_any_size():
    dataset = mosaic(3)
    dataset.compress(RLELossless)
    dataset.Rows = dataset.Columns = 60000
    with pytest.raises(VolumeError, match="larger than 512 MiB"):
        decode(to_bytes(dataset))

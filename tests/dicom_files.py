"""Synthetic DICOM files for the tests of readers; the names and dates in them are made up."""

import gzip
import os
import struct
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage

from rtfmri.simulator.dicom import mosaic_dataset
from rtfmri.volume import Grid

SERIES_UID = "1.2.826.0.1.3680043.8.498.1"
PATIENT = "DOE^JANE"


def real_data(folder: str) -> Path:
    """Return a folder of the real data, or skip the test."""
    root = os.environ.get("RTFMRI_TEST_DATA")
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"RTFMRI_TEST_DATA names no folder with {folder}")
    return Path(root) / folder


def oblique_grid(shape: tuple[int, int, int] = (12, 10, 7)) -> Grid:
    """Return a grid of 3 x 2.5 x 4 mm, turned about all axes, x to the left and y to the back."""
    a, b, c = np.deg2rad([8.0, -5.0, 12.0])
    about_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    about_y = [[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]
    about_z = [[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]
    affine = np.eye(4)
    rotation = np.array(about_z) @ about_y @ about_x
    affine[:3, :3] = rotation @ np.diag([-3.0, -2.5, 4.0])
    affine[:3, 3] = [17.5, 22.25, -9.125]
    return Grid(shape, affine)


def voxels(grid: Grid, seed: int = 0, dtype: type = np.uint16) -> np.ndarray:
    """Return random voxels that fill *dtype*'s range, (x, y, z), x fastest."""
    limits = np.iinfo(dtype)
    random = np.random.default_rng(seed)
    return np.asfortranarray(
        random.integers(limits.min, limits.max, grid.shape, dtype, endpoint=True)
    )


def to_bytes(dataset: Dataset) -> bytes:
    """Return the file that *dataset* makes."""
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def mosaic(index: int = 0, *, grid: Grid | None = None, series_uid: str = SERIES_UID) -> Dataset:
    """Return a Siemens mosaic of `voxels` with *index* as their seed."""
    grid = grid or oblique_grid()
    return mosaic_dataset(voxels(grid, index), grid, index=index, tr_s=1.5, series_uid=series_uid)


def numbers(values: np.ndarray) -> list[str]:
    return [f"{value:.10g}" for value in values]


def item(**values: object) -> Sequence:
    """Return a sequence of one item."""
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return Sequence([dataset])


def _to_patient(grid: Grid) -> np.ndarray:
    return np.diag([-1.0, -1, 1, 1]) @ grid.affine


def _directions(grid: Grid) -> np.ndarray:
    """Return row and column direction in patient coordinates, six numbers."""
    return (_to_patient(grid)[:3, :2] / grid.voxel_size_mm[:2]).T.ravel()


def protocol(grid: Grid, n_echoes: int = 1) -> bytes:
    """Return the part of Siemens' protocol that tells how much makes a volume."""
    lines = [
        b"### ASCCONV BEGIN object=MrProtDataImpl@MrProtocolData ###",
        b'tReferenceImage0\t = \t"1.2.3"',
        b"lContrasts\t = \t%d" % n_echoes,
        b"sSliceArray.lSize\t = \t%d" % grid.shape[2],
        b"### ASCCONV END ###",
    ]
    text = b"some binary before\0" + b"\n".join(lines) + b"\0"
    return text + bytes(len(text) % 2)


def echo_mosaic(index: int, echo: int, *, n_echoes: int = 3, says: bool = True) -> Dataset:
    """Return a mosaic of echo 1, 2, ... at 12 ms times that; *says* how many there are, or not."""
    dataset = mosaic(index * 10 + echo)
    dataset.AcquisitionNumber = index + 1
    dataset.InstanceNumber = index * n_echoes + echo
    dataset.EchoTime, dataset.EchoNumbers = f"{12 * echo}", echo
    if says:
        dataset[0x0029, 0x1020].value = protocol(oblique_grid(), n_echoes)
    else:
        del dataset.SequenceName
    return dataset


def _image(index: int, pixels: np.ndarray, uid: str, sop_class: str) -> Dataset:
    """Return what all images have; *pixels* are (..., rows, columns)."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = sop_class
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = f"{uid}.{index + 1}"
    d.SeriesInstanceUID = uid
    d.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    d.Modality, d.SeriesNumber = "MR", 1
    d.PatientName, d.PatientID = PATIENT, "12345"
    d.Rows, d.Columns = pixels.shape[-2:]
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, int(pixels.dtype.kind == "i")
    d.PixelData = np.ascontiguousarray(pixels).tobytes()
    return d


def slice_file(data: np.ndarray, grid: Grid, z: int, *, instance: int, uid: str) -> Dataset:
    """Return slice *z* of *data* (x, y, z) with what every vendor's has."""
    d = _image(instance, data.T[z], uid, MRImageStorage)
    size = grid.voxel_size_mm
    d.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    d.InstanceNumber = instance + 1
    d.AcquisitionNumber = 1
    d.RepetitionTime, d.EchoTime = "1500", "30"
    d.SliceThickness = d.SpacingBetweenSlices = f"{size[2]:g}"
    d.PixelSpacing = numbers(np.array([size[1], size[0]]))
    d.ImageOrientationPatient = numbers(_directions(grid))
    d.ImagePositionPatient = numbers((_to_patient(grid) @ [0, 0, z, 1])[:3])
    return d


def ge_slices(index: int = 0, *, says: bool = True, uid: str = SERIES_UID) -> list[Dataset]:
    """Return a volume as GE's slices; *says* in its own tags how many there are, or not."""
    grid = oblique_grid()
    n = grid.shape[2]
    files = []
    for z in range(n):
        d = slice_file(voxels(grid, index, np.int16), grid, z, instance=index * n + z, uid=uid)
        d.Manufacturer = "GE MEDICAL SYSTEMS"
        d.ImageType = ["ORIGINAL", "PRIMARY", "EPI", "NONE"]
        d.AcquisitionTime = "120000"
        if says:
            d.private_block(0x0021, "GEMS_RELA_01", create=True).add_new(0x4F, "SS", n)
            d.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x2F, "SS", 0)
            text = gzip.compress(b'IMODE "2D"\nSLICEORDER "1"\n')
            d.private_block(0x0025, "GEMS_SERS_01", create=True).add_new(
                0x1B, "OB", struct.pack("<I", 28) + text + bytes(len(text) % 2)
            )
            d.InStackPositionNumber = z + 1
        files.append(d)
    return files


PHILIPS_SCALES = (2.5, 100.0, 0.01)
"""Rescale slope, intercept and scale slope."""


def philips_slices(
    index: int = 0, *, echo: int = 1, n_echoes: int = 1, kind: str = "M"
) -> list[Dataset]:
    """Return a volume as Philips' slices, magnitude ("M") or phase ("P")."""
    grid = oblique_grid()
    data = voxels(grid, index * 10 + echo)
    files = []
    for z in range(grid.shape[2]):
        instance = (z * n_echoes + echo - 1) * 1000 + index  # all of a slice's come first
        d = slice_file(data, grid, z, instance=instance, uid=SERIES_UID)
        d.Manufacturer = "Philips Medical Systems"
        d.ImageType = ["ORIGINAL", "PRIMARY", f"{kind}_FFE", kind, "FFE"]
        d.TemporalPositionIdentifier = index + 1
        d.EchoTime, d.EchoNumbers = f"{12 * echo}", echo
        slope, intercept, scale = PHILIPS_SCALES
        d.RescaleSlope, d.RescaleIntercept = f"{slope}", f"{intercept}"
        block = d.private_block(0x2001, "Philips Imaging DD 001", create=True)
        block.add_new(0x14, "SL", n_echoes)
        block.add_new(0x18, "SL", grid.shape[2])
        block = d.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", scale)
        block.add_new(0x11, "CS", kind)
        files.append(d)
    return files


def xa_slices(index: int = 0, *, uid: str = SERIES_UID) -> list[Dataset]:
    """Return a volume as Siemens XA's slices, as it sends them for "interoperability"."""
    grid = oblique_grid()
    n = grid.shape[2]
    files = []
    for z in range(n):
        d = slice_file(voxels(grid, index), grid, z, instance=index * n + z, uid=uid)
        d.Manufacturer = "Siemens Healthineers"
        d.AcquisitionNumber = index + 1
        d.AcquisitionTime = f"235959.{100_000 * z:06d}" if z else "000000.000000"
        d.private_block(0x0021, "SIEMENS MR SDS 01", create=True).add_new(
            0x19, "OB", protocol(grid)
        )
        files.append(d)
    return files


class Frame(NamedTuple):
    """One frame of a multiframe file."""

    z: int
    pixels: np.ndarray
    echo_time_ms: float | None = None
    time: int | None = None
    component: str = "MAGNITUDE"


def multiframe(
    frames: list[Frame], index: int = 0, *, grid: Grid, uid: str = SERIES_UID
) -> Dataset:
    """Return an enhanced image of *frames*, in their order."""
    d = _image(index, np.array([frame.pixels for frame in frames]), uid, EnhancedMRImageStorage)
    d.Manufacturer = "Siemens Healthineers"
    d.AcquisitionNumber = d.InstanceNumber = index + 1
    d.AcquisitionDateTime = f"20200102030405.{250000 + index:06d}"
    d.NumberOfFrames = len(frames)
    size = grid.voxel_size_mm
    (shared,) = item(
        PixelMeasuresSequence=item(
            PixelSpacing=numbers(np.array([size[1], size[0]])), SliceThickness=f"{size[2]:g}"
        ),
        PlaneOrientationSequence=item(ImageOrientationPatient=numbers(_directions(grid))),
        MRTimingAndRelatedParametersSequence=item(RepetitionTime="1500"),
    )
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    d.DimensionIndexSequence = item(DimensionIndexPointer=0x00209057)
    groups = []
    for frame in frames:
        content = item(InStackPositionNumber=frame.z + 1, DimensionIndexValues=[frame.z + 1])
        if frame.time is not None:
            content[0].TemporalPositionIndex = frame.time + 1
        (group,) = item(
            PlanePositionSequence=item(
                ImagePositionPatient=numbers((_to_patient(grid) @ [0, 0, frame.z, 1])[:3])
            ),
            FrameContentSequence=content,
            MRImageFrameTypeSequence=item(ComplexImageComponent=frame.component),
        )
        if frame.echo_time_ms is not None:
            group.MREchoSequence = item(EffectiveEchoTime=frame.echo_time_ms)
        groups.append(group)
    d.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return d


def enhanced(
    index: int = 0, *, order: list[int] | None = None, grid: Grid | None = None
) -> Dataset:
    """Return an enhanced multiframe image of `voxels`, its slices stored in *order*."""
    grid = grid or oblique_grid()
    data = voxels(grid, index).T
    order = order if order is not None else list(range(grid.shape[2]))
    return multiframe([Frame(z, data[z]) for z in order], index, grid=grid)


def xa_frames(index: int = 0) -> list[Dataset]:
    """Return a volume as Siemens XA's enhanced files of one frame each."""
    grid = oblique_grid()
    data = voxels(grid, index).T
    files = []
    for z in range(grid.shape[2]):
        d = multiframe([Frame(z, data[z], 30.0, index)], index, grid=grid)
        d.InstanceNumber = index * grid.shape[2] + z + 1
        (group,) = d.PerFrameFunctionalGroupsSequence
        content = group.FrameContentSequence[0]
        content.FrameAcquisitionDateTime = f"20200102030405.{100_000 * z:06d}"
        (shared,) = d.SharedFunctionalGroupsSequence
        block = shared.private_block(0x0021, "SIEMENS MR SDS 01", create=True)
        (inner,) = item()
        inner.private_block(0x0021, "SIEMENS MR SDS 01", create=True).add_new(
            0x19, "OB", protocol(grid)
        )
        block.add_new(0xFE, "SQ", Sequence([inner]))
        files.append(d)
    return files


def philips_enhanced(
    n_volumes: int = 3, n_echoes: int = 2, *, phase: bool = True, says_time: bool = True
) -> Dataset:
    """Return a whole run in one file: slices, then echoes, phases, and volumes change slowest."""
    grid = oblique_grid()
    frames = []
    for time in range(n_volumes):
        for component in ("MAGNITUDE", "PHASE")[: 1 + phase]:
            for echo in range(1, n_echoes + 1):
                data = voxels(grid, time * 10 + echo).T
                if component == "PHASE":
                    data = data[::-1]
                frames += [
                    Frame(z, data[z], 12.0 * echo, time if says_time else None, component)
                    for z in range(grid.shape[2])
                ]
    d = multiframe(frames, grid=grid)
    d.Manufacturer = "Philips Medical Systems"
    slope, intercept, scale = PHILIPS_SCALES
    for group in d.PerFrameFunctionalGroupsSequence:
        group.PixelValueTransformationSequence = item(
            RescaleSlope=f"{slope}", RescaleIntercept=f"{intercept}"
        )
        (inner,) = item()
        inner.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(
            0x0E, "FL", scale
        )
        group.private_block(0x2005, "Philips MR Imaging DD 005", create=True).add_new(
            0x0F, "SQ", Sequence([inner])
        )
    return d

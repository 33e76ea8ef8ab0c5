"""DICOM as the scanners write it: Siemens mosaics, one file a volume, or GE's, one file a slice.

Facts about the private headers are from nibabel's description of the CSA format (nipy.org/nibabel,
"Siemens format DICOM with CSA header") and from what dcm2niix reads of it.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import ConfigError, GridError, VolumeError
from rtfmri.volume import Grid, Volume, tiled

if TYPE_CHECKING:
    from pydicom import Dataset

ECHO_TIME_MS = 30.0
START_S = 12 * 3600.0
"""Time of day of every simulated series; its date is 1 January 2000."""
_DATE = "20000101"
_ANONYMOUS = "ANONYMOUS"
_SYNGO_TYPES = {"IS": 6, "DS": 3, "FD": 4, "US": 10, "SH": 22}
_PERPENDICULAR = 1e-4
"""Cosine from which axes count as oblique to each other, which DICOM cannot say."""


def mosaic_dataset(
    volume: NDArray[Any],
    grid: Grid,
    *,
    index: int,
    tr_s: float,
    series_uid: str,
    series_number: int = 1,
    slice_times_s: Sequence[float] | None = None,
) -> "Dataset":
    """Return one volume as a Siemens mosaic.

    Parameters
    ----------
    volume : (x, y, z) int16 or uint16
        Image rows run along x, columns along y, slices along z, in the order of the array.
    grid : Grid
        Its position; the axes must be perpendicular to each other.
    index : int
        Position in the run, from 0.
    tr_s : float
        Seconds between volumes.
    series_uid : str
        Series instance UID; all other identifiers derive from it, *index* and the shape.
    series_number : int
        The operator's number of the series.
    slice_times_s : sequence of float, optional
        Acquisition start of each slice after the volume's, in seconds; the middle of the TR for
        all of them by default, as in a 3-D readout.

    Raises
    ------
    VolumeError
        If the volume is of another type or shape, or has not one time for each slice.
    GridError
        If the axes are not perpendicular.

    Notes
    -----
    ImagePositionPatient is the corner of the whole mosaic as if it were one slice: half of what
    the mosaic is larger than a slice, along rows and columns, lies between it and the first
    slice's own position.
    """
    n_x, n_y, n_z = grid.shape
    times_s = [tr_s / 2] * n_z if slice_times_s is None else slice_times_s
    if len(times_s) != n_z:
        raise VolumeError(
            f"slice_times_s must have one time for each of {n_z} slices, got {len(times_s)}"
        )
    position, row, column, normal = _geometry(volume, grid)
    size_x_mm, size_y_mm, _ = grid.voxel_size_mm
    n_tiles = math.ceil(math.sqrt(n_z))
    corner = (
        position
        - row * size_x_mm * n_x * (n_tiles - 1) / 2
        - column * size_y_mm * n_y * (n_tiles - 1) / 2
    )
    image_csa = {
        "AcquisitionMatrixText": ("SH", [f"{n_x}*{n_y}"]),
        "NumberOfImagesInMosaic": ("US", [n_z]),
        "SliceNormalVector": ("FD", normal.tolist()),
        "MosaicRefAcqTimes": ("FD", [1000.0 * time_s for time_s in times_s]),
        "BandwidthPerPixelPhaseEncode": ("FD", [1000 / (0.5 * n_y)]),
        "PhaseEncodingDirectionPositive": ("IS", [1]),
        "ProtocolSliceNumber": ("IS", [0]),
        "TimeAfterStart": ("DS", [index * tr_s]),
    }
    d = _dataset(
        pixels=tiled(volume),
        grid=grid,
        index=index,
        instance=index + 1,
        tr_s=tr_s,
        series_uid=series_uid,
        series_number=series_number,
        position=corner,
        orientation=np.concatenate([row, column]),
        acquisition="3D" if slice_times_s is None else "2D",
    )
    d.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    d.Manufacturer = "SIEMENS"
    d.AcquisitionNumber = index + 1
    block = d.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x08, "CS", "IMAGE NUM 4")
    block.add_new(0x09, "LO", _DATE)
    block.add_new(0x10, "OB", _csa(image_csa))
    block.add_new(0x18, "CS", "MR")
    block.add_new(0x19, "LO", _DATE)
    block.add_new(0x20, "OB", _csa({"Isocentered": ("IS", [])}))
    return d


def write_mosaic(
    path: str | Path,
    volume: NDArray[Any],
    grid: Grid,
    *,
    index: int,
    tr_s: float,
    series_uid: str,
    slice_times_s: Sequence[float] | None = None,
) -> None:
    """Write what `mosaic_dataset` returns to *path*, explicit VR little endian."""
    dataset = mosaic_dataset(
        volume,
        grid,
        index=index,
        tr_s=tr_s,
        series_uid=series_uid,
        slice_times_s=slice_times_s,
    )
    dataset.save_as(Path(path), enforce_file_format=True)


def slice_datasets(
    volume: NDArray[Any],
    grid: Grid,
    *,
    index: int,
    tr_s: float,
    series_uid: str,
    series_number: int = 1,
) -> "list[Dataset]":
    """Return one volume as GE writes it: an image a slice, numbered on through the run.

    Parameters and errors are those of `mosaic_dataset`. Slices have no times.

    Notes
    -----
    Where a slice belongs is said by standard tags, and by GE's own number of slices (0021,xx4F).
    """
    position, row, column, normal = _geometry(volume, grid)
    n_slices = grid.shape[2]
    datasets = []
    for k in range(n_slices):
        corner = position + k * grid.voxel_size_mm[2] * normal
        d = _dataset(
            pixels=volume[:, :, k].T,
            grid=grid,
            index=index,
            instance=index * n_slices + k + 1,
            tr_s=tr_s,
            series_uid=series_uid,
            series_number=series_number,
            position=corner,
            orientation=np.concatenate([row, column]),
            acquisition="2D",
        )
        d.ImageType = ["ORIGINAL", "PRIMARY", "EPI", "NONE"]
        d.Manufacturer = "GE MEDICAL SYSTEMS"
        d.AcquisitionNumber = 1
        d.ImagesInAcquisition = n_slices
        d.TemporalPositionIdentifier = index + 1
        d.StackID = "1"
        d.InStackPositionNumber = k + 1
        d.SliceLocation = _decimal(float(corner @ normal))
        block = d.private_block(0x0021, "GEMS_RELA_01", create=True)
        block.add_new(0x4F, "SS", n_slices)
        datasets.append(d)
    return datasets


class Series:
    """The images of one run, and of the other series that strangers are of."""

    def __init__(self) -> None:
        self._uid = ""

    def mosaic(self, volume: Volume, stranger: bool) -> "Dataset":
        """Return a volume as a Siemens mosaic.

        Raises
        ------
        ConfigError
            If it is float32.
        """
        return mosaic_dataset(
            volume.data,
            volume.grid,
            **self._place(volume, stranger),
            slice_times_s=volume.slice_times_s,
        )

    def slices(self, volume: Volume, stranger: bool) -> "list[Dataset]":
        """Return a volume as GE's slices; raises as `mosaic` does."""
        return slice_datasets(volume.data, volume.grid, **self._place(volume, stranger))

    def _place(self, volume: Volume, stranger: bool) -> dict[str, Any]:
        from pydicom.uid import generate_uid

        if volume.data.dtype == np.float32:
            raise ConfigError(
                "a DICOM image holds int16 or uint16 and these volumes are float32; "
                "use folder:DIR?format=nifti"
            )
        self._uid = self._uid or _series_uid(volume)
        return {
            "index": volume.index,
            "tr_s": volume.tr_s,
            "series_uid": generate_uid(entropy_srcs=[self._uid]) if stranger else self._uid,
            "series_number": 2 if stranger else 1,
        }


def _series_uid(first: Volume) -> str:
    """Return a UID that depends on the run alone: its first volume, grid and TR."""
    from pydicom.uid import generate_uid

    voxels = hashlib.sha256(first.flat.tobytes()).hexdigest()
    where, pace = str(first.grid.affine.tolist()), str(first.tr_s)
    return str(generate_uid(entropy_srcs=[voxels, where, pace]))


def _geometry(volume: NDArray[Any], grid: Grid) -> tuple[NDArray[np.float64], ...]:
    """Return the first voxel's place and the axes' directions, for the patient's LPS+."""
    if volume.dtype not in (np.int16, np.uint16):
        raise VolumeError(f"a DICOM image holds int16 or uint16, got {volume.dtype}")
    if volume.shape != grid.shape:
        raise VolumeError(f"volume is {volume.shape} but its grid is {grid.shape}")
    to_patient = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
    row, column, normal = (to_patient[:3, :3] / grid.voxel_size_mm).T
    cosines = np.abs([row @ column, row @ normal, column @ normal])
    if cosines.max() > _PERPENDICULAR:
        raise GridError(
            f"DICOM needs perpendicular axes, got cosines of {cosines.round(4).tolist()} between "
            "them; use format=nifti or resample"
        )
    return to_patient[:3, 3], row, column, normal


def _dataset(
    *,
    pixels: NDArray[Any],
    grid: Grid,
    index: int,
    instance: int,
    tr_s: float,
    series_uid: str,
    series_number: int,
    position: NDArray[np.float64],
    orientation: NDArray[np.float64],
    acquisition: str,
) -> "Dataset":
    """Return what the images of all makers have."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    size_x_mm, size_y_mm, size_z_mm = grid.voxel_size_mm
    d = Dataset()
    d.SpecificCharacterSet = "ISO_IR 100"
    d.SOPClassUID = MRImageStorage
    d.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(instance), str(grid.shape)])
    d.StudyInstanceUID = generate_uid(entropy_srcs=[series_uid, "study"])
    d.SeriesInstanceUID = series_uid
    d.FrameOfReferenceUID = generate_uid(entropy_srcs=[series_uid, "frame of reference"])
    d.StudyDate = d.SeriesDate = d.AcquisitionDate = d.ContentDate = _DATE
    d.StudyTime = d.SeriesTime = _time_of_day(START_S)
    d.AcquisitionTime = _time_of_day(START_S + index * tr_s)
    d.ContentTime = _time_of_day(START_S + (index + 1) * tr_s)
    d.Modality = "MR"
    d.ManufacturerModelName = "rtfmri simulator"
    d.SeriesDescription = "simulated"
    d.ProtocolName = "simulated"
    d.PatientName = d.PatientID = _ANONYMOUS
    d.PatientBirthDate = d.PatientSex = d.AccessionNumber = d.ReferringPhysicianName = ""
    d.PatientIdentityRemoved = "YES"
    d.DeidentificationMethod = "no person: simulated"
    d.StudyID = "1"
    d.SeriesNumber = series_number
    d.InstanceNumber = instance

    d.ScanningSequence = "EP"
    d.SequenceVariant = "SK"
    d.ScanOptions = "FS"
    d.SequenceName = f"*epfid{acquisition.lower()}1"
    d.MRAcquisitionType = acquisition
    d.PatientPosition = "HFS"
    d.MagneticFieldStrength = "3"
    d.FlipAngle = "75"
    d.EchoTrainLength = 1
    d.RepetitionTime = _decimal(1000 * tr_s)
    d.EchoTime = _decimal(ECHO_TIME_MS)
    d.SliceThickness = d.SpacingBetweenSlices = _decimal(size_z_mm)
    d.InPlanePhaseEncodingDirection = "COL"
    d.AcquisitionMatrix = [grid.shape[0], 0, 0, grid.shape[1]]
    d.ImagePositionPatient = [_decimal(v) for v in position]
    d.ImageOrientationPatient = [_decimal(v) for v in orientation]
    d.PixelSpacing = [_decimal(size_y_mm), _decimal(size_x_mm)]

    d.SamplesPerPixel = 1
    d.PhotometricInterpretation = "MONOCHROME2"
    d.Rows, d.Columns = pixels.shape
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit = 15
    d.PixelRepresentation = int(pixels.dtype.kind == "i")
    d.PixelData = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")).tobytes()

    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = MRImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
    return d


def _decimal(value: float) -> str:
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value))


def _time_of_day(seconds: float) -> str:
    """Return a DICOM TM, going past midnight as a clock does."""
    microseconds = round(seconds * 1e6) % (24 * 3600 * 1_000_000)
    whole, fraction = divmod(microseconds, 1_000_000)
    return f"{whole // 3600:02}{whole // 60 % 60:02}{whole % 60:02}.{fraction:06}"


def _csa(tags: dict[str, tuple[str, list[Any]]]) -> bytes:
    """Encode tags (value representation, values) as a CSA header of type 2.

    "SV10", a magic number, the number of tags and 77; then each tag: name (64 bytes),
    multiplicity, representation, type, number of items, 77; then each item: four numbers with its
    length in first, second and fourth place, and its text, zero-terminated, padded to 4 bytes.
    """
    parts = [b"SV10\4\3\2\1", struct.pack("<2I", len(tags), 77)]
    for name, (representation, values) in tags.items():
        parts.append(
            struct.pack(
                "<64si4s3i",
                name.encode(),
                len(values),
                representation.encode(),
                _SYNGO_TYPES[representation],
                max(len(values), 6),
                77,
            )
        )
        texts = [f"{value:.8f}" if isinstance(value, float) else str(value) for value in values]
        for text in texts:
            item = text.encode() + b"\0"
            parts.append(struct.pack("<4i", len(item), len(item), 77, len(item)))
            parts.append(item + bytes(-len(item) % 4))
        parts.append(struct.pack("<4i", 0, 0, 205, 0) * (6 - len(values)))
    header = b"".join(parts)
    return header + bytes(len(header) % 2)

"""Siemens mosaic DICOM, as the scanners write it: one volume a file, its slices tiled.

Facts about the private headers are from nibabel's description of the CSA format (nipy.org/nibabel,
"Siemens format DICOM with CSA header") and from what dcm2niix reads of it.
"""

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import GridError, VolumeError
from rtfmri.volume import Grid, tiled

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
        Series instance UID; all other identifiers derive from it and *index*.
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
    if volume.dtype not in (np.int16, np.uint16):
        raise VolumeError(f"a DICOM mosaic holds int16 or uint16, got {volume.dtype}")
    if volume.shape != grid.shape:
        raise VolumeError(f"volume is {volume.shape} but its grid is {grid.shape}")
    n_x, n_y, n_z = grid.shape
    size_x_mm, size_y_mm, size_z_mm = (float(size) for size in grid.voxel_size_mm)
    to_patient = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
    times_s = [tr_s / 2] * n_z if slice_times_s is None else slice_times_s
    if len(times_s) != n_z:
        raise VolumeError(
            f"slice_times_s must have one time for each of {n_z} slices, got {len(times_s)}"
        )
    row, column, normal = (to_patient[:3, :3] / grid.voxel_size_mm).T
    cosines = np.abs([row @ column, row @ normal, column @ normal])
    if cosines.max() > _PERPENDICULAR:
        raise GridError(
            f"DICOM needs perpendicular axes, got cosines of {cosines.round(4).tolist()} between "
            "them; use format=nifti or resample"
        )
    n_tiles = math.ceil(math.sqrt(n_z))
    corner = (
        to_patient[:3, 3]
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
    return _dataset(
        pixels=tiled(volume),
        index=index,
        tr_s=tr_s,
        series_uid=series_uid,
        position=corner,
        orientation=np.concatenate([row, column]),
        spacing=(size_y_mm, size_x_mm),
        thickness=size_z_mm,
        matrix=(n_x, n_y),
        csa=(_csa(image_csa), _csa({"Isocentered": ("IS", [])})),
        acquisition="3D" if slice_times_s is None else "2D",
    )


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


def _dataset(
    *,
    pixels: NDArray[Any],
    index: int,
    tr_s: float,
    series_uid: str,
    position: NDArray[np.float64],
    orientation: NDArray[np.float64],
    spacing: tuple[float, float],
    thickness: float,
    matrix: tuple[int, int],
    csa: tuple[bytes, bytes],
    acquisition: str,
) -> "Dataset":
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
    from pydicom.valuerep import format_number_as_ds

    def decimal(value: float) -> str:
        return format_number_as_ds(float(value))

    d = Dataset()
    d.SpecificCharacterSet = "ISO_IR 100"
    d.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    d.SOPClassUID = MRImageStorage
    d.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(index)])
    d.StudyInstanceUID = generate_uid(entropy_srcs=[series_uid, "study"])
    d.SeriesInstanceUID = series_uid
    d.FrameOfReferenceUID = generate_uid(entropy_srcs=[series_uid, "frame of reference"])
    d.StudyDate = d.SeriesDate = d.AcquisitionDate = d.ContentDate = _DATE
    d.StudyTime = d.SeriesTime = _time_of_day(START_S)
    d.AcquisitionTime = _time_of_day(START_S + index * tr_s)
    d.ContentTime = _time_of_day(START_S + (index + 1) * tr_s)
    d.Modality = "MR"
    d.Manufacturer = "SIEMENS"
    d.ManufacturerModelName = "rtfmri simulator"
    d.SeriesDescription = "simulated"
    d.ProtocolName = "simulated"
    d.PatientName = d.PatientID = _ANONYMOUS
    d.PatientBirthDate = d.PatientSex = d.AccessionNumber = d.ReferringPhysicianName = ""
    d.PatientIdentityRemoved = "YES"
    d.DeidentificationMethod = "no person: simulated"
    d.StudyID = "1"
    d.SeriesNumber = 1
    d.AcquisitionNumber = d.InstanceNumber = index + 1

    d.ScanningSequence = "EP"
    d.SequenceVariant = "SK"
    d.ScanOptions = "FS"
    d.SequenceName = f"*epfid{acquisition.lower()}1"
    d.MRAcquisitionType = acquisition
    d.PatientPosition = "HFS"
    d.MagneticFieldStrength = "3"
    d.FlipAngle = "75"
    d.EchoTrainLength = 1
    d.RepetitionTime = decimal(1000 * tr_s)
    d.EchoTime = decimal(ECHO_TIME_MS)
    d.SliceThickness = d.SpacingBetweenSlices = decimal(thickness)
    d.InPlanePhaseEncodingDirection = "COL"
    d.AcquisitionMatrix = [matrix[0], 0, 0, matrix[1]]
    d.ImagePositionPatient = [decimal(v) for v in position]
    d.ImageOrientationPatient = [decimal(v) for v in orientation]
    d.PixelSpacing = [decimal(v) for v in spacing]

    d.SamplesPerPixel = 1
    d.PhotometricInterpretation = "MONOCHROME2"
    d.Rows, d.Columns = pixels.shape
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit = 15
    d.PixelRepresentation = int(pixels.dtype.kind == "i")
    d.PixelData = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")).tobytes()

    block = d.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x08, "CS", "IMAGE NUM 4")
    block.add_new(0x09, "LO", _DATE)
    block.add_new(0x10, "OB", csa[0])
    block.add_new(0x18, "CS", "MR")
    block.add_new(0x19, "LO", _DATE)
    block.add_new(0x20, "OB", csa[1])

    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = MRImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
    return d


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

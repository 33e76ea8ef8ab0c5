"""DICOM files to volumes: Siemens mosaic and enhanced multiframe, one file a volume.

Only technical tags are looked at. Nothing of a header leaves this module but numbers and a digest
of the series' UID; errors name a kind of trouble, never a value.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.config import disable_value_validation
from pydicom.errors import InvalidDicomError
from pydicom.pixels.utils import pixel_array
from pydicom.valuerep import DT, TM

from rtfmri.errors import GridError, RtfmriError, VolumeError
from rtfmri.readers.replay import checked_tr
from rtfmri.volume import Grid, Volume, as_slice_times, as_voxels, untiled

with warnings.catch_warnings():
    # nibabel says this at every import; the tests compare its geometry with dcm2niix.
    warnings.filterwarnings("ignore", "The DICOM readers are highly experimental", UserWarning)
    from nibabel.nicom.csareader import get_csa_header, is_mosaic
    from nibabel.nicom.dicomwrappers import MosaicWrapper

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
"""SOP class UID of Enhanced MR Image Storage (DICOM PS3.4, table B.5-1)."""

_ORDER_TAGS = ["SeriesInstanceUID", "AcquisitionNumber", "InstanceNumber"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file belongs."""

    series: str
    """Digest of the SeriesInstanceUID: equal for files of one series, otherwise opaque."""
    index: int
    """Position of its volume in the run, from 0."""


class _Image(NamedTuple):
    slices: NDArray[Any]
    """(z, y, x)."""
    affine: NDArray[np.float64]
    """From (x, y, z) to LPS mm."""
    times_s: list[float]
    """Acquisition start of each slice after the volume's; empty if not known."""


class Decoded(NamedTuple):
    """A volume and the series it belongs to, as in `Place`."""

    volume: Volume
    series: str


def locate(path: Path) -> Place:
    """Read no more of a DICOM file than tells where it belongs.

    Raises
    ------
    VolumeError
        If it is not DICOM, or has no number.
    """
    with _plain_errors():
        return _place(
            pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_ORDER_TAGS))
        )


def decode(source: bytes | Path, *, tr_s: float | None = None) -> Decoded:
    """Decode one DICOM file that holds one volume.

    Parameters
    ----------
    source : bytes or Path
        The whole file.
    tr_s : float, optional
        Repetition time in seconds; the header's by default.

    Returns
    -------
    Decoded
        The volume's voxels keep the integers as stored, unless the header asks for a rescaling
        (then float32). Its axes are column, row and slice of the images; its affine is RAS+.

    Raises
    ------
    VolumeError
        If it is not DICOM, is cut short, holds no image, one slice, or more than one volume, or
        is compressed in a way that no installed decoder knows.
    SourceError
        If it has no repetition time and none is given.

    Notes
    -----
    The index is AcquisitionNumber - 1, or InstanceNumber - 1 where that is missing. Patient
    coordinates are LPS+ (DICOM PS3.3, C.7.6.2.1.1); their first two are negated here.
    """
    with _plain_errors():
        data = source if isinstance(source, bytes) else source.read_bytes()
        dataset = pydicom.dcmread(BytesIO(data))
        if not dataset.get("PixelData"):
            raise VolumeError("holds no image, or is cut short")
        split = _split_frames if dataset.get("SOPClassUID") == ENHANCED_MR else _split_mosaic
        slices, affine_lps, times_s = split(dataset)
        place = _place(dataset)
        volume = Volume(
            data=as_voxels(slices.T),
            grid=Grid(slices.T.shape, np.diag([-1.0, -1, 1, 1]) @ affine_lps),
            index=place.index,
            tr_s=tr_s or checked_tr(_repetition_time_s(dataset), "the series"),
            acquired_s=_acquired_s(dataset),
            slice_times_s=as_slice_times(times_s, len(slices)),
        )
    return Decoded(volume, place.series)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn whatever a parser makes of a stranger's bytes into a VolumeError without their text."""
    try:
        with disable_value_validation():
            yield
    except GridError as error:
        raise VolumeError(f"has no usable geometry: {error}") from None
    except RtfmriError:
        raise
    except InvalidDicomError:
        raise VolumeError("is not DICOM") from None
    except OSError as error:
        raise VolumeError(f"cannot be read: {error.strerror or 'it ends too early'}") from None
    except Exception as error:
        # Messages of pydicom and nibabel quote header values, so only the kind is told.
        raise VolumeError(f"cannot be decoded ({type(error).__name__})") from None


def _split_mosaic(dataset: pydicom.Dataset) -> _Image:
    """Return the slices of a Siemens mosaic.

    The first slice's place and the direction of the slices come from nibabel, which corrects
    the mosaic's position and reads the slices' normal from Siemens' private header. So do the
    slices' times, in ms; older scanners have none, or zeros.
    """
    csa = get_csa_header(dataset)
    if csa is None or not is_mosaic(csa):
        raise VolumeError(
            "holds one slice; whole volumes are needed (Siemens mosaic, or enhanced multiframe)"
        )
    wrapper = MosaicWrapper(dataset, csa)
    n_rows, n_columns, n_slices = wrapper.image_shape
    slices = untiled(_pixels(dataset), (n_columns, n_rows, n_slices)).T
    slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    times_ms = csa["tags"].get("MosaicRefAcqTimes", {}).get("items", [])
    return _Image(
        _rescaled(slices, [[slope, intercept]]),
        wrapper.affine[:, [1, 0, 2, 3]],
        [float(time_ms) / 1000 for time_ms in times_ms],
    )


def _split_frames(dataset: pydicom.Dataset) -> _Image:
    """Return the slices of an enhanced image.

    Slices are sorted along the normal of their plane, row direction x column direction, and are
    taken to be evenly spaced (DICOM PS3.3, C.7.6.16.2.3 and C.7.6.16.2.4).
    """
    frames = dataset.PerFrameFunctionalGroupsSequence
    directions = np.array(
        _macro(dataset, frames[0], "PlaneOrientationSequence").ImageOrientationPatient, np.float64
    ).reshape(2, 3)
    spacing_mm = _macro(dataset, frames[0], "PixelMeasuresSequence").PixelSpacing
    corners = np.array(
        [_macro(dataset, frame, "PlanePositionSequence").ImagePositionPatient for frame in frames],
        np.float64,
    )
    heights_mm = corners @ np.cross(*directions)
    order = np.argsort(heights_mm)
    if len(frames) < 2:
        raise VolumeError("holds one slice; whole volumes are needed")
    if np.diff(heights_mm[order]).min() < 1e-3:
        raise VolumeError("holds more than one volume; one file a volume is needed")
    pixels = _pixels(dataset)
    if len(pixels) != len(frames):
        raise VolumeError(f"says {len(frames)} slices but holds {len(pixels)}")
    affine = np.eye(4)
    affine[:3, 0] = directions[0] * float(spacing_mm[1])
    affine[:3, 1] = directions[1] * float(spacing_mm[0])
    affine[:3, 2] = (corners[order[-1]] - corners[order[0]]) / (len(frames) - 1)
    affine[:3, 3] = corners[order[0]]
    scales = [
        [macro.get("RescaleSlope", 1), macro.get("RescaleIntercept", 0)]
        for frame in (frames[i] for i in order)
        if (macro := _macro(dataset, frame, "PixelValueTransformationSequence"))
    ]
    times_s = _frame_times_s([frames[i] for i in order])
    return _Image(_rescaled(pixels[order], scales), affine, times_s)


def _frame_times_s(frames: list[pydicom.Dataset]) -> list[float]:
    """Return when each frame was taken after the first one (DICOM PS3.3, C.7.6.16.2.2)."""
    contents = [(frame.get("FrameContentSequence") or [pydicom.Dataset()])[0] for frame in frames]
    with suppress(ValueError, TypeError):  # a frame without a time, or without a usable one
        clocks = [DT(content.get("FrameAcquisitionDateTime")) for content in contents]
        first = min(clocks)
        return [(clock - first).total_seconds() for clock in clocks]
    return []


def _macro(dataset: pydicom.Dataset, frame: pydicom.Dataset, name: str) -> pydicom.Dataset:
    """Return a functional group of a frame, its own or the one all frames share."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    groups = frame.get(name) or shared[0].get(name) or [pydicom.Dataset()]
    macro: pydicom.Dataset = groups[0]
    return macro


def _pixels(dataset: pydicom.Dataset) -> NDArray[Any]:
    try:
        return pixel_array(dataset, raw=True)
    except ValueError:
        raise VolumeError("is cut short, or its image does not fit its header") from None
    except RuntimeError:
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise VolumeError(f"no installed decoder knows its compression, {syntax.name}") from None


def _rescaled(slices: NDArray[Any], scales: list[list[Any]]) -> NDArray[Any]:
    """Apply one (slope, intercept) to all slices, or one to each; keep integers if it is 1, 0."""
    factors = np.array(scales, np.float32).reshape(-1, 2)
    if (factors == (1, 0)).all():
        return slices
    slope, intercept = factors.T[:, :, None, None]
    scaled: NDArray[Any] = slices * slope + intercept
    return scaled


def _place(dataset: pydicom.Dataset) -> Place:
    uid = str(dataset.get("SeriesInstanceUID", ""))
    numbers = (dataset.get("AcquisitionNumber"), dataset.get("InstanceNumber"))
    for number in numbers:
        if number is not None and int(number) > 0:
            return Place(hashlib.blake2b(uid.encode(), digest_size=8).hexdigest(), int(number) - 1)
    raise VolumeError("has no AcquisitionNumber and no InstanceNumber")


def _repetition_time_s(dataset: pydicom.Dataset) -> float | None:
    value_ms = dataset.get("RepetitionTime")
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if not value_ms and frames:
        timing = _macro(dataset, frames[0], "MRTimingAndRelatedParametersSequence")
        value_ms = timing.get("RepetitionTime")
    return float(value_ms) / 1000 if value_ms else None


def _acquired_s(dataset: pydicom.Dataset) -> float | None:
    """Return the start of the acquisition after midnight; anonymised headers have it empty."""
    clock: TM | DT | None = None
    with suppress(ValueError):
        if text := dataset.get("AcquisitionTime"):
            clock = TM(text)
        elif text := dataset.get("AcquisitionDateTime"):
            clock = DT(text)
    if clock is None:
        return None
    return clock.hour * 3600 + clock.minute * 60 + clock.second + clock.microsecond / 1e6

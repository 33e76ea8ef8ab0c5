"""DICOM headers: what each vendor's tags mean for a run of volumes.

Only technical tags are looked at. Facts about private ones are dcm2niix's, and of the vendors'
conformance statements.
"""

import math
import re
import zlib
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.valuerep import DT, TM

from rtfmri.errors import VolumeError
from rtfmri.volume import Grid

TO_RAS = np.diag([-1.0, -1, 1, 1])
"""Patient coordinates are LPS+ (DICOM PS3.3, C.7.6.2.1.1)."""
NOT_MAGNITUDE = {"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY"}
PHILIPS_MR = "Philips MR Imaging DD 001"
_PHILIPS = "Philips Imaging DD 001"


class Numbers(NamedTuple):
    """How much makes a volume; None where the header does not say."""

    n_slices: int | None
    n_echoes: int | None
    times_s: tuple[float, ...] = ()
    """When each slice is taken, by its number in the stack; empty where that is not told once."""


def numbers_of(dataset: pydicom.Dataset) -> Numbers:
    """Read how much makes a volume from the vendors' own tags."""
    protocol = _protocol(dataset)
    if protocol:
        n_slices = _entry(protocol, b"sSliceArray.lSize")
        if n_slices and _entry(protocol, b"sKSpace.ucDimension") == 4:  # slabs, not slices
            n_slices *= _entry(protocol, b"sKSpace.lImagesPerSlab") or 1
        return Numbers(n_slices, _entry(protocol, b"lContrasts") or 1)
    if is_ge(dataset):
        n_slices = whole_number(private_value(dataset, 0x0021, 0x4F, "GEMS_RELA_01"))
        n_echoes = whole_number(private_value(dataset, 0x0019, 0x7E, "GEMS_ACQU_01"))
        n_slices = n_slices or whole_number(dataset.get("ImagesInAcquisition"))
        return Numbers(n_slices, n_echoes or 1, _ge_times_s(dataset, n_slices or 0))
    n_slices = whole_number(private_value(dataset, 0x2001, 0x18, _PHILIPS))
    n_echoes = whole_number(private_value(dataset, 0x2001, 0x14, _PHILIPS))
    # Siemens' names of sequences tell it, too: *epfid2d1_64 has one echo.
    name = str(dataset.get("SequenceName") or dataset.get("PulseSequenceName") or "")
    if not n_echoes and (found := re.search(r"[23]d([1-9])", name)):
        n_echoes = int(found[1])
    if not n_echoes and not dataset.get("EchoNumbers"):
        n_echoes = 1
    return Numbers(n_slices, n_echoes)


def _ge_times_s(dataset: pydicom.Dataset, n_slices: int) -> tuple[float, ...]:
    """Return when GE takes each slice of a plain 2-D sequence; empty where it is not as simple.

    The protocol, a compressed text, says in which order they are taken: one after another, or
    every other one first.
    """
    packed = private_value(dataset, 0x0025, 0x1B, "GEMS_SERS_01")
    tr_s = repetition_time_s(dataset)
    if not isinstance(packed, bytes) or not n_slices or not tr_s:
        return ()
    try:
        text = zlib.decompressobj(wbits=31).decompress(packed[4:], 2**18)
    except zlib.error:
        return ()
    order = re.search(rb'^SLICEORDER "([01])"', text, re.M)
    many_at_once = re.search(rb'^MBACCEL "(?!1")', text, re.M)
    pause = private_value(dataset, 0x0043, 0x7C, "GEMS_PARM_01")
    if not order or many_at_once or pause or not re.search(rb'^IMODE "2D"', text, re.M):
        return ()
    step = 1 + int(order[1])
    taken = [k for first in range(step) for k in range(first, n_slices, step)]
    return tuple(float(i) * tr_s / n_slices for i in np.argsort(taken))


def _protocol(dataset: pydicom.Dataset) -> bytes:
    """Return Siemens' protocol as text; empty if there is none."""
    shared = items_of(dataset.get("SharedFunctionalGroupsSequence"))
    nested = (
        private_value(item, 0x0021, 0xFE, "SIEMENS MR SDS 01") for item in [dataset, *shared]
    )
    places = [dataset, *(item for sequence in nested for item in items_of(sequence))]
    for place in places:
        text = private_value(place, 0x0029, 0x20, "SIEMENS CSA HEADER") or private_value(
            place, 0x0021, 0x19, "SIEMENS MR SDS 01"
        )
        if isinstance(text, bytes) and (begin := text.find(b"### ASCCONV BEGIN")) >= 0:
            return text[begin : text.find(b"### ASCCONV END", begin)]
    return b""


def _entry(protocol: bytes, name: bytes) -> int | None:
    found = re.search(
        rb"^" + re.escape(name) + rb"\s*=\s*(0x[0-9a-fA-F]{1,4}|[0-9]{1,5})\b", protocol, re.M
    )
    return int(found[1], 0) if found else None


def is_ge(dataset: pydicom.Dataset) -> bool:
    """Tell whether GE made it."""
    return str(dataset.get("Manufacturer", "")).upper().startswith("GE")


def is_siemens(dataset: pydicom.Dataset) -> bool:
    """Tell whether Siemens made it."""
    return str(dataset.get("Manufacturer", "")).upper().startswith("SIEMENS")


def texts_of(value: Any) -> list[str]:
    """Return a value that may be missing, one or several texts."""
    return [value] if isinstance(value, str) else [str(part) for part in value or []]


def is_magnitude(dataset: pydicom.Dataset) -> bool:
    """Tell whether the whole file is, or may be, magnitude; frames are looked at one by one."""
    return (
        not NOT_MAGNITUDE.intersection(texts_of(dataset.get("ImageType"))[2:])
        and not private_value(dataset, 0x0043, 0x2F, "GEMS_PARM_01")
        and str(private_value(dataset, 0x2005, 0x11, PHILIPS_MR) or "M") not in NOT_MAGNITUDE
        and str(dataset.get("ComplexImageComponent")) not in NOT_MAGNITUDE
    )


def is_single_band(dataset: pydicom.Dataset) -> bool:
    """Tell whether it is the reference of a multi-band run, as CMRR's sequence writes it."""
    return bool(
        re.match("single-band reference", str(dataset.get("ImageComments", "")), re.I)
        or re.search("_SBRef$", str(dataset.get("SeriesDescription", "")), re.I)
    )


def functional_group(
    dataset: pydicom.Dataset, frame: pydicom.Dataset, name: str
) -> pydicom.Dataset:
    """Return a functional group of a frame, its own or the one all frames share."""
    shared = items_of(dataset.get("SharedFunctionalGroupsSequence"))
    groups = frame.get(name) or (shared[0].get(name) if shared else None)
    return (items_of(groups) or [pydicom.Dataset()])[0]


def items_of(sequence: Any) -> list[pydicom.Dataset]:
    """Return a sequence's items; none of what is no sequence."""
    return list(sequence) if isinstance(sequence, pydicom.Sequence) else []


def private_value(dataset: pydicom.Dataset, group: int, element: int, creator: str) -> Any:
    """Return a private value; None if there is none of this creator (DICOM PS3.5, 7.8.1)."""
    for block in range(0x10, 0x20):
        if (group, block) in dataset and dataset[group, block].value == creator:
            tag = (group, block << 8 | element)
            return dataset[tag].value if tag in dataset else None
    return None


def plane_affine(
    orientation: pydicom.Dataset, position: pydicom.Dataset, measures: pydicom.Dataset
) -> NDArray[np.float64]:
    """Return where a slice lies, from (column, row, slice) to RAS+ mm (C.7.6.2.1.1)."""
    along_row, along_column = np.array(orientation.ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = (float(spacing) for spacing in measures.PixelSpacing)
    normal = np.cross(along_row, along_column)
    thickness_mm = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 1
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = normal / (np.linalg.norm(normal) or 1) * float(thickness_mm)
    affine[:3, 3] = position.ImagePositionPatient
    return Grid((1, 1, 1), TO_RAS @ affine).affine


def value_scale(header: pydicom.Dataset, philips: Any = None) -> tuple[float, float]:
    """Return the (slope, intercept) of an image's values.

    Philips' own scale makes values that are comparable between images, the "precise" ones of
    dcm2niix: (stored * slope + intercept) / (slope * scale).
    """
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    slope = 1.0 if slope in (None, "") else float(slope)
    intercept = 0.0 if intercept in (None, "") else float(intercept)
    divisor = slope * float(philips or 0) or 1.0
    if not all(map(math.isfinite, (slope, intercept, divisor))):
        raise VolumeError("has no usable scale of values")
    return slope / divisor, intercept / divisor


def whole_number(value: Any, least: int = 1) -> int | None:
    """Return a whole number; None if it is missing, or less than *least*."""
    number = None if value is None or value == "" else int(value)
    return None if number is None or number < least else number


def volume_index(dataset: pydicom.Dataset) -> int | None:
    """Return the volume of a file that holds one, from 0."""
    numbers = (dataset.get("AcquisitionNumber"), dataset.get("InstanceNumber"))
    first = next((n for value in numbers if (n := whole_number(value)) is not None), None)
    return None if first is None else first - 1


def repetition_time_s(dataset: pydicom.Dataset) -> float | None:
    """Return the repetition time, also where it is a functional group; None if it is missing."""
    value_ms = dataset.get("RepetitionTime")
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if not value_ms and frames:
        timing = functional_group(dataset, frames[0], "MRTimingAndRelatedParametersSequence")
        value_ms = timing.get("RepetitionTime")
    return float(value_ms) / 1000 if value_ms else None


def echo_time_ms(value: Any) -> float | None:
    """Return an echo time to 0.01 ms; None if it is missing, or cannot be one."""
    return round(float(value), 2) or None if value and 0 < float(value) < math.inf else None


def acquired_s(dataset: pydicom.Dataset) -> float | None:
    """Return the start of the acquisition after midnight; anonymised headers have it empty."""
    for name, kind in (("AcquisitionTime", TM), ("AcquisitionDateTime", DT)):
        with suppress(ValueError, TypeError):
            clock = kind(dataset.get(name))
            if clock is not None:
                return of_day_s(clock)
    return None


def of_day_s(clock: TM | DT) -> float:
    """Return a time of day in seconds after midnight."""
    return clock.hour * 3600 + clock.minute * 60 + clock.second + clock.microsecond / 1e6

"""DICOM files to pieces of volumes.

    mosaic      Siemens VB12 to VE11: one file, one echo of a volume
    enhanced    multiframe: one file, one volume (Siemens XA) or any number of them (Philips)
    slices      GE, Philips classic, Siemens XA "interoperability", enhanced of one frame

Nothing of a header leaves this module but numbers and a digest of the series' UID; errors name a
kind of trouble, never a value.
"""

import atexit
import hashlib
import logging
import math
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.config import disable_value_validation
from pydicom.errors import InvalidDicomError
from pydicom.pixels.utils import pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless
from pydicom.valuerep import DT

from rtfmri.errors import GridError, RtfmriError, VolumeError
from rtfmri.readers.assembly import Piece, height_mm, stacked
from rtfmri.readers.headers import (
    NOT_MAGNITUDE,
    PHILIPS_MR,
    TO_RAS,
    Numbers,
    acquired_s,
    echo_time_ms,
    functional_group,
    is_ge,
    is_magnitude,
    is_siemens,
    is_single_band,
    items_of,
    numbers_of,
    of_day_s,
    plane_affine,
    private_value,
    repetition_time_s,
    texts_of,
    value_scale,
    volume_index,
    whole_number,
)
from rtfmri.readers.mosaic import Mosaics
from rtfmri.readers.unpacking import CUT_SHORT, Unpacker
from rtfmri.volume import Grid, untiled

with warnings.catch_warnings():
    # nibabel says this at every import; the tests compare its geometry with dcm2niix.
    warnings.filterwarnings("ignore", "The DICOM readers are highly experimental", UserWarning)
    from nibabel.nicom.csareader import get_csa_header, is_mosaic
    from nibabel.nicom.dicomwrappers import MosaicWrapper

NOT_DICOM = "is not DICOM"
NO_MAGNITUDE = "is no magnitude image"
SINGLE_BAND = "is a single-band reference"

_MOST_UNPACKED = 2**29
"""Bytes that a compressed image may come to; more than any run's in one file."""

_one_at_a_time = threading.Lock()
"""pydicom's settings, its logger and Python's warnings are the whole process's; so is its
unpacker."""
_unpacker = Unpacker()
atexit.register(_unpacker.close)


class Unwanted(VolumeError):
    """A file that is whole, but of no use for a run."""


class Decoder:
    """Reads DICOM files, and remembers what has to be read once a series.

    Digests of UIDs are made with a random key of this decoder, so that they cannot be looked up.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._known: dict[str, Numbers] = {}
        self._mosaics = Mosaics()

    def read(self, source: bytes | Path, *, voxels: bool = True) -> list[Piece]:
        """Return the magnitude pieces in a file, in the order of volumes and echoes.

        Parameters
        ----------
        source : bytes or Path
            The whole file.
        voxels : bool
            Whether the pieces can be loaded; if not, no more than the header is read.

        Raises
        ------
        Unwanted
            If it holds no magnitude image, or no image of a run.
        VolumeError
            If it is not DICOM, is cut short, or lacks what makes an image of it. `Piece.load`
            raises it, too.
        """
        if isinstance(source, bytes) and voxels and (known := self._mosaics.read(source)):
            return [known]
        with plain_errors():
            if isinstance(source, bytes) and _is_deflated(source):
                raise VolumeError("is deflated as a whole, which is not read")
            dataset = pydicom.dcmread(
                BytesIO(source) if isinstance(source, bytes) else source,
                stop_before_pixels=not voxels,
            )
            if voxels and not dataset.get("PixelData"):
                raise VolumeError("holds no image, or is cut short")
            if not is_magnitude(dataset):
                raise Unwanted(NO_MAGNITUDE)
            if is_single_band(dataset):
                raise Unwanted(SINGLE_BAND)
            pieces = self._split(dataset)
            if isinstance(source, bytes) and voxels and len(pieces) == 1:
                self._mosaics.learn(source, pieces[0])
        return [replace(piece, load=_guarded(piece)) for piece in pieces]

    def _split(self, dataset: pydicom.Dataset) -> list[Piece]:
        series = self._digest(dataset)
        numbers = self._numbers(dataset, series)
        image_type = texts_of(dataset.get("ImageType"))
        if "PerFrameFunctionalGroupsSequence" in dataset:
            pieces = _split_frames(dataset, numbers)
        elif (csa := get_csa_header(dataset)) is not None and is_mosaic(csa):
            pieces = [_split_mosaic(dataset, csa, numbers)]
        elif "MOSAIC" in image_type and "XA" not in str(dataset.get("SoftwareVersions")):
            raise VolumeError("is a mosaic without the private header that tells its slices")
        else:
            pieces = [_slice(dataset, numbers)]
        return [
            replace(
                piece,
                series=series,
                series_number=whole_number(dataset.get("SeriesNumber"), least=0),
                derived="DERIVED" in image_type[:1] or "MOCO" in image_type,
                tr_s=repetition_time_s(dataset),
            )
            for piece in pieces
        ]

    def _digest(self, dataset: pydicom.Dataset) -> str:
        uid = str(dataset.get("SeriesInstanceUID", "")).encode()
        return hashlib.blake2b(uid, digest_size=8, key=self._key).hexdigest()

    def _numbers(self, dataset: pydicom.Dataset, series: str) -> Numbers:
        if series not in self._known:
            if len(self._known) >= 16:
                self._known.clear()
            self._known[series] = numbers_of(dataset)
        return self._known[series]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn whatever a parser makes of a stranger's bytes into a VolumeError without their text.

    What parsers warn of and log quotes the header, too, and is dropped.
    """
    logger = logging.getLogger("pydicom")
    try:
        with _one_at_a_time, disable_value_validation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            was_disabled, logger.disabled = logger.disabled, True
            try:
                yield
            finally:
                logger.disabled = was_disabled
    except GridError:
        raise VolumeError("has no usable geometry") from None
    except RtfmriError:
        raise
    except InvalidDicomError:
        raise VolumeError(NOT_DICOM) from None
    except OSError as error:
        raise VolumeError(f"cannot be read: {error.strerror or 'it ends too early'}") from None
    except Exception as error:
        # Messages of pydicom and nibabel quote header values, so only the kind is told.
        raise VolumeError(f"cannot be decoded ({type(error).__name__})") from None


def _guarded(piece: Piece) -> Callable[[], NDArray[Any]]:
    def load() -> NDArray[Any]:
        with plain_errors():
            voxels = piece.load()
            if voxels.shape != piece.shape:
                raise VolumeError(CUT_SHORT)
            return voxels

    return load


def _split_mosaic(dataset: pydicom.Dataset, csa: dict[str, Any], numbers: Numbers) -> Piece:
    """Return the slices of a Siemens mosaic.

    The first slice's place and the direction of the slices come from nibabel, which corrects
    the mosaic's position and reads the slices' normal from Siemens' private header. So do the
    slices' times, in ms; older scanners have none, or zeros.
    """
    # Rounded to text they are not quite of length 1: 0.3 micrometres over a whole mosaic.
    cosines = np.array(dataset.ImageOrientationPatient, np.float64).reshape(2, 3)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    placed = pydicom.Dataset(dataset)
    placed.ImageOrientationPatient = cosines.ravel().tolist()
    wrapper = MosaicWrapper(placed, csa)
    n_rows, n_columns, n_slices = (int(n) for n in wrapper.image_shape)
    affine = Grid((n_columns, n_rows, n_slices), TO_RAS @ wrapper.affine[:, [1, 0, 2, 3]]).affine
    scale = value_scale(dataset)
    times_ms = csa["tags"].get("MosaicRefAcqTimes", {}).get("items", [])

    def load() -> NDArray[Any]:
        slices = untiled(_pixels(dataset), (n_columns, n_rows, n_slices)).T
        return _rescaled(slices, [scale])

    return Piece(
        series="",
        shape=(n_slices, n_rows, n_columns),
        affine=affine,
        load=load,
        index=volume_index(dataset),
        n_slices=n_slices,
        n_echoes=numbers.n_echoes,
        echo_time_ms=echo_time_ms(dataset.get("EchoTime")),
        acquired_s=acquired_s(dataset),
        times_s=tuple(float(time_ms) / 1000 for time_ms in times_ms),
    )


def _slice(dataset: pydicom.Dataset, numbers: Numbers) -> Piece:
    """Return a file that holds one slice."""
    temporal = whole_number(dataset.get("TemporalPositionIdentifier"))
    instance = whole_number(dataset.get("InstanceNumber"))
    index = temporal - 1 if temporal else volume_index(dataset) if is_siemens(dataset) else None
    if index is None and instance is None:
        raise VolumeError("has no InstanceNumber")
    scale = value_scale(dataset, private_value(dataset, 0x2005, 0x0E, PHILIPS_MR))
    in_stack = whole_number(dataset.get("InStackPositionNumber")) or 0
    return Piece(
        series="",
        shape=(1, int(dataset.Rows), int(dataset.Columns)),
        affine=plane_affine(dataset, dataset, dataset),
        load=lambda: _rescaled(_pixels(dataset)[None], [scale]),
        index=index,
        instance=None if instance is None else instance - 1,
        n_slices=numbers.n_slices,
        n_echoes=numbers.n_echoes,
        echo_time_ms=echo_time_ms(dataset.get("EchoTime")),
        # GE has the time of the series here.
        acquired_s=None if is_ge(dataset) else acquired_s(dataset),
        times_s=numbers.times_s[in_stack - 1 : in_stack] if in_stack else (),
    )


class _Frame(NamedTuple):
    number: int
    """In the file, from 0."""
    affine: NDArray[np.float64]
    echo_time_ms: float | None
    time: int | None
    """Of the volume in the run, from 0."""
    scale: tuple[float, float]
    clock: DT | None


def _split_frames(dataset: pydicom.Dataset, numbers: Numbers) -> list[Piece]:
    """Return the volumes and echoes of an enhanced image (DICOM PS3.3, C.7.6.16.2).

    Frames whose header does not tell their volumes apart are taken to be in the volumes' order.
    """
    groups = dataset.PerFrameFunctionalGroupsSequence
    frames = [f for i, group in enumerate(groups) if (f := _frame(dataset, group, i)) is not None]
    if not frames:
        raise Unwanted(NO_MAGNITUDE)
    places = [(frame.echo_time_ms or 0.0, height_mm(frame.affine)) for frame in frames]
    times = [frame.time or 0 for frame in frames]
    if len(set(zip(places, times, strict=True))) < len(frames):
        nth = {place: count() for place in places}
        times = [next(nth[place]) for place in places]
    stacks: dict[tuple[int, float], list[_Frame]] = {}
    for frame, time, (echo, _) in zip(frames, times, places, strict=True):
        stacks.setdefault((time, echo), []).append(frame)
    n_slices = max(len(stack) for stack in stacks.values())
    n_echoes = len({echo for _, echo in stacks})
    if n_slices == 1:
        n_slices = numbers.n_slices or (1 if len(groups) > 1 else 0)
    alone = len({time for time, _ in stacks}) == 1
    shape = (len(groups), int(dataset.Rows), int(dataset.Columns))
    pixels = cache(partial(_all_frames, dataset, shape))
    start_s = acquired_s(dataset) if alone and len(frames) > 1 else None
    return [
        replace(
            _frames_piece(stack, len(stack) == n_slices, shape, pixels, start_s),
            index=volume_index(dataset) if alone else time,
            n_slices=n_slices or None,
            n_echoes=n_echoes if n_echoes > 1 else numbers.n_echoes,
        )
        for (time, _), stack in sorted(stacks.items(), key=lambda item: item[0])
    ]


def _frame(dataset: pydicom.Dataset, group: pydicom.Dataset, number: int) -> _Frame | None:
    """Read one frame's functional groups; None if it is no magnitude image."""
    kind = functional_group(dataset, group, "MRImageFrameTypeSequence")
    if NOT_MAGNITUDE.intersection(
        [*texts_of(kind.get("FrameType"))[2:], str(kind.get("ComplexImageComponent"))]
    ):
        return None
    content = functional_group(dataset, group, "FrameContentSequence")
    time = whole_number(content.get("TemporalPositionIndex"))
    clock = None
    with suppress(ValueError, TypeError):  # there is none, or no usable one
        clock = DT(content.get("FrameAcquisitionDateTime"))
    philips = items_of(private_value(group, 0x2005, 0x0F, "Philips MR Imaging DD 005"))
    return _Frame(
        number=number,
        affine=plane_affine(
            functional_group(dataset, group, "PlaneOrientationSequence"),
            functional_group(dataset, group, "PlanePositionSequence"),
            functional_group(dataset, group, "PixelMeasuresSequence"),
        ),
        echo_time_ms=echo_time_ms(
            functional_group(dataset, group, "MREchoSequence").get("EffectiveEchoTime")
        ),
        time=None if time is None else time - 1,
        scale=value_scale(
            functional_group(dataset, group, "PixelValueTransformationSequence"),
            private_value(philips[0], 0x2005, 0x0E, PHILIPS_MR) if philips else None,
        ),
        clock=clock or None,
    )


def _frames_piece(
    frames: list[_Frame],
    is_whole: bool,
    shape: tuple[int, int, int],
    pixels: Callable[[], NDArray[Any]],
    start_s: float | None,
) -> Piece:
    """Return the frames of one volume and echo, sorted along their normal."""
    frames = sorted(frames, key=lambda frame: height_mm(frame.affine))
    affines = [frame.affine for frame in frames]
    numbers, scales = [frame.number for frame in frames], [frame.scale for frame in frames]
    clocks = [frame.clock for frame in frames if frame.clock]
    times_s: tuple[float, ...] = ()
    with suppress(TypeError):  # one of them has a time zone
        if 1 < len(clocks) == len(frames):
            times_s = tuple((clock - min(clocks)).total_seconds() for clock in clocks)
    return Piece(
        series="",
        shape=(len(frames), *shape[1:]),
        affine=stacked(affines) if is_whole else affines[0],
        load=lambda: _rescaled(pixels()[numbers], scales),
        echo_time_ms=frames[0].echo_time_ms,
        acquired_s=of_day_s(min(clocks)) if clocks and start_s is None else start_s,
        times_s=times_s,
    )


def _pixels(dataset: pydicom.Dataset) -> NDArray[Any]:
    syntax = dataset.file_meta.TransferSyntaxUID
    shape = (dataset.get("NumberOfFrames") or 1, dataset.Rows, dataset.Columns)
    if syntax.is_compressed and math.prod(int(n) for n in shape) * 2 > _MOST_UNPACKED:
        raise VolumeError("holds an image larger than 512 MiB when unpacked")
    if syntax.is_compressed and syntax != RLELossless:
        return _unpacker.unpack(dataset)
    try:
        return pixel_array(dataset, raw=True)
    except ValueError:
        raise VolumeError(CUT_SHORT) from None


def _all_frames(dataset: pydicom.Dataset, shape: tuple[int, int, int]) -> NDArray[Any]:
    pixels = _pixels(dataset)
    if pixels.size != math.prod(shape):
        raise VolumeError(CUT_SHORT)
    return pixels.reshape(shape)


def _is_deflated(data: bytes) -> bool:
    """Tell whether the header says so; what is small may unfold to any size."""
    return DeflatedExplicitVRLittleEndian.encode() in data[:4096]


def _rescaled(slices: NDArray[Any], scales: list[tuple[float, float]]) -> NDArray[Any]:
    """Apply one (slope, intercept) to all slices, or one to each; keep integers if it is 1, 0."""
    factors = np.array(scales, np.float32)
    if (factors == (1, 0)).all():
        return slices
    slope, intercept = factors.T[:, :, None, None]
    scaled: NDArray[Any] = slices * slope + intercept
    return scaled

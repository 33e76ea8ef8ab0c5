"""MRD (ISMRMRD) streams, as scanners send them to a reconstruction server.

A message is a uint16 that tells its kind, and a body; all numbers are little-endian. Facts are
from the MRD 1.x documentation (ismrmrd.readthedocs.io) and from python-ismrmrd-server. Of the XML
header only the repetition time and the number of slices are looked at; whom it is about is never
kept.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.etree.ElementTree import XMLParser

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import VolumeError
from rtfmri.readers import CUT_SHORT, Skipped
from rtfmri.readers.network import Allowed, parse_address
from rtfmri.readers.stream import (
    NO_GEOMETRY,
    Incoming,
    Item,
    NotOurs,
    StreamReader,
    checked_shape,
    make_volume,
    parsing,
)
from rtfmri.volume import unflatten

PORT = 9002
CONFIG_FILE, CONFIG_TEXT, HEADER, CLOSE, TEXT = 1, 2, 3, 4, 5
ACQUISITION, IMAGE, WAVEFORM = 1008, 1022, 1026
CONFIG_FILE_BYTES = 1024
KIND = struct.Struct("<H")
TEXT_LENGTH = struct.Struct("<I")
ATTRIBUTES_LENGTH = struct.Struct("<Q")
IMAGE_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("data_type", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("matrix_size", "<u2", 3),
        ("field_of_view", "<f4", 3),
        ("channels", "<u2"),
        ("position", "<f4", 3),
        ("read_dir", "<f4", 3),
        ("phase_dir", "<f4", 3),
        ("slice_dir", "<f4", 3),
        ("patient_table_position", "<f4", 3),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", 3),
        ("image_type", "<u2"),
        ("image_index", "<u2"),
        ("image_series_index", "<u2"),
        ("user_int", "<i4", 8),
        ("user_float", "<f4", 8),
        ("attribute_string_len", "<u4"),
    ]
)
DATA_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u2"),
    2: np.dtype("<i2"),
    3: np.dtype("<u4"),
    4: np.dtype("<i4"),
    5: np.dtype("<f4"),
    6: np.dtype("<f8"),
    7: np.dtype("<c8"),
    8: np.dtype("<c16"),
}
MAGNITUDE = 1
_GEOMETRY = ("field_of_view", "position", "read_dir", "phase_dir", "slice_dir")
_UNSET = 0
_ACQUISITION_BYTES, _WAVEFORM_BYTES = 340, 40
_VOLUMES_IN_PIECES = 4
"""So many may be incomplete at once; slices come one volume after the other."""


def open_mrd(
    target: str, tr_s: float | None, *, allow: Allowed | None = None, **options: Any
) -> "MrdReader":
    """Open a listener for MRD streams; *options* are those of `StreamReader`."""
    return MrdReader(parse_address(target, PORT, allow), tr_s, allow=allow, **options)


@dataclass(slots=True)
class _Scan:
    """What is known of a connection's measurement."""

    tr_s: float | None = None
    n_slices: int = 0
    in_pieces: dict[int, "_Slices"] = field(default_factory=dict)


@dataclass(slots=True)
class _Slices:
    """A volume that comes slice by slice."""

    voxels: NDArray[Any]
    """(x, y, z), x fastest."""
    first: Any
    """Header of the slice that came first."""
    positions_mm: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Of the slices' centres, LPS."""


class MrdReader(StreamReader):
    """Reader of MRD images: magnitude images of one series and one echo, whole or as slices.

    The volume's number is the images' ``repetition``. The measurement's end is its CLOSE message,
    which is answered with another.
    """

    def _read(self, incoming: Incoming) -> Iterator[Item]:
        scan = _Scan()
        try:
            while True:
                (kind,) = KIND.unpack(incoming.exactly(KIND.size))
                if kind == IMAGE:
                    yield from self._image(incoming, scan)
                elif kind == CLOSE:
                    yield from _unfinished(scan)
                    if incoming.introduced:
                        yield self._end()
                    incoming.reply(KIND.pack(CLOSE))
                    return
                else:
                    _take_in(kind, incoming, scan)
        except (EOFError, OSError):
            yield from _unfinished(scan)
            raise

    def _image(self, incoming: Incoming, scan: _Scan) -> Iterator[Item]:
        head = np.frombuffer(incoming.exactly(IMAGE_HEADER.itemsize), IMAGE_HEADER)[0]
        shape = checked_shape(head["matrix_size"].tolist())
        n_voxels = shape[0] * shape[1] * shape[2]
        dtype: np.dtype[Any] | None = DATA_TYPES.get(int(head["data_type"]))
        channels = int(head["channels"])
        if dtype is None or not 0 < channels <= 1024:
            raise NotOurs
        (n_bytes,) = ATTRIBUTES_LENGTH.unpack(incoming.exactly(ATTRIBUTES_LENGTH.size))
        incoming.welcome()
        incoming.skip(n_bytes)
        name = f"volume {head['repetition']}"
        reason = _unusable(head, dtype, scan)
        if reason:
            incoming.skip(n_voxels * channels * dtype.itemsize)
            yield Skipped(name, reason)
            return
        if shape[2] > 1:
            flat = np.empty(n_voxels, dtype)
            arrived_s = incoming.voxels(name, flat)
            yield from self._volume(head, unflatten(flat, shape), _affine(head), scan, arrived_s)
            return
        slices = _place_for(head, shape, dtype, scan)
        while len(scan.in_pieces) > _VOLUMES_IN_PIECES:
            oldest = next(iter(scan.in_pieces))
            del scan.in_pieces[oldest]
            yield Skipped(f"volume {oldest}", CUT_SHORT)
        z = int(head["slice"])
        arrived_s = incoming.voxels(name, slices.voxels[:, :, z].reshape(-1, order="F"))
        slices.positions_mm[z] = head["position"].astype(np.float64)
        if len(slices.positions_mm) == scan.n_slices:
            del scan.in_pieces[int(head["repetition"])]
            try:
                voxels, affine = _stacked(slices)
            except VolumeError as error:
                yield Skipped(name, str(error))
                return
            yield from self._volume(head, voxels, affine, scan, arrived_s)

    def _volume(
        self,
        head: Any,
        voxels: NDArray[Any],
        affine: NDArray[np.float64],
        scan: _Scan,
        arrived_s: float,
    ) -> Iterator[Item]:
        index = int(head["repetition"])
        try:
            volume = make_volume(
                voxels,
                affine,
                index=index,
                tr_s=self._checked_tr(scan.tr_s),
                arrived_s=arrived_s,
            )
        except VolumeError as error:
            yield Skipped(f"volume {index}", str(error))
            return
        yield from self._offer(volume, series=int(head["image_series_index"]))


def _unfinished(scan: _Scan) -> Iterator[Skipped]:
    for index in scan.in_pieces:
        yield Skipped(f"volume {index}", CUT_SHORT)
    scan.in_pieces.clear()


def _take_in(kind: int, incoming: Incoming, scan: _Scan) -> None:
    """Read a message that is no image."""
    if kind == CONFIG_FILE:
        incoming.exactly(CONFIG_FILE_BYTES)
    elif kind in (CONFIG_TEXT, HEADER, TEXT):
        (n_bytes,) = TEXT_LENGTH.unpack(incoming.exactly(TEXT_LENGTH.size))
        text = incoming.exactly(n_bytes)
        if kind == HEADER:
            scan.tr_s, scan.n_slices = _parse(text)
            incoming.welcome()
    elif kind == ACQUISITION:
        # Raw data: complex numbers for each channel and sample, after a trajectory.
        head = incoming.exactly(_ACQUISITION_BYTES)
        n_samples, _, n_channels = struct.unpack_from("<3H", head, 34)
        (n_dimensions,) = struct.unpack_from("<H", head, 176)
        incoming.skip(n_samples * (4 * n_dimensions + 8 * n_channels))
    elif kind == WAVEFORM:
        n_samples, n_channels = struct.unpack_from("<2H", incoming.exactly(_WAVEFORM_BYTES), 28)
        incoming.skip(4 * n_samples * n_channels)
    else:
        raise NotOurs


def _parse(text: bytes) -> tuple[float | None, int]:
    """Return an XML header's repetition time in seconds, if any, and number of slices, or 0."""
    with parsing():
        target = _HeaderTarget()
        parser = XMLParser(target=target)
        parser.feed(text.rstrip(b"\0"))
        parser.close()
        found = target.found
        tr_ms = found.get(_TR)
        last = found.get(_LAST_SLICE)
        return (
            None if tr_ms is None else float(tr_ms) / 1000,
            0 if last is None else int(last) + 1,
        )


_TR = ("ismrmrdHeader", "sequenceParameters", "TR")
_LAST_SLICE = ("ismrmrdHeader", "encoding", "encodingLimits", "slice", "maximum")


class _HeaderTarget:
    """Keeps two elements' first texts, and forgets the rest while it is read."""

    def __init__(self) -> None:
        self._path: list[str] = []
        self.found: dict[tuple[str, ...], str] = {}
        self._texts: list[str] | None = None

    def doctype(self, *_: object) -> None:
        """Refuse documents that declare anything: what they declare may explode."""
        raise NotOurs

    def start(self, tag: str, _: object) -> None:
        self._path.append(tag.rpartition("}")[2])
        if self._path[0] != _TR[0]:
            raise NotOurs
        path = tuple(self._path)
        self._texts = [] if path in (_TR, _LAST_SLICE) and path not in self.found else None

    def data(self, text: str) -> None:
        if self._texts is not None:
            self._texts.append(text)

    def end(self, _: str) -> None:
        if self._texts is not None:
            self.found[tuple(self._path)] = "".join(self._texts)
        self._texts = None
        self._path.pop()


def _unusable(head: Any, dtype: np.dtype[Any], scan: _Scan) -> str | None:
    """Return why an image is not of the volumes that are read; None if it is."""
    if head["image_type"] not in (_UNSET, MAGNITUDE) or dtype.kind == "c":
        return "is not a magnitude image"
    if not all(np.isfinite(head[name]).all() for name in _GEOMETRY):
        return NO_GEOMETRY
    if head["channels"] != 1:
        return "has more than one channel"
    if head["contrast"] != 0:
        return "is of a later echo"
    if head["matrix_size"][2] == 1 and not head["slice"] < scan.n_slices:
        return "is a slice, and the header does not say of how many"
    return None


def _place_for(
    head: Any, shape: tuple[int, int, int], dtype: np.dtype[Any], scan: _Scan
) -> _Slices:
    """Return the volume to which a slice belongs; a new one if it is its first."""
    whole = checked_shape((shape[0], shape[1], scan.n_slices))
    slices = scan.in_pieces.get(int(head["repetition"]))
    if slices is None or slices.voxels.shape != whole or slices.voxels.dtype != dtype:
        slices = _Slices(np.empty(whole, dtype, order="F"), head)
        scan.in_pieces[int(head["repetition"])] = slices
    return slices


def _affine(head: Any) -> NDArray[np.float64]:
    """Return the affine of a whole volume, to RAS+.

    Directions and the position, which is that of the middle of the volume, are LPS+.
    """
    steps = (head["field_of_view"] / head["matrix_size"]).astype(np.float64)
    axes = np.stack([head["read_dir"], head["phase_dir"], head["slice_dir"]], 1) * steps
    return _to_ras(axes, head["position"], (head["matrix_size"] - 1.0) / 2)


def _stacked(slices: _Slices) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return a volume that came as slices, ordered by their places, and its affine.

    Raises
    ------
    VolumeError
        If the slices are not evenly spaced.
    """
    head = slices.first
    steps = (head["field_of_view"] / head["matrix_size"]).astype(np.float64)
    axes = np.stack([head["read_dir"] * steps[0], head["phase_dir"] * steps[1]], 1)
    centres = np.stack([slices.positions_mm[z] for z in range(slices.voxels.shape[2])])
    if len(centres) == 1:
        return slices.voxels, _affine(head)
    heights_mm = centres @ np.cross(*axes.T)
    gaps = np.diff(heights_mm)
    voxels = slices.voxels
    if not ((gaps > 0).all() or (gaps < 0).all()):
        order = np.argsort(heights_mm)
        voxels, centres = np.asfortranarray(voxels[:, :, order]), centres[order]
    step = (centres[-1] - centres[0]) / (len(centres) - 1)
    places = centres[0] + np.arange(len(centres))[:, None] * step
    if np.abs(centres - places).max() > 0.05 * np.linalg.norm(step):
        raise VolumeError("has slices that are not evenly spaced")
    n_x, n_y = voxels.shape[:2]
    middle = np.array([(n_x - 1) / 2, (n_y - 1) / 2, 0])
    return voxels, _to_ras(np.column_stack([axes, step]), centres[0], middle)


def _to_ras(
    axes: NDArray[np.float64], position: NDArray[Any], voxel: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the RAS+ affine whose *voxel* lies at *position*, LPS+."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = position - axes @ voxel
    return np.diag([-1.0, -1, 1, 1]) @ affine

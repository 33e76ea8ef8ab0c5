"""The fast way through a Siemens mosaic that is like one before it.

A file's elements are walked, not parsed. Where all that decides shape, position, scale and series
is byte for byte what it was in a file that was read thoroughly, only the numbers that count
volumes, the clocks and the voxels are taken from the new one. Anything else is for the thorough
way. It takes 1.4 (104 x 104 x 72) to 1.9 times (74 x 74 x 36) as long as reading the file and
sorting its tiles alone; the thorough way takes 7 to 18 times as long.

Facts about the CSA header are nibabel's (nipy.org/nibabel, "Siemens format DICOM with CSA
header"); explicit VR little endian is DICOM PS3.5, 7.1.2.
"""

import math
import re
import struct
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rtfmri.readers.assembly import Piece
from rtfmri.volume import untiled

_HEAD = struct.Struct("<HH2sH")
_LENGTH = struct.Struct("<I")
_CSA_ITEMS = struct.Struct("<i4s3i")
_CSA_ITEM = struct.Struct("<4i")
_SHORT = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED = 0xFFFFFFFF
_SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
_OPEN_SEQUENCE = struct.pack("<2sHI", b"SQ", 0, _UNDEFINED)

_TIME, _DATE_TIME, _COMMENTS = 0x00080032, 0x0008002A, 0x00204000
_ACQUISITION, _INSTANCE, _CSA, _PIXELS = 0x00200012, 0x00200013, 0x00291010, 0x7FE00010
_VARYING = frozenset((_TIME, _DATE_TIME, _COMMENTS, _ACQUISITION, _INSTANCE, _CSA))
_DECISIVE = frozenset(
    (
        *(0x00020010, 0x00080008, 0x00080016, 0x00080070, 0x0008103E, 0x00089208),
        *(0x00180024, 0x00180050, 0x00180080, 0x00180081, 0x00180086, 0x00180088, 0x00189005),
        *(0x0020000E, 0x00200011, 0x00200032, 0x00200037, 0x00290010),
        *(0x00280000 + n for n in (2, 4, 6, 8, 0x10, 0x11, 0x30, 0x100, 0x101, 0x102, 0x103)),
        *(0x00281052, 0x00281053, 0x00281054),
    )
)
"""Transfer syntax, kind and maker of the image; sequence, sizes and times; series and place; how
pixels are stored and scaled."""
_SYNTAX = _HEAD.pack(2, 0x10, b"UI", 20) + b"1.2.840.10008.1.2.1\0"
_CREATOR = b"SIEMENS CSA HEADER"
_GEOMETRY = (b"NumberOfImagesInMosaic\0", b"SliceNormalVector\0")
_SLICE_TIMES = b"MosaicRefAcqTimes\0"
_MOST_TEMPLATES = 16
"""There is one for each echo; where the scanner follows the head, one for each volume."""


class _Walked(NamedTuple):
    decisive: bytes
    varying: dict[int, bytes]
    pixels_at: int


class _Template(NamedTuple):
    piece: Piece
    dtype: np.dtype[Any]
    n_tiles: int
    """Along a side of the mosaic."""
    geometry: tuple[bytes, ...]
    """The CSA header's tags that decide it."""
    slice_times: bytes
    """The CSA header's tag; empty if there is none."""


class Mosaics:
    """Mosaics that were read thoroughly, to know others like them."""

    def __init__(self) -> None:
        self._templates: dict[bytes, _Template] = {}

    def learn(self, data: bytes, piece: Piece) -> None:
        """Take a file and what was read of it, if the fast way gives just the same."""
        walked = _walk(data)
        csa = walked.varying.get(_CSA, b"") if walked else b""
        if not walked or not csa.startswith(b"SV10"):
            return
        if _SYNTAX not in walked.decisive or _CREATOR not in walked.decisive:
            return
        voxels = piece.load()
        try:
            template = _Template(
                piece,
                voxels.dtype.newbyteorder("<"),
                math.ceil(math.sqrt(piece.shape[0])),
                tuple(_csa_tag(csa, name) for name in _GEOMETRY),
                _csa_tag(csa, _SLICE_TIMES) if _SLICE_TIMES in csa else b"",
            )
            again = _like(template, data, walked)
        except (ValueError, struct.error):
            return
        same = (again.index, again.acquired_s, again.times_s) == (
            piece.index,
            piece.acquired_s,
            piece.times_s,
        )
        if same and np.array_equal(again.load(), voxels):
            if len(self._templates) >= _MOST_TEMPLATES:
                self._templates.clear()
            # The piece must not keep its file in memory.
            piece = replace(piece, load=lambda: np.empty(0))
            self._templates[walked.decisive] = template._replace(piece=piece)

    def read(self, data: bytes) -> Piece | None:
        """Return the piece in a file that is like a known one; None if it is not."""
        walked = _walk(data)
        template = self._templates.get(walked.decisive) if walked else None
        if not walked or not template:
            return None
        try:
            return _like(template, data, walked)
        except (ValueError, struct.error):
            return None


def _walk(data: bytes) -> _Walked | None:
    """Return what matters of a file that ends with its pixels; None if it is built otherwise."""
    if data[128:132] != b"DICM":
        return None
    decisive: list[bytes] = []
    varying: dict[int, bytes] = {}
    before, at = 0, 132
    try:
        while True:
            group, element, kind, length = _HEAD.unpack_from(data, at)
            begin, at = at, at + 8
            if kind in _LONG:
                (length,) = _LENGTH.unpack_from(data, at)
                at += 4
            elif kind not in _SHORT:
                return None
            tag = group << 16 | element
            if tag <= before:
                return None
            before = tag
            if tag == _PIXELS:
                is_whole = at + length == len(data)
                return _Walked(b"".join(decisive), varying, at) if is_whole else None
            if length == _UNDEFINED:
                end = data.find(_SEQUENCE_END, at)
                if end < 0 or kind != b"SQ" or data.find(_OPEN_SEQUENCE, at, end) >= 0:
                    return None
                length = end + len(_SEQUENCE_END) - at
            if tag in _DECISIVE:
                decisive.append(data[begin : at + length])
            elif tag in _VARYING:
                varying[tag] = data[at : at + length]
            at += length
    except struct.error:  # it ends too early
        return None


def _like(template: _Template, data: bytes, walked: _Walked) -> Piece:
    """Return the piece in a file whose decisive elements are those of *template*.

    Raises
    ------
    ValueError, struct.error
        If anything else in it is unusual.
    """
    n_slices, n_rows, n_columns = template.piece.shape
    varying, n_tiles = walked.varying, template.n_tiles
    csa = varying.get(_CSA, b"")
    if not all(tag in csa for tag in template.geometry) or varying.get(_DATE_TIME):
        raise ValueError
    if b"reference" in varying.get(_COMMENTS, b"").lower():
        raise ValueError
    index = _number(varying.get(_ACQUISITION, b"")) or _number(varying.get(_INSTANCE, b""))
    if not index:
        raise ValueError
    times_s = template.piece.times_s
    if not template.slice_times or template.slice_times not in csa:
        times_s = _slice_times_s(csa) if _SLICE_TIMES in csa else ()
    pixels = np.frombuffer(data, template.dtype, offset=walked.pixels_at)
    pixels = pixels.reshape(n_rows * n_tiles, n_columns * n_tiles)
    slices = untiled(pixels, (n_columns, n_rows, n_slices)).T
    return replace(
        template.piece,
        load=lambda: slices,
        index=index - 1,
        acquired_s=_acquired_s(varying.get(_TIME, b"")),
        times_s=times_s,
    )


def _number(text: bytes) -> int:
    """Return an integer string; 0 if it is empty."""
    digits = re.fullmatch(rb" *([0-9]{0,9})[ \0]*", text)
    if not digits:
        raise ValueError
    return int(digits[1] or 0)


def _acquired_s(text: bytes) -> float | None:
    """Return a time of day in seconds; None if it is empty."""
    if not text.strip(b" \0"):
        return None
    parts = re.fullmatch(rb"([01][0-9]|2[0-3])([0-5][0-9])([0-5][0-9])\.([0-9]{6})[ \0]*", text)
    if not parts:
        raise ValueError
    hours, minutes, seconds, microseconds = (int(part) for part in parts.groups())
    return hours * 3600 + minutes * 60 + seconds + microseconds / 1e6


def _csa_tag(csa: bytes, name: bytes) -> bytes:
    """Return a tag of a CSA header of type 2, with its items."""
    begin = csa.index(name)
    at = begin + 64
    (_, _, _, n_items, _) = _CSA_ITEMS.unpack_from(csa, at)
    at += _CSA_ITEMS.size
    for _ in range(min(n_items, 1000)):
        length = _CSA_ITEM.unpack_from(csa, at)[1]
        if length < 0:
            raise ValueError
        at += _CSA_ITEM.size + length + -length % 4
    return csa[begin:at]


def _slice_times_s(csa: bytes) -> tuple[float, ...]:
    tag = _csa_tag(csa, _SLICE_TIMES)
    n_items = _CSA_ITEMS.unpack_from(tag, 64)[3]
    at, times_s = 64 + _CSA_ITEMS.size, []
    for _ in range(n_items):
        length = _CSA_ITEM.unpack_from(tag, at)[1]
        at += _CSA_ITEM.size
        if length:
            times_s.append(float(tag[at : at + length].partition(b"\0")[0]) / 1000)
        at += length + -length % 4
    return tuple(times_s)

"""Siemens' vSend, as murfi2 receives it: a C struct and an image, one connection a volume.

The struct is `RtExternalImageInfo` of murfi2 (src/io/RtExternalSenderImageInfo.h), as compilers
lay it out on 64-bit machines; murfi takes its matrix for voxel to RAS+.
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import VolumeError
from rtfmri.readers import Skipped
from rtfmri.readers.network import Allowed, parse_address
from rtfmri.readers.stream import (
    Incoming,
    Item,
    NotOurs,
    StreamReader,
    checked_shape,
    make_volume,
)
from rtfmri.volume import unflatten, untiled

PORT = 15000
MAGIC = b"ERTI"
VERSION = 4
IMAGE_INFO = np.dtype(
    [
        ("magic", "S5"),
        ("version", "<i4"),
        ("series_uid", "S64"),
        ("scan_type", "S64"),
        ("image_type", "S16"),
        ("note", "S256"),
        ("data_type", "S16"),
        ("is_little_endian", "?"),
        ("is_mosaic", "?"),
        ("spacing_mm", "<f8", 3),
        ("slice_gap_mm", "<f8"),
        ("shape", "<i4", 3),
        ("voxel_to_world", "<f4", (4, 4)),
        ("repetition_time_ms", "<i4"),
        ("repetition_delay_ms", "<i4"),
        ("current_tr", "<i4"),
        ("total_tr", "<i4"),
        ("is_motion_corrected", "?"),
        ("correction_order", "S5"),
        ("translation_mm", "<f8", 3),
        ("rotation_deg", "<f8", 3),
    ],
    align=True,
)
DATA_TYPES = {
    b"char": "i1",
    b"uchar": "u1",
    b"int16_t": "i2",
    b"uint16_t": "u2",
    b"int32_t": "i4",
    b"uint32_t": "u4",
    b"float32_t": "f4",
    b"float64_t": "f8",
}
_SIZES = struct.Struct("<2i")
"""Some Siemens systems send the sizes of header and image before them."""


def open_murfi(
    target: str, tr_s: float | None, *, allow: Allowed | None = None, **options: Any
) -> "MurfiReader":
    """Open a listener for vSend; *options* are those of `StreamReader`."""
    return MurfiReader(parse_address(target, PORT, allow), tr_s, allow=allow, **options)


class MurfiReader(StreamReader):
    """Reader of vSend; a run ends when the volumes are there that its header announces."""

    def _read(self, incoming: Incoming) -> Iterator[Item]:
        while True:
            start = incoming.exactly(_SIZES.size)
            if _SIZES.unpack(start)[0] == IMAGE_INFO.itemsize:
                start = b""
            rest = incoming.exactly(IMAGE_INFO.itemsize - len(start))
            info = np.frombuffer(start + rest, IMAGE_INFO)[0]
            if info["magic"] != MAGIC or info["version"] != VERSION:
                raise NotOurs
            yield from self._volume(info, incoming)

    def _volume(self, info: Any, incoming: Incoming) -> Iterator[Item]:
        shape = checked_shape(info["shape"].tolist())
        code = DATA_TYPES.get(info["data_type"])
        if code is None:
            raise NotOurs
        incoming.welcome()
        n_tiles = math.ceil(math.sqrt(shape[2])) ** 2 if info["is_mosaic"] else shape[2]
        order = "<" if info["is_little_endian"] else ">"
        flat = np.empty(shape[0] * shape[1] * n_tiles, order + code)
        index = int(info["current_tr"]) - 1
        name = f"volume {index}"
        arrived_s = incoming.voxels(name, flat)
        try:
            volume = make_volume(
                _voxels(flat, shape, mosaic=bool(info["is_mosaic"])),
                info["voxel_to_world"],
                index=index,
                tr_s=self._checked_tr(int(info["repetition_time_ms"]) / 1000),
                arrived_s=arrived_s,
            )
        except VolumeError as error:
            yield Skipped(name, str(error))
            return
        series = hashlib.blake2b(info["series_uid"], digest_size=8).digest()
        announced = int(info["total_tr"]) or None
        yield from self._offer(volume, series=series, announced=announced)


def _voxels(flat: NDArray[Any], shape: tuple[int, int, int], *, mosaic: bool) -> NDArray[Any]:
    """Return an image as (x, y, z)."""
    if not mosaic:
        return unflatten(flat, shape)
    n_tiles = math.ceil(math.sqrt(shape[2]))
    return untiled(flat.reshape(n_tiles * shape[1], n_tiles * shape[0]), shape)

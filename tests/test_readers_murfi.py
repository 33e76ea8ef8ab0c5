"""vSend, literally as in murfi2's RtExternalSenderImageInfo.h and its external_image.py."""

import socket
import struct

import numpy as np
import pytest

from dicom_files import PATIENT
from rtfmri.readers import RunEnd, Skipped, open_reader
from rtfmri.readers.network import Address
from rtfmri.simulator.streams import MurfiTarget
from stream_runs import GRID, Items, indices, received, skipped, volume, volumes

# magic, version, series UID, scan type, image type, note, data type, little-endian, mosaic, three
# spacings, gap, three sizes, matrix, TR, delay, current TR, total TR, motion corrected, its order,
# three translations, three rotations: in native alignment, as a C compiler lays it out.
INFO = struct.Struct("@5s i 64s 64s 16s 256s 16s ? ? 4d 3i 16f 4i ? 5s 6d")


def info(index: int, *, total: int = 0, uid: bytes = b"1.2.3", mosaic: bool = False, **changes):
    fields = {
        "magic": b"ERTI",
        "version": 4,
        "data_type": b"int16_t",
        "little": True,
        "shape": GRID.shape,
        "matrix": GRID.affine.ravel(),
        "tr_ms": 100,
    } | changes
    return INFO.pack(
        fields["magic"],
        fields["version"],
        uid,
        PATIENT.encode(),
        b"3Dt",
        PATIENT.encode(),
        fields["data_type"],
        fields["little"],
        mosaic,
        *GRID.voxel_size_mm,
        0.0,
        *fields["shape"],
        *fields["matrix"],
        fields["tr_ms"],
        0,
        index + 1,
        total,
        False,
        b"TZYX",
        *[0.0] * 6,
    )


def mosaic_of(data: np.ndarray) -> np.ndarray:
    """Return slices in tiles, row by row, in a square."""
    n_x, n_y, n_z = data.shape
    n = int(np.ceil(np.sqrt(n_z)))
    tiles = np.zeros((n * n_y, n * n_x), data.dtype)
    for z in range(n_z):
        row, column = z // n * n_y, z % n * n_x
        tiles[row : row + n_y, column : column + n_x] = data[:, :, z].T
    return tiles


def receive(*messages: bytes, query: str = "timeout_s=0.3") -> Items:
    """Send each message by a connection of its own."""
    reader = open_reader(f"murfi://:0?{query}")

    def send() -> None:
        for message in messages:
            with socket.create_connection(
                (reader.address.host, reader.address.port)
            ) as connection:
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b""

    try:
        return received(reader, send)
    finally:
        reader.close()


def test_the_struct_has_its_size():
    assert INFO.size == 616


@pytest.mark.parametrize("mosaic", [True, False])
@pytest.mark.parametrize("before", [b"", struct.pack("<2i", 616, 0)])
def test_volumes_as_siemens_sends_them(mosaic, before, caplog):
    caplog.set_level("DEBUG")
    messages = [
        before
        + info(i, mosaic=mosaic, total=3)
        + (mosaic_of(volume(i).data).tobytes() if mosaic else volume(i).data.tobytes(order="F"))
        for i in range(3)
    ]
    items = receive(*messages, query="")
    assert indices(items) == [0, 1, 2]
    assert items[-1] == RunEnd("the scanner said so")
    for got in volumes(items):
        np.testing.assert_array_equal(got.data, volume(got.index).data)
        np.testing.assert_allclose(got.grid.affine, GRID.affine, atol=1e-5)
        assert got.tr_s == 0.1
    assert "DOE" not in caplog.text + repr(items)


def test_big_endian_voxels_and_several_volumes_by_one_connection():
    messages = [
        info(i, little=False) + volume(i).data.astype(">i2").tobytes("F") for i in range(2)
    ]
    items = receive(b"".join(messages))
    assert indices(items) == [0, 1]
    np.testing.assert_array_equal(volumes(items)[1].data, volume(1).data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"uid": b"1.2.4"}, "belongs to another series"),
        ({"matrix": np.zeros(16)}, "has no usable geometry"),
        ({"matrix": np.full(16, np.nan)}, "has no usable geometry"),
        ({"tr_ms": 0}, "has no usable repetition time"),
    ],
)
def test_what_cannot_be_used_is_skipped(changes, reason):
    bad = info(1, **changes) + volume(1).data.tobytes("F")
    good = [info(i) + volume(i).data.tobytes("F") for i in range(2)]
    items = receive(good[0], bad, good[1])
    assert indices(items) == [0, 1]
    assert skipped(items) == [Skipped("volume 1", reason)]


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": b"DOE"},
        {"version": 3},
        {"shape": (30000, 30000, 30000)},
        {"shape": (-1, 1, 1)},
        {"data_type": b"c_float32_t"},
    ],
)
def test_other_headers_are_strangers(changes):
    good = [info(i) + volume(i).data.tobytes("F") for i in range(2)]
    items = receive(good[0], info(5, **changes), good[1])
    assert indices(items) == [0, 1]
    assert skipped(items) == [Skipped("a connection", "does not speak this protocol")]


def test_murfi_would_read_what_the_target_sends():
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = MurfiTarget(Address(*server.getsockname()))
        got = bytearray()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while piece := connection.recv(1 << 16):
                    got.extend(piece)

        from stream_runs import background

        with background(serve):
            target.send(volume(4))
    fields = INFO.unpack(got[: INFO.size])
    assert fields[0].rstrip(b"\0") == b"ERTI"
    assert fields[1] == 4
    assert fields[4].rstrip(b"\0") == b"3Dt"
    assert fields[6].rstrip(b"\0") == b"int16_t"
    assert fields[7:9] == (True, True)
    assert fields[13:16] == GRID.shape
    np.testing.assert_allclose(np.reshape(fields[16:32], (4, 4)), GRID.affine, atol=1e-5)
    assert fields[32] == 100
    assert fields[34] == 5
    assert bytes(got[INFO.size :]) == mosaic_of(volume(4).data).tobytes()

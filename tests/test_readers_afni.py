"""AFNI's real-time protocol, literally as in README.realtime, rtfeedme.c and Dimon."""

import socket

import numpy as np
import pytest

from dicom_files import PATIENT
from rtfmri.errors import SourceError
from rtfmri.readers import RunEnd, Skipped, open_reader
from rtfmri.readers.afni import AfniReader
from rtfmri.readers.network import Address
from rtfmri.simulator.streams import AfniTarget
from rtfmri.volume import Grid, Volume
from stream_runs import indices, received, skipped, volume, volumes

SHAPE = (6, 5, 7)
MARKER = b"Et Earello Endorenna utulien!!"
COMMANDS = {
    "ACQUISITION_TYPE": "3D+t",
    "NAME": PATIENT,
    "NOTE": f"of {PATIENT}",
    "DRIVE_AFNI": f"OPEN_WINDOW {PATIENT}",
    "TR": "0.1",
    "XYFOV": "18.0 12.5 28.0",
    "XYMATRIX": "6 5 7",
    "DATUM": "short",
    "XYZAXES": "R-L A-P I-S",
    "XYZFIRST": "7.5R 6.25A 10.5I",
    "BYTEORDER": "LSB_FIRST",
}


def brick(seed: int) -> np.ndarray:
    """Return a volume (x, y, z)."""
    return np.random.default_rng(seed).integers(-999, 999, SHAPE, np.int16)


def text(**changes: str | None) -> bytes:
    """Return commands; None leaves one out."""
    lines = {**COMMANDS, **changes}
    return "\n".join(f"{k} {v}" for k, v in lines.items() if v is not None).encode() + b"\0"


def raw(seed: int) -> bytes:
    return brick(seed).tobytes(order="F")


def receive(
    *parts: bytes, query: str = "timeout_s=0.3", tr_s: float | None = None, port: int = -1
):
    """Send parts to the data port, or another one."""
    reader = open_reader(f"afni://:0?{query}", tr_s=tr_s)
    assert isinstance(reader, AfniReader)

    def send() -> None:
        where = reader.address.host, reader.address.port + port
        with socket.create_connection(where) as connection:
            connection.sendall(b"".join(parts))
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""

    try:
        return received(reader, send)
    finally:
        reader.close()


@pytest.mark.parametrize("port", [-1, 0])
def test_a_session_as_rtfeedme_has_it(port, caplog):
    caplog.set_level("DEBUG")
    items = receive(text(), *(raw(i) for i in range(3)), port=port)
    assert indices(items) == [0, 1, 2]
    for got in volumes(items):
        np.testing.assert_array_equal(got.data, brick(got.index))
        assert got.tr_s == 0.1
        # First voxel at 7.5 mm right, 6.25 mm front, 10.5 mm low; then to left, back and up.
        expected = [[-3, 0, 0, 7.5], [0, -2.5, 0, 6.25], [0, 0, 4, -10.5], [0, 0, 0, 1]]
        np.testing.assert_array_equal(got.grid.affine, expected)
    assert "DOE" not in caplog.text + repr(items)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Without a place the volume is in the middle.
        ({"XYZFIRST": None}, [[-3, 0, 0, 7.5], [0, -2.5, 0, 5], [0, 0, 4, -12]]),
        (
            {"XYZFIRST": None, "XYZOFF": "1 2 3"},
            [[-3, 0, 0, 8.5], [0, -2.5, 0, 7], [0, 0, 4, -15]],
        ),
        ({"XYZFIRST": None, "ZFIRST": "9S"}, [[-3, 0, 0, 7.5], [0, -2.5, 0, 5], [0, 0, 4, 9]]),
        # The first voxel may lie beyond the middle, and numbers without a letter go with the axis.
        ({"XYZFIRST": "1L 2P 3S"}, [[-3, 0, 0, -1], [0, -2.5, 0, -2], [0, 0, 4, 3]]),
        ({"XYZFIRST": "1 2 3"}, [[-3, 0, 0, 1], [0, -2.5, 0, 2], [0, 0, 4, -3]]),
        ({"XYZFIRST": "-7L -6P -5S"}, [[-3, 0, 0, 7], [0, -2.5, 0, 6], [0, 0, 4, -5]]),
        # Sagittal slices, as in README.realtime; a letter of another axis says nothing.
        (
            {"XYZAXES": "S-I A-P L-R", "XYZFIRST": "1S 2A 3L"},
            [[0, 0, 4, -3], [0, -2.5, 0, 2], [-3, 0, 0, 1]],
        ),
        ({"XYZFIRST": "1S 2A 3I"}, [[-3, 0, 0, 1], [0, -2.5, 0, 2], [0, 0, 4, -3]]),
        (
            {"XYZAXES": "RL AP IS", "XYFOV": "18 0", "ZDELTA": "2"},
            [[-3, 0, 0, 7.5], [0, -3.6, 0, 6.25], [0, 0, 2, -10.5]],
        ),
        ({"ZGAP": "1"}, [[-3, 0, 0, 7.5], [0, -2.5, 0, 6.25], [0, 0, 5, -10.5]]),
        (
            {"OBLIQUE_XFORM": "2 1 0 5 -1 2 0 6 0 0 3 7 0 0 0 1"},
            [[-2, -1, 0, -5], [1, -2, 0, -6], [0, 0, 3, 7]],
        ),
    ],
)  # fmt: skip
def test_where_the_volume_is(changes, expected):
    (got,) = volumes(receive(text(**changes), raw(0)))
    np.testing.assert_allclose(got.grid.affine[:3], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "zs"),
    [
        (None, [0, 2, 4, 6, 1, 3, 5]),
        ("alt", [0, 2, 4, 6, 1, 3, 5]),
        ("seq", [0, 1, 2, 3, 4, 5, 6]),
        ("explicit 7 6 5 4 3 2 1", [6, 5, 4, 3, 2, 1, 0]),
        ("explicit 6 4 2 0 5 3 1", [6, 4, 2, 0, 5, 3, 1]),
    ],
)
@pytest.mark.parametrize("kind", [None, "2D+z"])
def test_slices(order, zs, kind):
    slices = [brick(i)[:, :, z].tobytes(order="F") for i in range(2) for z in zs]
    items = receive(text(ACQUISITION_TYPE=kind, ZORDER=order), *slices)
    assert indices(items) == [0, 1]
    for got in volumes(items):
        np.testing.assert_array_equal(got.data, brick(got.index))


@pytest.mark.parametrize(
    ("datum", "sent", "kept"),
    [("byte", "u1", "i2"), ("short", ">i2", "i2"), ("int", ">i4", "f4"), ("float", ">f4", "f4")],
)
def test_voxel_types_and_byte_orders(datum, sent, kept):
    data = (np.abs(brick(0)) % 200).astype(sent)
    items = receive(text(DATUM=datum, BYTEORDER="MSB_FIRST"), data.tobytes(order="F"))
    (got,) = volumes(items)
    assert got.data.dtype == kept
    np.testing.assert_array_equal(got.data, data)


def test_the_first_of_several_channels_is_read():
    items = receive(text(NUM_CHAN="3"), *(raw(10 * i + c) for i in range(2) for c in range(3)))
    assert indices(items) == [0, 1]
    np.testing.assert_array_equal(volumes(items)[1].data, brick(10))


def test_slice_times_and_the_number_of_volumes():
    times = "TPATTERN", "explicit 0 0.02 0.04 0.06 0.01 0.03 0.05"
    changes = {"ACQUISITION_TYPE": "3D+timing", times[0]: times[1], "NUMVOLS": "2"}
    items = receive(text(**changes), raw(0), raw(1), query="")
    assert volumes(items)[0].slice_times_s == (0, 0.02, 0.04, 0.06, 0.01, 0.03, 0.05)
    assert items[2:] == [RunEnd("the scanner said so")]


def test_a_marker_ends_a_run_and_the_next_comes_by_the_same_connection():
    reader = open_reader("afni://:0")
    end = MARKER.ljust(len(raw(0)), b"\0")
    with socket.create_connection((reader.address.host, reader.address.port - 1)) as connection:
        for run in range(2):
            connection.sendall(text() + raw(run) + raw(5) + end)
            items = list(reader)
            assert indices(items) == [0, 1]
            assert items[-1] == RunEnd("the scanner said so")
            np.testing.assert_array_equal(volumes(items)[0].data, brick(run))
    reader.close()


def test_the_control_channel_names_another_port(caplog):
    reader = open_reader("afni://:0?count=1")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    control = reader.address.host, reader.address.port
    for words in (b"shm:grv:1M\0", b"tcp:localhost:80\0", b"tcp:localhost:%d\0" % port):
        with socket.create_connection(control) as connection:
            connection.sendall(words)
            assert connection.recv(1) == b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(text() + raw(0))
        assert indices(list(reader)) == [0]
    reader.close()
    assert "shared memory" in caplog.text


def test_from_another_machine_nobody_joins_a_run_that_is_going_on():
    reader = open_reader("afni://:0?count=2")
    where = reader.address.host, reader.address.port - 1
    items = iter(reader)
    with socket.create_connection(where) as first:
        first.sendall(text() + raw(0))
        assert next(items).index == 0
        with socket.create_connection(where, source_address=("127.0.0.2", 0)) as second:
            second.sendall(text() + raw(1))
            said = "comes from a second sender in the middle of a run"
            assert next(items) == Skipped("a connection", said)
        first.sendall(raw(2))
        got = next(items)
    assert got.index == 1
    np.testing.assert_array_equal(got.data, brick(2))
    reader.close()


def test_the_same_machine_takes_over_from_a_connection_that_hangs():
    reader = open_reader("afni://:0?count=2")
    where = reader.address.host, reader.address.port - 1
    items = iter(reader)
    with socket.create_connection(where) as first, socket.create_connection(where) as second:
        first.sendall(text() + raw(0))
        assert next(items).index == 0
        second.sendall(text() + raw(1))
        assert next(items).index == 1
        assert first.recv(1) == b""
    reader.close()


@pytest.mark.parametrize("axes", ["R-L R-L I-S", "R-L A-P", None])
def test_without_geometry_volumes_are_skipped(axes):
    items = receive(text(), raw(0), MARKER.ljust(len(raw(0)), b"\0"), text(XYZAXES=axes), raw(1))
    assert indices(items) == [0]  # of the first run; the second has none
    reader = open_reader("afni://:0")
    with socket.create_connection((reader.address.host, reader.address.port - 1)) as connection:
        connection.sendall(text(XYZAXES=axes) + raw(1))
        assert next(iter(reader)) == Skipped("volume 0", "has no usable geometry")
    reader.close()


def test_without_a_tr_one_is_asked_for():
    with pytest.raises(SourceError, match="--tr"):
        receive(text(TR=None), raw(0))
    assert volumes(receive(text(TR=None), raw(0), tr_s=2.0))[0].tr_s == 2.0


def afni_would_read(data: bytes, n_voxels: int) -> tuple[dict[str, list[str]], list[bytes]]:
    """Take a data channel apart as plug_realtime does: commands up to a NUL, then images."""
    commands, _, images = data.partition(b"\0")
    lines = [line.split() for line in commands.decode("ascii").splitlines()]
    size = 2 * n_voxels
    return (
        {line[0]: line[1:] for line in lines},
        [images[i : i + size] for i in range(0, len(images), size)],
    )


def two_ports() -> tuple[socket.socket, socket.socket]:
    """Listen on two ports, one above the other."""
    for _ in range(50):
        lower = socket.create_server(("127.0.0.1", 0))
        try:
            return lower, socket.create_server(("127.0.0.1", lower.getsockname()[1] + 1))
        except OSError:
            lower.close()
    raise AssertionError


@pytest.mark.parametrize("oblique", [True, False])
def test_the_target_does_what_afni_demands(oblique):
    affine = np.array([[-3.0, 0, 0, 20], [0, 0, 4, -11], [0, -2.5, 0, 9], [0, 0, 0, 1]])
    sent = volume(0)
    if not oblique:
        sent = Volume(sent.data, Grid(sent.grid.shape, affine), 0, 0.1)
    data_port, control_port = two_ports()
    with data_port, control_port:
        target = AfniTarget(Address(*control_port.getsockname()))
        target.send(sent)
        control, _ = control_port.accept()
        with control:
            assert control.recv(100) == b"tcp:127.0.0.1:%d\0" % data_port.getsockname()[1]
        connection, _ = data_port.accept()
        with connection:
            target_bytes = bytearray()
            connection.settimeout(10)
            while len(target_bytes.partition(b"\0")[2]) < sent.data.nbytes:
                target_bytes += connection.recv(1 << 16)
            connection.shutdown(socket.SHUT_WR)
            target.close()
            while piece := connection.recv(1 << 16):
                target_bytes += piece
    commands, images = afni_would_read(bytes(target_bytes), sent.data.size)
    assert images[0] == sent.data.tobytes(order="F")
    assert len(images) == 2
    assert images[1].startswith(MARKER)
    assert len(images[1]) == len(images[0])
    n_x, n_y, n_z = (int(n) for n in commands["XYMATRIX"])
    assert (n_x, n_y, n_z) == sent.grid.shape
    fov_mm = np.array(commands["XYFOV"], float)
    np.testing.assert_allclose(fov_mm / sent.grid.shape, sent.grid.voxel_size_mm, rtol=1e-7)
    assert commands["DATUM"] == ["short"]
    assert commands["TR"] == ["0.1"]
    assert commands["ACQUISITION_TYPE"] == ["3D+t"]
    if oblique:
        matrix = np.array(commands["OBLIQUE_XFORM"], float).reshape(4, 4)
        np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ matrix, sent.grid.affine, atol=1e-6)
    else:
        assert "OBLIQUE_XFORM" not in commands
        assert commands["XYZAXES"] == ["R-L", "S-I", "P-A"]
        assert commands["XYZFIRST"] == ["20R", "9S", "11P"]


def test_what_afni_has_no_type_for_is_refused():
    from rtfmri.errors import ConfigError

    sent = volume(0, "uint16")
    big = Volume(sent.data | np.uint16(0x8000), sent.grid, 0, 0.1)
    with pytest.raises(ConfigError, match="uint16"):
        AfniTarget(Address("127.0.0.1", 1)).send(big)


def test_hostile_commands_close_the_connection():
    for changes in (
        {"XYMATRIX": "4096 4096 4096"},
        {"XYMATRIX": "x"},
        {"DATUM": "complex"},
        {"NUM_CHAN": "999999"},
        {"ZORDER": "explicit 1 1 1 1 1 1 1"},
        {"ACQUISITION_TYPE": "4D"},
        {"TR": PATIENT},
    ):
        reader = open_reader("afni://:0?count=1")
        with socket.create_connection((reader.address.host, reader.address.port)) as connection:
            connection.sendall(text(**changes))
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        with socket.create_connection((reader.address.host, reader.address.port)) as connection:
            connection.sendall(text() + raw(0))
            items = list(reader)
        reader.close()
        assert indices(items) == [0]
        assert skipped(items) == [Skipped("a connection", "does not speak this protocol")]

"""MRD streams: python ismrmrd as the sender and as the receiver, and slices in any order."""

import ctypes
import io
import random
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest

from dicom_files import PATIENT, real_data
from rtfmri.readers import RunEnd, Skipped, open_reader
from rtfmri.readers.mrd import IMAGE_HEADER, MrdReader
from rtfmri.simulator.streams import MrdTarget
from rtfmri.volume import Volume
from stream_runs import GRID, TR_S, Items, indices, received, skipped, volume, volumes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ismrmrd
    from ismrmrd.serialization import ConfigFile, ProtocolDeserializer, ProtocolSerializer
    from ismrmrd.xsd import CreateFromDocument

TO_LPS = np.diag([-1.0, -1, 1, 1])


@pytest.fixture(autouse=True)
def _filters():
    """The package switches warnings on when it is imported and used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def header(tr_s: float = TR_S, n_slices: int = 1, limits: bool = True) -> object:
    """Return an XML header as a scanner writes it, of somebody with a name."""
    slices = (
        f"<slice><minimum>0</minimum><maximum>{n_slices - 1}</maximum><center>0</center></slice>"
    )
    space = (
        "<matrixSize><x>12</x><y>10</y><z>1</z></matrixSize>"
        "<fieldOfView_mm><x>36</x><y>25</y><z>4</z></fieldOfView_mm>"
    )
    return CreateFromDocument(
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"<subjectInformation><patientName>{PATIENT}</patientName></subjectInformation>"
        "<experimentalConditions><H1resonanceFrequency_Hz>1</H1resonanceFrequency_Hz>"
        "</experimentalConditions>"
        f"<encoding><encodedSpace>{space}</encodedSpace><reconSpace>{space}</reconSpace>"
        f"<encodingLimits>{slices if limits else ''}</encodingLimits>"
        "<trajectory>epi</trajectory></encoding>"
        f"<sequenceParameters><TR>{tr_s * 1000}</TR><TR>99000</TR></sequenceParameters>"
        "</ismrmrdHeader>"
    )


def image(sent: Volume, z: int | None = None, **fields: object) -> "ismrmrd.Image":
    """Return a volume, or one of its slices, as an image of python ismrmrd."""
    lps = TO_LPS @ sent.grid.affine
    shape, sizes_mm = np.array(sent.grid.shape), np.array(sent.grid.voxel_size_mm)
    data, middle = sent.data.T, (shape - 1) / 2
    if z is not None:
        data, middle, shape = data[z : z + 1], [*middle[:2], z], np.array([*shape[:2], 1])
    made = ismrmrd.Image.from_array(np.ascontiguousarray(data), transpose=False)
    made.field_of_view = tuple(shape * sizes_mm)
    made.position = tuple(lps[:3, :3] @ middle + lps[:3, 3])
    for i, name in enumerate(("read_dir", "phase_dir", "slice_dir")):
        setattr(made, name, tuple(lps[:3, i] / sizes_mm[i]))
    made.repetition, made.slice, made.image_type = sent.index, z or 0, ismrmrd.IMTYPE_MAGNITUDE
    made.attribute_string = f"<ismrmrdMeta><meta><name>{PATIENT}</name></meta></ismrmrdMeta>"
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def stream(*parts: object, close: bool = True) -> bytes:
    """Return what python ismrmrd sends."""
    buffer = io.BytesIO()
    serializer = ProtocolSerializer(buffer)
    for part in (ConfigFile("rtfmri"), *parts):
        serializer.serialize(part)
    if close:
        serializer.close()
    return buffer.getvalue()


def receive(data: bytes, query: str = "", tr_s: float | None = None) -> Items:
    """Return what the reader makes of it, after the goodbye is answered."""
    reader = open_reader(f"mrd://:0?{query}", tr_s=tr_s)
    assert isinstance(reader, MrdReader)

    def send() -> None:
        with socket.create_connection((reader.address.host, reader.address.port)) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(100), b""))
            assert answer == (b"\4\0" if data.endswith(b"\4\0") else b"")

    try:
        return received(reader, send)
    finally:
        reader.close()


def check(got: Volume, sent: Volume) -> None:
    assert got.data.dtype == sent.data.dtype
    np.testing.assert_array_equal(got.data, sent.data)
    np.testing.assert_allclose(got.grid.affine, sent.grid.affine, rtol=0, atol=2e-5)
    assert got.tr_s == pytest.approx(sent.tr_s)


def test_the_header_is_laid_out_as_in_ismrmrd():
    theirs = ismrmrd.ImageHeader
    assert IMAGE_HEADER.itemsize == ctypes.sizeof(theirs) == 198
    for name, _ in theirs._fields_:
        assert IMAGE_HEADER.fields[name][1] == getattr(theirs, name).offset, name
        assert IMAGE_HEADER.fields[name][0].itemsize == getattr(theirs, name).size, name


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_whole_volumes_from_ismrmrd(dtype, caplog):
    caplog.set_level("DEBUG")
    sent = [volume(i, dtype) for i in range(8)]
    items = receive(stream(header(), *(image(v) for v in sent)))
    assert indices(items) == list(range(8))
    for got, want in zip(volumes(items), sent, strict=True):
        check(got, want)
    assert items[8:] == [RunEnd("the scanner said so")]
    assert "DOE" not in caplog.text + repr(items)


@pytest.mark.parametrize("order", ["ascending", "descending", "interleaved", "random"])
def test_slices_from_ismrmrd_in_any_order(order):
    n = GRID.shape[2]
    zs = {
        "ascending": list(range(n)),
        "descending": list(range(n))[::-1],
        "interleaved": [*range(0, n, 2), *range(1, n, 2)],
        "random": random.Random(1).sample(range(n), n),
    }[order]
    sent = [volume(i) for i in range(3)]
    items = receive(stream(header(n_slices=n), *(image(v, z) for v in sent for z in zs)))
    assert indices(items) == [0, 1, 2]
    for got, want in zip(volumes(items), sent, strict=True):
        check(got, want)


def test_slices_numbered_as_they_were_acquired_are_sorted_by_their_places():
    n = GRID.shape[2]
    acquired = [*range(0, n, 2), *range(1, n, 2)]
    images = [image(volume(0), z, slice=i) for i, z in enumerate(acquired)]
    (got, _) = receive(stream(header(n_slices=n), *images))
    check(got, volume(0))


def test_a_volume_of_which_slices_lack_is_cut_short():
    n = GRID.shape[2]
    images = [image(volume(i), z) for i in range(9) for z in range(n) if (i, z) != (1, 3)]
    items = receive(stream(header(n_slices=n), *images))
    assert indices(items) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert skipped(items) == [Skipped("volume 1", "is cut short")]


def test_a_broken_connection_cuts_short_what_came_as_slices():
    n = GRID.shape[2]
    data = stream(
        header(n_slices=n),
        image(volume(0)),
        *(image(volume(1), z) for z in range(n - 1)),
        close=False,
    )
    items = receive(data, "timeout_s=0.3")
    assert indices(items) == [0]
    assert skipped(items) == [Skipped("volume 1", "is cut short")]


def test_unevenly_spaced_slices_are_refused():
    n = GRID.shape[2]
    images = [image(volume(0), z) for z in range(n)]
    images[3].position = tuple(np.array(images[3].position[:]) + 2)
    items = receive(stream(header(n_slices=n), image(volume(5)), *images))
    assert skipped(items) == [Skipped("volume 0", "has slices that are not evenly spaced")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image_type": ismrmrd.IMTYPE_PHASE}, "is not a magnitude image"),
        ({"contrast": 1}, "is of a later echo"),
        ({"image_series_index": 9}, "belongs to another series"),
        ({"position": (np.nan, 0, 0)}, "has no usable geometry"),
        ({"position": (1e30, 0, 0)}, "has no usable geometry"),
        ({"read_dir": (0, 0, 0)}, "has no usable geometry"),
    ],
)
def test_other_images_are_skipped(fields, reason):
    parts = [image(volume(0)), image(volume(1), **fields), image(volume(1))]
    items = receive(stream(header(), *parts))
    assert indices(items) == [0, 1]
    assert skipped(items) == [Skipped("volume 1", reason)]


@pytest.mark.parametrize("dtype", ["complex64", "float64", "uint32"])
def test_other_voxel_types_are_converted_or_skipped(dtype):
    made = ismrmrd.Image.from_array(volume(1).data.T.astype(dtype), transpose=False)
    like = image(volume(1))
    for name in ("field_of_view", "position", "read_dir", "phase_dir", "slice_dir", "repetition"):
        setattr(made, name, getattr(like, name))
    items = receive(stream(header(), made, image(volume(2))))
    if dtype == "complex64":
        assert skipped(items) == [Skipped("volume 1", "is not a magnitude image")]
    else:
        expected = volume(1).data.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(volumes(items)[0].data, expected)


def test_raw_data_waveforms_and_text_are_passed_over():
    acquisition = ismrmrd.Acquisition.from_array(np.ones((4, 32), np.complex64))
    waveform = ismrmrd.Waveform.from_array(np.ones((2, 50), np.uint32))
    parts = [header(), acquisition, image(volume(0)), PATIENT, waveform, image(volume(1))]
    assert indices(receive(stream(*parts))) == [0, 1]


def test_slices_without_their_number_and_a_missing_tr():
    parts = [header(limits=False), image(volume(0)), image(volume(1), 3), image(volume(1))]
    items = receive(stream(*parts))
    assert skipped(items) == [
        Skipped("volume 1", "is a slice, and the header does not say of how many")
    ]
    items = receive(stream(image(volume(0))), tr_s=2.0)
    assert volumes(items)[0].tr_s == 2.0


@pytest.mark.parametrize(
    "xml",
    [
        b'<!DOCTYPE x [<!ENTITY a "DOE">]><ismrmrdHeader>&a;</ismrmrdHeader>',
        b"<ismrmrdHeader><sequenceParameters><TR>DOE</TR></sequenceParameters></ismrmrdHeader>",
        b"<other>DOE</other>",
        b"<ismrmrdHeader>",
        b"\xff\xfe\0DOE",
    ],
)
def test_a_bad_xml_header_is_a_stranger(xml, caplog):
    caplog.set_level("DEBUG")
    bad = b"\3\0" + len(xml).to_bytes(4, "little") + xml
    reader = open_reader("mrd://:0?count=1")
    with socket.create_connection((reader.address.host, reader.address.port)) as connection:
        connection.sendall(bad)
        assert connection.recv(1) == b""
    target = MrdTarget(reader.address)
    items = received(reader, lambda: target.send(volume(0)))
    target.close()
    reader.close()
    assert indices(items) == [0]
    assert skipped(items) == [Skipped("a connection", "does not speak this protocol")]
    assert "DOE" not in caplog.text + repr(items)


def test_ismrmrd_reads_what_the_target_sends():
    with socket.create_server(("127.0.0.1", 0)) as server:
        from rtfmri.readers.network import Address

        target = MrdTarget(Address(*server.getsockname()))
        target.send(volume(3, "uint16"))
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as file:
            parts = ProtocolDeserializer(file).deserialize()
            assert isinstance(next(parts), ConfigFile)
            told = next(parts)
            got = next(parts)
            connection.shutdown(socket.SHUT_WR)
            target.close()
            with pytest.raises(StopIteration):
                next(parts)
    assert told.sequenceParameters.TR == [TR_S * 1000]
    np.testing.assert_array_equal(got.data[0], volume(3, "uint16").data.T)
    like = image(volume(3, "uint16"))
    assert (got.repetition, got.image_type, got.version) == (3, 1, 1)
    for name in ("field_of_view", "position", "read_dir", "phase_dir", "slice_dir"):
        np.testing.assert_allclose(getattr(got, name)[:], getattr(like, name)[:], atol=1e-5)


def test_a_real_run_is_the_same_as_from_its_folder():
    folder: Path = real_data("siemens_mosaic_psc")
    sent = []
    for item in open_reader(str(folder)):
        if isinstance(item, Volume):
            sent.append(item)
        if len(sent) == 20:
            break
    for as_slices in (False, True):
        parts = [
            part
            for v in sent
            for part in (
                [image(v, z) for z in range(v.grid.shape[2])] if as_slices else [image(v)]
            )
        ]
        head = header(tr_s=sent[0].tr_s, n_slices=sent[0].grid.shape[2])
        items = receive(stream(head, *parts))
        assert indices(items) == list(range(20))
        for got, want in zip(volumes(items), sent, strict=True):
            np.testing.assert_array_equal(got.data, want.data)
            assert got.data.dtype == want.data.dtype
            np.testing.assert_allclose(got.grid.affine, want.grid.affine, rtol=0, atol=5e-5)
            assert got.grid.matches(want.grid)
            assert got.tr_s == pytest.approx(want.tr_s)

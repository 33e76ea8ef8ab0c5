"""A hostile network: garbage, idlers and liars neither stop a run nor lock a scanner out.

And what an object says of a participant goes nowhere.
"""

import gzip
import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pynetdicom import _config

import recordings
from dicom_files import SERIES_UID, mosaic, to_bytes
from dicom_peers import (
    EXPLICIT,
    MR,
    SECONDARY_CAPTURE,
    SUCCESS,
    association,
    connected,
    ended,
    store,
    wait_until,
)
from memory import plain
from rtfmri.export import export_bids
from rtfmri.readers import Skipped
from rtfmri.readers.cstore import CstoreReader, open_cstore
from rtfmri.report import write_report
from rtfmri.session import Session
from rtfmri.simulator.dicom import mosaic_dataset
from rtfmri.volume import Grid, Volume

ASSOCIATE, DATA = 1, 4
LAST, COMMAND = 2, 1


@pytest.fixture
def reader() -> Iterator[CstoreReader]:
    with closing(open_cstore("//127.0.0.1:0", None, timeout_s=30)) as opened:
        yield opened


def pdu(kind: int, body: bytes, n_claimed: int | None = None) -> bytes:
    """Return a PDU (PS3.8, 9.3.1), which may lie about its length."""
    return struct.pack(">BxI", kind, len(body) if n_claimed is None else n_claimed) + body


def item(kind: int, data: bytes, n_claimed: int | None = None) -> bytes:
    return struct.pack(">BxH", kind, len(data) if n_claimed is None else n_claimed) + data


def request(more: bytes = b"") -> bytes:
    """Return a request for an association that sends MR images."""
    syntaxes = item(0x30, MR.encode()) + item(0x40, EXPLICIT.encode())
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3")
    items = item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, b"\1\0\0\0" + syntaxes)
    titles = struct.pack(">Hxx16s16s32x", 1, b"RTFMRI".ljust(16), b"SCANNER".ljust(16))
    return pdu(ASSOCIATE, titles + items + item(0x50, user) + more)


def piece(data: bytes, control: int, context: int = 1) -> bytes:
    """Return a PDU with a piece of a message (PS3.8, 9.3.5)."""
    return pdu(DATA, struct.pack(">IBB", len(data) + 2, context, control) + data)


def command(**values: bytes) -> bytes:
    """Return a message's command (PS3.7, 6.3.1), its elements named like ``x0002``."""
    elements = [
        struct.pack("<HHI", 0, int(name[1:], 16), len(value)) + value
        for name, value in values.items()
    ]
    body = b"".join(elements)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def short(number: int) -> bytes:
    return struct.pack("<H", number)


def store_request() -> bytes:
    """Return the command of a C-STORE (PS3.7, 9.3.1), to which an object belongs."""
    uids = {"x0002": MR.encode().ljust(26, b"\0"), "x1000": b"1.2.3.4."}
    numbers = {"x0100": short(1), "x0110": short(1), "x0700": short(0), "x0800": short(1)}
    return piece(command(**dict(sorted({**uids, **numbers}.items()))), LAST | COMMAND)


def echo(context: int) -> bytes:
    """Return a C-ECHO (PS3.7, 9.3.5)."""
    numbers = {"x0100": short(0x30), "x0110": short(1), "x0800": short(0x101)}
    return piece(command(x0002=b"1.2.840.10008.1.1\0", **numbers), LAST | COMMAND, context)


def associated(reader: CstoreReader) -> socket.socket:
    """Return a connection with an association."""
    connection = connected(reader)
    connection.sendall(request())
    kind, length = struct.unpack(">BxI", connection.recv(6, socket.MSG_WAITALL))
    connection.recv(length, socket.MSG_WAITALL)
    assert kind == 2
    return connection


def send(data: bytes, *, after_association: bool = False) -> Callable[[CstoreReader], bool]:
    """Return an attack that says *data* and waits until it is thrown out."""

    def attack(reader: CstoreReader) -> bool:
        with associated(reader) if after_association else connected(reader) as connection:
            with suppress(ConnectionError):
                connection.sendall(data)
            return ended(connection)

    return attack


def drip(reader: CstoreReader) -> bool:
    """Send a request byte by byte."""
    with connected(reader) as connection:
        with suppress(ConnectionError):
            for byte in request():
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        return ended(connection)


def inside(data: bytes) -> Callable[[CstoreReader], bool]:
    return send(data, after_association=True)


NOISE = random.Random(1).randbytes(5000)
ATTACKS = {
    "nothing": send(b""),
    "noise": send(NOISE),
    "HTTP": send(b"GET / HTTP/1.1\r\nHost: rtfmri\r\n\r\n"),
    "half a request": send(request()[:90]),
    "a request that drips": drip,
    "a request of 4 GB": send(pdu(ASSOCIATE, NOISE, 2**32 - 1)),
    "noise for items": send(pdu(ASSOCIATE, bytes(68) + NOISE)),
    "an item that is too long": send(request(item(0x20, b"\1\0\0\0", 60000))),
    "10000 empty contexts": send(request(item(0x20, b"") * 10000)),
    "no contexts": send(pdu(ASSOCIATE, struct.pack(">Hxx16s16s32x", 1, b"RTFMRI", b""))),
    "data before association": send(store_request()),
    "a PDU of 4 GB inside": inside(pdu(DATA, NOISE, 2**32 - 1)),
    "an unknown PDU inside": inside(pdu(99, NOISE)),
    "noise inside": inside(pdu(DATA, NOISE)),
    "noise for a command": inside(piece(NOISE, LAST | COMMAND)),
    "another context": inside(echo(context=77)),
    "a second request": inside(request()),
    "objects without waiting": inside((store_request() + piece(NOISE, LAST)) * 50),
}


def status(reader: CstoreReader, name: str) -> int:
    """Return a number of the listener's from /proc/PID/status (in kB if it is memory)."""
    text = Path(f"/proc/{reader.listener_pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name))


def test_attacks_are_thrown_out_while_a_scanner_sends(reader: CstoreReader) -> None:
    pid = reader.listener_pid
    thrown_out: dict[str, bool] = {}

    def run(name: str) -> None:
        thrown_out[name] = ATTACKS[name](reader)

    threads = [threading.Thread(target=run, args=(name,)) for name in ATTACKS for _ in range(3)]
    with association(reader) as before:
        assert store(before, mosaic(0)) == [SUCCESS]
        for thread in threads:
            thread.start()
        for index in range(1, 6):
            with association(reader) as during:
                assert store(during, mosaic(index)) == [SUCCESS]
        for thread in threads:
            thread.join(60)
        assert store(before, mosaic(6)) == [SUCCESS]
    with association(reader) as after:
        assert store(after, mosaic(7)) == [SUCCESS]
    assert thrown_out.keys() == ATTACKS.keys()
    assert reader.listener_pid == pid
    assert status(reader, "VmHWM") < 300_000
    stream = iter(reader)
    volumes: list[Volume] = []
    while len(volumes) < 8:
        given = next(stream)
        if isinstance(given, Volume):
            volumes.append(given)
        else:  # what could be an object of an attack
            assert isinstance(given, Skipped)
    assert [volume.index for volume in volumes] == list(range(8))


def test_mutated_requests(reader: CstoreReader) -> None:
    dice = random.Random(2)
    pid = reader.listener_pid
    for _ in range(300):
        data = bytearray(request())
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(6, len(data))] = dice.randrange(256)
        with connected(reader) as connection, suppress(ConnectionError):
            connection.sendall(data)
    with association(reader) as made:
        assert store(made, mosaic(0)) == [SUCCESS]
    assert reader.listener_pid == pid
    assert status(reader, "VmHWM") < 300_000


def test_idle_connections_lock_nobody_out_and_are_closed(reader: CstoreReader) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(reader)) for _ in range(300)]
        with association(reader) as made:
            assert store(made, mosaic(0)) == [SUCCESS]
            assert status(reader, "Threads") < 10
        assert all(ended(connection) for connection in idle)


def test_idle_associations_lock_nobody_out(reader: CstoreReader) -> None:
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(associated(reader))
        with association(reader) as made:
            assert store(made, mosaic(0)) == [SUCCESS]
            wait_until(lambda: status(reader, "Threads") < 2 * 33 + 2)
    wait_until(lambda: status(reader, "Threads") < 4)


def test_objects_without_an_end_are_not_held(
    reader: CstoreReader, caplog: pytest.LogCaptureFixture
) -> None:
    pid = reader.listener_pid
    endless = piece(bytes((128 << 10) - 8), 0)
    n_pieces = 0

    def flood() -> None:
        nonlocal n_pieces
        with associated(reader) as connection, suppress(ConnectionError):
            connection.sendall(store_request())
            while True:
                connection.sendall(endless)
                n_pieces += 1

    threads = [threading.Thread(target=flood) for _ in range(3)]
    for thread in threads:
        thread.start()
    for index in range(3):
        with association(reader) as made:
            assert store(made, mosaic(index)) == [SUCCESS]
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert reader.listener_pid == pid
    assert status(reader, "VmHWM") < 1_500_000
    wait_until(lambda: "it sends more at once than can be held" in caplog.text)
    with association(reader) as made:
        assert store(made, mosaic(3)) == [SUCCESS]


# What must not be found anywhere: names, identifiers, and the digits of UIDs.
PLANTED = ("PLANTED", "77301958", SERIES_UID)


def planted(dataset: pydicom.Dataset) -> pydicom.Dataset:
    """Write what must stay private wherever text fits."""
    dataset.PatientName, dataset.PatientID = "PLANTED^NAME", "77301958"
    dataset.PatientComments = dataset.StudyDescription = dataset.SeriesDescription = "PLANTED"
    dataset.ProtocolName = dataset.InstitutionName = dataset.OperatorsName = "PLANTED"
    dataset.SequenceName = dataset.ScanningSequence = dataset.StationName = "PLANTED"
    dataset.AccessionNumber = "77301958"
    return dataset


def test_what_names_a_participant_goes_nowhere(
    reader: CstoreReader,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # sends files as they are
    caplog.set_level(logging.DEBUG)
    n = 40
    grid = Grid(recordings.GRID.shape, np.diag([3, 3, 3.5, 1]))
    volumes = recordings.volumes(n, grid=grid)

    def made(index: int, uid: str = SERIES_UID) -> pydicom.Dataset:
        volume = volumes[index]
        dataset = mosaic_dataset(
            volume.data, volume.grid, index=index, tr_s=volume.tr_s, series_uid=uid
        )
        return planted(dataset)

    capture = made(3, SERIES_UID + ".7")
    capture.SOPClassUID = capture.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE
    capture.Modality = "OT"
    cut = made(4)
    cut.PixelData = cut.PixelData[:-100]
    whole = to_bytes(made(5))
    n_header = 144 + int.from_bytes(whole[140:144], "little")  # PS3.10, 7.1
    (tmp_path / "sent").mkdir()
    malformed = {
        "number": whole.replace(b"2000", b"PLAN", 1),
        "noise": whole[:n_header] + b"PLANTED 77301958 " * 300,
        "cut": whole[:-3000],
        "shape": whole.replace(struct.pack("<HHcc", 0x28, 0x10, b"U", b"S"), b"PLANTE", 1),
    }
    for name, data in malformed.items():
        assert data != whole, name
        (tmp_path / "sent" / name).write_bytes(data)
    strange = [capture, cut, made(9, SERIES_UID + ".8")]
    out = tmp_path / "out"
    out.mkdir()
    session = Session(reader, events=recordings.EVENTS, config=plain(), out=out / "run.h5")
    with session, association(reader, calling="PLANTED") as peer:
        for index in range(n):
            assert store(peer, made(index)) == [SUCCESS]
            if index == 10:
                store(peer, *strange)
                for name in malformed:
                    assert peer.send_c_store(tmp_path / "sent" / name).Status == SUCCESS
                with association(reader, calling="PLANTED", called="PLANTED") as other:
                    assert other.is_rejected
        results = []
        for result in session:
            results.append(result)
            if len(results) == n:
                reader.close()
    assert sum(session.counters.skipped.values()) >= len(strange) + len(malformed) - 1
    export_bids(out / "run.h5", out / "bids")
    write_report(out / "run.h5", out / "report")
    records = [r for r in caplog.records if r.name.startswith("rtfmri")]
    told = "\n".join(f"{logging.Formatter().format(r)} {r.args}" for r in records)
    assert "another AE title" in told
    told += repr(session.counters) + repr(session.summary())
    for text in PLANTED:
        assert text.lower() not in told.lower()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        for text in PLANTED:
            assert text.lower() not in path.name.lower()
            assert text.lower().encode() not in data.lower(), path.name

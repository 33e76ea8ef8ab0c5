"""The DICOM node: what arrives is what was sent, whoever sends it, and whatever ends meanwhile."""

import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from dicom_files import SERIES_UID, enhanced, mosaic, oblique_grid, real_data, to_bytes, voxels
from dicom_peers import (
    EXPLICIT,
    MR,
    SECONDARY_CAPTURE,
    SENDERS,
    SUCCESS,
    Sender,
    association,
    connected,
    ended,
    installed,
    store,
    wait_until,
)
from memory import plain
from rtfmri.errors import SourceError
from rtfmri.readers import RunEnd, Skipped, open_reader
from rtfmri.readers import cstore as cstore_module
from rtfmri.readers.cstore import RESTARTED, CstoreReader, open_cstore
from rtfmri.session import Session
from rtfmri.volume import Volume


@pytest.fixture
def open_node() -> Iterator[Callable[..., CstoreReader]]:
    """Open readers on free ports of the loopback, and close them in the end."""
    with ExitStack() as readers:

        def open_it(tr_s: float | None = None, **options: Any) -> CstoreReader:
            reader = open_cstore("//127.0.0.1:0", tr_s, **options)
            return readers.enter_context(closing(reader))

        yield open_it


def files_of(folder: Path, n: int, uid: str = SERIES_UID) -> list[Path]:
    """Write *n* synthetic mosaics into *folder*."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{uid[-3:]}-{index:03d}.dcm" for index in range(n)]
    for index, path in enumerate(paths):
        path.write_bytes(to_bytes(mosaic(index, series_uid=uid)))
    return paths


def volumes_of(items: Sequence[Any]) -> list[Volume]:
    return sorted((i for i in items if isinstance(i, Volume)), key=lambda volume: volume.index)


def replayed(folder: Path) -> list[Volume]:
    return volumes_of(list(open_reader(str(folder))))


def assert_same(received: list[Volume], expected: list[Volume]) -> None:
    """Check that these are the same volumes, bit by bit."""
    assert [v.index for v in received] == [v.index for v in expected]
    for ours, theirs in zip(received, expected, strict=True):
        assert ours.data.dtype == theirs.data.dtype
        np.testing.assert_array_equal(ours.data, theirs.data)
        np.testing.assert_array_equal(ours.grid.affine, theirs.grid.affine)
        assert (ours.tr_s, ours.acquired_s) == (theirs.tr_s, theirs.acquired_s)
        assert ours.slice_times_s == theirs.slice_times_s


@pytest.mark.parametrize("send", SENDERS)
def test_what_arrives_is_what_was_sent(
    send: Sender, open_node: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rtfmri")
    files = files_of(tmp_path / "run", 6)
    reader = open_node(count=6)
    send(reader, files, tmp_path)
    items = list(reader)
    assert_same(volumes_of(items), replayed(tmp_path / "run"))
    assert items[6:] == [RunEnd("all 6 volumes are there")]
    said = caplog.text
    assert "implementation PYNETDICOM_" in said or "implementation OFFIS_DCMTK_" in said
    if send.__name__ in ("by_storescu", "by_dcmsend"):
        assert "implementation OFFIS_DCMTK_" in said


@pytest.mark.parametrize("send", SENDERS)
def test_a_real_run_arrives_as_it_was_sent(send: Sender, open_node: Any, tmp_path: Path) -> None:
    folder = real_data("siemens_mosaic_psc")
    files = sorted(folder.glob("*.dcm"))
    reader = open_node(count=155)
    send(reader, files, tmp_path)
    assert len(files) == 155
    assert_same(volumes_of(list(reader)), replayed(folder))


def test_compressed_objects_arrive_and_uncompressed_ones_are_preferred(open_node: Any) -> None:
    dataset = mosaic(0)
    dataset.compress(RLELossless, generate_instance_uid=False)
    reader = open_node(count=2)
    with association(reader, contexts=[(MR, RLELossless)]) as made:
        assert store(made, dataset) == [SUCCESS]
    both = [RLELossless, "1.2.840.10008.1.2", EXPLICIT]
    with association(reader, contexts=[(MR, both)]) as made:
        assert made.accepted_contexts[0].transfer_syntax == [EXPLICIT]
        assert store(made, mosaic(1)) == [SUCCESS]
    received = volumes_of(list(reader))
    for index, volume in enumerate(received):
        np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), index))


def test_echo_is_answered(open_node: Any) -> None:
    with association(open_node()) as made:
        assert made.send_c_echo().Status == SUCCESS


def test_arrival_is_told_by_this_process_clock(open_node: Any) -> None:
    reader = open_node(count=1)
    before_s = time.perf_counter()
    with association(reader) as made:
        store(made, mosaic(0))
        after_s = time.perf_counter()
    (volume,) = volumes_of(list(reader))
    assert before_s < volume.arrived_s < after_s < volume.decoded_s


def test_what_is_no_volume_is_answered_with_success_and_skipped(open_node: Any) -> None:
    capture = mosaic(0, series_uid=SERIES_UID + ".7")
    capture.SOPClassUID = capture.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE
    del capture[0x0029, 0x1010]
    cut = mosaic(2)
    cut.PixelData = cut.PixelData[:-100]
    other = mosaic(5, series_uid=SERIES_UID + ".9")
    reader = open_node(count=3)
    with association(reader) as made:
        sent = [mosaic(0), mosaic(1), capture, cut, other, mosaic(2)]
        assert store(made, *sent) == [SUCCESS] * len(sent)
    items = list(reader)
    assert [v.index for v in volumes_of(items)] == [0, 1, 2]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert [item.name for item in skipped] == ["object 3", "object 4", "object 5"]
    assert all(item.reason for item in skipped)


def test_enhanced_objects(open_node: Any) -> None:
    reader = open_node(count=2)
    with association(reader) as made:
        store(made, enhanced(0), enhanced(1))
    assert [v.index for v in volumes_of(list(reader))] == [0, 1]


def test_objects_without_a_repetition_time_do_not_end_a_run(open_node: Any) -> None:
    dataset = mosaic(0)
    del dataset.RepetitionTime
    reader = open_node(count=1)
    with association(reader) as made:
        store(made, dataset, mosaic(0, series_uid=SERIES_UID + ".8"))
    first, *rest = list(reader)
    assert isinstance(first, Skipped)
    assert "--tr" in first.reason
    assert [v.index for v in volumes_of(rest)] == [0]
    reader = open_node(count=1, tr_s=0.8)
    with association(reader) as made:
        store(made, dataset)
    assert [v.tr_s for v in volumes_of(list(reader))] == [0.8]


def test_the_called_title_and_the_callers_must_be_right(
    open_node: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reader = open_node(callers=("SCANNER",), count=1)
    for calling, called in [("SCANNER", "OTHER"), ("DOE_JANE", "RTFMRI")]:
        with association(reader, calling=calling, called=called) as made:
            assert made.is_rejected
    with association(reader, calling="SCANNER") as made:
        assert store(made, mosaic(0)) == [SUCCESS]
    list(reader)
    assert "it calls another AE title than RTFMRI" in caplog.text
    assert "its AE title is not among callers" in caplog.text
    assert "DOE" not in caplog.text


def test_addresses_that_are_not_allowed_are_closed_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, but finds the way
        except OSError:
            pytest.skip("this machine has no address but the loopback's")
        own = probe.getsockname()[0]
    reader = open_reader("dicom://0.0.0.0:0?allow=192.0.2.7")
    assert isinstance(reader, CstoreReader)
    try:
        with socket.create_connection((own, reader.address.port), timeout=20) as connection:
            assert ended(connection)
        wait_until(lambda: "its address is not among those of allow" in caplog.text)
        with association(reader) as made:  # by the loopback
            assert made.is_established
    finally:
        reader.close()


def test_two_runs_back_to_back(open_node: Any) -> None:
    reader = open_node(count=3)
    with association(reader) as made:
        store(made, *[mosaic(index) for index in range(3)])
        # These are there before the first run has been looked at.
        store(made, *[mosaic(index, series_uid=SERIES_UID + ".2") for index in range(3)])
        runs = [list(reader), list(reader)]
    assert [[v.index for v in volumes_of(run)] for run in runs] == [[0, 1, 2], [0, 1, 2]]
    assert [run[-1] for run in runs] == [RunEnd("all 3 volumes are there")] * 2


def test_silence_ends_a_run(open_node: Any) -> None:
    reader = open_node(timeout_s=0.2)
    with association(reader) as made:
        store(made, mosaic(0))
        items = list(reader)
    assert items[1:] == [RunEnd("no volume came for 0.2 s")]


def test_when_nobody_takes_objects_the_sender_is_told(
    open_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cstore_module, "_WAITING_BYTES", 5000)
    monkeypatch.setattr(cstore_module, "_PATIENCE_S", 0.2)
    reader = open_node(count=5)
    with association(reader) as made:
        answers = store(made, *[mosaic(index) for index in range(4)])
        n_taken = answers.index(0xA700)
        assert answers == [SUCCESS] * n_taken + [0xA700] * (4 - n_taken)
        stream = iter(reader)
        given = [next(stream) for _ in range(n_taken)]
        assert store(made, mosaic(4)) == [SUCCESS]
        given.append(next(stream))
    assert [v.index for v in volumes_of(given)] == [*range(n_taken), 4]


def test_a_listener_that_dies_is_started_again(
    open_node: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reader = open_node(count=2)
    items: list[Any] = []
    with association(reader) as made:
        store(made, mosaic(0))
        first = reader.listener_pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not made.is_established)
    # It may not have been started yet: a peer waits then.
    with association(reader) as made:
        assert store(made, mosaic(1)) == [SUCCESS]
        assert reader.listener_pid not in (None, first)
    items = list(reader)
    assert [v.index for v in volumes_of(items)] == [0, 1]
    assert Skipped("listener", RESTARTED) in items
    assert RESTARTED in caplog.text


ORPHAN = """
import sys, time
from rtfmri.readers import open_reader
reader = open_reader("dicom://127.0.0.1:0")
print(reader.listener_pid, reader.address.port, flush=True)
time.sleep(600)
"""


def test_the_listener_ends_with_the_process_of_its_reader() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout
        pid, port = map(int, process.stdout.readline().split())
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            process.kill()
            assert ended(connection)
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: has_ended(pid))


def has_ended(pid: int) -> bool:
    """Tell whether there is no such process, or what is left of it waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_close_ends_iteration_associations_and_process(open_node: Any) -> None:
    reader = open_node()
    items: list[Any] = []
    thread = threading.Thread(target=lambda: items.extend(reader))
    thread.start()
    with association(reader) as made:
        store(made, mosaic(0))
        pid, port = reader.listener_pid, reader.address.port
        reader.close()
        reader.close()
        thread.join(20)
        wait_until(lambda: not made.is_established)
    assert not thread.is_alive()
    assert has_ended(pid)
    assert reader.listener_pid is None
    with socket.create_server(("127.0.0.1", port)):
        pass  # the port is free again


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SourceError, match=f"port {port} is in use"):
            open_reader(f"dicom://127.0.0.1:{port}")


def test_an_address_that_cannot_be_is_named() -> None:
    with pytest.raises(SourceError, match=r"cannot listen on 192\.0\.2\.1:0"):
        open_reader("dicom://192.0.2.1:0?allow=192.0.2.0/24")
    with pytest.raises(SourceError, match="open to other machines"):
        open_reader("dicom://0.0.0.0:0")


def test_a_missing_pynetdicom_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cstore_module, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"rtfmri\[dicom\]"):
        open_reader("dicom://127.0.0.1:0")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a certificate and its key, of its own authority."""
    program = installed("/usr/bin/openssl", "openssl")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    names = ["-subj", "/CN=rtfmri", "-addext", "subjectAltName=IP:127.0.0.1", "-nodes"]
    paths = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names, *paths], check=True, capture_output=True)
    return {"certificate": certificate, "key": key}


@pytest.mark.debian("openssl")
def test_tls(open_node: Any, tls: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    reader = open_node(count=2, **tls, authority=tls["certificate"])
    stranger = ssl.create_default_context(cafile=str(tls["certificate"]))
    context = ssl.create_default_context(cafile=str(tls["certificate"]))
    context.load_cert_chain(tls["certificate"], tls["key"])
    with association(reader, tls_args=(context, "127.0.0.1")) as made:
        assert store(made, mosaic(0)) == [SUCCESS]
        with connected(reader) as plain_one:
            plain_one.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert ended(plain_one)
        with (
            connected(reader) as other,
            suppress(ssl.SSLError),
            stranger.wrap_socket(other, server_hostname="127.0.0.1") as wrapped,
        ):
            assert ended(wrapped)
        assert store(made, mosaic(1)) == [SUCCESS]
    assert [v.index for v in volumes_of(list(reader))] == [0, 1]
    assert "it did not agree on TLS" in caplog.text


@pytest.mark.debian("openssl")
def test_files_of_tls_that_are_wrong_are_named(tls: dict[str, Path], tmp_path: Path) -> None:
    garbage, missing = tmp_path / "garbage.pem", tmp_path / "missing.pem"
    garbage.write_text("nothing")
    good = dict(tls)
    for name, wrong in [
        ("certificate", good | {"certificate": garbage}),
        ("certificate", good | {"certificate": missing}),
        ("key", good | {"key": garbage}),
        ("key", {"certificate": good["certificate"]}),
        ("key", {"key": good["key"]}),
        ("authority", good | {"authority": missing}),
        ("authority", good | {"authority": garbage}),
        ("authority", {"authority": good["certificate"]}),
    ]:
        with pytest.raises(SourceError, match=f"^{name} "):
            open_cstore("//127.0.0.1:0", None, **wrong)  # type: ignore[arg-type]


def test_a_session_gives_the_results_of_the_folder(open_node: Any, tmp_path: Path) -> None:
    files = files_of(tmp_path / "run", 6)
    reader = open_node(count=6)
    with association(reader) as made:
        store(made, *map(pydicom.dcmread, files))
    results = []
    for source in (reader, str(tmp_path / "run")):
        with Session(source, config=plain()) as session:
            results.append([(r.index, r.quality.dvars) for r in session])
    assert len(results[0]) == 6
    assert results[0] == results[1]


CLOCKS = ("arrived_s", "deadline_missed", "latency_ms")


def contents(path: Path) -> dict[str, Any]:
    """Return what a recording holds, without what clocks say and how the end was recognised."""
    kept: dict[str, Any] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name != "journal":
            if not item.dtype.names:
                kept[name] = item[()]
            for field in item.dtype.names or ():
                if field not in CLOCKS and not field.endswith("_ms"):
                    kept[f"{name}/{field}"] = item[()][field]

    with h5py.File(path) as file:
        file.visititems(keep)
    return kept


def lines_of(text: str) -> list[dict[str, Any]]:
    """Return what a run tells of its volumes, without what clocks say."""
    rows = [json.loads(line) for line in text.splitlines()][:-1]
    return [{k: v for k, v in row.items() if k not in ("latency_ms", "recorded")} for row in rows]


def check_command_line(folder: Path, scratch: Path, *options: str) -> None:
    """Check that a run by DICOM is the run by the folder, bit by bit."""
    files = sorted(folder.glob("*.dcm"))
    command = [sys.executable, "-m", "rtfmri", "-v", "run", "--json", "--device", "cpu", *options]
    done = subprocess.run(
        [*command, str(folder), "--out", str(scratch / "folder.h5")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    source = f"dicom://127.0.0.1:0?count={len(files)}"
    with subprocess.Popen(
        [*command, source, "--out", str(scratch / "dicom.h5")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    ) as run:
        try:
            assert run.stderr
            while not (said := re.search(r"listening on \S+:(\d+)", run.stderr.readline())):
                assert run.poll() is None
            storescu = installed("/usr/bin/storescu", "dcmtk")
            target = ["-aec", "RTFMRI", "127.0.0.1", said[1]]
            subprocess.run([storescu, *target, *map(str, files)], check=True, timeout=120)
            out, _ = run.communicate(timeout=300)
        finally:
            run.kill()
    assert run.returncode == 0
    rows = lines_of(out)
    assert len(rows) == len(files)
    assert rows == lines_of(done.stdout)
    expected, got = contents(scratch / "folder.h5"), contents(scratch / "dicom.h5")
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


@pytest.mark.debian("dcmtk")
def test_a_run_by_the_command_line(tmp_path: Path) -> None:
    installed("/usr/bin/storescu", "dcmtk")
    files_of(tmp_path / "run", 6)
    check_command_line(tmp_path / "run", tmp_path)


@pytest.mark.debian("dcmtk")
def test_a_real_run_by_the_command_line(tmp_path: Path) -> None:
    installed("/usr/bin/storescu", "dcmtk")
    source = real_data("siemens_mosaic_psc")
    (tmp_path / "run").mkdir()
    for file in source.glob("*.dcm"):
        (tmp_path / "run" / file.name).symlink_to(file)
    check_command_line(tmp_path / "run", tmp_path, "--events", str(source / "events.tsv"))

"""What sends to our DICOM node in the tests: pynetdicom, dcmtk and Orthanc."""

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pynetdicom import AE, build_context
from pynetdicom.association import Association

from rtfmri.readers.cstore import CstoreReader

MR = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT = "1.2.840.10008.1.2.1"
SUCCESS = 0x0000

Sender = Callable[[CstoreReader, Sequence[Path], Path], None]


@contextmanager
def association(
    reader: CstoreReader,
    *,
    calling: str = "SCANNER",
    called: str = "RTFMRI",
    contexts: Sequence[tuple[str, str]] = (
        (MR, EXPLICIT),
        (ENHANCED_MR, EXPLICIT),
        (SECONDARY_CAPTURE, EXPLICIT),
        (VERIFICATION, EXPLICIT),
    ),
    **options: Any,
) -> Iterator[Association]:
    """Ask *reader* for an association by pynetdicom, which may be refused."""
    ae = AE(calling)
    ae.network_timeout = 60
    ae.requested_contexts = [build_context(uid, syntax) for uid, syntax in contexts]
    made = ae.associate(
        reader.address.host, reader.address.port, ae_title=called, max_pdu=131072, **options
    )
    try:
        yield made
    finally:
        if made.is_established:
            made.release()


def store(made: Association, *datasets: pydicom.Dataset) -> list[int]:
    """Send datasets; return what was answered."""
    return [int(made.send_c_store(dataset).Status) for dataset in datasets]


def by_pynetdicom(reader: CstoreReader, files: Sequence[Path], scratch: Path) -> None:
    """Send by pynetdicom."""
    with association(reader) as made:
        for file in files:
            assert store(made, pydicom.dcmread(file)) == [SUCCESS]


def by_storescu(reader: CstoreReader, files: Sequence[Path], scratch: Path) -> None:
    """Send by dcmtk's storescu."""
    _dcmtk("storescu", "-aec", "RTFMRI", *_address(reader), *map(str, files))


def by_dcmsend(reader: CstoreReader, files: Sequence[Path], scratch: Path) -> None:
    """Send by dcmtk's dcmsend."""
    _dcmtk("dcmsend", "-aec", "RTFMRI", *_address(reader), *map(str, files))


def by_orthanc(reader: CstoreReader, files: Sequence[Path], scratch: Path) -> None:
    """Put the files into an Orthanc of our own, and let it send them on."""
    program = installed("/usr/sbin/Orthanc", "orthanc")
    host, port = _address(reader)
    config = scratch / "orthanc.json"
    http = free_port()
    settings = {
        "StorageDirectory": str(scratch / "orthanc"),
        "IndexDirectory": str(scratch / "orthanc"),
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "DicomServerEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomModalities": {"rtfmri": ["RTFMRI", host, int(port)]},
    }
    config.write_text(json.dumps(settings))
    with (scratch / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, str(config)], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{http}"
        _wait_for(process, f"{url}/system")
        ids = [json.loads(_post(f"{url}/instances", file.read_bytes()))["ID"] for file in files]
        answer = json.loads(_post(f"{url}/modalities/rtfmri/store", json.dumps(ids).encode()))
        assert (answer["InstancesCount"], answer["FailedInstancesCount"]) == (len(files), 0)
    finally:
        process.terminate()
        process.wait(30)


SENDERS = [
    by_pynetdicom,
    pytest.param(by_storescu, marks=pytest.mark.debian("dcmtk")),
    pytest.param(by_dcmsend, marks=pytest.mark.debian("dcmtk")),
    pytest.param(by_orthanc, marks=pytest.mark.debian("orthanc")),
]


def installed(program: str, package: str) -> str:
    """Return the path of a program of Debian's, or skip the test."""
    if not Path(program).exists():
        pytest.skip(f"{program} of the Debian package {package} is not installed")
    return program


def free_port() -> int:
    """Return a port of the loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def connected(reader: CstoreReader) -> socket.socket:
    """Return a connection to the listener on which nothing has been said."""
    return socket.create_connection((reader.address.host, reader.address.port), timeout=30)


def ended(connection: socket.socket) -> bool:
    """Wait until the peer ends the connection."""
    with suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


def wait_until(what: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until *what* is true; fail if it does not become so."""
    until_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until_s, "waited for too long"
        time.sleep(0.01)


def _dcmtk(name: str, *arguments: str) -> None:
    # By its full path: pynetdicom and gdcm install programs of the same names.
    program = installed(f"/usr/bin/{name}", "dcmtk")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _address(reader: CstoreReader) -> tuple[str, str]:
    return reader.address.host, str(reader.address.port)


def _post(url: str, data: bytes) -> bytes:
    with urllib.request.urlopen(url, data, timeout=30) as answer:
        return bytes(answer.read())


def _wait_for(process: "subprocess.Popen[bytes]", url: str) -> None:
    for _ in range(300):
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert process.poll() is None, "Orthanc has ended"
        time.sleep(0.1)
    pytest.fail("Orthanc does not answer")

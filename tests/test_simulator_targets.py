"""Where the simulated scanner sends: what arrives is what was sent, or is cut as it was told."""

import gc
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from socket import create_server
from typing import Any

import dcm2niix
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, evt

from dicom_files import oblique_grid, voxels
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.readers import open_reader
from rtfmri.readers.dicom import Assembly
from rtfmri.readers.network import Address
from rtfmri.simulator import cstore, open_target, parse_faults, play, targets
from rtfmri.volume import Volume

TR_S = 2.0
TIMEOUT_S = 30.0


def run(n_volumes: int = 3, dtype: type = np.int16) -> list[Volume]:
    grid = oblique_grid()
    times_s = tuple(0.25 * (k % 4) for k in range(grid.shape[2]))
    data = [voxels(grid, i, np.int16).astype(dtype) for i in range(n_volumes)]
    return [Volume(d, grid, i, TR_S, slice_times_s=times_s) for i, d in enumerate(data)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assemble(folder: Path) -> list[object]:
    """Return what the decoder of all DICOM sources makes of the files, in the order of names."""
    assembly = Assembly()
    items: list[object] = []
    for path in sorted(folder.iterdir()):
        items += assembly.add(path.read_bytes(), path.name, time.perf_counter())
    return items + assembly.end()


def assert_same(found: list[object], sent: list[Volume]) -> None:
    assert [volume.index for volume in found] == [volume.index for volume in sent]
    for one, other in zip(found, sent, strict=True):
        np.testing.assert_array_equal(one.data, other.data)
        assert one.data.dtype == other.data.dtype
        assert one.grid.matches(other.grid)
        assert one.tr_s == pytest.approx(other.tr_s)


class TestFolder:
    @pytest.mark.parametrize("query", ["", "?format=dicom", "?write=chunked&format=dicom"])
    def test_mosaics_are_read_back(self, tmp_path, query):
        play(run(), f"folder:{tmp_path}{query}", speed=None)
        assert names(tmp_path) == [f"001_000001_00000{i}.dcm" for i in (1, 2, 3)]
        found = list(open_reader(str(tmp_path)))
        assert_same(found, run())
        assert found[0].slice_times_s == run()[0].slice_times_s

    @pytest.mark.parametrize("write", ["atomic", "chunked"])
    @pytest.mark.parametrize("dtype", [np.int16, np.float32])
    def test_nifti_is_read_back(self, tmp_path, write, dtype):
        play(run(dtype=dtype), f"folder:{tmp_path}?format=nifti&write={write}", speed=None)
        assert names(tmp_path) == [f"001_000001_00000{i}.nii" for i in (1, 2, 3)]
        assert_same(list(open_reader(str(tmp_path))), run(dtype=dtype))
        image = nibabel.load(tmp_path / "001_000001_000002.nii")
        assert image.header.get_xyzt_units() == ("mm", "sec")

    @pytest.mark.parametrize("write", ["atomic", "chunked"])
    @pytest.mark.parametrize("dtype", [np.int16, np.uint16])
    def test_slices_are_read_back(self, tmp_path, write, dtype):
        sent = run(dtype=dtype)
        play(sent, f"folder:{tmp_path}?format=slices&write={write}", speed=None)
        assert names(tmp_path) == [f"001_000001_0000{i:02d}.dcm" for i in range(1, 22)]
        assert_same(list(open_reader(str(tmp_path))), sent)
        assert_same(assemble(tmp_path), sent)

    def test_slices_say_where_they_belong(self, tmp_path):
        play(run(), f"folder:{tmp_path}?format=slices", speed=None)
        headers = [pydicom.dcmread(path) for path in sorted(tmp_path.iterdir())]
        assert [h.InstanceNumber for h in headers] == list(range(1, 22))
        assert {h.AcquisitionNumber for h in headers} == {1}
        assert [h.InStackPositionNumber for h in headers] == 3 * list(range(1, 8))
        assert [h.TemporalPositionIdentifier for h in headers] == [i // 7 + 1 for i in range(21)]
        assert {h.ImagesInAcquisition for h in headers} == {7}
        assert {h.private_block(0x21, "GEMS_RELA_01")[0x4F].value for h in headers} == {7}
        assert len({h.SOPInstanceUID for h in headers}) == 21
        assert len({h.SeriesInstanceUID for h in headers}) == 1
        places_mm = np.array([h.ImagePositionPatient for h in headers[:7]], float)
        grid = oblique_grid()
        corners = [[0, 0, k, 1] for k in range(7)]
        expected_mm = (np.diag([-1, -1, 1, 1]) @ grid.affine @ np.transpose(corners))[:3].T
        np.testing.assert_allclose(places_mm, expected_mm, atol=1e-4)

    def test_dcm2niix_gives_back_the_slices(self, tmp_path):
        sent = run()
        play(sent, f"folder:{tmp_path / 'export'}?format=slices", speed=None)
        command = [dcm2niix.bin, "-z", "n", "-f", "run", "-o", tmp_path, tmp_path / "export"]
        subprocess.run(command, capture_output=True, check=True, timeout=60)
        found = nibabel.as_closest_canonical(nibabel.load(tmp_path / "run.nii"))
        stack = np.stack([volume.data for volume in sent], -1).astype(np.int32)
        expected = nibabel.as_closest_canonical(
            nibabel.Nifti1Image(stack, sent[0].grid.affine)
        )  # fmt: skip
        np.testing.assert_array_equal(found.dataobj, expected.dataobj)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)
        assert found.header.get_zooms()[3] == pytest.approx(TR_S)

    def test_no_person_is_in_slices(self, tmp_path):
        play(run(1), f"folder:{tmp_path}?format=slices", speed=None)
        for path in tmp_path.iterdir():
            elements = pydicom.dcmread(path)
            found = {str(e.value) for e in elements if e.tag.group == 0x10 or e.VR == "PN"}
            assert found == {"ANONYMOUS", ""}

    def test_the_same_run_is_the_same_series_and_another_is_not(self, tmp_path):
        uids = []
        for name, volumes in (("a", run()), ("b", run()), ("c", run()[1:])):
            play(volumes, f"folder:{tmp_path / name}", speed=None)
            first = sorted((tmp_path / name).iterdir())[0]
            uids.append(pydicom.dcmread(first).SeriesInstanceUID)
        assert uids[0] == uids[1] != uids[2]

    def test_atomic_shows_no_part_of_a_file(self, tmp_path, monkeypatch):
        sizes = []
        rename = Path.replace

        def replace(path: Path, to: Path) -> None:
            assert names(tmp_path) == [path.name]
            assert path.name.startswith(".")
            sizes.append(path.stat().st_size)
            rename(path, to)

        monkeypatch.setattr(Path, "replace", replace)
        target = open_target(f"folder:{tmp_path}")
        target.send(run(1)[0])
        (path,) = tmp_path.iterdir()
        assert path.name == "001_000001_000001.dcm"
        assert sizes == [path.stat().st_size]

    def test_chunked_grows_in_place(self, tmp_path, monkeypatch):
        seen = []

        class Time:
            @staticmethod
            def sleep(seconds: float) -> None:
                assert 0 < seconds < 0.1
                (path,) = tmp_path.iterdir()
                seen.append((path.name, path.stat().st_size))

        monkeypatch.setattr(targets, "time", Time)
        open_target(f"folder:{tmp_path}?write=chunked").send(run(1)[0])
        (path,) = tmp_path.iterdir()
        assert {name for name, _ in seen} == {"001_000001_000001.dcm"}
        sizes = [size for _, size in seen]
        assert sizes[:3] == sorted(sizes[:3])
        assert 0 < sizes[0] < sizes[1] < sizes[2] < path.stat().st_size

    @pytest.mark.parametrize("query", ["", "?write=chunked", "?format=slices&write=chunked"])
    def test_a_live_folder_is_read_while_it_is_written(self, tmp_path, query):
        sent = run(5)
        reader = open_reader(f"folder:{tmp_path}?count=5&timeout_s={TIMEOUT_S}")
        scanner = threading.Thread(
            target=play, args=(sent, f"folder:{tmp_path}{query}"), kwargs={"speed": 50.0}
        )
        scanner.start()
        found = [item for item in reader if isinstance(item, Volume)]
        scanner.join(TIMEOUT_S)
        assert_same(found, sent)

    @pytest.mark.parametrize("write", ["atomic", "chunked"])
    def test_a_truncated_volume_is_half_a_file(self, tmp_path, write):
        faults = parse_faults(["truncated@1"])
        assert play(run(), f"folder:{tmp_path}?write={write}", speed=None, faults=faults) == 2
        whole, cut, _ = (path.stat().st_size for path in sorted(tmp_path.iterdir()))
        assert cut == pytest.approx(whole / 2, abs=64)
        found = [item for item in open_reader(str(tmp_path)) if isinstance(item, Volume)]
        assert_same(found, [run()[i] for i in (0, 2)])

    def test_a_truncated_volume_is_half_of_its_slices(self, tmp_path):
        open_target(f"folder:{tmp_path / 'whole'}?format=slices").send(run(1)[0])
        open_target(f"folder:{tmp_path / 'cut'}?format=slices").send(run(1)[0], share=0.5)
        sizes = [path.stat().st_size for path in sorted((tmp_path / "cut").iterdir())]
        assert len(sizes) == 4
        whole = [path.stat().st_size for path in sorted((tmp_path / "whole").iterdir())]
        assert sizes[:3] == whole[:3]
        assert 0 < sizes[3] < whole[3]

    @pytest.mark.parametrize("format", ["dicom", "slices"])
    def test_a_stranger_is_of_another_series(self, tmp_path, format):
        faults = parse_faults(["wrong-series@1-2"])
        play(run(), f"folder:{tmp_path}?format={format}", speed=None, faults=faults)
        headers = {path.name: pydicom.dcmread(path) for path in tmp_path.iterdir()}
        ours = {n: h for n, h in headers.items() if n.startswith("001_000001_")}
        others = {n: h for n, h in headers.items() if n.startswith("001_000002_")}
        assert len(ours) + len(others) == len(headers)
        assert 3 * len(others) == 2 * len(ours)
        (our_uid,) = {h.SeriesInstanceUID for h in ours.values()}
        (other_uid,) = {h.SeriesInstanceUID for h in others.values()}
        assert our_uid != other_uid
        assert {h.SeriesNumber for h in ours.values()} == {1}
        assert {h.SeriesNumber for h in others.values()} == {2}
        found = [item for item in assemble(tmp_path) if isinstance(item, Volume)]
        assert_same(found, run())

    @pytest.mark.parametrize("suffix", ["dcm", "nii"])
    def test_a_second_copy_has_a_name_of_its_own(self, tmp_path, suffix):
        format = {"dcm": "dicom", "nii": "nifti"}[suffix]
        play(run(2), f"folder:{tmp_path}?format={format}", speed=None,
             faults=parse_faults(["doubled@0"]))  # fmt: skip
        first, second, other = (tmp_path / name for name in names(tmp_path))
        assert [first.name, second.name, other.name] == [
            f"001_000001_000001-2.{suffix}",
            f"001_000001_000001.{suffix}",
            f"001_000001_000002.{suffix}",
        ]
        assert first.read_bytes() == second.read_bytes() != other.read_bytes()

    def test_another_shape_is_another_image(self, tmp_path):
        play(run(1), f"folder:{tmp_path}", speed=None, faults=parse_faults(["wrong-shape@0"]))
        wide, ours = (pydicom.dcmread(tmp_path / name) for name in reversed(names(tmp_path)))
        assert (wide.Columns, wide.Rows) == (2 * ours.Columns, ours.Rows)
        assert wide.SeriesInstanceUID == ours.SeriesInstanceUID
        assert wide.InstanceNumber == ours.InstanceNumber
        assert wide.SOPInstanceUID != ours.SOPInstanceUID

    def test_a_folder_that_dies_goes_on(self, tmp_path):
        assert play(run(), f"folder:{tmp_path}", speed=None, faults=parse_faults(["dies@1"])) == 3
        assert len(names(tmp_path)) == 3

    @pytest.mark.parametrize("format", ["dicom", "slices"])
    def test_float_voxels_need_nifti(self, tmp_path, format):
        with pytest.raises(
            ConfigError, match=r"these volumes are float32; use folder:DIR\?format=nif"
        ):
            play(run(dtype=np.float32), f"folder:{tmp_path}?format={format}", speed=None)
        assert names(tmp_path) == []

    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        with pytest.raises(RecordingError, match="cannot make the folder"):
            open_target(f"folder:{tmp_path / 'file' / 'export'}")

    @pytest.mark.parametrize("write", ["atomic", "chunked"])
    def test_folder_that_goes_away(self, tmp_path, write):
        target = open_target(f"folder:{tmp_path / 'export'}?write={write}")
        (tmp_path / "export").rmdir()
        with pytest.raises(RecordingError, match=r"cannot write .*001_000001_000001\.dcm: "):
            target.send(run(1)[0])

    def test_another_run_is_not_overwritten(self, tmp_path):
        play(run(2), f"folder:{tmp_path}", speed=None)
        with pytest.raises(RecordingError, match="exists already; play into an empty folder"):
            play(run(1), f"folder:{tmp_path}", speed=None)

    def test_a_name_may_be_encoded(self, tmp_path):
        open_target(f"folder:{tmp_path}/what%3F?format=nifti").send(run(1)[0])
        assert names(tmp_path) == ["what?"]


class Node:
    """A DICOM node that notes what happens to it."""

    def __init__(self, title: str = "RTFMRI", storage: str = MRImageStorage) -> None:
        self.images: list[bytes] = []
        self.callers: list[str] = []
        self.said: list[str] = []
        self.statuses: list[int] = []
        self.aborts_at: int | None = None
        self.waits: threading.Event | None = None
        ae = AE(title)
        ae.require_called_aet = True
        ae.add_supported_context(storage, ExplicitVRLittleEndian)
        self._sockets: list[Any] = []
        self._ended = threading.Event()
        self._server = ae.start_server(
            ("127.0.0.1", 0),
            block=False,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, self._open),
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_ESTABLISHED, self._meet),
                (evt.EVT_PDU_RECV, self._hear),
                (evt.EVT_CONN_CLOSE, self._part),
            ],
        )
        self.uri = f"dicom://127.0.0.1:{self._server.server_address[1]}"

    def wait(self) -> None:
        """Wait until a connection has ended."""
        assert self._ended.wait(TIMEOUT_S)
        self._ended.clear()

    def close(self) -> None:
        self._server.shutdown()
        for connection in self._sockets:
            connection.close()

    def _open(self, event: evt.Event) -> None:
        self._sockets.append(event.assoc.dul.socket.socket)

    def _meet(self, event: evt.Event) -> None:
        self.callers.append(event.assoc.requestor.ae_title)

    def _hear(self, event: evt.Event) -> None:
        self.said.append(type(event.pdu).__name__)

    def _part(self, event: evt.Event) -> None:
        self.said.append("closed")
        self._ended.set()

    def _store(self, event: evt.Event) -> int:
        if self.waits is not None:
            self.waits.wait(TIMEOUT_S)
        if len(self.images) == self.aborts_at:
            event.assoc.abort()
            return 0x0000
        self.images.append(event.encoded_dataset())
        return self.statuses.pop(0) if self.statuses else 0x0000

    def volumes(self) -> list[object]:
        assembly = Assembly()
        items: list[object] = []
        for image in self.images:
            items += assembly.add(image, "image", time.perf_counter())
        return items

    def said_in_short(self) -> list[str]:
        """Return what was said, data once for however many pieces."""
        kept = zip(self.said, [None, *self.said], strict=False)
        return [word for word, last in kept if word != last or word != "P_DATA_TF"]


@pytest.fixture
def node():
    with closing(Node()) as node:
        yield node


@pytest.fixture
def _nothing_left():
    """Let pynetdicom's sockets, of connections that failed, be collected in the test of theirs."""
    yield
    gc.collect()


# pynetdicom does not close the socket of a connection that was refused.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_nothing_left")
class TestCStoreWithoutANode:
    def test_nobody_is_there(self):
        with create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(RecordingError, match=f"no DICOM node answers at .*:{port}"):
            open_target(f"dicom://127.0.0.1:{port}")

    def test_a_node_that_is_gone_when_we_come_back(self):
        node = Node()
        target = open_target(node.uri)
        target.die()
        node.close()
        with pytest.raises(RecordingError, match="no DICOM node answers at dicom://127"):
            target.send(run(1)[0])
        target.close()


class TestCStore:
    def test_a_run_arrives_in_one_association(self, node):
        sent = run(4)
        assert play(sent, node.uri, speed=None) == 4
        node.wait()
        assert_same(node.volumes(), sent)
        assert node.volumes()[0].slice_times_s == sent[0].slice_times_s
        assert node.callers == ["SIMULATOR"]
        assert node.said_in_short() == ["A_ASSOCIATE_RQ", "P_DATA_TF", "A_RELEASE_RQ", "closed"]

    def test_titles_are_as_asked_for(self):
        with closing(Node("SCANNERS")) as node:
            play(run(1), f"{node.uri}?ae=SCANNERS&caller=MR1", speed=None)
            assert node.callers == ["MR1"]

    def test_a_truncated_volume_is_aborted_in_the_middle(self, node):
        faults = parse_faults(["truncated@1"])
        assert play(run(), node.uri, speed=None, faults=faults) == 2
        assert_same(node.volumes(), [run()[i] for i in (0, 2)])
        node.wait()
        associated, data, aborted, closed, *again = node.said_in_short()
        assert (associated, data, aborted, closed) == (
            "A_ASSOCIATE_RQ",
            "P_DATA_TF",
            "A_ABORT_RQ",
            "closed",
        )
        assert again[:2] == ["A_ASSOCIATE_RQ", "P_DATA_TF"]

    def test_a_cut_volume_is_neither_nothing_nor_whole(self, node):
        target = open_target(node.uri)
        for share in (0.01, 0.5, 0.99):
            target.send(run(1)[0], share=share)
            node.wait()
        assert node.images == []
        pieces = [0]
        for word in node.said:
            if word == "A_ABORT_RQ":
                pieces.append(0)
            pieces[-1] += word == "P_DATA_TF"
        few, half, most, _ = pieces
        assert 1 <= few < half < most
        target.close()

    def test_who_dies_says_nothing(self, node):
        faults = parse_faults(["dies@1"])
        assert play(run(), node.uri, speed=None, faults=faults) == 3
        assert_same(node.volumes(), run())
        assert len(node.callers) == 2
        assert node.said_in_short()[:5] == [
            "A_ASSOCIATE_RQ",
            "P_DATA_TF",
            "closed",
            "A_ASSOCIATE_RQ",
            "P_DATA_TF",
        ]

    def test_one_may_die_twice_and_before_the_first_volume(self, node):
        target = open_target(node.uri)
        target.die()
        target.die()
        target.send(run(1)[0])
        target.close()
        target.close()
        assert_same(node.volumes(), run(1))

    def test_a_stranger_is_of_another_series(self, node):
        play(run(), node.uri, speed=None, faults=parse_faults(["wrong-series@2"]))
        assert len(node.images) == 4
        found = [item for item in node.volumes() if isinstance(item, Volume)]
        assert_same(found, run())

    def test_a_refused_volume_is_an_error_that_says_the_status(self, node):
        node.statuses = [0x0000, 0xA700]
        seen: list[int] = []
        with pytest.raises(RecordingError, match=r"refused volume 1 with the status 0xA700"):
            play(run(), node.uri, speed=None, on_volume=seen.append)
        assert seen == [0]
        node.wait()
        assert node.said[-2:] == ["A_RELEASE_RQ", "closed"]

    def test_a_warning_is_no_refusal(self, node):
        node.statuses = [0xB000, 0xB007]
        assert play(run(), node.uri, speed=None) == 3

    def test_another_title_is_refused(self, node):
        with pytest.raises(RecordingError, match=r"ae=NOBODY.* refused .*: Called AE title not"):
            open_target(f"{node.uri}?ae=NOBODY")

    def test_a_node_that_takes_no_mr_images(self):
        with (
            closing(Node(storage=CTImageStorage)) as node,
            pytest.raises(RecordingError, match="takes no MR images"),
        ):
            open_target(node.uri)

    def test_a_node_that_aborts_in_the_middle(self, node):
        node.aborts_at = 1
        with pytest.raises(RecordingError, match="went away instead of taking volume 1"):
            play(run(), node.uri, speed=None)

    def test_a_node_that_takes_too_long(self, node, monkeypatch):
        monkeypatch.setattr(cstore, "_ANSWER_S", 0.3)
        node.waits = threading.Event()
        with pytest.raises(RecordingError, match="went away instead of taking volume 0"):
            play(run(), node.uri, speed=None)
        node.waits.set()

    def test_somebody_who_never_answers(self, monkeypatch):
        monkeypatch.setattr(cstore, "_ANSWER_S", 0.2)
        with create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with pytest.raises(RecordingError, match="no DICOM node answers"):
                open_target(f"dicom://127.0.0.1:{port}")

    def test_somebody_who_speaks_no_dicom(self):
        with create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                with server.accept()[0] as connection:
                    connection.sendall(b"220 mail.example ready\r\n")
                    connection.recv(1024)

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(RecordingError, match="no DICOM node answers"):
                open_target(f"dicom://127.0.0.1:{server.getsockname()[1]}")
            thread.join(TIMEOUT_S)

    def test_float_voxels_need_nifti(self, node):
        with pytest.raises(ConfigError, match="these volumes are float32"):
            play(run(dtype=np.float32), node.uri, speed=None)

    def test_without_pynetdicom_one_is_told_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynetdicom", None)
        with pytest.raises(ConfigError, match=r"pip install 'rtfmri\[dicom\]'"):
            open_target("dicom://127.0.0.1:11112")


class TestGrammar:
    @pytest.mark.parametrize(
        "target",
        ["", "export", "folder:", "folder:?format=nifti", "tape:1", "folder:x?speed=2",
         "folder:x?format=nifti&a=b", "folder:x?format=nifti&format=dicom",
         "dicom://:1?format=nifti", "afni://:1?x=1"],
    )  # fmt: skip
    def test_a_target_is_one_of_these(self, target, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = r"target must be folder:DIR with .* dicom://HOST:PORT .* zmq://HOST:PORT; got "
        with pytest.raises(ConfigError, match=words):
            open_target(target)
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("folder:x?format=png", "format must be one of dicom, slices, nifti; got 'folder:x"),
            ("folder:x?write=", "write must be one of atomic, chunked; got"),
            ("dicom://:1?ae=", "ae must be an AE title of up to 16 characters; got"),
            ("dicom://:1?ae=A+TITLE", "ae must be an AE title"),
            ("dicom://:1?caller=SEVENTEEN_LETTERS", "caller must be an AE title"),
            ("dicom:x:y", "an address is //HOST:PORT, .* in 'dicom:x:y'"),
            ("dicom://:99999", "an address is //HOST:PORT"),
            ("mrd://a/b", "an address is //HOST:PORT"),
        ],
    )
    def test_what_is_wrong_is_told(self, target, words, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=words):
            open_target(target)
        assert names(tmp_path) == []

    @pytest.mark.parametrize("scheme", targets.STREAMS)
    def test_a_stream_gets_its_address(self, scheme, monkeypatch):
        streams = pytest.importorskip("rtfmri.simulator.streams")
        assert set(streams.STREAM_TARGETS) == set(targets.STREAMS)
        asked: list[Address] = []
        monkeypatch.setitem(streams.STREAM_TARGETS, scheme, asked.append)
        for where in ("", "//:7", "//192.0.2.1:8", "//scanner.example", "//[::1]:9"):
            open_target(f"{scheme}:{where}")
        assert asked == [
            Address("127.0.0.1", 0),
            Address("127.0.0.1", 7),
            Address("192.0.2.1", 8),
            Address("scanner.example", 0),
            Address("::1", 9),
        ]

"""Folders: played back in the order of the run, and live while files arrive in pieces."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dicom_files import SERIES_UID, enhanced, mosaic, oblique_grid, real_data, to_bytes, voxels
from rtfmri.errors import SourceError
from rtfmri.readers import Skipped, open_reader
from rtfmri.readers.folder import OTHER_SERIES, LiveFolder
from rtfmri.volume import Volume

OTHER_UID = SERIES_UID + ".77"


def save(folder: Path, index: int, name: str | None = None, uid: str = SERIES_UID) -> Path:
    path = folder / (name or f"{index:03d}.dcm")
    path.write_bytes(to_bytes(mosaic(index, series_uid=uid)))
    return path


def indices(items: list[Volume | Skipped]) -> list[int]:
    return [item.index for item in items if isinstance(item, Volume)]


def test_replay_is_ordered_by_the_headers_and_accounts_for_every_file(tmp_path):
    for index, name in [(2, "a"), (0, "z.dcm"), (1, "m.IMA"), (4, "q")]:
        save(tmp_path, index, name)
    save(tmp_path, 3, "other", OTHER_UID)
    (tmp_path / "events.tsv").write_text("onset\tduration\n")
    (tmp_path / "empty.dcm").touch()
    cut = save(tmp_path, 5, "cut")
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "half.dcm.part").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "folder").mkdir()
    reader = open_reader(str(tmp_path))
    items = list(reader)
    assert (reader.live, reader.n_volumes) == (False, 5)
    assert indices(items) == [0, 1, 2, 4]
    for volume in items:
        if isinstance(volume, Volume):
            np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), volume.index))
    skipped = {item.name: item.reason for item in items if isinstance(item, Skipped)}
    assert skipped.keys() == {"other", "events.tsv", "empty.dcm", "cut"}
    assert skipped["other"] == OTHER_SERIES
    assert skipped["events.tsv"] == "is not DICOM"
    assert "cut short" in skipped["cut"]


def test_replay_gives_volumes_of_another_shape_to_the_session(tmp_path):
    save(tmp_path, 0)
    dataset = mosaic(1, grid=oblique_grid((12, 10, 5)))
    (tmp_path / "other.dcm").write_bytes(to_bytes(dataset))
    assert [volume.grid.shape[2] for volume in open_reader(str(tmp_path))] == [7, 5]


def test_replay_of_enhanced_files(tmp_path):
    for index in range(3):
        (tmp_path / f"{9 - index}").write_bytes(to_bytes(enhanced(index)))
    assert indices(list(open_reader(str(tmp_path)))) == [0, 1, 2]


def test_replay_without_tr_asks_for_it(tmp_path):
    dataset = mosaic()
    del dataset.RepetitionTime
    (tmp_path / "0.dcm").write_bytes(to_bytes(dataset))
    with pytest.raises(SourceError, match="--tr"):
        open_reader(str(tmp_path))
    assert [volume.tr_s for volume in open_reader(str(tmp_path), tr_s=0.9)] == [0.9]


def test_folders_without_a_usable_volume_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no DICOM and no NIfTI"):
        open_reader(str(tmp_path))
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(SourceError, match="no DICOM and no NIfTI"):
        open_reader(str(tmp_path))
    dataset = mosaic()
    del dataset[0x0029, 0x1010]
    (tmp_path / "slice.dcm").write_bytes(to_bytes(dataset))
    with pytest.raises(SourceError, match="one slice"):
        open_reader(str(tmp_path))


@contextmanager
def writing(write: Callable[[], None]) -> Iterator[None]:
    """Run *write* in a thread beside the block."""
    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=20)
    assert not thread.is_alive()


def in_chunks(path: Path, data: bytes, pause_s: float = 0.01) -> None:
    """Write *data* in four pieces, each of them on the disk before the next."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), -(-len(data) // 4)):
            file.write(data[start : start + -(-len(data) // 4)])
            time.sleep(pause_s)


def test_live_files_in_chunks_out_of_order_and_renamed(tmp_path):
    save(tmp_path, 9, "before.dcm")
    reader = open_reader(f"folder:{tmp_path}?count=6&timeout_s=20")
    assert (reader.live, reader.n_volumes) == (True, 6)

    def write() -> None:
        for index in (0, 1, 3, 2):
            in_chunks(tmp_path / f"{index}.dcm", to_bytes(mosaic(index)))
        in_chunks(tmp_path / "4.dcm.tmp", to_bytes(mosaic(4)))
        (tmp_path / "4.dcm.tmp").rename(tmp_path / "4.dcm")
        in_chunks(tmp_path / ".5.dcm", to_bytes(mosaic(5)), pause_s=0.1)
        (tmp_path / ".5.dcm").rename(tmp_path / "5.dcm")

    with writing(write):
        items = list(reader)
    assert sorted(indices(items)) == [0, 1, 2, 3, 4, 5]
    assert len(items) == 6
    for volume in items:
        assert isinstance(volume, Volume)
        np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), volume.index))
        assert volume.arrived_s < volume.decoded_s


def test_live_existing_files_are_used_on_request(tmp_path):
    for index in (1, 0, 2):
        os.utime(save(tmp_path, index), ns=(0, 10**9 * index))
    items = list(open_reader(f"folder:{tmp_path}?count=3&existing=use"))
    assert indices(items) == [0, 1, 2]


def test_live_polling_alone_is_enough(tmp_path, monkeypatch, caplog):
    def refuse(observer: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr("watchdog.observers.api.BaseObserver.start", refuse)
    reader = open_reader(f"folder:{tmp_path}?count=3")
    assert "polling only" in caplog.text

    def write() -> None:
        for index in range(3):
            in_chunks(tmp_path / f"{index}.dcm", to_bytes(mosaic(index)))

    with writing(write):
        assert sorted(indices(list(reader))) == [0, 1, 2]


def test_live_skips_other_series_text_and_incomplete_files(tmp_path):
    reader = LiveFolder(tmp_path, count=2, patience_s=0.2)
    items: list[Volume | Skipped] = []
    stream = iter(reader)
    save(tmp_path, 0)
    items.append(next(stream))
    save(tmp_path, 1, "other.dcm", OTHER_UID)
    items.append(next(stream))
    (tmp_path / "notes.txt").write_text("nothing")
    items.append(next(stream))
    (tmp_path / "cut.dcm").write_bytes(to_bytes(mosaic(2))[:-100])
    items.append(next(stream))
    (tmp_path / "late.dcm").write_bytes(to_bytes(mosaic(3))[:-100])
    save(tmp_path, 4)
    items.extend(stream)
    assert indices(items) == [0, 4]
    skipped = {item.name: item.reason for item in items if isinstance(item, Skipped)}
    assert skipped["other.dcm"] == OTHER_SERIES
    assert skipped["notes.txt"] == "incomplete or no volume: is not DICOM"
    assert skipped["cut.dcm"].startswith("incomplete or no volume: is cut short")
    assert skipped["late.dcm"].startswith("incomplete")
    assert len(items) == 6


def test_live_nifti_is_numbered_as_it_comes(tmp_path):
    stream = iter(open_reader(f"folder:{tmp_path}?count=2", tr_s=2.0))
    grid = oblique_grid()
    for index, name in enumerate(["b.nii", "a.nii.gz"]):
        image = nibabel.Nifti1Image(voxels(grid, index, np.int16), grid.affine)
        nibabel.save(image, tmp_path / f".{name}")
        (tmp_path / f".{name}").rename(tmp_path / name)
        volume = next(stream)
        assert (volume.index, volume.tr_s) == (index, 2.0)
        np.testing.assert_array_equal(volume.data, voxels(grid, index, np.int16))
    assert list(stream) == []


def test_live_mask_beside_dicom_files_belongs_to_another_series(tmp_path):
    nibabel.save(nibabel.Nifti1Image(voxels(oblique_grid()), np.eye(4)), tmp_path / "a_mask.nii")
    save(tmp_path, 0)
    save(tmp_path, 1)
    items = list(open_reader(f"folder:{tmp_path}?existing=use&timeout_s=0.2"))
    assert indices(items) == [0, 1]
    assert items[2:] == [Skipped("a_mask.nii", OTHER_SERIES)]


def test_live_ends_after_its_timeout(tmp_path):
    reader = open_reader(f"folder:{tmp_path}?timeout_s=0.2&existing=use")
    save(tmp_path, 0)
    assert indices(list(reader)) == [0]


def test_live_without_tr_asks_for_it(tmp_path):
    dataset = mosaic()
    del dataset.RepetitionTime
    (tmp_path / "0.dcm").write_bytes(to_bytes(dataset))
    with pytest.raises(SourceError, match="--tr"):
        list(open_reader(f"folder:{tmp_path}?existing=use"))


def test_close_ends_a_waiting_reader(tmp_path):
    reader = open_reader(f"folder:{tmp_path}")
    items: list[Volume | Skipped] = []
    with writing(lambda: items.extend(reader)):
        reader.close()
        reader.close()
    assert items == []


def test_live_survives_a_share_that_goes_away(tmp_path, caplog):
    folder = tmp_path / "share"
    folder.mkdir()
    reader = open_reader(f"folder:{folder}?count=2")
    stream = iter(reader)
    save(folder, 0)
    assert next(stream).index == 0

    def return_later() -> None:
        while "trying on" not in caplog.text:
            time.sleep(0.01)
        (tmp_path / "away").rename(folder)
        save(folder, 1)

    folder.rename(tmp_path / "away")
    with writing(return_later):
        assert indices(list(stream)) == [1]


def test_real_run_is_whole_and_the_rest_is_accounted_for():
    reader = open_reader(str(real_data("siemens_mosaic_psc")))
    items = list(reader)
    assert reader.n_volumes == 155
    assert indices(items) == list(range(155))
    skipped = {item.name for item in items if isinstance(item, Skipped)}
    assert {"events.tsv", "epi_template.nii", "lROI_1.nii", "rROI_2.nii"} < skipped
    assert len(items) - 155 == len(skipped)
    first = items[-155]
    assert all(first.grid.matches(v.grid) for v in items if isinstance(v, Volume))


@pytest.mark.parametrize(
    ("folder", "n"), [("siemens_mosaic_mb", 24), ("siemens_xa30_enhanced", 20)]
)
def test_real_runs_replay_in_order(folder, n):
    assert indices(list(open_reader(str(real_data(folder))))) == list(range(n))


def test_real_files_live(tmp_path):
    files = sorted(real_data("siemens_mosaic_psc").glob("*.dcm"))[:4]
    reader = open_reader(f"folder:{tmp_path}?count=4")
    with writing(lambda: [in_chunks(tmp_path / f.name, f.read_bytes()) for f in files]):
        assert sorted(indices(list(reader))) == [0, 1, 2, 3]

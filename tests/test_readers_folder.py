"""Folders: played back in the order of the run, and live while files arrive in pieces."""

import os
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom import Dataset

from dicom_files import (
    SERIES_UID,
    echo_mosaic,
    enhanced,
    ge_slices,
    mosaic,
    oblique_grid,
    philips_enhanced,
    philips_slices,
    real_data,
    to_bytes,
    voxels,
    xa_frames,
    xa_slices,
)
from par_files import precise, write_pair
from rtfmri.errors import SourceError
from rtfmri.readers import RunEnd, Skipped, open_reader
from rtfmri.readers.assembly import OTHER_SHAPE
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


def test_a_volume_of_another_shape_takes_nobodys_place(tmp_path):
    for index in range(2):
        save(tmp_path, index)
    dataset = mosaic(1, grid=oblique_grid((12, 10, 5)))
    (tmp_path / "other.dcm").write_bytes(to_bytes(dataset))
    stranger, *run = open_reader(str(tmp_path))
    assert stranger == Skipped("other.dcm", OTHER_SHAPE)
    assert indices(run) == [0, 1]


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
    with pytest.raises(
        SourceError, match=r"no usable volume among 1 files in .*: is a mosaic without"
    ):
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
    assert items.pop() == RunEnd("all 6 volumes are there")
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
    reader = LiveFolder(tmp_path, count=3, patience_s=0.2)
    stream = iter(reader)
    save(tmp_path, 0)
    items = [next(stream)]
    save(tmp_path, 6)
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
    assert indices(items) == [0, 6, 4]
    skipped = {item.name: item.reason for item in items if isinstance(item, Skipped)}
    assert skipped["other.dcm"] == OTHER_SERIES
    assert skipped["notes.txt"] == "incomplete or no volume: is not DICOM"
    assert skipped["cut.dcm"].startswith("incomplete or no volume: is cut short")
    assert skipped["late.dcm"].startswith("incomplete")
    assert items[-1] == RunEnd("all 3 volumes are there")
    assert len(items) == 8


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
    assert list(stream) == [RunEnd("all 2 volumes are there")]


def test_live_mask_beside_dicom_files_belongs_to_another_series(tmp_path):
    nibabel.save(nibabel.Nifti1Image(voxels(oblique_grid()), np.eye(4)), tmp_path / "a_mask.nii")
    save(tmp_path, 0)
    save(tmp_path, 1)
    items = list(open_reader(f"folder:{tmp_path}?existing=use&timeout_s=0.2"))
    assert indices(items) == [0, 1]
    assert items[2:] == [
        Skipped("a_mask.nii", OTHER_SERIES),
        RunEnd("no volume came for 0.2 s"),
    ]


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


def save_all(folder: Path, datasets: list[Dataset], prefix: str = "", first: int = 0) -> None:
    for number, dataset in enumerate(datasets, first):
        (folder / f"{prefix}{number:04d}.dcm").write_bytes(to_bytes(dataset))


@pytest.mark.parametrize("make", [ge_slices, philips_slices, xa_slices, xa_frames])
def test_slices_replay_in_the_order_of_volumes_whatever_they_are_called(make, tmp_path):
    files = [dataset for index in range(3) for dataset in make(index)]
    random.Random(3).shuffle(files)
    save_all(tmp_path, files)
    reader = open_reader(str(tmp_path))
    assert indices(list(reader)) == [0, 1, 2]
    assert reader.n_volumes == 3


def test_replay_of_slices_tells_what_is_lost_doubled_and_cut(tmp_path):
    files = [to_bytes(dataset) for index in range(4) for dataset in ge_slices(index)]
    files[10] = files[9]  # of volume 1
    files[15] = files[15][:-20]  # of volume 2, which shows only when it is read
    for number, data in enumerate(files):
        (tmp_path / f"{number:02d}").write_bytes(data)
    items = list(open_reader(str(tmp_path)))
    assert indices(items) == [0, 3]
    assert [item for item in items if isinstance(item, Skipped)] == [
        Skipped("10", "came twice"),
        Skipped("volume 1 (6 of 7 slices)", "lacks slices"),
        Skipped("volume 2", "is cut short, or its image does not fit its header"),
    ]


def test_replay_of_a_run_in_one_file_and_of_echoes(tmp_path):
    (tmp_path / "run.dcm").write_bytes(to_bytes(philips_enhanced()))
    assert indices(list(open_reader(str(tmp_path)))) == [0, 1, 2]
    (tmp_path / "run.dcm").unlink()
    save_all(tmp_path, [echo_mosaic(index, echo) for index in range(3) for echo in (3, 1, 2)])
    volumes = list(open_reader(str(tmp_path)))
    assert indices(volumes) == [0, 1, 2]
    assert all(volume.data.dtype == np.float32 for volume in volumes)


def test_replay_takes_the_series_with_the_most_volumes_not_files(tmp_path):
    anatomy = ge_slices(0, uid=OTHER_UID)
    save_all(tmp_path, anatomy, "anatomy")
    derived = [mosaic(index, series_uid=SERIES_UID + ".5") for index in range(3)]
    for dataset in derived:
        dataset.ImageType = ["DERIVED", "PRIMARY", "M", "MOSAIC"]
    save_all(tmp_path, derived, "a derived")
    save_all(tmp_path, [mosaic(index) for index in range(3)], "run")
    items = list(open_reader(str(tmp_path)))
    assert [volume.grid.shape for volume in items[-3:]] == [(12, 10, 7)] * 3
    skipped = items[:-3]
    assert len(skipped) == 10
    assert {item.reason for item in skipped} == {OTHER_SERIES}
    assert not any(item.name.startswith("run") for item in skipped)


def test_replay_keeps_no_more_than_a_volume(tmp_path):
    grid = oblique_grid((64, 64, 16))
    save_all(tmp_path, [mosaic(index, grid=grid) for index in range(40)])
    reader = iter(open_reader(str(tmp_path)))
    next(reader)
    tracemalloc.start()
    for _ in reader:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A file, its voxels and what is made of them; all 40 would be 5 MB of voxels alone.
    assert peak < 12 * 64 * 64 * 16 * 2


@pytest.mark.parametrize("make", [ge_slices, xa_frames])
def test_live_slices(make, tmp_path):
    files = [dataset for index in range(3) for dataset in make(index)]
    reader = open_reader(f"folder:{tmp_path}?count=3")
    with writing(lambda: save_all(tmp_path, files)):
        items = list(reader)
    reader.close()
    assert sorted(indices(items)) == [0, 1, 2]
    for volume in items[:-1]:
        dtype = volume.data.dtype.type
        np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), volume.index, dtype))


def test_live_pairs_are_whole_when_both_files_are(tmp_path):
    made, folder = tmp_path / "made", tmp_path / "export"
    made.mkdir()
    folder.mkdir()
    data = [np.full((12, 10, 7), value, np.uint16) for value in (10, 20, 30)]
    for index in range(3):
        write_pair(made / f"{index}.par", [(data[index], 1, 1, 0)])
    reader = open_reader(f"folder:{folder}?count=3", tr_s=1.5)
    stream = iter(reader)

    def copy(name: str) -> None:
        in_chunks(folder / name, (made / name).read_bytes())

    for index, order in enumerate([("par", "rec"), ("rec", "par"), ("par", "rec")]):
        for suffix in order:
            copy(f"{index}.{suffix}")
        volume = next(stream)
        assert volume.index == index
        np.testing.assert_allclose(volume.data, precise(data[index]), rtol=1e-6)
    assert list(stream) == [RunEnd("all 3 volumes are there")]
    reader.close()


def test_live_options_reach_the_assembly(tmp_path):
    files = [echo_mosaic(index, echo, says=False) for index in range(2) for echo in (1, 2, 3)]
    save_all(tmp_path, files)
    source = f"folder:{tmp_path}?existing=use&count=2&echoes=3&echo=2&series=1"
    reader = open_reader(source)
    volumes = [item for item in reader if isinstance(item, Volume)]
    reader.close()
    for volume in volumes:
        np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), volume.index * 10 + 2))
    reader = open_reader(f"folder:{tmp_path}?existing=use&timeout_s=0.2&series=8")
    with writing(lambda: (time.sleep(0.5), reader.close())):
        items = list(reader)
    assert items == [Skipped(f"{number:04d}.dcm", OTHER_SERIES) for number in range(6)]


def test_live_counts_a_volume_once(tmp_path):
    for name in ("0", "0 again"):
        save(tmp_path, 0, name)
    save(tmp_path, 1)
    reader = open_reader(f"folder:{tmp_path}?existing=use&count=2")
    items = list(reader)
    reader.close()
    assert indices(items) == [0, 1]
    assert [item.reason for item in items if isinstance(item, Skipped)] == ["came twice"]
    assert items[-1] == RunEnd("all 2 volumes are there")


def test_live_runs_follow_each_other(tmp_path):
    save(tmp_path, 0, "before", SERIES_UID + ".3")
    reader = LiveFolder(tmp_path, timeout_s=20)
    stream = iter(reader)
    for index in range(3):
        save(tmp_path, index, f"a{index}")
        assert next(stream).index == index
        time.sleep(0.02)
    time.sleep(0.3)  # many times the interval
    for index in range(3):
        save(tmp_path, index, f"b{index}", OTHER_UID)
    assert list(stream) == [RunEnd("the next run began")]
    again = iter(reader)
    assert [next(again).index for _ in range(3)] == [0, 1, 2]
    reader.close()
    assert list(again) == []


def test_live_goes_on_after_a_run_that_was_complete_or_fell_silent(tmp_path):
    reader = LiveFolder(tmp_path, count=2, timeout_s=0.3)
    with writing(lambda: save_all(tmp_path, [mosaic(index) for index in range(2)], "a")):
        assert list(reader)[-1] == RunEnd("all 2 volumes are there")
    # The second run begins before anybody looks, and is not complete.
    save_all(tmp_path, [mosaic(0, series_uid=OTHER_UID)], "b")
    save(tmp_path, 7, "late")
    items = list(reader)
    assert indices(items) == [0]
    assert Skipped("late", OTHER_SERIES) in items
    assert items[-1] == RunEnd("no volume came for 0.3 s")
    reader.close()


def test_live_folder_with_very_many_files(tmp_path):
    for number in range(3000):
        (tmp_path / f"old{number}").touch()
    reader = LiveFolder(tmp_path, count=2)
    with writing(lambda: [in_chunks(tmp_path / f"{i}", to_bytes(mosaic(i))) for i in range(2)]):
        items = list(reader)
    reader.close()
    assert sorted(indices(items)) == [0, 1]
    assert len(items) == 3


@pytest.mark.parametrize(
    ("folder", "n", "tr_s"), [("ge_slices", 60, None), ("philips_parrec", 30, 2.0)]
)
def test_real_slices_and_pairs_replay_in_order(folder, n, tr_s):
    assert indices(list(open_reader(str(real_data(folder)), tr_s=tr_s))) == list(range(n))

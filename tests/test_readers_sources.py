"""The grammar of sources, the pace of a replay, and the sources that are no scanner's files."""

import threading

import nibabel
import numpy as np
import pytest

from dicom_files import oblique_grid, voxels
from memory import plain
from rtfmri import Paradigm, Pipeline
from rtfmri.errors import ConfigError, RecordingError, SourceError
from rtfmri.readers import open_reader
from rtfmri.recording import Recorder
from rtfmri.volume import Volume

GRID = oblique_grid()


def write_run(path, n_volumes=4):
    data = np.stack([voxels(GRID, i, np.int16) for i in range(n_volumes)], axis=-1)
    image = nibabel.Nifti1Image(data, GRID.affine)
    image.header.set_zooms((*GRID.voxel_size_mm, 1.0))
    nibabel.save(image, path)
    return str(path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("dicomm://0.0.0.0:11112", "afni:, dicom:, folder:, mrd:"),
        ("gone.nii", "no such file"),
        ("{tmp}/notes.txt", "must be .nii, .nii.gz or .h5"),
        ("folder:{tmp}/gone", "cannot read the folder"),
        ("folder:{tmp}/notes.txt", "cannot read the folder"),
        ("folder:{tmp}?cuont=3", "allowed are count, echo, echoes, existing"),
        ("folder:{tmp}?series=last", "series must be a whole number, 0 or more"),
        ("folder:{tmp}?echo=0", "echo must be a whole number, 1 or more"),
        ("folder:{tmp}?t2star_ms=-4", "t2star_ms must be a number of ms from 1 to 1000"),
        ("dicom://?ae=TOO_LONG_FOR_A_TITLE", "AE titles of up to 16 characters"),
        ("dicom://?callers=A,,B", "AE titles of up to 16 characters"),
        ("mrd://?allow=somewhere", "addresses or networks, such as"),
        ("mrd://0.0.0.0:9002", "0.0.0.0 is open to other machines; name those that may connect"),
        ("mrd://127.0.0.1:99999", "an address is //HOST:PORT"),
        ("mrd://127.0.0.1:9002/x", "an address is //HOST:PORT"),
        ("folder:{tmp}?count=three", "count must be a whole number, 1 or more, got 'three'"),
        ("folder:{tmp}?count=0", "count must be a whole number, 1 or more, got '0'"),
        ("folder:{tmp}?count=", "count must be a whole number"),
        ("folder:{tmp}?count", "key=value"),
        ("folder:{tmp}?count=1&count=2", "given once"),
        ("folder:{tmp}?timeout_s=nan", "seconds above 0"),
        ("folder:{tmp}?timeout_s=-1", "seconds above 0"),
        ("folder:{tmp}?existing=yes", "skip or use"),
        ("simulator:finger-tapping?spikes=yes", "0 or 1"),
        ("simulator:finger-tapping?shape=64x64", "like 64x64x36"),
        ("simulator:juggling", "finger-tapping"),
    ],
)
def test_sources_that_cannot_be_opened_say_what_is_allowed(tmp_path, source, reason):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(SourceError, match=reason):
        open_reader(source.format(tmp=tmp_path))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_speed_and_tr_must_be_positive(tmp_path, value):
    source = write_run(tmp_path / "run.nii")
    with pytest.raises(ConfigError, match="speed must be a number above 0"):
        open_reader(source, speed=value)
    with pytest.raises(ConfigError, match="tr_s must be a number above 0"):
        open_reader(source, tr_s=value)
    with pytest.raises(ConfigError, match="speed is for replay"):
        open_reader(f"folder:{tmp_path}", speed=1.0)


def test_uris_are_percent_decoded_and_may_be_relative(tmp_path, monkeypatch):
    (tmp_path / "scan 1?").mkdir()
    monkeypatch.chdir(tmp_path)
    open_reader("folder:scan%201%3F?count=3").close()
    (tmp_path / "odd:name").mkdir()
    write_run(tmp_path / "odd:name" / "run.nii")
    assert len(list(open_reader("odd:name/run.nii"))) == 4


def test_pace_follows_the_tr_and_the_speed(tmp_path):
    volumes = list(open_reader(write_run(tmp_path / "run.nii"), speed=20.0))
    arrived_s = np.array([volume.arrived_s for volume in volumes])
    # Waiting never ends early (1 ms for the clock's grain); how late it ends is the machine's.
    assert (arrived_s - arrived_s[0] >= np.arange(4) / 20 - 1e-3).all()
    assert all(volume.arrived_s <= volume.decoded_s for volume in volumes)


def test_close_ends_a_paced_replay_that_waits(tmp_path):
    reader = open_reader(write_run(tmp_path / "run.nii"), speed=1e-3)
    stream = iter(reader)
    assert next(stream).index == 0
    threading.Timer(0.05, reader.close).start()
    assert list(stream) == []


def test_simulator(tmp_path):
    source = "simulator:finger-tapping?volumes=3&seed=5&shape=20x22x10"
    first, second = list(open_reader(source)), list(open_reader(source, tr_s=1.2))
    assert open_reader(source).live is False
    assert [volume.index for volume in first] == [0, 1, 2]
    assert (first[0].grid.shape, first[0].tr_s, second[0].tr_s) == ((20, 22, 10), 2.0, 1.2)
    again = list(open_reader(source))
    np.testing.assert_array_equal(first[2].data, again[2].data)
    other = next(iter(open_reader(source.replace("seed=5", "seed=6"))))
    assert (other.data != first[0].data).any()
    moving = list(open_reader(source + "&motion=1&spikes=1"))
    assert (moving[2].data != first[2].data).any()


def record(path, indices):
    config, paradigm = plain(), Paradigm()
    rois = {"all": np.ones(GRID.shape, np.float32)}
    pipeline = Pipeline(GRID, config, rois=rois, dtype=np.int16)
    recorder = Recorder(
        path,
        grid=GRID,
        tr_s=1.5,
        dtype=np.int16,
        config=config,
        paradigm=paradigm,
        rois=rois,
    )
    for index in indices:
        volume = Volume(voxels(GRID, index, np.int16), GRID, index, 1.5)
        recorder.append(volume, pipeline.push(volume))
    recorder.close(pipeline.run_maps())


def test_recording_is_played_as_it_was_recorded(tmp_path):
    record(tmp_path / "run.h5", [0, 1, 3])
    reader = open_reader(str(tmp_path / "run.h5"))
    volumes = list(reader)
    assert (reader.live, reader.n_volumes) == (False, 3)
    assert [volume.index for volume in volumes] == [0, 1, 3]
    for volume in volumes:
        np.testing.assert_array_equal(volume.data, voxels(GRID, volume.index, np.int16))
        assert volume.data.dtype == np.int16
        assert volume.data.flags.writeable
        assert volume.tr_s == 1.5
        assert volume.grid.matches(GRID)
    assert next(iter(open_reader(str(tmp_path / "run.h5"), tr_s=0.5))).tr_s == 0.5


def test_what_is_no_recording_is_refused(tmp_path):
    (tmp_path / "run.h5").write_text("nothing")
    with pytest.raises(RecordingError):
        open_reader(str(tmp_path / "run.h5"))


def test_another_package_may_bring_a_transport(tmp_path, monkeypatch):
    info = tmp_path / "lab_reader-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-reader\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rtfmri.readers]\nlab = lab_reader:SCHEME\n")
    (tmp_path / "lab_reader.py").write_text(
        "from rtfmri.readers import Scheme, open_reader\n"
        "def open_lab(target, tr_s, speed, depth):\n"
        "    return open_reader(f'simulator:finger-tapping?volumes={depth}&shape=16x16x8')\n"
        "SCHEME = Scheme(open_lab, {'depth': int})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert len(list(open_reader("lab:scanner?depth=3"))) == 3
    with pytest.raises(SourceError, match="allowed are depth"):
        open_reader("lab:scanner?width=3")

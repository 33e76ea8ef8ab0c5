"""A run meets what a run meets: gaps, doubles, strangers, a full disk, a reader that dies."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from memory import ACTIVE, EVENTS, GRID, TR_S, MemoryReader, plain, volumes
from rtfmri.config import OrderSettings
from rtfmri.errors import ConfigError, DeviceError, EventsError, RecordingError, SourceError
from rtfmri.paradigm import Event
from rtfmri.readers import RunEnd, Skipped
from rtfmri.recording import Recorder, open_recording
from rtfmri.session import Session
from rtfmri.volume import Grid, Volume

CPU = plain()
ROI = np.zeros(GRID.shape, np.float32)
ROI[ACTIVE] = 1


def changed(volume: Volume, **changes: object) -> Volume:
    values = {"data": volume.data, "grid": volume.grid, "index": volume.index, "tr_s": volume.tr_s}
    return Volume(**{**values, **changes})  # type: ignore[arg-type]


def test_every_volume_gives_a_result_in_order() -> None:
    with Session(MemoryReader(volumes(40)), events=EVENTS, rois={"m": ROI}, config=CPU) as session:
        results = list(session)
    assert [r.index for r in results] == list(range(40))
    assert session.counters.arrived == session.counters.processed == 40
    assert session.latency.count == 40
    assert not session.counters.skipped
    assert session.maps()["tap"].t[ACTIVE].min() > 8
    assert results[-1].roi["m"].signal == pytest.approx(1030, abs=5)


def test_every_fault_is_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    good = volumes(12)
    other = Grid((8, 8, 7), GRID.affine)
    moved = GRID.affine.copy()
    moved[0, 3] += 1
    items = [
        *good[:4],
        Skipped("notes.txt", "is not DICOM"),
        good[3],
        good[2],
        changed(volumes(5, grid=other)[4]),
        changed(good[4], grid=Grid(GRID.shape, moved)),
        changed(good[4], tr_s=1.0),
        volumes(5, dtype=np.float32)[4],
        good[4],
        *good[7:],
    ]
    with Session(MemoryReader(items), config=CPU) as session:
        results = list(session)
    assert [r.index for r in results] == list(range(12))
    assert [r.index for r in results if r.missing] == [5, 6]
    assert session.counters.missing == 2
    assert session.counters.skipped == {
        "is not DICOM": 1,
        "came twice": 2,
        "another shape or position than the run's first volume": 2,
        "another TR than the run's first volume": 1,
        "another voxel type than the run's first volume": 1,
    }
    assert session.counters.arrived == session.counters.processed + 7
    assert "volumes 5 to 6 never came" in caplog.text
    # The strangers left no trace: the baseline is that of the good volumes.
    used = np.mean([good[i].data for i in (0, 1, 2, 3, 4, 7, 8, 9, 10, 11)], 0)
    np.testing.assert_allclose(session.maps()["baseline"].mean, used, rtol=1e-6)


def test_faults_are_in_the_recording(tmp_path: Path) -> None:
    good = volumes(4)
    notes = Skipped("a.txt", "is not DICOM")
    items = [notes, *good[:2], notes, *good[2:], good[0]]
    with Session(MemoryReader(items), config=CPU, out=tmp_path / "run.h5") as session:
        list(session)
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.journal == [
            (0, "skipped", "is not DICOM"),
            (2, "skipped", "is not DICOM"),
            (4, "skipped", "came twice"),
            (4, "end", "the source ended"),
        ]
        assert recording.n_volumes == 4


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("DOE^JANE.MR.HEAD.0007.0012.2020.01.02.IMA", "a file (…02.IMA)"),
        ("doe_jane_000003.dcm", "a file (…000003.dcm)"),
        ("DOE_JANE", "a file"),
        ("Jane.Doe", "a file"),
        ("volume 7 (16 of 18 slices)", "volume 7 (16 of 18 slices)"),
        ("object 12", "object 12"),
    ],
)
def test_a_files_name_may_be_a_participants(
    name: str, label: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert Skipped(name, "is not DICOM").label == label
    with Session(MemoryReader([Skipped(name, "is not DICOM"), *volumes(2)]), config=CPU) as run:
        list(run)
    assert f"skipped {label}: is not DICOM" in caplog.text
    assert "doe" not in caplog.text.lower()


def test_a_run_may_be_joined_late(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    with Session(MemoryReader(volumes(8)[5:]), config=CPU, out=out) as session:
        assert [r.time_s for r in session] == [5 * TR_S, 6 * TR_S, 7 * TR_S]
    assert (session.counters.before_start, session.counters.missing) == (5, 0)
    with open_recording(out) as recording:
        assert recording.journal[0] == (0, "start", "the run was joined after volumes 0 to 4")


def test_volumes_in_another_order_give_the_same_run(tmp_path: Path) -> None:
    run = volumes(40)
    swapped = [run[i] for i in (1, 0, *range(2, 20), 22, 21, 20, *range(23, 40))]
    maps = []
    for name, items in (("a.h5", run), ("b.h5", swapped)):
        reader = MemoryReader(items, live=True)
        config = plain(order=OrderSettings(wait_s=30))
        with Session(reader, events=EVENTS, config=config, out=tmp_path / name) as session:
            assert [r.index for r in session] == list(range(40))
        maps.append(session.maps()["tap"].t)
    assert session.counters.reordered == 3
    np.testing.assert_array_equal(*maps)
    with open_recording(tmp_path / "b.h5") as recording:
        assert recording.journal[0] == (0, "reordered", "volume 0 came after a later one")
        assert [note.kind for note in recording.journal] == [*["reordered"] * 3, "end"]


@pytest.mark.parametrize("feedback", ["none", "hold"])
def test_a_missing_volume_has_no_value_or_the_one_before(
    feedback: Literal["none", "hold"], tmp_path: Path
) -> None:
    run = volumes(20)
    config = plain(order=OrderSettings(feedback=feedback))
    out = tmp_path / "run.h5"
    reader = MemoryReader([*run[:10], *run[12:]])
    with Session(reader, events=EVENTS, rois={"m": ROI}, config=config, out=out) as session:
        results = list(session)
    assert [r.index for r in results if r.missing] == [10, 11]
    assert results[11].time_s == 11 * TR_S
    assert results[11].conditions == ()
    assert results[11].quality.problems == ("missing",)
    assert results[11].quality.n_usable == results[9].quality.n_usable
    if feedback == "hold":
        assert results[11].roi == results[10].roi == results[9].roi
    else:
        value = results[11].roi["m"]
        assert np.isnan(
            [value.signal, value.filtered, value.psc, value.z, *value.t.values()]
        ).all()
    # Nothing learned of them: the results after them are as if they had never been.
    with Session(MemoryReader(run[:10] + run[12:]), events=EVENTS, config=CPU) as other:
        list(other)
    np.testing.assert_array_equal(session.maps()["tap"].t, other.maps()["tap"].t)
    with open_recording(out) as recording:
        assert recording.n_volumes == 18
        assert recording.journal[0] == (10, "missing", "volumes 10 to 11 never came")


def test_a_live_run_gives_a_gap_up_in_time() -> None:
    """The scanner stops after volume 3; 2 never comes, and 3 must not wait for a later one."""
    run, ended = volumes(4), threading.Event()
    reader = MemoryReader([run[0], run[1], run[3], ended, run[2]], live=True)
    with Session(reader, config=plain(order=OrderSettings(wait_s=0.05))) as session:
        results = iter(session)
        assert [next(results).index for _ in range(4)] == [0, 1, 2, 3]
        ended.set()
        assert list(results) == []
    assert session.counters.missing == 1
    assert session.counters.skipped == {"came after it was given up": 1}


def test_a_stranger_does_not_take_the_place_of_a_volume() -> None:
    run = volumes(4)
    stranger = volumes(3, grid=Grid((8, 8, 7), GRID.affine))[2]
    with Session(MemoryReader([*run[:2], stranger, *run[2:]]), config=CPU) as session:
        assert [r.index for r in session if not r.missing] == [0, 1, 2, 3]


def test_the_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "run.h5"
    reader = MemoryReader([*volumes(3), RunEnd("the scanner said so")], live=True)
    with Session(reader, config=CPU, out=out) as session:
        assert len(list(session)) == 3
    assert session.end == session.summary()["end"] == "the scanner said so"
    assert "the run has ended: the scanner said so" in caplog.text
    with open_recording(out) as recording:
        assert recording.journal == [(3, "end", "the scanner said so")]


def test_two_runs_back_to_back_are_two_runs(tmp_path: Path) -> None:
    first, second = volumes(5), volumes(6, seed=1)
    reader = MemoryReader([*first, RunEnd("the next run began"), *second], live=True)
    found = []
    for name in ("a.h5", "b.h5"):
        more = name == "a.h5"
        with Session(reader, config=CPU, out=tmp_path / name, more_runs=more) as session:
            assert all(not r.missing for r in session)
        with open_recording(tmp_path / name) as recording:
            found.append([volume.data for volume in recording.volumes()])
    assert reader.closed
    np.testing.assert_array_equal(found[0], [volume.data for volume in first])
    np.testing.assert_array_equal(found[1], [volume.data for volume in second])


def test_late_results_are_counted_and_the_run_goes_on() -> None:
    config = plain(deadline_s=1e-9)
    with Session(MemoryReader(volumes(5)), config=config) as session:
        assert all(r.deadline_missed for r in session)
    assert session.counters.missed_deadlines == 5


def test_leaving_early_keeps_what_was_processed(tmp_path: Path) -> None:
    with Session(MemoryReader(volumes(40)), config=CPU, out=tmp_path / "run.h5") as session:
        for result in session:
            if result.index == 9:
                break
    assert session.n_recorded == 10
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.closed
        assert recording.n_volumes == 10
        assert recording.maps()["baseline"].n_volumes == 10


def test_a_reader_that_dies_is_raised_and_the_data_is_safe(tmp_path: Path) -> None:
    items = [*volumes(6), SourceError("the share went away")]
    with (
        pytest.raises(SourceError, match="went away"),
        Session(MemoryReader(items), config=CPU, out=tmp_path / "run.h5") as session,
    ):
        list(session)
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.closed
        assert recording.n_volumes == 6


def test_a_recording_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Recorder.append

    def full_disk(self: Recorder, *arguments: object) -> None:
        if self.n_volumes == 3:
            raise OSError(28, "No space left on device")
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Recorder, "append", full_disk)
    with Session(MemoryReader(volumes(10)), config=CPU, out=tmp_path / "run.h5") as session:
        assert len(list(session)) == 10
    assert session.n_recorded == 3
    assert "recording stopped after 3 volumes" in caplog.text
    assert "No space left" in caplog.text


def test_a_slow_disk_delays_no_result_of_a_live_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: all results are there while the disk still holds the first volume."""
    real, hold = Recorder.append, [True]

    def stuck(self: Recorder, *arguments: object) -> None:
        for _ in range(1000):
            if not hold[0]:
                break
            time.sleep(0.01)
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Recorder, "append", stuck)
    reader = MemoryReader(volumes(50), live=True)
    with Session(reader, config=CPU, out=tmp_path / "run.h5") as session:
        assert len(list(session)) == 50
        assert session.n_recorded == 0
        hold[0] = False
    assert session.n_recorded == 50


@pytest.mark.parametrize("items", [[], [Skipped("a.txt", "is not DICOM")] * 3])
def test_a_source_without_a_volume_is_an_error(items: list[Skipped], tmp_path: Path) -> None:
    with (
        pytest.raises(SourceError, match="no usable volume"),
        Session(MemoryReader(items), config=CPU, out=tmp_path / "run.h5") as session,
    ):
        list(session)
    assert not (tmp_path / "run.h5").exists()


def test_nothing_starts_with_a_bad_configuration(tmp_path: Path) -> None:
    events = tmp_path / "events.tsv"
    events.write_text("onset\tduration\n0\t-3\n")
    out = tmp_path / "run.h5"
    with pytest.raises(EventsError, match="duration must be 0 or more"):
        Session(MemoryReader(volumes(1)), events=events, out=out)
    with pytest.raises(ConfigError, match="no such file"):
        Session(MemoryReader(volumes(1)), rois={"m": tmp_path / "none.nii"}, out=out)
    with pytest.raises(SourceError):
        Session(str(tmp_path / "nowhere"), out=out)
    with pytest.raises(DeviceError, match="threads"):
        Session(MemoryReader(volumes(1)), config=plain(threads=256), out=out)
    assert not out.exists()


def test_an_output_that_cannot_be_written_starts_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot write"):
        Session(MemoryReader(volumes(1)), out=tmp_path / "no" / "folder" / "run.h5")
    taken = tmp_path / "run.h5"
    taken.write_bytes(b"precious")
    with pytest.raises(RecordingError, match="exists already"):
        Session(MemoryReader(volumes(1)), out=taken)
    assert taken.read_bytes() == b"precious"


def test_events_too_short_to_count_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with Session(MemoryReader(volumes(3)), events=[Event(4, 1, "flash")], config=CPU) as session:
        list(session)
    assert "'flash'" in caplog.text


def test_the_summary_is_json(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Session(MemoryReader(volumes(40)), events=EVENTS, rois={"m": ROI}, config=CPU) as session:
        list(session)
    summary = json.loads(json.dumps(session.summary()))
    assert summary["volumes"] == 40
    assert summary["conditions"]["tap"] > 10
    assert summary["contrasts"]["tap"]["roi_t"]["m"] > 10
    with Session(MemoryReader(volumes(5)), events=EVENTS, rois={"m": ROI}, config=CPU) as short:
        list(short)
    assert short.summary()["contrasts"]["tap"]["roi_t"] == {"m": None}
    json.dumps(short.summary(), allow_nan=False)
    assert "9x8x7 voxels" in caplog.text

"""Recordings: whole, growing, and left behind by a kill."""

import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from memory import ACTIVE, EVENTS, GRID, MemoryReader, plain, volumes
from rtfmri.config import BaselineSettings, SmoothingSettings
from rtfmri.errors import RecordingError
from rtfmri.recording import open_recording, recover
from rtfmri.session import Session

CONFIG = plain(
    smoothing=SmoothingSettings(fwhm_mm=4.0),
    baseline=BaselineSettings(kind="sliding", window_volumes=8),
)
SIGMA = 4.0 / np.sqrt(8 * np.log(2)) / np.array(GRID.voxel_size_mm)
ROI = np.zeros(GRID.shape, np.float32)
ROI[ACTIVE] = 1


def record(path: Path, n: int = 40) -> Session:
    with Session(
        MemoryReader(volumes(n)), events=EVENTS, rois={"motor": ROI}, config=CONFIG, out=path
    ) as session:
        list(session)
    return session


def same_maps(one: Session, other: dict[str, object]) -> bool:
    return all(
        np.array_equal(a, b)
        for name, maps in one.maps().items()
        for a, b in zip(maps, other[name], strict=True)  # type: ignore[call-overload]
    )


def test_a_recording_holds_the_run(tmp_path: Path) -> None:
    session = record(tmp_path / "run.h5")
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.closed
        assert recording.n_volumes == 40
        assert recording.grid.matches(GRID)
        assert recording.tr_s == 2.0
        assert recording.config == CONFIG
        assert recording.events == EVENTS
        assert recording.conditions == ("baseline", "tap")
        assert np.array_equal(recording.roi_weights["motor"], ROI)
        for given, kept in zip(volumes(40), recording.volumes(), strict=True):
            assert given.index == kept.index
            assert given.data.dtype == kept.data.dtype
            assert np.array_equal(given.data, kept.data)
        assert recording.results["index"].tolist() == list(range(40))
        assert recording.members()[:, 1].sum() == session.maps()["tap"].n_volumes
        smoothed = [gaussian_filter(v.data.astype(float), SIGMA)[ACTIVE] for v in volumes(40)]
        np.testing.assert_allclose(recording.roi[:, 0, 0], np.mean(smoothed, (1, 2, 3)), rtol=1e-5)
        assert np.isnan(recording.roi[:2, 0, 2]).all()
        assert same_maps(session, recording.maps())


def test_a_replay_gives_the_same_bits(tmp_path: Path) -> None:
    session = record(tmp_path / "run.h5")
    with open_recording(tmp_path / "run.h5") as recording:
        pipeline = recording.pipeline()
        replayed = [pipeline.push(volume) for volume in recording.volumes()]
        assert same_maps(session, pipeline.maps())
        psc = [result.roi["motor"].psc for result in replayed]
        assert np.array_equal(psc, recording.roi[:, 0, 2], equal_nan=True)


def test_an_empty_task_and_no_regions_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    with Session(MemoryReader(volumes(3)), config=CONFIG, out=path) as session:
        list(session)
    with open_recording(path) as recording:
        assert recording.events == ()
        assert recording.roi_names == ()
        assert recording.roi.shape == (3, 0, 5)


def test_every_dataset_is_chunked_and_no_string_is_variable(tmp_path: Path) -> None:
    record(tmp_path / "run.h5", 3)
    bad = []

    def look(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            fields = item.dtype.fields or {}
            kinds = [item.dtype, *(dtype for dtype, *_ in fields.values())]
            if item.chunks is None or any(kind.hasobject for kind in kinds):
                bad.append(name)

    with h5py.File(tmp_path / "run.h5") as file:
        file.visititems(look)
        assert not any(np.asarray(value).dtype.hasobject for value in file.attrs.values())
    assert bad == []


FOLLOWER = """
import sys, time
from rtfmri.recording import open_recording
print("ready", flush=True)
path, wanted = sys.stdin.readline().strip(), 12
with open_recording(path) as recording:
    seen = []
    for _ in range(500):
        n = recording.n_volumes
        if n and (not seen or n > seen[-1]):
            seen.append(n)
            last = recording.volume(n - 1)
            assert last.index == n - 1 == recording.results["index"][-1], (last.index, n)
            print(n, int(last.data.sum()), flush=True)
        if n == wanted:
            break
        time.sleep(0.01)
"""


def test_another_process_reads_while_the_run_goes_on(tmp_path: Path) -> None:
    made = volumes(12)
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with follower:
        assert follower.stdin
        assert follower.stdout
        assert follower.stdout.readline() == "ready\n"
        lines = []
        with Session(
            MemoryReader(made, live=True), config=CONFIG, out=tmp_path / "run.h5"
        ) as session:
            for result in session:
                while session.n_recorded <= result.index:
                    pass
                if result.index == 0:
                    follower.stdin.write(f"{tmp_path / 'run.h5'}\n")
                    follower.stdin.flush()
                if not lines or int(lines[-1].split()[0]) <= result.index:
                    lines.append(follower.stdout.readline())
    assert follower.returncode == 0
    read = [tuple(map(int, line.split())) for line in lines if line]
    assert read[-1][0] == 12
    assert all(total == int(made[n - 1].data.sum()) for n, total in read)


# The victim forks a run for each seed and kills it: imports are paid once, and no thread of a
# kernel exists before the fork. A child acknowledges through a pipe, as a caller would see it.
VICTIM = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from memory import EVENTS, MemoryReader, plain, volumes
from rtfmri.config import Config
from rtfmri.session import Session

made = volumes(400)
for seed in range(int(sys.argv[3])):
    rng = random.Random(seed)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with Session(
            MemoryReader(made), events=EVENTS, config=plain(threads=1),
            out=f"{sys.argv[1]}/{seed}.h5",
        ) as session:
            for result in session:
                os.write(write_end, b"%d\\n" % session.n_recorded)
        os._exit(0)
    os.close(write_end)
    acknowledged, wanted = 0, rng.randrange(1, 250)
    with os.fdopen(read_end) as pipe:
        for line in pipe:
            acknowledged = int(line)
            if acknowledged >= wanted:
                break
        time.sleep(rng.random() * 2e-3)
        os.kill(child, signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in pipe.read().split())])
    _, status = os.waitpid(child, 0)
    print(seed, acknowledged, os.WTERMSIG(status), flush=True)
"""


def test_no_kill_loses_an_acknowledged_volume(tmp_path: Path) -> None:
    kills = 20
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM, str(tmp_path), str(Path(__file__).parent), str(kills)],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [tuple(map(int, line.split())) for line in victim.stdout.splitlines()]
    assert len(rows) == kills
    made = volumes(400)
    for seed, acknowledged, number in rows:
        assert number == signal.SIGKILL
        out = tmp_path / f"{seed}-mended.h5"
        assert recover(tmp_path / f"{seed}.h5", out) >= acknowledged > 0
        with open_recording(out) as mended:
            assert mended.closed
            for row in range(mended.n_volumes):
                assert np.array_equal(mended.volume(row).data, made[row].data)


def test_recovered_maps_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    session = record(tmp_path / "whole.h5", 40)
    with h5py.File(tmp_path / "whole.h5", "r+") as file:
        file["closed"][0] = 0
        file["maps/t"][:] = 0
    assert recover(tmp_path / "whole.h5", tmp_path / "mended.h5") == 40
    with (
        open_recording(tmp_path / "mended.h5") as mended,
        open_recording(tmp_path / "whole.h5") as broken,
    ):
        assert same_maps(session, mended.maps())
        assert same_maps(session, broken.maps())
        assert mended.results.tobytes() == broken.results.tobytes()
        assert np.array_equal(mended.roi, broken.roi, equal_nan=True)
        assert mended.journal == broken.journal


@pytest.mark.parametrize("kind", ["missing", "text", "stranger", "cut"])
def test_what_is_no_recording_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.h5"
    if kind == "text":
        path.write_text("no HDF5")
    elif kind == "stranger":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    elif kind == "cut":
        record(tmp_path / "run.h5", 3)
        path.write_bytes((tmp_path / "run.h5").read_bytes()[:100])
    with pytest.raises(RecordingError, match=r"x\.h5"):
        open_recording(path)
    with pytest.raises(RecordingError, match=r"x\.h5"):
        recover(path, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_recover_overwrites_nothing(tmp_path: Path) -> None:
    record(tmp_path / "run.h5", 3)
    (tmp_path / "out.h5").write_text("precious")
    with pytest.raises(RecordingError, match="exists already"):
        recover(tmp_path / "run.h5", tmp_path / "out.h5")
    assert (tmp_path / "out.h5").read_text() == "precious"

"""The command line as a user meets it, in a process of its own."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.config import disable_value_validation

from rtfmri.recording import open_recording

SMALL = "simulator:finger-tapping?volumes=40&shape=24x24x12"


def rtfmri(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "rtfmri", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("task") / "events.tsv"
    file.write_text("onset\tduration\ttrial_type\n20\t20\ttapping\n60\t20\ttapping\n")
    return file


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, events: Path) -> Path:
    """A simulated scanner writes DICOM files, another process takes them through a run."""
    folder = tmp_path_factory.mktemp("run")
    out = folder / "run.h5"
    rtfmri("simulate", SMALL, "--to", f"folder:{folder / 'dicom'}", "--speed", 1000)
    assert len(list((folder / "dicom").glob("*.dcm"))) == 40
    done = rtfmri("run", folder / "dicom", "--events", events, "--out", out)
    assert "40" in done.stdout
    assert "tapping" in done.stdout
    assert f"rtfmri report {out}" in done.stdout.replace("\n", "")
    return out


def test_a_run_from_dicom_is_recorded(recording: Path) -> None:
    with open_recording(recording) as run:
        assert run.closed
        assert run.n_volumes == 40
        assert run.conditions == ("baseline", "tapping")
        assert run.maps()["tapping"].t.max() > 8


def test_json_is_a_line_a_volume_and_a_summary(recording: Path, events: Path) -> None:
    lines = rtfmri("run", recording, "--events", events, "--json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["index"] for row in rows[:-1]] == list(range(40))
    assert rows[-1]["summary"]["volumes"] == 40
    with open_recording(recording) as run:
        peak = rows[-1]["summary"]["contrasts"]["tapping"]["peak_t"]
        assert peak <= float(run.maps()["tapping"].t.max())


def test_the_glm_is_summed_up(recording: Path, events: Path) -> None:
    shown = rtfmri("run", recording, "--events", events, "--contrast", "twice=2*tapping").stdout
    assert "General linear model" in shown
    assert "twice" in shown
    assert "voxels evident" in shown


def test_blobs_are_listed(recording: Path, tmp_path: Path) -> None:
    (tmp_path / "to_mni.txt").write_text("1 0 0 2\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    affine = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    labels = nibabel.Nifti1Image(np.ones((91, 109, 91), np.int16), affine)
    labels.to_filename(tmp_path / "atlas.nii")
    (tmp_path / "atlas.tsv").write_text("index\tname\n1\tthe [red]brain\n")
    arguments = (
        *("blobs", recording, "--threshold", "bonferroni", "--min-voxels", 2),
        *("--mni", tmp_path / "to_mni.txt", "--atlas", tmp_path / "atlas.nii"),
    )
    assert "[red]brain" in rtfmri(*arguments).stdout
    found = json.loads(rtfmri(*arguments, "--json", "--tsv", tmp_path / "b.tsv").stdout)
    assert found["contrast"] == "tapping"
    assert "Bonferroni" in found["threshold"]
    first = found["blobs"][0]
    assert first["Peak Stat"] > 6
    assert first["MNI X"] == pytest.approx(first["X"] + 2)
    assert (tmp_path / "b.tsv").read_text().startswith("Cluster ID\tX\tY\tZ\tPeak Stat")
    none = rtfmri("blobs", recording, "--threshold", "z", "--level", 19).stdout
    assert "no blobs" in none


def test_a_localiser_makes_a_region_for_the_next_run(
    recording: Path, events: Path, tmp_path: Path
) -> None:
    region = tmp_path / "hands.nii.gz"
    done = rtfmri("localize", recording, "--top", 20, "--out", region)
    assert done.stdout.startswith("20 voxels of tapping")
    assert np.count_nonzero(nibabel.load(region).dataobj) == 20
    shown = rtfmri("run", recording, "--events", events, "--roi", f"hands={region}", "--json")
    last = [json.loads(line) for line in shown.stdout.splitlines()][-2:]
    assert last[0]["roi"]["hands"]["t"]["tapping"] > 8
    value = last[1]["summary"]["glm"]["tapping"]["roi"]["hands"]
    assert value["interval"][0] < value["effect"] < value["interval"][1]
    refused = rtfmri("localize", recording, "--top", 20, "--out", region, expect=1)
    assert "exists already" in refused.stderr
    cluster = tmp_path / "cluster.nii.gz"
    rtfmri("localize", recording, "--inside", region, "--threshold", "fdr", "--out", cluster)
    inside, chosen = (np.asarray(nibabel.load(f).dataobj) > 0 for f in (region, cluster))
    assert chosen.any()
    assert not (chosen & ~inside).any()


def test_names_are_shown_as_they_are(recording: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.tsv"
    events.write_text("onset\tduration\ttrial_type\n20\t20\t[bold]tap[/red]\n")
    assert "[bold]tap[/red]" in rtfmri("run", recording, "--events", events).stdout


def test_a_live_folder_is_followed_while_a_scanner_writes(tmp_path: Path) -> None:
    source = f"folder:{tmp_path}?count=12&timeout_s=20"
    reader = subprocess.Popen(
        [sys.executable, "-m", "rtfmri", "-v", "run", source, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with reader:
        assert reader.stderr
        while "waiting for the first volume" not in (line := reader.stderr.readline()):
            assert line, "the run ended before it was ready"
        small = SMALL.replace("40", "12")
        rtfmri("simulate", small, "--to", f"folder:{tmp_path}", "--speed", 100)
        assert reader.stdout
        rows = [json.loads(line) for line in reader.stdout]
    assert reader.returncode == 0
    assert rows[-1]["summary"]["volumes"] == 12
    assert rows[-1]["summary"]["missing"] == 0


def test_two_runs_of_one_listener_are_two_recordings(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    source = "tcp://:0?count=6&timeout_s=20"
    command = [sys.executable, "-m", "rtfmri", "-v", "run", source, "--runs", "2", "--json"]
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stderr
        said = ""
        while "waiting for the first volume" not in said:
            line = reader.stderr.readline()
            assert line, "the run ended before it was ready"
            said += line
        port = int(re.search(r"listening on 127\.0\.0\.1:(\d+)", said.replace("\n", ""))[1])
        for seed in (1, 2):
            small = SMALL.replace("40", f"6&seed={seed}")
            rtfmri("simulate", small, "--to", f"tcp://127.0.0.1:{port}", "--speed", 50)
        reader.communicate(timeout=60)
    assert reader.returncode == 0
    found = []
    for number in (1, 2):
        with open_recording(tmp_path / f"run-{number}.h5") as recording:
            assert recording.n_volumes == 6
            found.append(recording.volume(0).data)
    assert not np.array_equal(*found)
    rtfmri("run", out.with_stem("run-1"), "--runs", "2", expect=1)


def test_series_lists_what_is_in_a_folder(recording: Path) -> None:
    folder = recording.parent / "dicom"
    table = rtfmri("series", folder).stdout
    assert "24x24x12" in table
    (one,) = json.loads(rtfmri("series", folder, "--json").stdout)
    assert (one["number"], one["n_files"], one["n_volumes"]) == (1, 40, 40)
    assert one["shape"] == [24, 24, 12]
    assert "no such" in rtfmri("series", folder / "none", expect=1).stderr.lower()


def test_ctrl_c_ends_a_run_and_closes_its_recording(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    command = [sys.executable, "-m", "rtfmri", "run", SMALL, "--speed", "20", "--json"]
    with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        assert json.loads(run.stdout.readline())["index"] == 0
        run.send_signal(signal.SIGINT)
        rows = [json.loads(line) for line in run.stdout]
    assert run.returncode == 0
    assert rows[-1]["summary"]["volumes"] < 40
    with open_recording(out) as recording:
        assert recording.closed
        assert recording.n_volumes == rows[-1]["summary"]["recorded"]


def test_report_export_and_recover(recording: Path, tmp_path: Path) -> None:
    rtfmri("report", recording, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "data:image/png;base64" in page
    rtfmri("export", recording, "--bids", tmp_path / "bids")
    assert list((tmp_path / "bids").rglob("*contrast-tapping_stat-t_statmap.nii.gz"))
    done = rtfmri("recover", recording, tmp_path / "mended.h5")
    assert done.stdout.startswith("40 volumes recovered")
    with open_recording(recording) as one, open_recording(tmp_path / "mended.h5") as other:
        assert np.array_equal(one.maps()["tapping"].t, other.maps()["tapping"].t)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere"], "nowhere"),
        (["run", SMALL, "--events", "none.tsv"], "cannot read the events in none.tsv"),
        (["run", SMALL, "--roi", "motor"], "--roi must be NAME=FILE, got 'motor'"),
        (["run", SMALL, "--tr", "-2"], "tr_s should be greater than 0, got -2"),
        (["run", SMALL, "--config", "none.toml"], "cannot read the settings in none.toml"),
        (["run", SMALL, "--out", "no/folder/run.h5"], "cannot write the recording"),
        (["run", "ftp://somewhere"], "source"),
        (["simulate", SMALL, "--to", "tape:1"], "folder:DIR"),
        (["report", "none.h5"], "none.h5"),
        (["run", SMALL, "--contrast", "tap"], "--contrast must be NAME=EXPRESSION, got 'tap'"),
        (["blobs", "none.h5"], "none.h5"),
        (["localize", "none.h5", "--out", "r.nii"], "none.h5"),
        (["bench", "--grid", "64x64"], "--grid must be like 64x64x36, got '64x64'"),
    ],
)
def test_an_error_is_one_sentence(arguments: list[str], words: str) -> None:
    done = rtfmri(*arguments, expect=1)
    assert words in " ".join(done.stderr.split())


def test_other_libraries_log_nothing_of_a_header(tmp_path: Path) -> None:
    """Bits Stored below Bits Allocated and a name that breaks its rule both make pydicom talk."""
    folder = tmp_path / "dicom"
    rtfmri("simulate", SMALL.replace("40", "3"), "--to", f"folder:{folder}", "--speed", 1000)
    for path in folder.iterdir():
        dataset = dcmread(path)
        dataset.BitsStored, dataset.HighBit = 12, 11
        with disable_value_validation():
            dataset.PatientName = "Planted^Name" + 64 * "x"
            dataset.save_as(path)
    done = rtfmri("-v", "run", folder, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["volumes"] == 3
    assert "Planted" not in done.stdout + done.stderr
    assert "ndarray" not in done.stderr


def test_cuda_without_a_gpu_says_what_is_missing() -> None:
    from rtfmri.backends import gpu_problem

    problem = gpu_problem()
    if problem is None:
        pytest.skip("this machine has a GPU")
    done = rtfmri("run", SMALL, "--device", "cuda", expect=1)
    assert problem in " ".join(done.stderr.split())


def test_importing_is_light() -> None:
    """What makes an import slow stays out of it; the time itself is a benchmark's matter."""
    code = "import sys, rtfmri; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"numba", "h5py", "nibabel", "pydicom", "nilearn", "matplotlib", "scipy", "pandas"}
    assert heavy.isdisjoint(loaded)


def test_every_public_name_is_there() -> None:
    import rtfmri

    assert all(getattr(rtfmri, name) is not None for name in rtfmri.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        rtfmri.nothing_like_it  # noqa: B018

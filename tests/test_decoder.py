"""Decoders: trained on recordings, scored honestly, and the same number online."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from typer.testing import CliRunner

import recordings
from dicom_files import real_data
from memory import MemoryReader, plain
from recordings import GRID, TR_S
from rtfmri.cli import app
from rtfmri.config import BaselineSettings, Config, FeedbackSettings, GlmSettings
from rtfmri.errors import ConfigError
from rtfmri.feedback.decoder import Decoder, Score, check, load_decoder
from rtfmri.feedback.train import train
from rtfmri.paradigm import Event
from rtfmri.recording import open_recording
from rtfmri.session import Session
from rtfmri.stages.readout import Readout
from rtfmri.volume import Grid, Volume

CLASSES = ("house", "face")
EVENTS = tuple(Event(20.0 + 40 * i, 20.0, CLASSES[(i + i // 4) % 2]) for i in range(8))
N = 175


def pattern(rng: np.random.Generator) -> np.ndarray:
    image = np.zeros(GRID.shape)
    image[4:10, 5:12, 3:8] = rng.choice([-1, 1], (6, 7, 5))
    return image


def run(seed: int, strength: float = 4.0) -> list[Volume]:
    """A head whose pattern is that of the block, with its sign, 5 s late."""
    rng = np.random.default_rng(seed)
    image, still = pattern(np.random.default_rng(0)), np.where(recordings.head(), 1000.0, 20.0)
    made = []
    for index in range(N):
        data = still + rng.normal(0, 5, GRID.shape)
        moment_s = (index + 0.5) * TR_S - 5
        for event in EVENTS:
            if event.onset_s <= moment_s < event.onset_s + event.duration_s:
                data += strength * image * (1 if event.trial_type == "face" else -1)
        made.append(Volume(np.asfortranarray(data, np.int16), GRID, index, TR_S))
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / f"run-{i}.h5" for i in range(3)]
    region = {"middle": np.float32(pattern(np.random.default_rng(0)) != 0)}
    for i, path in enumerate(paths):
        recordings.record(path, run(i), events=EVENTS, rois=region, glm=GlmSettings(noise="off"))
    return paths


@pytest.fixture(scope="module")
def decoder(runs: list[Path]) -> Decoder:
    return train(runs[:2], CLASSES)


def maps_and_labels(path: Path, of: str) -> tuple[np.ndarray, np.ndarray]:
    """The pipeline's own maps after each volume of the two classes, and their class."""
    maps, labels = [], []
    with open_recording(path) as recording:
        pipeline = recording.pipeline()
        for volume in recording.volumes():
            result = pipeline.push(volume)
            if result.baseline_ready and set(result.conditions) & set(CLASSES):
                maps.append(pipeline.subtraction()[of].reshape(-1, order="F"))
                labels.append("face" in result.conditions)
    return np.float64(maps), np.array(labels)


def test_a_planted_pattern_is_found_and_told_from_what_was_left_out(decoder: Decoder) -> None:
    score = decoder.score
    assert score.left_out == "run"
    assert len(score.folds) == 2
    assert score.accuracy > 0.9
    assert score.n_blocks == 16
    assert score.blocks_right == 16
    assert score.p == pytest.approx(0.5**16)
    planted = pattern(np.random.default_rng(0))
    assert np.corrcoef(decoder.weights.ravel(), planted.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("of", ["z", "psc"])
def test_the_value_is_scikit_learns_decision_function(runs: list[Path], of: Any) -> None:
    decoder = train(runs[:2], CLASSES, of=of)
    parts = [maps_and_labels(path, of) for path in runs[:2]]
    maps = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    theirs = make_pipeline(
        StandardScaler(),
        LinearSVC(C=1.0, class_weight="balanced", dual=True, max_iter=10_000, random_state=0),
    ).fit(maps, labels)
    held_out, _ = maps_and_labels(runs[2], of)
    weights = np.float64(decoder.weights.reshape(-1, order="F"))
    ours = held_out @ weights + decoder.intercept
    # Weights are rounded to float32.
    error = 2.0**-24 * np.abs(held_out * weights).sum(axis=1).max()
    np.testing.assert_allclose(ours, theirs.decision_function(held_out), rtol=0, atol=2 * error)
    # And so it is where it is computed on the way.
    with open_recording(runs[2]) as recording:
        pipeline = recording.pipeline(readouts={"d": Readout(decoder.weights, of)})
        online = [
            result.readouts["d"][0] + decoder.intercept
            for volume in recording.volumes()
            if (result := pipeline.push(volume)).baseline_ready
            and set(result.conditions) & set(CLASSES)
        ]
    np.testing.assert_allclose(online, ours, rtol=0, atol=1e-9 * np.abs(ours).max() + error)


def test_a_single_run_leaves_blocks_out_and_a_region_is_enough(runs: list[Path]) -> None:
    decoder = train(runs[:1], CLASSES, within="middle", model="logistic")
    assert decoder.score.left_out == "block"
    assert len(decoder.score.folds) == 4
    assert decoder.score.accuracy > 0.9
    assert decoder.score.p is None
    inside = pattern(np.random.default_rng(0)) != 0
    assert not decoder.weights[~inside].any()


def test_noise_is_not_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.h5" for i in range(2)]
    for i, path in enumerate(paths):
        recordings.record(path, run(10 + i, 0.0), events=EVENTS, glm=GlmSettings(noise="off"))
    score = train(paths, CLASSES).score
    assert 0.25 < score.accuracy < 0.75
    assert score.p is not None
    assert score.p > 0.01


def test_a_session_gives_its_value_and_warns_of_other_settings(
    decoder: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "faces.h5"
    decoder.save(file)
    config: Config = plain(
        feedback=FeedbackSettings(signals={"faces": {"kind": "decoder", "file": file}}),
        glm=GlmSettings(noise="off"),
        baseline=BaselineSettings(kind="sliding"),
    )
    with Session(MemoryReader(run(2)), events=EVENTS, config=config) as session:
        results = list(session)
    assert "trained with other settings of baseline" in caplog.text
    values = {name: [] for name in CLASSES}
    for result in results:
        assert result.feedback
        for name in set(result.conditions) & set(CLASSES):
            values[name].append(result.feedback.signals["faces"])
    assert np.mean(np.array(values["face"]) > 0) > 0.9
    assert np.mean(np.array(values["house"]) < 0) > 0.9


def test_it_comes_back_from_its_file(decoder: Decoder, tmp_path: Path) -> None:
    decoder.save(tmp_path / "d.h5")
    back = load_decoder(tmp_path / "d.h5")
    np.testing.assert_array_equal(back.weights, decoder.weights)
    assert back.weights.flags.f_contiguous
    for name in ("intercept", "of", "classes", "score", "settings"):
        assert getattr(back, name) == getattr(decoder, name)
    assert back.grid.matches(decoder.grid)
    with pytest.raises(ConfigError, match="exists already"):
        decoder.save(tmp_path / "d.h5")


def test_damaged_files_are_refused(decoder: Decoder, tmp_path: Path, runs: list[Path]) -> None:
    good, bad = tmp_path / "d.h5", tmp_path / "bad.h5"
    decoder.save(good)
    with pytest.raises(ConfigError, match="no such decoder"):
        load_decoder(tmp_path / "none.h5")
    with pytest.raises(ConfigError, match="no decoder: its format"):
        load_decoder(runs[0])
    for content in (b"", b"pickle", good.read_bytes()[:700]):
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot read the decoder"):
            load_decoder(bad)
    bad.write_bytes(good.read_bytes())
    with h5py.File(bad, "a") as file:
        told = json.loads(file.attrs["decoder"])
        file.attrs["decoder"] = np.bytes_(json.dumps({**told, "of": "t"}))
    with pytest.raises(ConfigError, match="damaged"):
        load_decoder(bad)
    with h5py.File(bad, "a") as file:
        file.attrs["decoder"] = np.bytes_(json.dumps({**told, "intercept": math.nan}))
    with pytest.raises(ConfigError, match="damaged"):
        load_decoder(bad)
    with h5py.File(bad, "a") as file:
        del file["weights"]
        file.create_dataset("weights", (4096, 4096, 4096), np.float32, chunks=True)
    with pytest.raises(ConfigError, match="has more than 16777216 voxels"):
        load_decoder(bad)


def test_another_grid_is_refused(decoder: Decoder) -> None:
    other = Grid((16, 18, 11), GRID.affine)
    with pytest.raises(ConfigError, match=r"of another shape or position.*16x18x12.*16x18x11"):
        check(decoder, other, Config())
    assert check(decoder, GRID, plain(glm=GlmSettings(noise="off"))) == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": ("house", "cat")}, "has no condition 'cat'; it has baseline, face, house"),
        ({"classes": ("face", "face")}, "must differ"),
        ({"within": "left"}, "no region 'left'; its regions are middle"),
    ],
)
def test_what_cannot_be_trained_is_said(
    runs: list[Path], changes: dict[str, Any], says: str
) -> None:
    given = {"classes": CLASSES, **changes}
    with pytest.raises(ConfigError, match=says):
        train(runs[:1], **given)


def test_a_recording_given_twice_is_refused(runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match="must be given once"):
        train([runs[0], runs[0]], CLASSES)


def test_too_few_blocks_and_other_grids_are_said(runs: list[Path], tmp_path: Path) -> None:
    short, other = tmp_path / "short.h5", tmp_path / "other.h5"
    recordings.record(short, run(0)[:60], events=EVENTS, glm=GlmSettings(noise="off"))
    with pytest.raises(ConfigError, match="at least 2 blocks of each condition"):
        train([short], CLASSES)
    affine = GRID.affine.copy()
    affine[0, 3] += 5
    grid = Grid(GRID.shape, affine)
    moved = [replace(volume, grid=grid) for volume in run(0)[:40]]
    recordings.record(other, moved, events=EVENTS, glm=GlmSettings(noise="off"))
    with pytest.raises(ConfigError, match="must be on one grid"):
        train([runs[0], other], CLASSES)


def test_command_line(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "faces.h5"
    command = ["train", *map(str, runs[:2]), "--positive", "face", "--negative", "house"]
    done = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "face against house" in done.output
    assert "16 of 16" in done.output
    assert 'kind = "decoder"' in done.output
    assert isinstance(load_decoder(out).score, Score)
    done = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert "exists already" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "b.h5"), "--json"])
    told = json.loads(done.output.splitlines()[-1])
    assert told["classes"] == list(CLASSES)
    assert told["blocks_right"] == 16


@pytest.fixture(scope="module")
def haxby(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The 12 runs of one slice of Haxby's experiment, each a recording."""
    import nibabel

    folder = real_data("nifti_haxby")
    image = nibabel.load(folder / "bold.nii.gz")
    rows = [line.split() for line in (folder / "attributes_literal.txt").read_text().splitlines()]
    labels = [row[0] for row in rows if len(row) == 2 and row[1].isdigit()]
    chunks = np.array([int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()])
    data, grid = np.asarray(image.dataobj), Grid(image.shape[:3], image.affine)
    out, paths = tmp_path_factory.mktemp("haxby"), []
    for chunk in np.unique(chunks):
        where = np.flatnonzero(chunks == chunk)
        volumes = [
            Volume(np.asfortranarray(data[..., at], np.int16), grid, i, 2.5)
            for i, at in enumerate(where)
        ]
        events = blocks([labels[at] for at in where])
        paths.append(out / f"run-{chunk:02}.h5")
        record_at(paths[-1], volumes, events, 2.5)
    return paths


def blocks(labels: list[str]) -> list[Event]:
    """Events of 2.5 s volumes' labels; rest is none."""
    events: list[Event] = []
    for i, label in enumerate(labels):
        if label == "rest":
            continue
        if i and labels[i - 1] == label:
            events[-1] = replace(events[-1], duration_s=events[-1].duration_s + 2.5)
        else:
            events.append(Event(2.5 * i, 2.5, label))
    return events


def record_at(path: Path, volumes: list[Volume], events: list[Event], tr_s: float) -> None:
    config = plain(glm=GlmSettings(noise="off"))
    with Session(MemoryReader(volumes), events=events, config=config, out=path) as session:
        for _ in session:
            pass
    assert session.n_recorded == len(volumes)
    assert volumes[0].tr_s == tr_s


def test_haxbys_faces_and_houses_are_told_apart_in_runs_left_out(haxby: list[Path]) -> None:
    decoder = train(haxby[:10], CLASSES)
    score = decoder.score
    assert score.left_out == "run"
    assert score.n_blocks == 20
    assert score.accuracy > 0.75
    assert score.p < 0.001
    right = []
    for path in haxby[10:]:
        with open_recording(path) as recording:
            pipeline = recording.pipeline(readouts={"d": Readout(decoder.weights, decoder.of)})
            for volume in recording.volumes():
                result = pipeline.push(volume)
                for name in set(result.conditions) & set(CLASSES):
                    value = result.readouts["d"][0] + decoder.intercept
                    right.append((value > 0) == (name == "face"))
    print(f"held out: {np.mean(right):.3f} of {len(right)}")
    assert len(right) > 20
    assert np.mean(right) > 0.7

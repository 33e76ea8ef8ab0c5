"""Control groups: what each arm shows, and that nobody is told which it is."""

import logging
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from memory import ACTIVE, EVENTS, GRID, MemoryReader, plain, volumes
from rtfmri.cli import app
from rtfmri.config import FeedbackSettings, ShamSettings
from rtfmri.errors import ConfigError
from rtfmri.feedback.sham import open_sham, unblind
from rtfmri.recording import FORMAT, open_recording
from rtfmri.session import Session

ROI = np.zeros(GRID.shape, np.float32)
ROI[ACTIVE] = 1
KINDS = ("contingent", "inverted", "noise", "yoked")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another participant's run."""
    path = tmp_path_factory.mktemp("other") / "other.h5"
    record(path, FeedbackSettings(), seed=5)
    return path


def record(path: Path, feedback: FeedbackSettings, seed: int = 0) -> list[float]:
    with Session(
        MemoryReader(volumes(40, seed=seed)),
        events=EVENTS,
        rois={"m": ROI},
        config=plain(feedback=feedback),
        out=path,
    ) as session:
        return [r.feedback.shown for r in session if r.feedback]


def allocation(folder: Path, other: Path) -> Path:
    path = folder / "arms.toml"
    (folder / "no-run.h5").write_bytes(other.read_bytes()[:4000] if other.exists() else b"")
    path.write_text(
        'salt = "some words"\nA = "contingent"\nB = "inverted"\nC = "noise"\n'
        f'D = "yoked:{other}"\nE = "yoked:/nowhere.h5"\nF = "placebo"\n'
        'G = "yoked:no-run.h5"\nH = "yoked:a\\u0000b"\nI = "yoked:hollow.h5"\n'
        'J = "yoked:dark.h5"\n'
    )
    return path


def arm(path: Path, name: str) -> ShamSettings:
    return ShamSettings(allocation=path, arm=name)


def test_each_arm_shows_what_it_is_to_show(tmp_path: Path, other: Path) -> None:
    arms = allocation(tmp_path, other)
    genuine = record(tmp_path / "g.h5", FeedbackSettings())
    got = {
        name: record(tmp_path / f"{name}.h5", FeedbackSettings(sham=arm(arms, name)))
        for name in "ABCD"
    }
    np.testing.assert_equal(got["A"], genuine)
    np.testing.assert_equal(got["B"], 1 - np.array(genuine))
    with open_recording(other) as recording:
        np.testing.assert_equal(got["D"], recording.shown)
    noise = np.array(got["C"])
    np.testing.assert_array_equal(np.isnan(noise), np.isnan(genuine))
    assert not np.isclose(noise, genuine)[5:].all()
    with open_recording(tmp_path / "C.h5") as recording:
        np.testing.assert_array_equal(recording.shown, noise)
        assert recording.signal_names == ("m",)  # the genuine signal is beside it
        assert recording.signals[-1, 0] != noise[-1]


def test_noise_has_the_mean_the_variance_and_the_memory_of_the_genuine(tmp_path: Path) -> None:
    path = allocation(tmp_path, Path("x"))
    rng = np.random.default_rng(1)
    genuine, level = [], 0.0
    for _ in range(4000):
        level = 0.7 * level + rng.normal(0, 0.06)
        genuine.append(0.5 + level)
    sham = open_sham(arm(path, "C"))
    noise = np.array([sham.push(value, i) for i, value in enumerate(genuine)])[500:]
    assert noise.mean() == pytest.approx(np.mean(genuine), abs=0.02)
    assert noise.std() == pytest.approx(np.std(genuine), rel=0.1)
    assert np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(0.7, abs=0.05)
    assert abs(np.corrcoef(noise, genuine[500:])[0, 1]) < 0.1
    blocks = np.where(np.arange(4000) % 20 < 8, genuine, math.nan)
    after_gaps = open_sham(arm(path, "C"))
    in_blocks = np.array([after_gaps.push(value, i) for i, value in enumerate(blocks)])
    pairs = np.stack([in_blocks[501:], in_blocks[500:-1]])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    assert np.corrcoef(pairs)[0, 1] == pytest.approx(0.7, abs=0.08)
    again = open_sham(arm(path, "C"))
    for _ in range(2):  # a run that begins anew, and a replay, get the same
        again.begin()
        np.testing.assert_array_equal(
            [again.push(v, i) for i, v in enumerate(genuine)][500:], noise
        )


def test_no_value_stays_none_and_volumes_the_other_did_not_have_are_none(
    tmp_path: Path, other: Path
) -> None:
    path = allocation(tmp_path, other)
    for name in "ABC":
        assert math.isnan(open_sham(arm(path, name)).push(math.nan, 3))
    assert math.isnan(open_sham(arm(path, "D")).push(0.5, 4000))


def test_nothing_tells_the_kind_until_it_is_unblinded(
    tmp_path: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = allocation(tmp_path, other)
    caplog.set_level(logging.DEBUG)
    for name, kind in zip("ABCD", KINDS, strict=True):
        out = tmp_path / f"{name}.h5"
        record(out, FeedbackSettings(sham=arm(path, name)))
        content = out.read_bytes()
        for word in ("contingent", "inverted", "yoked", str(other)):
            assert word not in caplog.text
            assert word.encode() not in content
        with open_recording(out) as recording:
            seal = recording.sham_seal
            assert len(seal) == 64
        assert unblind(seal, name, path).startswith(kind)
        done = CliRunner().invoke(app, ["unblind", str(out), "--allocation", str(path)])
        assert done.output.startswith(f"arm {name}: {kind}")
    changed = tmp_path / "changed.toml"
    changed.write_text(path.read_text().replace('B = "inverted"', 'B = "noise"'))
    with open_recording(tmp_path / "B.h5") as recording:
        seal = recording.sham_seal
    with pytest.raises(ConfigError, match="not what it was during the run"):
        unblind(seal, "B", changed)


def test_errors_have_the_same_words_for_every_kind(tmp_path: Path, other: Path) -> None:
    path = allocation(tmp_path, other)
    with h5py.File(tmp_path / "hollow.h5", "w", libver="latest") as hollow:
        hollow.attrs["format"] = np.bytes_(FORMAT)
    (tmp_path / "dark.h5").write_bytes(other.read_bytes())
    with h5py.File(tmp_path / "dark.h5", "r+") as dark:
        dark["shown"][...] = math.nan
    messages = set()
    for name in "EFGHIJ":
        with pytest.raises(ConfigError) as caught:
            record(tmp_path / "never.h5", FeedbackSettings(sham=arm(path, name)))
        messages.add(str(caught.value).replace(repr(name), ""))
        assert "nowhere" not in str(caught.value)
    assert len(messages) == 1
    with pytest.raises(ConfigError, match=r"must be one of A, B, C, D, E, F, G, H, I, J; got 'Z'"):
        open_sham(arm(path, "Z"))


def test_a_yoked_path_begins_at_the_allocations_folder(tmp_path: Path, other: Path) -> None:
    arms = tmp_path / "arms.toml"
    (tmp_path / "other.h5").write_bytes(other.read_bytes())
    arms.write_text('salt = "some words"\nA = "yoked:other.h5"\n')
    with open_recording(other) as recording:
        shown = recording.shown
    sham = open_sham(arm(arms, "A"))
    np.testing.assert_array_equal([sham.push(0.5, i) for i in range(len(shown))], shown)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read the allocation"),
        ("A = ", "is no TOML"),
        ('A = "noise"', "must have a salt"),
        ('salt = ""\nA = "noise"', "must have a salt"),
        ('salt = "x"', "must have arms"),
        ('salt = "x"\nA = 3', "must have arms"),
    ],
)
def test_allocations_that_cannot_be(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "arms.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        open_sham(arm(path, "A"))
    assert "noise" not in str(caught.value)


def test_a_run_without_sham_has_nothing_to_unblind(tmp_path: Path, other: Path) -> None:
    with open_recording(other) as recording:
        assert recording.sham_seal == ""
    done: Any = CliRunner().invoke(
        app, ["unblind", str(other), "--allocation", str(allocation(tmp_path, other))]
    )
    assert "without a sham" in str(done.exception)

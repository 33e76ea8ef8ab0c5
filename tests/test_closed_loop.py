"""The loop closes: who sees the own feedback learns, who sees another's does not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rtfmri.cli import app
from rtfmri.closed_loop import (
    EFFICACIES,
    Arm,
    Learner,
    Learning,
    compare_arms,
    draw_learning,
    simulate_training,
)
from rtfmri.errors import ConfigError
from rtfmri.recording import open_recording

N_BLOCKS = 18


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training") / "out"


@pytest.fixture(scope="module")
def arms(folder: Path) -> dict[Arm, list[Learning]]:
    return compare_arms(folder, n_participants=4, n_blocks=N_BLOCKS)


def test_own_feedback_teaches_and_anothers_does_not(arms: dict[Arm, list[Learning]]) -> None:
    own, others = (np.array([one.activity for one in arms[arm]]) for arm in arms)
    assert own.shape == others.shape == (4, N_BLOCKS)
    gains = {arm: np.mean([one.gain for one in group]) for arm, group in arms.items()}
    assert gains["contingent"] > 0.2
    assert gains["contingent"] > gains["yoked"] + 0.2
    assert own[:, -6:].mean() > others[:, -6:].mean() + 0.3
    # Tries at random have the mean of all.
    assert others.mean() == pytest.approx(np.mean(EFFICACIES), abs=0.2)


def test_what_is_measured_is_what_the_brain_did(arms: dict[Arm, list[Learning]]) -> None:
    for group in arms.values():
        true = np.ravel([one.activity for one in group])
        measured = np.ravel([one.psc for one in group])
        assert np.corrcoef(true, measured)[0, 1] > 0.5


def test_the_yoked_were_shown_what_the_others_saw(
    arms: dict[Arm, list[Learning]], folder: Path
) -> None:
    assert len(arms["yoked"]) == 4
    for number in range(1, 5):
        with (
            open_recording(folder / f"contingent-{number}.h5") as own,
            open_recording(folder / f"yoked-{number}.h5") as yoked,
        ):
            np.testing.assert_array_equal(own.shown, yoked.shown)
            assert not np.array_equal(own.signals, yoked.signals)
            assert np.isfinite(own.shown).sum() > 4 * N_BLOCKS


def test_it_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, again = (simulate_training(tmp_path / f"{name}.h5", seed=3, n_blocks=4) for name in "ab")
    assert one == again
    with pytest.raises(ConfigError, match="n_blocks must be 3 or more, got 2"):
        simulate_training(tmp_path / "c.h5", seed=3, n_blocks=2)


def test_a_learner_keeps_to_what_works() -> None:
    learner, chosen = Learner(0), []
    for _ in range(100):
        chosen.append(learner.choose())
        learner.see(chosen[-1])
        learner.see(None)
    assert np.mean(chosen[-20:]) > 0.8
    assert set(chosen) <= set(EFFICACIES)


def test_picture_and_numbers(arms: dict[Arm, list[Learning]], folder: Path) -> None:
    told = json.loads((folder / "learning.json").read_text())
    assert told["yoked"][0]["activity"] == list(arms["yoked"][0].activity)
    assert (folder / "learning.png").stat().st_size > 10_000
    axes = draw_learning(arms).axes[0]
    gain = 100 * np.mean([one.gain for one in arms["contingent"]])
    assert f"own feedback {gain:+.0f}" in axes.get_title(loc="left")
    for line, arm in zip(axes.lines, arms, strict=True):
        mean = 100 * np.mean([one.activity for one in arms[arm]], axis=0)
        np.testing.assert_allclose(line.get_ydata(), mean)


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "loop"
    command = ["demo", "--feedback", "--out", str(out), "--participants", "2", "--json"]
    done: Any = CliRunner().invoke(app, [*command, "--blocks", "3"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    assert len(told["gain"]["contingent"]) == 2
    assert (out / "learning.png").exists()
    done = CliRunner().invoke(app, [*command, "--blocks", "3"])
    assert "must be a new folder" in str(done.exception)

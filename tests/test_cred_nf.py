"""The CRED-nf checklist: what recordings know is told as it is, nothing else is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from memory import ACTIVE, EVENTS, GRID, MemoryReader, plain, volumes
from rtfmri.cli import app
from rtfmri.config import BaselineSettings, FeedbackSettings, SmoothingSettings
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Event
from rtfmri.recording import open_recording
from rtfmri.report import write_report
from rtfmri.report.cred_nf import OPEN, cred_nf
from rtfmri.session import Session

ROI = np.zeros(GRID.shape, np.float32)
ROI[ACTIVE] = 1
KNOWN = {"3d", "3e", "4a", "4b", "4d", "4e", "5a", "5b", "7a"}


def record(
    path: Path, rois: dict[str, Any], events: Sequence[Event] = EVENTS, **settings: Any
) -> Path:
    config = plain(**settings)
    with Session(
        MemoryReader(volumes(50)), events=events, rois=rois, config=config, out=path
    ) as session:
        assert len(list(session)) == 50
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    feedback = FeedbackSettings(
        signals={
            "motor": {"kind": "activity", "roi": "left", "measure": "z"},
            "side": {"kind": "differential", "plus": "left", "minus": "right"},
        },
        show="side",
        during=("tap",),
        scale={"kind": "running", "sd": 1.5},
    )
    other = np.roll(ROI, 3, axis=0)
    return record(
        tmp_path_factory.mktemp("nf") / "run.h5",
        {"left": ROI, "right": other},
        feedback=feedback,
        smoothing=SmoothingSettings(fwhm_mm=4),
        baseline=BaselineSettings(kind="sliding", window_volumes=12),
    )


def told(paths: Sequence[Path]) -> dict[str, str]:
    return {item.number: "\n".join(item.told) for item in cred_nf(paths)}


def test_what_the_recording_knows_is_told_as_it_is(run: Path) -> None:
    texts = told([run])
    assert {number for number, text in texts.items() if text} == KNOWN
    assert "motor: z of region left (mean)" in texts["4a"]
    assert "side: psc of region left less that of right" in texts["4a"]
    assert "sliding baseline of condition 'baseline' (12 volumes)" in texts["4a"]
    assert "smoothing 4 mm FWHM" in texts["3d"]
    assert "no motion correction" in texts["3d"]
    assert "mean of 60 volumes, 1.5 standard deviations each way" in texts["4b"]
    assert "in conditions tap; TR 2 s" in texts["4b"]
    with open_recording(run) as recording:
        rows, members = recording.results, recording.members()
        side, shown, version = recording.signals[:, 1], recording.shown, recording.version
    p50, p99 = np.percentile(rows["latency_ms"], [50, 99])
    assert f"{p50:.1f} ms (median), {p99:.1f} ms (99th percentile)" in texts["4b"]
    assert f"at {np.isfinite(shown).sum()} of 50 volumes" in texts["4d"]
    assert f"rtfmri {version}, computed on the CPU" in texts["4e"]
    tap = side[members[:, 1]]
    assert f"tap {tap.mean():.3g} (sd {tap.std(ddof=1):.3g}, {tap.size} volumes)" in texts["5a"]
    blocks = np.split(
        np.flatnonzero(members[:, 1]),
        1 + np.flatnonzero(np.diff(np.flatnonzero(members[:, 1])) > 1),
    )
    means = ", ".join(f"{side[block].mean():.3g}" for block in blocks)
    assert len(blocks) == 2
    assert f"side, by block: tap {means}" in texts["5b"]
    assert f"tap: {members[:, 1].sum()} volumes" in texts["3e"]


def test_several_runs_tell_what_is_the_same_once(run: Path, tmp_path: Path) -> None:
    other = record(tmp_path / "other.h5", {"left": ROI})
    items = {item.number: item.told for item in cred_nf([run, run, other])}
    assert len(items["7a"]) == 1
    assert len(items["4a"]) == 2
    assert items["5a"][0].startswith("run.h5: side: ")
    assert items["5a"][-1].startswith("other.h5: left: ")
    assert "left: psc of region left (mean); cumulative baseline" in items["4a"][1]


def test_a_sham_tells_its_arm_and_seal_alone(tmp_path: Path) -> None:
    allocation = tmp_path / "arms.toml"
    allocation.write_text('salt = "words"\nB = "inverted"\n')
    sham = {"allocation": allocation, "arm": "B"}
    path = record(tmp_path / "s.h5", {"left": ROI}, feedback=FeedbackSettings(sham=sham))
    with open_recording(path) as recording:
        assert recording.sham_seal in told([path])["2b"]
    assert "arm 'B'" in told([path])["2b"]
    assert "inverted" not in str(cred_nf([path]))
    assert "what the arm makes of signal left" in told([path])["4d"]
    page = write_report(path, tmp_path / "report").read_text()
    assert "<th>shown</th>" not in page  # beside the signal it would tell
    assert "inverted" not in page


def test_files_and_command_line(run: Path, tmp_path: Path) -> None:
    done: Any = CliRunner().invoke(app, ["cred-nf", str(run), "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.output)["filled"]) == KNOWN
    items = json.loads((tmp_path / "cred-nf.json").read_text())
    text = (tmp_path / "cred-nf.md").read_text()
    for item in items:
        assert f"**{item['number']}** {item['topic']}" in text
        for line in item["told"]:
            assert f"- {line}" in text
    assert text.count(OPEN) == len(items) - len(KNOWN)
    done = CliRunner().invoke(app, ["cred-nf", str(run), "--out", str(tmp_path)])
    assert "to be filled in by the" in done.output


def test_a_run_without_feedback_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "r.h5", {})
    with pytest.raises(ConfigError, match="has no feedback"):
        cred_nf([path])


def test_the_report_shows_signals_and_what_was_shown(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report").read_text()
    assert "<h2>Feedback</h2>" in page
    assert (tmp_path / "report" / "feedback.png").stat().st_size > 10_000
    assert "<th>shown</th>" in page
    with open_recording(run) as recording:
        tap = recording.signals[recording.members()[:, 1], 1]
    assert f"<td>{tap.mean():+.2f} ({tap.std(ddof=1):.2f})</td>" in page
    silent = record(tmp_path / "silent.h5", {})
    assert "<h2>Feedback</h2>" not in write_report(silent, tmp_path / "other").read_text()

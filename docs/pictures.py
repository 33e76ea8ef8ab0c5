"""Make the pictures in README.md: the demo, a run that moves, a training, the benchmarks."""

import importlib
import shutil
import tempfile
from pathlib import Path

from rtfmri.cli import load_benchmarks
from rtfmri.closed_loop import compare_arms
from rtfmri.config import Config
from rtfmri.demo import run_demo
from rtfmri.report import write_report
from rtfmri.session import Session

MOVING = "simulator:finger-tapping?volumes=150&motion=1&spikes=1"
DOCS = Path(__file__).resolve().parent


def draw_benchmarks() -> None:
    """Draw the newest result in benchmarks/results, as far as README.md shows it."""
    name = load_benchmarks().__name__
    tables = importlib.import_module(f"{name}.tables")
    reports = tables.newest_reports(tables.FOLDER / "results")
    complete = (report for report in reports if "peers" in report["tables"])
    newest = max(complete, key=lambda report: report["date"])
    with tempfile.TemporaryDirectory() as folder:
        for said in importlib.import_module(f"{name}.figures").draw(newest, Path(folder)):
            print(said)
        shutil.copy(Path(folder) / "peers.png", DOCS / "peers.png")
        shutil.copy(Path(folder) / "roofline.png", DOCS / "roofline.png")


def draw_training() -> None:
    """Train simulated participants by their own feedback, and by another's."""
    with tempfile.TemporaryDirectory() as folder:
        compare_arms(Path(folder) / "training", n_participants=12, say=print)
        shutil.copy(Path(folder) / "training" / "learning.png", DOCS / "learning.png")


def main() -> None:
    """Write the pictures beside this file."""
    draw_benchmarks()
    draw_training()
    with tempfile.TemporaryDirectory() as folder:
        report = run_demo(Path(folder) / "demo", device="cpu", say=print).out / "report"
        shutil.copy(report / "blobs-tapping.png", DOCS / "demo.png")
        shutil.copy(report / "time-courses.png", DOCS / "time-courses.png")
        shutil.copy(report / "design.png", DOCS / "design.png")
        moving = Path(folder) / "moving.h5"
        print("a run with motion and spikes")
        with Session(MOVING, config=Config(device="cpu"), out=moving) as session:
            for _ in session:
                pass
        page = write_report(moving, Path(folder) / "report")
        shutil.copy(page.parent / "quality.png", DOCS / "quality.png")


if __name__ == "__main__":
    main()

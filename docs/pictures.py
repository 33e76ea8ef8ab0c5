"""Make the pictures in README.md: run the demo, and a run that moves, and keep what they show."""

import shutil
import tempfile
from pathlib import Path

from rtfmri.config import Config
from rtfmri.demo import run_demo
from rtfmri.report import write_report
from rtfmri.session import Session

MOVING = "simulator:finger-tapping?volumes=150&motion=1&spikes=1"
DOCS = Path(__file__).resolve().parent


def main() -> None:
    """Write the pictures beside this file."""
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

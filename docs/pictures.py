"""Make the pictures in README.md: run the demo and keep what its report shows."""

import shutil
import tempfile
from pathlib import Path

from rtfmri.demo import run_demo

DOCS = Path(__file__).resolve().parent


def main() -> None:
    """Write ``demo.png`` and ``time-courses.png`` beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_demo(Path(folder) / "demo", device="cpu", say=print).out / "report"
        shutil.copy(report / "blobs-tapping.png", DOCS / "demo.png")
        shutil.copy(report / "time-courses.png", DOCS / "time-courses.png")


if __name__ == "__main__":
    main()

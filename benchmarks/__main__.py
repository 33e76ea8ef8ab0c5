"""``python -m benchmarks``: run the suites with nothing but NumPy, numba, pydantic (and CuPy)."""

import argparse
import json
import sys
from pathlib import Path

from . import LAYOUTS, SUITES, run
from .tables import file_name, markdown, write_readme


def main() -> None:
    """Run the suites named on the command line and write the report as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What rtfmri costs on this machine"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--suites", nargs="+", choices=tuple(SUITES), default=tuple(SUITES))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="folder for the JSON; its name says the rest")
    parser.add_argument(
        "--readme", action="store_true", help="measure nothing, write results/ into README.md"
    )
    options = parser.parse_args()
    if options.readme:
        write_readme(LAYOUTS)
        return

    def progress(step: str) -> None:
        print(step, file=sys.stderr, flush=True)

    report = run(
        device=options.device, suites=options.suites, minutes=options.minutes, progress=progress
    )
    print(markdown(report, LAYOUTS))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1) + "\n"
        (options.out / file_name(report)).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

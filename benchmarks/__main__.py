"""``python -m benchmarks``: run the suites with nothing but NumPy, numba, pydantic (and CuPy)."""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rtfmri.errors import ConfigError, RtfmriError

from . import GRIDS, LAYOUTS, SUITES, run
from .compare import compare, conclusion, lines, read_report, write_report
from .tables import file_name, markdown, write_readme


def main() -> None:
    """Do what the command line asks; errors of use end with a sentence, not a traceback."""
    options = _parser().parse_args()
    do: Callable[[argparse.Namespace], int] = options.do
    try:
        sys.exit(do(options))
    except RtfmriError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What rtfmri costs on this machine"
    )
    parser.set_defaults(do=_measure)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--suites", nargs="+", choices=tuple(SUITES), default=tuple(SUITES))
    parser.add_argument("--grids", nargs="+", type=_grid, default=GRIDS, metavar="64x64x36")
    parser.add_argument("--rounds", type=_positive(int), default=8, help="of turns")
    parser.add_argument(
        "--minutes", type=_positive(float), default=1.0, help="as rtfmri bench has"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON; its name says the rest")
    parser.add_argument(
        "--readme", action="store_true", help="measure nothing, write results/ into README.md"
    )
    commands = parser.add_subparsers(title="without measuring")
    command = commands.add_parser("compare", help="what became slower; exit status 1 if any did")
    command.set_defaults(do=_compare)
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command = commands.add_parser("figures", help="draw a report (needs matplotlib)")
    command.set_defaults(do=_draw)
    command.add_argument("report", type=Path)
    command.add_argument("--out", dest="folder", type=Path, required=True)
    return parser


def _grid(text: str) -> tuple[int, int, int]:
    try:
        x, y, z = (int(n) for n in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 64x64x36, got {text!r}") from None
    if min(x, y, z) < 1:
        raise argparse.ArgumentTypeError(f"must have positive sides, got {text!r}")
    return x, y, z


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def positive(text: str) -> float:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return number

    return positive


def _measure(options: argparse.Namespace) -> int:
    if options.readme:
        write_readme(LAYOUTS)
        return 0
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)

    def save(report: dict[str, Any]) -> None:
        if options.out:
            write_report(report, options.out / file_name(report))

    report = run(
        device=options.device,
        grids=options.grids,
        suites=options.suites,
        rounds=options.rounds,
        minutes=options.minutes,
        progress=lambda step: print(step, file=sys.stderr, flush=True),
        finished=save,
    )
    print(markdown(report, LAYOUTS))
    return 0


def _compare(options: argparse.Namespace) -> int:
    found = compare(read_report(options.old), read_report(options.new))
    for cells in lines(found) if found.changes else ():
        print(" | ".join(cells))
    print(conclusion(found))
    return int(found.slower)


def _draw(options: argparse.Namespace) -> int:
    if not find_spec("matplotlib"):
        raise ConfigError("figures need matplotlib: pip install matplotlib")
    from .figures import draw

    print(*draw(read_report(options.report), options.folder), sep="\n")
    return 0


if __name__ == "__main__":
    main()

"""A report's tables, for the terminal and for README.md."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = "rtfmri-benchmark-2"
FOLDER = Path(__file__).resolve().parent
_MARKS = "<!-- results: written by python -m benchmarks --readme -->", "<!-- end of results -->"

Column = tuple[str, Callable[[dict[str, Any]], Any]]


class Layout(NamedTuple):
    """A table's title, and its columns: heading, and what takes the cell from a row."""

    title: str
    columns: Sequence[Column]


Layouts = Mapping[str, Layout]


def number(digits: int, *path: str) -> Callable[[dict[str, Any]], str]:
    """Return what shows a row's number, found along *path*, with so many digits; - for none."""

    def cell(row: dict[str, Any]) -> str:
        value: Any = row
        for key in path:
            value = value.get(key)
            if value is None:
                return "-"
        return f"{value:.{digits}f}"

    return cell


def percent(*path: str) -> Callable[[dict[str, Any]], str]:
    """Return what shows a row's part as a percentage."""
    return lambda row: f"{100 * row[path[0]][path[1]]:.0f} %"


def text(key: str) -> Callable[[dict[str, Any]], str]:
    """Return what shows a row's word."""
    return lambda row: str(row[key])


def cells(layout: Layout, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the text of each cell of a table; what was skipped has none."""
    return [[cell(row) for _, cell in layout.columns] for row in rows if "skipped" not in row]


def _title(layout: Layout, rows: Sequence[dict[str, Any]]) -> str:
    skipped = (f" (skipped: {row['skipped']})" for row in rows if "skipped" in row)
    return "".join((layout.title, *skipped))


def summary(report: dict[str, Any]) -> str:
    """Return in one line what was measured, where, when."""
    host = report["machine"]
    gpu = f"{host['gpu']['name']}, CuPy {host['gpu']['cupy']}, " if host["gpu"] else ""
    caches = ", ".join(f"{name} {kib} KiB" for name, kib in host["caches_kib"].items())
    openmp = "".join(f", {name}={value}" for name, value in host["openmp"].items())
    return (
        f"{report['date']}, {report['device']}: {gpu}{host['cpu']}, {host['threads']} threads "
        f"({host['threading_layer']}{openmp}), {caches}, {host['memory_gb']} GB, "
        f"{host['platform']}, Python {host['python']}, NumPy {host['numpy']}, "
        f"numba {host['numba']}, rtfmri {report['rtfmri']} ({report['revision'] or 'installed'})"
    )


def rich_tables(report: dict[str, Any], layouts: Layouts) -> "list[Table]":
    """Return a report's tables for the terminal."""
    from rich.table import Table

    tables = []
    for name, rows in report["tables"].items():
        layout = layouts[name]
        table = Table(title=_title(layout, rows), title_justify="left")
        for heading, _ in layout.columns:
            table.add_column(heading, justify="right")
        for row in cells(layout, rows):
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown(report: dict[str, Any], layouts: Layouts) -> str:
    """Return a report's tables for README.md."""
    parts = [summary(report)]
    for name, rows in report["tables"].items():
        layout = layouts[name]
        headings = [heading for heading, _ in layout.columns]
        lines = [headings, ["---"] * len(headings), *cells(layout, rows)]
        parts.append(f"{_title(layout, rows)}:")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def readme(text: str, reports: Sequence[dict[str, Any]], layouts: Layouts) -> str:
    """Return README.md's *text* with the part between its marks made from *reports*."""
    start, end = (text.index(mark) for mark in _MARKS)
    parts = (_MARKS[0], *(markdown(report, layouts) for report in reports), text[end:])
    return text[:start] + "\n\n".join(parts)


def newest_reports(folder: Path) -> list[dict[str, Any]]:
    """Return of each machine and device the newest report in *folder*, by `file_name`.

    Those of an older format are left out.
    """
    newest = {path.name.split("_", 1)[1]: path for path in sorted(folder.glob("*_*.json"))}
    reports = (json.loads(path.read_text(encoding="utf-8")) for path in newest.values())
    return [report for report in reports if report["format"] == FORMAT]


def file_name(report: dict[str, Any]) -> str:
    """Return a name for a report, like ``2026-11-22_amd-epyc-2c_cpu.json``."""
    host = report["machine"]
    name = f"{host['gpu']['name']}" if report["device"] == "cuda" else host["cpu"]
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", " ", name.lower()))
    return f"{report['date']}_{'-'.join(words)}-{host['threads']}c_{report['device']}.json"


def write_readme(layouts: Layouts) -> None:
    """Write the newest results into README.md."""
    page = FOLDER / "README.md"
    text = readme(page.read_text(encoding="utf-8"), newest_reports(FOLDER / "results"), layouts)
    page.write_text(text, encoding="utf-8")

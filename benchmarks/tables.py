"""A report's tables, for the terminal and for README.md."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

FOLDER = Path(__file__).resolve().parent
_MARKS = "<!-- results: written by python -m benchmarks --readme -->", "<!-- end of results -->"

Column = tuple[str, Callable[[dict[str, Any]], Any]]


class Layout(NamedTuple):
    """A table's title, and its columns: heading, and what takes the cell from a row."""

    title: str
    columns: Sequence[Column]


def _number(digits: int, *path: str) -> Callable[[dict[str, Any]], str]:
    def cell(row: dict[str, Any]) -> str:
        value: Any = row
        for key in path:
            value = value.get(key)
            if value is None:
                return "-"
        return f"{value:.{digits}f}"

    return cell


def _percent(*path: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{100 * row[path[0]][path[1]]:.0f} %"


def _text(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row[key])


LAYOUTS = {
    "kernels": Layout(
        "Operations, hot caches against a stream of the same size, cold ones against main memory",
        (
            ("grid", _text("grid")),
            ("operation", _text("operation")),
            ("voxels", _text("dtype")),
            ("B/voxel", _number(0, "bytes_per_voxel")),
            ("hot ms", _number(4, "hot", "median_ms")),
            ("min", _number(4, "hot", "min_ms")),
            ("p95", _number(4, "hot", "p95_ms")),
            ("GB/s", _number(1, "hot", "gb_s")),
            ("stream GB/s", _number(1, "hot", "stream_gb_s")),
            ("share", _percent("hot", "share")),
            ("cold ms", _number(4, "cold", "median_ms")),
            ("GB/s", _number(1, "cold", "gb_s")),
            ("memory GB/s", _number(1, "cold", "stream_gb_s")),
            ("share", _percent("cold", "share")),
        ),
    ),
    "baseline": Layout(
        "Baseline + PSC + z of a volume: one fused pass against NumPy float32",
        (
            ("grid", _text("grid")),
            ("caches", _text("caches")),
            ("fused ms", _number(4, "median_ms")),
            ("one thread", _number(4, "fused_one_thread_ms")),
            ("NumPy guarded ms", _number(3, "numpy_guarded_ms")),
            ("times", _number(1, "times_faster", "numpy_guarded")),
            ("plain ms", _number(3, "numpy_plain_ms")),
            ("times", _number(1, "times_faster", "numpy_plain")),
            ("in place ms", _number(3, "numpy_in_place_ms")),
            ("times", _number(1, "times_faster", "numpy_in_place")),
            ("stream GB/s", _number(1, "stream_gb_s")),
            ("26 B/voxel allow ms", _number(4, "allowed_ms")),
            ("fused / allowed", _number(2, "of_allowed")),
        ),
    ),
    "flat": Layout(
        "Cost of Pipeline.push as a run grows",
        (
            ("grid", _text("grid")),
            ("baseline", _text("baseline")),
            *((f"ms at {n}", _number(4, "push_ms", n)) for n in ("10", "100", "1000", "10000")),
            ("last / first", _number(2, "last_to_first")),
            ("memory grown KiB", lambda row: f"{row['memory_growth_bytes'] / 1024:.0f}"),
        ),
    ),
    "motion": Layout(
        "Motion correction of the same volumes: error over a sphere of 50 mm, time of a volume",
        (
            ("grid", _text("grid")),
            ("tool", _text("tool")),
            ("volumes", _number(0, "n_volumes")),
            ("error rms mm", _number(4, "rms_mm")),
            ("largest", _number(4, "max_mm")),
            ("after 6 mm, 6 degrees", _number(4, "jump_mm")),
            ("with activation", _number(4, "active_mm")),
            ("estimate ms", _number(2, "estimate_ms")),
            ("reslice ms", _number(2, "reslice_ms")),
            ("together ms", _number(2, "together_ms")),
            ("times ours", _number(1, "times_ours")),
        ),
    ),
    "smoothing": Layout(
        "Smoothing with FWHM 6 mm, caches cold: ours against scipy.ndimage.gaussian_filter",
        (
            ("grid", _text("grid")),
            ("ms", _number(3, "median_ms")),
            ("scipy ms", _number(2, "scipy_ms")),
            ("times", _number(1, "times_faster")),
        ),
    ),
    "glm": Layout(
        "A step of the GLM with 12 columns against NumPy's incremental GLM and nilearn's refit",
        (
            ("grid", _text("grid")),
            ("caches", _text("caches")),
            ("contrasts", _text("contrasts")),
            ("ms", _number(4, "median_ms")),
            ("min", _number(4, "min_ms")),
            ("p95", _number(4, "p95_ms")),
            ("stream GB/s", _number(1, "stream_gb_s")),
            ("B/voxel", _number(0, "bytes_per_voxel")),
            ("they allow ms", _number(4, "allowed_ms")),
            ("ours / allowed", _number(2, "of_allowed")),
            ("NumPy ms", _number(1, "iglm_ms")),
            ("times", _number(0, "times_faster", "iglm")),
            ("in place ms", _number(1, "iglm_in_place_ms")),
            ("times", _number(0, "times_faster", "iglm_in_place")),
            ("nilearn ms", _number(0, "nilearn_ms")),
            ("times", _number(0, "times_faster", "nilearn")),
        ),
    ),
    "glm_cost": Layout(
        "What a step of the GLM is made of, with independent (OLS) and with AR(1) noise",
        (
            ("grid", _text("grid")),
            ("caches", _text("caches")),
            *(
                (f"{noise} {heading}", _number(digits, noise.lower(), key))
                for noise in ("OLS", "AR1")
                for heading, digits, key in (
                    ("told µs", 1, "told_us"),
                    ("update_design µs", 1, "design_us"),
                    ("push ms", 4, "push_ms"),
                )
            ),
            ("AR1 / OLS", _number(2, "times_ols")),
            ("noise classes", _number(0, "n_classes")),
            ("end of warm-up ms", _number(0, "warm_up_end_ms")),
        ),
    ),
    "chain": Layout(
        "A volume's whole way, from a mosaic's pixels to the ROIs' values",
        (
            ("grid", _text("grid")),
            ("step", _text("step")),
            *(
                (f"{caches} {name}", _number(3, caches, f"{name}_ms"))
                for caches in ("hot", "cold")
                for name in ("p50", "p99", "min")
            ),
        ),
    ),
    "latency": Layout(
        "Arrival to result in a session",
        (
            ("grid", _text("grid")),
            ("recorded", lambda row: "yes" if row["recorded"] else "no"),
            ("a volume every ms", _number(0, "pace_ms")),
            ("p50 ms", _number(2, "p50_ms")),
            ("p95", _number(2, "p95_ms")),
            ("p99", _number(2, "p99_ms")),
            ("max", _number(2, "max_ms")),
            ("first volume", _number(1, "first_ms")),
        ),
    ),
    "transports": Layout(
        "From the scanner's side, in another process, to a decoded volume",
        (
            ("transport", _text("transport")),
            ("grid", _text("grid")),
            ("KB", _number(0, "kb")),
            ("n", _number(0, "n")),
            ("lost", _number(0, "lost")),
            ("from first byte, p50 ms", _number(2, "first_byte", "p50_ms")),
            ("p95", _number(2, "first_byte", "p95_ms")),
            ("from last byte, p50 ms", _number(2, "last_byte", "p50_ms")),
            ("p95", _number(2, "last_byte", "p95_ms")),
        ),
    ),
    "decode": Layout(
        "Decoding a Siemens mosaic, against reading the file and cutting it up alone",
        (
            ("grid", _text("grid")),
            ("read + cut ms", _number(3, "bare_ms")),
            ("decode ms", _number(3, "median_ms")),
            ("times", _number(2, "times")),
        ),
    ),
}


def cells(name: str, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the text of each cell of the table *name*; a suite that was skipped has none."""
    columns = LAYOUTS[name].columns
    return [[cell(row) for _, cell in columns] for row in rows if "skipped" not in row]


def _title(name: str, rows: Sequence[dict[str, Any]]) -> str:
    skipped = (f" (skipped: {row['skipped']})" for row in rows if "skipped" in row)
    return "".join((LAYOUTS[name].title, *skipped))


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


def rich_tables(report: dict[str, Any]) -> "list[Table]":
    """Return a report's tables for the terminal."""
    from rich.table import Table

    tables = []
    for name, rows in report["tables"].items():
        table = Table(title=_title(name, rows), title_justify="left")
        for heading, _ in LAYOUTS[name].columns:
            table.add_column(heading, justify="right")
        for row in cells(name, rows):
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown(report: dict[str, Any]) -> str:
    """Return a report's tables for README.md."""
    parts = [summary(report)]
    for name, rows in report["tables"].items():
        headings = [heading for heading, _ in LAYOUTS[name].columns]
        lines = [headings, ["---"] * len(headings), *cells(name, rows)]
        parts.append(f"{_title(name, rows)}:")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def readme(text: str, reports: Sequence[dict[str, Any]]) -> str:
    """Return README.md's *text* with the part between its marks made from *reports*."""
    start, end = (text.index(mark) for mark in _MARKS)
    parts = (_MARKS[0], *(markdown(report) for report in reports), text[end:])
    return text[:start] + "\n\n".join(parts)


def newest_reports(folder: Path) -> list[dict[str, Any]]:
    """Return of each machine and device the newest report in *folder*, by `file_name`."""
    newest = {path.name.split("_", 1)[1]: path for path in sorted(folder.glob("*_*.json"))}
    return [json.loads(path.read_text(encoding="utf-8")) for path in newest.values()]


def file_name(report: dict[str, Any]) -> str:
    """Return a name for a report, like ``2026-11-22_amd-epyc-2c_cpu.json``."""
    host = report["machine"]
    name = f"{host['gpu']['name']}" if report["device"] == "cuda" else host["cpu"]
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", " ", name.lower()))
    return f"{report['date']}_{'-'.join(words)}-{host['threads']}c_{report['device']}.json"


def write_readme() -> None:
    """Write the newest results into README.md."""
    page = FOLDER / "README.md"
    text = readme(page.read_text(encoding="utf-8"), newest_reports(FOLDER / "results"))
    page.write_text(text, encoding="utf-8")

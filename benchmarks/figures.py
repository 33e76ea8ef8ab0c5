"""A report's pictures: the memory's roof, stages beside their peers, latency, scaling."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .chain import TOTAL
from .kernels import LEAST_SHARE
from .latency import BUSY, COMMON_S, IDLE, PERCENTS, SPARED, TCP
from .measure import Row, Tables

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
"""After Okabe & Ito 2008, Color Universal Design."""
_MARKERS = "osD^vPX*"
_INK, _GREY, _LIGHT = "#22303c", "#7d8892", "#e4e8eb"
_WIDTH_IN, _DPI = 9.0, 150
_PARTS = {
    "baseline": ("subtract", "fold", "slide", "contrast"),
    "gather, retime": ("gather", "retime"),
    "quality": ("compare", "track"),
    "detrend": ("remove_slow", "remove_fit"),
    "GLM": ("update_glm",),
}
"""Of the pipeline, with their operations that memory bounds."""
_LEAST_MB = 0.25
_SHORT, _LINE_POINTS = 30, 8
"""Ends of an axis in whose ratio there are ticks between the powers of ten; a line's height."""
_WHOLE = "whole chain"
_ROOM = 30
"""So much farther than the longest bar goes an axis, for the words beside."""
_SMALL: dict[str, Any] = {"frameon": False, "fontsize": 8}
_FROM_LAST = "ms from the last byte to the result"
_LINES = {IDLE: "-", BUSY: "--", SPARED: ":"}
_STEPS = (TOTAL, "motion", "reslice", "smooth", "glm", "baseline", "roi")


def draw(report: dict[str, Any], folder: Path) -> Iterator[str]:
    """Draw each picture whose tables a report has, as PNG; yield what became of each.

    Parameters
    ----------
    report : dict
        As `benchmarks.run` returns it.
    folder : Path
        Made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        tables = {
            table: [row for row in report["tables"].get(table, []) if "skipped" not in row]
            for table in picture.tables
        }
        if missing := [table for table, rows in tables.items() if not rows]:
            yield f"no {name}.png: the report has nothing of {', '.join(missing)}"
            continue
        figure = picture.draw(tables)
        figure.supxlabel(footer(report), size=8, color=_GREY, x=0.01, ha="left")
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
        yield str(folder / f"{name}.png")


def footer(report: dict[str, Any]) -> str:
    """Return in one line where and when a report was measured."""
    host = report["machine"]
    gpu = f"{host['gpu']['name']}, " if report["device"] == "cuda" else ""
    revision = f" ({report['revision']})" if report["revision"] else ""
    return (
        f"{gpu}{host['cpu']}, {host['threads']} threads; {report['date']}; "
        f"rtfmri {report['rtfmri']}{revision}"
    )


def roofline(tables: Tables) -> Figure:
    """Draw the rate of each operation against the bytes it moves, under the memory's roof.

    The roof is a stream over as many bytes as the operation's arrays have, with the same caches.
    Calls of less than `_LEAST_MB` are left out: their start is most of their time.
    """
    rows = [row for row in tables["kernels"] if _moved_mb(row) >= _LEAST_MB]
    bound = [row for row in rows if row["memory_bound"]]
    others = [row for row in rows if not row["memory_bound"]]
    reach = [
        sum(row[caches]["share"] >= LEAST_SHARE for row in bound) for caches in ("hot", "cold")
    ]
    figure = _figure(
        f"{reach[0]} (caches hot) and {reach[1]} (cold) of {len(bound)} memory-bound cases "
        f"reach {LEAST_SHARE:.0%} of the memory's pace",
        height_in=5.2,
    )
    panels: Sequence[Axes] = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, caches in zip(panels, ("hot", "cold"), strict=True):
        _roof(axes, rows, caches)
        for i, (part, operations) in enumerate(_PARTS.items()):
            members = [row for row in bound if _first_word(row["operation"]) in operations]
            _plot(axes, *_rates(members, caches), i, label=part, ls="none", ms=6)
        hollow: dict[str, Any] = {"color": _GREY, "mfc": "none", "marker": "o", "ls": "none"}
        _plot(axes, *_rates(others, caches), 0, label="bound by arithmetic", **hollow)
        _finish(axes, f"caches {caches}", "MB read and written by a call")
    panels[0].set_ylabel("GB/s")
    panels[1].legend(loc="best", ncols=2, **_SMALL)
    return figure


def _rates(rows: Sequence[Row], caches: str) -> tuple[list[float], list[float]]:
    return [_moved_mb(row) for row in rows], [row[caches]["gb_s"] for row in rows]


def _moved_mb(row: Row) -> float:
    return 1e-6 * float(row["bytes_per_voxel"] * row["n"])


def _roof(axes: Axes, rows: Sequence[Row], caches: str) -> None:
    """Draw the stream's rate as medians over neighbouring sizes."""
    moved_mb, _ = _rates(rows, caches)
    order = np.argsort(moved_mb)
    x = np.array(moved_mb)[order]
    y = np.array([row[caches]["stream_gb_s"] for row in rows])[order]
    roof = np.array([np.median(y[max(0, i - 3) : i + 4]) for i in range(len(y))])
    axes.plot(x, roof, color=_INK, lw=1.8, label="memory stream")
    axes.plot(x, LEAST_SHARE * roof, color=_INK, lw=1, ls=":", label=f"{LEAST_SHARE:.0%} of it")


def peers(tables: Tables) -> Figure:
    """Draw each stage's time beside that of its fastest peer, on the largest grid."""
    rows = _of_largest_grid(tables["peers"])
    stages = [row["times"] for row in rows if row["stage"] != _WHOLE]
    parts = [f"the whole chain {row['times']:.0f}" for row in rows if row["stage"] == _WHOLE]
    if stages:
        parts.append(f"its stages {min(stages):.1f} to {max(stages):.0f}")
    title = f"Times as fast as the fastest peer at {rows[0]['grid']}: {', '.join(parts)}"
    figure = _figure(title, height_in=1 + 0.5 * len(rows))
    axes = figure.subplots()
    for i, row in enumerate(rows):
        label_ours, label_peer = ("rtfmri", "the fastest peer") if i == 0 else ("", "")
        axes.barh(i - 0.19, row["median_ms"], 0.36, color=_COLOURS[0], label=label_ours)
        axes.barh(i + 0.19, row["peer_ms"], 0.36, color=_COLOURS[4], label=label_peer)
        text = f"{row['peer']}, {row['times']:.{1 if row['times'] < 10 else 0}f} times ours"
        axes.text(1.1 * row["peer_ms"], i + 0.19, text, va="center", size=8.5, color=_INK)
    _finish(axes, "", "ms a volume", log_y=False)
    axes.set_yticks(range(len(rows)), [row["stage"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(right=axes.get_xlim()[1] * _ROOM)
    axes.grid(visible=False, axis="y")
    axes.legend(loc="best", **_SMALL)
    return figure


def latency(tables: Tables) -> Figure:
    """Draw how many volumes take longer than so many ms: by transport, and by the TR."""
    rows = _of_largest_grid(tables["latency"])
    common = [row for row in rows if row["tr_ms"] == 1e3 * COMMON_S and row["neighbour"] != SPARED]
    over_tcp = [row for row in rows if row["transport"] == TCP.name]
    idle = [row for row in rows if row["neighbour"] == IDLE]
    figure = _figure(
        f"At {rows[0]['grid']}, 99 of 100 volumes are answered within "
        f"{max(row['p99_ms'] for row in idle):.0f} ms of their last byte",
        height_in=5.2,
    )
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["transport"] for row in common))
    for row in common:
        label, i = f"{row['transport']}, {row['neighbour']}", names.index(row["transport"])
        _plot(left, *_tail(row), i, label=label, ls=_LINES[row["neighbour"]], marker="")
    _finish(left, f"every {1e3 * COMMON_S:.0f} ms, by transport", _FROM_LAST)
    left.set_ylabel("% of volumes that take longer")
    for i, neighbour in enumerate(dict.fromkeys(row["neighbour"] for row in over_tcp)):
        line = [row for row in over_tcp if row["neighbour"] == neighbour]
        trs_ms = [row["tr_ms"] for row in line]
        for name, ls in (("p50", "-"), ("p99", "--")):
            costs_ms = [row[f"{name}_ms"] for row in line]
            _plot(right, trs_ms, costs_ms, i, label=f"{name}, {neighbour}", ls=ls)
    _finish(right, f"by the TR, {TCP.name}", "TR, ms")
    right.set_ylabel(_FROM_LAST)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, **_SMALL)
    return figure


def _tail(row: Row) -> tuple[list[float], list[float]]:
    """Return quantiles in ms, and the percentage above each; as far as the volumes tell it."""
    above = 100 - np.array(PERCENTS)
    told = above >= 100 / row["n"]
    return np.array(row["quantiles_ms"])[told].tolist(), above[told].tolist()


def scaling(tables: Tables) -> Figure:
    """Draw what a volume costs as one thing grows, a panel each, and as the run gets longer."""
    rows, flat = tables["scaling"], tables["flat"]
    fits = {(fit["axis"], fit["grid"]): fit["steps"] for fit in tables["exponents"]}
    axes_of = dict.fromkeys((row["axis"], _line_grid(row)) for row in rows)
    powers = [f"volumes seen^{max((row['exponent'] for row in flat), key=abs):.2f}"]
    if ("voxels", "all") in fits:
        powers.append(f"voxels^{fits['voxels', 'all'][TOTAL]['exponent']:.2f}")
    n_rows = -(-(len(axes_of) + 2) // 3)
    figure = _figure(f"A volume's cost ~ {', '.join(powers)}", height_in=0.8 + 2.3 * n_rows)
    panels = list(figure.subplots(n_rows, 3, squeeze=False).flat)
    for axes, (axis, grid) in zip(panels, axes_of, strict=False):
        line = [row for row in rows if (row["axis"], _line_grid(row)) == (axis, grid)]
        ends = {}
        for i, step in enumerate(_STEPS):
            told = [row for row in line if step in row["steps"]]
            costs_ms = [row["steps"][step]["p50_ms"] for row in told]
            _plot(axes, [row["size"] for row in told], costs_ms, i, label=step)
            if costs_ms and step in fits.get((axis, grid), {}):
                ends[i] = (costs_ms[-1], fits[axis, grid][step]["exponent"])
        _finish(axes, axis if grid == "all" else f"{axis}, {grid}")
        _name_ends(axes, line[-1]["size"], ends)
    _flat(panels[len(axes_of)], flat)
    for axes in panels[len(axes_of) + 1 :]:
        axes.set_axis_off()
    for axes in panels[: len(axes_of) + 1 : 3]:
        axes.set_ylabel("ms, median")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[len(axes_of) + 1].legend(handles, labels, loc="center left", title="step", **_SMALL)
    return figure


def _name_ends(axes: Axes, x: float, ends: Mapping[int, tuple[float, float]]) -> None:
    """Write the exponents beside the ends of their lines, one above the other."""
    to_points = axes.transData + axes.figure.dpi_scale_trans.inverted()
    lowest = -np.inf
    for i, (y, exponent) in sorted(ends.items(), key=lambda end: end[1][0]):
        at = 72 * float(to_points.transform((x, y))[1])
        lift = max(0.0, lowest - at)
        lowest = at + lift + _LINE_POINTS
        text = axes.annotate(f"{exponent:z.2f}", (x, y), (6, lift), textcoords="offset points")
        text.set(size=7, color=_COLOURS[i], va="center")


def _line_grid(row: Row) -> str:
    """Return a row's grid, unless the grid is what grows."""
    return "all" if row["axis"] == "voxels" else str(row["grid"])


def _flat(axes: Axes, flat: Sequence[Row]) -> None:
    for i, row in enumerate(flat):
        volumes = [int(n) for n in row["push_ms"]]
        _plot(axes, volumes, list(row["push_ms"].values()), i, label=row["baseline"], ls="--")
    _finish(axes, f"volumes seen, {flat[0]['grid']}, total", log_y=False)
    axes.legend(loc="lower left", title="baseline", title_fontsize=8, ncols=2, **_SMALL)


class Picture(NamedTuple):
    """The tables it is made from, and what makes it from their rows."""

    tables: tuple[str, ...]
    draw: Callable[[Tables], Figure]


PICTURES = {
    "roofline": Picture(("kernels",), roofline),
    "peers": Picture(("peers",), peers),
    "latency": Picture(("latency",), latency),
    "scaling": Picture(("scaling", "exponents", "flat"), scaling),
}


def _figure(title: str, height_in: float) -> Figure:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    figure.suptitle(title, size=12, color=_INK, x=0.01, ha="left", weight="bold")
    return figure


def _plot(axes: Axes, x: Sequence[float], y: Sequence[float], i: int, **style: Any) -> None:
    """Plot with the colour and the marker of number *i*."""
    own: dict[str, Any] = {"color": _COLOURS[i], "marker": _MARKERS[i], "ms": 4.5, "lw": 1.5}
    axes.plot(x, y, **own | style)


def _finish(axes: Axes, title: str, xlabel: str = "", *, log_y: bool = True) -> None:
    """Give a panel its title, its scales and readable ticks."""
    axes.set_title(title, size=10, color=_INK)
    axes.set_xlabel(xlabel)
    axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        if axis is axes.xaxis or log_y:
            short = limits[1] < _SHORT * limits[0]
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
            axis.set_minor_formatter(NullFormatter())
    axes.grid(color=_LIGHT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def _first_word(operation: str) -> str:
    return operation.replace(",", " ").split()[0]


def _of_largest_grid(rows: Sequence[Row]) -> list[Row]:
    def n_voxels(row: Row) -> int:
        return int(np.prod([int(size) for size in row["grid"].split("x")]))

    largest = max(rows, key=n_voxels)["grid"]
    return [row for row in rows if row["grid"] == largest]

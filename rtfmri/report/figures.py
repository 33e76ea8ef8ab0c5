"""The report's figures: each function returns a Figure, without matplotlib's global state."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rtfmri.design import Contrast
from rtfmri.paradigm import Event
from rtfmri.pipeline import STAGES
from rtfmri.recording import MOTION
from rtfmri.volume import Grid

WARM_COOL = LinearSegmentedColormap.from_list(
    "warm_cool",
    [
        (0.00, "#d7f0ff"),
        (0.20, "#56b4e9"),
        (0.38, "#0072b2"),
        (0.50, "#000000"),
        (0.62, "#c0470a"),
        (0.80, "#f0a020"),
        (1.00, "#fff6c0"),
    ],
)
"""Warm above zero, cool below, black at zero; colour-blind eyes tell them apart, too."""

_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
"""For conditions, after Okabe & Ito 2008, Color Universal Design."""
_INK, _GREY = "#22303c", "#7d8892"
_PER_ROW = 7

Rows = list[tuple[str, list[float]]]
"""Rows of slices: the axis that they cut, x, y or z, and where, in scanner mm."""


class Course(NamedTuple):
    """What a panel shows of each volume, (n_volumes,); nan is no value."""

    title: str
    values: NDArray[np.float64]


def slices_at(grid: Grid, at_mm: Sequence[float]) -> Rows:
    """Return the axial and the coronal slice through a point; of a thin volume its own plane."""
    axes = _thin_axis(grid) or "zy"
    return [(axis, [float(at_mm["xyz".index(axis)])]) for axis in axes]


def slices_through(brain: NDArray[np.bool_], grid: Grid, at_mm: Sequence[float]) -> Rows:
    """Return two rows of axial and one of coronal slices, some of them through the given point."""
    places_mm = np.argwhere(brain) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    rows: Rows = []
    for axis, n_rows in [(_thin_axis(grid), 1)] if _thin_axis(grid) else [("z", 2), ("y", 1)]:
        i = "xyz".index(axis)
        low, high = np.percentile(places_mm[:, i], (2, 98))
        n = min(n_rows * _PER_ROW, 1 + int((high - low) / min(grid.voxel_size_mm)))
        cuts = np.linspace(low, high, n)
        cuts[np.argmin(np.abs(cuts - at_mm[i]))] = at_mm[i]
        rows += [(axis, part.tolist()) for part in np.array_split(cuts, n_rows) if part.size]
    return rows


def _thin_axis(grid: Grid) -> str:
    """Return the scanner axis along which the volume has next to no slices, or nothing."""
    thinnest = int(np.argmin(grid.shape))
    across = int(np.argmax(np.abs(grid.affine[:3, thinnest])))
    return "xyz"[across] if grid.shape[thinnest] < 4 else ""


def subtraction(images: Mapping[str, Any], difference: tuple[str, Any], rows: Rows) -> Figure:
    """Draw images in grey and their difference in colour, side by side on the same slices.

    Parameters
    ----------
    images : mapping of str to NIfTI image
        By title; all on one scale.
    difference : (str, NIfTI image)
        Title and image, 0 outside the brain.
    rows : Rows
    """
    figure = Figure(figsize=(10, 0.9 + 2.6 * len(rows)), facecolor="black")
    brightest = max(_brightest(image) for image in images.values())
    largest = float(np.percentile(np.abs(difference[1].dataobj), 99.9)) or 1.0
    columns: list[tuple[str, Any, Any, float, float]] = [
        (title, image, "gray", 0.0, brightest) for title, image in images.items()
    ]
    columns.append((*difference, WARM_COOL, -largest, largest))
    width = 1 / len(columns)
    top, bottom = 1 - 0.4 / figure.get_figheight(), 0.5 / figure.get_figheight()
    for column, (title, image, cmap, low, high) in enumerate(columns):
        left = column * width
        figure.text(left + width / 2, top, title, color="white", ha="center", size=12)
        place = (left, bottom, width, top - bottom - 0.02)
        _draw(figure, place, rows, image, cmap=cmap, vmin=low, vmax=high)
        _colour_bar(figure, left + width / 2, cmap, low, high, "scanner units")
    return figure


def plain(image: Any, rows: Rows, label: str, cmap: str) -> Figure:
    """Draw slices of an image that is 0 or more, on a scale from dark to bright."""
    figure, place = _dark_figure(rows)
    brightest = _brightest(image)
    _draw(figure, place, rows, image, cmap=cmap, vmin=0, vmax=brightest)
    _colour_bar(figure, 0.5, cmap, 0, brightest, label)
    return figure


def mosaic(
    background: Any, rows: Rows, t_map: Any, threshold: float, statistic: str = "t"
) -> Figure:
    """Draw slices of *background* in grey and, over it, the t map where |t| >= *threshold*."""
    figure, place = _dark_figure(rows)
    largest = max(float(np.abs(t_map.dataobj).max()), threshold + 1)
    if np.any(t_map.dataobj):
        scale = {"cmap": WARM_COOL, "vmin": -largest, "vmax": largest}
        _draw(figure, place, rows, t_map, threshold=threshold, bg_img=background, **scale)
    else:
        _draw(figure, place, rows, background, cmap="gray", vmin=0, vmax=_brightest(background))
    bar = _colour_bar(figure, 0.5, WARM_COOL, -largest, largest, statistic, dark=threshold)
    if statistic == "F":
        bar.set_xlim(left=0)
    return figure


def _dark_figure(rows: Rows) -> tuple[Figure, tuple[float, float, float, float]]:
    """Return a figure for rows of slices, and the place for them above the colour bar."""
    figure = Figure(figsize=(10, 0.7 + 1.75 * len(rows)), facecolor="black")
    bottom = 0.55 / figure.get_figheight()
    return figure, (0, bottom, 1, 0.99 - bottom)


def _draw(
    figure: Figure, place: tuple[float, float, float, float], rows: Rows, image: Any, **style: Any
) -> None:
    from nilearn.plotting import plot_img

    left, bottom, width, height = place
    for row, (axis, cuts) in enumerate(rows):
        display = plot_img(
            image,
            display_mode=axis,
            cut_coords=cuts,
            figure=figure,
            axes=(left, bottom + height * (1 - (row + 1) / len(rows)), width, height / len(rows)),
            black_bg=True,
            colorbar=False,
            annotate=False,
            resampling_interpolation="nearest",
            **style,
        )
        display.annotate(size=8)


def _brightest(image: Any) -> float:
    """Return what is drawn white: a few vessels may be brighter."""
    return float(np.percentile(image.dataobj, 99.7)) or 1.0


def _colour_bar(
    figure: Figure, centre: float, cmap: Any, low: float, high: float, label: str, dark: float = 0
) -> Axes:
    height = figure.get_figheight()
    axes = figure.add_axes((centre - 0.12, 0.38 / height, 0.24, 0.1 / height))
    colours = ScalarMappable(Normalize(low, high), cmap)
    bar = figure.colorbar(colours, axes, orientation="horizontal")
    if dark:
        axes.axvspan(-dark, dark, color="#333333")
    bar.ax.tick_params(colors="white", labelsize=8, length=2, pad=1)
    bar.set_label(label, color="white", size=8, labelpad=1)
    return axes


def design(
    matrix: NDArray[np.float64],
    columns: Sequence[str],
    contrasts: Sequence[Contrast],
    usable: NDArray[np.bool_],
) -> Figure:
    """Draw the design matrix, and below it the contrasts' weights.

    Parameters
    ----------
    matrix : (n_volumes, n_columns)
        A row a volume; each column is drawn relative to its largest value.
    columns : sequence of str
    contrasts : sequence of Contrast
    usable : (n_volumes,) bool
        Volumes that are not are marked.
    """
    rows = [(f"{c.name} ({c.kind})", row) for c in contrasts for row in c.weights]
    below = 0.28 * len(rows)
    figure = Figure(figsize=(10, 5.2 + below), layout="constrained")
    panels = figure.subplots(
        2 if rows else 1, 1, squeeze=False, height_ratios=[5, below][: 1 + bool(rows)]
    )
    drawn, *asked = panels[:, 0]
    scaled = matrix / np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    drawn.imshow(scaled, aspect="auto", cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    drawn.xaxis.tick_top()
    drawn.set_xticks(range(len(columns)), columns, rotation=60, ha="left")
    drawn.set_ylabel("volume")
    drawn.scatter(
        np.full((~usable).sum(), len(columns) - 0.5),
        np.flatnonzero(~usable),
        marker="<",
        s=20,
        color=_COLOURS[0],
        clip_on=False,
    )
    for axes in asked:
        weights = np.array([row for _, row in rows])
        largest = np.abs(weights).max()
        axes.imshow(weights, aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_xticks([])
    for axes in panels[:, 0]:
        _tidy(axes)
    return figure


def time_courses(
    courses: Sequence[Course],
    time_s: NDArray[np.float64],
    members: NDArray[np.bool_],
    conditions: Sequence[str],
    events: Sequence[Event],
    *,
    label: str = "signal change (%)",
    one_scale: bool = True,
) -> Figure:
    """Draw each course against the task.

    Parameters
    ----------
    courses : sequence of Course
        One panel each.
    time_s : (n_volumes,)
        Middle of each volume.
    members : (n_volumes, n_conditions)
        Which volume counts for which condition; one that counts for none is a hollow point.
    conditions : sequence of str
        The baseline first.
    events : sequence of Event
        Shaded where they are, not where their response is.
    label : str
        Of the vertical axis.
    one_scale : bool
        Whether all panels have the same one.
    """
    height = 0.9 + (1.9 if len(courses) <= 3 else 1.45) * len(courses)
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(len(courses), 1, sharex=True, sharey=one_scale, squeeze=False)[:, 0]
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(conditions[1:])}
    colour[conditions[0]] = _GREY
    # A point has the colour of the last condition it counts for: the baseline's only if no other.
    faces = [
        next(
            (colour[name] for name, on in zip(conditions[::-1], row[::-1], strict=True) if on),
            "white",
        )
        for row in members
    ]
    # Where a volume never came, the line is broken.
    usual_s = np.median(np.diff(time_s)) if len(time_s) > 1 else 0.0
    gaps = 1 + np.flatnonzero(np.diff(time_s) > 1.5 * usual_s)
    for axes, course in zip(panels, courses, strict=True):
        for event in events:
            stop_s = event.onset_s + event.duration_s
            shade = colour.get(event.trial_type, _GREY)
            axes.axvspan(event.onset_s, stop_s, color=shade, alpha=0.16, lw=0)
        axes.axhline(0, color=_GREY, lw=0.8)
        line = np.insert(course.values, gaps, np.nan)
        axes.plot(np.insert(time_s, gaps, np.nan), line, color=_INK, lw=0.8, alpha=0.7)
        axes.scatter(
            time_s, course.values, s=13, c=faces, edgecolors=_INK, linewidths=0.6, zorder=3
        )
        axes.set_title(course.title, loc="left", size=10, color=_INK)
        axes.set_xlim(0, time_s[-1] + usual_s)
        _tidy(axes)
    panels[-1].set_xlabel("time in the run (s)")
    figure.supylabel(label, size=10, color=_INK)
    if len(conditions) > 1:
        point: dict[str, Any] = {"marker": "o", "ls": "", "mec": _INK, "mew": 0.6, "ms": 5}
        blocks = [
            Patch(color=colour[name], alpha=0.5, label=f"{name} (block, and volumes in it)")
            for name in conditions[1:]
        ]
        points = [
            Line2D([], [], mfc=_GREY, label=f"{conditions[0]} volume", **point),
            Line2D([], [], mfc="white", label="left out", **point),
        ]
        handles = [*blocks, *points]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5
        )
    return figure


def quality(
    rows: NDArray[Any], problems: Sequence[Sequence[str]], n_start_up: int, fd_limit_mm: float
) -> Figure:
    """Draw motion, framewise displacement and DVARS, and what was wrong with which volume.

    Parameters
    ----------
    rows : (n_volumes,) compound
        `Recording.results`.
    problems : sequence of sequence of str
        Of each volume.
    n_start_up : int
        Volumes before the run began.
    fd_limit_mm : float
        Above which a volume was left out.
    """
    time_s = rows["time_s"]
    found = sorted({problem for words in problems for problem in words})
    names = (["start-up"] if n_start_up else []) + found
    has_motion = bool(np.isfinite(rows["fd_mm"]).any())
    heights = [3, 3, 2.4] * has_motion + [2.4] + [0.5 + 0.32 * len(names)] * bool(names)
    figure = Figure(figsize=(10, 0.6 + 0.62 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    left = iter(panels[:, 0])
    if has_motion:
        for title, columns in (
            ("Translation (mm)", MOTION[:3]),
            ("Rotation (degrees)", MOTION[3:]),
        ):
            axes = next(left)
            for axis, column, colour in zip("xyz", columns, _COLOURS, strict=False):
                axes.plot(time_s, rows[column], color=colour, lw=1.1, label=axis)
            axes.axhline(0, color=_GREY, lw=0.6)
            axes.set_title(title, loc="left", size=10, color=_INK)
            _legend_above(axes)
        axes = next(left)
        axes.plot(time_s, rows["fd_mm"], color=_INK, lw=0.9, label="Power")
        axes.plot(time_s, rows["fd_jenkinson_mm"], color=_COLOURS[5], lw=0.9, label="Jenkinson")
        axes.axhline(fd_limit_mm, color=_COLOURS[0], lw=1.2, ls="--", label="limit")
        axes.set_ylim(0, 1.15 * max(fd_limit_mm, float(np.nanmax(rows["fd_mm"]))))
        axes.set_title("Framewise displacement (mm)", loc="left", size=10, color=_INK)
        _legend_above(axes)
    axes = next(left)
    axes.plot(time_s, rows["dvars_std"], color=_INK, lw=0.9)
    axes.axhline(1, color=_GREY, lw=0.6)
    axes.set_ylim(bottom=0)
    axes.set_title("DVARS (standardised; 1 is ordinary)", loc="left", size=10, color=_INK)
    for axes in panels[:, 0]:
        _tidy(axes)
        for start_s in time_s[~rows["usable"]]:
            axes.axvline(start_s, color=_COLOURS[0], alpha=0.25, lw=1.5)
    if names:
        axes = next(left)
        words = [("start-up", *w) if i < n_start_up else w for i, w in enumerate(problems)]
        points = [(time_s[i], names.index(w)) for i, all_w in enumerate(words) for w in all_w]
        axes.scatter(*zip(*points, strict=True), marker="|", s=60, color=_COLOURS[0])
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title("Left out", loc="left", size=10, color=_INK)
    panels[-1, 0].set_xlabel("time in the run (s)")
    return figure


def latency(rows: NDArray[Any], deadline_ms: float) -> Figure:
    """Draw how long each stage took, and the total of each volume against the deadline.

    Parameters
    ----------
    rows : (n_volumes,) compound
        `Recording.results`.
    deadline_ms : float
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    stages, total, spread = figure.subplots(1, 3, width_ratios=(5, 6, 1.2))
    names = [*(stage for stage in STAGES if rows[f"{stage}_ms"].any()), "total"]
    times = [rows["latency_ms" if name == "total" else f"{name}_ms"] for name in names]
    p50, p99 = (np.array([np.percentile(t, p) for t in times]) for p in (50, 99))
    floor = max(1e-3, 0.5 * float(min(p50[p50 > 0], default=1e-3)))
    place = np.arange(len(names))
    stages.barh(place - 0.19, p50, 0.36, color=_COLOURS[1], label="p50")
    stages.barh(place + 0.19, p99, 0.36, color=_COLOURS[5], label="p99")
    for bars in stages.containers:
        stages.bar_label(bars, fmt="%.3g", padding=3, size=7.5, color=_INK)
    stages.set(xscale="log", yticks=place, yticklabels=names, xlabel="time (ms)")
    stages.set_xlim(floor, 8 * p99.max())
    stages.invert_yaxis()
    stages.set_title("Each stage", loc="left", size=10, color=_INK)
    _legend_above(stages)

    late = rows["deadline_missed"]
    total.scatter(rows["index"][~late], times[-1][~late], s=7, color=_COLOURS[1])
    total.scatter(rows["index"][late], times[-1][late], s=14, color=_COLOURS[0], marker="x")
    total.axhline(deadline_ms, color=_COLOURS[0], lw=1.2, ls="--")
    total.annotate(
        f"deadline {deadline_ms:g} ms",
        (1, deadline_ms),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        size=8,
        color=_COLOURS[0],
    )
    total.set(xlabel="volume", ylabel="arrival to result (ms)", yscale="log")
    total.set_ylim(0.5 * times[-1].min(), 2 * max(deadline_ms, times[-1].max()))
    total.set_title("Each volume", loc="left", size=10, color=_INK)
    bins = np.geomspace(times[-1].min(), 1.001 * times[-1].max(), 40)
    spread.hist(times[-1], bins=bins, orientation="horizontal", color=_COLOURS[1])
    spread.set(yscale="log", ylim=total.get_ylim(), xlabel="count")
    spread.tick_params(labelleft=False)
    stages.xaxis.set_major_formatter("{x:g}")
    total.yaxis.set_major_formatter("{x:g}")
    for axes in (stages, total, spread):
        _tidy(axes)
    return figure


def _legend_above(axes: Axes) -> None:
    """Put the legend where no line or bar reaches."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=_INK)
    axes.xaxis.label.set(size=9, color=_INK)
    axes.yaxis.label.set(size=9, color=_INK)

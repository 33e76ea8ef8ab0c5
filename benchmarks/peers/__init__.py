"""The same work by whatever else does it: time beside accuracy, stage by stage, and in all."""

from collections.abc import Iterator

from ..measure import Plan, Row, Tables
from ..tables import Layout, number, text
from . import baseline, decode, glm, motion, reslice, roi, smoothing, whole
from .turns import OURS

ASKED, ASKED_OF_ALL = 5, 40
"""How many times faster than its fastest peer a stage is to be, and the whole."""
NOT_INSTALLED = " is not installed"

_STAGES = (whole, decode, motion, reslice, smoothing, baseline, glm, roi)

LAYOUTS = {
    "peers": Layout(
        "Each stage beside its fastest peer, from the tables below",
        (
            ("grid", text("grid")),
            ("stage", text("stage")),
            ("ours ms", number(4, "median_ms")),
            ("fastest peer", text("peer")),
            ("its ms", number(3, "peer_ms")),
            ("times", number(1, "times")),
            ("asked", number(0, "asked")),
            ("accuracy", text("measure")),
            ("ours", number(6, "error")),
            ("the peer's", number(6, "peer_error")),
            ("why not", text("why")),
        ),
    ),
    **{name: layout for stage in _STAGES for name, layout in stage.LAYOUTS.items()},
}


def run(plan: Plan) -> Tables:
    """Return the rows of each stage's tables, and of the table ``peers`` made from them."""
    tables: Tables = {}
    for stage in _STAGES:
        tables |= stage.run(plan)
    return {"peers": [*summary(tables), *absent(tables)]} | tables


def absent(tables: Tables) -> Iterator[Row]:
    """Yield what says of each peer that is missing in *tables* that it is, once."""
    told = (
        str(row.get("skipped", row.get("tool", ""))) for rows in tables.values() for row in rows
    )
    for what in dict.fromkeys(what for what in told if what.endswith(NOT_INSTALLED)):
        yield {"skipped": what}


def summary(tables: Tables) -> Iterator[Row]:
    """Yield a row for each grid and stage that has a peer in *tables*.

    Where ours is not as much faster as is asked for, ``why`` tells what was measured beside it.
    """
    rows = {name: [row for row in table if "median_ms" in row] for name, table in tables.items()}
    for row in rows["whole"]:
        peer = "python-rtspm + NumPy GLM", row["peer_ms"]
        measure = f"activation, rms %; noise alone {row['still_effect_error']:.3f}"
        errors = measure, row["effect_error"], row["peer_effect_error"]
        yield _row(
            row["grid"], "whole chain", row["median_ms"], peer, errors, _slowest(row), ASKED_OF_ALL
        )
    yield from _decode(rows["decode"])
    motion_rows = [
        {**row, "median_ms": row["estimate_ms"]}
        for row in tables["motion"]
        if "estimate_ms" in row
    ]
    yield from _by_tool(motion_rows, "motion, estimate", ("error, rms mm", "rms_mm"))
    yield from _by_tool(rows["reslice"], "motion, reslice", ("error, rms of 1000", "error"))
    yield from _by_tool(rows["smoothing"], "smoothing", ("deviation, ppm", "deviation_ppm"))
    for row in rows["baseline"]:
        stage, (name, peer_ms) = f"baseline, {row['caches']} caches", _fastest(row)
        errors = "error of z", row["z_error"]["fused"], row["z_error"][name]
        peer = _SHOWN[name], peer_ms
        yield _row(row["grid"], stage, row["median_ms"], peer, errors, _memory(row, peer_ms))
    for row in rows["glm"]:
        if row["times_faster"]:
            stage, (name, peer_ms) = f"GLM, {row['caches']} caches", _fastest(row)
            theirs = row["t_error"][name.removesuffix("_in_place")]
            errors = "error of t", row["t_error"]["ours"], theirs
            peer = _SHOWN.get(name, name), peer_ms
            yield _row(row["grid"], stage, row["median_ms"], peer, errors, _memory(row, peer_ms))
    yield from _by_tool(rows["roi"], "means of regions", ("error, parts of 1e9", "error_ppb"))


def _row(
    grid: str,
    stage: str,
    ours_ms: float,
    peer: tuple[str, float],
    errors: tuple[str, float, float],
    why: str,
    asked: int = ASKED,
) -> Row:
    (name, peer_ms), (measure, error, peer_error) = peer, errors
    return {
        "grid": grid,
        "stage": stage,
        "median_ms": ours_ms,
        "peer": name,
        "peer_ms": peer_ms,
        "times": peer_ms / ours_ms,
        "asked": asked,
        "measure": measure,
        "error": error,
        "peer_error": peer_error,
        "why": why if peer_ms < asked * ours_ms else "",
    }


_SHOWN = {
    "numpy_plain": "NumPy plain",
    "numpy_guarded": "NumPy guarded",
    "numpy_in_place": "NumPy in place",
    "iglm": "NumPy GLM",
    "iglm_in_place": "NumPy GLM in place",
    "rls": "NumPy RLS",
}


def _fastest(row: Row) -> tuple[str, float]:
    """Return the key of the fastest peer, and its time in ms."""
    name = min(row["times_faster"], key=row["times_faster"].__getitem__)
    return name, row[f"{name}_ms"]


def _of_grid(rows: list[Row]) -> Iterator[tuple[str, dict[str, Row]]]:
    """Yield each grid and its rows by tool."""
    for grid in dict.fromkeys(row["grid"] for row in rows):
        yield grid, {row["tool"]: row for row in rows if row["grid"] == grid}


def _by_tool(rows: list[Row], stage: str, error: tuple[str, str]) -> Iterator[Row]:
    """Yield a stage's rows from those of its tools; *error* is how it is called and its key."""
    measure, key = error
    for grid, by_tool in _of_grid(rows):
        ours = by_tool.pop(OURS)
        if by_tool:
            peer = min(by_tool.values(), key=lambda row: row["median_ms"])
            found = peer["tool"], peer["median_ms"]
            errors, why = (measure, ours[key], peer[key]), _why(ours, peer["median_ms"])
            yield _row(grid, stage, ours["median_ms"], found, errors, why)


def _decode(rows: list[Row]) -> Iterator[Row]:
    for grid, by_tool in _of_grid(rows):
        peers = [by_tool[name] for name in ("pydicom", "dicomsdl") if name in by_tool]
        ours, peer = by_tool[OURS], min(peers, key=lambda row: row["median_ms"])
        bare_ms = by_tool["read + cut alone"]["median_ms"]
        why = (
            f"to read the file and cut it up alone takes {bare_ms:.3f} ms, so that at most "
            f"{peer['median_ms'] / bare_ms:.1f} times are possible; only ours also reads "
            "geometry, TR and slice times"
        )
        wrong = [float(row["voxels"] != "identical") for row in (ours, peer)]
        found = peer["tool"], peer["median_ms"]
        errors = "wrong voxels", wrong[0], wrong[1]
        yield _row(grid, "decode", ours["median_ms"], found, errors, why)


def _why(ours: Row, peer_ms: float) -> str:
    """Return what was measured beside *ours* that says what it is bound by."""
    if "allowed_ms" in ours:
        return _memory(ours, peer_ms)
    if "start_us" in ours:
        ours_us = 1e3 * ours["median_ms"]
        each_ns = 1e3 * (ours_us - ours["start_us"]) / ours["n_voxels"]
        return (
            f"starting: a call for one voxel takes {ours['start_us']:.1f} of the {ours_us:.1f} "
            f"µs, each voxel with its weight {each_ns:.2f} ns"
        )
    return "not known: nothing was measured beside it"


def _slowest(row: Row) -> str:
    steps = sorted(row["steps_ms"].items(), key=lambda step: -step[1])[:3]
    parts = ", ".join(f"{step} {ms:.2f} ms" for step, ms in steps)
    return (
        f"most of ours is {parts}; its fastest volume took {row['min_ms']:.2f} ms, "
        f"{row['peer_ms'] / row['min_ms']:.0f} times less"
    )


def _memory(row: Row, peer_ms: float) -> str:
    return (
        f"memory: at {row['stream_gb_s']:.0f} GB/s of the stream the least bytes take "
        f"{row['allowed_ms']:.3f} ms, so that at most {peer_ms / row['allowed_ms']:.1f} times are "
        f"possible; ours takes {row['of_allowed']:.2f} times as long as they"
    )

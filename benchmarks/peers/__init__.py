"""The same work by whatever else does it: time beside accuracy, stage by stage, and in all."""

from collections.abc import Iterator

from ..measure import Plan, Row, Tables
from ..tables import Layout, number, text
from . import baseline, decode, glm, motion, smoothing, whole

ASKED, ASKED_OF_ALL = 5, 40
"""How many times faster than its fastest peer a stage is to be, and the whole."""

LAYOUTS = {
    "peers": Layout(
        "Each stage beside its fastest peer, from the tables below",
        (
            ("grid", text("grid")),
            ("stage", text("stage")),
            ("ours ms", number(3, "median_ms")),
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
    **whole.LAYOUTS,
    **decode.LAYOUTS,
    **motion.LAYOUTS,
    **smoothing.LAYOUTS,
    **baseline.LAYOUTS,
    **glm.LAYOUTS,
}


def run(plan: Plan) -> Tables:
    """Return the rows of each stage's tables, and of the table ``peers`` made from them."""
    tables: Tables = {}
    for stage in (whole, decode, motion, smoothing, baseline, glm):
        tables |= stage.run(plan)
    return {"peers": list(summary(tables))} | tables


def summary(tables: Tables) -> Iterator[Row]:
    """Yield a row for each grid and stage that has a peer in *tables*.

    Where ours is not as much faster as is asked for, ``why`` tells what was measured beside it.
    """
    rows = {name: [row for row in table if "median_ms" in row] for name, table in tables.items()}
    for row in rows["whole"]:
        peer = "python-rtspm + NumPy GLM", row["peer_ms"]
        errors = "motion, rms mm", row["rms_mm"], row["peer_rms_mm"]
        why = f"{row['peer_ms'] - row['glm_ms']:.0f} ms of the peer's are python-rtspm's"
        yield _row(row["grid"], "whole chain", row["median_ms"], peer, errors, why, ASKED_OF_ALL)
    yield from _decode(rows["decode"])
    yield from _motion([row for row in tables["motion"] if "estimate_ms" in row])
    yield from _smoothing(rows["smoothing"])
    for row in rows["baseline"]:
        stage, (name, peer_ms) = f"baseline, {row['caches']} caches", _fastest(row)
        peer = _SHOWN[name], peer_ms
        errors = "error of z", row["z_error"]["fused"], row["z_error"]["numpy_in_place"]
        yield _row(row["grid"], stage, row["median_ms"], peer, errors, _memory(row))
    for row in rows["glm"]:
        if row["times_faster"]:
            stage, (name, peer_ms) = f"GLM, {row['caches']} caches", _fastest(row)
            peer = _SHOWN.get(name, name), peer_ms
            theirs = row["t_error"][name.removesuffix("_in_place")]
            errors = "error of t", row["t_error"]["ours"], theirs
            yield _row(row["grid"], stage, row["median_ms"], peer, errors, _memory(row))


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


def _memory(row: Row) -> str:
    return (
        f"memory: at {row['stream_gb_s']:.0f} GB/s of the stream the least bytes take "
        f"{row['allowed_ms']:.3f} ms, ours takes {row['of_allowed']:.2f} times that"
    )


def _of_grid(rows: list[Row]) -> Iterator[tuple[str, dict[str, Row]]]:
    """Yield each grid and its rows by tool."""
    for grid in dict.fromkeys(row["grid"] for row in rows):
        yield grid, {row["tool"]: row for row in rows if row["grid"] == grid}


def _decode(rows: list[Row]) -> Iterator[Row]:
    for grid, by_tool in _of_grid(rows):
        peers = [by_tool[name] for name in ("pydicom", "dicomsdl") if name in by_tool]
        ours, peer = by_tool[decode.OURS], min(peers, key=lambda row: row["median_ms"])
        bare_ms = by_tool["read + cut alone"]["median_ms"]
        why = (
            f"reading and cutting alone take {bare_ms:.3f} ms of it; only ours also tells "
            "geometry, TR and slice times"
        )
        wrong = [float(row["voxels"] != "identical") for row in (ours, peer)]
        errors = "other voxels", wrong[0], wrong[1]
        yield _row(
            grid,
            "decode",
            ours["median_ms"],
            (peer["tool"], peer["median_ms"]),
            errors,
            why,
        )


def _motion(rows: list[Row]) -> Iterator[Row]:
    for grid, by_tool in _of_grid(rows):
        ours = by_tool.pop(motion.OURS)
        for stage in ("estimate", "reslice"):
            key = f"{stage}_ms"
            if by_tool:
                peer = min(by_tool.values(), key=lambda row: row[key])
                errors = "motion, rms mm", ours["rms_mm"], peer["rms_mm"]
                found = peer["tool"], peer[key]
                yield _row(grid, f"motion, {stage}", ours[key], found, errors, "")


def _smoothing(rows: list[Row]) -> Iterator[Row]:
    for grid, by_tool in _of_grid(rows):
        ours = by_tool.pop(smoothing.OURS)
        if by_tool:
            peer = min(by_tool.values(), key=lambda row: row["median_ms"])
            errors = "deviation, ppm", ours["deviation_ppm"], peer["deviation_ppm"]
            found = peer["tool"], peer["median_ms"]
            yield _row(grid, "smoothing", ours["median_ms"], found, errors, "")

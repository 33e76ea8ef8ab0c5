"""Means of regions: ours beside NumPy and scipy."""

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend, RoiTable
from rtfmri.stages.roi import roi_table
from rtfmri.volume import Grid

from ..measure import Clock, Plan, Row, Tables, grid_name, peers_clock, statistics_ms, take_turns
from ..phantom import Phantom
from ..tables import Layout, number, text
from .turns import OURS

RADIUS_MM = 10.0
_CENTRES_MM = (-34.0, -12.0, 18.0), (34.0, -12.0, 18.0), (0.0, 40.0, 0.0), (0.0, -40.0, 0.0)

LAYOUTS = {
    "roi": Layout(
        "Means of four spheres of 10 mm, caches hot; the largest error as a part of the mean",
        (
            ("grid", text("grid")),
            ("tool", text("tool")),
            ("voxels", number(0, "n_voxels")),
            ("µs", lambda row: f"{1e3 * row['median_ms']:.2f}" if "median_ms" in row else "-"),
            (
                "of one voxel µs",
                lambda row: f"{row['start_us']:.2f}" if "start_us" in row else "-",
            ),
            ("times ours", number(1, "times_ours")),
            ("error, parts of 1e9", number(2, "error_ppb")),
        ),
    ),
}


def spheres(grid: Grid) -> NDArray[np.int32]:
    """Return which sphere each voxel is in, (x, y, z): 1 to 4, or 0 for none."""
    places_mm = np.indices(grid.shape).reshape(3, -1).T * grid.voxel_size_mm + grid.affine[:3, 3]
    labels = np.zeros(len(places_mm), np.int32)
    for i, centre_mm in enumerate(_CENTRES_MM, start=1):
        distances_mm = np.linalg.norm(places_mm - centre_mm, axis=1)
        labels[distances_mm <= max(RADIUS_MM, distances_mm.min())] = i
    return labels.reshape(grid.shape)


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``roi``, one a tool and grid."""
    rows: list[Row] = []
    for shape in plan.grids:
        plan.progress(f"means of regions, {grid_name(shape)}")
        rows += compare(plan.backend, plan.clock, shape, plan.rounds)
    return {"roi": rows}


def compare(backend: Backend, clock: Clock, shape: tuple[int, int, int], rounds: int) -> list[Row]:
    """Return a row a tool; all average the same volume, float32 as it is once smoothed."""
    phantom, where = Phantom(shape), {"grid": grid_name(shape)}
    labels = spheres(phantom.grid)
    numbers = list(range(1, len(_CENTRES_MM) + 1))
    volume = phantom.volume(0, np.zeros(6)).astype(np.float32)
    flat = volume.reshape(-1, order="F")
    inside = [np.flatnonzero(labels.reshape(-1, order="F") == i) for i in numbers]
    exact = np.array([flat[voxels].astype(np.float64).mean() for voxels in inside])
    voxels, means = backend.copy(flat), backend.zeros(len(numbers), np.float64)
    table = _on(backend, {str(i): labels == i for i in numbers})
    one_voxel = np.zeros(shape, np.bool_)
    one_voxel[0, 0, 0] = True
    smallest, one_mean = _on(backend, {"one": one_voxel}), backend.zeros(1, np.float64)

    def ours() -> Any:
        backend.roi_means(voxels, table, means)
        return means

    peers: dict[str, Callable[[], Any]] = {
        "NumPy": lambda: [flat[within].mean(dtype=np.float64) for within in inside]
    }
    missing: list[Row] = []
    if find_spec("scipy"):
        from scipy import ndimage

        peers["scipy.ndimage"] = partial(ndimage.mean, volume, labels, numbers)
    else:
        missing.append({**where, "tool": "scipy.ndimage is not installed"})
    host, start = peers_clock(clock), "start"
    seconds = take_turns(
        {
            OURS: clock.timer(ours, cold=False),
            start: clock.timer(lambda: backend.roi_means(voxels, smallest, one_mean), cold=False),
            **{name: host.timer(call, cold=False) for name, call in peers.items()},
        },
        rounds,
        cold=False,
        slow=["scipy.ndimage"],
    )
    start_us = 1e6 * statistics.median(seconds.pop(start))
    found = {OURS: backend.download(ours()), **{name: call() for name, call in peers.items()}}
    ours_s = statistics.median(seconds[OURS])
    rows: list[Row] = [
        {
            **where,
            "tool": name,
            "n_voxels": sum(within.size for within in inside),
            **statistics_ms(values),
            "times_ours": statistics.median(values) / ours_s,
            "error_ppb": float(1e9 * np.abs(np.array(found[name]) / exact - 1).max()),
        }
        for name, values in seconds.items()
    ]
    rows[0]["start_us"] = start_us
    return [*rows, *missing]


def _on(backend: Backend, regions: dict[str, NDArray[np.bool_]]) -> RoiTable:
    return RoiTable(*(backend.copy(part) for part in roi_table(regions)))

"""The whole path of a volume: from a Siemens mosaic's pixels to the ROIs' values."""

import time
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend
from rtfmri.config import Config, GlmSettings, SmoothingSettings
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import Pipeline, Result
from rtfmri.volume import Grid, Volume, tiled, untiled

from .measure import Clock, Plan, Tables, grid_name
from .phantom import Phantom, drifting
from .tables import Layout, number, text

N_PUSHES = 200
"""Volumes that are timed with hot and with cold caches each, after `_FIRST` that are not."""
_FIRST = 10
FWHM_MM = 6.0
_ROIS_MM = {"left": (-34.0, -12.0, 18.0), "right": (34.0, -12.0, 18.0)}
_ROI_RADIUS_MM = 10.0
_TR_S = 1.0
_TASKS, _BLOCK_S = ("left", "right"), 15.0
"""They take turns, with as much rest before each."""
TOTAL, FILE = "total", "decode of a DICOM file"


LAYOUTS = {
    "chain": Layout(
        "A volume's whole way, from a mosaic's pixels to the ROIs' values",
        (
            ("grid", text("grid")),
            ("step", text("step")),
            *(
                (f"{caches} {name}", number(3, caches, f"{name}_ms"))
                for caches in ("hot", "cold")
                for name in ("p50", "p99", "min")
            ),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``chain``, one a grid and step."""
    rows = []
    for shape in plan.grids:
        plan.progress(f"the whole chain, {grid_name(shape)}")
        rows += _rows(plan.backend, plan.clock, shape)
    return {"chain": rows}


def _rows(backend: Backend, clock: Clock, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    phantom = Phantom(shape)
    images = drifting(phantom)
    mosaics = [tiled(image) for image in images]
    pipeline = _pipeline(backend, phantom)

    def push(i: int) -> Result:
        arrived_s = time.perf_counter()
        data = untiled(mosaics[i % len(mosaics)], shape)
        return pipeline.push(Volume(data, phantom.grid, i, tr_s=_TR_S, arrived_s=arrived_s))

    for i in range(_FIRST):
        push(i)
    steps: dict[str, dict[str, list[float]]] = {"hot": {}, "cold": {}}
    for i in range(_FIRST, _FIRST + 2 * N_PUSHES):
        caches = "hot" if i < _FIRST + N_PUSHES else "cold"
        if caches == "cold":
            clock.largest()
            backend.synchronize()
        result = push(i)
        for step, ms in (*result.stage_ms.items(), (TOTAL, result.latency_ms)):
            steps[caches].setdefault(step, []).append(ms)
    if backend.name == "cpu" and find_spec("pydicom") and find_spec("nibabel"):
        steps["hot"][FILE] = _decode_ms(images, phantom.grid)
    return [
        {
            "grid": grid_name(shape),
            "step": step,
            "n": len(values_ms),
            **{
                caches: _percentiles_ms(values[step])
                for caches, values in steps.items()
                if step in values
            },
        }
        for step, values_ms in steps["hot"].items()
        if any(values_ms)
    ]


def _pipeline(backend: Backend, phantom: Phantom) -> Pipeline:
    device: Any = backend.name
    config = Config(
        device=device,
        smoothing=SmoothingSettings(fwhm_mm=FWHM_MM),
        # A bare GPU machine has no nilearn, which convolves the events.
        glm=GlmSettings(noise="ols" if find_spec("nilearn") else "off"),
    )
    rois = {name: _sphere(phantom.grid, place_mm) for name, place_mm in _ROIS_MM.items()}
    n_volumes = _FIRST + 2 * N_PUSHES
    return Pipeline(
        phantom.grid,
        config,
        paradigm=Paradigm(_blocks(n_volumes * _TR_S), config.paradigm, config.baseline),
        rois=rois,
        mask=phantom.mask(),
        n_volumes=n_volumes,
    )


def _blocks(run_s: float) -> list[Event]:
    onsets_s = np.arange(_BLOCK_S, run_s, 2 * _BLOCK_S).tolist()
    return [Event(onset_s, _BLOCK_S, task) for onset_s, task in zip(onsets_s, cycle(_TASKS))]


def _decode_ms(images: Sequence[NDArray[np.int16]], grid: Grid) -> list[float]:
    """Return the times of `rtfmri.readers.dicom.decode` on whole files, header and all."""
    from rtfmri.readers.dicom import decode
    from rtfmri.simulator.dicom import mosaic_dataset

    files = []
    for i, image in enumerate(images):
        file = BytesIO()
        dataset = mosaic_dataset(image, grid, index=i, tr_s=_TR_S, series_uid="1.2.3")
        dataset.save_as(file, enforce_file_format=True)
        files.append(file.getvalue())
    times_ms = []
    for i in range(N_PUSHES):
        started_s = time.perf_counter()
        decode(files[i % len(files)])
        times_ms.append(1e3 * (time.perf_counter() - started_s))
    return times_ms


def _percentiles_ms(values_ms: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values_ms, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "min_ms": min(values_ms)}


def _sphere(grid: Grid, centre_mm: Sequence[float]) -> NDArray[np.float32]:
    voxels = np.indices(grid.shape).reshape(3, -1)
    places_mm = (grid.affine[:3, :3] @ voxels).T + grid.affine[:3, 3]
    distances_mm = np.linalg.norm(places_mm - centre_mm, axis=1)
    inside = distances_mm <= max(_ROI_RADIUS_MM, distances_mm.min())
    weights: NDArray[np.float32] = inside.reshape(grid.shape).astype(np.float32)
    return weights

"""Recordings of small simulated runs whose content a test knows."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory import plain
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import Pipeline
from rtfmri.recording import Recorder
from rtfmri.volume import Grid, Volume

TR_S = 2.0
EVENTS = (Event(20, 20, "left hand"), Event(60, 20, "left hand"))
GRID = Grid(
    (16, 18, 12), np.array([[-3, 0, 0, 24], [0, 3, 0.5, -27], [0, -0.4, 3.5, -20], [0, 0, 0, 1]])
)
ACTIVE = (slice(3, 6), slice(8, 11), slice(5, 8))
EFFECT = 30


def head(grid: Grid = GRID) -> NDArray[np.bool_]:
    """An ellipsoid in the middle of the grid."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n + 2)[1:-1] for n in grid.shape), indexing="ij")
    return np.asarray(sum(axis**2 for axis in axes) < 0.85)


def roi(grid: Grid = GRID) -> NDArray[np.float32]:
    """The active voxels."""
    weights = np.zeros(grid.shape, np.float32)
    weights[ACTIVE] = 1
    return weights


def volumes(n: int, events: Sequence[Event] = EVENTS, grid: Grid = GRID) -> list[Volume]:
    """A head of 1000 in air of 20, noise of sd 5; ACTIVE rises by EFFECT 5 s after an event."""
    rng = np.random.default_rng(7)
    still = np.where(head(grid), 1000.0, 20.0)
    made = []
    for index in range(n):
        data = still + rng.normal(0, 5, grid.shape)
        moment_s = (index + 0.5) * TR_S - 5
        if any(e.onset_s <= moment_s < e.onset_s + e.duration_s for e in events):
            data[ACTIVE] += EFFECT
        made.append(Volume(np.asfortranarray(data, np.int16), grid, index, TR_S))
    return made


def record(
    path: Path,
    run: Sequence[Volume],
    *,
    events: Sequence[Event] = EVENTS,
    rois: Mapping[str, NDArray[Any]] | None = None,
    broken: bool = False,
    skipped: Sequence[str] = (),
    **settings: Any,
) -> Pipeline:
    """Process and record a run; *broken* leaves the file as a killed process does."""
    config = plain(**settings)
    paradigm = Paradigm(events, config.paradigm, config.baseline)
    first = run[0]
    pipeline = Pipeline(
        first.grid, config, paradigm=paradigm, rois=rois, tr_s=TR_S, dtype=first.data.dtype
    )
    growing = path.with_suffix(".growing")
    recorder = Recorder(
        growing,
        grid=first.grid,
        tr_s=TR_S,
        dtype=first.data.dtype,
        config=config,
        paradigm=paradigm,
        rois=rois,
        design=pipeline.design,
    )
    for volume in run:
        now_s = time.perf_counter()
        arrived = replace(volume, arrived_s=now_s, decoded_s=now_s)
        recorder.append(arrived, pipeline.push(arrived))
    for reason in skipped:
        recorder.note("skipped", reason)
    if broken:
        shutil.copy(growing, path)
    recorder.close(pipeline.run_maps())
    if not broken:
        growing.rename(path)
    return pipeline

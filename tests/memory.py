"""Volumes from memory: a reader whose content a test knows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np

from rtfmri.config import Config, MaskSettings, MotionSettings
from rtfmri.paradigm import Event as TaskEvent
from rtfmri.readers import RunEnd, Skipped
from rtfmri.volume import Grid, Volume

TR_S = 2.0
GRID = Grid((9, 8, 7), np.diag([3.0, 3.0, 3.5, 1.0]))
EVENTS = (TaskEvent(20.0, 20.0, "tap"), TaskEvent(60.0, 20.0, "tap"))
ACTIVE = (slice(2, 5), slice(2, 5), slice(2, 4))


def volumes(n: int, *, seed: int = 0, dtype: type = np.int16, grid: Grid = GRID) -> list[Volume]:
    """Noise of sd 5 around 1000; ACTIVE rises by 3 % in EVENTS, 5 s late."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        data = rng.normal(1000, 5, grid.shape[::-1]).T
        moment_s = (i + 0.5) * TR_S - 5
        if any(e.onset_s <= moment_s < e.onset_s + e.duration_s for e in EVENTS):
            data[ACTIVE] += 30
        made.append(Volume(np.asfortranarray(data, dtype=dtype), grid, i, TR_S))
    return made


def plain(**settings: Any) -> Config:
    """Settings of a run on the CPU whose voxels are compared as they come, all of them."""
    motion, mask = MotionSettings(mode="off"), MaskSettings(source="none")
    return Config(**{"device": "cpu", "motion": motion, "mask": mask, **settings})


class MemoryReader:
    """Gives *items* as a reader would; an exception among them is raised, a pause is waited for.

    The next iteration goes on where a `RunEnd` ended the last one.
    """

    def __init__(
        self,
        items: Sequence[Volume | Skipped | RunEnd | Exception | Event],
        *,
        live: bool = False,
    ) -> None:
        self.items = iter(items)
        self.live = live
        self.n_volumes: int | None = len(items)
        self.closed = False

    def __iter__(self) -> Iterator[Volume | Skipped | RunEnd]:
        for item in self.items:
            if self.closed:
                return
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Event):
                assert item.wait(30)
                continue
            now_s = time.perf_counter()
            yield (
                replace(item, arrived_s=now_s, decoded_s=now_s)
                if isinstance(item, Volume)
                else item
            )
            if isinstance(item, RunEnd):
                return

    def close(self) -> None:
        self.closed = True

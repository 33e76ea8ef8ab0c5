"""A scanner in a process of its own: ``python sender.py TARGET 64x64x48 N_VOLUMES PACE_S``.

Writes, as JSON, when each volume began to be sent and when that was done, or why nothing was sent.
"""

import json
import sys
import time
from collections.abc import Iterator

import numpy as np

from rtfmri.errors import RtfmriError
from rtfmri.simulator.targets import open_target
from rtfmri.volume import Grid, Volume


def volumes(shape: tuple[int, ...], n_volumes: int, tr_s: float) -> Iterator[Volume]:
    """Return volumes that share a few images: noise, so that nothing can be compressed."""
    rng = np.random.default_rng(0)
    grid = Grid((shape[0], shape[1], shape[2]), np.diag([3.0, 3.0, 3.0, 1.0]))
    images = [np.asfortranarray(rng.integers(0, 4000, shape, np.int16)) for _ in range(4)]
    return (Volume(images[i % 4], grid, i, tr_s) for i in range(n_volumes))


def send(
    target: str, shape: tuple[int, ...], n_volumes: int, pace_s: float
) -> tuple[list[float], list[float]]:
    """Send volumes at their pace; return `time.perf_counter` before and after each."""
    before_s, after_s = [], []
    out = open_target(target)
    start_s = time.perf_counter()
    for volume in volumes(shape, n_volumes, pace_s):
        time.sleep(max(0.0, start_s + volume.index * pace_s - time.perf_counter()))
        before_s.append(time.perf_counter())
        out.send(volume)
        after_s.append(time.perf_counter())
    out.close()
    return before_s, after_s


if __name__ == "__main__":
    try:
        shape_text = sys.argv[2].split("x")
        found: object = send(
            sys.argv[1], tuple(map(int, shape_text)), int(sys.argv[3]), float(sys.argv[4])
        )
    except (RtfmriError, ImportError) as error:
        found = str(error)
    print(json.dumps(found))

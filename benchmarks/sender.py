"""A scanner in a process of its own: ``sender.py TARGET IMAGES.npz N_VOLUMES PACE_S N_ASKED``.

The first N_ASKED volumes (at least 1) are sent one for each line that comes in, the others at
their pace. When all are sent it writes null, or why nothing was sent, and is still until its input
ends: so the last volume meets the same machine as the others. Then it writes when each volume
began to be sent, and when that was done. All of that is JSON.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import RtfmriError
from rtfmri.simulator.targets import open_target
from rtfmri.volume import Grid, Volume


def save_images(path: Path, images: Sequence[NDArray[np.int16]], grid: Grid) -> None:
    """Write what a sender sends, (x, y, z) each, for its command line."""
    np.savez(path, images=np.stack([image.T for image in images]), affine=grid.affine)


def volumes(path: Path, n_volumes: int, tr_s: float) -> Iterator[Volume]:
    """Return volumes of a run, the images of *path* in turn."""
    with np.load(path) as saved:
        images, affine = saved["images"], saved["affine"]
    grid = Grid(images.shape[:0:-1], affine)
    return (Volume(images[i % len(images)].T, grid, i, tr_s) for i in range(n_volumes))


def send(
    target: str, images: Path, n_volumes: int, pace_s: float, n_asked: int
) -> tuple[list[float], list[float]]:
    """Send volumes at their pace; return `time.perf_counter` before and after each."""
    before_s, after_s = [], []
    out = open_target(target)
    start_s = 0.0
    for volume in volumes(images, n_volumes, pace_s):
        if volume.index < n_asked:
            if not sys.stdin.readline():
                break  # nobody asks any more
            start_s = time.perf_counter() - volume.index * pace_s
        else:
            time.sleep(max(0.0, start_s + volume.index * pace_s - time.perf_counter()))
        before_s.append(time.perf_counter())
        out.send(volume)
        after_s.append(time.perf_counter())
    print("null", flush=True)
    sys.stdin.read()
    out.close()
    return before_s, after_s


if __name__ == "__main__":
    where, path, *numbers = sys.argv[1:]
    n_sent, n_first = int(numbers[0]), int(numbers[2])
    try:
        print(json.dumps(send(where, Path(path), n_sent, float(numbers[1]), n_first)))
    except (RtfmriError, ImportError) as error:
        print(json.dumps(str(error)))
        sys.exit(1)

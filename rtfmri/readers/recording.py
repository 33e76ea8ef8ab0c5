"""A recording as a source: its volumes once more, in the order in which they were processed."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from rtfmri.errors import VolumeError
from rtfmri.readers.replay import Replay, Step
from rtfmri.recording import Recording, open_recording
from rtfmri.volume import Volume


def replay_recording(path: Path, tr_s: float | None, speed: float | None) -> Replay:
    """Open an HDF5 recording, finished or not.

    Raises
    ------
    RecordingError
        If it cannot be read.
    """
    recording = open_recording(path)
    tr_s = tr_s or recording.tr_s
    n_volumes = recording.n_volumes

    def steps() -> Iterator[Step]:
        with recording:
            for row, index in enumerate(recording.results["index"][:n_volumes].tolist()):
                yield Step(f"volume {index}", index, partial(_load, recording, row, tr_s))

    return Replay(steps(), n_volumes=n_volumes, tr_s=tr_s, speed=speed)


def _load(recording: Recording, row: int, tr_s: float) -> Volume:
    try:
        return replace(recording.volume(row), tr_s=tr_s)
    except OSError:
        raise VolumeError("cannot be read from the recording") from None

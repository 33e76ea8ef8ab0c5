"""Plays a run as a scanner would: each volume is sent when its acquisition has ended."""

import time
from collections.abc import Callable, Iterable, Sequence

from rtfmri.errors import ConfigError
from rtfmri.simulator.faults import Fault, check_faults, script
from rtfmri.simulator.targets import Target, open_target
from rtfmri.volume import Volume


def play(
    reader: Iterable[object],
    target: str | Target,
    *,
    speed: float | None = 1.0,
    faults: Sequence[Fault] = (),
    on_volume: Callable[[int], None] | None = None,
    on_fault: Callable[[Fault], None] | None = None,
) -> int:
    """Send the volumes of *reader* to *target* at the pace of the TR.

    Parameters
    ----------
    reader : iterable
        Its `Volume` items are played; anything else in it is ignored.
    target : str or Target
        What `open_target` understands, such as ``folder:DIR`` or ``dicom://:11112``. It is closed
        at the end, whatever happens.
    speed : float or None
        Volume i is sent ``(i + 1) * tr_s / speed`` seconds after the start; None: at once. The
        seconds of faults pass faster, too.
    faults : sequence of Fault
        What goes wrong.
    on_volume : callable, optional
        Called with the index of each volume when it has been sent, whole and for the first time.
    on_fault : callable, optional
        Called with each fault when it begins.

    Returns
    -------
    int
        Number of the reader's volumes that were sent whole.

    Raises
    ------
    ConfigError
        If the target is not in the grammar, the speed is not above 0, a fault is of a volume that
        is not in the run, or the volumes are not what the target can carry.
    RecordingError
        If the target cannot be written, is not there, refuses a volume or goes away.
    """
    if speed is not None and not 0 < speed < float("inf"):
        raise ConfigError(f"speed must be above 0, or None for at once, got {speed}")
    check_faults(faults, getattr(reader, "n_volumes", None))
    if isinstance(target, str):
        target = open_target(target)
    volumes = (item for item in reader if isinstance(item, Volume))
    n_sent = 0
    try:
        start_s = time.perf_counter()
        for act in script(volumes, faults, on_fault):
            if speed is not None:
                time.sleep(max(0.0, start_s + act.due_s / speed - time.perf_counter()))
            if act.volume is None:
                target.die()
                continue
            target.send(act.volume, stranger=act.stranger, share=act.share)
            n_sent += act.counts
            if act.counts and on_volume is not None:
                on_volume(act.volume.index)
    finally:
        target.close()
    return n_sent

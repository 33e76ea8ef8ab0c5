"""Plays a run as a scanner would: one file a volume, when its acquisition has ended."""

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np

from rtfmri.errors import ConfigError, RecordingError
from rtfmri.simulator.dicom import write_mosaic
from rtfmri.volume import Volume

GRAMMAR = "folder:DIR, folder:DIR?format=dicom or folder:DIR?format=nifti"


def play(
    reader: Iterable[object],
    target: str,
    *,
    speed: float | None = 1.0,
    on_volume: Callable[[int], None] | None = None,
) -> int:
    """Write the volumes of *reader* to *target* at the pace of the TR.

    Parameters
    ----------
    reader : iterable
        Its `Volume` items are played; anything else in it is ignored.
    target : str
        ``folder:DIR``, with ``?format=dicom`` (Siemens mosaics, the default) or
        ``?format=nifti``. The folder is made where it is missing.
    speed : float or None
        Volume i appears ``(i + 1) * tr_s / speed`` seconds after the start; None: at once.
    on_volume : callable, optional
        Called with the index of each volume when its file is there.

    Returns
    -------
    int
        Number of volumes written.

    Raises
    ------
    ConfigError
        If the target is not in the grammar, the speed is not above 0, or a float32 volume is to
        become DICOM.
    RecordingError
        If the folder cannot be written, or holds a file of the name that is to be written.

    Notes
    -----
    Each file is written under a name that begins with a dot and then renamed, so that whoever
    watches the folder never sees a part of one.
    """
    folder, write, suffix = _parse(target)
    if speed is not None and not 0 < speed < float("inf"):
        raise ConfigError(f"speed must be above 0, or None for at once, got {speed}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordingError(f"cannot make the folder {folder}: {error}") from error
    series_uid = ""
    n_written = 0
    start_s = time.perf_counter()
    for volume in reader:
        if not isinstance(volume, Volume):
            continue
        series_uid = series_uid or _series_uid(volume)
        if speed is not None:
            due_s = start_s + (volume.index + 1) * volume.tr_s / speed
            time.sleep(max(0.0, due_s - time.perf_counter()))
        path = folder / f"001_000001_{volume.index + 1:06d}{suffix}"
        if path.exists():
            raise RecordingError(f"{path} exists already; play into an empty folder")
        unfinished = path.with_name(f".{path.name}")
        try:
            write(unfinished, volume, series_uid)
            unfinished.replace(path)
        except OSError as error:
            raise RecordingError(f"cannot write {path}: {error}") from error
        n_written += 1
        if on_volume is not None:
            on_volume(volume.index)
    return n_written


def _parse(target: str) -> tuple[Path, Callable[[Path, Volume, str], None], str]:
    scheme, _, rest = target.partition(":")
    folder, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    name = options.pop("format", "dicom")
    if scheme != "folder" or not folder or options or name not in _FORMATS:
        raise ConfigError(f"target must be {GRAMMAR}, got {target!r}")
    return Path(folder), *_FORMATS[name]


def _series_uid(first: Volume) -> str:
    """Return a UID that depends on the run alone: its first volume, grid and TR."""
    from pydicom.uid import generate_uid

    voxels = hashlib.sha256(first.flat.tobytes()).hexdigest()
    where, pace = str(first.grid.affine.tolist()), str(first.tr_s)
    return str(generate_uid(entropy_srcs=[voxels, where, pace]))


def _write_dicom(path: Path, volume: Volume, series_uid: str) -> None:
    if volume.data.dtype == np.float32:
        raise ConfigError(
            "a DICOM mosaic holds int16 or uint16 and these volumes are float32; "
            "use folder:DIR?format=nifti"
        )
    write_mosaic(
        path,
        volume.data,
        volume.grid,
        index=volume.index,
        tr_s=volume.tr_s,
        series_uid=series_uid,
        slice_times_s=volume.slice_times_s,
    )


def _write_nifti(path: Path, volume: Volume, series_uid: str) -> None:
    import nibabel

    image = nibabel.Nifti1Image(volume.data, volume.grid.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = volume.tr_s
    nibabel.save(image, path)


_FORMATS = {"dicom": (_write_dicom, ".dcm"), "nifti": (_write_nifti, ".nii")}

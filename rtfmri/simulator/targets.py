"""Where a simulated scanner sends its volumes: the Target protocol and the grammar of targets.

A target is named like the reader at its other end::

    folder:/export?format=slices&write=chunked  files: dicom (Siemens mosaics, the default), slices
                                                (GE, a file a slice) or nifti; atomic (the default:
                                                no part of one is ever seen) or chunked
    dicom://127.0.0.1:11112?ae=RTFMRI           a DICOM node (C-STORE); caller=SIMULATOR is us
    afni://:7961, mrd://:9002, murfi://:15000, pyneal://:5555, tcp://:5678, zmq://:5679
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from io import BytesIO
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qsl, unquote

from rtfmri.errors import ConfigError, RecordingError, SourceError
from rtfmri.readers.network import Address, Allowed, parse_address
from rtfmri.simulator.dicom import Series
from rtfmri.volume import Volume

if TYPE_CHECKING:
    from pydicom import Dataset

STREAMS = ("afni", "mrd", "murfi", "pyneal", "tcp", "zmq")
GRAMMAR = (
    "folder:DIR with ?format=dicom, slices or nifti and &write=atomic or chunked, "
    "dicom://HOST:PORT with ?ae=TITLE&caller=TITLE, or "
    + ", ".join(f"{name}://HOST:PORT" for name in STREAMS)
)
_N_PIECES = 4
_PAUSE_S = 0.002
"""In how many pieces, and with what pauses, a file is written in place."""
_ANYBODY = Allowed((ip_network("0.0.0.0/0"),))


class Target(Protocol):
    """Something that volumes are sent to, as a scanner would."""

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Send a volume.

        Parameters
        ----------
        volume : Volume
            Of the run, with its index.
        stranger : bool
            Send it as one of another series.
        share : float
            Below 1: send that share of its bytes, then break off.

        Raises
        ------
        RecordingError
            If it cannot be written, or nobody takes it.
        ConfigError
            If volumes of this kind cannot be sent this way.
        """
        ...

    def die(self) -> None:
        """Break off without saying goodbye; the next `send` comes back."""
        ...

    def close(self) -> None:
        """Say that the run is over, where the protocol can."""
        ...


def open_target(uri: str) -> Target:
    """Open what *uri* names, see the top of this module.

    Raises
    ------
    ConfigError
        If it is not in the grammar, or needs a package that is not installed.
    RecordingError
        If the folder cannot be made, or nobody is there.
    """
    scheme, _, rest = uri.partition(":")
    where, _, query = rest.partition("?")
    if scheme == "folder" and where:
        options = _options(uri, query, {"format": _FORMATS, "write": _WRITERS})
        return FolderTarget(Path(unquote(where)), **options)
    if scheme == "dicom":
        from rtfmri.simulator.cstore import DEFAULT_PORT, DicomTarget

        options = _options(uri, query, {"ae": None, "caller": None})
        return DicomTarget(_address(uri, where, DEFAULT_PORT), **options)
    if scheme in STREAMS:
        from rtfmri.simulator.streams import STREAM_TARGETS

        _options(uri, query, {})
        return STREAM_TARGETS[scheme](_address(uri, where, 0))
    raise ConfigError(f"target must be {GRAMMAR}; got {uri!r}")


def _options(
    uri: str, query: str, allowed: Mapping[str, Mapping[str, object] | None]
) -> dict[str, str]:
    """Read a query; the keys that are allowed have names to choose from, or take AE titles."""
    options: dict[str, str] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in allowed or key in options:
            raise ConfigError(f"target must be {GRAMMAR}; got {uri!r}")
        names = allowed[key]
        if names is not None and text not in names:
            raise ConfigError(f"{key} must be one of {', '.join(names)}; got {uri!r}")
        if names is None and not re.fullmatch(r"[\x21-\x5b\x5d-\x7e]{1,16}", text):
            raise ConfigError(f"{key} must be an AE title of up to 16 characters; got {uri!r}")
        options[key] = text
    return options


def _address(uri: str, where: str, default_port: int) -> Address:
    try:
        return parse_address(where, default_port, _ANYBODY)
    except SourceError as error:
        raise ConfigError(f"{error}, in {uri!r}") from None


class FolderTarget:
    """A folder that is filled as a scanner does it; it is made where it is missing.

    Parameters
    ----------
    folder : Path
        May hold other files, but none of the names that are to be written.
    format : {"dicom", "slices", "nifti"}
        Siemens mosaics, GE's slices, or NIfTI. The latter names no series: a stranger has another
        name, and that is all.
    write : {"atomic", "chunked"}
        Under a hidden name and then renamed, so that no part of a file is ever seen; or in place,
        piece by piece, as some scanners and shares do it.

    Raises
    ------
    RecordingError
        If the folder cannot be made.
    """

    def __init__(self, folder: Path, format: str = "dicom", write: str = "atomic") -> None:
        self._folder = folder
        self._encode, self._suffix = _FORMATS[format]
        self._write = _WRITERS[write]
        self._series = Series()
        self._n_written: Counter[str] = Counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordingError(f"cannot make the folder {folder}: {error}") from error

    def send(self, volume: Volume, *, stranger: bool = False, share: float = 1.0) -> None:
        """Write a volume; its second copy has another name."""
        files = self._encode(self._series, volume, stranger)
        n_left = int(share * sum(map(len, files)))
        for i, data in enumerate(files):
            name = f"001_{1 + stranger:06d}_{volume.index * len(files) + i + 1:06d}"
            self._put(name, data[:n_left])
            n_left -= len(data)
            if n_left <= 0:
                return

    def _put(self, name: str, data: bytes) -> None:
        self._n_written[name] += 1
        copy = f"-{self._n_written[name]}" if self._n_written[name] > 1 else ""
        path = self._folder / f"{name}{copy}{self._suffix}"
        if path.exists():
            raise RecordingError(f"{path} exists already; play into an empty folder")
        try:
            self._write(path, data)
        except OSError as error:
            raise RecordingError(f"cannot write {path}: {error}") from error

    def die(self) -> None:
        """Do nothing: there is no connection that could break."""

    def close(self) -> None:
        """Do nothing: a folder cannot say that a run is over."""


def _write_atomic(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _write_chunked(path: Path, data: bytes) -> None:
    size = -(-len(data) // _N_PIECES)
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(data), size):
            file.write(data[begin : begin + size])
            time.sleep(_PAUSE_S)


def _as_mosaic(series: Series, volume: Volume, stranger: bool) -> list[bytes]:
    return [_to_bytes(series.mosaic(volume, stranger))]


def _as_slices(series: Series, volume: Volume, stranger: bool) -> list[bytes]:
    return [_to_bytes(dataset) for dataset in series.slices(volume, stranger)]


def _to_bytes(dataset: "Dataset") -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _as_nifti(series: Series, volume: Volume, stranger: bool) -> list[bytes]:
    import nibabel

    image = nibabel.Nifti1Image(volume.data, volume.grid.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = volume.tr_s
    return [image.to_bytes()]


_FORMATS: dict[str, tuple[Callable[[Series, Volume, bool], list[bytes]], str]] = {
    "dicom": (_as_mosaic, ".dcm"),
    "slices": (_as_slices, ".dcm"),
    "nifti": (_as_nifti, ".nii"),
}
_WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "atomic": _write_atomic,
    "chunked": _write_chunked,
}

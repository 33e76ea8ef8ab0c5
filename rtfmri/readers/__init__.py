"""Where volumes come from: the Reader protocol and the grammar that names sources.

A source is a path, which is played back as it lies there, or a URI::

    run.nii.gz                                  a 4-D NIfTI file
    scans/                                      a folder of 3-D NIfTI files, or of DICOM files
    run.h5                                      a recording
    folder:/export?count=155&timeout_s=30       a folder, live: files that arrive from now on
    dicom://127.0.0.1:11112?ae=RTFMRI           a DICOM node to which the scanner sends (C-STORE)
    afni://:7961                                AFNI's real-time protocol
    mrd://:9002                                 an MRD (ISMRMRD) stream
    murfi://:15000                              Siemens' vSend, as murfi reads it
    pyneal://:5555                              Pyneal's ZeroMQ protocol
    tcp://:5678, zmq://:5679                    our own, for those who write a sender themselves
    simulator:finger-tapping?volumes=150        a scanner that is not there

A new transport is one module and one entry in `SCHEMES`; one of somebody else's is an entry point
of the group ``rtfmri.readers``, named like its scheme, that is a `Scheme`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote

from rtfmri.errors import ConfigError, SourceError
from rtfmri.readers.network import parse_allowed
from rtfmri.volume import Volume

_Scheme = TypeVar("_Scheme")
OTHER_SERIES = "belongs to another series"
CUT_SHORT = "is cut short"
"""Reasons that several transports have."""

_OWN_NAME = re.compile(r"(volume|object|file) \d+( \([0-9a-z ]+ slices\))?|an? [a-z]+|listener")
_END_OF_NAME = re.compile(
    r"\d{0,6}(\.(dcm|ima|nii|nii\.gz|par|rec|tsv|txt|json))?$", re.IGNORECASE
)


class Skipped(NamedTuple):
    """Something arrived that is no volume of this run."""

    name: str
    """Of the file, without its folder, or "volume 7", "object 12" and the like."""
    reason: str
    """In words; holds nothing from the file's header that could name a participant."""

    @property
    def label(self) -> str:
        """The name as it may be written down: scanners call files after their participants."""
        if _OWN_NAME.fullmatch(self.name):
            return self.name
        end = _END_OF_NAME.search(self.name)
        return f"a file (…{end[0]})" if end and end[0] else "a file"


class RunEnd(NamedTuple):
    """The run is over, as far as the source can tell."""

    reason: str
    """How that was recognised, in words."""


class Reader(Protocol):
    """A source of volumes, iterated once; a live one once for each run.

    A `Volume` leaves with ``arrived_s`` and ``decoded_s`` stamped. What cannot be used leaves as
    `Skipped`, never as an exception. Volumes may come late, doubled, out of order or with another
    grid: that is for the session to judge.
    """

    live: bool
    """Whether a scanner sets the pace; a live source is not to be held up."""
    n_volumes: int | None
    """How many volumes are expected, where that is known."""

    def __iter__(self) -> Iterator[Volume | Skipped | RunEnd]:
        """Give volumes as they come; ends with the run, a `RunEnd` at most last, or `close`."""
        ...

    def close(self) -> None:
        """Let a blocked iteration end soon; may be called from another thread, and twice."""
        ...


Option = Callable[[str], Any]
"""Parses the text of one query key; a ValueError says in words what is allowed."""


class Scheme(NamedTuple):
    """What stands behind ``scheme:target?key=value``."""

    open: Callable[..., Reader]
    """Called as ``open(target, tr_s, speed, **options)``."""
    options: Mapping[str, Option]


def open_reader(source: str, *, tr_s: float | None = None, speed: float | None = None) -> Reader:
    """Open a source of volumes.

    Parameters
    ----------
    source : str
        A path or a URI, see the top of this module. Characters like ``?`` or ``%`` in a URI's
        path are percent-encoded.
    tr_s : float, optional
        Repetition time in seconds; overrules the headers'.
    speed : float, optional
        Pace of a replay: 1 is the TR's, 20 is twenty times faster; None is as fast as it goes.

    Raises
    ------
    SourceError
        If there is no such source, it holds no volumes, its query is not understood, or it knows
        no repetition time and none is given.
    ConfigError
        If tr_s or speed is no positive number.
    """
    for name, value in (("tr_s", tr_s), ("speed", speed)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} must be a number above 0, got {value}")
    uri = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", source)
    scheme = find_scheme(uri[1], SCHEMES, "rtfmri.readers") if uri else None
    if not uri or (not scheme and Path(source).exists()):
        return _open_path(Path(source), tr_s, speed)
    if not scheme:
        known = ", ".join(f"{name}:" for name in sorted(SCHEMES))
        raise SourceError(f"source must be a path or begin with one of {known}; got {source!r}")
    target, _, query = source[uri.end() :].partition("?")
    options = parse_query(query, scheme.options, source)
    return scheme.open(unquote(target), tr_s, speed, **options)


def parse_query(query: str, allowed: Mapping[str, Option], source: str) -> dict[str, Any]:
    """Return the options of a URI's *query*, of those that are *allowed*.

    Raises
    ------
    SourceError
        If a key is unknown or given twice, or its text is not understood.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise SourceError(f"a query is key=value&key=value, got {query!r} in {source!r}") from None
    options: dict[str, Any] = {}
    for key, text in pairs:
        if key not in allowed:
            names = ", ".join(sorted(allowed))
            raise SourceError(f"{key!r} is not a key of {source!r}; allowed are {names}")
        if key in options:
            raise SourceError(f"{key} must be given once in {source!r}")
        try:
            options[key] = allowed[key](text)
        except ValueError as error:
            raise SourceError(f"{key} must be {error}, got {text!r} in {source!r}") from None
    return options


def _whole(least: int) -> Option:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise ValueError(f"a whole number, {least} or more")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ValueError("a number of seconds above 0")
    return value


def _number(least: float, most: float, unit: str) -> Option:
    def parse(text: str) -> float:
        value = _seconds(text) if re.fullmatch(r"[0-9.]{1,12}", text) else math.nan
        if not least <= value <= most:
            raise ValueError(f"a number of {unit} from {least:g} to {most:g}")
        return value

    return parse


def _echo(text: str) -> int | None:
    return None if text == "combine" else _whole(1)(text)


def _titles(text: str) -> tuple[str, ...]:
    titles = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"[\x21-\x5b\x5d-\x7e]{1,16}", title) for title in titles):
        raise ValueError("AE titles of up to 16 characters, such as SCANNER1,SCANNER2")
    return titles


def _title(text: str) -> str:
    (title,) = _titles(text.replace(",", " "))
    return title


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def _existing(text: str) -> str:
    if text not in ("skip", "use"):
        raise ValueError("skip or use")
    return text


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){2}", text):
        raise ValueError("three whole numbers like 64x64x36")
    return tuple(int(n) for n in text.split("x"))


def _open_path(path: Path, tr_s: float | None, speed: float | None) -> Reader:
    if path.is_dir():
        from rtfmri.readers.folder import replay_folder

        return replay_folder(path, tr_s, speed)
    if not path.exists():
        raise SourceError(f"no such file or folder: {path}")
    if path.suffix in (".h5", ".hdf5"):
        from rtfmri.readers.recording import replay_recording

        return replay_recording(path, tr_s, speed)
    if path.name.endswith((".nii", ".nii.gz")):
        from rtfmri.readers.nifti import replay_4d

        return replay_4d(path, tr_s, speed)
    raise SourceError(
        f"a source file must be .nii, .nii.gz or .h5, got {path}; for DICOM give the folder"
    )


def _opener(module: str, name: str) -> Callable[..., Reader]:
    """Return an opener of a live source that imports its module when it is needed."""

    def open_it(target: str, tr_s: float | None, speed: float | None, **options: Any) -> Reader:
        if speed is not None:
            raise ConfigError(f"speed is for replay; a live source has its own pace, got {speed}")
        opener = getattr(import_module(f"rtfmri.readers.{module}"), name)
        reader: Reader = opener(target, tr_s, **options)
        return reader

    return open_it


def _open_simulator(
    target: str, tr_s: float | None, speed: float | None, **options: Any
) -> Reader:
    from rtfmri.readers.simulator import replay_simulator

    return replay_simulator(target, tr_s, speed, **options)


_LIVE: dict[str, Option] = {"count": _whole(1), "timeout_s": _seconds}
_NETWORK: dict[str, Option] = {**_LIVE, "allow": parse_allowed}
_DICOM: dict[str, Option] = {
    "series": _whole(0),
    "echo": _echo,
    "echoes": _whole(1),
    "slices": _whole(1),
    "t2star_ms": _number(1, 1000, "ms"),
}

SCHEMES: dict[str, Scheme] = {
    "folder": Scheme(_opener("folder", "open_live"), {**_LIVE, **_DICOM, "existing": _existing}),
    "dicom": Scheme(
        _opener("cstore", "open_cstore"),
        {
            **_NETWORK,
            **_DICOM,
            "ae": _title,
            "callers": _titles,
            "certificate": Path,
            "key": Path,
            "authority": Path,
        },
    ),
    "afni": Scheme(_opener("afni", "open_afni"), _NETWORK),
    "mrd": Scheme(_opener("mrd", "open_mrd"), _NETWORK),
    "murfi": Scheme(_opener("murfi", "open_murfi"), _NETWORK),
    "pyneal": Scheme(_opener("pyneal", "open_pyneal"), _NETWORK),
    "tcp": Scheme(_opener("plain", "open_tcp"), _NETWORK),
    "zmq": Scheme(_opener("plain", "open_zmq"), _NETWORK),
    "simulator": Scheme(
        _open_simulator,
        {
            "volumes": _whole(1),
            "seed": _whole(0),
            "shape": _shape,
            "motion": _flag,
            "spikes": _flag,
        },
    ),
}
"""The URIs there are: scheme to opener and query keys."""


def find_scheme(name: str, schemes: Mapping[str, _Scheme], group: str) -> _Scheme | None:
    """Return one of *schemes*, or what an installed package has of that name in its *group*."""
    if name in schemes:
        return schemes[name]
    for point in entry_points(group=group, name=name):
        scheme: _Scheme = point.load()
        return scheme
    return None

"""AFNI's real-time protocol, as plug_realtime of AFNI receives it (README.realtime).

A sender first connects to the control port, where it says ``tcp:HOST:PORT``, and then to that data
port, where it sends text commands that end with a NUL, and after them nothing but voxels. Here a
sender may also begin with the commands at once. Of the text only what tells shape, place and time
is looked at; names, notes and commands that drive AFNI are not.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import SourceError, VolumeError
from rtfmri.readers import Skipped
from rtfmri.readers.network import Address, Allowed, parse_address
from rtfmri.readers.stream import (
    Incoming,
    Item,
    NotOurs,
    StreamReader,
    checked_shape,
    make_volume,
    parsing,
)
from rtfmri.volume import OTHER_SHAPE, unflatten

_log = logging.getLogger(__name__)

CONTROL_PORT = 7961
MARKER = b"Et Earello Endorenna utulien!!"
"""An image that begins with it is none: it ends the run, and new commands follow."""
DATUMS = {"byte": "u1", "short": "i2", "int": "i4", "float": "f4", "double": "f8"}
OTHER_SENDER = "comes from a second sender in the middle of a run"
_MAX_LISTENERS = 4
_TRIES = 100
_TAKEOVER_S = 1.0
_MAX_CHANNELS = 32
_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "I": (2, 1), "S": (2, -1)}
"""Where an axis begins: which LPS axis it runs along, and in which sense."""


def open_afni(
    target: str, tr_s: float | None, *, allow: Allowed | None = None, **options: Any
) -> "AfniReader":
    """Open a listener for AFNI's real-time protocol; *options* are those of `StreamReader`."""
    address = parse_address(target, CONTROL_PORT, allow)
    for _ in range(_TRIES if address.port == 0 else 0):
        # The operating system chooses one port, and the one below it may be in use.
        with suppress(SourceError):
            return AfniReader(address, tr_s, allow=allow, **options)
    return AfniReader(address, tr_s, allow=allow, **options)


@dataclass(slots=True)
class _Head:
    """What the commands say."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    affine: NDArray[np.float64]
    tr_s: float | None
    by_slice: bool
    slice_order: list[int]
    slice_times_s: list[float | None]
    n_channels: int
    n_volumes: int | None


class AfniReader(StreamReader):
    """Reader of AFNI's real-time protocol, on the control port and on the data port below it.

    The protocol does not number volumes: they are counted, also across a connection that broke
    off; a volume that was cut short keeps its number. So there can be one sender at a time: who
    connects from another machine while one is sending is refused, who connects from the same
    machine takes over.
    """

    def __init__(self, address: Address, tr_s: float | None, **options: Any) -> None:
        self._sender: Incoming | None = None
        self._shape: tuple[int, int, int] | None = None
        super().__init__(address, tr_s, **options)
        try:
            self._listen(Address(address.host, self.address.port - 1))
        except SourceError:
            self.close()
            raise

    def _read(self, incoming: Incoming) -> Iterator[Item]:
        while True:
            text = incoming.until_nul()
            if text.startswith((b"tcp:", b"shm:")):
                self._open_channel(text, incoming)
                return
            head = _parse(text)
            incoming.welcome()
            if not self._make_sender(incoming):
                yield Skipped("a connection", OTHER_SENDER)
                return
            yield from self._images(head, incoming)

    def _open_channel(self, text: bytes, incoming: Incoming) -> None:
        """Listen where a control message says that the data will come, if nothing does yet."""
        incoming.welcome()
        named = re.match(rb"tcp:[^:\n]*:([0-9]{1,5})", text)
        if named is None:
            _log.warning("a sender wants shared memory; let it send by TCP, to this host's name")
            return
        port = int(named[1])
        if port in self._listeners or not 1024 <= port <= 65535:
            return
        if len(self._listeners) >= _MAX_LISTENERS:
            _log.warning("a sender names one more data port, %d; too many are open", port)
            return
        try:
            self._listen(Address(self.address.host, port))
        except SourceError as error:
            _log.warning("%s", error)

    def _make_sender(self, incoming: Incoming) -> bool:
        """Let a connection be the run's, unless another machine's is.

        A connection of the same machine that broke off has a moment to hand over what came by it.
        """
        other = self._sender
        if other not in (None, incoming):
            if other.host != incoming.host and not other.gone.is_set():
                return False
            if not other.gone.wait(_TAKEOVER_S):
                other.close()
                other.gone.wait(_TAKEOVER_S)
        self._sender = incoming
        return True

    def _is_of_the_run(self, head: _Head) -> bool:
        """Tell whether volumes of this shape are the run's; those that come first are."""
        with self._lock:
            if not self._indices:
                self._shape = head.shape
            return head.shape == self._shape

    def _images(self, head: _Head, incoming: Incoming) -> Iterator[Item]:
        """Yield volumes until a marker comes in a volume's place."""
        n_voxels = head.shape[0] * head.shape[1] * head.shape[2]
        n_images = head.shape[2] if head.by_slice else 1
        n_image = n_voxels // n_images
        while True:
            flat = np.empty(n_voxels, head.dtype)
            first = True
            for z in head.slice_order if head.by_slice else [0]:
                image = flat[z * n_image : (z + 1) * n_image]
                if first:
                    begun = incoming.exactly(min(len(MARKER), image.nbytes))
                    if begun == MARKER:
                        incoming.skip(image.nbytes - len(begun))
                        yield self._end()
                        return
                    # What is no volume of this run must not count as one: all after it would move.
                    ours = self._is_of_the_run(head)
                    index = self._next_index() if ours else -1
                    image.view("u1")[: len(begun)] = np.frombuffer(begun, "u1")
                    image, first = image.view("u1")[len(begun) :], False
                arrived_s = incoming.voxels(f"volume {index}", image)
                incoming.skip((head.n_channels - 1) * n_image * head.dtype.itemsize)
            if not ours:
                yield Skipped("a volume", OTHER_SHAPE)
                continue
            try:
                volume = make_volume(
                    unflatten(flat, head.shape),
                    head.affine,
                    index=index,
                    tr_s=self._checked_tr(head.tr_s),
                    arrived_s=arrived_s,
                    slice_times_s=head.slice_times_s,
                )
            except VolumeError as error:
                yield Skipped(f"volume {index}", str(error))
                continue
            yield from self._offer(volume, announced=head.n_volumes)


def _parse(text: bytes) -> _Head:
    """Read the commands.

    Raises
    ------
    NotOurs
        If they do not tell how many voxels follow, of which type and in which order.
    """
    with parsing():
        lines = [line.split() for line in text.decode("ascii", "replace").splitlines()]
        commands = {line[0]: line[1:] for line in lines if line}
        matrix = [int(n) for n in commands["XYMATRIX"]]
        n_x, n_y = matrix[0], matrix[1] if len(matrix) > 1 and matrix[1] > 1 else matrix[0]
        n_z = int(commands["ZNUM"][0]) if "ZNUM" in commands else matrix[2]
        kind = commands.get("ACQUISITION_TYPE", ["2D+zt"])[0]
        if kind not in ("2D+z", "2D+zt", "3D", "3D+t", "3D+timing"):
            raise NotOurs
        n_channels = int(commands.get("NUM_CHAN", ["1"])[0])
        if not 1 <= n_channels <= _MAX_CHANNELS:
            raise NotOurs
        order = ">" if commands.get("BYTEORDER") == ["MSB_FIRST"] else "<"
        shape = checked_shape((n_x, n_y, n_z))
        return _Head(
            shape=shape,
            dtype=np.dtype(order + DATUMS[commands.get("DATUM", ["short"])[0]]),
            affine=_affine(commands, shape),
            tr_s=float(commands["TR"][0]) if "TR" in commands else None,
            by_slice=kind.startswith("2D"),
            slice_order=_slice_order(commands.get("ZORDER", ["alt"]), n_z),
            slice_times_s=_slice_times(commands.get("TPATTERN", [])),
            n_channels=n_channels,
            n_volumes=int(commands["NUMVOLS"][0]) if "NUMVOLS" in commands else None,
        )


def _slice_order(words: list[str], n_slices: int) -> list[int]:
    """Return the order in which slices come: ``alt``, ``seq``, or ``explicit`` numbers."""
    if words[0] == "explicit":
        numbers = [int(word) for word in words[1:]]
        order = [number - min(numbers) for number in numbers]
        if sorted(order) != list(range(n_slices)) or min(numbers) not in (0, 1):
            raise NotOurs
        return order
    slices = list(range(n_slices))
    return {"alt": slices[::2] + slices[1::2], "seq": slices}[words[0]]


def _slice_times(words: list[str]) -> list[float | None]:
    return [float(word) for word in words[1:]] if words[:1] == ["explicit"] else []


def _affine(commands: dict[str, list[str]], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Return the affine to RAS+; all zeros if the commands do not tell it.

    ``OBLIQUE_XFORM`` is voxel to AFNI's coordinates, which are LPS+. Without it the axes are
    parallel to those, and the first voxel's place is given, or the volume is in the middle.
    """
    affine = np.eye(4)
    if "OBLIQUE_XFORM" in commands:
        affine[:3] = np.array(commands["OBLIQUE_XFORM"][:12], np.float64).reshape(3, 4)
        return np.diag([-1.0, -1, 1, 1]) @ affine
    begins = [_DIRECTIONS[word[0].upper()] for word in commands.get("XYZAXES", [])]
    if sorted(axis for axis, _ in begins) != [0, 1, 2] or "XYFOV" not in commands:
        return np.zeros((4, 4))
    affine[:3, :3] = 0
    sizes_mm = _sizes_mm(commands, shape)
    firsts = _firsts(commands)
    for i, (axis, sense) in enumerate(begins):
        affine[axis, i] = sense * sizes_mm[i]
        number, letter = firsts[i]
        if number is None:
            offset_mm = float(commands.get("XYZOFF", ["0", "0", "0"])[i])
            number = (shape[i] - 1) * sizes_mm[i] / 2 + offset_mm
        if letter in _DIRECTIONS and _DIRECTIONS[letter][0] == axis:
            sense = _DIRECTIONS[letter][1]
        affine[axis, 3] = -sense * number
    return np.diag([-1.0, -1, 1, 1]) @ affine


def _sizes_mm(commands: dict[str, list[str]], shape: tuple[int, int, int]) -> list[float]:
    """Return the voxel's edges; a field of view's missing or zero y is its x."""
    fov_mm = [float(word) for word in commands["XYFOV"]] + [0.0, 0.0]
    sizes_mm = [fov_mm[0] / shape[0], (fov_mm[1] or fov_mm[0]) / shape[1]]
    if fov_mm[2] > 0:
        return [*sizes_mm, fov_mm[2] / shape[2] + float(commands.get("ZGAP", ["0"])[0])]
    return [*sizes_mm, float(commands.get("ZDELTA", ["0"])[0])]


def _firsts(commands: dict[str, list[str]]) -> list[tuple[float | None, str]]:
    """Return where the first voxel is along each axis, and on which side, as far as it is told."""
    words: list[str] = ["", "", ""]
    if "XYZFIRST" in commands:
        words = commands["XYZFIRST"]
    elif "ZFIRST" in commands:
        words[2] = commands["ZFIRST"][0]
    firsts: list[tuple[float | None, str]] = []
    for word in words:
        parts = re.fullmatch(r"([-+0-9.eE]+?)([RLAPIS]?)", word)
        firsts.append((float(parts[1]), parts[2]) if parts else (None, ""))
    return firsts

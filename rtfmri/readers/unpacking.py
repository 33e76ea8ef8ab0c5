"""Compressed images, unpacked in a process of its own.

No decoder of JPEG is proof against every broken file, and some take their process down with them.
The process, this module run as a program, is told the few numbers that an image needs and its
compressed bytes; it answers with voxels, or that it has none. It ends when its standard input
does, and is started anew when it has died.
"""

import json
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from rtfmri.errors import VolumeError
from rtfmri.readers.child import limit_child, start_child

CUT_SHORT = "is cut short, or its image does not fit its header"
NEEDS_A_DECODER = "is compressed, which needs pip install 'rtfmri[dicom]'"

_NUMBERS = (
    *("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "NumberOfFrames"),
)
_PATIENCE_S = 20.0
_MEMORY_BYTES = 3 << 30
_LENGTH_BYTES = 8


class Unpacker:
    """Unpacks images in another process; for use from one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None before it was needed."""
        return self._process.pid if self._process else None

    def unpack(self, dataset: pydicom.Dataset) -> NDArray[Any]:
        """Return the voxels of a compressed image, as stored.

        Raises
        ------
        VolumeError
            If it cannot be unpacked, or no decoder for its compression is installed.
        """
        head: dict[str, Any] = {name: int(dataset.get(name) or 1) for name in _NUMBERS}
        head["PixelRepresentation"] = int(dataset.get("PixelRepresentation") or 0)
        head["syntax"] = str(dataset.file_meta.TransferSyntaxUID)
        process = self._running()
        watchdog = threading.Timer(_PATIENCE_S, process.kill)
        watchdog.start()
        try:
            _send(process.stdin, head, dataset.PixelData)
            answer, data = _receive(process.stdout)
        except (OSError, EOFError):
            self.close()
            raise VolumeError(CUT_SHORT) from None
        finally:
            watchdog.cancel()
        if "dtype" not in answer:
            raise VolumeError(NEEDS_A_DECODER if answer["known"] is False else CUT_SHORT)
        return np.frombuffer(data, answer["dtype"]).reshape(answer["shape"])

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process and self._process.poll() is not None:
            self.close()
        if not self._process:
            self._process = start_child("rtfmri.readers.unpacking", stdout=subprocess.PIPE)
        return self._process


def _send(stream: Any, head: dict[str, Any], data: bytes) -> None:
    text = json.dumps({**head, "n_bytes": len(data)}).encode()
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "big") + text)
    stream.write(data)
    stream.flush()


def _receive(stream: Any) -> tuple[dict[str, Any], bytes]:
    """Return what the other side has sent.

    Raises
    ------
    EOFError
        If it has ended.
    """
    length = _exactly(stream, _LENGTH_BYTES)
    head = json.loads(_exactly(stream, int.from_bytes(length, "big")))
    return head, _exactly(stream, head["n_bytes"])


def _exactly(stream: Any, n_bytes: int) -> bytes:
    data: bytes = stream.read(n_bytes)
    if len(data) < n_bytes:
        raise EOFError
    return data


def _serve() -> None:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    limit_child(_MEMORY_BYTES)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for decoders that print
    while True:
        head, data = _receive(requests)
        known = False
        try:
            syntax = pydicom.uid.UID(head["syntax"])
            known = get_decoder(syntax).is_available
            dataset = pydicom.Dataset()
            dataset.file_meta = pydicom.dataset.FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = syntax
            for name in _NUMBERS:
                setattr(dataset, name, head[name])
            dataset.PhotometricInterpretation = "MONOCHROME2"
            dataset.PixelData = data
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = True
            pixels = pixel_array(dataset, raw=True)
        except Exception:
            _send(answers, {"known": known}, b"")
            continue
        kind = {"dtype": pixels.dtype.str, "shape": pixels.shape}
        _send(answers, kind, pixels.tobytes())


if __name__ == "__main__":
    try:
        _serve()
    except (EOFError, BrokenPipeError):
        os._exit(0)

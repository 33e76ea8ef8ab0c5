"""Philips PAR/REC pairs: a text that describes images, and their pixels.

A pair holds a whole run, or, as research tools dump them while they come, one volume that does not
say which it is. The general part of such a dump is all zeros; what is needed is also in the lines
of the images. nibabel reads the text and knows the axes.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.parrec import PARRECHeader, parse_PAR_header
from numpy.typing import NDArray

from rtfmri.errors import VolumeError
from rtfmri.readers.assembly import Piece
from rtfmri.readers.headers import echo_time_ms
from rtfmri.readers.pieces import NO_MAGNITUDE, Unwanted, plain_errors
from rtfmri.volume import Grid


def is_par(name: str) -> bool:
    """Tell whether a file is the text of a pair, by its name."""
    return name.lower().endswith(".par")


def rec_of(par: Path) -> Path:
    """Return the file of the pixels beside a text."""
    return par.with_suffix(".REC" if par.suffix == ".PAR" else ".rec")


def read_par(par: Path) -> list[Piece]:
    """Return the magnitude pieces of a pair, in the order of volumes and echoes.

    Values are the "precise" ones, (stored * slope + intercept) / (slope * scale): they compare
    between slices and volumes, each of which may have a scale of its own.

    Raises
    ------
    Unwanted
        If it holds no magnitude image.
    VolumeError
        If it is no PAR file, or the REC file is not all there; `Piece.load` raises it, too.
    """
    with plain_errors():
        with par.open(encoding="latin-1") as file:
            general, lines = parse_PAR_header(file)
        if not _is_whole(rec_of(par), lines):
            raise VolumeError("is cut short, or its REC file is")
        lines = lines[lines["image_type_mr"] == _magnitude(lines)]
        dynamics, echoes = lines["dynamic scan number"], lines["echo number"]
        n_slices, n_echoes = len(set(lines["slice number"])), len(set(echoes))
        counts_volumes = general["max_dynamics"] > 1
        pieces = []
        for dynamic, echo in sorted(set(zip(dynamics.tolist(), echoes.tolist(), strict=True))):
            ours = lines[(dynamics == dynamic) & (echoes == echo)]
            ours = ours[np.argsort(ours["slice number"])]
            columns, rows = (int(n) for n in ours["recon resolution"][0])
            shape = (len(ours), rows, columns)
            pieces.append(
                Piece(
                    series=par.stem if counts_volumes else "",
                    shape=shape,
                    affine=_affine(general, ours),
                    load=partial(_load, rec_of(par), ours, shape),
                    index=int(dynamic) - 1 if counts_volumes else None,
                    n_slices=n_slices,
                    n_echoes=n_echoes,
                    echo_time_ms=echo_time_ms(ours["echo_time"][0]),
                    tr_s=float(np.atleast_1d(general["repetition_time"])[0]) / 1000,
                )
            )
        return pieces


def _is_whole(rec: Path, lines: NDArray[Any]) -> bool:
    """Tell whether the REC file holds all images of the text, which are of one size."""
    n_bytes = _dtype(lines).itemsize * lines["recon resolution"].prod(axis=1).max()
    return rec.is_file() and rec.stat().st_size >= (lines["index in REC file"].max() + 1) * n_bytes


def _dtype(lines: NDArray[Any]) -> np.dtype[Any]:
    return np.dtype(f"<u{int(lines['image pixel size'][0]) // 8}")


def _magnitude(lines: NDArray[Any]) -> int:
    """Return the image_type_mr of magnitude: 0, or in dumps the first without negative values."""
    kinds = lines["image_type_mr"]
    signed = set(kinds[lines["rescale intercept"] < 0].tolist())
    unsigned = sorted(set(kinds.tolist()) - signed)
    if not unsigned:
        raise Unwanted(NO_MAGNITUDE)
    return int(unsigned[0])


def _affine(general: dict[str, Any], lines: NDArray[Any]) -> NDArray[np.float64]:
    """Return voxel index to RAS+ mm, from what the lines of one volume say of place and turn."""
    header = PARRECHeader(
        {
            **general,
            "angulation": lines["image angulation"][0],
            "off_center": lines["image offcentre"].mean(axis=0),
            "max_slices": len(lines),
        },
        lines,
        permit_truncated=True,
    )
    return Grid((1, 1, 1), header.get_affine()).affine


def _load(rec: Path, lines: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    n_pixels, dtype = shape[1] * shape[2], _dtype(lines)
    with plain_errors(), rec.open("rb") as file:
        slices = np.empty(shape, np.float32)
        for line, image in zip(lines, slices, strict=True):
            file.seek(int(line["index in REC file"]) * n_pixels * dtype.itemsize)
            stored = np.frombuffer(file.read(n_pixels * dtype.itemsize), dtype)
            slope, intercept = line["rescale slope"], line["rescale intercept"]
            divisor = slope * line["scale slope"] or 1.0
            image[:] = (stored * (slope / divisor) + intercept / divisor).reshape(shape[1:])
        return slices

"""From a file to a volume: ours beside pydicom, dicomsdl, nibabel, and reading it alone."""

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.volume import Volume, as_voxels, untiled

from ..measure import Plan, Row, Tables, grid_name, statistics_ms
from ..phantom import Phantom, drifting
from ..tables import Layout, number, text
from .turns import OURS

N_FILES = 12
TR_S = 1.0

LAYOUTS = {
    "decode": Layout(
        "From a file to (x, y, z) voxels; ours alone also reads geometry, TR, times and scaling",
        (
            ("grid", text("grid")),
            ("tool", text("tool")),
            ("file", text("file")),
            ("ms", number(3, "median_ms")),
            ("min", number(3, "min_ms")),
            ("p95", number(3, "p95_ms")),
            ("times ours", number(2, "times_ours")),
            ("voxels", text("voxels")),
        ),
    ),
}

Decode = Callable[[Path], NDArray[Any]]


def tools(shape: tuple[int, int, int]) -> dict[str, tuple[str, str, Callable[[], Decode]]]:
    """Return by name the package a tool needs, its file's suffix, and what makes it."""
    return {
        OURS: ("pydicom", ".dcm", _ours),
        "read + cut alone": ("numpy", ".dcm", lambda: partial(_bare, shape=shape)),
        "pydicom": ("pydicom", ".dcm", lambda: partial(_pydicom, shape=shape)),
        "dicomsdl": ("dicomsdl", ".dcm", lambda: partial(_dicomsdl, shape=shape)),
        "nibabel": ("nibabel", ".nii", lambda: _nibabel),
    }


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``decode``, one a tool and grid."""
    needed = [name for name in ("pydicom", "nibabel") if not find_spec(name)]
    if needed:
        return {"decode": [{"skipped": f"{needed[0]} is not installed, so there are no files"}]}
    rows: list[Row] = []
    for shape in plan.grids:
        plan.progress(f"decoding, {grid_name(shape)}")
        rows += compare(shape, plan.rounds)
    return {"decode": rows}


def compare(shape: tuple[int, int, int], rounds: int) -> list[Row]:
    """Return a row a tool; all decode the same volumes, in turn."""
    where = {"grid": grid_name(shape)}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        images = drifting(Phantom(shape))[:N_FILES]
        _write(Path(folder), shape, images)
        present = {}
        for name, (package, suffix, make) in tools(shape).items():
            if find_spec(package):
                present[name] = make, sorted(Path(folder).glob(f"*{suffix}"))
            else:
                rows.append({**where, "tool": f"{name} is not installed", "file": "-"})
        seconds: dict[str, list[float]] = {name: [] for name in present}
        same = dict.fromkeys(present, True)
        for _ in range(rounds):
            # A run's first file is read with more care, and no volume comes twice in a run.
            decoders = {name: make() for name, (make, _) in present.items()}
            for i, image in enumerate(images):
                for name, decode in decoders.items():
                    started_s = time.perf_counter()
                    voxels = decode(present[name][1][i])
                    elapsed_s = time.perf_counter() - started_s
                    same[name] &= np.array_equal(voxels, image)
                    if i:
                        seconds[name].append(elapsed_s)
    ours_s = statistics.median(seconds[OURS])
    measured = [
        {
            **where,
            "tool": name,
            "file": "NIfTI" if name == "nibabel" else "mosaic",
            **statistics_ms(values),
            "times_ours": statistics.median(values) / ours_s,
            "voxels": "identical" if same[name] else "different",
        }
        for name, values in seconds.items()
    ]
    return [*measured, *rows]


def _write(folder: Path, shape: tuple[int, int, int], images: list[NDArray[np.int16]]) -> None:
    import nibabel

    from rtfmri.simulator.targets import open_target

    grid = Phantom(shape).grid
    target = open_target(f"folder:{folder}")
    for i, image in enumerate(images):
        target.send(Volume(image, grid, i, TR_S))
        nibabel.Nifti1Image(image, grid.affine).to_filename(folder / f"{i:04}.nii")
    target.close()


def _ours() -> Decode:
    from rtfmri.readers.dicom import Assembly

    assembly = Assembly(TR_S)

    def decode(path: Path) -> NDArray[Any]:
        (item,) = assembly.add(path.read_bytes(), path.name, time.perf_counter())
        assert isinstance(item, Volume)
        return item.data

    return decode


def _bare(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    """Take the last bytes of a file for a mosaic: no header is looked at."""
    tiles = int(np.ceil(np.sqrt(shape[2])))
    n_bytes = 2 * shape[0] * shape[1] * tiles**2
    pixels = np.frombuffer(path.read_bytes()[-n_bytes:], np.int16)
    return as_voxels(untiled(pixels.reshape(tiles * shape[1], -1), shape))


def _pydicom(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    return untiled(importlib.import_module("pydicom").dcmread(path).pixel_array, shape)


def _dicomsdl(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    return untiled(importlib.import_module("dicomsdl").open(str(path)).pixelData(), shape)


def _nibabel(path: Path) -> NDArray[Any]:
    return np.asarray(importlib.import_module("nibabel").load(path).dataobj)

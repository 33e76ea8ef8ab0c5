"""NIfTI files: runs in one 4-D file or a folder of 3-D files, and ROI images."""

import logging
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import io_orientation, ornt_transform
from numpy.typing import NDArray

from rtfmri.errors import ConfigError, RtfmriError, SourceError, VolumeError
from rtfmri.readers import Skipped
from rtfmri.readers.replay import EndOfSource, Replay, Step, checked_tr
from rtfmri.volume import Grid, Volume, as_voxels

logger = logging.getLogger(__name__)

SUFFIXES = (".nii", ".nii.gz")

_UNREADABLE = (ImageFileError, OSError, EOFError, ValueError, zlib.error)
"""What nibabel and the decompressors raise on files that are cut short or no NIfTI."""

_PER_SECOND = {"sec": 1.0, "msec": 1e3, "usec": 1e6, "unknown": 1.0}


def replay_4d(path: Path, tr_s: float | None, speed: float | None) -> Replay:
    """Open a 4-D file, to be read volume by volume.

    Integers leave as they are stored where the header has no scaling, else float32.

    Raises
    ------
    SourceError
        If it is no 4-D NIfTI file, or has no repetition time and none is given.
    GridError
        If its affine cannot be inverted.
    """
    image = _load(path)
    if len(image.shape) != 4:
        raise SourceError(
            f"{path} must be 4-D, got shape {image.shape}; for 3-D files give the folder"
        )
    tr_s = tr_s or checked_tr(_header_tr_s(image), str(path))
    grid, n_volumes = Grid(image.shape[:3], image.affine), image.shape[3]

    def load(index: int) -> Volume:
        try:
            return Volume(_voxels(image.dataobj[..., index]), grid, index, tr_s)
        except _UNREADABLE:
            raise EndOfSource(f"the file ends after {index} of {n_volumes} volumes") from None

    steps = (Step(path.name, i, partial(load, i)) for i in range(n_volumes))
    return Replay(steps, n_volumes=n_volumes, tr_s=tr_s, speed=speed)


def replay_3d(
    paths: list[Path], others: list[Skipped], tr_s: float | None, speed: float | None
) -> Replay:
    """Open 3-D files, given in the order of the run; *others* of their folder are told first.

    Raises
    ------
    SourceError
        If the first of them is no 3-D NIfTI file, or has no repetition time and none is given.
    """
    first = _load(paths[0])
    if _n_dimensions(first) != 3:
        raise SourceError(f"{paths[0]} is 4-D, its folder is none of 3-D files; give the file")
    run_tr_s = tr_s or checked_tr(_header_tr_s(first), str(paths[0]))

    def steps() -> Iterator[Step | Skipped]:
        yield from others
        for index, path in enumerate(paths):
            yield Step(path.name, index, partial(load_volume, path, index, run_tr_s))

    return Replay(steps(), n_volumes=len(paths), tr_s=run_tr_s, speed=speed)


def load_volume(path: Path, index: int, tr_s: float | None) -> Volume:
    """Read one 3-D file as volume *index* of a run.

    Raises
    ------
    VolumeError
        If it is cut short, is no NIfTI file, or holds more than one volume.
    SourceError
        If it has no repetition time and none is given.
    """
    try:
        image = nibabel.load(path)
        if _n_dimensions(image) != 3:
            raise VolumeError(f"must be one 3-D image, its shape is {image.shape}")
        data = _voxels(np.asanyarray(image.dataobj).reshape(image.shape[:3]))
        grid = Grid(image.shape[:3], image.affine)
    except RtfmriError as error:
        raise VolumeError(str(error)) from None
    except _UNREADABLE:
        raise VolumeError("is cut short or no NIfTI file") from None
    return Volume(data, grid, index, tr_s or checked_tr(_header_tr_s(image), path.name))


def read_roi(path: str | Path, grid: Grid) -> NDArray[np.float32]:
    """Read the weights of a region of interest on the grid of a run.

    Parameters
    ----------
    path : path
        A 3-D NIfTI mask (integers, or zeros and ones) or map of weights, in scanner space.
    grid : Grid
        Of the run.

    Returns
    -------
    weights : (x, y, z) float32
        On *grid*, 0 or more. Axes that are merely flipped or swapped are put right exactly; any
        other grid is resampled, masks to the nearest voxel and weights linearly (linear keeps
        them positive), which is logged.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not 3-D, has negative or non-finite weights, or has no
        voxel inside the run's grid.
    """
    try:
        loaded = nibabel.load(path)
        weights = np.asanyarray(loaded.dataobj).reshape(loaded.shape[:3])
        own = Grid(weights.shape, loaded.affine)
    except (*_UNREADABLE, RtfmriError) as error:
        raise ConfigError(f"ROI {path} must be a readable 3-D NIfTI image: {error}") from None
    if weights.dtype.kind not in "biuf" or not np.isfinite(weights).all() or weights.min() < 0:
        raise ConfigError(f"ROI {path}: weights must be finite and 0 or more")
    is_mask = weights.dtype.kind in "biu" or bool(np.isin(weights, (0, 1)).all())
    image = nibabel.Nifti1Image(weights.astype(np.float32), loaded.affine)
    if not own.matches(grid):
        turn = ornt_transform(io_orientation(own.affine), io_orientation(grid.affine))
        image = image.as_reoriented(turn)
        if not Grid(image.shape, image.affine).matches(grid):
            image = _resampled(image, grid, "nearest" if is_mask else "linear", str(path))
    on_grid = np.asfortranarray(image.dataobj, np.float32)
    if not on_grid.any():
        raise ConfigError(f"ROI {path} has no voxel inside the run's grid, {grid}")
    return on_grid


def _resampled(image: Any, grid: Grid, interpolation: str, name: str) -> Any:
    from nilearn.image import resample_img
    from nilearn.image.resampling import BoundingBoxError

    try:
        moved = resample_img(
            image,
            target_affine=grid.affine,
            target_shape=grid.shape,
            interpolation=interpolation,
            force_resample=True,
            copy_header=True,
        )
    except BoundingBoxError:
        raise ConfigError(f"ROI {name} has no voxel inside the run's grid, {grid}") from None
    logger.warning(
        "ROI %s is on another grid and was resampled (%s): %d of its %d voxels are left",
        name,
        interpolation,
        np.count_nonzero(moved.dataobj),
        np.count_nonzero(image.dataobj),
    )
    return moved


def _load(path: Path) -> Any:
    try:
        image = nibabel.load(path, keep_file_open=True)
    except _UNREADABLE as error:
        raise SourceError(f"cannot read {path} as NIfTI: {error}") from None
    if image.get_data_dtype().kind not in "biuf":
        raise SourceError(f"voxels must be numbers, {path} has {image.get_data_dtype()}")
    return image


def _n_dimensions(image: Any) -> int:
    """Return the number of dimensions that the image uses: a 4-D file of one volume is 3-D."""
    return len(image.shape) - int(image.shape[3:] == (1,))


def _header_tr_s(image: Any) -> float | None:
    """Return the fourth pixel dimension in seconds (NIfTI-1 standard, pixdim and xyzt_units).

    In a 3-D file it counts only if its unit is given: writers leave a 1 there that says nothing.
    """
    pixdim, unit = image.header["pixdim"], image.header.get_xyzt_units()[1]
    if unit not in _PER_SECOND or (unit == "unknown" and len(image.shape) < 4):
        return None
    return float(pixdim[4]) / _PER_SECOND[unit]


def _voxels(array: NDArray[Any]) -> NDArray[Any]:
    """Return *array* as a volume's data that is writable: compiled kernels tell these apart."""
    voxels = as_voxels(array)
    return voxels if voxels.flags.writeable else voxels.copy(order="F")

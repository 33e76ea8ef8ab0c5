"""NIfTI files: runs in one 4-D file or a folder of 3-D files, and ROIs, masks and references."""

import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from rtfmri.errors import ConfigError, RtfmriError, SourceError, VolumeError
from rtfmri.readers import Skipped
from rtfmri.readers.replay import EndOfSource, Replay, Step, checked_tr
from rtfmri.volume import Grid, Volume, as_slice_times, as_voxels

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
    times_s = _slice_times_s(image, path)

    def load(index: int) -> Volume:
        try:
            data = _voxels(image.dataobj[..., index])
            return Volume(data, grid, index, tr_s, slice_times_s=times_s)
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
    tr_s = tr_s or checked_tr(_header_tr_s(image), path.name)
    return Volume(data, grid, index, tr_s, slice_times_s=_slice_times_s(image, path))


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
    what = f"ROI {path}"
    weights, affine = _read_weights(path, what)
    is_mask = weights.dtype.kind in "biu" or bool(np.isin(weights, (0, 1)).all())
    return _on_grid(weights, affine, grid, "nearest" if is_mask else "linear", what)


def read_mask(path: str | Path, grid: Grid) -> NDArray[np.bool_]:
    """Read a mask on the grid of a run.

    Parameters
    ----------
    path, grid
        As for `read_roi`.

    Returns
    -------
    mask : (x, y, z) bool
        Where the file is not 0. Another grid is brought to the run's as by `read_roi`, to the
        nearest voxel.

    Raises
    ------
    ConfigError
        As `read_roi`.
    """
    what = f"mask {path}"
    weights, affine = _read_weights(path, what)
    return _on_grid((weights != 0).astype(np.float32), affine, grid, "nearest", what) > 0


def read_reference(path: str | Path, grid: Grid) -> NDArray[np.float32]:
    """Read the image that volumes are registered to, on the grid of the run.

    Parameters
    ----------
    path, grid
        As for `read_roi`; the image may have any values.

    Returns
    -------
    image : (x, y, z) float32
        Voxels that are not finite are 0, and so is what the file does not cover. Another grid is
        brought to the run's as by `read_roi`, linearly.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not 3-D, or has no voxel inside the run's grid.
    """
    what = f"reference {path}"
    voxels, affine = _read_numbers(path, what)
    finite = np.nan_to_num(voxels.astype(np.float32), posinf=0, neginf=0)
    return _on_grid(finite, affine, grid, "linear", what)


def read_affine(path: str | Path) -> NDArray[np.float64]:
    """Read a 4 x 4 affine from a text file, as FSL, SPM users and nibabel's tools write it.

    Raises
    ------
    ConfigError
        If the file cannot be read, or is not 4 x 4, finite and invertible.
    """
    try:
        return Grid((1, 1, 1), np.loadtxt(path)).affine
    except (OSError, ValueError) as error:
        raise ConfigError(f"affine {path} must be 4 x 4 numbers: {error}") from None


def _read_numbers(path: str | Path, what: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return voxels and affine of a 3-D image."""
    try:
        image = nibabel.load(path)
        voxels = np.asanyarray(image.dataobj).reshape(image.shape[:3])
        affine = Grid(voxels.shape, image.affine).affine
    except (*_UNREADABLE, RtfmriError) as error:
        raise ConfigError(f"{what} must be a readable 3-D NIfTI image: {error}") from None
    if voxels.dtype.kind not in "biuf":
        raise ConfigError(f"{what}: voxels must be numbers, got {voxels.dtype}")
    return voxels, affine


def _read_weights(path: str | Path, what: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    weights, affine = _read_numbers(path, what)
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ConfigError(f"{what}: weights must be finite and 0 or more")
    return weights, affine


def _on_grid(
    voxels: NDArray[Any],
    affine: NDArray[np.float64],
    grid: Grid,
    interpolation: str,
    what: str,
) -> NDArray[np.float32]:
    """Return *voxels* on *grid*, as `read_roi` tells."""
    image = nibabel.Nifti1Image(voxels.astype(np.float32), affine)
    if not Grid(image.shape, affine).matches(grid):
        turn = ornt_transform(io_orientation(affine), io_orientation(grid.affine))
        image = image.as_reoriented(turn)
        if not Grid(image.shape, image.affine).matches(grid):
            image = _resampled(image, grid, interpolation, what)
    on_grid = np.asfortranarray(image.dataobj, np.float32)
    if not on_grid.any():
        raise ConfigError(f"{what} has no voxel inside the run's grid, {grid}")
    return on_grid


def _resampled(image: Any, grid: Grid, interpolation: str, what: str) -> Any:
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
        raise ConfigError(f"{what} has no voxel inside the run's grid, {grid}") from None
    logger.warning(
        "%s is on another grid and was resampled (%s): %d of its %d voxels are left",
        what,
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


def _slice_times_s(image: Any, path: Path) -> tuple[float, ...] | None:
    """Return the acquisition start of each slice along the third axis, if the file tells.

    Its header does where it names order and duration of the slices; else a BIDS sidecar may, the
    JSON file of the same name (BIDS, "Timing parameters": seconds, from the volume's start).
    """
    n_slices = image.shape[2]
    with suppress(HeaderDataError):
        _, _, slice_axis = image.header.get_dim_info()
        unit = image.header.get_xyzt_units()[1]
        if slice_axis == 2 and unit in _PER_SECOND:
            times = image.header.get_slice_times()
            scaled = [None if time is None else time / _PER_SECOND[unit] for time in times]
            if times_s := as_slice_times(scaled, n_slices):
                return times_s
    sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    with suppress(OSError, ValueError, TypeError, AttributeError):  # none, no JSON, no times
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
        times = fields.get("SliceTiming", [])
        direction = fields.get("SliceEncodingDirection", "k")
        if direction in ("k", "k-"):
            return as_slice_times(times if direction == "k" else times[::-1], n_slices)
    return None


def _voxels(array: NDArray[Any]) -> NDArray[Any]:
    """Return *array* as a volume's data that is writable: compiled kernels tell these apart."""
    voxels = as_voxels(array)
    return voxels if voxels.flags.writeable else voxels.copy(order="F")

"""Regions that a functional localiser finds: each participant's own, for the runs that follow."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.blobs import Method, StatMap, label_blobs, threshold
from rtfmri.errors import ConfigError, GridError, RecordingError
from rtfmri.export import to_nifti
from rtfmri.readers.nifti import read_mask
from rtfmri.recording import Recording, open_recording
from rtfmri.stages.glm import ContrastMaps
from rtfmri.volume import Grid

Mask = NDArray[np.bool_]


def choose_region(
    values: NDArray[Any],
    inside: Mask,
    *,
    top_voxels: int | None = None,
    above: Mask | None = None,
) -> Mask:
    """Choose a region of interest within an anatomical mask from a localiser's map.

    Parameters
    ----------
    values : (x, y, z) float
        The statistic. Voxels that are not finite are never chosen.
    inside : (x, y, z) bool
        The anatomical mask.
    top_voxels : int, optional
        Choose so many voxels, those of the largest values, wherever they lie: the size of the
        region is then the same for every participant. Of equal values, those come first that are
        first in the order of x, then y, then z.
    above : (x, y, z) bool, optional
        Choose instead, of the voxels above a threshold that lie inside and are positive, the
        cluster with the largest value; whatever touches is a neighbour.

    Returns
    -------
    region : (x, y, z) bool
        At least one voxel, all of them inside.

    Raises
    ------
    ConfigError
        If both or neither of *top_voxels* and *above* are given, *top_voxels* is below 1 or more
        than there are voxels inside, or nothing above the threshold is inside.
    GridError
        If the shapes differ.
    """
    for name, mask in (("inside", inside), ("above", above)):
        if mask is not None and mask.shape != values.shape:
            raise GridError(f"{name} must be of shape {values.shape}, got {mask.shape}")
    usable = inside & np.isfinite(values)
    if top_voxels is not None and above is None:
        return _top(values, usable, top_voxels)
    if above is not None and top_voxels is None:
        return _largest_cluster(values, usable & above & (values > 0))
    given = "neither" if above is None else "both"
    raise ConfigError(f"either top_voxels or above must be given, got {given}")


def localize(
    recording: str | Path,
    out: str | Path,
    *,
    contrast: str | None = None,
    inside: str | Path | None = None,
    top_voxels: int | None = None,
    method: Method = "e-bh",
    level: float = 0.05,
) -> tuple[str, int]:
    """Make a region of interest for the next run out of a functional localiser's recording.

    Parameters
    ----------
    recording : path
        Of the localiser, with a GLM.
    out : path
        The NIfTI file to write, on the recording's grid, in scanner mm.
    contrast : str, optional
        The recording's first t contrast by default.
    inside : path, optional
        An anatomical mask, resampled where its grid differs; the brain by default.
    top_voxels, method, level
        Either the *top_voxels* of the largest t inside, or, without it, the cluster around the
        largest of those above a threshold, as for `rtfmri.blobs.threshold`.

    Returns
    -------
    contrast : str
    n_voxels : int
        Of the region.

    Raises
    ------
    ConfigError
        If the recording has no such contrast, or no region can be made.
    RecordingError
        If the recording cannot be read, or *out* exists or cannot be written.
    """
    with open_recording(recording) as run:
        name, maps = contrast_of(run, contrast)
        if maps.kind != "t":
            raise ConfigError(f"contrast must be of kind t, {name!r} is {maps.kind}")
        brain = run.quality_maps()["mask"] > 0
        mask = brain if inside is None else brain & read_mask(inside, run.grid)
        found = None
        if top_voxels is None:
            found = threshold(StatMap.of(maps), brain, method, level, two_sided=False).above
        region = choose_region(maps.statistic, mask, top_voxels=top_voxels, above=found)
        if Path(out).exists():
            raise RecordingError(f"{out} exists already; name another file, or remove it")
        try:
            write_region(out, region, run.grid)
        except OSError as error:
            raise RecordingError(f"cannot write the region {out}: {error}") from error
    return name, int(region.sum())


def contrast_of(recording: Recording, name: str | None) -> tuple[str, ContrastMaps]:
    """Return name and maps of a recording's contrast; of its first without a *name*.

    Raises
    ------
    ConfigError
        If there is no such contrast.
    """
    maps = recording.contrast_maps()
    if not maps:
        raise ConfigError("the recording has no contrasts: it was made without events or GLM")
    wanted = next(iter(maps)) if name is None else name
    if wanted not in maps:
        raise ConfigError(f"contrast must be one of {', '.join(maps)}; got {wanted!r}")
    return wanted, maps[wanted]


def write_region(path: str | Path, region: Mask, grid: Grid) -> None:
    """Write a region as NIfTI, uint8 zeros and ones on the run's grid, for ``--roi``.

    Raises
    ------
    ConfigError
        If *path* does not end in .nii or .nii.gz.
    GridError
        If *region* has another shape than *grid*.
    """
    if not str(path).endswith((".nii", ".nii.gz")):
        raise ConfigError(f"region file must end in .nii or .nii.gz, got {path}")
    if region.shape != grid.shape:
        raise GridError(f"region must be of shape {grid.shape}, got {region.shape}")
    to_nifti(region.astype(np.uint8), grid).to_filename(path)


def _top(values: NDArray[Any], usable: Mask, n_voxels: int) -> Mask:
    voxels = np.flatnonzero(usable)
    if not 1 <= n_voxels <= voxels.size:
        raise ConfigError(
            f"top_voxels must be 1 to {voxels.size}, the voxels inside the mask, got {n_voxels}"
        )
    region = np.zeros(values.size, bool)
    region[voxels[np.argsort(-values.ravel()[voxels], kind="stable")[:n_voxels]]] = True
    return region.reshape(values.shape)


def _largest_cluster(values: NDArray[Any], candidates: Mask) -> Mask:
    if not candidates.any():
        raise ConfigError(
            "above must have a positive voxel inside the mask, got none: lower the threshold or "
            "choose by top_voxels"
        )
    labels = label_blobs(values, candidates)
    peak = np.argmax(np.where(candidates, values, -np.inf))
    return np.asarray(labels == labels.flat[peak])

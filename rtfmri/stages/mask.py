"""The brain mask: which voxels are worth looking at."""

import logging
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import ConfigError
from rtfmri.volume import Grid

_log = logging.getLogger(__name__)

_SMALLEST_SHARE = 0.01
"""Of the voxels; a mask that is smaller has missed the brain."""


def load_nilearn() -> None:
    """Import what `brain_mask` needs, which takes seconds that no volume should wait for.

    Raises
    ------
    ConfigError
        If nilearn is not installed.
    """
    try:
        import nilearn.masking  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"mask.source 'auto' needs nilearn ({error}); install it, set mask.source to 'none', "
            "or give a mask"
        ) from error


def brain_mask(image: NDArray[Any], grid: Grid) -> NDArray[np.bool_]:
    """Find the brain in an echo-planar image, by nilearn's `compute_epi_mask`.

    It cuts the image's histogram at its widest gap, opens the result by two voxels and keeps the
    largest part. Where that leaves next to nothing, as of a single slice, or where the image
    is the same everywhere, all voxels are taken, which is logged.

    Parameters
    ----------
    image : (x, y, z) array
        A volume, or a mean of several. Voxels that are not finite count as 0.
    grid : Grid
        Of *image*.

    Returns
    -------
    mask : (x, y, z) bool
        x fastest in memory; never empty.

    Raises
    ------
    ConfigError
        If nilearn is not installed.
    """
    load_nilearn()
    from nibabel.nifti1 import Nifti1Image
    from nilearn.masking import compute_epi_mask

    finite = np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty mask is dealt with below
        try:
            found = compute_epi_mask(Nifti1Image(finite, grid.affine))
            mask = np.asfortranarray(found.dataobj, np.bool_)
        except (ValueError, IndexError):  # too few voxels for a histogram
            mask = np.zeros(grid.shape, np.bool_, order="F")
    if mask.mean() < _SMALLEST_SHARE or finite.min() == finite.max():
        _log.warning("no brain was found in %s: all voxels are taken for it", grid)
        mask[...] = True
    return mask

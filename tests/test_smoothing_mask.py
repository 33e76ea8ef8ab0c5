"""Smoothing within a mask on every backend, against scipy in float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import U
from rtfmri.backends import Backend, open_backend
from rtfmri.stages.smoothing import SmoothingStage, gaussian_taps, smoothing_radius
from rtfmri.volume import Grid

ndimage = pytest.importorskip("scipy.ndimage")
SIZE_MM = (3.0, 2.0, 3.5)
SIGMA_MM = 1 / np.sqrt(8 * np.log(2))  # of a Gaussian whose FWHM is 1 mm
SHAPES = [(20, 17, 12), (33, 1, 5), (1, 1, 1), (7, 40, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_width = pytest.mark.parametrize("fwhm_mm", [0.5, 6.0, 18.0])


def a_grid(shape: tuple[int, int, int]) -> Grid:
    return Grid(shape, np.diag([*SIZE_MM, 1.0]))


def a_mask(shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """A head's shape up to the faces, with holes, in memory order."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else [0.0] for n in shape), indexing="ij")
    mask = sum(axis**2 for axis in axes) < 1.2
    mask &= np.random.default_rng(1).random(shape) < 0.9
    mask[shape[0] // 2, shape[1] // 2, shape[2] // 2] = True
    return np.asfortranarray(mask)


def a_volume(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Voxels of the mask; nothing outside."""
    values = np.random.default_rng(0).uniform(500, 1500, mask.shape)
    return np.asfortranarray(values * mask, np.float32)


def smoothed(
    backend: Backend, volume: NDArray[np.float32], mask: NDArray[np.bool_], fwhm_mm: float
) -> NDArray[np.float32]:
    """Return the mask's voxels, smoothed among themselves."""
    stage = SmoothingStage(backend, a_grid(mask.shape), fwhm_mm)
    scale = backend.download(stage.scale_within(mask))
    assert scale.dtype == np.float32
    flat = backend.download(stage.push(backend.copy(volume.reshape(-1, order="F"))))
    return flat[mask.reshape(-1, order="F")] * scale


def reference(
    volume: NDArray[np.float32], mask: NDArray[np.bool_], fwhm_mm: float
) -> NDArray[np.float64]:
    sigma = fwhm_mm * SIGMA_MM / np.array(SIZE_MM)
    above, below = (
        ndimage.gaussian_filter(image.astype(np.float64), sigma, mode="reflect", truncate=4.0)
        for image in (volume, mask)
    )
    return (above / np.where(mask, below, 1)).reshape(-1, order="F")[mask.reshape(-1, order="F")]


def relative_error(fwhm_mm: float) -> float:
    """Volume and mask are smoothed alike, all terms positive; then one quotient, one product.

    Each axis rounds its filter once and each of its sums once a term, and a pair of voxels is one
    addition, one product and one addition to the sum.
    """
    taps = sum(1 + 3 * gaussian_taps(fwhm_mm * SIGMA_MM / mm).size for mm in SIZE_MM)
    return 1.01 * (2 * taps + 2) * U


@every_shape
@every_width
def test_it_is_the_quotient_of_scipys(
    backend: Backend, shape: tuple[int, int, int], fwhm_mm: float
) -> None:
    mask = a_mask(shape)
    volume = a_volume(mask)
    got, wanted = smoothed(backend, volume, mask, fwhm_mm), reference(volume, mask, fwhm_mm)
    assert got.dtype == np.float32
    assert got.shape == (np.count_nonzero(mask),)
    assert (np.abs(got - wanted) <= relative_error(fwhm_mm) * wanted).all()


@every_shape
@every_width
def test_a_constant_stays_constant_up_to_the_masks_edge(
    backend: Backend, shape: tuple[int, int, int], fwhm_mm: float
) -> None:
    mask = a_mask(shape)
    got = smoothed(backend, np.where(mask, np.float32(1000), np.float32(0)), mask, fwhm_mm)
    assert np.abs(got / 1000 - 1).max() <= relative_error(fwhm_mm)


@every_shape
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(backend: Backend, shape: tuple[int, int, int]) -> None:
    mask = a_mask(shape)
    volume = a_volume(mask)
    wanted = smoothed(open_backend("cpu"), volume, mask, 6.0)
    assert np.array_equal(smoothed(backend, volume, mask, 6.0), wanted)


def test_a_mask_of_all_voxels_changes_next_to_nothing(backend: Backend) -> None:
    mask = np.ones((9, 8, 7), np.bool_, order="F")
    volume = a_volume(mask)
    stage = SmoothingStage(backend, a_grid(mask.shape), 6.0)
    plain = backend.download(stage.push(backend.copy(volume.reshape(-1, order="F"))))
    got = smoothed(backend, volume, mask, 6.0)
    assert np.abs(got / plain - 1).max() <= relative_error(6.0)


def test_a_lonely_voxel_keeps_its_value(backend: Backend) -> None:
    mask = np.zeros((15, 15, 15), np.bool_, order="F")
    mask[7, 8, 9] = True
    got = smoothed(backend, a_volume(mask), mask, 18.0)
    assert np.abs(got / a_volume(mask)[mask] - 1).max() <= relative_error(18.0)


def test_a_box_that_is_larger_by_the_radius_is_as_good_as_the_volume(backend: Backend) -> None:
    shape, fwhm_mm = (40, 50, 36), 6.0
    mask = np.zeros(shape, np.bool_, order="F")
    mask[14:22, 20:31, 0:9] = a_mask((8, 11, 9))
    volume = a_volume(mask)
    radius = smoothing_radius(a_grid(shape), fwhm_mm)
    assert radius == (3, 5, 3)  # 4 sigma are 10.2 mm
    box = tuple(
        slice(max(0, first - r), last + r)
        for first, last, r in zip((14, 20, 0), (22, 31, 9), radius, strict=True)
    )
    whole = smoothed(backend, volume, mask, fwhm_mm)
    cut = smoothed(backend, np.asfortranarray(volume[box]), np.asfortranarray(mask[box]), fwhm_mm)
    assert np.array_equal(cut, whole)

"""Smoothing on every backend, against scipy in float64 and nilearn."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import U
from rtfmri.backends import Backend, open_backend
from rtfmri.stages.smoothing import SmoothingStage, gaussian_taps
from rtfmri.volume import Grid

ndimage = pytest.importorskip("scipy.ndimage")
SHAPES = [(20, 17, 12), (33, 1, 5), (1, 1, 1), (7, 40, 2)]
SIZE_MM = (3.0, 2.0, 3.5)
every_dtype = pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
every_shape = pytest.mark.parametrize("shape", SHAPES)


def a_grid(shape: tuple[int, int, int]) -> Grid:
    return Grid(shape, np.diag([*SIZE_MM, 1.0]))


def a_volume(shape: tuple[int, int, int], dtype: str) -> NDArray[Any]:
    return np.random.default_rng(0).uniform(500, 1500, shape).astype(dtype, order="F")


def smoothed(backend: Backend, volume: NDArray[Any], fwhm_mm: float) -> NDArray[np.float32]:
    stage = SmoothingStage(backend, a_grid(volume.shape), fwhm_mm)
    flat = backend.download(stage.push(backend.upload(volume.reshape(-1, order="F"))))
    return flat.reshape(volume.shape, order="F")


def reference(volume: NDArray[Any], fwhm_mm: float) -> NDArray[np.float64]:
    """What scipy makes of it in float64, with its own filter, cut off at 4 sigma."""
    sigma = fwhm_mm / np.sqrt(8 * np.log(2)) / np.array(SIZE_MM)
    return ndimage.gaussian_filter(volume.astype(np.float64), sigma, mode="reflect", truncate=4.0)


def error_bound(volume: NDArray[Any], fwhm_mm: float) -> float:
    """Each axis rounds its filter once and each of its sums once a term, all terms positive.

    A pair of voxels is one addition, one product and one addition to the sum; relative errors of
    the three axes add, and no value exceeds the largest voxel.
    """
    sigma_mm = fwhm_mm / np.sqrt(8 * np.log(2))
    n_roundings = sum(1 + 3 * gaussian_taps(sigma_mm / mm).size for mm in SIZE_MM)
    return 1.01 * n_roundings * U * float(np.abs(volume).max())


@every_dtype
@every_shape
@pytest.mark.parametrize("fwhm_mm", [0.5, 6.0, 18.0])
def test_smoothing_is_scipys(
    backend: Backend, shape: tuple[int, int, int], dtype: str, fwhm_mm: float
) -> None:
    volume = a_volume(shape, dtype)
    got = smoothed(backend, volume, fwhm_mm)
    assert got.dtype == np.float32
    assert np.abs(got - reference(volume, fwhm_mm)).max() <= error_bound(volume, fwhm_mm)


@every_dtype
@every_shape
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_gives_the_bits_of_numba(
    backend: Backend, shape: tuple[int, int, int], dtype: str
) -> None:
    volume = a_volume(shape, dtype)
    wanted = smoothed(open_backend("cpu"), volume, 6.0)
    assert np.array_equal(smoothed(backend, volume, 6.0), wanted)


def thinned(
    backend: Backend, volume: NDArray[Any], radii: tuple[int, ...], step: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Smooth with filters that also sharpen, and keep every step-th voxel."""
    rng = np.random.default_rng(5)
    x, y, z = (backend.copy(rng.uniform(-0.3, 1, r + 1).astype(np.float32)) for r in radii)
    shape = tuple(-(-n // s) for n, s in zip(volume.shape, step, strict=True))
    scratch, out = backend.zeros(2 * volume.size), backend.zeros(int(np.prod(shape)))
    flat = backend.upload(volume.reshape(-1, order="F"))
    backend.smooth(flat, volume.shape, (x, y, z), scratch, out, step=step)
    return backend.download(out).reshape(shape, order="F")


@every_dtype
@every_shape
@pytest.mark.parametrize("step", [(2, 2, 2), (3, 1, 1), (1, 4, 1), (1, 1, 2), (5, 3, 50)])
def test_a_step_leaves_voxels_out_and_changes_none(
    backend: Backend, shape: tuple[int, int, int], dtype: str, step: tuple[int, int, int]
) -> None:
    volume, radii = a_volume(shape, dtype), (3, 0, 5)
    x, y, z = step
    wanted = thinned(open_backend("cpu"), volume, radii, (1, 1, 1))[::x, ::y, ::z]
    assert np.array_equal(thinned(backend, volume, radii, step), wanted)


def test_a_constant_stays_constant_up_to_the_edges(backend: Backend) -> None:
    volume = np.full((9, 8, 7), 1000, np.int16, order="F")
    got = smoothed(backend, volume, 8.0)
    assert np.abs(got - 1000).max() <= error_bound(volume, 8.0)


def test_the_width_is_the_one_asked_for(backend: Backend) -> None:
    volume = np.zeros((61, 61, 61), np.float32, order="F")
    volume[30, 30, 30] = 1e6
    got = smoothed(backend, volume, 8.0).astype(np.float64)
    assert got.sum() == pytest.approx(1e6, rel=1e-5)
    for axis, mm in enumerate(SIZE_MM):
        profile = got.sum(tuple(a for a in range(3) if a != axis))
        place_mm = (np.arange(61) - 30) * mm
        fwhm_mm = np.sqrt(8 * np.log(2) * (profile @ place_mm**2) / profile.sum())
        # The tails beyond 4 sigma hold 1e-3 of a Gaussian's variance.
        assert fwhm_mm == pytest.approx(8.0, rel=1e-3)


def test_what_is_not_a_number_stays_within_the_filter(backend: Backend) -> None:
    volume = np.full((30, 4, 4), 1000, np.float32, order="F")
    volume[0] = np.nan
    got = smoothed(backend, volume, 6.0)
    reach = gaussian_taps(6.0 / np.sqrt(8 * np.log(2)) / SIZE_MM[0]).size
    assert np.isnan(got[:reach]).all()
    assert np.isfinite(got[reach:]).all()


def test_the_number_of_threads_changes_nothing() -> None:
    volume = a_volume((40, 40, 30), "int16")
    try:
        one = open_backend("cpu", 1)
        expected = smoothed(one, volume, 6.0)
        assert np.array_equal(smoothed(open_backend("cpu"), volume, 6.0), expected)
    finally:
        open_backend("cpu")


def test_it_is_what_nilearn_does() -> None:
    image = pytest.importorskip("nilearn.image")
    nibabel = pytest.importorskip("nibabel")
    volume = a_volume((20, 17, 12), "float32")
    theirs = image.smooth_img(nibabel.Nifti1Image(volume, a_grid(volume.shape).affine), 6.0)
    got = smoothed(open_backend("cpu"), volume, 6.0)
    # nilearn smooths in float32, too.
    assert np.abs(got - theirs.get_fdata()).max() <= 2 * error_bound(volume, 6.0)

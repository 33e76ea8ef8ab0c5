"""Weighted ROI means on every backend, against float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import roi_means
from rtfmri.backends import Backend, RoiTable, open_backend

N_VOXELS = 30_000
SUM_ERROR = 1e-11
"""Relative error of a sum of all voxels in double, with room."""
every_dtype = pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])


def a_volume(dtype: str) -> NDArray[Any]:
    return np.random.default_rng(0).uniform(100, 20_000, N_VOXELS).astype(dtype)


def a_table(*sizes: int) -> RoiTable:
    """ROIs of random voxels, which overlap, with random weights."""
    rng = np.random.default_rng(1)
    voxels = [np.sort(rng.choice(N_VOXELS, size, replace=False)) for size in sizes]
    weights = [rng.dirichlet(np.ones(size)) for size in sizes]
    return RoiTable(
        np.cumsum([0, *sizes]).astype(np.int32),
        np.concatenate(voxels).astype(np.int32),
        np.concatenate(weights).astype(np.float32),
    )


def means_of(backend: Backend, volume: NDArray[Any], table: RoiTable) -> NDArray[np.float64]:
    means = backend.zeros(table.offsets.size - 1, np.float64)
    rois = RoiTable(*(backend.copy(part) for part in table))
    backend.roi_means(backend.upload(volume), rois, means)
    return backend.fetch(means)


@every_dtype
def test_roi_means(backend: Backend, dtype: str) -> None:
    volume, table = a_volume(dtype), a_table(1, 31, 256, 257, 20_011)
    got, wanted = means_of(backend, volume, table), roi_means(volume, table)
    assert got.dtype == np.float64
    assert got.shape == (5,)
    # Sums are in double: below 20011 * 2**-53 relative, where all terms are positive.
    assert (np.abs(got - wanted) <= SUM_ERROR * wanted).all()


@pytest.mark.parametrize(("dtype", "value"), [("int16", -32768), ("uint16", 65535)])
def test_the_ends_of_the_integer_types(backend: Backend, dtype: str, value: int) -> None:
    table = RoiTable(
        np.array([0, 4], np.int32), np.arange(4, dtype=np.int32), np.full(4, 0.25, np.float32)
    )
    assert means_of(backend, np.full(4, value, dtype), table).tolist() == [value]


def test_positive_and_negative_voxels_cancel_in_double(backend: Backend) -> None:
    volume = np.random.default_rng(2).normal(0, 20_000, N_VOXELS).astype(np.float32)
    table = a_table(3, 700, 20_011)
    got, wanted = means_of(backend, volume, table), roi_means(volume, table)
    # Of terms around 20000 that leave some hundreds: products or sums in float32 would be off by
    # U * 20000 = 1e-3, hundreds of times what is allowed.
    assert (np.abs(got - wanted) <= SUM_ERROR * 20_000).all()


def test_a_bad_voxel_is_in_its_own_rois_only(backend: Backend) -> None:
    volume, table = a_volume("float32"), a_table(300, 500)
    inside, both = (set(table.voxels[a:b].tolist()) for a, b in ((0, 300), (0, 800)))
    volume[min(inside)] = np.nan
    volume[min(set(range(N_VOXELS)) - both)] = np.inf
    in_second = min(inside) in table.voxels[300:]
    assert np.isnan(means_of(backend, volume, table)).tolist() == [True, in_second]
    assert not in_second


def test_no_rois_and_an_empty_roi(backend: Backend) -> None:
    volume = a_volume("int16")
    nothing = RoiTable(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    assert means_of(backend, volume, nothing).shape == (0,)
    table = RoiTable(
        np.array([0, 0, 1], np.int32), np.array([7], np.int32), np.ones(1, np.float32)
    )
    assert means_of(backend, volume, table).tolist() == [0, volume[7]]


@every_dtype
@pytest.mark.parametrize("backend", CUDA_BACKENDS, indirect=True)
def test_cuda_differs_from_numba_by_the_order_of_the_sum(backend: Backend, dtype: str) -> None:
    volume, table = a_volume(dtype), a_table(3, 255, 256, 5000)
    got, wanted = (means_of(b, volume, table) for b in (backend, open_backend("cpu")))
    assert (np.abs(got - wanted) <= 2 * SUM_ERROR * wanted).all()

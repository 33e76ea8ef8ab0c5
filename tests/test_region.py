"""Regions built from masks, against the voxels counted one by one."""

import numpy as np
import pytest
from numpy.typing import NDArray

from rtfmri.backends import Region
from rtfmri.errors import GridError
from rtfmri.stages.region import Box, bounding_box, dilated, region_of

SHAPES = [(20, 17, 12), (1, 9, 7), (9, 1, 7), (9, 7, 1), (1, 1, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def a_mask(shape: tuple[int, int, int], share: float = 0.5) -> NDArray[np.bool_]:
    """Voxels at random, so that most runs are short."""
    mask = np.random.default_rng(0).random(shape) < share
    mask[shape[0] // 2, shape[1] // 2, shape[2] // 2] = True
    return mask


def assert_consistent(region: Region, line: int) -> None:
    """Runs and voxels say the same, no run leaves its line or could go on."""
    for array in region:
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    ramps = [np.arange(n) for n in region.runs[:, 2]]
    for start, places in ((0, region.sources), (1, region.targets)):
        spelt = [first + ramp for first, ramp in zip(region.runs[:, start], ramps, strict=True)]
        assert np.array_equal(np.concatenate(spelt), places)
    assert (region.runs[:, 2] > 0).all()
    assert (region.runs[:, 0] % line + region.runs[:, 2] <= line).all()
    ends = region.runs[:-1, 0] + region.runs[:-1, 2]
    assert ((ends < region.runs[1:, 0]) | (ends % line == 0)).all()


def voxel_numbers(shape: tuple[int, int, int]) -> NDArray[np.int64]:
    return np.arange(np.prod(shape)).reshape(shape, order="F")


@every_shape
@pytest.mark.parametrize("order", ["C", "F"])
def test_from_the_grid_to_the_masks_voxels(shape: tuple[int, int, int], order: str) -> None:
    mask = np.array(a_mask(shape), order=order)  # type: ignore[call-overload]
    region = region_of(mask)
    assert np.array_equal(region.sources, np.sort(voxel_numbers(shape)[mask]))
    assert np.array_equal(region.targets, np.arange(mask.sum()))
    assert_consistent(region, shape[0])


@every_shape
def test_from_the_grid_to_a_box_and_on(shape: tuple[int, int, int]) -> None:
    mask = a_mask(shape, 0.1)
    box = bounding_box(mask, (1, 0, 2))
    volume = np.random.default_rng(1).random(shape)
    to_box, to_mask = region_of(mask, targets=box), region_of(mask, sources=box)
    boxed, compact = np.zeros(box.n_voxels), np.zeros(mask.sum())
    boxed[to_box.targets] = volume.reshape(-1, order="F")[to_box.sources]
    assert np.array_equal(
        boxed.reshape(box.shape, order="F"), np.where(mask, volume, 0)[box.slices]
    )
    compact[to_mask.targets] = boxed[to_mask.sources]
    assert np.array_equal(compact, volume.reshape(-1, order="F")[region_of(mask).sources])
    assert_consistent(to_box, shape[0])
    assert_consistent(to_mask, box.shape[0])


def test_a_full_grid_is_a_run_a_line() -> None:
    region = region_of(np.ones((5, 3, 2), np.bool_))
    assert region.runs.tolist() == [[5 * i, 5 * i, 5] for i in range(6)]


def test_an_empty_mask_has_no_runs() -> None:
    region = region_of(np.zeros((5, 3, 2), np.bool_))
    assert [array.shape for array in region] == [(0, 3), (0,), (0,)]


@pytest.mark.parametrize("side", ["sources", "targets"])
def test_a_box_must_hold_the_mask(side: str) -> None:
    mask = np.zeros((5, 4, 3), np.bool_)
    mask[1:4, 2, 1] = True
    with pytest.raises(GridError, match="outside"):
        region_of(mask, **{side: Box((2, 2, 1), (3, 1, 1))})


def test_bounding_box() -> None:
    mask = np.zeros((9, 8, 7), np.bool_)
    mask[2, 3, 0] = mask[4, 3, 5] = True
    assert bounding_box(mask) == Box((2, 3, 0), (3, 1, 6))
    assert bounding_box(mask, (1, 2, 3)) == Box((1, 1, 0), (5, 5, 7))
    assert bounding_box(mask, (99, 99, 99)) == Box((0, 0, 0), (9, 8, 7))
    assert mask[bounding_box(mask).slices].sum() == 2
    with pytest.raises(GridError, match="at least one voxel"):
        bounding_box(np.zeros((2, 2, 2), np.bool_))


@every_shape
@pytest.mark.parametrize("radius", [(0, 0, 0), (1, 2, 3), (4, 0, 7), (30, 5, 1)])
def test_dilated(shape: tuple[int, int, int], radius: tuple[int, int, int]) -> None:
    mask = a_mask(shape, 0.01)
    before = mask.copy()
    wanted = np.zeros(shape, np.bool_)
    for voxel in np.argwhere(mask):
        reach = zip(voxel, radius, strict=True)
        wanted[tuple(slice(max(i - r, 0), i + r + 1) for i, r in reach)] = True
    got = dilated(mask, radius)
    assert np.array_equal(got, wanted)
    assert got.flags.f_contiguous
    assert np.array_equal(mask, before)

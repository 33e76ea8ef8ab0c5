"""The brain mask: a simulated brain that is known, real ones, and images without any."""

import logging

import numpy as np
import pytest
from numpy.typing import NDArray

from dicom_files import real_data
from rtfmri.readers import open_reader
from rtfmri.simulator.scanner import Scanner
from rtfmri.stages.mask import brain_mask
from rtfmri.volume import Grid, Volume


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return twice the overlap over the sum of the sizes (Dice 1945, Ecology 26:297)."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner(n_volumes=2)


def test_it_finds_the_brain_of_one_volume(
    scanner: Scanner, caplog: pytest.LogCaptureFixture
) -> None:
    mask = brain_mask(scanner.volume(0), scanner.grid)
    assert mask.dtype == np.bool_
    assert mask.flags.f_contiguous
    assert dice(mask, scanner.truth.brain) > 0.95
    assert not caplog.records


def test_it_is_nilearns(scanner: Scanner) -> None:
    masking = pytest.importorskip("nilearn.masking")
    nibabel = pytest.importorskip("nibabel")
    image = scanner.volume(1).astype(np.float32)
    theirs = masking.compute_epi_mask(nibabel.Nifti1Image(image, scanner.grid.affine))
    assert np.array_equal(brain_mask(image, scanner.grid), np.asarray(theirs.dataobj) > 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_as_nothing(scanner: Scanner, bad: float) -> None:
    image = scanner.volume(0).astype(np.float32)
    image[:, :5] = bad
    empty = np.where(np.isfinite(image), image, 0)
    assert np.array_equal(brain_mask(image, scanner.grid), brain_mask(empty, scanner.grid))


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 4), (64, 64, 1), (20, 20, 12)])
@pytest.mark.parametrize("value", [0, 1000, np.nan])
def test_all_voxels_where_there_is_no_brain(
    shape: tuple[int, int, int], value: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert brain_mask(np.full(shape, value), Grid(shape, np.eye(4))).all()
    assert "no brain was found in" in caplog.text
    assert "all voxels" in caplog.text


def test_all_voxels_of_a_single_slice(scanner: Scanner) -> None:
    grid = Grid((64, 64, 1), scanner.grid.affine)
    assert brain_mask(scanner.volume(0)[:, :, 18:19], grid).all()


@pytest.mark.parametrize(
    ("source", "low", "high"),
    [
        ("siemens_mosaic_psc", 0.15, 0.20),
        ("siemens_mosaic_mb", 0.17, 0.22),
        ("nifti_fsl_feeds/bold.nii.gz", 0.14, 0.19),
    ],
)
def test_real_brains_are_found(source: str, low: float, high: float) -> None:
    folder, _, file = source.partition("/")
    # Shares of the field of view that were seen to be the brain, by eye, give or take an eighth.
    reader = open_reader(str(real_data(folder) / file), tr_s=2.0)
    volume = next(item for item in reader if isinstance(item, Volume))
    assert low < brain_mask(volume.data, volume.grid).mean() < high

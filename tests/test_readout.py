"""What is asked of single voxels, on every backend, against float64."""

import numpy as np
import pytest

from rtfmri.backends import Backend, Subtraction
from rtfmri.errors import ConfigError
from rtfmri.stages.readout import Readout, ReadoutStage, n_numbers

SHAPE = (7, 6, 5)


def maps(seed: int, n: int) -> Subtraction:
    rng = np.random.default_rng(seed)
    return Subtraction(*rng.normal(0, 3, (3, n)).astype(np.float32))


def image(seed: int) -> np.ndarray:
    """Weights of both signs, most of them 0."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(SHAPE) < 0.3, rng.normal(size=SHAPE), 0)


def answers(
    backend: Backend,
    readouts: dict[str, Readout],
    inside: np.ndarray,
    found: Subtraction,
    ready: bool = True,
) -> dict[str, np.ndarray]:
    stage = ReadoutStage(backend, readouts, inside.reshape(-1, order="F"))
    numbers = backend.zeros(n_numbers(readouts), np.float64)
    stage.push(Subtraction(*(backend.copy(values) for values in found)), numbers)
    return stage.values(backend.fetch(numbers), ready)


def test_sums_and_voxels_of_both_maps(backend: Backend) -> None:
    inside = np.random.default_rng(0).random(SHAPE) < 0.7
    readouts = {
        "decoder": Readout(image(1), "z"),
        "voxels": Readout(image(2), "psc", each=True),
        "other": Readout(image(3), "psc"),
    }
    found = maps(4, int(inside.sum()))
    got = answers(backend, readouts, inside, found)
    grids = {}
    for of in ("psc", "z"):
        grid = np.full(inside.size, np.nan)
        grid[inside.reshape(-1, order="F")] = getattr(found, of)
        grids[of] = grid
    assert list(got) == list(readouts)
    for name in ("decoder", "other"):
        weights = readouts[name].image.reshape(-1, order="F").astype(np.float32)
        products = np.nan_to_num(grids[readouts[name].of]) * weights.astype(np.float64)
        # Weights are rounded to float32; products and sums are in double.
        assert got[name] == pytest.approx([products.sum()], abs=1e-13 * np.abs(products).sum())
    where = np.flatnonzero(readouts["voxels"].image.reshape(-1, order="F"))
    np.testing.assert_array_equal(got["voxels"], grids["psc"][where])
    assert np.isnan(got["voxels"]).any()  # those outside the brain


def test_without_a_baseline_there_is_no_number() -> None:
    from rtfmri.backends import open_backend

    inside = np.ones(SHAPE, bool)
    readouts = {"a": Readout(image(1), "z"), "b": Readout(image(2), "z", each=True)}
    got = answers(open_backend("cpu"), readouts, inside, maps(0, inside.size), ready=False)
    assert all(np.isnan(values).all() for values in got.values())
    assert got["b"].size == np.count_nonzero(image(2))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (np.full(SHAPE, np.nan), "signal 'd': weights must be finite"),
        (np.zeros(SHAPE), "signal 'd' must have a voxel inside the brain, has none"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights: np.ndarray, says: str) -> None:
    from rtfmri.backends import open_backend

    with pytest.raises(ConfigError, match=says):
        ReadoutStage(
            open_backend("cpu"), {"d": Readout(weights, "z")}, np.ones(weights.size, bool)
        )

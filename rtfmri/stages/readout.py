"""What feedback needs of single voxels: weighted sums of a map, or the map at some of them.

A decoder's linear model is a weighted sum over the whole brain; a region's median or eigenvariate
needs its voxels. Both are rows of one table, which the backend's `roi_means` goes through where
the map is: what leaves the device are the numbers alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, Backend, RoiTable, Subtraction
from rtfmri.errors import ConfigError

Of = Literal["psc", "z"]


@dataclass(frozen=True, eq=False, slots=True)
class Readout:
    """A question to a map.

    Attributes
    ----------
    image : (x, y, z) array
        The weights; those voxels count whose weight is not 0.
    of : {"psc", "z"}
        The map: the newest volume against its baseline.
    each : bool
        Whether the map is wanted at each of these voxels, in Fortran order, instead of the sum of
        weight times map.
    """

    image: NDArray[Any]
    of: Of
    each: bool = False

    @property
    def n_numbers(self) -> int:
        """How many numbers answer it."""
        return int(np.count_nonzero(self.image)) if self.each else 1


class ReadoutStage:
    """Answers every `Readout`, volume by volume.

    Parameters
    ----------
    backend : Backend
    readouts : mapping of str to Readout
    inside : (n_grid,) bool
        The brain in Fortran order; what is outside is 0 in all maps, and counts for nothing.

    Raises
    ------
    ConfigError
        If a weight is not finite, or none of a readout's voxels is inside.
    """

    def __init__(
        self, backend: Backend, readouts: Mapping[str, Readout], inside: NDArray[np.bool_]
    ) -> None:
        self._backend = backend
        self._questions: dict[str, _Question] = {}
        ends = np.cumsum([0, *(r.n_numbers for r in readouts.values())]).tolist()
        for (name, readout), (start, stop) in zip(readouts.items(), pairwise(ends), strict=True):
            table = _table(name, readout, inside)
            self._questions[name] = _Question(
                readout.of,
                RoiTable(*(backend.copy(part) for part in table)),
                slice(start, stop),
                np.diff(table.offsets) == 0,
            )

    def push(self, subtraction: Subtraction, numbers: Array) -> None:
        """Write the answers for the newest volume into *numbers*, (n_numbers,) float64."""
        for asked in self._questions.values():
            values = getattr(subtraction, asked.of)
            self._backend.roi_means(values, asked.table, numbers[asked.part])

    def values(self, numbers: NDArray[np.float64], ready: bool) -> dict[str, NDArray[np.float64]]:
        """Return the answers by name, from the host's *numbers*.

        They are nan at voxels outside the brain, and everywhere if there is no baseline (*ready*).
        """
        return {
            name: np.where(asked.outside | (not ready), np.nan, numbers[asked.part])
            for name, asked in self._questions.items()
        }


class _Question(NamedTuple):
    of: Of
    table: RoiTable
    part: slice
    outside: NDArray[np.bool_]


def n_numbers(readouts: Mapping[str, Readout]) -> int:
    """Return how many numbers answer all of *readouts*."""
    return sum(readout.n_numbers for readout in readouts.values())


def _table(name: str, readout: Readout, inside: NDArray[np.bool_]) -> RoiTable:
    """Return a readout's rows on the host: one in all, or one a voxel, empty outside the brain."""
    weights = np.asarray(readout.image, np.float64).reshape(-1, order="F")
    if not np.isfinite(weights).all():
        raise ConfigError(f"signal {name!r}: weights must be finite")
    asked = np.flatnonzero(weights)
    found = inside[asked]
    if not found.any():
        raise ConfigError(f"signal {name!r} must have a voxel inside the brain, has none")
    ends = np.cumsum(found) if readout.each else np.array([found.sum()])
    asked = asked[found]
    return RoiTable(
        np.concatenate([[0], ends]).astype(np.int32),
        (np.cumsum(inside) - 1)[asked].astype(np.int32),
        (np.ones(asked.size) if readout.each else weights[asked]).astype(np.float32),
    )

"""ROI signals: the weighted mean of each region, against the same baseline as the voxels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, Backend, RoiTable, open_backend
from rtfmri.config import BaselineSettings
from rtfmri.errors import ConfigError
from rtfmri.stages.baseline import BaselineStage


@dataclass(frozen=True, slots=True)
class RoiValue:
    """One region at one volume.

    ``signal`` is its weighted mean in scanner units, ``psc`` and ``z`` compare that with the
    baseline of the region's own signal; both are nan until two baseline volumes were seen.
    """

    signal: float
    psc: float
    z: float


class RoiStage:
    """Averages each region and compares the average with its baseline.

    PSC and z are those of the region's mean signal, not means over voxels: a voxel near zero,
    whose own percentage is arbitrary, then weighs no more than its signal does.

    Parameters
    ----------
    backend : Backend
        Executes the averaging.
    rois : mapping of str to array
        Weights, 0 or more, of the voxels that are pushed; a mask is one case.
    n_conditions, settings
        As for `BaselineStage`.

    Raises
    ------
    ConfigError
        If a region is empty or a weight is negative or not finite.
    """

    def __init__(
        self,
        backend: Backend,
        rois: Mapping[str, NDArray[Any]],
        n_conditions: int,
        settings: BaselineSettings,
    ) -> None:
        self.names = tuple(rois)
        self._backend = backend
        self._table = RoiTable(*(backend.copy(part) for part in roi_table(rois)))
        host = backend if backend.name == "cpu" else open_backend("cpu")
        self._baseline = BaselineStage(host, len(self.names), n_conditions, settings, np.float32)

    def push(self, volume: Array, means: Array) -> None:
        """Average each region of *volume* into *means*, (n_rois,) float64 on the backend."""
        if self.names:
            self._backend.roi_means(volume, self._table, means)

    def compare(
        self, means: NDArray[np.float64], members: Sequence[int], usable: bool = True
    ) -> dict[str, RoiValue]:
        """Return each region's value; *means*, on the host, count for *members* if usable."""
        if not self.names:
            return {}
        self._baseline.push(means.astype(np.float32), members if usable else ())
        self._baseline.settle()
        _, psc, z = self._baseline.subtraction
        nan = np.nan
        return {
            name: RoiValue(float(mean), float(p), float(q))
            if self._baseline.ready
            else RoiValue(float(mean), nan, nan)
            for name, mean, p, q in zip(self.names, means, psc, z, strict=True)
        }

    def t(self, condition: int) -> dict[str, float]:
        """Return Welch's t of each region's signal, *condition* against the baseline, or nan."""
        contrast = self._baseline.contrast(condition) if self.names else None
        values = np.full(len(self.names), np.nan) if contrast is None else contrast.t
        return {name: float(t) for name, t in zip(self.names, values, strict=True)}


def roi_table(rois: Mapping[str, NDArray[Any]]) -> RoiTable:
    """Return *rois*, arrays of weights, as a table on the host; each is scaled to sum 1.

    Raises
    ------
    ConfigError
        If a region is empty or a weight is negative or not finite.
    """
    offsets, voxels, weights = [0], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for name, image in rois.items():
        flat = np.asarray(image, np.float64).reshape(-1, order="F")
        if not np.isfinite(flat).all() or flat.min() < 0:
            raise ConfigError(f"ROI {name!r}: weights must be finite and 0 or more")
        inside = np.flatnonzero(flat)
        if not inside.size:
            raise ConfigError(f"ROI {name!r} must have at least one voxel above 0, got none")
        voxels.append(inside.astype(np.int32))
        weights.append((flat[inside] / flat[inside].sum()).astype(np.float32))
        offsets.append(offsets[-1] + inside.size)
    return RoiTable(np.array(offsets, np.int32), np.concatenate(voxels), np.concatenate(weights))

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
    rois : mapping of str to (x, y, z) array
        Weights, 0 or more, on the run's grid; a mask is one case. Each is scaled to sum 1.
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
        self._table = RoiTable(*(backend.copy(part) for part in _roi_table(rois)))
        host = backend if backend.name == "cpu" else open_backend("cpu")
        self._baseline = BaselineStage(host, len(self.names), n_conditions, settings, np.float32)

    def push(self, volume: Array, members: Sequence[int]) -> dict[str, RoiValue]:
        """Return each region's value for *volume*, whose conditions are *members*."""
        if not self.names:
            return {}
        means = self._backend.roi_means(volume, self._table)
        self._baseline.push(means, members)
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


def _roi_table(rois: Mapping[str, NDArray[Any]]) -> RoiTable:
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

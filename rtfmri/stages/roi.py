"""ROI signals: the weighted mean of each region, against the same baseline as the voxels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Array, Backend, RoiTable, open_backend
from rtfmri.config import Config
from rtfmri.design import Design
from rtfmri.errors import ConfigError
from rtfmri.stages.baseline import BaselineStage
from rtfmri.stages.glm import ContrastMaps, GlmStage
from rtfmri.stages.kalman import KalmanFilter

CONFIDENCE = 0.95
"""Of the confidence sequences of effects."""


@dataclass(frozen=True, slots=True)
class RoiValue:
    """One region at one volume.

    ``signal`` is its weighted mean in scanner units, ``filtered`` the same as it is compared:
    detrended and filtered, where that is asked for. ``psc`` and ``z`` compare it with the baseline
    of the region's own signal; both are nan until two baseline volumes were seen. ``adjusted`` is
    the signal in percent of its level, without the drift, motion and confounds that the GLM has
    found so far (`GlmStage.adjusted`), where a signal of the feedback asks for that, else nan.
    ``t`` has the t, or F, of each contrast of the GLM after this volume, 0 where it cannot be said
    yet.
    """

    signal: float
    filtered: float
    psc: float
    z: float
    adjusted: float
    t: Mapping[str, float]

    def none(self) -> "RoiValue":
        """Return the value of this region where there is none: all nan."""
        return RoiValue(*(math.nan,) * 5, t=dict.fromkeys(self.t, math.nan))


@dataclass(frozen=True, slots=True)
class RoiContrast:
    """What the GLM says of one region after the volumes so far.

    ``statistic`` is t or F. For t: ``effect`` and its ``standard_error`` in scanner units, the
    natural logarithm ``log_e`` of the anytime-valid e-value, and the ``interval`` of the effect, a
    95 % confidence sequence: however often one looks, the chance that it ever misses the true
    effect is at most 5 % (`rtfmri.anytime`); None while it has no bounds. For F these are None.
    """

    kind: Literal["t", "F"]
    dof: int
    statistic: float
    effect: float | None = None
    standard_error: float | None = None
    log_e: float | None = None
    interval: tuple[float, float] | None = None


class RoiStage:
    """Averages each region, compares the average with its baseline, and fits the GLM to it.

    PSC and z are those of the region's mean signal, not means over voxels: a voxel near zero,
    whose own percentage is arbitrary, then weighs no more than its signal does.

    Parameters
    ----------
    backend : Backend
        Executes the averaging.
    rois : mapping of str to array
        Weights, 0 or more, of the voxels that are pushed; a mask is one case.
    n_conditions : int
        As for `BaselineStage`.
    config : Config
    design : Design, optional
        Of the GLM.

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
        config: Config,
        design: Design | None = None,
    ) -> None:
        self.names = tuple(rois)
        self._backend = backend
        self._table = RoiTable(*(backend.copy(part) for part in roi_table(rois)))
        host = backend if backend.name == "cpu" else open_backend("cpu")
        n = len(self.names)
        self._baseline = BaselineStage(host, n, n_conditions, config.baseline, np.float32)
        self._filter = KalmanFilter(n) if config.roi.filter == "kalman" else None
        self._glm = GlmStage(host, n, design, config.glm) if design and n else None
        self._row = np.zeros(len(design.columns) if design else 0)
        self._adjusts = any(
            getattr(signal, "measure", None) == "adjusted"
            for signal in config.feedback.signals.values()
        )

    def push(self, volume: Array, means: Array) -> None:
        """Average each region of *volume* into *means*, (n_rois,) float64 on the backend."""
        if self.names:
            self._backend.roi_means(volume, self._table, means)

    def compare(
        self,
        means: NDArray[np.float64],
        members: Sequence[int],
        usable: bool = True,
        *,
        detrended: NDArray[np.float64] | None = None,
        index: int = 0,
        row: NDArray[np.float64] | None = None,
    ) -> dict[str, RoiValue]:
        """Return each region's value.

        Parameters
        ----------
        means : (n_rois,) float64
            What `push` found, on the host.
        members : sequence of int
            The conditions that the volume counts for.
        usable : bool
            Whether it counts at all.
        detrended : (n_rois,) float64, optional
            The means of the detrended volume; *means* by default.
        index : int
            The volume's position in the run.
        row : (n_columns,) float64, optional
            Its row of the design.
        """
        if not self.names:
            return {}
        adjusted = np.full(len(self.names), np.nan)
        if self._glm and row is not None:
            self._fit(self._glm, means, usable, index, row)
            if self._adjusts:
                adjusted = self._glm.adjusted(means, row)
        filtered = means if detrended is None else detrended
        if self._filter:
            filtered = self._filter.push(filtered, usable)
        self._baseline.push(filtered.astype(np.float32), members if usable else ())
        self._baseline.settle()
        _, psc, z = self._baseline.subtraction
        if not self._baseline.ready:
            psc = z = np.full(len(self.names), np.nan)
        values = zip(self.names, means, filtered, psc, z, adjusted, self._ts(), strict=True)
        return {
            name: RoiValue(float(mean), float(level), float(p), float(q), float(a), t)
            for name, mean, level, p, q, a, t in values
        }

    def catch_up(self) -> None:
        """See `GlmStage.catch_up`."""
        if self._glm:
            self._glm.catch_up()

    def contrasts(self) -> dict[str, dict[str, RoiContrast]]:
        """Return what the GLM says of each region, by contrast and region; empty without one."""
        maps = self._glm.maps() if self._glm else {}
        return {
            contrast: {
                name: self._contrast(contrast, found, i) for i, name in enumerate(self.names)
            }
            for contrast, found in maps.items()
        }

    def _contrast(self, contrast: str, found: ContrastMaps, i: int) -> RoiContrast:
        value = RoiContrast(found.kind, found.dof, float(found.statistic[i]))
        if not self._glm or found.effect is None or found.variance is None or found.log_e is None:
            return value
        effect, error = float(found.effect[i]), math.sqrt(found.variance[i])
        critical = float(self._glm.test(contrast, i).critical_t(-math.log(1 - CONFIDENCE)))
        reach = critical * error if error > 0 else math.inf
        bounded = math.isfinite(reach)
        return replace(
            value,
            effect=effect,
            standard_error=error,
            log_e=float(found.log_e[i]),
            interval=(effect - reach, effect + reach) if bounded else None,
        )

    def _fit(
        self,
        glm: GlmStage,
        means: NDArray[np.float64],
        usable: bool,
        index: int,
        row: NDArray[np.float64],
    ) -> None:
        gate = np.array([usable], np.float32)
        glm.push(means.astype(np.float32), glm.told(index, row), self._row, usable=gate)
        glm.settle(row, usable)

    def _ts(self) -> list[dict[str, float]]:
        if not self._glm:
            return [{}] * len(self.names)
        names = [contrast.name for contrast in self._glm.design.contrasts]
        columns = self._glm.statistics.T.tolist()
        return [dict(zip(names, column, strict=True)) for column in columns]

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

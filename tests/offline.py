"""Feedback signals computed afterwards, in float64, from a run's recorded volumes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class Offline:
    """A run without motion correction or mask, as arrays.

    ``voxels`` of each region (n, n_voxels), its ``weights`` (n_voxels,), and which volumes are
    ``baseline`` (n,).
    """

    voxels: Mapping[str, Floats]
    weights: Mapping[str, Floats]
    baseline: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        volumes: Iterable[Any],
        rois: Mapping[str, NDArray[Any]],
        conditions: Sequence[Sequence[str]],
    ) -> "Offline":
        inside = {name: image > 0 for name, image in rois.items()}
        rows: dict[str, list[NDArray[Any]]] = {name: [] for name in rois}
        for volume in volumes:
            for name, mask in inside.items():
                rows[name].append(volume.data.T[mask.T].copy())  # in Fortran order
        return cls(
            {name: np.array(values, np.float64) for name, values in rows.items()},
            {name: np.float64(image.T[inside[name].T]) for name, image in rois.items()},
            np.array(["baseline" in names for names in conditions]),
        )

    def signal(self, roi: str) -> Floats:
        """Each volume's weighted mean of a region."""
        return np.average(self.voxels[roi], axis=1, weights=self.weights[roi])

    def against(self, series: Floats, of: str) -> Floats:
        """PSC or z along axis 0; nan before there are two baseline volumes."""
        out = np.full(series.shape, np.nan)
        for t in range(len(series)):
            before = series[:t][self.baseline[:t]]
            if len(before) >= 2:
                mean, sd = before.mean(axis=0), before.std(axis=0, ddof=1)
                away = series[t] - mean
                # A voxel that has not varied yet has no z to speak of: 0.
                by_sd = np.divide(away, sd, out=np.zeros_like(away), where=sd > 0)
                out[t] = 100 * away / mean if of == "psc" else by_sd
        return out

    def activity(self, roi: str, of: str) -> Floats:
        return self.against(self.signal(roi), of)

    def median(self, roi: str, of: str) -> Floats:
        return np.median(self.against(self.voxels[roi], of), axis=1)

    def eigenvariate(self, roi: str, of: str) -> Floats:
        """The newest volume's part of the first singular vectors of all volumes up to it."""
        table = self.against(self.voxels[roi], of)
        out = np.full(len(table), np.nan)
        first = int(np.flatnonzero(np.isfinite(table[:, 0]))[0])
        for t in range(first, len(table)):
            left, size, right = np.linalg.svd(table[first : t + 1], full_matrices=False)
            sign = np.sign(right[0].sum())
            out[t] = sign * left[-1, 0] * size[0] / math.sqrt(table.shape[1])
        return out

    def connectivity(self, one: str, other: str, window: int) -> Floats:
        """Correlation over the newest *window* volumes, from the fifth on."""
        pair = np.array([self.signal(one), self.signal(other)])
        out = np.full(pair.shape[1], np.nan)
        for t in range(4, pair.shape[1]):
            out[t] = np.corrcoef(pair[:, max(0, t - window + 1) : t + 1])[0, 1]
        return out

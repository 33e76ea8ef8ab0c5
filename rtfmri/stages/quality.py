"""Quality: is this volume any good, is the run, and how long will it take to have enough.

Everything is incremental: the cost of a volume does not depend on how many there were. What is
judged is judged on the backend, by limits that the host derives from the volumes before; the host
then reads the same numbers, and finds the same volumes usable.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import POSE_FIELDS, SLICE_FIELDS, Array, Backend, Moments, Shape
from rtfmri.config import QualitySettings

Floats = NDArray[np.float64]

MIN_INSIDE = 0.8
"""Share of the template's points that must lie inside a volume."""
SATURATED_PERCENT, SATURATED_VOXELS = 0.1, 10
"""A volume may have this many percent of all voxels, and at least this many voxels, more at its
largest value than the volume that had fewest. Good int16 volumes of two vendors had at
most 5 in all."""
WARM_UP = 3
"""Volumes before there are limits that come from the run."""
DEVIATIONS = 5.0
"""Limits are this many running standard deviations away from the running mean."""
SLICE_FLOOR, DVARS_FLOOR = 0.01, 0.15
"""The least such a deviation counts as, relative to the mean: so a slice must be off by 5 %, and
DVARS by 75 %, before a quiet run calls anything an outlier."""
MEMORY = 0.1
"""Weight of the newest volume in the running means."""

PROBLEMS = {
    "not finite": "more voxels that are not a number than the best volume before had",
    "no signal": "all voxels are equal",
    "saturated": "more voxels hold the largest value than `SATURATED_PERCENT` allows",
    "not registered": "motion correction did not converge",
    "out of view": "less than `MIN_INSIDE` of the reference is inside the volume",
    "motion": "framewise displacement above `QualitySettings.fd_limit_mm`",
    "spike": "DVARS far above that of the volumes before",
    "slice": "a slice far brighter than in the volumes before",
    "drop-out": "a slice far darker than in the volumes before",
    "missing": "it never came, or too late",
}
"""What an operator may be told of a volume, and the rule behind it."""

_BROKEN = {"not finite", "no signal", "saturated"}
"""With one of these the numbers of a volume say nothing about the run."""

_FD, _INSIDE, _CONVERGED = map(POSE_FIELDS.index, ("fd_power_mm", "inside", "converged"))
_TOTAL, _N_LARGEST, _N_NOT_FINITE = map(SLICE_FIELDS.index, ("total", "n_largest", "n_not_finite"))


class ReportParts(NamedTuple):
    """Which part of a volume's report, one float64 array, holds which measured numbers."""

    pose: slice
    """As in `POSE_FIELDS`; empty without motion correction."""
    sums: slice
    """What `Backend.compare` writes."""
    slices: slice
    """What `Backend.inspect` writes, row by row."""


def report_parts(n_slices: int, has_motion: bool) -> ReportParts:
    """Lay out the report; it is as long as its last part's ``stop``."""
    pose = len(POSE_FIELDS) if has_motion else 0
    end = pose + 2 + (n_slices + 1) * len(SLICE_FIELDS)
    return ReportParts(slice(0, pose), slice(pose, pose + 2), slice(pose + 2, end))


@dataclass(frozen=True, slots=True)
class QualityValue:
    """How good one volume is, and the run up to it.

    Attributes
    ----------
    dvars : float
        Root mean square over the brain's voxels of the difference from the volume before, in
        percent of the mean brain signal of the usable volumes before (Power 2012, NeuroImage
        59:2142); nan for the first volume.
    dvars_std : float
        The same relative to what the run lets expect: the root mean square DVARS of the usable
        volumes before that followed a usable one, which estimates the voxels' variance of
        differences (Afyouni & Nichols 2018, NeuroImage 172:291). 1 is ordinary; nan at first.
    global_signal : float
        Mean of the brain's voxels, in scanner units; one that is not finite counts as 0.
    n_slice_outliers : int
        Slices that are too bright or too dark.
    problems : tuple of str
        Of `PROBLEMS`, in that order.
    usable : bool
        Whether there are none.
    n_usable : int
        Usable volumes so far.
    usable_min : float
        Minutes that they make.
    forecast_min : float or None
        Minutes of scanning until there are `QualitySettings.target_min` of usable data, if the
        share of usable volumes stays as it was (Dosenbach 2017, NeuroImage 161:80); 0 when they
        are there, infinite while nothing is usable, None without a target.
    """

    dvars: float
    dvars_std: float
    global_signal: float
    n_slice_outliers: int
    problems: tuple[str, ...]
    usable: bool
    n_usable: int
    usable_min: float
    forecast_min: float | None


class QualityStage:
    """Judges each volume by the volumes before it, and keeps tSNR and SNR of the usable ones.

    For a volume: `inspect` as the scanner sent it; `push` when its brain voxels are there;
    `result` with the report, once that is on the host. Only `result` needs anything from the
    backend, so nothing waits until then.

    Parameters
    ----------
    backend : Backend
        What executes it.
    shape : (int, int, int)
        Voxels along x, y, z of what the scanner sends.
    n_voxels : int
        Voxels that are brain: the length of what `push` gets.
    settings : QualitySettings
        The limit of motion, and how much data is wanted.
    tr_s : float
        Seconds between volumes.
    report : (n,) float64
        On the backend, laid out as `report_parts` says; motion correction fills in its pose.
    has_motion : bool
        Whether there is a pose.

    Attributes
    ----------
    usable : (1,) float32
        On the backend: 1 if the volume pushed last is usable, else 0.
    """

    def __init__(
        self,
        backend: Backend,
        shape: Shape,
        n_voxels: int,
        settings: QualitySettings,
        tr_s: float,
        *,
        report: Array,
        has_motion: bool,
    ) -> None:
        parts = report_parts(shape[2], has_motion)
        self.usable = backend.zeros(1)
        self._backend, self._shape, self._settings, self._tr_s = backend, shape, settings, tr_s
        self._n_voxels, self._n_all = n_voxels, math.prod(shape)
        self._parts, self._words = parts, _words(parts)
        self._report = report[: parts.slices.stop]
        self._sums, self._slices = report[parts.sums], _rows(report[parts.slices])
        self._moments = Moments(backend.zeros(n_voxels), backend.zeros(n_voxels))
        self._successive, self._previous = backend.zeros(n_voxels), backend.zeros(n_voxels)
        self._n_seen = self._n_usable = self._n_pairs = 0
        self._previous_usable = False
        self._strangeness = 0.0
        self._mean_signal = self._mean_square = 0.0
        self._totals, self._dvars = _Running(shape[2], SLICE_FLOOR), _Running(1, DVARS_FLOOR)
        self._fewest_largest = self._fewest_not_finite = math.inf
        self._limits, self._unlearned = self._new_limits(), False
        self._newest: tuple[Floats, float] = np.zeros((0, 0)), 0.0

    @property
    def limits(self) -> Floats:
        """Lowest and highest value of each number in the next volume's report, (2, n), host."""
        self.catch_up()
        return self._limits

    def inspect(self, volume: Array) -> None:
        """Measure *volume* as the scanner sent it, (n_all,) int16, uint16 or float32."""
        self._backend.inspect(volume, self._shape, self._slices)

    def push(self, voxels: Array, limits: Array) -> None:
        """Judge the volume whose brain is *voxels*, and fold it into the maps if it is usable.

        Parameters
        ----------
        voxels : (n_voxels,) float32
            As they are compared with the baseline: resliced, and smoothed where that is asked for.
        limits : (2, n) float64
            `limits`, on the backend.
        """
        self._backend.compare(voxels, self._previous, self._sums)
        self._backend.judge(self._report, limits, self.usable)
        self._backend.track(
            voxels,
            self._previous,
            self._moments,
            self._successive,
            usable=self.usable,
            gain=1 / (self._n_usable + 1),
            successive_gain=1 / (self._n_pairs + 1) if self._previous_usable else 0.0,
        )

    def result(self, values: Floats) -> QualityValue:
        """Say how good the volume pushed last was, and learn from it.

        Parameters
        ----------
        values : (n,) float64
            The report, on the host; what lies behind its parts is left alone.
        """
        values = values[: self._parts.slices.stop]
        low, high = self.limits
        outside = np.stack([~(values >= low), values > high])
        slices = _rows(values[self._parts.slices])
        found = set(self._words[outside]) if outside.any() else set()
        if (
            "saturated" in found
            and slices[-1, _N_LARGEST] + slices[-1, _N_NOT_FINITE] == self._n_all
        ):
            found = found - {"saturated"} | {"no signal"}
        total, squares = values[self._parts.sums].tolist()
        signal, mean_signal = total / self._n_voxels, self._mean_signal
        dvars = math.sqrt(squares / self._n_voxels) if self._n_seen else math.nan
        expected = math.sqrt(self._mean_square)
        if found.isdisjoint(_BROKEN):
            self._newest = slices, dvars if self._previous_usable else math.nan
        self._count(signal, dvars, usable=not found)
        self._unlearned = True
        usable_min = self._n_usable * self._tr_s / 60
        return QualityValue(
            dvars=100 * dvars / mean_signal if mean_signal > 0 else math.nan,
            dvars_std=dvars / expected if expected else math.nan,
            global_signal=signal,
            n_slice_outliers=self._n_slice_outliers(outside) if found else 0,
            problems=tuple(word for word in PROBLEMS if word in found),
            usable=not found,
            n_usable=self._n_usable,
            usable_min=usable_min,
            forecast_min=self._forecast_min(usable_min),
        )

    def _n_slice_outliers(self, outside: NDArray[np.bool_]) -> int:
        either = (outside[0] | outside[1])[self._parts.slices]
        return int(_rows(either)[:-1, _TOTAL].sum())

    def missing(self) -> QualityValue:
        """Return what is to be said of a volume that never came."""
        usable_min = self._n_usable * self._tr_s / 60
        return QualityValue(
            dvars=math.nan,
            dvars_std=math.nan,
            global_signal=math.nan,
            n_slice_outliers=0,
            problems=("missing",),
            usable=False,
            n_usable=self._n_usable,
            usable_min=usable_min,
            forecast_min=self._forecast_min(usable_min),
        )

    def maps(self) -> dict[str, NDArray[np.float32]]:
        """Return maps of the usable volumes so far, (n_voxels,) float32 each, on the host.

        ``tsnr`` is the mean over the sample standard deviation. ``snr`` takes the noise from the
        differences of successive volumes instead, sqrt(mean square / 2) (von Neumann 1941, Ann.
        Math. Stat. 12:367), which drift and task hardly change. 0 where there is no noise.
        """
        mean, variance, successive = (
            self._backend.download(array).astype(np.float64)
            for array in (*self._moments, self._successive)
        )
        bessel = self._n_usable / max(self._n_usable - 1, 1)
        noises = {"tsnr": np.sqrt(variance * bessel), "snr": np.sqrt(successive / 2)}
        return {
            name: np.divide(mean, noise, out=np.zeros_like(mean), where=noise > 0).astype(
                np.float32
            )
            for name, noise in noises.items()
        }

    def catch_up(self) -> None:
        """Take the newest volume's numbers into what the next one is compared with.

        That may wait until its result is out.
        """
        if not self._unlearned:
            return
        slices, dvars = self._newest
        if slices.size:
            self._learn(slices, dvars)
        self._newest = np.zeros((0, 0)), 0.0
        self._limits, self._unlearned = self._new_limits(), False

    def _learn(self, slices: Floats, dvars: float) -> None:
        self._totals.update(slices[:-1, _TOTAL])
        if not math.isnan(dvars):
            self._dvars.update(np.array([dvars]))
        self._fewest_largest = min(self._fewest_largest, slices[-1, _N_LARGEST].item())
        self._fewest_not_finite = min(self._fewest_not_finite, slices[-1, _N_NOT_FINITE].item())

    def _count(self, signal: float, dvars: float, *, usable: bool) -> None:
        self._n_seen += 1
        if usable and self._previous_usable:
            self._n_pairs += 1
            self._mean_square += (dvars**2 - self._mean_square) / self._n_pairs
        if usable:
            self._n_usable += 1
            self._mean_signal += (signal - self._mean_signal) / self._n_usable
        # What is like the run differs from a stranger as much as the stranger from the run.
        self._strangeness = 0.0 if usable else dvars if dvars >= 0 else math.inf
        self._previous_usable = usable

    def _new_limits(self) -> Floats:
        limits = np.full((2, self._parts.slices.stop), np.inf)
        limits[0] = -np.inf
        low, high = limits
        if self._parts.pose.stop:
            low[_CONVERGED], low[_INSIDE] = 1, MIN_INSIDE
            high[_FD] = self._settings.fd_limit_mm
        highest_dvars = self._dvars.high.item() + self._strangeness
        high[self._parts.sums.start + 1] = self._n_voxels * highest_dvars**2
        least, most = _rows(low[self._parts.slices]), _rows(high[self._parts.slices])
        least[:-1, _TOTAL], most[:-1, _TOTAL] = self._totals.low, self._totals.high
        more = max(SATURATED_PERCENT / 100 * self._n_all, SATURATED_VOXELS)
        least[-1, _N_LARGEST] = 1
        most[-1, _N_LARGEST] = min(self._fewest_largest + more, self._n_all - 1)
        most[-1, _N_NOT_FINITE] = self._fewest_not_finite
        return limits

    def _forecast_min(self, usable_min: float) -> float | None:
        if self._settings.target_min is None:
            return None
        missing_min = max(self._settings.target_min - usable_min, 0)
        return missing_min * self._n_seen / self._n_usable if self._n_usable else math.inf


class _Running:
    """Exponentially weighted means and deviations, of which outliers cannot take hold.

    A value beyond the limits counts as the limit (Winsorised). So one outlier moves the mean by
    little; when the values have changed for good, the deviation grows by about 3/4 a volume
    (sqrt of ``(1 - MEMORY) * (1 + MEMORY * DEVIATIONS**2)``) until they are within the limits.

    Attributes
    ----------
    low, high : (n,) float64
        Lowest and highest value that is no outlier.
    """

    def __init__(self, n: int, floor: float) -> None:
        self._mean, self._variance = np.zeros((2, n))
        self._n_seen, self._floor = 0, floor
        self.low, self.high = np.full(n, -np.inf), np.full(n, np.inf)

    def update(self, values: Floats) -> None:
        """Take in one value of each, (n,)."""
        step = np.minimum(np.maximum(values, self.low), self.high) - self._mean
        self._n_seen += 1
        gain = max(1 / self._n_seen, MEMORY)
        self._mean = self._mean + gain * step
        self._variance = (1 - gain) * (self._variance + gain * step**2)
        if self._n_seen < WARM_UP:
            return
        # A value that is small among the others is not to be judged by its own size alone.
        size = np.abs(self._mean)
        least = self._floor * np.maximum(size, size.sum() / size.size)
        reach = DEVIATIONS * np.maximum(np.sqrt(self._variance), least)
        self.low, self.high = self._mean - reach, self._mean + reach


def _rows(slices: Array) -> Array:
    """Return the slices' part of an array of the report's layout as a table."""
    return slices.reshape(-1, len(SLICE_FIELDS))


def _words(parts: ReportParts) -> NDArray[np.object_]:
    """Return the problem of a number that is below its limit, and above it, (2, n)."""
    # A pose that is not a number is below any limit. All other numbers are.
    words = np.full((2, parts.slices.stop), "not registered", np.object_)
    if parts.pose.stop:
        words[:, _INSIDE], words[:, _FD] = "out of view", "motion"
    words[:, parts.sums] = "spike"
    low, high = (_rows(side[parts.slices]) for side in words)
    low[:, _TOTAL], high[:, _TOTAL] = "drop-out", "slice"
    low[:, _N_LARGEST], high[:, _N_LARGEST] = "no signal", "saturated"
    high[:, _N_NOT_FINITE] = "not finite"
    return words

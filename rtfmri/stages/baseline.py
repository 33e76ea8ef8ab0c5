"""Baseline and subtraction: moments of every condition, and each volume against the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.typing import DTypeLike

from rtfmri.backends import Array, Backend, Contrast, Moments, Subtraction
from rtfmri.config import BaselineSettings

MIN_VOLUMES = 2
"""Baseline volumes before the first difference is worth showing: a variance needs two."""


@dataclass(slots=True)
class ConditionState:
    """What is known of one condition so far."""

    moments: Moments
    n_volumes: int = 0
    sum_squared_weights: float = 1.0

    @property
    def n_effective(self) -> float:
        """Effective number of volumes, 1 / sum of squared weights (Kish 1965)."""
        return 1 / self.sum_squared_weights if self.n_volumes else 0.0

    @property
    def bessel(self) -> float:
        """Factor from population to sample variance; 0 as long as there is none."""
        return self.n_effective / (self.n_effective - 1) if self.n_volumes >= MIN_VOLUMES else 0.0

    def count(self, gain: float) -> None:
        """Take note that a volume was folded in with weight *gain*."""
        self.n_volumes += 1
        self.sum_squared_weights = (1 - gain) ** 2 * self.sum_squared_weights + gain**2


class BaselineStage:
    """Keeps each condition's running moments and subtracts the baseline from each volume.

    The conditions are averaged over all their volumes; the baseline, condition 0, according to
    `BaselineSettings.kind`. A volume is compared with the baseline volumes before it, then counts,
    if it is usable: the backend knows that at once, the stage when it is told by `settle`.

    Parameters
    ----------
    backend : Backend
        What executes it.
    n_voxels : int
        Voxels of a volume.
    n_conditions : int
        Conditions, the baseline included.
    settings : BaselineSettings
        Kind and length of the baseline.
    dtype : dtype
        Of the volumes; a sliding window keeps its volumes in it.

    Attributes
    ----------
    conditions : list of ConditionState
        The baseline first.
    subtraction : Subtraction
        The newest volume against the baseline before it.
    ready : bool
        Whether there was a baseline to subtract: two volumes or more.
    """

    def __init__(
        self,
        backend: Backend,
        n_voxels: int,
        n_conditions: int,
        settings: BaselineSettings,
        dtype: DTypeLike,
    ) -> None:
        def new() -> Array:
            return backend.zeros(n_voxels)

        self.conditions = [ConditionState(Moments(new(), new())) for _ in range(n_conditions)]
        self.subtraction = Subtraction(new(), new(), new())
        self.ready = False
        self._contrast = Contrast(new(), new(), new())
        self._backend = backend
        self._settings = settings
        self._n_voxels = n_voxels
        self._pending: list[tuple[ConditionState, float]] = []
        sliding = settings.kind == "sliding"
        self._ring = backend.zeros((settings.window_volumes, n_voxels), dtype) if sliding else None

    def push(self, volume: Array, members: Sequence[int], usable: Array | None = None) -> None:
        """Subtract the baseline from *volume*, then fold it into its conditions.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            On the backend.
        members : sequence of int
            The conditions it counts for; none at all is fine.
        usable : (1,) float32, optional
            On the backend; 0 leaves all conditions as they are, None says 1. `settle` is to be
            called with the same.
        """
        self.ready = self.conditions[0].n_volumes >= MIN_VOLUMES
        self._pending = [(self.conditions[c], gain) for c in members if (gain := self._gain(c))]
        others = list(self._pending)
        if self._ring is not None and 0 in members:
            others = [(state, gain) for state, gain in others if state is not self.conditions[0]]
            self._slide(volume, usable)
        else:
            into, gain = others.pop(0) if others else (None, 0.0)
            self._subtract(volume, into, gain, usable)
        for state, gain in others:
            self._backend.fold(volume, state.moments, gain=gain, usable=usable)

    def settle(self, usable: bool = True) -> None:
        """Count the volume that was pushed last, if it was usable."""
        for state, gain in self._pending if usable else ():
            state.count(gain)
            if self._ring is not None and state is self.conditions[0]:
                state.sum_squared_weights = gain  # all volumes in the window weigh the same
        self._pending = []

    def contrast(self, condition: int) -> Contrast | None:
        """Return effect, PSC and Welch's t of *condition* against the baseline.

        Returns
        -------
        Contrast or None
            Valid until the next call; None while either has fewer than two volumes.
        """
        state, baseline = self.conditions[condition], self.conditions[0]
        if min(state.n_volumes, baseline.n_volumes) < MIN_VOLUMES:
            return None
        self._backend.contrast(
            state.moments,
            state.n_effective,
            baseline.moments,
            baseline.n_effective,
            self._contrast,
        )
        return self._contrast

    def _gain(self, condition: int) -> float:
        """Weight of the next volume of *condition*; 0 leaves it out."""
        n = self.conditions[condition].n_volumes + 1
        if condition == 0:
            window = self._settings.window_volumes
            if self._settings.kind == "sliding":
                return 1 / min(n, window)
            if self._settings.kind == "fixed" and n > window:
                return 0.0
            if self._settings.kind == "exponential":
                # A plain mean at first, so that the first volume weighs no more than the others.
                return max(1 / n, 2 / (window + 1))
        return 1 / n

    def _subtract(
        self, volume: Array, into: ConditionState | None, gain: float, usable: Array | None
    ) -> None:
        baseline = self.conditions[0]
        self._backend.subtract(
            volume,
            baseline.moments,
            self.subtraction,
            bessel=baseline.bessel,
            into=into.moments if into else None,
            gain=gain,
            usable=usable,
        )

    def _slide(self, volume: Array, usable: Array | None) -> None:
        baseline, window = self.conditions[0], self._settings.window_volumes
        slot = baseline.n_volumes % window
        full = baseline.n_volumes >= window
        self._backend.slide(
            volume,
            baseline.moments,
            self._ring,
            slot,
            self.subtraction,
            bessel=baseline.bessel,
            gain=self._gain(0),
            full=full,
            usable=usable,
        )
        if full:
            start, stop = (self._n_voxels * part // window for part in (slot, slot + 1))
            if stop > start:
                self._backend.refresh(self._ring, baseline.moments, start, stop)

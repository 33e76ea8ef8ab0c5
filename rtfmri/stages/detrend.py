"""Detrending: the scanner's slow drift taken out of each volume as it comes.

Exponential means and incremental linear models are the usual ways in real time (Kopel, Sladky et
al. 2019, NeuroImage 191:421, compare them). Everything here is linear in the signal, so a region's
mean of detrended voxels is its detrended mean, and what a volume loses is its drift since the
run's start: the level stays in scanner units, where it was.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import POSE_FIELDS, Array, Backend, Contrasts, new_design, new_fit
from rtfmri.config import DetrendSettings, GlmSettings, HrfModel
from rtfmri.design import Design
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Paradigm

Floats = NDArray[np.float64]

UNPLANNED_S = 600.0
"""What a run is planned for where neither its length nor any event is known."""
PRIOR_SD = 1.0
"""Expected standard deviation over the planned run of each drift column's part of the signal, in
standard deviations of the noise."""


def with_derivative(hrf: HrfModel) -> HrfModel:
    """Return the model with its time derivative, which fits a response that is early or late."""
    return "glover + derivative" if hrf.startswith("glover") else "spm + derivative"


class _Way(Protocol):
    """One method of detrending."""

    def told(self, index: int) -> Floats: ...

    def push(self, volume: Array, told: Array, out: Array, usable: Array | None) -> None: ...

    def settle(self, usable: bool) -> None: ...


class DetrendStage:
    """Takes the drift out of each volume, at a constant cost.

    ``exponential`` subtracts the exponentially weighted mean of the volumes before, and adds the
    mean of those of the first `DetrendSettings.period_s`: while these come, both are the same, and
    volumes stay as they are. ``linear`` and ``cosine`` fit drift and task to all volumes so far,
    by the recursive least squares of `rtfmri.stages.glm`, and subtract the drift part alone, so
    that the task is not taken for drift. Drift counts from the run's start: what is subtracted
    begins at 0, and a slope that becomes known later hardly shifts the level.

    The fit has a prior: drift of about the noise's standard deviation. Each column of drift is
    scaled to a mean square of 1 over the planned run, and its coefficient is taken for normal with
    a standard deviation of `PRIOR_SD` times the noise's, which is ridge regression (Hoerl &
    Kennard 1970, Technometrics 12:55) with a penalty of ``1 / PRIOR_SD**2``: so the first volumes'
    noise is not taken for a large drift. The penalty weighs as much as one volume. A drift that
    the task does not resemble is found too small by 1 / (n + 1) at the end of a run of n volumes:
    0.5 % after 200.

    Parameters
    ----------
    backend : Backend
        What executes it.
    n_voxels : int
        Voxels of a volume.
    settings : DetrendSettings
        Of any method but ``off``.
    paradigm : Paradigm
        Its events are what the drift is told from; without any, there is drift only.
    tr_s : float
        Seconds between volumes.
    n_volumes : int, optional
        The run's planned length; by default up to the last event's end, or 10 minutes. Volumes
        beyond it are welcome: the line and the cosines go on.
    hrf : str
        The haemodynamic response with which the events are convolved.
    slice_time : float
        The moment a volume stands for, in TRs after its start.

    Raises
    ------
    ConfigError
        If the method is ``off``, there are more than 128 columns, or nilearn is missing.
    """

    def __init__(
        self,
        backend: Backend,
        n_voxels: int,
        settings: DetrendSettings,
        paradigm: Paradigm,
        tr_s: float,
        *,
        n_volumes: int | None = None,
        hrf: HrfModel = "spm",
        slice_time: float = 0.5,
    ) -> None:
        if settings.method == "off":
            raise ConfigError("detrend.method must not be 'off' where volumes are detrended")
        self._out = backend.zeros(n_voxels)
        self._way: _Way
        if settings.method == "exponential":
            self._way = _SlowMean(backend, n_voxels, settings.period_s, tr_s)
            return
        end_s = max((e.onset_s + e.duration_s for e in paradigm.events), default=0.0)
        n = n_volumes or math.ceil((end_s if end_s > 0 else UNPLANNED_S) / tr_s)
        model = GlmSettings(
            drift=settings.method, high_pass_s=settings.period_s, hrf=hrf, motion=False
        )
        try:
            design = Design(paradigm, model, tr_s, n_volumes=n, slice_time=slice_time)
        except ConfigError as error:
            raise ConfigError(f"detrend: {error}") from error
        self._way = _DriftFit(backend, n_voxels, design, n)

    def told(self, index: int) -> Floats:
        """Return what is known of volume *index* before it comes, (2, n), for `push`."""
        return self._way.told(index)

    def push(self, volume: Array, told: Array, usable: Array | None = None) -> Array:
        """Return a volume without its drift, and learn from it.

        Parameters
        ----------
        volume : (n_voxels,) float32
            On the backend, in scanner units.
        told : (2, n) float64
            On the backend: what `told` returned for it.
        usable : (1,) float32, optional
            On the backend; 0 leaves everything as it is: the volume then loses the drift of the
            usable one before it. None says 1. `settle` is to be called with the same.

        Returns
        -------
        (n_voxels,) float32
            On the backend, in scanner units, valid until the next call.
        """
        self._way.push(volume, told, self._out, usable)
        return self._out

    def settle(self, usable: bool = True) -> None:
        """Count the volume that was pushed last, if it was usable."""
        self._way.settle(usable)


class _SlowMean:
    """The exponentially weighted mean, against the mean that it had when its window was full."""

    def __init__(self, backend: Backend, n_voxels: int, period_s: float, tr_s: float) -> None:
        self._backend = backend
        self._slow, self._level = backend.zeros(n_voxels), backend.zeros(n_voxels)
        self._gain = -math.expm1(-tr_s / period_s)
        self._n = 0

    def told(self, index: int) -> Floats:
        """Return the weights of the next volume in the two means; *index* does not matter."""
        plain = 1 / (self._n + 1)
        return np.array([[max(plain, self._gain)], [plain if plain >= self._gain else 0.0]])

    def push(self, volume: Array, told: Array, out: Array, usable: Array | None) -> None:
        gains = told.reshape(2)
        self._backend.remove_slow(volume, self._slow, self._level, gains, out, usable=usable)

    def settle(self, usable: bool) -> None:
        self._n += usable


class _DriftFit:
    """Least squares of a design, for a run of *n* volumes."""

    def __init__(self, backend: Backend, n_voxels: int, design: Design, n: int) -> None:
        self._backend, self._design, p = backend, design, len(design.columns)
        self._drift = design.drift
        planned = design.rows(n)[:, self._drift]
        self._start, self._size = planned[0], np.sqrt((planned**2).mean(axis=0))
        new = backend.zeros
        penalty = np.zeros(p)
        penalty[self._drift] = 1 / PRIOR_SD**2
        state, self._step = new_design(backend, n_classes=1, n_rows=1, n_columns=p)
        # As if there had been a row for each column of drift, with nothing to be seen.
        self._state = state._replace(
            factor=backend.copy(np.diag(np.sqrt(penalty))[None]),
            squares=backend.copy(penalty[None]),
        )
        self._voxels = new_fit(backend, p, np.zeros(n_voxels, np.int32))
        self._whitening = backend.copy(np.array([1.0, 0.0]))
        self._no_pose, self._row = new(len(POSE_FIELDS), np.float64), new(p, np.float64)
        self._one_t = backend.copy(np.array([0, 1], np.int32)), new(1, np.int32)
        self._nothing = Contrasts(new((0, p), np.float64), new(1, np.int32), new(0, np.int32))
        self._no_statistics = new((0, n_voxels))

    def told(self, index: int) -> Floats:
        """Return the row of the design, and the contrast that is its drift."""
        told = np.zeros((2, len(self._design.columns)))
        told[0] = self._design.row(index)
        told[:, self._drift] = (told[0, self._drift] - self._start) / self._size
        return told

    def push(self, volume: Array, told: Array, out: Array, usable: Array | None) -> None:
        backend, step, voxels = self._backend, self._step, self._voxels
        drift = Contrasts(told[1:], *self._one_t)
        given = (told[0], self._no_pose, self._whitening, drift, self._state, step, self._row)
        backend.update_design(*given, motion_at=-1, usable=usable)
        asked = (self._nothing, step, self._no_statistics)
        backend.update_glm(volume, voxels, *asked, whitened=False, first_column=0, usable=usable)
        fit = voxels.coordinates, step.directions[0, 0], step.scales[0]
        backend.remove_fit(volume, *fit, out)

    def settle(self, usable: bool) -> None:
        """Do nothing: the fit counts on the backend."""

"""Neurofeedback signals: each takes a volume's `Result` and gives one number, or nan for none."""

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh

from rtfmri.config import (
    ActivitySettings,
    ConnectivitySettings,
    CustomSettings,
    DecoderSettings,
    DifferentialSettings,
    FeedbackSettings,
    Measure,
    SignalSettings,
)
from rtfmri.errors import ConfigError
from rtfmri.feedback.decoder import Decoder
from rtfmri.pipeline import Result
from rtfmri.stages.readout import Readout
from rtfmri.stages.roi import RoiValue

Floats = NDArray[np.float64]

_log = logging.getLogger(__name__)

MAX_EIGENVARIATE_VOXELS = 1000
"""Their covariance is kept, and its largest eigenvector sought, within a TR."""
_DENSE = 8
"""Voxels up to which all eigenvectors are computed, which the iterative solver cannot."""
_SMALLEST_PART = 1e-12
"""Of a variance, below which what is left of it is rounding."""


class Signal(Protocol):
    """A number a volume.

    Attributes
    ----------
    readout : Readout or None
        What it needs of single voxels; the answers are in `Result.readouts`, by its own name.
    """

    @property
    def readout(self) -> Readout | None:
        """The question."""
        ...

    def push(self, result: Result) -> float:
        """Take the next volume; return its value, nan for none."""
        ...


class Activity:
    """What one region does: its PSC, z or adjusted signal.

    Parameters
    ----------
    settings : ActivitySettings
    """

    readout: Readout | None = None

    def __init__(self, settings: ActivitySettings) -> None:
        self._roi, self._measure = settings.roi, settings.measure

    def push(self, result: Result) -> float:
        """See `Signal.push`."""
        return _measured(result.roi[self._roi], self._measure)


class Median:
    """The median of PSC or z over a region's voxels.

    Parameters
    ----------
    name : str
        Of the signal.
    readout : Readout
        The region's voxels, each.
    """

    def __init__(self, name: str, readout: Readout) -> None:
        self._name, self.readout = name, readout

    def push(self, result: Result) -> float:
        """See `Signal.push`."""
        values = _inside(result.readouts[self._name])
        return float(np.median(values)) if values.size else math.nan


class Eigenvariate:
    """The first eigenvariate of a region's voxels, as of this volume.

    With the volumes so far as rows of Y and the first eigenvector v of Y'Y, its sign such that
    its sum is positive, the newest volume's value is ``y @ v / sqrt(n_voxels)``: the scale of
    SPM's (spm_regions; Friston et al. 1997, NeuroImage 6:218), by which voxels that all do the
    same have the value of each. Y is PSC or z against the running baseline.

    Parameters
    ----------
    name : str
        Of the signal.
    readout : Readout
        The region's voxels, each; at most `MAX_EIGENVARIATE_VOXELS`.

    Raises
    ------
    ConfigError
        If there are more.
    """

    def __init__(self, name: str, readout: Readout) -> None:
        if readout.n_numbers > MAX_EIGENVARIATE_VOXELS:
            raise ConfigError(
                f"feedback.signals.{name}: an eigenvariate takes at most "
                f"{MAX_EIGENVARIATE_VOXELS} voxels, the region has {readout.n_numbers}; take a "
                "smaller one, or the mean or median"
            )
        self._name, self.readout = name, readout
        self._products: Floats = np.zeros((0, 0))
        self._vector: Floats = np.zeros(0)

    def push(self, result: Result) -> float:
        """See `Signal.push`; what is not usable has a value, but changes nothing."""
        values = _inside(result.readouts[self._name])
        if not values.size:
            return math.nan
        if not self._vector.size:
            self._products = np.zeros((values.size, values.size))
            self._vector = np.full(values.size, 1 / math.sqrt(values.size))
        if result.quality.usable:
            self._products += np.outer(values, values)
            self._vector = _first_eigenvector(self._products, self._vector)
        return float(values @ self._vector) / math.sqrt(values.size)


class Differential:
    """What one region does more than another.

    Parameters
    ----------
    settings : DifferentialSettings
    """

    readout: Readout | None = None

    def __init__(self, settings: DifferentialSettings) -> None:
        self._plus, self._minus = settings.plus, settings.minus
        self._measure = settings.measure

    def push(self, result: Result) -> float:
        """See `Signal.push`."""
        plus, minus = result.roi[self._plus], result.roi[self._minus]
        return _measured(plus, self._measure) - _measured(minus, self._measure)


class Connectivity:
    """The correlation, or partial correlation, of two regions' signals.

    The signals are the regions' as they are compared with their baseline: detrended and filtered,
    where that is asked for. Covariances are those of the newest usable volumes, or exponentially
    weighted ones: with weight w of the newest, ``C = (1 - w) (C + w d d')``, where d is its
    distance from the mean before it (West 1979, CACM 22:532); at first all weigh the same. For a
    partial correlation, what the given regions explain of both is taken out of their covariance.
    There is no value before there are five volumes more than given regions.

    Parameters
    ----------
    settings : ConnectivitySettings
    """

    readout: Readout | None = None

    def __init__(self, settings: ConnectivitySettings) -> None:
        self._names = (*settings.rois, *settings.given)
        self._least = 5 + len(settings.given)
        self._n, k = 0, len(self._names)
        self._gain = 2 / (settings.window_volumes + 1)
        sliding = settings.window == "sliding"
        self._ring = np.zeros((settings.window_volumes, k)) if sliding else None
        self._mean, self._covariance = np.zeros(k), np.zeros((k, k))

    def push(self, result: Result) -> float:
        """See `Signal.push`; what is not usable has no value, and counts for nothing."""
        values = np.array([result.roi[name].filtered for name in self._names])
        if not (result.quality.usable and np.isfinite(values).all()):
            return math.nan
        self._take(values)
        return math.nan if self._n < self._least else _correlation(self._covariance)

    def _take(self, values: Floats) -> None:
        self._n += 1
        if self._ring is not None:
            self._ring[(self._n - 1) % len(self._ring)] = values
            kept = self._ring[: self._n]
            away = kept - kept.mean(axis=0)
            self._covariance = away.T @ away / len(kept)
            return
        gain = max(1 / self._n, self._gain)
        away = values - self._mean
        self._mean = self._mean + gain * away
        self._covariance = (1 - gain) * (self._covariance + gain * np.outer(away, away))


class Decoded:
    """The decision function of a trained linear model.

    Parameters
    ----------
    name : str
        Of the signal.
    decoder : Decoder
    """

    def __init__(self, name: str, decoder: Decoder) -> None:
        self._name, self._intercept = name, decoder.intercept
        self.readout = Readout(decoder.weights, decoder.of)

    def push(self, result: Result) -> float:
        """See `Signal.push`."""
        (value,) = result.readouts[self._name]
        return float(value) + self._intercept


class Custom:
    """Somebody's own function; an exception in it is counted, and gives no value.

    Parameters
    ----------
    name : str
        Of the signal.
    function : callable
        Takes a `Result`, returns a number or None.

    Attributes
    ----------
    n_failed : int
        Volumes at which it raised, or returned what is no number.
    """

    readout: Readout | None = None

    def __init__(self, name: str, function: Callable[[Result], Any]) -> None:
        self._name, self._function = name, function
        self.n_failed = 0

    def push(self, result: Result) -> float:
        """See `Signal.push`."""
        try:
            value = self._function(result)
            return math.nan if value is None else float(value)
        except Exception as error:  # it is not ours: whatever it raises must not end the run
            self.n_failed += 1
            level = logging.DEBUG if self.n_failed > 1 else logging.WARNING
            _log.log(
                level,
                "signal %r has no value at volume %d: %s: %s",
                self._name,
                result.index,
                type(error).__name__,
                error,
            )
            return math.nan


def load_functions(settings: FeedbackSettings) -> dict[str, Callable[[Result], Any]]:
    """Return what the custom signals call, by signal.

    Raises
    ------
    ConfigError
        If one cannot be found or made.
    """
    return {
        name: _load_function(name, asked.function)
        for name, asked in settings.signals.items()
        if isinstance(asked, CustomSettings)
    }


def check_signals(settings: FeedbackSettings, rois: Sequence[str]) -> None:
    """Check what can be known before the first volume.

    Raises
    ------
    ConfigError
        If a signal names a region that is not there, or asks for what cannot be, or ``show``
        names none of the signals.
    """
    for name, asked in settings.signals.items():
        for roi in _regions_of(asked):
            if roi not in rois:
                known = ", ".join(rois) or "none; give one with --roi NAME=FILE"
                raise ConfigError(
                    f"feedback.signals.{name}: there is no ROI {roi!r}; the ROIs are {known}"
                )
        match asked:
            case ConnectivitySettings() if len(set(_regions_of(asked))) < len(_regions_of(asked)):
                raise ConfigError(
                    f"feedback.signals.{name}: rois and given must be different regions"
                )
            case ActivitySettings(measure="adjusted", summary="median" | "eigenvariate"):
                raise ConfigError(
                    f"feedback.signals.{name}: measure 'adjusted' is of a region's mean, got "
                    f"summary {asked.summary!r}"
                )
    names = tuple(settings.signals) or tuple(rois)
    if settings.show is not None and settings.show not in names:
        raise ConfigError(
            f"feedback.show must be one of the signals {', '.join(names)}; got {settings.show!r}"
        )


def make_signals(
    settings: FeedbackSettings,
    rois: Mapping[str, NDArray[Any]],
    decoders: Mapping[str, Decoder],
    functions: Mapping[str, Callable[[Result], Any]],
) -> dict[str, Signal]:
    """Return a run's signals by name; without any in the settings, each region's PSC.

    Parameters
    ----------
    settings : FeedbackSettings
        Checked by `check_signals`.
    rois : mapping of str to (x, y, z) array
    decoders, functions : mapping
        Of the decoder and the custom signals, by signal.
    """
    asked: Mapping[str, SignalSettings] = settings.signals or {
        name: ActivitySettings(kind="activity", roi=name) for name in rois
    }
    return {name: _make(name, one, rois, decoders, functions) for name, one in asked.items()}


def _make(
    name: str,
    asked: SignalSettings,
    rois: Mapping[str, NDArray[Any]],
    decoders: Mapping[str, Decoder],
    functions: Mapping[str, Callable[[Result], Any]],
) -> Signal:
    match asked:
        case ActivitySettings(summary="mean"):
            return Activity(asked)
        case ActivitySettings():
            of: Any = asked.measure
            readout = Readout(rois[asked.roi], of, each=True)
            return (Median if asked.summary == "median" else Eigenvariate)(name, readout)
        case DifferentialSettings():
            return Differential(asked)
        case ConnectivitySettings():
            return Connectivity(asked)
        case DecoderSettings():
            return Decoded(name, decoders[name])
        case CustomSettings():
            return Custom(name, functions[name])


def _regions_of(asked: SignalSettings) -> tuple[str, ...]:
    match asked:
        case ActivitySettings():
            return (asked.roi,)
        case DifferentialSettings():
            return asked.plus, asked.minus
        case ConnectivitySettings():
            return *asked.rois, *asked.given
    return ()


def _measured(value: RoiValue, measure: Measure) -> float:
    return float(getattr(value, measure))


def _inside(values: Floats) -> Floats:
    """Return the values of voxels that have one: those outside the brain never do."""
    return values[np.isfinite(values)]


def _first_eigenvector(products: Floats, start: Floats) -> Floats:
    """Return the eigenvector of the largest eigenvalue, of length 1, its sum not negative."""
    if not products.any():
        return start
    if len(products) <= _DENSE:
        vector = np.linalg.eigh(products)[1][:, -1]
    else:
        vector = eigsh(products, k=1, which="LA", v0=start)[1][:, 0]
    return np.asarray(-vector if vector.sum() < 0 else vector)


def _correlation(covariance: Floats) -> float:
    """Return the correlation of the first two variables, without the others' part in both."""
    variances = covariance.diagonal()
    if not (variances > 0).all():
        return math.nan
    scale = np.sqrt(np.outer(variances, variances))
    matrix = covariance / scale
    if len(matrix) > 2:
        given = matrix[2:, 2:]
        if np.linalg.matrix_rank(given) < len(given):
            return math.nan
        matrix = matrix[:2, :2] - matrix[:2, 2:] @ np.linalg.solve(given, matrix[2:, :2])
        if (matrix.diagonal() < _SMALLEST_PART).any():
            return math.nan
    value = matrix[0, 1] / math.sqrt(matrix[0, 0] * matrix[1, 1])
    return float(np.clip(value, -1, 1))


def _load_function(name: str, named: str) -> Callable[[Result], Any]:
    """Return the function that a custom signal names; of a class, `push` of a new one."""
    what = f"feedback.signals.{name}: function {named!r}"
    try:
        found = _find(named)
        if isinstance(found, type):
            found = found().push
    except Exception as error:  # a module of somebody else's can raise anything
        raise ConfigError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{what} must be a function or a class with push, it is {found!r}")
    function: Callable[[Result], Any] = found
    return function


def _find(named: str) -> Any:
    module, colon, attribute = named.rpartition(":")
    if not colon:
        for point in entry_points(group="rtfmri.signals", name=named):
            return point.load()
        raise LookupError(
            "it is no entry point of the group rtfmri.signals, nor MODULE:NAME or FILE.py:NAME"
        )
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), attribute)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None:
        raise LookupError("it is no Python file")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, attribute)

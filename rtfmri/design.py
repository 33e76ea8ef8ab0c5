"""The design matrix: what each volume's signal is explained by, and what is asked of it.

Columns stand in this order: the constant, drift, the user's confounds, motion, conditions. What is
asked, as a rule, are the last of them, so that a statistic is made of the coordinates that nothing
before explains (`rtfmri.stages.glm`).
"""

import csv
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.config import BaselineSettings, Config, GlmSettings
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Event, Paradigm

Floats = NDArray[np.float64]

MOTION_COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
"""mm and radians, as fMRIPrep names them; known only when a volume has been registered."""
MAX_COLUMNS = 128
MAX_CONTRASTS = 64
_HRF_S = 32.0
"""Length of nilearn's haemodynamic responses: a condition is silent this long after its end."""
_ANY_TR_S = 2.0
_ARITHMETIC = re.compile(r"(?:[^\W\d]\w*(?!\s*\()|\d+(?:\.\d*)?|[-+*/() ])+")
"""What may be evaluated: a recording's settings may come from anybody."""
_SLICE_TIME = 0.5
"""Of a TR: a volume stands for its middle, as in nilearn."""


@dataclass(frozen=True, eq=False, slots=True)
class Contrast:
    """A question: t asks for the sign of one sum of columns, F whether any of several is not 0.

    Parameters
    ----------
    name : str
    kind : {"t", "F"}
    weights : (n_rows, n_columns) float64
        One row for t; linearly independent rows for F.
    """

    name: str
    kind: Literal["t", "F"]
    weights: Floats


class Confounds(NamedTuple):
    """The user's regressors: ``values`` (n, n_confounds) float64, nan where not known; names."""

    values: Floats
    names: tuple[str, ...]


class Design:
    """The design matrix of a run, row by row.

    Parameters
    ----------
    paradigm : Paradigm
        Its events are convolved with the haemodynamic response by nilearn.
    settings : GlmSettings
    tr_s : float
        Seconds between volumes.
    n_volumes : int, optional
        The run's planned length, which decides how many cosines of drift there are; by default up
        to the last event's end. Volumes beyond it are welcome: the cosines go on.
    baseline : BaselineSettings, optional
        Names the condition that the others are compared with where no contrasts are given.
    confounds : Confounds, optional
        The user's regressors, a row a volume; they are 0 in volumes beyond.
    has_motion : bool
        Whether the volumes are registered, so that motion can be a regressor.
    slice_time : float
        The moment a volume stands for, in TRs after its start.

    Raises
    ------
    ConfigError
        If a contrast names what is no column, is all zero or has dependent rows, a name is given
        twice, or there are more than 128 columns or 64 contrasts.

    Attributes
    ----------
    columns : tuple of str
    contrasts : tuple of Contrast
    drift : slice
        The columns of drift.
    motion_at : int
        The first of the six motion columns, or -1.
    conditions : slice
        The columns of the conditions, which are the last.
    silent : tuple of str
        Conditions of which nothing falls into the planned run.
    """

    def __init__(
        self,
        paradigm: Paradigm,
        settings: GlmSettings,
        tr_s: float,
        *,
        n_volumes: int | None = None,
        baseline: BaselineSettings | None = None,
        confounds: Confounds | None = None,
        has_motion: bool = True,
        slice_time: float = _SLICE_TIME,
    ) -> None:
        events = paradigm.events
        end_s = max((e.onset_s + e.duration_s for e in events), default=0.0)
        self._n_planned = max(2, n_volumes or math.ceil(end_s / tr_s))
        n_known = max(self._n_planned, math.ceil((end_s + _HRF_S) / tr_s) + 1)
        times_s = np.asarray((np.arange(n_known) + slice_time) * tr_s, np.float64)
        self._conditions, names = _conditions(events, times_s, self._n_planned, settings.hrf)
        confounds = confounds or Confounds(np.zeros((0, 0)), ())
        self._confounds = _standardised(confounds)
        self._drift = settings.drift
        run_s = self._n_planned * tr_s
        self._n_cosines = min(self._n_planned - 1, math.floor(2 * run_s / settings.high_pass_s))
        drift = self._drift_columns()
        self.drift = slice(1, 1 + len(drift))
        motion = MOTION_COLUMNS if settings.motion and has_motion else ()
        self.columns = ("constant", *drift, *confounds.names, *motion, *names)
        self.conditions = slice(len(self.columns) - len(names), len(self.columns))
        self.motion_at = self.columns.index(motion[0]) if motion else -1
        self._motion = np.zeros(len(motion))
        planned = self._conditions[: self._n_planned]
        self.silent = tuple(name for i, name in enumerate(names) if not planned[:, i].any())
        _check_names(self.columns)
        asked = dict(settings.contrasts) or _against_the_baseline(names, paradigm, baseline)
        self.contrasts = _contrasts(asked, settings.f_contrasts, self.columns)
        self._rows = np.array([self._row(index) for index in range(n_known)])

    def row(self, index: int) -> Floats:
        """Return the row of volume *index*, (n_columns,); motion is 0, to be filled in."""
        return np.array(self._rows[index]) if index < len(self._rows) else self._row(index)

    def _row(self, index: int) -> Floats:
        conditions, confounds = (
            table[index] if index < len(table) else np.zeros(table.shape[1])
            for table in (self._conditions, self._confounds)
        )
        return np.concatenate([[1.0], self._drift_at(index), confounds, self._motion, conditions])

    def rows(self, n_volumes: int) -> Floats:
        """Return the first rows, (n_volumes, n_columns)."""
        return np.array([self.row(index) for index in range(n_volumes)])

    def _drift_columns(self) -> tuple[str, ...]:
        if self._drift == "linear":
            return ("drift_1",)
        n = self._n_cosines if self._drift == "cosine" else 0
        return tuple(f"drift_{k}" for k in range(1, n + 1))

    def _drift_at(self, index: int) -> Floats:
        """Cosines of the discrete cosine transform (II), as nilearn's, or a line from -1 to 1."""
        n = self._n_planned
        if self._drift == "linear":
            return np.array([(2 * index + 1) / n - 1])
        k = np.arange(1, len(self._drift_columns()) + 1)
        return np.asarray(np.sqrt(2 / n) * np.cos(np.pi / n * (index + 0.5) * k))


def design_of(
    paradigm: Paradigm,
    config: Config,
    tr_s: float,
    *,
    n_volumes: int | None,
    confounds: Confounds | None,
    has_motion: bool,
) -> Design | None:
    """Return the design of a run; None if it has no GLM, which needs events.

    Raises
    ------
    ConfigError
        As `Design` does.
    """
    if not _wanted(paradigm, config):
        return None
    return Design(
        paradigm,
        config.glm,
        tr_s,
        n_volumes=n_volumes,
        baseline=config.baseline,
        confounds=confounds,
        has_motion=has_motion,
        slice_time=slice_time(config),
    )


def slice_time(config: Config) -> float:
    """Return the moment a volume stands for, in TRs after its start; slice timing moves it."""
    return _SLICE_TIME if config.slice_timing.method == "off" else 0.0


def check_design(
    paradigm: Paradigm,
    config: Config,
    confounds: Confounds | None,
    n_volumes: int | None = None,
) -> None:
    """Check what can be known of a design before the first volume: contrasts and names.

    Raises
    ------
    ConfigError
        As `Design` does.
    """
    if not _wanted(paradigm, config):
        return
    settings = config.glm
    if config.tr_s is None:  # nor is it known how many cosines there will be
        asked = {name: e for name, e in settings.contrasts.items() if "drift_" not in e}
        f_asked = {name: e for name, e in settings.f_contrasts.items() if "drift_" not in str(e)}
        changes = {"drift": "none", "contrasts": asked, "f_contrasts": f_asked}
        settings = settings.model_copy(update=changes)
    Design(
        paradigm,
        settings,
        config.tr_s or _ANY_TR_S,
        n_volumes=n_volumes,
        baseline=config.baseline,
        confounds=confounds,
    )


def _wanted(paradigm: Paradigm, config: Config) -> bool:
    return config.glm.noise != "off" and bool(paradigm.events)


def read_confounds(path: str | Path) -> Confounds:
    """Read confounds from a table: tab-separated, names in the first line, then a line a volume.

    What fMRIPrep writes will do, and so will physiological regressors of any program. ``n/a``
    stands for a value that is not known (BIDS), which the column's mean takes the place of.

    Raises
    ------
    ConfigError
        If the file cannot be read, a line has too few or too many cells, or a cell is no number.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"glm.confounds: cannot read {path}: {error}") from error
    if len(rows) < 2:
        raise ConfigError(f"glm.confounds: {path} must have a header and a line a volume")
    names = tuple(name.strip() for name in rows[0])
    values = np.empty((len(rows) - 1, len(names)))
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise ConfigError(
                f"glm.confounds: {path}, line {line}: {len(names)} cells expected, got {len(row)}"
            )
        values[line - 2] = [_number(cell, path, line) for cell in row]
    return Confounds(values, names)


def _number(cell: str, path: str | Path, line: int) -> float:
    if cell.strip() == "n/a":
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise ConfigError(
            f"glm.confounds: {path}, line {line}: cells must be finite numbers or n/a, "
            f"got {cell!r}"
        )
    return value


def _standardised(confounds: Confounds) -> Floats:
    """Return confounds with mean 0 and standard deviation 1, 0 where they are not known."""
    values = confounds.values
    if not len(values):
        return np.zeros((0, len(confounds.names)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of nothing but nan
        centred = values - np.nanmean(values, axis=0)
        sd = np.nanstd(values, axis=0)
    scaled: Floats = np.nan_to_num(centred / np.where(sd > 0, sd, 1.0))
    return scaled


def _conditions(
    events: Sequence[Event], times_s: Floats, n_planned: int, hrf: str
) -> tuple[Floats, tuple[str, ...]]:
    """Return the conditions' columns, (n_times, n), and their names.

    nilearn's values depend a little on how many it is asked for, since its fine grid of times is
    spread over all of them: the planned run gets those that an offline analysis of it has. Events
    after its end are left out there, since nilearn would move them to its last moment.
    """
    if not events:
        return np.zeros((0, 0)), ()
    table = _convolved(events, times_s, hrf)
    columns = tuple(table)
    within = [event for event in events if event.onset_s <= times_s[n_planned - 1]]
    planned = _convolved(within, times_s[:n_planned], hrf) if within else {}
    for name in columns:
        table[name][:n_planned] = planned.get(name, 0.0)
    return np.column_stack(list(table.values())), columns


def _convolved(events: Sequence[Event], times_s: Floats, hrf: str) -> dict[str, Floats]:
    """Return the conditions' columns by nilearn, (n_times,) each."""
    try:
        import pandas as pd
        from nilearn.glm.first_level import make_first_level_design_matrix
    except ImportError as error:
        raise ConfigError(
            f"the GLM needs nilearn ({error}); install it, or set glm.noise to 'off'"
        ) from error

    table = pd.DataFrame(
        {
            "onset": [e.onset_s for e in events],
            "duration": [e.duration_s for e in events],
            "trial_type": [e.trial_type for e in events],
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is checked or documented here
        matrix = make_first_level_design_matrix(times_s, table, hrf_model=hrf, drift_model=None)
    matrix = matrix.drop(columns="constant")
    return {str(name): np.array(matrix[name], np.float64) for name in matrix.columns}


def _check_names(columns: Sequence[str]) -> None:
    if len(columns) > MAX_COLUMNS:
        raise ConfigError(
            f"a design has at most {MAX_COLUMNS} columns, got {len(columns)}: leave out "
            "confounds, or raise glm.high_pass_s"
        )
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ConfigError(
            f"columns of the design must have different names, got {', '.join(twice)} twice: "
            "rename the trial_type or the confound"
        )


def _against_the_baseline(
    names: Sequence[str], paradigm: Paradigm, baseline: BaselineSettings | None
) -> dict[str, Mapping[str, float]]:
    """Return each condition, less the baseline where that is a column: name to weights."""
    named = baseline.condition if baseline else None
    less = {named: -1.0} if named is not None and named in names else {}
    tasks = (name for name in paradigm.conditions if name in names and name != named)
    return {name: {name: 1.0, **less} for name in tasks}


def _contrasts(
    asked: Mapping[str, str | Mapping[str, float]],
    asked_f: Mapping[str, Sequence[str]],
    columns: Sequence[str],
) -> tuple[Contrast, ...]:
    found = [
        Contrast(name, "t", np.array([_weights(name, expression, columns)]))
        for name, expression in asked.items()
    ]
    for name, expressions in asked_f.items():
        if name in asked:
            raise ConfigError(f"glm.f_contrasts.{name} must have a name of its own")
        weights = np.array([_weights(name, e, columns) for e in expressions])
        if not len(weights) or np.linalg.matrix_rank(weights) < len(weights):
            raise ConfigError(
                f"glm.f_contrasts.{name} must be one or more linearly independent contrasts, "
                f"got {list(expressions)}"
            )
        found.append(Contrast(name, "F", weights))
    if len(found) > MAX_CONTRASTS:
        raise ConfigError(f"there may be at most {MAX_CONTRASTS} contrasts, got {len(found)}")
    return tuple(found)


def _weights(name: str, expression: str | Mapping[str, float], columns: Sequence[str]) -> Floats:
    """Return the weights of a contrast in nilearn's syntax, such as ``tap - rest``."""
    if not isinstance(expression, str):
        return np.array([expression.get(column, 0.0) for column in columns])
    from nilearn.glm.contrasts import expression_to_contrast_vector

    if expression not in columns and not _ARITHMETIC.fullmatch(expression):
        raise ConfigError(
            f"contrast {name!r} must be names of columns, numbers, + - * / and brackets, "
            f"got {expression!r}"
        )
    try:
        weights = np.asarray(expression_to_contrast_vector(expression, list(columns)))
    except (ValueError, TypeError, SyntaxError, AttributeError):
        weights = np.empty(0)
    if weights.shape != (len(columns),) or not np.isfinite(weights).all():
        raise ConfigError(
            f"contrast {name!r} must be a sum of columns of the design such as 'a - b', got "
            f"{expression!r}; the columns are {', '.join(columns)}"
        )
    if not weights.any():
        raise ConfigError(f"contrast {name!r} must not be 0 everywhere, got {expression!r}")
    return weights.astype(np.float64)

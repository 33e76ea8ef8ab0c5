"""Training of a decoder: two conditions of a localiser, told apart by scikit-learn.

A recording is replayed through a pipeline like that of its run, and the decoder sees the very
numbers that it will see in the next run (`rtfmri.stages.readout`).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import ConfigError
from rtfmri.feedback.decoder import Decoder, Score, feature_settings
from rtfmri.recording import Recording, open_recording
from rtfmri.stages.readout import Of, Readout
from rtfmri.volume import Grid

_log = logging.getLogger(__name__)

_MOST_FOLDS = 10
_MOST_ROUNDS = 10_000
_FEATURES = "features"


class Sample(NamedTuple):
    """One volume: its voxels (n_voxels,), nan outside the brain, its class, its block and run."""

    values: NDArray[np.float32]
    positive: bool
    block: int
    run: int


def train(
    paths: Sequence[str | Path],
    classes: tuple[str, str],
    *,
    of: Of = "psc",
    within: str | None = None,
    model: Literal["svm", "logistic"] = "svm",
    c: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
) -> Decoder:
    """Train a decoder, and cross-validate it.

    Volumes are labelled by the conditions that they count for, so the haemodynamic delay and
    transitions are taken care of; those that were not usable, or had no baseline, are left out.
    With several recordings each fold leaves one out, else some blocks of the only one. Voxels are
    standardised within what a fold is trained on; classes weigh the same.

    Parameters
    ----------
    paths : sequence of path
        Recordings of runs on one grid.
    classes : (str, str)
        The conditions for which the value is to be negative and positive.
    of : {"psc", "z"}
        What is looked at. z divides by the standard deviation of the baseline so far, which is
        noisy in a run's first minutes: on Haxby's faces and houses PSC told 84 % of volumes
        rightly, z 79 %.
    within : str, optional
        A region of the recordings; the brain by default.
    model : {"svm", "logistic"}
        scikit-learn's LinearSVC or LogisticRegression.
    c : float
        Their inverse strength of regularisation.
    say : callable
        Told what is being done, in a few words.

    Raises
    ------
    ConfigError
        If grids differ, a condition or region is not there, or there are too few blocks.
    RecordingError
        If a recording cannot be read.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if classes[0] == classes[1]:
        raise ConfigError(f"the two conditions must differ, got {classes[0]!r} twice")
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ConfigError("a recording must be given once: what is left out must not be seen")
    grid, image, settings, samples = _samples(paths, classes, of, within, say)
    table = np.array([sample.values for sample in samples])
    inside = np.isfinite(table).all(axis=0)
    if not inside.any():
        raise ConfigError("no voxel is in the brain of all recordings")
    positive = np.array([sample.positive for sample in samples])
    values = table[:, inside].astype(np.float64)
    fitted = make_pipeline(StandardScaler(), _classifier(model, c))
    say("cross-validating")
    score = _score(fitted, values, samples)
    say("fitting")
    fitted.fit(values, positive)
    scaler, classifier = fitted[0], fitted[-1]
    coefficients = classifier.coef_[0] / scaler.scale_
    weights = np.zeros(grid.n_voxels, np.float32)
    asked = np.flatnonzero(image.reshape(-1, order="F"))
    weights[asked[inside]] = coefficients
    return Decoder(
        weights=weights.reshape(grid.shape, order="F"),
        intercept=float(classifier.intercept_[0] - scaler.mean_ @ coefficients),
        of=of,
        grid=grid,
        classes=classes,
        score=score,
        settings=settings,
    )


def _samples(
    paths: Sequence[str | Path],
    classes: tuple[str, str],
    of: Of,
    within: str | None,
    say: Callable[[str], None],
) -> tuple[Grid, NDArray[Any], dict[str, Any], list[Sample]]:
    """Return the recordings' grid, the voxels asked for, the settings, and all volumes."""
    samples: list[Sample] = []
    first: tuple[Grid, NDArray[Any], dict[str, Any]] | None = None
    for run, path in enumerate(paths):
        with open_recording(path) as recording:
            if first is None:
                image = _region(recording, within)
                first = recording.grid, image, feature_settings(recording.config)
            if not first[0].matches(recording.grid):
                raise ConfigError(
                    f"recordings must be on one grid: {paths[0]} has {first[0]}, {path} has "
                    f"{recording.grid}, or another position"
                )
            if feature_settings(recording.config) != first[2]:
                _log.warning("%s was recorded with other settings than the first", path)
            for name in classes:
                if name not in recording.conditions:
                    known = ", ".join(recording.conditions)
                    raise ConfigError(f"{path} has no condition {name!r}; it has {known}")
            say(f"replaying {Path(path).name}")
            _replay(recording, classes, Readout(first[1], of, each=True), run, samples)
    if first is None:
        raise ConfigError("at least one recording must be given, got none")
    return *first, samples


def _region(recording: Recording, within: str | None) -> NDArray[Any]:
    """Return the voxels to look at, (x, y, z)."""
    if within is None:
        return np.ones(recording.grid.shape, np.float32)
    if within not in recording.roi_names:
        known = ", ".join(recording.roi_names) or "none"
        raise ConfigError(f"the recording has no region {within!r}; its regions are {known}")
    return recording.roi_weights[within]


def _replay(
    recording: Recording,
    classes: tuple[str, str],
    readout: Readout,
    run: int,
    samples: list[Sample],
) -> None:
    """Add a recording's volumes of the two classes."""
    without_glm = recording.config.glm.model_copy(update={"noise": "off"})
    pipeline = recording.pipeline("auto", readouts={_FEATURES: readout}, glm=without_glm)
    block, newest = samples[-1].block if samples else -1, ""
    for volume in recording.volumes():
        result = pipeline.push(volume)
        pipeline.catch_up()
        if result.begins:  # those before count for nothing
            samples[:] = [sample for sample in samples if sample.run < run]
        of_these = [name for name in classes if name in result.conditions]
        name = of_these[0] if len(of_these) == 1 else ""
        if name and name != newest:
            block += 1
        # A volume that is no good does not end a block, nor does a transition within it.
        if name or not result.quality.usable or not result.conditions:
            newest = name or newest
        else:
            newest = ""
        values = result.readouts[_FEATURES]
        if name and np.isfinite(values).any():
            samples.append(Sample(values.astype(np.float32), name == classes[1], block, run))


def _classifier(model: str, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if model == "svm":
        return LinearSVC(
            C=c, class_weight="balanced", dual=True, max_iter=_MOST_ROUNDS, random_state=0
        )
    return LogisticRegression(C=c, class_weight="balanced", max_iter=_MOST_ROUNDS)


def _score(fitted: Any, values: NDArray[np.float64], samples: Sequence[Sample]) -> Score:
    """Return how well volumes are told by models that have not seen their run, or block."""
    from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold

    positive = np.array([sample.positive for sample in samples])
    blocks = np.array([sample.block for sample in samples])
    runs = np.array([sample.run for sample in samples])
    by_run = len(np.unique(runs)) > 1
    fewest = min(len(np.unique(blocks[positive == one])) for one in (False, True))
    if fewest < 2:
        raise ConfigError(
            f"a decoder needs at least 2 blocks of each condition, with usable volumes and a "
            f"baseline before them; one has {fewest}"
        )
    folds = (
        LeaveOneGroupOut().split(values, positive, runs)
        if by_run
        else StratifiedGroupKFold(min(_MOST_FOLDS, fewest)).split(values, positive, blocks)
    )
    told, accuracies = np.zeros(len(samples)), []
    for seen, held_out in folds:
        if positive[seen].all() or not positive[seen].any():
            raise ConfigError(
                "each recording must have both conditions, or leave enough in others"
            )
        fitted.fit(values[seen], positive[seen])
        told[held_out] = fitted.decision_function(values[held_out])
        accuracies.append(_balanced(told[held_out] > 0, positive[held_out]))
    right = [
        (told[blocks == block].mean() > 0) == positive[blocks == block][0]
        for block in np.unique(blocks)
    ]
    return Score(
        left_out="run" if by_run else "block",
        folds=tuple(accuracies),
        accuracy=_balanced(told > 0, positive),
        n_volumes=len(samples),
        n_blocks=len(right),
        blocks_right=int(np.sum(right)),
        p=_p(int(np.sum(right)), len(right)) if by_run else None,
    )


def _p(right: int, n: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(right, n, 0.5, "greater").pvalue)


def _balanced(told: NDArray[np.bool_], positive: NDArray[np.bool_]) -> float:
    """Return the mean over the classes that are there of how many of each are told rightly."""
    return float(
        np.mean([(told == positive)[positive == one].mean() for one in np.unique(positive)])
    )

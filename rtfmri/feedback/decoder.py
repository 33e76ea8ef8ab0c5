"""A decoder: a linear model of the voxels, trained on a localiser run, and its file.

Its value is ``sum(weights * map) + intercept``, where the map is the newest volume against the
baseline before it (PSC or z), as the pipeline has it on the device.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from rtfmri.config import Config
from rtfmri.errors import ConfigError, RtfmriError
from rtfmri.stages.readout import Of
from rtfmri.volume import Grid

FORMAT = "rtfmri-decoder-1"
FEATURE_SETTINGS = (
    *("slice_timing", "motion", "mask", "smoothing", "detrend", "baseline"),
    "paradigm",
)
"""Settings that change what a map is: a run should have those of the training."""
_MAX_VOXELS = 1 << 24


@dataclass(frozen=True, slots=True)
class Score:
    """How well a decoder tells what it was not trained on (`rtfmri.feedback.train`).

    Attributes
    ----------
    left_out : {"run", "block"}
        What a fold leaves out: a run, or some blocks of the only one.
    folds : tuple of float
        Balanced accuracy of each fold's volumes, from 0 to 1.
    accuracy : float
        Balanced accuracy of all volumes, each told by the model that had not seen its fold.
    n_volumes, n_blocks : int
        Of both classes together.
    blocks_right : int
        Blocks that are told rightly by the mean value of their volumes.
    p : float or None
        The chance that tossing a coin for each block gets as many right. Volumes of one block
        resemble each other, so they are not counted as so many tosses. None for a single run: its
        blocks resemble each other, too, and in simulated noise with a lag-1 autocorrelation of .7
        one in eight had p below .05.
    """

    left_out: Literal["run", "block"]
    folds: tuple[float, ...]
    accuracy: float
    n_volumes: int
    n_blocks: int
    blocks_right: int
    p: float | None


@dataclass(frozen=True, eq=False, slots=True)
class Decoder:
    """A linear model of the voxels.

    Attributes
    ----------
    weights : (x, y, z) float32
        0 outside of what it looks at.
    intercept : float
    of : {"psc", "z"}
        The map that it looks at.
    grid : Grid
    classes : (str, str)
        The conditions for which its value is negative and positive.
    score : Score
    settings : dict
        Those of `FEATURE_SETTINGS` with which it was trained, as JSON has them.
    """

    weights: NDArray[np.float32]
    intercept: float
    of: Of
    grid: Grid
    classes: tuple[str, str]
    score: Score
    settings: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write it to *path* (HDF5), which must not exist.

        Raises
        ------
        ConfigError
            If it exists, or cannot be written.
        """
        told = {
            "intercept": self.intercept,
            "of": self.of,
            "classes": self.classes,
            "score": asdict(self.score),
            "settings": self.settings,
        }
        try:
            with h5py.File(path, "x") as file:
                file.attrs["format"] = np.bytes_(FORMAT)
                file.attrs["affine"] = self.grid.affine
                file.attrs["decoder"] = np.bytes_(json.dumps(told).encode())
                file["weights"] = self.weights.T
        except FileExistsError:
            raise ConfigError(f"{path} exists already; name another file, or remove it") from None
        except OSError as error:
            raise ConfigError(f"cannot write the decoder {path}: {error}") from error


def load_decoder(path: str | Path) -> Decoder:
    """Read a decoder that `Decoder.save` wrote.

    Raises
    ------
    ConfigError
        If the file cannot be read, or is none.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no such decoder: {path}; rtfmri train makes one")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT.encode():
                raise ConfigError(f"{path} is HDF5, but no decoder: its format is not {FORMAT}")
            told = json.loads(file.attrs["decoder"])
            if file["weights"].size > _MAX_VOXELS:
                raise ConfigError(f"the decoder {path} has more than {_MAX_VOXELS} voxels")
            weights = np.asarray(file["weights"], np.float32).T
            grid = Grid(weights.shape, file.attrs["affine"])
            score = Score(**{**told["score"], "folds": tuple(told["score"]["folds"])})
            negative, positive = told["classes"]
            finite = np.isfinite(weights).all() and math.isfinite(told["intercept"])
            if told["of"] not in ("psc", "z") or not finite:
                raise ConfigError(f"the decoder {path} is damaged")
            return Decoder(
                weights,
                float(told["intercept"]),
                told["of"],
                grid,
                (str(negative), str(positive)),
                score,
                dict(told["settings"]),
            )
    except RtfmriError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"cannot read the decoder {path}: {error}") from error


def feature_settings(config: Config) -> dict[str, Any]:
    """Return those of `FEATURE_SETTINGS`, as JSON has them."""
    settings: dict[str, Any] = config.model_dump(mode="json", include=set(FEATURE_SETTINGS))
    return settings


def check(decoder: Decoder, grid: Grid, config: Config) -> tuple[str, ...]:
    """Check that a decoder fits a run; return which of `FEATURE_SETTINGS` differ from its own.

    Raises
    ------
    ConfigError
        If it is of another grid.
    """
    if not decoder.grid.matches(grid):
        raise ConfigError(
            f"the decoder of {' and '.join(decoder.classes)} is of another shape or position: "
            f"{decoder.grid}, the run has {grid}; train it on a run with the same"
        )
    now = feature_settings(config)
    return tuple(name for name in FEATURE_SETTINGS if now[name] != decoder.settings.get(name))

"""The demo: a simulated finger-tapping run, from scanner to picture, judged by its truth."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rtfmri.config import Config, Device
from rtfmri.errors import ConfigError
from rtfmri.export import export_bids
from rtfmri.pipeline import ConditionMaps
from rtfmri.readers.simulator import replay_scanner
from rtfmri.report import peak, write_report
from rtfmri.session import Session
from rtfmri.simulator import Scanner, Truth
from rtfmri.volume import Grid

_SPEED = 50.0
"""Times faster than the TR: the pipeline still waits for the scanner, so latencies are real."""

_LEAST_TSNR = 60
"""Of the simulator's grey matter, see `rtfmri.simulator.scanner.THERMAL_SNR`."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a t map found what the simulator had put there.

    Attributes
    ----------
    threshold_t : float
        One-sided Bonferroni threshold at 5 % over the brain's voxels, Student's t with
        n_active + n_baseline - 2 degrees of freedom.
    dice : float
        Overlap of the voxels above it with the truly active ones (Dice 1945), 0 to 1.
    least_dice : float
        What it should be at least: the overlap that each voxel's true effect, over its standard
        error at the lowest tSNR the simulator promises, is expected to reach.
    roc_area : float
        Probability that an active voxel has a larger t than an inactive one.
    peak_t : dict of str to float
        Largest t in each active region.
    peak_mm : (float, float, float)
        Place of the largest t in the brain.
    inactive_t : float
        Welch's t of the mean signal of the region that takes no part.
    inactive_limit_t : float
        The null's band: 99.9 % of |t| lie inside.
    """

    threshold_t: float
    dice: float
    least_dice: float
    roc_area: float
    peak_t: dict[str, float]
    peak_mm: tuple[float, float, float]
    inactive_t: float
    inactive_limit_t: float

    @classmethod
    def of(
        cls,
        maps: dict[str, ConditionMaps],
        truth: Truth,
        grid: Grid,
        *,
        inactive_t: float,
        mean_response: float,
    ) -> Self:
        """Score the maps of a run.

        Parameters
        ----------
        maps
            The baseline's and one condition's.
        truth, grid
            Of the simulator.
        inactive_t : float
            Welch's t of the inactive region's signal.
        mean_response : float
            Mean of ``truth.response`` over the condition's volumes less that over the baseline's.
        """
        from scipy import stats
        from sklearn.metrics import roc_auc_score

        baseline, condition = maps.values()
        n = np.array([condition.n_volumes, baseline.n_volumes])
        brain = truth.brain
        active = np.logical_or.reduce(list(truth.regions.values()))[brain]
        t = condition.t[brain]
        threshold = float(stats.t.isf(0.05 / brain.sum(), n.sum() - 2))
        standard_error_percent = 100 / _LEAST_TSNR * np.sqrt((1 / n).sum())
        true_t = truth.effect_percent[brain] * mean_response / standard_error_percent
        # Student's t with 100 degrees of freedom is normal here to the second digit.
        power = stats.norm.sf(threshold - true_t)
        expected = 2 * power[active].sum() / (active.sum() + power.sum())
        found = t > threshold
        return cls(
            threshold_t=threshold,
            dice=float(2 * (found & active).sum() / (found.sum() + active.sum())),
            least_dice=float(expected),
            roc_area=float(roc_auc_score(active, t)),
            peak_t={name: float(condition.t[mask].max()) for name, mask in truth.regions.items()},
            peak_mm=peak(condition.t, grid, brain)[1],
            inactive_t=inactive_t,
            inactive_limit_t=float(stats.t.isf(0.0005, n.sum() - 2)),
        )


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo left behind."""

    out: Path
    score: Score
    run: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {"out": str(self.out), "score": asdict(self.score), "run": self.run}


def run_demo(
    out: str | Path,
    *,
    device: Device = "auto",
    n_volumes: int = 150,
    shape: tuple[int, int, int] = (64, 64, 36),
    say: Callable[[str], None] = lambda text: None,
) -> Demo:
    """Simulate, run, record, export and report a finger-tapping run.

    Parameters
    ----------
    out : path
        A folder that is not there yet, or empty. Gets ``run.h5``, ``bids/``, ``report/``,
        ``truth/``.
    device : {"auto", "cpu", "cuda"}
        What computes.
    n_volumes, shape
        Length and grid of the run.
    say : callable
        Told what is being done, in a few words.

    Raises
    ------
    ConfigError
        If *out* is not empty.
    """
    out = new_folder(out)
    say("building a brain")
    scanner = Scanner(n_volumes=n_volumes, shape=shape)
    truth = scanner.truth
    scanner.write_truth(out / "truth")
    rois = {name: truth.regions[name] for name in ("left_hand", "right_hand")}
    rois["inactive"] = truth.inactive
    say("preparing the kernels (the first time takes some seconds)")
    with Session(
        replay_scanner(scanner, _SPEED),
        events=scanner.events,
        rois=rois,
        config=Config(device=device),
        out=out / "run.h5",
        speed=_SPEED,
    ) as session:
        conditions = []
        for result in session:
            conditions.append(result.conditions)
            values = "  ".join(f"{name} {value.psc:+.2f} %" for name, value in result.roi.items())
            say(f"volume {result.index + 1} of {n_volumes}  {values}")
    summary = session.summary()
    (condition,) = summary["contrasts"]
    say("scoring against the truth")
    score = Score.of(
        session.maps(),
        truth,
        scanner.grid,
        inactive_t=summary["contrasts"][condition]["roi_t"]["inactive"],
        mean_response=_mean(truth.response, conditions, condition)
        - _mean(truth.response, conditions, "baseline"),
    )
    say("exporting")
    export_bids(out / "run.h5", out / "bids")
    say("drawing the report")
    write_report(out / "run.h5", out / "report")
    return Demo(out, score, summary)


def new_folder(out: str | Path) -> Path:
    """Return *out* as a folder that is empty.

    Raises
    ------
    ConfigError
        If it is not.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"--out must be a new folder; {folder} is in use: name another or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mean(
    response: NDArray[np.float64], conditions: list[tuple[str, ...]], condition: str
) -> float:
    counted = [condition in names for names in conditions]
    return float(response[: len(counted)][counted].mean())

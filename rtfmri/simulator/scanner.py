"""A scanner that is not there: volumes of a finger-tapping run whose truth is known."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import ConfigError, RecordingError
from rtfmri.paradigm import Event
from rtfmri.simulator.brain import ACTIVE, GREY, INACTIVE, Brain, build_brain
from rtfmri.simulator.hemodynamics import Balloon, bold_response
from rtfmri.volume import Grid

REST_S = TAPPING_S = 20.0
TRIAL_TYPE = "tapping"

THERMAL_SNR = 110.0
"""Grey matter signal over the standard deviation of thermal noise. With the physiological noise
below, tSNR in grey matter is 60 to 100, as at 3 T with 3 mm voxels (Triantafyllou 2005, NeuroImage
26:243). Both add as squares; the physiological part grows with the signal (Krueger & Glover 2001,
MRM 46:631)."""
DRIFT_PERCENT = 0.5
DRIFT_PERIODS_S = (600.0, 330.0, 210.0)
"""Standard deviation over space of each drift's amplitude, and their periods: all slower than the
usual high-pass at 128 s (drifts: Smith 1999, NeuroImage 9:526)."""
DRIFT_FWHM_MM = 50.0
RESPIRATION_PERCENT, RESPIRATION_HZ = 0.4, 0.3
"""Amplitude, the same in the whole head (bulk changes of the field: Raj 2001, PMB 46:3331)."""
CARDIAC_PERCENT, CARDIAC_CSF_PERCENT, CARDIAC_HZ = 0.3, 2.0, 1.1
"""Amplitude in tissue and what pure CSF adds (pulsation: Dagli 1999, NeuroImage 9:407)."""
MOTION_MM, MOTION_DEG = 1.0, 1.0
MOTION_SMOOTH_VOLUMES = 3.0
SPIKE_CHANCE, SPIKE_GAIN = 0.02, 0.3
"""Chance of a volume to have a spike, and how much brighter its slices are."""
_STEP_S = 0.05
_RESPONSE = 1
"""The pattern of activity among all that can happen."""
_MIN_SHAPE = (16, 16, 8)


@dataclass(frozen=True, eq=False, slots=True)
class Truth:
    """What a run holds, known because it was put there.

    Parameters
    ----------
    regions : dict of (x, y, z) bool
        The active regions by name.
    inactive : (x, y, z) bool
        A region whose response is exactly 0.
    effect_percent : (x, y, z) float32
        Peak signal change in percent of the voxel's resting signal; 0 outside the regions.
    brain : (x, y, z) bool
        The brain.
    response : (n_volumes,) float64
        BOLD time course in the middle of each volume; 1 is the response's peak, so a voxel's
        signal change at volume i is ``effect_percent * response[i]``.
    motion : (n_volumes, 6) float64
        Position of the head: translations along x, y, z in mm, rotations about x, y, z in degrees.
        A point p of the head at rest is at ``Rz Ry Rx (p - c) + c + t`` in volume i, with c the
        centre of the grid, RAS+. The maps here are those of the head at rest.
    spikes : (n_volumes, z) bool
        Slices that are too bright.
    """

    regions: dict[str, NDArray[np.bool_]]
    inactive: NDArray[np.bool_]
    effect_percent: NDArray[np.float32]
    brain: NDArray[np.bool_]
    response: NDArray[np.float64]
    motion: NDArray[np.float64]
    spikes: NDArray[np.bool_]


class Scanner:
    """Simulate a run: 20 s of rest and 20 s of finger tapping with both hands, in turn.

    ``signal = anatomy * (1 + effect * response + drift + respiration + cardiac)``, moved with the
    head, plus thermal noise in both channels of a complex image of which the magnitude is kept
    (Rician: Gudbjartsson & Patz 1995, MRM 34:910). All slices are taken in the middle of the TR.
    On one machine the same arguments make the same bits, in whatever order volumes are asked for.

    Parameters
    ----------
    paradigm : str
        ``finger-tapping``.
    n_volumes : int
        1 or more.
    tr_s : float
        Seconds between volumes, above 0 and at most 60.
    shape : (int, int, int)
        Voxels along x, y, z, at least 16 x 16 x 8; the voxel size follows from a fixed field of
        view (3.25 x 3.25 x 4 mm by default).
    seed : int
        0 or more.
    motion : bool
        Let the head wander by up to 1 mm and 1 degree. Each volume is then resampled with cubic
        splines, some 10 times the cost of a volume without.
    spikes : bool
        Make a few slices of a few volumes brighter.

    Raises
    ------
    ConfigError
        If an argument breaks its rule.
    """

    def __init__(
        self,
        paradigm: str = "finger-tapping",
        *,
        n_volumes: int = 150,
        tr_s: float = 2.0,
        shape: Sequence[int] = (64, 64, 36),
        seed: int = 0,
        motion: bool = False,
        spikes: bool = False,
    ) -> None:
        if paradigm != "finger-tapping":
            raise ConfigError(f"paradigm must be 'finger-tapping', got {paradigm!r}")
        if n_volumes < 1:
            raise ConfigError(f"n_volumes must be 1 or more, got {n_volumes}")
        if not 0 < tr_s <= 60:
            raise ConfigError(f"tr_s must be above 0 and at most 60, got {tr_s}")
        if len(shape) != 3 or any(n < least for n, least in zip(shape, _MIN_SHAPE, strict=True)):
            raise ConfigError(f"shape must be at least {_MIN_SHAPE}, got {tuple(shape)}")
        if seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {seed}")
        self.paradigm, self.n_volumes, self.tr_s, self.seed = paradigm, n_volumes, tr_s, seed
        self._brain = build_brain((shape[0], shape[1], shape[2]))
        self.events = _events(n_volumes * tr_s)
        self._noise_sd = np.float32(GREY / THERMAL_SNR)
        response, peak = _response(self.events, n_volumes, tr_s)
        rng = np.random.default_rng([seed, 0])
        self._patterns = _patterns(self._brain, 100 * peak, rng)
        self._courses = _courses(response, tr_s, rng)
        self.truth = Truth(
            regions=self._brain.regions,
            inactive=self._brain.inactive,
            effect_percent=np.float32(100 * peak) * self._brain.strength,
            brain=self._brain.mask,
            response=response,
            motion=_walk(n_volumes, rng) if motion else np.zeros((n_volumes, 6)),
            spikes=_spikes(n_volumes, shape[2], rng if spikes else None),
        )

    @property
    def grid(self) -> Grid:
        """Shape and position of every volume."""
        return self._brain.grid

    def volume(self, index: int) -> NDArray[np.int16]:
        """Return volume *index*, (x, y, z) int16, x fastest.

        Raises
        ------
        IndexError
            If there is no such volume.
        """
        if not 0 <= index < self.n_volumes:
            raise IndexError(f"volume must be from 0 to {self.n_volumes - 1}, got {index}")
        signal = (self._courses[index] @ self._patterns).reshape(self.grid.shape, order="F")
        if self.truth.motion[index].any():
            signal = _moved(signal, self.grid, self.truth.motion[index])
        if self.truth.spikes[index].any():
            signal[:, :, self.truth.spikes[index]] *= 1 + SPIKE_GAIN
        rng = np.random.default_rng([self.seed, index + 1])
        real, imaginary = rng.standard_normal((2, signal.size), np.float32) * self._noise_sd
        real += signal.reshape(-1, order="F")
        magnitude = np.rint(np.sqrt(real * real + imaginary * imaginary)).astype(np.int16)
        voxels: NDArray[np.int16] = magnitude.reshape(self.grid.shape, order="F")
        return voxels

    def respond(self, index: int, response: float) -> None:
        """Let the active regions respond so in volume *index*, instead of to finger tapping.

        Parameters
        ----------
        index : int
        response : float
            As `Truth.response`, which says it from now on, too.
        """
        self._courses[index, _RESPONSE] = response
        self.truth.response[index] = response

    def write_truth(self, folder: str | Path) -> None:
        """Write the truth into *folder*, for others to compare with.

        NIfTI maps (anatomy, effect in percent, masks), ``events.tsv`` (BIDS), ``timecourses.tsv``
        (response and motion per volume) and ``truth.json`` (all parameters and their units).

        Raises
        ------
        RecordingError
            If the folder cannot be written.
        """
        folder = Path(folder)
        maps: dict[str, NDArray[Any]] = {
            "anatomy": self._brain.anatomy,
            "effect_percent": self.truth.effect_percent,
            "brain_mask": self.truth.brain,
            "inactive_mask": self.truth.inactive,
            **{f"{name}_mask": mask for name, mask in self.truth.regions.items()},
        }
        events = [(e.onset_s, e.duration_s, e.trial_type) for e in self.events]
        courses = np.column_stack([self.truth.response, self.truth.motion])
        header = ["response", *(f"trans_{a}_mm" for a in "xyz"), *(f"rot_{a}_deg" for a in "xyz")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_maps(folder, maps, self.grid)
            _write_tsv(folder / "events.tsv", ["onset", "duration", "trial_type"], events)
            _write_tsv(folder / "timecourses.tsv", header, courses.round(6).tolist())
            text = json.dumps(self._parameters(), indent=2) + "\n"
            (folder / "truth.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise RecordingError(f"cannot write the truth to {folder}: {error}") from error

    def _parameters(self) -> dict[str, Any]:
        masks = {**self.truth.regions, INACTIVE.name: self.truth.inactive}
        return {
            "paradigm": self.paradigm,
            "n_volumes": self.n_volumes,
            "tr_s": self.tr_s,
            "shape": list(self.grid.shape),
            "affine": self.grid.affine.tolist(),
            "seed": self.seed,
            "motion": bool(self.truth.motion.any()),
            "spikes": [[int(v), int(z)] for v, z in np.argwhere(self.truth.spikes)],
            "regions": {
                region.name: {**asdict(region), "n_voxels": int(masks[region.name].sum())}
                for region in (*ACTIVE, INACTIVE)
            },
            "balloon": asdict(Balloon()),
            "noise": {
                "thermal_snr": THERMAL_SNR,
                "drift_percent": DRIFT_PERCENT,
                "drift_periods_s": list(DRIFT_PERIODS_S),
                "respiration_percent": RESPIRATION_PERCENT,
                "respiration_hz": RESPIRATION_HZ,
                "cardiac_percent": CARDIAC_PERCENT,
                "cardiac_csf_percent": CARDIAC_CSF_PERCENT,
                "cardiac_hz": CARDIAC_HZ,
            },
            "units": {
                "anatomy": "scanner units",
                "effect_percent": "percent of the resting signal at response 1",
                "response": "fraction of its peak, at the middle of each volume",
                "trans_*_mm": "mm, RAS+",
                "rot_*_deg": "degrees about x, y, z through the centre of the grid",
                "spikes": "[volume, slice], from 0",
            },
        }


def _events(end_s: float) -> tuple[Event, ...]:
    onsets = np.arange(REST_S, end_s, REST_S + TAPPING_S)
    return tuple(Event(float(t), min(TAPPING_S, end_s - float(t)), TRIAL_TYPE) for t in onsets)


def _response(
    events: Iterable[Event], n_volumes: int, tr_s: float
) -> tuple[NDArray[np.float64], float]:
    """Return the response in the middle of each volume, relative to its peak, and that peak.

    The peak is that of one whole block, so that it does not depend on where a run ends.
    """
    times_s = np.arange(math.ceil(n_volumes * tr_s / _STEP_S) + 1) * _STEP_S
    stimulus = np.zeros(len(times_s))
    for event in events:
        # Half a step of tolerance: onsets are multiples of the step, up to rounding.
        since_s = times_s - event.onset_s + _STEP_S / 2
        stimulus[(since_s >= 0) & (since_s < event.duration_s)] = 1.0
    block = np.zeros(round(3 * TAPPING_S / _STEP_S))
    block[: round(TAPPING_S / _STEP_S)] = 1.0
    peak = float(bold_response(block, _STEP_S).max())
    middles_s = (np.arange(n_volumes) + 0.5) * tr_s
    return np.interp(middles_s, times_s, bold_response(stimulus, _STEP_S)) / peak, peak


def _patterns(brain: Brain, peak_percent: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return what can happen in space, (n_patterns, n_voxels), in scanner units.

    A volume is a weighted sum of them: anatomy, activity, drifts, respiration, cardiac sine and
    cosine are each a map times a number per volume.
    """
    flat = (brain.grid.n_voxels,)
    percent: list[NDArray[Any]] = [
        (peak_percent * brain.strength).reshape(flat, order="F"),
        *(DRIFT_PERCENT * _smooth_field(brain.grid, rng) for _ in DRIFT_PERIODS_S),
        np.full(flat, RESPIRATION_PERCENT),
        CARDIAC_PERCENT + CARDIAC_CSF_PERCENT * brain.csf.reshape(flat, order="F"),
    ]
    anatomy = brain.anatomy.reshape(flat, order="F")
    return np.stack([anatomy, *(anatomy * (p / 100) for p in percent)]).astype(np.float32)


def _courses(
    response: NDArray[np.float64], tr_s: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return when it happens, (n_volumes, n_patterns), without unit."""
    time_s = (np.arange(len(response)) + 0.5) * tr_s
    phases = rng.uniform(0, 2 * np.pi, len(DRIFT_PERIODS_S) + 4)
    drifts = [
        np.sqrt(2) * np.sin(2 * np.pi * time_s / period_s + phase)
        for period_s, phase in zip(DRIFT_PERIODS_S, phases[4:], strict=True)
    ]
    rhythms = [
        # The rate wanders by a few percent over half a minute, as breath and pulse do.
        np.sin(2 * np.pi * hz * time_s + phase + np.sin(2 * np.pi * time_s / 31 + wander))
        for hz, phase, wander in (
            (RESPIRATION_HZ, phases[0], phases[1]),
            (CARDIAC_HZ, phases[2], phases[3]),
        )
    ]
    ones = np.ones(len(response))
    return np.column_stack([ones, response, *drifts, *rhythms]).astype(np.float32)


def _smooth_field(grid: Grid, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return Gaussian noise of zero mean and unit variance, smooth, (n_voxels,)."""
    from scipy.ndimage import gaussian_filter

    sd_voxels = DRIFT_FWHM_MM / math.sqrt(8 * math.log(2)) / np.array(grid.voxel_size_mm)
    field = gaussian_filter(rng.standard_normal(grid.shape, np.float32), sd_voxels)
    return np.asarray((field - field.mean()) / field.std(), np.float32).reshape(-1, order="F")


def _walk(n_volumes: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a smooth random walk that begins at 0; its largest values are the limits."""
    from scipy.ndimage import gaussian_filter1d

    steps = gaussian_filter1d(rng.standard_normal((n_volumes, 6)), MOTION_SMOOTH_VOLUMES, axis=0)
    walk = np.cumsum(steps, axis=0)
    walk -= walk[0]
    largest = np.abs(walk.reshape(n_volumes, 2, 3)).max(axis=(0, 2)).repeat(3)
    limits = np.array([MOTION_MM] * 3 + [MOTION_DEG] * 3)
    return np.asarray(walk * limits / np.maximum(largest, limits))


def _spikes(n_volumes: int, n_slices: int, rng: np.random.Generator | None) -> NDArray[np.bool_]:
    """Return which slices spike: one to three neighbours in one volume of fifty."""
    spikes = np.zeros((n_volumes, n_slices), np.bool_)
    if rng is not None:
        for volume in np.flatnonzero(rng.random(n_volumes) < SPIKE_CHANCE):
            first, n_bright = rng.integers(0, n_slices), rng.integers(1, 4)
            spikes[volume, first : first + n_bright] = True
    return spikes


def _moved(
    signal: NDArray[np.float32], grid: Grid, motion: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return *signal* with the head where *motion* says, by cubic splines."""
    from scipy.ndimage import affine_transform

    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(motion[3:])), np.sin(np.radians(motion[3:]))
    rotate_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    rotate_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rotate_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    rotation = rotate_z @ rotate_y @ rotate_x
    centre_mm = (grid.affine @ [*((n - 1) / 2 for n in grid.shape), 1])[:3]
    move = np.eye(4)
    move[:3, :3] = rotation
    move[:3, 3] = centre_mm - rotation @ centre_mm + motion[:3]
    # Of each voxel of the moved image, the voxel of the head at rest it comes from.
    origin = np.linalg.inv(move @ grid.affine) @ grid.affine
    moved = affine_transform(signal, origin[:3, :3], origin[:3, 3], order=3, mode="nearest")
    return np.asfortranarray(moved, np.float32)


def _write_maps(folder: Path, maps: dict[str, NDArray[Any]], grid: Grid) -> None:
    import nibabel

    for name, data in maps.items():
        stored = data.astype(np.uint8) if data.dtype == np.bool_ else data
        nibabel.save(nibabel.Nifti1Image(stored, grid.affine), folder / f"{name}.nii.gz")


def _write_tsv(path: Path, header: list[str], rows: Iterable[Iterable[object]]) -> None:
    lines = ["\t".join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

"""Settings: frozen, validated once, units in their names; read from TOML."""

import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rtfmri.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Interpolation = Literal["trilinear", "catmull-rom", "bspline"]
BaselineKind = Literal["cumulative", "exponential", "sliding", "fixed"]
HrfModel = Literal[
    "spm",
    "spm + derivative",
    "spm + derivative + dispersion",
    "glover",
    "glover + derivative",
    "glover + derivative + dispersion",
]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None


class ParadigmSettings(_Settings):
    """Which volumes count for which condition.

    The BOLD response to a stimulus peaks about 5 s after it (Glover 1999, NeuroImage 9:416), and
    the response to a block rises and falls through half its height about that long after the
    block's edges. So conditions are looked up `haemodynamic_delay_s` earlier than a volume was
    taken, and volumes within `transition_s` of an edge, where the signal is still on its way,
    count for nothing.
    """

    haemodynamic_delay_s: Annotated[float, Field(ge=0, le=30)] = 5.0
    """Seconds by which the signal follows the task."""
    transition_s: Annotated[float, Field(ge=0, le=30)] = 2.0
    """Seconds before and after a (delayed) edge of a block in which volumes are left out."""
    conditions: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Conditions of events that a stimulus program announces while the run goes on (`--stimulus`),
    instead of a file. Baseline, regions and feedback know them as they come; the GLM, whose
    design is made before the run, does not: there is none. The baseline is in here if its blocks
    are announced, too; else it is all the time that no other covers."""


class ClockSettings(_Settings):
    """Which moment the onsets of events count from.

    Results count from the start of volume 0, whatever this says: events are moved there once, when
    the first volume has come. What is played back always starts with its first volume.
    """

    start: Literal["first volume", "trigger"] | datetime = "first volume"
    """first volume: from the start of volume 0; trigger: from the scanner's trigger, which the
    stimulus program passes on: volumes that were acquired after it and not delivered (dummies)
    are counted; or from a time, such as ``2026-11-25T10:15:00+01:00``; without an offset it is
    this machine's local time."""


class SliceTimingSettings(_Settings):
    """Correction for the slices of a volume being taken one after the other.

    Each slice is interpolated in time to the start of its volume, from the volumes before it: so
    no result has to wait for the next volume, and what it says is the head's state when the
    volume began, one TR before its last slice was there.
    """

    method: Literal["off", "linear", "cubic"] = "off"
    """linear: between the newest two volumes; cubic: the polynomial through the newest four."""


class MotionSettings(_Settings):
    """Where the head is in each volume, and what is done about it."""

    mode: Literal["correct", "register_only", "off"] = "correct"
    """correct: estimate and reslice; register_only: estimate, and leave the voxels as they are."""
    interpolation: Interpolation = "bspline"
    """How voxels are resliced: trilinear blurs most, catmull-rom less, bspline (cubic) least."""
    reference: Path | None = None
    """NIfTI image to register to, such as a single-band reference; None takes the first good
    volume."""


class MaskSettings(_Settings):
    """Which voxels are brain; only these get a baseline and maps."""

    source: Literal["auto", "none"] | Path = "auto"
    """auto: made from the reference (nilearn's compute_epi_mask); none: all voxels; or a NIfTI
    file, resampled if its grid differs."""


class SmoothingSettings(_Settings):
    """Spatial smoothing of each volume before anything is compared."""

    fwhm_mm: Annotated[float, Field(ge=0, le=50)] = 0.0
    """Full width at half maximum of the Gaussian; 0 smooths nothing."""
    within_mask: bool = False
    """Whether voxels outside the mask are left out of the Gaussian (normalised convolution:
    Knutsson & Westin 1993), so that nothing from outside the brain blurs into it."""


class QualitySettings(_Settings):
    """Which volumes are good enough to enter the baseline and the maps."""

    fd_limit_mm: Annotated[float, Field(gt=0)] = 0.5
    """Framewise displacement (Power 2012, NeuroImage 59:2142) above which a volume is left out."""
    target_min: Annotated[float, Field(gt=0)] | None = None
    """Minutes of usable data wanted, for the forecast of when they will be there."""


class RoiSettings(_Settings):
    """What is done to a region's signal before it is compared with its baseline."""

    filter: Literal["off", "kalman"] = "off"
    """kalman: follow the signal and leave out spikes of a single volume or two, as the
    neurofeedback literature does (Koush 2012, NeuroImage 59:478); it is some 1.3 volumes late."""


class OrderSettings(_Settings):
    """What is done about volumes that come late, in another order, or never.

    What is played back comes in order, and waits for nothing.
    """

    window_volumes: Annotated[int, Field(ge=0, le=100)] = 4
    """How many volumes are held back for one that lacks before them; 0 waits for none."""
    wait_s: Annotated[float, Field(ge=0, le=60)] | None = None
    """Seconds for which they are held, from the arrival of the first; None is half a TR. Then
    what lacks is missing: baseline and GLM leave it out."""
    feedback: Literal["none", "hold"] = "none"
    """What the feedback of a missing volume says: no value (nan), or that of the volume before."""


class BaselineSettings(_Settings):
    """What everything is subtracted from."""

    condition: Annotated[str, Field(min_length=1)] = "baseline"
    """The condition that is the baseline: a trial_type of the events, or, where the events do not
    name it, all the time that no event covers."""
    kind: BaselineKind = "cumulative"
    """cumulative: all baseline volumes so far, equally; exponential: newer ones count more;
    sliding: the newest `window_volumes`; fixed: the first `window_volumes`, then frozen."""
    window_volumes: Annotated[int, Field(ge=2, le=10_000)] = 20
    """Length of the sliding or fixed window in baseline volumes; the exponential window has the
    same effective number of volumes (its weight is 2 / (window_volumes + 1))."""


class DetrendSettings(_Settings):
    """How slow drift is taken out of each volume, for maps and ROI signals alike.

    That comes before the baseline is subtracted. The level stays that of the run's start, in
    scanner units. The GLM has a drift of its own, and sees volumes as they were.
    """

    method: Literal["off", "exponential", "linear", "cosine"] = "off"
    """exponential: less an exponentially weighted mean of the volumes before, as soon as
    `period_s` are over; linear: less a line; cosine: less all that is slower than `period_s`, in
    runs of half that length or more. Line and cosine are fitted together with the task and its
    time derivative, so that the task is not taken for drift: measured with blocks of 20 s,
    Glover's response where SPM's was expected comes out 1 % (linear) or 4 % (cosine) too small.
    exponential knows of no task: blocks of 20 s are kept within 0.5 %, of 130 s come out 5 % too
    small. Of the variance of a line and a slow wave together, it leaves a third, linear a seventh,
    cosine 0.3 %."""
    period_s: Annotated[float, Field(ge=20)] = 128.0
    """Time constant of the exponential mean; period of the slowest signal that cosine keeps."""


class GlmSettings(_Settings):
    """What the signal is explained by, and what is asked of it; nothing without events.

    The model is fitted anew with each volume, by recursive least squares; it equals a fit to all
    volumes so far.
    """

    noise: Literal["ols", "ar1", "off"] = "ols"
    """ols: independent from volume to volume; ar1: each voxel's noise remembers the volume before
    (estimated once, after `ar1_warm_up_volumes`; until then as ols); off: no GLM. Where the noise
    remembers and is taken for independent, t and e-values promise too much."""
    hrf: HrfModel = "spm"
    """nilearn's haemodynamic response, with which the conditions are convolved."""
    drift: Literal["cosine", "linear", "none"] = "cosine"
    """cosine: all that is slower than `high_pass_s`; linear: a line."""
    high_pass_s: Annotated[float, Field(ge=20)] = 128.0
    """Period of the slowest signal that is not drift."""
    motion: bool = True
    """Whether the six parameters of motion are regressors, where motion is estimated."""
    confounds: Path | None = None
    """Further regressors: a table with a column each and a line a volume (TSV)."""
    contrasts: dict[str, str] = {}
    """t contrasts by name, in nilearn's syntax, as ``{side = "left - right"}``; by default each
    condition, less the baseline where the events name it."""
    f_contrasts: dict[str, tuple[str, ...]] = {}
    """F contrasts: is any of these not 0? ``{any = ["left", "right"]}``"""
    ar1_warm_up_volumes: Annotated[int, Field(ge=20, le=300)] = 60
    """Usable volumes from which ar1 estimates the noise's memory."""
    prior_sd: Annotated[float, Field(gt=0)] = 1.0
    """Effects that the anytime-valid test looks for, in standard deviations of a voxel's noise:
    the test holds with any value, and finds effects of about this size soonest."""


Measure = Literal["psc", "z", "adjusted"]


class ActivitySettings(_Settings):
    """What one region does."""

    kind: Literal["activity"]
    roi: str
    """The region's name; its image may weigh its voxels."""
    measure: Measure = "psc"
    """psc: percent of the baseline; z: standard deviations of the baseline; adjusted: percent of
    the level, without the drift, motion and confounds that the GLM has found so far."""
    summary: Literal["mean", "median", "eigenvariate"] = "mean"
    """mean: of the region's signal; median: over its voxels' PSC or z; eigenvariate: the first one
    of its voxels' PSC or z so far, signed and scaled to be their mean where all do the same."""


class DifferentialSettings(_Settings):
    """What one region does more than another."""

    kind: Literal["differential"]
    plus: str
    minus: str
    measure: Measure = "psc"


class ConnectivitySettings(_Settings):
    """How closely two regions go together: the correlation of their signals."""

    kind: Literal["connectivity"]
    rois: tuple[str, str]
    given: tuple[str, ...] = ()
    """Regions whose part in both is taken out first: partial correlation."""
    window: Literal["sliding", "exponential"] = "sliding"
    """sliding: of the newest `window_volumes`, all equally; exponential: newer ones count more."""
    window_volumes: Annotated[int, Field(ge=5, le=1000)] = 20
    """Length of the window in usable volumes; the exponential one has the same effective number
    (its weight is 2 / (window_volumes + 1))."""


class DecoderSettings(_Settings):
    """On which side of a trained boundary the brain is: a linear model's decision function."""

    kind: Literal["decoder"]
    file: Path
    """What `rtfmri train` wrote."""


class CustomSettings(_Settings):
    """Somebody's own function of a `Result`."""

    kind: Literal["custom"]
    function: str
    """``package.module:name``, ``path/to/file.py:name``, or the name of an entry point of the
    group ``rtfmri.signals``. What it names is called with each `Result`, or, if it is a class,
    made once and its ``push`` is; it returns a number, or None for no value. An exception is
    counted, and gives no value."""


SignalSettings = Annotated[
    ActivitySettings
    | DifferentialSettings
    | ConnectivitySettings
    | DecoderSettings
    | CustomSettings,
    Field(discriminator="kind"),
]


class ScaleSettings(_Settings):
    """How a signal becomes what the participant sees: 0 is the display's bottom, 1 its top."""

    kind: Literal["fixed", "percentile", "baseline", "running"] = "fixed"
    """fixed: `low` and `high` in the signal's own units; percentile: `percentiles` of all values
    so far; baseline: `sd` standard deviations to both sides of the mean of the newest baseline
    block; running: the same of the newest `window_volumes` values."""
    low: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    high: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    percentiles: tuple[float, float] = (5.0, 95.0)
    sd: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    window_volumes: Annotated[int, Field(ge=5, le=10_000)] = 60

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        first, last = self.percentiles
        if not self.low < self.high:
            raise ConfigError(f"high must be above low, got {self.high} and {self.low}")
        if not 0 <= first < last <= 100:
            raise ConfigError(f"percentiles must be two from 0 to 100, got {self.percentiles}")
        return self


class ShamSettings(_Settings):
    """Control groups, without anybody knowing who is in one.

    Experimenters are told an arm ("A", "B"). What each arm is stands in the allocation, which one
    person keeps who does not run the experiment; neither logs nor recordings tell it.
    """

    allocation: Path
    """A TOML file, ``A = "contingent"`` and the like (`rtfmri.feedback.sham`)."""
    arm: Annotated[str, Field(min_length=1, max_length=32)]


class FeedbackSettings(_Settings):
    """From regions to what the participant sees."""

    signals: dict[str, SignalSettings] = {}
    """What is computed, by name; by default the PSC of each region, by its name."""
    show: str | None = None
    """The signal that is shown; the first by default."""
    during: tuple[str, ...] = ()
    """Conditions for whose (delayed) volumes feedback is shown; for all by default."""
    mode: Literal["continuous", "intermittent"] = "continuous"
    """continuous: a value a volume; intermittent: the mean over a block, once it is over."""
    filter: Literal["off", "kalman"] = "off"
    """kalman: follow the signal and leave spikes out, as `RoiSettings.filter` does to regions."""
    scale: ScaleSettings = ScaleSettings()
    sham: ShamSettings | None = None


class Config(_Settings):
    """All settings of a run."""

    device: Device = "auto"
    """cpu, cuda, or auto: cuda where there is a GPU, else cpu."""
    tr_s: Annotated[float, Field(gt=0, le=60)] | None = None
    """Repetition time in seconds; None takes the headers'."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Time from a volume's arrival to its result; None means one TR."""
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    """CPU threads of the kernels; None takes all this process may use."""
    paradigm: ParadigmSettings = ParadigmSettings()
    clock: ClockSettings = ClockSettings()
    order: OrderSettings = OrderSettings()
    slice_timing: SliceTimingSettings = SliceTimingSettings()
    motion: MotionSettings = MotionSettings()
    mask: MaskSettings = MaskSettings()
    smoothing: SmoothingSettings = SmoothingSettings()
    quality: QualitySettings = QualitySettings()
    detrend: DetrendSettings = DetrendSettings()
    baseline: BaselineSettings = BaselineSettings()
    roi: RoiSettings = RoiSettings()
    glm: GlmSettings = GlmSettings()
    feedback: FeedbackSettings = FeedbackSettings()

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read settings from a TOML file.

        Raises
        ------
        ConfigError
            If the file cannot be read, is not TOML, or breaks a rule.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the settings in {path}: {error}") from error
        return cls(**values)

    def with_changes(self, **changes: Any) -> Self:
        """Return a copy with the given settings that are not None, validated again."""
        kept = {name: value for name, value in changes.items() if value is not None}
        return type(self)(**{**self.model_dump(), **kept})


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        nested = problem.get("ctx", {}).get("error")
        if isinstance(nested, ConfigError):
            lines.append(f"{name}.{nested}")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{name} is not a setting, got {problem['input']!r}")
        else:
            rule = problem["msg"].removeprefix("Input ")
            lines.append(f"{name} {rule}, got {problem['input']!r}")
    return "; ".join(lines)

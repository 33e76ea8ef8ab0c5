"""The CRED-nf checklist, as far as recordings can fill it.

Ros et al. 2020, "Consensus on the reporting and experimental design of clinical and
cognitive-behavioural neurofeedback studies (CRED-nf checklist)", Brain 143:1674. Numbers are the
checklist's, topics are in our words. What no recording can know is left to the experimenter.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.config import (
    ActivitySettings,
    Config,
    ConnectivitySettings,
    CustomSettings,
    DecoderSettings,
    DifferentialSettings,
)
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.recording import Recording, open_recording

_TOPICS = {
    "1a": ("before", "preregistration of protocol and analyses"),
    "1b": ("before", "sample size and its reasons"),
    "2a": ("control groups", "control group or condition"),
    "2b": ("control groups", "blinding of participants and experimenters"),
    "2c": ("control groups", "blinding of raters and statisticians"),
    "2d": ("control groups", "whether they remained blind"),
    "2e": ("control groups", "comparison with standard care, in clinical studies"),
    "3a": ("control measures", "psychosocial factors"),
    "3b": ("control measures", "whether strategies were given"),
    "3c": ("control measures", "strategies that participants used"),
    "3d": ("control measures", "online processing and artefact correction"),
    "3e": ("control measures", "artefacts by condition and group"),
    "4a": ("feedback", "how the online feature is defined"),
    "4b": ("feedback", "reinforcement schedule and its reasons"),
    "4c": ("feedback", "modality and content"),
    "4d": ("feedback", "all brain variables that were fed back, as displayed"),
    "4e": ("feedback", "hardware and software"),
    "5a": ("outcome, brain", "regulation success by the feedback signal"),
    "5b": ("outcome, brain", "the signal within and between sessions"),
    "5c": ("outcome, brain", "statistical comparison with the control"),
    "6a": ("outcome, behaviour", "measures of clinical or behavioural significance"),
    "6b": ("outcome, behaviour", "relation of regulation and behaviour"),
    "7a": ("data", "materials, code and raw data in a repository"),
}
OPEN = "(to be filled in by the experimenter)"


@dataclass(frozen=True, slots=True)
class Item:
    """One item of the checklist.

    ``told`` has what the recordings tell of it, a text for each distinct answer; empty if they
    cannot know.
    """

    number: str
    domain: str
    topic: str
    told: tuple[str, ...]


def cred_nf(paths: Sequence[str | Path]) -> list[Item]:
    """Fill the checklist from recordings.

    Parameters
    ----------
    paths : sequence of path
        Of runs with feedback.

    Raises
    ------
    ConfigError
        If a recording has no signals.
    RecordingError
        If one cannot be read, or has no volume.
    """
    told: dict[str, list[str]] = {number: [] for number in _TOPICS}
    for path in paths:
        with open_recording(path) as recording:
            if not recording.signal_names:
                raise ConfigError(f"{path} has no feedback: it was recorded without ROI or signal")
            if not recording.n_volumes:
                raise RecordingError(f"{path} holds no complete volume")
            run = f"{Path(path).name}: " if len(paths) > 1 else ""
            for number, (of_run, tell) in _TELL.items():
                text = tell(recording)
                # What is the same in all runs is said once.
                text = f"{run}{text}" if text and of_run else text
                if text and text not in told[number]:
                    told[number].append(text)
    return [Item(number, *_TOPICS[number], tuple(texts)) for number, texts in told.items()]


def write_cred_nf(paths: Sequence[str | Path], out: str | Path) -> list[Item]:
    """Write ``cred-nf.md`` and ``cred-nf.json`` into the folder *out*, and return the items."""
    items, folder = cred_nf(paths), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(item) for item in items], indent=1) + "\n"
        (folder / "cred-nf.json").write_text(text, encoding="utf-8")
        (folder / "cred-nf.md").write_text(_markdown(items), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the checklist to {folder}: {error}") from error
    return items


def _markdown(items: Iterable[Item]) -> str:
    lines = [
        "# CRED-nf checklist",
        "",
        "After Ros et al. 2020, Brain 143:1674. What rtfmri's recordings tell is filled in.",
    ]
    domain = ""
    for item in items:
        if item.domain != domain:
            domain = item.domain
            lines += ["", f"## {domain[0].upper()}{domain[1:]}"]
        lines += ["", f"**{item.number}** {item.topic}", ""]
        lines += [f"- {text}" for text in item.told] or [f"- [ ] {OPEN}"]
    return "\n".join(lines) + "\n"


def _sham(recording: Recording) -> str:
    sham = recording.config.feedback.sham
    if sham is None:
        return ""
    return (
        f"arm {sham.arm!r} of an allocation that the recording does not tell; its seal is "
        f"{recording.sham_seal} (rtfmri unblind verifies it)"
    )


def _processing(recording: Recording) -> str:
    config, fd_mm = recording.config, recording.config.quality.fd_limit_mm
    left_out = (
        f"left out of baseline and statistics: volumes with FD above {fd_mm:g} mm, spikes, "
        "outlier slices, saturation, or values that are no numbers"
    )
    parts = [
        _motion(config),
        f"slice timing {config.slice_timing.method}",
        f"smoothing {config.smoothing.fwhm_mm:g} mm FWHM",
        f"detrending {config.detrend.method}",
        f"ROI filter {config.roi.filter}",
        f"feedback filter {config.feedback.filter}",
        left_out,
    ]
    if config.glm.noise != "off" and recording.columns:
        parts.append(f"GLM with drift {config.glm.drift}, {len(recording.columns)} columns")
    missing = config.order.feedback
    parts.append(f"feedback of a missing volume: {'no value' if missing == 'none' else 'held'}")
    return "; ".join(parts)


def _motion(config: Config) -> str:
    if config.motion.mode == "off":
        return "no motion correction"
    if config.motion.mode == "register_only":
        return "motion estimated (rigid), not corrected"
    return f"motion correction (rigid, {config.motion.interpolation})"


def _artefacts(recording: Recording) -> str:
    rows, members = recording.results, recording.members()
    fd_mm = rows["fd_mm"]
    texts = []
    for name, counts in zip(recording.conditions, members.T, strict=True):
        text = f"{name}: {int(counts.sum())} volumes"
        if counts.any() and np.isfinite(fd_mm[counts]).any():
            text += f", mean FD {np.nanmean(fd_mm[counts]):.2f} mm"
        texts.append(text)
    unusable = int((~rows["usable"]).sum())
    return f"{'; '.join(texts)}; {unusable} of {len(rows)} volumes not usable"


def _feature(recording: Recording) -> str:
    config = recording.config
    settings = config.feedback.signals
    texts = []
    for name in recording.signal_names:
        asked = settings.get(name)
        texts.append(f"{name}: {_defined(asked, name)}")
    baseline = config.baseline
    kind = f"{baseline.kind} baseline of condition {baseline.condition!r}"
    window = "" if baseline.kind == "cumulative" else f" ({baseline.window_volumes} volumes)"
    return f"{'; '.join(texts)}; {kind}{window}"


def _defined(asked: Any, name: str) -> str:
    match asked:
        case ActivitySettings():
            return f"{asked.measure} of region {asked.roi} ({asked.summary})"
        case DifferentialSettings():
            return f"{asked.measure} of region {asked.plus} less that of {asked.minus}"
        case ConnectivitySettings():
            given = f" given {', '.join(asked.given)}" if asked.given else ""
            return (
                f"correlation of {' and '.join(asked.rois)}{given}, {asked.window} window of "
                f"{asked.window_volumes} volumes"
            )
        case DecoderSettings():
            return f"linear decoder ({asked.file.name})"
        case CustomSettings():
            return "a function of the experimenter's"
    return f"psc of region {name} (mean)"


def _schedule(recording: Recording) -> str:
    config = recording.config
    feedback, scale = config.feedback, config.feedback.scale
    when = f"in conditions {', '.join(feedback.during)}" if feedback.during else "all the time"
    limits = {
        "fixed": f"from {scale.low:g} to {scale.high:g}",
        "percentile": "from the {:g}th to the {:g}th percentile so far".format(*scale.percentiles),
        "baseline": f"mean of the newest baseline block, {scale.sd:g} standard deviations "
        "each way",
        "running": f"mean of {scale.window_volumes} volumes, {scale.sd:g} standard deviations "
        "each way",
    }[scale.kind]
    rows = recording.results
    p50, p99 = np.percentile(rows["latency_ms"], [50, 99])
    late = int(rows["deadline_missed"].sum())
    return (
        f"{feedback.mode}, {when}; TR {recording.tr_s:g} s; scale {limits}; conditions follow the "
        f"task by {config.paradigm.haemodynamic_delay_s:g} s, with "
        f"{config.paradigm.transition_s:g} s left out at their edges; from a volume's arrival to "
        f"its value {p50:.1f} ms (median), {p99:.1f} ms (99th percentile), {late} late"
    )


def _shown(recording: Recording) -> str:
    shown = recording.config.feedback.show or recording.signal_names[0]
    what = f"signal {shown} scaled to 0 ... 1"
    if recording.config.feedback.sham:
        what = f"what the arm makes of {what}"
    n = int(np.isfinite(recording.shown).sum())
    return (
        f"shown: {what}, at {n} of {recording.n_volumes} volumes; all "
        f"signals ({', '.join(recording.signal_names)}) and what was shown are in the recording"
    )


def _software(recording: Recording) -> str:
    what = "a GPU (CUDA)" if recording.device == "cuda" else "the CPU"
    return f"rtfmri {recording.version}, computed on {what}; recording in HDF5"


def _success(recording: Recording) -> str:
    values, name = _shown_signal(recording)
    texts = []
    for condition, counts in zip(recording.conditions, recording.members().T, strict=True):
        found = values[counts & np.isfinite(values)]
        if found.size > 1:
            mean, sd = found.mean(), found.std(ddof=1)
            texts.append(f"{condition} {mean:.3g} (sd {sd:.3g}, {found.size} volumes)")
    return f"{name}: {'; '.join(texts)}" if texts else ""


def _course(recording: Recording) -> str:
    """Return the mean of each block, a block being volumes of one condition in a row."""
    values, name = _shown_signal(recording)
    members = recording.members()
    texts = []
    for condition, counts in list(zip(recording.conditions, members.T, strict=True))[1:]:
        # Between two blocks there are volumes that count for something else, or a transition.
        usable = recording.results["usable"]
        runs = np.split(np.flatnonzero(usable), 1 + np.flatnonzero(np.diff(counts[usable])))
        blocks = [values[run] for run in runs if run.size and counts[run[0]]]
        means = [np.nanmean(block) for block in blocks if np.isfinite(block).any()]
        if means:
            texts.append(f"{condition} {', '.join(f'{mean:.3g}' for mean in means)}")
    return f"{name}, by block: {'; '.join(texts)}" if texts else ""


def _shown_signal(recording: Recording) -> tuple[NDArray[np.float64], str]:
    name = recording.config.feedback.show or recording.signal_names[0]
    return recording.signals[:, recording.signal_names.index(name)], name


def _storage(recording: Recording) -> str:
    return (
        "the recording holds every volume, all settings, regions, events, results and what was "
        "shown; rtfmri export writes them as BIDS derivatives"
    )


_TELL: dict[str, tuple[bool, Callable[[Recording], str]]] = {
    "2b": (True, _sham),
    "3d": (False, _processing),
    "3e": (True, _artefacts),
    "4a": (False, _feature),
    "4b": (True, _schedule),
    "4d": (True, _shown),
    "4e": (False, _software),
    "5a": (True, _success),
    "5b": (True, _course),
    "7a": (False, _storage),
}
"""What a recording can tell of an item, and whether that is of the run itself."""

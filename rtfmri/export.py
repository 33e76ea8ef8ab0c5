"""A recording as a BIDS derivatives folder: NIfTI maps, TSV tables, JSON sidecars.

Names and keys follow BIDS 1.10.0; the maps are named as nilearn names them
(``sub-01_task-x_contrast-y_stat-t_statmap.nii.gz``).
"""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rtfmri
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.pipeline import STAGES
from rtfmri.recording import Recording, open_recording
from rtfmri.stages.baseline import MIN_VOLUMES
from rtfmri.stages.glm import ContrastMaps
from rtfmri.volume import Grid

_log = logging.getLogger(__name__)

_STATISTICS = {
    "effect": ("arbitrary", "mean(condition) - mean(baseline)"),
    "psc": ("percent", "100 * (mean(condition) - mean(baseline)) / mean(baseline)"),
    "t": (
        "1",
        "effect / sqrt(variance(condition) / n(condition) + variance(baseline) / n(baseline))",
    ),
}
"""Units and formula; t is Welch's (1947, Biometrika 34:28)."""

_GLM = {
    "effect": ("arbitrary", "contrast of the coefficients"),
    "variance": ("arbitrary", "variance of the effect"),
    "t": ("1", "effect / sqrt(variance)"),
    "F": ("1", "explained by the contrast's rows, per row, over the residual variance"),
    "z": ("1", "standard normal with the same tail as the statistic"),
    "p": ("1", "chance of a larger t, or F, where there is no effect; one-sided"),
    "log10e": ("1", "log10 of the e-value, valid however often it was looked at"),
}
"""Units and meaning; the e-value is that of Lindon 2022 (arXiv:2210.08589)."""

_QUALITY = {
    "memory": "lag-1 autocorrelation of the noise that the GLM took out",
    "tsnr": "mean / standard deviation over the usable volumes",
    "snr": "mean / sqrt(mean squared difference of successive volumes / 2)",
}

_ROI_VALUES = {
    "signal": ("weighted mean of the voxels", "arbitrary"),
    "filtered": ("the same, detrended and filtered where that was asked for", "arbitrary"),
    "psc": ("that against the baseline volumes before this one", "percent"),
    "z": ("the same in standard deviations of those volumes", "1"),
    "adjusted": (
        "signal without drift, motion and confounds, where that was asked for",
        "percent",
    ),
}
_STAGE_TEXTS = {
    "decode": "from the arrival of the last byte to the decoded volume",
    "wait": "from the decoded volume to the start of its processing",
    "begin": "to find the brain and the reference, where the run begins",
    "upload": "to bring the volume to the device",
    "slice_timing": "to interpolate the slices in time, where that is asked for",
    "motion": "to find where the head is",
    "reslice": "to bring the brain to where it is in the reference",
    "smooth": "to smooth the volume, where that is asked for",
    "quality": "to judge the volume",
    "glm": "to fit the general linear model, and test its contrasts",
    "detrend": "to take out slow drift, where that is asked for",
    "baseline": "to subtract the baseline and update each condition's mean and variance",
    "roi": "to average the regions",
    "fetch": "to wait for the device and bring the values back",
}


def export_bids(
    path: str | Path, out: str | Path, *, subject: str = "01", task: str | None = None
) -> list[Path]:
    """Write what a recording holds into a BIDS derivatives folder.

    That is the baseline's mean image; effect, PSC and Welch's t of every condition with enough
    volumes to be tested (``desc-subtraction``); of the GLM its design and every contrast's
    effect, variance, statistic, z, p and e-value; the regions; the events; feedback and timing of
    every volume. Maps are float32 on the run's grid, in scanner mm. The maps of a run that did not
    end properly are made again from its volumes.

    Parameters
    ----------
    path : path
        Of the recording.
    out : path
        The folder, made where it is missing. Exports of other subjects or tasks may be there.
    subject : str
        Letters and digits.
    task : str, optional
        Letters and digits. By default the name of the condition where the baseline has only one
        beside it, ``rest`` where it has none, else ``task``.

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    ConfigError
        If subject or task has other characters than letters and digits.
    RecordingError
        If the recording cannot be read or holds no volume, or if a file exists already or cannot
        be written. Nothing is written if any file exists.
    """
    for name, value in (("subject", subject), ("task", task)):
        if value is not None and not re.fullmatch("[A-Za-z0-9]+", value):
            raise ConfigError(f"{name} must be letters and digits only, got {value!r}")
    out = Path(out)
    with open_recording(path) as recording:
        if not recording.n_volumes:
            raise RecordingError(f"{path} holds no complete volume, so there is nothing to export")
        grid = recording.grid
        prefix = f"sub-{subject}/func/sub-{subject}_task-{task or _task(recording)}"
        files = {out / f"{prefix}_{name}": what for name, what in _contents(recording).items()}
    description = out / "dataset_description.json"
    if not _is_ours(description):
        files[description] = {
            "Name": "Real-time fMRI: maps, feedback and timing",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "rtfmri", "Version": rtfmri.__version__}],
        }
    for file in files:
        if file.exists():
            raise RecordingError(
                f"{file} exists already and is not overwritten; export to another folder, or as "
                "another subject or task"
            )
    try:
        for file, content in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, content, grid)
    except OSError as error:
        raise RecordingError(f"cannot write the export to {out}: {error}") from error
    return list(files)


def bids_labels(names: Iterable[str]) -> dict[str, str]:
    """Return a BIDS label for each name: letters and digits, in camel case, no two alike.

    ``left hand`` becomes ``leftHand``. Of names that come out alike, all but the first get a
    number; upper and lower case are alike, since some file systems take them so.
    """
    labels: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        first, *others = re.findall("[A-Za-z0-9]+", name) or ["unnamed"]
        stem = first + "".join(part[0].upper() + part[1:] for part in others)
        label, number = stem, 1
        while label.lower() in taken:
            number += 1
            label = f"{stem}{number}"
        taken.add(label.lower())
        labels[name] = label
    return labels


def _task(recording: Recording) -> str:
    others = list(bids_labels(recording.conditions[1:]).values())
    return others[0] if len(others) == 1 else "task" if others else "rest"


def _contents(recording: Recording) -> dict[str, Any]:
    """Return the content of each file by the end of its name: image, sidecar, or table."""
    maps = recording.maps()
    baseline, *others = recording.conditions
    common = {
        "RepetitionTime": recording.tr_s,
        "BaselineCondition": baseline,
        "NumberOfVolumes": {name: maps[name].n_volumes for name in recording.conditions},
        "Settings": recording.config.model_dump(mode="json", exclude_none=True),
        "Software": f"rtfmri {rtfmri.__version__}",
    }
    files: dict[str, Any] = {}

    def add_image(name: str, data: NDArray[Any], **sidecar: str | int) -> None:
        files[f"{name}.nii.gz"], files[f"{name}.json"] = data, sidecar | common

    mean = "Mean of the volumes of the baseline condition"
    add_image("desc-baseline_boldref", maps[baseline].mean, Description=mean, Units="arbitrary")
    quality = recording.quality_maps()
    brain = "Voxels that have a baseline and maps"
    add_image("desc-brain_mask", quality["mask"].astype(np.uint8), Description=brain, Type="Brain")
    for statistic, formula in _QUALITY.items():
        if statistic == "memory" and not quality["memory"].any():
            continue
        add_image(f"stat-{statistic}_statmap", quality[statistic], Units="1", Formula=formula)
    for condition, label in bids_labels(others).items():
        if min(maps[condition].n_volumes, maps[baseline].n_volumes) < MIN_VOLUMES:
            _log.warning("no maps of %r: it or the baseline has too few volumes", condition)
            continue
        for statistic, (units, formula) in _STATISTICS.items():
            add_image(
                f"contrast-{label}_desc-subtraction_stat-{statistic}_statmap",
                getattr(maps[condition], statistic),
                Description=f"{condition} against {baseline}",
                Condition=condition,
                Units=units,
                Formula=formula,
            )
    contrasts = recording.contrast_maps()
    for contrast, label in bids_labels(contrasts).items():
        if contrasts[contrast].dof < 1:
            _log.warning("no maps of contrast %r: it could not be estimated", contrast)
            continue
        for statistic, image in _glm_maps(contrasts[contrast]).items():
            units, formula = _GLM[statistic]
            add_image(
                f"contrast-{label}_stat-{statistic}_statmap",
                image,
                Description=f"Contrast {contrast} of the general linear model",
                Units=units,
                Formula=formula,
                DegreesOfFreedom=contrasts[contrast].dof,
            )
    if recording.columns:
        files["design.tsv"] = [recording.columns, *recording.design.tolist()]
        files["design.json"] = _design_sidecar(recording)
    rois = bids_labels(recording.roi_names)
    for name, weights in recording.roi_weights.items():
        # BIDS has binary masks and, for weights from 0 to 1, probabilistic segmentations.
        binary = np.unique(weights[weights > 0]).size == 1
        image = (weights > 0).astype(np.uint8) if binary else weights / weights.max()
        suffix = "mask" if binary else "probseg"
        add_image(f"label-{rois[name]}_{suffix}", image, Description=f"Region {name}", Type="ROI")
    if recording.events:
        files["events.tsv"] = [
            ("onset", "duration", "trial_type"),
            *((event.onset_s, event.duration_s, event.trial_type) for event in recording.events),
        ]
    rows = recording.results
    for name, columns in (
        ("confounds", _confounds(recording, rows)),
        ("feedback", _feedback(recording, rows)),
        ("timing", _timing(rows)),
    ):
        header = [column for column, *_ in columns]
        rows_of_cells = zip(*(values for _, values, _, _ in columns), strict=True)
        files[f"desc-{name}_timeseries.tsv"] = [header, *rows_of_cells]
        files[f"desc-{name}_timeseries.json"] = {
            column: {"Description": text} | ({"Units": unit} if unit else {})
            for column, _, text, unit in columns
        }
    return files


def _glm_maps(maps: ContrastMaps) -> dict[str, NDArray[np.float32]]:
    """Return a contrast's maps by the name of the statistic; 0 where nothing is known.

    z and p are one-sided, as nilearn's: p is the chance of a larger value.
    """
    from scipy import special, stats

    known = maps.statistic != 0
    found = {"effect": maps.effect, "variance": maps.variance, maps.kind: maps.statistic}
    p, z = np.zeros(maps.statistic.shape), np.zeros(maps.statistic.shape)
    value = maps.statistic[known].astype(np.float64)
    if maps.kind == "t":
        p[known] = stats.t.sf(value, maps.dof)
        tail = stats.t.logsf(np.abs(value), maps.dof)
    else:
        p[known] = stats.f.sf(value, maps.n_rows, maps.dof)
        tail = stats.f.logsf(value, maps.n_rows, maps.dof)
    sign = np.sign(value) if maps.kind == "t" else 1.0
    z[known] = sign * -special.ndtri_exp(np.maximum(tail, _SMALLEST))
    found |= {"z": z.astype(np.float32), "p": p.astype(np.float32)}
    if maps.log_e is not None:
        found["log10e"] = maps.log_e / np.float32(np.log(10))
    return {name: image for name, image in found.items() if image is not None}


def _design_sidecar(recording: Recording) -> dict[str, Any]:
    """Return what the columns of the design are, and the contrasts' weights."""
    settings = recording.config.glm
    return {
        "RepetitionTime": recording.tr_s,
        "HRF": settings.hrf,
        "Drift": settings.drift,
        "NoiseModel": settings.noise,
        "Used": [bool(used) for used in recording.results["usable"]],
        "Contrasts": {
            contrast.name: {"Test": contrast.kind, "Weights": contrast.weights.tolist()}
            for contrast in recording.contrasts()
        },
    }


_SMALLEST = float(np.log(np.finfo(np.float64).tiny))
_Column = tuple[str, Sequence[Any], str, str]
"""Name, values, description, units ("" for none)."""


def _position(rows: NDArray[Any]) -> list[_Column]:
    index = "Position of the volume in the run, from 0; a number that is left out never came"
    return [
        ("volume", rows["index"].tolist(), index, ""),
        ("time_s", rows["time_s"].tolist(), "Start of its acquisition after volume 0's", "s"),
    ]


def _feedback(recording: Recording, rows: NDArray[Any]) -> list[_Column]:
    members = [
        ",".join(name for name, counts in zip(recording.conditions, row, strict=True) if counts)
        for row in recording.members()[: len(rows)]
    ]
    text = "Conditions the volume counted for, with commas between; n/a in a transition"
    columns = [*_position(rows), ("conditions", members, text, "")]
    values, ts = recording.roi[: len(rows)], recording.roi_t[: len(rows)]
    for r, (roi, label) in enumerate(bids_labels(recording.roi_names).items()):
        for v, (value, (meaning, units)) in enumerate(_ROI_VALUES.items()):
            text = f"Region {roi}: {meaning}"
            columns.append((f"{label}_{value}", values[:, r, v].tolist(), text, units))
        for c, (contrast, short) in enumerate(bids_labels(recording.contrast_names).items()):
            text = f"Region {roi}: t (or F) of contrast {contrast} after this volume"
            columns.append((f"{label}_t_{short}", ts[:, r, c].tolist(), text, "1"))
    for s, (signal, label) in enumerate(bids_labels(recording.signal_names).items()):
        series = recording.signals[: len(rows), s].tolist()
        columns.append((f"signal_{label}", series, f"Feedback signal {signal}", ""))
    shown = recording.shown[: len(rows)].tolist()
    return [*columns, ("shown", shown, "What the participant was shown, from 0 to 1", "1")]


def _confounds(recording: Recording, rows: NDArray[Any]) -> list[_Column]:
    """Return motion and quality under the names that fMRIPrep gives them."""
    text = "Head {} along {}, against the reference, about the centre of the grid (RAS+)"
    columns = _position(rows)
    for axis in "xyz":
        mm = rows[f"trans_{axis}_mm"].tolist()
        columns.append((f"trans_{axis}", mm, text.format("translation", axis), "mm"))
    for axis in "xyz":
        radians = np.deg2rad(rows[f"rot_{axis}_deg"]).tolist()
        about = text.format("rotation", axis).replace("along", "about")
        columns.append((f"rot_{axis}", radians, f"{about}; R = Rz Ry Rx", "rad"))
    problems = [",".join(words) for words in recording.problems()[: len(rows)]]
    start_up = np.arange(len(rows)) < recording.n_start_up
    for name, values, meaning, units in (
        ("framewise_displacement", rows["fd_mm"], "Power 2012, NeuroImage 59:2142", "mm"),
        ("rmsd", rows["fd_jenkinson_mm"], "Framewise displacement of Jenkinson 2002", "mm"),
        ("dvars", rows["dvars"], "In percent of the mean brain signal", "percent"),
        ("std_dvars", rows["dvars_std"], "Relative to what the run lets expect", "1"),
        ("global_signal", rows["global_signal"], "Mean of the brain's voxels", "arbitrary"),
        ("n_slice_outliers", rows["n_slice_outliers"], "Slices too bright or too dark", ""),
        ("start_up", start_up, "Whether it was before the signal was steady", ""),
        ("usable", rows["usable"], "Whether the baseline and the maps have it", ""),
    ):
        columns.append((name, values.tolist(), meaning, units))
    columns.append(("problems", problems, "Why not, with commas between", ""))
    return columns


def _timing(rows: NDArray[Any]) -> list[_Column]:
    columns = _position(rows)
    for name, text, unit in (
        (
            "acquired_s",
            "Scanner's time of day, since its midnight; n/a if the header has none",
            "s",
        ),
        ("arrived_s", "Arrival of the last byte, on a clock with an arbitrary zero", "s"),
        *((f"{stage}_ms", f"Time {_STAGE_TEXTS[stage]}", "ms") for stage in STAGES),
        ("latency_ms", "From the arrival of the last byte to the result", "ms"),
        ("deadline_missed", "Whether the latency was above the deadline", ""),
    ):
        columns.append((name, rows[name].tolist(), text, unit))
    return columns


def _is_ours(description: Path) -> bool:
    """Tell whether the dataset in the folder is one of our exports, to which runs may be added."""
    try:
        generators = json.loads(description.read_text(encoding="utf-8"))["GeneratedBy"]
        return bool(generators[0]["Name"] == "rtfmri")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write(file: Path, content: Any, grid: Grid) -> None:
    if file.suffix == ".json":
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    elif file.suffix == ".tsv":
        lines = ("\t".join(_cell(value) for value in row) + "\n" for row in content)
        file.write_text("".join(lines), encoding="utf-8")
    else:
        to_nifti(content, grid).to_filename(file)


def _cell(value: Any) -> str:
    """Return a value as BIDS writes it in a table; floats with the digits that bring them back."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "n/a" if np.isnan(value) else repr(value)
    return " ".join(str(value).split()) or "n/a"


def to_nifti(data: NDArray[Any], grid: Grid) -> Any:
    """Return *data* (x, y, z) as a `nibabel.Nifti1Image` in scanner mm."""
    import nibabel

    image = nibabel.Nifti1Image(data, grid.affine)
    image.set_sform(grid.affine, code="scanner")
    image.set_qform(grid.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    return image

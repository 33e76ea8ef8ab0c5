"""The report of a run: figures, and a page that shows and explains them."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import rtfmri
from rtfmri.blobs import StatMap, threshold
from rtfmri.config import GlmSettings
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.export import bids_labels, to_nifti
from rtfmri.recording import Recording, open_recording
from rtfmri.report import figures
from rtfmri.report.page import frame, numbers, page, paragraph, picture, section, table
from rtfmri.report.regions import (
    THRESHOLD_T,
    Mask,
    active_region,
    inactive_region,
    peak,
)
from rtfmri.stages.baseline import MIN_VOLUMES
from rtfmri.stages.glm import ContrastMaps
from rtfmri.stages.mask import brain_mask
from rtfmri.stages.quality import PROBLEMS
from rtfmri.volume import Grid

__all__ = ["peak", "write_report"]

_DPI = 150
_MOST_SIGNALS = 5
"""That are drawn."""
_FDR = 0.05
_MIN_CLUSTER_VOXELS = 5
_MAX_CLUSTERS = 12
_MIN_VIEWER_SLICES = 4
_VIEWER_STYLE = "<style>body { margin: 0; color: #bbb; font: 14px system-ui, sans-serif; }</style>"
_MARGIN_VOXELS = 2
_ANATOMY_FINER = 2


def write_report(path: str | Path, out: str | Path, *, anatomy: str | Path | None = None) -> Path:
    """Draw what a recording holds and explain it on one self-contained HTML page.

    Parameters
    ----------
    path : path
        Of the recording; a run that did not end properly, or is still going on, will do.
    out : path
        A folder, made where it is missing; an earlier report in it is replaced.
    anatomy : path, optional
        An image in the same scanner mm, to draw the blobs on instead of the baseline image.

    Returns
    -------
    Path
        Of ``index.html``; each figure lies beside it as PNG.

    Raises
    ------
    RecordingError
        If the recording cannot be read or holds no volume, or the folder cannot be written.
    ConfigError
        If the anatomy cannot be read.
    """
    with open_recording(path) as recording:
        if not recording.n_volumes:
            raise RecordingError(f"{path} holds no complete volume, so there is nothing to show")
        report = _Report(recording, Path(out), anatomy)
        index = report.out / "index.html"
        try:
            report.out.mkdir(parents=True, exist_ok=True)
            index.write_text(report.html(), encoding="utf-8")
        except OSError as error:
            raise RecordingError(f"cannot write the report to {out}: {error}") from error
    return index


class _Finding(NamedTuple):
    """A map to look for blobs in, (x, y, z), with the threshold to draw it above."""

    name: str
    statistic: str
    values: NDArray[np.float32]
    text: str
    threshold: float = THRESHOLD_T


class _Report:
    """What the sections share: the recording, its maps, and the part of them that is drawn."""

    def __init__(self, recording: Recording, out: Path, anatomy: str | Path | None) -> None:
        self.recording, self.out = recording, out
        # A run that goes on grows while it is being read; these rows are the report's.
        self.rows = recording.results
        self.members = recording.members()[: len(self.rows)]
        self.maps = recording.maps()
        self.baseline, *others = recording.conditions
        n_baseline = self.maps[self.baseline].n_volumes
        self.tested = [
            name for name in others if min(n_baseline, self.maps[name].n_volumes) >= MIN_VOLUMES
        ]
        self.contrasts = recording.contrast_maps()
        self.mean = self.maps[self.baseline].mean if n_baseline else recording.volume(0).data
        self.quality_maps = recording.quality_maps()
        mask = self.quality_maps["mask"] > 0
        self.brain = brain_mask(self.mean, recording.grid) if mask.all() else mask
        self.box, self.grid = _around(self.brain, recording.grid)
        self.over = "the anatomy" if anatomy else "the baseline image"
        brain_only = self.image(self.mean * self.brain)
        self.background = _read_anatomy(anatomy, self.grid) if anatomy else brain_only

    def image(self, data: NDArray[Any]) -> Any:
        """Return the part of a map that is drawn, as a NIfTI image."""
        return to_nifti(np.nan_to_num(data[self.box]).astype(np.float32), self.grid)

    def html(self) -> str:
        """Draw all figures and return the page."""
        parts = [self.summary(), *self.warnings()]
        if self.tested:
            parts.append(self.subtraction())
        findings = self.findings()
        for label, finding in zip(
            bids_labels(f.name for f in findings).values(), findings, strict=True
        ):
            parts += self.blobs(finding, label)
        if not (self.tested or findings):
            parts.append(self.mean_image())
        if self.recording.columns:
            parts.append(self.design())
        parts.append(self.courses(findings))
        if self.recording.signal_names:
            parts.append(self.feedback())
        parts += [*self.quality(), self.latency()]
        return page(
            "Real-time fMRI run",
            f"{self.recording.grid}, one volume every {self.recording.tr_s:g} s, processed on "
            f"{self.recording.device}.",
            parts,
            f"Made by rtfmri {rtfmri.__version__}. This file holds all its pictures and loads "
            "nothing from anywhere. Not for diagnosis.",
        )

    def summary(self) -> str:
        """Return the header: what the run was."""
        recording, rows, journal = self.recording, self.rows, self.recording.journal
        skipped = [note.text for note in journal if note.kind == "skipped"]
        told = {note.kind: note.text for note in journal if note.kind in ("start", "end")}
        reordered = sum(note.kind == "reordered" for note in journal)
        n, missing = len(rows), int(np.ptp(rows["index"])) + 1 - len(rows)
        late = int(rows["deadline_missed"].sum())
        p50, p99 = np.percentile(rows["latency_ms"], (50, 99))
        counts = [f"{name}: {self.maps[name].n_volumes}" for name in recording.conditions]
        in_transition = rows["usable"] & ~self.members.any(axis=1)
        in_transition[: recording.n_start_up] = False
        counts.append(f"left out as transition: {int(in_transition.sum())}")
        unusable = int((~rows["usable"][recording.n_start_up :]).sum())
        counts.append(f"not usable: {unusable + recording.n_start_up}")
        reasons = Counter(skipped)
        task, baseline = recording.config.paradigm, recording.config.baseline
        facts = [
            ("Grid", str(recording.grid)),
            ("Repetition time", f"{recording.tr_s:g} s"),
            ("Length", f"{n} volumes, {(rows['index'].max() + 1) * recording.tr_s:.0f} s"),
            ("Volumes counted", "; ".join(counts)),
            ("Baseline", f"{self.baseline}, {baseline.kind}"),
            (
                "Haemodynamic delay",
                f"{task.haemodynamic_delay_s:g} s; left out {task.transition_s:g} s around edges",
            ),
            ("Regions given", ", ".join(recording.roi_names) or "none"),
            ("Device", recording.device),
            *([("Start", told["start"])] if "start" in told else []),
            ("End", told.get("end", "not recorded: the run was cut off")),
            ("Never came", f"{missing} volumes"),
            ("Came after a later one", f"{reordered} volumes"),
            ("Skipped", "; ".join(f"{k} x {why}" for why, k in reasons.items()) or "nothing"),
        ]
        large = [
            (str(n), "volumes"),
            (str(missing), "missing"),
            (str(len(skipped)), "skipped"),
            (f"{p50:.3g} ms", "latency, p50"),
            (f"{p99:.3g} ms", "latency, p99"),
            (str(late), "late"),
            (f"{rows['usable_min'][-1]:.1f} min", "usable"),
        ]
        return numbers(large) + section("The run", table((), facts))

    def warnings(self) -> list[str]:
        """Return what the reader must know before the pictures."""
        texts = []
        if not self.recording.closed:
            texts.append(
                "The recording was not closed: the run is still going on, or was cut off. The "
                "maps here were made again from the volumes that are safe."
            )
        texts += [
            f"There is no map of {name}: it or the baseline has fewer than {MIN_VOLUMES} volumes."
            for name in self.recording.conditions[1:]
            if name not in self.tested
        ]
        texts += [
            f"Contrast {name} could not be estimated: what it asks for did not happen in the run, "
            "or cannot be told from the other columns of the design."
            for name, maps in self.contrasts.items()
            if maps.dof < 1
        ]
        return [section("Note", text=text, warning=True) for text in texts]

    def mean_image(self) -> str:
        """Return the section of a run without a task to test."""
        rows = figures.slices_through(self.brain, self.recording.grid, self.middle_mm())
        drawn = figures.plain(self.image(self.mean), rows, "scanner units", "gray")
        return section(
            "Mean image",
            self.figure("mean", drawn, "Mean image"),
            text="The mean of the baseline volumes, slice by slice. Look for lost signal, ghosts "
            "of the head beside the head, and whether the whole brain is in the picture.",
        )

    def subtraction(self) -> str:
        """Return baseline, activity and their difference."""
        name = self.tested[0]
        maps = self.maps[name]
        _, at_mm = peak(maps.t, self.recording.grid, self.brain)
        images = {"Baseline": self.image(self.mean), f"Activity: {name}": self.image(maps.mean)}
        difference = self.image(maps.effect * self.brain)
        drawn = figures.subtraction(
            images,
            ("Activity minus baseline", difference),
            figures.slices_at(self.recording.grid, at_mm),
        )
        return section(
            "Activity minus baseline",
            self.figure("subtraction", drawn, f"Baseline, {name}, and their difference"),
            text=f"Left, the mean image of {self.baseline}; middle, that of {name}: to the eye "
            "they are the same. Right, their difference: warm where the signal rose, cool where "
            "it fell, black where nothing changed. The slices go through the largest t; look for "
            "patches of one colour there, while single scattered voxels are noise.",
        )

    def findings(self) -> list["_Finding"]:
        """Return the maps to look for blobs in: the GLM's contrasts, else Welch's t."""
        if self.recording.columns:
            return [
                _Finding(
                    name,
                    maps.kind,
                    maps.statistic,
                    f"contrast {name} of the general linear model, {maps.dof} degrees of freedom",
                    THRESHOLD_T if maps.kind == "t" else self.critical_f(maps),
                )
                for name, maps in self.contrasts.items()
                if maps.dof >= 1
            ]
        return [
            _Finding(
                name, "Welch t", self.maps[name].t, f"{name} against {self.baseline}, Welch's t"
            )
            for name in self.tested
        ]

    def critical_f(self, maps: ContrastMaps) -> float:
        """Return the F that is as rare as `THRESHOLD_T`."""
        return threshold(StatMap.of(maps), self.brain, "z", THRESHOLD_T).statistic

    def blobs(self, finding: "_Finding", label: str) -> list[str]:
        """Return the blobs of one map: mosaic, table, what holds at any time, viewer."""
        name = finding.name
        t, at_mm = peak(finding.values, self.recording.grid, self.brain)
        rows = figures.slices_through(self.brain, self.recording.grid, at_mm)
        least = finding.threshold
        t_map = _without_specks(self.image(finding.values * self.brain), least)
        drawn = figures.mosaic(self.background, rows, t_map, least, finding.statistic)
        meaning = (
            f"coloured where F is {least:.1f} or more"
            if finding.statistic == "F"
            else "warm where the signal rose, cool where it fell "
            f"({finding.statistic} of {least} or more either way)"
        )
        blobs = section(
            f"Blobs: {name}",
            self.figure(f"blobs-{label}", drawn, f"{finding.statistic} map of {name}"),
            paragraph(
                f"{finding.text[0].upper()}{finding.text[1:]}, over {self.over}: {meaning}, in "
                f"clusters of {_MIN_CLUSTER_VOXELS} voxels or more, not corrected for the number "
                "of voxels. Look for compact blobs where the task should have them; a rim along "
                "the edge of the brain means that the head moved with the task."
            ),
            _clusters(t_map, least),
            text=f"Largest {finding.statistic}: {t:.1f} at {_place(at_mm)} mm. Places are scanner "
            "mm: x grows to the right, y to the front, z to the top.",
        )
        parts = [blobs]
        if finding.statistic == "t":
            parts.append(self.evidence(name, rows, label))
        heading = f"Look around: {name}"
        if min(self.grid.shape) < _MIN_VIEWER_SLICES:
            text = "Left out: the volume has too few slices to be cut three ways."
            return [*parts, section(heading, text=text)]
        if not np.any(t_map.dataobj):
            text = "Left out: there are no blobs to look at."
            return [*parts, section(heading, text=text)]
        viewer = section(
            heading,
            _viewer(t_map, least, self.background, at_mm, heading),
            text=f"The same blobs over {self.over}, in three planes through one point. Click or "
            "drag in a plane to move the point; its place and its value are shown.",
        )
        return [*parts, viewer]

    def evidence(self, name: str, rows: figures.Rows, label: str) -> str:
        """Return what of a t contrast holds however often it was looked at."""
        stat = StatMap.of(self.contrasts[name])
        found = threshold(stat, self.brain, "e-bh", _FDR)
        heading = f"Evidence: {name}"
        explanation = (
            "The map above is right for who looks once, at the end. Here are the voxels of which "
            f"at most {100 * _FDR:.0f} % on average are false discoveries, however often one "
            "looked and whenever the run was stopped: e-BH on e-values, which may be watched at "
            "every volume (Wang & Ramdas 2022; Lindon 2022)."
        )
        if self.recording.config.glm.noise == "ols":
            explanation += (
                " They take the noise for independent from volume to volume; where it is not, "
                'there are more false ones, and glm.noise = "ar1" puts that right.'
            )
        if not found.above.any():
            return section(heading, paragraph("No voxel is evident yet."), text=explanation)
        drawn = figures.mosaic(
            self.background,
            rows,
            self.image(stat.values * found.above),
            found.statistic,
            "t",
        )
        least = _power(stat.log_e_values()[found.above].min())
        return section(
            heading,
            self.figure(f"evidence-{label}", drawn, f"Voxels of {name} that are evident"),
            text=f"{found.above.sum()} voxels, with e-values of {least} or more. {explanation}",
        )

    def design(self) -> str:
        """Return the design matrix."""
        recording, settings = self.recording, self.recording.config.glm
        matrix, contrasts = recording.design[: len(self.rows)], recording.contrasts()
        drawn = figures.design(matrix, recording.columns, contrasts, self.rows["usable"])
        noise = "independent from volume to volume"
        if settings.noise == "ar1":
            memory = self.quality_maps["memory"][self.brain]
            noise = (
                f"autoregressive, with a median lag-1 correlation of {np.median(memory):.2f}"
                if memory.any()
                else "autoregressive; its correlation was not known yet"
            )
        return section(
            "Design matrix",
            self.figure("design", drawn, "Design matrix and contrasts"),
            text="What each voxel's signal is explained by: a row a volume, from top to bottom, a "
            f"column a cause ({settings.hrf} haemodynamic response; noise {noise}). Below, what "
            "each contrast weighs. Marks beside the matrix are volumes that were left out.",
        )

    def courses(self, findings: Sequence["_Finding"]) -> str:
        """Return the time courses: regions from the maps, then the regions that were given."""
        grid, single = self.recording.grid, len(findings) == 1
        regions: dict[str, Mask] = {}
        for finding in findings:
            region = active_region(finding.values, self.brain)
            of = "" if single else f" of {finding.name}"
            at = _place(peak(finding.values, grid, self.brain)[1])
            regions[f"Active: cluster around the peak{of} at {at} mm, {region.sum()} voxels"] = (
                region
            )
        if findings:
            region = inactive_region([finding.values for finding in findings], self.brain)
            regions[f"Inactive: {region.sum()} voxels with values nearest to 0"] = region
        else:
            regions["Whole brain"] = self.brain
        signals = dict(
            zip(regions, _signals(self.recording, len(self.rows), regions), strict=True)
        )
        for i, name in enumerate(self.recording.roi_names):
            signals[f"Region {name}"] = self.recording.roi[: len(self.rows), i, 1]
        rest = self.members[:, 0] if self.members[:, 0].any() else np.ones(len(self.rows), bool)
        drawn = figures.time_courses(
            [
                figures.Course(name, 100 * (signal / (signal[rest].mean() or 1.0) - 1))
                for name, signal in signals.items()
            ],
            self.rows["time_s"] + self.recording.tr_s / 2,
            self.members,
            self.recording.conditions,
            self.recording.events,
        )
        text = "The signal of each region, in percent of its mean over all baseline volumes. "
        if findings:
            delay_s = self.recording.config.paradigm.haemodynamic_delay_s
            text += (
                "Shaded: the task blocks, when they were; the signal follows them by some "
                f"{delay_s:g} s, since blood is slow. An active region steps up with every block, "
                "an inactive one does not. Hollow points are volumes left out because the signal "
                "was on its way up or down, or because they were no good. The regions called "
                "active and inactive were chosen from this very map, so they illustrate it; they "
                "are no test of it."
            )
        else:
            text += "Look for jumps (the head moved), spikes and slow drift."
        return section(
            "Time courses", self.figure("time-courses", drawn, "Time courses"), text=text
        )

    def feedback(self) -> str:
        """Return what the signals were, and what was shown of them."""
        recording, n = self.recording, len(self.rows)
        names, shown = recording.signal_names, recording.shown[:n]
        signals = recording.signals[:n]
        presented = recording.config.feedback.show or names[0]
        courses = [
            figures.Course(f"Signal {name}", values)
            for name, values in list(zip(names, signals.T, strict=True))[:_MOST_SIGNALS]
        ]
        columns = dict(zip(names, signals.T, strict=True))
        text = "The signals, each in its own units. Shaded: the task blocks, when they were. "
        if recording.config.feedback.sham:
            text += (
                "What the participant was shown is left out here, since beside the signals it "
                "would tell of which kind the sham's arm is."
            )
        else:
            title = f"Shown to the participant (from {presented})"
            courses.insert(0, figures.Course(title, shown))
            columns["shown"] = shown
            text += (
                f"The participant was shown {presented}, from 0 to 1, at "
                f"{int(np.isfinite(shown).sum())} of {n} volumes: not where no feedback was due, "
                "there was no baseline yet, or the volume was no good."
            )
        drawn = figures.time_courses(
            courses,
            self.rows["time_s"] + recording.tr_s / 2,
            self.members,
            recording.conditions,
            recording.events,
            label="in each signal's own units",
            one_scale=False,
        )
        facts = []
        for condition, counts in zip(recording.conditions, self.members.T, strict=True):
            facts.append((condition, *(_mean_and_sd(v[counts]) for v in columns.values())))
        return section(
            "Feedback",
            self.figure("feedback", drawn, "What was shown, and each signal, over time"),
            table(("mean (sd)", *columns), facts),
            text=text,
        )

    def quality(self) -> list[str]:
        """Return how still the head was, and how steady the signal."""
        recording, rows, n = self.recording, self.rows, len(self.rows)
        limit_mm = recording.config.quality.fd_limit_mm
        problems = recording.problems()[:n]
        drawn = figures.quality(rows, problems, recording.n_start_up, limit_mm)
        counts = Counter(problem for words in problems for problem in words)
        facts = [(problem, str(k), PROBLEMS[problem]) for problem, k in counts.items()]
        if recording.n_start_up:
            facts.append(("start-up", str(recording.n_start_up), "before the signal was steady"))
        section_of_run = section(
            "Motion and quality",
            self.figure("quality", drawn, "Head motion, framewise displacement and DVARS"),
            table(("left out for", "volumes", "which means"), facts) if facts else "",
            text="Where the head was, against the reference (translation along and rotation about "
            "x to the right, y to the front, z to the top); how far it moved from volume to "
            "volume (framewise displacement); and how much the picture changed from volume to "
            "volume (DVARS). Orange lines mark volumes that were left out of the baseline and of "
            "all maps. Look for steps and spikes, above all when they come with the task.",
        )
        tsnr = self.quality_maps["tsnr"]
        if not tsnr.any():
            return [section_of_run]
        slices = figures.slices_through(self.brain, recording.grid, self.middle_mm())
        drawn = figures.plain(self.image(tsnr), slices, "tSNR", "inferno")
        median = float(np.median(tsnr[tsnr > 0]))
        section_of_map = section(
            "Signal against noise over time (tSNR)",
            self.figure("tsnr", drawn, "Map of tSNR"),
            text="The mean of each voxel over its standard deviation; the median is "
            f"{median:.0f}. Dark patches inside the brain have too little signal (drop-out) or "
            "too much movement; a dark rim means that the head moved.",
        )
        return [section_of_run, section_of_map]

    def latency(self) -> str:
        """Return how long everything took."""
        deadline_s = self.recording.config.deadline_s or self.recording.tr_s
        drawn = figures.latency(self.rows, 1e3 * deadline_s)
        return section(
            "Latency",
            self.figure("latency", drawn, "Latency of each stage and of each volume"),
            text="Left, how long each stage took (p50: half are faster; p99: one in 100 is "
            "slower); right, the time from each volume's last byte to its result, which should "
            "stay under the deadline (crosses are late). The axes are logarithmic. 'wait' is time "
            "in the queue: it grows where volumes come faster than they are processed. On a GPU, "
            "'fetch' is the time of all stages before it.",
        )

    def middle_mm(self) -> list[float]:
        """Return the middle of the brain in scanner mm."""
        middle = np.argwhere(self.brain).mean(axis=0)
        return list((self.recording.grid.affine @ [*middle, 1])[:3])

    def figure(self, name: str, figure: Figure, text: str) -> str:
        """Save a figure as PNG and return it as HTML."""
        file = self.out / f"{name}.png"
        figure.savefig(file, dpi=_DPI, facecolor=figure.get_facecolor())
        return picture(file, text)


def _around(mask: Mask, grid: Grid) -> tuple[tuple[slice, ...], Grid]:
    """Return the box around *mask* with a margin, as slices and as a grid of its own."""
    voxels = np.argwhere(mask)
    first = np.maximum(voxels.min(axis=0) - _MARGIN_VOXELS, 0)
    stop = np.minimum(voxels.max(axis=0) + 1 + _MARGIN_VOXELS, grid.shape)
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    x, y, z = (stop - first).tolist()
    return tuple(slice(a, b) for a, b in zip(first, stop, strict=True)), Grid((x, y, z), affine)


def _read_anatomy(path: str | Path, grid: Grid) -> Any:
    """Return the anatomy on *grid*, twice as fine along each axis."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nilearn.image import resample_img

    affine = grid.affine @ np.diag([*(1 / _ANATOMY_FINER,) * 3, 1])
    # The first and the last fine voxel share the outer faces of the first and the last coarse one.
    affine[:3, 3] -= grid.affine[:3, :3] @ np.full(3, 0.5 - 0.5 / _ANATOMY_FINER)
    shape = tuple(_ANATOMY_FINER * n for n in grid.shape)
    try:
        image = nibabel.load(path)
        return resample_img(image, affine, shape, interpolation="linear", copy_header=True)
    except (ImageFileError, OSError, EOFError, ValueError, TypeError) as error:
        raise ConfigError(
            f"anatomy must be a 3-D NIfTI image; cannot use {path}: {error}"
        ) from None


def _signals(
    recording: Recording, n_volumes: int, regions: Mapping[str, Mask]
) -> NDArray[np.float64]:
    """Return each region's mean signal, (n_regions, n_volumes), by taking the run again."""
    pipeline = recording.pipeline("cpu", regions, glm=GlmSettings(noise="off"))
    results = [pipeline.push(recording.volume(row)) for row in range(n_volumes)]
    return np.array([[result.roi[name].signal for result in results] for name in regions])


def _without_specks(t_map: Any, threshold: float) -> Any:
    """Return the t map where it is beyond the threshold in clusters of some voxels, else 0."""
    from nilearn.image import threshold_img

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given float value must not exceed")
        return threshold_img(
            t_map,
            threshold,
            cluster_threshold=_MIN_CLUSTER_VOXELS,
            two_sided=True,
            copy_header=True,
        )


def _clusters(t_map: Any, threshold: float) -> str:
    from nilearn.reporting import get_clusters_table

    if not np.any(t_map.dataobj):
        return paragraph("No cluster is beyond the threshold.")
    with warnings.catch_warnings():
        # All may have one sign.
        warnings.filterwarnings("ignore", "No clusters found")
        found = get_clusters_table(t_map, threshold, two_sided=True).to_dict("records")
    # nilearn lists further peaks of a cluster under it, without a size of their own.
    clusters = [row for row in found if row["Cluster Size (mm3)"] != ""]
    clusters.sort(key=lambda row: -abs(row["Peak Stat"]))
    rows = [
        (
            str(i),
            f"{row['Peak Stat']:.1f}",
            *(str(round(row[axis])) for axis in "XYZ"),
            f"{row['Cluster Size (mm3)'] / 1000:.2f}",
        )
        for i, row in enumerate(clusters[:_MAX_CLUSTERS], 1)
    ]
    left = len(clusters) - len(rows)
    more = paragraph(f"{left} more clusters are not listed.") if left > 0 else ""
    return (
        table(("", "peak", "x mm", "y mm", "z mm", "volume cm\N{SUPERSCRIPT THREE}"), rows) + more
    )


def _viewer(
    t_map: Any,
    threshold: float,
    background: Any,
    at_mm: tuple[float, float, float],
    title: str,
) -> str:
    from nilearn.plotting import view_img

    view = view_img(
        t_map,
        bg_img=background,
        threshold=threshold,
        cut_coords=at_mm,
        cmap=figures.WARM_COOL,
        black_bg=True,
        resampling_interpolation="nearest",
        width_view=900,
    )
    # The viewer asks a server for its icon, and nothing here asks a server.
    document = re.sub(r'<link rel="(?:shortcut )?icon"[^>]*>', _VIEWER_STYLE, view.html)
    return frame(document, title, view.height)


def _power(log_e: float) -> str:
    return f"10^{log_e / np.log(10):.1f}"


def _mean_and_sd(values: NDArray[np.float64]) -> str:
    """Return both in words; a dash if there are too few values for them."""
    values = values[np.isfinite(values)]
    if values.size < 2:
        return "-"
    return f"{values.mean():+.2f} ({values.std(ddof=1):.2f})"


def _place(at_mm: tuple[float, float, float]) -> str:
    return "({}, {}, {})".format(*(round(x) for x in at_mm))

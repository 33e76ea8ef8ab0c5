"""The command line: each command parses, calls one function of the package, shows the result."""

import importlib
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from rtfmri import __version__
from rtfmri.errors import ConfigError, RtfmriError

if TYPE_CHECKING:
    from rtfmri.blobs import Blob
    from rtfmri.pipeline import Result
    from rtfmri.readers import Reader
    from rtfmri.session import Session
    from rtfmri.simulator import Fault

app = typer.Typer(
    help="Real-time fMRI on the GPU: each volume through baseline and subtraction within its TR.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out_console = Console()
err_console = Console(stderr=True)


_GLANCE_S = 1.0
"""How often the evidence is shown: a human's glance, so that a replay is not held up."""


class Threshold(StrEnum):
    """What a blob must be above."""

    t = "t"
    z = "z"
    p = "p"
    bonferroni = "bonferroni"
    fdr = "fdr"
    anytime = "anytime"
    e_bh = "e-bh"


class MapName(StrEnum):
    """What a decoder looks at."""

    z = "z"
    psc = "psc"


class Model(StrEnum):
    """What a decoder is fitted by."""

    svm = "svm"
    logistic = "logistic"


class Device(StrEnum):
    """What computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Source = Annotated[
    str,
    typer.Argument(
        help="A NIfTI file, a folder of DICOM or NIfTI files, a recording (.h5), or a URI: "
        "folder:/export or dicom://:11112 (live), simulator:finger-tapping"
    ),
]
TrOption = Annotated[
    float | None, typer.Option("--tr", help="Repetition time in s, instead of the headers'.")
]
DeviceOption = Annotated[
    Device, typer.Option(help="What computes; auto takes a GPU if there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON for machines.")]
ContrastOption = Annotated[
    str | None, typer.Option(help="Of the GLM; the recording's first by default.")
]
ThresholdOption = Annotated[
    Threshold,
    typer.Option(
        help="t, z or p: of each voxel; bonferroni: of the map; fdr: share of false ones; "
        "anytime, e-bh: the last two for who looks at every volume."
    ),
]
LevelOption = Annotated[
    float, typer.Option(help="The t or z itself, or the chance to be wrong, such as 0.05.")
]
RecordingArgument = Annotated[Path, typer.Argument(help="A recording (.h5).")]


def main() -> None:
    """Run the command line; errors of use end with a sentence, not a traceback."""
    try:
        app()
    except RtfmriError as error:
        err_console.print("error:", style="bold red", end=" ")
        err_console.print(str(error), markup=False, highlight=False)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        out_console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    # Our own log alone is shown: other libraries' messages can quote a header, patient included.
    logging.getLogger().addHandler(logging.NullHandler())
    log = logging.getLogger("rtfmri")
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.addHandler(RichHandler(console=err_console, show_path=False, log_time_format="%H:%M:%S"))


@app.command()
def run(
    source: Source,
    events: Annotated[Path | None, typer.Option(help="The task: a BIDS events.tsv.")] = None,
    tr: TrOption = None,
    out: Annotated[Path | None, typer.Option(help="Record into this file (.h5).")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML.")] = None,
    roi: Annotated[
        list[str] | None, typer.Option(help="A region as NAME=FILE; may be repeated.")
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            help="A t contrast of the GLM as NAME=EXPRESSION, such as side='left - right'; may be "
            "repeated. By default each condition."
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            help="Where each volume's feedback goes: zmq://127.0.0.1:5556, tcp://127.0.0.1:5557, "
            "lsl:, udp://HOST:PORT, afni://HOST:PORT, ws://127.0.0.1:8765, file:FILE; may be "
            "repeated."
        ),
    ] = None,
    stimulus: Annotated[
        str | None,
        typer.Option(
            help="Where the stimulus program says that the trigger came, or a block begins: "
            "tcp://127.0.0.1:5560, zmq://127.0.0.1:5561 or lsl:NAME."
        ),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="What computes: auto, cpu or cuda.")
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(help="Play a recorded source at this multiple of its TR's pace."),
    ] = None,
    runs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of a live source: so many runs, one after the other; each has a recording of "
            "its own, OUT-1.h5, OUT-2.h5 and so on.",
        ),
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Take each volume of SOURCE through the pipeline as it comes, and record it."""
    from rtfmri.config import Config
    from rtfmri.feedback.outputs import Outputs
    from rtfmri.readers import open_reader
    from rtfmri.stimulus import open_stimulus

    settings = (Config.from_toml(config) if config else Config()).with_changes(
        tr_s=tr, device=device and device.value
    )
    if contrast:
        contrasts = dict(_split(text, "--contrast", "EXPRESSION") for text in contrast)
        settings = settings.with_changes(
            glm=settings.glm.model_copy(update={"contrasts": contrasts})
        )
    rois = dict(_split(text, "--roi", "FILE") for text in roi or [])
    outs = [out]
    if runs > 1:
        outs = [out and out.with_stem(f"{out.stem}-{i + 1}") for i in range(runs)]
    lost = False
    with (
        Outputs(output or ()) as outputs,
        closing(open_stimulus(stimulus)) if stimulus else nullcontext() as link,
        closing(open_reader(source, tr_s=settings.tr_s, speed=speed)) as reader,
    ):
        if runs > 1 and not reader.live:
            raise ConfigError(f"--runs is for a live source, got {source}")
        for number, file in enumerate(outs, start=1):
            session = _run_once(
                reader,
                file,
                as_json=as_json,
                outputs=outputs,
                stimulus=link,
                events=events,
                rois=rois,
                config=settings,
                speed=speed,
                more_runs=number < runs,
            )
            lost |= file is not None and session.counters.processed > session.n_recorded
            if not session.end:
                break
    if lost:
        raise typer.Exit(3)


def _run_once(reader: "Reader", out: Path | None, *, as_json: bool, **given: Any) -> "Session":
    """Take one run through, and show it."""
    from rtfmri.session import Session

    with err_console.status("preparing the kernels (the first time takes some seconds)"):
        session = Session(reader, out=out, **given)
    with session:
        try:
            if as_json:
                for result in session:
                    print(json.dumps(_result_json(result, session)), flush=True)
            else:
                _watch(session)
        except KeyboardInterrupt:
            err_console.print("stopped by the operator; closing the recording")
    if not session.counters.processed:
        raise typer.Exit(1)
    summary = session.summary()
    if as_json:
        print(json.dumps({"summary": summary}))
    else:
        _show_summary(summary)
    if session.n_recorded and not as_json:
        out_console.print(f"recorded in {out}; next: rtfmri report {out}", highlight=False)
    return session


def _split(text: str, option: str, what: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"{option} must be NAME={what}, got {text!r}")
    return name, value


def _result_json(result: "Result", session: "Session") -> dict[str, Any]:
    return {
        "index": result.index,
        "time_s": round(result.time_s, 3),
        "conditions": result.conditions,
        "roi": {
            name: {
                "signal": _finite(value.signal),
                "filtered": _finite(value.filtered),
                "psc": None if math.isnan(value.psc) else value.psc,
                "z": None if math.isnan(value.z) else value.z,
                "adjusted": _finite(value.adjusted),
                "t": {name: _finite(t) for name, t in value.t.items()},
            }
            for name, value in result.roi.items()
        },
        "signals": result.feedback
        and {name: _finite(value) for name, value in result.feedback.signals.items()},
        "feedback": result.feedback and _finite(result.feedback.shown),
        "motion": result.motion
        and {
            "translation_mm": [round(mm, 5) for mm in result.motion.translation_mm],
            "rotation_deg": [round(deg, 5) for deg in result.motion.rotation_deg],
            "fd_mm": round(result.motion.fd_mm, 5),
            "converged": result.motion.converged,
        },
        "quality": {
            "usable": result.quality.usable,
            "problems": result.quality.problems,
            "dvars_percent": _finite(result.quality.dvars),
            "dvars_std": _finite(result.quality.dvars_std),
            "global_signal": _finite(result.quality.global_signal),
            "usable_min": round(result.quality.usable_min, 3),
            "forecast_min": _finite(result.quality.forecast_min),
        },
        "missing": result.missing,
        "latency_ms": None if result.missing else round(result.latency_ms, 3),
        "recorded": session.n_recorded,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)


def _watch(session: "Session") -> None:
    """Show the run as it goes."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    with Progress(
        SpinnerColumn(),
        TextColumn("volume"),
        MofNCompleteColumn(),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        console=err_console,
        transient=True,
    ) as progress:
        task = progress.add_task("run", total=session.n_volumes, state="waiting for a volume")
        evidence, looked_s = "", 0.0
        for result in session:
            if result.design is not None and time.monotonic() - looked_s > _GLANCE_S:
                evidence, looked_s = _evidence(session), time.monotonic()
            state = "  ".join([*_state(result), evidence])
            progress.update(task, completed=session.counters.processed, state=state)


def _evidence(session: "Session") -> str:
    """Return how much the map says, which holds however often one looks."""
    found = session.evident_voxels()
    return "  ".join(f"{name}: {n} voxels evident" for name, n in found.items())


def _state(result: "Result") -> Iterator[str]:
    """Yield what an operator wants to see of a volume at a glance."""
    quality = result.quality
    yield ", ".join(quality.problems) or "+".join(result.conditions) or "transition"
    if result.motion:
        yield f"FD {result.motion.fd_mm:.2f} mm"
    minutes = f"{quality.usable_min:.1f} min usable"
    if quality.forecast_min:
        minutes += f", {quality.forecast_min:.1f} to go"
    yield minutes
    for name, value in result.roi.items():
        if math.isnan(value.signal):
            yield f"{name} no value"
            continue
        t = next(iter(value.t.values()), None)
        yield f"{name} {value.psc:+.2f} %" + ("" if t is None else f" (t {t:+.1f})")
    if result.feedback and math.isfinite(result.feedback.shown):
        yield f"shown {result.feedback.shown:.2f}"
    if not result.missing:
        yield f"{result.latency_ms:.1f} ms"


def _show_summary(summary: dict[str, Any]) -> None:
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_row("volumes", str(summary["volumes"]))
    for name, n in summary["conditions"].items():
        table.add_row(f"  {escape(name)}", str(n))
    quality = summary["quality"]
    usable = f"{quality['usable']}, {quality['usable_min']:.1f} min"
    if quality["forecast_min"]:
        usable += f"; {quality['forecast_min']:.1f} min more to the target"
    table.add_row("usable", usable)
    for problem, n in quality["problems"].items():
        table.add_row(f"  {problem}", str(n))
    if quality["start_up"]:
        table.add_row("  start-up", str(quality["start_up"]))
    if fd := quality["fd_mm"]:
        table.add_row("FD mean / max", f"{fd['mean']:.2f} / {fd['max']:.2f} mm")
    if quality["tsnr_median"]:
        table.add_row("tSNR, median", f"{quality['tsnr_median']:.0f}")
    table.add_row("missing", str(summary["missing"]))
    if summary["before_start"]:
        table.add_row("before the start", str(summary["before_start"]))
    if summary["reordered"]:
        table.add_row("came after a later one", str(summary["reordered"]))
    for reason, n in summary["skipped"].items():
        table.add_row("skipped", f"{n}: {reason}")
    latency = summary["latency_ms"]
    table.add_row("latency p50 / p99", f"{latency['p50']:.2f} / {latency['p99']:.2f} ms")
    table.add_row("late results", str(summary["missed_deadlines"]))
    for uri, counts in summary["outputs"].items():
        told = ", ".join(f"{n} {what}" for what, n in counts.items() if n or what == "sent")
        table.add_row(escape(uri), told)
    for name, n in summary["failed_signals"].items():
        table.add_row(f"signal {escape(name)}", f"failed at {n} volumes")
    if summary["stimulus"]:
        told = ", ".join(f"{n} {what}" for what, n in summary["stimulus"].items() if n)
        table.add_row("stimulus program", told or "said nothing")
    clock = summary["clock"]
    if clock["start"] != "first volume":
        table.add_row("clock", f"{clock['start']}; volume 0 at {clock['offset_s']:g} s")
    table.add_row("end", summary["end"] or "stopped by the operator")
    table.add_row("device", summary["device"])
    out_console.print(table)
    if summary["glm"]:
        out_console.print(_glm_table(summary["glm"]))
    if not summary["contrasts"]:
        return
    table = Table(title="Against the baseline (Welch's t)", title_justify="left")
    for column in ("condition", "where", "t", "at x, y, z (mm)"):
        table.add_column(column)
    for condition, values in summary["contrasts"].items():
        for name, t in values["roi_t"].items():
            value = "-" if t is None else f"{t:+.1f}"
            table.add_row(escape(condition), escape(name), value, "")
        place = ", ".join(f"{mm:.0f}" for mm in values["peak_mm"])
        table.add_row(escape(condition), "peak", f"{values['peak_t']:+.1f}", place)
    out_console.print(table)


def _glm_table(glm: dict[str, Any]) -> Table:
    table = Table(title="General linear model", title_justify="left")
    for column in ("contrast", "where", "t or F", "effect", "e-value", "at x, y, z (mm)"):
        table.add_column(column)
    for contrast, values in glm.items():
        for name, roi in values["roi"].items():
            effect, evidence = "", ""
            if roi["effect"] is not None:
                effect = f"{roi['effect']:+.2f} ± {roi['standard_error']:.2f}"
                evidence = f"10^{roi['log_e'] / math.log(10):.1f}"
            statistic = _statistic(roi["kind"], roi["statistic"])
            table.add_row(escape(contrast), escape(name), statistic, effect, evidence, "")
        place = ", ".join(f"{mm:.0f}" for mm in values["peak_mm"])
        evident = values["evident_voxels"]
        found = "" if evident is None else f"{evident} voxels evident"
        peak = _statistic(values["kind"], values["peak"])
        table.add_row(escape(contrast), "peak", peak, "", found, place)
    return table


def _statistic(kind: str, value: float) -> str:
    return f"t {value:+.1f}" if kind == "t" else f"F {value:.1f}"


@app.command()
def simulate(
    source: Source,
    to: Annotated[
        str,
        typer.Option(
            help="Who is sent the volumes: folder:DIR (with ?format=dicom, slices or nifti, and "
            "&write=atomic or chunked), dicom://HOST:PORT (?ae=TITLE&caller=TITLE), or afni, mrd, "
            "murfi, pyneal, tcp or zmq://HOST:PORT."
        ),
    ],
    tr: TrOption = None,
    speed: Annotated[float, typer.Option(help="Multiple of the TR's pace.")] = 1.0,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND@INDEX",
            help="What goes wrong with a volume (INDEX from 0, or FIRST-LAST); may be repeated. "
            "late (:SECONDS; one TR by default), doubled, swapped (with the next), missing, "
            "truncated, wrong-series and wrong-shape (such a one comes before it), dies (before "
            "it; comes back after :SECONDS).",
        ),
    ] = None,
) -> None:
    """Play SOURCE as a scanner would: each volume is sent when its TR has passed."""
    from rich.progress import Progress

    from rtfmri.readers import open_reader
    from rtfmri.simulator import parse_faults, play

    faults = parse_faults(fault or [])
    sent: list[int] = []
    played: list[Fault] = []
    with (
        closing(open_reader(source, tr_s=tr)) as reader,
        Progress(console=err_console, transient=True) as progress,
    ):
        task = progress.add_task("scanning", total=reader.n_volumes)

        def show(index: int) -> None:
            sent.append(index)
            progress.update(task, completed=index + 1)

        try:
            play(reader, to, speed=speed, faults=faults, on_volume=show, on_fault=played.append)
        except KeyboardInterrupt:
            err_console.print("stopped by the operator")
    text = f"{len(sent)} volume{'s' * (len(sent) != 1)} sent to {to}"
    if played:
        text += f"; faults: {', '.join(map(str, played))}"
    if left := [str(fault) for fault in faults if fault not in played]:
        text += f"; not played: {', '.join(left)}"
    out_console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def series(
    folder: Annotated[Path, typer.Argument(help="A folder of DICOM files or PAR/REC pairs.")],
    as_json: JsonOption = False,
) -> None:
    """List the series in FOLDER, to choose one: rtfmri run 'folder:FOLDER?series=7'."""
    from rtfmri.readers.folder import list_series

    with err_console.status("looking into the files"):
        found = list_series(folder)
    if as_json:
        print(json.dumps([one._asdict() for one in found]))
        return
    table = Table(title=f"Series in {escape(str(folder))}", title_justify="left")
    for column in ("series", "files", "volumes", "shape", "TR (s)", "echo times (ms)", "images"):
        table.add_column(column)
    for one in found:
        table.add_row(
            "-" if one.number is None else str(one.number),
            str(one.n_files),
            str(one.n_volumes),
            "x".join(map(str, one.shape)) if one.shape else "-",
            f"{one.tr_s:g}" if one.tr_s else "-",
            ", ".join(f"{time_ms:g}" for time_ms in one.echo_times_ms) or "-",
            "derived" if one.derived else "original",
        )
    out_console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for everything.")] = Path("rtfmri-demo"),
    device: DeviceOption = Device.auto,
    feedback: Annotated[
        bool,
        typer.Option(
            "--feedback",
            help="Simulate neurofeedback training instead: participants whose brains answer.",
        ),
    ] = False,
    participants: Annotated[int, typer.Option(min=1, help="Of each arm, with --feedback.")] = 8,
    blocks: Annotated[int, typer.Option(min=3, help="Of regulation, with --feedback.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Simulate a finger-tapping run, take it through the pipeline, and draw what was found."""
    from rtfmri.demo import run_demo

    if feedback:
        _show_training(out, participants, blocks, device, as_json)
        return
    with err_console.status("starting") as status:
        found = run_demo(out, device=device.value, say=status.update)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    score, latency = found.score, found.run["latency_ms"]
    table = Table(title="Found in the simulated run", title_justify="left", show_header=False)
    for name, t in score.peak_t.items():
        table.add_row(f"peak t, {name.replace('_', ' ')}", f"{t:.1f}")
    table.add_row(
        "t of the inactive region",
        f"{score.inactive_t:+.2f}  (null: within {score.inactive_limit_t:.1f})",
    )
    table.add_row("Dice against the truth", f"{score.dice:.3f}  (at least {score.least_dice:.3f})")
    table.add_row("area under the ROC curve", f"{score.roc_area:.4f}")
    for contrast, values in found.run["glm"].items():
        evident = f"{values['evident_voxels']} voxels, peak t {values['peak']:.1f}"
        table.add_row(f"evident in the GLM, {contrast}", evident)
    table.add_row("volumes", f"{found.run['volumes']}, {found.run['recorded']} recorded")
    table.add_row("latency p50 / p99", f"{latency['p50']:.2f} / {latency['p99']:.2f} ms")
    table.add_row("device", found.run["device"])
    out_console.print(table)
    for name in ("report/index.html", "run.h5", "bids", "truth"):
        out_console.print(f"  {out / name}", highlight=False)


def _show_training(
    out: Path, participants: int, blocks: int, device: Device, as_json: bool
) -> None:
    from rtfmri.closed_loop import compare_arms

    with err_console.status("preparing the kernels (the first time takes some seconds)") as status:
        arms = compare_arms(
            out,
            n_participants=participants,
            n_blocks=blocks,
            device=device.value,
            say=status.update,
        )
    if as_json:
        gains = {arm: [one.gain for one in group] for arm, group in arms.items()}
        print(json.dumps({"out": str(out), "gain": gains}))
        return
    table = Table(title="Activity, % of the strongest strategy's", title_justify="left")
    for column in ("feedback", "participants", "first third", "last third", "gain"):
        table.add_column(column, justify="left" if column == "feedback" else "right")
    third = blocks // 3
    for arm, group in arms.items():
        first, last = (
            100 * sum(sum(one.activity[part]) for one in group) / (third * len(group))
            for part in (slice(third), slice(-third, None))
        )
        name = "own" if arm == "contingent" else "another's (yoked sham)"
        cells = f"{first:.0f}", f"{last:.0f}", f"{last - first:+.0f}"
        table.add_row(name, str(len(group)), *cells)
    out_console.print(table)
    out_console.print(f"  {out / 'learning.png'}", highlight=False)


@app.command()
def report(
    recording: RecordingArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the page and its pictures.")] = None,
    anatomy: Annotated[
        Path | None, typer.Option(help="Draw the blobs on this image, in the same scanner mm.")
    ] = None,
) -> None:
    """Draw a recording: pictures as PNG and one self-contained HTML page."""
    from rtfmri.report import write_report

    with err_console.status("drawing"):
        folder = out or recording.with_name(f"{recording.stem}-report")
        page = write_report(recording, folder, anatomy=anatomy)
    out_console.print(f"report: {page}", highlight=False)


@app.command(name="cred-nf")
def cred_nf(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings (.h5) of a study.")],
    out: Annotated[Path, typer.Option(help="A folder for cred-nf.md and cred-nf.json.")],
    as_json: JsonOption = False,
) -> None:
    """Fill the CRED-nf checklist for neurofeedback studies, as far as recordings can."""
    from rtfmri.report.cred_nf import write_cred_nf

    items = write_cred_nf(recordings, out)
    if as_json:
        print(json.dumps({"out": str(out), "filled": [i.number for i in items if i.told]}))
        return
    table = Table(title="CRED-nf (Ros et al. 2020)", title_justify="left")
    for column in ("item", "topic", "from the recordings"):
        table.add_column(column)
    for item in items:
        text = escape("\n".join(item.told)) or "to be filled in by the experimenter"
        table.add_row(item.number, item.topic, text)
    out_console.print(table)
    out_console.print(f"  {out / 'cred-nf.md'}", highlight=False)


@app.command()
def export(
    recording: RecordingArgument,
    bids: Annotated[Path, typer.Option(help="The BIDS derivatives folder to write into.")],
    subject: Annotated[str, typer.Option(help="The BIDS subject label.")] = "01",
) -> None:
    """Export a recording's maps and time courses as a BIDS derivative."""
    from rtfmri.export import export_bids

    files = export_bids(recording, bids, subject=subject)
    out_console.print(f"{len(files)} files written to {bids}", highlight=False)


@app.command()
def blobs(
    recording: RecordingArgument,
    contrast: ContrastOption = None,
    threshold: ThresholdOption = Threshold.e_bh,
    level: LevelOption = 0.05,
    neighbours: Annotated[int, typer.Option(help="Of a voxel: 6, 18 or 26.")] = 26,
    min_voxels: Annotated[int, typer.Option(help="Leave out smaller blobs.")] = 1,
    mni: Annotated[
        Path | None, typer.Option(help="Text file of the 4 x 4 affine from scanner to MNI mm.")
    ] = None,
    atlas: Annotated[
        str | None,
        typer.Option(
            help="Names the peaks: a label image with its table (BIDS dseg), or AAL, AAL3 or "
            "HCPEx with pip install 'rtfmri[atlas]'. Needs --mni."
        ),
    ] = None,
    tsv: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the blobs of a contrast: size, peak, centre, and what the place is called.

    Of a run that is still going on, too: with e-bh (or anytime) one may look at every volume.
    """
    from rtfmri.atlas import open_atlas
    from rtfmri.blobs import StatMap, find_blobs, table, write_table
    from rtfmri.blobs import threshold as find
    from rtfmri.localiser import contrast_of
    from rtfmri.readers.nifti import read_affine
    from rtfmri.recording import open_recording

    to_mni = None if mni is None else read_affine(mni)
    names = None if atlas is None else open_atlas(atlas)
    with open_recording(recording) as run:
        name, maps = contrast_of(run, contrast)
        brain = run.quality_maps()["mask"] > 0
        stat = StatMap.of(maps)
        found = find(stat, brain, threshold.value, level)
        rows = find_blobs(stat, found.above, run.grid, neighbours, min_voxels, to_mni, names)
    if tsv:
        write_table(rows, tsv)
    if as_json:
        print(json.dumps({"contrast": name, "threshold": found.text, "blobs": table(rows)}))
        return
    _show_blobs(f"{name}: {found.text}", rows)


def _show_blobs(title: str, rows: "Sequence[Blob]") -> None:
    if not rows:
        out_console.print(f"{title}: no blobs", markup=False, highlight=False)
        return
    in_mni = any(blob.peak_mni_mm for blob in rows)
    shown = Table(title=escape(title), title_justify="left")
    names = ("", "peak", "at x, y, z (mm)", "voxels", "cm\N{SUPERSCRIPT THREE}")
    for column in (*names, "MNI (mm)" if in_mni else "centre (mm)"):
        shown.add_column(column, justify="right", no_wrap=True)
    if in_mni:
        shown.add_column("region", overflow="fold")
    for i, blob in enumerate(rows, 1):
        places = (blob.peak_mm, blob.peak_mni_mm if in_mni else blob.centre_mm)
        peak, other = (", ".join(f"{mm:.0f}" for mm in place or ()) for place in places)
        cells = [f"{blob.peak:+.1f}", peak, str(blob.n_voxels), f"{blob.volume_mm3 / 1000:.2f}"]
        shown.add_row(str(i), *cells, other, *([escape(blob.region or "")] if in_mni else []))
    out_console.print(shown)


@app.command()
def localize(
    recording: RecordingArgument,
    out: Annotated[Path, typer.Option(help="The region to write, as NIfTI.")],
    contrast: ContrastOption = None,
    inside: Annotated[
        Path | None, typer.Option(help="An anatomical mask in scanner mm; the brain by default.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(help="Take so many voxels of the largest t, instead of a cluster."),
    ] = None,
    threshold: ThresholdOption = Threshold.e_bh,
    level: LevelOption = 0.05,
) -> None:
    """Make a region out of a functional localiser's run, for the next run's --roi.

    The cluster around the largest t above the threshold, or the voxels of the largest t (--top).
    """
    from rtfmri.localiser import localize as make

    name, n_voxels = make(
        recording,
        out,
        contrast=contrast,
        inside=inside,
        top_voxels=top,
        method=threshold.value,
        level=level,
    )
    next_run = f"rtfmri run SOURCE --roi {out.name.split('.')[0]}={out}"
    text = f"{n_voxels} voxels of {name} in {out}; next: {next_run}"
    out_console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def train(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings (.h5) of a localiser.")],
    positive: Annotated[str, typer.Option(help="The condition for which the value is above 0.")],
    negative: Annotated[str, typer.Option(help="The one for which it is below 0.")],
    out: Annotated[Path, typer.Option(help="The decoder to write (.h5).")],
    of: Annotated[
        MapName, typer.Option(help="What it looks at: PSC or z against the baseline.")
    ] = MapName.psc,
    within: Annotated[
        str | None, typer.Option(help="A region of the recordings; the brain by default.")
    ] = None,
    model: Annotated[Model, typer.Option(help="scikit-learn's linear model.")] = Model.svm,
    as_json: JsonOption = False,
) -> None:
    """Train a decoder of two conditions on a localiser, for [feedback.signals] of the next run."""
    from rtfmri.feedback.train import train as make

    if out.exists():
        raise ConfigError(f"{out} exists already; name another file, or remove it")
    with err_console.status("replaying the recordings") as status:
        decoder = make(
            recordings,
            (negative, positive),
            of=of.value,
            within=within,
            model=model.value,
            say=status.update,
        )
    decoder.save(out)
    score = decoder.score
    if as_json:
        print(json.dumps({"out": str(out), "classes": decoder.classes, **asdict(score)}))
        return
    title = f"{escape(positive)} against {escape(negative)}"
    table = Table(title=title, title_justify="left", show_header=False)
    n_voxels = sum(1 for weight in decoder.weights.flat if weight)
    table.add_row("volumes, blocks, voxels", f"{score.n_volumes}, {score.n_blocks}, {n_voxels}")
    table.add_row("accuracy, held out", f"{score.accuracy:.0%} of volumes (chance: 50 %)")
    folds = " ".join(f"{fold:.0%}" for fold in score.folds)
    table.add_row(f"of each {score.left_out} left out", folds)
    right = f"{score.blocks_right} of {score.n_blocks}"
    right += "; for a p give several runs" if score.p is None else f", p = {score.p:.2g}"
    table.add_row("blocks told rightly", right)
    out_console.print(table)
    name, file = json.dumps(out.stem), json.dumps(str(out))
    text = f'[feedback.signals]\n{name} = {{kind = "decoder", file = {file}}}'
    out_console.print("next, in the settings of a run:", highlight=False)
    out_console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def unblind(
    recording: RecordingArgument,
    allocation: Annotated[Path, typer.Option(help="The TOML file that says what each arm is.")],
) -> None:
    """Tell of which kind a run's sham was, and make sure that the allocation is the run's."""
    from rtfmri.feedback.sham import unblind as tell
    from rtfmri.recording import open_recording

    with open_recording(recording) as file:
        sham = file.config.feedback.sham
        if sham is None:
            raise ConfigError(f"{recording} was recorded without a sham")
        kind = tell(file.sham_seal, sham.arm, allocation)
    out_console.print(f"arm {sham.arm}: {kind}", highlight=False, markup=False)


@app.command()
def recover(
    recording: RecordingArgument,
    out: Annotated[Path, typer.Argument(help="The mended recording to write.")],
) -> None:
    """Rescue every acknowledged volume of a recording that a crash left behind."""
    from rtfmri.recording import recover as mend

    with err_console.status("copying and replaying"):
        n_volumes = mend(recording, out)
    out_console.print(f"{n_volumes} volumes recovered into {out}", highlight=False)


bench_app = typer.Typer(
    help="Measure what this machine can do; compare and draw what was measured.",
    invoke_without_command=True,
)
app.add_typer(bench_app, name="bench")
ReportArgument = Annotated[Path, typer.Argument(help="What rtfmri bench --json wrote.")]


@bench_app.callback()
def bench(
    context: typer.Context,
    suite: Annotated[
        list[str] | None, typer.Option(help="Run only this suite; may be repeated.")
    ] = None,
    grid: Annotated[
        str, typer.Option(help="Grids, as 64x64x36,104x104x72.")
    ] = "64x64x36,104x104x72,192x192x84",
    device: DeviceOption = Device.auto,
    minutes: Annotated[
        float, typer.Option(help="How long a TR must be sustained, and the soak lasts.", min=0.01)
    ] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures and the machine here.")
    ] = None,
) -> None:
    """Measure what this machine can do, against its own memory bandwidth."""
    if context.invoked_subcommand:
        return
    benchmarks = load_benchmarks()
    grids = [_parse_grid(text) for text in grid.split(",")]
    suites = suite or list(benchmarks.SUITES)
    if json_file and not json_file.parent.is_dir():
        raise ConfigError(f"--json must be in a folder that is there, got {json_file}")
    report = _measure(
        benchmarks, json_file, device=device.value, grids=grids, suites=suites, minutes=minutes
    )
    for table in benchmarks.table(report):
        _print_wide(table)
    if json_file:
        out_console.print(f"figures in {json_file}", highlight=False)


def _measure(
    benchmarks: Any, json_file: Path | None, *, suites: list[str], **given: Any
) -> dict[str, Any]:
    """Run the suites, show how far they are, and write what there is after each."""
    from rich.progress import (
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    with Progress(
        SpinnerColumn(),
        TextColumn("suites"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=err_console,
        transient=True,
    ) as progress:
        task = progress.add_task("preparing the kernels", total=len(suites))

        def show(step: str) -> None:
            progress.update(task, description=step)

        def finished(report: dict[str, Any]) -> None:
            progress.advance(task)
            if json_file:
                _benchmark_module("compare").write_report(report, json_file)

        report: dict[str, Any] = benchmarks.run(
            suites=suites, progress=show, finished=finished, **given
        )
    return report


def _print_wide(table: Table) -> None:
    """Print a table as wide as it is: cells of one letter tell less than lines that wrap."""
    wide = Measurement.get(out_console, out_console.options.update(max_width=1000), table)
    Console(width=max(wide.maximum, out_console.width)).print(table)


def _benchmark_module(name: str) -> Any:
    return importlib.import_module(f"{load_benchmarks().__name__}.{name}")


@bench_app.command()
def compare(old: ReportArgument, new: ReportArgument, as_json: JsonOption = False) -> None:
    """Show what became slower from OLD to NEW beyond both runs' noise; then exit with 1."""
    module = _benchmark_module("compare")
    found = module.compare(module.read_report(old), module.read_report(new))
    if as_json:
        print(json.dumps(module.as_json(found), indent=1))
    else:
        if found.changes:
            out_console.print(module.table(found))
        out_console.print(module.conclusion(found), highlight=False)
    raise typer.Exit(int(found.slower))


@bench_app.command()
def figures(
    report: ReportArgument,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
) -> None:
    """Draw a report: roofline, stages against their peers, latency, scaling, as PNG."""
    read = _benchmark_module("compare").read_report(report)
    for line in _benchmark_module("figures").draw(read, out):
        out_console.print(line, highlight=False, markup=False)


def _parse_grid(text: str) -> tuple[int, int, int]:
    try:
        x, y, z = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise ConfigError(f"--grid must be like 64x64x36, got {text!r}") from None
    if min(x, y, z) < 1:
        raise ConfigError(f"--grid must have positive sides, got {text!r}")
    return x, y, z


def load_benchmarks() -> Any:
    """Return the benchmark suites: inside an installed package, beside it in a checkout."""
    if "rtfmri_benchmarks" in sys.modules:
        return sys.modules["rtfmri_benchmarks"]
    package = Path(__file__).resolve().parent
    for folder in (package / "_benchmarks", package.parent / "benchmarks"):
        if (folder / "__init__.py").is_file():
            spec = importlib.util.spec_from_file_location(
                "rtfmri_benchmarks", folder / "__init__.py"
            )
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module
    raise ConfigError(f"the benchmarks are missing beside {package}; reinstall rtfmri")


@app.command()
def check(as_json: JsonOption = False) -> None:
    """Show what this machine has, what is missing, and the command that adds it."""
    from rtfmri.machine import inspect

    with err_console.status("looking"):
        findings = inspect()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    marks = {"ok": "[green]ok", "warning": "[yellow]look", "missing": "[yellow]missing"}
    table = Table(title="This machine", title_justify="left")
    for column in ("", "what", "found", "to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            marks[finding.status], finding.name, escape(finding.value), escape(finding.advice)
        )
    out_console.print(table)

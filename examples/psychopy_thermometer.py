"""A neurofeedback experiment in PsychoPy: cues, a thermometer, and a fixation cross.

The feedback comes from rtfmri by Lab Streaming Layer, on this machine or, if both are told so, on
another one. Start both, in any order::

    rtfmri run dicom://:11112 --events events.tsv --roi motor=motor.nii.gz --output lsl:
    python psychopy_thermometer.py events.tsv --cue up=IMAGINE --csv sub-01_feedback.csv

Then the experiment waits for the scanner's trigger (key 5, or t), which comes with the first
volume, and shows each block's cue when it begins. Escape ends it.

Cues are timed by the events and the trigger, not by the conditions that rtfmri sends: those tell
what a volume counts for, and so come later by the haemodynamic delay.

The trigger is passed on as a marker of the stream PsychoPy; with ``--announce`` the blocks are,
too, so that rtfmri needs no events (``rtfmri run ... --stimulus lsl:PsychoPy``).

It needs pylsl and psychopy; `FeedbackStream` needs only pylsl, and may be of use elsewhere.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pylsl

GLIDE_S = 0.15
"""Time constant with which the bar follows the feedback."""
HEIGHT, WIDTH = 0.72, 0.12
"""Of the thermometer, as parts of the screen's height."""
BLUE, GREY, DARK = "#56b4e9", "#6e6e6e", "#4d4d4d"


class Sample(NamedTuple):
    """What rtfmri says of one volume."""

    index: int
    time_s: float
    """Start of its acquisition, in seconds from the run's start."""
    condition: str
    """What it counts for; empty in transitions between blocks."""
    feedback: float | None
    """From 0 to 1, or None: no value."""
    sure: bool
    """Whether the volume is there, and good."""
    sent_s: float
    """When it was sent, on LSL's clock."""


class FeedbackStream:
    """The newest feedback, without ever waiting for it.

    It finds rtfmri as soon as it is there, and again if it was started anew.

    Attributes
    ----------
    newest : Sample or None
    """

    def __init__(self, name: str = "rtfmri-events") -> None:
        self.newest: Sample | None = None
        self._resolver = pylsl.ContinuousResolver("name", name)
        self._inlet: pylsl.StreamInlet | None = None

    @property
    def connected(self) -> bool:
        """Whether rtfmri has been found."""
        return self._inlet is not None

    def poll(self) -> list[Sample]:
        """Return what has come since the last call; call it once a frame."""
        if self._inlet is None:
            found = self._resolver.results()
            if not found:
                return []
            self._inlet = pylsl.StreamInlet(found[0])
        texts, stamps = self._inlet.pull_chunk(timeout=0.0)
        samples = [_sample(text[0], at_s) for text, at_s in zip(texts, stamps, strict=True)]
        if samples:
            self.newest = samples[-1]
        return samples


def _sample(text: str, sent_s: float) -> Sample:
    said = json.loads(text)
    sure = said["quality"]["usable"] and not said["missing"]
    return Sample(said["index"], said["time_s"], said["condition"], said["feedback"], sure, sent_s)


class Block(NamedTuple):
    """A block of the task."""

    onset_s: float
    duration_s: float
    trial_type: str


def read_events(path: Path) -> list[Block]:
    """Read a BIDS events file, in the order of its onsets."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    blocks = [Block(float(r["onset"]), float(r["duration"]), r["trial_type"]) for r in rows]
    return sorted(blocks)


def block_at(blocks: Sequence[Block], now_s: float) -> Block | None:
    """Return the block that is on; of several, the one that began last."""
    on = [block for block in blocks if 0 <= now_s - block.onset_s < block.duration_s]
    return on[-1] if on else None


class Log:
    """One line a volume: what came when, and what was on the screen."""

    COLUMNS = "seconds", "lsl_s", "sent_s", "index", "time_s", "condition", "feedback", "cue"

    def __init__(self, path: Path) -> None:
        self._file = path.open("x", newline="", encoding="utf-8", buffering=1)
        self._csv = csv.writer(self._file)
        self._csv.writerow(self.COLUMNS)

    def write(self, seconds: float, sample: Sample, cue: str) -> None:
        """Write a line; *seconds* are from the trigger."""
        feedback = "n/a" if sample.feedback is None else sample.feedback
        times = f"{seconds:.4f}", f"{pylsl.local_clock():.4f}", f"{sample.sent_s:.4f}"
        self._csv.writerow([*times, sample.index, sample.time_s, sample.condition, feedback, cue])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Markers:
    """Tells rtfmri of the trigger, and of blocks."""

    def __init__(self) -> None:
        info = pylsl.StreamInfo(
            "PsychoPy", "Markers", 1, pylsl.IRREGULAR_RATE, "string", "psychopy"
        )
        self._outlet = pylsl.StreamOutlet(info)

    def trigger(self) -> None:
        """Say that the scanner's trigger came."""
        self._outlet.push_sample(["trigger"])

    def block(self, block: Block) -> None:
        """Say that a block begins."""
        said = {"trial_type": block.trial_type, "duration": block.duration_s}
        self._outlet.push_sample([json.dumps(said)])


class Display:
    """The screen."""

    def __init__(self, options: argparse.Namespace) -> None:
        from psychopy import visual

        self.window = visual.Window(
            size=(1024, 768),
            fullscr=options.fullscreen,
            screen=options.screen,
            color="black",
            units="height",
            allowGUI=False,
        )
        self.window.mouseVisible = False
        self._cross = visual.ShapeStim(
            self.window, vertices="cross", size=0.04, fillColor="white", lineColor="black"
        )
        self._tube = visual.Rect(
            self.window, WIDTH + 0.016, HEIGHT + 0.016, lineColor=DARK, lineWidth=3, fillColor=None
        )
        self._bar = visual.Rect(self.window, WIDTH, 0.0, lineColor=None, fillColor=BLUE)
        self._cue = visual.TextStim(self.window, "", pos=(0, 0.43), height=0.05, color="white")
        self._level, self._seen = 0.0, False

    def draw(self, sample: Sample | None, cue: str, frame_s: float) -> None:
        """Show the next frame: the cross, and the bar if there is a value for it.

        A volume that is missing, or no good, leaves the bar where it is, in grey.
        """
        doubt = sample is not None and sample.feedback is None and not sample.sure
        if sample is not None and sample.feedback is not None:
            step = 1 - math.exp(-frame_s / GLIDE_S) if self._seen else 1.0
            self._level += step * (min(1.0, max(0.0, sample.feedback)) - self._level)
            self._seen = True
        elif not doubt:
            self._seen = False
        if self._seen:
            self._bar.fillColor = GREY if doubt else BLUE
            self._bar.height = HEIGHT * self._level
            self._bar.pos = (0, HEIGHT * (self._level - 1) / 2)
            self._bar.draw()
            self._tube.draw()
        if cue:
            self._cue.text = cue
            self._cue.draw()
        self._cross.draw()
        self.window.flip()


def run(options: argparse.Namespace) -> None:
    """Run the experiment."""
    from psychopy import core, event

    blocks = read_events(options.events)
    cues = {block.trial_type: "" for block in blocks} | dict(options.cue)
    end_s = options.seconds or max(block.onset_s + block.duration_s for block in blocks)
    stream, markers, log = FeedbackStream(), Markers(), Log(options.csv)
    display = Display(options)
    try:
        while options.trigger and not (pressed := event.getKeys([*options.trigger, "escape"])):
            stream.poll()
            display.draw(None, "", 0.0)
        if options.trigger and "escape" in pressed:
            return
        clock, before_s, last = core.Clock(), 0.0, None
        markers.trigger()
        while (now_s := clock.getTime()) < end_s and not event.getKeys(["escape"]):
            block = block_at(blocks, now_s)
            if options.announce and block and block is not last:
                markers.block(block)
            last, cue = block, cues[block.trial_type] if block else ""
            for sample in stream.poll():
                log.write(now_s, sample, cue)
            display.draw(stream.newest, cue, now_s - before_s)
            before_s = now_s
    finally:
        display.window.close()
        log.close()


def _cue(text: str) -> tuple[str, str]:
    trial_type, _, shown = text.partition("=")
    return trial_type, shown


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Neurofeedback with a thermometer.")
    parser.add_argument("events", type=Path, help="BIDS events.tsv, with the blocks")
    parser.add_argument("--csv", type=Path, required=True, help="log to write; must not exist")
    parser.add_argument(
        "--cue", type=_cue, action="append", default=[], help="what a block shows: up=IMAGINE"
    )
    parser.add_argument(
        "--trigger", nargs="*", default=["5", "t"], help="keys of the trigger; none: start at once"
    )
    parser.add_argument("--announce", action="store_true", help="tell rtfmri of each block")
    parser.add_argument("--seconds", type=float, help="length; by default to the last block's end")
    parser.add_argument("--fullscreen", action="store_true")
    parser.add_argument("--screen", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))

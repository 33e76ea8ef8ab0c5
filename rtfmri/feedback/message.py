"""What leaves the machine for each volume: one message, the same for every output."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from rtfmri.pipeline import Result


class Run(NamedTuple):
    """What an output is told when a run begins."""

    tr_s: float
    n_volumes: int | None
    """None where it is not known."""
    conditions: tuple[str, ...]
    """The baseline first."""
    rois: tuple[str, ...]
    signals: tuple[str, ...]
    """Names of what `Message.signals` holds, in its order."""


@dataclass(frozen=True)
class Message:
    """One volume's feedback.

    Attributes
    ----------
    index : int
        The volume's number, from 0.
    time_s : float
        Start of its acquisition, in seconds after the start of volume 0.
    condition : str
        What it counts for, joined by "+"; empty in a transition, and if it was not usable.
    feedback : float
        What the participant is to see, from 0 to 1; nan is no value.
    signals : mapping of str to float
        Every signal in its own units; nan is no value.
    roi : mapping of str to float
        Each region's PSC; nan is no value.
    quality : mapping
        ``usable``, ``problems``, ``fd_mm`` (None without motion correction).
    missing : bool
        Whether the volume never came.
    latency_ms : float
        From its last byte's arrival to its result; nan if it is missing.
    motion : tuple of six float, or None
        Where the head is: translation along x, y, z in mm, rotation about x, y, z in degrees
        (`MotionValue.parameters`); None without motion correction, and if it is missing.
    unix_s : float
        Wall-clock time of this message, in seconds since 1970.
    """

    index: int
    time_s: float
    condition: str
    feedback: float
    signals: Mapping[str, float]
    roi: Mapping[str, float]
    quality: Mapping[str, Any]
    missing: bool
    latency_ms: float
    motion: tuple[float, ...] | None = None
    unix_s: float = field(default_factory=time.time)

    @classmethod
    def of(cls, result: Result) -> "Message":
        """Return the message of a volume's result."""
        feedback = result.feedback
        return cls(
            index=result.index,
            time_s=result.time_s,
            condition="+".join(result.conditions),
            feedback=feedback.shown if feedback else math.nan,
            signals=feedback.signals if feedback else {},
            roi={name: value.psc for name, value in result.roi.items()},
            quality={
                "usable": result.quality.usable,
                "problems": list(result.quality.problems),
                "fd_mm": result.motion.fd_mm if result.motion else None,
            },
            missing=result.missing,
            latency_ms=result.latency_ms,
            motion=result.motion.parameters if result.motion else None,
        )

    @cached_property
    def json(self) -> bytes:
        """The message as one line of JSON, without its end; null is no value."""
        return json.dumps(
            {
                "index": self.index,
                "time_s": round(self.time_s, 6),
                "condition": self.condition,
                "feedback": _or_none(self.feedback),
                "signals": {name: _or_none(value) for name, value in self.signals.items()},
                "roi": {name: _or_none(value) for name, value in self.roi.items()},
                "quality": {**self.quality, "fd_mm": _or_none(self.quality["fd_mm"])},
                "missing": self.missing,
                "latency_ms": _or_none(self.latency_ms),
                "motion": self.motion and [_or_none(value) for value in self.motion],
                "unix_s": self.unix_s,
            },
            allow_nan=False,
            separators=(",", ":"),
        ).encode()


def _or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value

"""Real-time fMRI on the GPU: each volume through baseline and subtraction within its TR."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtfmri.config import (
        BaselineSettings,
        Config,
        DetrendSettings,
        FeedbackSettings,
        GlmSettings,
        ParadigmSettings,
        SmoothingSettings,
    )
    from rtfmri.design import Design, read_confounds
    from rtfmri.feedback.outputs import Outputs
    from rtfmri.paradigm import Event, Paradigm, read_events
    from rtfmri.pipeline import ConditionMaps, Pipeline, Result
    from rtfmri.readers import open_reader
    from rtfmri.recording import open_recording
    from rtfmri.session import Session
    from rtfmri.stages.glm import ContrastMaps
    from rtfmri.volume import Grid, Volume

__version__ = "0.1.0"

_HOMES = {
    "BaselineSettings": "config",
    "ConditionMaps": "pipeline",
    "Config": "config",
    "ContrastMaps": "stages.glm",
    "Design": "design",
    "DetrendSettings": "config",
    "Event": "paradigm",
    "FeedbackSettings": "config",
    "GlmSettings": "config",
    "Grid": "volume",
    "Outputs": "feedback.outputs",
    "Paradigm": "paradigm",
    "ParadigmSettings": "config",
    "Pipeline": "pipeline",
    "Result": "pipeline",
    "Session": "session",
    "SmoothingSettings": "config",
    "Volume": "volume",
    "open_reader": "readers",
    "open_recording": "recording",
    "read_confounds": "design",
    "read_events": "paradigm",
}

__all__ = [
    "BaselineSettings",
    "ConditionMaps",
    "Config",
    "ContrastMaps",
    "Design",
    "DetrendSettings",
    "Event",
    "FeedbackSettings",
    "GlmSettings",
    "Grid",
    "Outputs",
    "Paradigm",
    "ParadigmSettings",
    "Pipeline",
    "Result",
    "Session",
    "SmoothingSettings",
    "Volume",
    "open_reader",
    "open_recording",
    "read_confounds",
    "read_events",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used: numba alone takes longer than a shell start."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rtfmri' has no attribute {name!r}")
    return getattr(import_module(f"rtfmri.{_HOMES[name]}"), name)

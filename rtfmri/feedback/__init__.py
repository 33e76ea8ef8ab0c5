"""The loop closed: from a volume's result to what the participant sees.

`signals` make numbers of a `Result`, `presentation` makes one of them fit for the display (with
`sham` for control groups), `outputs` carry it away as a `Message`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from rtfmri.config import Config, DecoderSettings
from rtfmri.errors import ConfigError
from rtfmri.feedback.decoder import Decoder, check, load_decoder
from rtfmri.feedback.presentation import Presentation
from rtfmri.feedback.sham import Sham, open_sham
from rtfmri.feedback.signals import Custom, Signal, check_signals, load_functions, make_signals
from rtfmri.pipeline import Feedback, Result
from rtfmri.stages.readout import Readout
from rtfmri.volume import Grid

_log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """What is loaded before a run, so that nothing can be missing in it."""

    decoders: Mapping[str, Decoder]
    functions: Mapping[str, Callable[[Result], Any]]
    sham: Sham | None


def prepare(config: Config, rois: Sequence[str], conditions: Sequence[str]) -> Prepared:
    """Check the feedback's settings, and load what they name.

    Parameters
    ----------
    config : Config
    rois, conditions : sequence of str
        Names of the run's.

    Raises
    ------
    ConfigError
        If they ask for what is not there, or cannot be loaded.
    """
    settings = config.feedback
    check_signals(settings, rois)
    unknown = [name for name in settings.during if name not in conditions]
    if unknown:
        raise ConfigError(
            f"feedback.during must be conditions of the task, {', '.join(conditions)}; "
            f"got {', '.join(unknown)}"
        )
    decoders = {
        name: load_decoder(asked.file)
        for name, asked in settings.signals.items()
        if isinstance(asked, DecoderSettings)
    }
    sham = None if settings.sham is None else open_sham(settings.sham)
    return Prepared(decoders, load_functions(settings), sham)


class Neurofeedback:
    """A run's signals and their presentation.

    Parameters
    ----------
    config : Config
    prepared : Prepared
        What `prepare` returned for it.
    grid : Grid
    rois : mapping of str to (x, y, z) array
        On that grid.
    conditions : tuple of str

    Raises
    ------
    ConfigError
        If a decoder is of another grid, or a region has too many voxels for what is asked.

    Attributes
    ----------
    names : tuple of str
        Of the signals.
    sham_seal : str
        Of the sham's arm; empty without one.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        grid: Grid,
        rois: Mapping[str, NDArray[Any]],
        conditions: tuple[str, ...],
    ) -> None:
        for name, decoder in prepared.decoders.items():
            if different := check(decoder, grid, config):
                _log.warning(
                    "signal %r: its decoder was trained with other settings of %s",
                    name,
                    ", ".join(different),
                )
        self._settings, self._prepared = config.feedback, prepared
        self._rois, self._conditions = rois, conditions
        self._hold = config.order.feedback == "hold"
        self._begun = False
        self._begin()
        self.names = tuple(self._signals)
        self.sham_seal = prepared.sham.seal if prepared.sham else ""
        self._shown = self._settings.show or next(iter(self.names), "")
        self._nothing = dict.fromkeys(self.names, math.nan)
        self._last = Feedback(self._nothing, math.nan)

    @property
    def readouts(self) -> dict[str, Readout]:
        """What the signals ask of single voxels, by signal, for the `Pipeline`."""
        signals = self._signals.items()
        return {name: signal.readout for name, signal in signals if signal.readout}

    @property
    def n_failed(self) -> dict[str, int]:
        """At how many volumes each custom signal failed."""
        signals = self._signals.items()
        return {name: signal.n_failed for name, signal in signals if isinstance(signal, Custom)}

    def push(self, result: Result) -> Feedback:
        """Return a volume's feedback; results come in their order, missing ones, too."""
        if result.begins and self._begun:
            self._begin()  # those before count for nothing
        self._begun |= not result.missing
        if result.missing:
            shown = self._presentation.push(math.nan, result)
            return self._last if self._hold else Feedback(self._nothing, shown)
        values = {name: signal.push(result) for name, signal in self._signals.items()}
        shown = self._presentation.push(values.get(self._shown, math.nan), result)
        self._last = Feedback(values, shown)
        return self._last

    def _begin(self) -> None:
        prepared = self._prepared
        self._signals: dict[str, Signal] = make_signals(
            self._settings, self._rois, prepared.decoders, prepared.functions
        )
        self._presentation = Presentation(self._settings, self._conditions, prepared.sham)

"""A run in step with its stimulus program: whose clock it is on, and blocks as they are told."""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rtfmri.clock import RunClock, start_clock
from rtfmri.config import Config
from rtfmri.errors import ConfigError, EventsError
from rtfmri.paradigm import MAX_ANNOUNCED, Announced, Event, Paradigm
from rtfmri.stimulus import Said, Stimulus, Trigger
from rtfmri.volume import Volume

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Heard:
    """What the stimulus program said during a run.

    ``ignored`` blocks are none of the run's events; ``late`` ones are, although volumes that they
    should have covered had been processed before.
    """

    triggers: int = 0
    blocks: int = 0
    late: int = 0
    ignored: int = 0


class Synchronisation:
    """Keeps one run's clock, and makes events of what the stimulus program says.

    Parameters
    ----------
    config : Config
    stimulus : Stimulus or None
    live : bool
        Whether a scanner sets the pace.
    paced : bool
        Whether volumes come at the pace of their TR, from a scanner or not.
    has_events : bool
        Whether the task is known before the run.

    Raises
    ------
    ConfigError
        If what the settings ask for cannot be heard, or is known already.

    Attributes
    ----------
    clock : RunClock
    heard : Heard
    """

    def __init__(
        self,
        config: Config,
        stimulus: Stimulus | None,
        *,
        live: bool,
        paced: bool,
        has_events: bool,
    ) -> None:
        task, start = config.paradigm, config.clock.start
        if task.conditions and has_events:
            raise ConfigError(
                "paradigm.conditions are announced while the run goes on, and events are known "
                "before it; give one of the two, got both"
            )
        if stimulus and not paced:
            raise ConfigError(
                "a stimulus program needs volumes at the pace of their TR: those of a live "
                "source, or of a recorded one with --speed 1"
            )
        if live and not stimulus and (task.conditions or start == "trigger"):
            name = "paradigm.conditions" if task.conditions else "clock.start 'trigger'"
            raise ConfigError(
                f"{name} needs a stimulus program that says it; give --stimulus, such as "
                "tcp://127.0.0.1:5560"
            )
        if task.conditions:
            _warn_of_announcing(config)
        self._start = start if live or stimulus else "first volume"
        if self._start != start:
            _log.warning("clock.start: what is played back starts with its first volume")
        self._task, self._stimulus = task, stimulus
        self._n_malformed = stimulus.counts.malformed if stimulus else 0
        self._waiting: list[Said] = []
        self._moment_s = math.nan
        self.clock = RunClock()
        self.heard = Heard()

    def begin(self, first: Volume, paradigm: Paradigm) -> Paradigm:
        """Start the clock; return the paradigm in seconds after the start of volume 0.

        Parameters
        ----------
        first : Volume
            The first of the run that arrived.
        paradigm : Paradigm
            Its events count from the start of the clock.
        """
        self._listen()
        triggers_s = [said.came_s for said in self._waiting if isinstance(said, Trigger)]
        lsl_minus_perf_s = self._stimulus.lsl_minus_perf_s if self._stimulus else math.nan
        self.clock = start_clock(self._start, first, triggers_s, lsl_minus_perf_s)
        return paradigm.moved(-self.clock.offset_s) if self.clock.offset_s else paradigm

    def take(self, volume: Volume, paradigm: Paradigm) -> Iterator[Announced | float]:
        """Take in what was said before *volume* is processed.

        Yields
        ------
        Announced or float
            A block, which *paradigm* knows from this volume on, or the moment of a trigger on the
            run's clock, in seconds; of the first `MAX_ANNOUNCED` triggers.
        """
        self._listen()
        clock, task, before_s = self.clock, self._task, self._moment_s
        self._moment_s = volume.time_s + volume.tr_s / 2 - task.haemodynamic_delay_s
        for said in self._waiting:
            at_s = said.came_s - clock.zero_s
            if isinstance(said, Trigger):
                self.heard.triggers += 1
                if self.heard.triggers <= MAX_ANNOUNCED:
                    yield at_s + clock.offset_s
                continue
            onset_s = at_s if said.onset_s is None else said.onset_s - clock.offset_s
            event = Event(onset_s, said.duration_s, said.trial_type)
            announced = Announced(event, volume.time_s)
            problem = ""
            if onset_s + said.duration_s <= -task.haemodynamic_delay_s:
                problem = "it was over before the run began"
            else:
                try:
                    paradigm.add(announced)
                except EventsError as error:
                    problem = str(error)
            if problem:
                _say(self.heard.ignored, "ignored a block of the stimulus program: %s", problem)
                self.heard.ignored += 1
                continue
            self.heard.blocks += 1
            if onset_s - task.transition_s <= before_s:
                _say(self.heard.late, "a block from %.1f s on was announced too late", onset_s)
                self.heard.late += 1
            yield announced
        self._waiting.clear()

    def summary(self) -> dict[str, int] | None:
        """Return what was heard, ready for JSON; None without a stimulus program."""
        if not self._stimulus:
            return None
        malformed = self._stimulus.counts.malformed - self._n_malformed
        return {**asdict(self.heard), "malformed": malformed}

    def _listen(self) -> None:
        if self._stimulus:
            self._waiting += self._stimulus.said()


def _warn_of_announcing(config: Config) -> None:
    """Say what does not go together with blocks that nobody knows before they begin."""
    task, method = config.paradigm, config.detrend.method
    if task.haemodynamic_delay_s < task.transition_s:
        _log.warning(
            "paradigm.haemodynamic_delay_s (%g s) is below transition_s (%g s): when a block is "
            "announced, volumes that its transition should leave out have been processed",
            task.haemodynamic_delay_s,
            task.transition_s,
        )
    if method in ("linear", "cosine"):
        _log.warning(
            "detrend.method %r knows nothing of blocks that are announced, and takes part of them "
            "for drift; exponential does not",
            method,
        )


def _say(n_before: int, text: str, *values: object) -> None:
    """Warn once; then only whoever wants to know everything is told."""
    _log.log(logging.DEBUG if n_before else logging.WARNING, text, *values)

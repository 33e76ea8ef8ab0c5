"""The loop closed in simulation: participants whose brains answer the feedback that they get.

A participant tries strategies, of which some raise the activity of a region more than others, and
keeps to those that seem to work (a bandit with a softmax rule: Sutton & Barto 2018, chapter 2).
What the strategy does is in the volumes that the simulated scanner makes; these go through a
`Session` like any other, and the feedback comes back through a real output, over TCP. Participants
who see their own feedback learn; those who are shown another's (yoked sham) do not.
"""

import json
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfmri.config import (
    Config,
    Device,
    FeedbackSettings,
    GlmSettings,
    MaskSettings,
    MotionSettings,
    ScaleSettings,
    ShamSettings,
)
from rtfmri.demo import new_folder
from rtfmri.errors import ConfigError, SourceError
from rtfmri.feedback.outputs import Outputs
from rtfmri.paradigm import Event
from rtfmri.recording import open_recording
from rtfmri.session import Session
from rtfmri.simulator import Scanner
from rtfmri.simulator.hemodynamics import bold_response
from rtfmri.volume import Volume

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arm = Literal["contingent", "yoked"]

TR_S, BLOCK_S, CONDITION = 2.0, 20.0, "regulate"
SHAPE = (24, 24, 14)
REGION = "left_hand"
EFFICACIES = (0.0, 0.1, 0.2, 0.35, 0.5, 1.0)
"""Activity that each strategy brings, as a part of the strongest; their order is shuffled."""
LEARNING_RATE, TEMPERATURE = 0.25, 0.12
FIRST_GUESS = 0.5
"""What a strategy is expected to be worth before it was tried."""
PSC_AT_TOP = 2.0
"""Percent signal change at which the display is full."""
_PATIENCE_S = 60.0
_STEP_S = 0.1


class Learner:
    """Chooses a strategy for each block, and learns what it is worth from what is shown.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._efficacies = self._random.permutation(EFFICACIES)
        self._worth = np.full(len(EFFICACIES), FIRST_GUESS)
        self._chosen = -1
        self._seen: list[float] = []

    def choose(self) -> float:
        """Return the activity, 0 to 1, of the next block's strategy."""
        if self._chosen >= 0 and self._seen:
            error = float(np.mean(self._seen)) - self._worth[self._chosen]
            self._worth[self._chosen] += LEARNING_RATE * error
        self._seen = []
        likely = np.exp((self._worth - self._worth.max()) / TEMPERATURE)
        self._chosen = int(self._random.choice(len(likely), p=likely / likely.sum()))
        return float(self._efficacies[self._chosen])

    def see(self, shown: float | None) -> None:
        """Look at the display; None is an empty one."""
        if shown is not None:
            self._seen.append(shown)


class Participant:
    """A scanner with a learner in it, as a `Reader`: each volume waits for the feedback before it.

    Parameters
    ----------
    address : str
        "HOST:PORT" of the session's TCP output.
    n_blocks : int
        Of regulation, each after as long a rest.
    seed : int

    Attributes
    ----------
    activity : list of float
        Of each block so far: what its strategy truly brings.
    """

    live = False

    def __init__(self, address: str, n_blocks: int, seed: int) -> None:
        self.n_volumes: int | None = round((2 * n_blocks + 1) * BLOCK_S / TR_S)
        self._n = self.n_volumes
        self.scanner = Scanner(n_volumes=self._n, tr_s=TR_S, shape=SHAPE, seed=seed)
        self.events = tuple(
            Event((2 * block + 1) * BLOCK_S, BLOCK_S, CONDITION) for block in range(n_blocks)
        )
        self.activity: list[float] = []
        self._learner, self._address = Learner(seed), address
        self._kernel = _response_to_a_tr(self._n)
        self._closed = False

    def __iter__(self) -> Iterator[Volume]:
        """Give volumes, each once the one before it was answered."""
        host, _, port = self._address.partition(":")
        neural = np.zeros(self._n)
        with socket.create_connection((host, int(port)), timeout=_PATIENCE_S) as connection:
            lines = connection.makefile("rb")
            connection.sendall(b"0\n")  # who asks is a listener at once
            lines.readline()
            for index in range(self._n):
                if self._closed:
                    return
                block, within = divmod(index * TR_S, 2 * BLOCK_S)
                if within == BLOCK_S:
                    self.activity.append(self._learner.choose())
                if within >= BLOCK_S and block < len(self.events):
                    neural[index] = self.activity[-1]
                response = float(neural[: index + 1] @ self._kernel[index::-1])
                self.scanner.respond(index, response)
                yield Volume(self.scanner.volume(index), self.scanner.grid, index, TR_S)
                self._learner.see(_feedback(lines.readline(), index))

    def close(self) -> None:
        """End the iteration soon."""
        self._closed = True


def _response_to_a_tr(n: int) -> NDArray[np.float64]:
    """Return the BOLD response to one TR of activity in the middle of each TR, (n,).

    Responses are added up, where a brain saturates a little. 1 is the peak of a whole block's.
    """
    steps_per_tr = round(TR_S / _STEP_S)
    block = np.zeros(3 * round(BLOCK_S / _STEP_S))
    block[: round(BLOCK_S / _STEP_S)] = 1.0
    impulse = np.zeros(max(n, 20) * steps_per_tr)
    impulse[:steps_per_tr] = 1.0
    response = bold_response(impulse, _STEP_S)[steps_per_tr // 2 :: steps_per_tr][:n]
    return np.asarray(response / bold_response(block, _STEP_S).max())


def _feedback(line: bytes, index: int) -> float | None:
    if not line:
        raise SourceError(f"the feedback of volume {index} never came")
    message = json.loads(line)
    if message["index"] != index:
        raise SourceError(f"the feedback of volume {index} was due, got {message['index']}")
    shown: float | None = message["feedback"]
    return shown


@dataclass(frozen=True, slots=True)
class Learning:
    """One participant's training.

    Attributes
    ----------
    arm : {"contingent", "yoked"}
    seed : int
    activity : tuple of float
        What each block's strategy truly brings, 0 to 1.
    psc : tuple of float
        The region's mean percent signal change of each block, as measured.
    """

    arm: Arm
    seed: int
    activity: tuple[float, ...]
    psc: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Mean activity of the last third of the blocks less that of the first third."""
        third = len(self.activity) // 3
        return float(np.mean(self.activity[-third:]) - np.mean(self.activity[:third]))


def simulate_training(
    out: str | Path,
    *,
    seed: int,
    n_blocks: int = 24,
    yoked_to: str | Path | None = None,
    device: Device = "cpu",
) -> Learning:
    """Train one simulated participant, and record the run.

    Parameters
    ----------
    out : path
        The recording.
    seed : int
        Of the participant and the scanner.
    n_blocks : int
        Of regulation, of 20 s each; at least 3.
    yoked_to : path, optional
        Another participant's recording, whose feedback is shown instead.
    device : {"auto", "cpu", "cuda"}
    """
    if n_blocks < 3:
        raise ConfigError(f"n_blocks must be 3 or more, got {n_blocks}")
    arm: Arm = "contingent" if yoked_to is None else "yoked"
    with tempfile.TemporaryDirectory() as folder, Outputs(["tcp://127.0.0.1:0"]) as outputs:
        (address,) = outputs.addresses().values()
        participant = Participant(address, n_blocks, seed)
        truth = participant.scanner.truth
        sham = None
        if yoked_to is not None:
            allocation = Path(folder) / "arms.toml"
            arms = {"salt": f"seed {seed}", "A": f"yoked:{Path(yoked_to).resolve()}"}
            lines = (f"{name} = {json.dumps(text)}\n" for name, text in arms.items())
            allocation.write_text("".join(lines), encoding="utf-8")
            sham = ShamSettings(allocation=allocation, arm="A")
        config = Config(
            device=device,
            motion=MotionSettings(mode="off"),
            mask=MaskSettings(source="none"),
            glm=GlmSettings(noise="off"),
            feedback=FeedbackSettings(
                during=(CONDITION,), scale=ScaleSettings(high=PSC_AT_TOP), sham=sham
            ),
        )
        with Session(
            participant,
            events=participant.events,
            rois={REGION: truth.regions[REGION].astype(np.float32)},
            config=config,
            out=out,
            outputs=outputs,
        ) as session:
            for _ in session:
                pass
    return Learning(arm, seed, tuple(participant.activity), _psc_by_block(out, n_blocks))


def _psc_by_block(path: str | Path, n_blocks: int) -> tuple[float, ...]:
    with open_recording(path) as recording:
        psc = recording.roi[:, 0, recording.roi_values.index("psc")]
        counts = recording.members()[:, recording.conditions.index(CONDITION)]
        block = (recording.results["time_s"] // (2 * BLOCK_S)).astype(int)
        # A volume's condition is that of some seconds earlier: its block may be the one before.
        block -= (recording.results["time_s"] % (2 * BLOCK_S)) < BLOCK_S
    means = (np.nanmean(psc[counts & (block == i)]) for i in range(n_blocks))
    return tuple(float(mean) for mean in means)


def compare_arms(
    out: str | Path,
    *,
    n_participants: int = 8,
    n_blocks: int = 24,
    device: Device = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict[Arm, list[Learning]]:
    """Train participants with their own feedback, and as many yoked to them.

    Writes a recording for each, ``learning.json`` and the picture ``learning.png``.

    Parameters
    ----------
    out : path
        A folder that is not there yet, or empty.
    n_participants : int
        Of each arm.
    n_blocks, device
        As for `simulate_training`.
    say : callable
        Told what is being done, in a few words.
    """
    folder = new_folder(out)
    arms: dict[Arm, list[Learning]] = {"contingent": [], "yoked": []}
    for number in range(n_participants):
        say(f"participant {number + 1} of {n_participants}, who sees the own feedback")
        genuine = folder / f"contingent-{number + 1}.h5"
        given: dict[str, Any] = {"n_blocks": n_blocks, "device": device}
        arms["contingent"].append(simulate_training(genuine, seed=number, **given))
        say(f"participant {number + 1} of {n_participants}, who is shown another's")
        yoked = folder / f"yoked-{number + 1}.h5"
        arms["yoked"].append(
            simulate_training(yoked, seed=1000 + number, yoked_to=genuine, **given)
        )
    told = {arm: [asdict(one) for one in group] for arm, group in arms.items()}
    (folder / "learning.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    draw_learning(arms).savefig(folder / "learning.png", dpi=130)
    return arms


def draw_learning(arms: Mapping[Arm, Sequence[Learning]]) -> "Figure":
    """Draw each arm's mean activity by block, and the 95 % interval of the mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from scipy import stats

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    titles = {"contingent": "own feedback", "yoked": "another's (yoked sham)"}
    colours = {"contingent": "#d55e00", "yoked": "#0072b2"}
    for arm, group in arms.items():
        table = 100 * np.array([one.activity for one in group])
        blocks, mean = np.arange(1, table.shape[1] + 1), table.mean(axis=0)
        axes.plot(
            blocks, mean, color=colours[arm], lw=2.2, label=f"{titles[arm]}, n = {len(table)}"
        )
        if len(table) > 1:
            reach = stats.t.ppf(0.975, len(table) - 1) * table.std(axis=0, ddof=1)
            reach = reach / np.sqrt(len(table))
            low, high = mean - reach, mean + reach
            axes.fill_between(blocks, low, high, color=colours[arm], alpha=0.2, lw=0)
    gains = ", ".join(
        f"{titles[arm]} {100 * np.mean([one.gain for one in group]):+.0f}"
        for arm, group in arms.items()
    )
    axes.set_title(f"Gain from the first to the last third: {gains} points", loc="left", size=11)
    axes.set_xlabel("block of regulation")
    axes.set_ylabel("activity, % of the strongest")
    axes.set_xlim(1, max(len(one.activity) for group in arms.values() for one in group))
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure

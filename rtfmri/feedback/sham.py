"""Control groups, and the blinding of all who run the experiment.

An *allocation* is a TOML file that one person keeps who does not run it::

    salt = "any words that nobody guesses"
    A = "contingent"
    B = "inverted"
    C = "noise"
    D = "yoked:/data/somebody-else/run.h5"

contingent shows the participant's own feedback, inverted 1 minus that, noise a random process
with its mean, variance and lag-1 autocorrelation so far, yoked what another participant was shown
at the same volume (a path that is not absolute begins at the allocation's folder). All runs of an
arm have the same noise, scaled to their values: an arm may be one participant's. Who runs a
session says an arm's name. Neither log, terminal, outputs nor recording tell its kind; errors
have the same words whatever it is. A recording has the arm's *seal*, a SHA-256 over salt, name
and kind: once the allocation is opened, anybody can verify it (`unblind`).

An honest experimenter can still see it: a recording, and every output's messages, hold the
genuine signals beside what was shown, for the analysis. Who is to stay blind must not compare
them; and yoked alone may show something at a volume that is not usable.
"""

import hashlib
import math
import tomllib
from pathlib import Path

import numpy as np

from rtfmri.config import ShamSettings
from rtfmri.errors import ConfigError
from rtfmri.recording import open_recording

_KINDS = ("contingent", "inverted", "noise", "yoked")
_LEAST = 10
"""Values before the noise's variance and autocorrelation are taken from them."""
_FIRST_SD = 0.2
"""Of the noise until then."""


class Sham:
    """One arm of an allocation.

    Parameters
    ----------
    arm, kind, salt : str
    yoked : dict of int to float
        What is shown by volume number, if the kind is yoked.

    Attributes
    ----------
    seal : str
        SHA-256 in hexadecimal digits.
    """

    def __init__(self, arm: str, kind: str, salt: str, yoked: dict[int, float]) -> None:
        self.seal = _seal(salt, arm, kind)
        self._kind, self._yoked = kind.partition(":")[0], yoked
        self._seed = int.from_bytes(hashlib.sha256(f"{salt}\n{arm}".encode()).digest()[:8])
        self.begin()

    def begin(self) -> None:
        """Begin a run, or begin it anew: what was random is so again, in the same way."""
        self._random = np.random.default_rng(self._seed)
        self._n, self._mean, self._squares = 0, 0.5, 0.0
        self._n_pairs, self._products = 0, 0.0
        self._before, self._noise = math.nan, math.nan

    def push(self, shown: float, index: int) -> float:
        """Return what is shown instead of *shown* (0 ... 1; nan is no value) at a volume."""
        match self._kind:
            case "yoked":
                return self._yoked.get(index, math.nan)
            case "inverted":
                return 1 - shown
            case "noise":
                if math.isfinite(shown):
                    return self._like(shown)
                self._before = self._noise = math.nan  # only neighbours are correlated
                return math.nan
        return shown

    def _like(self, shown: float) -> float:
        """Learn of a genuine value, and return the noise's next one."""
        self._n += 1
        away = shown - self._mean
        self._mean += away / self._n
        self._squares += away * (shown - self._mean)
        if not math.isnan(self._before):
            self._n_pairs += 1
            self._products += (shown - self._mean) * (self._before - self._mean)
        self._before = shown
        sd, memory = _FIRST_SD, 0.0
        if self._n >= _LEAST and self._squares > 0:
            sd = math.sqrt(self._squares / (self._n - 1))
            covariance = self._products / max(1, self._n_pairs)
            memory = float(np.clip(covariance / sd**2, -0.95, 0.95))
        new = sd * float(self._random.normal())
        old = self._noise
        self._noise = new if math.isnan(old) else memory * old + math.sqrt(1 - memory**2) * new
        return float(np.clip(self._mean + self._noise, 0, 1))


def open_sham(settings: ShamSettings) -> Sham:
    """Return the arm that the settings name.

    Raises
    ------
    ConfigError
        If the allocation cannot be read, has no such arm, or the arm cannot be used.
    """
    salt, arms = _read(settings.allocation)
    if settings.arm not in arms:
        known = ", ".join(arms)
        raise ConfigError(f"feedback.sham.arm must be one of {known}; got {settings.arm!r}")
    kind = arms[settings.arm]
    name, _, path = kind.partition(":")
    try:
        yoked = _shown(settings.allocation.parent / path) if name == "yoked" else {}
    except Exception:  # whatever is wrong with a recording, to say it would tell the kind
        name = ""
    if name not in _KINDS:
        raise ConfigError(
            f"feedback.sham: arm {settings.arm!r} cannot be used; ask who keeps the allocation"
        )
    return Sham(settings.arm, kind, salt, yoked)


def unblind(seal: str, arm: str, allocation: str | Path) -> str:
    """Return the kind of an arm, and make sure that it is what a recording's *seal* says.

    Raises
    ------
    ConfigError
        If the allocation cannot be read, has no such arm, or was changed since.
    """
    salt, arms = _read(allocation)
    if arm not in arms:
        raise ConfigError(f"the allocation has no arm {arm!r}; it has {', '.join(arms)}")
    if _seal(salt, arm, arms[arm]) != seal:
        raise ConfigError(f"the allocation's arm {arm!r} is not what it was during the run")
    return arms[arm]


def _read(path: str | Path) -> tuple[str, dict[str, str]]:
    """Return an allocation's salt and its arms; errors do not quote what stands in it."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the allocation {path}: {error}") from None
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"the allocation {path} is no TOML") from None
    salt = table.pop("salt", "")
    if not (isinstance(salt, str) and salt):
        raise ConfigError(f'the allocation {path} must have a salt, as in salt = "some words"')
    arms = {arm: kind for arm, kind in table.items() if isinstance(kind, str)}
    if not arms or len(arms) < len(table):
        raise ConfigError(f'the allocation {path} must have arms, as in A = "contingent"')
    return salt, arms


def _shown(path: Path) -> dict[int, float]:
    with open_recording(path) as recording:
        indices, shown = recording.results["index"].tolist(), recording.shown.tolist()
    if not any(map(math.isfinite, shown)):
        raise ConfigError(f"nothing was shown in {path}")
    return dict(zip(indices, shown, strict=True))


def _seal(salt: str, arm: str, kind: str) -> str:
    return hashlib.sha256(f"{salt}\n{arm}\n{kind}".encode()).hexdigest()

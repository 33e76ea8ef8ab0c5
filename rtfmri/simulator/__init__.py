"""A scanner that is not there."""

from rtfmri.simulator.player import play
from rtfmri.simulator.scanner import Scanner, Truth

__all__ = ["Scanner", "Truth", "play"]

"""A scanner that is not there."""

from rtfmri.simulator.faults import Fault, parse_faults
from rtfmri.simulator.player import play
from rtfmri.simulator.scanner import Scanner, Truth
from rtfmri.simulator.targets import Target, open_target

__all__ = ["Fault", "Scanner", "Target", "Truth", "open_target", "parse_faults", "play"]

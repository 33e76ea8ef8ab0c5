"""The same work by whatever else does it: time beside accuracy, stage by stage."""

from ..measure import Plan, Tables
from . import baseline, glm, motion

LAYOUTS = motion.LAYOUTS | baseline.LAYOUTS | glm.LAYOUTS


def run(plan: Plan) -> Tables:
    """Return the rows of each stage's table."""
    return motion.run(plan) | baseline.run(plan) | glm.run(plan)

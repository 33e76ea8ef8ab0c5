"""Messages of feedback, as a run would send them."""

import math
from typing import Any

from rtfmri.feedback.message import Message, Run

RUN = Run(2.0, 30, ("baseline", "up"), ("left", "right"), ("difference", "link"))


def message(index: int, **changes: Any) -> Message:
    """Volume 3 has no value, the others one that tells their number."""
    given = math.nan if index == 3 else index / 100
    values: dict[str, Any] = {
        "index": index,
        "time_s": 2.0 * index,
        "condition": "up" if index % 2 else "",
        "feedback": given,
        "signals": {"difference": 1.0 + index, "link": given},
        "roi": {"left": 0.5, "right": given},
        "quality": {"usable": index != 3, "problems": [], "fd_mm": 0.1},
        "missing": False,
        "latency_ms": 2.5,
        "unix_s": 1.7e9 + index,
        **changes,
    }
    return Message(**values)

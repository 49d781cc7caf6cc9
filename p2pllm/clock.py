"""Wall time, and the only place that reads it.

Two clocks run in a node. *Monotonic* time is the event loop's `time()`, handed to pure code as
`now`; *wall* time (seconds since 1970) is needed only for the lifetimes in signed records and
comes from a `Clock`. In tests both are virtual.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Where wall time comes from."""

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...


class SystemClock:
    """The computer's own clock."""

    def wall(self) -> float:
        return time.time()

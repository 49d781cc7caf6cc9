"""How often and how long to try again, and when to stop waiting. Pure.

`Patience` spreads attempts: the first follows at once, then pauses double, drawn at random so that
the clients of a dead server do not all come back in the same moment. `LatencyWindow` says when a
step is slow enough to be hedged: at three times what 99 of 100 take ("The Tail at Scale", Dean and
Barroso 2013, who wait for the 95th percentile; a hedge here costs a replay, so we wait longer).
"""

import random
import statistics
from collections import deque
from dataclasses import dataclass, field

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0

WINDOW_STEPS = 128
MIN_STEPS = 32  # before "usual" means anything
HEDGE_FACTOR = 3.0
MIN_HEDGE_S = 0.5  # a replay takes as long
FORGIVING = 0.99  # what is left of the extra patience after each step
RECOUNT_STEPS = 16  # steps between two looks at the percentile


@dataclass
class Patience:
    """Attempts until `deadline`, in the caller's time."""

    deadline: float
    rng: random.Random
    attempts: int = 0

    def pause_s(self, now: float) -> float | None:
        """Seconds until the next attempt; None if the time is over."""
        ceiling = min(FIRST_PAUSE_S * 2.0 ** min(self.attempts - 1, 16), MAX_PAUSE_S)
        pause_s = 0.0 if not self.attempts else ceiling * self.rng.uniform(0.5, 1.0)
        self.attempts += 1
        return None if now + pause_s > self.deadline else pause_s


@dataclass
class LatencyWindow:
    """What the last steps took, in seconds."""

    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    _p99_s: float = 0.0
    _num_added: int = 0
    _factor: float = HEDGE_FACTOR

    @property
    def num_added(self) -> int:
        """Steps so far."""
        return self._num_added

    def median_s(self, num_steps: int) -> float:
        """The median of the last steps; 0 if there was none."""
        return statistics.median([*self._seconds][-num_steps:] or [0.0])

    def add(self, seconds: float) -> None:
        """A step took so long."""
        self._seconds.append(seconds)
        self._num_added += 1
        self._factor = max(HEDGE_FACTOR, self._factor * FORGIVING)
        if self._num_added % RECOUNT_STEPS == 0:
            ordered = sorted(self._seconds)
            self._p99_s = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]

    def on_needless_hedge(self) -> None:
        """A hedged step came by itself: wait longer the next time."""
        self._factor *= 2

    def hedge_after_s(self) -> float | None:
        """When to hedge a step; None while too few were seen."""
        if self._num_added < MIN_STEPS:
            return None
        return max(self._factor * self._p99_s, MIN_HEDGE_S)

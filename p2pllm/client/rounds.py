"""What waits for the client's compute thread, and what it does next.

The LM head reads all its weights for a single row, so one product for the last hidden states of
all generations costs little more than one of them alone. Work that comes while the thread is busy
therefore waits here, and whatever of it are decode steps leaves together, as one *round*. Nobody
waits for company: when the thread is free it takes what is there, be it one row.

Other work (embedding a prompt, a slice of a prompt's logits) is done one piece at a time. It is
small, and alternates with rounds where both wait: a round waits for one such piece at most, and
the next piece for one round.
"""

from collections import deque
from typing import Generic, Protocol, TypeVar


class Work(Protocol):
    """Something that the thread is asked to do."""

    @property
    def num_rows(self) -> int:
        """Rows that it adds to a round; 0: it is no decode step, and done by itself."""
        ...


W = TypeVar("W", bound=Work)


class Rounds(Generic[W]):
    """First come, first served, decode steps side by side. Bounded by whoever waits for each."""

    def __init__(self, max_rows: int) -> None:
        """`max_rows`: of a round. A single step with more of them is a round of its own."""
        self._max_rows = max_rows
        self._steps: deque[W] = deque()
        self._others: deque[W] = deque()
        self._was_round = False  # what was taken last

    def on_work(self, work: W) -> None:
        """Somebody waits for this."""
        (self._steps if work.num_rows else self._others).append(work)

    def discard(self, work: W) -> None:
        """Nobody waits for it any more. Nothing happens if it has been taken already."""
        waiting = self._steps if work.num_rows else self._others
        if work in waiting:
            waiting.remove(work)

    def next_round(self) -> tuple[W, ...]:
        """What to do now: some decode steps, or one other piece of work; empty: nothing."""
        if self._others and (self._was_round or not self._steps):
            self._was_round = False
            return (self._others.popleft(),)
        taken: list[W] = []
        num_rows = 0
        while self._steps:
            num_rows += self._steps[0].num_rows
            if taken and num_rows > self._max_rows:
                break
            taken.append(self._steps.popleft())
        self._was_round = bool(taken)
        return tuple(taken)

    def snapshot(self) -> tuple[W, ...]:
        """All that waits, decode steps first."""
        return (*self._steps, *self._others)

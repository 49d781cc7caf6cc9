"""One text being generated: its tokens, its stop rules, what of it may be shown already.

A stop string may arrive in pieces, so text that could be the beginning of one is held back until
it is clear; what `push` returns is final and never taken back. Pure.
"""

import enum
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol


class Detokenizer(Protocol):
    """Turns a growing list of tokens into growing text."""

    def push(self, token: int) -> str:
        """The text that this token makes certain; whole UTF-8 characters only."""
        ...

    def flush(self) -> str:
        """What was held back, at the end."""
        ...


class Finish(enum.StrEnum):
    """Why a generation ended."""

    LENGTH = "length"  # max_new_tokens are there
    EOS = "eos"  # the model ended the text
    STOP = "stop"  # a stop string appeared


@dataclass
class Sequence:
    """A prompt and what has been generated after it."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    detokenizer: Detokenizer
    eos_ids: frozenset[int] = frozenset()  # empty: never ends by itself
    stops: tuple[str, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    num_cached: int = 0  # of the prompt's tokens: those that no server had to compute for it
    _held: str = ""  # decoded, not shown: may begin a stop string

    def push(self, token: int) -> str:
        """Take the next token in; returns the text that may be shown now."""
        if token in self.eos_ids:
            return self._end(Finish.EOS, self._held + self.detokenizer.flush())
        self.token_ids.append(token)
        pending = self._held + self.detokenizer.push(token)
        cut = _first_stop(pending, self.stops)
        if cut is not None:
            return self._end(Finish.STOP, pending[:cut])
        if len(self.token_ids) >= self.max_new_tokens:
            pending += self.detokenizer.flush()
            cut = _first_stop(pending, self.stops)
            return self._end(Finish.LENGTH if cut is None else Finish.STOP, pending[:cut])
        keep = _held_back(pending, self.stops)
        shown, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += shown
        return shown

    def _end(self, finish: Finish, last: str) -> str:
        self.finish, self._held = finish, ""
        self.text += last
        return last


def _first_stop(text: str, stops: SequenceOf[str]) -> int | None:
    """Where the first stop string begins, or None."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _held_back(text: str, stops: SequenceOf[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )

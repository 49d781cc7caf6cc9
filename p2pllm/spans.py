"""Span: a half-open range of transformer blocks, `[start, stop)`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from p2pllm.errors import ConfigError

_MAX_DIGITS = 18  # of both numbers together; Python refuses to read 4301


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `start`, `start + 1`, … `stop - 1`; never empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ConfigError(
                f"blocks {self.start}:{self.stop} are not a span; "
                "write START:STOP with 0 <= START < STOP, for example 0:10"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def covers(self, other: "Span") -> bool:
        """Is every block of `other` one of mine?"""
        return self.start <= other.start and other.stop <= self.stop

    def overlap(self, other: "Span") -> "Span | None":
        """The blocks that both have, or None."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(start, stop) if start < stop else None

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read "10:20"; raises ConfigError with an example for anything else."""
        start, colon, stop = text.partition(":")
        start, stop = start.strip(), stop.strip()
        is_number = start.isdecimal() and stop.isdecimal() and len(start + stop) <= _MAX_DIGITS
        if not (colon and is_number):
            raise ConfigError(f"not a span of blocks: {text!r}; write START:STOP, for example 0:10")
        return cls(int(start), int(stop))


def uncovered(whole: Span, parts: Iterable[Span]) -> tuple[Span, ...]:
    """The maximal spans of `whole` that no part covers, in order."""
    missing, reached = [], whole.start
    for part in sorted(parts):
        if part.start > reached and reached < whole.stop:
            missing.append(Span(reached, min(part.start, whole.stop)))
        reached = max(reached, part.stop)
    if reached < whole.stop:
        missing.append(Span(reached, whole.stop))
    return tuple(missing)


def cut(span: Span, sizes: Sequence[int]) -> tuple[Span, ...]:
    """Consecutive spans of so many blocks each, which are all of `span` together."""
    assert sum(sizes) == len(span)
    spans, start = [], span.start
    for size in sizes:
        spans.append(Span(start, start + size))
        start += size
    return tuple(spans)

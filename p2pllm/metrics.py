"""Measurements as values. Nothing here reads a clock; a caller passes what it measured."""

from dataclasses import dataclass


@dataclass
class MovingAverage:
    """An exponentially weighted mean; the first sample is taken whole.

    `weight` is what a new sample counts (0.2: about the last ten samples matter).
    """

    weight: float = 0.2
    value: float | None = None

    def add(self, sample: float) -> float:
        """Take a sample in and return the new mean."""
        old = self.value
        self.value = sample if old is None else old + self.weight * (sample - old)
        return self.value

    def get(self, default: float) -> float:
        """The mean, or `default` before the first sample."""
        return default if self.value is None else self.value

"""Measurements as values: counters, moving averages, latency histograms.

Nothing here reads a clock or keeps an unbounded list; a caller passes what it measured.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

# Upper bounds of the histogram's buckets in seconds: 0.1 ms to about 100 s, 25 % apart.
_BOUNDS = tuple(1e-4 * 1.25**i for i in range(62))


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


@dataclass
class Histogram:
    """Counts of durations in seconds, in buckets 25 % apart; quantiles are exact to that."""

    counts: Counter[int] = field(default_factory=Counter)
    total: int = 0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.total += 1

    def quantile(self, q: float) -> float:
        """The bound of the bucket that holds the q-quantile (0 ≤ q ≤ 1); 0 if empty."""
        if not self.total:
            return 0.0
        rank, seen = q * (self.total - 1), 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen > rank:
                return _BOUNDS[min(index, len(_BOUNDS) - 1)]
        raise AssertionError("unreachable: the counts sum up to the total")

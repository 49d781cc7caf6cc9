"""How long to wait for a peer: about twice the 95th percentile of recent round trips.

Under churn a good part of all queries goes to peers that left. A fixed timeout of seconds would
make each of them the slowest part of a lookup; one fitted to what is measured costs a dead peer
hardly more than a live one that is far away. Round trips include the dial where one was needed.
"""

from collections import deque

WINDOW = 64  # recent round trips that count
_REFIT_EVERY = 8  # samples between two computations
_FACTOR, _QUANTILE = 2.0, 0.95


class RpcTimeout:
    """The timeout of the next query, in seconds; the largest until something was measured."""

    def __init__(self, min_s: float, max_s: float) -> None:
        self._min_s, self._max_s = min_s, max_s
        self._samples: deque[float] = deque(maxlen=WINDOW)
        self._until_refit = 1
        self.seconds = max_s

    def add(self, rtt_s: float) -> None:
        """Take in one measured round trip."""
        self._samples.append(rtt_s)
        self._until_refit -= 1
        if self._until_refit > 0:
            return
        self._until_refit = _REFIT_EVERY
        ordered = sorted(self._samples)
        high = ordered[int(_QUANTILE * (len(ordered) - 1) + 0.5)]
        self.seconds = min(max(_FACTOR * high, self._min_s), self._max_s)

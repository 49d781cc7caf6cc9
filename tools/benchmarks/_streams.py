"""What a load test saw, as values: when requests came, when each of their tokens did.

Clients note moments of the machine's monotonic clock, which all of its processes share; everything
else (times to first token, times between tokens, rates) follows from them here. Pure.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Request:
    """One generation as its client saw it.

    `arrived`: when it was asked for; it may have waited before it began. `tokens`: when each new
    token was there. `own_s`: the client's own computation per token. `bytes_per_token_hop`: payload
    to and from a hop. `hop_compute_s`: what the hops say that a token takes. `error`: why it ended
    early, if it did.
    """

    client: int
    arrived: float
    tokens: tuple[float, ...]
    own_s: float = 0.0
    bytes_per_token_hop: float = 0.0
    hop_compute_s: tuple[float, ...] = ()
    error: str = ""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Request":
        """The opposite of `to_json`."""
        tokens, computed = tuple(value["tokens"]), tuple(value["hop_compute_s"])
        return cls(**{**value, "tokens": tokens, "hop_compute_s": computed})

    def to_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)

    @property
    def gaps_s(self) -> list[float]:
        """The time of each token after the first."""
        return [after - before for before, after in itertools.pairwise(self.tokens)]

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; there must be one."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0 to 1) of them lie, interpolated between neighbours."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values, no percentile")
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def poisson_arrivals(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Moments in [0, seconds) at which requests come, `rate` per second on average."""
    moments: list[float] = []
    moment = rng.expovariate(rate)
    while moment < seconds:
        moments.append(moment)
        moment += rng.expovariate(rate)
    return moments


def latencies(requests: Sequence[Request]) -> dict[str, float]:
    """TTFT p50 and p95, TPOT p50 and p99, in ms; TPOT is of single tokens, not of means."""
    firsts = [request.tokens[0] - request.arrived for request in requests if request.tokens]
    gaps = [gap for request in requests for gap in request.gaps_s]
    found: dict[str, float] = {}
    if firsts:
        found |= {"ttft_p50_ms": ms(percentile(firsts, 0.5))}
        found |= {"ttft_p95_ms": ms(percentile(firsts, 0.95))}
    if gaps:
        found |= {"tpot_p50_ms": ms(percentile(gaps, 0.5))}
        found |= {"tpot_p99_ms": ms(percentile(gaps, 0.99))}
    return found


def rate_in_all(requests: Sequence[Request]) -> float:
    """Tokens per second from the first arrival to the last token, prompts and pauses included."""
    moments = [moment for request in requests for moment in request.tokens]
    begun = min(request.arrived for request in requests)
    return len(moments) / (max(moments) - begun)


def rate_when_all_decode(requests: Sequence[Request], num_streams: int) -> float | None:
    """Tokens per second while `num_streams` requests are between their first and last token.

    That is what a loop of as many sequences, without prompts, is to be compared with. None if there
    was no such time.
    """
    decoding = [(r.tokens[0], r.tokens[-1]) for r in requests if len(r.tokens) > 1]
    windows = when_at_least(num_streams, decoding)
    seconds = sum(stop - start for start, stop in windows)
    if not seconds:
        return None
    moments = (moment for request in requests for moment in request.tokens)
    # A token belongs to the time before it, so a window is open at its start.
    inside = sum(any(start < m <= stop for start, stop in windows) for m in moments)
    return inside / seconds


def when_at_least(count: int, intervals: Iterable[Interval]) -> list[Interval]:
    """Where at least `count` of the intervals overlap."""
    changes = sorted(
        (moment, step) for pair in intervals for moment, step in zip(pair, (1, -1), strict=True)
    )
    windows: list[Interval] = []
    depth, since = 0, 0.0
    for moment, step in changes:
        if depth < count <= depth + step:
            since = moment
        elif depth + step < count <= depth and moment > since:
            windows.append((since, moment))
        depth += step
    return windows


def gaps_beside(requests: Sequence[Request], disturbances: Sequence[Interval]) -> list[float]:
    """Times of the tokens that were waited for while a disturbance went on."""
    return [
        after - before
        for request in requests
        for before, after in itertools.pairwise(request.tokens)
        if any(before < stop and after > start for start, stop in disturbances)
    ]


def ms(seconds: float) -> float:
    """In milliseconds, rounded to microseconds."""
    return round(1e3 * seconds, 3)

"""What one step through some hops tells: where its time went, and how far to believe that.

The client knows when a step left and when its output came. Of what lies between, each hop says
how long it had the step in its queue and on its device, and what its transport knows of the link
that the output left on. These are claims: every hop passes on the timings of those before it and
could change them. So nothing may exceed the time that really passed, and moments on different
computers are never compared, since nobody knows how far their clocks are apart.

What remains of the time went on the links: one to each hop, and one back to the client. Each gets
half its round trip where that is known; the rest goes to the links of which nothing is known, or
in equal parts to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from p2pllm.ids import PeerId
from p2pllm.spans import Span
from p2pllm.wire.messages import HopTiming


@dataclass(frozen=True, slots=True)
class HopShare:
    """What one hop had of a step's time, in seconds.

    `link_s`: on the way to it; `return_s`: from it back to the client (0 unless it is the last).
    The rest as in `HopTiming`, as far as it can be true.
    """

    link_s: float
    queue_s: float
    compute_s: float
    return_s: float = 0.0
    next_rtt_s: float = 0.0
    next_rate_bytes_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SegmentStep:
    """One step through a segment: hops that push to each other, the last one back to the client.

    `first_hop` counts from the chain's beginning. `batch` is the number of sequences, `position`
    the first one's, before the step. `sent_at` and `received_at` are this client's monotonic
    clock. `sent_bytes` and `received_bytes` are those of the tensors. `timings` are the hops' own,
    in order; without one for every hop nothing is known of where the time went. `rtt_s` and
    `rate_bytes_s` are what our own transport knows of the way to the first hop (0: nothing).
    `is_relayed`: we carry the output to the chain's next hop ourselves. `is_replay`: the hops had
    computed this before, or others had.
    """

    peers: tuple[PeerId, ...]
    spans: tuple[Span, ...]
    batch: int
    num_tokens: int
    sent_at: float
    received_at: float
    timings: tuple[HopTiming, ...]
    sent_bytes: int = 0
    received_bytes: int = 0
    rtt_s: float = 0.0
    rate_bytes_s: float = 0.0
    first_hop: int = 0
    position: int = 0
    epoch: int = 0
    is_replay: bool = False
    is_relayed: bool = False

    @property
    def total_s(self) -> float:
        """From when the step left until its output was here."""
        return max(0.0, self.received_at - self.sent_at)

    @property
    def is_decode(self) -> bool:
        """One token of each sequence?"""
        return self.num_tokens == self.batch

    def shares(self) -> tuple[HopShare, ...]:
        """Where the time went; empty if the timings are not one per hop."""
        if len(self.timings) != len(self.peers):
            return ()
        return divide(self.timings, self.total_s, self.rtt_s)

    def overhead_s(self) -> float | None:
        """What a hop costs beyond link, queue and computation, on average over the hops.

        That is the price of messages, encryption and event loops. None where a link is not known,
        or the tensor may have spent time on a slow one.
        """
        shares = self.shares()
        if not shares or not self.rtt_s or not all(share.next_rtt_s for share in shares):
            return None
        links_s = (self.rtt_s + sum(share.next_rtt_s for share in shares)) / 2
        rates = [self.rate_bytes_s, *(share.next_rate_bytes_s for share in shares)]
        transfer_s = sum(self.sent_bytes / rate for rate in rates if rate)
        busy_s = sum(share.queue_s + share.compute_s for share in shares)
        return max(0.0, self.total_s - links_s - transfer_s - busy_s) / len(shares)


def divide(
    timings: Sequence[HopTiming], total_s: float, first_rtt_s: float = 0.0
) -> tuple[HopShare, ...]:
    """Divide a step's time among its hops. `first_rtt_s`: our transport's to the first one."""
    busy_s = sum(timing.queue_s + timing.compute_s for timing in timings)
    # More than there was: somebody is wrong, and nobody knows who. All give way alike.
    scale = min(1.0, total_s / busy_s) if busy_s > 0 else 1.0
    # A step that took `total_s` crossed each link once, so no round trip is above twice that.
    rtts_s = [min(rtt_s, 2 * total_s) for rtt_s in (first_rtt_s, *(t.next_rtt_s for t in timings))]
    links_s = _divide_links(max(0.0, total_s - busy_s), rtts_s)
    last = len(timings) - 1
    return tuple(
        HopShare(
            link_s=links_s[index],
            queue_s=timing.queue_s * scale,
            compute_s=timing.compute_s * scale,
            return_s=links_s[-1] if index == last else 0.0,
            next_rtt_s=rtts_s[index + 1],
            next_rate_bytes_s=timing.next_rate_bytes_s,
        )
        for index, timing in enumerate(timings)
    )


def _divide_links(rest_s: float, rtts_s: Sequence[float]) -> list[float]:
    """Give each link its part of the time; a round trip of 0 is an unknown one."""
    known_s = sum(rtts_s) / 2
    if known_s >= rest_s:
        return (
            [rest_s * rtt_s / 2 / known_s for rtt_s in rtts_s] if known_s else [0.0] * len(rtts_s)
        )
    takers = [not rtt_s for rtt_s in rtts_s]
    if not any(takers):
        takers = [True] * len(rtts_s)
    part_s = (rest_s - known_s) / sum(takers)
    return [
        rtt_s / 2 + (part_s if takes else 0.0) for rtt_s, takes in zip(rtts_s, takers, strict=True)
    ]

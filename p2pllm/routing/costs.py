"""What a route costs, in seconds, term by term.

A hop costs, for one step,

    rtt/2 + bytes/bandwidth + queue + blocks × seconds_per_block(batch)

and, once, the wait for K/V cache where the server has none free (arXiv 2512.21884 shows that on
Petals this wait outweighs the rest). A request has one prefill and `new_tokens` decode steps, so

    total = TTFT + new_tokens × TPOT

is what planning minimises; prefill and decode differ in bytes, batch and speed, and a server that
is good at one may be poor at the other. TTFT is the sum over the hops: that the chunks of a long
prompt overlap between hops is left out, which does not change which of two hops is better.

`CostModel` gives these numbers in two forms that agree: *weights* (one float per edge, what a
search adds up) and *prices* (all terms by name, what a person is shown).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from p2pllm.ids import PeerId
from p2pllm.routing.request import RouteRequest
from p2pllm.spans import Span
from p2pllm.swarm.view import UNKNOWN_BANDWIDTH_BYTES_S, End, ServerView, SwarmView

CACHE_WAIT_S = 10.0  # for a server without room that has not told us how long; Petals' alloc_delay


@dataclass(frozen=True, slots=True)
class HopCost:
    """The seconds that one hop adds to one step, by cause.

    `rtt_s`: half a round trip for every move that is charged to this hop: to arrive at it and,
    where the activation goes back to the client, to return. `transfer_s`: the bytes of the same.
    """

    rtt_s: float = 0.0
    transfer_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    cache_wait_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.rtt_s + self.transfer_s + self.queue_s + self.compute_s + self.cache_wait_s


@dataclass(frozen=True, slots=True)
class RouteCost:
    """What a whole route costs: time to first token, time per output token, and all of it."""

    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server that may be used, for these blocks of its span."""

    server: ServerView
    span: Span


class CostModel:
    """The costs of one request on one view."""

    def __init__(self, view: SwarmView, request: RouteRequest) -> None:
        self.view = view
        self.request = request
        self._prefill_tokens = request.batch * max(request.prompt_tokens, 1)
        self._prefill_bytes = self._prefill_tokens * request.activation_bytes_per_token
        self._decode_bytes = request.batch * request.activation_bytes_per_token
        self._num_steps = 1 + request.new_tokens
        self._all_bytes = self._prefill_bytes + request.new_tokens * self._decode_bytes

    # --- weights: prefill + new_tokens × decode, in one number -------------------------------

    def move_weight(self, source: End, target: End) -> float:
        """To carry the activation of every step over this link."""
        link = self.view.link(source, target)
        weight = self._num_steps * link.rtt_s / 2 + self._all_bytes / link.bandwidth_bytes_s
        return weight if target is None else weight * self.factor(target)

    def estimated_weight(self, peer: PeerId) -> float:
        """To carry it over a link of unknown bandwidth as long as the one from us to `peer`: of
        two servers the larger is `move_weight` between them where `view.link` estimates."""
        rtt_s = self.view.client_rtt_s(peer)
        return self._num_steps * rtt_s / 2 + self._all_bytes / UNKNOWN_BANDWIDTH_BYTES_S

    def stay_weight(self, server: ServerView) -> float:
        """To be taken in: the queue of every step, and once the wait for cache."""
        weight = self._num_steps * server.expected_queue_s + self.cache_wait_s(server)
        return weight * self.factor(server.peer_id)

    def block_weight(self, server: ServerView) -> float:
        """To compute one block in every step."""
        decode_s = server.seconds_per_block(self.request.batch)
        weight = self._prefill_block_s(server) + self.request.new_tokens * decode_s
        return weight * self.factor(server.peer_id)

    def factor(self, peer: PeerId) -> float:
        """1 … 1 + spread, by the request's seed: see `RouteRequest`."""
        if self.request.seed is None:
            return 1.0
        seed = str(self.request.seed).encode()
        draw = int.from_bytes(blake2b(peer.key, digest_size=4, key=seed).digest(), "big")
        return 1.0 + self.request.spread * draw / 2**32

    # --- terms -------------------------------------------------------------------------------

    def cache_wait_s(self, server: ServerView) -> float:
        """How long until the server has cache for the request; 0 if it has some now."""
        needed = self.request.batch * self.request.cache_tokens
        if server.cache_wait_s > 0:
            return server.cache_wait_s
        return 0.0 if server.presence.free_tokens >= needed else CACHE_WAIT_S

    def _prefill_block_s(self, server: ServerView) -> float:
        # A prompt of a few tokens takes no less than a decode step.
        at_rate = self._prefill_tokens / server.expected_prefill_tokens_s
        return max(at_rate, server.seconds_per_block(self.request.batch))

    # --- prices ------------------------------------------------------------------------------

    def price(self, hops: Sequence[tuple[ServerView, Span]]) -> list[tuple[HopCost, HopCost]]:
        """For every hop what it adds to the prefill and to each decode step."""
        return [
            self._price_hop(server, span, self._links_of(hops, index))
            for index, (server, span) in enumerate(hops)
        ]

    def total(self, prices: Sequence[tuple[HopCost, HopCost]]) -> RouteCost:
        """The cost of a route whose hops have these prices."""
        ttft_s = sum(prefill.total_s for prefill, _ in prices)
        tpot_s = sum(decode.total_s for _, decode in prices)
        return RouteCost(ttft_s, tpot_s, ttft_s + self.request.new_tokens * tpot_s)

    def _links_of(
        self, hops: Sequence[tuple[ServerView, Span]], index: int
    ) -> list[tuple[End, End]]:
        """The links charged to a hop: the one it is reached by, and the one back to the client
        (or to what follows a repaired gap) if its output goes there."""
        peer, request = hops[index][0].peer_id, self.request
        if request.relayed:
            return [(None, peer), (peer, None)]
        before = hops[index - 1][0].peer_id if index else request.before
        links: list[tuple[End, End]] = [(before, peer)]
        if index == len(hops) - 1:
            links.append((peer, request.after))
        return links

    def _price_hop(
        self, server: ServerView, span: Span, links: Sequence[tuple[End, End]]
    ) -> tuple[HopCost, HopCost]:
        views = [self.view.link(source, target) for source, target in links]
        rtt_s = sum(link.rtt_s / 2 for link in views)
        seconds_per_byte = sum(1 / link.bandwidth_bytes_s for link in views)
        prefill = HopCost(
            rtt_s=rtt_s,
            transfer_s=self._prefill_bytes * seconds_per_byte,
            queue_s=server.expected_queue_s,
            compute_s=len(span) * self._prefill_block_s(server),
            cache_wait_s=self.cache_wait_s(server),
        )
        decode = HopCost(
            rtt_s=rtt_s,
            transfer_s=self._decode_bytes * seconds_per_byte,
            queue_s=server.expected_queue_s,
            compute_s=len(span) * server.seconds_per_block(self.request.batch),
        )
        return prefill, decode

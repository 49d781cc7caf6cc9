"""What a route costs, in seconds, term by term.

A hop costs, for one step,

    rtt/2 + bytes/bandwidth + queue + blocks × seconds_per_block(batch) + overhead

and, once, the wait for K/V cache where the server has none free (arXiv 2512.21884 shows that on
Petals this wait outweighs the rest). A request has one prefill and `new_tokens` decode steps, so

    total = TTFT + new_tokens × TPOT

is what planning minimises; prefill and decode differ in bytes, batch and speed, and a server that
is good at one may be poor at the other.

TPOT is the sum over the hops, and the client's own part. TTFT is not: sessions are opened at all
hops at once, and a prompt goes through them in chunks, so that one hop works on a chunk while the
one before it works on the next. Link, queue and device of each hop are stages of a pipeline, and
the time until the last chunk is out follows from when each stage is free (`_Pipeline`).

`CostModel` gives these numbers in two forms: *prices* (all terms by name, what is predicted and
shown) and *weights* (one float per edge, what a search adds up). Weights cannot express that
chunks overlap. So there are two kinds: in one every hop pays for all chunks, in the other
(`overlapped`) for one only. The truth lies between; a search tries both and prices what it finds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

from p2pllm.ids import PeerId
from p2pllm.routing.request import Objective, RouteRequest
from p2pllm.spans import Span
from p2pllm.swarm.view import (
    UNKNOWN_BANDWIDTH_BYTES_S,
    End,
    LinkView,
    ServerView,
    SwarmView,
)

CACHE_WAIT_S = 10.0  # for a server without room that has not told us how long; Petals' alloc_delay
CHUNKS_IN_FLIGHT = 8  # of one sequence: the client sends the next when the eighth before is out
MESSAGE_BYTES = 400  # of a step beside its tensor: rows, timings, framing, encryption; measured
SECONDARY = 1e-3  # how much of the other objective decides between equals


@dataclass(frozen=True, slots=True)
class HopCost:
    """The seconds that one hop adds to one step (a chunk, or a token), by cause.

    `rtt_s`: half a round trip for every move that is charged to this hop: to arrive at it and,
    where the activation goes back to the client, to return. `transfer_s`: the bytes of the same.
    `overhead_s`: messages, encryption and event loops, as measured on average.
    """

    rtt_s: float = 0.0
    transfer_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    overhead_s: float = 0.0
    cache_wait_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Without the wait for cache, which is over when the first step comes."""
        return self.rtt_s + self.transfer_s + self.queue_s + self.compute_s + self.overhead_s

    @property
    def total_s(self) -> float:
        return self.step_s + self.cache_wait_s


@dataclass(frozen=True, slots=True)
class RouteCost:
    """What a whole route costs: time to first token, time per output token, and all of it.

    TTFT is made of `open_s` (sessions at all hops at once), `cache_wait_s` (the longest of them),
    `own_first_s` (the client's own computation), the hops' prices for one chunk, and `pipeline_s`:
    what the prompt's other chunks add, though they overlap. TPOT is the hops' prices for a token
    and `own_token_s`.
    """

    ttft_s: float
    tpot_s: float
    total_s: float
    open_s: float = 0.0
    cache_wait_s: float = 0.0
    own_first_s: float = 0.0
    own_token_s: float = 0.0
    pipeline_s: float = 0.0
    num_chunks: int = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server that may be used, for these blocks of its span."""

    server: ServerView
    span: Span


class _Leg(NamedTuple):
    """One move of an activation: all of its tokens, or the last one only."""

    source: End
    target: End
    is_whole: bool


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What goes through the hops: a whole prefill, or one chunk of it."""

    count: int  # of steps
    num_bytes: float
    chunks: tuple[int, ...]


@dataclass
class _Pipeline:
    """Stages that chunks pass in order, each busy with one chunk at a time.

    A stage serves a chunk and then lets it travel for a while, during which it takes the next.
    """

    stages: list[tuple[dict[int, float], float]] = field(default_factory=list)

    def add(self, service_s: dict[int, float], travel_s: float = 0.0) -> None:
        """A stage: its time for a chunk, by the chunk's size."""
        self.stages.append((service_s, travel_s))

    def last_out_s(self, chunks: Sequence[int], in_flight: int) -> float:
        """When the last chunk is out, if the first enters at 0 and `in_flight` may be inside."""
        free = [0.0] * len(self.stages)
        out: list[float] = []
        for number, chunk in enumerate(chunks):
            at = out[number - in_flight] if number >= in_flight else 0.0
            for index, (service_s, travel_s) in enumerate(self.stages):
                free[index] = max(at, free[index]) + service_s[chunk]
                at = free[index] + travel_s
            out.append(at)
        return max(out)


class CostModel:
    """The costs of one request on one view. `is_overlapped`: see the module's text."""

    def __init__(
        self, view: SwarmView, request: RouteRequest, *, is_overlapped: bool = False
    ) -> None:
        self.view = view
        self.request = request
        self._factors: dict[PeerId, float] = {}
        chunks = request.chunks
        weighed = chunks[:1] if is_overlapped else chunks * request.batch
        per_token = request.activation_bytes_per_token
        self._first_weight = SECONDARY if request.objective is Objective.EACH_TOKEN else 1.0
        is_first = request.objective is Objective.FIRST_TOKEN
        self._num_tokens = request.new_tokens * (SECONDARY if is_first else 1.0)
        self._prefill = _Sizes(
            len(weighed), len(weighed) * MESSAGE_BYTES + sum(weighed) * per_token, weighed
        )
        self._decode_bytes = MESSAGE_BYTES + request.batch * per_token
        self._tail_bytes = MESSAGE_BYTES + per_token  # the last hop's output, after a prompt
        self._num_steps = self._first_weight * len(weighed) + self._num_tokens
        # A link delays the chunks of a prompt once: they follow each other.
        self._num_delays = self._first_weight + self._num_tokens
        self._all_bytes = (
            self._first_weight * self._prefill.num_bytes + self._num_tokens * self._decode_bytes
        )
        self._leave_bytes = (
            self._first_weight * len(weighed) * self._tail_bytes
            + self._num_tokens * self._decode_bytes
        )

    def overlapped(self) -> "CostModel | None":
        """The model whose weights count one chunk of the prompt; None if there is one only."""
        if len(self.request.chunks) * self.request.batch == 1:
            return None
        return CostModel(self.view, self.request, is_overlapped=True)

    # --- weights: prefill + new_tokens × decode, in one number -------------------------------

    def move_weight(self, source: End, target: End) -> float:
        """To carry the activation of every step over this link, by way of us if it is broken."""
        if self.view.is_broken(source, target):
            return self.move_weight(source, None) + self.move_weight(None, target)
        return self.link_weight(self.view.link(source, target), target)

    def link_weight(self, link: LinkView, target: End) -> float:
        """The same over a link that works."""
        weight = self._carry(link, self._all_bytes)
        return weight if target is None else weight * self.factor(target)

    def leave_weight(self, source: PeerId, target: End) -> float:
        """To carry it from the last hop to where it goes: of a prompt only the last token."""
        if self.view.is_broken(source, target):
            return self.leave_weight(source, None) + self.move_weight(None, target)
        return self._carry(self.view.link(source, target), self._leave_bytes)

    def _carry(self, link: LinkView, num_bytes: float) -> float:
        return self._num_delays * link.rtt_s / 2 + num_bytes / link.bandwidth_bytes_s

    def estimated_weight(self, peer: PeerId) -> float:
        """To carry it over a link of unknown bandwidth as long as the one from us to `peer`: of
        two servers the larger is `move_weight` between them where `view.link` estimates."""
        rtt_s = self.view.client_rtt_s(peer)
        return self._num_delays * rtt_s / 2 + self._all_bytes / UNKNOWN_BANDWIDTH_BYTES_S

    def stay_weight(self, server: ServerView) -> float:
        """To be taken in: queue and overhead of every step, and once the wait for cache."""
        step_s = server.expected_queue_s + self.view.overhead_s
        weight = self._num_steps * step_s + self._first_weight * self.cache_wait_s(server)
        return weight * self.factor(server.peer_id)

    def block_weight(self, server: ServerView) -> float:
        """To compute one block in every step."""
        prefill_s = sum(map(server.prefill_block_s, self._prefill.chunks))
        decode_s = server.seconds_per_block(self.request.batch)
        weight = self._first_weight * prefill_s + self._num_tokens * decode_s
        return weight * self.factor(server.peer_id)

    def factor(self, peer: PeerId) -> float:
        """1 … 1 + spread, by the request's seed: see `RouteRequest`."""
        if self.request.seed is None:
            return 1.0
        factor = self._factors.get(peer)
        if factor is None:
            seed = str(self.request.seed).encode()
            draw = int.from_bytes(blake2b(peer.key, digest_size=4, key=seed).digest(), "big")
            factor = self._factors[peer] = 1.0 + self.request.spread * draw / 2**32
        return factor

    def cache_wait_s(self, server: ServerView) -> float:
        """How long until the server has cache for the request; 0 if it has some now."""
        needed = self.request.batch * self.request.cache_tokens
        if server.cache_wait_s > 0:
            return server.cache_wait_s
        return 0.0 if server.presence.free_tokens >= needed else CACHE_WAIT_S

    # --- prices ------------------------------------------------------------------------------

    def price(self, hops: Sequence[tuple[ServerView, Span]]) -> list[tuple[HopCost, HopCost]]:
        """For every hop what it adds to the way of one chunk (the longest), and of one token."""
        peers = [server.peer_id for server, _ in hops]
        chunk = self.request.chunks[0]
        prices = []
        for index, (server, span) in enumerate(hops):
            prefill_s = len(span) * server.prefill_block_s(chunk)
            decode_s = len(span) * server.seconds_per_block(self.request.batch)
            into, out = self._prefill_legs(peers, index)
            first = self._price_hop(server, [*into, *out], self._leg_bytes(chunk), prefill_s)
            legs = self._decode_legs(peers, index)
            each = self._price_hop(server, legs, {True: self._decode_bytes}, decode_s)
            prices.append((replace(first, cache_wait_s=self.cache_wait_s(server)), each))
        return prices

    def total(self, hops: Sequence[tuple[ServerView, Span]]) -> RouteCost:
        """The cost of a route with these hops."""
        prices = self.price(hops)
        request = self.request
        open_s = self._open_s([server.peer_id for server, _ in hops])
        wait_s = max((first.cache_wait_s for first, _ in prices), default=0.0)
        one_s = sum(first.step_s for first, _ in prices)
        last_out_s = self._prefill_s(hops) - request.own_chunk_s
        own_s = request.own_chunk_s + request.own_step_s
        ttft_s = open_s + wait_s + own_s + last_out_s
        tpot_s = request.own_step_s + sum(each.total_s for _, each in prices)
        return RouteCost(
            ttft_s,
            tpot_s,
            ttft_s + request.new_tokens * tpot_s,
            open_s=open_s,
            cache_wait_s=wait_s,
            own_first_s=own_s,
            own_token_s=request.own_step_s,
            pipeline_s=last_out_s - one_s,
            num_chunks=len(request.chunks) * request.batch,
        )

    def objective_s(self, cost: RouteCost) -> float:
        """What planning wants to be small: the total, as the request weighs its parts."""
        return self._first_weight * cost.ttft_s + self._num_tokens * cost.tpot_s

    def _open_s(self, peers: Sequence[PeerId]) -> float:
        """To open sessions: a round trip to each hop, which meanwhile makes one to the next."""
        longest = 0.0
        for index, peer in enumerate(peers):
            rtt_s = self.view.link(None, peer).rtt_s
            after = peers[index + 1] if index + 1 < len(peers) else self.request.after
            is_pushing = not (self.request.relayed or after is None)
            if is_pushing and not self.view.is_broken(peer, after):
                rtt_s += self.view.link(peer, after).rtt_s
            longest = max(longest, rtt_s)
        return longest

    def _prefill_s(self, hops: Sequence[tuple[ServerView, Span]]) -> float:
        """From the first chunk's embedding until the last chunk's output is here."""
        sizes = set(self.request.chunks)
        pipeline = _Pipeline()
        pipeline.add(dict.fromkeys(sizes, self.request.own_chunk_s))
        peers = [server.peer_id for server, _ in hops]
        for index, (server, span) in enumerate(hops):
            into, out = self._prefill_legs(peers, index)
            for leg in into:
                self._add_leg(pipeline, leg, sizes)
            wait_s = server.expected_queue_s + self.view.overhead_s
            pipeline.add(
                {size: wait_s + len(span) * server.prefill_block_s(size) for size in sizes}
            )
            for leg in out:
                self._add_leg(pipeline, leg, sizes)
        batch = self.request.batch
        return pipeline.last_out_s(self.request.chunks * batch, CHUNKS_IN_FLIGHT * batch)

    def _add_leg(self, pipeline: _Pipeline, leg: _Leg, sizes: set[int]) -> None:
        link = self.view.link(leg.source, leg.target)
        service_s = {
            size: self._leg_bytes(size)[leg.is_whole] / link.bandwidth_bytes_s for size in sizes
        }
        pipeline.add(service_s, link.rtt_s / 2)

    def _leg_bytes(self, chunk: int) -> dict[bool, float]:
        """The bytes of a leg of one chunk, by whether all tokens travel."""
        whole = MESSAGE_BYTES + chunk * self.request.activation_bytes_per_token
        return {True: whole, False: self._tail_bytes}

    def _prefill_legs(self, peers: Sequence[PeerId], index: int) -> tuple[list[_Leg], list[_Leg]]:
        """The moves of a chunk to a hop, and those from it that are charged to it.

        A repair is no exception: the journal is replayed from us, and what comes out at the end
        of the gap is known already to whoever is behind it.
        """
        peer, is_last = peers[index], index == len(peers) - 1
        if self.request.relayed or index == 0:
            into = [_Leg(None, peer, True)]
        else:
            into = list(self._legs(peers[index - 1], peer))
        if is_last:
            return into, [_Leg(peer, None, False)]
        return into, [_Leg(peer, None, True)] if self.request.relayed else []

    def _decode_legs(self, peers: Sequence[PeerId], index: int) -> list[_Leg]:
        """The moves of a token that are charged to a hop: to it, and the one back to the client
        (or to what follows a repaired gap) if its output goes there."""
        peer, request = peers[index], self.request
        if request.relayed:
            return [_Leg(None, peer, True), _Leg(peer, None, True)]
        before = peers[index - 1] if index else request.before
        legs = list(self._legs(before, peer))
        if index == len(peers) - 1:
            legs += self._legs(peer, request.after)
        return legs

    def _legs(self, source: End, target: End) -> Iterator[_Leg]:
        """The way from one end to another: by way of us, if the link is known to be broken."""
        if self.view.is_broken(source, target):
            yield _Leg(source, None, True)
            yield _Leg(None, target, True)
        else:
            yield _Leg(source, target, True)

    def _price_hop(
        self,
        server: ServerView,
        legs: Sequence[_Leg],
        num_bytes: dict[bool, float],
        compute_s: float,
    ) -> HopCost:
        links = [self.view.link(leg.source, leg.target) for leg in legs]
        return HopCost(
            rtt_s=sum(link.rtt_s / 2 for link in links),
            transfer_s=sum(
                num_bytes[leg.is_whole] / link.bandwidth_bytes_s
                for leg, link in zip(legs, links, strict=True)
            ),
            queue_s=server.expected_queue_s,
            compute_s=compute_s,
            overhead_s=self.view.overhead_s,
        )

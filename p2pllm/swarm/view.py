"""The swarm as one client sees it: a value that routes are planned on.

`SwarmView` joins what servers announce (`Presence`) with what this client measured itself
(`Measurements`: round trips, bandwidths, timings of its own steps, failures). Where both speak of
the same thing, the measurement wins while it is fresh: an announcement is up to 40 s old, and
nothing keeps a server from lying.

A view is frozen and knows the moment it was taken, so planning on it needs no clock. The same
value comes from the live tracker, from tests and from the simulator.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from p2pllm.ids import ModelId, PeerId
from p2pllm.metrics import MovingAverage
from p2pllm.spans import Span, uncovered
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.timings import SegmentStep

UNKNOWN_RTT_S = 0.3  # of a peer that nobody measured; Petals takes 0.15 s one way
UNKNOWN_BANDWIDTH_BYTES_S = 12.5e6  # 100 Mbit/s, as Petals takes without a speed test
FRESH_LINK_S = 300.0  # how long a measured link is believed; Petals' time to live of a ping
FRESH_TIMING_S = 60.0  # how long queue and compute times are: load moves faster than links
RTT_WINDOW_S = 60.0  # the smallest round trip of this long counts: what is above it is queueing
BROKEN_LINK_S = 120.0  # how long nobody is asked again to push where it could not
PENALTY_S = 15.0  # for the first failure, doubled for each one after it
MAX_PENALTY_S = 900.0
# A record lives as long: what is announced later was announced after the failure.
SUSPECT_S = 120.0
MIN_PREFILL_TOKENS = 16  # per sequence: shorter steps say little about the speed of prefill
ANNOUNCED_CHUNK_TOKENS = 256  # the step on which servers measure their prefill
MIN_RATE_BYTES_S = 1e3  # of a link; less is no link, or a lie
MAX_OVERHEAD_S = 0.02  # of a hop; what is above it is something else, and not learned
MIN_BANDWIDTH_BYTES = 64 * 2**10  # smaller transfers measure the round trip, not the bandwidth
MAX_PEERS = 2048  # whose measurements are kept; the longest untouched go first
MAX_LINKS = 8192

End = PeerId | None  # one end of a link; None is this client
K = TypeVar("K")
V = TypeVar("V")


class LinkSource(enum.Enum):
    """How a round trip is known, best first."""

    MEASURED = "measured"  # by this client's pings, or by its traffic through the two servers
    ANNOUNCED = "announced"  # by one of the two servers
    ESTIMATED = "estimated"  # from this client's distance to both


@dataclass(frozen=True, slots=True)
class LinkView:
    """What is known of the way from one peer to another."""

    rtt_s: float
    bandwidth_bytes_s: float
    source: LinkSource


@dataclass(frozen=True, slots=True)
class ServerView:
    """One server: its word, and what this client measured (None: nothing fresh)."""

    presence: Presence
    rtt_s: float | None = None
    queue_s: float | None = None
    seconds_per_block_1: float | None = None  # decode at batch 1, from steps of any batch
    prefill_tokens_s: float | None = None  # tokens × blocks per second, in a step of 256 tokens
    cache_wait_s: float = 0.0  # the server asked us to wait this much longer for K/V cache
    penalty_until: float = 0.0  # monotonic; it failed us, and is a last resort until then
    suspect_until: float = 0.0  # and until then, unless it answers a ping or a step before

    @property
    def peer_id(self) -> PeerId:
        return self.presence.peer_id

    @property
    def span(self) -> Span:
        return self.presence.span

    @property
    def expected_queue_s(self) -> float:
        """How long a step will wait before it is computed."""
        return self.presence.queue_s if self.queue_s is None else self.queue_s

    @property
    def expected_prefill_tokens_s(self) -> float:
        """Tokens × blocks per second while reading a prompt."""
        measured, said = self.prefill_tokens_s, self.presence
        return said.prefill_tokens_s / said.prefill_slowdown if measured is None else measured

    def seconds_per_block(self, batch: int) -> float:
        """One decode step of one block for `batch` sequences: our measurement scaled by the
        announced curve, or the announcement itself."""
        announced = self.presence.seconds_per_block(batch)
        if self.seconds_per_block_1 is None:
            return announced
        return self.seconds_per_block_1 * announced / self.presence.seconds_per_block_1

    def prefill_block_s(self, num_tokens: int) -> float:
        """One block over a step of so many tokens of a prompt: the line through the announced
        or measured step of one token and that of `ANNOUNCED_CHUNK_TOKENS`."""
        one_s = self.seconds_per_block(1)
        return _prefill_line(one_s, self.expected_prefill_tokens_s, num_tokens)


@dataclass(frozen=True)  # without slots: the cached properties need a place
class SwarmView:
    """All servers of one model at the moment `taken_at` (monotonic seconds)."""

    model: ModelId
    num_blocks: int
    servers: tuple[ServerView, ...] = ()
    measured_links: Mapping[tuple[End, End], LinkView] = field(default_factory=dict)
    taken_at: float = 0.0
    broken_links: frozenset[tuple[PeerId, PeerId]] = frozenset()  # the first cannot push there
    overhead_s: float = 0.0  # what a hop costs beyond link, queue and computation

    @cached_property
    def by_peer(self) -> dict[PeerId, ServerView]:
        """The servers by their PeerId."""
        return {server.peer_id: server for server in self.servers}

    @cached_property
    def announced_rtts(self) -> dict[tuple[PeerId, PeerId], float]:
        """What the servers say of their round trips to each other, as (from, to)."""
        return {
            (server.peer_id, peer): rtt_s
            for server in self.servers
            for peer, rtt_s in server.presence.rtts
        }

    @cached_property
    def known_links(self) -> dict[PeerId, dict[PeerId, LinkView]]:
        """For each server the links to others whose round trip is measured or announced, or that
        are known to be broken; all other ones `link` estimates as max(client_rtt_s of both)."""
        links: dict[PeerId, dict[PeerId, LinkView]] = {}
        for source, target in [*self.measured_links, *self.announced_rtts, *self.broken_links]:
            if source is not None and target is not None:
                for one, other in ((source, target), (target, source)):
                    known = links.setdefault(one, {})
                    if other not in known:
                        known[other] = self.link(one, other)
        return links

    def is_penalised(self, server: ServerView) -> bool:
        """Did it fail us a short while ago, or is it not known whether it has come back?"""
        return max(server.penalty_until, server.suspect_until) > self.taken_at

    def is_broken(self, source: End, target: End) -> bool:
        """Did `source` lately fail to reach `target`, so that the client has to relay?"""
        return (source, target) in self.broken_links

    def by_block(self) -> tuple[tuple[ServerView, ...], ...]:
        """For every block the online servers that have it."""
        online = [s for s in self.servers if s.presence.state is ServerState.ONLINE]
        return tuple(
            tuple(server for server in online if block in server.span)
            for block in range(self.num_blocks)
        )

    def missing(self, span: Span | None = None) -> tuple[Span, ...]:
        """The spans (of `span`, or of the model) that no online server has."""
        online = (s.span for s in self.servers if s.presence.state is ServerState.ONLINE)
        return uncovered(span or Span(0, self.num_blocks), online)

    def client_rtt_s(self, peer: PeerId) -> float:
        """The round trip from this client, or `UNKNOWN_RTT_S`."""
        server = self.by_peer.get(peer)
        return UNKNOWN_RTT_S if server is None or server.rtt_s is None else server.rtt_s

    def link(self, source: End, target: End) -> LinkView:
        """The way from `source` to `target`, by the best knowledge there is.

        Between two servers that nobody measured, the triangle inequality bounds the round trip
        by |a - b| and a + b, where a and b are their distances from us; the estimate is the
        middle of these, max(a, b).
        """
        measured = self.measured_links.get((source, target))
        if measured is not None:
            return measured
        bandwidth = UNKNOWN_BANDWIDTH_BYTES_S
        if source is None or target is None:
            peer = target if source is None else source
            server = self.by_peer.get(peer) if peer is not None else None
            if server is None or server.rtt_s is None:
                return LinkView(UNKNOWN_RTT_S, bandwidth, LinkSource.ESTIMATED)
            return LinkView(server.rtt_s, bandwidth, LinkSource.MEASURED)
        announced = self.announced_rtts.get((source, target))
        if announced is None:
            announced = self.announced_rtts.get((target, source))
        if announced is not None:
            return LinkView(announced, bandwidth, LinkSource.ANNOUNCED)
        estimate = max(self.client_rtt_s(source), self.client_rtt_s(target))
        return LinkView(estimate, bandwidth, LinkSource.ESTIMATED)


@dataclass
class _Fresh:
    """A moving average that is forgotten when nothing new comes for a while."""

    average: MovingAverage = field(default_factory=MovingAverage)
    updated_at: float = float("-inf")

    def add(self, sample: float, now: float, max_age_s: float) -> None:
        if now - self.updated_at > max_age_s:
            self.average = MovingAverage()  # what is that old should not weigh on the new
        self.average.add(sample)
        self.updated_at = now

    def get(self, now: float, max_age_s: float) -> float | None:
        return self.average.value if now - self.updated_at <= max_age_s else None


@dataclass
class _Smallest:
    """The smallest sample of the last `RTT_WINDOW_S`, or the last one if none is that young.

    Kept as the minima of two half windows, so that it needs no list.
    """

    older: float | None = None
    newer: float | None = None
    half_since: float = float("-inf")
    updated_at: float = float("-inf")

    def add(self, sample: float, now: float) -> None:
        age_s = now - self.half_since
        if age_s > RTT_WINDOW_S / 2:
            self.older = self.newer if age_s <= RTT_WINDOW_S else None
            self.newer, self.half_since = sample, now
        else:
            self.newer = sample if self.newer is None else min(self.newer, sample)
        self.updated_at = now

    def get(self, now: float, max_age_s: float) -> float | None:
        if now - self.updated_at > max_age_s:
            return None
        return min((s for s in (self.older, self.newer) if s is not None), default=None)


@dataclass
class _PeerFacts:
    """What we measured at one server."""

    queue_s: _Fresh = field(default_factory=_Fresh)
    decode_s: _Fresh = field(default_factory=_Fresh)  # seconds per block and step
    decode_batch: _Fresh = field(default_factory=_Fresh)  # at this many sequences on average
    prefill_s: _Fresh = field(default_factory=_Fresh)  # seconds per block and step
    prefill_tokens: _Fresh = field(default_factory=_Fresh)  # in a step of so many tokens
    num_failures: int = 0  # since the last step that worked
    penalty_until: float = 0.0
    suspect_until: float = 0.0
    cache_until: float = 0.0


@dataclass
class _LinkFacts:
    rtt_s: _Smallest = field(default_factory=_Smallest)
    bandwidth_bytes_s: _Fresh = field(default_factory=_Fresh)
    broken_until: float = 0.0


class Measurements:
    """Collects what this client measures, in bounded memory. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, _PeerFacts] = {}
        self._links: dict[tuple[End, End], _LinkFacts] = {}
        self._overhead_s = _Fresh()

    def on_rtt(self, source: End, target: End, rtt_s: float, now: float) -> None:
        """A round trip was measured; it counts for both directions.

        A server that answers us is not suspected any more. A penalty that runs stays: one may
        answer pings and fail at all else.
        """
        for ends in ((source, target), (target, source)):
            facts = _touch(self._links, ends, _LinkFacts, MAX_LINKS)
            facts.rtt_s.add(max(0.0, rtt_s), now)
        peer = self._peers.get(target) if source is None and target is not None else None
        if peer is not None:
            peer.suspect_until = 0.0

    def on_rate(self, source: End, target: End, bytes_s: float, now: float) -> None:
        """The rate of delivery from `source` to `target`, as a transport measured it."""
        facts = _touch(self._links, (source, target), _LinkFacts, MAX_LINKS)
        facts.bandwidth_bytes_s.add(max(bytes_s, MIN_RATE_BYTES_S), now, FRESH_LINK_S)

    def on_link_broken(self, source: PeerId, target: PeerId, now: float) -> None:
        """`source` could not reach `target`: for a while the client relays between them.

        Neither is penalised: both may be well, with a firewall between them.
        """
        facts = _touch(self._links, (source, target), _LinkFacts, MAX_LINKS)
        facts.broken_until = now + BROKEN_LINK_S

    def on_segment(self, step: SegmentStep, now: float) -> None:
        """A step came back through hops that push to each other: what its timings tell."""
        shares = step.shares()
        if not shares:
            return
        if step.rtt_s:
            self._on_link(None, step.peers[0], step.rtt_s, step.rate_bytes_s, now)
        followers: tuple[End, ...] = (*step.peers[1:], None)
        for peer, span, share, after in zip(step.peers, step.spans, shares, followers, strict=True):
            self.on_step(
                peer,
                num_blocks=len(span),
                batch=step.batch,
                num_tokens=step.num_tokens,
                queue_s=share.queue_s,
                compute_s=share.compute_s,
                now=now,
            )
            if share.next_rtt_s:
                self._on_link(peer, after, share.next_rtt_s, share.next_rate_bytes_s, now)
        overhead_s = step.overhead_s() if step.is_decode else None
        if overhead_s is not None and overhead_s <= MAX_OVERHEAD_S:
            self._overhead_s.add(overhead_s, now, FRESH_LINK_S)

    def _on_link(self, source: End, target: End, rtt_s: float, rate: float, now: float) -> None:
        self.on_rtt(source, target, rtt_s, now)
        self._links[source, target].broken_until = 0.0
        if rate:
            self.on_rate(source, target, rate, now)

    def on_transfer(
        self, source: End, target: End, num_bytes: int, seconds: float, now: float
    ) -> None:
        """`num_bytes` took `seconds` on the link, the delay not counted in."""
        if num_bytes < MIN_BANDWIDTH_BYTES or seconds <= 0:
            return
        facts = _touch(self._links, (source, target), _LinkFacts, MAX_LINKS)
        facts.bandwidth_bytes_s.add(num_bytes / seconds, now, FRESH_LINK_S)

    def on_step(
        self,
        peer: PeerId,
        *,
        num_blocks: int,
        batch: int,
        num_tokens: int,
        queue_s: float,
        compute_s: float,
        now: float,
    ) -> None:
        """A hop reported its timings of a step with `num_tokens` over `batch` sequences.

        It works, so its next failure counts as the first one. A penalty that still runs stays:
        it came from another session, which would otherwise be sent straight back. Only decode
        steps tell of the queue: the chunks of a prompt queue up behind each other.
        """
        facts = _touch(self._peers, peer, _PeerFacts, MAX_PEERS)
        facts.num_failures, facts.cache_until, facts.suspect_until = 0, 0.0, 0.0
        block_s = max(compute_s, 1e-9) / num_blocks
        if num_tokens == batch:
            facts.queue_s.add(max(0.0, queue_s), now, FRESH_TIMING_S)
            facts.decode_s.add(block_s, now, FRESH_TIMING_S)
            facts.decode_batch.add(batch, now, FRESH_TIMING_S)
        elif num_tokens >= batch * MIN_PREFILL_TOKENS:
            facts.prefill_s.add(block_s, now, FRESH_TIMING_S)
            facts.prefill_tokens.add(num_tokens, now, FRESH_TIMING_S)

    def on_failure(self, peer: PeerId, now: float) -> None:
        """The server failed us: a last resort for a while, longer with every failure in a row.

        After that it stays one until it answers again, at most for as long as its announcement
        may outlive it. Not for a failure to reach *another* server: that is `on_link_broken`.
        """
        facts = _touch(self._peers, peer, _PeerFacts, MAX_PEERS)
        penalty_s = min(PENALTY_S * 2.0 ** min(facts.num_failures, 16), MAX_PENALTY_S)
        facts.num_failures += 1
        facts.penalty_until = now + penalty_s
        facts.suspect_until = now + SUSPECT_S

    def on_cache_full(self, peer: PeerId, retry_after_s: float, now: float) -> None:
        """The server has no K/V cache for us before `retry_after_s` is over; no failure."""
        facts = _touch(self._peers, peer, _PeerFacts, MAX_PEERS)
        facts.cache_until = now + min(max(retry_after_s, 0.0), MAX_PENALTY_S)

    def server(self, presence: Presence, now: float) -> ServerView:
        """The server with what is known of it now."""
        link = self._links.get((None, presence.peer_id))
        rtt_s = link.rtt_s.get(now, FRESH_LINK_S) if link else None
        facts = self._peers.get(presence.peer_id)
        if facts is None:
            return ServerView(presence, rtt_s)
        decode_s = facts.decode_s.get(now, FRESH_TIMING_S)
        if decode_s is not None:
            batch = facts.decode_batch.average.get(1.0)
            announced = presence.seconds_per_block(round(batch))
            decode_s *= presence.seconds_per_block_1 / announced
        return ServerView(
            presence,
            rtt_s,
            queue_s=facts.queue_s.get(now, FRESH_TIMING_S),
            seconds_per_block_1=decode_s,
            prefill_tokens_s=_measured_rate(presence, facts, now),
            cache_wait_s=max(0.0, facts.cache_until - now),
            penalty_until=facts.penalty_until,
            suspect_until=facts.suspect_until,
        )

    def links(self, now: float) -> dict[tuple[End, End], LinkView]:
        """All links whose round trip is freshly measured."""
        views: dict[tuple[End, End], LinkView] = {}
        for ends, facts in self._links.items():
            rtt_s = facts.rtt_s.get(now, FRESH_LINK_S)
            if rtt_s is not None:
                bandwidth = facts.bandwidth_bytes_s.get(now, FRESH_LINK_S)
                views[ends] = LinkView(
                    rtt_s, bandwidth or UNKNOWN_BANDWIDTH_BYTES_S, LinkSource.MEASURED
                )
        return views

    def broken_links(self, now: float) -> frozenset[tuple[PeerId, PeerId]]:
        """The links on which servers lately failed to push."""
        return frozenset(
            (source, target)
            for (source, target), facts in self._links.items()
            if facts.broken_until > now and source is not None and target is not None
        )

    def overhead_s(self, now: float) -> float:
        """What a hop costs beyond link, queue and computation; 0 while not measured."""
        return self._overhead_s.get(now, FRESH_LINK_S) or 0.0


def build_view(
    model: ModelId,
    num_blocks: int,
    presences: Iterable[Presence],
    measurements: Measurements,
    now: float,
) -> SwarmView:
    """The view at `now`. Servers whose span is not of this model are left out; order is that of
    the PeerIds, so that equal knowledge gives an equal view."""
    fitting = [presence for presence in presences if presence.span.stop <= num_blocks]
    servers = [measurements.server(presence, now) for presence in fitting]
    servers.sort(key=lambda server: server.peer_id)
    return SwarmView(
        model,
        num_blocks,
        tuple(servers),
        measurements.links(now),
        now,
        measurements.broken_links(now),
        measurements.overhead_s(now),
    )


def _prefill_line(one_s: float, tokens_s: float, num_tokens: float) -> float:
    """Seconds per block of a step, by the line through 1 and `ANNOUNCED_CHUNK_TOKENS` tokens."""
    chunk = ANNOUNCED_CHUNK_TOKENS
    slope_s = max(0.0, chunk / tokens_s - one_s) / (chunk - 1)
    return one_s + slope_s * (max(num_tokens, 1) - 1)


def _measured_rate(presence: Presence, facts: _PeerFacts, now: float) -> float | None:
    """Tokens × blocks per second in a step of `ANNOUNCED_CHUNK_TOKENS`: the announced figure,
    wrong by the same factor as it was for the steps that we measured."""
    measured_s = facts.prefill_s.get(now, FRESH_TIMING_S)
    if measured_s is None:
        return None
    num_tokens = facts.prefill_tokens.average.get(1.0)
    rate = presence.prefill_tokens_s
    announced_s = _prefill_line(presence.seconds_per_block_1, rate, num_tokens)
    return rate * announced_s / measured_s


def _touch(table: dict[K, V], key: K, make: type[V], max_items: int) -> V:
    """The entry of `key`, made if new, moved to the end; the first one goes if there are many."""
    facts = table.pop(key, None) or make()
    table[key] = facts
    if len(table) > max_items:
        del table[next(iter(table))]
    return facts

"""Routes of one model, as its client plans them: for a new chain, and for a gap in one.

What comes from where: the view of the swarm from the tracker, the choice from the planner
(`p2pllm.routing`), the servers' signed records, which others need to reach them, from the DHT.
What a chain measures and suffers goes back into the tracker's measurements, for the next plan.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

from p2pllm.client.recovery import Gap
from p2pllm.client.session import Prospect
from p2pllm.client.state import Hop, SessionState
from p2pllm.config import ClientConfig
from p2pllm.errors import LookupFailed
from p2pllm.ids import PeerId
from p2pllm.metrics import MovingAverage
from p2pllm.net.endpoint import Endpoint
from p2pllm.routing.moving import should_move
from p2pllm.routing.planner import Route, RouteRequest, plan
from p2pllm.routing.request import Objective
from p2pllm.spans import Span
from p2pllm.swarm.timings import SegmentStep
from p2pllm.swarm.tracker import SwarmTracker
from p2pllm.swarm.view import SwarmView
from p2pllm.tasks import together
from p2pllm.wire.messages import HopTiming, Numerics
from p2pllm.wire.records import Record

logger = logging.getLogger(__name__)

RECORD_FRESH_S = 60.0  # a peer record lives ten minutes, and addresses change seldom
RECORD_GOOD_S = 300.0  # of the ten minutes that one lives
NEVER = float("-inf")
MAX_RECORDS = 1024


class ModelRoutes:
    """Plans on what is known of the swarm, and learns (`recovery.Routes`)."""

    def __init__(
        self,
        endpoint: Endpoint,
        tracker: SwarmTracker,
        find_record: Callable[[PeerId], Awaitable[Record | None]],
        settings: ClientConfig,
        bytes_per_token: int,
        kv_bytes: int,
    ) -> None:
        """`bytes_per_token`: of a coded hidden state; `kv_bytes`: of one token's keys and values
        in one block."""
        self.tracker = tracker
        self._endpoint = endpoint
        self._find_record = find_record
        self._settings = settings
        self._bytes_per_token = bytes_per_token
        self._kv_bytes = kv_bytes
        self._own_step_s = MovingAverage()
        self._last_timings: tuple[HopTiming, ...] = ()  # of a message that has taught us
        self._records: dict[PeerId, tuple[bytes, float]] = {}  # signed, and when it was read

    # --- planning ----------------------------------------------------------------------------

    def request(self, prompt_tokens: int, new_tokens: int, batch: int) -> RouteRequest:
        """What is asked of a route for the whole model."""
        return RouteRequest(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            max_tokens=prompt_tokens + new_tokens,
            activation_bytes_per_token=self._bytes_per_token,
            chunk_tokens=self._settings.prefill_chunk_tokens,
            own_step_s=self._own_step_s.get(0.0),
            relayed=not self._settings.is_chained,
            seed=int.from_bytes(self._endpoint.peer_id.key[:7], "big"),
        )

    async def replan(self, gap: Gap) -> tuple[Hop, ...]:
        """Servers for a gap in a chain; raises NoRoute or LookupFailed."""
        view = await self.tracker.fresh_view()
        request = RouteRequest(
            prompt_tokens=gap.replay_tokens,
            new_tokens=max(0, gap.max_tokens - gap.replay_tokens),
            batch=gap.batch,
            max_tokens=gap.max_tokens,
            chunk_tokens=self._settings.prefill_chunk_tokens,
            activation_bytes_per_token=self._bytes_per_token,
            span=gap.span,
            before=gap.before,
            after=gap.after,
            excluded=gap.excluded,
            relayed=not self._settings.is_chained,
            numerics=gap.numerics,
            seed=int.from_bytes(self._endpoint.peer_id.key[:7], "big"),
        )
        return await self.hops(view, plan(view, request))

    async def without_sessions(
        self,
        span: Span,
        *,
        num_tokens: int,
        excluded: frozenset[PeerId],
        numerics: Numerics | None,
    ) -> tuple[Hop, ...]:
        """Servers for a batch of so many tokens that goes through in micro-batches, once.

        The quickest for that: its way is a prompt's, that we carry, and it needs no cache. Raises
        NoRoute or LookupFailed.
        """
        view = await self.tracker.fresh_view()
        request = RouteRequest(
            prompt_tokens=num_tokens,
            new_tokens=0,
            max_tokens=1,
            chunk_tokens=self._settings.micro_batch_tokens,
            activation_bytes_per_token=self._bytes_per_token,
            objective=Objective.FIRST_TOKEN,
            span=span,
            excluded=excluded,
            numerics=numerics,
            seed=int.from_bytes(self._endpoint.peer_id.key[:7], "big"),
        )
        return tuple(
            Hop(hop.peer_id, hop.span, view.by_peer[hop.peer_id].presence.numerics)
            for hop in plan(view, request).hops
        )

    async def hops(self, view: SwarmView, route: Route) -> tuple[Hop, ...]:
        """A route's hops, with what they need to reach each other."""
        numerics = [view.by_peer[hop.peer_id].presence.numerics for hop in route.hops]
        hops = [
            Hop(hop.peer_id, hop.span, its, record_at=NEVER)
            for hop, its in zip(route.hops, numerics, strict=True)
        ]
        return await self.fresh(hops)

    async def fresh(self, hops: Sequence[Hop]) -> tuple[Hop, ...]:
        """The same hops, with records that servers will believe for a while."""
        now = asyncio.get_running_loop().time()

        async def refresh(hop: Hop) -> Hop:
            if now - hop.record_at < RECORD_GOOD_S:
                return hop
            record = await self._record_of(hop.peer)
            return replace(hop, record=record or hop.record, record_at=now)

        return tuple(await together(map(refresh, hops)))

    async def _record_of(self, peer: PeerId) -> bytes:
        """A server's signed peer record, for its predecessor; empty if we relay that link."""
        if not self._settings.is_chained:
            return b""
        now = asyncio.get_running_loop().time()
        known = self._records.get(peer)
        if known is not None and now - known[1] < RECORD_FRESH_S:
            return known[0]
        try:
            record = await self._find_record(peer)
        except LookupFailed as exc:
            logger.info("peer record not found peer=%s reason=%s", peer.short, exc)
            return b""
        if record is None:  # it may have joined a moment ago: the next route asks again
            return b""
        found = record.to_bytes()
        if len(self._records) >= MAX_RECORDS:
            self._records.clear()
        self._records[peer] = (found, now)
        return found

    async def hops_of(self, route: Route) -> tuple[Hop, ...]:
        """A route's hops, on the swarm as it is known now."""
        return await self.hops(self.tracker.view(), route)

    def reconsider(
        self, prospect: Prospect, measured_s: float, states: Sequence[SessionState]
    ) -> Prospect | None:
        """A better route for what is left of some sequences, or None to stay."""
        request = replace(
            prospect.request,
            prompt_tokens=max((state.position for state in states), default=1),
            new_tokens=max((state.max_tokens - state.position for state in states), default=0),
            batch=max(1, len(states)),
        )
        measured_s += request.own_step_s
        better = should_move(prospect.route, measured_s, self.tracker.view(), request)
        return None if better is None else Prospect(better, request)

    def is_pull_cheaper(self, source: Hop, hops: Sequence[Hop], num_tokens: int) -> bool:
        """Do these hops get keys and values sooner from `source` than by computing them again?"""
        view = self.tracker.view()
        pull_s, compute_s = 0.0, 0.0
        for hop in hops:
            server = view.by_peer.get(hop.peer)
            if not source.record or hop.numerics != source.numerics or server is None:
                return False
            link, num_blocks = view.link(source.peer, hop.peer), len(hop.span)
            num_bytes = num_tokens * num_blocks * self._kv_bytes
            pull_s += link.rtt_s + num_bytes / link.bandwidth_bytes_s
            compute_s += num_tokens * num_blocks / server.expected_prefill_tokens_s
        return pull_s < compute_s

    async def wait(self, seconds: float) -> None:
        """Let time go by, less if the swarm changes."""
        await self.tracker.wait_for_change(seconds)

    def slowest_rate(self, hops: Iterable[Hop]) -> float | None:
        """Of our links to some hops, the lowest rate that was measured, in bytes/s."""
        rates = [self._endpoint.rate_bytes_s(hop.peer) for hop in hops]
        return min((rate for rate in rates if rate is not None), default=None)

    # --- learning ----------------------------------------------------------------------------

    def on_failure(self, peer: PeerId) -> None:
        """A server has failed us: a last resort for a while."""
        self.tracker.measurements.on_failure(peer, asyncio.get_running_loop().time())

    def on_full(self, peer: PeerId, retry_after_s: float) -> None:
        """A server has no room for us."""
        now = asyncio.get_running_loop().time()
        self.tracker.measurements.on_cache_full(peer, retry_after_s, now)

    def on_link_broken(self, source: PeerId, target: PeerId) -> None:
        """One server could not reach another one."""
        now = asyncio.get_running_loop().time()
        self.tracker.measurements.on_link_broken(source, target, now)

    def on_own_step(self, seconds: float) -> None:
        """What this client itself computes for each new token."""
        self._own_step_s.add(seconds)

    def on_segment(self, step: SegmentStep) -> None:
        """A step teaches what links, queues and computation cost.

        Steps that travelled in one message say the same, once.
        """
        is_new = step.timings is not self._last_timings or not step.timings
        if is_new and not step.is_replay:
            self._last_timings = step.timings
            self.tracker.measurements.on_segment(step, asyncio.get_running_loop().time())

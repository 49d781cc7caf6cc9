"""Where this server's blocks should be, asked of the swarm: before the first load, and ever after.

*Joining.* Servers that start together would all choose the same span. So a server announces what
it has chosen before it loads, looks again after a moment and once more when it has loaded, and
those who chose alike part by the order of their PeerIds (`placement.settle`).

*Moving.* `MoveRule` says when it is our turn to go, on what we read in the DHT, less the servers
that do not answer: at each look a chain of them is pinged, one that covers all blocks, so a span
whose servers were killed is seen within a look and not when their records expire. Before anything
is given up,

1. our intention is stored in the DHT, and *then* the swarm is read again and the move judged once
   more, with everybody else where they intend to be: of two who would do the same, one reads what
   the other has stored;
2. when the new blocks are loaded, each block that we leave needs another server that promises to
   keep it: a record is no server, and may be older than its server's own plans.

This is the shell around `p2pllm.routing`; what a move does is in `p2pllm.server.server`.
"""

import asyncio
import logging
import random
import statistics
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from p2pllm.errors import LookupFailed, NotServed, P2PLLMError
from p2pllm.ids import ModelId, PeerId
from p2pllm.net.rpc import Request
from p2pllm.routing.placement import (
    Move,
    Placed,
    Placement,
    choose_span,
    holders_to_check,
    is_still_right,
    settle,
)
from p2pllm.routing.rebalancing import MoveRule, Promises
from p2pllm.server.announcer import Announcer
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.node import Node
from p2pllm.swarm.tracker import read_presences
from p2pllm.tasks import together
from p2pllm.wire.messages import Ack, Message, Stay

logger = logging.getLogger(__name__)

SETTLE_S = (0.5, 1.5)  # before we look whether others have chosen alike: a lookup takes less
MAX_SETTLES = 4  # each look ends a conflict of two; whoever is still wrong moves later
JITTER = 0.3  # of the pause between two looks: servers that started together drift apart
PING_TIMEOUT_S = 2.0
GONE_S = 60.0  # how long we believe that a server is gone which did not answer
GUESSED_RATE = 1e4  # tokens × blocks per second of a swarm's first server, before it measures

MayLeave = Callable[[], Awaitable[bool]]
MoveTo = Callable[[Span, MayLeave], Awaitable[None]]


class Balancer:
    """Looks at the swarm on behalf of one server. Others' presences are read, ours is announced."""

    def __init__(
        self, node: Node, announcer: Announcer, model: ModelId, num_blocks: int, rng: random.Random
    ) -> None:
        """`num_blocks`: of the model."""
        self._node = node
        self._announcer = announcer
        self._model = model
        self._num_blocks = num_blocks
        self._rng = rng
        self._promises = Promises()
        self._alive: set[PeerId] = set()  # answered at the last look
        self._gone: dict[PeerId, float] = {}  # did not answer; believed until then

    # --- joining -------------------------------------------------------------------------------

    async def take_place(self, num_blocks: int, kept: Span | None) -> Span:
        """Choose a span and announce that we are going to load it.

        `kept` is where we were before, and go again if that is good enough.
        """
        others = await self._others()
        span = choose_span(others, num_blocks, kept=kept)
        for _ in range(MAX_SETTLES):
            self._announcer.join(span, _usual_rate(others), is_movable=True)
            await self._announcer.told()
            await asyncio.sleep(self._rng.uniform(*SETTLE_S))
            others = await self._others()
            chosen, span = span, self._settled(others)
            if span == chosen:
                break
            logger.info("span taken by another from=%s to=%s", chosen, span)
        return span

    async def look_again(self) -> Span:
        """Where we should be, now that our blocks are loaded and others have chosen theirs.

        Announced, if it is not where we are.
        """
        others = await self._others()
        span = self._settled(others)
        if span != self._announcer.presence().span:
            self._announcer.join(span, _usual_rate(others), is_movable=True)
        return span

    def _settled(self, others: Placement) -> Span:
        return settle(self._with_us(others), self._node.peer_id)

    # --- moving --------------------------------------------------------------------------------

    def bind(self) -> None:
        """Answer others who are about to leave blocks that we have."""
        self._node.endpoint.handle(Stay, self._on_stay)

    async def run(self, move: MoveTo) -> None:
        """Look, and `move` when that is right, until cancelled.

        `move(span, may_leave)` calls `may_leave()` before it gives anything up. False, or a
        P2PLLMError of `move`, means that we still serve what we did.
        """
        rule = MoveRule(self._node.peer_id, self._now())
        while True:
            await asyncio.sleep(rule.next_look_s * self._rng.uniform(1 - JITTER, 1 + JITTER))
            try:
                span = rule.on_look(self._with_us(await self._living()), self._now())
                if span is not None:
                    await self._try_move(span, move)
                    rule.on_moved(self._now())
            except P2PLLMError as exc:
                logger.warning("placement not looked at reason=%s", exc)

    async def _try_move(self, span: Span, move: MoveTo) -> None:
        announcer, here = self._announcer, self._announcer.presence().span
        leaving = [block for block in here if block not in span]
        if not self._promises.begin(leaving, self._now()):
            logger.info("move put off, others rely on us from=%s to=%s", here, span)
            return
        try:
            announcer.plan_move(span)
            await announcer.told()
            await asyncio.sleep(self._rng.uniform(*SETTLE_S))
            placement = self._with_us(await self._living())
            if not is_still_right(placement, Move(self._node.peer_id, span)):
                logger.info("move given up from=%s to=%s", here, span)
                return
            logger.info("moving from=%s to=%s", here, span)
            await move(span, partial(self._are_kept, leaving))
        except P2PLLMError as exc:
            logger.warning("move failed from=%s to=%s reason=%s", here, span, exc)
        finally:
            self._promises.end()
            if announcer.presence().next_span is not None:
                announcer.plan_move(None)

    async def _are_kept(self, blocks: Sequence[int]) -> bool:
        """Has each of these blocks another server that promises to keep it?"""
        others = await self._others()

        async def promises(peer: PeerId) -> bool:
            """Asked for what it has of the blocks, which lie side by side at one end of ours."""
            held = [block for block in blocks if block in (others.by_peer[peer].holds or ())]
            span = Span(held[0], held[-1] + 1)
            message = Stay(self._model, span)
            try:
                await self._node.endpoint.request(peer, message, timeout_s=PING_TIMEOUT_S)
            except P2PLLMError as exc:
                logger.info("no promise to stay peer=%s reason=%s", peer.short, exc)
                return False
            return True

        staying, _ = await self._ask_a_chain(others, blocks, promises)
        kept = others.only(staying).num_holders
        return all(kept[block] for block in blocks)

    async def _on_stay(self, request: Request[Stay]) -> Message:
        presence, span = self._announcer.presence(), request.message.span
        is_ours = request.message.model == self._model and presence.state is ServerState.ONLINE
        if not is_ours or not self._promises.promise(span, presence.span, self._now()):
            raise NotServed(f"blocks {span} may not stay here")
        return Ack()

    # --- what we know of the others ------------------------------------------------------------

    async def _living(self) -> Placement:
        """The others, less those that were pinged and did not answer.

        Every block that we do not have is checked for a living holder.
        """
        others = await self._others()
        here = self._announcer.presence().span
        blocks = [block for block in range(self._num_blocks) if block not in here]
        self._alive, silent = await self._ask_a_chain(others, blocks, self._answers)
        now = self._now()
        self._gone = {
            peer: until
            for peer, until in self._gone.items()
            if until > now and peer not in self._alive
        }
        self._gone.update(dict.fromkeys(silent, now + GONE_S))
        return others.without(self._gone)

    async def _ask_a_chain(
        self,
        others: Placement,
        blocks: Iterable[int],
        ask: Callable[[PeerId], Coroutine[Any, Any, bool]],
    ) -> tuple[set[PeerId], set[PeerId]]:
        """Ask until each block has a server that says yes, or none is left: (yes, no)."""
        yes, no = set[PeerId](), set[PeerId]()
        while asked := holders_to_check(others, blocks, alive=yes, gone=no, trusted=self._alive):
            answers = await together(ask(peer) for peer in asked)
            for peer, answer in zip(asked, answers, strict=True):
                (yes if answer else no).add(peer)
        return yes, no

    async def _answers(self, peer: PeerId) -> bool:
        try:
            await self._node.endpoint.ping(peer, timeout_s=PING_TIMEOUT_S)
        except P2PLLMError as exc:
            logger.info("holder does not answer peer=%s reason=%s", peer.short, exc)
            return False
        return True

    async def _others(self) -> Placement:
        try:
            presences = await read_presences(self._node.dht, self._model)
        except LookupFailed:  # we are the first
            presences = []
        own = self._node.peer_id
        return Placement.of((p for p in presences if p.peer_id != own), self._num_blocks)

    def _with_us(self, others: Placement) -> Placement:
        """The whole swarm: of ourselves we know better than the DHT."""
        own: Presence = replace(self._announcer.presence(), next_span=None)
        us = Placed.of(own)
        servers = [*others.servers, *([us] if us is not None else [])]
        return replace(others, servers=tuple(sorted(servers, key=lambda s: s.peer_id)))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _usual_rate(others: Placement) -> float:
    """What a server like others can do: before ours has measured itself."""
    return statistics.median(s.rate for s in others.servers) if others.servers else GUESSED_RATE

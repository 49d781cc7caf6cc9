"""Tells the swarm what this server offers, and keeps it true.

A presence is republished by the DHT for as long as the server lives; here it is changed when what
it says has changed enough to matter to a router, at most once in `UPDATE_S`. Now and then the
server also measures its round trips to servers that could be the next hop, which no client can
measure for it.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

from p2pllm.dht.node import Publication
from p2pllm.errors import P2PLLMError
from p2pllm.ids import ModelId, PeerId
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.server.serving import Serving
from p2pllm.server.throughput import Throughput
from p2pllm.spans import Span
from p2pllm.swarm.announcements import (
    MAX_RTTS,
    MODELS_NAME,
    MODELS_NAMESPACE,
    ModelListing,
    Presence,
    ServerState,
    presence_name,
)
from p2pllm.swarm.node import Node
from p2pllm.swarm.tracker import read_presences
from p2pllm.tasks import task_group
from p2pllm.wire.records import PRESENCE_NAMESPACE

logger = logging.getLogger(__name__)

UPDATE_S = 10.0  # eight stores per change; a swarm of 1,000 servers makes 800 a second at most
MATTERS = 0.2  # a change of free cache or queue by a fifth
MEASURE_S = 60.0
PING_TIMEOUT_S = 2.0
TOLD_S = 3.0  # storers answer within the DHT's timeout of 2 s, or are given up
WITHDRAW_S = 1.0  # leaving must be quick; whoever misses the tombstone sees the record expire


class Announcer:
    """A server's two records: its presence, and its entry in the index of models.

    `presence` says what never changes; its state and span come from `join` and `serve`. Nothing is
    published before the first of them.
    """

    def __init__(self, node: Node, model: ModelId, listing: ModelListing, presence: Presence):
        self._node = node
        self._model = model
        self._listing = listing
        self._presence = presence
        self._said = presence  # what was published last
        self._serving: Serving | None = None
        self._is_leaving = False
        self._has_moved = asyncio.Event()
        self._publications: list[Publication] = []  # of the presence, of the listing

    def presence(self) -> Presence:
        """What is true now."""
        presence, serving = self._presence, self._serving
        if self._is_leaving:
            presence = replace(presence, state=ServerState.DRAINING, next_span=None)
        if serving is None:
            return presence
        return replace(
            presence,
            free_tokens=serving.pages.num_free * PAGE_TOKENS,
            queue_s=serving.worker.queue_s,
            prefill_slowdown=serving.worker.prefill_slowdown,
        )

    # --- the states, each told at once ---------------------------------------------------------

    def join(self, span: Span, rate: float, *, is_movable: bool) -> None:
        """We are going to load these blocks, and others if somebody else has taken them.

        `rate` is a guess of tokens × blocks per second.
        """
        self._presence = replace(
            self._presence,
            span=span,
            state=ServerState.JOINING,
            prefill_tokens_s=rate,
            is_movable=is_movable,
        )
        self._say()

    def serve(self, serving: Serving, throughput: Throughput, *, is_movable: bool) -> None:
        """We serve these blocks, this fast, and others if the swarm needs them more."""
        self._serving = serving
        self._presence = replace(
            self._presence,
            span=serving.span,
            next_span=None,
            numerics=serving.service.offer.numerics,
            state=ServerState.ONLINE,
            seconds_per_block_1=throughput.seconds_per_block_1,
            seconds_per_block_8=throughput.seconds_per_block_8,
            prefill_tokens_s=throughput.prefill_tokens_s,
            rtts=(),
            is_movable=is_movable,
        )
        self._has_moved.set()
        self._say()

    def plan_move(self, span: Span | None) -> None:
        """We still serve, and are about to move there; None: we stay after all."""
        self._presence = replace(self._presence, next_span=span, state=ServerState.ONLINE)
        self._say()

    def drain_to(self, span: Span) -> None:
        """We take no new sessions here, and will serve these blocks next."""
        self._presence = replace(self._presence, next_span=span, state=ServerState.DRAINING)
        self._say()

    def leave(self) -> None:
        """We take no new sessions, and leave the swarm when the last one is gone."""
        self._is_leaving = True
        self._say()

    def _say(self) -> None:
        self._said = self.presence()
        if self._publications:
            self._publications[0].update(self._said.to_body())
            return
        dht, name = self._node.dht, presence_name(self._model)
        self._publications = [
            dht.publish(PRESENCE_NAMESPACE, name, self._said.to_body()),
            dht.publish(MODELS_NAMESPACE, MODELS_NAME, self._listing.to_body()),
        ]

    async def told(self) -> None:
        """Wait until the swarm has what was said last; gives up after `TOLD_S`."""
        try:
            async with asyncio.timeout(TOLD_S):
                await self._publications[0].wait()
        except TimeoutError:
            logger.info("presence not stored after_s=%.1f", TOLD_S)

    # --- while we serve ------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the presence true until cancelled."""
        async with task_group() as tasks:
            tasks.create_task(self._keep_true())
            tasks.create_task(self._measure_successors())

    async def withdraw(self) -> None:
        """Say that we leave; gives up after `WITHDRAW_S`."""
        try:
            async with asyncio.timeout(WITHDRAW_S), asyncio.TaskGroup() as tasks:
                for publication in self._publications:
                    tasks.create_task(publication.withdraw())
        except TimeoutError:
            logger.info("tombstones not confirmed after_s=%.1f", WITHDRAW_S)

    async def _keep_true(self) -> None:
        while True:
            await asyncio.sleep(UPDATE_S)
            if _matters(self._said, self.presence()):
                self._say()

    async def _measure_successors(self) -> None:
        while True:
            self._has_moved.clear()
            rtts = []
            for peer in await self._successors():
                try:
                    rtts.append(
                        (peer, await self._node.endpoint.ping(peer, timeout_s=PING_TIMEOUT_S))
                    )
                except P2PLLMError as exc:
                    logger.debug("successor not reached peer=%s reason=%s", peer.short, exc)
            if not self._has_moved.is_set():  # else they are successors of other blocks
                self._presence = replace(self._presence, rtts=tuple(rtts))
            with suppress(TimeoutError):
                async with asyncio.timeout(MEASURE_S):
                    await self._has_moved.wait()

    async def _successors(self) -> list[PeerId]:
        """Servers that hold the block after ours, at most `MAX_RTTS`, the longest reach first."""
        stop = self._presence.span.stop
        try:
            presences = await read_presences(self._node.dht, self._model)
        except P2PLLMError as exc:
            logger.debug("presences not read reason=%s", exc)
            return []
        own = self._node.peer_id
        found = [p for p in presences if stop in p.span and p.peer_id != own]
        found.sort(key=lambda presence: (-presence.span.stop, presence.peer_id))
        return [presence.peer_id for presence in found[:MAX_RTTS]]


def _matters(said: Presence, now: Presence) -> bool:
    """Would a router decide differently?"""
    free = abs(said.free_tokens - now.free_tokens) > MATTERS * max(said.free_tokens, PAGE_TOKENS)
    queue = abs(said.queue_s - now.queue_s) > max(MATTERS * said.queue_s, 0.01)
    rtts = {peer for peer, _ in said.rtts} != {peer for peer, _ in now.rtts}
    prefill = abs(said.prefill_slowdown / now.prefill_slowdown - 1) > MATTERS
    return free or queue or rtts or prefill or said.state != now.state

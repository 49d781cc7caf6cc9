"""Tells the swarm what this server offers, and keeps it true.

A presence is republished by the DHT for as long as the server lives; here it is changed when what
it says has changed enough to matter to a router, at most once in `UPDATE_S`. Now and then the
server also measures its round trips to servers that could be the next hop, which no client can
measure for it.
"""

import asyncio
import logging
from dataclasses import replace

from p2pllm.errors import P2PLLMError
from p2pllm.ids import PeerId
from p2pllm.server.handlers import Offer
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator
from p2pllm.server.throughput import Throughput
from p2pllm.server.worker import Worker
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
WITHDRAW_S = 1.0  # leaving must be quick; whoever misses the tombstone sees the record expire


class Announcer:
    """A server's two records: its presence, and its entry in the index of models."""

    def __init__(
        self,
        node: Node,
        offer: Offer,
        num_blocks: int,
        *,
        pages: PageAllocator,
        worker: Worker,
        throughput: Throughput,
        max_tokens_per_session: int,
        public_name: str,
        version: str,
    ) -> None:
        self._node = node
        self._pages = pages
        self._worker = worker
        self._state = ServerState.ONLINE
        self._presence = Presence(
            peer_id=node.peer_id,
            span=offer.span,
            numerics=offer.numerics,
            seconds_per_block_1=throughput.seconds_per_block_1,
            seconds_per_block_8=throughput.seconds_per_block_8,
            prefill_tokens_s=throughput.prefill_tokens_s,
            max_tokens_per_session=max_tokens_per_session,
            public_name=public_name,
            version=version,
        )
        self._model = offer.model
        listing = ModelListing(node.peer_id, offer.model, num_blocks, offer.hidden_size)
        self._listing = node.dht.publish(MODELS_NAMESPACE, MODELS_NAME, listing.to_body())
        self._publication = node.dht.publish(
            PRESENCE_NAMESPACE, presence_name(offer.model), self.presence().to_body()
        )

    def presence(self) -> Presence:
        """What is true now."""
        return replace(
            self._presence,
            state=self._state,
            free_tokens=self._pages.num_free * PAGE_TOKENS,
            queue_s=self._worker.queue_s,
        )

    async def run(self) -> None:
        """Keep the presence true until cancelled."""
        async with task_group() as tasks:
            tasks.create_task(self._keep_true())
            tasks.create_task(self._measure_successors())

    async def withdraw(self) -> None:
        """Say that we leave; gives up after `WITHDRAW_S`."""
        try:
            async with asyncio.timeout(WITHDRAW_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._publication.withdraw())
                tasks.create_task(self._listing.withdraw())
        except TimeoutError:
            logger.info("tombstones not confirmed after_s=%.1f", WITHDRAW_S)

    async def _keep_true(self) -> None:
        said = self.presence()
        while True:
            await asyncio.sleep(UPDATE_S)
            presence = self.presence()
            if _matters(said, presence):
                said = presence
                self._publication.update(presence.to_body())

    async def _measure_successors(self) -> None:
        while True:
            rtts = []
            for peer in await self._successors():
                try:
                    rtts.append(
                        (peer, await self._node.endpoint.ping(peer, timeout_s=PING_TIMEOUT_S))
                    )
                except P2PLLMError as exc:
                    logger.debug("successor not reached peer=%s reason=%s", peer.short, exc)
            self._presence = replace(self._presence, rtts=tuple(rtts))
            await asyncio.sleep(MEASURE_S)

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
    return free or queue or rtts or said.state != now.state

"""Keeps the view of one model's swarm fresh: the shell around `p2pllm.swarm.view`.

Twice per `view_refresh_s`, or when somebody asks, it reads all presences from the DHT and pings up
to `max_pings` servers. Any server may be a hop, so none is left out: those of the first, the last
and the middle blocks take turns, the ones longest unpinged first. (Petals overwrites its list of
first servers with that of middle ones, so its entry links are mostly priced by a constant.) Only
servers under a penalty are not pinged: a dead one would hold up every refresh. When it is over,
they come first, for until they answer they stay a last resort.

What it needs is passed in: where records come from and how a peer is pinged.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from random import Random
from typing import Protocol, TypeVar

from p2pllm.config import ClientConfig
from p2pllm.errors import CodecError, P2PLLMError
from p2pllm.ids import ModelId, PeerId
from p2pllm.swarm.announcements import (
    MODELS_NAME,
    MODELS_NAMESPACE,
    ModelListing,
    Presence,
    ServerState,
    presence_name,
)
from p2pllm.swarm.view import Measurements, SwarmView, build_view
from p2pllm.wire.records import PRESENCE_NAMESPACE, Record

logger = logging.getLogger(__name__)

T = TypeVar("T")

PING_TIMEOUT_S = 2.0  # a server that needs longer is no good as a hop
IMPATIENT_REFRESH_S = 2.0  # the period while somebody waits for a change


class RecordSource(Protocol):
    """Where records come from: the DHT."""

    async def get(self, namespace: str, name: str) -> list[Record]:
        """The live, verified records under a name; raises LookupFailed."""
        ...


class SwarmTracker:
    """The servers of one model, as this client knows them.

    `measurements` is fed by whoever uses the servers. `run()` keeps the presences fresh until it
    is cancelled; without it they are as fresh as the last `refresh()`.
    """

    def __init__(
        self,
        model: ModelId,
        num_blocks: int,
        records: RecordSource,
        ping: Callable[[PeerId], Awaitable[float]],
        config: ClientConfig,
        rng: Random | None = None,
    ) -> None:
        """`ping(peer)` returns the round trip in seconds, or raises a P2PLLMError."""
        self.model = model
        self.num_blocks = num_blocks
        self.measurements = Measurements()
        self._records = records
        self._ping = ping
        self._config = config
        self._rng = rng or Random()
        self._presences: dict[PeerId, Presence] = {}
        self._pinged_at: dict[PeerId, float] = {}
        self._refreshed_at = float("-inf")
        self._refreshing = asyncio.Lock()
        self._changed = asyncio.Event()  # replaced after every change
        self._impatience = asyncio.Event()  # set while somebody waits for a change
        self._num_waiting = 0

    def view(self) -> SwarmView:
        """The swarm as it is known now; never waits."""
        now = asyncio.get_running_loop().time()
        presences = self._presences.values()
        return build_view(self.model, self.num_blocks, presences, self.measurements, now)

    async def fresh_view(self) -> SwarmView:
        """The view to plan on. `run` keeps it within half of `view_refresh_s`; if it is older
        than the whole, because nothing runs or the DHT fails, it is refreshed first."""
        age_s = asyncio.get_running_loop().time() - self._refreshed_at
        if age_s > self._config.view_refresh_s:
            await self.refresh()
        return self.view()

    async def refresh(self) -> None:
        """Read the DHT and ping now, or join a refresh that is under way.

        Raises LookupFailed; what was known before is kept then.
        """
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        was_busy = self._refreshing.locked()
        async with self._refreshing:
            if was_busy and self._refreshed_at >= asked_at:
                return
            found = await read_presences(self._records, self.model)
            self._take_in(found)
            await self._ping_some()
            self._refreshed_at = loop.time()

    async def run(self) -> None:
        """Refresh periodically, and sooner while somebody waits for a change."""
        period_s = self._config.view_refresh_s / 2
        pause_s = min(IMPATIENT_REFRESH_S, period_s)
        while True:
            try:
                await self.refresh()
            except P2PLLMError as exc:
                logger.warning("view not refreshed model=%s reason=%s", self.model, exc)
            await asyncio.sleep(pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(period_s - pause_s):
                    await self._impatience.wait()

    async def wait_for_change(self, timeout: float) -> bool:
        """Wait until the servers' announcements change; False if they do not in time.

        While anybody waits, `run` refreshes every `IMPATIENT_REFRESH_S`.
        """
        self._num_waiting += 1
        self._impatience.set()
        changed = self._changed
        try:
            async with asyncio.timeout(timeout):
                await changed.wait()
        except TimeoutError:
            return False
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._impatience.clear()
        return True

    def _take_in(self, presences: Iterable[Presence]) -> None:
        allowed, blocked = self._config.allowed_servers, self._config.blocked_servers
        found = {
            presence.peer_id: presence
            for presence in presences
            if str(presence.peer_id) not in blocked
            and (not allowed or str(presence.peer_id) in allowed)
        }
        self._pinged_at = {peer: at for peer, at in self._pinged_at.items() if peer in found}
        if found != self._presences:
            logger.debug("swarm changed model=%s servers=%d", self.model, len(found))
            self._presences = found
            self._changed.set()
            self._changed = asyncio.Event()

    async def _ping_some(self) -> None:
        async with asyncio.TaskGroup() as group:
            for peer in self._next_to_ping():
                group.create_task(self._ping_one(peer))

    def _next_to_ping(self) -> list[PeerId]:
        """At most `max_pings` servers: those suspected, then first, last and middle ones in turn,
        and within each of these the longest unpinged first (drawn where equal)."""
        view = self.view()
        servers = [
            server
            for server in view.servers
            if server.presence.state is ServerState.ONLINE and server.penalty_until <= view.taken_at
        ]
        self._rng.shuffle(servers)
        servers.sort(key=lambda s: self._pinged_at.get(s.peer_id, float("-inf")), reverse=True)
        firsts = [s.peer_id for s in servers if s.span.start == 0]
        lasts = [s.peer_id for s in servers if s.span.stop == self.num_blocks]
        outer = {*firsts, *lasts}
        middles = [s.peer_id for s in servers if s.peer_id not in outer]
        suspects = [s.peer_id for s in servers if view.is_penalised(s)]
        # In order, each once: a server may be first and last.
        chosen = dict.fromkeys(suspects[::-1][: self._config.max_pings])
        while (firsts or lasts or middles) and len(chosen) < self._config.max_pings:
            for queue in (firsts, lasts, middles):
                if queue and len(chosen) < self._config.max_pings:
                    chosen[queue.pop()] = None
        return list(chosen)

    async def _ping_one(self, peer: PeerId) -> None:
        """Measure one server; one that fails is penalised and never ends the refresh."""
        loop = asyncio.get_running_loop()
        self._pinged_at[peer] = loop.time()
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                rtt_s = await self._ping(peer)
        except (P2PLLMError, TimeoutError) as exc:
            logger.debug("ping failed peer=%s reason=%r", peer.short, exc)
            self.measurements.on_failure(peer, loop.time())
        else:
            self.measurements.on_rtt(None, peer, rtt_s, loop.time())


async def read_presences(records: RecordSource, model: ModelId) -> list[Presence]:
    """All servers of a model, malformed announcements left out; raises LookupFailed."""
    return _parse(await records.get(PRESENCE_NAMESPACE, presence_name(model)), Presence.from_record)


async def read_models(records: RecordSource) -> list[ModelListing]:
    """One entry per server and the model it serves; raises LookupFailed."""
    return _parse(await records.get(MODELS_NAMESPACE, MODELS_NAME), ModelListing.from_record)


def _parse(records: Iterable[Record], read: Callable[[Record], T]) -> list[T]:
    values = []
    for record in records:
        if record.is_tombstone:
            continue
        try:
            values.append(read(record))
        except CodecError as exc:
            logger.debug("bad announcement peer=%s reason=%s", record.subkey.short, exc)
    return values

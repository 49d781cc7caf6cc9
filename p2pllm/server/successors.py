"""The peers that a server dials because a client says so: next hops, and sources of pages.

A client names them by their signed peer records, since nobody else's word makes us dial, and
only records that are of today: an old one may lead to a stranger. Even so a client could use us to
knock at many doors, or let us wait for dead ones again and again. So each has a budget of peers
that are dialled for it, and a peer that was not reached is not tried again for some seconds.
"""

import logging
import math
from collections import OrderedDict

from p2pllm.clock import Clock
from p2pllm.config import DhtConfig
from p2pllm.dht.records import RecordRules, Refusal
from p2pllm.errors import BadRequest, BadSignature, CodecError, RemoteProtocolError, TransportError
from p2pllm.identity import verify
from p2pllm.ids import PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.wire.records import RECORD_DOMAIN, PeerRecord, parse_record

logger = logging.getLogger(__name__)

NO_NEXT_HOP = -1.0  # in `Opened.next_rtt_s`
REACH_TIMEOUT_S = 3.0  # for the next hop to be dialled; else the client relays that link
BROKEN_S = 10.0  # a peer that was not reached counts as unreachable
DIALS_AT_ONCE = 16  # peers dialled for one client; a chain has fewer
DIALS_PER_S = 1.0  # and then
SAME_DIAL_S = 5.0  # further sessions over the same link come within so long
REMEMBERED = 1024  # of peers, clients, and pairs of them


class DialBudget:
    """A token bucket per client. Dialling the same peer again soon costs nothing. Pure."""

    def __init__(self) -> None:
        self._budgets: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()  # tokens, at
        self._recent: OrderedDict[tuple[PeerId, PeerId], float] = OrderedDict()

    def allows(self, client: PeerId, peer: PeerId, now: float) -> bool:
        """May `peer` be dialled for `client`? Takes that off the client's budget."""
        if now < self._recent.get((client, peer), -math.inf) + SAME_DIAL_S:
            return True
        tokens, at = self._budgets.pop(client, (float(DIALS_AT_ONCE), now))
        tokens = min(DIALS_AT_ONCE, tokens + (now - at) * DIALS_PER_S)
        is_allowed = tokens >= 1
        self._budgets[client] = (tokens - is_allowed, now)
        if is_allowed:
            self._recent.pop((client, peer), None)
            self._recent[client, peer] = now
        for table in (self._budgets, self._recent):
            if len(table) > REMEMBERED:
                table.popitem(last=False)
        return is_allowed


class Successors:
    """Reads, judges and reaches the peers that clients name."""

    def __init__(self, endpoint: Endpoint, clock: Clock) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._rules = RecordRules(endpoint.config.network_id, DhtConfig())
        self._budget = DialBudget()
        self._broken: OrderedDict[PeerId, float] = OrderedDict()  # until when

    def read(self, data: bytes) -> PeerId | None:
        """Whose peer record it is; None if it is empty. Raises BadRequest.

        The record of a peer that we are connected to may be over: it is not needed any more.
        """
        if not data:
            return None
        try:
            record = parse_record(data)
            verify(record.subkey, RECORD_DOMAIN, record.payload, record.signature)
            addresses = PeerRecord.from_record(record).addresses
        except (CodecError, BadSignature) as exc:
            raise BadRequest(f"a peer record: {exc}") from exc
        peer = record.subkey
        if peer == self._endpoint.peer_id:
            raise BadRequest("a hop cannot be its own successor")
        left_s = self._rules.remaining_s(record, self._clock.wall())
        if not isinstance(left_s, Refusal):
            self._endpoint.learn(peer, addresses)
        elif not self._endpoint.is_connected(peer):
            raise BadRequest(f"a peer record of {peer.short}: {left_s}")
        return peer

    def may_use(self, client: PeerId, peer: PeerId, now: float) -> bool:
        """Is there a connection, or may one be dialled for this client?"""
        return self._endpoint.is_connected(peer) or self._budget.allows(client, peer, now)

    async def reach(self, client: PeerId, peer: PeerId | None, now: float) -> float:
        """The round trip to the next hop in seconds; negative if there is none or no way."""
        if peer is None:
            return NO_NEXT_HOP
        is_broken = now < self._broken.get(peer, now) and not self._endpoint.is_connected(peer)
        if is_broken or not self.may_use(client, peer, now):
            logger.info("next hop not tried peer=%s client=%s", peer.short, client.short)
            return NO_NEXT_HOP
        self._broken.pop(peer, None)
        try:
            return await self._endpoint.ping(peer, timeout_s=REACH_TIMEOUT_S)
        except (TransportError, RemoteProtocolError) as exc:
            logger.info("next hop not reached peer=%s reason=%s", peer.short, exc)
            self._broken[peer] = now + REACH_TIMEOUT_S + BROKEN_S
            if len(self._broken) > REMEMBERED:
                self._broken.popitem(last=False)
            return NO_NEXT_HOP

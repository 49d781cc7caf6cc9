"""A node of the DHT: drives lookups over the transport and keeps what it published alive.

The shell around the pure parts: it carries out the queries that a `Lookup` asks for, tells the
`RoutingTable` what came of them, hands requests to the `Responder`, and runs the maintenance:

- what this node publishes is stored again every 40 s ± 20 % (a peer's own record, which rarely
  changes, every 200 s ± 20 %), at once when it changes, and as a tombstone when it is withdrawn;
- peers that introduce themselves, or are heard of for a thin bucket, are asked once before they
  enter the table;
- buckets that no lookup touched, and our own neighbourhood, are looked up now and then; with an
  empty table we start again from all peers that we ever heard an answer from.

A client (`DhtConfig.is_client`) does all this but never introduces itself, so nobody asks it.
"""

import asyncio
import logging
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from p2pllm.addresses import Address
from p2pllm.clock import Clock
from p2pllm.config import DhtConfig
from p2pllm.dht.contacts import Contact, ContactReader, group_of
from p2pllm.dht.kbuckets import RoutingTable
from p2pllm.dht.keys import key_of, random_id_sharing, to_id, to_key
from p2pllm.dht.lookup import Lookup, Query
from p2pllm.dht.protocol import ReplyReader, Responder
from p2pllm.dht.records import RecordReader, RecordRules, Refusal, peer_key, supersedes
from p2pllm.dht.rtt import RpcTimeout
from p2pllm.dht.storage import RecordStore, StoreSnapshot
from p2pllm.errors import (
    Busy,
    CodecError,
    LookupFailed,
    P2PLLMError,
    RemoteProtocolError,
    RequestFailed,
    TransportError,
)
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.wire.codec import pack, unpack_map
from p2pllm.wire.messages import (
    FindNode,
    FindValue,
    Message,
    Store,
    Stored,
)
from p2pllm.wire.records import (
    MAX_ADDRESSES,
    MAX_RECORD_BYTES,
    PEER_NAMESPACE,
    PeerRecord,
    Record,
    make_record,
)

logger = logging.getLogger(__name__)

TICK_S = 10.0  # between two looks at what maintenance is due
MAX_ENTRY_POINTS = 64  # peers to start from, at once and again
MAX_RUMOURS = 128  # peers heard of that wait to be asked
PING_SLOTS = 3  # asked at once
RETRY_S = 5.0  # after nobody took a publication
YOUNG_S = 10.0  # after fewer took it than should, doubled each time: others may have come since
MAX_SAVED = 1024  # peers in a saved table; a node among millions knows about 400
TABLE_VERSION = 1

_FAILURES = (TransportError, RemoteProtocolError, RequestFailed)


class Rpc(Protocol):
    """What the DHT needs of the transport."""

    async def request(self, peer: PeerId, message: Message, *, timeout_s: float) -> Message:
        """Ask and await the reply; raises TransportError, RemoteProtocolError, RequestFailed."""
        ...

    def learn(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Remember where a peer can be dialled."""
        ...


class Publication:
    """Something that a node keeps published while `DhtNode.run` runs."""

    def __init__(self, node: "DhtNode", namespace: str, key: bytes, ttl_s: float) -> None:
        self.namespace = namespace
        self.key = key
        self.ttl_s = ttl_s
        self.body: dict[str, Any] = {}
        self.is_withdrawn = False
        self.num_replicas = 0  # that took it, the last time
        self._young_s = YOUNG_S
        self._node = node
        self._changed = asyncio.Event()
        self._published = asyncio.Event()

    def update(self, body: dict[str, Any]) -> None:
        """Publish this from now on, the first time at once.

        Raises LocalProtocolError if it is too large: here, not later in `DhtNode.run`.
        """
        self._node.sign(self.namespace, self.key, body, self.ttl_s)
        self.body = body
        self._published.clear()
        self._changed.set()

    async def wait(self) -> int:
        """Wait until the newest body is stored; returns by how many replicas."""
        await self._published.wait()
        return self.num_replicas

    async def withdraw(self) -> None:
        """Say that we left, with a signed tombstone in the place of the body."""
        if self.is_withdrawn:
            return
        self.is_withdrawn = True
        self._changed.set()
        try:
            await self._node.store(self.namespace, self.key, {}, ttl_s=self.ttl_s)
        except LookupFailed as exc:
            logger.info("tombstone not stored namespace=%s reason=%s", self.namespace, exc)

    async def keep(self) -> None:
        """Store it again and again until it is withdrawn."""
        while not self.is_withdrawn:
            self._changed.clear()
            try:
                self.num_replicas = await self._node.store(
                    self.namespace, self.key, self.body, ttl_s=self.ttl_s
                )
            except LookupFailed as exc:
                self.num_replicas = 0
                logger.info("publication not stored namespace=%s reason=%s", self.namespace, exc)
            else:
                if not self._changed.is_set():
                    self._published.set()
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._changed.wait()
            except TimeoutError:
                pass  # the usual case: due again, unchanged

    def _pause_s(self) -> float:
        if not self.num_replicas:
            return RETRY_S
        usual_s = self._node.republish_s(self.ttl_s)
        if self.num_replicas >= self._node.num_replicas:
            return usual_s
        self._young_s *= 2
        return min(usual_s, self._young_s / 2)


@dataclass(frozen=True, slots=True)
class DhtSnapshot:
    """A node's DHT in numbers. `refused` counts records by why they were refused."""

    num_peers: int
    store: StoreSnapshot
    num_publications: int
    num_lookups: int
    num_queries: int
    num_failures: int
    rpc_timeout_s: float
    refused: dict[str, int]


class DhtNode:
    """One node. `handle` answers others, `run` maintains, the rest asks the swarm.

    `remote_host` tells to which host a peer's connection goes, for the bounds per address group;
    without it the peers' own word is taken. `records` may be shared by nodes of one process.
    """

    def __init__(
        self,
        identity: Identity,
        config: DhtConfig,
        rpc: Rpc,
        clock: Clock,
        rng: random.Random,
        *,
        network_id: str,
        remote_host: Callable[[PeerId], str | None] | None = None,
        records: RecordReader | None = None,
        contacts: ContactReader | None = None,
    ) -> None:
        """Make a node; an event loop must be running, whose time the table begins with."""
        self.peer_id = identity.peer_id
        self._identity = identity
        self._config = config
        self._rpc = rpc
        self._clock = clock
        self._rng = rng
        self._network_id = network_id
        self._remote_host = remote_host
        self._id = self.peer_id.dht_id
        self._records = records or RecordReader()
        self._contacts = contacts or ContactReader(self._records)
        self._rules = RecordRules(network_id, config)
        self.table = RoutingTable(self._id, config, _now())
        self._store = RecordStore(config)
        self._responder = Responder(
            config, self.table, self._store, self._records, self._contacts, self._rules
        )
        self._replies = ReplyReader(self._records, self._contacts, self._rules)
        self._timeout = RpcTimeout(config.rpc_timeout_min_s, config.rpc_timeout_max_s)
        self._sender = b""  # our signed peer record, if we serve the DHT
        self._own_addresses: tuple[tuple[Address, ...], bool] = ((), False)
        self._own_record: Publication | None = None
        self._last_seq = 0
        self._publications: list[Publication] = []
        self._group: asyncio.TaskGroup | None = None  # of `run`
        self._entry_points: dict[int, Contact] = {}
        self._rumours: OrderedDict[int, Contact] = OrderedDict()
        self._ping_wanted = asyncio.Event()
        self._reads: dict[tuple[str, bytes, bytes], asyncio.Future[list[Record]]] = {}
        self._self_lookup_at = _now()
        self._counts: Counter[str] = Counter()

    # --- being asked --------------------------------------------------------------------------

    async def handle(self, peer: PeerId, host: str | None, message: Message) -> Message:
        """Answer FindNode, FindValue or Store. Raises RequestFailed, which the peer is told."""
        now = _now()
        wall = self._clock.wall()
        reply, sender = self._responder.answer(peer, host, message, now=now, wall=wall)
        if sender is not None:
            self.table.on_contact(sender)
            self._hear_of(sender, now)
        return reply

    # --- asking -------------------------------------------------------------------------------

    async def bootstrap(self, peers: Sequence[PeerId]) -> int:
        """Get to know the swarm through these peers; returns how many peers answered in all."""
        entry_points = {peer.dht_id: Contact.of(peer) for peer in peers if peer != self.peer_id}
        # The newest come first, and those of earlier calls fill what room is left.
        merged = entry_points | self._entry_points
        self._entry_points = dict(islice(merged.items(), MAX_ENTRY_POINTS))
        reached = await self._join(self._entry_points.values())
        for publication in self._publications:  # stored where only we look, if we knew nobody
            publication.update(publication.body)
        return reached

    async def find_node(self, target: bytes, *, is_urgent: bool = True) -> Lookup:
        """Look up the k peers closest to `target`: the finished lookup tells them."""
        return await self._find_node(to_id(target), quorum=self._config.k, is_urgent=is_urgent)

    async def get(self, namespace: str, name: str | bytes) -> list[Record]:
        """The live records under a name, one per writer, verified; tombstones left out.

        Concurrent reads of one name are one lookup. Raises LookupFailed if nobody could be asked.
        """
        key = key_of(self._network_id, namespace, name)
        return await self._read(namespace, key)

    async def find_peer(self, peer_id: PeerId) -> PeerRecord | None:
        """Where a peer can be dialled, as it says itself; None if nobody knows.

        Raises LookupFailed if nobody could be asked.
        """
        record = await self.find_peer_record(peer_id)
        return PeerRecord.from_record(record) if record is not None else None

    async def find_peer_record(self, peer_id: PeerId) -> Record | None:
        """The signed record that `find_peer` reads, to be shown to others."""
        key = peer_key(self._network_id, peer_id)
        for record in await self._read(PEER_NAMESPACE, key, peer_id.key):
            try:
                found = PeerRecord.from_record(record)
            except CodecError:
                self._rules.count(Refusal.MALFORMED)
                continue
            self._rpc.learn(peer_id, found.addresses)
            return record
        return None

    # --- publishing ---------------------------------------------------------------------------

    async def put(
        self, namespace: str, name: str | bytes, body: dict[str, Any], *, ttl_s: float | None = None
    ) -> int:
        """Store our record under a name once; returns how many replicas took it.

        Raises LookupFailed if none did, LocalProtocolError if the body is too large.
        """
        key = key_of(self._network_id, namespace, name)
        return await self.store(namespace, key, body, ttl_s=ttl_s or self._config.record_ttl_s)

    def publish(self, namespace: str, name: str | bytes, body: dict[str, Any]) -> Publication:
        """Keep our record under a name alive from now on, while `run` runs."""
        key = key_of(self._network_id, namespace, name)
        return self._publish(namespace, key, body, self._config.record_ttl_s)

    def set_addresses(self, addresses: Sequence[Address], is_public: bool) -> None:
        """Say where we can be dialled, and whether from anywhere: published as our peer record.

        If so, and we are no client, requests introduce us with it and others may ask us.
        """
        told = (tuple(addresses[:MAX_ADDRESSES]), is_public)
        if told == self._own_addresses:
            return
        self._own_addresses = told
        if not addresses and self._own_record is None:
            return  # a client that nobody can dial has nothing to tell
        body = PeerRecord(self.peer_id, *told).to_body()
        if self._own_record is None:
            key = peer_key(self._network_id, self.peer_id)
            self._own_record = self._publish(PEER_NAMESPACE, key, body, self._config.max_ttl_s)
        else:
            self._own_record.update(body)
        record = self.sign(PEER_NAMESPACE, self._own_record.key, body, self._config.max_ttl_s)
        self._introduce_as(record)

    async def store(self, namespace: str, key: bytes, body: dict[str, Any], *, ttl_s: float) -> int:
        """`put` at a key."""
        record = self.sign(namespace, key, body, ttl_s)
        if namespace == PEER_NAMESPACE and body:
            self._introduce_as(record)
        replicas = self._config.replicas
        lookup = await self._find_node(to_id(key), quorum=replicas, is_urgent=False)
        closest = lookup.closest
        kept = 0
        if self._serves and self._is_among(closest[:replicas], to_id(key)):
            kept += self._keep_own(record)
        kept += await self._store_at(closest, record, replicas - kept)
        if not kept:
            raise LookupFailed(f"no peer took the record ({len(closest)} answered)")
        return kept

    def sign(self, namespace: str, key: bytes, body: dict[str, Any], ttl_s: float) -> Record:
        """Our record at a key, newer than any before; an empty body is a tombstone."""
        wall = self._clock.wall()
        # Milliseconds of wall time: higher than before a restart, without keeping a file.
        self._last_seq = max(self._last_seq + 1, int(wall * 1000))
        record = make_record(
            namespace,
            key,
            self.peer_id,
            seq=self._last_seq,
            issued=wall,
            expires=wall + min(ttl_s, self._config.max_ttl_s),
            body=body,
            sign=self._identity.sign,
        )
        self._records.remember(record.to_bytes(), record)
        return record

    @property
    def num_replicas(self) -> int:
        """By how many peers a record should be kept."""
        return self._config.replicas

    def republish_s(self, ttl_s: float) -> float:
        """Seconds until a record is stored again: a third of its life, ± jitter."""
        config = self._config
        interval_s = config.republish_s * ttl_s / config.record_ttl_s
        return interval_s * self._rng.uniform(
            1 - config.republish_jitter, 1 + config.republish_jitter
        )

    # --- maintenance --------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep publications, table and storage in order until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._group = tasks
                for publication in self._publications:
                    tasks.create_task(publication.keep())
                for _ in range(PING_SLOTS):
                    tasks.create_task(self._ping_who_is_wanted())
                tasks.create_task(self._maintain())
        finally:
            self._group = None

    def save(self, path: Path) -> None:
        """Write the table's peers to a file; a failure is logged, for it costs little."""
        contacts = self.table.snapshot().contacts
        peers = [contact.record for contact in contacts if contact.record][:MAX_SAVED]
        temporary = path.with_name(path.name + ".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(pack({"v": TABLE_VERSION, "peers": peers}))
            os.replace(temporary, path)
        except OSError as exc:
            logger.warning("routing table not saved path=%s reason=%s", path, exc)

    def load(self, path: Path) -> list[PeerId]:
        """Take the peers of a saved table in, on probation; returns who they are.

        A missing file is an empty table, and so is a broken one, which is logged.
        """
        try:
            fields = unpack_map(path.read_bytes(), max_bytes=MAX_SAVED * (MAX_RECORD_BYTES + 8))
        except FileNotFoundError:
            return []
        except (OSError, CodecError) as exc:
            logger.warning("routing table not read path=%s reason=%s", path, exc)
            return []
        peers = fields.get("peers") if fields.get("v") == TABLE_VERSION else None
        if not isinstance(peers, list):
            return []
        read = (self._contacts.read(data) for data in peers if isinstance(data, bytes))
        contacts = [contact for contact in read if isinstance(contact, Contact)]
        self.table.restore(contacts, _now())
        for contact in contacts:
            self._rpc.learn(contact.peer_id, contact.addresses)
        return [contact.peer_id for contact in contacts]

    def snapshot(self) -> DhtSnapshot:
        """The node in numbers."""
        return DhtSnapshot(
            len(self.table),
            self._store.snapshot(),
            len(self._publications),
            self._counts["lookups"],
            self._counts["queries"],
            self._counts["failures"],
            self._timeout.seconds,
            {str(refusal): count for refusal, count in self._rules.refused.items()},
        )

    # --- inside: lookups ----------------------------------------------------------------------

    async def _find_node(self, target: int, *, quorum: int, is_urgent: bool) -> Lookup:
        lookup = self._new_lookup(target, quorum=quorum, is_urgent=is_urgent)
        key = to_key(target)

        async def ask(query: Query) -> None:
            contacts = await self._ask_nodes(query.contact, key)
            lookup.on_reply(query, self._news(lookup, contacts))

        await self._drive(lookup, ask)
        return lookup

    def _new_lookup(self, target: int, *, quorum: int, is_urgent: bool) -> Lookup:
        config, now = self._config, _now()
        self._counts["lookups"] += 1
        self.table.on_lookup(target, now)
        seeds = [
            contact
            for contact in self.table.closest(target, 2 * config.k)
            if not self.table.is_avoided(contact.id, now)
        ]
        return Lookup(
            target,
            seeds[: config.k],
            own_id=self._id,
            alpha=config.alpha if is_urgent else config.alpha_maintenance,
            k=config.k,
            quorum=quorum,
            max_per_group=config.max_per_group_in_bucket,
        )

    async def _drive(self, lookup: Lookup, ask: Callable[[Query], Awaitable[None]]) -> None:
        """Carry out a lookup's queries, as many at once as it allows, until it is done."""
        running: set[asyncio.Task[None]] = set()

        async def carry_out(query: Query) -> None:
            try:
                await ask(query)
            except _FAILURES as exc:
                logger.debug("query failed peer=%s reason=%s", query.contact.peer_id.short, exc)
                lookup.on_failure(query)
            go_on()

        def go_on() -> None:
            while (query := lookup.next_query()) is not None:
                task = tasks.create_task(carry_out(query))
                running.add(task)
                task.add_done_callback(running.discard)
            if lookup.is_done:
                for task in running:
                    task.cancel()  # ourselves as well, who end here anyway

        async with asyncio.TaskGroup() as tasks:
            go_on()

    async def _read(self, namespace: str, key: bytes, subkey: bytes = b"") -> list[Record]:
        """Records at a key; whoever asks while a read is under way waits for that one."""
        flight = (namespace, key, subkey)
        while (leader := self._reads.get(flight)) is not None:
            await asyncio.wait([leader])
            if not leader.cancelled():  # else its caller gave up, and one of us takes over
                return list(leader.result())
        leader = self._reads[flight] = asyncio.get_running_loop().create_future()
        try:
            records = await self._read_now(namespace, key, subkey)
            leader.set_result(records)
            return list(records)
        except P2PLLMError as exc:
            leader.set_exception(exc)
            leader.exception()  # there may be nobody else to retrieve it
            raise
        finally:
            leader.cancel()  # does nothing to a finished one
            del self._reads[flight]

    async def _read_now(self, namespace: str, key: bytes, subkey: bytes) -> list[Record]:
        # One slot is the same wherever it lies, but a set is known only when every place where
        # a part of it may lie has been asked: in a young swarm the writers knew different peers.
        quorum = self._config.beta if subkey else self._config.replicas
        lookup = self._new_lookup(to_id(key), quorum=quorum, is_urgent=True)

        async def ask(query: Query) -> None:
            message = FindValue(namespace, key, subkey, query.cursor, self._sender)
            contact = query.contact
            started = _now()
            reply = await self._ask(contact, message)
            with self._blaming(contact):
                values = self._replies.values(reply, namespace, key, self._clock.wall())
            self._answered(contact, started)
            news = self._news(lookup, values.contacts)
            lookup.on_reply(query, news, values.records, values.cursor)

        await self._drive(lookup, ask)
        if subkey and not lookup.records:
            # Perhaps it was stored when the swarm was young, and closer peers have come since.
            lookup.widen(self._config.replicas)
            await self._drive(lookup, ask)
        found = dict(lookup.records)
        now = _now()
        for record in self._store.records(namespace, key, now=now):
            if record.subkey not in found or supersedes(record, found[record.subkey]):
                found[record.subkey] = record
        if not (found or lookup.has_answers or (self._serves and not len(self.table))):
            raise LookupFailed(f"none of {len(self.table)} known peers answered")
        return [record for record in found.values() if not record.is_tombstone]

    def _news(self, lookup: Lookup, contacts: Iterable[Contact]) -> list[Contact]:
        """Contacts that are new to a lookup, without those that failed us lately."""
        now = _now()
        news = []
        for contact in contacts:
            if lookup.knows(contact) or self.table.is_avoided(contact.id, now):
                continue
            news.append(contact)
            if contact in self.table:
                self.table.on_contact(contact)
            elif self.table.wants(contact, now, only_if_thin=True):
                self._hear_of(contact, now)
        return news

    # --- inside: one request ------------------------------------------------------------------

    async def _ask_nodes(self, contact: Contact, key: bytes) -> list[Contact]:
        """Ask a peer for those closest to `key`; the table learns how it went."""
        started = _now()
        reply = await self._ask(contact, FindNode(key, self._sender))
        with self._blaming(contact):
            contacts = self._replies.contacts(reply)
        # A peer known by name only says where it is when asked about its own place.
        own = next((heard for heard in contacts if heard.id == contact.id), contact)
        self._answered(own, started)
        return contacts

    async def _ask(self, contact: Contact, message: Message) -> Message:
        self._counts["queries"] += 1
        if contact.addresses:
            self._rpc.learn(contact.peer_id, contact.addresses)
        try:
            return await self._rpc.request(
                contact.peer_id, message, timeout_s=self._timeout.seconds
            )
        except Busy:
            raise  # alive, and no worse a peer for saying so
        except _FAILURES:
            self._failed(contact)
            raise

    def _answered(self, contact: Contact, started: float) -> None:
        now = _now()
        self._timeout.add(now - started)
        host = self._remote_host(contact.peer_id) if self._remote_host else None
        group = group_of(host) if host else None
        self.table.on_success(contact, now, host_group=group)
        if self.table.has_pings:
            self._ping_wanted.set()

    def _failed(self, contact: Contact) -> None:
        self._counts["failures"] += 1
        self.table.on_failure(contact, _now())
        if self.table.has_pings:
            self._ping_wanted.set()

    @contextmanager
    def _blaming(self, contact: Contact) -> Iterator[None]:
        """What is wrong with a reply counts against the peer that gave it."""
        try:
            yield
        except RemoteProtocolError:
            self._failed(contact)
            raise

    async def _store_at(self, closest: Sequence[Contact], record: Record, wanted: int) -> int:
        """Store at the closest peers, going on to the next where one refuses or fails."""
        message = Store((record.to_bytes(),), self._sender)
        candidates = iter(closest)
        kept = 0

        async def store_one() -> None:
            nonlocal kept
            for contact in candidates:  # shared: each is tried once
                try:
                    reply = await self._ask(contact, message)
                except _FAILURES:
                    continue
                if isinstance(reply, Stored) and reply.refusals == ("",):
                    kept += 1
                    return
                logger.debug("record refused peer=%s reply=%s", contact.peer_id.short, reply)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(wanted, len(closest))):
                tasks.create_task(store_one())
        return kept

    # --- inside: our own records --------------------------------------------------------------

    @property
    def _serves(self) -> bool:
        return bool(self._sender)

    def _introduce_as(self, record: Record) -> None:
        addresses, is_public = self._own_addresses
        if self._config.is_client or not is_public or not addresses:
            self._sender, self._responder.own = b"", None
            return
        self._sender = record.to_bytes()
        own = self._contacts.read(self._sender)
        self._responder.own = own if isinstance(own, Contact) else None

    def _publish(
        self, namespace: str, key: bytes, body: dict[str, Any], ttl_s: float
    ) -> Publication:
        publication = Publication(self, namespace, key, ttl_s)
        publication.update(body)
        self._publications = [p for p in self._publications if not p.is_withdrawn]
        self._publications.append(publication)
        if self._group is not None:
            self._group.create_task(publication.keep())
        return publication

    def _is_among(self, closest: Sequence[Contact], target: int) -> bool:
        """Are we one of the replicas?"""
        if len(closest) < self._config.replicas:
            return True
        return (self._id ^ target) < (closest[-1].id ^ target)

    def _keep_own(self, record: Record) -> bool:
        life_s = self._rules.remaining_s(record, self._clock.wall())
        if isinstance(life_s, Refusal):
            return False
        return self._store.put(record, record.to_bytes(), now=_now(), life_s=life_s) is None

    # --- inside: maintenance ------------------------------------------------------------------

    async def _join(self, entry_points: Iterable[Contact]) -> int:
        """Ask the entry points, then look ourselves up; returns how many peers answered."""
        reached: set[int] = set()

        async def enter(contact: Contact) -> None:
            if await self._ping(contact):
                reached.add(contact.id)

        async with asyncio.TaskGroup() as tasks:
            for contact in islice(entry_points, MAX_ENTRY_POINTS):
                tasks.create_task(enter(contact))
        self._self_lookup_at = _now()
        lookup = await self._find_node(self._id, quorum=self._config.k, is_urgent=True)
        reached.update(contact.id for contact in lookup.closest)
        logger.info("dht joined reached=%d peers=%d", len(reached), len(self.table))
        return len(reached)

    async def _ping(self, contact: Contact) -> bool:
        """Ask a peer about its own place: tells that it lives, and its newest record."""
        try:
            await self._ask_nodes(contact, to_key(contact.id))
        except _FAILURES as exc:
            logger.debug("ping failed peer=%s reason=%s", contact.peer_id.short, exc)
            return False
        return True

    def _hear_of(self, contact: Contact, now: float) -> None:
        """A peer that the table might take in, if it answers."""
        if contact.id in self._rumours or not self.table.wants(contact, now):
            return
        self._rumours[contact.id] = contact
        if len(self._rumours) > MAX_RUMOURS:
            self._rumours.popitem(last=False)
        self._ping_wanted.set()

    async def _ping_who_is_wanted(self) -> None:
        while True:
            contact = self._next_ping()
            if contact is not None:
                await self._ping(contact)
                continue
            self._ping_wanted.clear()
            await self._ping_wanted.wait()

    def _next_ping(self) -> Contact | None:
        while self._rumours:
            _, contact = self._rumours.popitem(last=False)
            if self.table.wants(contact, _now()):  # still
                return contact
        return self.table.next_ping()

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(TICK_S * self._rng.uniform(0.8, 1.2))
            now = _now()
            self._store.expire(now)
            if not len(self.table):
                failed = {contact.id: contact for contact in self.table.failed_contacts()}
                await self._join((self._entry_points | failed).values())
            elif now - self._self_lookup_at >= self._config.refresh_self_s:
                self._self_lookup_at = now
                await self._find_node(self._id, quorum=self._config.k, is_urgent=False)
            elif (bucket := self.table.bucket_to_refresh(now)) is not None:
                target = random_id_sharing(self._id, bucket, self._rng)
                await self._find_node(target, quorum=self._config.k, is_urgent=False)


def _now() -> float:
    return asyncio.get_running_loop().time()

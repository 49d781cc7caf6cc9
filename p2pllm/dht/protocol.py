"""Requests and replies: what a node answers, and what it believes of others' answers.

`Responder` answers FindNode, FindValue and Store from the table and the storage. Pure: a message
and two times in, a reply out. Who asks is known from the handshake, never from
the message, and a record is stored only for its own writer: nobody keeps others' records alive,
and the bounds per address group mean the writer's address. Checking signatures is what costs, so
each source has a budget of checks.

`ReplyReader` takes from a reply what is signed and was asked for. One forged signature condemns
the whole reply: so a liar costs us one check and not a page of them.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from p2pllm.config import DhtConfig
from p2pllm.dht.contacts import Contact, ContactReader, group_of
from p2pllm.dht.kbuckets import RoutingTable
from p2pllm.dht.keys import KEY_BYTES, to_id
from p2pllm.dht.records import RecordReader, RecordRules, Refusal
from p2pllm.dht.storage import RECORD_OVERHEAD_BYTES, RecordStore
from p2pllm.errors import BadRequest, BadSignature, Busy, Forbidden, RemoteProtocolError
from p2pllm.ids import PeerId
from p2pllm.wire.messages import (
    FindNode,
    FindValue,
    Message,
    Nodes,
    Store,
    Stored,
    Values,
)
from p2pllm.wire.records import Record

MAX_STORE_RECORDS = 16  # per message; a node has few publications
CHECKS_PER_S = 50.0  # signature checks per source: under 1 % of a core
CHECKS_BURST = 200.0
MAX_SOURCES = 4096
_NODES_SHARE = 2  # of a page of values at most 1 / this is for nodes


class CheckBudget:
    """Signature checks that each source may cause: a token bucket per host or peer."""

    def __init__(self) -> None:
        self._sources: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when

    def spend(self, source: str, num_checks: int, now: float) -> None:
        """Take `num_checks` from the source's bucket; raises Busy if they are not there."""
        tokens, then = self._sources.pop(source, (CHECKS_BURST, now))
        tokens = min(CHECKS_BURST, tokens + (now - then) * CHECKS_PER_S)
        is_allowed = tokens >= num_checks
        self._sources[source] = (tokens - num_checks if is_allowed else tokens, now)
        if len(self._sources) > MAX_SOURCES:
            self._sources.popitem(last=False)
        if not is_allowed:
            raise Busy("too many signatures to check", retry_after_s=num_checks / CHECKS_PER_S)


class Responder:
    """Answers the three requests. `own` is the node's own contact, if it serves the DHT."""

    def __init__(
        self,
        config: DhtConfig,
        table: RoutingTable,
        store: RecordStore,
        records: RecordReader,
        contacts: ContactReader,
        rules: RecordRules,
    ) -> None:
        self.own: Contact | None = None  # listed to others; set by whoever signs our record
        self._config = config
        self._table = table
        self._store = store
        self._records = records
        self._contacts = contacts
        self._rules = rules
        self._budget = CheckBudget()

    def answer(
        self, peer: PeerId, host: str | None, message: Message, *, now: float, wall: float
    ) -> tuple[Message, Contact | None]:
        """The reply to `peer`'s message, and the contact that it introduces itself as, if any.

        `host` is where its connection comes from. Raises BadRequest, Busy or Forbidden.
        """
        if self._config.is_client:
            raise Forbidden("this node asks the DHT and does not serve it")
        if not isinstance(message, FindNode | FindValue | Store):
            raise BadRequest(f"{type(message).__name__} is no request to the DHT")
        source = host or str(peer)
        sender = self._introduced(peer, source, message.sender, now) if message.sender else None
        match message:
            case FindNode():
                return self._nodes(peer, message), sender
            case FindValue():
                return self._values(peer, message, now), sender
            case Store():
                self._spend_checks(source, message.records, now)
                return self._stored(peer, host, message, now=now, wall=wall), sender

    def _introduced(self, peer: PeerId, source: str, data: bytes, now: float) -> Contact:
        self._spend_checks(source, (data,), now)
        contact = self._contacts.read(data)
        if isinstance(contact, Contact) and contact.peer_id != peer:
            contact = Refusal.WRONG_SUBKEY
        if isinstance(contact, Refusal):
            self._rules.count(contact)
            raise BadRequest(f"the sender's record: {contact}")
        return contact

    def _spend_checks(self, source: str, records: Sequence[bytes], now: float) -> None:
        num_new = sum(not self._records.is_known(data) for data in records)
        if num_new:
            self._budget.spend(source, num_new, now)

    def _nodes(self, peer: PeerId, message: FindNode) -> Nodes:
        self._check_length(message.target)
        return Nodes(self._closest(peer, message.target, self._config.page_bytes))

    def _values(self, peer: PeerId, message: FindValue, now: float) -> Values:
        self._check_length(message.key)
        max_bytes, nodes = self._config.page_bytes, tuple[bytes, ...]()
        if not message.cursor:
            nodes = self._closest(peer, message.key, max_bytes // _NODES_SHARE)
            max_bytes -= sum(len(node) + RECORD_OVERHEAD_BYTES for node in nodes)
        page = self._store.page(
            message.namespace,
            message.key,
            now=now,
            max_bytes=max_bytes,
            cursor=message.cursor,
            subkey=message.subkey,
        )
        return Values(page.records, page.cursor, nodes, page.ages_s)

    def _stored(
        self, peer: PeerId, host: str | None, message: Store, *, now: float, wall: float
    ) -> Stored:
        if len(message.records) > MAX_STORE_RECORDS:
            raise BadRequest(f"at most {MAX_STORE_RECORDS} records are stored at once")
        group = (host and group_of(host)) or ""
        refusals = [self._keep(peer, group, data, now, wall) for data in message.records]
        return Stored(tuple("" if refusal is None else str(refusal) for refusal in refusals))

    def _keep(
        self, peer: PeerId, group: str, data: bytes, now: float, wall: float
    ) -> Refusal | None:
        record = self._records.read(data)
        if isinstance(record, Refusal):
            return self._rules.count(record)
        if record.subkey != peer:
            return self._rules.count(Refusal.WRONG_SUBKEY)
        if self._rules.is_misplaced(record):
            return self._rules.count(Refusal.WRONG_KEY)
        life_s = self._rules.remaining_s(record, wall)
        if isinstance(life_s, Refusal):
            return self._rules.count(life_s)
        refusal = self._store.put(record, data, now=now, life_s=life_s, group=group)
        return None if refusal is None else self._rules.count(refusal)

    def _closest(self, asker: PeerId, key: bytes, max_bytes: int) -> tuple[bytes, ...]:
        """Signed records of the closest peers that have answered us, ourselves included."""
        target, k = to_id(key), self._config.k
        contacts = self._table.closest(target, k + 1, only_verified=True)
        if self.own is not None:
            insort(contacts, self.own, key=lambda contact: contact.id ^ target)
        nodes: list[bytes] = []
        for contact in contacts:
            if len(nodes) == k or not contact.record or contact.id == asker.dht_id:
                continue
            max_bytes -= len(contact.record) + RECORD_OVERHEAD_BYTES
            if max_bytes < 0:
                break
            nodes.append(contact.record)
        return tuple(nodes)

    @staticmethod
    def _check_length(key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise BadRequest(f"a place in the DHT has {KEY_BYTES} bytes, not {len(key)}")


@dataclass(frozen=True, slots=True)
class ReadValues:
    """What a `Values` holds of use: verified records, contacts, and the next page's cursor."""

    records: list[Record]
    contacts: list[Contact]
    cursor: int


class ReplyReader:
    """Judges replies; what is refused is counted in the rules' `refused`."""

    def __init__(self, records: RecordReader, contacts: ContactReader, rules: RecordRules) -> None:
        self._records = records
        self._contacts = contacts
        self._rules = rules

    def contacts(self, reply: Message) -> list[Contact]:
        """The contacts in a `Nodes`.

        Raises RemoteProtocolError if it is another message, or BadSignature.
        """
        if not isinstance(reply, Nodes):
            raise RemoteProtocolError(f"answered FindNode with {type(reply).__name__}")
        return self._read_contacts(reply.nodes)

    def values(self, reply: Message, namespace: str, key: bytes, wall: float) -> ReadValues:
        """The records at `key` and the contacts in a `Values`. Raises as `contacts` does."""
        if not isinstance(reply, Values):
            raise RemoteProtocolError(f"answered FindValue with {type(reply).__name__}")
        has_ages = len(reply.ages_s) == len(reply.records)
        ages = reply.ages_s if has_ages else (0.0,) * len(reply.records)
        records = []
        for data, age_s in zip(reply.records, ages, strict=True):
            record = self._judge(data, namespace, key, wall, age_s)
            if isinstance(record, Refusal):
                self._rules.count(record)
                if record is Refusal.BAD_SIGNATURE:
                    raise BadSignature("passed on a forged record")
            else:
                records.append(record)
        return ReadValues(records, self._read_contacts(reply.nodes), reply.cursor)

    def _judge(
        self, data: bytes, namespace: str, key: bytes, wall: float, age_s: float
    ) -> Record | Refusal:
        record = self._records.read(data)
        if isinstance(record, Refusal):
            return record
        if (record.namespace, record.key) != (namespace, key) or self._rules.is_misplaced(record):
            return Refusal.WRONG_KEY
        life_s = self._rules.remaining_s(record, wall, age_s=age_s)
        return life_s if isinstance(life_s, Refusal) else record

    def _read_contacts(self, nodes: Sequence[bytes]) -> list[Contact]:
        contacts = []
        for data in nodes:
            contact = self._contacts.read(data)
            if isinstance(contact, Contact):
                contacts.append(contact)
                continue
            self._rules.count(contact)
            if contact is Refusal.BAD_SIGNATURE:
                raise BadSignature("passed on a forged peer record")
        return contacts

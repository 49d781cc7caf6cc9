from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.addresses import Address
from p2pllm.config import DhtConfig
from p2pllm.dht.contacts import Contact, ContactReader
from p2pllm.dht.kbuckets import RoutingTable
from p2pllm.dht.keys import key_of
from p2pllm.dht.protocol import CHECKS_BURST, ReplyReader, Responder
from p2pllm.dht.records import RecordReader, RecordRules, Refusal, peer_key
from p2pllm.dht.storage import RecordStore
from p2pllm.errors import BadRequest, BadSignature, Busy, Forbidden, RemoteProtocolError
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.wire.codec import pack
from p2pllm.wire.messages import (
    Ack,
    FindNode,
    FindValue,
    Message,
    Nodes,
    Store,
    Stored,
    Values,
    encode_head,
)
from p2pllm.wire.records import PeerRecord, Record, make_record

OWN = Identity.from_seed(b"o" * 32)
ALICE, BOB = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)
NOW, WALL = 100.0, 1_800_000_000.0
KEY = key_of("main", "presence", "model")


def record(
    writer: Identity = ALICE,
    *,
    seq: int = 1,
    issued: float = WALL,
    ttl_s: float = 120.0,
    signer: Identity | None = None,
    namespace: str = "presence",
    key: bytes = KEY,
    body: dict[str, Any] | None = None,
) -> Record:
    return make_record(
        namespace,
        key,
        writer.peer_id,
        seq=seq,
        issued=issued,
        expires=issued + ttl_s,
        body=body or {"x": 1},
        sign=(signer or writer).sign,
    )


def peer_record(identity: Identity, host: str = "8.8.4.4") -> bytes:
    body = PeerRecord(identity.peer_id, (Address(host, 31337),)).to_body()
    key = peer_key("main", identity.peer_id)
    return record(identity, namespace="peer", key=key, body=body).to_bytes()


class Side:
    """A responder with everything it stands on."""

    def __init__(self, config: DhtConfig = DhtConfig()) -> None:  # noqa: B008
        self.table = RoutingTable(OWN.peer_id.dht_id, config, NOW)
        self.store = RecordStore(config)
        self.rules = RecordRules("main", config)
        self.records = RecordReader()
        self.contacts = ContactReader(self.records)
        self.responder = Responder(
            config, self.table, self.store, self.records, self.contacts, self.rules
        )
        self.replies = ReplyReader(self.records, self.contacts, self.rules)

    def ask(self, message: Message, peer: PeerId = ALICE.peer_id) -> Message:
        return self.introduce(message, peer)[0]

    def introduce(
        self, message: Message, peer: PeerId = ALICE.peer_id
    ) -> tuple[Message, Contact | None]:
        return self.responder.answer(peer, "8.8.4.4", message, now=NOW, wall=WALL)

    def know(self, identity: Identity, host: str) -> bytes:
        data = peer_record(identity, host)
        contact = self.contacts.read(data)
        assert isinstance(contact, Contact)
        self.table.on_success(contact, NOW)
        return data


def test_the_closest_peers_known_are_told_closest_first() -> None:
    side = Side()
    peers = [Identity.from_seed(bytes([index]) * 32) for index in range(30)]
    known = {p.peer_id: side.know(p, f"{10 + i}.1.1.1") for i, p in enumerate(peers[1:], 1)}
    target = BOB.peer_id.dht_id

    reply = side.ask(FindNode(target.to_bytes(32, "big")))

    in_table = [c.peer_id for c in side.table.closest(target, 20)]
    assert reply == Nodes(tuple(known[peer] for peer in in_table))


def test_the_node_itself_is_among_the_closest_it_tells() -> None:
    side = Side()
    own = side.contacts.read(peer_record(OWN))
    assert isinstance(own, Contact)
    side.responder.own = own

    assert side.ask(FindNode(KEY)) == Nodes((own.record,))


def test_the_asker_is_not_told_of_itself() -> None:
    side = Side()
    side.know(ALICE, "8.8.4.4")

    assert side.ask(FindNode(KEY), ALICE.peer_id) == Nodes(())
    assert side.ask(FindNode(KEY), BOB.peer_id) != Nodes(())


def test_a_stored_record_is_found() -> None:
    side = Side()

    stored = side.ask(Store((record().to_bytes(),)))

    assert stored == Stored(("",))
    assert side.ask(FindValue("presence", KEY)) == Values((record().to_bytes(),), 0, (), (0.0,))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (record(ALICE, signer=BOB).to_bytes(), Refusal.BAD_SIGNATURE),
        (record(BOB).to_bytes(), Refusal.WRONG_SUBKEY),
        (b"x" * 1025, Refusal.OVERSIZE),
        (b"\x00", Refusal.MALFORMED),
        (record(issued=WALL - 500).to_bytes(), Refusal.EXPIRED),
        (record(issued=WALL + 500).to_bytes(), Refusal.FAR_FUTURE),
        (record(namespace="peer").to_bytes(), Refusal.WRONG_KEY),
    ],
    ids=lambda value: str(value) if isinstance(value, Refusal) else "",
)
def test_a_record_that_breaks_a_rule_is_refused_and_counted(data: bytes, reason: Refusal) -> None:
    side = Side()

    reply = side.ask(Store((data,)))

    assert reply == Stored((str(reason),))
    assert side.rules.refused == {reason: 1}
    assert side.store.snapshot().num_records == 0


def test_an_older_record_is_refused_as_stale() -> None:
    side = Side()
    side.ask(Store((record(seq=2).to_bytes(),)))

    assert side.ask(Store((record(seq=1).to_bytes(),))) == Stored(("stale",))


def test_records_of_one_message_are_judged_one_by_one() -> None:
    side = Side()

    reply = side.ask(Store((b"", record().to_bytes(), record(BOB).to_bytes())))

    assert reply == Stored(("malformed", "", "wrong subkey"))


def test_a_page_with_its_nodes_stays_within_its_bytes() -> None:
    side = Side()
    for index in range(1, 30):
        side.know(Identity.from_seed(bytes([index]) * 32), f"{10 + index}.1.1.1")
    for index in range(1, 100):
        writer = Identity.from_seed(bytes([index]) * 32)
        data = record(writer, body={"x": "y" * 600}).to_bytes()
        side.responder.answer(writer.peer_id, f"{index}.1.1.1", Store((data,)), now=NOW, wall=WALL)
    cursor, found = 0, set[bytes]()
    while True:
        reply = side.ask(FindValue("presence", KEY, cursor=cursor))
        assert isinstance(reply, Values)
        assert len(encode_head(reply)) <= 16 * 2**10 + 200
        assert bool(reply.nodes) == (not cursor)
        found |= set(reply.records)
        cursor = reply.cursor
        if not cursor:
            break

    assert len(found) == 99


def test_a_sender_introduces_itself_by_its_own_signed_record() -> None:
    side = Side()

    _, contact = side.introduce(FindNode(KEY, peer_record(ALICE)))

    assert contact is not None
    assert contact.peer_id == ALICE.peer_id


def test_nobody_is_introduced_by_another_peer() -> None:
    side = Side()

    with pytest.raises(BadRequest, match="wrong subkey"):
        side.ask(FindNode(KEY, peer_record(BOB)))


def test_a_forged_introduction_stores_nothing() -> None:
    side = Side()
    forged = record(ALICE, signer=BOB, namespace="peer", key=peer_key("main", ALICE.peer_id))

    with pytest.raises(BadRequest, match="bad signature"):
        side.ask(Store((record().to_bytes(),), forged.to_bytes()))
    assert side.store.snapshot().num_records == 0


def test_a_client_does_not_serve() -> None:
    side = Side(DhtConfig(is_client=True))

    with pytest.raises(Forbidden):
        side.ask(FindNode(KEY))


@pytest.mark.parametrize("message", [FindNode(b"short"), FindValue("presence", b""), Ack()])
def test_a_malformed_request_is_told_so(message: Message) -> None:
    with pytest.raises(BadRequest):
        Side().ask(message)


def test_a_source_that_makes_us_check_too_many_signatures_is_put_off() -> None:
    side = Side()
    forged = [pack([record(seq=seq).payload, bytes(64)]) for seq in range(300)]

    for data in forged[: int(CHECKS_BURST)]:
        side.ask(Store((data,)))
    with pytest.raises(Busy) as caught:
        side.ask(Store((forged[-1],)))

    assert side.records.num_checks == CHECKS_BURST
    assert caught.value.retry_after_s > 0


def test_a_reply_gives_what_is_signed_and_was_asked_for() -> None:
    side = Side()
    good, elsewhere = record(ALICE), record(BOB, key=b"e" * 32)
    old = record(BOB, issued=WALL - 500)
    reply = Values(
        (good.to_bytes(), elsewhere.to_bytes(), old.to_bytes(), b"?"),
        9,
        (peer_record(BOB),),
        (0.0, 0.0, 0.0, 0.0),
    )

    values = side.replies.values(reply, "presence", KEY, WALL)

    assert values.records == [good]
    assert [contact.peer_id for contact in values.contacts] == [BOB.peer_id]
    assert values.cursor == 9
    assert side.rules.refused == {
        Refusal.WRONG_KEY: 1,
        Refusal.EXPIRED: 1,
        Refusal.MALFORMED: 1,
    }


def test_the_age_told_by_the_storer_counts() -> None:
    side = Side()
    reply = Values((record().to_bytes(),), 0, (), (121.0,))

    assert side.replies.values(reply, "presence", KEY, WALL).records == []


def test_one_forged_record_condemns_the_reply_after_one_check() -> None:
    side = Side()
    forged = tuple(pack([record(seq=seq).payload, bytes(64)]) for seq in range(15))

    with pytest.raises(BadSignature):
        side.replies.values(Values(forged, 0, ()), "presence", KEY, WALL)
    assert side.records.num_checks == 1


@pytest.mark.parametrize("reply", [Ack(), Stored(())])
def test_a_reply_of_another_kind_breaks_the_rules(reply: Message) -> None:
    side = Side()

    with pytest.raises(RemoteProtocolError):
        side.replies.contacts(reply)
    with pytest.raises(RemoteProtocolError):
        side.replies.values(reply, "presence", KEY, WALL)


BYTES = st.binary(max_size=60)
REQUESTS = st.one_of(
    st.builds(FindNode, st.one_of(BYTES, st.just(KEY)), BYTES),
    st.builds(
        FindValue,
        st.text(max_size=8),
        st.one_of(BYTES, st.just(KEY)),
        BYTES,
        st.integers(-(2**31), 2**63 - 1),
        BYTES,
    ),
    st.builds(Store, st.lists(BYTES, max_size=20).map(tuple), BYTES),
)


@settings(max_examples=150)
@given(REQUESTS)
def test_whatever_is_asked_ends_in_a_reply_or_a_refusal(message: Message) -> None:
    side = Side()

    try:
        reply = side.ask(message)
    except BadRequest:
        return

    assert isinstance(reply, Nodes | Values | Stored)
    encode_head(reply)

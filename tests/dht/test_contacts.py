import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.addresses import Address
from p2pllm.dht.contacts import Contact, ContactReader, group_of, group_of_addresses
from p2pllm.dht.records import RecordReader, Refusal, peer_key
from p2pllm.identity import Identity
from p2pllm.wire.records import MAX_RECORD_BYTES, PeerRecord, make_record

ALICE = Identity.from_seed(b"a" * 32)
RELAY = Identity.from_seed(b"r" * 32).peer_id


def peer_record(*hosts: str, is_public: bool = True, namespace: str = "peer") -> bytes:
    addresses = tuple(Address(host, 31337) for host in hosts)
    return make_record(
        namespace,
        peer_key("main", ALICE.peer_id),
        ALICE.peer_id,
        seq=7,
        issued=1000.0,
        expires=1600.0,
        body=PeerRecord(ALICE.peer_id, addresses, is_public).to_body(),
        sign=ALICE.sign,
    ).to_bytes()


def test_a_contact_is_read_from_a_peer_record() -> None:
    data = peer_record("8.8.4.4")

    contact = ContactReader(RecordReader()).read(data)

    address = Address("8.8.4.4", 31337, ALICE.peer_id)
    expected = Contact(ALICE.peer_id, ALICE.peer_id.dht_id, (address,), data, 7, "8.8.0.0/16")
    assert contact == expected


@pytest.mark.parametrize(
    "data",
    [
        peer_record("8.8.4.4", is_public=False),
        peer_record(),
        peer_record("8.8.4.4", namespace="presence"),
    ],
    ids=["asks only", "nowhere", "of another namespace"],
)
def test_a_record_of_nobody_who_can_be_asked_is_refused(data: bytes) -> None:
    assert ContactReader(RecordReader()).read(data) is Refusal.MALFORMED


@settings(max_examples=100)
@given(st.binary(max_size=MAX_RECORD_BYTES + 10))
def test_garbage_is_refused(data: bytes) -> None:
    assert isinstance(ContactReader(RecordReader()).read(data), Refusal)


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("8.8.4.4", "8.8.0.0/16"),
        ("::ffff:8.8.4.4", "8.8.0.0/16"),
        ("2a00:1450:4001:81b::200e", "2a00:1450:4001::/48"),
        ("Peer.Example", "peer.example"),
        ("192.168.1.7", None),
        ("127.0.0.1", None),
        ("fe80::1%eth0", None),
    ],
)
def test_hosts_fall_into_groups_by_network(host: str, group: str | None) -> None:
    assert group_of(host) == group


def test_a_private_address_in_front_does_not_hide_the_public_one() -> None:
    addresses = (Address("10.0.0.1", 1), Address("8.8.4.4", 1))

    assert group_of_addresses(addresses) == "8.8.0.0/16"


def test_a_relays_address_says_nothing_about_the_peer() -> None:
    assert group_of_addresses((Address("8.8.4.4", 1, ALICE.peer_id, RELAY),)) is None

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.addresses import Address
from p2pllm.errors import CodecError, LocalProtocolError
from p2pllm.identity import Identity, verify
from p2pllm.wire.codec import pack, unpack
from p2pllm.wire.records import (
    MAX_ADDRESSES,
    MAX_RECORD_BYTES,
    PEER_NAMESPACE,
    RECORD_DOMAIN,
    PeerRecord,
    Record,
    make_record,
    parse_record,
)

VECTORS = Path(__file__).resolve().parent.parent / "vectors" / "records.json"
ALICE, BOB = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)
NOW = 1_800_000_000.0


def record(namespace: str = "presence", body: dict[str, Any] | None = None) -> Record:
    return make_record(
        namespace,
        b"k" * 32,
        ALICE.peer_id,
        seq=7,
        issued=NOW,
        expires=NOW + 120,
        body={"x": 1} if body is None else body,
        sign=ALICE.sign,
    )


def peer_record() -> Record:
    addresses = (
        Address("203.0.113.7", 31337, ALICE.peer_id),
        Address("2001:db8::1", 31337, ALICE.peer_id),
        Address("relay.example", 31337, ALICE.peer_id, BOB.peer_id),
    )
    return record(PEER_NAMESPACE, PeerRecord(ALICE.peer_id, addresses).to_body())


def examples() -> dict[str, Record]:
    """The records whose bytes are written down; signatures of Ed25519 are deterministic."""
    return {"presence": record(), "peer": peer_record(), "tombstone": record(body={})}


def with_payload(**changes: object) -> bytes:
    """A record's bytes with fields of its payload changed (None: left out), unsigned."""
    fields = unpack(record().payload, max_bytes=MAX_RECORD_BYTES) | changes
    payload = pack({name: value for name, value in fields.items() if value is not None})
    return pack([payload, bytes(64)])


def peer_body(body: dict[str, Any]) -> PeerRecord:
    return PeerRecord.from_record(parse_record(record(PEER_NAMESPACE, body).to_bytes()))


@pytest.mark.parametrize("name", examples())
def test_a_record_has_its_golden_bytes(name: str) -> None:
    golden = bytes.fromhex(json.loads(VECTORS.read_text())[name])

    assert examples()[name].to_bytes() == golden
    assert parse_record(golden) == examples()[name]


def test_the_signature_of_a_golden_record_holds() -> None:
    for text in json.loads(VECTORS.read_text()).values():
        golden = parse_record(bytes.fromhex(text))
        verify(golden.subkey, RECORD_DOMAIN, golden.payload, golden.signature)


def test_an_empty_body_is_a_tombstone() -> None:
    assert record(body={}).is_tombstone
    assert not record().is_tombstone


def test_a_record_with_keys_of_a_newer_version_is_passed_on_as_it_came() -> None:
    data = with_payload(priority=3, more={"nested": [1]})

    newer = parse_record(data)

    assert newer.seq == 7
    assert newer.to_bytes() == data


def test_a_record_that_is_too_large_is_not_made() -> None:
    with pytest.raises(LocalProtocolError):
        record(body={"x": bytes(MAX_RECORD_BYTES)})


def test_a_record_that_is_too_large_is_not_read() -> None:
    payload = pack({"x": bytes(MAX_RECORD_BYTES)})

    with pytest.raises(CodecError, match="allowed"):
        parse_record(pack([payload, bytes(64)]))


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": None},
        {"v": "1"},
        {"ns": None},
        {"ns": 1},
        {"ns": "n" * 33},
        {"key": b"k" * 31},
        {"key": "k" * 32},
        {"subkey": b""},
        {"seq": -1},
        {"seq": 2**63},
        {"seq": True},
        {"seq": 1.0},
        {"issued": float("nan")},
        {"issued": float("inf")},
        {"issued": -1.0},
        {"issued": 1},
        {"issued": None},
        {"expires": float("nan")},
        {"expires": 2.0**40},
        {"body": None},
        {"body": []},
        {"body": {"deep": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]}},
    ],
    ids=str,
)
def test_a_field_that_is_missing_of_another_type_or_out_of_range_is_refused(
    changes: dict[str, object],
) -> None:
    with pytest.raises(CodecError):
        parse_record(with_payload(**changes))


@pytest.mark.parametrize(
    "value", [{}, [], [b""], [b"", b"", b""], ["", b""], [record().payload, 1], None, b"x"], ids=str
)
def test_anything_but_payload_and_signature_is_refused(value: object) -> None:
    with pytest.raises(CodecError):
        parse_record(pack(value))


def test_every_truncation_is_a_codec_error() -> None:
    data = record().to_bytes()

    for size in range(len(data)):
        with pytest.raises(CodecError):
            parse_record(data[:size])


@given(st.integers(0, 2000), st.integers(1, 255))
def test_a_changed_byte_is_a_record_or_a_codec_error(at: int, flip: int) -> None:
    data = bytearray(peer_record().to_bytes())
    data[at % len(data)] ^= flip
    try:
        PeerRecord.from_record(parse_record(bytes(data)))
    except CodecError:
        return


# --- peer records -----------------------------------------------------------------------------


def test_a_peer_record_reads_what_it_writes() -> None:
    read = PeerRecord.from_record(parse_record(peer_record().to_bytes()))

    assert read.to_body() == peer_record().body
    assert read.is_public
    assert [str(address).removeprefix(f"{ALICE.peer_id}@") for address in read.addresses] == [
        "203.0.113.7:31337",
        "[2001:db8::1]:31337",
        f"relay:{BOB.peer_id}@relay.example:31337",
    ]


@pytest.mark.parametrize("host", ["2001:db8:1111:2222:3333:4444:5555:6666", "h" * 255])
def test_of_more_addresses_than_a_record_holds_the_first_are_told(host: str) -> None:
    addresses = tuple(
        Address(host, 10_000 + i, ALICE.peer_id, BOB.peer_id) for i in range(MAX_ADDRESSES + 1)
    )

    body = PeerRecord(ALICE.peer_id, addresses).to_body()
    data = make_record(
        PEER_NAMESPACE,
        b"k" * 32,
        ALICE.peer_id,
        seq=2**63 - 1,
        issued=NOW,
        expires=NOW,
        body=body,
        sign=ALICE.sign,
    ).to_bytes()

    told = PeerRecord.from_record(parse_record(data)).addresses
    assert told == addresses[: len(told)]
    assert len(told) >= 2


def test_the_addresses_of_a_peer_record_are_its_writers() -> None:
    read = peer_body({"addresses": ["203.0.113.7:1"]})

    assert read.addresses == (Address("203.0.113.7", 1, ALICE.peer_id),)


def test_a_peer_says_that_it_is_public_or_is_not() -> None:
    assert peer_body({"addresses": [], "public": True}).is_public
    for value in (False, 1, "yes", None):
        assert not peer_body({"x": 1, "public": value}).is_public


@pytest.mark.parametrize(
    "addresses",
    [
        "203.0.113.7:1",
        {"a": 1},
        None,
        [1],
        [None],
        [b"203.0.113.7:1"],
        [["203.0.113.7:1"]],
        ["nowhere"],
        ["host:0"],
        ["ho\0st:1"],
        [f"{BOB.peer_id}@203.0.113.7:1"],
        ["relay:" + "é" * 52 + "@203.0.113.7:1"],
        ["host:" + "9" * 600],
        ["203.0.113.7:1"] * (MAX_ADDRESSES + 1),
    ],
    ids=lambda value: str(value)[:20],
)
def test_addresses_that_are_none_are_a_codec_error(addresses: object) -> None:
    with pytest.raises(CodecError):
        peer_body({"addresses": addresses})


@given(st.lists(st.text(max_size=60), max_size=3))
def test_any_texts_are_addresses_or_a_codec_error(texts: list[str]) -> None:
    try:
        read = peer_body({"addresses": texts})
    except CodecError:
        return
    assert all(address.peer_id == ALICE.peer_id for address in read.addresses)


def test_a_record_of_another_namespace_is_not_a_peers() -> None:
    with pytest.raises(CodecError):
        PeerRecord.from_record(record("presence", {"addresses": []}))


def _write_vectors() -> None:
    golden = {name: example.to_bytes().hex() for name, example in examples().items()}
    VECTORS.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":  # after a change of the format that is meant
    _write_vectors()

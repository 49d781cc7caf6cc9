from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import DhtConfig
from p2pllm.dht.records import RecordReader, RecordRules, Refusal, peer_key, supersedes
from p2pllm.identity import Identity
from p2pllm.wire.codec import pack
from p2pllm.wire.records import MAX_RECORD_BYTES, Record, make_record

ALICE, BOB = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)
NOW = 1_800_000_000.0
KEY = b"k" * 32
RULES = RecordRules("main", DhtConfig())


def record(
    *,
    seq: int = 1,
    issued: float = NOW,
    ttl_s: float = 120.0,
    body: dict[str, Any] | None = None,
    writer: Identity = ALICE,
    signer: Identity = ALICE,
    namespace: str = "presence",
    key: bytes = KEY,
) -> Record:
    return make_record(
        namespace,
        key,
        writer.peer_id,
        seq=seq,
        issued=issued,
        expires=issued + ttl_s,
        body={"x": 1} if body is None else body,
        sign=signer.sign,
    )


def test_a_well_signed_record_is_read() -> None:
    original = record()

    assert RecordReader().read(original.to_bytes()) == original


def test_a_record_signed_by_another_than_the_owner_of_its_slot_is_refused() -> None:
    forged = record(writer=ALICE, signer=BOB)

    assert RecordReader().read(forged.to_bytes()) is Refusal.BAD_SIGNATURE


def test_a_changed_body_breaks_the_signature() -> None:
    original = record()
    other = record(body={"x": 2})

    mixed = pack([other.payload, original.signature])

    assert RecordReader().read(mixed) is Refusal.BAD_SIGNATURE


def test_an_oversize_record_is_refused_before_it_is_parsed() -> None:
    reader = RecordReader()

    assert reader.read(b"x" * (MAX_RECORD_BYTES + 1)) is Refusal.OVERSIZE
    assert reader.num_checks == 0


@settings(max_examples=200)
@given(st.binary(max_size=MAX_RECORD_BYTES))
def test_garbage_is_refused_as_malformed(data: bytes) -> None:
    assert RecordReader().read(data) is Refusal.MALFORMED


@settings(max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(at: int, flip: int) -> None:
    data = bytearray(record().to_bytes())
    data[at % len(data)] ^= flip

    assert isinstance(RecordReader().read(bytes(data)), Refusal)


def test_the_same_bytes_are_checked_once() -> None:
    reader, data = RecordReader(), record().to_bytes()

    for _ in range(100):
        reader.read(data)

    assert reader.num_checks == 1


def test_the_memory_of_checked_records_is_bounded() -> None:
    reader = RecordReader(capacity=2)
    first, *others = [record(seq=seq).to_bytes() for seq in range(3)]

    for data in (first, *others):
        reader.read(data)

    assert not reader.is_known(first)
    assert all(reader.is_known(data) for data in others)


def test_a_fresh_record_has_its_whole_life_left() -> None:
    assert RULES.remaining_s(record(), NOW) == 120.0


@pytest.mark.parametrize("skew_s", [-120.0, -60.0, 60.0, 120.0])
def test_two_clocks_that_are_both_off_cost_a_fresh_record_nothing(skew_s: float) -> None:
    assert RULES.remaining_s(record(issued=NOW + skew_s), NOW) == 120.0


def test_a_record_from_the_far_future_is_refused() -> None:
    assert RULES.remaining_s(record(issued=NOW + 121), NOW) is Refusal.FAR_FUTURE


def test_an_expired_record_is_refused() -> None:
    assert RULES.remaining_s(record(issued=NOW - 241), NOW) is Refusal.EXPIRED


def test_a_record_that_expires_before_it_was_issued_is_refused() -> None:
    assert RULES.remaining_s(record(ttl_s=-1.0), NOW) is Refusal.EXPIRED


def test_lifetimes_are_cut_to_ten_minutes() -> None:
    assert RULES.remaining_s(record(ttl_s=1e6), NOW) == 600.0


def test_a_far_expiry_does_not_keep_an_old_record_alive() -> None:
    assert RULES.remaining_s(record(issued=NOW - 721, ttl_s=1e6), NOW) is Refusal.EXPIRED


def test_the_age_that_a_storer_tells_shortens_a_life() -> None:
    assert RULES.remaining_s(record(), NOW, age_s=100.0) == 20.0
    assert RULES.remaining_s(record(), NOW, age_s=120.0) is Refusal.EXPIRED


@given(st.floats(-1e9, 1e9), st.floats(0, 1000))
def test_no_age_that_a_storer_tells_makes_a_record_live_longer(age_s: float, past_s: float) -> None:
    old = record(issued=NOW - past_s)
    bound_s = max(0.0, min(120.0, 240.0 - past_s))

    left_s = RULES.remaining_s(old, NOW, age_s=age_s)

    assert isinstance(left_s, Refusal) or left_s <= bound_s + 1e-6


def test_a_peer_record_has_one_place_only() -> None:
    right = record(namespace="peer", key=peer_key("main", ALICE.peer_id))
    wrong = record(namespace="peer")

    assert not RULES.is_misplaced(right)
    assert RULES.is_misplaced(wrong)
    assert not RULES.is_misplaced(record())


def test_of_two_records_the_higher_seq_wins() -> None:
    assert supersedes(record(seq=2), record(seq=1))
    assert not supersedes(record(seq=1), record(seq=2))


def test_of_two_records_with_one_seq_all_readers_choose_the_same() -> None:
    one, other = record(body={"x": 1}), record(body={"x": 2})

    assert supersedes(one, other) != supersedes(other, one)
    assert not supersedes(one, replace(one))


def test_refusals_are_counted_by_reason() -> None:
    rules = RecordRules("main", DhtConfig())

    rules.count(Refusal.EXPIRED)
    rules.count(Refusal.EXPIRED)

    assert rules.refused == {Refusal.EXPIRED: 2}

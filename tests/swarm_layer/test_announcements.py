"""What servers announce: round trips, bounds, and whatever a hostile writer may put there."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import CodecError
from p2pllm.identity import Identity
from p2pllm.ids import ModelId, PeerId
from p2pllm.spans import Span
from p2pllm.swarm.announcements import (
    MAX_NAME_BYTES,
    MODELS_NAMESPACE,
    ModelListing,
    Presence,
    ServerState,
)
from p2pllm.wire.messages import Numerics
from p2pllm.wire.records import (
    MAX_RECORD_BYTES,
    PRESENCE_NAMESPACE,
    Record,
    make_record,
    parse_record,
)

IDENTITY = Identity.from_seed(bytes(32))
PRESENCE = Presence(
    IDENTITY.peer_id,
    Span(10, 20),
    Numerics("float32", "none", "float16"),
    ServerState.DRAINING,
    seconds_per_block_1=0.012,
    seconds_per_block_8=0.03,
    prefill_tokens_s=1234.5,
    free_tokens=16_384,
    queue_s=0.25,
    max_tokens_per_session=8192,
    relays=(PeerId(b"r" * 32),),
    rtts=((PeerId(b"p" * 32), 0.0125), (PeerId(b"q" * 32), 0.5)),
    public_name="Ada's GPU ✨",
    version="0.1.0",
    next_span=Span(15, 25),
    is_movable=True,
)


def a_record(body: dict[str, Any], namespace: str = PRESENCE_NAMESPACE) -> Record:
    """The body as it comes out of the DHT: signed, sent and parsed."""
    record = make_record(
        namespace,
        bytes(32),
        IDENTITY.peer_id,
        seq=1,
        issued=0.0,
        expires=1.0,
        body=body,
        sign=IDENTITY.sign,
    )
    return parse_record(record.to_bytes())


def test_a_presence_survives_the_way_through_the_dht() -> None:
    assert Presence.from_record(a_record(PRESENCE.to_body())) == PRESENCE


def test_the_largest_presence_fits_a_record() -> None:
    largest = Presence(
        IDENTITY.peer_id,
        Span(4000, 4096),
        Numerics("d" * 99, "q" * 99, "k" * 99),
        ServerState.DRAINING,
        seconds_per_block_1=0.1,
        seconds_per_block_8=0.1,
        prefill_tokens_s=1e11 / 3,
        free_tokens=2**40,
        queue_s=0.1,
        max_tokens_per_session=2**40,
        relays=(PeerId(b"r" * 32),) * 20,
        rtts=((PeerId(b"p" * 32), 1e9),) * 20,
        public_name="ü" * 99,
        version="v" * 99,
        next_span=Span(4001, 4096),
        is_movable=True,
    )
    record = make_record(
        PRESENCE_NAMESPACE,
        b"k" * 32,
        IDENTITY.peer_id,
        seq=2**63 - 1,
        issued=1.8e9,
        expires=1.8e9 + 0.1,
        body=largest.to_body(),
        sign=IDENTITY.sign,
    )
    assert len(record.to_bytes()) <= MAX_RECORD_BYTES
    assert len(Presence.from_record(record).rtts) == 10


def test_values_out_of_bounds_are_clamped_when_written() -> None:
    wild = replace(
        PRESENCE,
        seconds_per_block_1=0.0,
        seconds_per_block_8=float("nan"),
        prefill_tokens_s=float("inf"),
        queue_s=-1.0,
        free_tokens=-5,
        public_name="\x1b[31mred" + "x" * 99,
    )
    read = Presence.from_record(a_record(wild.to_body()))
    assert (read.seconds_per_block_1, read.seconds_per_block_8) == (1e-9, 3600.0)
    assert (read.prefill_tokens_s, read.queue_s, read.free_tokens) == (1e12, 0.0, 0)
    assert read.public_name == ("[31mred" + "x" * 99)[:MAX_NAME_BYTES]


def test_unknown_keys_are_ignored_and_optional_ones_may_be_missing() -> None:
    body = PRESENCE.to_body() | {"later": [1, 2, 3]}
    for name in ("relays", "rtts", "name", "version"):
        del body[name]
    expected = replace(PRESENCE, relays=(), rtts=(), public_name="", version="")
    assert Presence.from_record(a_record(body)) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("span", [5, 5]),
        ("span", [0, 4097]),
        ("span", [True, 2]),
        ("span", "0:5"),
        ("state", 3),
        ("state", -1),
        ("numerics", ["float32"]),
        ("numerics", ["float32", "none", "x" * 17]),
        ("block1_s", 0.0),
        ("block1_s", float("nan")),
        ("block8_s", float("inf")),
        ("block8_s", True),
        ("prefill", -1.0),
        ("queue_s", 3601.0),
        ("free", 1.5),
        ("free", 2**32),
        ("max_tokens", None),
        ("relays", b"short"),
        ("relays", bytes(32 * 4)),
        ("rtts", bytes(36 * 11)),
        ("rtts", b"\xff" * 36),
        ("name", "\x1b[2J"),
        ("name", "x" * 49),
        ("version", 1),
    ],
)
def test_a_presence_with_a_bad_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(CodecError):
        Presence.from_record(a_record(PRESENCE.to_body() | {name: value}))


def test_a_record_of_another_namespace_is_no_presence() -> None:
    with pytest.raises(CodecError):
        Presence.from_record(a_record(PRESENCE.to_body(), "peer"))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=80),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(PRESENCE.to_body())), VALUES, max_size=3))
def test_whatever_stands_in_a_body_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        presence = Presence.from_record(a_record(PRESENCE.to_body() | changes))
    except CodecError:
        return
    assert Presence.from_record(a_record(presence.to_body())) == presence


def test_decode_time_is_interpolated_between_batch_1_and_8() -> None:
    presence = replace(PRESENCE, seconds_per_block_1=0.01, seconds_per_block_8=0.024)
    seconds = [presence.seconds_per_block(batch) for batch in (1, 2, 8, 15)]
    assert seconds == pytest.approx([0.01, 0.012, 0.024, 0.038])


def test_larger_batches_never_take_less_time_whatever_was_announced() -> None:
    presence = replace(PRESENCE, seconds_per_block_1=0.01, seconds_per_block_8=0.001)
    assert presence.seconds_per_block(100) == 0.01


LISTING = ModelListing(IDENTITY.peer_id, ModelId(b"d" * 32, "smollm2-135m"), 30, 576)


def test_a_listing_survives_the_way_through_the_dht() -> None:
    read = ModelListing.from_record(a_record(LISTING.to_body(), MODELS_NAMESPACE))
    assert (read, read.model.name) == (LISTING, "smollm2-135m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("digest", b"short"),
        ("digest", "d" * 32),
        ("num_blocks", 0),
        ("num_blocks", 10**9),
        ("name", "bell\x07"),
        ("hidden_size", -1),
    ],
)
def test_a_listing_with_a_bad_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(CodecError):
        ModelListing.from_record(a_record(LISTING.to_body() | {name: value}, MODELS_NAMESPACE))

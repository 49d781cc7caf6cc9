import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm import errors
from p2pllm.errors import CodecError, LocalProtocolError
from p2pllm.ids import ModelId, PeerId, SessionId
from p2pllm.spans import Span
from p2pllm.wire.codec import pack, unpack
from p2pllm.wire.messages import (
    HEAD_BYTES,
    MAX_BODY_BYTES,
    MAX_COUNT,
    MAX_ITEMS,
    MAX_TENSORS,
    MAX_TEXT,
    MESSAGES,
    Ack,
    Close,
    Echo,
    ErrorReply,
    FindNode,
    FindValue,
    Fork,
    Forward,
    Forwarded,
    HandOver,
    HopFailed,
    HopTiming,
    Leaving,
    Message,
    Nodes,
    Numerics,
    Open,
    Opened,
    Output,
    Pages,
    Pull,
    Rewire,
    Row,
    Stay,
    Step,
    Store,
    Stored,
    Values,
    decode_message,
    encode_head,
    encode_message,
    message,
    tensors_of,
)
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

VECTORS = Path(__file__).resolve().parent.parent / "vectors" / "messages.json"

SESSION, OTHER_SESSION = SessionId(b"s" * 16), SessionId(b"t" * 16)
ROW = Row(SESSION, epoch=1, step=2, position=3, num_tokens=4, acked=1, tail=2, first_step=2)
TIMING = HopTiming(0.25, 0.5, 1_800_000_000.0, next_rtt_s=0.125, next_rate_bytes_s=1e6)
TENSOR = WireTensor(
    TensorHeader(TensorCodec.RAW, Compression.NONE, DType.FLOAT32, (4, 2)), bytes(range(32))
)


def examples() -> tuple[Message, ...]:
    """One message of each type, no field at its default: the golden bytes are of these."""
    return (
        ErrorReply(error=6, text="not the next step", retry_after_s=1.5, expected=64),
        Ack(),
        FindNode(target=b"k" * 32, sender=b"signed"),
        Nodes(nodes=(b"one", b"two")),
        FindValue("presence", b"k" * 32, subkey=b"w" * 32, cursor=20, sender=b"signed"),
        Values(records=(b"one", b"two"), cursor=2, nodes=(b"three",), ages_s=(0.5, 60.0)),
        Store(records=(b"one",), sender=b"signed"),
        Stored(refusals=("", "expired")),
        Open(
            session=SESSION,
            epoch=1,
            span=Span(10, 20),
            max_tokens=512,
            model=ModelId(b"m" * 32, "smollm2-135m"),
            numerics=Numerics("bfloat16", "int8", "float16"),
            push_token=b"p" * 16,
            client=PeerId(b"c" * 32),
            next_hop=b"signed",
            next_token=b"n" * 16,
            echo=Echo.ALL,
            codec=TensorCodec.INT8,
            is_compressed=True,
            wait_s=2.5,
            source=b"signed too",
            source_token=b"r" * 16,
            source_position=300,
            prefix_keys=(b"1" * 16, b"2" * 16),
        ),
        Opened(60.0, position=7, next_rtt_s=0.03, numerics=Numerics("float32"), next_step=9),
        Step((ROW,), TENSOR, tokens=(b"p" * 16,), timings=(TIMING,), budget_s=9.5),
        Output((ROW,), TENSOR, timings=(TIMING, TIMING), is_echo=True),
        HopFailed((ROW,), 3, "no", next_hop=b"peer", retry_after_s=2.0, expected=5, is_input=True),
        Rewire(SESSION, 2, next_hop=b"signed", next_token=b"n" * 16),
        Close((SESSION, OTHER_SESSION), epoch=3),
        Fork(SESSION, 3, OTHER_SESSION, position=64, push_token=b"p" * 16, next_token=b"n" * 16),
        Leaving((SESSION, OTHER_SESSION), deadline_s=30.0),
        HandOver(SESSION, 3, token=b"r" * 16),
        Pull(
            SESSION,
            token=b"r" * 16,
            model=ModelId(b"m" * 32, "smollm2-135m"),
            numerics=Numerics("bfloat16", "int8", "float16"),
            span=Span(10, 20),
            start=64,
            stop=300,
        ),
        Pages(position=64, num_tokens=4, checksum=2**32 - 1, tensor=TENSOR),
        Stay(ModelId(b"m" * 32, "smollm2-135m"), Span(10, 20)),
        Forward(
            ModelId(b"m" * 32, "smollm2-135m"),
            Numerics("bfloat16", "int8", "float16"),
            Span(10, 20),
            lengths=(3, 1),
            tensor=TENSOR,
            codec=TensorCodec.INT8,
            is_compressed=True,
        ),
        Forwarded(TENSOR, TIMING),
    )


def name_of(value: Message | type[Message]) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.TYPE} {cls.__name__}"


EACH = pytest.mark.parametrize("example", examples(), ids=name_of)


def encoded(msg: Message) -> bytes:
    return b"".join(encode_message(msg))


def body_of(msg: Message) -> dict[str, Any]:
    body: dict[str, Any] = unpack(encode_head(msg)[HEAD_BYTES:], max_bytes=MAX_BODY_BYTES)
    return body


def with_body(msg: Message, body: object, *, version: int | None = None) -> bytes:
    """The message's bytes with another body: what a newer or a hostile peer might send."""
    packed, tensors = pack(body), tensors_of(msg)
    head = msg.TYPE.to_bytes(2, "big")
    head += bytes([msg.VERSION if version is None else version, len(tensors)])
    tail = b"".join(tensor.head_bytes() + tensor.data for tensor in tensors)
    return head + len(packed).to_bytes(4, "big") + packed + tail


# --- golden bytes -----------------------------------------------------------------------------


def test_every_registered_message_has_golden_bytes() -> None:
    golden = json.loads(VECTORS.read_text())

    assert set(golden) == {name_of(cls) for cls in MESSAGES.values()}
    assert set(golden) == {name_of(example) for example in examples()}


@EACH
def test_a_message_is_encoded_as_its_golden_bytes(example: Message) -> None:
    assert encoded(example).hex() == json.loads(VECTORS.read_text())[name_of(example)]


@EACH
def test_golden_bytes_decode_to_the_message(example: Message) -> None:
    golden = bytes.fromhex(json.loads(VECTORS.read_text())[name_of(example)])

    assert decode_message(golden) == example
    assert decode_message(bytearray(golden)) == example


@EACH
def test_no_field_of_a_golden_message_has_its_default(example: Message) -> None:
    assert is_dataclass(example)
    for item in fields(example):
        assert getattr(example, item.name) != item.default, item.name


def test_a_type_number_is_never_given_twice() -> None:
    with pytest.raises(LocalProtocolError, match="taken"):
        message(Ack.TYPE)(ErrorReply)
    assert MESSAGES[Ack.TYPE] is Ack


# --- other versions ---------------------------------------------------------------------------


@EACH
def test_a_newer_minor_version_is_read(example: Message) -> None:
    newer = with_body(example, body_of(example) | {"zz_new": {"deep": [1, None]}}, version=255)

    assert decode_message(newer) == example


def test_version_0_is_refused() -> None:
    with pytest.raises(CodecError, match="version"):
        decode_message(with_body(Ack(), {}, version=0))


def grown(value: object) -> object:
    """An array of fields, or each one in an array of such, with two more entries."""
    if isinstance(value, list) and value and not isinstance(value[0], list):
        return [*value, "new", {"a": [None]}]
    return [grown(item) for item in value] if isinstance(value, list) else value


def test_nested_values_may_have_more_items_than_we_know() -> None:
    opening, output = examples()[8], examples()[11]

    for example, names in ((opening, ("span", "model", "numerics")), (output, ("rows", "timings"))):
        body = body_of(example)
        newer = body | {name: grown(body[name]) for name in names}
        assert newer != body
        assert decode_message(with_body(example, newer)) == example


def test_nested_values_may_lack_the_items_that_have_defaults() -> None:
    example = examples()[11]
    body = body_of(example)

    short = {"rows": [body["rows"][0][:5]], "timings": [body["timings"][0][:3]]}
    older = decode_message(with_body(example, body | short))

    assert isinstance(older, Output)
    assert older.timings == (replace(TIMING, next_rtt_s=0.0, next_rate_bytes_s=0.0),)
    assert older.rows == (replace(ROW, acked=-1, tail=0, first_step=-1),)


def test_nested_values_must_have_the_items_without_defaults() -> None:
    example = examples()[11]
    body = body_of(example)

    too_short: list[dict[str, object]] = [
        {"rows": [body["rows"][0][:4]]},
        {"timings": [[0.1, 0.2]]},
        {"rows": [[]]},
    ]
    for changes in too_short:
        with pytest.raises(CodecError):
            decode_message(with_body(example, body | changes))


@EACH
def test_a_missing_key_takes_its_default_and_is_refused_without_one(example: Message) -> None:
    assert is_dataclass(example)
    defaults = {item.name: item.default for item in fields(example)}
    body = body_of(example)
    for name in body:
        data = with_body(example, {key: body[key] for key in body if key != name})
        if defaults[name] is MISSING:
            with pytest.raises(CodecError, match=name):
                decode_message(data)
        else:
            assert decode_message(data) == replace(example, **{name: defaults[name]})


def test_a_newer_version_may_send_a_tensor_more() -> None:
    data = bytearray(encoded(examples()[10]))
    data[3] += 1

    newer = decode_message(bytes(data) + TENSOR.head_bytes() + TENSOR.data)

    assert newer == examples()[10]


# --- what does not fit ------------------------------------------------------------------------


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(CodecError, match="type"):
        decode_message((9999).to_bytes(2, "big") + encoded(Ack())[2:])


@EACH
def test_every_truncation_and_an_appended_byte_are_a_codec_error(example: Message) -> None:
    data = encoded(example)

    for size in range(len(data)):
        with pytest.raises(CodecError):
            decode_message(data[:size])
    with pytest.raises(CodecError):
        decode_message(data + b"\0")


@given(st.binary(max_size=80))
def test_random_bytes_are_a_message_or_a_codec_error(data: bytes) -> None:
    try:
        decode_message(data)
    except CodecError:
        return


@settings(max_examples=300)
@given(st.sampled_from(examples()), st.lists(st.tuples(st.integers(0, 500), st.integers(1, 255))))
def test_changed_bytes_are_a_message_or_a_codec_error(
    example: Message, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(encoded(example))
    for at, flip in changes:
        data[at % len(data)] ^= flip
    try:
        decoded = decode_message(bytes(data))
    except CodecError:
        return
    assert decode_message(encoded(decoded)) == decoded


ODD_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.sampled_from([-1, 0, 2**31, 2**63, 1e300])
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from([b"x" * 16, b"x" * 32]),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=10,
)


@settings(max_examples=300)
@given(st.sampled_from(examples()), st.data())
def test_odd_values_in_a_body_are_a_message_or_a_codec_error(
    example: Message, data: st.DataObject
) -> None:
    body = body_of(example)
    names = st.sampled_from(sorted(body)) if body else st.text(max_size=3)
    changes = data.draw(st.dictionaries(names, ODD_VALUES, max_size=3))
    try:
        decoded = decode_message(with_body(example, body | changes))
    except CodecError:
        return
    assert decode_message(encoded(decoded)) == decoded


@EACH
def test_a_body_that_is_not_a_map_is_refused(example: Message) -> None:
    for body in ([], None, 1, "", [body_of(example)]):
        with pytest.raises(CodecError):
            decode_message(with_body(example, body))


def test_a_key_that_stands_twice_is_refused() -> None:
    packed = b"\x82" + pack("target") + pack(b"k" * 32) + pack("target") + pack(b"l" * 32)
    head = encoded(FindNode(b""))[:4] + len(packed).to_bytes(4, "big")

    with pytest.raises(CodecError, match="twice"):
        decode_message(head + packed)


@pytest.mark.parametrize("depth", [100, 1000, 30_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"])
def test_a_body_nested_deeply_is_a_codec_error(depth: int, opening: bytes) -> None:
    packed = b"\x81\xa1a" + opening * min(depth, 65_000 // len(opening) // 2) + b"\xc0"
    head = encoded(Ack())[:4] + len(packed).to_bytes(4, "big")

    with pytest.raises(CodecError):
        decode_message(head + packed)


@pytest.mark.parametrize("num_bytes", [MAX_BODY_BYTES + 1, 2**32 - 1])
def test_a_body_that_is_said_to_be_huge_is_refused(num_bytes: int) -> None:
    head = encoded(Ack())[:4] + num_bytes.to_bytes(4, "big")

    with pytest.raises(CodecError, match="allowed"):
        decode_message(head + bytes(100))


def test_too_many_tensors_are_refused() -> None:
    data = bytearray(encoded(Ack()))
    data[3] = MAX_TENSORS + 1

    with pytest.raises(CodecError, match="tensors"):
        decode_message(bytes(data) + (TENSOR.head_bytes() + bytes(TENSOR.data)) * data[3])


def test_a_step_without_its_tensor_is_refused() -> None:
    data = bytearray(encoded(examples()[10]))
    data[3] = 0

    with pytest.raises(CodecError, match="tensor"):
        decode_message(data[: HEAD_BYTES + int.from_bytes(data[4:8], "big")])


def test_arrays_are_bounded() -> None:
    for cls, value in ((Stored, [""]), (Nodes, [b""]), (Close, [b"s" * 16])):
        example = next(e for e in examples() if type(e) is cls)
        body = body_of(example)
        name = next(iter(body))
        longest = decode_message(with_body(example, body | {name: value * MAX_ITEMS}))
        assert len(getattr(longest, name)) == MAX_ITEMS
        with pytest.raises(CodecError, match="array"):
            decode_message(with_body(example, body | {name: value * (MAX_ITEMS + 1)}))


def test_texts_are_bounded() -> None:
    body = body_of(examples()[0])

    decode_message(with_body(examples()[0], body | {"text": "é" * MAX_TEXT}))
    with pytest.raises(CodecError, match="text"):
        decode_message(with_body(examples()[0], body | {"text": "é" * (MAX_TEXT + 1)}))


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="too large"):
        encode_head(Nodes((bytes(MAX_BODY_BYTES),)))


# --- numbers ----------------------------------------------------------------------------------


def paths(value: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where the numbers in a body stand."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*at, key))
    elif type(value) in (int, float):
        yield at


def placed(value: Any, at: tuple[str | int, ...], new: object) -> Any:
    """The value with `new` where `at` points."""
    if not at:
        return new
    copy = value.copy()
    copy[at[0]] = placed(value[at[0]], at[1:], new)
    return copy


NUMBERS = [
    pytest.param(example, at, id=f"{name_of(example)} {'.'.join(map(str, at))}")
    for example in examples()
    for at in paths(body_of(example))
]
MAY_BE_NEGATIVE = {  # None: any number; else the least
    ("1 ErrorReply", ("error",)): None,
    ("36 HopFailed", ("error",)): None,
    ("33 Opened", ("next_rtt_s",)): None,
    ("34 Step", ("rows", 0, 5)): -1,
    ("35 Output", ("rows", 0, 5)): -1,
    ("36 HopFailed", ("rows", 0, 5)): -1,
    ("34 Step", ("rows", 0, 7)): -1,
    ("35 Output", ("rows", 0, 7)): -1,
    ("36 HopFailed", ("rows", 0, 7)): -1,
}


@pytest.mark.parametrize(("example", "at"), NUMBERS)
@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -math.inf, 1e300, True, False, None, "1", 2**63, -(2**62)]
)
def test_no_number_is_another_type_or_beyond_all_bounds(
    example: Message, at: tuple[str | int, ...], number: object
) -> None:
    with pytest.raises(CodecError):
        decode_message(with_body(example, placed(body_of(example), at, number)))


@pytest.mark.parametrize(("example", "at"), NUMBERS)
def test_no_number_is_negative_that_counts_or_measures(
    example: Message, at: tuple[str | int, ...]
) -> None:
    least = MAY_BE_NEGATIVE.get((name_of(example), at), 0)

    if least is None:
        decode_message(with_body(example, placed(body_of(example), at, -5)))
    else:
        with pytest.raises(CodecError):
            decode_message(with_body(example, placed(body_of(example), at, least - 1)))


@pytest.mark.parametrize("index", [0, 1])
def test_a_row_has_tokens_and_a_session_has_room(index: int) -> None:
    opening, step = examples()[8], examples()[10]
    example, at = [(opening, ("max_tokens",)), (step, ("rows", 0, 4))][index]

    for number in (0, MAX_COUNT + 1):
        with pytest.raises(CodecError):
            decode_message(with_body(example, placed(body_of(example), at, number)))


@pytest.mark.parametrize("span", [[], [1], [2, 1], [1, 1], [-1, 2], [0, 2**16], [0.0, 1], "ab"])
def test_what_is_not_a_span_of_blocks_is_refused(span: object) -> None:
    with pytest.raises(CodecError):
        decode_message(with_body(examples()[8], body_of(examples()[8]) | {"span": span}))


@pytest.mark.parametrize("name", ["session", "client", "model"])
def test_ids_of_another_length_are_refused(name: str) -> None:
    for value in (b"", b"x" * 15, b"x" * 33, "x" * 16, [b"x" * 31, ""], [b"x" * 32]):
        with pytest.raises(CodecError):
            decode_message(with_body(examples()[8], body_of(examples()[8]) | {name: value}))


@pytest.mark.parametrize("value", [3, 255, -1, True, "RAW", None, 1.0])
def test_codes_that_stand_for_nothing_are_refused(value: object) -> None:
    for name in ("echo", "codec"):
        with pytest.raises(CodecError):
            decode_message(with_body(examples()[8], body_of(examples()[8]) | {name: value}))


# --- meaning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", errors.REQUEST_ERRORS.values())
def test_an_error_comes_out_as_the_class_that_went_in(cls: type[errors.RequestFailed]) -> None:
    reply = ErrorReply.from_exception(cls("why", retry_after_s=2.5, expected=9))

    exc = decode_message(encoded(reply))

    assert isinstance(exc, ErrorReply)
    raised = exc.to_exception()
    assert type(raised) is cls
    assert (raised.message, raised.retry_after_s, raised.expected) == ("why", 2.5, 9)


def test_an_error_code_of_a_newer_version_is_a_failed_request() -> None:
    assert type(ErrorReply(4711, "new").to_exception()) is errors.RequestFailed


def test_a_long_sentence_is_cut_where_the_receiver_would_refuse_it() -> None:
    reply = ErrorReply.from_exception(errors.Busy("é" * 5000))

    assert decode_message(encoded(reply)) == reply


@pytest.mark.parametrize(("tail", "expected"), [(0, 4), (1, 1), (4, 4), (9, 4)])
def test_a_rows_outputs_are_its_last_tokens(tail: int, expected: int) -> None:
    assert replace(ROW, tail=tail).num_outputs == expected


def test_numerics_are_shown_in_few_words() -> None:
    assert str(Numerics("float32")) == "float32"
    assert str(Numerics("bfloat16", "int8", "bfloat16")) == "bfloat16 int8"
    assert str(Numerics("bfloat16", kv_dtype="int8")) == "bfloat16 kv int8"


def _write_vectors() -> None:
    golden = {name_of(example): encoded(example).hex() for example in examples()}
    VECTORS.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":  # after a change of the protocol that is meant
    _write_vectors()


@pytest.mark.parametrize("example", [e for e in examples() if hasattr(e, "tensor")], ids=name_of)
def test_only_pages_may_hold_bytes(example: Message) -> None:
    header = TensorHeader(TensorCodec.RAW, Compression.NONE, DType.INT8, (1, 1, 1, 8))
    message = replace(example, tensor=WireTensor(header, bytes(8)))  # type: ignore[type-var]
    if isinstance(example, Pages):
        assert decode_message(encoded(message)) == message
        return
    with pytest.raises(CodecError, match="for pages only"):
        decode_message(encoded(message))

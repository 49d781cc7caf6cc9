import math
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import CodecError, LocalProtocolError
from p2pllm.wire.codec import MAX_DEPTH, Reader, pack, unpack, unpack_map

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)

# --- Reader -----------------------------------------------------------------------------------

FIELDS = struct.Struct(">BHIQ")


@given(
    st.integers(0, 2**8 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=20),
)
def test_a_reader_reads_what_was_written(a: int, b: int, c: int, d: int, raw: bytes) -> None:
    reader = Reader(FIELDS.pack(a, b, c, d) + raw)

    assert reader.fields(FIELDS) == (a, b, c, d)
    assert reader.take(reader.remaining) == raw
    reader.finish()


@given(st.binary(max_size=16), st.lists(st.integers(0, 5), max_size=8))
def test_whatever_is_read_of_whatever_bytes_ends_within_them(data: bytes, calls: list[int]) -> None:
    reader = Reader(data)
    methods: list[Callable[[], object]] = [
        lambda: reader.fields(struct.Struct(">B")),
        lambda: reader.fields(struct.Struct(">H")),
        lambda: reader.fields(struct.Struct(">I")),
        lambda: reader.fields(FIELDS),
        reader.finish,
        lambda: reader.take(3),
    ]

    for call in calls:
        before = reader.remaining
        try:
            methods[call]()
        except CodecError:
            assert reader.remaining == before
        assert 0 <= reader.remaining <= before


@pytest.mark.parametrize("size", [-1, 4, 2**63])
def test_a_reader_never_reads_past_the_end_or_backwards(size: int) -> None:
    reader = Reader(b"abc")

    with pytest.raises(CodecError):
        reader.take(size)
    assert reader.remaining == 3


def test_finish_refuses_what_is_left() -> None:
    reader = Reader(b"ab")
    reader.take(1)

    with pytest.raises(CodecError):
        reader.finish()


def test_what_is_taken_is_not_copied() -> None:
    data = bytearray(b"abcd")
    taken = Reader(data).take(2)

    data[0] = ord("z")

    assert bytes(taken) == b"zb"


# --- msgpack ----------------------------------------------------------------------------------


@given(VALUES)
def test_unpack_reads_what_pack_wrote(value: object) -> None:
    data = pack(value)

    assert unpack(data, max_bytes=len(data)) == value
    assert unpack(memoryview(data), max_bytes=len(data)) == value


@given(VALUES)
def test_every_truncation_and_every_appended_byte_is_a_codec_error(value: object) -> None:
    data = pack(value)

    for size in range(len(data)):
        with pytest.raises(CodecError):
            unpack(data[:size], max_bytes=1000)
    with pytest.raises(CodecError):
        unpack(data + b"\0", max_bytes=len(data) + 1)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_value_or_a_codec_error(data: bytes) -> None:
    for parse in (unpack, unpack_map):
        try:
            value = parse(data, max_bytes=64)
        except CodecError:
            continue
        pack(value)  # what was taken in can be passed on


def test_more_bytes_than_allowed_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(CodecError, match="allowed"):
        unpack(b"\xc1" * 11, max_bytes=10)


@pytest.mark.parametrize(
    "head", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"], ids=["array", "map", "bin", "str", "ext"]
)
def test_a_length_of_4_gib_costs_nothing(head: bytes) -> None:
    with pytest.raises(CodecError):
        unpack(head + b"\xff\xff\xff\xff" + b"\0" * 8, max_bytes=100)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k"], ids=["arrays", "maps"])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 1023, 1024, 1025, 20_000])
def test_deep_nesting_is_a_codec_error(opening: bytes, depth: int) -> None:
    for end in (b"\x90", b""):
        with pytest.raises(CodecError):
            unpack(opening * depth + end, max_bytes=100_000)


def test_nesting_up_to_the_bound_is_read() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]

    assert unpack(pack(value), max_bytes=100) == value
    with pytest.raises(CodecError):
        unpack(pack([value]), max_bytes=100)


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x91\x82\xa1a\x01\xa1a\x01",
        b"\x82\xa1a\x01\xd9\x01a\x01",  # the same text, encoded in two ways
    ],
)
def test_a_key_that_stands_twice_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError, match="twice"):
        unpack(data, max_bytes=100)


@pytest.mark.parametrize("key", [1, None, b"a", 1.5, True])
def test_a_key_that_is_not_text_is_refused_at_any_depth(key: object) -> None:
    for value in ({key: 1}, [{key: 1}], {"a": {key: 1}}):
        with pytest.raises(CodecError):
            unpack(msgpack.packb(value), max_bytes=100)


@pytest.mark.parametrize(
    "data", [b"\xd4\x01\x00", b"\xd6\xff\0\0\0\0", b"\xd7\xff" + b"\xff" * 8, b"\xc7\0\x05"]
)
def test_extension_types_and_timestamps_are_refused(data: bytes) -> None:
    for wrapped in (data, b"\x91" + data, b"\x81\xa1a" + data):
        with pytest.raises(CodecError):
            unpack(wrapped, max_bytes=100)


@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
def test_text_that_is_not_utf8_is_refused(text: bytes) -> None:
    with pytest.raises(CodecError):
        unpack(bytes([0xA0 | len(text)]) + text, max_bytes=100)


def test_a_map_is_not_just_anything() -> None:
    others: list[object] = [[], "", 1, None, [{}]]
    for value in others:
        with pytest.raises(CodecError):
            unpack_map(pack(value), max_bytes=100)
    assert unpack_map(pack({"a": math.inf}), max_bytes=100) == {"a": math.inf}


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, "\ud800"])
def test_what_msgpack_cannot_hold_is_our_own_mistake(value: object) -> None:
    with pytest.raises(LocalProtocolError):
        pack(value)


def test_packing_what_contains_itself_is_our_own_mistake() -> None:
    value: list[object] = []
    value.append(value)

    with pytest.raises(LocalProtocolError):
        pack(value)

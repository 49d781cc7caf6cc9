import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import CodecError
from p2pllm.wire.codec import Reader
from p2pllm.wire.tensors import (
    INT8_BLOCK,
    MAX_DIMS,
    MAX_TENSOR_BYTES,
    Compression,
    DType,
    TensorCodec,
    TensorHeader,
    WireTensor,
    read_tensor,
)

SHAPES = st.lists(st.integers(1, 9), max_size=MAX_DIMS).map(tuple)
HEADERS = st.builds(
    TensorHeader,
    st.sampled_from(TensorCodec),
    st.just(Compression.NONE),
    st.sampled_from(DType),
    SHAPES,
)


def head(
    *dims: int, codec: int = 0, compression: int = 0, dtype: int = 0, ndim: int | None = None
) -> bytes:
    """The header's bytes up to the shape, as an attacker would write them."""
    first = bytes([codec, compression, dtype, len(dims) if ndim is None else ndim])
    return first + b"".join(size.to_bytes(4, "big") for size in dims)


def read(data: bytes) -> WireTensor:
    return read_tensor(Reader(data))


@given(HEADERS)
def test_a_tensor_reads_as_it_was_written(header: TensorHeader) -> None:
    tensor = WireTensor(header, bytes(range(256)) * 103)
    tensor = WireTensor(header, tensor.data[: header.coded_bytes])

    reader = Reader(tensor.head_bytes() + tensor.data)

    assert read_tensor(reader) == tensor
    reader.finish()


def test_a_header_has_these_bytes() -> None:
    header = TensorHeader(TensorCodec.INT8, Compression.NONE, DType.BFLOAT16, (2, 65))

    head_bytes = WireTensor(header, bytes(header.coded_bytes)).head_bytes()

    assert head_bytes.hex() == "02 00 01 02 00000002 00000041 0000000000000088".replace(" ", "")


@pytest.mark.parametrize(
    ("codec", "dtype", "count", "expected"),
    [
        (TensorCodec.RAW, DType.FLOAT32, 10, 40),
        (TensorCodec.RAW, DType.BFLOAT16, 10, 20),
        (TensorCodec.RAW, DType.FLOAT16, 10, 20),
        (TensorCodec.BF16, DType.FLOAT32, 10, 20),
        (TensorCodec.INT8, DType.FLOAT32, INT8_BLOCK, INT8_BLOCK + 2),
        (TensorCodec.INT8, DType.FLOAT32, INT8_BLOCK + 1, INT8_BLOCK + 1 + 4),
        (TensorCodec.INT8, DType.FLOAT32, 1, 3),
    ],
)
def test_the_coded_size_follows_from_the_header(
    codec: TensorCodec, dtype: DType, count: int, expected: int
) -> None:
    assert TensorHeader(codec, Compression.NONE, dtype, (count,)).coded_bytes == expected


@settings(max_examples=30)
@given(HEADERS)
def test_every_truncation_is_a_codec_error(header: TensorHeader) -> None:
    data = WireTensor(header, bytes(header.coded_bytes)).head_bytes() + bytes(header.coded_bytes)

    for size in range(0, len(data), max(1, len(data) // 50)):
        with pytest.raises(CodecError):
            read(data[:size])


@given(st.binary(max_size=64))
def test_any_bytes_are_a_tensor_within_them_or_a_codec_error(data: bytes) -> None:
    try:
        tensor = read(data)
    except CodecError:
        return
    assert len(tensor.data) <= min(len(data), tensor.header.coded_bytes)


@given(
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 3),
    st.lists(st.integers(0, 2**32 - 1), max_size=MAX_DIMS + 1),
    st.integers(0, 2**64 - 1),
)
def test_any_header_is_a_tensor_within_the_bounds_or_a_codec_error(
    codec: int, compression: int, dtype: int, dims: list[int], num_bytes: int
) -> None:
    data = head(*dims, codec=codec, compression=compression, dtype=dtype)
    try:
        tensor = read(data + num_bytes.to_bytes(8, "big") + bytes(64))
    except CodecError:
        return
    assert math.prod(tensor.header.shape) <= MAX_TENSOR_BYTES


@pytest.mark.parametrize("field", ["codec", "compression", "dtype"])
def test_unknown_codes_are_refused(field: str) -> None:
    for code in (3, 255):
        with pytest.raises(CodecError):
            read(head(1, **{field: code}) + (4).to_bytes(8, "big") + bytes(4))


def test_a_scalar_is_one_value() -> None:
    tensor = read(head() + (4).to_bytes(8, "big") + b"abcd")

    assert tensor.header.shape == ()
    assert tensor.header.num_values == 1
    assert tensor.data == b"abcd"


@pytest.mark.parametrize("ndim", [MAX_DIMS + 1, 255])
def test_too_many_dimensions_are_refused(ndim: int) -> None:
    with pytest.raises(CodecError, match="dimensions"):
        read(head(*[1] * ndim, ndim=ndim) + (4).to_bytes(8, "big") + bytes(4))


@pytest.mark.parametrize("dims", [(0,), (0, 5), (2**32 - 1, 2**32 - 1, 2**32 - 1, 0)])
def test_a_tensor_without_values_is_refused(dims: tuple[int, ...]) -> None:
    """Its other dimensions would be bounded by nothing."""
    with pytest.raises(CodecError, match="no values"):
        read(head(*dims) + bytes(8))


@pytest.mark.parametrize(
    "dims",
    [
        (2**32 - 1,) * 4,  # overflows 64 bits
        (2**16, 2**16, 2**16, 2**16),  # 2**64, which is 0 in 64 bits
        (2**31, 2),
        (MAX_TENSOR_BYTES // 4 + 1,),
    ],
)
@pytest.mark.parametrize("compression", [0, 1])
def test_dimensions_that_multiply_past_the_bound_are_refused(
    dims: tuple[int, ...], compression: int
) -> None:
    with pytest.raises(CodecError, match="allowed"):
        read(head(*dims, compression=compression) + bytes(8))


@pytest.mark.parametrize("num_bytes", [0, 39, 41, 2**64 - 1])
def test_uncompressed_data_has_the_size_that_the_header_says(num_bytes: int) -> None:
    with pytest.raises(CodecError, match="bytes for a tensor"):
        read(head(10) + num_bytes.to_bytes(8, "big") + bytes(64))


def test_compressed_data_is_never_larger_than_uncompressed() -> None:
    with pytest.raises(CodecError, match="larger"):
        read(head(10, compression=1) + (41).to_bytes(8, "big") + bytes(41))
    assert len(read(head(10, compression=1) + (12).to_bytes(8, "big") + bytes(12)).data) == 12


def test_the_data_of_a_tensor_is_not_copied() -> None:
    data = bytearray(head(1) + (4).to_bytes(8, "big") + b"abcd")
    tensor = read_tensor(Reader(data))

    data[-1] = ord("z")

    assert tensor.data == b"abcz"

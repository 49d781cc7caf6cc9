import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import CodecError, LocalProtocolError
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.wire.rows import can_join, decompressed, is_finite, joined, rows_of
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

CODECS = st.sampled_from(TensorCodec)
TORCH_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TARGETS = [torch.float32, torch.bfloat16]
WIDTHS = st.sampled_from([1, 63, 64, 65, 100, 128, 192])


def hidden(num_rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> WireTensor:
    return encode_tensor(values(num_rows, width, seed, dtype), TensorCodec.RAW)


def values(num_rows: int, width: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, width, generator=generator) * 3).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


def header(codec: TensorCodec, *shape: int) -> TensorHeader:
    return TensorHeader(codec, Compression.NONE, DType.FLOAT32, shape)


@settings(max_examples=60)
@given(CODECS, TORCH_DTYPES, WIDTHS, st.integers(1, 7), st.booleans(), st.data())
def test_rows_decode_to_the_bits_of_the_whole(
    codec: TensorCodec,
    dtype: torch.dtype,
    width: int,
    num_rows: int,
    compress: bool,
    data: st.DataObject,
) -> None:
    tensor = encode_tensor(values(num_rows, width, 1, dtype), codec)
    if compress:
        tensor = zstd(tensor)
    start = data.draw(st.integers(0, num_rows - 1))
    stop = data.draw(st.integers(start + 1, num_rows))

    rows = rows_of(tensor, start, stop)

    assert rows.header.shape == (stop - start, width)
    assert rows.header.compression is Compression.NONE
    assert len(rows.data) == rows.header.coded_bytes
    for target in TARGETS:
        whole = decode_tensor(tensor, dtype=target)[start:stop]
        assert same_bits(decode_tensor(rows, dtype=target), whole)


@settings(max_examples=60)
@given(CODECS, TORCH_DTYPES, WIDTHS, st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_joined_tensors_decode_to_the_bits_of_their_parts(
    codec: TensorCodec, dtype: torch.dtype, width: int, sizes: list[int]
) -> None:
    tensors = [
        encode_tensor(values(size, width, seed, dtype), codec) for seed, size in enumerate(sizes)
    ]

    whole = joined(tensors)

    assert whole.header.shape == (sum(sizes), width)
    for target in TARGETS:
        parts = torch.cat([decode_tensor(tensor, dtype=target) for tensor in tensors])
        assert same_bits(decode_tensor(whole, dtype=target), parts)


@pytest.mark.parametrize("codec", TensorCodec)
def test_cut_rows_join_to_the_bytes_that_were_sent(codec: TensorCodec) -> None:
    tensor = encode_tensor(values(6, 128, 2, torch.bfloat16), codec)

    again = joined([rows_of(tensor, 0, 1), rows_of(tensor, 1, 4), rows_of(tensor, 4, 6)])

    assert again == WireTensor(tensor.header, bytes(tensor.data))


def test_int8_rows_keep_their_scales_and_codes() -> None:
    # Two rows of 64: scales a, b, then the codes.
    tensor = WireTensor(header(TensorCodec.INT8, 2, 64), b"aabb" + b"x" * 64 + b"y" * 64)

    assert rows_of(tensor, 1, 2).data == b"bb" + b"y" * 64


def test_int8_blocks_that_straddle_rows_become_float32() -> None:
    tensor = encode_tensor(values(3, 100, 3, torch.bfloat16), TensorCodec.INT8)

    rows = rows_of(tensor, 0, 3)

    assert rows.header == header(TensorCodec.RAW, 3, 100)


def test_a_scale_that_is_no_number_is_refused_where_values_are_computed() -> None:
    data = b"\x00\x7e" + bytes(10)  # NaN, little-endian

    with pytest.raises(CodecError, match="scale"):
        rows_of(WireTensor(header(TensorCodec.INT8, 2, 5), data), 0, 1)


def test_rows_do_not_pin_the_buffer_they_came_from() -> None:
    tensor = hidden(4, 8, 1)
    view = WireTensor(tensor.header, memoryview(bytearray(tensor.data)))

    assert isinstance(rows_of(view, 0, 4).data, bytes)
    assert isinstance(joined([view]).data, bytes)


def test_tensors_of_other_coding_type_or_width_do_not_join() -> None:
    tensor = hidden(2, 8, 1)

    assert can_join(tensor, hidden(5, 8, 2))
    assert not can_join(tensor, hidden(2, 9, 1))
    assert not can_join(tensor, hidden(2, 8, 1, torch.bfloat16))
    assert not can_join(tensor, encode_tensor(values(2, 8, 1, torch.float32), TensorCodec.BF16))
    with pytest.raises(LocalProtocolError):
        joined([tensor, hidden(2, 9, 1)])


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(LocalProtocolError):
        joined([])


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 4), (0, 4), (4, 0)])
def test_a_tensor_without_rows_is_refused(shape: tuple[int, ...]) -> None:
    head = header(TensorCodec.RAW, *shape)
    tensor = WireTensor(head, bytes(head.coded_bytes))

    with pytest.raises(CodecError, match="no rows"):
        rows_of(tensor, 0, 1)
    with pytest.raises(CodecError, match="no rows"):
        joined([tensor])
    with pytest.raises(CodecError, match="no rows"):
        can_join(tensor, tensor)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (1, 1), (2, 1), (0, 4)])
def test_rows_that_are_not_there_are_our_mistake(start: int, stop: int) -> None:
    with pytest.raises(LocalProtocolError):
        rows_of(hidden(3, 4, 1), start, stop)


@pytest.mark.parametrize("codec", TensorCodec)
@pytest.mark.parametrize("excess", [-1, 1])
def test_data_of_another_size_is_refused(codec: TensorCodec, excess: int) -> None:
    head = header(codec, 3, 64)

    with pytest.raises(CodecError, match="bytes for a tensor"):
        rows_of(WireTensor(head, bytes(head.coded_bytes + excess)), 0, 1)


@pytest.mark.parametrize("compress", [False, True])
def test_decompressed_tensors_of_any_shape_have_the_coded_bytes(compress: bool) -> None:
    plain = encode_tensor(values(4, 6, 1, torch.float32).view(2, 3, 4), TensorCodec.BF16)

    result = decompressed(zstd(plain) if compress else plain)

    assert result.header == plain.header
    assert bytes(result.data) == bytes(plain.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", [TensorCodec.RAW, TensorCodec.BF16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_seen(
    codec: TensorCodec, dtype: torch.dtype, bad: float
) -> None:
    good = values(3, 50, 1, dtype)
    spoilt = good.clone()
    spoilt[1, 7] = bad

    assert is_finite(encode_tensor(good, codec))
    assert is_finite(zstd(encode_tensor(good, codec)))
    assert not is_finite(encode_tensor(spoilt, codec))
    assert not is_finite(zstd(encode_tensor(spoilt, codec)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    tensor = torch.tensor([[limits.max, limits.min, limits.tiny, 0.0]], dtype=dtype)

    assert is_finite(encode_tensor(tensor, TensorCodec.RAW))


@pytest.mark.parametrize("scale", [b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"])
def test_int8_is_finite_unless_a_scale_is_not(scale: bytes) -> None:
    head = header(TensorCodec.INT8, 2, 64)

    assert is_finite(WireTensor(head, b"\xff\x7b" * 2 + b"\x80" * 128))
    assert not is_finite(WireTensor(head, b"\xff\x7b" + scale + bytes(128)))


def test_whether_malformed_bytes_are_finite_is_not_answered() -> None:
    with pytest.raises(CodecError):
        is_finite(WireTensor(header(TensorCodec.RAW, 2, 4), bytes(31)))


@settings(max_examples=40)
@given(st.binary(max_size=80))
def test_any_bytes_as_a_compressed_tensor_end_in_rows_or_a_codec_error(data: bytes) -> None:
    head = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, (2, 2))

    try:
        rows = rows_of(WireTensor(head, data), 0, 2)
    except CodecError:
        return
    assert len(rows.data) == 16


@pytest.mark.parametrize("num_bytes", [15, 17, 10_000_000])
def test_a_frame_of_another_size_is_refused(num_bytes: int) -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(num_bytes))
    head = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, (2, 2))

    with pytest.raises(CodecError, match="does not hold"):
        decompressed(WireTensor(head, frame))


def test_a_frame_cut_short_is_refused() -> None:
    tensor = zstd(hidden(4, 16, 1))

    with pytest.raises(CodecError, match="zstd"):
        decompressed(WireTensor(tensor.header, tensor.data[:-3]))


def zstd(tensor: WireTensor) -> WireTensor:
    """The tensor as one zstd frame, however small it is."""
    head = tensor.header
    return WireTensor(
        TensorHeader(head.codec, Compression.ZSTD, head.dtype, head.shape),
        zstandard.ZstdCompressor().compress(tensor.data),
    )

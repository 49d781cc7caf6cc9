import math

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pllm.errors import CodecError, LocalProtocolError
from p2pllm.model.tensor_io import (
    bytes_of,
    choose_codec,
    decode_tensor,
    encode_tensor,
    is_finite,
    is_plain,
    plain_tensor,
)
from p2pllm.wire.codec import Reader
from p2pllm.wire.tensors import (
    Compression,
    DType,
    TensorCodec,
    TensorHeader,
    WireTensor,
    read_tensor,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 576), (7, 64), (3, 5, 11), (130,), ()]


def hidden_like(*shape: int) -> Tensor:
    """Values as hidden states are: normal, with a few features a hundred times larger."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    values[..., :: shape[-1] // 3 + 1] *= 100.0
    return values


def relative_error(decoded: Tensor, original: Tensor) -> float:
    difference = (decoded.double() - original.double()).norm()
    return float(difference / original.double().norm())


def over_the_wire(wire: WireTensor) -> WireTensor:
    """Written and read again: `data` is then a read-only view of a larger buffer."""
    return read_tensor(Reader(wire.head_bytes() + bytes(wire.data)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_raw_keeps_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    decoded = decode_tensor(over_the_wire(encode_tensor(tensor, TensorCodec.RAW)))
    assert decoded.dtype is dtype
    assert torch.equal(decoded, tensor)


@pytest.mark.parametrize("codec", list(TensorCodec))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_codec_keeps_shape_and_gives_the_type_asked_for(
    codec: TensorCodec, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    wire = over_the_wire(encode_tensor(torch.randn(shape).to(dtype), codec))
    assert decode_tensor(wire).dtype is dtype
    decoded = decode_tensor(wire, dtype=torch.bfloat16)
    assert (decoded.dtype, decoded.shape) == (torch.bfloat16, shape)


def test_bf16_rounds_to_bfloat16() -> None:
    tensor = hidden_like(3, 576)
    decoded = decode_tensor(encode_tensor(tensor, TensorCodec.BF16))
    assert torch.equal(decoded, tensor.to(torch.bfloat16).float())


@pytest.mark.parametrize("shape", [(1, 576), (300, 576), (5, 7, 100), (1, 70)])
def test_int8_is_small_and_close(shape: tuple[int, ...]) -> None:
    tensor = hidden_like(*shape)
    wire = encode_tensor(tensor, TensorCodec.INT8)
    decoded = decode_tensor(over_the_wire(wire))
    assert relative_error(decoded, tensor) <= 0.02
    if tensor.numel() % 64 == 0:
        assert len(wire.data) <= 1.04 * tensor.numel()


def test_int8_keeps_the_small_values_of_blocks_without_an_outlier() -> None:
    tensor = torch.randn(4, 64)
    tensor[1] *= 1e4
    decoded = decode_tensor(encode_tensor(tensor, TensorCodec.INT8))
    for block in range(4):
        assert relative_error(decoded[block], tensor[block]) <= 0.02


@pytest.mark.parametrize("value", [0.0, 1e-9, 3e38])
def test_int8_bears_values_past_the_range_of_its_scale(value: float) -> None:
    tensor = torch.full((1, 64), value)
    decoded = decode_tensor(encode_tensor(tensor, TensorCodec.INT8))
    assert torch.isfinite(decoded).all()
    assert float(decoded[0, 0]) == pytest.approx(min(value, 127 * 65504.0), abs=1e-8, rel=1e-3)


def test_int8_gives_a_row_the_same_bytes_in_any_piece_of_a_tensor() -> None:
    tensor = torch.randn(400, 576)  # more than one piece of the loop
    wire = encode_tensor(tensor, TensorCodec.INT8)
    alone = decode_tensor(encode_tensor(tensor[333:334], TensorCodec.INT8))
    assert torch.equal(decode_tensor(wire)[333:334], alone)


def test_a_tensor_that_is_a_strided_view_is_sent_in_order() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(decode_tensor(encode_tensor(tensor, TensorCodec.RAW)), tensor)


@pytest.mark.parametrize("codec", list(TensorCodec))
def test_compression_is_kept_where_it_pays_and_undone(codec: TensorCodec) -> None:
    tensor = hidden_like(64, 576)
    plain, packed = encode_tensor(tensor, codec), encode_tensor(tensor, codec, compress=True)
    assert packed.header.compression is Compression.ZSTD
    assert len(packed.data) < len(plain.data)
    assert torch.equal(decode_tensor(over_the_wire(packed)), decode_tensor(plain))


def test_small_or_incompressible_tensors_are_not_compressed() -> None:
    small = encode_tensor(torch.zeros(1, 576), TensorCodec.RAW, compress=True)
    noise = torch.randint(-(2**15), 2**15, (64, 576), dtype=torch.int16).view(torch.float16)
    incompressible = encode_tensor(noise, TensorCodec.RAW, compress=True)
    assert small.header.compression is Compression.NONE
    assert incompressible.header.compression is Compression.NONE


def test_decoded_tensors_have_their_own_writable_memory() -> None:
    buffer = bytearray(encode_tensor(torch.ones(4), TensorCodec.RAW).data)
    header = TensorHeader(TensorCodec.RAW, Compression.NONE, DType.FLOAT32, (4,))
    decoded = decode_tensor(WireTensor(header, memoryview(buffer)))
    buffer[:] = bytes(16)
    assert torch.equal(decoded.add_(1), torch.full((4,), 2.0))


def test_types_without_a_code_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="float64"):
        encode_tensor(torch.zeros(3, dtype=torch.float64), TensorCodec.RAW)


# --- hostile bytes -----------------------------------------------------------------------------


def zstd_header(shape: tuple[int, ...]) -> TensorHeader:
    return TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, shape)


def test_a_frame_that_states_another_size_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**24))
    with pytest.raises(CodecError, match="does not hold 16 bytes"):
        decode_tensor(WireTensor(zstd_header((4,)), bomb))


def test_a_frame_that_states_no_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(CodecError, match="does not hold 16 bytes"):
        decode_tensor(WireTensor(zstd_header((4,)), compressor.compress(bytes(16))))


def test_a_second_frame_behind_the_first_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(16))
    with pytest.raises(CodecError, match="zstd"):
        decode_tensor(WireTensor(zstd_header((4,)), frame + frame))


@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan])
def test_a_scale_that_is_not_finite_is_refused(scale: float) -> None:
    data = bytearray(encode_tensor(torch.ones(2, 64), TensorCodec.INT8).data)
    data[2:4] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8).numpy().tobytes()
    header = TensorHeader(TensorCodec.INT8, Compression.NONE, DType.FLOAT32, (2, 64))
    with pytest.raises(CodecError, match="scale"):
        decode_tensor(WireTensor(header, data))


def test_data_of_another_length_than_the_header_says_is_refused() -> None:
    header = TensorHeader(TensorCodec.RAW, Compression.NONE, DType.FLOAT32, (4,))
    with pytest.raises(CodecError, match="15 bytes"):
        decode_tensor(WireTensor(header, bytes(15)))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(TensorCodec)),
    st.sampled_from(list(Compression)),
    st.sampled_from(list(DType)),
    st.lists(st.integers(0, 20), max_size=4).map(tuple),
    st.binary(max_size=200),
)
def test_any_bytes_decode_or_raise_codec_error(
    codec: TensorCodec,
    compression: Compression,
    dtype: DType,
    shape: tuple[int, ...],
    data: bytes,
) -> None:
    header = TensorHeader(codec, compression, dtype, shape)
    try:
        decoded = decode_tensor(WireTensor(header, data), dtype=torch.float32)
    except CodecError:
        return
    assert decoded.shape == shape


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=150, max_size=150))
def test_any_int8_bytes_of_the_right_length_decode_or_raise_codec_error(data: bytes) -> None:
    header = TensorHeader(TensorCodec.INT8, Compression.NONE, DType.BFLOAT16, (2, 72))
    try:
        decoded = decode_tensor(WireTensor(header, data))
    except CodecError as exc:
        assert "scale" in str(exc)  # noqa: PT017
    else:
        assert torch.isfinite(decoded).all()


# --- auto --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate_bytes_s", "expected"),
    [
        (None, (TensorCodec.RAW, False)),  # not measured
        (1e9, (TensorCodec.RAW, False)),  # this machine, or a local network
        (100e6, (TensorCodec.BF16, False)),  # 32 KiB of float32 take 0.33 ms
        (30e6, (TensorCodec.INT8, False)),
        (1e6, (TensorCodec.INT8, True)),
    ],
)
def test_auto_takes_the_most_exact_codec_that_the_link_carries_in_time(
    rate_bytes_s: float | None, expected: tuple[TensorCodec, bool]
) -> None:
    assert choose_codec(4 * 8192, DType.FLOAT32, rate_bytes_s) == expected


def test_auto_does_not_round_what_is_bfloat16_already() -> None:
    assert choose_codec(2 * 8192, DType.BFLOAT16, 100e6) == (TensorCodec.RAW, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    values = torch.randn(3, 50).to(dtype)
    assert is_finite(values)
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = values.clone()
        spoiled[1, 7] = bad
        assert not is_finite(spoiled)
    spoiled[2, 3] = math.inf  # they add up to NaN
    assert not is_finite(spoiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_values_too_large_to_add_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((2, 50), torch.finfo(dtype).max, dtype=dtype))


def test_raw_values_of_the_wanted_type_are_plain_and_others_are_not() -> None:
    values = torch.randn(3, 6).bfloat16()
    raw = encode_tensor(values, TensorCodec.RAW)
    assert is_plain(raw, torch.bfloat16)
    assert not is_plain(raw, torch.float32)
    assert not is_plain(encode_tensor(values, TensorCodec.INT8), torch.bfloat16)
    assert not is_plain(WireTensor(raw.header, bytes(raw.data)[:-1]), torch.bfloat16)


def test_bytes_of_rows_are_their_raw_coding() -> None:
    values = torch.randn(3, 6)
    wire = plain_tensor(bytes(bytes_of(values)[24:]), values)
    assert decode_tensor(wire).equal(values[1:])
    assert wire.header == encode_tensor(values[1:], TensorCodec.RAW).header

"""Coded tensors of hidden states, cut and joined by rows without decoding their values.

A tensor of shape (N, D) holds one row per token. Whoever keeps sent tensors (the client's
journals) wants some of those tokens back, or several tensors as one, with the very bytes that were
sent. RAW and BF16 rows simply follow each other. INT8 keeps all scales before all codes
(`p2pllm.wire.tensors`), so a row has two parts, cut and joined separately; its blocks end where
rows end only if D is a multiple of 64. Where it is not, a block straddles two rows, and the tensor
is turned into the float32 values that it decodes to: larger, but a receiver computes the same.

Only bytes are handled here; values between torch and the wire are `p2pllm.model.tensor_io`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import zstandard

from p2pllm.errors import CodecError, LocalProtocolError
from p2pllm.wire.tensors import (
    INT8_BLOCK,
    Compression,
    DType,
    TensorCodec,
    TensorHeader,
    WireTensor,
)

# Of several steps in one message. With 64 bytes for a row and its push token, 256 rows are a
# quarter of what a body may have; with the longest of tokens half.
TOKENS_TOGETHER = 256

_BF16_EXPONENT = 0x7F80

T = TypeVar("T")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class RowCoding:
    """What rows must have in common to stand in one tensor."""

    codec: TensorCodec
    dtype: DType
    width: int  # D
    scale_bytes: int  # per row; 0 except for INT8
    value_bytes: int  # per row

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, scales included."""
        return self.scale_bytes + self.value_bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """Uncompressed rows, in the two parts that are cut separately; the buffers may be views."""

    coding: RowCoding
    num_rows: int
    scales: Buffer  # num_rows * coding.scale_bytes
    values: Buffer  # num_rows * coding.value_bytes

    def cut(self, start: int, stop: int) -> "Rows":
        """Rows [start, stop), as views."""
        coding = self.coding
        return Rows(
            coding,
            stop - start,
            memoryview(self.scales)[start * coding.scale_bytes : stop * coding.scale_bytes],
            memoryview(self.values)[start * coding.value_bytes : stop * coding.value_bytes],
        )


def decompressed(tensor: WireTensor) -> WireTensor:
    """The tensor, of any shape, without its compression; itself if it has none.

    Raises CodecError unless the data is what the header says. A zstd frame must state its size,
    and state the one that we expect: nothing is allocated on its word alone.
    """
    header, data = tensor.header, tensor.data
    num_bytes = header.coded_bytes
    if header.compression is Compression.NONE:
        if len(data) != num_bytes:
            raise CodecError(f"{len(data)} bytes for a tensor of {num_bytes}")
        return tensor
    try:
        if zstandard.get_frame_parameters(data).content_size != num_bytes:
            raise CodecError(f"a zstd frame that does not hold {num_bytes} bytes")
        plain: bytes = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=num_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as exc:
        raise CodecError(f"zstd: {exc}") from exc
    if len(plain) != num_bytes:
        raise CodecError(f"{len(plain)} bytes for a tensor of {num_bytes}")
    header = TensorHeader(header.codec, Compression.NONE, header.dtype, header.shape)
    return WireTensor(header, plain)


def is_finite(tensor: WireTensor) -> bool:
    """Whether a tensor, of any shape, holds neither NaN nor infinity, in float32 at least.

    Raises CodecError if `tensor` is malformed.
    """
    header, data = tensor.header, decompressed(tensor).data
    if header.codec is TensorCodec.INT8:  # no product of finite factors leaves float32
        num_blocks = -(-header.num_values // INT8_BLOCK)
        return bool(np.isfinite(np.frombuffer(data, dtype="<f2", count=num_blocks)).all())
    dtype = DType.BFLOAT16 if header.codec is TensorCodec.BF16 else header.dtype
    if dtype is DType.BFLOAT16:  # which numpy lacks: an exponent of ones is NaN or infinity
        bits = np.frombuffer(data, dtype="<u2") & _BF16_EXPONENT
        return bool((bits != _BF16_EXPONENT).all())
    values = np.frombuffer(data, dtype="<f4" if dtype is DType.FLOAT32 else "<f2")
    return bool(np.isfinite(values).all())


def rows_of(tensor: WireTensor, start: int, stop: int) -> WireTensor:
    """Rows [start, stop) as an uncompressed tensor with memory of its own.

    Raises CodecError if `tensor` is malformed or not of shape (N, D).
    """
    rows = split(tensor)
    if not 0 <= start < stop <= rows.num_rows:
        raise LocalProtocolError(f"rows [{start}, {stop}) of a tensor of {rows.num_rows}")
    return assembled([rows.cut(start, stop)])


def can_join(a: WireTensor, b: WireTensor) -> bool:
    """Whether the rows of both may stand in one tensor.  Raises CodecError as `split` does."""
    return row_coding(a.header) == row_coding(b.header)


def joined(tensors: Sequence[WireTensor]) -> WireTensor:
    """All rows, in order, as one uncompressed tensor with memory of its own.

    Raises CodecError as `split` does, LocalProtocolError unless the tensors can be joined.
    """
    return assembled([split(tensor) for tensor in tensors])


def may_join_others(header: TensorHeader) -> bool:
    """Whether a tensor's rows may be joined with others' just to save a message.

    What was compressed stays so: somebody has a narrow line, and `joined` would undo it.
    """
    return header.compression is Compression.NONE


def messages_of(items: Sequence[T], num_tokens: Callable[[T], int]) -> Iterator[list[T]]:
    """Divide steps that may travel together into messages of at most `TOKENS_TOGETHER` tokens.

    A step is never divided, so one that is larger is a message of its own.
    """
    message: list[T] = []
    total = 0
    for item in items:
        count = num_tokens(item)
        if message and total + count > TOKENS_TOGETHER:
            yield message
            message, total = [], 0
        message.append(item)
        total += count
    if message:
        yield message


def row_coding(header: TensorHeader) -> RowCoding:
    """How the rows of such a tensor are kept.  Raises CodecError unless it is (N, D)."""
    if len(header.shape) != 2 or 0 in header.shape:
        raise CodecError(f"a tensor of shape {header.shape} has no rows")
    return _row_coding(header.codec, header.dtype, header.shape[1])


@lru_cache(maxsize=64)  # every token asks, and a swarm knows few codings
def _row_coding(codec: TensorCodec, dtype: DType, width: int) -> RowCoding:
    if codec is TensorCodec.INT8 and width % INT8_BLOCK:
        codec, dtype = TensorCodec.RAW, DType.FLOAT32
    if codec is TensorCodec.INT8:
        return RowCoding(codec, dtype, width, 2 * (width // INT8_BLOCK), width)
    itemsize = 2 if codec is TensorCodec.BF16 else dtype.itemsize
    return RowCoding(codec, dtype, width, 0, width * itemsize)


def split(tensor: WireTensor) -> Rows:
    """The rows of a tensor, as views of its data where it is neither compressed nor straddling.

    Raises CodecError if `tensor` is malformed or not of shape (N, D).
    """
    coding = row_coding(tensor.header)
    data = decompressed(tensor).data
    num_rows = tensor.header.shape[0]
    if tensor.header.codec is not coding.codec:
        data = _float32_values(data, tensor.header)
    if not coding.scale_bytes:
        return Rows(coding, num_rows, b"", data)
    view = memoryview(data)
    num_scale_bytes = num_rows * coding.scale_bytes
    return Rows(coding, num_rows, view[:num_scale_bytes], view[num_scale_bytes:])


def assembled(parts: Sequence[Rows]) -> WireTensor:
    """The rows of all parts, in order, as one tensor with memory of its own."""
    if not parts or any(part.coding != parts[0].coding for part in parts):
        raise LocalProtocolError("only rows of one coding make a tensor")
    coding = parts[0].coding
    shape = (sum(part.num_rows for part in parts), coding.width)
    data = b"".join([*(part.scales for part in parts), *(part.values for part in parts)])
    return WireTensor(TensorHeader(coding.codec, Compression.NONE, coding.dtype, shape), data)


def _float32_values(data: Buffer, header: TensorHeader) -> bytes:
    """What INT8 data decodes to, by the arithmetic of `tensor_io`: float32(scale) * code."""
    num_blocks = -(-header.num_values // INT8_BLOCK)
    scales = np.frombuffer(data, dtype="<f2", count=num_blocks).astype(np.float32)
    if not np.isfinite(scales).all():
        raise CodecError("a scale that is not a finite number")
    values = np.frombuffer(data, dtype=np.int8, offset=2 * num_blocks).astype("<f4")
    num_whole = header.num_values // INT8_BLOCK
    blocks = values[: num_whole * INT8_BLOCK].reshape(-1, INT8_BLOCK)  # (blocks, 64), a view
    blocks *= scales[:num_whole, None]
    values[num_whole * INT8_BLOCK :] *= scales[-1]  # empty if the last block is whole
    return values.tobytes()

"""How a tensor lies on the wire: a small binary header, then raw bytes.

    u8 codec   u8 compression   u8 dtype   u8 ndim   u32 dims[ndim]   u64 num_bytes   data

`dtype` is what the sender computes in, or int8 for keys and values that it holds in 8 bits. `codec`
says how the values are coded:

    RAW    the values, little-endian, in `dtype`
    BF16   the values rounded to bfloat16
    INT8   blocks of 64 consecutive values (the last one may be shorter): first one float16 scale
           per block, then one int8 per value; value = scale * code

`compression` says whether those coded bytes are then one zstd frame. `num_bytes` counts the
bytes that follow. The coded size follows from codec, dtype and shape alone, so a receiver knows
what to allow for before it allocates or decompresses anything.
"""

import enum
import math
import struct
from dataclasses import dataclass

from p2pllm.errors import CodecError
from p2pllm.wire.codec import Reader

INT8_BLOCK = 64  # values per scale: 1 + 2/64 = 1.03 bytes a value
MAX_DIMS = 4
MAX_TENSOR_BYTES = 256 * 2**20  # coded; a 16k-token prompt of a 70B model in bfloat16


class DType(enum.IntEnum):
    """Element types; the number is the code on the wire."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3  # of `Pages` only: codes and scales, in one

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZES[self]


_ITEMSIZES = (4, 2, 2, 1)  # by number


class TensorCodec(enum.IntEnum):
    """How values are coded; the number is the code on the wire."""

    RAW = 0
    BF16 = 1
    INT8 = 2


class Compression(enum.IntEnum):
    """What is done to the coded bytes; the number is the code on the wire."""

    NONE = 0
    ZSTD = 1


# By number, all from 0 on: an enum's own look-up takes ten times as long.
_CODECS, _COMPRESSIONS, _DTYPES = tuple(TensorCodec), tuple(Compression), tuple(DType)
_CODES = struct.Struct(">4B")
_SIZES = tuple(struct.Struct(f">{count}IQ") for count in range(MAX_DIMS + 1))
_HEAD_LAYOUTS = tuple(struct.Struct(f">4B{count}IQ") for count in range(MAX_DIMS + 1))


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Everything about a tensor but its bytes."""

    codec: TensorCodec
    compression: Compression
    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def coded_bytes(self) -> int:
        """Bytes after coding and before compression."""
        count = self.num_values
        if self.codec is TensorCodec.RAW:
            return count * self.dtype.itemsize
        if self.codec is TensorCodec.BF16:
            return count * 2
        return count + 2 * -(-count // INT8_BLOCK)


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A coded tensor: header and bytes. `data` is never copied on its way to the socket."""

    header: TensorHeader
    data: bytes | bytearray | memoryview

    def head_bytes(self) -> bytes:
        """The header as it precedes `data` on the wire."""
        header = self.header
        layout = _HEAD_LAYOUTS[len(header.shape)]
        codes = (header.codec, header.compression, header.dtype, len(header.shape))
        return layout.pack(*codes, *header.shape, len(self.data))


def read_tensor(reader: Reader) -> WireTensor:
    """Parse header and bytes; `data` stays a view of the reader's buffer.

    Raises CodecError for unknown codes, shapes past the bounds, or a size that cannot be right.
    """
    *codes, num_dims = reader.fields(_CODES)
    try:
        codec, compression, dtype = _CODECS[codes[0]], _COMPRESSIONS[codes[1]], _DTYPES[codes[2]]
    except IndexError as exc:
        raise CodecError(f"an unknown coding of tensors: {codes}") from exc
    if num_dims > MAX_DIMS:
        raise CodecError(f"a tensor of {num_dims} dimensions; at most {MAX_DIMS} are allowed")
    *sizes, num_bytes = reader.fields(_SIZES[num_dims])
    shape = tuple(sizes)
    if 0 in shape:
        raise CodecError(f"a tensor of shape {shape} has no values")
    header = TensorHeader(codec, compression, dtype, shape)
    if header.coded_bytes > MAX_TENSOR_BYTES:
        raise CodecError(f"a tensor of {header.coded_bytes} bytes; {MAX_TENSOR_BYTES} are allowed")
    if compression is Compression.NONE and num_bytes != header.coded_bytes:
        raise CodecError(f"{num_bytes} bytes for a tensor of {header.coded_bytes}")
    if num_bytes > header.coded_bytes:
        raise CodecError("compression that makes a tensor larger is not allowed")
    return WireTensor(header, reader.take(num_bytes))

"""Hidden states between torch and the wire (`p2pllm.wire.tensors` has the layout).

`encode_tensor` rounds and perhaps compresses; `decode_tensor` undoes that, trusting nothing: sizes
are checked before anything is allocated, and what comes out may still hold NaN only if the codec
carries NaN as a value (whoever computes with it looks).

int8 is blockwise: 64 values share a scale, so an outlier spoils its neighbours only
(arXiv 2110.02861; 64 instead of 2048, because hidden states have outliers in fixed features).
"""

import math

import numpy as np
import torch
import zstandard
from torch import Tensor

from p2pllm.errors import CodecError, LocalProtocolError
from p2pllm.wire.rows import decompressed
from p2pllm.wire.tensors import (
    INT8_BLOCK,
    Compression,
    DType,
    TensorCodec,
    TensorHeader,
    WireTensor,
)

_MAX_CODE = 127
_MAX_SCALE = 65504.0  # of float16
# Quantizing takes several passes over the values; pieces of this many stay in the cache.
_PIECE = 2**17

# Below this, a compressed message saves less than the time to find out.
_MIN_COMPRESSED_BYTES = 16 * 2**10
_ZSTD_LEVEL = 1  # higher ones gain under 1 % on such bytes, at a tenth of the speed

# "auto": the most exact codec whose transfer takes no longer than this per token and hop. A block
# computes a prefill token in about 0.1 ms, so a span of several hides that much behind its work.
_MAX_TRANSFER_S = 0.25e-3
# zstd and back costs 21 ms per 16 MiB of bfloat16 and gains 22 %; per 8 MiB of int8 11 ms and 5 %.
# The gain is worth the time, for both, on links slower than this.
_SLOW_LINK_BYTES_S = 20e6

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
    DType.INT8: torch.int8,
}
_WIRE_DTYPES = {dtype: code for code, dtype in _TORCH_DTYPES.items()}


def choose_codec(
    num_bytes: int, dtype: DType, rate_bytes_s: float | None
) -> tuple[TensorCodec, bool]:
    """The codec for "auto", and whether to try compression.

    `num_bytes`: one token's hidden state in `dtype`, uncoded. `rate_bytes_s`: of the slowest
    link of the route; None if none was measured, and what was not measured is not called slow.
    """
    if rate_bytes_s is None:
        return TensorCodec.RAW, False
    is_slow = rate_bytes_s < _SLOW_LINK_BYTES_S
    num_values = num_bytes // dtype.itemsize
    for codec in (TensorCodec.RAW, TensorCodec.BF16):
        header = TensorHeader(codec, Compression.NONE, dtype, (num_values,))
        if header.coded_bytes <= _MAX_TRANSFER_S * rate_bytes_s:
            return codec, is_slow
    return TensorCodec.INT8, is_slow


def encode_tensor(tensor: Tensor, codec: TensorCodec, *, compress: bool = False) -> WireTensor:
    """Code a float tensor of any device.

    The result may share memory with `tensor`, which must not be changed while it is sent.
    `compress` tries zstd on large ones and keeps it if that is smaller.
    """
    if tensor.dtype not in _WIRE_DTYPES:
        raise LocalProtocolError(f"a tensor of {tensor.dtype} cannot be sent")
    header = TensorHeader(codec, Compression.NONE, _WIRE_DTYPES[tensor.dtype], tuple(tensor.shape))
    if codec is TensorCodec.RAW and not compress and tensor.device.type == "cpu":
        return WireTensor(header, bytes_of(tensor.detach().contiguous()))  # nothing else is needed
    values = tensor.detach().to("cpu").reshape(-1)
    if codec is TensorCodec.INT8:
        coded = _quantize(values, header)
    else:
        coded = values.to(torch.bfloat16) if codec is TensorCodec.BF16 else values
    data = bytes_of(coded.contiguous())
    if compress and len(data) >= _MIN_COMPRESSED_BYTES:
        compressed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)
        if len(compressed) < len(data):
            return WireTensor(
                TensorHeader(codec, Compression.ZSTD, header.dtype, header.shape), compressed
            )
    return WireTensor(header, data)


def decode_tensor(wire: WireTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, on the CPU, in `dtype` (None: what the sender computes in), with its own memory.

    Raises CodecError for data that does not decode to what the header says.
    """
    header = wire.header
    target = _TORCH_DTYPES[header.dtype] if dtype is None else dtype
    coded = _own(decompressed(wire).data)
    if header.codec is TensorCodec.INT8:
        values = _dequantize(coded, header, target)
    elif header.codec is TensorCodec.BF16:
        values = coded.view(torch.bfloat16).to(target)
    else:
        values = coded.view(_TORCH_DTYPES[header.dtype]).to(target)
    return values.view(header.shape)


def is_plain(wire: WireTensor, dtype: torch.dtype) -> bool:
    """Are the coded bytes just the values, in this type? Then nothing needs to be decoded."""
    header = wire.header
    return (
        header.codec is TensorCodec.RAW
        and header.compression is Compression.NONE
        and _TORCH_DTYPES[header.dtype] is dtype
        and len(wire.data) == header.coded_bytes
    )


def plain_tensor(data: bytes, like: Tensor) -> WireTensor:
    """Rows as they lie in memory, as RAW has them; `like` (N, D) has their type and width."""
    width = like.shape[1]
    shape = (len(data) // (width * like.itemsize), width)
    return WireTensor(
        TensorHeader(TensorCodec.RAW, Compression.NONE, _WIRE_DTYPES[like.dtype], shape), data
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; whoever writes to it changes the tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def is_finite(tensor: Tensor) -> bool:
    """Is there neither NaN nor infinity in a float tensor?

    A sum has either if any of its terms has, and takes a tenth of the time of looking at each: only
    if it is not finite itself is there something to look for (or finite values too large to add).
    """
    # In its own type, which is faster; but float16 ends at 65,504, and a sum is soon past that.
    total = tensor.sum(dtype=torch.float32 if tensor.dtype is torch.float16 else None)
    return math.isfinite(float(total)) or bool(torch.isfinite(tensor).all())


def _own(data: bytes | bytearray | memoryview) -> Tensor:
    """The coded bytes as a uint8 tensor.

    Copied once: a message's buffer is read-only, of any alignment, and much larger than this.
    """
    coded = torch.empty(len(data), dtype=torch.uint8)
    coded.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
    return coded


def _num_blocks(num_values: int) -> int:
    return -(-num_values // INT8_BLOCK)


def _quantize(values: Tensor, header: TensorHeader) -> Tensor:
    """values: (n,).  Returns the coded bytes: float16 scales, then int8 codes."""
    num_blocks = _num_blocks(len(values))
    coded = torch.empty(header.coded_bytes, dtype=torch.uint8)
    scales, codes = coded[: 2 * num_blocks].view(torch.float16), coded[2 * num_blocks :]
    codes = codes.view(torch.int8)
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE].float()
        count = len(piece)
        if count % INT8_BLOCK:  # the last one
            piece = torch.nn.functional.pad(piece, (0, -count % INT8_BLOCK))
        blocks = piece.view(-1, INT8_BLOCK)
        scale = (blocks.abs().amax(1) / _MAX_CODE).clamp_(max=_MAX_SCALE).half()
        first = start // INT8_BLOCK
        scales[first : first + len(blocks)] = scale
        # Codes are of the scale as it was rounded; a block of zeros has scale 0 and codes 0.
        inverse = scale.float().reciprocal_().nan_to_num_(posinf=0.0)
        blocks = (blocks * inverse[:, None]).round_().clamp_(-_MAX_CODE, _MAX_CODE)
        codes[start : start + count] = blocks.view(-1)[:count]
    return coded


def _dequantize(coded: Tensor, header: TensorHeader, dtype: torch.dtype) -> Tensor:
    num_values = header.num_values
    num_blocks = _num_blocks(num_values)
    scales = coded[: 2 * num_blocks].view(torch.float16).float()
    if not math.isfinite(float(scales.sum())):  # float16 values cannot overflow this sum
        raise CodecError("a scale that is not a finite number")
    codes = coded[2 * num_blocks :].view(torch.int8)
    values = torch.empty(num_values, dtype=dtype)
    whole = num_values - num_values % INT8_BLOCK
    for start in range(0, whole, _PIECE):
        stop = min(start + _PIECE, whole)
        scale = scales[start // INT8_BLOCK : stop // INT8_BLOCK, None]
        values[start:stop] = (codes[start:stop].view(-1, INT8_BLOCK) * scale).view(-1)
    if whole < num_values:
        values[whole:] = codes[whole:] * scales[-1]
    return values

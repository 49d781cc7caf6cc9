"""Linear layers over quantized weights: torch's own kernels, and one of ours.

A step of few tokens reads every weight once and computes little, so half or a quarter of the
bytes is half or a quarter of the time. The kernels dequantize as they multiply:

- `Int4Linear`: tinygemm's `_weight_int4pack_mm` on CUDA, its namesake on CPU. Scale and centre of
  a group are two bytes each, so that a weight takes 5 bits.
- `int4_triton.FusedInt4Linear`: the same product on CUDA in Triton, because tinygemm is slow for
  more than a few rows. It is taken wherever Triton is installed and sizes are multiples of 128.
- `Int8Linear`: `_weight_int8pack_mm`, one scale per output. Its CUDA version is slower than to
  dequantize first (H100, 57,344 × 8,192: 2.9 ms against 1.6, bfloat16 0.3), so there int8 saves
  memory only.

No kernel of torch has 8 bits in groups, as GGUF's Q8_0 is. Such a code is 16 · high + low, with
both in 4 bits, so the matrix is two of 4 bits side by side, with scales 16 · s and s, times the
input twice: exact, 10 bits per weight, and twice the time of int4.

The CPU kernels multiply in float32, which is slow for many tokens: past `MAX_ROWS` the weights
become bfloat16 for the moment of the product, a layer at a time. That reads the packed layout,
which is the kernel's own business; so it is tried on the layer's own codes when it is packed, and
where it does not give them back the kernel does it all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.model import int4_layout
from p2pllm.model.kernels import int4_kernels
from p2pllm.model.packed_linear import linear
from p2pllm.model.quantize import GROUP, Codes, concatenated

Projection = Callable[[Tensor], Tensor]
"""A linear layer: (N, in) -> (N, out)."""

# Tokens up to which the kernel beats dequantizing first, on an EPYC with AVX-512 and bfloat16.
MAX_ROWS_INT4, MAX_ROWS_TWO_PLANES, MAX_ROWS_INT8 = 48, 24, 24

PACKED_BLOCK = 64  # outputs that the CPU's AVX-512 kernel packs together
INNER_TILES = 2  # of tinygemm: any input that is a multiple of 32


def projection(parts: Sequence[Tensor | Codes], bias: Tensor | None) -> Projection:
    """The layer of some matrices that read the same input, one after the other.

    All are tensors or all are codes. Raises CheckpointError for sizes that kernels cannot take.
    """
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return linear(torch.cat(tensors), bias)
    codes = concatenated([part for part in parts if isinstance(part, Codes)])
    if codes.bits == 8 and codes.scales.shape[1] == 1:
        return Int8Linear(codes.codes, codes.scales.flatten(), bias)
    return _in_int4(codes if codes.bits == 4 else two_planes(codes), bias, codes.shape[1])


def _in_int4(codes: Codes, bias: Tensor | None, num_inputs: int) -> Projection:
    kernels = int4_kernels(codes.codes)
    in_groups = codes.shape[1] == GROUP * codes.scales.shape[1]
    if kernels is not None and in_groups and int4_layout.fits(codes.shape[0], num_inputs):
        fused: Projection = kernels.FusedInt4Linear.pack(codes, bias, num_inputs)
        return fused
    return Int4Linear.pack(codes, bias, num_inputs)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """`weight` (out, in) int8, `scales` (out,)."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= MAX_ROWS_INT8 and not x.is_cuda:
            y = torch._weight_int8pack_mm(x, self.weight, self.scales)
        else:
            y = F.linear(x, self.weight.to(x.dtype)).mul_(self.scales)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """`packed` as the device's kernel wants it; `scales` (in / 32, out, 2): scale and centre.

    `num_planes`: how often the input is repeated. `can_unpack`: the layout of `packed` is the one
    that `_unpacked` reads.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    num_planes: int
    can_unpack: bool

    @classmethod
    def pack(cls, codes: Codes, bias: Tensor | None, num_inputs: int) -> "Int4Linear":
        """Bring 4-bit codes in groups of 32 into the layout of their device's kernel."""
        num_outputs, depth = codes.shape
        is_cuda = codes.codes.is_cuda
        if depth != GROUP * codes.scales.shape[1] or num_outputs % (8 if is_cuda else 16):
            raise CheckpointError(
                f"no int4 kernel for a matrix of {num_outputs} × {num_inputs}: it takes inputs in "
                f"groups of {GROUP} and outputs by 16"
            )
        packed = _packed_for_cuda(codes.codes) if is_cuda else _packed_for_cpu(codes.codes)
        scales = torch.stack((codes.scales.T, codes.centres.T), dim=-1).contiguous()
        can_unpack = not is_cuda and num_outputs % PACKED_BLOCK == 0
        can_unpack = can_unpack and torch.equal(_unpacked(packed, torch.int8), codes.codes.T)
        return cls(packed, scales, bias, depth // num_inputs, can_unpack)

    def __call__(self, x: Tensor) -> Tensor:
        limit = MAX_ROWS_INT4 if self.num_planes == 1 else MAX_ROWS_TWO_PLANES
        if self.can_unpack and x.shape[0] > limit:
            y = x @ self.dequantized()
        else:
            if self.num_planes > 1:
                x = x.repeat(1, self.num_planes)
            y = self._kernel(x)
        return y if self.bias is None else y.add_(self.bias)

    def _kernel(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return torch._weight_int4pack_mm(x, self.packed, GROUP, self.scales)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scales)
        return y

    def dequantized(self) -> Tensor:
        """The weights, (in, out), in bfloat16."""
        codes = _unpacked(self.packed, torch.bfloat16)  # (planes · in, out)
        num_outputs, scales = codes.shape[1], self.scales
        if self.num_planes > 1:
            high, low = codes.chunk(2)
            codes = high.mul_(16).add_(low)  # integers up to 256 are exact
            scales = scales.chunk(2)[1]  # the low plane's
        scale, centre = (scales[:, None, :, i].contiguous() for i in (0, 1))  # (G, 1, out)
        weights = torch.addcmul(centre, codes.view(-1, GROUP, num_outputs), scale)
        return weights.view(-1, num_outputs)


def _packed_for_cuda(codes: Tensor) -> Tensor:
    unsigned = (codes + 8).to(torch.uint8)
    return torch._convert_weight_to_int4pack(unsigned[:, ::2] << 4 | unsigned[:, 1::2], INNER_TILES)


def _packed_for_cpu(codes: Tensor) -> Tensor:
    """In slices, because the conversion takes int32: four times the codes at once are too much."""
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    slices = codes.split(16 * PACKED_BLOCK)  # each a whole number of packed blocks, but the last
    return torch.cat([convert((part + 8).to(torch.int32), INNER_TILES) for part in slices])


def two_planes(codes: Codes) -> Codes:
    """8-bit codes (out, in) as 4-bit ones (out, 2 · in): 16 · high + (low - 8) + 8."""
    high = codes.codes >> 4
    low = (codes.codes & 15) - 8
    return Codes(  # times powers of two: exact
        4,
        torch.cat((high, low), 1),
        torch.cat((codes.scales * 16, codes.scales), 1),
        torch.cat((codes.centres, codes.scales * 8), 1),
    )


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The signed codes (in, out) of the CPU's packed weights.

    For each 64 outputs and each input there are 32 bytes: outputs 0 to 31 in their low halves,
    32 to 63 in the high ones, all unsigned.
    """
    num_outputs, half = packed.shape[0], PACKED_BLOCK // 2
    signed = (packed ^ 0x88).view(torch.int8).view(num_outputs // PACKED_BLOCK, -1, half)
    signed = signed.transpose(0, 1)  # (in, out / 64, 32)
    codes = packed.new_empty((*signed.shape[:2], 2, half), dtype=dtype)
    codes[:, :, 0] = (signed << 4) >> 4  # shifts keep the sign
    codes[:, :, 1] = signed >> 4
    return codes.view(-1, num_outputs)

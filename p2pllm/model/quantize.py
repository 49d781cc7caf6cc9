"""Weights in 8 and 4 bits: the schemes, and how codes come from full-precision weights.

A quantized matrix is small signed integers, and for each run of `group` inputs of an output a scale
and a centre:

    weight = scale · code + centre

Scales and centres are bfloat16, because that is what torch's kernels multiply with
(`p2pllm.model.quantized_linear`); they are rounded *before* codes are chosen, so that codes fit
the scales that are used. A GGUF file's own codes (Q4_0, Q4_1, Q8_0) are taken over bit for bit and
not quantized again (`p2pllm.model.gguf`): there, only scales are rounded.

The rounding is to the nearest, without looking at activations: GPTQ (arXiv 2210.17323) and AWQ
(arXiv 2306.00978) lose less, and need a calibration text and minutes per block.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pllm.errors import CheckpointError

GROUP = 32  # inputs that share a scale in int4: as GGUF's Q4_0 and Q4_1 have it
SCALE_BYTES = 2  # bfloat16


class Scheme(enum.StrEnum):
    """How a server holds its blocks' matrices; norms and biases stay in the compute type."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Of a code."""
        assert self is not Scheme.NONE
        return 4 if self is Scheme.INT4 else 8


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix (out, in) in `bits` bits; group g of an output has its in / G inputs' values.

    codes: (out, in) int8, within -2^(bits-1) … 2^(bits-1) - 1;
    scales, centres: (out, G), bfloat16; in 8 bits all centres are zero.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    centres: Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    def to(self, device: torch.device, dtype: torch.dtype) -> "Codes":
        """The same on another device; named as for tensors, but no type changes."""
        codes, scales, centres = (
            tensor.to(device) for tensor in (self.codes, self.scales, self.centres)
        )
        return Codes(self.bits, codes, scales, centres)

    def dequantized(self) -> Tensor:
        """The weights that this stands for: (out, in), float32."""
        groups = self.codes.float().view(self.shape[0], self.scales.shape[1], -1)
        weights = groups * self.scales.float()[..., None] + self.centres.float()[..., None]
        return weights.view(self.shape)


def quantize(weight: Tensor, scheme: Scheme) -> Codes:
    """Choose codes for a full-precision matrix (out, in). Raises CheckpointError."""
    if scheme is Scheme.INT4 and weight.shape[1] % GROUP:
        raise CheckpointError(
            f"no int4 for a matrix of {weight.shape[1]} inputs: groups are of {GROUP}"
        )
    return _to_int4(weight.float()) if scheme is Scheme.INT4 else _to_int8(weight.float())


def _to_int8(weight: Tensor) -> Codes:
    """One scale per output: with 8 bits that is exact enough, and has a kernel of its own."""
    scales = _rounded_up(weight.abs().amax(1, keepdim=True) / 127)
    return Codes(8, _nearest(weight, scales.float(), 8), scales, torch.zeros_like(scales))


def _to_int4(weight: Tensor) -> Codes:
    """Groups of 32 with a scale and a centre each.

    First codes that span a group's range; then scale and centre by least squares on these codes,
    and the codes again. That takes 4 % off the error of normally distributed weights; trying three
    ranges as well would take off 7 %, in three times the time.
    """
    groups = weight.reshape(weight.shape[0], -1, GROUP)  # (out, G, 32)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = _positive((high - low) / 15).bfloat16()
    centres = ((high + low + scales.float()) / 2).bfloat16()  # -8 is one code further than 7
    codes = _nearest(groups - centres.float(), scales.float(), 4)
    scales, centres = _least_squares(groups, codes.float())
    codes = _nearest(groups - centres.float(), scales.float(), 4)
    return Codes(4, codes.view(weight.shape), scales.squeeze(-1), centres.squeeze(-1))


def _least_squares(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and centre (out, G, 1) of least error for given codes: a line's slope and base."""
    mean_code, mean = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    spread = codes - mean_code
    slope = (spread * groups).sum(-1, keepdim=True) / _positive(spread.square().sum(-1, True))
    scales = _positive(slope).bfloat16()
    return scales, (mean - scales.float() * mean_code).bfloat16()


def _nearest(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    limit = 2 ** (bits - 1)
    return (values / scales).round_().clamp_(-limit, limit - 1).to(torch.int8)


def _rounded_up(scales: Tensor) -> Tensor:
    """In bfloat16, and not below: the largest weight must not fall off the range."""
    return (_positive(scales) * (1 + 2**-8)).bfloat16()


def _positive(values: Tensor) -> Tensor:
    """Not zero, where a group's weights are all equal: whatever divides by it gives zeros."""
    return values.clamp_min(torch.finfo(torch.bfloat16).tiny)


def concatenated(parts: Sequence[Codes]) -> Codes:
    """Matrices that read the same input as one, their outputs one after the other.

    Parts with wider groups than others get the finer ones: a scale repeated says the same.
    """
    num_groups = max(part.scales.shape[1] for part in parts)

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat([v.repeat_interleave(num_groups // v.shape[1], dim=1) for v in values])

    return Codes(
        parts[0].bits,
        torch.cat([part.codes for part in parts]),
        joined([part.scales for part in parts]),
        joined([part.centres for part in parts]),
    )


def num_bytes(shape: tuple[int, ...], scheme: Scheme, *, in_groups: bool = False) -> int:
    """What a matrix (out, in) takes in memory, packed.

    `in_groups`: the source holds it in groups that int8 has to keep, see `quantized_linear`.
    """
    num_outputs, num_inputs = shape
    in_int4 = num_outputs * (num_inputs // 2 + num_inputs // GROUP * 2 * SCALE_BYTES)
    if scheme is Scheme.INT4:
        return in_int4
    return 2 * in_int4 if in_groups else num_outputs * (num_inputs + SCALE_BYTES)

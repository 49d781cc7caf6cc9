"""Linear layers whose weights lie as the CPU's kernel reads them: oneDNN's own layout.

For a step of few tokens a layer costs the reading of its weights. From a matrix (out, in) as
checkpoints hold it, `F.linear` reads half as fast as a core can, whatever the type: 16 GB/s of 35
on an EPYC with AVX-512. oneDNN's blocked layout, made once when a model is loaded, is read at the
speed of the memory. For SmolLM2-135M's head (49,152 × 576) on one core, in ms:

    tokens                1     8    16    64   256
    bfloat16, plain     3.4   4.1   4.9  10.5    48
    bfloat16, packed    1.7   2.4   3.4   9.4    43
    float32, plain      6.9  13.1
    float32, packed     3.4   4.5

Results in bfloat16 are the same to the bit; those in float32 are sums in another order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pllm.model.layers import Linear


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """y = x Wᵀ + b, with `packed` as oneDNN has laid it out: opaque, and the only copy."""

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear | PackedLinear:
    """The layer of a matrix (out, in) in full precision: packed where that is known to be fast."""
    if not _is_packable(weight):
        return Linear(weight, bias)
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias)


def _is_packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32

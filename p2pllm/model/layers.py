"""The parts that blocks are made of: linear layers, rotary positions, the gated MLP.

Plain functions and small values over tensors; shapes use N = packed tokens of all rows of a
batch, H = heads, d = width of a head. Nothing here knows about sequences or caches.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pllm.model.config import ModelConfig, RopeKind, RopeScaling
from p2pllm.model.kernels import decode_kernels


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x Wᵀ + b, with `weight` (out, in) as checkpoints hold it."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Root-mean-square normalisation with a gain (arXiv 1910.07467)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after_add_(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add to x (N, D) in place, and normalise: one kernel where we have our own."""
        kernels = decode_kernels(x)
        if kernels is not None:
            normed: Tensor = kernels.add_norm(x, delta, self.weight, self.eps)
            return normed
        return self(x if delta is None else x.add_(delta))


def gated_silu(gate_up: Tensor) -> Tensor:
    """SwiGLU's silu(gate) · up (arXiv 2002.05202); gate_up: (N, 2·I).  Returns (N, I)."""
    kernels = decode_kernels(gate_up)
    if kernels is not None:
        gated: Tensor = kernels.gated_silu(gate_up)
        return gated
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of a batch's positions, shared by all blocks of a pass: (N, 1, d) each.

    `sin` has the sign of rotate_half folded in: minus in the first half.
    """

    cos: Tensor
    sin: Tensor

    def rotate_(self, x: Tensor) -> None:
        """Rotate x (N, H, d) in place, pairing feature i with i + d/2 (the layout of HF files)."""
        swapped = x.roll(x.shape[-1] // 2, dims=-1)
        x.mul_(self.cos).addcmul_(swapped, self.sin)


class RotaryEmbedding:
    """Rotary position embedding (arXiv 2104.09864) at a model's frequencies."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        if config.rope_scaling is not None:
            frequencies = _scale(frequencies, config.rope_scaling)
        self._frequencies = frequencies.to(device)  # (d / 2,), radians per position

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of positions (N,). Angles are float32 whatever `dtype` is.

        Computed once per pass for all its blocks, which is cheaper than keeping a table for
        the 131,072 positions of a Llama 3.1.
        """
        cos, sin = self.cos_sin(positions)
        return Rotation(
            torch.cat((cos, cos), -1)[:, None].to(dtype),
            torch.cat((-sin, sin), -1)[:, None].to(dtype),
        )

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the angles of positions (N,): (N, d / 2) each, float32."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies  # (N, d / 2)
        return angles.cos(), angles.sin()


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind is RopeKind.LINEAR:
        return frequencies / scaling.factor
    # Llama 3: wavelengths that fit the original context often enough stay as they are, those
    # longer than it are divided, and between the two the change is gradual.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 1: unchanged, 0: divided
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies

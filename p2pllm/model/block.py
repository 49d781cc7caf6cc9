"""One transformer block as most models since Llama have it: pre-normalised, gated, bias optional.

    x = x + O · attention(rotate(QKV · norm(x)))
    x = x + Down · (silu(gate) · up),   gate, up = GateUp · norm(x)

Projections that read the same input are one matrix (QKV, gate and up), because at decode the time
goes into reading weights and into starting kernels, and one large product does both better.
Weights are read-only, in full precision or quantized; all state is in the K/V cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from p2pllm.model.layers import RmsNorm, Rotation, gated_silu
from p2pllm.model.quantized_linear import Projection

Attend = Callable[[Tensor], Tensor]
"""Attention of one block over the cache: (N, Hq + 2 · Hkv, d) -> (N, Hq · d)."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block's weights, fused; `num_heads` and `num_kv_heads` say how QKV is divided."""

    num_heads: int
    num_kv_heads: int
    attention_norm: RmsNorm
    qkv: Projection
    out: Projection
    mlp_norm: RmsNorm
    gate_up: Projection
    down: Projection

    def forward(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """hidden: (N, D), packed tokens of a batch, not changed.  Returns (N, D).

        `attend` is given rotated queries and keys.
        """
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv(self.attention_norm(hidden))
        qkv = qkv.view(hidden.shape[0], num_rotated + self.num_kv_heads, -1)  # (N, H, d)
        rotation.rotate_(qkv[:, :num_rotated])
        hidden = hidden + self.out(attend(qkv))
        return hidden.add_(self.down(gated_silu(self.gate_up(self.mlp_norm(hidden)))))

    def step_(self, hidden: Tensor, attend: Attend) -> None:
        """The same in place, with few kernels, for a decode pass; `attend` rotates."""
        qkv = self.qkv(self.attention_norm.after_add_(hidden, None))
        attended = attend(qkv.view(hidden.shape[0], self.num_heads + 2 * self.num_kv_heads, -1))
        normed = self.mlp_norm.after_add_(hidden, self.out(attended))
        hidden.add_(self.down(gated_silu(self.gate_up(normed))))

"""The client's part of a model: embedding in front of the blocks; norm and head behind them.

Sequences are packed as everywhere: (N,) token ids of any number of sequences in, (N, D) out.
A client that samples needs logits of the last token of each sequence only, and passes those.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pllm.model.config import ModelConfig
from p2pllm.model.families import family_of
from p2pllm.model.layers import RmsNorm
from p2pllm.model.packed_linear import linear
from p2pllm.model.quantized_linear import Projection
from p2pllm.model.span_model import check_shapes


class EdgeCompute(Protocol):
    """What a client computes itself: `Edges`, or the simulator's stand-in."""

    dtype: torch.dtype
    device: torch.device

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (N,) to hidden states (N, D)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The last block's output (N, D) to logits (N, V), float32."""


class Edges:
    """Embedding, final norm and LM head of a model, in one dtype; norm and head on one device.

    The embedding is always in the computer's memory. Looking rows up there takes no time, and what
    is embedded is sent away from there: each lookup on a GPU would wait for it twice.
    """

    def __init__(self, embedding: Tensor, norm: RmsNorm, head: Projection) -> None:
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = norm.weight.device
        self._embedding = embedding  # (V, D); the head's weight too where they are tied
        self._norm = norm
        self._head = head

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "Edges":
        """Build from the tensors named by `Family.edge_shapes`, or raise CheckpointError.

        A head that is packed for its kernel, or on a GPU, is a second copy of a tied embedding.
        """
        family = family_of(config)
        shapes = family.edge_shapes(config)
        check_shapes(shapes, weights)
        own = {name: weights[name].to(device, dtype) for name in shapes}
        embedding = own[family.embedding]
        return cls(
            embedding.to("cpu"),
            RmsNorm(own[family.final_norm], config.norm_eps),
            linear(own.get(family.head, embedding)),
        )

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self._embedding.shape[0])

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (N,) to hidden states (N, D), on the CPU."""
        with torch.inference_mode():
            return F.embedding(ids.to("cpu"), self._embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last block's output (N, D) to logits (N, V), float32."""
        with torch.inference_mode():
            return self._head(self._norm(hidden.to(self.device, self.dtype))).float()

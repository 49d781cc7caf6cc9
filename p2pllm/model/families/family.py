"""What a model family has to say about itself; see the package's docstring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from p2pllm.model.block import Block
from p2pllm.model.config import ModelConfig
from p2pllm.model.quantize import Codes

Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, Tensor | Codes]


@dataclass(frozen=True, slots=True)
class Family:
    """Names and shapes of a family's tensors, and the making of its blocks.

    `block_prefix` is formatted with the block's number; names in `block_shapes` and in the weights
    given to `build_block` are what follows it ("self_attn.q_proj.weight"). A block's matrices may
    be quantized: all of them, or none.
    """

    block_prefix: str
    embedding: str
    final_norm: str
    head: str
    block_shapes: Callable[[ModelConfig], Shapes]
    build_block: Callable[[ModelConfig, Weights], Block]

    def edge_shapes(self, config: ModelConfig) -> Shapes:
        """The tensors of a client: embedding, final norm and, unless it is tied, the head."""
        table = (config.vocab_size, config.hidden_size)
        shapes: Shapes = {self.embedding: table, self.final_norm: (config.hidden_size,)}
        if not config.tie_embeddings:
            shapes[self.head] = table
        return shapes

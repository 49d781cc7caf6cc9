"""Another baseline: the same model as a plain loop in torch, without pages, sessions or network.

    python -m benchmarks._plain '{"weights": "int4", "batch": 16, "max_tokens": 256}'

`decode` is a greedy generation by a batch of sequences of one length, LM head included, behind
prompts of which only the length counts. Keys and values lie in one dense tensor for each block;
quantized products are those of our layers. `forward` is all blocks over a batch, without a cache.
"""

import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._program import answer
from benchmarks._server import settings_of
from p2pllm.model.block import Block
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.edges import Edges
from p2pllm.model.hub import resolve_model
from p2pllm.model.layers import RotaryEmbedding
from p2pllm.model.span_model import SpanModel
from p2pllm.server.source import CheckpointSource
from p2pllm.spans import Span


class PlainLoop:
    """All blocks and the edges, with room for `max_tokens` tokens of each sequence."""

    def __init__(self, weights: str, batch: int, max_tokens: int) -> None:
        source = CheckpointSource(open_checkpoint(resolve_model()))
        self.config = config = source.config
        model = source.load_span(Span(0, config.num_blocks), settings_of(weights), None)
        assert isinstance(model, SpanModel)
        dtype = model.dtype
        self.blocks: list[Block] = list(model._blocks.values())
        self.edges = Edges.load(config, source.checkpoint.edge_weights(dtype), dtype=dtype)
        self.rotary = RotaryEmbedding(config, model.device)
        shape = (batch, config.num_kv_heads, max_tokens, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in self.blocks]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in self.blocks]
        self.batch, self.dtype = batch, dtype

    def step(self, ids: Tensor, position: int) -> Tensor:
        """Next tokens (B,) of all sequences, whose tokens `ids` (B,) are at `position`."""
        hidden = self.edges.embed(ids)
        rotation = self.rotary.at(torch.full((self.batch,), position), self.dtype)
        num_heads, num_kv = self.config.num_heads, self.config.num_kv_heads
        scale = 1 / math.sqrt(self.config.head_dim)
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):

            def attend(qkv: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                keys[:, :, position] = qkv[:, num_heads : num_heads + num_kv]
                values[:, :, position] = qkv[:, num_heads + num_kv :]
                queries = qkv[:, :num_heads].unflatten(1, (num_kv, -1))  # (B, Hkv, group, d)
                scores = queries @ keys[:, :, : position + 1].mT * scale
                out = scores.softmax(-1) @ values[:, :, : position + 1]
                return out.reshape(self.batch, -1)

            hidden = block.forward(hidden, rotation, attend)
        return self.edges.logits(hidden).argmax(-1)

    @torch.inference_mode()
    def seconds_per_step(self, tokens: int, prompt_tokens: int) -> float:
        """Of so many steps, one after the other."""
        ids = torch.arange(self.batch)
        started = time.perf_counter()
        for position in range(prompt_tokens, prompt_tokens + tokens):
            ids = self.step(ids, position)
        return (time.perf_counter() - started) / tokens

    @torch.inference_mode()
    def seconds_of_forward(self, batch: int, prompt_tokens: int) -> float:
        """All blocks over a batch (B, T) in one go, without cache and head."""
        hidden = self.edges.embed(torch.arange(batch * prompt_tokens) % self.config.vocab_size)
        started = time.perf_counter()
        rotation = self.rotary.at(torch.arange(prompt_tokens).repeat(batch), self.dtype)
        num_heads, num_kv = self.config.num_heads, self.config.num_kv_heads

        def attend(qkv: Tensor) -> Tensor:
            by_head = qkv.view(batch, prompt_tokens, -1, self.config.head_dim).transpose(1, 2)
            q, k, v = by_head.split([num_heads, num_kv, num_kv], dim=1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(len(qkv), -1)

        for block in self.blocks:
            hidden = block.forward(hidden, rotation, attend)
        return time.perf_counter() - started


def main() -> None:
    loop = PlainLoop(**json.loads(sys.argv[1]))
    loop.seconds_per_step(4, 1)
    answer({}, {"decode": loop.seconds_per_step, "forward": loop.seconds_of_forward})


if __name__ == "__main__":
    main()

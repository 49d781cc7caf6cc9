"""Another baseline: the same model as a plain loop in torch, without pages, sessions or network.

    python _plain.py KIND BATCH      KIND: a dtype, int8 or int4

Prints "ready"; then for every line "NUM_TOKENS" on standard input, the seconds per step of a greedy
generation of so many tokens by BATCH sequences of one length, LM head included. Keys and values lie
in one dense tensor for each block; quantized products are those of our layers.
"""

import math
import sys
import time

import torch
from _server import settings_of
from torch import Tensor

from p2pllm.model.block import Block
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.edges import Edges
from p2pllm.model.hub import resolve_model
from p2pllm.model.layers import RotaryEmbedding
from p2pllm.model.span_model import SpanModel
from p2pllm.server.source import CheckpointSource
from p2pllm.spans import Span

PROMPT_TOKENS = 5
MAX_TOKENS = 512


class PlainLoop:
    """All blocks and the edges, with room for MAX_TOKENS tokens of each sequence."""

    def __init__(self, kind: str, batch: int) -> None:
        source = CheckpointSource(open_checkpoint(resolve_model()))
        self.config = config = source.config
        model = source.load_span(Span(0, config.num_blocks), settings_of(kind), None)
        assert isinstance(model, SpanModel)
        dtype = model.dtype
        self.blocks: list[Block] = list(model._blocks.values())
        weights = source.checkpoint.edge_weights(dtype)
        self.edges = Edges.load(config, weights, dtype=dtype)
        self.rotary = RotaryEmbedding(config, model.device)
        shape = (batch, config.num_kv_heads, MAX_TOKENS, config.head_dim)
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
    def seconds_per_step(self, num_tokens: int) -> float:
        ids = torch.arange(self.batch)
        for position in range(PROMPT_TOKENS):
            ids = self.step(ids, position)
        started = time.perf_counter()
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + num_tokens):
            ids = self.step(ids, position)
        return (time.perf_counter() - started) / num_tokens


def main() -> None:
    loop = PlainLoop(sys.argv[1], int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(loop.seconds_per_step(min(int(line), MAX_TOKENS - PROMPT_TOKENS)), flush=True)


if __name__ == "__main__":
    main()

"""A tiny deterministic model for swarms on virtual time: the same faces, next to no work.

It stands in for `SpanModel` and `Edges` where a test is about the network and not about language.
What it must have in common with a real model is that *any* lost, repeated, reordered or foreign
token changes everything after it. So a block's output is a hash of its own number and of all
inputs since the sequence's start, kept in pages as a real cache would keep keys and values:

    state(p) = state(p - 1) + weight(p) · x(p)                 all modulo 127, feature by feature
    y(p)     = a · x(p) + b · roll(state(p)) + number          a, b of the block, never 0

Values are whole numbers from -63 to 63. They are exact in float32 and bfloat16, and inputs are
rounded, so they survive the int8 codec too: the same tokens come out whatever codec is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.config import ModelConfig
from p2pllm.model.forward_pass import Pass
from p2pllm.model.kv_cache import CacheRow, KVCache, Rows
from p2pllm.spans import Span

MODULUS = 127  # a prime, so that no factor loses anything; its half is below int8's largest code
WIDTH = 16  # of a hidden state: 127^16 values hardly collide


def fake_config(num_blocks: int, vocab_size: int = 256) -> ModelConfig:
    """A config of the fake model's size."""
    return ModelConfig(
        model_type="llama",
        hidden_size=WIDTH,
        num_blocks=num_blocks,
        num_heads=1,
        num_kv_heads=1,
        head_dim=WIDTH,
        intermediate_size=WIDTH,
        vocab_size=vocab_size,
        max_position=2**20,
        norm_eps=1e-5,
        tie_embeddings=True,
    )


class FakeCache(KVCache):
    """The real cache's pages, with a running hash in the place of keys."""

    def state_before(self, block: int, row: CacheRow) -> Tensor:
        """What the row's predecessors left: (WIDTH,) of whole numbers, zero at the start."""
        if row.position == 0:
            return torch.zeros(WIDTH, dtype=torch.int64)
        slot = self._slot(row, row.position - 1)
        return self.block(block)[0, slot].to(torch.int64)

    def write(self, block: int, slots: Tensor, states: Tensor) -> None:
        """Keep the states (T, WIDTH) after each of a row's tokens."""
        self.block(block)[0].index_copy_(0, slots, states.to(self.dtype))


@dataclass
class FakeDevice:
    """What computing costs, in virtual seconds, and how much has been spent.

    A batch costs every block `block_s`, and `token_s` more for each token: reading the weights,
    and multiplying. Nothing waits here; an executor does.
    """

    block_s: float = 0.0
    token_s: float = 0.0
    spent_s: float = 0.0

    def on_forward(self, num_blocks: int, num_tokens: int) -> None:
        """So many tokens went through so many blocks."""
        self.spent_s += num_blocks * (self.block_s + num_tokens * self.token_s)


class FakeSpanModel:
    """Stands in for `SpanModel`; see the module's docstring. Costs nothing without a device."""

    def __init__(
        self, config: ModelConfig, span: Span, fake_device: FakeDevice | None = None
    ) -> None:
        self.config = config
        self.span = span
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self._fake_device = fake_device or FakeDevice()

    def make_cache(self, num_pages: int, page_tokens: int) -> FakeCache:
        """Allocate pages for all blocks of the span."""
        return FakeCache(
            self.config,
            num_blocks=len(self.span),
            num_pages=num_pages,
            page_tokens=page_tokens,
            dtype=self.dtype,
        )

    def prepare(self, cache: KVCache, max_batch: int) -> None:
        """There is nothing to prepare."""

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        """As `SpanModel.forward`: packed (N, WIDTH) in and out."""
        assert isinstance(cache, FakeCache)
        span = self.span if span is None else span
        sizes = [row.num_tokens for row in rows]
        if not self.span.covers(span) or hidden.shape != (sum(sizes), WIDTH):
            raise LocalProtocolError(f"blocks {span} of {self.span}, {tuple(hidden.shape)} hidden")
        self._fake_device.on_forward(len(span), sum(sizes))
        plan = cache.plan(rows)
        x = hidden.float().round().to(torch.int64)
        for block in span:
            weights = _weights(block, plan.positions)
            local = block - self.span.start
            parts, start = [], 0
            for row in rows:
                here = slice(start, start + row.num_tokens)
                start = here.stop
                states = cache.state_before(local, row) + (weights[here] * x[here]).cumsum(0)
                states = _centred(states)
                cache.write(local, plan.slots[here], states)
                parts.append(states)
            a, b = 1 + (2 * block + 2) % (MODULUS - 1), 1 + (3 * block + 4) % (MODULUS - 1)
            x = _centred(a * x + b * torch.cat(parts).roll(1, -1) + block)
        return x.to(self.dtype)

    def forward_pass(
        self, hidden: Tensor, lengths: Sequence[int], span: Span | None = None
    ) -> Pass:
        """As `SpanModel.forward_pass`, a block of one sequence at a time."""
        span = self.span if span is None else span
        if not self.span.covers(span) or hidden.shape != (sum(lengths), WIDTH):
            raise LocalProtocolError(f"blocks {span} of {self.span}, {tuple(hidden.shape)} hidden")
        return self._pass(hidden, lengths, span)

    def _pass(self, hidden: Tensor, lengths: Sequence[int], span: Span) -> Pass:
        outputs = []
        for sequence in hidden.split(list(lengths)):
            cache, row = self.make_cache(1, len(sequence)), CacheRow((0,), 0, len(sequence))
            for block in span:
                sequence = self.forward(sequence, [row], cache, Span(block, block + 1))
                yield len(sequence)
            outputs.append(sequence)
        return torch.cat(outputs)

    def forget_all_but(self, kept: Span | None) -> None:
        """There is nothing to forget."""


class FakeEdges:
    """Stands in for `Edges`: a fixed table for embedding and head."""

    def __init__(self, config: ModelConfig) -> None:
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.vocab_size = config.vocab_size
        half = MODULUS // 2
        self._table = torch.randint(
            -half, half + 1, (config.vocab_size, WIDTH), generator=torch.Generator().manual_seed(0)
        ).float()

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (N,) to hidden states (N, WIDTH)."""
        return self._table[ids]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, WIDTH) to logits (N, V): whole numbers, exact in float32."""
        return hidden.float().round() @ self._table.T


def greedy(config: ModelConfig, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What the whole fake model answers: the tokens that a swarm must give, too."""
    model, edges = FakeSpanModel(config, Span(0, config.num_blocks)), FakeEdges(config)
    page_tokens = len(prompt_ids) + num_tokens
    cache = model.make_cache(num_pages=1, page_tokens=page_tokens)
    answer: list[int] = []
    new, position = list(prompt_ids), 0
    while len(answer) < num_tokens:
        row = CacheRow((0,), position, len(new))
        hidden = model.forward(edges.embed(torch.tensor(new)), [row], cache)
        position += len(new)
        new = [int(edges.logits(hidden[-1:]).argmax())]
        answer += new
    return answer


def _weights(block: int, positions: Tensor) -> Tensor:
    """(N, WIDTH) factors from 1 to 126: no position is like its neighbours, none counts for 0."""
    features = torch.arange(WIDTH)
    mixed = (positions[:, None] + 1) * (features + block + 13) ** 2 + positions[:, None] ** 2
    return mixed % (MODULUS - 1) + 1


def _centred(values: Tensor) -> Tensor:
    """The representatives modulo MODULUS that are nearest to zero."""
    half = MODULUS // 2
    return (values + half) % MODULUS - half

"""SpanModel: the blocks of a span, run over a batch of rows of many sessions.

A batch is *packed*: the hidden states of all rows' tokens lie one after the other in one (N, D)
tensor, so decode steps and prefill chunks of any lengths are one matmul per layer. Only attention
looks at rows, in `p2pllm.model.kv_cache`.

A row's result depends on its own tokens only; what shares its batch may change it by rounding
(matmuls of other shapes add in another order), about 1e-6 of its scale in float32.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from p2pllm.errors import CheckpointError, LocalProtocolError
from p2pllm.model.block import Block
from p2pllm.model.config import ModelConfig
from p2pllm.model.families import family_of
from p2pllm.model.families.family import Family, Weights
from p2pllm.model.kv_cache import KVCache, Rows
from p2pllm.model.layers import RotaryEmbedding
from p2pllm.spans import Span


class SpanCompute(Protocol):
    """What a server's worker runs: `SpanModel`, or the simulator's stand-in."""

    config: ModelConfig
    span: Span
    dtype: torch.dtype
    device: torch.device

    def make_cache(self, num_pages: int, page_tokens: int) -> KVCache:
        """Allocate pages for all blocks of the span."""

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        """Run blocks over packed rows; see `SpanModel.forward`."""

    def forget_all_but(self, kept: Span | None) -> None:
        """Give up the memory of other blocks than these; what is forgotten cannot be run."""


class SpanModel:
    """The blocks `[span.start, span.stop)` of a model, on one device in one dtype."""

    def __init__(
        self,
        config: ModelConfig,
        span: Span,
        blocks: Mapping[int, Block],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert blocks.keys() == set(span)
        self.config = config
        self.span = span
        self.dtype = dtype
        self.device = device
        self._blocks = dict(blocks)
        self._rotary = RotaryEmbedding(config, device)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        span: Span,
        weights: Iterable[Weights],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        loaded: "SpanModel | None" = None,
    ) -> "SpanModel":
        """Build the span from one mapping of local tensor names per block, in order.

        Blocks that `loaded` has are taken from it: `weights` has the others only (`missing`). It
        is consumed block by block, so a lazy one never holds more than one block's tensors twice.
        Raises CheckpointError for a missing tensor or a wrong shape.
        """
        device, family = torch.device(device), family_of(config)
        blocks = {} if loaded is None else loaded._shared(span)
        lacking = [index for index in span if index not in blocks]
        for index, tensors in zip(lacking, weights, strict=True):
            blocks[index] = _load_block(config, family, index, tensors, dtype, device)
        return cls(config, span, blocks, dtype=dtype, device=device)

    def missing(self, span: Span) -> list[int]:
        """The blocks of a span that are not in memory here."""
        return [index for index in span if index not in self._blocks]

    def forget_all_but(self, kept: Span | None) -> None:
        """Give up the memory of other blocks than these; what is forgotten cannot be run."""
        self._blocks = {} if kept is None else self._shared(kept)

    def _shared(self, span: Span) -> dict[int, Block]:
        return {index: block for index, block in self._blocks.items() if index in span}

    def make_cache(self, num_pages: int, page_tokens: int) -> KVCache:
        """Allocate pages for all blocks of the span."""
        return KVCache(
            self.config,
            num_blocks=len(self.span),
            num_pages=num_pages,
            page_tokens=page_tokens,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        """Run the blocks of `span` (None: all) over the packed tokens of `rows`.

        hidden: (N, D), N the sum of the rows' num_tokens; any float type and device.
        Returns (N, D) in the model's dtype.  Rows' keys and values are in `cache` afterwards.
        No two rows may be of one sequence. Raises LocalProtocolError for shapes and spans that
        do not fit: whoever takes them from a peer checks them first.
        """
        span = self.span if span is None else span
        num_tokens = sum(row.num_tokens for row in rows)
        if not self.span.covers(span) or hidden.shape != (num_tokens, self.config.hidden_size):
            raise LocalProtocolError(
                f"blocks {span} of {self.span}, hidden states {tuple(hidden.shape)} for "
                f"{num_tokens} tokens of {self.config.hidden_size}"
            )
        with torch.inference_mode():
            hidden = hidden.to(self.device, self.dtype)
            plan = cache.plan(rows)
            rotation = self._rotary.at(plan.positions, self.dtype)
            for index in span:
                attend = partial(cache.attend, index - self.span.start, plan=plan)
                hidden = self._blocks[index].forward(hidden, rotation, attend)
        return hidden


def _load_block(
    config: ModelConfig,
    family: Family,
    index: int,
    tensors: Weights,
    dtype: torch.dtype,
    device: torch.device,
) -> Block:
    shapes = family.block_shapes(config)
    check_shapes(shapes, tensors, family.block_prefix.format(index))
    return family.build_block(config, {name: tensors[name].to(device, dtype) for name in shapes})


def check_shapes(shapes: dict[str, tuple[int, ...]], tensors: Weights, prefix: str = "") -> None:
    """Raise CheckpointError unless `tensors` has every name of `shapes`, with that shape."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {prefix}{name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"tensor {prefix}{name} is {tuple(tensors[name].shape)}, not {shape}"
            )

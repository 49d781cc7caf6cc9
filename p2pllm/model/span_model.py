"""SpanModel: the blocks of a span, run over a batch of rows of many sessions.

A batch is *packed*: the hidden states of all rows' tokens lie one after the other in one (N, D)
tensor, so decode steps and prefill chunks of any lengths are one matmul per layer. Only attention
looks at rows, in `p2pllm.model.kv_cache`. On a GPU batches of few tokens are replayed instead
(`p2pllm.model.decode_pass`), once `prepare` has recorded them.

A row's result depends on its own tokens only; what shares its batch may change it by rounding
(matmuls of other shapes add in another order), about 1e-6 of its scale in float32.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from p2pllm.errors import CheckpointError, LocalProtocolError
from p2pllm.model.block import Block
from p2pllm.model.config import ModelConfig
from p2pllm.model.decode_pass import CudaRecorder, DecodePass, Recorder
from p2pllm.model.families import family_of
from p2pllm.model.families.family import Family, Weights
from p2pllm.model.forward_pass import Pass, Shape, forward_pass
from p2pllm.model.kernels import decode_kernels
from p2pllm.model.kv_cache import KVCache, Rows
from p2pllm.model.layers import RotaryEmbedding
from p2pllm.model.paged_attention import PagedAttention
from p2pllm.model.staging import on_device
from p2pllm.spans import Span

logger = logging.getLogger(__name__)


class SpanCompute(Protocol):
    """What a server's worker runs: `SpanModel`, or the simulator's stand-in."""

    config: ModelConfig
    span: Span
    dtype: torch.dtype
    device: torch.device

    def make_cache(self, num_pages: int, page_tokens: int) -> KVCache:
        """Allocate pages for all blocks of the span."""

    def prepare(self, cache: KVCache, max_batch: int) -> None:
        """Do now what would make the first steps over this cache slow; see `SpanModel.prepare`."""

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        """Run blocks over packed rows; see `SpanModel.forward`."""

    def forward_pass(
        self, hidden: Tensor, lengths: Sequence[int], span: Span | None = None
    ) -> Pass:
        """Run whole sequences through blocks without a cache; see `SpanModel.forward_pass`."""

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
        kv_bits: int = 16,
    ) -> None:
        assert blocks.keys() == set(span)
        self.config = config
        self.span = span
        self.dtype = dtype
        self.device = device
        self._kv_bits = kv_bits
        self._blocks = dict(blocks)
        self._rotary = RotaryEmbedding(config, device)
        self._decode_pass: DecodePass | None = None

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        span: Span,
        weights: Iterable[Weights],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kv_bits: int = 16,
        loaded: "SpanModel | None" = None,
    ) -> "SpanModel":
        """Build the span from one mapping of local tensor names per block, in order.

        `kv_bits` is what caches are made with: 16 for the compute type, or 8.
        Blocks that `loaded` has are taken from it: `weights` has the others only (`missing`). It
        is consumed block by block, so a lazy one never holds more than one block's tensors twice.
        Raises CheckpointError for a missing tensor or a wrong shape.
        """
        device, family = torch.device(device), family_of(config)
        blocks = {} if loaded is None else loaded._shared(span)
        lacking = [index for index in span if index not in blocks]
        for index, tensors in zip(lacking, weights, strict=True):
            blocks[index] = _load_block(config, family, index, tensors, dtype, device)
        return cls(config, span, blocks, dtype=dtype, device=device, kv_bits=kv_bits)

    def missing(self, span: Span) -> list[int]:
        """The blocks of a span that are not in memory here."""
        return [index for index in span if index not in self._blocks]

    def forget_all_but(self, kept: Span | None) -> None:
        """Give up the memory of other blocks than these; what is forgotten cannot be run."""
        self._decode_pass = None  # it holds them, too
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
            has_scratch=self.device.type == "cuda",
            kv_bits=self._kv_bits,
        )

    def prepare(self, cache: KVCache, max_batch: int, recorder: Recorder | None = None) -> None:
        """Record decode passes over this cache, of up to `max_batch` tokens. On the CPU: nothing.

        No session may have pages yet, or be computed meanwhile. Without Triton, or with keys and
        values in 8 bits, nothing is recorded either, and a GPU is slower. `recorder` is how, for
        tests.
        """
        if cache.kv_bits == 8:
            if self.device.type == "cuda":
                logger.warning("no kernels for 8-bit keys and values: decode steps are slower")
            return
        if recorder is None:
            if decode_kernels(cache.block(0)) is None:
                if self.device.type == "cuda":
                    logger.warning("no triton here: decode steps are not recorded, and slower")
                return
            recorder = CudaRecorder(self.device)
        config = self.config
        decode_pass = DecodePass(
            self._blocks,
            cache,
            self._rotary,
            PagedAttention(
                config.num_heads, config.head_dim, cache.page_tokens, config.sliding_window
            ),
            max_batch=max_batch,
            hidden_size=config.hidden_size,
            dtype=self.dtype,
            device=self.device,
        )
        decode_pass.record(recorder)
        self._decode_pass = decode_pass

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
        recorded = self._decode_pass
        with torch.inference_mode():
            if recorded is not None and recorded.cache is cache and recorded.takes(rows):
                return recorded.run(hidden, rows, span)
            hidden = on_device(hidden, self.device).to(self.dtype)
            plan = cache.plan(rows)
            rotation = self._rotary.at(plan.positions, self.dtype)
            for index in span:
                attend = partial(cache.attend, index - self.span.start, plan=plan)
                hidden = self._blocks[index].forward(hidden, rotation, attend)
        return hidden

    def forward_pass(
        self, hidden: Tensor, lengths: Sequence[int], span: Span | None = None
    ) -> Pass:
        """Run whole sequences through the blocks of `span` (None: all), without a cache.

        hidden: (sum of lengths, D), any float type and device. To be driven in inference mode,
        piece by piece (`p2pllm.model.forward_pass`); returns (sum of lengths, D) in the model's
        dtype. Raises LocalProtocolError as `forward` does.
        """
        span = self.span if span is None else span
        if not self.span.covers(span) or hidden.shape[1:] != (self.config.hidden_size,):
            raise LocalProtocolError(
                f"blocks {span} of {self.span}, hidden states {tuple(hidden.shape)}"
            )
        hidden = on_device(hidden, self.device).to(self.dtype)
        blocks = [self._blocks[index] for index in span]
        return forward_pass(blocks, self._rotary, Shape.of(self.config), hidden, lengths)


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

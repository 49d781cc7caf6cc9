"""SplitSpan: one span whose blocks lie on several devices of a computer.

The span is cut into *parts*, one for each device, in order. A part is a `SpanModel` with weights
and cache of its own; hidden states go from device to device between the parts. So a server with
two GPUs holds twice the blocks and is one hop, and nothing above knows.

One thread drives all devices: work on a GPU is queued, and so are copies from one GPU to another
(torch makes the streams wait for each other). Only who reads the result waits. Where one batch
follows another, one device works at a time: this is about room, and not about speed.

When the server moves, its new span is cut into as many blocks for each device as before, for the
cache of a part stays where it is. Blocks that come to lie on another device are read anew.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.config import ModelConfig
from p2pllm.model.families.family import Weights
from p2pllm.model.forward_pass import Pass
from p2pllm.model.kv_cache import KVCache, Rows
from p2pllm.model.span_model import SpanCompute, SpanModel
from p2pllm.model.staging import on_cpu, on_device
from p2pllm.spans import Span, cut

ReadBlock = Callable[[int, torch.device], Weights]
"""Reads a block's tensors, to be held on that device."""


class SplitCache(KVCache):
    """The caches of all parts as one: a page has the same number in each.

    What it holds itself is the shape that they have in common, of no block at all. Attention is
    over the cache of a part.
    """

    def __init__(self, config: ModelConfig, parts: Sequence[KVCache], sizes: Sequence[int]) -> None:
        first = parts[0]
        super().__init__(
            config,
            num_blocks=0,
            num_pages=first.num_pages,
            page_tokens=first.page_tokens,
            dtype=first.dtype,
            kv_bits=first.kv_bits,
        )
        self.parts = tuple(parts)
        self.sizes = tuple(sizes)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    def block(self, index: int) -> Tensor:
        ((part, here),) = self._overlaps(index, 1)
        return part.block(here.start)

    def copy(self, source: Sequence[int], target: Sequence[int], num_tokens: int) -> None:
        for part in self.parts:
            part.copy(source, target, num_tokens)

    def export_tokens(
        self, pages: Sequence[int], first_block: int, num_blocks: int, start: int, num_tokens: int
    ) -> Tensor:
        """As `KVCache.export_tokens`, in the computer's memory."""
        copies = [
            on_cpu(part.export_tokens(pages, here.start, len(here), start, num_tokens))
            for part, here in self._overlaps(first_block, num_blocks)
        ]
        return copies[0] if len(copies) == 1 else torch.cat(copies)

    def import_tokens(
        self, pages: Sequence[int], first_block: int, start: int, values: Tensor
    ) -> None:
        overlaps = list(self._overlaps(first_block, len(values)))
        pieces = values.split([len(here) for _, here in overlaps])
        for (part, here), piece in zip(overlaps, pieces, strict=True):
            part.import_tokens(pages, here.start, start, piece)

    def _overlaps(self, first_block: int, num_blocks: int) -> Iterator[tuple[KVCache, Span]]:
        """The parts that have some of these blocks, and which, counted from the part's first."""
        asked = Span(first_block, first_block + num_blocks)
        for part, whole in zip(self.parts, cut(Span(0, sum(self.sizes)), self.sizes), strict=True):
            common = whole.overlap(asked)
            if common is not None:
                yield part, Span(common.start - whole.start, common.stop - whole.start)


class SplitSpan:
    """The blocks `[span.start, span.stop)` of a model, in parts that follow one another."""

    def __init__(self, parts: Sequence[SpanModel]) -> None:
        first, last = parts[0], parts[-1]
        self.parts = tuple(parts)
        self.config = first.config
        self.span = Span(first.span.start, last.span.stop)
        self.dtype = first.dtype
        self.device = first.device  # where hidden states come in
        assert cut(self.span, self.sizes) == tuple(part.span for part in parts)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        span: Span,
        read: ReadBlock,
        *,
        sizes: Sequence[int],
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        kv_bits: int = 16,
        loaded: "SplitSpan | None" = None,
    ) -> "SplitSpan":
        """Build a part of `sizes[i]` blocks on `devices[i]`, for each i.

        Blocks that the same part of `loaded` has are taken from it: `read` is called for those
        that its `missing` names, in that order. Raises CheckpointError for a missing tensor or a
        wrong shape.
        """
        parts = []
        for number, (here, device) in enumerate(zip(cut(span, sizes), devices, strict=True)):
            before = None if loaded is None else loaded.parts[number]
            lacking = list(here) if before is None else before.missing(here)
            with _current(device):
                weights = (read(index, device) for index in lacking)
                parts.append(
                    SpanModel.load(
                        config,
                        here,
                        weights,
                        dtype=dtype,
                        device=device,
                        kv_bits=kv_bits,
                        loaded=before,
                    )
                )
        return cls(parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many blocks each part has."""
        return tuple(len(part.span) for part in self.parts)

    def missing(self, span: Span) -> list[int]:
        """The blocks of a span of as many blocks that are not where they would have to be."""
        pairs = zip(self.parts, cut(span, self.sizes), strict=True)
        return [index for part, here in pairs for index in part.missing(here)]

    def forget_all_but(self, kept: Span | None) -> None:
        """Give up the memory of other blocks than these; what is forgotten cannot be run.

        `kept` is what this span has in common with the one that the server moves to. What will
        lie on another device then is forgotten, too: it must be read for that one.
        """
        if kept is None:
            for part in self.parts:
                part.forget_all_but(None)
            return
        shift = (kept.start - self.span.start) or (kept.stop - self.span.stop)
        for part in self.parts:
            start = max(part.span.start, part.span.start + shift)
            stop = min(part.span.stop, part.span.stop + shift)
            part.forget_all_but(Span(start, stop) if start < stop else None)

    def make_cache(self, num_pages: int, page_tokens: int) -> SplitCache:
        """Allocate pages for all blocks of the span, each part's on its device."""
        caches = [part.make_cache(num_pages, page_tokens) for part in self.parts]
        return SplitCache(self.config, caches, self.sizes)

    def prepare(self, cache: KVCache, max_batch: int) -> None:
        """See `SpanModel.prepare`."""
        for part, part_cache in self._with_caches(cache):
            with _current(part.device):
                part.prepare(part_cache, max_batch)

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        """As `SpanModel.forward`; what it returns is on the device of the last part that ran."""
        span = self.span if span is None else span
        if not self.span.covers(span):
            raise LocalProtocolError(f"blocks {span} of {self.span}")
        with torch.inference_mode():
            for part, part_cache in self._with_caches(cache):
                here = part.span.overlap(span)
                if here is not None:
                    with _current(part.device):
                        hidden = _moved(hidden, part.device)
                        hidden = part.forward(hidden, rows, part_cache, here)
        return hidden

    def forward_pass(
        self, hidden: Tensor, lengths: Sequence[int], span: Span | None = None
    ) -> Pass:
        """As `SpanModel.forward_pass`."""
        span = self.span if span is None else span
        if not self.span.covers(span):
            raise LocalProtocolError(f"blocks {span} of {self.span}")
        return self._pass(hidden, lengths, span)

    def _pass(self, hidden: Tensor, lengths: Sequence[int], span: Span) -> Pass:
        for part in self.parts:
            here = part.span.overlap(span)
            if here is None:
                continue
            pieces = part.forward_pass(_moved(hidden, part.device), lengths, here)
            while True:
                with _current(part.device):  # for a piece only: others use the thread between
                    try:
                        num_tokens = next(pieces)
                    except StopIteration as end:
                        hidden = end.value
                        break
                yield num_tokens
        return hidden

    def _with_caches(self, cache: KVCache) -> Iterator[tuple[SpanModel, KVCache]]:
        assert isinstance(cache, SplitCache)
        assert cache.sizes == self.sizes
        return zip(self.parts, cache.parts, strict=True)


def sizes_of(model: SpanCompute) -> tuple[int, ...]:
    """How many blocks lie on each device."""
    return model.sizes if isinstance(model, SplitSpan) else (len(model.span),)


def _moved(hidden: Tensor, device: torch.device) -> Tensor:
    """Hidden states on a device. Between GPUs the copy is queued, and nothing waits for it."""
    if not hidden.is_cuda:
        return on_device(hidden, device)
    return hidden.to(device, non_blocking=True) if device.type == "cuda" else on_cpu(hidden)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels that are not torch's own (Triton's) are launched on the thread's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

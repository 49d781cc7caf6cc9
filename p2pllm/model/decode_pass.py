"""Decode steps as recorded work: the blocks of a span for batches of a few fixed sizes.

A decode step of 27 Llama-2-70B blocks in int4 is three hundred kernels of a few microseconds each,
and Python starts them slower than a GPU runs them. So each block is recorded once per batch size,
when the server starts, as a CUDA graph over arrays that stay where they are: the hidden states,
changed in place from block to block, and the batch's plan (`p2pllm.model.paged_attention`). A
step then writes the arrays, replays, and reads the hidden states. Any batch of few tokens is one:
decode steps of any lengths, and rows of some drafted tokens.

There is one graph of all blocks, and one of each: a session may use a part of the span only, and
then replays follow one another, 4 µs apart (docs/adr/0013).

Nothing here knows CUDA graphs but `CudaRecorder`. On the CPU, in tests, what is recorded is just
called again.
"""

import bisect
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from p2pllm.model.block import Block
from p2pllm.model.kv_cache import KVCache, Rows
from p2pllm.model.layers import RotaryEmbedding
from p2pllm.model.paged_attention import HEADER, PagedAttention, PageLayout
from p2pllm.spans import Span

logger = logging.getLogger(__name__)

MAX_ROW_TOKENS = 8  # more is a prefill chunk, which reads its keys once for all its tokens
MAX_PAGES = 256  # of a row: 16,384 tokens; a longer one is computed without graphs
WARM_UPS = 2  # before recording: kernels are compiled, libraries choose theirs

Work = Callable[[], None]


class Recorder(Protocol):
    """Makes something that can be repeated out of work on arrays that stay where they are."""

    def record(self, work: Work) -> Work:
        """Do it, and return what does it again."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they are replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile: a server loads blocks beside those it serves.
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                work()
        replay: Work = graph.replay
        return replay


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Sizes that passes are recorded for, the largest `max_batch`.

    Powers of two up to 16, then two for each doubling: a batch is filled up by a third at most
    where a row more costs time.
    """
    sizes = {1, 2, 4, 8}
    size = 16
    while size < max_batch:
        sizes |= {size, size * 3 // 2}
        size *= 2
    return (*sorted(s for s in sizes if s < max_batch), max_batch)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What there is for one batch size: all of it; the rotation of its positions; each block."""

    everything: Work
    rotate: Work
    blocks: dict[int, Work]


class DecodePass:
    """Recorded passes of a span over one cache, which must have a scratch page."""

    def __init__(
        self,
        blocks: Mapping[int, Block],
        cache: KVCache,
        rotary: RotaryEmbedding,
        attention: PagedAttention,
        *,
        max_batch: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert cache.has_scratch
        self.cache = cache
        self._layout = PageLayout(cache.num_pages, cache.page_tokens)
        self._blocks = blocks
        self._first_block = min(blocks)
        self._rotary = rotary
        self._attention = attention
        self._sizes = batch_sizes(max_batch)
        self._max_pages = min(cache.num_pages, MAX_PAGES)
        width = HEADER + max(1, self._max_pages)
        self._hidden = torch.zeros(max_batch, hidden_size, dtype=dtype, device=device)
        self._plan = torch.zeros(max_batch, width, dtype=torch.int32, device=device)
        self._cos = torch.zeros(max_batch, attention.head_dim // 2, device=device)
        self._sin = torch.zeros_like(self._cos)
        self._is_pinned = device.type == "cuda"
        self._recorded: dict[int, _Recorded] = {}

    def record(self, recorder: Recorder) -> None:
        """Record all sizes, on fillers: no page but the scratch page is written."""
        with torch.inference_mode():
            plan = torch.zeros_like(self._plan, device="cpu")
            self._layout.fill(plan.numpy(), [])
            self._plan.copy_(plan)
            for size in reversed(self._sizes):  # the largest first: others fit into its memory
                self._recorded[size] = self._record(recorder, size)
                logger.info("recorded decode pass batch=%d blocks=%d", size, len(self._blocks))

    def _record(self, recorder: Recorder, size: int) -> _Recorded:
        def everything() -> None:
            self._rotate(size)
            for index in self._blocks:
                self._step(size, index)

        return _Recorded(
            recorder.record(everything),
            recorder.record(functools.partial(self._rotate, size)),
            {
                index: recorder.record(functools.partial(self._step, size, index))
                for index in self._blocks
            },
        )

    def takes(self, rows: Rows) -> bool:
        """Can this batch be computed here?"""
        page_tokens = self.cache.page_tokens
        longest = max(row.position + row.num_tokens for row in rows)
        return (
            sum(row.num_tokens for row in rows) <= self._sizes[-1]
            and max(row.num_tokens for row in rows) <= MAX_ROW_TOKENS
            and longest <= self._max_pages * page_tokens
        )

    def run(self, hidden: Tensor, rows: Rows, span: Span) -> Tensor:
        """Run the blocks of `span` over packed rows; hidden: (N, D), of any device and type.

        Returns (N, D). Nothing is waited for: hidden states on the CPU and the plan are copied
        while the device may still be at work. Raises LocalProtocolError for rows that do not fit
        their pages.
        """
        num_tokens = hidden.shape[0]
        size = self._sizes[bisect.bisect_left(self._sizes, num_tokens)]
        if self._is_pinned and not hidden.is_cuda:
            hidden = hidden.pin_memory()  # itself, if it is already
        self._hidden[:num_tokens].copy_(hidden, non_blocking=True)  # while the plan is made
        plan = torch.empty(
            (size, self._plan.shape[1]), dtype=torch.int32, pin_memory=self._is_pinned
        )
        self._layout.fill(plan.numpy(), rows)
        self._plan[:size].copy_(plan, non_blocking=True)
        recorded = self._recorded[size]
        if len(span) == len(self._blocks):
            recorded.everything()
        else:
            recorded.rotate()
            for index in span:
                recorded.blocks[index]()
        return self._hidden[:num_tokens].clone()

    def _rotate(self, size: int) -> None:
        cos, sin = self._rotary.cos_sin(self._plan[:size, 0])
        self._cos[:size] = cos
        self._sin[:size] = sin

    def _step(self, size: int, index: int) -> None:
        """Block `index` over the first `size` rows, in place."""

        def attend(qkv: Tensor) -> Tensor:
            storage = self.cache.block(index - self._first_block)
            plan, cos, sin = self._plan[:size], self._cos[:size], self._sin[:size]
            return self._attention.attend(qkv, cos, sin, plan, storage)

        self._blocks[index].step_(self._hidden[:size], attend)

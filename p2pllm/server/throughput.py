"""How fast this server is, measured on its own blocks before it takes requests.

Two decode points (batch 1 and 8) and one prefill chunk, through the real blocks and cache, as the
worker will run them. The router needs seconds and tokens per second *per block*, because a client
may use a part of the span. Medians of a few passes: the first one warms caches and is dropped.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.span_model import SpanCompute

CACHED_TOKENS = 128  # position of the measured decode steps: a short conversation
DECODE_PASSES, PREFILL_PASSES = 7, 3


@dataclass(frozen=True, slots=True)
class Throughput:
    """`seconds_per_block_1` and `_8`: one decode step of one block at batch 1 and 8.

    `prefill_tokens_s`: tokens × blocks per second while reading a prompt.
    """

    seconds_per_block_1: float
    seconds_per_block_8: float
    prefill_tokens_s: float

    @classmethod
    def stated(cls, tokens_blocks_s: float) -> "Throughput":
        """From the one figure that a user may state: tokens × blocks per second."""
        return cls(1 / tokens_blocks_s, 1 / tokens_blocks_s, tokens_blocks_s)


def measure(
    model: SpanCompute,
    cache: KVCache,
    *,
    chunk_tokens: int,
    timer: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Measure on pages of the idle cache; takes a second or so. Runs in the device thread, whose
    `timer` it reads."""
    num_blocks = len(model.span)
    chunk = min(chunk_tokens, cache.num_pages * cache.page_tokens)
    one, eight = _decode_rows(cache, 1), _decode_rows(cache, 8)
    everything = tuple(range(cache.num_pages))
    prompt = [CacheRow(everything, 0, chunk)]

    def seconds(rows: list[CacheRow], passes: int) -> float:
        return _median_s(model, cache, rows, passes, timer)

    return Throughput(
        seconds_per_block_1=seconds(one, DECODE_PASSES) / num_blocks,
        seconds_per_block_8=seconds(eight, DECODE_PASSES) / num_blocks,
        prefill_tokens_s=chunk * num_blocks / seconds(prompt, PREFILL_PASSES),
    )


def _decode_rows(cache: KVCache, batch: int) -> list[CacheRow]:
    """Rows of one token each, in pages of their own as far as the cache has them."""
    share = max(1, cache.num_pages // batch)
    position = min(CACHED_TOKENS, share * cache.page_tokens - 1)
    return [
        CacheRow(tuple((row * share + i) % cache.num_pages for i in range(share)), position, 1)
        for row in range(batch)
    ]


def _median_s(
    model: SpanCompute,
    cache: KVCache,
    rows: list[CacheRow],
    passes: int,
    timer: Callable[[], float],
) -> float:
    num_tokens = sum(row.num_tokens for row in rows)
    hidden = torch.randn(num_tokens, model.config.hidden_size).to(model.device, model.dtype)
    times = [
        _timed(lambda: model.forward(hidden, rows, cache, span=model.span), timer)
        for _ in range(passes + 1)
    ]
    return statistics.median(times[1:])


def _timed(work: Callable[[], torch.Tensor], timer: Callable[[], float]) -> float:
    started = timer()
    with torch.inference_mode():
        output = work()
    if output.is_cuda:  # of several devices the last one
        torch.cuda.synchronize(output.device)
    return timer() - started

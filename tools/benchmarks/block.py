"""One server's blocks without the network: seconds per decode step, beside the floor.

All variants are loaded, then measured in turn, round after round, so that whatever else the
machine does meets all of them; medians and the best are given. The floor is the time to read the
weights and the cached keys and values once, at the rate at which memory is copied here. Beside it,
in the same rounds, `transformers` generates with the whole model in this process.

With `--device cuda` it is blocks of `--shape`, with random weights made there: `_gpu_block`.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks._server import settings_of
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.edges import Edges
from p2pllm.model.hub import resolve_model
from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.span_model import SpanCompute
from p2pllm.server.pages import PAGE_TOKENS, pages_for
from p2pllm.server.source import CheckpointSource
from p2pllm.spans import Span

QUICK = {"kinds": ["bfloat16"], "batches": [1], "rounds": 1, "local": [], "prompt": 0}
COPIED_BYTES = 256 * 2**20  # far more than the caches hold


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--span", default="0:15", help="blocks; the default model has 30")
    parser.add_argument("--kinds", nargs="+", default=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument(
        "--kv-bits", nargs="+", type=int, choices=[16, 8], default=[16], help="of the cache"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument(
        "--prompt", type=int, default=256, help="tokens of a prefill chunk; 0: none"
    )
    parser.add_argument("--cached", type=int, default=256, help="tokens in front of a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--local", nargs="*", default=["float32", "bfloat16"], help="baselines")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--device", default="cpu")
    gpu.add_argument("--shape", default="llama-2-70b", help="of the model: see `_shapes`")
    gpu.add_argument("--blocks", type=int, default=16)
    gpu.add_argument("--offload", action="store_true", help="the baseline with weights elsewhere")
    gpu.add_argument("--offload-blocks", type=int, default=8, help="in pinned memory; 0.5 GB each")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if torch.device(args.device).type == "cuda":
        from benchmarks import _gpu_block

        return _gpu_block.run(args)
    source = CheckpointSource(open_checkpoint(resolve_model()))
    span = Span.parse(args.span)
    timed: dict[str, Callable[[], object]] = {"copy": _copy()}
    for name in args.local:
        timed[f"transformers {name}"] = _local(name)
    bytes_read = {}
    token_bytes = {}
    for kind, kv_bits in itertools.product(args.kinds, args.kv_bits):
        name = kind if kv_bits == 16 else f"{kind} kv{kv_bits}"
        settings = replace(settings_of(kind), kv_bits=kv_bits)
        model = source.load_span(span, settings, None)
        weights = source.block_bytes(settings) * len(span)
        pages = pages_for(args.cached + 1)
        cache = model.make_cache(max([*args.batches, pages_for(args.prompt)]) * pages, PAGE_TOKENS)
        token_bytes[name] = cache.token_bytes
        for batch in args.batches:
            key = f"{name} batch {batch}"
            rows = [_row(i * pages, pages, args.cached, 1) for i in range(batch)]
            timed[key] = _step(model, cache, rows)
            per_token = cache.token_bytes * len(span)
            bytes_read[key] = weights + batch * (args.cached + 1) * per_token
        if args.prompt:
            num_pages = pages_for(args.prompt)
            timed[f"{name} prompt"] = _step(model, cache, [_row(0, num_pages, 0, args.prompt)])
    for batch in args.batches:
        timed[f"head bfloat16 batch {batch}"] = _head(source, batch)
    times = _measured(timed, args.rounds)
    bandwidth = 2 * COPIED_BYTES / statistics.median(times.pop("copy"))
    return {
        "blocks": len(span),
        "cached_tokens": args.cached,
        "kv_bytes_per_token_and_block": token_bytes,
        "load_average": round(os.getloadavg()[0], 1),
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "threads": torch.get_num_threads(),
        "ms": {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()},
        "best_ms": {name: round(1e3 * min(each), 2) for name, each in times.items()},
        "floor_ms": {name: round(1e3 * n / bandwidth, 2) for name, n in bytes_read.items()},
    }


def _measured(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, the first round dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 1):
        for name, work in timed.items():
            started = time.perf_counter()
            result = work()
            elapsed = time.perf_counter() - started
            seconds[name].append(result if isinstance(result, float) else elapsed)
    return {name: times[1:] for name, times in seconds.items()}


def _row(first: int, num_pages: int, position: int, num_tokens: int) -> CacheRow:
    return CacheRow(tuple(range(first, first + num_pages)), position, num_tokens)


def _step(model: SpanCompute, cache: KVCache, rows: list[CacheRow]) -> Callable[[], object]:
    num_tokens = sum(row.num_tokens for row in rows)
    hidden = torch.randn(num_tokens, model.config.hidden_size).to(model.dtype)
    return lambda: model.forward(hidden, rows, cache)


def _head(source: CheckpointSource, batch: int) -> Callable[[], object]:
    dtype = torch.bfloat16
    edges = Edges.load(source.config, source.checkpoint.edge_weights(dtype), dtype=dtype)
    hidden = torch.randn(batch, source.config.hidden_size).to(dtype)
    return lambda: edges.logits(hidden)


def _copy() -> Callable[[], object]:
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _local(dtype_name: str) -> Callable[[], object]:
    from benchmarks import _local

    model, prompt = _local.load(getattr(torch, dtype_name))
    return lambda: _local.seconds_per_token(model, prompt, 16)

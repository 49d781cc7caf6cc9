"""Blocks of a model's shape with random weights on a GPU, through the real worker's device part.

A step is what the device thread of a server does with a batch: it decodes each session's tensor,
copies, replays the recorded pass, copies back, and codes each session's output. Sessions are of
clients of their own, one token each, behind `cached` tokens. The floor is the time to read
weights and cached keys and values once, at the rate of a copy from device memory to itself
(bytes read and written). `forward_ms` is the pass without the worker around it, waited for.

The baseline `offload` is one process whose weights do not fit on the device: int4 blocks lie in
pinned host memory, and while one computes the next is copied, into two buffers by turns.
"""

import argparse
import copy
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._shapes import config_of
from p2pllm.clock import SystemClock
from p2pllm.config import ServerConfig
from p2pllm.ids import PeerId, SessionId
from p2pllm.model.block import Block
from p2pllm.model.config import ModelConfig
from p2pllm.model.dummy import dummy_weights
from p2pllm.model.executor import DeviceThread
from p2pllm.model.families import family_of
from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.quantize import Scheme
from p2pllm.model.span_model import SpanCompute, SpanModel
from p2pllm.model.tensor_io import encode_tensor
from p2pllm.server.pages import PAGE_TOKENS, pages_for
from p2pllm.server.scheduler import Batch, Piece, Scheduler, Task
from p2pllm.server.source import DummySource
from p2pllm.server.worker import StepInput, Worker
from p2pllm.spans import Span
from p2pllm.wire.messages import Numerics, Open, Row
from p2pllm.wire.tensors import TensorCodec

GIB = 2**30
WARM_UPS = 3


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    config, span = config_of(args.shape), Span(0, args.blocks)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "shape": args.shape,
        "blocks": args.blocks,
        "cached_tokens": args.cached,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
    }
    for kind in args.kinds:
        result[kind] = _measure(config, span, kind, args, bandwidth)
        torch.cuda.empty_cache()
    if args.offload:
        result["offload"] = offloaded(config, device, args)
    return result


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy within device memory."""
    source = torch.randn(GIB, device=device)
    target = torch.empty_like(source)
    times = [_event_s(lambda: target.copy_(source)) for _ in range(WARM_UPS + 7)]
    return 2 * source.nbytes / statistics.median(times[WARM_UPS:])


def _event_s(work: Callable[[], object]) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    work()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1e3


def settings_of(kind: str, device: str) -> ServerConfig:
    """Of a server with weights of this dtype or quantization."""
    if kind in ("int8", "int4"):
        return ServerConfig(quantize=kind, device=device, load="dummy")
    return ServerConfig(dtype=kind, device=device, load="dummy")


def _measure(
    config: ModelConfig, span: Span, kind: str, args: argparse.Namespace, bandwidth: float
) -> dict[str, Any]:
    source, settings = DummySource(config, args.shape), settings_of(kind, args.device)
    started = time.perf_counter()
    model = source.load_span(span, settings, None)
    loaded_s = time.perf_counter() - started
    pages = pages_for(args.cached + 1)
    cache = model.make_cache(max(args.batches) * pages, PAGE_TOKENS)
    for index in range(len(span)):
        cache.block(index).normal_(0.0, 0.5)  # zeros can be read faster
    started = time.perf_counter()
    model.prepare(cache, max(args.batches))
    recorded_s = time.perf_counter() - started
    gc.collect()
    gc.freeze()  # as `p2pllm serve` does
    weights = source.block_bytes(settings) * len(span)
    found: dict[str, Any] = {"loaded_s": round(loaded_s, 1), "recorded_s": round(recorded_s, 1)}
    for batch in args.batches:
        cached = batch * (args.cached + 1) * cache.token_bytes * len(span)
        step, forward = _times(model, cache, batch, args)
        floor = (weights + cached) / bandwidth
        found[f"batch {batch}"] = {
            "ms": round(1e3 * statistics.median(step), 3),
            "best_ms": round(1e3 * min(step), 3),
            "forward_ms": round(1e3 * statistics.median(forward), 3),
            "floor_ms": round(1e3 * floor, 3),
            "of_floor": round(floor / statistics.median(step), 3),
        }
    return found


def _times(
    model: SpanCompute, cache: KVCache, batch: int, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of steps through the worker, and of the pass alone, in turn."""
    executor = DeviceThread("bench")  # not used: the device's part is called here
    worker = Worker(model, cache, Scheduler(512, 256, 1024), executor, SystemClock())
    pages = pages_for(args.cached + 1)
    tables = [tuple(range(i * pages, (i + 1) * pages)) for i in range(batch)]
    states = torch.randn(batch, model.config.hidden_size).to(model.dtype)
    rows = [CacheRow(table, args.cached, 1) for table in tables]

    def step() -> None:
        work, inputs = _batch_of(model, states, tables, args.cached)
        started = time.perf_counter()
        done = worker._compute(work, inputs, 0.0)
        steps.append(time.perf_counter() - started)
        assert not done.failed
        assert len(done.coded) == batch

    def forward() -> None:
        started = time.perf_counter()
        model.forward(states, rows, cache)
        torch.cuda.synchronize()
        forwards.append(time.perf_counter() - started)

    steps: list[float] = []
    forwards: list[float] = []
    for _ in range(WARM_UPS + args.rounds):
        step()
        forward()
    executor.close()
    return steps[WARM_UPS:], forwards[WARM_UPS:]


def _batch_of(
    model: SpanCompute, states: Tensor, tables: list[tuple[int, ...]], position: int
) -> tuple[Batch, list[Any]]:
    """One decode step of as many sessions, as the scheduler and the loop hand it over."""
    pieces, inputs = [], []
    for number, (state, table) in enumerate(zip(states, tables, strict=True)):
        client, session = PeerId(number.to_bytes(32)), SessionId(number.to_bytes(16))
        row = Row(session, 0, 0, position, 1, 1)
        opening = Open(
            session, 0, model.span, 4096, DummySource(model.config, "").model_id,
            Numerics("bfloat16"), b"", client,
        )  # fmt: skip
        task = Task(row, client, model.span, 0.0)
        source = StepInput(encode_tensor(state[None], TensorCodec.RAW), client, opening, math.inf)
        source.add(task, 0, table)
        pieces.append(Piece(task, 0, 1))
        inputs.append(source.inputs[task])
    return Batch(model.span, tuple(pieces)), inputs


# --- weights that are copied for each step -----------------------------------------------------


def offloaded(
    config: ModelConfig, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds per token of all blocks in int4, from what some of them take."""
    family = family_of(config)
    on_host: list[Block] = []
    for index in range(args.offload_blocks):
        weights = dummy_weights(config, index, torch.bfloat16, Scheme.INT4, device)
        on_host.append(_mapped(family.build_block(config, weights), _pinned))
    buffers = [_mapped(on_host[0], lambda host: host.to(device)) for _ in range(2)]
    torch.cuda.empty_cache()
    model = SpanModel(
        config, Span(0, 2), dict(enumerate(buffers)), dtype=torch.bfloat16, device=device
    )
    pages = pages_for(args.cached + 1)
    cache = model.make_cache(pages, PAGE_TOKENS)
    hidden = torch.randn(1, config.hidden_size, device=device).bfloat16()
    row = [CacheRow(tuple(range(pages)), args.cached, 1)]
    model.prepare(cache, 1)

    copies = torch.cuda.Stream(device)
    is_copied = [torch.cuda.Event() for _ in buffers]
    is_free = [torch.cuda.Event() for _ in buffers]
    for event in is_free:
        event.record()

    def step(number: int) -> None:
        slot = number % 2
        with torch.cuda.stream(copies):
            copies.wait_event(is_free[slot])
            for target, host in zip(
                _tensors(buffers[slot]), _tensors(on_host[number % len(on_host)]), strict=True
            ):
                target.copy_(host, non_blocking=True)
            is_copied[slot].record()
        torch.cuda.current_stream().wait_event(is_copied[slot])
        model.forward(hidden, row, cache, Span(slot, slot + 1))
        is_free[slot].record()

    def pass_s() -> float:
        started = time.perf_counter()
        for number in range(len(on_host)):
            step(number)
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / len(on_host)

    pass_s()
    per_block = statistics.median(pass_s() for _ in range(5))
    num_bytes = sum(tensor.nbytes for tensor in _tensors(on_host[0]))
    return {
        "blocks_measured": len(on_host),
        "block_mb": round(num_bytes / 1e6, 1),
        "host_to_device_gb_per_s": round(num_bytes / per_block / 1e9, 2),
        "ms_per_block": round(1e3 * per_block, 3),
        "ms_per_token_all_blocks": round(1e3 * per_block * config.num_blocks, 1),
        "tokens_per_s": round(1 / (per_block * config.num_blocks), 3),
    }


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's or layer's copy, with all tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if not dataclasses.is_dataclass(value):
        return value
    copied = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(copied, field.name, _mapped(getattr(value, field.name), change))
    return copied


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not dataclasses.is_dataclass(value):
        return []
    return [t for f in dataclasses.fields(value) for t in _tensors(getattr(value, f.name))]

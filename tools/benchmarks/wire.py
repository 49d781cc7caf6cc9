"""What codecs make of real hidden states: bytes, error, and the time to code and decode them.

The states are those of the default model in front of some of its blocks, over a reference text:
single rows and a few of them, as decode steps carry them, and prompts. The error is of the whole
tensor, relative to it. Bytes are payload, per token.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._server import settings_of
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.edges import Edges
from p2pllm.model.hub import resolve_model
from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.span_model import SpanCompute
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.server.pages import PAGE_TOKENS, pages_for
from p2pllm.server.source import CheckpointSource
from p2pllm.spans import Span
from p2pllm.wire.tensors import Compression, TensorCodec

QUICK = {"repeats": 3, "depths": [0, 10], "dtypes": ["bfloat16"]}
TEXTS = Path(__file__).resolve().parents[2] / "tests" / "vectors" / "smollm2_135m_greedy.json"
SHAPES = {"1 token": 1, "8 tokens": 8, "prompt of 256": 256}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 10, 20, 30], help="blocks")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=30, help="of which the median is taken")


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in args.dtypes:
        states = _states(name, sorted(args.depths))
        for shape, num_tokens in SHAPES.items():
            for codec in TensorCodec:
                for compress in (False, True):
                    row = _row(states, num_tokens, codec, compress, args.repeats)
                    if row is not None:
                        rows.append({"dtype": name, "states": shape, **row})
    return {"depths": args.depths, "codecs": rows}


def _row(
    states: dict[int, Tensor], num_tokens: int, codec: TensorCodec, compress: bool, repeats: int
) -> dict[str, Any] | None:
    """One codec on states of one size; None where compression is not even tried."""
    coded = {
        depth: encode_tensor(_last(each, num_tokens), codec, compress=compress)
        for depth, each in states.items()
    }
    if compress and all(each.header.compression is Compression.NONE for each in coded.values()):
        return None
    errors = {
        depth: _error(decode_tensor(coded[depth]), _last(each, num_tokens))
        for depth, each in states.items()
    }
    deepest = max(states)
    sample = _last(states[deepest], num_tokens)
    return {
        "codec": codec.name.lower() + (", zstd" if compress else ""),
        "bytes_per_token": round(
            statistics.mean(len(c.data) for c in coded.values()) / num_tokens, 1
        ),
        **{f"error_at_{depth}": float(f"{error:.3g}") for depth, error in errors.items()},
        "encode_us": _micros(lambda: encode_tensor(sample, codec, compress=compress), repeats),
        "decode_us": _micros(lambda: decode_tensor(coded[deepest]), repeats),
    }


@torch.inference_mode()
def _states(dtype_name: str, depths: list[int]) -> dict[int, Tensor]:
    """The hidden states in front of these blocks, (T, D) each."""
    source = CheckpointSource(open_checkpoint(resolve_model()))
    config = source.config
    dtype = getattr(torch, dtype_name)
    edges = Edges.load(config, source.checkpoint.edge_weights(dtype), dtype=dtype)
    model = source.load_span(Span(0, config.num_blocks), settings_of(dtype_name), None)
    hidden = edges.embed(torch.tensor(_text()))
    states, at = {}, 0
    for depth in depths:
        if depth > at:
            hidden, at = _run(model, hidden, Span(at, depth)), depth
        states[depth] = hidden
    return states


def _text() -> list[int]:
    """Reference texts in a row, as long as the longest of SHAPES."""
    cases = json.loads(TEXTS.read_text())["cases"]
    ids = [token for case in cases for token in case["prompt_ids"] + case["greedy_ids"]]
    return ids[: max(SHAPES.values())]


def _run(model: SpanCompute, hidden: Tensor, span: Span) -> Tensor:
    num_pages = pages_for(hidden.shape[0])
    cache = model.make_cache(num_pages, PAGE_TOKENS)
    row = CacheRow(tuple(range(num_pages)), 0, hidden.shape[0])
    return model.forward(hidden, [row], cache, span=span)


def _last(states: Tensor, num_tokens: int) -> Tensor:
    return states[-num_tokens:]


def _error(decoded: Tensor, true: Tensor) -> float:
    return float((decoded.double() - true.double()).norm() / true.double().norm())


def _micros(work: Callable[[], object], repeats: int) -> float:
    """The median time, in microseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(1e6 * statistics.median(times), 1)

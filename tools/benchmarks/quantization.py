"""What weights in fewer bits change: error of each block, KL of the whole model, memory, loading.

The reference is the same model with its weights dequantized to float32. Every block gets the
reference's hidden states in front of it, so an error is that block's own, relative to its output
and to what it adds. The KL (nats per token, reference to scheme) is of the whole model over the
reference texts, teacher-forced.

With `--kv-bits 8` it is keys and values in 8 bits: the reference of each scheme is then the same
weights with keys and values in the compute type, read in the same chunks.
"""

import argparse
import json
import math
import time
from dataclasses import replace
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
from p2pllm.server.source import CheckpointSource
from p2pllm.spans import Span

QUICK = {"schemes": ["int4"]}
TEXTS = Path(__file__).resolve().parents[2] / "tests" / "vectors" / "smollm2_135m_greedy.json"
PAGE_TOKENS = 64
# Tokens read at once: prompts take another path through the kernels than steps do.
MANY, FEW = 512, 16


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="as p2pllm serve takes it")
    parser.add_argument("--schemes", nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--kv-bits", type=int, choices=[16, 8], default=16)


def run(args: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_checkpoint(resolve_model(args.model) if args.model else resolve_model())
    source = CheckpointSource(checkpoint)
    edges = Edges.load(checkpoint.config, checkpoint.edge_weights(), dtype=torch.float32)
    cases = json.loads(TEXTS.read_text())["cases"]
    texts = [case["prompt_ids"] + case["greedy_ids"] for case in cases]
    if args.kv_bits == 8:
        return {
            "model": str(checkpoint.model_id.name),
            "tokens": sum(map(len, texts)),
            "kv8": {name: _compare_kv8(source, name, edges, texts) for name in args.schemes},
        }
    reference, _ = _load(source, "float32")
    states = [_states(reference, edges.embed(torch.tensor(ids))) for ids in texts]
    expected = [edges.logits(each[-1]).log_softmax(-1) for each in states]
    return {
        "model": str(checkpoint.model_id.name),
        "tokens": sum(map(len, texts)),
        "schemes": {name: _compare(source, name, edges, states, expected) for name in args.schemes},
    }


def _load(
    source: CheckpointSource, name: str, loaded: SpanCompute | None = None, kv_bits: int = 16
) -> tuple[SpanCompute, float]:
    started = time.perf_counter()
    settings = replace(settings_of(name), kv_bits=kv_bits)
    model = source.load_span(Span(0, source.config.num_blocks), settings, None, loaded)
    return model, time.perf_counter() - started


def _compare(
    source: CheckpointSource,
    name: str,
    edges: Edges,
    states: list[list[Tensor]],
    expected: list[Tensor],
) -> dict[str, Any]:
    model, seconds = _load(source, name)
    errors = []
    for index in model.span:
        one = Span(index, index + 1)
        off = change = whole = 0.0
        for before, after in ((each[index], each[index + 1]) for each in states):
            off += float((_run(model, before, one) - after).square().sum())
            change += float((after - before).square().sum())
            whole += float(after.square().sum())
        errors.append((math.sqrt(off / whole), math.sqrt(off / change)))
    of_output, of_change = zip(*errors, strict=True)
    return {
        "kl": {
            "prompts": _divergence(model, edges, states, expected, MANY),
            "steps": _divergence(model, edges, states, expected, FEW),
        },
        "block_error": {
            "mean": _round(sum(of_output) / len(errors)),
            "max": _round(max(of_output)),
        },
        "block_error_of_its_change": {
            "mean": _round(sum(of_change) / len(errors)),
            "max": _round(max(of_change)),
        },
        "mib_per_block": round(source.block_bytes(settings_of(name)) / 2**20, 3),
        "load_s": round(seconds, 2),
    }


def _compare_kv8(
    source: CheckpointSource, name: str, edges: Edges, texts: list[list[int]]
) -> dict[str, Any]:
    plain, _ = _load(source, name)
    kv8, _ = _load(source, name, plain, kv_bits=8)
    states = [[edges.embed(torch.tensor(ids))] for ids in texts]
    kl = {}
    for label, chunk in (("prompts", MANY), ("steps", FEW)):
        outputs = [_run(plain, each[0], plain.span, chunk) for each in states]
        expected = [edges.logits(output).log_softmax(-1) for output in outputs]
        kl[label] = _divergence(kv8, edges, states, expected, chunk)
    return kl


def _divergence(
    model: SpanCompute, edges: Edges, states: list[list[Tensor]], expected: list[Tensor], chunk: int
) -> dict[str, float]:
    """Over all texts, read in chunks of so many tokens."""
    kl, same, count = 0.0, 0, 0
    for each, log_p in zip(states, expected, strict=True):
        log_q = edges.logits(_run(model, each[0], model.span, chunk)).log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count += log_p.shape[0]
    return {"mean_nats": round(kl / count, 6), "top1_agreement": round(same / count, 4)}


def _round(error: float) -> float:
    return float(f"{error:.3g}")


def _states(model: SpanCompute, hidden: Tensor) -> list[Tensor]:
    """The hidden states before each block, and after the last."""
    states = [hidden]
    for index in model.span:
        states.append(_run(model, states[-1], Span(index, index + 1)))
    return states


def _run(model: SpanCompute, hidden: Tensor, span: Span, chunk: int = MANY) -> Tensor:
    """One text's states through some blocks, with a cache of its own; float32."""
    pages = tuple(range(-(-hidden.shape[0] // PAGE_TOKENS)))
    cache = model.make_cache(len(pages), PAGE_TOKENS)
    outputs, position = [], 0
    for part in hidden.split(chunk):
        row = CacheRow(pages, position, part.shape[0])
        outputs.append(model.forward(part, [row], cache, span=span).float())
        position += part.shape[0]
    return torch.cat(outputs)

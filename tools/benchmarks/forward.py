"""Passes without sessions (training, scoring): tokens per second, beside the same in one process.

All blocks over a batch of whole sequences. Beside it, in turn: `blocks_alone`, the same blocks over
the whole batch in one process, and `transformers`, which both have the machine for themselves.
Embedding included everywhere, head nowhere.
"""

import argparse
import statistics
from contextlib import ExitStack
from typing import Any

from benchmarks import _lab
from benchmarks._program import Program, running

QUICK = {"shapes": ["2x16"], "rounds": 1, "weights": ["bfloat16"]}
TO_REACH = {("float32", "8x128"): 600, ("bfloat16", "8x128"): 1200}  # tokens per second


def configure(parser: argparse.ArgumentParser) -> None:
    _lab.add_weights(parser, ["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=["8x128", "1x128"], help="BATCHxTOKENS")
    parser.add_argument("--rtts", type=float, nargs="+", default=[0.0], help="in ms")
    parser.add_argument("--micro-batch", type=int, default=512, help="tokens sent together")
    parser.add_argument("--rounds", type=int, default=5)
    _lab.add_swarm(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for weights in args.weights:
        dtype = _lab.dtype_beside(weights)
        with ExitStack() as stack:
            setup = {"weights": weights, "batch": 1, "max_tokens": 8}
            alone = stack.enter_context(running("_plain", setup))
            local = stack.enter_context(running("_local", dtype))
            for rtt_ms in args.rtts:
                rows += _rows(alone, local, weights, rtt_ms, args)
    return {
        "loop": args.loop,
        "hops": args.hops,
        "rounds": args.rounds,
        "micro_batch_tokens": args.micro_batch,
        "forward": rows,
    }


def _rows(
    alone: Program, local: Program, weights: str, rtt_ms: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One swarm: a row for each shape, measured in turn."""
    rtt_s, dtype = rtt_ms / 1e3, _lab.dtype_beside(weights)
    rows = []
    with (
        _lab.servers(weights, args.hops, loop=args.loop, rtt_s=rtt_s) as swarm,
        _lab.clients(
            1,
            swarm,
            dtype,
            loop=args.loop,
            rtt_s=rtt_s,
            micro_batch_tokens=args.micro_batch,
        ) as (client,),
    ):
        for shape in args.shapes:
            batch, tokens = map(int, shape.split("x"))
            size = {"batch": batch, "prompt_tokens": tokens}
            found: dict[str, list[float]] = {"ours": [], "alone": [], "local": []}
            for seed in range(-1, args.rounds):
                found["alone"].append(alone.ask("forward", **size))
                found["ours"].append(client.ask("forward", **size, seed=seed))
                found["local"].append(local.ask("forward", **size))
            measured = {name: seconds[1:] for name, seconds in found.items()}  # one is a warm-up
            rows.append(
                {
                    "weights": weights,
                    "shape": shape,
                    "rtt_ms": rtt_ms,
                    **_figures(batch * tokens, measured),
                    "to_reach": None if rtt_ms else TO_REACH.get((weights, shape)),
                }
            )
    return rows


def _figures(num_tokens: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    rates = {name: round(num_tokens / statistics.median(each)) for name, each in seconds.items()}
    return {
        "tokens_per_s": rates["ours"],
        "best_tokens_per_s": round(num_tokens / min(seconds["ours"])),
        "blocks_alone_tokens_per_s": rates["alone"],
        "transformers_tokens_per_s": rates["local"],
        "ratio_to_blocks_alone": _lab.paired(seconds["alone"], seconds["ours"]),
        "ratio_to_transformers": _lab.paired(seconds["local"], seconds["ours"]),
    }

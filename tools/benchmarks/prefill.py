"""Time to first token by length of the prompt and round trip, beside `transformers`.

Chunks of a prompt follow each other through the chain, so that the second hop computes while the
first does the next chunk. How well that works shows in the time to first token beside what the
hops computed: between the slowest hop's sum and that of all.

With `--batch`, so many prompts at once, without tokens after them; the baseline is then a forward
pass of all blocks without cache, which is what training needs.
"""

import argparse
import statistics
from typing import Any

from benchmarks import _lab
from benchmarks._program import Program, running
from benchmarks._streams import ms, percentile

QUICK = {"lengths": [64], "rtts": [0.0], "hops": [2], "rounds": 1, "weights": ["bfloat16"]}
TO_REACH = {("bfloat16", 1024, 0.0): 1.2}  # times transformers, by weights, length and RTT
FORWARD_TO_REACH = {"float32": 600, "bfloat16": 1200}  # tokens per second, 8 prompts of 128


def configure(parser: argparse.ArgumentParser) -> None:
    _lab.add_weights(parser, ["bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2000])
    parser.add_argument("--rtts", type=float, nargs="+", default=[0.0, 30.0, 100.0], help="in ms")
    parser.add_argument("--hops", type=int, nargs="+", default=[2, 3], help="servers, equal spans")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    _lab.add_loop(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for weights in args.weights:
        with running("_local", _lab.dtype_beside(weights)) as local:
            for length in args.lengths:
                _local(local, length, args.batch)  # warm-up
            for hops in args.hops:
                for rtt_ms in args.rtts:
                    rows += _rows(local, weights, hops, rtt_ms, args)
    return {"loop": args.loop, "rounds": args.rounds, "batch": args.batch, "prefill": rows}


def _rows(
    local: Program, weights: str, hops: int, rtt_ms: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One swarm: a row for each length, measured in turn."""
    rtt_s, dtype = rtt_ms / 1e3, _lab.dtype_beside(weights)
    ours: dict[int, list[dict[str, Any]]] = {length: [] for length in args.lengths}
    theirs: dict[int, list[float]] = {length: [] for length in args.lengths}
    with (
        _lab.servers(weights, hops, loop=args.loop, rtt_s=rtt_s) as swarm,
        _lab.clients(1, swarm, dtype, loop=args.loop, rtt_s=rtt_s) as (client,),
    ):
        for length in args.lengths:
            client.ask("prefill", prompt_tokens=length, batch=args.batch, seed=-1)  # warm-up
        for seed in range(args.rounds):
            for length in args.lengths:
                theirs[length].append(_local(local, length, args.batch))
                order = {"prompt_tokens": length, "batch": args.batch, "seed": seed}
                ours[length].append(client.ask("prefill", **order))
    return [
        {
            "weights": weights,
            "hops": hops,
            "rtt_ms": rtt_ms,
            "prompt_tokens": length,
            **_figures(ours[length], theirs[length]),
            **(
                _in_tokens(weights, length, args.batch, ours[length], theirs[length])
                if args.batch > 1
                else {"to_reach": TO_REACH.get((weights, length, rtt_ms))}
            ),
        }
        for length in args.lengths
    ]


def _local(local: Program, length: int, batch: int) -> float:
    """Seconds of the baseline."""
    if batch > 1:
        return float(local.ask("forward", batch=batch, prompt_tokens=length))
    return float(local.ask("prefill", prompt_tokens=length))


def _figures(ours: list[dict[str, Any]], theirs: list[float]) -> dict[str, Any]:
    ttft = [each["ttft_s"] for each in ours]
    found = {
        "ttft_p50_ms": ms(percentile(ttft, 0.5)),
        "ttft_p95_ms": ms(percentile(ttft, 0.95)),
        "transformers_ms": ms(statistics.median(theirs)),
        "ratio": _lab.paired(ttft, theirs),
    }
    computed = [each["hop_compute_s"] for each in ours if each["hop_compute_s"]]
    if computed:
        slowest = [max(hops) for hops in computed]
        found |= {
            "slowest_hop_ms": ms(statistics.median(slowest)),
            "all_hops_ms": ms(statistics.median(map(sum, computed))),
            "ttft_to_slowest_hop": _lab.paired(ttft, slowest),
        }
    return found


def _in_tokens(
    weights: str, length: int, batch: int, ours: list[dict[str, Any]], theirs: list[float]
) -> dict[str, Any]:
    """The same as tokens per second."""
    tokens = batch * length
    return {
        "tokens_per_s": round(tokens / statistics.median(each["ttft_s"] for each in ours)),
        "transformers_tokens_per_s": round(tokens / statistics.median(theirs)),
        "to_reach": FORWARD_TO_REACH.get(weights) if (batch, length) == (8, 128) else None,
    }

"""One stream of tokens through servers on loopback, beside the whole model in one process.

For each kind of weights: rounds of a local `transformers` generation and a generation through the
swarm, one after the other. Servers may hold their weights in int8 or int4; client and baseline are
then in bfloat16. The ratio is the median of the rounds' ratios. The baseline runs twice: with the
setting of OpenMP that p2pllm brings, and as whoever installs it finds it (`as_is`).
"""

import argparse
from typing import Any

from benchmarks import _lab
from benchmarks._program import running
from benchmarks._streams import Request

QUICK = {"tokens": 8, "rounds": 1, "weights": ["bfloat16"]}
TO_REACH = {"float32": 0.9, "bfloat16": 1.0, "int4": 2.0}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=128, help="generated per round")
    parser.add_argument("--prompt-tokens", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    _lab.add_weights(parser, ["float32", "bfloat16", "int4"])
    _lab.add_swarm(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    results = {weights: _compare(weights, args) for weights in args.weights}
    return {
        "hops": args.hops,
        "loop": args.loop,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.tokens,
        "rounds": args.rounds,
        "one_stream": [{"weights": name, **figures} for name, (figures, _) in results.items()],
        "memory": [
            {"weights": name, **row} for name, (_, memory) in results.items() for row in memory
        ],
    }


def _compare(weights: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one stream gets, and what the servers take."""
    dtype = _lab.dtype_beside(weights)
    local_s: list[float] = []
    as_is_s: list[float] = []
    requests: list[Request] = []
    with (
        running("_local", dtype) as local,
        running("_local", dtype, _lab.GIVEN_ENVIRONMENT) as as_is,
        _lab.servers(weights, args.hops, loop=args.loop) as swarm,
        _lab.clients(1, swarm, dtype, loop=args.loop) as client,
    ):
        sizes = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens}
        _lab.warm_baseline(local, **sizes)
        _lab.warm_baseline(as_is, **sizes)
        _lab.warm_up(client, 1, args.prompt_tokens)
        for seed in range(args.rounds):
            local_s.append(local.ask("decode", **sizes))
            as_is_s.append(as_is.ask("decode", **sizes))
            requests += _lab.closed_loop(client, 1, **sizes, seed=seed)
        memory = _lab.memory(swarm)
    _lab.check(requests)
    rates = [1 / request.tpot_s for request in requests]
    local_rates = [1 / seconds for seconds in local_s]
    as_is_rates = [1 / seconds for seconds in as_is_s]
    return {
        "tokens_per_s": _lab.median(rates, 2),
        "transformers_tokens_per_s": _lab.median(local_rates, 2),
        "ratio": _lab.paired(rates, local_rates),
        "transformers_as_is_tokens_per_s": _lab.median(as_is_rates, 2),
        "ratio_as_is": _lab.paired(rates, as_is_rates),
        "to_reach": TO_REACH.get(weights),
        **_lab.seen(requests),
    }, memory

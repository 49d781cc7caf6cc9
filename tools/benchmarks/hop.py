"""What the software costs per hop, with servers whose blocks do nothing and all other code real.

Overhead per hop: (time per token - the client's own work) / hops, on each event loop, for chains of
several lengths; and the CPU time that client and servers use per token, which other users of the
machine disturb less.

To see that identities leave nothing out, real servers are measured in turn with them: their time
per token less the client's work, and less what their blocks take alone (in the same processes,
between the generations), must be what as many identities take.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import _lab
from benchmarks._program import Program
from benchmarks._streams import Request, ms

QUICK = {"tokens": 16, "rounds": 1, "hops": [1], "loops": ["uvloop"], "real_hops": 1}
TO_REACH_MS = {"asyncio": 0.7, "uvloop": 0.4}
AGREEMENT = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=128, help="generated per round")
    parser.add_argument("--prompt-tokens", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="of the blocks alone, per round")
    parser.add_argument("--hops", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--loops", nargs="+", choices=tuple(TO_REACH_MS), default=list(TO_REACH_MS))
    parser.add_argument("--weights", choices=_lab.WEIGHTS, default="bfloat16")
    parser.add_argument("--real-hops", type=int, default=2, help="with real blocks too; 0: none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    overhead = [_overhead(loop, hops, args) for loop in args.loops for hops in args.hops]
    checked = args.loops if args.real_hops else []
    return {
        "weights": args.weights,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.tokens,
        "rounds": args.rounds,
        "overhead": overhead,
        "beside_real_blocks": [_check(loop, args.real_hops, args) for loop in checked],
    }


def _overhead(loop: str, hops: int, args: argparse.Namespace) -> dict[str, Any]:
    """Identities."""
    dtype = _lab.dtype_beside(args.weights)
    with (
        _lab.servers(dtype, hops, loop=loop, is_identity=True) as swarm,
        _lab.clients(1, swarm, dtype, loop=loop) as client,
    ):
        _lab.warm_up(client, 1, args.prompt_tokens)
        before = _lab.cpu_s([*client, *swarm])
        requests = [_generate(client, args, seed) for seed in range(args.rounds)]
        used = [b - a for a, b in zip(before, _lab.cpu_s([*client, *swarm]), strict=True)]
    num_tokens = args.tokens * args.rounds
    per_hop = [(r.tpot_s - r.own_s) / hops for r in requests]
    return {
        "loop": loop,
        "hops": hops,
        "ms_per_hop": ms(statistics.median(per_hop)),
        "best_ms_per_hop": ms(min(per_hop)),
        "to_reach": TO_REACH_MS[loop],
        "ms_per_token": ms(statistics.median(r.tpot_s for r in requests)),
        "client_own_ms": ms(statistics.median(r.own_s for r in requests)),
        "client_cpu_ms_per_token": ms(used[0] / num_tokens),
        "server_cpu_ms_per_token": ms(statistics.mean(used[1:]) / num_tokens),
    }


def _check(loop: str, hops: int, args: argparse.Namespace) -> dict[str, Any]:
    """Real blocks and identities in turn: is the blocks' time all that identities leave out?"""
    dtype = _lab.dtype_beside(args.weights)
    middle = args.prompt_tokens + args.tokens // 2
    identities, requests, blocks = [], [], []
    with (
        _lab.servers(dtype, hops, loop=loop, is_identity=True) as empty,
        _lab.clients(1, empty, dtype, loop=loop) as other,
        _lab.servers(args.weights, hops, loop=loop) as swarm,
        _lab.clients(1, swarm, dtype, loop=loop) as client,
    ):
        for one in (client, other):
            _lab.warm_up(one, 1, args.prompt_tokens)
        _blocks_s(swarm, middle, args.steps)
        for seed in range(args.rounds):
            identities.append(_generate(other, args, seed))
            requests.append(_generate(client, args, seed))
            blocks.append(_blocks_s(swarm, middle, args.steps))
    overhead = [request.tpot_s - request.own_s for request in identities]
    rest = [r.tpot_s - r.own_s - block_s for r, block_s in zip(requests, blocks, strict=True)]
    token_ms = _median_ms(request.tpot_s for request in requests)
    rest_ms, overhead_ms = _median_ms(rest), _median_ms(overhead)
    return {
        "loop": loop,
        "hops": hops,
        "ms_per_token": token_ms,
        "client_own_ms": _median_ms(request.own_s for request in requests),
        "blocks_in_chain_ms": _median_ms(sum(request.hop_compute_s) for request in requests),
        "blocks_alone_ms": _median_ms(blocks),
        "rest_ms": rest_ms,
        "overhead_ms": overhead_ms,
        "rest_to_overhead": round(rest_ms / overhead_ms, 3),
        "unexplained_of_token": round((rest_ms - overhead_ms) / token_ms, 3),
        "to_reach": f"rest within {AGREEMENT:.0%} of overhead",
    }


def _blocks_s(swarm: Sequence[Program], cached: int, steps: int) -> float:
    """What the blocks of all servers take for a token. They compute in turn, as in a chain, so
    that each finds the caches of the processor as the others leave them."""
    times = [[server.ask("step", cached=cached) for server in swarm] for _ in range(steps)]
    return sum(map(statistics.median, zip(*times, strict=True)))


def _generate(client: Sequence[Program], args: argparse.Namespace, seed: int) -> Request:
    requests = _lab.closed_loop(
        client, 1, prompt_tokens=args.prompt_tokens, tokens=args.tokens, seed=seed
    )
    _lab.check(requests)
    return requests[0]


def _median_ms(seconds: Iterable[float]) -> float:
    return ms(statistics.median(seconds))

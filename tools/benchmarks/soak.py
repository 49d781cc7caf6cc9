"""Sessions that open and close at random, for ten minutes: is memory flat, do all pages come back?

Generations of random sizes, some given up on the way, from many clients in one process. Between
slices of the time nothing is under way: then every page must be free and no session open, and
memory is read: all of it (`rss`), and of servers what is neither weights nor pages that sessions
have used (`beyond`). Growth is what the straight line through the second half of the readings
gains over that half; the first half fills caches and allocators.
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks import _lab
from benchmarks._program import Program

QUICK = {"seconds": 4.0, "slice_s": 2.0, "clients": 4, "tokens": 8, "prompt_tokens": 32}
SETTLE_S = 1.0  # a generation that was given up frees its pages in the background


def configure(parser: argparse.ArgumentParser) -> None:
    _lab.add_weights(parser, ["bfloat16"])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--slice-s", type=float, default=15.0, help="between two readings")
    parser.add_argument("--clients", type=int, default=16, help="generations at once")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="at most")
    parser.add_argument("--tokens", type=int, default=64, help="at most")
    _lab.add_swarm(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    results, readings = [], []
    for weights in args.weights:
        result, read = _soak(weights, args)
        results.append(result)
        readings += [{"weights": weights, **reading} for reading in read]
    return {
        "clients": args.clients,
        "seconds": args.seconds,
        "soak": results,
        "readings": readings,
    }


def _soak(weights: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What has become of it all, and the readings."""
    with (
        _lab.servers(weights, args.hops, loop=args.loop) as swarm,
        _lab.clients(1, swarm, _lab.dtype_beside(weights), loop=args.loop) as (client,),
    ):
        readings, counts = [], {"finished": 0, "given_up": 0, "failed": 0, "tokens": 0}
        started = time.monotonic()
        while time.monotonic() < started + args.seconds:
            ended = client.ask(
                "soak",
                clients=args.clients,
                seconds=args.slice_s,
                prompt_tokens=args.prompt_tokens,
                tokens=args.tokens,
                seed=len(readings),
            )
            counts = {name: counts[name] + ended[name] for name in counts}
            time.sleep(SETTLE_S)
            readings.append(_reading(time.monotonic() - started, swarm, client))
    memory = [name for name in readings[0] if name.endswith("_mib")]
    result = {
        "weights": weights,
        **counts,
        "pages_not_free_in_the_end": readings[-1]["pages_not_free"],
        "most_pages_not_free": max(reading["pages_not_free"] for reading in readings),
        "growth_mib": {name: _growth([each[name] for each in readings]) for name in memory},
    }
    return result, readings


def _reading(at_s: float, swarm: list[Program], client: Program) -> dict[str, Any]:
    usages = [server.ask("usage") for server in swarm]
    servers = {
        f"server{number}_{name}_mib": round(usage[name] / _lab.MIB, 1)
        for number, usage in enumerate(usages)
        for name in ("rss", "beyond")
    }
    return {
        "at_s": round(at_s),
        **servers,
        "client_rss_mib": round(client.ask("usage")["rss"] / _lab.MIB, 1),
        "pages_not_free": sum(usage["pages"] - usage["free_pages"] for usage in usages),
        "sessions": sum(usage["sessions"] for usage in usages),
    }


def _growth(values: list[float]) -> float:
    """What a straight line through the second half of the values gains over it."""
    half = values[len(values) // 2 :]
    if len(half) < 2:
        return 0.0
    slope = statistics.linear_regression(range(len(half)), half).slope
    return round(slope * (len(half) - 1), 1)

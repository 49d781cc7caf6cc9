"""Many streams at once: a closed loop of N clients, or requests that come at random.

Closed loop (the default): each of N clients generates, and again when it is through. Open loop
(`--rate`): requests come as a Poisson process, whatever became of those before; a TTFT then counts
from when the request came. Clients are generations of one client process, or each has a process of
its own (`--processes`). In the same rounds, one after the other: `transformers` with one stream,
and a plain torch loop of the same model with as many sequences as there are clients.

Tokens per second *in all* are of the whole round; *decoding* only while all clients are between
their first and last token, which is what the baselines, without their prompts, are compared with.

`--disturb-prompt` measures the closed loop again while another client, in a process of its own,
has a long prompt read every few seconds: what that does to the others' tokens.
"""

import argparse
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks import _lab
from benchmarks._program import Program, running
from benchmarks._streams import (
    Interval,
    Request,
    gaps_beside,
    ms,
    percentile,
    poisson_arrivals,
    rate_in_all,
    rate_when_all_decode,
)

QUICK = {"clients": 2, "tokens": 8, "seconds": 1.0, "rounds": 1, "weights": ["bfloat16"]}
DISTURBED_AT_MOST = 2.0  # times the p99 without


def configure(parser: argparse.ArgumentParser) -> None:
    _lab.add_weights(parser, ["bfloat16"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rate", type=float, help="requests per second: an open loop")
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--processes", action="store_true", help="one for each client")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=("transformers", "plain"),
        default=["transformers", "plain"],
    )
    parser.add_argument("--disturb-prompt", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--disturb-every", type=float, default=5.0, metavar="SECONDS")
    _lab.add_swarm(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    trials = {weights: _measure(weights, args) for weights in args.weights}
    result: dict[str, Any] = {
        "arrivals": f"Poisson, {args.rate:g} per s" if args.rate else "closed loop",
        "clients": args.clients,
        "client_processes": args.clients if args.processes else 1,
        "hops": args.hops,
        "loop": args.loop,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.tokens,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "load": [
            {"weights": weights, **_figures(trial, args.clients, is_open=bool(args.rate))}
            for weights, trial in trials.items()
        ],
    }
    if args.disturb_prompt:
        result["disturbed"] = [
            {"weights": weights, "prompt_tokens": args.disturb_prompt, **_disturbed(trial)}
            for weights, trial in trials.items()
        ]
    result["memory"] = [
        {"weights": weights, **row} for weights, trial in trials.items() for row in trial.memory
    ]
    return result


@dataclass
class Trial:
    """What the rounds with one kind of weights brought."""

    rounds: list[list[Request]] = field(default_factory=list)
    transformers: list[float] = field(default_factory=list)  # tokens per second, one stream
    plain: list[float] = field(default_factory=list)  # of all sequences together
    beside_prompts: list[list[Request]] = field(default_factory=list)
    prompts: list[Request] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)


def _measure(weights: str, args: argparse.Namespace) -> Trial:
    trial, dtype = Trial(), _lab.dtype_beside(weights)
    sizes = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens}
    with ExitStack() as stack:
        enter = stack.enter_context
        one = enter(running("_local", dtype)) if "transformers" in args.baselines else None
        many = None
        if "plain" in args.baselines:
            longest = args.prompt_tokens + args.tokens
            of_batch = {"weights": weights, "batch": args.clients, "max_tokens": longest}
            many = enter(running("_plain", of_batch))
        swarm = enter(_lab.servers(weights, args.hops, loop=args.loop))
        count = args.clients if args.processes else 1
        programs = enter(_lab.clients(count, swarm, dtype, loop=args.loop))
        other = None
        if args.disturb_prompt:
            (other,) = enter(_lab.clients(1, swarm, dtype, loop=args.loop))
        for program in filter(None, (one, many)):
            _lab.warm_baseline(program, **sizes)
        _lab.warm_up(programs, args.clients, args.prompt_tokens)
        for seed in range(args.rounds):
            if one is not None:
                trial.transformers.append(1 / one.ask("decode", **sizes))
            if many is not None:
                trial.plain.append(args.clients / many.ask("decode", **sizes))
            trial.rounds.append(_round(programs, args, seed))
            if other is not None:
                _round_beside_prompts(trial, programs, other, args, args.rounds + seed)
        trial.memory = _lab.memory(swarm)
    return trial


def _round(programs: Sequence[Program], args: argparse.Namespace, seed: int) -> list[Request]:
    sizes = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens, "seed": seed}
    if args.rate:
        arrivals = poisson_arrivals(args.rate, args.seconds, random.Random(seed))
        requests = _lab.open_loop(programs, arrivals, **sizes)
    else:
        requests = _lab.closed_loop(programs, args.clients, **sizes, seconds=args.seconds)
    if not any(request.tokens for request in requests):
        _lab.check(requests)
        raise SystemExit("no request came: more --seconds or a higher --rate are needed")
    return requests


def _round_beside_prompts(
    trial: Trial, programs: Sequence[Program], other: Program, args: argparse.Namespace, seed: int
) -> None:
    """A round while long prompts come, the first one when all clients are decoding, it is hoped."""
    count = max(1, int(args.seconds / args.disturb_every))
    arrivals = [(number + 0.5) * args.disturb_every for number in range(count)]
    _lab.send_open(other, arrivals, prompt_tokens=args.disturb_prompt, tokens=1, seed=seed)
    trial.beside_prompts.append(_round(programs, args, seed))
    trial.prompts += _lab.read_requests(other)


def _figures(trial: Trial, num_clients: int, *, is_open: bool) -> dict[str, Any]:
    """A row of the table. An open loop has as many streams as come: that all of so many decode
    means nothing there."""
    in_all = [rate_in_all(requests) for requests in trial.rounds]
    requests = [request for requests in trial.rounds for request in requests]
    per_client = [1 / request.tpot_s for request in requests if len(request.tokens) > 1]
    row: dict[str, Any] = {
        "tokens_per_s_per_client": _lab.median(per_client, 2) if per_client else None,
        "tokens_per_s_in_all": _lab.median(in_all, 1),
    }
    compared = {"in_all": in_all}
    if not is_open:
        found = [rate_when_all_decode(requests, num_clients) for requests in trial.rounds]
        decoding = [each for each in found if each is not None]
        row["tokens_per_s_decoding"] = _lab.median(decoding, 1) if decoding else None
        if len(decoding) == len(in_all):
            compared["decoding"] = decoding
    for name, theirs in (("transformers", trial.transformers), ("plain", trial.plain)):
        if theirs:
            row[f"{name}_tokens_per_s"] = _lab.median(theirs, 1)
            for which, ours in compared.items():
                row[f"{which}_to_{name}"] = _lab.paired(ours, theirs)
    return row | _lab.seen(requests)


def _disturbed(trial: Trial) -> dict[str, Any]:
    """The others' tokens with and without the long prompts."""
    without = [gap for requests in trial.rounds for request in requests for gap in request.gaps_s]
    disturbances: list[Interval] = [(r.arrived, r.tokens[0]) for r in trial.prompts if r.tokens]
    requests = [request for requests in trial.beside_prompts for request in requests]
    beside = gaps_beside(requests, disturbances)
    if not beside:
        return {"prompts": len(disturbances), "tokens_beside": 0}
    found: dict[str, Any] = {
        "prompts": len(disturbances),
        "prompt_ttft_p50_ms": ms(percentile([stop - start for start, stop in disturbances], 0.5)),
        "tokens_beside": len(beside),
    }
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        alone_s, beside_s = percentile(without, share), percentile(beside, share)
        found[f"{name}_without_ms"], found[f"{name}_beside_ms"] = ms(alone_s), ms(beside_s)
        found[f"{name}_ratio"] = round(beside_s / alone_s, 3)
    return found | {"to_reach_p99_ratio": DISTURBED_AT_MOST}

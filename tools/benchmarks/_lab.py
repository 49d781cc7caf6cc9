"""What benchmarks of whole swarms share: servers, clients and baselines in processes of their own.

Everything that is compared runs in one run, in turn, on one machine. Servers, clients and
baselines have the same environment: what the benchmark was started with, and what p2pllm adds to
that (GOMP_SPINCOUNT). With OpenMP's own default, threads that spin, `transformers` is up to twice
as slow on an idle machine and ten times on a busy one, and every ratio would be as much better.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

# Taken before p2pllm is imported, which sets what is not set.
GIVEN_ENVIRONMENT = dict(os.environ)

import p2pllm  # noqa: E402, F401
from benchmarks._program import Program, running  # noqa: E402
from benchmarks._setups import ClientSetup, ServerSetup  # noqa: E402
from benchmarks._streams import Request, latencies, ms  # noqa: E402

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
STARTS_TOGETHER_S = 0.2  # until every client process has its order
MIB = 2**20
MAX_BEYOND_MIB = 350  # of a server's memory, beside weights and cache


def add_weights(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The option that says what the servers hold."""
    parser.add_argument(
        "--weights",
        nargs="+",
        default=list(default),
        choices=WEIGHTS,
        help="of the servers; client and baseline compute in bfloat16 beside int8 and int4",
    )


def add_swarm(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that runs servers."""
    parser.add_argument("--hops", type=int, default=2, help="servers, with equal spans")
    add_loop(parser)


def add_loop(parser: argparse.ArgumentParser) -> None:
    """The option that says which event loop our programs run on."""
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")


def dtype_beside(weights: str) -> str:
    """What client and baseline compute in beside servers with such weights."""
    return "bfloat16" if weights.startswith("int") else weights


# --- programs ----------------------------------------------------------------------------------


@contextmanager
def servers(
    weights: str, hops: int, *, loop: str, is_identity: bool = False, rtt_s: float = 0.0
) -> Iterator[list[Program]]:
    """Servers with equal spans of the default model, in the order of the blocks."""
    with ExitStack() as stack:
        started: list[Program] = []
        for span in spans(hops):
            setup = ServerSetup(span, weights, is_identity, addresses(started), loop, rtt_s)
            started.append(stack.enter_context(running("_server", setup.to_json())))
        yield started


def spans(hops: int) -> list[str]:
    """The default model's blocks in equal parts."""
    from p2pllm.model.checkpoint import open_checkpoint
    from p2pllm.model.hub import resolve_model

    num_blocks = open_checkpoint(resolve_model()).config.num_blocks
    bounds = [num_blocks * i // hops for i in range(hops + 1)]
    return [f"{start}:{stop}" for start, stop in itertools.pairwise(bounds)]


@contextmanager
def clients(
    count: int,
    swarm: Sequence[Program],
    dtype: str,
    *,
    loop: str,
    rtt_s: float = 0.0,
    micro_batch_tokens: int = 512,
) -> Iterator[list[Program]]:
    """So many client processes."""
    setup = ClientSetup(addresses(swarm), dtype, loop, rtt_s, micro_batch_tokens=micro_batch_tokens)
    with ExitStack() as stack:
        yield [stack.enter_context(running("_client", setup.to_json())) for _ in range(count)]


def addresses(swarm: Sequence[Program]) -> tuple[str, ...]:
    """Whom to join: the first server."""
    return tuple(server.greeting["address"] for server in swarm[:1])


# --- what they do ------------------------------------------------------------------------------


def closed_loop(
    programs: Sequence[Program], num_clients: int, *, seconds: float = 0.0, **sizes: int
) -> list[Request]:
    """Every client generates once, and again until `seconds` have passed; clients are spread
    evenly over the processes. `sizes` are prompt_tokens, tokens and the seed of the prompts."""
    bounds = [num_clients * i // len(programs) for i in range(len(programs) + 1)]
    at = time.monotonic() + STARTS_TOGETHER_S
    for program, (start, stop) in zip(programs, itertools.pairwise(bounds), strict=True):
        mine = {"clients": stop - start, "first": start}
        program.send("closed", at=at, seconds=seconds, **mine, **sizes)
    return [request for program in programs for request in read_requests(program)]


def warm_up(programs: Sequence[Program], num_clients: int, prompt_tokens: int) -> None:
    """A few tokens for everybody that nobody measures; ends the benchmark if one fails."""
    requests = closed_loop(programs, num_clients, prompt_tokens=prompt_tokens, tokens=8, seed=-1)
    check(requests)


def warm_baseline(local: Program, **sizes: int) -> None:
    """The same for a baseline: the first time of every shape takes longer."""
    local.ask("decode", **{**sizes, "tokens": 4})


def check(requests: Sequence[Request]) -> None:
    """End the benchmark, with the reason, if a request has failed."""
    for request in requests:
        if request.error:
            raise SystemExit(f"a generation failed: {request.error}")


def open_loop(
    programs: Sequence[Program], arrivals: Sequence[float], **sizes: int
) -> list[Request]:
    """A request at each moment, of the processes in turn."""
    for number, program in enumerate(programs):
        mine = arrivals[number :: len(programs)]
        send_open(program, mine, first=number * len(arrivals), **sizes)
    return [request for program in programs for request in read_requests(program)]


def send_open(program: Program, arrivals: Sequence[float], **sizes: int) -> None:
    """Have one client process make requests at these moments; `read_requests` waits for them."""
    at = time.monotonic() + STARTS_TOGETHER_S
    program.send("open", arrivals=list(arrivals), at=at, **sizes)


def read_requests(program: Program) -> list[Request]:
    """What became of the requests that a client process was sent."""
    return [Request.from_json(value) for value in program.read()]


def cpu_s(programs: Sequence[Program]) -> list[float]:
    """CPU time that each has used so far."""
    return [usage["cpu_s"] for usage in _usages(programs)]


def memory(swarm: Sequence[Program]) -> list[dict[str, Any]]:
    """What each server takes, in MiB."""
    return [
        {
            "server": number,
            "processes": usage["processes"],
            "threads": usage["threads"],
            **{
                f"{name}_mib": round(usage[name] / MIB)
                for name in ("rss", "peak", "weights", "cache", "beyond", "files")
            },
            "to_reach_beyond_mib": MAX_BEYOND_MIB,
        }
        for number, usage in enumerate(_usages(swarm))
    ]


def _usages(programs: Sequence[Program]) -> list[dict[str, Any]]:
    return [program.ask("usage") for program in programs]


# --- figures -----------------------------------------------------------------------------------


def seen(requests: Sequence[Request]) -> dict[str, Any]:
    """What clients saw, and what it cost on the wire; errors only if there were any."""
    errors = [request.error for request in requests if request.error]
    whole = [request for request in requests if not request.error and len(request.tokens) > 1]
    found: dict[str, Any] = {"requests": len(requests), **latencies(requests)}
    if whole:
        found["client_own_ms"] = ms(statistics.median(r.own_s for r in whole))
        found["bytes_per_token_hop"] = round(
            statistics.median(r.bytes_per_token_hop for r in whole)
        )
    if errors:
        found |= {"failed": len(errors), "first_error": errors[0]}
    return found


def median(values: Sequence[float], digits: int = 3) -> float:
    """Rounded."""
    return round(statistics.median(values), digits)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of ours / theirs, each pair measured one after the other."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])

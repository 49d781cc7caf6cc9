"""One stream of tokens through two servers on loopback, beside the whole model in one process.

For each dtype: rounds of a local `transformers` generation and a generation through the swarm, one
after the other, and the medians of both. Servers may also hold their weights in int8 or int4; the
client and the baseline are then in bfloat16. Then the overhead per hop, with servers whose blocks
are identities: (time per token - the client's own work) / hops.
"""

import argparse
import asyncio
import itertools
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROMPT = "The capital of France is"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=128, help="generated per round")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--no-overhead", action="store_true", help="real blocks only")
    parser.add_argument("--hops", type=int, default=2, help="servers, with equal spans")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokens": args.tokens,
        "hops": args.hops,
        "decode": {dtype: _compare(dtype, args) for dtype in args.dtypes},
        "overhead": {
            dtype: _overhead(dtype, args)
            for dtype in args.dtypes
            if not (args.no_overhead or dtype.startswith("int"))
        },
    }


def _compare(dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of both, measured in turn, and their ratio."""
    baseline = "bfloat16" if dtype.startswith("int") else dtype
    with _process("_local.py", baseline) as local, _servers(dtype, "real", args.hops) as peers:
        local_s, swarm_s, own_s = [], [], []

        def between() -> None:
            local_s.append(float(_ask(local, str(args.tokens))))

        for result in _generate(peers, baseline, args.tokens, args.rounds, between):
            swarm_s.append(result.tpot_s)
            own_s.append(result.own_s_per_token)
    local, swarm = statistics.median(local_s), statistics.median(swarm_s)
    return {
        "swarm_tokens_per_s": round(1 / swarm, 2),
        "local_transformers_tokens_per_s": round(1 / local, 2),
        "ratio": round(local / swarm, 3),
        "client_own_ms_per_token": round(1e3 * statistics.median(own_s), 2),
    }


def _overhead(dtype: str, args: argparse.Namespace) -> dict[str, float]:
    with _servers(dtype, "identity", args.hops) as peers:
        per_hop, tokens = [], []
        for result in _generate(peers, dtype, args.tokens, args.rounds):
            per_hop.append((result.tpot_s - result.own_s_per_token) / args.hops)
            tokens.append(result.tpot_s)
    return {
        "ms_per_hop": round(1e3 * statistics.median(per_hop), 3),
        "ms_per_token": round(1e3 * statistics.median(tokens), 3),
    }


def _generate(
    peers: list[str], dtype: str, tokens: int, rounds: int, between: Any = None
) -> list[Any]:
    """Results of `rounds` generations by one client, after one that warms up."""
    import p2pllm
    from p2pllm.loops import new_event_loop

    async def generate() -> list[Any]:
        results = []
        async with p2pllm.connect(peers, swarm="bench", dtype=dtype, wire_codec="raw") as swarm:
            model = await swarm.model()
            await model.generate_batch([PROMPT], max_new_tokens=8, ignore_eos=True)
            for _ in range(rounds):
                if between is not None:
                    await asyncio.to_thread(between)
                results += await model.generate_batch(
                    [PROMPT], max_new_tokens=tokens, ignore_eos=True
                )
        return results

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(generate())


@contextmanager
def _servers(dtype: str, kind: str, hops: int) -> Iterator[list[str]]:
    """Servers with equal spans of the default model; yields the first one's address."""
    from contextlib import ExitStack

    from p2pllm.model.checkpoint import open_checkpoint
    from p2pllm.model.hub import resolve_model

    num_blocks = open_checkpoint(resolve_model()).config.num_blocks
    bounds = [num_blocks * i // hops for i in range(hops + 1)]
    with ExitStack() as stack:
        peers: list[str] = []
        for start, stop in itertools.pairwise(bounds):
            arguments = [f"{start}:{stop}", dtype, kind, *peers[:1]]
            process = stack.enter_context(_process("_server.py", *arguments))
            peers.append(process.greeting)
        yield peers[:1]


class _Process:
    """A program that prints a line when it is ready and ends with its standard input."""

    def __init__(self, popen: "subprocess.Popen[str]") -> None:
        self.popen = popen
        self.greeting = self.read()

    def read(self) -> str:
        line = self.popen.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.popen.args} ended early; its errors stand above")
        return line


def _ask(process: _Process, line: str) -> str:
    process.popen.stdin.write(line + "\n")
    process.popen.stdin.flush()
    return process.read()


@contextmanager
def _process(script: str, *arguments: str) -> Iterator[_Process]:
    popen = subprocess.Popen(
        [sys.executable, str(HERE / script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _Process(popen)
    finally:
        popen.stdin.close()
        try:
            popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            popen.kill()

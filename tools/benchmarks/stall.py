"""How long a generation stands still when a server is killed, beside a plain prefill.

Two servers of 15 blocks and a replica of each, in processes of their own on loopback, the default
model in float32. One text is at 512 tokens of history when the server of a hop gets kill -9. The
stall is the time between two tokens as the client sees them; its parts are read off the client's
own functions. Directly after it the same replica is given 512 tokens by a session of their own:
the plain prefill, in the same chunks.
"""

import argparse
import asyncio
import functools
import itertools
import shutil
import signal
import statistics
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks._nodes import Swarm, running

QUICK = {"runs": 1}
SPANS = ["0:15", "15:30", "0:15", "15:30"]
HISTORY = 512  # tokens in the lost cache, of one sequence
DECODED = 16  # of them, before the kill: enough to know what a token takes
AFTER = 8  # tokens after it
HOPS = {"first": 0, "last": -1}
WARM_UP = 64  # tokens of a prompt that nobody measures, so that no replica is at its first step


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=5, help="kills of each hop")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from p2pllm.loops import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run(args.runs))


async def _run(runs: int) -> dict[str, Any]:
    kills: dict[str, list[Kill]] = {name: [] for name in HOPS}
    async with running(SPANS) as swarm:
        for _ in range(runs):
            for name, index in HOPS.items():
                kills[name].append(await _kill(swarm, index))
                for server in swarm.servers:
                    if not server.is_running:
                        server.launch()
                        await server.ready()
    shutil.rmtree(swarm.directory)
    return {
        "history_tokens": HISTORY,
        "blocks": 15,
        **{f"{name}_hop": _figures(found) for name, found in kills.items()},
        "target": {"stall_p50_s": 1.0, "replay_to_prefill": 1.2},
    }


@dataclass
class Kill:
    """What one kill has cost, in seconds. `parts`: of the stall."""

    stall_s: float
    token_s: float  # between two tokens before it
    prefill_s: float
    parts: dict[str, float] = field(default_factory=dict)


def _figures(kills: list[Kill]) -> dict[str, Any]:
    def median(values: Iterator[float]) -> float:
        return round(statistics.median(values), 3)

    names = list(dict.fromkeys(name for kill in kills for name in kill.parts))
    return {
        "runs": len(kills),
        "stall_p50_s": median(kill.stall_s for kill in kills),
        "stall_max_s": round(max(kill.stall_s for kill in kills), 3),
        "parts_p50_s": {
            name: median(kill.parts.get(name, 0.0) for kill in kills) for name in names
        },
        "prefill_p50_s": median(kill.prefill_s for kill in kills),
        "replay_to_prefill": median(kill.parts["replay"] / kill.prefill_s for kill in kills),
        "token_p50_s": median(kill.token_s for kill in kills),
    }


async def _kill(swarm: Swarm, index: int) -> Kill:
    """One text, one kill."""
    import p2pllm

    peers = [server.address for server in swarm.servers]
    async with p2pllm.connect(
        peers, swarm=swarm.network, dtype="float32", wire_codec="raw"
    ) as joined:
        model = await joined.model()
        for server in swarm.servers:
            await _prefill(model, server.peer_id, WARM_UP)
        with _phases() as phases:
            killed_at, times, by = await _generate(model, swarm, index)
        prefill_s = await _prefill(model, by, HISTORY)
    stall_s = next(b - a for a, b in itertools.pairwise(times) if b > killed_at)
    before = [time for time in times if time <= killed_at]
    parts = {
        "notice": phases.starts["repair"] - killed_at,
        **{name: s for name, s in phases.spent_s.items() if name != "repair"},
    }
    named_s = sum(s for name, s in parts.items() if name != "notice")
    parts["rest of the repair"] = phases.spent_s["repair"] - named_s
    parts["the step itself"] = stall_s - parts["notice"] - phases.spent_s["repair"]
    gaps = [b - a for a, b in itertools.pairwise(before)]
    return Kill(stall_s, statistics.median(gaps), prefill_s, parts)


async def _generate(model: Any, swarm: Swarm, index: int) -> tuple[float, list[float], str]:
    """When the kill was, when tokens came, and who took over."""
    loop = asyncio.get_running_loop()
    prompt = [1000 + 7 * n % 5000 for n in range(HISTORY - DECODED + 1)]
    generation = model.generate(prompt, max_new_tokens=DECODED + AFTER, ignore_eos=True)
    killed_at, times = 0.0, []
    async with generation:
        async for _ in generation:
            times.append(loop.time())
            result = generation.results()[0]
            if not killed_at and len(result.token_ids) >= DECODED:
                victim = swarm.by_peer(str(result.route[index].peer_id))
                killed_at = loop.time()
                victim.send(signal.SIGKILL)
        (recovery,) = generation.results()[0].recoveries
    return killed_at, times, str(recovery.by[0][0])


async def _prefill(model: Any, peer_id: str, num_tokens: int) -> float:
    """Seconds for so many tokens through one server's blocks, in a session of its own."""
    from p2pllm.client.generate import prefill

    view = await model.view()
    server = next(s for s in view.servers if str(s.peer_id) == peer_id)
    from p2pllm.client.state import Hop

    presence = server.presence
    chain = model._chain((Hop(server.peer_id, presence.span, presence.numerics, b""),))
    states = await chain.open([num_tokens])
    started = asyncio.get_running_loop().time()
    await prefill(
        chain,
        model.compute,
        states[0],
        [1000 + n for n in range(num_tokens)],
        tail=1,
        chunk_tokens=model.settings.prefill_chunk_tokens,
    )
    took_s = asyncio.get_running_loop().time() - started
    await chain.close(states)
    return took_s


@dataclass
class Phases:
    """What a repair spends its time on: the first start and the seconds of each part."""

    starts: dict[str, float] = field(default_factory=dict)
    spent_s: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, work: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
        """`work`, with a look at the clock before and after."""

        @functools.wraps(work)
        async def measured(*args: Any, **kwargs: Any) -> Any:
            loop = asyncio.get_running_loop()
            started = loop.time()
            self.starts.setdefault(name, started)
            try:
                return await work(*args, **kwargs)
            finally:
                self.spent_s[name] = self.spent_s.get(name, 0.0) + loop.time() - started

        return measured


@contextmanager
def _phases() -> Iterator[Phases]:
    """Time the parts of the client's repairs."""
    from p2pllm.client.recovery import Recovery
    from p2pllm.client.replacement import Replacer

    phases = Phases()
    parts = [
        (Recovery, "repair", "repair"),
        (Recovery, "_alive", "probe"),
        (Recovery, "_plans", "plan"),
        (Replacer, "_open", "open"),
        (Replacer, "_replay", "replay"),
        (Replacer, "tell", "tell"),
    ]
    originals = [(cls, method, getattr(cls, method)) for cls, method, _ in parts]
    for cls, method, name in parts:
        setattr(cls, method, phases.timed(name, getattr(cls, method)))
    try:
        yield phases
    finally:
        for cls, method, original in originals:
            setattr(cls, method, original)

"""Clients generate while servers are killed, stopped and started again; every token is compared.

The answers must be the reference's: `transformers` in float32, greedy, with the end of text
suppressed. The two best logits of those texts are never nearer than 0.0045, so that the other
shapes in which a replay computes cannot change a token.

Unless it is to be cruel, a server is left alone while it is the only one that is well for some of
its blocks. Two at once may be out of order.
"""

import argparse
import asyncio
import collections
import itertools
import json
import logging
import random
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._nodes import Node, Swarm, running

logger = logging.getLogger(__name__)

QUICK = {"seconds": 5.0}
SPANS = ["0:15", "0:15", "15:30", "15:30", "7:23"]
NUM_BLOCKS = 30
VECTORS = Path(__file__).resolve().parents[2] / "tests" / "vectors" / "smollm2_135m_greedy.json"

DOWN_S = (0.5, 3.0)  # before who was killed is started again, which takes some seconds more
DRAINS_WITHIN_S = 40.0  # longer than the server's own limit
PAUSED_S = (0.5, 10.0)  # shorter and longer than it takes to call a server dead
AIMED = 0.75  # of the failures are at a server that somebody uses, if one may fail
MIN_TOKENS = 8
BATCH = 3  # texts that some generations have
BATCHES = 0.25  # of all generations
TOO_LONG_S = 120.0  # for one generation, twice a client's patience
LINE_S = 10.0  # between two live lines where they cannot be written over each other


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60.0, help="how long [60]")
    parser.add_argument("--clients", type=int, default=4, help="at once, in one process [4]")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between failures [5]")
    parser.add_argument("--seed", type=int, default=1, help="of all dice [1]")
    parser.add_argument("--cruel", action="store_true", help="leave blocks without a server, too")
    parser.add_argument("--keep", action="store_true", help="keep the logs also if all is well")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from p2pllm.loops import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run(args))


def is_good(result: dict[str, Any]) -> bool:
    """Nothing lost, nothing wrong, nobody died by himself, and something happened at all."""
    bad = result["lost"] + result["wrong"] + result["servers_ended_by_themselves"]
    return not bad and result["generations"] > 0


def describe(result: dict[str, Any]) -> None:
    """The result for people."""
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name.replace('_', ' '):{width}}  {value}")


# --- what is counted ------------------------------------------------------------------------------


@dataclass
class Tally:
    """What has happened so far."""

    generations: int = 0
    tokens: int = 0
    hop_tokens: int = 0  # computed for the texts: tokens of each, at every hop of its route
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    crashes: list[str] = field(default_factory=list)
    recoveries: int = 0
    waits: int = 0  # for blocks that nobody served
    replayed: int = 0
    stalls_s: list[float] = field(default_factory=list)  # between two tokens, at a recovery
    gaps_s: list[float] = field(default_factory=list)  # between two tokens, else
    active: list[Any] = field(default_factory=list)  # generations under way, of single texts

    def on_result(self, result: Any, expected: list[int], name: str) -> None:
        """An answer is complete."""
        got = list(result.token_ids)
        if got != expected:
            self.wrong.append(f"{name}: {got}, not {expected}, after {result.recoveries}")
        self.tokens += len(got)
        held = len(result.prompt_token_ids) + len(got) - 1
        self.hop_tokens += held * len(result.route)

    def line(self, seconds: float) -> str:
        """Where we stand."""
        return (
            f"{seconds:4.0f} s  {self.generations} generations, {self.tokens} tokens, "
            f"{sum(self.failures.values())} failures, {self.recoveries} recoveries, "
            f"{len(self.lost)} lost, {len(self.wrong)} wrong"
        )

    def report(self, seconds: float) -> dict[str, Any]:
        """The figures."""
        return {
            "seconds": round(seconds, 1),
            "generations": self.generations,
            "lost": len(self.lost),
            "wrong": len(self.wrong),
            "failures": dict(sorted(self.failures.items())),
            "servers_ended_by_themselves": len(self.crashes),
            "recoveries": self.recoveries,
            "waits_for_missing_blocks": self.waits,
            "stall_p50_s": _quantile(self.stalls_s, 0.5),
            "stall_p99_s": _quantile(self.stalls_s, 0.99),
            "token_p50_s": _quantile(self.gaps_s, 0.5),
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / seconds, 1),
            "replayed_tokens": self.replayed,  # at each of the hops that were replaced
            "replayed_share": round(self.replayed / max(1, self.hop_tokens + self.replayed), 4),
        }


def _quantile(values: list[float], q: float) -> float | None:
    if len(values) < 2:
        return round(values[0], 3) if values else None
    cuts = statistics.quantiles(values, n=1000, method="inclusive")
    return round(cuts[min(998, int(1000 * q) - 1)], 3)


# --- the run --------------------------------------------------------------------------------------


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    tally, loop = Tally(), asyncio.get_running_loop()
    async with running(SPANS) as swarm:
        _log_to(swarm.directory / "clients.log")
        is_over, ready = asyncio.Event(), asyncio.Barrier(args.clients + 1)
        async with asyncio.TaskGroup() as tasks:
            clients = [
                tasks.create_task(
                    _client(swarm, tally, random.Random(f"{args.seed}-{n}"), ready, is_over)
                )
                for n in range(args.clients)
            ]
            await ready.wait()
            started = loop.time()
            injector = Injector(swarm, tally, random.Random(args.seed), args.cruel, tasks)
            injecting = tasks.create_task(injector.run(args.every))
            showing = tasks.create_task(_show(tally))
            await asyncio.sleep(args.seconds)
            is_over.set()
            injecting.cancel()
            await asyncio.wait(clients)  # they end their last generation, and servers come back
            seconds = loop.time() - started
            showing.cancel()
            injector.cancel()
        _say(tally.line(seconds), is_last=True)
        for text in (*tally.lost, *tally.wrong, *tally.crashes):
            print(text, file=sys.stderr)
        if args.keep or tally.lost or tally.wrong or tally.crashes:
            print(f"the logs are in {swarm.directory}", file=sys.stderr)
        else:
            shutil.rmtree(swarm.directory)
        return tally.report(seconds)


def _log_to(path: Path) -> None:
    """What the clients and the injector say goes to a file beside the servers' logs."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s %(message)s", "%X"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


async def _show(tally: Tally) -> None:
    """A line about how it goes."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    while True:
        await asyncio.sleep(1.0 if sys.stderr.isatty() else LINE_S)
        _say(tally.line(loop.time() - started))


def _say(line: str, *, is_last: bool = False) -> None:
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="\n" if is_last else "", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


async def _client(
    swarm: Swarm,
    tally: Tally,
    rng: random.Random,
    ready: asyncio.Barrier,
    is_over: asyncio.Event,
) -> None:
    """One text, or some at once, after the other."""
    import p2pllm

    cases = json.loads(VECTORS.read_text())["cases"]
    async with p2pllm.connect(
        [swarm.bootstrap.address], swarm=swarm.network, dtype="float32", wire_codec="raw"
    ) as joined:
        model = await joined.model()
        await ready.wait()
        while not is_over.is_set():
            size = BATCH if rng.random() < BATCHES else 1
            chosen = rng.sample(cases, size)
            num_tokens = rng.randint(MIN_TOKENS, len(chosen[0]["greedy_ids"]))
            try:
                generating = asyncio.ensure_future(_generate(model, chosen, num_tokens, tally))
                await asyncio.wait_for(generating, TOO_LONG_S)
            except Exception as exc:  # whatever it is, an answer is lost
                names = [case["prompt"][:20] for case in chosen]
                tally.lost.append(f"{names}: {type(exc).__name__}: {exc}")
                logger.exception("generation lost prompts=%s", names)
                await asyncio.sleep(1.0)


async def _generate(model: Any, cases: list[Any], num_tokens: int, tally: Tally) -> None:
    prompts = [case["messages"] or case["prompt"] for case in cases]
    options = {"max_new_tokens": num_tokens, "ignore_eos": True}
    if len(cases) > 1:
        results = await model.generate_batch(prompts, **options)
    else:
        results = [await _watched(model, prompts[0], options, tally)]
    tally.generations += 1
    for case, result in zip(cases, results, strict=True):
        tally.on_result(result, case["greedy_ids"][:num_tokens], case["prompt"][:20])
    tally.recoveries += len(results[0].recoveries)  # the batch has one chain
    tally.replayed += sum(recovery.replayed_tokens for recovery in results[0].recoveries)


async def _watched(model: Any, prompt: Any, options: dict[str, Any], tally: Tally) -> Any:
    """One text, with a look at the clock at every token."""
    from p2pllm.client.results import Recovered

    loop = asyncio.get_running_loop()
    is_disturbed = False

    def on_event(event: Any) -> None:
        nonlocal is_disturbed
        is_disturbed |= isinstance(event, Recovered)
        tally.waits += not isinstance(event, Recovered)

    async with model.generate(prompt, on_event=on_event, **options) as generation:
        tally.active.append(generation)
        last = None
        try:
            async for _ in generation:
                now = loop.time()
                if last is not None:
                    (tally.stalls_s if is_disturbed else tally.gaps_s).append(now - last)
                last, is_disturbed = now, False
        finally:
            tally.active.remove(generation)
        return generation.results()[0]


# --- failures -------------------------------------------------------------------------------------


class Injector:
    """Puts servers out of order, and in order again."""

    def __init__(
        self,
        swarm: Swarm,
        tally: Tally,
        rng: random.Random,
        is_cruel: bool,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._swarm = swarm
        self._tally = tally
        self._rng = rng
        self._is_cruel = is_cruel
        self._tasks = tasks
        self._sick: set[Node] = set()
        self._healing: set[asyncio.Task[None]] = set()
        self._kinds: dict[str, Callable[[Node], Any]] = {
            "kill": self._kill,
            "pause": self._pause,
            "restart": self._restart,
        }

    async def run(self, period_s: float) -> None:
        """Until it is cancelled; what is out of order then comes back by itself."""
        kinds = itertools.cycle(self._kinds)  # each as often as the others, also in a short run
        while True:
            await asyncio.sleep(self._rng.uniform(0.2, 1.8) * period_s)
            self._look()
            allowed = [node for node in self._swarm.servers if self._may_fail(node)]
            routes = [generation.results()[0].route for generation in self._tally.active]
            used = {str(hop.peer_id) for route in routes for hop in route}
            busy = [node for node in allowed if node.peer_id in used]
            if allowed:
                is_aimed = busy and self._rng.random() < AIMED
                self._fail(self._rng.choice(busy if is_aimed else allowed), next(kinds))

    def cancel(self) -> None:
        """Bring nobody back any more."""
        for task in self._healing:
            task.cancel()

    def _look(self) -> None:
        """Who has ended and should not have?"""
        for node in self._swarm.servers:
            if not node.is_running and node not in self._sick:
                self._tally.crashes.append(f"{node.name} has ended by itself")
                self._fail(node, "kill")

    def _may_fail(self, node: Node) -> bool:
        if node in self._sick:
            return False
        left = [
            _blocks(span)
            for other, span in zip(self._swarm.servers, SPANS, strict=True)
            if other not in self._sick and other is not node
        ]
        return self._is_cruel or set().union(*left) == set(range(NUM_BLOCKS))

    def _fail(self, node: Node, kind: str) -> None:
        logger.info("failure kind=%s node=%s peer=%s", kind, node.name, node.peer_id[:8])
        self._tally.failures[kind] += 1
        self._sick.add(node)
        task = self._tasks.create_task(self._carry_out(node, kind))
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)

    async def _carry_out(self, node: Node, kind: str) -> None:
        await self._kinds[kind](node)
        self._sick.discard(node)
        logger.info("in order again node=%s", node.name)

    async def _kill(self, node: Node) -> None:
        await node.kill()
        await self._come_back(node)

    async def _pause(self, node: Node) -> None:
        node.send(signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(*PAUSED_S))
        node.send(signal.SIGCONT)

    async def _restart(self, node: Node) -> None:
        """An orderly end."""
        node.send(signal.SIGTERM)
        await node.ended(DRAINS_WITHIN_S)
        await self._come_back(node)

    async def _come_back(self, node: Node) -> None:
        await asyncio.sleep(self._rng.uniform(*DOWN_S))
        node.launch()
        await node.ready()


def _blocks(span: str) -> set[int]:
    start, _, stop = span.partition(":")
    return set(range(int(start), int(stop)))

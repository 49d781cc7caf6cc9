"""Steps per second while servers die: dual caches, restarts and no caches, on virtual time.

The comparison of PETALS (arXiv 2312.08361, section 3.2 and its table of failure rates): whenever a
server has computed something for the one generation that runs, it dies with probability p before
it can send it. Three ways to go on:

    dual caches   p2pllm's own: the lost hop is replaced, its inputs are replayed from the journals
    restart       with caches, but a failure ends the generation, which begins again
    no caches     every step sends the whole text so far through all hops; a failure costs a hop
                  nothing but to do this step again

Everything runs on the code of production, on virtual time; only links, devices and model are
simulated. A device takes what this project measured for the default model's blocks on two CPU
cores, so that computing again costs what it should. A dead server stays dead, and another one
joins the swarm; there are always some for every span.
"""

import argparse
import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pllm.client.model import SwarmModel
from p2pllm.client.moves import Mover
from p2pllm.client.session import Chain
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import P2PLLMError
from p2pllm.ids import PeerId
from p2pllm.sim.fake_model import FakeDevice
from p2pllm.sim.loop import run as run_on_virtual_time
from p2pllm.sim.swarm import SimServer, SimSwarm
from p2pllm.spans import Span

QUICK = {"lengths": [128], "rates": [1e-3], "runs": 1}
SPANS = (Span(0, 2), Span(2, 4), Span(4, 6))
SCALE = 5  # blocks of the default model that one simulated block stands for: 30 in all
BLOCK_S = SCALE * 0.80e-3  # to read a block's weights; docs/benchmarks.md
TOKEN_S = SCALE * 0.085e-3  # for each token more: 512 tokens through 15 blocks take 0.65 s
REPLICAS = 4  # of each span, when it begins
SETTINGS = ClientConfig(view_refresh_s=4.0)  # newcomers are found sooner than they are needed
SERVER = ServerConfig(cache_tokens=8192, throughput=1 / (BLOCK_S + TOKEN_S))
PROMPT = (72, 101, 108, 108, 111)  # bytes
MAX_RUNS = 10
METHODS = ("dual caches", "restart", "no caches")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024], metavar="TOKENS")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.0, 1e-4, 1e-3, 1e-2], metavar="P"
    )
    parser.add_argument("--runs", type=int, default=2, help="of the longest; more of shorter ones")
    parser.add_argument(
        "--limit", type=float, default=1200.0, help="virtual seconds; longer is not finished"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the figure there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    speeds: dict[str, dict[str, list[float | None]]] = {}
    for length in args.lengths:
        speeds[str(length)] = {}
        runs = min(args.runs * max(args.lengths) // length, MAX_RUNS)  # short ones fail seldom
        for method in METHODS:
            speeds[str(length)][method] = [
                _mean_speed(method, length, rate, runs, args.limit) for rate in args.rates
            ]
    if args.svg is not None:
        from benchmarks._faults_plot import draw

        args.svg.write_text(draw(args.rates, speeds))
    return {
        "failures_per_step_and_server": args.rates,
        "steps_per_s_by_length": speeds,
        "servers_in_chain": len(SPANS),
        "one_way_delay_s": 0.005,
        "block_s": BLOCK_S / SCALE,
        "token_s_per_block": TOKEN_S / SCALE,
        "blocks": SPANS[-1].stop * SCALE,
    }


def _mean_speed(method: str, length: int, rate: float, runs: int, limit_s: float) -> float | None:
    """Steps per second over all runs (one without failures); None if one did not finish."""
    took_s, failures = 0.0, 0
    for seed in range(runs if rate else 1):
        result = run_on_virtual_time(_measure(method, length, rate, limit_s, seed), seed=seed)
        if result is None:
            print(f"{method}, {length} tokens, p = {rate:g}: not finished", file=sys.stderr)
            return None
        took_s += result[0] / (runs if rate else 1)
        failures += result[1]
    speed = round(length / took_s, 2)
    print(
        f"{method}, {length} tokens, p = {rate:g}: {speed} steps/s, {failures} failures",
        file=sys.stderr,
    )
    return speed


async def _measure(
    method: str, length: int, rate: float, limit_s: float, seed: int
) -> tuple[float, int] | None:
    """Virtual seconds of one generation, and how many servers died; None beyond the limit."""
    loop = asyncio.get_running_loop()
    async with SimSwarm(num_blocks=SPANS[-1].stop, seed=seed) as swarm:
        async with asyncio.TaskGroup() as tasks:
            mortals = Mortals(swarm, rate, random.Random(seed), tasks)
            for span in SPANS * REPLICAS:
                await mortals.add(span)
            async with swarm.client(SETTINGS) as model:
                started = loop.time()
                mortals.is_armed = True
                generating = tasks.create_task(GENERATORS[method](model, length))
                done, _ = await asyncio.wait({generating}, timeout=limit_s)
                took_s = loop.time() - started
                mortals.is_armed = False
                generating.cancel()  # if it has not finished
    if not done:
        return None
    if tuple(generating.result()) != swarm.expected(PROMPT, length):
        raise SystemExit(f"{method} has given wrong tokens with seed {seed}")
    return took_s, mortals.num_dead


# --- servers that die -----------------------------------------------------------------------------


@dataclass
class MortalDevice(FakeDevice):
    """Computes, and then dies, perhaps."""

    on_computed: Callable[[], None] = lambda: None

    def on_forward(self, num_blocks: int, num_tokens: int) -> None:
        super().on_forward(num_blocks, num_tokens)
        self.on_computed()


class Mortals:
    """The servers; whoever dies is replaced by a newcomer."""

    def __init__(
        self, swarm: SimSwarm, rate: float, rng: random.Random, tasks: asyncio.TaskGroup
    ) -> None:
        self.is_armed = False
        self.num_dead = 0
        self._swarm = swarm
        self._rate = rate
        self._rng = rng
        self._tasks = tasks

    async def add(self, span: Span) -> None:
        """One more server."""
        device = MortalDevice(BLOCK_S, TOKEN_S)
        server = await self._swarm.add_server(span, SERVER, device_s=0.0, device=device)

        def on_computed() -> None:
            if self.is_armed and self._rng.random() < self._rate:
                self._die(server)
                device.on_computed = lambda: None

        device.on_computed = on_computed

    def _die(self, server: SimServer) -> None:
        self.num_dead += 1
        self._swarm.internet.kill(server.host)
        server.task.cancel()
        self._tasks.create_task(self.add(server.server.offer.span))


# --- the three ways -------------------------------------------------------------------------------


async def _with_dual_caches(model: SwarmModel, length: int) -> Sequence[int]:
    (result,) = await model.generate(PROMPT, max_new_tokens=length).finish()
    return result.token_ids


async def _with_restarts(model: SwarmModel, length: int) -> Sequence[int]:
    assert isinstance(model._mover, Mover)  # else the next line would change nothing
    model._mover = NoRepair(model)  # type: ignore[assignment] # the baseline knows no repairs
    while True:
        try:
            return await _with_dual_caches(model, length)
        except P2PLLMError:
            continue  # from the beginning, on other servers


async def _without_caches(model: SwarmModel, length: int) -> Sequence[int]:
    """The session is rolled back to nothing before each step, so nobody's cache is of use."""
    text = list(PROMPT)
    async with model.session(max_tokens=len(PROMPT) + length) as session:
        while len(text) < len(PROMPT) + length:
            session.rollback(0)
            logits = await session.step(text)
            text.append(int(logits[-1].argmax()))
    return text[len(PROMPT) :]


GENERATORS = dict(zip(METHODS, (_with_dual_caches, _with_restarts, _without_caches), strict=True))


class NoRepair:
    """Stands in for the client's `Mover`: a step that fails is an error, and nothing is moved."""

    def __init__(self, model: SwarmModel) -> None:
        self._model = model

    async def repair(self, chain: Chain, failure: P2PLLMError) -> None:
        for hop in chain.hops:
            try:
                await chain.endpoint.ping(hop.peer, timeout_s=1.0, is_patient=False)
            except P2PLLMError:
                self._model.routes.on_failure(hop.peer)
        raise failure

    async def prepare_hedge(self, chain: Chain, index: int) -> None:
        await asyncio.get_running_loop().create_future()

    def on_progress(self, chain: Chain) -> None:
        pass

    def on_leaving(self, chain: Chain, peer: PeerId, deadline_s: float) -> None:
        pass

    def on_closed(self, chain: Chain) -> None:
        pass

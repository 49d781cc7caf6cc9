"""A long prompt among streams that decode, on devices that take time: who waits for how long."""

import asyncio
import math
from dataclasses import dataclass, field

import pytest

from p2pllm.client.model import SwarmModel
from p2pllm.config import ServerConfig, ShaperConfig
from p2pllm.sim.fake_model import FakeDevice
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import SimSwarm
from p2pllm.spans import Span

NUM_STREAMS = 8
PROMPT_TOKENS = 2000
SERVER = ServerConfig(cache_tokens=8192, max_tokens_per_peer=8192, throughput=1e4)
LINE = ShaperConfig(delay_s=0.0002)  # one host: all time is the devices'

CPU = (0.006, 0.00027)  # seconds of a batch and of a token: 15 small blocks on one core
GPU = (0.012, 0.00001)


@dataclass
class Streams:
    """Generations of one client, and when their tokens came: after how long, at what moment."""

    model: SwarmModel
    tokens: list[tuple[float, float]] = field(default_factory=list)

    async def run(self, num_tokens: int) -> None:
        async with asyncio.TaskGroup() as streams:
            for number in range(NUM_STREAMS):
                streams.create_task(self._decode(number, num_tokens))

    async def _decode(self, number: int, num_tokens: int) -> None:
        now = asyncio.get_running_loop().time
        await asyncio.sleep(0.005 * number)  # nobody starts in the same moment
        last = None
        async for _ in self.model.generate([number] * 4, max_new_tokens=num_tokens):
            if last is not None:
                self.tokens.append((now() - last, now()))
            last = now()

    def p99_s(self, start: float = -math.inf, stop: float = math.inf) -> float:
        """Of the tokens that somebody waited for at any time from `start` to `stop`."""
        waits = sorted(s for s, at in self.tokens if at >= start and at - s <= stop)
        return waits[int(0.99 * len(waits))]


async def read_prompt(model: SwarmModel, seed: int) -> tuple[float, float]:
    """Have a prompt read, another one for each seed; returns from when to when that took."""
    now = asyncio.get_running_loop().time
    started = now()
    prompt = [(seed + 7 * n) % 251 for n in range(PROMPT_TOKENS)]
    await model.generate(prompt, max_new_tokens=1).finish()
    return started, now()


@dataclass
class Seen:
    """What a prompt and streams cost each other."""

    alone_s: float  # the prompt
    beside_s: float
    p99_alone_s: float  # tokens of the streams
    p99_beside_s: float


def observe(block_s: float, token_s: float) -> Seen:
    """A prompt alone, streams alone, then both, at two servers with such devices."""

    async def scenario() -> Seen:
        async with SimSwarm(num_blocks=2, line=LINE) as swarm:
            for index in range(2):
                device = FakeDevice(block_s=block_s, token_s=token_s)
                await swarm.add_server(Span(index, index + 1), SERVER, device_s=0.0, device=device)
            async with swarm.client() as model, swarm.client() as other:
                start, stop = await read_prompt(other, 1)
                alone_s = stop - start
                undisturbed, disturbed = Streams(model), Streams(model)
                await undisturbed.run(30)
                async with asyncio.TaskGroup() as streams:
                    running = streams.create_task(disturbed.run(300))
                    await asyncio.sleep(0.5)
                    start, stop = await read_prompt(other, 2)
                    running.cancel()
                p99_beside_s = disturbed.p99_s(start, stop)
                return Seen(alone_s, stop - start, undisturbed.p99_s(), p99_beside_s)

    return run(scenario())


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_long_prompt_at_most_doubles_the_others_token_times(device: tuple[float, float]) -> None:
    seen = observe(*device)

    assert seen.p99_beside_s <= 2 * seen.p99_alone_s
    assert seen.beside_s <= 2.5 * seen.alone_s  # and it gets through

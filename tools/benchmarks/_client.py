"""One client in a process of its own: generates as it is told, and notes when each token came.

    python -m benchmarks._client '{"peers": [...], "dtype": "bfloat16", ...}'      (see `_setups`)

All generations of one such process share a node, as those of a program do that serves users.
"""

import asyncio
import gc
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import p2pllm
from benchmarks import _machine
from benchmarks._program import answer_async
from benchmarks._server import LAB_DHT, loop_factory, shaped
from benchmarks._setups import SWARM, ClientSetup
from benchmarks._streams import Request
from p2pllm.client.client import client_config
from p2pllm.client.model import SwarmModel
from p2pllm.config import NodeConfig
from p2pllm.errors import P2PLLMError

FIRST_ID = 100  # tokens below are special


class Bench:
    """What can be asked of a client that runs here. Moments are of the machine's monotonic clock;
    `first` numbers the clients of several processes."""

    def __init__(self, model: SwarmModel) -> None:
        self._model = model

    async def closed(
        self,
        *,
        clients: int,
        at: float,
        prompt_tokens: int,
        tokens: int,
        seed: int,
        seconds: float = 0.0,
        first: int = 0,
    ) -> list[dict[str, Any]]:
        """Some clients from the moment `at`; each generates once, and again while there is time."""

        async def one(number: int) -> list[Request]:
            rng = random.Random(f"{seed} {number}")
            found = []
            while not found or time.monotonic() < at + seconds:
                ids = self._prompt(prompt_tokens, rng)
                arrived = max(at, time.monotonic())
                found.append(await self._generate(number, ids, tokens, arrived))
            return found

        await asyncio.sleep(max(0.0, at - time.monotonic()))
        each = await asyncio.gather(*map(one, range(first, first + clients)))
        return [request.to_json() for requests in each for request in requests]

    async def open(
        self,
        *,
        arrivals: Sequence[float],
        at: float,
        prompt_tokens: int,
        tokens: int,
        seed: int,
        first: int = 0,
    ) -> list[dict[str, Any]]:
        """A request at each of these moments after `at`, whatever became of those before."""

        async def one(number: int, arrival: float) -> Request:
            ids = self._prompt(prompt_tokens, random.Random(f"{seed} {number}"))
            await asyncio.sleep(max(0.0, at + arrival - time.monotonic()))
            return await self._generate(number, ids, tokens, at + arrival)

        each = await asyncio.gather(*(one(first + n, when) for n, when in enumerate(arrivals)))
        return [request.to_json() for request in each]

    async def prefill(self, *, prompt_tokens: int, batch: int, seed: int) -> dict[str, Any]:
        """Seconds until the first token of new prompts, and what each hop computed for it."""
        rng = random.Random(f"{seed} {prompt_tokens}")
        prompts = [self._prompt(prompt_tokens, rng) for _ in range(batch)]
        if batch > 1:
            started = time.monotonic()
            await self._model.generate_batch(prompts, max_new_tokens=1, ignore_eos=True)
            return {"ttft_s": time.monotonic() - started, "hop_compute_s": []}
        lines: list[str] = []
        generation = self._model.generate(
            prompts[0], max_new_tokens=1, ignore_eos=True, write_trace=lines.append
        )
        (result,) = await generation.finish()
        computed: dict[int, float] = {}
        for record in map(json.loads, lines):
            if "hop" in record:
                hop = record["hop"]
                computed[hop] = computed.get(hop, 0.0) + record["compute_s"]
        return {"ttft_s": result.ttft_s, "hop_compute_s": [computed[n] for n in sorted(computed)]}

    async def forward(self, *, prompt_tokens: int, batch: int, seed: int) -> float:
        """Seconds of all blocks over a batch, without sessions."""
        rng = random.Random(f"{seed} {prompt_tokens}")
        prompts = [self._prompt(prompt_tokens, rng) for _ in range(batch)]
        started = time.monotonic()
        await self._model.hidden_states(prompts)
        return time.monotonic() - started

    async def soak(
        self, *, clients: int, seconds: float, prompt_tokens: int, tokens: int, seed: int
    ) -> dict[str, int]:
        """Generations of random sizes, up to these, for a while, by so many at once; one of four
        is given up on the way. How many ended in each way."""
        found = {"finished": 0, "given_up": 0, "failed": 0, "tokens": 0}
        until = time.monotonic() + seconds

        async def one(rng: random.Random) -> None:
            while time.monotonic() < until:
                ids = self._prompt(rng.randint(1, prompt_tokens), rng)
                length = rng.randint(1, tokens)
                stop = rng.randint(0, length) if rng.random() < 0.25 else None
                made = 0
                generation = self._model.generate(ids, max_new_tokens=length, ignore_eos=True)
                try:
                    async with generation:
                        async for _ in generation._steps:
                            made += 1
                            if stop is not None and made > stop:
                                break
                except P2PLLMError:
                    found["failed"] += 1
                else:
                    found["finished" if made == length else "given_up"] += 1
                found["tokens"] += made
                await asyncio.sleep(rng.random() * 0.1)

        await asyncio.gather(*(one(random.Random(f"{seed} {n}")) for n in range(clients)))
        return found

    async def usage(self) -> dict[str, Any]:
        """CPU time so far, and memory."""
        return {"cpu_s": time.process_time(), **_machine.own_memory()}

    def _prompt(self, num_tokens: int, rng: random.Random) -> list[int]:
        """Another one each time: what servers still hold of an earlier one is of no use."""
        return [rng.randrange(FIRST_ID, self._model.config.vocab_size) for _ in range(num_tokens)]

    async def _generate(
        self, client: int, prompt: list[int], tokens: int, arrived: float
    ) -> Request:
        moments: list[float] = []
        generation = self._model.generate(prompt, max_new_tokens=tokens, ignore_eos=True)
        error = ""
        async with generation:
            try:
                # Iterating over the generation itself would leave out tokens without a text.
                async for _ in generation._steps:
                    moments.append(time.monotonic())  # noqa: PERF401 - kept if it fails
            except P2PLLMError as exc:
                error = f"{type(exc).__name__}: {exc}"
            (result,) = generation.results()
        return Request(
            client,
            arrived,
            tuple(moments),
            own_s=result.own_s_per_token or 0.0,
            bytes_per_token_hop=result.bytes_per_token_per_hop,
            hop_compute_s=tuple(hop.compute_s for hop in result.route),
            error=error,
        )


@asynccontextmanager
async def joined(setup: ClientSetup) -> AsyncIterator[SwarmModel]:
    """The default model of the benchmark's swarm."""
    config = client_config(SWARM)
    config = NodeConfig(
        net=replace(config.net, shaper=shaped(setup.rtt_s)),
        dht=replace(LAB_DHT, is_client=True),
        client=replace(config.client, micro_batch_tokens=setup.micro_batch_tokens),
    )
    async with p2pllm.connect(
        setup.peers, config=config, dtype=setup.dtype, wire_codec=setup.wire_codec
    ) as swarm:
        yield await swarm.model()


async def take_part(setup: ClientSetup) -> None:
    """Until standard input ends."""
    async with joined(setup) as model:
        gc.collect()
        gc.freeze()  # as `p2pllm generate` does
        bench = Bench(model)
        asked = {"closed": bench.closed, "open": bench.open, "prefill": bench.prefill}
        more = {"forward": bench.forward, "soak": bench.soak, "usage": bench.usage}
        await answer_async({}, {**asked, **more})


def main() -> None:
    setup = ClientSetup.parse(sys.argv[1])
    with asyncio.Runner(loop_factory=loop_factory(setup.loop)) as runner:
        runner.run(take_part(setup))


if __name__ == "__main__":
    main()

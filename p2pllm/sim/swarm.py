"""A whole swarm on virtual time: real endpoints, DHT, servers and clients, and the fake model.

    async def scenario() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            await swarm.add_server(Span(0, 3))
            await swarm.add_server(Span(3, 6))
            async with swarm.client() as model:
                result = await model.generate("abc", max_new_tokens=8).finish()

    run(scenario())

Everything above the links is the code that runs in production; only the links, the clock, the
device thread and the model are stand-ins. A server lives in a task of its own, so that it can be
killed (`SimNetwork.kill`) or stopped in an orderly way.
"""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from p2pllm.addresses import Address
from p2pllm.client.client import ModelParts, connect
from p2pllm.client.model import SwarmModel
from p2pllm.config import ClientConfig, DhtConfig, NetConfig, NodeConfig, ServerConfig, ShaperConfig
from p2pllm.identity import Identity
from p2pllm.ids import ModelId
from p2pllm.model.config import ModelConfig
from p2pllm.model.edges import EdgeCompute
from p2pllm.model.span_model import SpanCompute
from p2pllm.server.server import BlockChoice, Server
from p2pllm.server.source import LoadProgress
from p2pllm.sim.fake_model import FakeDevice, FakeEdges, FakeSpanModel, fake_config, greedy
from p2pllm.sim.loop import LoopClock
from p2pllm.sim.network import SimNetwork
from p2pllm.spans import Span
from p2pllm.swarm.node import Node
from p2pllm.tasks import task_group

T = TypeVar("T")

PORT = 31337
DEVICE_S = 0.001  # what a batch costs
# All hosts of a test are in one /16, and every simulated node is reachable.
LAB_DHT = DhtConfig(max_per_group_in_bucket=0, max_per_group_in_table=0)
LAB_SERVER = ServerConfig(cache_tokens=4096, throughput=1e4)


class InlineExecutor:
    """Computes on the loop's own thread, after a virtual `cost_s`; in order, as a thread would.

    What the work spends on a `device` is waited for as well.
    """

    def __init__(self, cost_s: float = DEVICE_S, device: FakeDevice | None = None) -> None:
        self._cost_s = cost_s
        self._device = device or FakeDevice()
        self._turn = asyncio.Lock()  # first come, first served

    async def run(self, work: Callable[[], T]) -> T:
        async with self._turn:
            await asyncio.sleep(self._cost_s)
            before_s = self._device.spent_s
            result = work()
            spent_s = self._device.spent_s - before_s
            if spent_s:
                await asyncio.sleep(spent_s)
            return result

    def timer(self) -> float:
        return self._device.spent_s


class BytesTokenizer:
    """One token per byte."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))

    def stream(self, prompt_ids: Sequence[int]) -> "BytesDetokenizer":
        return BytesDetokenizer()


class BytesDetokenizer:
    """Bytes as Latin-1, so that every token is one character."""

    def push(self, token: int) -> str:
        return bytes([token]).decode("latin-1")

    def flush(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class FakeSource:
    """The fake model as a server loads it."""

    config: ModelConfig
    model_id: ModelId
    device: FakeDevice | None = None  # what computing costs

    def block_bytes(self, settings: ServerConfig) -> int:
        return 2000

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        return FakeSpanModel(self.config, span, self.device)


def fake_source(num_blocks: int) -> FakeSource:
    """A fake model of this depth."""
    digest = hashlib.sha256(b"fake %d" % num_blocks).digest()
    return FakeSource(fake_config(num_blocks), ModelId(digest, "fake"))


class SimSwarm:
    """Hosts 10.0.0.1, 10.0.0.2, … on one simulated internet; the first one is a bootstrap node."""

    def __init__(
        self,
        num_blocks: int,
        *,
        line: ShaperConfig = ShaperConfig(delay_s=0.005),
        seed: int = 0,
        source: FakeSource | None = None,
        edges: EdgeCompute | None = None,
    ) -> None:
        """`source` and `edges`: another model than the fake one, as servers and clients load it."""
        self.source = source or fake_source(num_blocks)
        self._edges = edges or FakeEdges(self.source.config)
        self.internet = SimNetwork(line, seed=seed)
        self._rng = random.Random(seed)
        self._clock = LoopClock()
        self._group = task_group()
        self._running: list[asyncio.Task[None]] = []
        self._num_hosts = 0
        self.entry: Address | None = None

    async def __aenter__(self) -> "SimSwarm":
        self._tasks = await self._group.__aenter__()
        ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
        self._start(self._bootstrap(ready))
        self.entry = await ready
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._running:
            task.cancel()
        await self._group.__aexit__(kind, exc, traceback)

    async def add_server(
        self,
        blocks: Span | int,
        settings: ServerConfig | None = None,
        *,
        device_s: float = DEVICE_S,
        device: FakeDevice | None = None,
    ) -> "SimServer":
        """Start a server and wait until it serves; its device takes `device_s` for a batch, and
        what the `device` says for blocks and tokens.

        `blocks`: which ones, or how many of its own choice.
        """
        config = self._config(settings=settings)
        choice = BlockChoice(blocks) if isinstance(blocks, Span) else BlockChoice(num_blocks=blocks)
        ready: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        task = self._start(self._serve(config, choice, ready, device_s, device))
        return SimServer(await ready, config.net.listen_host, task)

    @asynccontextmanager
    async def client(
        self,
        settings: ClientConfig | None = None,
        *,
        wire_codec: str = "raw",
        eos_ids: frozenset[int] = frozenset(),
    ) -> AsyncIterator[SwarmModel]:
        """A client of the model, on a host of its own; `eos_ids` end a text."""
        config = self._config(is_client=True)
        config = replace(config, client=settings or config.client)
        async with connect(
            config=config,
            wire_codec=wire_codec,
            identity=self._identity(),
            network=self.internet.host(config.net.listen_host),
            clock=self._clock,
            executor=InlineExecutor(),
            rng=self._rng,
        ) as swarm:
            source, tokenizer = self.source, BytesTokenizer(eos_ids)
            parts = ModelParts(source.model_id, source.config, tokenizer, self._edges)
            yield await swarm.use(parts)

    def expected(self, prompt: str | Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """The greedy continuation that the whole model gives in one process."""
        ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        return tuple(greedy(self.source.config, ids, num_tokens))

    @property
    def next_host(self) -> str:
        """The address of the server or client that comes next, to shape its lines before."""
        return _host(self._num_hosts + 1)

    async def _bootstrap(self, ready: "asyncio.Future[Address]") -> None:
        config = self._config()
        host = self.internet.host(config.net.listen_host)
        async with Node.open(
            config, self._identity(), network=host, clock=self._clock, rng=self._rng
        ) as node:
            ready.set_result(node.addresses[0])
            await asyncio.Event().wait()

    async def _serve(
        self,
        config: NodeConfig,
        choice: BlockChoice,
        ready: "asyncio.Future[Server]",
        device_s: float,
        device: FakeDevice | None,
    ) -> None:
        try:
            async with Server.open(
                config,
                self._identity(),
                replace(self.source, device=device),
                choice,
                network=self.internet.host(config.net.listen_host),
                clock=self._clock,
                executor=InlineExecutor(device_s, device),
                rng=self._rng,
            ) as server:
                ready.set_result(server)
                await asyncio.Event().wait()
        except Exception as exc:
            if ready.done():
                raise
            ready.set_exception(exc)

    def _start(self, coroutine: "asyncio._CoroutineLike[None]") -> "asyncio.Task[None]":
        task = self._tasks.create_task(coroutine)
        self._running.append(task)
        return task

    def _config(
        self, *, settings: ServerConfig | None = None, is_client: bool = False
    ) -> NodeConfig:
        self._num_hosts += 1
        address = _host(self._num_hosts)
        return NodeConfig(
            net=NetConfig(
                network_id="sim",
                listen_host=address,
                listen_port=PORT,
                is_listening=not is_client,
            ),
            dht=replace(LAB_DHT, is_client=is_client),
            peers=(self.entry,) if self.entry else (),
            server=settings or LAB_SERVER,
        )

    def _identity(self) -> Identity:
        return Identity.from_seed(self._rng.randbytes(32))


def _host(number: int) -> str:
    return f"10.0.{number >> 8}.{number & 255}"


@dataclass(frozen=True, slots=True)
class SimServer:
    """A running server: the object itself, its host, and the task that it lives in."""

    server: Server
    host: str
    task: "asyncio.Task[None]"

    @property
    def num_pages(self) -> int:
        """Pages of its K/V cache."""
        return self.server.pages.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that no session holds."""
        return self.server.pages.num_free

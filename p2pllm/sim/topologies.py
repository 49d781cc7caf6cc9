"""Does the router tell the truth? Five small swarms, and what is predicted and measured on them.

Each has two servers, a and b, for every third of the blocks, so there are eight chains. They
differ in lines and devices: everything near, two continents, and a near swarm in which one link is
slow, one server is slow, or one is busy with the work of others. A client plans a route, generates
along it and compares; then other clients try all the chains one by one. It is known afterwards how
far the prediction was off, and how much better the best chain would have been.

Everything is what production runs but links, clock, devices and model; servers measure their
devices themselves, and nobody is told what a line is like.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import product

from p2pllm.client.model import SwarmModel
from p2pllm.config import ClientConfig, ServerConfig, ShaperConfig
from p2pllm.ids import PeerId
from p2pllm.routing.costs import CostModel, RouteCost
from p2pllm.routing.planner import Route
from p2pllm.routing.request import RouteRequest
from p2pllm.sim.fake_model import WIDTH, FakeDevice
from p2pllm.sim.swarm import DEVICE_S, SimSwarm
from p2pllm.spans import Span
from p2pllm.tasks import task_group

NUM_BLOCKS = 12
THIRDS = (Span(0, 4), Span(4, 8), Span(8, 12))
SERVERS = ("a1", "b1", "a2", "b2", "a3", "b3")
HELPERS = ("c1", "c3")  # through these, others get to the busy server
CLIENT, OTHERS = "client", "others"
BUSY = "a2"
NUM_OTHERS = 6
BLOCK_S, TOKEN_S = 1e-3, 5e-5  # a block of a mid-size model on a desktop's graphics card
# Until servers have measured their neighbours and told, and everybody's peer record has been stored
# again: those of a swarm's first minutes lie at the few peers that were known then.
SETTLING_S = 260.0
WARMING_S = 12.0  # until a busy server has announced that it is
SERVER = ServerConfig(cache_tokens=16_384)  # it measures its speed
PROMPT_TOKENS, NEW_TOKENS = 600, 32  # three chunks

Chain = tuple[str, ...]  # names of servers, in order


@dataclass(frozen=True, slots=True)
class Topology:
    """Where everybody is. `lines` gives what differs from `line`; `slow` what devices do.

    Names begin with a place of `lines`' pairs or are one: ("a", "b") is from every a to every b.
    """

    name: str
    line: ShaperConfig
    lines: tuple[tuple[str, str, ShaperConfig], ...] = ()
    slow: tuple[tuple[str, float], ...] = ()
    is_busy: bool = False

    def between(self, one: str, other: str) -> ShaperConfig:
        """The line between two; the last entry that fits counts."""
        found = self.line
        for first, second, line in self.lines:
            for ends in ((one, other), (other, one)):
                if ends[0].startswith(first) and ends[1].startswith(second):
                    found = line
        return found

    def device(self, name: str) -> FakeDevice:
        """What a server computes on."""
        factor = next((factor for prefix, factor in self.slow if name.startswith(prefix)), 1.0)
        return FakeDevice(BLOCK_S * factor, TOKEN_S * factor)


def _line(delay_ms: float, mbit: float) -> ShaperConfig:
    return ShaperConfig(delay_s=delay_ms / 1e3, bandwidth_bytes_s=mbit * 1e6 / 8)


TOPOLOGIES = (
    Topology("LAN", _line(0.3, 1000), slow=(("b", 1.15),)),
    Topology(
        "two continents",
        _line(8, 100),
        lines=(("a", "b", _line(45, 50)), ("client", "b", _line(45, 50))),
        slow=(("a", 1.5),),
    ),
    Topology("one slow link", _line(10, 100), lines=(("a1", "a2", _line(80, 1)),)),
    Topology("one slow server", _line(10, 100), slow=(("a2", 5.0),)),
    Topology("one busy server", _line(10, 100), is_busy=True),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: the chain it took, what was predicted for it, and what it took."""

    chain: Chain
    predicted: RouteCost
    ttft_s: float
    tpot_s: float

    @property
    def total_s(self) -> float:
        """The whole request, measured."""
        return self.ttft_s + NEW_TOKENS * self.tpot_s

    @property
    def ttft_error(self) -> float:
        """How far the predicted time to first token is off, as a part of the measured one."""
        return self.predicted.ttft_s / self.ttft_s - 1

    @property
    def tpot_error(self) -> float:
        """The same of the time per output token."""
        return self.predicted.tpot_s / self.tpot_s - 1


@dataclass(frozen=True, slots=True)
class Report:
    """`first`: by a client that knows announcements and its own pings only; `second`: its next
    generation. `tried`: the second generations of clients that may use one chain only."""

    topology: str
    first: Run
    second: Run
    tried: tuple[Run, ...]

    @property
    def best(self) -> Run:
        """The chain that turned out best."""
        return min((*self.tried, self.second), key=lambda run: run.total_s)

    @property
    def regret(self) -> float:
        """How much longer the chosen chain takes than the best one, as a part of it."""
        return self.second.total_s / self.best.total_s - 1


def all_chains() -> Iterator[Chain]:
    """One server for every third."""
    return product(*(tuple(n for n in SERVERS if n[1] == third) for third in "123"))


async def examine(topology: Topology, chains: tuple[Chain, ...] = ()) -> Report:
    """Predict and measure on a topology; `chains` are those to try (none: all)."""
    async with SimSwarm(num_blocks=NUM_BLOCKS, line=topology.line) as swarm:
        lab = _Lab(swarm, topology)
        await lab.build()
        async with task_group() as tasks:
            await asyncio.sleep(SETTLING_S)
            load = [tasks.create_task(lab.keep_busy()) for _ in range(lab.num_others)]
            await asyncio.sleep(WARMING_S if load else 0.0)
            async with lab.client(SERVERS) as model:
                first, second = await lab.generate(model), await lab.generate(model)
            tried = []
            for chain in chains or tuple(all_chains()):
                async with lab.client(chain) as model:
                    await lab.generate(model)
                    tried.append(await lab.generate(model))
            for task in load:
                task.cancel()
        return Report(topology.name, first, second, tuple(tried))


class _Lab:
    """A topology, built."""

    def __init__(self, swarm: SimSwarm, topology: Topology) -> None:
        self._swarm = swarm
        self._topology = topology
        self._hosts: dict[str, str] = {}  # of servers, by name
        self._peers: dict[str, PeerId] = {}

    @property
    def num_others(self) -> int:
        return NUM_OTHERS if self._topology.is_busy else 0

    async def build(self) -> None:
        """Start the servers."""
        names = (*SERVERS, *HELPERS) if self._topology.is_busy else SERVERS
        for name in names:
            self._shape(name)
            self._hosts[name] = self._swarm.next_host
            span, device = THIRDS[int(name[1]) - 1], self._topology.device(name)
            server = await self._swarm.add_server(span, SERVER, device_s=0.0, device=device)
            self._peers[name] = server.server.node.peer_id

    @asynccontextmanager
    async def client(
        self, names: tuple[str, ...], place: str = CLIENT
    ) -> AsyncIterator[SwarmModel]:
        """A client that may use these servers."""
        self._shape(place)
        allowed = frozenset(str(self._peers[name]) for name in names)
        # The same prompt again and again is to be computed each time.
        config = ClientConfig(allowed_servers=allowed, is_prefix_shared=False)
        async with self._swarm.client(config) as model:
            yield model

    async def generate(self, model: SwarmModel) -> Run:
        """Predict, generate, compare."""
        view = await model.view()
        prompt = [index % 251 for index in range(PROMPT_TOKENS)]
        generation = model.generate(prompt, max_new_tokens=NEW_TOKENS)
        (result,) = await generation.finish()
        route = generation.route
        assert route is not None
        assert result.ttft_s is not None
        assert result.tpot_s is not None
        hops = [(view.by_peer[hop.peer_id], hop.span) for hop in route.hops]
        predicted = CostModel(view, REQUEST).total(hops)
        return Run(self._names(route), predicted, result.ttft_s, result.tpot_s)

    async def keep_busy(self) -> None:
        """Generate through the busy server until cancelled."""
        async with self.client((HELPERS[0], BUSY, HELPERS[1]), OTHERS) as model:
            while True:
                await model.generate([1] * 512, max_new_tokens=32).finish()

    def _names(self, route: Route) -> Chain:
        names = {peer: name for name, peer in self._peers.items()}
        return tuple(names[hop.peer_id] for hop in route.hops)

    def _shape(self, name: str) -> None:
        """Give whoever comes next its lines."""
        for other, host in self._hosts.items():
            line = self._topology.between(name, other)
            self._swarm.internet.shape(self._swarm.next_host, host, line)


REQUEST = replace(
    RouteRequest(
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        activation_bytes_per_token=4 * WIDTH,
        relayed=False,
    ),
    own_step_s=DEVICE_S,
    own_chunk_s=DEVICE_S,
)

"""The DHT as a swarm: a thousand nodes that grow, look up, die and are replaced.

Every swarm grows as a real one does: each node joins through some member, looks itself up, and
fills its table from what it hears. Nothing is known from outside but who is alive.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import fmean

import pytest

from p2pllm.config import DhtConfig
from p2pllm.dht.keys import to_key
from p2pllm.dht.node import DhtNode, Publication
from p2pllm.ids import PeerId
from p2pllm.sim.dht_swarm import DhtSwarm
from p2pllm.sim.loop import run

logger = logging.getLogger(__name__)

NUM_NODES = 1000
JOIN_AT_ONCE = 25
MODELS = [f"model-{index}" for index in range(5)]


async def grow(
    swarm: DhtSwarm, num_nodes: int, *, skew_s: Callable[[], float] = lambda: 0.0
) -> None:
    """Let nodes join through random members until there are so many."""
    if not swarm.nodes:
        swarm.add(skew_s=skew_s())
    while (num_missing := num_nodes - len(swarm.nodes)) > 0:
        members = [node.peer_id for node in swarm.nodes]
        joining = [swarm.add(skew_s=skew_s()) for _ in range(min(JOIN_AT_ONCE, num_missing))]
        await asyncio.gather(*(node.bootstrap([swarm.rng.choice(members)]) for node in joining))


def in_swarm(scenario: Callable[[DhtSwarm], Awaitable[None]], *, seed: int = 1) -> None:
    """Run a scenario in an empty swarm on virtual time."""

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            swarm = DhtSwarm(tasks, DhtConfig(), rng=random.Random(seed))
            await scenario(swarm)
            swarm.kill_all()

    run(main())


@pytest.mark.slow(120)
def test_lookups_among_a_thousand_nodes_find_the_closest_twenty_in_few_steps() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        await grow(swarm, NUM_NODES)
        await asyncio.sleep(10)
        ids = [node.peer_id.dht_id for node in swarm.nodes]
        overlaps, chains = [], []
        for _ in range(200):
            node, target = swarm.rng.choice(swarm.nodes), swarm.rng.getrandbits(256)
            others = (place for place in ids if place != node.peer_id.dht_id)
            closest = set(sorted(others, key=target.__xor__)[:20])

            lookup = await node.find_node(to_key(target))

            overlaps.append(len(closest & {contact.id for contact in lookup.closest}) / 20)
            chains.append(lookup.chain)
        chains.sort()
        logger.info("overlap=%.4f chain_p50=%d max=%d", fmean(overlaps), chains[100], chains[-1])
        assert fmean(overlaps) >= 0.99
        assert chains[int(0.95 * len(chains))] <= 4

    in_swarm(scenario)


@dataclass
class Publisher:
    node: DhtNode
    model: str
    publication: Publication


class Churn:
    """Replaces random nodes by new ones; every fifth node serves one of the models."""

    def __init__(self, swarm: DhtSwarm, nodes_per_s: float) -> None:
        self.swarm = swarm
        self.publishers: dict[PeerId, Publisher] = {}
        self.have_published: set[PeerId] = set()
        self._pause_s = 1 / nodes_per_s

    def serve(self, node: DhtNode) -> None:
        model = self.swarm.rng.choice(MODELS)
        publication = node.publish("presence", model, {"span": [0, 10]})
        self.publishers[node.peer_id] = Publisher(node, model, publication)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self._pause_s)
                victim = self.swarm.rng.choice(self.swarm.nodes).peer_id
                self.swarm.kill(victim)
                was_publisher = self.publishers.pop(victim, None) is not None
                member = self.swarm.rng.choice(self.swarm.nodes).peer_id
                tasks.create_task(self._join(member, was_publisher))

    async def _join(self, member: PeerId, is_publisher: bool) -> None:
        node = self.swarm.add()
        await node.bootstrap([member])
        if is_publisher and node in self.swarm.nodes:
            self.serve(node)

    def live(self, model: str) -> set[PeerId]:
        """Who serves the model and has said so once; whose record got lost later counts too."""
        self.have_published.update(
            peer
            for peer, publisher in self.publishers.items()
            if publisher.publication.num_replicas
        )
        return {
            peer
            for peer, publisher in self.publishers.items()
            if publisher.model == model and peer in self.have_published
        }


@pytest.mark.slow(120)
def test_live_publishers_are_found_while_ten_percent_of_nodes_are_replaced_per_minute() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        await grow(swarm, NUM_NODES)
        churn = Churn(swarm, nodes_per_s=NUM_NODES / 10 / 60)
        for node in swarm.nodes[::5]:
            churn.serve(node)
        shares = []
        async with asyncio.TaskGroup() as tasks:
            replacing = tasks.create_task(churn.run())
            await asyncio.sleep(60)
            for _ in range(120):
                await asyncio.sleep(1.0)
                model = swarm.rng.choice(MODELS)
                expected = churn.live(model)

                records = await swarm.rng.choice(swarm.nodes).get("presence", model)

                expected &= churn.live(model)  # who died during the read is not asked for
                shares.append(len(expected & {record.subkey for record in records}) / len(expected))
            replacing.cancel()
        logger.info("found=%.4f worst=%.4f", fmean(shares), min(shares))
        assert fmean(shares) >= 0.95

    in_swarm(scenario)


@pytest.mark.slow(60)
def test_clocks_that_are_off_by_up_to_sixty_seconds_do_no_harm() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        await grow(swarm, 100, skew_s=lambda: swarm.rng.choice([-60.0, 60.0]))
        for node in swarm.nodes:
            node.publish("presence", "model", {"span": [0, 10]})
        for _ in range(10):
            await asyncio.sleep(30)

            records = await swarm.rng.choice(swarm.nodes).get("presence", "model")

            assert {record.subkey for record in records} == {n.peer_id for n in swarm.nodes}
        refused = [node.snapshot().refused for node in swarm.nodes]
        assert not any(refused)

    in_swarm(scenario)


@pytest.mark.slow(60)
def test_a_swarm_outlives_its_bootstrap_node_and_takes_in_new_ones_through_any_member() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        bootstrap = swarm.add()
        for _ in range(60):
            await swarm.add().bootstrap([bootstrap.peer_id])
        publisher = swarm.nodes[-1]
        await publisher.publish("presence", "model", {"span": [0, 10]}).wait()
        swarm.kill(bootstrap.peer_id)
        await asyncio.sleep(130)
        for member in swarm.nodes[::6]:
            newcomer = swarm.add()

            num_reached = await newcomer.bootstrap([member.peer_id])

            records = await newcomer.get("presence", "model")
            assert num_reached >= 20
            assert [record.subkey for record in records] == [publisher.peer_id]

    in_swarm(scenario)

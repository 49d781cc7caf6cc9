"""Servers that are dead and still announced: how soon nobody plans with them."""

import asyncio

from p2pllm.client.model import SwarmModel
from p2pllm.config import DhtConfig, ServerConfig
from p2pllm.routing.planner import plan
from p2pllm.routing.request import RouteRequest
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.swarm.view import PENALTY_S

WHOLE = Span(0, 4)
KNOWN_S = 10.0  # for those that tried it
REQUEST = RouteRequest(relayed=False)
SLOW = ServerConfig(cache_tokens=4096, throughput=1e3)


async def two_servers(swarm: SimSwarm) -> SimServer:
    """A slow server, and a fast one, which is returned."""
    await swarm.add_server(WHOLE, SLOW)
    return await swarm.add_server(WHOLE)


def is_planned(model: SwarmModel, server: SimServer) -> bool:
    route = plan(model.tracker.view(), REQUEST)
    return server.server.node.peer_id in [hop.peer_id for hop in route.hops]


def kill(swarm: SimSwarm, server: SimServer) -> None:
    swarm.internet.kill(server.host, is_silent=True)
    server.task.cancel()


def test_a_client_that_pings_a_dead_server_plans_without_it_soon_and_for_good() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            fast = await two_servers(swarm)
            async with swarm.client() as model:
                was_planned = is_planned(model, fast)
                kill(swarm, fast)
                await asyncio.sleep(KNOWN_S)
                planned = []
                for _ in range(30):
                    planned.append(is_planned(model, fast))
                    await asyncio.sleep(5.0)
                assert was_planned
                assert not any(planned)

    run(main())


def test_a_dead_server_is_forgotten_by_all_when_its_announcement_ends() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            fast = await two_servers(swarm)
            kill(swarm, fast)
            await asyncio.sleep(DhtConfig().record_ttl_s)
            async with swarm.client() as model:
                assert fast.server.node.peer_id not in model.tracker.view().by_peer

    run(main())


def test_a_server_that_failed_once_is_planned_with_again_when_it_has_answered() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            fast = await two_servers(swarm)
            async with swarm.client() as model:
                now = asyncio.get_running_loop().time()
                model.tracker.measurements.on_failure(fast.server.node.peer_id, now)
                right_after = is_planned(model, fast)
                await asyncio.sleep(PENALTY_S + KNOWN_S)
                assert not right_after
                assert is_planned(model, fast)

    run(main())

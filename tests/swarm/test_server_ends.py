"""A server that is cancelled, whenever that is: it says goodbye, and nothing of it stays.

That no task is left is checked by `p2pllm.sim.loop.run`, for every test.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from p2pllm.config import DhtConfig, NetConfig, NodeConfig
from p2pllm.errors import BadRequest, ConfigError, TransportError
from p2pllm.identity import Identity
from p2pllm.model.executor import Executor
from p2pllm.server.server import BlockChoice, Server
from p2pllm.sim.loop import LoopClock, run
from p2pllm.sim.swarm import LAB_DHT, LAB_SERVER, PORT, InlineExecutor, SimSwarm
from p2pllm.spans import Span
from p2pllm.swarm.node import Node
from p2pllm.swarm.tracker import read_presences
from tests.swarm.raw_client import RawClient, raw_client, states
from tests.swarm.test_session_rules import WHOLE, row
from tests.swarm.turns import cancelled_after

HOST = "10.0.7.7"
WITHIN_S = 2.0  # virtual
IDENTITY = Identity.from_seed(b"e" * 32)


@asynccontextmanager
async def served(
    swarm: SimSwarm, executor: Executor | None = None, dht: DhtConfig = LAB_DHT
) -> AsyncIterator[Server]:
    """A server of the whole model, always at the same place under the same name."""
    assert swarm.entry is not None
    config = NodeConfig(
        net=NetConfig(network_id="sim", listen_host=HOST, listen_port=PORT),
        dht=dht,
        peers=(swarm.entry,),
        server=LAB_SERVER,
    )
    async with Server.open(
        config,
        IDENTITY,
        swarm.source,
        BlockChoice(WHOLE),
        network=swarm.internet.host(HOST),
        clock=LoopClock(),
        executor=executor or InlineExecutor(0.01),
    ) as server:
        yield server


def with_swarm(scenario: Callable[[SimSwarm], Awaitable[None]]) -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            await scenario(swarm)

    run(main())


def test_a_server_that_is_cancelled_at_any_turn_of_its_start_is_gone() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        async def serve() -> None:
            async with served(swarm):
                pass

        await serve()
        await asyncio.sleep(30.0)
        async with swarm.client() as model:
            await asyncio.sleep(1.0)
            for num_turns in range(1, 10_000):
                was_running = await cancelled_after(num_turns, serve())
                assert not swarm.internet.host(HOST)._listeners
                await asyncio.sleep(WITHIN_S)
                found = await read_presences(model.tracker._records, swarm.source.model_id)
                assert not found
                if not was_running:
                    break
            assert num_turns > 50

    with_swarm(scenario)


@pytest.mark.parametrize("after_s", [0.0, 0.004, 0.011, 0.02, 0.3, 5.0, 45.0])
def test_a_server_that_is_cancelled_under_load_is_gone(after_s: float) -> None:
    async def scenario(swarm: SimSwarm) -> None:
        ready: asyncio.Future[Server] = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            async with served(swarm) as server:
                ready.set_result(server)
                await asyncio.Event().wait()

        serving = asyncio.ensure_future(serve())
        server = await ready
        place = type("Place", (), {"server": server})
        async with raw_client(swarm, place) as alice:  # type: ignore[arg-type]
            await alice.open(max_tokens=2048)
            load = asyncio.ensure_future(keep_stepping(alice))
            await asyncio.sleep(after_s)
            serving.cancel()
            await asyncio.wait([serving], timeout=WITHIN_S)
            assert serving.cancelled()
            load.cancel()
            await asyncio.wait([load])
        async with swarm.client() as model:
            assert not (await model.view()).servers
        assert not swarm.internet.host(HOST)._listeners

    with_swarm(scenario)


async def keep_stepping(client: RawClient) -> None:
    try:
        for step in range(2000):
            await client.step(row(step, step), hidden=states(1))
    except TransportError:
        pass  # the server is gone


def test_what_the_owner_of_a_server_raises_comes_out_as_it_is() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        with pytest.raises(BadRequest, match="mine"):
            async with served(swarm):
                raise BadRequest("mine")

    with_swarm(scenario)


def test_a_node_that_is_left_before_it_has_begun_gives_its_port_back() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        config = NodeConfig(net=NetConfig(listen_host=HOST, listen_port=PORT))
        host = swarm.internet.host(HOST)
        with pytest.raises(BadRequest):
            async with Node.open(config, IDENTITY, network=host):
                raise BadRequest("at once, without an await")
        assert not host._listeners

    with_swarm(scenario)


def test_a_port_in_use_is_a_transport_error_and_not_a_group() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        async with served(swarm):
            with pytest.raises(TransportError, match="in use"):
                async with served(swarm):
                    pass

    with_swarm(scenario)


def test_blocks_that_the_model_does_not_have_are_refused_before_anything_is_opened() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        with pytest.raises(ConfigError, match="0:4"):
            async with Server.open(
                NodeConfig(),
                IDENTITY,
                swarm.source,
                BlockChoice(Span(2, 5)),
                network=swarm.internet.host(HOST),
            ):
                pass
        assert not swarm.internet.host(HOST)._listeners

    with_swarm(scenario)


def test_a_load_that_fails_leaves_nothing() -> None:
    class Broken(InlineExecutor):
        async def run(self, work):  # type: ignore[no-untyped-def]
            raise ConfigError("disk full")

    async def scenario(swarm: SimSwarm) -> None:
        with pytest.raises(ConfigError, match="disk full"):
            async with served(swarm, Broken()):
                pass
        assert not swarm.internet.host(HOST)._listeners

    with_swarm(scenario)


def test_a_server_that_breaks_inside_ends_with_that_error() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        async def broken() -> None:
            raise ZeroDivisionError

        async def serve() -> None:
            async with served(swarm) as server:
                server.announcer._measure_successors = broken  # type: ignore[method-assign]
                await asyncio.sleep(1.0)

        with pytest.raises(ZeroDivisionError):
            await serve()

    with_swarm(scenario)


def test_results_that_cannot_be_delivered_do_not_stop_the_worker() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        async with served(swarm) as server:
            place = type("Place", (), {"server": server})
            async with raw_client(swarm, place) as alice:  # type: ignore[arg-type]
                await alice.open()
                deliver, server.worker.on_results = server.worker.on_results, None
                assert deliver is not None

                def broken(*_: object) -> None:
                    raise ZeroDivisionError

                server.worker.on_results = broken
                await alice.push([row(0, 0, 1)])
                await asyncio.sleep(1.0)
                server.worker.on_results = deliver
                await alice.open(epoch=1, max_tokens=128)
                await alice.step(replace(row(0, 0, 1), epoch=1))
                assert len(alice.outputs) == 1

    with_swarm(scenario)

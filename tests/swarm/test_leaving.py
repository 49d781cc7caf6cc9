"""Servers that leave while they are used: their sessions move, and the text does not notice."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from p2pllm.client.generation import Generation
from p2pllm.client.model import SwarmModel
from p2pllm.client.moves import FASTER
from p2pllm.client.results import Recovered
from p2pllm.client.routes import ModelRoutes
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.sim.fake_model import FakeDevice
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import SimServer, SimSwarm
from p2pllm.spans import Span
from tests.swarm.raw_client import assert_nothing_left

THIRDS = (Span(0, 2), Span(2, 4), Span(4, 6))
PROMPT = "hello"
NUM_TOKENS = 40
SETTLED_S = 2.0  # records have spread
DRAIN_S = 30.0
CLIENT = "10.0.0.8"  # after the bootstrap node and six servers

Use = Callable[[SimSwarm, list[SimServer], SwarmModel], Awaitable[None]]


def with_pairs(use: Use, settings: ClientConfig | None = None) -> None:
    """Run `use` with two servers for each third."""

    async def main() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            servers = [await swarm.add_server(span) for span in (*THIRDS, *THIRDS)]
            await asyncio.sleep(SETTLED_S)
            async with swarm.client(settings) as model:
                await use(swarm, servers, model)
            await asyncio.sleep(SETTLED_S)
            for server in servers:
                assert_nothing_left(server)

    run(main())


def hop(generation: Generation, servers: list[SimServer], index: int) -> SimServer:
    """The server that is a hop of the route now."""
    chain = generation._record.chain
    assert chain is not None
    peer = chain.hops[index].peer
    return next(server for server in servers if server.server.node.peer_id == peer)


async def begun(model: SwarmModel, num_pieces: int = 8) -> Generation:
    """A generation that has come to its n-th token."""
    generation = model.generate(PROMPT, max_new_tokens=NUM_TOKENS)
    for _ in range(num_pieces):
        await anext(generation)
    return generation


async def pieces_and_gaps(generation: Generation) -> list[float]:
    """Generate to the end; the seconds before each token."""
    now = asyncio.get_running_loop().time
    gaps, last = [], now()
    async for _ in generation:
        gaps.append(now() - last)
        last = now()
    return gaps


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("is_chained", [True, False], ids=["chained", "relayed"])
def test_a_hop_that_drains_is_replaced_and_the_text_is_the_same(
    index: int, is_chained: bool
) -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        generation = await begun(model)
        leaving = hop(generation, servers, index)
        draining = asyncio.ensure_future(leaving.server.drain(DRAIN_S))
        (result,) = await generation.finish()

        assert result.token_ids == swarm.expected(PROMPT, NUM_TOKENS)
        assert draining.done()  # while the generation ran: it did not have to end for that
        (repair,) = result.recoveries
        assert [peer for peer, _ in repair.lost] == [leaving.server.node.peer_id]
        assert leaving.server.node.peer_id not in {each.peer_id for each in result.route}

    with_pairs(use, ClientConfig(is_chained=is_chained))


def test_the_text_stalls_for_two_token_times_at_most() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        generation = await begun(model)
        draining = asyncio.ensure_future(hop(generation, servers, 1).server.drain(DRAIN_S))
        gaps = await pieces_and_gaps(generation)
        await draining
        usual = sorted(gaps)[len(gaps) // 2]
        assert max(gaps) <= 3 * usual  # its own time, and twice that again

    with_pairs(use)


def test_keys_and_values_are_pulled_where_that_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is computed again but what came meanwhile."""
    monkeypatch.setattr(ModelRoutes, "is_pull_cheaper", lambda *_: True)

    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        generation = await begun(model)
        draining = asyncio.ensure_future(hop(generation, servers, 1).server.drain(DRAIN_S))
        (result,) = await generation.finish()
        await draining
        assert result.token_ids == swarm.expected(PROMPT, NUM_TOKENS)
        (repair,) = result.recoveries
        assert repair.replayed_tokens <= 4 < len(PROMPT) + 8

    with_pairs(use)


def test_a_session_between_two_questions_moves_too() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            first = await session.step(list(b"abcdef"))
            peer = session.chain.hops[1].peer
            leaving = next(s for s in servers if s.server.node.peer_id == peer)
            await leaving.server.drain(DRAIN_S)
            assert session.chain.index_of(peer) is None
            session.rollback(3)
            assert (await session.step(list(b"def"))).equal(first[3:])

    with_pairs(use)


def test_a_server_that_nobody_can_replace_is_waited_for_until_its_time_is_over() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            servers = [await swarm.add_server(span) for span in THIRDS]
            await asyncio.sleep(SETTLED_S)
            async with swarm.client() as model:
                generation = await begun(model)
                now = asyncio.get_running_loop().time
                began = now()
                await servers[1].server.drain(0.2)
                assert now() - began == pytest.approx(0.2, abs=0.05)
                (result,) = await generation.finish()  # it is still there in this test
                assert result.token_ids == swarm.expected(PROMPT, NUM_TOKENS)
                assert not [e for e in result.recoveries if isinstance(e, Recovered) and e.lost]

    run(main())


def test_a_client_that_was_away_finds_its_session_within_the_lease() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            first = await session.step(list(b"abcdef"))
            epoch = session.state.epoch
            hops = [each for each in servers if session.chain.index_of(each.server.node.peer_id)]
            computed = [each.server.worker.tokens_computed for each in hops]
            for each in servers:
                swarm.internet.partition(CLIENT, each.host)
            await asyncio.sleep(30.0)
            for each in servers:
                swarm.internet.heal(CLIENT, each.host)
            await asyncio.sleep(6.0)  # what was dialled into the void has been given up
            session.rollback(5)
            assert (await session.step([*b"f"])).equal(first[5:])
            assert session.state.epoch == epoch  # nothing had to be repaired
            assert [each.server.worker.tokens_computed for each in hops] == [
                n + 1 for n in computed
            ]

    with_pairs(use)


def test_a_session_that_was_evicted_is_built_again() -> None:
    """Another client needs the pages of one that is idle; that one notices nothing but a pause."""
    small = ServerConfig(cache_tokens=256, max_tokens_per_peer=256, throughput=1e4)

    async def main() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            servers = [await swarm.add_server(span, small) for span in THIRDS]
            await asyncio.sleep(SETTLED_S)
            async with swarm.client() as idle, swarm.client() as busy:
                async with idle.session(max_tokens=192) as session:
                    first = await session.step(list(b"abcdef"))
                    result = asyncio.ensure_future(
                        busy.generate(PROMPT, max_new_tokens=NUM_TOKENS + 100).finish()
                    )
                    (answer,) = await result
                    assert answer.token_ids == swarm.expected(PROMPT, NUM_TOKENS + 100)
                    assert not any(len(each.server.service.sessions) for each in servers)
                    session.rollback(3)
                    assert (await session.step(list(b"def"))).equal(first[3:])

    run(main())


def test_a_server_that_becomes_slow_is_left_for_a_faster_one_in_the_middle_of_a_text() -> None:
    """Nothing fails: the route is only not what was planned any more."""
    num_tokens, honest = 200, ServerConfig(cache_tokens=4096)  # it measures its device

    async def main() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            servers, devices = [], {}
            for span in (*THIRDS, *THIRDS):
                device = FakeDevice(block_s=0.002)
                servers.append(await swarm.add_server(span, honest, device_s=0.0, device=device))
                devices[servers[-1].host] = device
            await asyncio.sleep(SETTLED_S)
            async with swarm.client() as model:
                generation = await begun_long(model, num_tokens)
                slow = hop(generation, servers, 1)
                devices[slow.host].block_s = 0.05
                (result,) = await generation.finish()

                assert result.token_ids == swarm.expected(PROMPT, num_tokens)
                (move,) = result.recoveries
                assert [peer for peer, _ in move.lost] == [slow.server.node.peer_id]
                assert move.reason == FASTER

    run(main())


async def begun_long(model: SwarmModel, num_tokens: int) -> Generation:
    """A generation that has come so far that its route was found to be as predicted."""
    generation = model.generate(PROMPT, max_new_tokens=num_tokens)
    for _ in range(40):
        await anext(generation)
    return generation

"""Whole swarms whose servers choose their blocks, and move: real balancers on virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from p2pllm.config import ServerConfig
from p2pllm.errors import CheckpointError, NotServed
from p2pllm.model.span_model import SpanCompute
from p2pllm.routing.rebalancing import PROMISE_S
from p2pllm.server.server import MOVE_DRAIN_S, Server
from p2pllm.server.source import LoadProgress
from p2pllm.sim.fake_model import FakeSpanModel
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import LAB_SERVER, FakeSource, SimServer, SimSwarm
from p2pllm.spans import Span, uncovered
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.tracker import read_presences
from p2pllm.wire.messages import Ack, Close, Stay
from tests.swarm.raw_client import ONE, THREE, TWO, raw_client

COVERED_WITHIN_S = 15.0
MOVED_WITHIN_S = 60.0
NUM_BLOCKS = 12


def with_swarm(scenario: Callable[[SimSwarm], Awaitable[None]], *, seed: int = 0) -> None:
    async def main() -> None:
        async with SimSwarm(NUM_BLOCKS, seed=seed) as swarm:
            await scenario(swarm)

    run(main(), seed=seed, limit_s=3000)


async def together(swarm: SimSwarm, *nums_blocks: int) -> list[SimServer]:
    """Servers that start at once, each with as many blocks of its own choice."""
    return await asyncio.gather(*(swarm.add_server(number) for number in nums_blocks))


def spans(servers: list[SimServer]) -> list[str]:
    return sorted(str(server.server.offer.span) for server in servers)


def missing(servers: list[SimServer]) -> tuple[Span, ...]:
    """Blocks that none of these serves, or takes sessions for."""
    serving = [s.server for s in servers if s.server.announcer.presence().state.name == "ONLINE"]
    return uncovered(Span(0, NUM_BLOCKS), [server.offer.span for server in serving])


async def until(is_so: Callable[[], bool], *, within_s: float) -> float:
    """Wait for something; returns after how many virtual seconds it came."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not is_so():
        assert loop.time() - started < within_s
        await asyncio.sleep(0.1)
    return loop.time() - started


async def presence_of(observer: SimServer, server: SimServer) -> Presence:
    """What the DHT has of a server, as another one reads it."""
    node, peer = observer.server.node, server.server.node.peer_id
    found = await read_presences(node.dht, observer.server.offer.model)
    (presence,) = [presence for presence in found if presence.peer_id == peer]
    return presence


# --- joining ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_servers_that_start_together_cover_the_model(seed: int) -> None:
    async def scenario(swarm: SimSwarm) -> None:
        started = asyncio.get_running_loop().time()
        servers = await together(swarm, 6, 6, 6, 6)
        assert asyncio.get_running_loop().time() - started < COVERED_WITHIN_S
        assert spans(servers) == ["0:6", "0:6", "6:12", "6:12"]

    with_swarm(scenario, seed=seed)


def test_servers_that_come_one_by_one_go_where_blocks_are_weakest() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = [await swarm.add_server(number) for number in (4, 4, 4, 12, 3)]
        assert spans(servers) == ["0:12", "0:3", "0:4", "4:8", "8:12"]

    with_swarm(scenario)


def test_a_server_says_what_it_loads_before_it_serves() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        first = await swarm.add_server(Span(0, 6))
        coming = asyncio.ensure_future(swarm.add_server(6))
        states: set[tuple[ServerState, Span]] = set()
        while not coming.done():
            found = await read_presences(first.server.node.dht, first.server.offer.model)
            states.update((p.state, p.span) for p in found if p.span != Span(0, 6))
            await asyncio.sleep(0.05)
        await coming
        assert (ServerState.JOINING, Span(6, 12)) in states

    with_swarm(scenario)


# --- moving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_silent", [False, True], ids=["killed", "vanished"])
def test_another_server_moves_where_a_span_has_lost_all_its_servers(is_silent: bool) -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = await together(swarm, 4, 4, 4, 4, 4, 4, 4, 4)
        await asyncio.sleep(20.0)
        victims = [s for s in servers if s.server.offer.span == Span(4, 8)]
        assert len(victims) >= 2
        others = [s for s in servers if s not in victims]
        for victim in victims:
            if not is_silent:
                swarm.internet.kill(victim.host)  # peers see a reset …
            swarm.internet.kill(victim.host, is_silent=True)  # … and nothing comes from it
            victim.task.cancel()
        assert missing(others) == (Span(4, 8),)
        await until(lambda: not missing(others), within_s=MOVED_WITHIN_S)
        assert sum(s.server.offer.span == Span(4, 8) for s in others) == 1
        async with swarm.client() as model:
            result = await model.generate("abc", max_new_tokens=4).finish()
        assert result[0].token_ids == swarm.expected("abc", 4)

    with_swarm(scenario)


def test_a_generation_goes_on_through_deaths_and_moves() -> None:
    """The span's only server dies, one that holds sessions moves there, and no token is wrong."""

    async def scenario(swarm: SimSwarm) -> None:
        servers = await asyncio.gather(*(swarm.add_server(6, device_s=0.05) for _ in range(3)))
        await asyncio.sleep(20.0)
        lonely = next(s for s in servers if spans(servers).count(str(s.server.offer.span)) == 1)
        others = [s for s in servers if s is not lonely]
        before = spans(others)
        async with swarm.client() as model:
            generation = model.generate("abc", max_new_tokens=300)
            finishing = asyncio.ensure_future(generation.finish())
            await asyncio.sleep(5.0)
            assert lonely.server.worker.tokens_computed > 3
            swarm.internet.kill(lonely.host, is_silent=True)
            lonely.task.cancel()
            (result,) = await finishing
        assert result.token_ids == swarm.expected("abc", 300)
        assert spans(others) != before

    with_swarm(scenario)


def test_a_server_that_leaves_is_replaced() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = await together(swarm, 6, 6, 6)
        await asyncio.sleep(30.0)
        lonely = next(s for s in servers if spans(servers).count(str(s.server.offer.span)) == 1)
        lonely.task.cancel()
        await asyncio.wait([lonely.task])
        others = [s for s in servers if s is not lonely]
        await until(lambda: not missing(others), within_s=MOVED_WITHIN_S)

    with_swarm(scenario)


def test_no_block_is_lost_while_servers_come_and_go() -> None:
    """Eight that move, two of which leave at a time; whatever had a server keeps one."""

    async def scenario(swarm: SimSwarm) -> None:
        servers = await together(swarm, 3, 3, 4, 4, 5, 5, 6, 6)
        moves: list[tuple[Span, Span]] = []

        def watch(server: SimServer) -> None:
            here = server.server.offer.span

            def on_moved(span: Span) -> None:
                nonlocal here
                moves.append((here, span))
                here = span

            server.server.on_moved = on_moved

        for server in servers:
            watch(server)
        for _ in range(3):
            for leaving in servers[:2]:
                leaving.task.cancel()
            await asyncio.wait([leaving.task for leaving in servers[:2]])
            servers = servers[2:]
            held = {block for s in servers for block in s.server.offer.span}
            for _ in range(400):
                await asyncio.sleep(1.0)
                lost = {block for span in missing(servers) for block in span}
                assert not held & lost
                held |= {*range(NUM_BLOCKS)} - lost
        assert len(moves) <= 6

    with_swarm(scenario)


def test_a_balanced_swarm_stays_as_it_is() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = await together(swarm, 4, 4, 4, 4, 4, 4)
        placed = [server.server.offer.span for server in servers]
        await asyncio.sleep(500.0)  # fifty looks of each
        assert [server.server.offer.span for server in servers] == placed

    with_swarm(scenario)


def test_a_server_of_chosen_blocks_never_moves() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        first, second = [await swarm.add_server(Span(0, 6)) for _ in range(2)]
        third = await swarm.add_server(6, replace(LAB_SERVER, is_balanced=False))
        third.task.cancel()
        await asyncio.sleep(120.0)
        assert spans([first, second]) == ["0:6", "0:6"]

    with_swarm(scenario)


class StubbornSource:
    """A fake model of which some blocks cannot be read."""

    def __init__(self, source: FakeSource, broken: Span) -> None:
        self.config, self.model_id = source.config, source.model_id
        self.block_bytes = source.block_bytes
        self.broken = broken

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        if span.overlap(self.broken):
            raise CheckpointError("a shard is missing")
        return FakeSpanModel(self.config, span)


def test_a_server_that_cannot_load_stays_and_another_goes() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = [await swarm.add_server(6) for _ in range(3)]
        lonely = next(s for s in servers if spans(servers).count(str(s.server.offer.span)) == 1)
        like = sorted((s for s in servers if s is not lonely), key=lambda s: s.server.node.peer_id)
        span = lonely.server.offer.span
        like[0].server._source = StubbornSource(swarm.source, span)
        lonely.task.cancel()
        await until(lambda: not missing(like), within_s=MOVED_WITHIN_S)
        assert like[1].server.offer.span == span
        assert like[0].server.announcer.presence().next_span is None

    with_swarm(scenario)


@pytest.mark.parametrize("is_broken", [False, True], ids=["loads", "fails"])
def test_a_server_without_room_for_both_spans_lets_go_of_the_old_one_first(
    is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "_has_room_beside", lambda *_: False)
    forgotten: list[Span | None] = []
    monkeypatch.setattr(FakeSpanModel, "forget_all_but", lambda _, kept: forgotten.append(kept))

    async def scenario(swarm: SimSwarm) -> None:
        servers = [await swarm.add_server(Span(0, 6)) for _ in range(2)]
        mover = servers[0].server
        if is_broken:
            mover._source = StubbornSource(swarm.source, Span(8, 12))

        async def may_leave() -> bool:
            return True

        if is_broken:
            with pytest.raises(CheckpointError):
                await mover.move(Span(4, 10), may_leave)
        else:
            await mover.move(Span(4, 10), may_leave)
        assert forgotten == [Span(4, 6)]
        span = Span(0, 6) if is_broken else Span(4, 10)
        assert mover.offer.span == span
        assert mover.announcer.presence().state is ServerState.ONLINE
        async with raw_client(swarm, servers[0]) as alice:
            await alice.open(span=span)

    with_swarm(scenario)


def test_a_server_stays_when_nobody_promises_to_keep_its_blocks() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        server = await swarm.add_server(6)
        here = server.server.offer.span

        async def may_leave() -> bool:
            return await server.server._balancer._are_kept([*here])

        assert not await may_leave()
        await server.server.move(Span(6, 12), may_leave)
        assert server.server.offer.span == here
        other = await swarm.add_server(here)
        await other.server.announcer.told()
        assert await may_leave()
        swarm.internet.kill(other.host, is_silent=True)
        assert not await may_leave()

    with_swarm(scenario)


def test_a_server_that_was_asked_to_stay_does_not_move_for_a_minute() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = [await swarm.add_server(6) for _ in range(3)]
        lonely = next(s for s in servers if spans(servers).count(str(s.server.offer.span)) == 1)
        like = [s for s in servers if s is not lonely]
        for server in like:
            async with raw_client(swarm, server) as alice:
                here = server.server.offer.span
                assert isinstance(await alice.ask(Stay(swarm.source.model_id, here)), Ack)
                with pytest.raises(NotServed):
                    await alice.ask(Stay(swarm.source.model_id, Span(0, NUM_BLOCKS)))
        lonely.task.cancel()
        await asyncio.sleep(PROMISE_S - 10.0)
        assert missing(like)
        await until(lambda: not missing(like), within_s=MOVED_WITHIN_S)

    with_swarm(scenario)


def test_sessions_are_drained_before_a_server_moves() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = [await swarm.add_server(6) for _ in range(3)]
        lonely = next(s for s in servers if spans(servers).count(str(s.server.offer.span)) == 1)
        like = sorted((s for s in servers if s is not lonely), key=lambda s: s.server.node.peer_id)
        mover, span = like[0], like[0].server.offer.span
        async with raw_client(swarm, mover) as alice:
            await alice.open(span=span, max_tokens=64)
            lonely.task.cancel()
            await until(
                lambda: mover.server.announcer.presence().state is ServerState.DRAINING,
                within_s=MOVED_WITHIN_S,
            )
            with pytest.raises(NotServed, match="leaving"):
                await alice.open(TWO, span=span)
            assert mover.server.offer.span == span
            took_s = await until(lambda: not missing(like), within_s=MOVE_DRAIN_S + 1)
            assert took_s > MOVE_DRAIN_S - 2  # alice does not go by herself
            with pytest.raises(NotServed):
                await alice.open(THREE, span=span)
        assert mover.num_free_pages == mover.num_pages
        assert not mover.server.node.endpoint._protected

    with_swarm(scenario)


# --- leaving ---------------------------------------------------------------------------------


def test_a_server_that_drains_says_so_and_waits_for_its_sessions() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        observer, server = [await swarm.add_server(Span(0, NUM_BLOCKS)) for _ in range(2)]
        async with raw_client(swarm, server) as alice:
            await alice.open(span=Span(0, NUM_BLOCKS))
            draining = asyncio.ensure_future(server.server.drain(30.0))
            await asyncio.sleep(1.0)
            presence = await presence_of(observer, server)
            assert presence.state is ServerState.DRAINING
            assert not draining.done()
            await alice.ask(Close((ONE,), epoch=0))
            await asyncio.wait_for(draining, 2.0)

    with_swarm(scenario)


def test_a_drain_ends_when_its_time_is_over() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        server = await swarm.add_server(Span(0, NUM_BLOCKS))
        async with raw_client(swarm, server) as alice:
            await alice.open(span=Span(0, NUM_BLOCKS))
            started = asyncio.get_running_loop().time()
            await server.server.drain(5.0)
            assert 4.0 < asyncio.get_running_loop().time() - started < 7.0

    with_swarm(scenario)


def test_a_draining_server_moves_no_more() -> None:
    async def scenario(swarm: SimSwarm) -> None:
        servers = [await swarm.add_server(6) for _ in range(3)]
        lonely = next(s for s in servers if spans(servers).count(str(s.server.offer.span)) == 1)
        like = [s for s in servers if s is not lonely]
        for server in like:
            await server.server.drain(1.0)
        lonely.task.cancel()
        await asyncio.sleep(MOVED_WITHIN_S)
        assert [s.server.announcer.presence().state for s in like] == [ServerState.DRAINING] * 2
        assert len(set(spans(like))) == 1

    with_swarm(scenario)

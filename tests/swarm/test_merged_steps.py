"""Rows of several clients travel from hop to hop in one message, and stay each client's own."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import pytest

from p2pllm.errors import BadRequest, ConnectionLost, Forbidden, SessionUnknown
from p2pllm.ids import PeerId, SessionId
from p2pllm.server import worker
from p2pllm.server.handlers import MAX_TOKEN_BYTES
from p2pllm.server.outbox import MAX_UNSENT, SEND_TIMEOUT_S
from p2pllm.sim.fake_model import WIDTH
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.tasks import together
from p2pllm.wire.messages import Close, Echo, Fork, Message, Opened, Rewire, Row, Step
from tests.swarm.raw_client import (
    RawClient,
    assert_nothing_left,
    expected,
    raw_client,
    session_id,
    states,
)

FIRST, SECOND, WHOLE = Span(0, 2), Span(2, 4), Span(0, 4)
SLOW_S = 0.05  # for a batch: what comes meanwhile is in the next one
NUM_CLIENTS = 5
NEXT_TOKEN = b"n" * 16


@dataclass
class Crowd:
    """Two servers, of which the first pushes to the second, and clients with a session each."""

    swarm: SimSwarm
    first: SimServer
    second: SimServer
    clients: list[RawClient]
    passed_on: list[Step]  # from the first to the second

    def session(self, client: RawClient) -> SessionId:
        return session_id(100 + self.clients.index(client))

    def row(self, client: RawClient, step: int = 0, *, epoch: int = 0) -> Row:
        return Row(self.session(client), epoch, step, step, 1)

    def at_second(self, client: RawClient) -> RawClient:
        return replace(client, server=self.second.server.node.peer_id)

    async def record(self) -> bytes:
        record = await self.first.server.node.dht.find_peer_record(self.second.server.node.peer_id)
        assert record is not None
        return record.to_bytes()

    async def open(
        self,
        client: RawClient,
        *,
        epoch: int = 0,
        next_token: bytes = NEXT_TOKEN,
        echo: Echo = Echo.NONE,
    ) -> None:
        base = client.opening(self.session(client), epoch)
        there = replace(base, span=SECOND, push_token=NEXT_TOKEN)
        here = replace(
            base, span=FIRST, next_hop=await self.record(), next_token=next_token, echo=echo
        )
        assert isinstance(await self.at_second(client).ask(there), Opened)
        assert isinstance(await client.ask(here), Opened)

    async def step(self, *, step: int = 0, epochs: tuple[int, ...] = (0,) * NUM_CLIENTS) -> None:
        """One token of every client, while the device is busy with one more that comes first."""
        busy = session_id(99)
        await self.clients[0].ask(replace(self.clients[0].opening(busy), span=FIRST))
        await self.clients[0].push([Row(busy, 0, 0, 0, 1)])
        del self.clients[0].outputs[:]
        await together(
            client.push([self.row(client, step, epoch=epoch)], budget_s=30.0)
            for client, epoch in zip(self.clients, epochs, strict=True)
        )
        await asyncio.sleep(1.0)
        self.clients[0].outputs = [
            each for each in self.clients[0].outputs if each.rows[0].session != busy
        ]
        await self.clients[0].ask(Close((busy,), 0))

    def assert_answered(self, client: RawClient, step: int = 0) -> None:
        """It has got the output of its row, once, and of nobody else's."""
        assert [[row.session for row in output.rows] for output in client.outputs] == [
            [self.session(client)]
        ]
        assert client.outputs[0].rows[0].step == step
        assert client.tensor().equal(expected(WHOLE, states(step + 1))[step:])
        assert len(client.outputs[0].timings) == 2
        assert not client.failures


def with_crowd(use: Callable[[Crowd], Awaitable[None]], *, is_second_killed: bool = False) -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm, AsyncExitStack() as stack:
            first = await swarm.add_server(FIRST, device_s=SLOW_S)
            second = await swarm.add_server(SECOND)
            clients = [
                await stack.enter_async_context(raw_client(swarm, first, number))
                for number in range(1, NUM_CLIENTS + 1)
            ]
            node = second.server.node
            for client in clients:
                client.endpoint.learn(node.peer_id, node.addresses)
            crowd = Crowd(swarm, first, second, clients, [])
            listen_in(first, node.peer_id, crowd.passed_on)
            await use(crowd)
            await asyncio.sleep(SEND_TIMEOUT_S + 1.0)
            for server in (first,) if is_second_killed else (first, second):
                for client in clients:
                    held = (crowd.session(client),)
                    there = replace(client, server=server.server.node.peer_id)
                    await there.ask(Close(held, 2**31 - 1))
                await asyncio.sleep(1.0)
                assert_nothing_left(server)

    run(main())


def listen_in(server: SimServer, peer: PeerId, heard: list[Step]) -> None:
    """Note the steps that a server posts to a peer."""
    endpoint = server.server.node.endpoint
    post = endpoint.post

    def noting(to: PeerId, message: Message, *args: object, **options: object) -> None:
        if to == peer and isinstance(message, Step):
            heard.append(message)
        post(to, message, *args, **options)  # type: ignore[arg-type]

    endpoint.post = noting  # type: ignore[method-assign,assignment]


def test_rows_of_several_clients_travel_on_as_one_message_and_come_back_apart() -> None:
    async def use(crowd: Crowd) -> None:
        for client in crowd.clients:
            await crowd.open(client, echo=Echo.ALL)
        await crowd.step()
        assert [len(step.rows) for step in crowd.passed_on] == [NUM_CLIENTS]
        for client in crowd.clients:
            echoes = [output for output in client.outputs if output.is_echo]
            assert [echo.rows for echo in echoes] == [(crowd.row(client),)]
            assert len(echoes[0].timings) == 1
            client.outputs = [output for output in client.outputs if not output.is_echo]
            crowd.assert_answered(client)

    with_crowd(use)


def test_a_session_that_the_next_hop_does_not_know_fails_alone() -> None:
    async def use(crowd: Crowd) -> None:
        for client in crowd.clients:
            await crowd.open(client)
        lost, *others = crowd.clients
        await crowd.at_second(lost).ask(Close((crowd.session(lost),), 0))
        await crowd.step()
        assert [(failed.error, failed.rows) for failed in lost.failures] == [
            (SessionUnknown.code, (crowd.row(lost),))
        ]
        assert not lost.outputs
        for client in others:
            crowd.assert_answered(client)

    with_crowd(use)


def test_a_wrong_token_fails_alone() -> None:
    async def use(crowd: Crowd) -> None:
        liar, *others = crowd.clients
        await crowd.open(liar, next_token=b"x" * 16)
        for client in others:
            await crowd.open(client)
        await crowd.step()
        assert [failed.error for failed in liar.failures] == [Forbidden.code]
        for client in others:
            crowd.assert_answered(client)

    with_crowd(use)


def test_epochs_in_one_message_are_each_sessions_own() -> None:
    async def use(crowd: Crowd) -> None:
        for number, client in enumerate(crowd.clients):
            await crowd.open(client, epoch=number)
        await crowd.step(epochs=tuple(range(NUM_CLIENTS)))
        assert len(crowd.passed_on) == 1
        assert [row.epoch for row in crowd.passed_on[0].rows] == list(range(NUM_CLIENTS))
        for client in crowd.clients:
            crowd.assert_answered(client)

    with_crowd(use)


def test_a_token_that_would_fill_the_message_of_all_is_refused() -> None:
    async def use(crowd: Crowd) -> None:
        greedy, *others = crowd.clients
        token = b"x" * (MAX_TOKEN_BYTES + 1)
        with pytest.raises(BadRequest, match="push token"):
            await crowd.open(greedy, next_token=token)
        await crowd.open(greedy)
        with pytest.raises(BadRequest, match="push token"):
            await greedy.ask(Rewire(crowd.session(greedy), 1, await crowd.record(), token))
        with pytest.raises(BadRequest, match="push token"):
            await greedy.ask(Fork(crowd.session(greedy), 1, session_id(7), 0, token))
        for client in others:
            await crowd.open(client)
        await crowd.step()
        for client in crowd.clients:
            crowd.assert_answered(client)

    with_crowd(use)


def test_a_message_of_many_clients_counts_once_in_what_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "MAX_WAITING_BYTES", (NUM_CLIENTS + 1) * WIDTH * 4)  # float32

    async def use(crowd: Crowd) -> None:
        for client in crowd.clients:
            await crowd.open(client)
        await crowd.step()
        assert len(crowd.passed_on) == 1
        for client in crowd.clients:
            crowd.assert_answered(client)

    with_crowd(use)


def test_who_has_too_much_on_its_way_delays_nobody() -> None:
    async def use(crowd: Crowd) -> None:
        for client in crowd.clients:
            await crowd.open(client)
        slow, *others = crowd.clients
        outbox = crowd.first.server.service._outbox
        outbox._unsent[slow.peer_id] += MAX_UNSENT
        await crowd.step()
        outbox._unsent[slow.peer_id] -= MAX_UNSENT
        assert not slow.outputs
        for client in others:
            crowd.assert_answered(client)
        del outbox._unsent[slow.peer_id], outbox._unsent_bytes[slow.peer_id]

    with_crowd(use)


def test_a_message_that_is_repeated_over_another_connection_is_computed_once() -> None:
    async def use(crowd: Crowd) -> None:
        for client in crowd.clients:
            await crowd.open(client)
        second = crowd.second.server.node.endpoint
        on_step = second.instant_handlers[Step]
        num_cuts = 0

        def cutting(request: object) -> None:
            nonlocal num_cuts
            on_step(request)  # type: ignore[arg-type]
            if not num_cuts:
                num_cuts += 1
                for channel in second._channels[crowd.first.server.node.peer_id][:]:
                    channel.fail(ConnectionLost("the test cuts it"))

        second.instant_handlers[Step] = cutting
        await crowd.step()
        await asyncio.sleep(5.0)
        assert num_cuts == 1
        assert crowd.second.server.worker.tokens_computed == NUM_CLIENTS
        for client in crowd.clients:
            crowd.assert_answered(client)

    with_crowd(use)


def test_a_next_hop_that_is_gone_is_told_to_each_for_its_own_row() -> None:
    async def use(crowd: Crowd) -> None:
        for client in crowd.clients:
            await crowd.open(client)
        crowd.swarm.internet.kill(crowd.second.host)
        await crowd.step()
        await asyncio.sleep(5.0)
        for client in crowd.clients:
            assert [(failed.rows, failed.next_hop) for failed in client.failures] == [
                ((crowd.row(client),), crowd.second.server.node.peer_id.key)
            ]

    with_crowd(use, is_second_killed=True)

"""Four servers in pairs and one client made by hand: the place where hops are replaced."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from p2pllm.config import ShaperConfig
from p2pllm.ids import SessionId
from p2pllm.server.outbox import SEND_TIMEOUT_S
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import DEVICE_S, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.wire.messages import Close, Echo, HandOver, Opened, Row
from tests.swarm.raw_client import (
    ONE,
    TIMEOUT_S,
    RawClient,
    assert_nothing_left,
    expected,
    raw_client,
    states,
)

FIRST, SECOND, WHOLE = Span(0, 2), Span(2, 4), Span(0, 4)
SLOW_S = 0.1  # for a batch
READER = b"r" * 16  # the token that lets others read


@dataclass
class Lab:
    """Servers a and spare_a of the first half, b and spare_b of the second; alice asks a."""

    swarm: SimSwarm
    alice: RawClient
    a: SimServer
    spare_a: SimServer
    b: SimServer
    spare_b: SimServer
    dead: set[str] = field(default_factory=set)

    def kill(self, server: SimServer, *, is_silent: bool = False) -> None:
        self.swarm.internet.kill(server.host, is_silent=is_silent)
        self.dead.add(server.host)

    def at(self, server: SimServer) -> RawClient:
        """Alice asking another server; outputs come to the same lists."""
        return replace(self.alice, server=server.server.node.peer_id)

    async def record(self, server: SimServer) -> bytes:
        record = await self.a.server.node.dht.find_peer_record(server.server.node.peer_id)
        if record is None:  # it is the asked one itself
            record = await self.b.server.node.dht.find_peer_record(server.server.node.peer_id)
        assert record is not None
        return record.to_bytes()

    async def open(
        self,
        server: SimServer,
        to: SimServer | None = None,
        *,
        epoch: int = 0,
        session: SessionId = ONE,
        echo: Echo = Echo.NONE,
        generation: int = 0,
    ) -> Opened:
        """Open, or take over, with push tokens of a generation."""
        request = replace(
            self.alice.opening(session, epoch),
            span=server.server.offer.span,
            push_token=token_of(server, generation),
            next_hop=await self.record(to) if to is not None else b"",
            next_token=token_of(to, generation) if to is not None else b"",
            echo=echo,
        )
        opened = await self.at(server).ask(request)
        assert isinstance(opened, Opened)
        return opened

    async def hand_over(
        self,
        position: int,
        *,
        epoch: int = 1,
        session: SessionId = ONE,
        token: bytes = READER,
        max_tokens: int = 640,
        timeout_s: float = TIMEOUT_S,
    ) -> Opened:
        """Let spare_b read what b has of a session, and open it there with so many tokens."""
        await self.at(self.b).ask(HandOver(session, 2**31 - 1, READER))
        request = replace(
            self.alice.opening(session, epoch, max_tokens),
            span=SECOND,
            source=await self.record(self.b),
            source_token=token,
            source_position=position,
        )
        opened = await self.at(self.spare_b).ask(request, timeout_s=timeout_s)
        assert isinstance(opened, Opened)
        return opened

    async def open_chain(self, *, session: SessionId = ONE, echo: Echo = Echo.NONE) -> None:
        """a pushes to b."""
        await self.open(self.b, session=session)
        await self.open(self.a, self.b, session=session, echo=echo)

    async def replace_b(self, length: int, *, session: SessionId = ONE) -> None:
        """Open the second half at spare_b under epoch 1, with the journal of so many tokens.

        Then a is taken over, and pushes there.
        """
        there = self.at(self.spare_b)
        await self.open(self.spare_b, session=session, epoch=1, generation=1)
        if length:
            journal = expected(FIRST, states(length))
            await there.step(Row(session, 1, 0, 0, length), hidden=journal)
        await self.open(self.a, self.spare_b, session=session, epoch=1, generation=1)


def token_of(server: SimServer, generation: int) -> bytes:
    return bytes([generation]) + server.server.node.peer_id.key[:15]


Use = Callable[[Lab], Awaitable[None]]


def with_lab(
    use: Use, *, device_s: float = DEVICE_S, line: ShaperConfig = ShaperConfig(delay_s=0.005)
) -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4, line=line) as swarm, AsyncExitStack() as stack:
            spans = (FIRST, FIRST, SECOND, SECOND)
            servers = [await swarm.add_server(span, device_s=device_s) for span in spans]
            alice = await stack.enter_async_context(raw_client(swarm, servers[0]))
            for server in servers:
                node = server.server.node
                alice.endpoint.learn(node.peer_id, node.addresses)
            a, spare_a, b, spare_b = servers
            lab = Lab(swarm, alice, a, spare_a, b, spare_b)
            await use(lab)
            await asyncio.sleep(SEND_TIMEOUT_S + 1.0)
            for server in servers:
                if server.host not in lab.dead:
                    held = tuple(session.id for session in server.server.service.sessions)
                    await lab.at(server).ask(Close(held, 2**31 - 1))
                    await asyncio.sleep(1.0)
                    assert_nothing_left(server)

    run(main())


def computed(server: SimServer) -> int:
    return server.server.worker.tokens_computed


def length(server: SimServer, session: SessionId = ONE) -> int:
    held = server.server.service.sessions.get(session)
    assert held is not None
    return held.length

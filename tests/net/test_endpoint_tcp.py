"""Endpoints over the operating system's TCP on loopback: what a simulated network cannot show."""

import asyncio
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from p2pllm.config import NetConfig
from p2pllm.identity import Identity
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.net.tcp import TcpNetwork
from p2pllm.wire.messages import FindNode, Message, Nodes, Output
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

CONFIG = replace(NetConfig(), listen_host="127.0.0.1", listen_port=0)


@asynccontextmanager
async def endpoints(count: int, config: NetConfig = CONFIG) -> AsyncIterator[list[Endpoint]]:
    made = [
        await Endpoint.bind(config, Identity.from_seed(bytes([number]) * 32), TcpNetwork())
        for number in range(1, count + 1)
    ]
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(endpoint.run()) for endpoint in made]
        yield made
        for task in running:
            task.cancel()


async def echo(request: Request[FindNode]) -> Message:
    return Nodes((request.message.target,))


def test_messages_of_every_size_arrive_intact() -> None:
    async def scenario() -> None:
        async with endpoints(2) as (alice, bob):

            async def digest(request: Request[Output]) -> Message:
                return Nodes((hashlib.sha256(request.message.tensor.data).digest(),))

            bob.handle(Output, digest)
            await alice.connect(bob.addresses[0], timeout_s=5)
            rng = random.Random(3)
            for size in (2, 4096, 16_300, 65_000, 1_000_000, 9_000_000):
                data = rng.randbytes(size)
                header = TensorHeader(
                    TensorCodec.RAW, Compression.NONE, DType.FLOAT16, (size // 2,)
                )
                for priority in (Priority.DECODE, Priority.BULK):
                    reply = await alice.request(
                        bob.peer_id,
                        Output((), WireTensor(header, data)),
                        timeout_s=10,
                        priority=priority,
                    )
                    assert reply == Nodes((hashlib.sha256(data).digest(),))

    asyncio.run(scenario())


def test_everybody_dials_everybody_at_once_and_one_connection_each_is_left() -> None:
    async def scenario() -> None:
        async with endpoints(5) as made:
            for endpoint in made:
                endpoint.handle(FindNode, echo)
                for other in made:
                    endpoint.learn(other.peer_id, other.addresses)

            async def ask(asker: Endpoint, other: Endpoint) -> None:
                for number in range(20):
                    target = number.to_bytes(32, "big")
                    reply = await asker.request(other.peer_id, FindNode(target), timeout_s=10)
                    assert reply == Nodes((target,))

            async with asyncio.TaskGroup() as group:
                for asker in made:
                    for other in made:
                        if other is not asker:
                            group.create_task(ask(asker, other))
            async with asyncio.timeout(5):
                while any(len(endpoint.connections()) != 4 for endpoint in made):
                    await made[0].ping(made[1].peer_id)  # until the goodbyes have crossed
            for endpoint in made:
                assert len({view.peer for view in endpoint.connections()}) == 4

    asyncio.run(scenario())


def test_a_flood_of_raw_connections_keeps_nobody_out() -> None:
    async def scenario() -> None:
        config = replace(CONFIG, max_handshakes_per_host=20, max_handshakes=32)
        async with endpoints(2, config) as (hub, guest):
            hub.handle(FindNode, echo)
            where = hub.addresses[0]
            await guest.connect(where, timeout_s=5)
            flood = []
            for _ in range(150):
                raw = socket.create_connection((where.host, where.port))
                raw.setblocking(False)
                flood.append(raw)
                await guest.request(hub.peer_id, FindNode(bytes(32)), timeout_s=5)
            assert len(hub._half_open) <= 20
            assert hub.refused["handshakes of one host"] >= 130
            for raw in flood:
                raw.close()

    asyncio.run(scenario())

"""Endpoints over the operating system's TCP on loopback: what a simulated network cannot show."""

import asyncio
import hashlib
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from p2pllm.addresses import Address
from p2pllm.config import NetConfig
from p2pllm.errors import ConnectionLost, PeerUnreachable, TransportError
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.net.tcp import TcpNetwork
from p2pllm.wire.messages import FindNode, FindValue, Message, Nodes, Output
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

CONFIG = replace(NetConfig(), listen_host="127.0.0.1", listen_port=0)
HASTY = replace(CONFIG, ping_after_silence_s=0.2, suspect_min_s=0.2)


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


# --- another process dies or hangs -----------------------------------------------------------


class PeerProcess:
    """`peer_process.py` at work: an endpoint that can be killed and stopped."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("peer_process.py"))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = Address.parse(self._process.stdout.readline().strip())

    @property
    def peer(self) -> PeerId:
        assert self.address.peer_id is not None
        return self.address.peer_id

    def send(self, number: signal.Signals) -> float:
        """Send a signal; returns when, in the event loop's time."""
        self._process.send_signal(number)
        return asyncio.get_running_loop().time()

    def close(self) -> None:
        self._process.kill()  # also when it is stopped
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def other() -> Iterator[PeerProcess]:
    process = PeerProcess()
    yield process
    process.close()


class FirstLoss:
    """What a watch says first, and when."""

    def __init__(self) -> None:
        self.told = asyncio.get_running_loop().create_future()

    def __call__(self, error: TransportError) -> None:
        if not self.told.done():
            self.told.set_result((asyncio.get_running_loop().time(), error))

    async def at(self) -> float:
        async with asyncio.timeout(10):
            told_at, error = await self.told
        assert isinstance(error, ConnectionLost)
        return float(told_at)


def test_a_killed_process_is_told_at_once_and_requests_to_it_fail(other: PeerProcess) -> None:
    async def scenario() -> None:
        async with endpoints(1) as (alice,):
            await alice.connect(other.address, timeout_s=5)
            await alice.request(other.peer, FindNode(bytes(32)), timeout_s=5)
            asking = asyncio.ensure_future(
                alice.request(other.peer, FindValue("peer", bytes(32)), timeout_s=60)
            )
            loss = FirstLoss()
            with alice.watch(other.peer, loss):
                await alice.ping(other.peer)  # the request has been sent before
                killed_at = other.send(signal.SIGKILL)
                assert await loss.at() - killed_at < 0.5  # one or two ms on an idle machine
                with pytest.raises(ConnectionLost):
                    await asking
                assert asyncio.get_running_loop().time() - killed_at < 0.5

    asyncio.run(scenario())


def test_an_impatient_push_to_a_killed_process_costs_milliseconds(other: PeerProcess) -> None:
    async def scenario() -> None:
        async with endpoints(1) as (alice,):
            loop = asyncio.get_running_loop()
            await alice.connect(other.address, timeout_s=5)
            await alice.push(other.peer, Nodes(()), timeout_s=5, is_patient=False)
            other.close()
            took_s = []
            for _ in range(5):
                began = loop.time()
                with pytest.raises(PeerUnreachable):
                    await alice.push(other.peer, Nodes(()), timeout_s=60, is_patient=False)
                took_s.append(loop.time() - began)
            assert min(took_s) < 0.05

    asyncio.run(scenario())


def test_a_stopped_process_is_told_after_two_seconds(other: PeerProcess) -> None:
    async def scenario() -> None:
        async with endpoints(1) as (alice,):
            await alice.connect(other.address, timeout_s=5)
            loss = FirstLoss()
            with alice.watch(other.peer, loss):
                await alice.request(other.peer, FindNode(bytes(32)), timeout_s=5)
                stopped_at = other.send(signal.SIGSTOP)
                # A second until the ping, another one until suspicion. On a busy machine timers
                # come late, never early.
                assert 1.9 < await loss.at() - stopped_at < 3.0
                assert not alice.is_connected(other.peer)

    asyncio.run(scenario())


def test_a_stopped_process_that_goes_on_is_used_over_the_same_connection(
    other: PeerProcess,
) -> None:
    async def scenario() -> None:
        async with endpoints(1, HASTY) as (alice,):
            await alice.connect(other.address, timeout_s=5)
            (channel,) = alice._all_channels()
            loss = FirstLoss()
            with alice.watch(other.peer, loss):
                await alice.request(other.peer, FindNode(bytes(32)), timeout_s=5)
                other.send(signal.SIGSTOP)
                await loss.at()
                other.send(signal.SIGCONT)
                async with asyncio.timeout(5):
                    await channel.ping()
                assert alice.is_connected(other.peer)
                await alice.request(other.peer, FindNode(bytes(32)), timeout_s=5)
                await alice.push(other.peer, Nodes(()), timeout_s=5, is_patient=False)
                assert alice._all_channels() == [channel]

    asyncio.run(scenario())


def test_an_impatient_push_to_a_stopped_process_gives_up_after_its_dial(
    other: PeerProcess,
) -> None:
    async def scenario() -> None:
        async with endpoints(1, HASTY) as (alice,):
            loop = asyncio.get_running_loop()
            await alice.connect(other.address, timeout_s=5)
            await alice.request(other.peer, FindNode(bytes(32)), timeout_s=5)
            other.send(signal.SIGSTOP)
            began = loop.time()
            with pytest.raises(PeerUnreachable):  # the kernel connects, and nobody answers
                await alice.push(other.peer, Nodes(()), timeout_s=60, is_patient=False)
            assert 1.3 < loop.time() - began < 2.5
            other.send(signal.SIGCONT)
            await alice.push(other.peer, Nodes(()), timeout_s=5, is_patient=False)

    asyncio.run(scenario())

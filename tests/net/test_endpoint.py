"""Endpoints on virtual time over a simulated network."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from p2pllm.addresses import Address
from p2pllm.config import NetConfig, ShaperConfig
from p2pllm.errors import (
    BadRequest,
    BadSignature,
    Busy,
    CacheFull,
    ConnectionLost,
    DeadlineExceeded,
    LocalProtocolError,
    PeerUnreachable,
    Refused,
    RemoteFault,
    RemoteProtocolError,
    RequestFailed,
    TransportError,
)
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority, StreamKind
from p2pllm.net.link import Buffer, Link
from p2pllm.net.rpc import Request
from p2pllm.sim.loop import run
from p2pllm.sim.network import SimNetwork
from p2pllm.wire.messages import Ack, FindNode, FindValue, Message, Nodes, Output
from p2pllm.wire.records import PeerRecord
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

LINE = ShaperConfig(delay_s=0.010)
PORT = 31337
CONFIG = NetConfig()

Resolve = Callable[[PeerId], Awaitable[PeerRecord | None]]


def identity_of(number: int) -> Identity:
    return Identity.from_seed(bytes([number]) * 32)


def ordered_identities() -> tuple[Identity, Identity]:
    """Two identities, the one with the lower PeerId first."""
    first, second = sorted((identity_of(1), identity_of(2)), key=lambda one: one.peer_id)
    return first, second


class World:
    """A simulated network with endpoints on it."""

    def __init__(self, group: asyncio.TaskGroup, line: ShaperConfig) -> None:
        self.network = SimNetwork(line)
        self.group = group
        self.tasks: dict[PeerId, asyncio.Task[None]] = {}

    async def add(
        self,
        number: int,
        config: NetConfig = CONFIG,
        *,
        identity: Identity | None = None,
        resolve: Resolve | None = None,
    ) -> Endpoint:
        host = f"10.0.0.{number}"
        config = replace(config, listen_host=host)
        endpoint = await Endpoint.bind(
            config, identity or identity_of(number), self.network.host(host), resolve=resolve
        )
        self.tasks[endpoint.peer_id] = self.group.create_task(endpoint.run())
        return endpoint

    async def stop(self, endpoint: Endpoint) -> None:
        task = self.tasks.pop(endpoint.peer_id)
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def world(line: ShaperConfig = LINE) -> AsyncIterator[World]:
    async with asyncio.TaskGroup() as group:
        made = World(group, line)
        yield made
        for task in made.tasks.values():
            task.cancel()


async def pair(made: World, config: NetConfig = CONFIG) -> tuple[Endpoint, Endpoint]:
    """Two endpoints; the first knows the second's address."""
    alice, bob = await made.add(1, config), await made.add(2, config)
    alice.learn(bob.peer_id, bob.addresses)
    return alice, bob


async def connected_pair(made: World) -> tuple[Endpoint, Endpoint]:
    """Two endpoints with a connection that the first has dialled."""
    alice, bob = await pair(made)
    await alice.connect(bob.peer_id, timeout_s=5)
    await asyncio.sleep(0.1)  # the last message of the handshake is on its way
    return alice, bob


def forget_links(made: World, first: str, second: str) -> None:
    """As when a NAT between two hosts restarts: their links are dead, new ones are not."""
    made.network.partition(first, second)
    made.network._cut.clear()


def tensor(num_bytes: int, fill: int = 0) -> WireTensor:
    header = TensorHeader(TensorCodec.RAW, Compression.NONE, DType.FLOAT16, (num_bytes // 2,))
    return WireTensor(header, bytes([fill]) * num_bytes)


def question(number: int = 0) -> FindNode:
    return FindNode(number.to_bytes(32, "big"))


async def echo(request: Request[FindNode]) -> Message:
    return Nodes((request.message.target,))


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def never(request: Request[FindNode]) -> Message:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable: nobody sets that future")


def test_a_request_is_answered_and_costs_one_round_trip() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            bob.handle(FindNode, echo)
            await alice.connect(bob.peer_id, timeout_s=5)
            began = asyncio.get_running_loop().time()
            reply = await alice.request(bob.peer_id, question(7), timeout_s=5)
            assert reply == Nodes((question(7).target,))
            assert asyncio.get_running_loop().time() - began == pytest.approx(0.020, abs=1e-4)

    run(scenario())


def test_the_accepting_side_asks_over_the_same_connection() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            alice.handle(FindNode, echo)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(0.02)  # the last message of the handshake is on its way
            assert isinstance(await bob.request(alice.peer_id, question(), timeout_s=5), Nodes)
            assert len(bob.connections()) == 1
            assert not bob.connections()[0].is_dialled

    run(scenario())


def test_a_handler_sees_who_asks_from_where_and_until_when() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            seen: list[Request[FindNode]] = []

            async def handler(request: Request[FindNode]) -> Message:
                seen.append(request)
                return Ack()

            bob.handle(FindNode, handler)
            await alice.connect(bob.peer_id, timeout_s=5)
            now = asyncio.get_running_loop().time()
            await alice.request(bob.peer_id, question(), timeout_s=3)
            assert seen[0].peer == alice.peer_id
            assert seen[0].remote is not None
            assert seen[0].remote[0] == "10.0.0.1"
            # The peer's clock is not ours: it got what was left when the request was sent.
            assert seen[0].deadline == pytest.approx(now + 3.010, abs=0.002)
            assert seen[0].remaining_s(now + 10) == 0.0

    run(scenario())


def test_an_error_of_the_handler_is_raised_by_the_asker() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)

            async def full(request: Request[FindNode]) -> Message:
                raise CacheFull("no pages", retry_after_s=2.5)

            bob.handle(FindNode, full)
            with pytest.raises(CacheFull, match="no pages") as caught:
                await alice.request(bob.peer_id, question(), timeout_s=5)
            assert caught.value.retry_after_s == 2.5

    run(scenario())


def test_an_unforeseen_error_tells_the_peer_nothing_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)

            async def broken(request: Request[FindNode]) -> Message:
                raise KeyError("a secret of ours")

            bob.handle(FindNode, broken)
            with pytest.raises(RemoteFault) as caught:
                await alice.request(bob.peer_id, question(), timeout_s=5)
            assert "secret" not in str(caught.value)
            assert alice.is_connected(bob.peer_id)

    run(scenario())
    assert "handler broke" in caplog.text


def test_a_message_that_nobody_handles_is_a_bad_request() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            with pytest.raises(BadRequest, match="FindNode"):
                await alice.request(bob.peer_id, question(), timeout_s=5)
            with pytest.raises(BadRequest):
                await alice.push(bob.peer_id, question(), timeout_s=5)
            with pytest.raises(BadRequest):
                async for _ in alice.stream(bob.peer_id, question(), timeout_s=5):
                    pass

    run(scenario())


def test_a_deadline_ends_the_request_on_both_sides() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            ended: list[str] = []

            async def slow(request: Request[FindNode]) -> Message:
                try:
                    return await never(request)
                finally:
                    ended.append("cancelled")

            bob.handle(FindNode, slow)
            await alice.connect(bob.peer_id, timeout_s=5)
            began = asyncio.get_running_loop().time()
            with pytest.raises(DeadlineExceeded):
                await alice.request(bob.peer_id, question(), timeout_s=2)
            assert asyncio.get_running_loop().time() - began == pytest.approx(2.0, abs=0.01)
            await asyncio.sleep(0.1)
            assert ended == ["cancelled"]

    run(scenario())


def test_cancelling_the_asker_cancels_the_handler() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            ended = asyncio.Event()

            async def slow(request: Request[FindNode]) -> Message:
                try:
                    return await never(request)
                finally:
                    ended.set()

            bob.handle(FindNode, slow)
            await alice.connect(bob.peer_id, timeout_s=5)
            asking = made.group.create_task(alice.request(bob.peer_id, question(), timeout_s=100))
            await asyncio.sleep(0.1)
            asking.cancel()
            async with asyncio.timeout(0.1):
                await ended.wait()

    run(scenario())


def test_large_tensors_arrive_intact_and_their_memory_is_given_back() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            received: list[bytes] = []

            async def keep(request: Request[Output]) -> Message:
                assert bob.budget.messages >= 3_000_000
                received.append(bytes(request.message.tensor.data))
                return Output((), tensor(2_000_000, 9))

            bob.handle(Output, keep)
            sent = tensor(3_000_000, 5)
            reply = await alice.request(
                bob.peer_id, Output((), sent), timeout_s=60, priority=Priority.PREFILL
            )
            assert isinstance(reply, Output)
            assert received == [sent.data]
            assert bytes(reply.tensor.data) == bytes([9]) * 2_000_000
            await asyncio.sleep(1)
            assert alice.budget.messages == bob.budget.messages == 0

    run(scenario())


def test_a_message_above_the_bound_is_refused_before_it_is_sent_and_by_the_receiver() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice = await made.add(1)
            bob = await made.add(2, replace(CONFIG, max_message_bytes=100_000))
            alice.learn(bob.peer_id, bob.addresses)
            with pytest.raises(BadRequest, match="allowed"):
                await alice.request(bob.peer_id, Output((), tensor(1_000_000)), timeout_s=5)
            bob.learn(alice.peer_id, alice.addresses)
            with pytest.raises(LocalProtocolError):
                await bob.request(alice.peer_id, Output((), tensor(1_000_000)), timeout_s=5)

    run(scenario())


def test_messages_wait_for_memory_and_then_arrive() -> None:
    async def scenario() -> None:
        async with world(replace(LINE, bandwidth_bytes_s=50e6)) as made:
            alice = await made.add(1)
            bob = await made.add(2, replace(CONFIG, process_memory_bytes=4 * 2**20))
            alice.learn(bob.peer_id, bob.addresses)
            most = 0

            async def slow(request: Request[Output]) -> Message:
                nonlocal most
                most = max(most, bob.budget.messages + bob.budget.windows)
                await asyncio.sleep(1)
                return Ack()

            bob.handle(Output, slow)
            async with asyncio.TaskGroup() as group:
                for _ in range(6):
                    group.create_task(
                        alice.request(
                            bob.peer_id,
                            Output((), tensor(1_500_000)),
                            timeout_s=60,
                            priority=Priority.BULK,
                        )
                    )
            assert 1_500_000 < most <= 4 * 2**20
            await asyncio.sleep(0)
            assert bob.budget.messages == 0

    run(scenario())


def test_memory_held_for_a_message_that_does_not_come_is_given_to_others() -> None:
    async def scenario() -> None:
        async with world() as made:
            bob = await made.add(2, replace(CONFIG, process_memory_bytes=8 * 2**20))
            alice, mallory = await made.add(1), await made.add(3)

            async def answer(request: Request[Output]) -> Message:
                return Ack()

            bob.handle(Output, answer)
            await mallory.connect(bob.addresses[0], timeout_s=5)
            (channel,) = mallory._all_channels()
            mux = channel.connection.mux
            assert mux is not None
            head = (5_000_000).to_bytes(4, "big") + bytes(1000)
            mux.open(StreamKind.UNARY, Priority.BULK, [head, bytes(2**20)], deadline=1e6)
            made.network.shape("10.0.0.3", "10.0.0.2", ShaperConfig(bandwidth_bytes_s=1000))
            channel.flush()
            await asyncio.sleep(1)
            await alice.connect(bob.addresses[0], timeout_s=5)
            await alice.request(
                bob.peer_id, Output((), tensor(3_000_000)), timeout_s=60, priority=Priority.BULK
            )

    run(scenario())


# --- streaming -------------------------------------------------------------------------------


async def count_up(request: Request[FindNode]) -> AsyncGenerator[Message, None]:
    for number in range(10):
        yield Nodes((bytes([number]),))


def test_a_stream_of_replies_comes_in_order() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            bob.handle_stream(FindNode, count_up)
            replies = [r async for r in alice.stream(bob.peer_id, question(), timeout_s=5)]
            assert replies == [Nodes((bytes([number]),)) for number in range(10)]

    run(scenario())


def test_a_slow_reader_holds_up_the_handler_not_the_memory() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            produced = 0

            async def endless(request: Request[FindNode]) -> AsyncGenerator[Message, None]:
                nonlocal produced
                while True:
                    produced += 1
                    yield Output((), tensor(100_000))

            bob.handle_stream(FindNode, endless)
            async with aclosing(
                alice.stream(bob.peer_id, question(), timeout_s=1000, priority=Priority.BULK)
            ) as replies:
                await anext(replies)
                await asyncio.sleep(10)
                assert produced < 40
                assert alice.budget.messages < 1_000_000
                for _ in range(100):
                    await anext(replies)
                assert produced >= 100
            await asyncio.sleep(1)
            count = produced
            await asyncio.sleep(10)
            assert produced == count  # leaving the loop ended the handler
            assert alice.budget.messages == bob.budget.messages == 0

    run(scenario())


def test_an_error_in_the_middle_of_a_stream_comes_after_what_was_sent() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)

            async def failing(request: Request[FindNode]) -> AsyncGenerator[Message, None]:
                yield Nodes((b"one",))
                raise Busy("enough", retry_after_s=1)

            bob.handle_stream(FindNode, failing)
            async with aclosing(alice.stream(bob.peer_id, question(), timeout_s=5)) as replies:
                assert await anext(replies) == Nodes((b"one",))
                with pytest.raises(Busy):
                    await anext(replies)

    run(scenario())


# --- pushes ----------------------------------------------------------------------------------


def test_a_push_is_handled_once_though_its_connection_dies_before_the_acknowledgement() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            handled: list[Message] = []

            async def take(request: Request[FindNode]) -> None:
                handled.append(request.message)
                if len(handled) == 1:
                    for channel in bob._all_channels():
                        channel.fail(ConnectionLost("the test cuts it"))

            bob.handle(FindNode, take)
            await alice.push(bob.peer_id, question(1), timeout_s=30)
            assert handled == [question(1)]
            assert alice.is_connected(bob.peer_id)

    run(scenario())


def test_pushes_survive_a_peer_that_is_away_for_a_while() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            handled: list[Message] = []

            async def take(request: Request[FindNode]) -> None:
                handled.append(request.message)

            bob.handle(FindNode, take)
            await alice.connect(bob.peer_id, timeout_s=5)
            made.network.partition("10.0.0.1", "10.0.0.2")
            pushing = made.group.create_task(alice.push(bob.peer_id, question(3), timeout_s=60))
            await asyncio.sleep(20)
            made.network.heal("10.0.0.1", "10.0.0.2")
            await pushing
            assert handled == [question(3)]

    run(scenario())


def test_a_push_leaves_a_suspected_connection_within_seconds() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            handled: list[Message] = []

            async def take(request: Request[FindNode]) -> None:
                handled.append(request.message)

            bob.handle(FindNode, take)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(30)
            forget_links(made, "10.0.0.1", "10.0.0.2")
            began = asyncio.get_running_loop().time()
            await alice.push(bob.peer_id, question(3), timeout_s=60)
            assert asyncio.get_running_loop().time() - began < 3
            assert handled == [question(3)]

    run(scenario())


async def took_s(pushing: Awaitable[None], error: type[Exception]) -> float:
    """After how many seconds a push has failed with this error."""
    began = now_s()
    with pytest.raises(error) as caught:
        await pushing
    assert caught.type is error
    return now_s() - began


def test_an_impatient_push_to_a_killed_peer_fails_after_one_refused_dial() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            await alice.connect(bob.peer_id, timeout_s=5)
            made.network.kill("10.0.0.2")
            push = alice.push(bob.peer_id, question(), timeout_s=60, is_patient=False)
            # The reset takes one way, the refusal there and back.
            assert await took_s(push, PeerUnreachable) == pytest.approx(0.030, abs=0.001)
            push = alice.push(bob.peer_id, question(), timeout_s=60, is_patient=False)
            assert await took_s(push, PeerUnreachable) == pytest.approx(0.020, abs=0.001)

    run(scenario())


def test_an_impatient_push_to_a_peer_that_hangs_is_given_back_and_dials_for_a_second() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(0.1)
            made.network.partition("10.0.0.1", "10.0.0.2")
            push = alice.push(bob.peer_id, question(), timeout_s=60, is_patient=False)
            # Silence since 0.1 s ago, ping, suspicion; then the dial. The suspected connection,
            # which a patient one would take after all, is not tried again.
            assert await took_s(push, PeerUnreachable) == pytest.approx(2.9, abs=0.05)
            push = alice.push(bob.peer_id, question(), timeout_s=60, is_patient=False)
            assert await took_s(push, PeerUnreachable) == pytest.approx(1.0, abs=0.001)

    run(scenario())


def test_an_impatient_push_without_a_connection_waits_no_longer_than_allowed() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            made.network.kill("10.0.0.2", is_silent=True)
            push = alice.push(bob.peer_id, question(), timeout_s=0.5, is_patient=False)
            assert await took_s(push, DeadlineExceeded) == pytest.approx(0.5, abs=0.001)

    run(scenario())


def test_an_impatient_push_leaves_a_suspected_connection_by_its_one_dial() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            handled: list[Message] = []

            async def take(request: Request[FindNode]) -> None:
                handled.append(request.message)

            bob.handle(FindNode, take)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(0.1)
            forget_links(made, "10.0.0.1", "10.0.0.2")
            began = now_s()
            await alice.push(bob.peer_id, question(3), timeout_s=60, is_patient=False)
            assert now_s() - began < 2.2
            assert handled == [question(3)]

    run(scenario())


def test_an_impatient_push_goes_over_another_connection_that_is_there() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            handled: list[Message] = []

            async def take(request: Request[FindNode]) -> None:
                handled.append(request.message)

            bob.handle(FindNode, take)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(0.1)
            forget_links(made, "10.0.0.1", "10.0.0.2")
            pushing = made.group.create_task(
                alice.push(bob.peer_id, question(3), timeout_s=60, is_patient=False)
            )
            await asyncio.sleep(0.1)
            bob.learn(alice.peer_id, alice.addresses)
            await bob._reach(alice.peer_id, now_s() + 5)
            made.network._hosts["10.0.0.2"]._listeners.clear()  # bob cannot be dialled
            await pushing
            assert handled == [question(3)]

    run(scenario())


def test_an_impatient_push_dials_once_only() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            num_handled = 0

            async def cut(request: Request[FindNode]) -> None:
                nonlocal num_handled
                num_handled += 1
                for channel in bob._all_channels():
                    channel.fail(ConnectionLost("the test cuts it"))

            bob.handle(FindNode, cut)
            push = alice.push(bob.peer_id, question(), timeout_s=60, is_patient=False)
            assert await took_s(push, ConnectionLost) < 0.1
            assert num_handled == 1

    run(scenario())


def test_an_impatient_push_looks_a_peer_up_only_if_no_address_is_known() -> None:
    async def scenario() -> None:
        async with world() as made:
            num_asked = 0
            bob = await made.add(2)
            bob.handle(FindNode, echo)

            async def resolve(peer: PeerId) -> PeerRecord | None:
                nonlocal num_asked
                num_asked += 1
                await asyncio.sleep(0.5)
                return PeerRecord(peer, bob.addresses)

            alice = await made.add(1, resolve=resolve)
            await alice.push(bob.peer_id, question(), timeout_s=5, is_patient=False)
            assert num_asked == 1
            made.network.kill("10.0.0.2")
            push = alice.push(bob.peer_id, question(), timeout_s=5, is_patient=False)
            assert await took_s(push, PeerUnreachable) < 0.1
            assert num_asked == 1

    run(scenario())


def test_an_impatient_push_does_not_wait_for_a_lookup_that_others_have_begun() -> None:
    async def scenario() -> None:
        async with world() as made:

            async def resolve(peer: PeerId) -> PeerRecord | None:
                await asyncio.sleep(30)
                return None

            alice, bob = await made.add(1, resolve=resolve), await made.add(2)
            alice.learn(bob.peer_id, bob.addresses)
            made.network.kill("10.0.0.2")
            asking = asyncio.ensure_future(alice.request(bob.peer_id, question(), timeout_s=60))
            await asyncio.sleep(1)
            push = alice.push(bob.peer_id, question(), timeout_s=60, is_patient=False)
            assert await took_s(push, PeerUnreachable) == pytest.approx(0.020, abs=0.001)
            with pytest.raises(PeerUnreachable):
                await asking

    run(scenario())


def test_an_impatient_push_whose_dial_meets_a_dying_process_fails_at_once() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice = await made.add(1)
            peer, host = identity_of(2).peer_id, made.network.host("10.0.0.2")

            def die(link: Link) -> None:
                listener.close()
                link.abort()

            listener = await host.listen("10.0.0.2", PORT, die)
            alice.learn(peer, [Address("10.0.0.2", PORT)])
            push = alice.push(peer, question(), timeout_s=60, is_patient=False)
            assert await took_s(push, PeerUnreachable) < 0.05

    run(scenario())


def test_an_impatient_push_is_not_given_up_while_its_connection_is_being_replaced() -> None:
    async def scenario() -> None:
        async with world() as made:
            low, high = ordered_identities()
            alice, bob = await made.add(1, identity=high), await made.add(2, identity=low)
            alice.learn(bob.peer_id, bob.addresses)
            bob.learn(alice.peer_id, alice.addresses)
            handled: list[Message] = []

            async def take(request: Request[FindNode]) -> None:
                handled.append(request.message)

            bob.handle(FindNode, take)
            dial = made.group.create_task(bob._reach(alice.peer_id, now_s() + 5))
            await asyncio.sleep(0.025)
            for end in made.network._ends[frozenset(("10.0.0.1", "10.0.0.2"))]:
                if end.host == "10.0.0.2":  # the end of the handshake is late
                    end.shaped.config = replace(LINE, delay_s=0.3)
            # What alice dials is refused until then, since the dial of the lower PeerId wins.
            await alice.push(bob.peer_id, question(3), timeout_s=5, is_patient=False)
            assert handled == [question(3)]
            assert await dial
            assert [view.is_dialled for view in alice.connections()] == [False]

    run(scenario())


@pytest.mark.parametrize("is_patient", [True, False])
def test_pushes_beyond_what_a_connection_takes_wait_and_arrive(is_patient: bool) -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made, replace(CONFIG, max_streams=8))
            handled: list[Message] = []

            async def slow(request: Request[FindNode]) -> None:
                handled.append(request.message)
                await asyncio.sleep(0.1)

            bob.handle(FindNode, slow)
            await alice.connect(bob.peer_id, timeout_s=5)
            async with asyncio.TaskGroup() as group:
                for number in range(40):
                    push = alice.push(
                        bob.peer_id, question(number), timeout_s=60, is_patient=is_patient
                    )
                    group.create_task(push)
            assert len(handled) == 40

    run(scenario())


def test_pushes_of_one_peer_run_in_order() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            handled: list[bytes] = []

            async def take(request: Request[FindNode]) -> None:
                handled.append(request.message.target)

            bob.handle(FindNode, take)
            await alice.connect(bob.peer_id, timeout_s=5)
            async with asyncio.TaskGroup() as group:
                for number in range(100):
                    group.create_task(alice.push(bob.peer_id, question(number), timeout_s=5))
            assert handled == [question(number).target for number in range(100)]

    run(scenario())


def test_a_peer_cannot_have_more_push_handlers_running_than_streams() -> None:
    async def scenario() -> None:
        async with world() as made:
            config = replace(CONFIG, max_streams=8)
            alice, bob = await pair(made, config)
            running = most = 0

            async def slow(request: Request[FindNode]) -> None:
                nonlocal running, most
                running += 1
                most = max(most, running)
                await asyncio.sleep(1)
                running -= 1

            bob.handle(FindNode, slow)
            async with asyncio.TaskGroup() as group:
                for number in range(14):
                    group.create_task(alice.push(bob.peer_id, question(number), timeout_s=60))
                    await asyncio.sleep(0.05)
            assert most == 8

    run(scenario())


# --- watching a peer -------------------------------------------------------------------------


class Losses:
    """What a watch has said, and when."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.errors: list[TransportError] = []

    def __call__(self, error: TransportError) -> None:
        self.times.append(now_s())
        self.errors.append(error)


def test_the_death_of_a_watched_peer_is_told_as_soon_as_its_connection_is_reset() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            losses = Losses()
            with alice.watch(bob.peer_id, losses):
                await asyncio.sleep(3)
                made.network.kill("10.0.0.2")
                died_at = now_s()
                await asyncio.sleep(20)
            assert losses.times == [pytest.approx(died_at + 0.010, abs=1e-6)]
            assert isinstance(losses.errors[0], ConnectionLost)

    run(scenario())


@pytest.mark.parametrize("idle_s", [0.1, 3.0])
def test_the_silence_of_a_watched_peer_is_told_within_two_seconds_and_once(idle_s: float) -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            await asyncio.sleep(idle_s)
            made.network.kill("10.0.0.2", is_silent=True)
            losses, began = Losses(), now_s()
            with alice.watch(bob.peer_id, losses):
                await asyncio.sleep(60)  # in which the connection is given up, too
            (told_at,) = losses.times
            assert told_at <= began + 2.0
            assert isinstance(losses.errors[0], ConnectionLost)

    run(scenario())


def test_the_silence_of_a_peer_at_a_distance_is_told_after_four_round_trips() -> None:
    async def scenario() -> None:
        async with world(ShaperConfig(delay_s=0.2)) as made:
            alice, bob = await connected_pair(made)
            losses = Losses()
            with alice.watch(bob.peer_id, losses):
                await asyncio.sleep(5.3)
                made.network.kill("10.0.0.2", is_silent=True)
                died_at = now_s()
                await asyncio.sleep(20)
            (told_at,) = losses.times
            assert died_at + 1.6 < told_at < died_at + 3.1  # a ping may be under way, or not

    run(scenario())


def test_a_peer_is_pinged_more_often_only_while_it_is_watched() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            (channel,) = alice._all_channels()
            mux = channel.connection.mux
            assert mux is not None

            async def pings_in(duration_s: float) -> int:
                before = mux._heartbeat._nonce
                await asyncio.sleep(duration_s)
                return mux._heartbeat._nonce - before

            assert await pings_in(60) <= 12
            with alice.watch(bob.peer_id, Losses()), alice.watch(bob.peer_id, Losses()) as second:
                second.close()
                assert 55 <= await pings_in(60) <= 60
            assert await pings_in(60) <= 12

    run(scenario())


def test_a_connection_that_is_made_during_a_watch_is_watched_too() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            losses = Losses()
            with alice.watch(bob.peer_id, losses):
                await asyncio.sleep(10)
                assert losses.times == []  # nothing was there to be lost
                await alice.connect(bob.peer_id, timeout_s=5)
                await asyncio.sleep(3)
                made.network.partition("10.0.0.1", "10.0.0.2")
                died_at = now_s()
                await asyncio.sleep(10)
            (told_at,) = losses.times
            assert told_at <= died_at + 2.0

    run(scenario())


def test_a_peer_that_recovers_and_is_lost_again_is_told_again() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            bob.handle(FindNode, echo)
            losses = Losses()
            with alice.watch(bob.peer_id, losses):
                for count in (1, 2):
                    made.network.partition("10.0.0.1", "10.0.0.2")
                    await asyncio.sleep(5)
                    assert len(losses.times) == count
                    assert not alice.is_connected(bob.peer_id)
                    made.network.heal("10.0.0.1", "10.0.0.2")
                    await asyncio.sleep(1)
                    assert alice.is_connected(bob.peer_id)
            await alice.request(bob.peer_id, question(), timeout_s=1)
            assert len(alice.connections()) == 1

    run(scenario())


def test_a_peer_that_is_reached_again_and_lost_again_is_told_again() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            losses = Losses()
            with alice.watch(bob.peer_id, losses):
                for count in (1, 2):
                    await alice.connect(bob.peer_id, timeout_s=5)
                    await asyncio.sleep(0.1)
                    for channel in bob._all_channels():
                        channel.fail(ConnectionLost("the test cuts it"))
                    await asyncio.sleep(1)
                    assert len(losses.times) == count

    run(scenario())


def test_a_watch_that_begins_during_suspicion_hears_of_the_end() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            early, late = Losses(), Losses()
            with alice.watch(bob.peer_id, early):
                made.network.kill("10.0.0.2", is_silent=True)
                await asyncio.sleep(5)
                with alice.watch(bob.peer_id, late):
                    await asyncio.sleep(5)
                    assert late.times == []
                    await asyncio.sleep(10)
            assert len(early.times) == 1
            assert late.times == [pytest.approx(early.times[0] + 13.0, abs=0.1)]

    run(scenario())


def test_watches_of_one_peer_end_independently() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            first, second, closed = Losses(), Losses(), Losses()
            with alice.watch(bob.peer_id, first), alice.watch(bob.peer_id, second):
                watch = alice.watch(bob.peer_id, closed)
                watch.close()
                watch.close()
                made.network.kill("10.0.0.2", is_silent=True)
                await asyncio.sleep(3)
            assert len(first.times) == len(second.times) == 1
            assert closed.times == []

    run(scenario())


def test_a_watch_may_be_closed_and_another_begun_from_inside_the_call() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            second, third = Losses(), Losses()

            def go_elsewhere(error: TransportError) -> None:
                watches[0].close()
                watches[1].close()
                watches.append(alice.watch(bob.peer_id, third))

            watches = [alice.watch(bob.peer_id, go_elsewhere), alice.watch(bob.peer_id, second)]
            made.network.kill("10.0.0.2")
            await asyncio.sleep(3)
            assert second.times == third.times == []
            watches[2].close()
            assert bob.peer_id not in alice._watches

    run(scenario())


def test_an_error_in_a_callback_is_the_loops_and_keeps_nobody_from_hearing() -> None:
    losses = Losses()

    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)

            def broken(error: TransportError) -> None:
                raise ZeroDivisionError

            with alice.watch(bob.peer_id, broken), alice.watch(bob.peer_id, losses):
                made.network.kill("10.0.0.2")
                await asyncio.sleep(1)
            assert alice.connections() == ()

    with pytest.raises(ZeroDivisionError):
        run(scenario())
    assert len(losses.times) == 1


def test_a_lost_connection_beside_a_good_one_is_not_told() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            bob.learn(alice.peer_id, alice.addresses)
            await asyncio.sleep(20)
            losses = Losses()
            with alice.watch(bob.peer_id, losses):
                forget_links(made, "10.0.0.1", "10.0.0.2")  # the old connection hears nothing
                await bob._reach(alice.peer_id, now_s() + 5)
                await asyncio.sleep(60)
                assert len(alice.connections()) == 1
                assert losses.times == []
                made.network.kill("10.0.0.2")
                await asyncio.sleep(1)
                assert len(losses.times) == 1

    run(scenario())


@pytest.mark.parametrize("lag_s", [0.0, 0.004, 0.009, 0.035])
def test_of_two_connections_the_one_that_is_replaced_is_not_told(lag_s: float) -> None:
    async def scenario() -> None:
        async with world() as made:
            low, high = ordered_identities()
            alice = await made.add(1, identity=low)
            bob = await made.add(2, identity=high)
            losses = Losses()
            for endpoint, other in ((alice, bob), (bob, alice)):
                endpoint.learn(other.peer_id, other.addresses)
            with alice.watch(bob.peer_id, losses), bob.watch(alice.peer_id, losses):
                async with asyncio.TaskGroup() as group:
                    group.create_task(bob.connect(alice.peer_id, timeout_s=5))
                    await asyncio.sleep(lag_s)
                    group.create_task(alice.connect(bob.peer_id, timeout_s=5))
                await asyncio.sleep(5)
                assert len(alice.connections()) == len(bob.connections()) == 1
                assert losses.times == []

    run(scenario())


@pytest.mark.parametrize("handshake_s", [0.5, 60.0])
def test_a_goodbye_may_come_before_the_connection_that_replaces_it(handshake_s: float) -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            bob.learn(alice.peer_id, alice.addresses)
            await asyncio.sleep(20)  # so that nobody takes the dials for simultaneous
            losses = Losses()
            with alice.watch(bob.peer_id, losses):
                again = made.group.create_task(bob._reach(alice.peer_id, now_s() + 5))
                await asyncio.sleep(0.025)  # connected; the first message is on its way
                ends = made.network._ends[frozenset(("10.0.0.1", "10.0.0.2"))]
                for end in ends[2:]:
                    if end.host == "10.0.0.2":
                        end.shaped.config = replace(LINE, delay_s=handshake_s)
                await again
                left_at = now_s() + 0.010
                await asyncio.sleep(0.1)
                assert not alice.is_connected(bob.peer_id)
                await asyncio.sleep(5)
            if handshake_s < 1:
                assert losses.times == []
                assert len(alice.connections()) == 1
            else:  # it does not come at all
                assert losses.times == [pytest.approx(left_at + 1.0, abs=0.002)]

    run(scenario())


def test_a_connection_that_was_never_taken_is_no_loss() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice = await made.add(1, replace(CONFIG, max_connections=1))
            bob, carol = await made.add(2), await made.add(3)
            await alice.connect(bob.addresses[0], timeout_s=5)
            alice.protect(bob.peer_id)  # there is no room for carol
            carol.learn(alice.peer_id, alice.addresses)
            losses = Losses()
            with alice.watch(carol.peer_id, losses):
                await carol._reach(alice.peer_id, now_s() + 5)
                await asyncio.sleep(5)
            assert alice.refused["connections"] == 1
            assert losses.times == []

    run(scenario())


def test_a_watched_peer_that_says_goodbye_is_told_at_once() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            await asyncio.sleep(1)
            losses, began = Losses(), now_s()
            with alice.watch(bob.peer_id, losses):
                await made.stop(bob)
                await asyncio.sleep(5)
            assert losses.times == [pytest.approx(began + 0.010, abs=1e-3)]

    run(scenario())


def test_the_connection_of_a_watched_peer_is_not_closed_as_idle() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made, replace(CONFIG, idle_close_s=60))
            await alice.connect(bob.peer_id, timeout_s=5)
            with alice.watch(bob.peer_id, Losses()), bob.watch(alice.peer_id, Losses()):
                await asyncio.sleep(100)
                assert alice.is_connected(bob.peer_id)
            await asyncio.sleep(100)
            assert alice.connections() == ()

    run(scenario())


# --- finding a peer --------------------------------------------------------------------------


def test_an_address_alone_leads_to_whoever_is_there() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await made.add(1), await made.add(2)
            who = await alice.connect(Address("10.0.0.2", PORT), timeout_s=5)
            assert who == bob.peer_id
            assert await alice.ping(bob.peer_id) == pytest.approx(0.020, abs=1e-3)
            assert alice.rtt_s(bob.peer_id) == pytest.approx(0.020, abs=1e-3)
            assert alice.remote_host(bob.peer_id) == "10.0.0.2"

    run(scenario())


def test_somebody_else_at_the_address_is_refused() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await made.add(1), await made.add(2)
            stranger = identity_of(9).peer_id
            address = Address("10.0.0.2", PORT, stranger)
            with pytest.raises(BadSignature, match=f"{stranger.short}.*{bob.peer_id.short}"):
                await alice.connect(address, timeout_s=5)
            assert alice.connections() == ()

    run(scenario())


def test_another_network_is_refused() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice = await made.add(1)
            await made.add(2, replace(CONFIG, network_id="another"))
            with pytest.raises(RemoteProtocolError, match="another network"):
                await alice.connect(Address("10.0.0.2", PORT), timeout_s=15)

    run(scenario())


def test_a_peer_is_resolved_when_no_address_is_known_or_the_known_one_is_old() -> None:
    async def scenario() -> None:
        async with world() as made:
            bob = await made.add(2)
            asked: list[PeerId] = []

            async def resolve(peer: PeerId) -> PeerRecord | None:
                asked.append(peer)
                return PeerRecord(peer, bob.addresses) if peer == bob.peer_id else None

            alice = await made.add(1, resolve=resolve)
            carol = await made.add(3, resolve=resolve)
            carol.learn(bob.peer_id, [Address("10.0.0.2", 9)])
            assert await alice.connect(bob.peer_id, timeout_s=5) == bob.peer_id
            assert await carol.connect(bob.peer_id, timeout_s=5) == bob.peer_id
            with pytest.raises(PeerUnreachable, match="no address"):
                await alice.connect(identity_of(9).peer_id, timeout_s=5)

    run(scenario())


def test_an_impatient_ping_asks_nobody_where_else_a_peer_might_be() -> None:
    async def scenario() -> None:
        async with world() as made:
            bob = await made.add(2)

            async def resolve(peer: PeerId) -> PeerRecord | None:
                await asyncio.sleep(1.0)  # a lookup among the living and the dead
                return PeerRecord(peer, bob.addresses)

            alice = await made.add(1, resolve=resolve)
            alice.learn(bob.peer_id, [Address("10.0.0.2", 9)])
            began = asyncio.get_running_loop().time()
            with pytest.raises(PeerUnreachable, match="refused"):
                await alice.ping(bob.peer_id, is_patient=False)
            assert asyncio.get_running_loop().time() - began < 0.1
            assert await alice.ping(bob.peer_id) == pytest.approx(0.020, abs=1e-3)

    run(scenario())


def test_addresses_are_raced_with_a_head_start_for_each() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await made.add(1), await made.add(2)
            made.network.kill("10.0.0.7", is_silent=True)
            alice.learn(bob.peer_id, [Address("10.0.0.7", PORT), Address("10.0.0.2", PORT)])
            began = asyncio.get_running_loop().time()
            await alice.connect(bob.peer_id, timeout_s=30)
            taken = asyncio.get_running_loop().time() - began
            assert taken == pytest.approx(0.25 + 0.020 + 0.020, abs=0.02)
            assert len(alice.connections()) == 1

    run(scenario())


def test_all_who_want_the_same_peer_share_one_dial() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            bob.handle(FindNode, echo)
            async with asyncio.TaskGroup() as group:
                for number in range(50):
                    group.create_task(alice.request(bob.peer_id, question(number), timeout_s=5))
            assert len(alice.connections()) == len(bob.connections()) == 1

    run(scenario())


def test_a_dial_goes_on_for_others_when_one_who_waits_is_cancelled() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            first = made.group.create_task(alice.connect(bob.peer_id, timeout_s=5))
            second = made.group.create_task(alice.connect(bob.peer_id, timeout_s=5))
            await asyncio.sleep(0.005)
            first.cancel()
            assert await second == bob.peer_id

    run(scenario())


def test_nobody_connects_to_itself() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice = await made.add(1)
            with pytest.raises(TransportError, match="itself"):
                await alice.connect(alice.peer_id, timeout_s=5)
            with pytest.raises(TransportError, match="itself"):
                await alice.connect(Address("10.0.0.1", PORT), timeout_s=5)
            assert alice.connections() == ()

    run(scenario())


def test_dials_leave_from_the_listening_port_and_peers_say_what_they_see() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(0.02)
            assert alice.observed == (("10.0.0.1", PORT),)
            assert bob.observed == (("10.0.0.2", PORT),)

    run(scenario())


def test_an_observed_address_counts_when_two_peers_agree() -> None:
    async def scenario() -> None:
        async with world() as made:
            network = made.network.host("10.0.0.1")
            alice = await Endpoint.bind(CONFIG, identity_of(1), network)  # listens everywhere
            made.tasks[alice.peer_id] = made.group.create_task(alice.run())
            seen = Address("10.0.0.1", PORT, alice.peer_id)
            for number in (2, 3):
                assert seen not in alice.addresses
                peer = await made.add(number)
                await alice.connect(peer.addresses[0], timeout_s=5)
            assert alice.addresses[0] == seen

    run(scenario())


# --- connections -----------------------------------------------------------------------------


@pytest.mark.parametrize("lag_s", [0.0, 0.004, 0.009])
def test_simultaneous_dials_end_in_the_one_of_the_lower_peer_id(lag_s: float) -> None:
    async def scenario() -> None:
        async with world() as made:
            low, high = ordered_identities()
            alice = await made.add(1, identity=low)
            bob = await made.add(2, identity=high)
            for endpoint, other in ((alice, bob), (bob, alice)):
                endpoint.learn(other.peer_id, other.addresses)
                endpoint.handle(FindNode, echo)

            async def ask(asker: Endpoint, other: Endpoint, after_s: float) -> None:
                await asyncio.sleep(after_s)
                for number in range(20):
                    await asker.request(other.peer_id, question(number), timeout_s=5)

            async with asyncio.TaskGroup() as group:
                group.create_task(ask(bob, alice, 0.0))
                group.create_task(ask(alice, bob, lag_s))
            await asyncio.sleep(1)
            assert [view.is_dialled for view in alice.connections()] == [True]
            assert [view.is_dialled for view in bob.connections()] == [False]

    run(scenario())


def test_requests_on_the_connection_that_is_given_up_are_answered() -> None:
    async def scenario() -> None:
        async with world() as made:
            low, high = ordered_identities()
            alice = await made.add(1, identity=low)
            bob = await made.add(2, identity=high)

            async def slow(request: Request[FindNode]) -> Message:
                await asyncio.sleep(3)
                return Ack()

            for endpoint, other in ((alice, bob), (bob, alice)):
                endpoint.learn(other.peer_id, other.addresses)
                endpoint.handle(FindNode, slow)
            async with asyncio.TaskGroup() as group:
                group.create_task(bob.request(alice.peer_id, question(), timeout_s=10))
                await asyncio.sleep(0.035)  # bob's handshake is half done
                group.create_task(alice.request(bob.peer_id, question(), timeout_s=10))
                await asyncio.sleep(1)
                assert len(alice.connections()) == 2
            await asyncio.sleep(1)
            assert len(alice.connections()) == len(bob.connections()) == 1

    run(scenario())


def test_a_peer_that_starts_anew_is_reached_again() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            await alice.connect(bob.peer_id, timeout_s=5)
            await made.stop(bob)
            await asyncio.sleep(0.1)
            assert not alice.is_connected(bob.peer_id)
            again = await made.add(2)
            again.handle(FindNode, echo)
            await alice.request(bob.peer_id, question(), timeout_s=5)

    run(scenario())


def test_a_request_ends_with_the_connection_that_carried_it() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            bob.handle(FindNode, never)
            await alice.connect(bob.peer_id, timeout_s=5)
            asking = asyncio.ensure_future(alice.request(bob.peer_id, question(), timeout_s=100))
            await asyncio.sleep(1)
            made.network.kill("10.0.0.2")
            with pytest.raises(ConnectionLost):
                await asking

    run(scenario())


def test_a_silent_peer_is_given_up_after_fifteen_seconds() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            bob.handle(FindNode, never)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(0.1)
            made.network.kill("10.0.0.2", is_silent=True)
            began = asyncio.get_running_loop().time()
            with pytest.raises(ConnectionLost):
                await alice.request(bob.peer_id, question(), timeout_s=100)
            assert asyncio.get_running_loop().time() - began == pytest.approx(15, abs=0.1)

    run(scenario())


def test_a_suspected_connection_is_replaced_by_a_new_one_within_seconds() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            bob.handle(FindNode, echo)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(30)
            forget_links(made, "10.0.0.1", "10.0.0.2")
            lost = asyncio.ensure_future(alice.request(bob.peer_id, question(), timeout_s=100))
            await asyncio.sleep(3)
            began = asyncio.get_running_loop().time()
            await alice.request(bob.peer_id, question(), timeout_s=5)
            assert asyncio.get_running_loop().time() - began < 1
            with pytest.raises(ConnectionLost):
                await lost

    run(scenario())


def test_stopping_says_goodbye_and_fails_what_waits() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            bob.handle(FindNode, never)
            await alice.connect(bob.peer_id, timeout_s=5)
            asking = asyncio.ensure_future(alice.request(bob.peer_id, question(), timeout_s=100))
            await asyncio.sleep(0.1)
            await made.stop(alice)
            with pytest.raises(ConnectionLost):
                await asking
            await asyncio.sleep(0.1)
            assert bob.connections() == ()
            with pytest.raises(TransportError):
                await alice.request(bob.peer_id, question(), timeout_s=1)

    run(scenario())


def test_idle_connections_are_closed_and_protected_ones_kept() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice, bob = await pair(made, replace(CONFIG, idle_close_s=60))
            carol = await made.add(3)
            await alice.connect(bob.peer_id, timeout_s=5)
            await alice.connect(carol.addresses[0], timeout_s=5)
            alice.protect(bob.peer_id)
            bob.protect(alice.peer_id)
            await asyncio.sleep(100)
            assert [view.peer for view in alice.connections()] == [bob.peer_id]
            alice.unprotect(bob.peer_id)
            await asyncio.sleep(100)
            assert alice.connections() == ()

    run(scenario())


# --- bounds ----------------------------------------------------------------------------------


def test_the_least_recently_used_idle_connection_makes_room() -> None:
    async def scenario() -> None:
        async with world() as made:
            hub = await made.add(1, replace(CONFIG, max_connections=3))
            others = [await made.add(number) for number in range(2, 6)]
            for other in others[:3]:
                await other.connect(hub.addresses[0], timeout_s=5)
                await asyncio.sleep(1)
            hub.protect(others[0].peer_id)
            await others[3].connect(hub.addresses[0], timeout_s=5)
            await asyncio.sleep(1)
            peers = {view.peer for view in hub.connections()}
            assert peers == {others[index].peer_id for index in (0, 2, 3)}

    run(scenario())


def test_a_connection_too_many_is_refused_while_all_are_in_use() -> None:
    async def scenario() -> None:
        async with world() as made:
            hub = await made.add(1, replace(CONFIG, max_connections=2))
            others = [await made.add(number) for number in range(2, 5)]
            for other in others[:2]:
                await other.connect(hub.addresses[0], timeout_s=5)
                hub.protect(other.peer_id)
            await others[2].connect(hub.addresses[0], timeout_s=5)  # the hub decides afterwards
            await asyncio.sleep(0.1)
            assert not others[2].is_connected(hub.peer_id)
            assert len(hub.connections()) == 2
            assert hub.refused["connections"] == 1

    run(scenario())


def test_one_peer_that_dials_again_and_again_keeps_few_connections() -> None:
    async def scenario() -> None:
        async with world() as made:
            hub = await made.add(1)
            hub.protect(identity_of(2).peer_id)
            network = made.network.host("10.0.0.2")
            for _ in range(20):
                config = replace(CONFIG, is_listening=False)
                guest = await Endpoint.bind(config, identity_of(2), network)
                made.group.create_task(cancelled_later(guest))
                await guest.connect(hub.addresses[0], timeout_s=5)
                for channel in guest._all_channels():
                    channel.leave = lambda code: None  # type: ignore[method-assign]
            assert len(hub.connections()) > 10
            await asyncio.sleep(30)
            assert len(hub.connections()) == 1

    async def cancelled_later(endpoint: Endpoint) -> None:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(endpoint.run())
            await asyncio.sleep(60)
            running.cancel()

    run(scenario())


class Silent:
    """A raw link that says nothing, or something wrong."""

    def __init__(self) -> None:
        self.is_closed = False

    def link_received(self, data: Buffer) -> None:
        pass

    def link_writable(self) -> None:
        pass

    def link_closed(self, reason: str) -> None:
        self.is_closed = True


async def raw_links(made: World, host: str, count: int) -> list[tuple[Link, Silent]]:
    links = []
    for _ in range(count):
        link = await made.network.host(host).dial("10.0.0.1", PORT)
        user = Silent()
        link.start(user)
        links.append((link, user))
    return links


def test_a_flood_of_half_open_handshakes_leaves_room_for_other_hosts() -> None:
    async def scenario() -> None:
        async with world() as made:
            hub = await made.add(1, replace(CONFIG, max_handshakes=16))
            flood = await raw_links(made, "10.0.6.6", 200)
            await asyncio.sleep(0.1)
            assert sum(not user.is_closed for _, user in flood) == 8
            guest = await made.add(2)
            assert await guest.connect(hub.addresses[0], timeout_s=2) == hub.peer_id
            await asyncio.sleep(6)
            assert all(user.is_closed for _, user in flood)  # five seconds each
            assert len(hub._half_open) == 0

    run(scenario())


def test_half_open_handshakes_are_bounded_in_all() -> None:
    async def scenario() -> None:
        async with world() as made:
            hub = await made.add(1, replace(CONFIG, max_handshakes=16))
            flood = []
            for number in range(10):
                flood += await raw_links(made, f"10.0.7.{number}", 8)
            assert len(hub._half_open) <= 16
            assert hub.refused["handshakes"] > 0

    run(scenario())


def test_signature_checks_of_one_host_are_limited() -> None:
    async def scenario() -> None:
        async with world() as made:
            hub = await made.add(1, replace(CONFIG, signature_checks_per_host_s=3.0))
            network = made.network.host("10.0.0.2")
            results: list[bool] = []
            for number in range(2, 12):
                config = replace(CONFIG, listen_port=0, is_listening=False)
                guest = await Endpoint.bind(config, identity_of(number), network)
                made.tasks[guest.peer_id] = made.group.create_task(guest.run())
                await guest.connect(hub.addresses[0], timeout_s=5)
                await asyncio.sleep(0.030)
                results.append(guest.is_connected(hub.peer_id))
            assert 3 <= sum(results) < 8
            assert hub.refused["signature checks"] == results.count(False)

    run(scenario())


def test_garbage_ends_its_own_connection_and_nothing_else() -> None:
    async def scenario() -> None:
        async with world() as made:
            hub = await made.add(1)
            guest = await made.add(2)
            hub.handle(FindNode, echo)
            await guest.connect(hub.addresses[0], timeout_s=5)
            flood = await raw_links(made, "10.0.6.6", 4)
            garbage = (b"GET / HTTP/1.1\r\n\r\n" * 100, b"\x01\xff\xff" + bytes(9000), b"\x00", b"")
            for (link, _), data in zip(flood, garbage, strict=True):
                link.write(data)
            await asyncio.sleep(6)
            assert all(user.is_closed for _, user in flood)
            await guest.request(hub.peer_id, question(), timeout_s=5)

    run(scenario())


def test_a_failing_peer_does_not_end_the_endpoint() -> None:
    async def scenario() -> None:
        async with world() as made:

            async def resolve(peer: PeerId) -> PeerRecord | None:
                raise RequestFailed("the lookup failed")

            alice = await made.add(1, resolve=resolve)
            with pytest.raises(RequestFailed):
                await alice.request(identity_of(9).peer_id, question(), timeout_s=5)
            assert not made.tasks[alice.peer_id].done()

    run(scenario())


def test_a_decode_step_beside_bulk_waits_for_two_frames_at_most() -> None:
    async def scenario() -> None:
        line = ShaperConfig(delay_s=0.015, bandwidth_bytes_s=12.5e6)
        async with world(line) as made:
            alice, bob = await pair(made)

            async def answer(request: Request[Output]) -> Message:
                return Ack()

            bob.handle(Output, answer)
            await alice.connect(bob.peer_id, timeout_s=5)
            loop = asyncio.get_running_loop()
            bulk = made.group.create_task(
                alice.request(
                    bob.peer_id, Output((), tensor(16 * 2**20)), timeout_s=60,
                    priority=Priority.BULK,
                )
            )  # fmt: skip
            times = []
            while not bulk.done():
                await asyncio.sleep(0.013)
                began = loop.time()
                await alice.request(
                    bob.peer_id, Output((), tensor(4096)), timeout_s=5, priority=Priority.DECODE
                )
                times.append(loop.time() - began)
            assert len(times) > 20
            assert max(times) < 0.030 + 3 * (16_500 / 12.5e6) + 0.001

    run(scenario())


def test_no_connection_is_made_for_find_value_without_an_address() -> None:
    async def scenario() -> None:
        async with world() as made:
            alice = await made.add(1)
            with pytest.raises(PeerUnreachable):
                await alice.request(identity_of(2).peer_id, FindValue("ns", bytes(32)), timeout_s=1)
            with pytest.raises((PeerUnreachable, Refused)):
                await alice.push(identity_of(2).peer_id, question(), timeout_s=1)

    run(scenario())

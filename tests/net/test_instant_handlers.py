"""Handlers that are plain functions, called from inside the link's callback."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from p2pllm.errors import Busy, ConnectionLost, P2PLLMError, RemoteFault, TransportError
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Code
from p2pllm.net.rpc import Request
from p2pllm.sim.loop import run
from p2pllm.wire.messages import Ack, FindNode, FindValue, Message, Output
from tests.net.test_endpoint import (
    CONFIG,
    World,
    connected_pair,
    question,
    tensor,
    world,
)

Scenario = Callable[[World, Endpoint, Endpoint], Awaitable[None]]


def with_pair(scenario: Scenario) -> None:
    """Run a scenario with two endpoints that are connected; no memory may be left reserved."""

    async def main() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            await scenario(made, alice, bob)
            await asyncio.sleep(1)
            assert (alice.budget.messages, bob.budget.messages) == (0, 0)

    run(main())


def ignore(error: P2PLLMError | None) -> None:
    """Whatever becomes of it."""


def test_a_request_is_answered_with_ack_or_with_what_the_handler_raises() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        def take(request: Request[FindNode]) -> None:
            match int.from_bytes(request.message.target, "big"):
                case 1:
                    raise Busy("later", retry_after_s=2.0)
                case 2:
                    raise RuntimeError("a bug")

        bob.handle_at_once(FindNode, take)
        assert await alice.request(bob.peer_id, question(0), timeout_s=5) == Ack()
        with pytest.raises(Busy, match="later"):
            await alice.request(bob.peer_id, question(1), timeout_s=5)
        with pytest.raises(RemoteFault):
            await alice.request(bob.peer_id, question(2), timeout_s=5)

    with_pair(scenario)


def test_a_push_whose_handler_breaks_is_acknowledged_and_others_go_on() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        handled: list[Message] = []

        def take(request: Request[FindNode]) -> None:
            handled.append(request.message)
            raise RuntimeError("a bug")

        bob.handle_at_once(FindNode, take)
        await alice.push(bob.peer_id, question(1), timeout_s=5)
        await alice.push(bob.peer_id, question(2), timeout_s=5)
        assert handled == [question(1), question(2)]

    with_pair(scenario)


def test_large_messages_give_their_memory_back_on_every_way() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        def take(request: Request[Output]) -> None:
            if request.message.is_echo:
                raise Busy("no")

        bob.handle_at_once(Output, take)
        large = Output((), tensor(300_000))
        await alice.push(bob.peer_id, large, timeout_s=5)
        await alice.push(bob.peer_id, replace(large, is_echo=True), timeout_s=5)
        await alice.request(bob.peer_id, large, timeout_s=5)
        with pytest.raises(Busy):
            await alice.request(bob.peer_id, replace(large, is_echo=True), timeout_s=5)
        await asyncio.sleep(0.1)
        assert bob.budget.messages == 0

    with_pair(scenario)


@pytest.mark.parametrize("is_push", [True, False])
def test_a_handler_may_cut_the_connection_that_it_is_called_from(is_push: bool) -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        handled: list[Message] = []

        def take(request: Request[Output]) -> None:
            handled.append(request.message)
            if len(handled) == 1:
                for channel in bob._all_channels():
                    channel.fail(ConnectionLost("the test cuts it"))

        bob.handle_at_once(Output, take)
        large = Output((), tensor(100_000))
        if is_push:
            await alice.push(bob.peer_id, large, timeout_s=30)
        else:
            with pytest.raises(TransportError):
                await alice.request(bob.peer_id, large, timeout_s=30)
        assert len(handled) == 1

    with_pair(scenario)


def test_a_handler_may_end_its_own_endpoint() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        def take(request: Request[FindNode]) -> None:
            made.tasks[bob.peer_id].cancel()
            bob.close()

        bob.handle_at_once(FindNode, take)
        ends: list[P2PLLMError | None] = []
        for number in range(3):
            alice.post(bob.peer_id, question(number), ends.append, timeout_s=5, is_patient=False)
        await asyncio.sleep(10)
        assert len(ends) == 3

    with_pair(scenario)


def test_a_handler_is_never_called_from_inside_itself() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        carol = await made.add(3)
        carol.learn(bob.peer_id, bob.addresses)
        await carol.connect(bob.peer_id, timeout_s=5)
        await asyncio.sleep(0.1)
        depth, deepest, count = 0, 0, 0

        def take(request: Request[FindNode]) -> None:
            nonlocal depth, deepest, count
            depth, count = depth + 1, count + 1
            deepest = max(depth, deepest)
            for peer in (alice.peer_id, carol.peer_id):
                for number in range(5):
                    bob.post(peer, question(number), ignore, timeout_s=5)
            depth -= 1

        bob.handle_at_once(FindNode, take)
        alice.handle_at_once(FindNode, lambda request: None)
        carol.handle_at_once(FindNode, lambda request: None)
        for number in range(20):
            alice.post(bob.peer_id, question(number), ignore, timeout_s=5)
            carol.post(bob.peer_id, question(number), ignore, timeout_s=5)
        await asyncio.sleep(2)
        assert (count, deepest) == (40, 1)

    with_pair(scenario)


def test_pushes_are_begun_in_order_whichever_way_they_are_handled() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        begun: list[Message] = []

        def at_once(request: Request[FindNode]) -> None:
            begun.append(request.message)

        async def in_a_task(request: Request[FindValue]) -> None:
            begun.append(request.message)

        bob.handle_at_once(FindNode, at_once)
        bob.handle(FindValue, in_a_task)
        sent: list[Message] = []
        for number in range(0, 20, 2):
            sent += [question(number), FindValue("test", bytes([number + 1]))]
        for message in sent:
            alice.post(bob.peer_id, message, ignore, timeout_s=5)
        await asyncio.sleep(1)
        assert [each for each in begun if isinstance(each, FindNode)] == sent[::2]
        assert [each for each in begun if isinstance(each, FindValue)] == sent[1::2]

    with_pair(scenario)


def test_the_last_way_to_handle_a_message_counts() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        calls: list[str] = []

        async def later(request: Request[FindNode]) -> None:
            calls.append("later")

        bob.handle(FindNode, later)
        bob.handle_at_once(FindNode, lambda request: calls.append("at once"))
        await alice.request(bob.peer_id, question(1), timeout_s=5)
        bob.handle(FindNode, later)
        await alice.request(bob.peer_id, question(1), timeout_s=5)
        assert calls == ["at once", "later"]

    with_pair(scenario)


def test_a_burst_of_pushes_does_not_wait_for_acknowledgements_that_are_held_back() -> None:
    async def main() -> None:
        async with world() as made:
            config = replace(CONFIG, max_streams=16)
            alice, bob = await made.add(1, config), await made.add(2, config)
            alice.learn(bob.peer_id, bob.addresses)
            await alice.connect(bob.peer_id, timeout_s=5)
            await asyncio.sleep(0.1)
            handled: list[float] = []
            loop = asyncio.get_running_loop()
            bob.handle_at_once(FindNode, lambda request: handled.append(loop.time()))
            started = loop.time()
            for number in range(14 * 2):  # so many may be open at once, twice
                alice.post(bob.peer_id, question(number), ignore, timeout_s=5)
            await asyncio.sleep(2)
            assert len(handled) == 28
            soon = [at for at in handled if at - started < 0.035]
            assert len(soon) >= 24, "one round trip for the second half, but for a few"

    run(main())


def test_a_connection_that_is_replaced_owes_no_acknowledgement() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint) -> None:
        ends: list[float] = []
        loop = asyncio.get_running_loop()

        def take(request: Request[FindNode]) -> None:
            loop.call_soon(bob._all_channels()[0].leave, Code.REPLACED)

        bob.handle_at_once(FindNode, take)
        started = loop.time()

        def on_end(error: P2PLLMError | None) -> None:
            assert error is None
            ends.append(loop.time())

        alice.post(bob.peer_id, question(1), on_end, timeout_s=5)
        await asyncio.sleep(1)
        assert ends[0] - started < 0.022, "it travels with the goodbye"

    with_pair(scenario)

"""Pushes that nobody awaits: `on_end` is told once how they ended, whatever happens meanwhile."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from p2pllm.errors import (
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    LocalProtocolError,
    P2PLLMError,
    PeerUnreachable,
)
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Code
from p2pllm.net.rpc import Request
from p2pllm.sim.loop import run
from p2pllm.sim.network import SimNetwork
from p2pllm.wire.messages import FindNode, Message, Output
from tests.net.test_endpoint import (
    CONFIG,
    World,
    connected_pair,
    identity_of,
    pair,
    question,
    tensor,
    world,
)


class Inbox:
    """What an endpoint was sent, and what becomes of posts."""

    def __init__(self) -> None:
        self.handled: list[Message] = []
        self.ends: list[P2PLLMError | None] = []

    def take(self, request: Request[FindNode]) -> None:
        self.handled.append(request.message)

    def on_end(self, error: P2PLLMError | None) -> None:
        self.ends.append(error)


Scenario = Callable[[World, Endpoint, Endpoint, Inbox], Awaitable[None]]


def with_pair(scenario: Scenario) -> None:
    """Run a scenario with two endpoints that are connected; the second takes pushes at once."""

    async def main() -> None:
        async with world() as made:
            alice, bob = await connected_pair(made)
            inbox = Inbox()
            bob.handle_at_once(FindNode, inbox.take)
            await scenario(made, alice, bob, inbox)

    run(main())


def test_a_post_leaves_at_once_and_is_acknowledged() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        alice.post(bob.peer_id, question(1), inbox.on_end, timeout_s=5)
        await asyncio.sleep(0.012)  # the way there takes 10 ms
        assert (inbox.handled, inbox.ends) == ([question(1)], [])
        await asyncio.sleep(0.1)
        assert (inbox.handled, inbox.ends) == ([question(1)], [None])

    with_pair(scenario)


def test_posts_of_one_turn_arrive_in_order() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        for number in range(40):
            alice.post(bob.peer_id, question(number), inbox.on_end, timeout_s=5)
        await asyncio.sleep(0.2)
        assert inbox.handled == [question(number) for number in range(40)]
        assert inbox.ends == [None] * 40

    with_pair(scenario)


def test_a_post_without_a_connection_dials() -> None:
    async def main() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            await asyncio.sleep(1)
            inbox = Inbox()
            bob.handle_at_once(FindNode, inbox.take)
            alice.post(bob.peer_id, question(1), inbox.on_end, timeout_s=5)
            await asyncio.sleep(1)
            assert (inbox.handled, inbox.ends) == ([question(1)], [None])

    run(main())


def test_a_post_that_loses_its_connection_is_repeated_and_taken_once() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        def take(request: Request[FindNode]) -> None:
            inbox.take(request)
            if len(inbox.handled) == 1:
                for channel in bob._all_channels():
                    channel.fail(ConnectionLost("the test cuts it"))

        bob.handle_at_once(FindNode, take)
        alice.post(bob.peer_id, question(1), inbox.on_end, timeout_s=30)
        await asyncio.sleep(5)
        assert (inbox.handled, inbox.ends) == ([question(1)], [None])

    with_pair(scenario)


def test_a_post_nobody_takes_is_a_bad_request() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        alice.post(bob.peer_id, Output((), tensor(4)), inbox.on_end, timeout_s=5)
        await asyncio.sleep(1)
        assert [type(end) for end in inbox.ends] == [BadRequest]

    with_pair(scenario)


def test_an_impatient_post_to_a_killed_peer_ends_once() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        alice.post(bob.peer_id, question(1), inbox.on_end, timeout_s=30, is_patient=False)
        made.network.kill("10.0.0.2")
        await asyncio.sleep(40)
        assert [type(end) for end in inbox.ends] == [PeerUnreachable]

    with_pair(scenario)


def test_posts_to_a_peer_that_hangs_are_given_back_and_each_ends_once() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        made.network.kill("10.0.0.2", is_silent=True)
        for number in range(3):
            alice.post(bob.peer_id, question(number), inbox.on_end, timeout_s=30, is_patient=False)
        await asyncio.sleep(10)
        assert [type(end) for end in inbox.ends] == [PeerUnreachable] * 3
        await asyncio.sleep(60)
        assert len(inbox.ends) == 3

    with_pair(scenario)


def test_a_post_whose_time_is_over_ends_once() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        made.network.partition("10.0.0.1", "10.0.0.2")
        alice.post(bob.peer_id, question(1), inbox.on_end, timeout_s=0.5)
        await asyncio.sleep(60)
        assert [type(end) for end in inbox.ends] == [DeadlineExceeded]

    with_pair(scenario)


def test_what_is_too_large_is_told_and_not_raised() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        alice.config = replace(CONFIG, max_message_bytes=1000)
        alice.post(bob.peer_id, Output((), tensor(2000)), inbox.on_end, timeout_s=5)
        assert [type(end) for end in inbox.ends] == [LocalProtocolError]

    with_pair(scenario)


# --- when the endpoint ends --------------------------------------------------------------------


def test_posts_under_way_are_told_that_the_endpoint_has_ended() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        made.network.partition("10.0.0.1", "10.0.0.2")
        alice.post(bob.peer_id, question(1), inbox.on_end, timeout_s=60)
        await asyncio.sleep(0.1)
        await made.stop(alice)
        assert [type(end) for end in inbox.ends] == [ConnectionLost]

    with_pair(scenario)


@pytest.mark.parametrize("after_s", [0.0, 0.5])
def test_posts_that_dial_are_told_that_the_endpoint_has_ended(after_s: float) -> None:
    async def main() -> None:
        async with world() as made:
            alice, bob = await pair(made)
            inbox = Inbox()
            await asyncio.sleep(1)
            made.network.partition("10.0.0.1", "10.0.0.2")
            alice.post(bob.peer_id, question(1), inbox.on_end, timeout_s=60)
            if after_s:
                await asyncio.sleep(after_s)
            await made.stop(alice)
            assert [type(end) for end in inbox.ends] == [ConnectionLost]

    run(main())


@pytest.mark.parametrize("is_over", [False, True])
def test_a_post_before_or_after_its_endpoint_runs_ends_at_once(is_over: bool) -> None:
    async def main() -> None:
        config = replace(CONFIG, listen_host="10.0.0.1")
        endpoint = await Endpoint.bind(config, identity_of(1), SimNetwork().host("10.0.0.1"))
        inbox = Inbox()
        if is_over:
            running = asyncio.ensure_future(endpoint.run())
            await asyncio.sleep(1)
            running.cancel()
            await asyncio.wait([running])
        endpoint.post(identity_of(2).peer_id, question(1), inbox.on_end, timeout_s=5)
        assert [type(end) for end in inbox.ends] == [ConnectionLost]
        endpoint.close()

    run(main())


# --- what `on_end` does ------------------------------------------------------------------------


def test_an_end_that_posts_again_is_no_trouble() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        def on_end(error: P2PLLMError | None) -> None:
            inbox.on_end(error)
            if len(inbox.ends) < 5:
                alice.post(bob.peer_id, question(len(inbox.ends)), on_end, timeout_s=5)

        alice.post(bob.peer_id, question(0), on_end, timeout_s=5)
        await asyncio.sleep(1)
        assert inbox.handled == [question(number) for number in range(5)]
        assert inbox.ends == [None] * 5

    with_pair(scenario)


def test_an_end_may_close_the_endpoint() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        def on_end(error: P2PLLMError | None) -> None:
            inbox.on_end(error)
            made.tasks[alice.peer_id].cancel()
            alice.close()

        for number in range(3):
            alice.post(bob.peer_id, question(number), on_end, timeout_s=5)
        await asyncio.sleep(1)
        assert len(inbox.ends) == 3
        assert inbox.ends[0] is None

    with_pair(scenario)


def test_an_end_that_breaks_hurts_no_other_post_and_no_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        def breaking(error: P2PLLMError | None) -> None:
            raise RuntimeError("a bug of ours")

        alice.post(bob.peer_id, question(1), breaking, timeout_s=5)
        alice.post(bob.peer_id, question(2), inbox.on_end, timeout_s=5)
        await asyncio.sleep(1)
        assert inbox.handled == [question(1), question(2)]
        assert inbox.ends == [None]
        assert alice.is_connected(bob.peer_id)
        (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
        assert record.exc_info is not None

    with_pair(scenario)


def test_an_end_that_breaks_leaves_no_closed_connection_half_told() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        def breaking(error: P2PLLMError | None) -> None:
            raise RuntimeError("a bug of ours")

        (channel,) = alice._all_channels()
        made.network.partition("10.0.0.1", "10.0.0.2")
        alice.post(bob.peer_id, Output((), tensor(4)), breaking, timeout_s=60, is_patient=False)
        alice.post(bob.peer_id, question(2), inbox.on_end, timeout_s=60, is_patient=False)
        await asyncio.sleep(0.1)
        alice._group, group = None, alice._group  # a lost post is not repeated, and told at once
        channel.close(Code.CLOSING)
        assert [type(end) for end in inbox.ends] == [ConnectionLost]
        assert not alice.connections()
        alice._group = group

    with_pair(scenario)


def test_an_end_that_breaks_in_a_repeated_post_does_not_end_the_endpoint() -> None:
    async def scenario(made: World, alice: Endpoint, bob: Endpoint, inbox: Inbox) -> None:
        def breaking(error: P2PLLMError | None) -> None:
            raise RuntimeError("a bug of ours")

        stranger = identity_of(9).peer_id
        alice.post(stranger, question(1), breaking, timeout_s=5, is_patient=False)
        await asyncio.sleep(5)
        alice.post(bob.peer_id, question(2), inbox.on_end, timeout_s=5)
        await asyncio.sleep(1)
        assert inbox.ends == [None]

    with_pair(scenario)

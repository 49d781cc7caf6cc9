"""Answers find the step that waits for them, whatever order they come in and whoever sends them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from p2pllm.client.exchange import Exchange, Part
from p2pllm.errors import (
    BadRequest,
    CacheFull,
    ConnectionLost,
    DeadlineExceeded,
    OutOfOrder,
    RequestFailed,
)
from p2pllm.ids import PeerId, SessionId
from p2pllm.model.tensor_io import encode_tensor
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.sim.loop import run
from p2pllm.wire.messages import HopFailed, HopTiming, Message, Output, Row, Step
from p2pllm.wire.tensors import TensorCodec, WireTensor

SERVER, OTHER = PeerId(b"s" * 32), PeerId(b"o" * 32)
TIMEOUT_S = 5.0


def row(number: int, step: int = 0) -> Row:
    return Row(SessionId(bytes([number]) * 16), 0, step, 0, 1)


ROWS = (row(1), row(2), row(3))


def tensor(num_rows: int) -> WireTensor:
    return encode_tensor(torch.ones(num_rows, 4), TensorCodec.RAW)


class FakeEndpoint:
    """Takes pushes and does nothing with them; `arrive` is what the network brings."""

    def __init__(self) -> None:
        self.handlers: dict[type[Message], Callable[[Request[Any]], Awaitable[Message]]] = {}
        self.pushed: list[Message] = []
        self.push_ends: asyncio.Future[None] | None = None  # None: at once

    def handle(
        self, kind: type[Message], handler: Callable[[Request[Any]], Awaitable[Message]]
    ) -> None:
        self.handlers[kind] = handler

    async def push(self, peer: PeerId, message: Message, **_: object) -> None:
        self.pushed.append(message)
        if self.push_ends is not None:
            await self.push_ends

    async def arrive(self, message: Message, sender: PeerId = SERVER) -> None:
        await self.handlers[type(message)](Request(sender, message, 0.0, None))


def output(*rows: Row) -> Output:
    return Output(rows, tensor(len(rows)), (HopTiming(0.0, 0.1, 1.0),))


def failed(*rows: Row, error: int = OutOfOrder.code, **more: Any) -> HopFailed:
    return HopFailed(rows, error, "no", **more)


Scenario = Callable[[FakeEndpoint, "asyncio.Task[tuple[Part, ...]]"], Awaitable[None]]


def with_step(scenario: Scenario, rows: tuple[Row, ...] = ROWS) -> None:
    """Run a scenario while a step waits; afterwards nobody may wait any more."""

    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        step = Step(rows, tensor(len(rows)))
        waiting = asyncio.ensure_future(
            exchange.step([SERVER], step, timeout_s=TIMEOUT_S, priority=Priority.DECODE)
        )
        await asyncio.sleep(0)
        await scenario(endpoint, waiting)
        await asyncio.wait([waiting])
        assert not exchange._waiters

    run(main())


def test_one_output_of_all_rows_is_the_answer() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        sent = output(*ROWS)
        await endpoint.arrive(sent)
        assert await waiting == (Part(ROWS, sent.tensor, sent.timings),)

    with_step(scenario)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_parts_come_in_any_order_and_are_handed_on_in_it(order: tuple[int, ...]) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        for index in order:
            assert not waiting.done()
            await endpoint.arrive(output(ROWS[index]))
        parts = await waiting
        assert [part.rows for part in parts] == [(ROWS[index],) for index in order]

    with_step(scenario)


def test_a_repeated_output_counts_once() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        for rows in ((ROWS[0],), (ROWS[0],), ROWS[1:], (ROWS[0],), ROWS):
            await endpoint.arrive(output(*rows))
        assert len(await waiting) == 2

    with_step(scenario)


@pytest.mark.parametrize("rows", [(row(1, 1),), (row(9),), (*ROWS, row(9)), (ROWS[0], row(1, 1))])
def test_an_output_of_something_else_is_ignored(rows: tuple[Row, ...]) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        await endpoint.arrive(output(*rows))
        await endpoint.arrive(output(*ROWS))
        assert [part.rows for part in await waiting] == [ROWS]

    with_step(scenario)


def test_a_stranger_neither_answers_nor_fails_for_a_hop() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        await endpoint.arrive(output(*ROWS), sender=OTHER)
        await endpoint.arrive(failed(*ROWS), sender=OTHER)
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await endpoint.arrive(output(*ROWS))
        await waiting

    with_step(scenario)


def test_one_failed_row_fails_the_step_with_what_the_hop_says() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        await endpoint.arrive(output(ROWS[0]))
        await endpoint.arrive(failed(ROWS[1], error=OutOfOrder.code, expected=7))
        await endpoint.arrive(failed(ROWS[2], error=CacheFull.code, retry_after_s=3.0))
        with pytest.raises(OutOfOrder) as caught:
            await waiting
        assert caught.value.expected == 7
        assert SERVER.short in str(caught.value)

    with_step(scenario)


def test_an_error_that_this_version_does_not_know_is_a_failed_request() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        await endpoint.arrive(failed(*ROWS, error=250))
        with pytest.raises(RequestFailed):
            await waiting

    with_step(scenario)


def test_no_answer_in_time_is_a_deadline_exceeded() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        await endpoint.arrive(output(ROWS[0]))
        with pytest.raises(DeadlineExceeded):
            await waiting
        assert asyncio.get_running_loop().time() == TIMEOUT_S
        await endpoint.arrive(output(*ROWS))  # too late, and no harm

    with_step(scenario)


@pytest.mark.parametrize("is_failed_first", [True, False])
def test_what_fails_first_is_raised_and_the_other_error_is_not_left_over(
    is_failed_first: bool,
) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        assert endpoint.push_ends is not None
        if is_failed_first:
            await endpoint.arrive(failed(*ROWS))
        endpoint.push_ends.set_exception(ConnectionLost("gone"))
        with pytest.raises(OutOfOrder if is_failed_first else ConnectionLost):
            await waiting
        await endpoint.arrive(failed(*ROWS))  # `run` would report an error that nobody took

    async def main() -> None:
        endpoint = FakeEndpoint()
        endpoint.push_ends = asyncio.get_running_loop().create_future()
        exchange = Exchange(cast(Endpoint, endpoint))
        step = Step(ROWS, tensor(3))
        waiting = asyncio.ensure_future(
            exchange.step([SERVER], step, timeout_s=TIMEOUT_S, priority=Priority.DECODE)
        )
        await asyncio.sleep(0)
        await scenario(endpoint, waiting)
        assert not exchange._waiters

    run(main())


def test_a_step_that_is_cancelled_leaves_no_waiter() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await endpoint.arrive(output(*ROWS))
        await endpoint.arrive(failed(*ROWS))

    with_step(scenario)


@pytest.mark.parametrize("kind", [output, failed])
def test_in_a_chain_the_last_hop_answers_and_any_may_fail(
    kind: Callable[..., Output | HopFailed],
) -> None:
    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        waiting = asyncio.ensure_future(
            exchange.step(
                [OTHER, SERVER],
                Step(ROWS, tensor(3)),
                timeout_s=TIMEOUT_S,
                priority=Priority.DECODE,
            )
        )
        await asyncio.sleep(0)
        await endpoint.arrive(kind(*ROWS), sender=OTHER)
        await endpoint.arrive(output(*ROWS), sender=SERVER)
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(result, OutOfOrder if kind is failed else tuple)
        assert not exchange._waiters

    run(main())


def test_an_echo_answers_nothing() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: "asyncio.Task[tuple[Part, ...]]") -> None:
        sent = output(*ROWS)
        await endpoint.arrive(replace(sent, is_echo=True))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await endpoint.arrive(sent)
        assert len(await waiting) == 1

    with_step(scenario)


def test_steps_of_two_sessions_do_not_meet() -> None:
    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        theirs = (row(4), row(5))
        both = [
            asyncio.ensure_future(
                exchange.step(
                    [peer],
                    Step(rows, tensor(len(rows))),
                    timeout_s=TIMEOUT_S,
                    priority=Priority.DECODE,
                )
            )
            for peer, rows in ((SERVER, ROWS), (OTHER, theirs))
        ]
        await asyncio.sleep(0)
        await endpoint.arrive(output(*ROWS), sender=OTHER)
        await endpoint.arrive(failed(*ROWS, *theirs, error=BadRequest.code), sender=OTHER)
        await endpoint.arrive(output(*ROWS), sender=SERVER)
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(first, tuple)
        assert isinstance(second, BadRequest)

    run(main())

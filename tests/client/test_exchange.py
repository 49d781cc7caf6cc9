"""Answers find the step that waits for them, whatever order they come in and whoever sends them."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import zstandard

from p2pllm.client.exchange import Exchange, Hedge, Interrupted, Part
from p2pllm.errors import (
    BadRequest,
    CacheFull,
    ConnectionLost,
    DeadlineExceeded,
    OutOfOrder,
    P2PLLMError,
    RemoteProtocolError,
    RequestFailed,
    StepFailed,
)
from p2pllm.ids import PeerId, SessionId
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import InstantHandler, OnEnd, Request
from p2pllm.net.watch import OnLost
from p2pllm.sim.loop import run
from p2pllm.wire.messages import HopFailed, HopTiming, Leaving, Message, Output, Row, Step
from p2pllm.wire.rows import TOKENS_TOGETHER
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

SERVER, OTHER = PeerId(b"s" * 32), PeerId(b"o" * 32)
TIMEOUT_S = 5.0


def row(number: int, step: int = 0) -> Row:
    return Row(SessionId(bytes([number]) * 16), 0, step, 0, 1)


ROWS = (row(1), row(2), row(3))


def tensor(num_rows: int) -> WireTensor:
    return encode_tensor(torch.ones(num_rows, 4), TensorCodec.RAW)


class FakeEndpoint:
    """Takes posts and does nothing with them; `arrive` and `lose` are what the network brings."""

    def __init__(self) -> None:
        self.suspected: set[PeerId] = set()
        self.handlers: dict[type[Message], InstantHandler[Any]] = {}
        self.pushed: list[tuple[PeerId, Message]] = []
        self.watched: list[tuple[PeerId, OnLost]] = []
        self.is_broken = False  # every post fails at once
        self.ends: list[OnEnd] = []  # of those under way

    def handle_at_once(self, kind: type[Message], handler: InstantHandler[Any]) -> None:
        self.handlers[kind] = handler

    def is_connected(self, peer: PeerId) -> bool:
        return True

    def is_suspected(self, peer: PeerId) -> bool:
        return peer in self.suspected

    def post(self, peer: PeerId, message: Message, on_end: OnEnd, **_: object) -> None:
        self.pushed.append((peer, message))
        if self.is_broken:
            on_end(ConnectionLost("gone"))
        else:
            self.ends.append(on_end)

    @contextmanager
    def watch(self, peer: PeerId, on_lost: OnLost) -> Iterator[None]:
        self.watched.append((peer, on_lost))
        try:
            yield
        finally:
            self.watched.remove((peer, on_lost))

    async def arrive(self, message: Message, sender: PeerId = SERVER) -> None:
        self.handlers[type(message)](Request(sender, message, 0.0, None))

    def lose(self, peer: PeerId) -> None:
        for watched, on_lost in list(self.watched):
            if watched == peer:
                on_lost(ConnectionLost("gone"))


def output(*rows: Row) -> Output:
    return Output(rows, tensor(len(rows)), (HopTiming(0.0, 0.1, 1.0),))


def failed(*rows: Row, error: int = OutOfOrder.code, **more: Any) -> HopFailed:
    return HopFailed(rows, error, "no", **more)


Waiting = asyncio.Task[tuple[Part, ...]]
Scenario = Callable[[FakeEndpoint, Waiting], Awaitable[None]]


def start(
    exchange: Exchange,
    hops: tuple[PeerId, ...] = (SERVER,),
    rows: tuple[Row, ...] = ROWS,
    hedge: Hedge | None = None,
) -> Waiting:
    """Begin to send a step."""
    step = Step(rows, tensor(len(rows)))
    return asyncio.ensure_future(
        exchange.step(hops, step, timeout_s=TIMEOUT_S, priority=Priority.DECODE, hedge=hedge)
    )


async def failure_of(waiting: Waiting) -> StepFailed:
    """How the step failed."""
    with pytest.raises(StepFailed) as caught:
        await waiting
    return caught.value


def with_step(
    scenario: Scenario,
    *,
    hops: tuple[PeerId, ...] = (SERVER,),
    prepare: Callable[[FakeEndpoint, Exchange], None] = lambda endpoint, exchange: None,
) -> None:
    """Run a scenario while a step waits; afterwards nobody may wait or watch any more."""

    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        prepare(endpoint, exchange)
        waiting = start(exchange, hops)
        await asyncio.sleep(0.001)
        await scenario(endpoint, waiting)
        await asyncio.wait([waiting])
        assert not exchange._waiters
        assert not endpoint.watched

    run(main())


def test_one_output_of_all_rows_is_the_answer() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        sent = output(*ROWS)
        await endpoint.arrive(sent)
        assert await waiting == (Part(ROWS, sent.tensor, sent.timings),)

    with_step(scenario)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_parts_come_in_any_order_and_are_handed_on_in_it(order: tuple[int, ...]) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        for index in order:
            assert not waiting.done()
            await endpoint.arrive(output(ROWS[index]))
        parts = await waiting
        assert [part.rows for part in parts] == [(ROWS[index],) for index in order]

    with_step(scenario)


def test_a_repeated_output_counts_once() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        for rows in ((ROWS[0],), (ROWS[0],), ROWS[1:], (ROWS[0],), ROWS):
            await endpoint.arrive(output(*rows))
        assert len(await waiting) == 2

    with_step(scenario)


@pytest.mark.parametrize("rows", [(row(1, 1),), (row(9),), (*ROWS, row(9)), (ROWS[0], row(1, 1))])
def test_an_output_of_something_else_is_ignored(rows: tuple[Row, ...]) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(output(*rows))
        await endpoint.arrive(output(*ROWS))
        assert [row for part in await waiting for row in part.rows] == list(ROWS)

    with_step(scenario)


def test_a_stranger_neither_answers_nor_fails_for_a_hop() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(output(*ROWS), sender=OTHER)
        await endpoint.arrive(failed(*ROWS), sender=OTHER)
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await endpoint.arrive(output(*ROWS))
        await waiting

    with_step(scenario)


def test_a_failure_of_an_older_route_does_not_end_the_step_that_was_sent_again() -> None:
    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        again = tuple(replace(each, epoch=3) for each in ROWS)
        waiting = start(exchange, rows=again)
        await asyncio.sleep(0.001)
        await endpoint.arrive(failed(*(replace(each, epoch=2) for each in ROWS)))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await endpoint.arrive(failed(again[2]))
        assert (await failure_of(waiting)).peer == SERVER

    run(main())


def test_one_failed_row_fails_the_step_with_what_the_hop_says() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(output(ROWS[0]))
        await endpoint.arrive(failed(ROWS[1], error=OutOfOrder.code, expected=7))
        await endpoint.arrive(failed(ROWS[2], error=CacheFull.code, retry_after_s=3.0))
        failure = await failure_of(waiting)
        assert failure.peer == SERVER
        assert isinstance(failure.cause, OutOfOrder)
        assert failure.cause.expected == 7
        assert SERVER.short in str(failure)

    with_step(scenario)


def test_an_error_that_this_version_does_not_know_is_a_failed_request() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(failed(*ROWS, error=250))
        assert type((await failure_of(waiting)).cause) is RequestFailed

    with_step(scenario)


def test_no_answer_in_time_is_a_deadline_exceeded() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(output(ROWS[0]))
        with pytest.raises(DeadlineExceeded):
            await waiting
        assert asyncio.get_running_loop().time() == TIMEOUT_S
        await endpoint.arrive(output(*ROWS))  # too late, and no harm

    with_step(scenario)


def test_a_hop_whose_connection_is_lost_ends_the_step_at_once() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        endpoint.lose(OTHER)
        failure = await failure_of(waiting)
        assert (failure.peer, type(failure.cause)) == (OTHER, ConnectionLost)

    with_step(scenario, hops=(SERVER, OTHER, SERVER))


def test_each_hop_of_a_step_is_watched_while_it_is_under_way() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        assert [peer for peer, _ in endpoint.watched] == [OTHER, SERVER]
        assert [peer for peer, _ in endpoint.pushed] == [OTHER]
        await endpoint.arrive(output(*ROWS))

    with_step(scenario, hops=(OTHER, SERVER))


def test_a_first_hop_that_cannot_be_reached_is_the_one_that_failed() -> None:
    def prepare(endpoint: FakeEndpoint, exchange: Exchange) -> None:
        endpoint.is_broken = True

    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        failure = await failure_of(waiting)
        assert (failure.peer, type(failure.cause)) == (OTHER, ConnectionLost)

    with_step(scenario, hops=(OTHER, SERVER), prepare=prepare)


@pytest.mark.parametrize(
    ("told", "understood"), [(OTHER.key, OTHER), (b"", None), (b"short", None), (b"x" * 33, None)]
)
def test_a_hop_may_name_the_next_one_and_the_input_as_what_is_wrong(
    told: bytes, understood: PeerId | None
) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(failed(*ROWS, next_hop=told, is_input=True))
        failure = await failure_of(waiting)
        assert (failure.peer, failure.next_hop, failure.is_input) == (SERVER, understood, True)

    with_step(scenario)


@pytest.mark.parametrize("is_failed_first", [True, False])
def test_what_fails_first_is_raised_and_the_other_error_is_not_left_over(
    is_failed_first: bool,
) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        if is_failed_first:
            await endpoint.arrive(failed(*ROWS))
        endpoint.ends[0](ConnectionLost("gone"))
        failure = await failure_of(waiting)
        assert isinstance(failure.cause, OutOfOrder if is_failed_first else ConnectionLost)
        await endpoint.arrive(failed(*ROWS))  # `run` would report an error that nobody took

    with_step(scenario)


def test_a_step_that_is_cancelled_leaves_no_waiter() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await endpoint.arrive(output(*ROWS))
        await endpoint.arrive(failed(*ROWS))

    with_step(scenario)


def test_in_a_chain_the_last_hop_answers() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(output(*ROWS), sender=OTHER)
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await endpoint.arrive(output(*ROWS), sender=SERVER)
        assert len(await waiting) == 1

    with_step(scenario, hops=(OTHER, SERVER))


@pytest.mark.parametrize("sender", [OTHER, SERVER])
def test_in_a_chain_any_hop_may_fail(sender: PeerId) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        await endpoint.arrive(failed(*ROWS), sender=sender)
        assert (await failure_of(waiting)).peer == sender

    with_step(scenario, hops=(OTHER, SERVER))


def test_steps_of_two_sessions_do_not_meet() -> None:
    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        theirs = (row(4), row(5))
        both = [start(exchange), start(exchange, (OTHER,), theirs)]
        await asyncio.sleep(0)
        await endpoint.arrive(output(*ROWS), sender=OTHER)
        await endpoint.arrive(failed(*ROWS, *theirs, error=BadRequest.code), sender=OTHER)
        await endpoint.arrive(output(*ROWS), sender=SERVER)
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(first, tuple)
        assert isinstance(second, StepFailed)
        assert isinstance(second.cause, BadRequest)

    run(main())


# --- who is told from outside ------------------------------------------------------------------


def test_a_wait_can_be_ended_by_any_of_its_rows() -> None:
    exchanges: list[Exchange] = []

    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        (exchange,) = exchanges
        exchange.fail([(row(9).session, 0)], Interrupted("another one"))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        keys = [(each.session, each.step) for each in ROWS[1:]]
        exchange.fail(keys, Interrupted("the chain is being repaired"))
        exchange.fail(keys, Interrupted("twice"))
        with pytest.raises(Interrupted, match="repaired"):
            await waiting

    with_step(scenario, prepare=lambda endpoint, exchange: exchanges.append(exchange))


def hedged(prepared_after_s: float | None, after_s: float = 1.0) -> tuple[Hedge, list[str]]:
    """A hedge, and what it did; None: it is never ready."""
    events: list[str] = []

    async def prepare() -> None:
        events.append("begun")
        try:
            await asyncio.sleep(prepared_after_s if prepared_after_s is not None else 1000.0)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise
        events.append("ready")

    return Hedge(after_s, prepare), events


@pytest.mark.parametrize(
    ("answer_at_s", "happened"),
    [(0.5, []), (2.0, ["begun", "cancelled"]), (4.0, ["begun", "ready"])],
)
def test_a_hedge_begins_after_its_time_and_ends_the_wait_when_it_is_ready(
    answer_at_s: float, happened: list[str]
) -> None:
    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        hedge, events = hedged(prepared_after_s=2.0)
        waiting = start(exchange, hedge=hedge)
        await asyncio.sleep(answer_at_s)
        await endpoint.arrive(output(*ROWS))
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(result, Interrupted if "ready" in happened else tuple)
        assert events == happened
        assert not exchange._waiters

    run(main())


def test_an_error_of_a_hedge_ends_the_step_and_is_not_lost() -> None:
    async def main() -> None:
        exchange = Exchange(cast(Endpoint, FakeEndpoint()))

        async def prepare() -> None:
            raise P2PLLMError("a bug")

        with pytest.raises(P2PLLMError, match="a bug"):
            await start(exchange, hedge=Hedge(1.0, prepare))
        assert not exchange._waiters

    run(main())


# --- what sessions are told --------------------------------------------------------------------


class Listener:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.echoes: list[tuple[PeerId, Output]] = []
        self.leaving: list[tuple[PeerId, float]] = []

    def on_echo(self, peer: PeerId, output: Output) -> None:
        self.echoes.append((peer, output))

    def on_leaving(self, peer: PeerId, deadline_s: float) -> None:
        self.leaving.append((peer, deadline_s))


def test_an_echo_answers_nothing() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: Waiting) -> None:
        sent = output(*ROWS)
        await endpoint.arrive(replace(sent, is_echo=True))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await endpoint.arrive(sent)
        assert len(await waiting) == 1

    with_step(scenario)


def test_of_an_echo_everyone_gets_what_is_theirs() -> None:
    async def main() -> None:
        endpoint, chain, other = FakeEndpoint(), Listener(), Listener()
        exchange = Exchange(cast(Endpoint, endpoint))
        for each in ROWS[:2]:
            exchange.listen(each.session, chain)
        exchange.listen(ROWS[2].session, other)
        echo = replace(output(*ROWS), is_echo=True)
        await endpoint.arrive(echo, sender=OTHER)
        exchange.forget(ROWS[2].session)
        await endpoint.arrive(echo)
        ours = replace(output(*ROWS[:2]), is_echo=True)
        assert chain.echoes == [(OTHER, ours), (SERVER, ours)]
        assert other.echoes == [(OTHER, replace(output(ROWS[2]), is_echo=True))]

    run(main())


def test_a_server_that_leaves_is_known_once_to_each_who_has_a_session_there() -> None:
    async def main() -> None:
        endpoint, chain, other = FakeEndpoint(), Listener(), Listener()
        exchange = Exchange(cast(Endpoint, endpoint))
        for each in ROWS[:2]:
            exchange.listen(each.session, chain)
        exchange.listen(ROWS[2].session, other)
        await endpoint.arrive(Leaving((ROWS[0].session, ROWS[1].session), 30.0))
        assert chain.leaving == [(SERVER, 30.0)]
        assert other.leaving == []

    run(main())


def test_what_nobody_listens_for_is_no_harm() -> None:
    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        exchange.forget(ROWS[0].session)
        await endpoint.arrive(replace(output(*ROWS), is_echo=True))
        await endpoint.arrive(Leaving((ROWS[0].session,), 30.0))

    run(main())


# --- steps of several generations --------------------------------------------------------------


def with_several(
    scenario: Callable[[FakeEndpoint, list[Waiting]], Awaitable[None]],
    *,
    firsts: Sequence[PeerId] = (SERVER, SERVER, SERVER),
) -> None:
    """Run a scenario while generations of one row each wait, which began in the same turn."""

    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        waiting = [
            start(exchange, (first,), (each,)) for first, each in zip(firsts, ROWS, strict=True)
        ]
        await asyncio.sleep(0.001)
        await scenario(endpoint, waiting)
        assert not exchange._waiters
        assert not endpoint.watched

    run(main())


def test_steps_of_one_turn_to_one_hop_leave_as_one_message() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        ((peer, step),) = endpoint.pushed
        assert peer == SERVER
        assert isinstance(step, Step)
        assert step.rows == ROWS
        assert step.tensor.header.shape == (3, 4)
        assert 0 < step.budget_s <= TIMEOUT_S
        await endpoint.arrive(output(*ROWS))
        for each, answer in zip(ROWS, await asyncio.gather(*waiting), strict=True):
            assert [part.rows for part in answer] == [(each,)]
            assert answer[0].tensor.header.shape == (1, 4)

    with_several(scenario)


def test_steps_to_other_hops_leave_by_themselves() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        assert [(peer, step.rows) for peer, step in endpoint.pushed if isinstance(step, Step)] == [
            (SERVER, (ROWS[0], ROWS[2])),
            (OTHER, (ROWS[1],)),
        ]
        await endpoint.arrive(output(ROWS[1]), sender=OTHER)
        await endpoint.arrive(output(ROWS[2], ROWS[0]))
        await asyncio.gather(*waiting)

    with_several(scenario, firsts=(SERVER, OTHER, SERVER))


def test_who_gave_its_step_up_disturbs_nobody_whose_step_left_with_it() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        waiting[1].cancel()
        await asyncio.sleep(0.001)
        await endpoint.arrive(output(*ROWS))
        first, _, last = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(first, tuple)
        assert isinstance(last, tuple)
        assert [part.rows for part in (*first, *last)] == [(ROWS[0],), (ROWS[2],)]

    with_several(scenario)


def test_a_message_that_does_not_arrive_fails_all_whose_steps_it_held() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        endpoint.ends[0](ConnectionLost("gone"))
        for each in waiting:
            assert (await failure_of(each)).peer == SERVER

    with_several(scenario)


def test_an_answer_that_cannot_be_divided_fails_all_who_wait_for_it() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        await endpoint.arrive(replace(output(*ROWS), tensor=tensor(2)))
        for each in waiting:
            assert isinstance((await failure_of(each)).cause, RemoteProtocolError)

    with_several(scenario)


def with_exchange(scenario: Callable[[FakeEndpoint, Exchange], Awaitable[None]]) -> None:
    """Run a scenario; afterwards nobody may wait or watch any more."""

    async def main() -> None:
        endpoint = FakeEndpoint()
        exchange = Exchange(cast(Endpoint, endpoint))
        await scenario(endpoint, exchange)
        assert not exchange._waiters
        assert not exchange._leaving
        assert not endpoint.watched

    run(main())


def steps_of(endpoint: FakeEndpoint) -> list[Step]:
    return [message for _, message in endpoint.pushed if isinstance(message, Step)]


def test_a_step_whose_wait_has_ended_before_the_turn_is_over_does_not_leave() -> None:
    async def scenario(endpoint: FakeEndpoint, exchange: Exchange) -> None:
        kept, gone = start(exchange, rows=(ROWS[0],)), start(exchange, rows=(ROWS[1],))
        await asyncio.sleep(0)  # they have handed their steps in
        exchange.fail([(ROWS[1].session, 0)], Interrupted("the chain is being repaired"))
        await asyncio.sleep(0.001)
        assert [step.rows for step in steps_of(endpoint)] == [(ROWS[0],)]
        await endpoint.arrive(output(ROWS[0]))
        assert len(await kept) == 1
        with pytest.raises(Interrupted):
            await gone

    with_exchange(scenario)


def test_more_steps_than_a_message_takes_leave_in_several() -> None:
    async def scenario(endpoint: FakeEndpoint, exchange: Exchange) -> None:
        batches = [tuple(row(number, step) for step in range(100)) for number in range(5)]
        waiting = [start(exchange, rows=rows) for rows in batches]
        await asyncio.sleep(0.001)
        sizes = [len(step.rows) for step in steps_of(endpoint)]
        assert sum(sizes) == 500
        assert max(sizes) <= TOKENS_TOGETHER
        for step in steps_of(endpoint):
            await endpoint.arrive(output(*step.rows))
        for rows, answer in zip(batches, await asyncio.gather(*waiting), strict=True):
            assert [each for part in answer for each in part.rows] == list(rows)

    with_exchange(scenario)


def test_what_was_compressed_leaves_as_it_is() -> None:
    async def scenario(endpoint: FakeEndpoint, exchange: Exchange) -> None:
        header = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, (1, 4))
        small = WireTensor(header, zstandard.compress(bytes(16)))
        waiting = [
            asyncio.ensure_future(
                exchange.step(
                    (SERVER,), Step((each,), small), timeout_s=1, priority=Priority.DECODE
                )
            )
            for each in ROWS
        ]
        await asyncio.sleep(0.001)
        assert [step.tensor for step in steps_of(endpoint)] == [small] * 3
        await endpoint.arrive(output(*ROWS))
        await asyncio.gather(*waiting)

    with_exchange(scenario)


def test_steps_of_other_codings_leave_by_themselves() -> None:
    async def scenario(endpoint: FakeEndpoint, exchange: Exchange) -> None:
        values = torch.ones(1, 4)
        coded = [encode_tensor(values, codec) for codec in (TensorCodec.RAW, TensorCodec.BF16)]
        waiting = [
            asyncio.ensure_future(
                exchange.step((SERVER,), Step((each,), part), timeout_s=1, priority=Priority.DECODE)
            )
            for each, part in zip(ROWS[:2], coded, strict=True)
        ]
        await asyncio.sleep(0.001)
        assert [step.tensor for step in steps_of(endpoint)] == coded
        await endpoint.arrive(output(*ROWS[:2]))
        await asyncio.gather(*waiting)

    with_exchange(scenario)


def test_steps_of_other_epochs_leave_together_and_fail_by_themselves() -> None:
    async def scenario(endpoint: FakeEndpoint, exchange: Exchange) -> None:
        rows = [replace(each, epoch=index) for index, each in enumerate(ROWS)]
        waiting = [start(exchange, rows=(each,)) for each in rows]
        await asyncio.sleep(0.001)
        assert [step.rows for step in steps_of(endpoint)] == [tuple(rows)]
        await endpoint.arrive(failed(replace(rows[2], epoch=1), rows[1]))  # the last one's is old
        await endpoint.arrive(output(rows[0], rows[2]))
        first, second, third = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(second, StepFailed)
        assert isinstance(first, tuple)
        assert isinstance(third, tuple)

    with_exchange(scenario)


def test_nobody_answers_for_the_step_of_another_hop() -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        await endpoint.arrive(output(*ROWS))  # SERVER has no business with the second
        await asyncio.sleep(1.0)
        assert [each.done() for each in waiting] == [True, False, True]
        await endpoint.arrive(output(ROWS[1]), sender=OTHER)
        for each, answer in zip(ROWS, await asyncio.gather(*waiting), strict=True):
            assert [part.rows for part in answer] == [(each,)]

    with_several(scenario, firsts=(SERVER, OTHER, SERVER))


@pytest.mark.parametrize(
    "strange",
    [
        Output((), tensor(1)),
        Output((), tensor(1), is_echo=True),
        Output((row(9),), tensor(1)),
        Output((row(9), row(8)), tensor(5)),
        Output((row(9), row(8)), tensor(5), is_echo=True),
    ],
)
def test_an_output_of_nothing_that_is_ours_breaks_nothing(
    strange: Output,
) -> None:
    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        await endpoint.arrive(strange)
        await endpoint.arrive(output(*ROWS))
        await asyncio.gather(*waiting)

    with_several(scenario)


@pytest.mark.parametrize(
    "claimed",
    [
        (replace(ROWS[0], num_tokens=2), ROWS[1], ROWS[2]),
        (replace(ROWS[0], num_tokens=2, tail=1), ROWS[1], ROWS[2]),
        (ROWS[0], ROWS[0], ROWS[1], ROWS[2]),
        (row(9), ROWS[0], ROWS[1], ROWS[2]),
    ],
)
def test_whatever_is_claimed_of_rows_no_part_has_another_size_than_it_says(
    claimed: tuple[Row, ...],
) -> None:
    """The chain judges a part by its own rows; here nobody may get another's instead."""

    async def scenario(endpoint: FakeEndpoint, waiting: list[Waiting]) -> None:
        counts = sum(each.num_outputs for each in claimed)
        values = torch.arange(counts).float()[:, None].repeat(1, 4)
        packed = encode_tensor(values, TensorCodec.RAW)
        await endpoint.arrive(Output(claimed, packed))
        for each in waiting:
            (part,) = await each
            start = 0
            expected = []
            for one in claimed:
                if one.session == part.rows[0].session:
                    expected.append(values[start : start + one.num_outputs])
                start += one.num_outputs
            assert decode_tensor(part.tensor).equal(torch.cat(expected))

    with_several(scenario)


HAPPENINGS = ("answer", "failure", "slow", "cancel", "loss")


@pytest.mark.parametrize("order", list(itertools.permutations(HAPPENINGS, 3)))
def test_whatever_happens_in_one_turn_the_step_ends_in_it(order: tuple[str, ...]) -> None:
    async def scenario(endpoint: FakeEndpoint, exchange: Exchange) -> None:
        hedge, _ = hedged(prepared_after_s=None, after_s=2.0)
        waiting = start(exchange, hedge=hedge)
        await asyncio.sleep(1.0)
        (waiter,) = {each for waiters in exchange._waiters.values() for each in waiters}
        for happening in order:
            match happening:
                case "answer":
                    await endpoint.arrive(output(*ROWS))
                case "failure":
                    await endpoint.arrive(failed(*ROWS))
                case "slow":
                    waiter.become_slow()
                case "cancel":
                    waiting.cancel()
                case "loss":
                    endpoint.lose(SERVER)
        await asyncio.wait([waiting])
        assert asyncio.get_running_loop().time() == 1.0, "nobody overslept"
        if "cancel" in order:
            assert waiting.cancelled()
        elif "answer" in order:  # when it is there, it counts
            assert len(waiting.result()) == 1
        else:
            assert isinstance(waiting.exception(), StepFailed)

    with_exchange(scenario)

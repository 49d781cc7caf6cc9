"""What a server has computed leaves in few messages, and what goes wrong is each client's own."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import pytest
import torch
import zstandard

from p2pllm.errors import (
    BadRequest,
    Busy,
    ConnectionLost,
    LocalProtocolError,
    P2PLLMError,
    RequestFailed,
)
from p2pllm.ids import ModelId, PeerId, SessionId
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import OnEnd
from p2pllm.server import outbox
from p2pllm.server.outbox import Outbox
from p2pllm.server.page_table import PageTable
from p2pllm.server.sessions import Session
from p2pllm.server.successors import Successors
from p2pllm.sim.loop import run
from p2pllm.spans import Span
from p2pllm.wire.messages import (
    Echo,
    HopFailed,
    HopTiming,
    Message,
    Numerics,
    Open,
    Output,
    Row,
    Step,
)
from p2pllm.wire.rows import TOKENS_TOGETHER
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

ALICE, BOB, NEXT = PeerId(b"a" * 32), PeerId(b"b" * 32), PeerId(b"n" * 32)
TIMING = HopTiming(0.0, 0.1, 1.0)


class FakeEndpoint:
    """Takes posts; `end` says how those to a peer end."""

    def __init__(self) -> None:
        self.posted: list[tuple[PeerId, Message, Priority]] = []
        self.under_way: list[tuple[PeerId, OnEnd]] = []
        self.fails_at_once: P2PLLMError | None = None

    def post(
        self, peer: PeerId, message: Message, on_end: OnEnd, *, priority: Priority, **_: object
    ) -> None:
        self.posted.append((peer, message, priority))
        if self.fails_at_once is not None:
            on_end(self.fails_at_once)
        else:
            self.under_way.append((peer, on_end))

    def end(self, peer: PeerId, error: P2PLLMError | None = None) -> None:
        ending = [on_end for to, on_end in self.under_way if to == peer]
        self.under_way = [each for each in self.under_way if each[0] != peer]
        for on_end in ending:
            on_end(error)

    def steps(self) -> list[Step]:
        return [message for _, message, _ in self.posted if isinstance(message, Step)]

    def failures(self, peer: PeerId) -> list[HopFailed]:
        return [each for to, each, _ in self.posted if to == peer and isinstance(each, HopFailed)]

    def rtt_s(self, peer: PeerId) -> float | None:
        return None

    def rate_bytes_s(self, peer: PeerId) -> float | None:
        return None


class FakeSuccessors:
    """Lets everybody dial but those who may not."""

    def __init__(self) -> None:
        self.refused: set[PeerId] = set()

    def may_use(self, client: PeerId, peer: PeerId, now: float) -> bool:
        return client not in self.refused


def session_of(
    client: PeerId, number: int, echo: Echo = Echo.NONE, next_peer: PeerId | None = NEXT
) -> Session[Output]:
    request = Open(
        session=SessionId(number.to_bytes(16, "big")),
        epoch=0,
        span=Span(0, 2),
        max_tokens=64,
        model=ModelId(b"m" * 32, "model"),
        numerics=Numerics("float32"),
        push_token=b"p" * 16,
        client=client,
        next_token=number.to_bytes(16, "big"),
        echo=echo,
    )
    return Session(
        id=request.session,
        client=client,
        epoch=0,
        span=request.span,
        max_tokens=64,
        table=cast(PageTable, None),
        request=request,
        expires=math.inf,
        next_peer=next_peer,
    )


def row_of(session: Session[Output], num_tokens: int = 1) -> Row:
    return Row(session.id, 0, 0, 0, num_tokens)


def emit(
    box: Outbox,
    sessions: Sequence[Session[Output]],
    *,
    num_tokens: int = 1,
    tensor: WireTensor | None = None,
) -> None:
    """An output of one client's sessions, in each value the number of its session."""
    rows = tuple(row_of(session, num_tokens) for session in sessions)
    values = [torch.full((num_tokens, 4), float(s.id.value[-1])) for s in sessions]
    packed = tensor or encode_tensor(torch.cat(values), TensorCodec.RAW)
    output = Output(rows, packed, (TIMING,))
    box.emit(list(zip(sessions, rows, strict=True)), output, math.inf)


def with_outbox(
    scenario: Callable[[Outbox, FakeEndpoint, FakeSuccessors], Awaitable[None]],
) -> None:
    async def main() -> None:
        endpoint, successors = FakeEndpoint(), FakeSuccessors()
        box = Outbox(cast(Endpoint, endpoint), cast(Successors, successors))
        box.is_open = True
        await scenario(box, endpoint, successors)
        for peer in (NEXT, ALICE, BOB):
            endpoint.end(peer)
        await asyncio.sleep(0)
        for peer in (NEXT, ALICE, BOB):
            endpoint.end(peer)
        assert len(box) == 0
        assert not box._unsent_bytes
        assert not box._onward
        assert not box._echoes

    run(main())


def test_rows_of_two_clients_leave_as_one_step_each_with_its_token() -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, _: FakeSuccessors) -> None:
        sessions = [session_of(ALICE, 1), session_of(BOB, 2), session_of(ALICE, 3)]
        for session in sessions:
            emit(box, [session])
        box.flush()
        (step,) = endpoint.steps()
        assert step.rows == tuple(map(row_of, sessions))
        assert step.tokens == tuple(session.request.next_token for session in sessions)
        assert decode_tensor(step.tensor)[:, 0].tolist() == [1.0, 2.0, 3.0]

    with_outbox(scenario)


def test_echoes_hold_the_clients_own_rows_and_leave_after_the_step() -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, __: FakeSuccessors) -> None:
        sessions = [session_of(ALICE, 1, Echo.ALL), session_of(BOB, 2, Echo.ALL)]
        for session in sessions:
            emit(box, [session])
        box.flush()
        assert [peer for peer, _, _ in endpoint.posted] == [NEXT, ALICE, BOB]
        for session, (_, echo, priority) in zip(sessions, endpoint.posted[1:], strict=True):
            assert isinstance(echo, Output)
            assert (echo.rows, echo.is_echo) == ((row_of(session),), True)
            assert priority is Priority.BULK

    with_outbox(scenario)


def test_chunks_of_prompts_leave_alone_and_decode_steps_between_them_together() -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, _: FakeSuccessors) -> None:
        for number, num_tokens in enumerate([100, 1, 1, 100, 100, 1, 100], start=1):
            emit(box, [session_of(ALICE, number)], num_tokens=num_tokens)
        box.flush()
        sizes = [[row.num_tokens for row in step.rows] for step in endpoint.steps()]
        assert sizes == [[100], [1, 1, 1], [100], [100], [100]]

    with_outbox(scenario)


def test_a_step_holds_so_many_tokens_and_no_more() -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, _: FakeSuccessors) -> None:
        for number in range(1, 101):
            emit(box, [session_of(ALICE if number % 2 else BOB, number)], num_tokens=8)
        box.flush()
        totals = [sum(row.num_tokens for row in step.rows) for step in endpoint.steps()]
        assert sum(totals) == 800
        assert max(totals) <= TOKENS_TOGETHER

    with_outbox(scenario)


def test_what_is_to_be_compressed_leaves_as_it_was_coded() -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, _: FakeSuccessors) -> None:
        header = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, (1, 4))
        small = WireTensor(header, zstandard.compress(bytes(16)))
        emit(box, [session_of(ALICE, 1)], tensor=small)
        emit(box, [session_of(BOB, 2)])
        emit(box, [session_of(ALICE, 3)])
        emit(box, [session_of(BOB, 4)], tensor=small)
        box.flush()
        assert [len(step.rows) for step in endpoint.steps()] == [1, 2, 1]
        assert [endpoint.steps()[i].tensor for i in (0, 2)] == [small, small]

    with_outbox(scenario)


def test_who_may_not_dial_any_more_keeps_nobody_back() -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, successors: FakeSuccessors) -> None:
        successors.refused.add(ALICE)
        alices, bobs = session_of(ALICE, 1), session_of(BOB, 2)
        emit(box, [alices])
        emit(box, [bobs])
        box.flush()
        assert [step.rows for step in endpoint.steps()] == [(row_of(bobs),)]
        (failed,) = endpoint.failures(ALICE)
        assert (failed.error, failed.rows) == (Busy.code, (row_of(alices),))
        assert not endpoint.failures(BOB)

    with_outbox(scenario)


def test_who_has_too_many_bytes_on_their_way_keeps_nobody_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "MAX_UNSENT_BYTES", 16)  # one row of 4 numbers

    async def scenario(box: Outbox, endpoint: FakeEndpoint, _: FakeSuccessors) -> None:
        sessions = [session_of(ALICE, 1), session_of(ALICE, 2), session_of(BOB, 3)]
        for session in sessions:
            emit(box, [session])
        box.flush()
        (step,) = endpoint.steps()
        assert step.rows == (row_of(sessions[0]), row_of(sessions[2]))
        assert [failed.rows for failed in endpoint.failures(ALICE)] == [(row_of(sessions[1]),)]

    with_outbox(scenario)


@pytest.mark.parametrize(
    ("error", "code", "next_hop"),
    [
        (ConnectionLost("gone"), RequestFailed.code, NEXT.key),
        (BadRequest("it cannot read that"), BadRequest.code, NEXT.key),
        (LocalProtocolError("too large"), BadRequest.code, b""),
    ],
)
@pytest.mark.parametrize("is_at_once", [True, False])
def test_when_a_step_does_not_arrive_each_client_hears_of_its_own_rows(
    error: P2PLLMError, code: int, next_hop: bytes, is_at_once: bool
) -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, _: FakeSuccessors) -> None:
        alices, bobs = session_of(ALICE, 1), session_of(BOB, 2)
        emit(box, [alices])
        emit(box, [bobs])
        if is_at_once:
            endpoint.fails_at_once = error
        box.flush()
        endpoint.end(NEXT, error)
        for client, session in ((ALICE, alices), (BOB, bobs)):
            (failed,) = endpoint.failures(client)
            assert failed.rows == (row_of(session),)
            assert (failed.error, failed.next_hop) == (code, next_hop)

    with_outbox(scenario)


def test_a_server_that_has_ended_sends_nothing_and_counts_nothing() -> None:
    async def scenario(box: Outbox, endpoint: FakeEndpoint, _: FakeSuccessors) -> None:
        emit(box, [session_of(ALICE, 1)])
        box.flush()
        emit(box, [session_of(BOB, 2)])
        box.is_open = False
        box.flush()
        endpoint.end(NEXT, ConnectionLost("the endpoint has been closed"))
        assert len(endpoint.posted) == 1

    with_outbox(scenario)

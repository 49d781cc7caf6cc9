"""A server and clients that break the rules: what one does never hurts the server or the others."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import torch

from p2pllm.config import ServerConfig
from p2pllm.errors import (
    BadRequest,
    Busy,
    CacheFull,
    DeadlineExceeded,
    Forbidden,
    NotServed,
    OutOfOrder,
    PeerUnreachable,
    RequestFailed,
    SessionUnknown,
    StaleEpoch,
)
from p2pllm.identity import Identity
from p2pllm.ids import ModelId, PeerId
from p2pllm.model.tensor_io import encode_tensor
from p2pllm.net.rpc import OnEnd
from p2pllm.server import admission, outbox, sessions, worker
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.server.sessions import EVICT_IDLE_S, WINDOW
from p2pllm.sim.fake_model import WIDTH
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import LAB_SERVER, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.tasks import together
from p2pllm.wire.messages import Ack, Close, Fork, Message, Numerics, Opened, Rewire, Row
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor
from tests.swarm.raw_client import (
    ONE,
    THREE,
    TOKEN,
    TWO,
    RawClient,
    assert_nothing_left,
    expected,
    raw_client,
    session_id,
    states,
)

WHOLE = Span(0, 4)
SLOW_S = 0.05  # for a batch
Scenario = Callable[[SimServer, RawClient, RawClient], Awaitable[None]]


def with_clients(
    scenario: Scenario, settings: ServerConfig = LAB_SERVER, *, device_s: float = 0.001
) -> None:
    """Run a scenario with one server of all four blocks and two clients; nothing may be left.

    A device that is slower than the network (10 ms there and back) lets rows wait.
    """

    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            server = await swarm.add_server(WHOLE, settings, device_s=device_s)
            async with AsyncExitStack() as stack:
                alice = await stack.enter_async_context(raw_client(swarm, server, 1))
                bob = await stack.enter_async_context(raw_client(swarm, server, 2))
                await scenario(server, alice, bob)
                for client in (alice, bob):
                    table = server.server.service.sessions
                    held = tuple(s.id for s in table if s.client == client.peer_id)
                    await client.ask(Close(held, 2**31 - 1))
            await asyncio.sleep(outbox.SEND_TIMEOUT_S + 1)
            assert_nothing_left(server)

    run(main())


def row(
    step: int = 0, position: int = 0, num_tokens: int = 1, *, epoch: int = 0, acked: int = -1
) -> Row:
    return Row(ONE, epoch, step, position, num_tokens, acked)


def of(session: int, row: Row) -> Row:
    return replace(row, session=session_id(session))


def length(server: SimServer) -> int:
    session = server.server.service.sessions.get(ONE)
    assert session is not None
    return session.length


# --- what may be opened ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": ModelId(b"x" * 32, "other")}, NotServed),
        ({"numerics": Numerics("bfloat16")}, NotServed),
        ({"numerics": Numerics("float32", "int8", "float32")}, NotServed),
        ({"numerics": Numerics("float32", "none", "int8")}, NotServed),
        ({"span": Span(0, 5)}, NotServed),
        ({"span": Span(3, 60000)}, NotServed),
        ({"next_hop": b"x"}, BadRequest),
        ({"client": Identity.from_seed(b"z" * 32).peer_id}, Forbidden),
        ({"max_tokens": 10_000}, BadRequest),
        ({"max_tokens": 5_000}, BadRequest),  # a session may have them, the cache has not
        ({"max_tokens": 2**31 - 1}, BadRequest),
    ],
    ids=str,
)
def test_an_open_that_does_not_fit_is_refused(
    change: dict[str, object], error: type[RequestFailed]
) -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        with pytest.raises(error):
            await alice.ask(replace(alice.opening(), **change))  # type: ignore[arg-type]
        assert len(server.server.service.sessions) == 0

    with_clients(scenario)


def test_who_is_blocked_or_not_allowed_is_forbidden() -> None:
    alice_id, bob_id = (str(Identity.from_seed(bytes([n]) * 32).peer_id) for n in (1, 2))

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await bob.open(TWO)
        with pytest.raises(Forbidden):
            await alice.open()

    with_clients(scenario, replace(LAB_SERVER, block=frozenset({alice_id})))
    with_clients(scenario, replace(LAB_SERVER, allow=frozenset({bob_id})))


def test_only_the_client_rewires_and_not_under_an_older_epoch() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(epoch=1)
        with pytest.raises(Forbidden):
            await bob.ask(Rewire(ONE, 2))
        with pytest.raises(StaleEpoch):
            await alice.ask(Rewire(ONE, 0))
        with pytest.raises(SessionUnknown):
            await alice.ask(Rewire(TWO, 2))
        opened = await alice.ask(Rewire(ONE, 2))
        assert isinstance(opened, Opened)
        assert opened.next_rtt_s < 0
        await alice.step(row(epoch=1))
        await alice.step(row(epoch=2))
        assert (alice.failures[0].error, len(alice.outputs)) == (StaleEpoch.code, 1)

    with_clients(scenario)


def test_a_part_of_the_span_may_be_used() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(span=Span(1, 3))
        await alice.step(row(num_tokens=5))
        assert alice.tensor().equal(expected(Span(1, 3), states(5)))

    with_clients(scenario)


# --- epochs ------------------------------------------------------------------------------------


def test_an_older_epoch_is_refused_in_every_message() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(epoch=3)
        for message in (alice.opening(epoch=2), Close((ONE,), 2), Fork(ONE, 2, TWO, 0)):
            with pytest.raises(StaleEpoch):
                await alice.ask(message)
        await alice.step(row(epoch=2))
        assert alice.failures[0].error == StaleEpoch.code
        assert server.server.worker.tokens_computed == 0

    with_clients(scenario)


def test_a_higher_epoch_takes_over_and_keeps_the_cache() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 4))
        opened = await alice.open(epoch=1)
        assert isinstance(opened, Opened)
        assert opened.position == 4
        await alice.step(row(1, 4, 2, epoch=1))
        assert alice.tensor().equal(expected(WHOLE, states(6))[4:])
        await alice.step(row(2, 6, 1))
        assert alice.failures[0].error == StaleEpoch.code

    with_clients(scenario)


def test_a_step_of_the_client_raises_the_epoch_too_and_may_leave_given_up_steps_out() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 4))
        await alice.step(row(3, 2, 2, epoch=1))
        await alice.step(row(5, 4, 1, epoch=1))
        await alice.step(row(1, 4, 1))
        assert [len(output.rows) for output in alice.outputs] == [1, 1]
        assert [failed.error for failed in alice.failures] == [OutOfOrder.code, StaleEpoch.code]
        assert length(server) == 4

    with_clients(scenario)


def test_only_the_client_takes_over() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        with pytest.raises(Forbidden):
            await bob.open(epoch=9)
        with pytest.raises(Forbidden):
            await bob.ask(Close((ONE,), 9))
        with pytest.raises(Forbidden):
            await bob.ask(Fork(ONE, 9, TWO, 0))
        await alice.step(row())
        assert len(alice.outputs) == 1

    with_clients(scenario)


def test_taking_over_with_another_span_begins_from_nothing() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.push([row(0, 0, 60)])  # perhaps still being computed when the pages change
        opened = await alice.open(epoch=1, span=Span(1, 2), max_tokens=100)
        assert isinstance(opened, Opened)
        assert opened.position == 0
        await alice.step(row(0, 0, 70, epoch=1))
        assert alice.tensor().equal(expected(Span(1, 2), states(70)))

    with_clients(scenario, device_s=SLOW_S)


# --- early steps -------------------------------------------------------------------------------


def test_steps_that_overtake_each_other_are_computed_in_order() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        for step in (3, 1, 2, 0):
            await alice.push([row(step, 5 * step, 5)])
        await alice.answered(4)
        assert [output.rows[0].step for output in alice.outputs] == [0, 1, 2, 3]
        whole = torch.cat([alice.tensor(index) for index in range(4)])
        assert whole.equal(expected(WHOLE, states(20)))
        assert server.server.worker.tokens_computed == 20

    with_clients(scenario)


def test_an_early_step_whose_predecessor_never_comes_is_refused_in_time() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        started = asyncio.get_running_loop().time()
        await alice.push([row(1, 5, 5)], budget_s=8.0)
        await alice.answered(1)
        assert alice.failures[0].error == OutOfOrder.code
        assert alice.failures[0].expected == 0
        assert asyncio.get_running_loop().time() - started < 6.0

    with_clients(scenario)


# --- push tokens -------------------------------------------------------------------------------


def test_a_peer_with_the_push_token_raises_the_epoch() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await bob.push([row(epoch=9)], tokens=(TOKEN,))
        await alice.answered(1)
        await alice.step(row(1, 1))
        assert (len(alice.outputs), alice.failures[0].error) == (1, StaleEpoch.code)

    with_clients(scenario)


def test_the_push_token_lets_another_peer_push_and_the_client_is_answered() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await bob.push([row(0, 0, 3)], tokens=(TOKEN,))
        await alice.answered(1)
        assert alice.tensor().equal(expected(WHOLE, states(3)))
        await bob.push([row(5, 99, 3)], tokens=(TOKEN,))
        await alice.answered(2)
        assert alice.failures[0].error == OutOfOrder.code
        assert bob.num_answered == 0

    with_clients(scenario)


@pytest.mark.parametrize("tokens", [(), (b"",), (b"q" * 16,), (TOKEN + b"x",), (TOKEN, TOKEN)])
def test_a_wrong_push_token_does_nothing_and_only_its_sender_hears_of_it(
    tokens: tuple[bytes, ...],
) -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await bob.push([row()], tokens=tokens)
        await bob.answered(1)
        assert bob.failures[0].error in (Forbidden.code, BadRequest.code)
        assert alice.num_answered == 0
        assert server.server.worker.tokens_computed == 0

    with_clients(scenario)


def test_without_a_push_token_only_the_client_pushes() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(push_token=b"")
        await bob.push([row()], tokens=(b"",))
        await bob.answered(1)
        assert bob.failures[0].error == Forbidden.code
        await alice.step(row())
        assert len(alice.outputs) == 1

    with_clients(scenario)


def test_rows_of_two_clients_in_one_message_are_answered_to_each_its_own() -> None:
    """A peer that holds both tokens mixes them; nobody is sent the other's states."""

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await bob.open(TWO)
        rows = [row(0, 0, 2), of(2, row(0, 0, 3))]
        await alice.push(rows, torch.cat([states(2), states(3)]), tokens=(TOKEN, TOKEN))
        await alice.answered(1)
        await bob.answered(1)
        assert [r.session for output in alice.outputs for r in output.rows] == [ONE]
        assert [r.session for output in bob.outputs for r in output.rows] == [TWO]
        assert bob.tensor().equal(expected(WHOLE, states(3)))

    with_clients(scenario)


# --- steps in order ----------------------------------------------------------------------------


def test_a_repeated_step_is_answered_again_and_computed_once() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.push([row(0, 0, 4)])
        await alice.push([row(0, 0, 4)])
        await alice.answered(1)
        await alice.step(row(0, 0, 4))
        assert server.server.worker.tokens_computed == 4
        assert alice.tensor(0).equal(alice.tensor(-1))
        await alice.step(row(1, 4, 1, acked=0))
        await alice.step(row(0, 0, 4))  # acknowledged: not kept any more
        assert alice.failures[-1].error == OutOfOrder.code
        assert server.server.worker.tokens_computed == 5

    with_clients(scenario, device_s=SLOW_S)


def test_a_position_before_the_end_truncates() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 6))
        await alice.step(row(1, 2, 3), hidden=states(3, start=50))
        hidden = torch.cat([states(2), states(3, start=50)])
        assert alice.tensor().equal(expected(WHOLE, hidden)[2:])
        assert length(server) == 5

    with_clients(scenario)


def test_a_position_past_the_end_is_out_of_order_and_says_what_is_expected() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 3))
        started = asyncio.get_running_loop().time()
        await alice.step(row(1, 4, 1))
        assert asyncio.get_running_loop().time() - started < 0.1, "it is not early, but wrong"
        assert alice.failures[0].error == OutOfOrder.code
        assert alice.failures[0].expected == 3
        await alice.step(row(2, 3, 1))  # a number is left out
        assert alice.failures[1].error == OutOfOrder.code
        await alice.step(row(1, 3, 1))
        assert len(alice.outputs) == 2

    with_clients(scenario)


def test_more_tokens_than_reserved_are_refused() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=64)
        await alice.step(row(0, 0, 65))
        assert alice.failures[0].error == BadRequest.code
        await alice.step(row(0, 0, 64))
        await alice.step(row(1, 64, 1))
        assert alice.failures[1].error == BadRequest.code
        assert len(alice.outputs) == 1

    with_clients(scenario)


def test_more_steps_than_the_window_are_busy() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        rows = [row(step, step) for step in range(WINDOW + 4)]
        await alice.step(*rows)  # in one message
        errors = {r.step: failed.error for failed in alice.failures for r in failed.rows}
        first = WINDOW  # and what follows the first one is out of order then
        assert errors == {first: Busy.code} | dict.fromkeys(
            range(first + 1, first + 4), OutOfOrder.code
        )
        assert sum(len(output.rows) for output in alice.outputs) == WINDOW

    with_clients(scenario, device_s=SLOW_S)


def test_a_session_twice_in_one_step_goes_in_order() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 2), row(1, 2, 3), row(2, 5, 1), hidden=states(6))
        found = {r.step: alice.tensor(i) for i, out in enumerate(alice.outputs) for r in out.rows}
        assert torch.cat([found[0], found[1], found[2]]).equal(expected(WHOLE, states(6)))

    with_clients(scenario)


def test_the_same_row_twice_in_one_step_is_computed_once() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.push([row(0, 0, 2), row(0, 0, 2)], torch.cat([states(2), states(2)]))
        await alice.answered(1)
        assert server.server.worker.tokens_computed == 2

    with_clients(scenario, device_s=SLOW_S)


def test_an_unknown_session_is_said_to_be_unknown() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.step(row())
        assert alice.failures[0].error == SessionUnknown.code
        assert await alice.ask(Close((ONE, TWO), 0)) == Ack()
        with pytest.raises(SessionUnknown):
            await alice.ask(Fork(ONE, 0, TWO, 0))

    with_clients(scenario)


def test_a_thousand_rows_in_a_step_are_all_answered() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        for number in range(60):
            await alice.open(session_id(number + 1))
        rows = [of(number + 1, row()) for number in range(1000)]  # most of them unknown
        await alice.step(*rows)
        assert sum(len(output.rows) for output in alice.outputs) == 60
        refused = [r for failed in alice.failures for r in failed.rows]
        assert len(refused) == 940
        assert len(alice.failures) == 2

    with_clients(scenario)


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, WIDTH), (3, WIDTH), (2, WIDTH + 1), (2 * WIDTH,), (1, 2, WIDTH)]
)
def test_a_tensor_of_a_wrong_shape_is_a_bad_request(shape: tuple[int, ...]) -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 2), hidden=torch.zeros(shape))
        assert alice.failures[0].error == BadRequest.code
        await alice.step(row(0, 0, 2))
        assert len(alice.outputs) == 1

    with_clients(scenario)


def test_a_step_without_rows_is_ignored() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.push([], states(1))
        await alice.step(row())
        assert len(alice.outputs) == 1
        assert not alice.failures

    with_clients(scenario)


def test_a_step_of_more_tokens_than_a_session_has_is_a_bad_request() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(), of(7, row(0, 0, 512)))
        assert [failed.error for failed in alice.failures] == [BadRequest.code]
        assert server.server.worker.tokens_computed == 0

    with_clients(scenario, replace(LAB_SERVER, max_tokens_per_session=512))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_row_does_not_hurt_the_others_of_its_batch(poison: float) -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        for number in (1, 2, 3):
            await alice.open(session_id(number))
        await bob.open(session_id(4), max_tokens=512)
        await bob.push([of(4, row(0, 0, 500))], states(500))  # keeps the device busy meanwhile
        hidden = torch.cat([states(1), states(1), states(1)])
        hidden[1, 3] = poison
        await alice.push([row(), of(2, row()), of(3, row())], hidden)
        await alice.answered(3)
        assert [r.session for failed in alice.failures for r in failed.rows] == [TWO]
        assert alice.failures[0].error == BadRequest.code
        assert alice.outputs[0].rows == (row(), of(3, row())), "all were in one batch"
        assert alice.tensor().equal(expected(WHOLE, states(1)).repeat(2, 1))
        await alice.step(of(2, row()))
        assert alice.tensor().equal(expected(WHOLE, states(1)))
        await bob.answered(1)
        assert bob.tensor().equal(expected(WHOLE, states(500)))

    with_clients(scenario, replace(LAB_SERVER, cache_tokens=8192), device_s=SLOW_S)


def test_poison_in_a_later_chunk_ends_the_prompt_and_what_follows_it() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=700)
        hidden = states(600)
        hidden[300, 0] = float("nan")
        await alice.push([row(0, 0, 600)], hidden)
        await alice.push([row(1, 600, 1)])
        await alice.answered(2)
        assert [r.step for failed in alice.failures for r in failed.rows] == [0, 1]
        assert length(server) == 0
        await alice.step(row(0, 0, 600))
        assert alice.tensor().equal(expected(WHOLE, states(600)))

    with_clients(scenario, device_s=SLOW_S)


def test_what_cannot_be_decoded_is_a_bad_request_for_each_of_its_rows() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.open(TWO)
        header = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, (2, WIDTH))
        await alice.step(row(), of(2, row()), hidden=WireTensor(header, b"no zstd frame"))
        assert {failed.error for failed in alice.failures} == {BadRequest.code}
        await alice.step(row(), of(2, row()))
        assert len(alice.outputs) == 1

    with_clients(scenario)


def test_other_codecs_and_types_are_taken() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        coded = encode_tensor(states(4).half(), TensorCodec.INT8)
        await alice.step(row(0, 0, 4), hidden=coded)
        assert len(alice.outputs) == 1

    with_clients(scenario)


# --- forks -------------------------------------------------------------------------------------


def test_a_fork_goes_on_by_itself() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 5))
        opened = await alice.ask(Fork(ONE, 0, TWO, 3))
        assert isinstance(opened, Opened)
        assert opened.position == 3
        await alice.step(row(1, 5, 2), hidden=states(2, start=90))
        await alice.step(of(2, row(7, 3, 2)))
        assert alice.tensor().equal(expected(WHOLE, states(5))[3:])

    with_clients(scenario)


def test_a_running_session_is_not_forked_and_nothing_is_reserved() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=2000)
        await alice.push([row(0, 0, 2000)])
        with pytest.raises(Busy):
            await alice.ask(Fork(ONE, 0, TWO, 0))
        await alice.answered(1)
        for position, new in ((2001, TWO), (0, ONE)):
            with pytest.raises(BadRequest):
                await alice.ask(Fork(ONE, 0, new, position))
        assert len(server.server.service.sessions) == 1

    with_clients(scenario, device_s=SLOW_S)


def test_a_fork_that_nobody_waits_for_is_undone() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 5))
        with pytest.raises(DeadlineExceeded):  # copying takes a turn of the device
            await alice.ask(Fork(ONE, 0, TWO, 3), timeout_s=0.03)
        await asyncio.sleep(1.0)
        assert [session.id for session in server.server.service.sessions] == [ONE]

    with_clients(scenario, device_s=SLOW_S)


def test_a_fork_without_room_is_refused_and_changes_nothing() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=3 * PAGE_TOKENS)
        with pytest.raises(CacheFull):
            await alice.ask(Fork(ONE, 0, TWO, 0))
        assert len(server.server.service.sessions) == 1

    with_clients(scenario, replace(LAB_SERVER, cache_tokens=4 * PAGE_TOKENS))


# --- bounds ------------------------------------------------------------------------------------


def test_too_many_sessions_are_busy() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(ONE)
        await bob.open(TWO)
        with pytest.raises(Busy):
            await alice.open(THREE)
        await bob.ask(Close((TWO,), 0))
        await alice.open(THREE)

    with_clients(scenario, replace(LAB_SERVER, max_sessions=2))


def test_a_full_queue_is_busy_for_who_filled_it_and_nobody_else() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await bob.open(TWO)
        for number in range(10, 20):
            await alice.open(session_id(number))
        await together(alice.push([of(number, row(0, 0, 64))]) for number in range(10, 20))
        await bob.step(of(2, row(0, 0, 5)))
        await alice.answered(10)
        assert len(bob.outputs) == 1
        refused = [r for failed in alice.failures for r in failed.rows]
        assert refused
        assert {failed.error for failed in alice.failures} == {Busy.code}
        for again in refused:
            await alice.step(again)
        assert sum(len(output.rows) for output in alice.outputs) == 10

    with_clients(scenario, replace(LAB_SERVER, max_queue_steps=16), device_s=SLOW_S)


def test_a_row_that_found_the_queue_full_leaves_the_sessions_earlier_rows_in_it() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=640)
        await together(alice.push([row(step, 64 * step, 64)]) for step in range(8))
        await alice.answered(8)
        done = [r.step for output in alice.outputs for r in output.rows]
        assert done == list(range(len(done)))
        assert 1 < len(done) < 8
        session = server.server.service.sessions.get(ONE)
        assert session is not None
        assert not session.running
        assert session.length == 64 * len(done)
        await alice.step(row(len(done), session.length, 64))
        assert alice.tensor().equal(expected(WHOLE, states(session.length))[-64:])

    with_clients(scenario, replace(LAB_SERVER, max_queue_steps=16), device_s=SLOW_S)


def test_a_first_message_larger_than_a_share_of_the_queue_is_taken() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        numbers = range(1, 31)
        for number in numbers:
            await alice.open(session_id(number))
        await alice.step(*(of(number, row()) for number in numbers))
        assert sum(len(output.rows) for output in alice.outputs) == 30

    with_clients(scenario, replace(LAB_SERVER, max_queue_steps=32))


def test_bytes_that_wait_are_bounded_for_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_WAITING_BYTES_PER_CLIENT", 64 * WIDTH * 4)

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await bob.open(TWO)
        for number in range(10, 16):
            await alice.open(session_id(number), max_tokens=128)
        for number in range(10, 16):
            await alice.push([of(number, row(0, 0, 100))])
            held = server.server.worker._held_bytes
            assert held.total() <= 100 * WIDTH * 4, "one message of any size, and no second one"
        await bob.step(of(2, row()))
        await alice.answered(6)
        assert Busy.code in {failed.error for failed in alice.failures}
        assert len(bob.outputs) == 1

    with_clients(scenario, device_s=SLOW_S)


def test_kept_outputs_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 10 * WIDTH * 4
    monkeypatch.setattr(sessions, "MAX_KEPT_BYTES", limit)

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        for number in range(1, 5):
            await alice.open(session_id(number))
        for step in range(4):
            for number in range(1, 5):
                await alice.step(of(number, row(step, 4 * step, 4)))
                assert server.server.service.sessions._kept_bytes <= limit
        await alice.step(of(1, row(0, 0, 4)))
        assert alice.failures[-1].error == OutOfOrder.code
        await alice.step(of(4, row(3, 12, 4)))
        assert alice.outputs[-1].rows == (of(4, row(3, 12, 4)),)

    with_clients(scenario)


def test_a_client_that_cannot_be_reached_costs_bounded_memory_and_hurts_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "MAX_UNSENT_BYTES", 4 * WIDTH * 4)

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        on_their_way: list[OnEnd] = []

        def post_to(peer: PeerId, message: Message, on_end: OnEnd, **options: object) -> None:
            if peer == alice.peer_id:
                on_their_way.append(on_end)
            else:
                post(peer, message, on_end, **options)  # type: ignore[arg-type]

        endpoint = server.server.node.endpoint
        post = endpoint.post
        monkeypatch.setattr(endpoint, "post", post_to)
        await alice.open()
        await bob.open(TWO)
        for step in range(10):
            await alice.push([row(step, step)])
            await bob.step(of(2, row(step, step)))
        unsent = server.server.service._outbox
        assert unsent._unsent_bytes[alice.peer_id] <= 4 * WIDTH * 4
        assert unsent._unsent[alice.peer_id] == 4
        assert len(bob.outputs) == 10
        for on_end in on_their_way:
            on_end(PeerUnreachable("gone"))

    with_clients(scenario)


# --- pages, quota and waiting ------------------------------------------------------------------


FOUR_PAGES = replace(LAB_SERVER, cache_tokens=4 * PAGE_TOKENS)


def test_a_full_cache_says_when_to_come_back() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=4 * PAGE_TOKENS)
        with pytest.raises(CacheFull) as refusal:
            await bob.open(TWO)
        assert 0 < refusal.value.retry_after_s <= 10

    with_clients(scenario, FOUR_PAGES)


def test_one_peer_may_have_all_pages_while_nobody_waits_and_a_quarter_otherwise() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        for number in range(1, 5):
            await alice.open(session_id(number))
        waiting = asyncio.ensure_future(bob.open(session_id(9), wait_s=30.0))
        await asyncio.sleep(0.1)
        await alice.ask(Close((ONE,), 0))
        with pytest.raises(CacheFull):  # the page is bob's
            await alice.open(session_id(5))
        assert isinstance(await waiting, Opened)

    with_clients(scenario, FOUR_PAGES)


def test_who_is_over_quota_waits_behind_who_is_not() -> None:
    order: list[str] = []

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        async def wait(name: str, client: RawClient, number: int) -> None:
            await client.open(session_id(number), wait_s=30.0)
            order.append(name)

        for number in range(1, 5):
            await alice.open(session_id(number))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(wait("alice", alice, 5))
            await asyncio.sleep(0.1)
            tasks.create_task(wait("bob", bob, 6))
            await asyncio.sleep(0.1)
            await alice.ask(Close((ONE,), 0))
            await asyncio.sleep(0.1)
            assert order == ["bob"]
            await alice.ask(Close((TWO,), 0))
        assert order == ["bob", "alice"]

    with_clients(scenario, FOUR_PAGES)


def test_a_take_over_for_more_pages_waits_in_line_as_well() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        for number in (1, 2, 3):
            await alice.open(session_id(number), max_tokens=2 * PAGE_TOKENS)
        waiting = asyncio.ensure_future(bob.open(session_id(9), max_tokens=192, wait_s=30.0))
        await asyncio.sleep(0.1)
        with pytest.raises(CacheFull):
            await alice.open(ONE, epoch=1, max_tokens=3 * PAGE_TOKENS)
        await alice.open(TWO, epoch=1, max_tokens=2 * PAGE_TOKENS)  # needs no more
        await alice.ask(Close((THREE,), 0))
        await waiting

    with_clients(scenario, replace(LAB_SERVER, cache_tokens=8 * PAGE_TOKENS))


def test_an_idle_peer_over_quota_gives_way_to_who_waits() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        for number in range(1, 5):
            await alice.open(session_id(number))
        started = asyncio.get_running_loop().time()
        await bob.open(session_id(9), wait_s=30.0)
        assert asyncio.get_running_loop().time() - started < 8.0
        await alice.step(row(0, 0, 1))
        assert alice.failures[-1].error == SessionUnknown.code

    with_clients(scenario, FOUR_PAGES)


def test_under_pressure_the_longest_idle_session_goes_whoever_has_it() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        loop = asyncio.get_running_loop()
        await alice.open(ONE, max_tokens=2 * PAGE_TOKENS)
        await asyncio.sleep(3.0)
        await alice.open(TWO, max_tokens=2 * PAGE_TOKENS)
        started = loop.time()
        await bob.open(THREE, wait_s=30.0)
        assert EVICT_IDLE_S - 3.0 <= loop.time() - started <= EVICT_IDLE_S - 1.0
        assert {session.id for session in server.server.service.sessions} == {TWO, THREE}
        await alice.step(row())
        assert alice.failures[0].error == SessionUnknown.code
        await alice.open(ONE, epoch=1)  # its client builds it again
        await alice.step(row(0, 0, 4, epoch=1))
        assert alice.tensor().equal(expected(WHOLE, states(4)))

    with_clients(scenario, replace(FOUR_PAGES, max_tokens_per_peer=4 * PAGE_TOKENS))


def test_sessions_that_are_used_are_not_evicted() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=4 * PAGE_TOKENS)
        waiting = asyncio.ensure_future(bob.open(TWO, wait_s=40.0))
        for step in range(15):
            await asyncio.sleep(EVICT_IDLE_S / 4)
            await alice.step(row(step, step))
        assert not alice.failures
        with pytest.raises(CacheFull):
            await waiting

    settings = replace(FOUR_PAGES, max_tokens_per_peer=4 * PAGE_TOKENS)
    with_clients(scenario, settings)


def test_nobody_is_evicted_for_one_who_would_hold_more_than_a_share() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=2 * PAGE_TOKENS)
        await bob.open(TWO, max_tokens=PAGE_TOKENS)
        with pytest.raises(CacheFull):
            await bob.open(THREE, max_tokens=3 * PAGE_TOKENS, wait_s=30.0)
        assert server.server.service.sessions.get(ONE) is not None
        await bob.open(THREE, max_tokens=2 * PAGE_TOKENS, wait_s=30.0)  # with its own pages
        assert {session.id for session in server.server.service.sessions} == {ONE, THREE}

    with_clients(scenario, replace(FOUR_PAGES, max_tokens_per_peer=2 * PAGE_TOKENS))


def test_a_client_that_comes_back_within_the_lease_finds_its_session() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open()
        await alice.step(row(0, 0, 5))
        await asyncio.sleep(LAB_SERVER.lease_s - 1.0)
        await alice.step(row(1, 5, 1))
        assert alice.tensor().equal(expected(WHOLE, states(6))[5:])

    with_clients(scenario)


def test_two_peers_over_quota_do_not_block_each_other() -> None:
    """Four of twelve pages are free, both have more than a quarter, and want two."""

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(ONE, max_tokens=4 * PAGE_TOKENS)
        await bob.open(TWO, max_tokens=4 * PAGE_TOKENS)
        await bob.open(THREE, max_tokens=4 * PAGE_TOKENS)
        started = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as tasks:
            for client, number in ((alice, 4), (bob, 5)):
                opening = client.open(session_id(number), max_tokens=128, wait_s=30.0)
                tasks.create_task(opening)
            await asyncio.sleep(0.1)
            await bob.ask(Close((THREE,), 0))
        assert asyncio.get_running_loop().time() - started < 1.0

    with_clients(scenario, replace(LAB_SERVER, cache_tokens=12 * PAGE_TOKENS))


def test_when_the_first_in_line_gives_up_the_next_one_is_served_at_once() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        loop = asyncio.get_running_loop()
        await alice.open(ONE, max_tokens=3 * PAGE_TOKENS)
        started = loop.time()
        impatient = asyncio.ensure_future(bob.open(TWO, max_tokens=2 * PAGE_TOKENS, wait_s=2.0))
        await asyncio.sleep(0.1)
        await alice.open(THREE, wait_s=30.0)
        assert loop.time() - started == pytest.approx(2.0, abs=0.1)
        with pytest.raises(CacheFull):
            await impatient

    with_clients(scenario, replace(FOUR_PAGES, max_tokens_per_peer=2 * PAGE_TOKENS))


def test_waiting_opens_are_served_in_their_order_and_nobody_slips_in() -> None:
    order: list[int] = []

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        async def wait(number: int) -> None:
            await bob.open(session_id(number), max_tokens=128, wait_s=30.0)
            order.append(number)

        await alice.open(ONE, max_tokens=256)
        await alice.open(TWO, max_tokens=256)
        async with asyncio.TaskGroup() as tasks:
            for number in (11, 12, 13, 14):
                tasks.create_task(wait(number))
                await asyncio.sleep(0.05)
            await alice.ask(Close((ONE,), 0))
            await asyncio.sleep(0.1)
            assert order == [11, 12]
            with pytest.raises(CacheFull):
                await alice.open(THREE)
            await alice.ask(Close((TWO,), 0))
        assert order == [11, 12, 13, 14]

    settings = replace(LAB_SERVER, cache_tokens=512, max_tokens_per_peer=512)
    with_clients(scenario, settings)


def test_a_waiting_open_ends_with_its_deadline() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=256)
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(CacheFull):
            await bob.open(TWO, wait_s=5.0)
        assert loop.time() - started == pytest.approx(5.0, abs=0.1)
        assert not server.server.service._admission

    with_clients(scenario, FOUR_PAGES)


def test_an_open_that_is_cancelled_while_it_waits_leaves_nothing() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=256)
        waiting = asyncio.ensure_future(bob.open(TWO, wait_s=30.0))
        await asyncio.sleep(0.5)
        assert len(server.server.service._admission) == 1
        waiting.cancel()
        await asyncio.sleep(0.5)
        assert not server.server.service._admission
        await alice.ask(Close((ONE,), 0))
        await asyncio.sleep(0.5)
        assert server.num_free_pages == server.num_pages

    with_clients(scenario, FOUR_PAGES)


def test_one_session_opened_twice_at_once_is_one_session() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await bob.open(TWO, max_tokens=256)
        both = [asyncio.ensure_future(alice.open(wait_s=30.0)) for _ in range(2)]
        await asyncio.sleep(0.5)
        await bob.ask(Close((TWO,), 0))
        await asyncio.gather(*both)
        assert len(server.server.service.sessions) == 1
        assert server.num_free_pages == 3

    with_clients(scenario, FOUR_PAGES)


def test_the_line_for_pages_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING_PER_PEER", 3)

    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=256)
        waiting = [
            asyncio.ensure_future(bob.open(session_id(10 + n), wait_s=5.0)) for n in range(5)
        ]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        kinds = [type(result) for result in results]
        assert kinds == [CacheFull, CacheFull, CacheFull, Busy, Busy]

    with_clients(scenario, FOUR_PAGES)


# --- leases and lost clients -------------------------------------------------------------------


def test_an_unused_session_ends_with_its_lease_and_a_used_one_does_not() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(ONE)
        await bob.open(TWO)
        for step in range(4):
            await asyncio.sleep(LAB_SERVER.lease_s / 2)
            await alice.step(row(step, step))
        assert [session.id for session in server.server.service.sessions] == [ONE]
        await bob.step(of(2, row()))
        assert bob.failures[0].error == SessionUnknown.code

    with_clients(scenario)


def test_a_stranger_does_not_keep_a_session_alive() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(ONE)
        for step in range(5):
            await bob.push([row(step, step)], tokens=(b"wrong",))
            await asyncio.sleep(LAB_SERVER.lease_s / 3)
        assert len(server.server.service.sessions) == 0

    with_clients(scenario)


def test_closing_one_foreign_session_among_others_closes_the_others() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(ONE)
        await bob.open(TWO)
        await alice.open(THREE)
        with pytest.raises(Forbidden):
            await alice.ask(Close((ONE, TWO, THREE), 0))
        assert [session.id for session in server.server.service.sessions] == [TWO]

    with_clients(scenario)


def test_closing_while_a_step_is_computed_frees_the_pages_at_once() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=1500)
        await alice.push([row(0, 0, 1500)])
        await alice.ask(Close((ONE,), 0))
        assert server.num_free_pages == server.num_pages
        await bob.open(TWO, max_tokens=1500)
        await bob.step(of(2, row(0, 0, 1500)), hidden=states(1500, start=7))
        assert bob.tensor().equal(expected(WHOLE, states(1500, start=7)))
        assert alice.num_answered == 0

    with_clients(scenario, device_s=SLOW_S)


def test_a_client_that_vanishes_during_a_step_is_forgotten_with_its_lease() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            server = await swarm.add_server(WHOLE, device_s=SLOW_S)
            async with raw_client(swarm, server) as alice:
                await alice.open(max_tokens=1500)
                await alice.push([row(0, 0, 1500)])
            await asyncio.sleep(LAB_SERVER.lease_s + 20)
            assert_nothing_left(server)

    run(main())


def test_a_step_whose_time_is_over_before_its_turn_is_not_computed() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await bob.open(TWO, max_tokens=2048)
        await alice.open(ONE, max_tokens=300)
        await bob.push([of(2, row(0, 0, 2048))])
        await alice.push([row(0, 0, 300)], budget_s=0.0005)
        await alice.answered(1)
        assert alice.failures[0].error == Busy.code
        assert length(server) == 0
        await bob.answered(1)
        assert server.server.worker.tokens_computed - 2048 <= 300

    with_clients(scenario, device_s=SLOW_S)


def test_an_answer_that_comes_too_late_for_the_asker_is_an_error_of_its_own() -> None:
    async def scenario(server: SimServer, alice: RawClient, bob: RawClient) -> None:
        await alice.open(max_tokens=256)
        with pytest.raises(DeadlineExceeded):
            await bob.ask(bob.opening(TWO, wait_s=30.0), timeout_s=2.0)
        await asyncio.sleep(0.5)
        assert not server.server.service._admission

    with_clients(scenario, FOUR_PAGES)

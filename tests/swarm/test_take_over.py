"""What a client needs of servers to replace a lost hop: take-overs, repeats, and who is refused."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from p2pllm.errors import BadRequest, Forbidden, OutOfOrder, StaleEpoch
from p2pllm.model.tensor_io import encode_tensor
from p2pllm.net.endpoint import Endpoint
from p2pllm.sim.fake_model import WIDTH
from p2pllm.sim.swarm import SimServer
from p2pllm.wire.messages import Close, Echo, Opened, Rewire, Row
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor
from tests.swarm.lab import FIRST, SLOW_S, WHOLE, Lab, computed, length, with_lab
from tests.swarm.raw_client import ONE, TWO, expected, states


def row(
    step: int, position: int, num_tokens: int = 1, *, epoch: int = 0, tail: int = 0, first: int = -1
) -> Row:
    return Row(ONE, epoch, step, position, num_tokens, tail=tail, first_step=first)


def assert_answered(lab: Lab, row: Row, stop: int, index: int = -1) -> None:
    """An output is of exactly this row, and right for a sequence of `stop` tokens."""
    assert lab.alice.outputs[index].rows == (row,)
    assert lab.alice.tensor(index).equal(expected(WHOLE, states(stop))[-row.num_outputs :])


# --- steps that are sent again -----------------------------------------------------------------


@pytest.mark.parametrize("is_silent", [False, True], ids=["process", "machine"])
def test_a_step_that_was_lost_with_the_next_hop_goes_on_to_its_replacement(is_silent: bool) -> None:
    async def use(lab: Lab) -> None:
        await lab.open_chain()
        await lab.alice.step(row(0, 0, 5))
        await asyncio.sleep(0.1)  # b has acknowledged it
        lab.kill(lab.b, is_silent=is_silent)
        started = asyncio.get_running_loop().time()
        await lab.alice.step(row(1, 5))
        took_s = asyncio.get_running_loop().time() - started
        assert lab.alice.failures[0].next_hop == lab.b.server.node.peer_id.key
        assert lab.alice.failures[0].rows == (row(1, 5),)
        assert took_s < (4.0 if is_silent else 0.2)
        await lab.replace_b(5)
        again = row(1, 5, epoch=1)
        await lab.alice.step(again)
        assert_answered(lab, again, 6)
        assert computed(lab.a) == 6, "the first hop has computed nothing twice"
        await lab.alice.step(row(2, 6, epoch=1))
        assert_answered(lab, row(2, 6, epoch=1), 7)

    with_lab(use)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 2 * SLOW_S], ids=["queued", "running", "kept"])
def test_a_step_that_comes_again_is_computed_once_and_leaves_by_the_new_way(after_s: float) -> None:
    async def use(lab: Lab) -> None:
        await lab.open_chain()
        await lab.open(lab.spare_b, epoch=1, generation=1)
        await lab.alice.push([row(0, 0, 5)])
        await asyncio.sleep(after_s)
        await lab.open(lab.a, lab.spare_b, epoch=1, generation=1)
        await lab.alice.step(row(0, 0, 5, epoch=1, tail=2))
        assert_answered(lab, row(0, 0, 5, epoch=1, tail=2), 5)
        await asyncio.sleep(1.0)
        assert len(lab.alice.outputs) == 1 + (after_s > SLOW_S), "the old way was open once"
        assert computed(lab.a) == 5
        assert computed(lab.spare_b) == 5

    with_lab(use, device_s=SLOW_S)


def test_a_step_that_comes_again_has_the_time_of_who_asked_last() -> None:
    async def use(lab: Lab) -> None:
        await lab.open(lab.a, session=TWO)
        await lab.open(lab.a)
        await lab.alice.push([Row(TWO, 0, 0, 0, 60)])  # keeps the device busy
        await lab.alice.push([row(0, 0, 3)], budget_s=0.01)
        await lab.alice.push([row(0, 0, 3, epoch=1)], budget_s=10.0)
        await lab.alice.answered(2)
        assert not lab.alice.failures
        assert lab.alice.outputs[-1].rows == (row(0, 0, 3, epoch=1),)

    with_lab(use, device_s=SLOW_S)


def test_a_kept_output_comes_back_to_the_client_as_it_asks_for_it() -> None:
    async def use(lab: Lab) -> None:
        await lab.open_chain()
        await lab.alice.step(row(0, 0, 5, tail=1))
        after_first = expected(FIRST, states(5))
        await lab.alice.ask(Rewire(ONE, 1))
        for tail, count in ((1, 1), (0, 5), (3, 3)):
            await lab.alice.step(row(0, 0, 5, epoch=1, tail=tail))
            assert lab.alice.tensor().equal(after_first[-count:])
        await lab.open(lab.b, epoch=1)
        await lab.at(lab.b).step(row(0, 0, 5, epoch=1, tail=2))
        assert [failed.error for failed in lab.alice.failures] == [OutOfOrder.code]
        assert computed(lab.b) == 5, "only one token of its output was asked for, and kept"

    with_lab(use)


def test_a_step_is_not_repeated_with_other_tokens() -> None:
    async def use(lab: Lab) -> None:
        await lab.open(lab.a)
        for pause_s in (0.0, 2 * SLOW_S):
            await lab.alice.push([row(0, 0, 5)])
            await asyncio.sleep(pause_s)
            await lab.alice.push([row(0, 0, 4, epoch=1)])
            await asyncio.sleep(1.0)
            assert lab.alice.failures[-1].error == BadRequest.code
            assert not lab.alice.failures[-1].is_input
        assert len(lab.alice.failures) == 2 + 1  # the second time epoch 0 is old as well

    with_lab(use, device_s=SLOW_S)


def test_a_failure_is_told_under_the_epoch_that_waits_for_it() -> None:
    async def use(lab: Lab) -> None:
        await lab.open(lab.a)
        hidden = states(3)
        hidden[1, 2] = torch.nan
        await lab.alice.push([row(0, 0, 3)], hidden)
        await lab.alice.push([row(1, 3)])
        await lab.alice.push([row(0, 0, 3, epoch=1)], hidden)
        await lab.alice.answered(2)
        (failed,) = lab.alice.failures
        assert failed.rows == (row(0, 0, 3, epoch=1), row(1, 3))
        assert (failed.error, failed.is_input) == (BadRequest.code, True)

    with_lab(use, device_s=SLOW_S)


# --- chunks of a prompt ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_chunks_that_are_sent_again_out_of_order_are_held_and_none_is_skipped(
    order: tuple[int, ...],
) -> None:
    """Also after a rollback, where each of them begins within what the hop has."""

    async def use(lab: Lab) -> None:
        await lab.open_chain()
        await lab.alice.step(row(0, 0, 60), hidden=states(60, start=7))
        await lab.replace_b(0)
        there = lab.at(lab.spare_b)
        replayed = expected(FIRST, states(60, start=7))
        await there.step(row(0, 0, 60, epoch=1), hidden=replayed)
        chunks = [row(4 + index, 10 * index, 10, epoch=2, first=4) for index in range(3)]
        for index in order:
            await lab.alice.push([chunks[index]])
        await lab.alice.answered(5)
        assert not lab.alice.failures
        outputs = {o.rows[0].step: lab.alice.tensor(i) for i, o in enumerate(lab.alice.outputs)}
        whole = torch.cat([outputs[4], outputs[5], outputs[6]])
        assert whole.equal(expected(WHOLE, states(30)))
        assert (length(lab.a), length(lab.spare_b)) == (30, 30)

    with_lab(use)


def test_chunks_that_some_hops_have_computed_go_on_from_where_each_hop_is() -> None:
    """b dies with chunks 1 and 2; a has computed them all, and repeats what it kept."""

    async def use(lab: Lab) -> None:
        await lab.open_chain()
        chunks = [row(step, 10 * step, 10) for step in range(3)]
        await lab.alice.step(chunks[0])
        await asyncio.sleep(0.1)  # b has acknowledged it
        lab.kill(lab.b)
        for chunk in chunks[1:]:
            await lab.alice.push([chunk])
        await lab.alice.answered(3)
        await lab.replace_b(10)
        again = [replace(chunk, epoch=2, first_step=1) for chunk in chunks[1:]]
        for chunk in reversed(again):
            await lab.alice.push([chunk])
        await lab.alice.answered(6)
        assert_answered(lab, again[1], 30)
        assert (computed(lab.a), computed(lab.spare_b)) == (30, 30)

    with_lab(use)


# --- who is refused ----------------------------------------------------------------------------


def test_rows_of_an_older_epoch_are_refused_and_do_no_harm() -> None:
    async def use(lab: Lab) -> None:
        await lab.open_chain()
        await lab.alice.step(row(0, 0, 5))
        await lab.open(lab.b, epoch=2, generation=2)
        there = lab.at(lab.b)
        late = row(1, 2, 4)  # it would roll back
        await there.push([late])
        await lab.alice.answered(2)
        assert lab.alice.failures[0].error == StaleEpoch.code
        assert lab.alice.failures[0].rows == (late,)
        assert length(lab.b) == 5
        again = row(1, 5, epoch=2)
        await there.step(again, hidden=expected(FIRST, states(6))[5:])
        assert_answered(lab, again, 6)

    with_lab(use)


@pytest.mark.parametrize("epoch", [0, 9])
def test_a_predecessor_that_was_stopped_and_wakes_up_does_no_harm(epoch: int) -> None:
    """It still has the old token; the epoch it may even have made up."""

    async def use(lab: Lab) -> None:
        await lab.open_chain()
        await lab.alice.step(row(0, 0, 5))
        endpoint = lab.a.server.node.endpoint
        wake = stop_sending(endpoint)
        await lab.alice.push([row(1, 5, epoch=epoch)])
        await asyncio.sleep(1.0)
        await lab.open(lab.spare_a, epoch=1, generation=1)
        there = lab.at(lab.spare_a)
        await there.step(row(0, 0, 5, epoch=1))
        await lab.open(lab.spare_a, lab.b, epoch=1, generation=1)
        await lab.open(lab.b, epoch=1, generation=1)
        wake()
        await asyncio.sleep(1.0)
        assert length(lab.b) == 5
        session = lab.b.server.service.sessions.get(ONE)
        assert session is not None
        assert session.epoch == 1
        (failed,) = lab.alice.failures  # a has told its client what b answered
        assert failed.error == Forbidden.code
        assert failed.next_hop == lab.b.server.node.peer_id.key
        await there.step(row(1, 5, epoch=1))
        assert_answered(lab, row(1, 5, epoch=1), 6)

    with_lab(use)


def test_what_a_hop_that_was_left_out_says_of_its_successor_is_not_passed_on() -> None:
    async def use(lab: Lab) -> None:
        await lab.open_chain()
        await lab.alice.step(row(0, 0, 5))
        held = lab.b.server.service.sessions.get(ONE)
        assert held is not None
        lab.b.server.service._close(held, held.client, held.epoch)
        endpoint = lab.b.server.node.endpoint
        wake = stop_sending(endpoint)
        await lab.alice.push([row(1, 5)])
        await asyncio.sleep(1.0)
        await lab.replace_b(5)
        await lab.alice.step(row(1, 5, epoch=1))
        wake()
        await asyncio.sleep(1.0)
        assert not lab.alice.failures

    with_lab(use)


# --- several sessions in one message -----------------------------------------------------------


def stop_sending(endpoint: Endpoint) -> Callable[[], None]:
    """Keep back what a server sends, until what is returned is called."""
    post, held = endpoint.post, list[partial[None]]()

    def keep(*args: object, **options: object) -> None:
        held.append(partial(post, *args, **options))  # type: ignore[arg-type]

    def wake() -> None:
        endpoint.post = post  # type: ignore[method-assign]
        for sending in held:
            sending()

    endpoint.post = keep  # type: ignore[method-assign]
    return wake


def both(step: int, position: int, num_tokens: int, epochs: tuple[int, int]) -> tuple[Row, Row]:
    one = row(step, position, num_tokens, epoch=epochs[0])
    return one, replace(one, session=TWO, epoch=epochs[1])


@pytest.mark.parametrize("codec", [TensorCodec.RAW, TensorCodec.INT8])
@pytest.mark.parametrize("is_running", [True, False])
def test_rows_of_one_message_part_where_their_ways_do(is_running: bool, codec: TensorCodec) -> None:
    """They were computed and coded together; then one of the sessions got another next hop."""

    async def use(lab: Lab) -> None:
        for session in (ONE, TWO):
            await lab.open_chain(session=session)
        for held in lab.a.server.service.sessions:
            held.request = replace(held.request, codec=codec)
        rows = both(0, 0, 3, (0, 0))
        if is_running:
            await lab.alice.push(rows)
            await asyncio.sleep(0.02)
        else:
            await lab.alice.step(*rows)
            lab.alice.outputs.clear()
        await lab.replace_b(0, session=TWO)
        again = both(0, 0, 3, (0, 1))
        if is_running:
            await lab.alice.push(again[1:], states(3))
        else:
            await lab.alice.push(again)
        await lab.alice.answered(2)
        await asyncio.sleep(1.0)
        assert not lab.alice.failures
        ways = sorted((output.rows for output in lab.alice.outputs), key=lambda rows: rows[0].epoch)
        assert ways == [again[:1], again[1:]]
        for index in range(2):
            assert lab.alice.tensor(index).equal(expected(WHOLE, states(3)))
        assert computed(lab.a) == 6
        assert (length(lab.b, TWO), length(lab.spare_b, TWO)) == (0 if is_running else 3, 3)

    with_lab(use, device_s=SLOW_S)


def test_only_the_rows_that_are_asked_for_again_are_sent_again() -> None:
    async def use(lab: Lab) -> None:
        for session in (ONE, TWO):
            await lab.open_chain(session=session)
        rows = both(0, 0, 3, (0, 0))
        await lab.alice.step(*rows)
        await lab.alice.step(rows[1])
        assert [output.rows for output in lab.alice.outputs] == [rows, rows[1:]]
        assert lab.alice.tensor().equal(expected(WHOLE, states(3)))

    with_lab(use)


@pytest.mark.parametrize("what", ["codec", "next_hop"])
def test_sessions_that_differ_in_how_they_go_on_do_not_share_a_message(what: str) -> None:
    async def use(lab: Lab) -> None:
        for session in (ONE, TWO):
            await lab.open_chain(session=session)
        second = lab.a.server.service.sessions.get(TWO)
        assert second is not None
        if what == "next_hop":
            await lab.alice.ask(Rewire(TWO, 0))
        else:
            second.request = replace(second.request, codec=TensorCodec.BF16)
        await lab.alice.push(both(0, 0, 3, (0, 0)))
        await lab.alice.answered(2)
        await asyncio.sleep(1.0)
        assert all(len(output.rows) == 1 for output in lab.alice.outputs)

    with_lab(use)


def test_sessions_that_differ_in_their_echo_only_share_the_message_to_the_next_hop() -> None:
    async def use(lab: Lab) -> None:
        for session in (ONE, TWO):
            await lab.open_chain(session=session)
        second = lab.a.server.service.sessions.get(TWO)
        assert second is not None
        second.request = replace(second.request, echo=Echo.ALL)
        rows = both(0, 0, 3, (0, 0))
        await lab.alice.push(rows)
        await lab.alice.answered(3)
        await asyncio.sleep(1.0)
        echoes = [output.rows for output in lab.alice.outputs if output.is_echo]
        assert echoes == [(rows[1],)]
        assert [output.rows for output in lab.alice.outputs if not output.is_echo] == [rows]

    with_lab(use)


# --- what a hop says ---------------------------------------------------------------------------


def test_an_echo_has_all_tokens_whatever_the_tail() -> None:
    async def use(lab: Lab) -> None:
        await lab.open_chain(echo=Echo.ALL)
        await lab.alice.push([row(0, 0, 5, tail=1)])
        await lab.alice.answered(2)
        (echo,) = [output for output in lab.alice.outputs if output.is_echo]
        assert echo.rows == (row(0, 0, 5, tail=1),)
        index = lab.alice.outputs.index(echo)
        assert lab.alice.tensor(index).equal(expected(FIRST, states(5)))
        assert lab.alice.tensor(1 - index).equal(expected(WHOLE, states(5))[-1:])

    with_lab(use)


def bad_inputs() -> list[object]:
    nan = states(2)
    nan[1, 1] = torch.nan
    zstd = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, (2, WIDTH))
    shape = encode_tensor(states(3), TensorCodec.RAW)
    return [nan, WireTensor(zstd, b"no zstd frame"), shape]


@pytest.mark.parametrize("hidden", bad_inputs(), ids=["nan", "zstd", "shape"])
def test_hidden_states_that_are_no_good_are_told_from_other_bad_requests(
    hidden: WireTensor,
) -> None:
    async def use(lab: Lab) -> None:
        await lab.open(lab.a)
        await lab.alice.step(row(0, 0, 2), hidden=hidden)
        await lab.alice.step(row(0, 0, 65))
        assert {failed.error for failed in lab.alice.failures} == {BadRequest.code}
        assert [failed.is_input for failed in lab.alice.failures] == [True, False]

    with_lab(use)


def test_a_take_over_says_which_step_is_next() -> None:
    async def use(lab: Lab) -> None:
        assert (await lab.open(lab.a)).next_step == 0
        await lab.alice.step(row(7, 0, 2))
        opened = await lab.open(lab.a, epoch=1)
        assert (opened.next_step, opened.position) == (8, 2)
        rewired = await lab.alice.ask(Rewire(ONE, 2))
        assert isinstance(rewired, Opened)
        assert rewired.next_step == 8

    with_lab(use)


def test_the_connection_to_the_next_hop_is_kept_as_long_as_a_session_uses_it() -> None:
    async def use(lab: Lab) -> None:
        def is_protected(server: SimServer) -> bool:
            return server.server.node.peer_id in lab.a.server.node.endpoint._protected

        await lab.open_chain()
        await lab.open_chain(session=TWO)
        assert is_protected(lab.b)
        await lab.open(lab.a, lab.spare_b, epoch=1)
        assert (is_protected(lab.b), is_protected(lab.spare_b)) == (True, True)
        await lab.alice.ask(Close((TWO,), 0))
        assert (is_protected(lab.b), is_protected(lab.spare_b)) == (False, True)
        await lab.alice.ask(Rewire(ONE, 1))
        assert not is_protected(lab.spare_b)

    with_lab(use)

"""Chains: all hops open or none, and steps that fail half way leave sequences that can go on."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest
import torch

from p2pllm.client.model import SwarmModel
from p2pllm.client.session import Chain, SessionState
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import BadRequest, Busy, CacheFull, OpenFailed, OutOfOrder, RemoteProtocolError
from p2pllm.ids import SessionId
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.sim.fake_model import WIDTH
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import LAB_SERVER, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.wire.messages import Output, Row
from p2pllm.wire.tensors import TensorCodec, WireTensor
from tests.swarm.raw_client import assert_nothing_left, expected, states

HALVES = (Span(0, 2), Span(2, 4))
WHOLE = Span(0, 4)
IS_CHAINED = True
Use = Callable[[Chain, list[SimServer], SwarmModel], Awaitable[None]]


@pytest.fixture(autouse=True, params=[True, False], ids=["chained", "relayed"])
def is_chained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test twice: servers that push to each other, and a client that relays."""
    chosen = bool(request.param)
    monkeypatch.setattr(sys.modules[__name__], "IS_CHAINED", chosen)
    return chosen


def with_chain(
    use: Use,
    settings: Sequence[ServerConfig] = (LAB_SERVER, LAB_SERVER),
    *,
    device_s: float = 0.001,
) -> None:
    """Run `use` with a chain over two servers; nothing may be left there at the end."""

    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            servers = [
                await swarm.add_server(span, each, device_s=device_s)
                for span, each in zip(HALVES, settings, strict=True)
            ]
            settings_of_client = ClientConfig(step_timeout_s=5.0, is_chained=IS_CHAINED)
            async with swarm.client(settings_of_client) as model:
                view = await model.view()
                chain = await model._chain(view, await model.route(prompt_tokens=8, new_tokens=8))
                await use(chain, servers, model)
                await asyncio.sleep(1.0)
                for server in servers:
                    assert_nothing_left(server)

    run(main())


def coded(num_tokens: int, start: int = 0) -> WireTensor:
    return encode_tensor(states(num_tokens, start=start), TensorCodec.RAW)


async def stepped(chain: Chain, state: SessionState, num_tokens: int) -> torch.Tensor:
    """Send the next made-up tokens of one sequence."""
    tensor = await chain.step([state], [num_tokens], coded(num_tokens, state.position), 0)
    return decode_tensor(tensor)


def test_a_chain_computes_what_the_whole_model_does() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        first, second = await stepped(chain, state, 5), await stepped(chain, state, 2)
        assert torch.cat([first, second]).equal(expected(WHOLE, states(7)))
        assert state.position == 7
        await chain.close([state])

    with_chain(use)


def test_a_tail_is_asked_of_the_last_hop_only() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        tensor = await chain.step([state], [6], coded(6), 2)
        assert decode_tensor(tensor).equal(expected(WHOLE, states(6))[-2:])
        await chain.close([state])

    with_chain(use)


@pytest.mark.parametrize("full", [0, 1])
def test_a_hop_that_refuses_closes_the_others(full: int) -> None:
    settings = [LAB_SERVER, LAB_SERVER]
    settings[full] = replace(LAB_SERVER, cache_tokens=PAGE_TOKENS)

    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (first,) = await chain.open([64])
        with pytest.raises(OpenFailed) as caught:
            await chain.open([64])
        assert list(caught.value.failures) == [chain.hops[full].peer]
        assert isinstance(caught.value.failures[chain.hops[full].peer], CacheFull)
        assert [server.num_pages - server.num_free_pages for server in servers] == [1, 1]
        await chain.close([first])

    with_chain(use, settings)


def test_several_sequences_open_all_or_none() -> None:
    settings = replace(LAB_SERVER, cache_tokens=3 * PAGE_TOKENS)

    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        with pytest.raises(OpenFailed):
            await chain.open([64] * 4)
        assert all(server.num_free_pages == server.num_pages for server in servers)
        opened = await chain.open([64] * 3)
        await chain.close(opened)

    with_chain(use, (settings, LAB_SERVER))


def test_opening_that_is_cancelled_closes_what_was_opened() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        held = await chain.open([4096])
        await chain.close(held)
        blocking = await chain.open([2048])
        second = replace(chain, hops=chain.hops[1:])
        blocking += await second.open([2048])  # the second hop is full, the first one is not
        opening = asyncio.ensure_future(chain.open([1024], wait_s=30.0))
        await asyncio.sleep(1.0)
        assert servers[0].num_free_pages == servers[0].num_pages - 48
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled()
        assert servers[0].num_free_pages == servers[0].num_pages - 32
        await chain.close(blocking)

    with_chain(use)


def test_a_fork_is_made_at_every_hop_or_at_none() -> None:
    settings = replace(LAB_SERVER, cache_tokens=PAGE_TOKENS)

    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        await stepped(chain, state, 3)
        with pytest.raises(OpenFailed):
            await chain.fork(state)
        assert [server.num_pages - server.num_free_pages for server in servers] == [1, 1]
        await chain.close([state])

    with_chain(use, (LAB_SERVER, settings))


def test_a_step_that_is_refused_leaves_the_sequence_where_it_was() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        await stepped(chain, state, 3)
        poisoned = states(2, start=3)
        poisoned[0, 0] = float("nan")
        with pytest.raises(BadRequest):
            await chain.step([state], [2], encode_tensor(poisoned, TensorCodec.RAW), 0)
        assert state.position == 3
        last = await stepped(chain, state, 4)
        assert last.equal(expected(WHOLE, states(7))[3:])
        await chain.close([state])

    with_chain(use)


@pytest.mark.parametrize("after_s", [0.001, 0.006, 0.014, 0.018, 0.025, 0.028])
def test_a_step_that_is_cancelled_anywhere_leaves_a_sequence_that_can_go_on(after_s: float) -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        await stepped(chain, state, 3)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(after_s):
                await chain.step([state], [2], coded(2, 40), 0)
        assert (state.position, state.epoch) == (3, 1)
        last = await stepped(chain, state, 4)
        assert last.equal(expected(WHOLE, states(7))[3:])
        fork = await chain.fork(state)
        assert (await stepped(chain, fork, 2)).equal(expected(WHOLE, states(9))[7:])
        await chain.close([state, fork])

    with_chain(use, device_s=0.007)


def test_a_busy_hop_is_asked_again() -> None:
    settings = replace(LAB_SERVER, max_queue_steps=8)  # two rows of one client

    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        opened = await chain.open([64] * 6)
        tensors = await asyncio.gather(*(stepped(chain, state, 20) for state in opened))
        assert all(tensor.equal(expected(WHOLE, states(20))) for tensor in tensors)
        await chain.close(opened)

    with_chain(use, (settings, settings), device_s=0.02)


def test_a_hop_that_stays_busy_ends_in_busy() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        async def busy(*_: object, **__: object) -> None:
            raise Busy("full", retry_after_s=2.0)

        (state,) = await chain.open([64])
        exchange, chain.exchange.step = chain.exchange.step, busy  # type: ignore[method-assign,assignment]
        with pytest.raises(Busy):
            await stepped(chain, state, 1)
        assert asyncio.get_running_loop().time() < 10
        chain.exchange.step = exchange  # type: ignore[method-assign]
        await chain.close([state])

    with_chain(use)


@pytest.mark.parametrize(
    "change",
    [
        lambda out: replace(out, tensor=coded(3)),
        lambda out: replace(out, tensor=encode_tensor(torch.ones(2, WIDTH + 1), TensorCodec.RAW)),
        lambda out: replace(out, tensor=encode_tensor(torch.ones(2 * WIDTH), TensorCodec.RAW)),
        lambda out: replace(out, rows=tuple(replace(row, num_tokens=3) for row in out.rows)),
        lambda out: replace(out, rows=tuple(replace(row, position=9) for row in out.rows)),
        lambda out: replace(out, rows=tuple(replace(row, tail=1) for row in out.rows)),
    ],
)
def test_an_answer_of_another_shape_is_a_protocol_error(change: Callable[[Output], Output]) -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        service = servers[1].server.service
        send = service._send
        service._send = lambda peer, out, priority: send(  # type: ignore[method-assign,assignment]
            peer, change(out) if isinstance(out, Output) else out, priority
        )
        (state,) = await chain.open([64])
        with pytest.raises(RemoteProtocolError):
            await chain.step([state], [2], coded(2), 0)
        await chain.close([state])

    with_chain(use)


def test_a_step_past_the_end_says_so() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        state.position = 5
        with pytest.raises(OutOfOrder):
            await stepped(chain, state, 1)
        await chain.close([state])

    with_chain(use)


def test_closing_nothing_asks_nobody() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        started = asyncio.get_running_loop().time()
        await chain.close([])
        assert asyncio.get_running_loop().time() == started

    with_chain(use)


def test_giving_up_goes_back_to_the_earliest_row_and_fences_it_off() -> None:
    state = SessionState(SessionId(b"1" * 16), 64)
    rows = [state.next_row(4, 0), state.next_row(4, 0), state.next_row(4, 0)]

    for row in (rows[1], rows[2]):
        state.give_up(row)

    assert (state.position, state.epoch, state.next_step) == (4, 1, 3)
    assert state.next_row(2, 0) == Row(state.id, 1, 3, 4, 2, -1, 0)

"""Chains: all hops open or none, and steps that fail half way leave sequences that can go on.

Nothing is repaired here, so that every failure is seen. What is done about them is in tests/swarm.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch

from p2pllm.client.generate import prefill
from p2pllm.client.model import SwarmModel
from p2pllm.client.session import Chain
from p2pllm.client.state import FIRST_STEP, SessionState
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import (
    BadRequest,
    Busy,
    CacheFull,
    ConnectionLost,
    OpenFailed,
    OutOfOrder,
    P2PLLMError,
    RemoteProtocolError,
    StepFailed,
)
from p2pllm.ids import PeerId
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.net.frames import Priority
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.sim.fake_model import WIDTH
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import LAB_SERVER, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.wire.messages import HopFailed, Output
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


@dataclass(eq=False)
class NoRepair:
    """Repairs nothing, and notes what it is asked."""

    failures: list[P2PLLMError] = field(default_factory=list)
    num_through: int = 0
    num_closed: int = 0

    async def repair(self, chain: Chain, failure: P2PLLMError) -> None:
        self.failures.append(failure)
        raise failure

    async def prepare_hedge(self, chain: Chain, index: int) -> None:
        await asyncio.get_running_loop().create_future()

    def on_leaving(self, chain: Chain, peer: PeerId, deadline_s: float) -> None:
        pass

    def on_progress(self, chain: Chain) -> None:
        self.num_through += 1

    def on_closed(self, chain: Chain) -> None:
        self.num_closed += 1


def with_chain(
    use: Use,
    settings: Sequence[ServerConfig] = (LAB_SERVER, LAB_SERVER),
    *,
    device_s: float = 0.001,
) -> None:
    """Run `use` with a chain over two servers; nothing may be left anywhere at the end."""

    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            servers = [
                await swarm.add_server(span, each, device_s=device_s)
                for span, each in zip(HALVES, settings, strict=True)
            ]
            await asyncio.sleep(1.0)  # their records spread
            settings_of_client = ClientConfig(step_timeout_s=5.0, is_chained=IS_CHAINED)
            async with swarm.client(settings_of_client) as model:
                view = await model.view()
                route = await model.route(prompt_tokens=8, new_tokens=8)
                chain = model._chain(await model.routes.hops(view, route))
                chain.repairer = NoRepair()
                await use(chain, servers, model)
                assert not chain.states
                assert not model._exchange._listeners
                assert not chain.store.memory_bytes
                await asyncio.sleep(1.0)
                for server in servers:
                    assert_nothing_left(server)

    run(main())


@contextmanager
def fails_with(cause: type[P2PLLMError], peer: PeerId | None = None) -> Iterator[None]:
    """What is inside fails as a step that a hop (that peer) did not carry out for this reason."""
    with pytest.raises(StepFailed) as caught:
        yield
    assert isinstance(caught.value.cause, cause)
    assert peer in (None, caught.value.peer)


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
        second = replace(chain, hops=chain.hops[1:], states={})
        blocking += await second.open([2048])  # the second hop is full, the first one is not
        opening = asyncio.ensure_future(chain.open([1024], wait_s=30.0))
        await asyncio.sleep(1.0)
        assert servers[0].num_free_pages == servers[0].num_pages - 48
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled()
        assert servers[0].num_free_pages == servers[0].num_pages - 32
        await chain.close(blocking[:1])
        await second.close(blocking[1:])

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


def test_a_fork_waits_for_hops_that_still_compute_what_was_given_up() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        await stepped(chain, state, 3)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await chain.step([state], [2], coded(2, 40), 0)
        fork = await chain.fork(state)
        assert (await stepped(chain, fork, 2)).equal(expected(WHOLE, states(5))[3:])
        await chain.close([state, fork])

    with_chain(use, device_s=0.2)


def test_a_fork_that_is_refused_for_good_is_a_failure() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        state.position = 9  # more than any hop has
        with pytest.raises(OpenFailed):
            await chain.fork(state)
        await chain.close([state])

    with_chain(use)


def test_a_step_that_is_refused_leaves_the_sequence_where_it_was() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        await stepped(chain, state, 3)
        poisoned = states(2, start=3)
        poisoned[0, 0] = float("nan")
        with fails_with(BadRequest, chain.hops[0].peer):
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


def test_a_hop_that_stays_busy_is_a_failure_when_the_steps_time_is_over() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        first = chain.hops[0].peer

        async def busy(*_: object, **__: object) -> None:
            raise StepFailed(first, Busy("full", retry_after_s=2.0))

        (state,) = await chain.open([64])
        step, chain.exchange.step = chain.exchange.step, busy  # type: ignore[method-assign,assignment]
        started = asyncio.get_running_loop().time()
        with fails_with(Busy, first):
            await stepped(chain, state, 1)
        assert asyncio.get_running_loop().time() - started == pytest.approx(4.0)
        chain.exchange.step = step  # type: ignore[method-assign]
        await chain.close([state])

    with_chain(use)


def changing_outputs(server: SimServer, change: Callable[[Output], Output]) -> None:
    """Let a server answer other things than it has computed."""
    outbox = server.server.service._outbox
    send = outbox.send

    def changed(client: PeerId, message: Output | HopFailed, priority: Priority) -> None:
        send(client, change(message) if isinstance(message, Output) else message, priority)

    outbox.send = changed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        lambda out: replace(out, tensor=coded(3)),
        lambda out: replace(out, tensor=coded(1)),
        lambda out: replace(out, tensor=encode_tensor(torch.ones(2, WIDTH + 1), TensorCodec.RAW)),
        lambda out: replace(out, tensor=encode_tensor(torch.ones(2 * WIDTH), TensorCodec.RAW)),
        lambda out: replace(
            out, tensor=encode_tensor(torch.full((2, WIDTH), float("nan")), TensorCodec.RAW)
        ),
        lambda out: replace(
            out, tensor=encode_tensor(torch.full((2, WIDTH), float("-inf")), TensorCodec.BF16)
        ),
        lambda out: replace(out, rows=tuple(replace(row, num_tokens=3) for row in out.rows)),
        lambda out: replace(out, rows=tuple(replace(row, position=9) for row in out.rows)),
        lambda out: replace(
            out, tensor=coded(1), rows=tuple(replace(row, tail=1) for row in out.rows)
        ),
    ],
    ids=["longer", "shorter", "wider", "flat", "nan", "infinity", "tokens", "position", "tail"],
)
def test_an_answer_that_is_none_is_the_fault_of_who_gave_it(
    change: Callable[[Output], Output],
) -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        changing_outputs(servers[1], change)
        (state,) = await chain.open([64])
        with fails_with(RemoteProtocolError, chain.hops[1].peer):
            await chain.step([state], [2], coded(2), 0)
        assert state.position == 0
        await chain.close([state])

    with_chain(use)


def test_an_answer_with_more_outputs_than_were_asked_for_is_cut() -> None:
    """A hop that was the last but one when it computed the step has made all of them."""
    whole: list[WireTensor] = []

    def change(out: Output) -> Output:
        rows = tuple(replace(row, tail=0) for row in out.rows)
        return replace(out, rows=rows, tensor=whole[0])

    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        whole.append(encode_tensor(expected(WHOLE, states(5)), TensorCodec.RAW))
        changing_outputs(servers[1], change)
        (state,) = await chain.open([64])
        tensor = await chain.step([state], [5], coded(5), 2)
        assert decode_tensor(tensor).equal(expected(WHOLE, states(5))[3:])
        await chain.close([state])

    with_chain(use)


def test_a_step_past_the_end_says_so() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        state.position = 5
        with fails_with(OutOfOrder, chain.hops[0].peer):
            await stepped(chain, state, 1)
        await chain.close([state])

    with_chain(use)


def test_closing_nothing_asks_nobody() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        started = asyncio.get_running_loop().time()
        await chain.close([])
        assert asyncio.get_running_loop().time() == started

    with_chain(use)


# --- journals ----------------------------------------------------------------------------------


def test_every_hops_inputs_are_in_the_journals_as_they_were_sent() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([64])
        for num_tokens in (5, 1, 1):
            await stepped(chain, state, num_tokens)
        await asyncio.sleep(0.1)  # echoes may come later than outputs
        kept = [decode_tensor(*journal.read(0, 7, 100)) for journal in state.journals]
        assert kept[0].equal(states(7))
        assert kept[1].equal(expected(HALVES[0], states(7)))
        fork = await chain.fork(state)
        state.rollback(2)
        assert [journal.known for journal in state.journals] == [2, 2]
        assert [journal.known for journal in fork.journals] == [7, 7]
        await chain.close([state, fork])

    with_chain(use)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_hop_that_passes_on_nonsense_is_the_one_that_failed(poison: float) -> None:
    """As its answer, or as its echo; the hop after it says the same of its input."""

    def change(out: Output) -> Output:
        hidden = torch.full(out.tensor.header.shape, poison)
        return replace(out, tensor=encode_tensor(hidden, TensorCodec.RAW))

    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        changing_outputs(servers[0], change)
        (state,) = await chain.open([64])
        servers[1].server.service._outbox.send = lambda *_: None  # type: ignore[method-assign]
        with fails_with(RemoteProtocolError, chain.hops[0].peer):
            await stepped(chain, state, 2)
        assert state.journals[1].known == 0
        await chain.close([state])

    with_chain(use)


# --- what is asked of the repairer -------------------------------------------------------------


def test_a_step_that_was_repaired_is_sent_again_under_its_old_number() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        repairer = Healing()
        chain.repairer = repairer
        (state,) = await chain.open([64])
        await stepped(chain, state, 3)
        with failing_once(chain):
            assert (await stepped(chain, state, 4)).equal(expected(WHOLE, states(7))[3:])
        assert [type(failure) for failure in repairer.failures] == [StepFailed]
        assert (state.position, state.next_step, chain.version) == (7, FIRST_STEP + 2, 1)
        assert repairer.num_through == 2
        assert [server.server.worker.tokens_computed for server in servers] == [7, 7]
        await chain.close([state])
        assert repairer.num_closed == 1

    with_chain(use)


def test_several_steps_that_fail_together_are_repaired_once() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        repairer = Healing(took_s=1.0)
        chain.repairer = repairer
        opened = await chain.open([64] * 3)
        with failing_once(chain, times=3):
            tensors = await asyncio.gather(*(stepped(chain, state, 4) for state in opened))
        assert all(tensor.equal(expected(WHOLE, states(4))) for tensor in tensors)
        assert (len(repairer.failures), chain.version) == (1, 1)
        await chain.close(opened)

    with_chain(use)


def test_what_cannot_be_repaired_is_told_to_all_that_wait_for_it() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        repairer = NoRepair()
        chain.repairer = repairer
        opened = await chain.open([64] * 3)
        with failing_once(chain, times=3):
            results = await asyncio.gather(
                *(stepped(chain, state, 4) for state in opened), return_exceptions=True
            )
        assert [type(result) for result in results] == [StepFailed] * 3
        assert len(repairer.failures) == 1
        assert [(state.position, state.epoch) for state in opened] == [(0, 1)] * 3
        assert (await stepped(chain, opened[0], 2)).equal(expected(WHOLE, states(2)))
        await chain.close(opened)

    with_chain(use)


@dataclass(eq=False)
class Healing(NoRepair):
    """Finds everything in order, after a while."""

    took_s: float = 0.0

    async def repair(self, chain: Chain, failure: P2PLLMError) -> None:
        self.failures.append(failure)
        await asyncio.sleep(self.took_s)


@contextmanager
def failing_once(chain: Chain, times: int = 1) -> Iterator[None]:
    """The next steps of a chain fail on the way to the first hop."""
    step, left = chain.exchange.step, times

    async def failing(hops: Sequence[PeerId], *args: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            await asyncio.sleep(0.01)
            raise StepFailed(hops[0], ConnectionLost("gone"))
        return await step(hops, *args, **options)  # type: ignore[arg-type]

    chain.exchange.step = failing  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        chain.exchange.step = step  # type: ignore[method-assign]


# --- prefixes that hops hold ----------------------------------------------------------------------

PROMPT = [(5 * number) % 250 for number in range(2 * PAGE_TOKENS + 10)]
SHARED = 2 * PAGE_TOKENS


async def fed(chain: Chain, model: SwarmModel, state: SessionState) -> None:
    """Send what a state lacks of the prompt."""
    rest = PROMPT[state.position :]
    tensor = await model.compute.embed(rest, chain.wire)
    await chain.step([state], [len(rest)], tensor, 1)


def test_a_sequence_begins_with_what_all_hops_hold_of_its_prompt() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (first,) = await chain.open([256], prompts=[PROMPT])
        assert (first.position, first.num_promised) == (0, SHARED)
        await fed(chain, model, first)
        (second, other) = await chain.open([256] * 2, prompts=[PROMPT, PROMPT[1:]])
        assert (second.position, other.position) == (SHARED, 0)
        held = [server.server.service.sessions.get(second.id) for server in servers]
        assert [session.length for session in held if session] == [SHARED, SHARED]
        await chain.close([first, second, other])

    with_chain(use)


def test_hops_are_asked_again_what_they_hold_before_the_first_step_only() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        late, first = await chain.open([256] * 2, prompts=[(), PROMPT])
        await fed(chain, model, first)

        await chain.share(late, PROMPT)
        assert late.position == SHARED
        await fed(chain, model, late)
        late.rollback(0)
        await chain.share(late, PROMPT)
        assert late.position == 0
        await chain.close([first, late])

    with_chain(use)


def test_a_hop_that_does_not_say_what_it_holds_is_no_failure() -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        late, first = await chain.open([256] * 2, prompts=[(), PROMPT])
        await fed(chain, model, first)
        service = servers[1].server.service
        service._config = replace(service._config, block=frozenset({str(model.endpoint.peer_id)}))

        await chain.share(late, PROMPT)

        assert late.position == 0
        await fed(chain, model, late)
        assert late.position == len(PROMPT)
        await chain.close([first, late])

    with_chain(use)


@pytest.mark.parametrize("claimed", [1, SHARED - 1, SHARED + 1, 2**31 - 1])
def test_a_hop_that_says_it_holds_what_was_not_asked_for_is_not_believed(claimed: int) -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (first,) = await chain.open([256], prompts=[PROMPT])
        await fed(chain, model, first)
        service = servers[1].server.service
        opened = service._opened
        service._opened = (  # type: ignore[method-assign]
            lambda *args: replace(opened(*args), position=claimed)
        )

        (second,) = await chain.open([256], prompts=[PROMPT])

        assert second.position == min(claimed, SHARED) // PAGE_TOKENS * PAGE_TOKENS
        await chain.close([first, second])

    with_chain(use)


@pytest.mark.parametrize("after_s", [0.001, 0.006, 0.012, 0.02])
def test_asking_what_hops_hold_may_be_cancelled_and_promises_nothing_then(after_s: float) -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (late,) = await chain.open([256])
        sharing = asyncio.ensure_future(chain.share(late, PROMPT))
        await asyncio.sleep(after_s)
        sharing.cancel()
        await asyncio.wait([sharing])
        late.break_promise()  # as who sends a prompt does, and fails

        assert (late.num_promised, late.epoch, late.position) == (0, 1, 0)
        assert decode_tensor(await chain.step([late], [5], coded(5), 0)).equal(
            expected(WHOLE, states(5))
        )
        await chain.close([late])

    with_chain(use)


def test_a_prompt_that_is_not_sent_to_its_end_was_not_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def use(chain: Chain, servers: list[SimServer], model: SwarmModel) -> None:
        (state,) = await chain.open([256], prompts=[PROMPT])

        async def broken(*_: object) -> WireTensor:
            raise RemoteProtocolError("no embedding today")

        monkeypatch.setattr(model.compute, "embed", broken)
        with pytest.raises(RemoteProtocolError):
            await prefill(chain, model.compute, state, PROMPT, tail=1, chunk_tokens=64)

        assert (state.num_promised, state.epoch) == (0, 1)
        await chain.close([state])

    with_chain(use)

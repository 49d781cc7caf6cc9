"""Generations that are cancelled, dropped or fail: whenever that happens, nothing stays behind."""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from p2pllm.client.generate import Progress
from p2pllm.client.model import Session, SwarmModel
from p2pllm.config import ClientConfig
from p2pllm.errors import ConfigError, LocalProtocolError
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import SimServer, SimSwarm
from p2pllm.spans import Span
from tests.swarm.raw_client import assert_nothing_left
from tests.swarm.turns import cancelled_after

HALVES = (Span(0, 2), Span(2, 4))
SETTINGS = ClientConfig(prefill_chunk_tokens=4, patience_s=5.0)
IS_CHAINED = True
CLEAN_UP_S = 3.0  # virtual: closing may take a hop's timeout
PROMPT = "some prompt"  # three chunks

Use = Callable[[SimSwarm, list[SimServer], SwarmModel], Awaitable[None]]


@pytest.fixture(autouse=True, params=[True, False], ids=["chained", "relayed"])
def is_chained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test twice: servers that push to each other, and a client that relays."""
    chosen = bool(request.param)
    monkeypatch.setattr(sys.modules[__name__], "IS_CHAINED", chosen)
    return chosen


def with_model(use: Use) -> None:
    """Run `use` with a client and two servers; nothing may be left at any of them."""

    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            servers = [await swarm.add_server(span) for span in HALVES]
            async with swarm.client(replace(SETTINGS, is_chained=IS_CHAINED)) as model:
                await use(swarm, servers, model)
                await asyncio.sleep(CLEAN_UP_S)
                assert_all_clean(servers, model)

    run(main())


def assert_all_clean(servers: list[SimServer], model: SwarmModel) -> None:
    for server in servers:
        assert_nothing_left(server)
    assert not model._exchange._waiters


def test_a_generation_that_is_cancelled_at_any_turn_of_the_loop_leaves_nothing() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        await model.generate(PROMPT, max_new_tokens=2).finish()  # dials, measures
        for num_steps in range(1, 10_000):
            work = model.generate_batch([PROMPT, "x"], max_new_tokens=2)
            was_running = await cancelled_after(num_steps, work)
            await asyncio.sleep(CLEAN_UP_S)
            assert_all_clean(servers, model)
            if not was_running:
                break
        assert num_steps > 50

    with_model(use)


def test_a_session_survives_a_generation_that_is_cancelled_at_any_turn() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        wanted = swarm.expected(PROMPT, 2)
        async with model.session(max_tokens=128) as session:
            for num_steps in range(1, 10_000):
                was_running = await cancelled_after(num_steps, ask(model, session, PROMPT))
                assert (
                    session.token_ids == list(PROMPT.encode() + bytes(wanted))[: session.position]
                )
                again = model.generate(PROMPT, session=session, max_new_tokens=2)
                (result,) = await again.finish()
                assert result.token_ids == wanted
                session.rollback(num_steps % 5)
                if not was_running:
                    break

    with_model(use)


async def ask(model: SwarmModel, session: Session, prompt: str) -> None:
    async with model.generate(prompt, session=session, max_new_tokens=2) as pieces:
        async for _ in pieces:
            pass


def test_a_step_by_hand_that_is_cancelled_at_any_turn_can_be_repeated() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        token_ids = list(PROMPT.encode())
        async with model.session(max_tokens=128) as session:
            logits = await session.step(token_ids)
            for num_steps in range(1, 10_000):
                session.rollback(2)
                if not await cancelled_after(num_steps, session.step(token_ids[2:])):
                    break
                assert session.position == len(session.token_ids) == 2
                again = await session.step(token_ids[2:])
                assert again.equal(logits[2:])

    with_model(use)


def test_a_generation_that_is_dropped_in_the_middle_frees_the_servers_at_once() -> None:
    """Without `aclose` and without waiting for the garbage collector to find a cycle."""

    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        gc.disable()
        try:
            async for _ in model.generate(PROMPT, max_new_tokens=20):
                break
            await asyncio.sleep(CLEAN_UP_S)
            assert_all_clean(servers, model)
        finally:
            gc.enable()

    with_model(use)


def test_an_error_in_the_users_loop_frees_the_servers_and_is_raised_as_it_is() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async def read() -> None:
            async with model.generate(PROMPT, max_new_tokens=20) as pieces:
                async for _ in pieces:
                    raise KeyError("mine")

        with pytest.raises(KeyError):
            await read()

    with_model(use)


def test_a_prompt_that_does_not_fit_the_session_is_refused_before_anything_is_sent() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=12) as session:
            with pytest.raises(ConfigError):
                await model.generate(PROMPT, session=session, max_new_tokens=2).finish()
            assert session.position == 0

    with_model(use)


def test_stepping_by_hand_past_the_end_fails_and_the_session_goes_on() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            first = await session.step([1, 2, 3])
            with pytest.raises(ConfigError):
                await session.step(range(70))
            assert session.position == len(session.token_ids) == 3
            session.rollback(2)
            assert (await session.step([3])).equal(first[2:])

    with_model(use)


def test_a_step_of_nothing_is_our_own_error() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            with pytest.raises(LocalProtocolError):
                await session.step([])

    with_model(use)


def test_times_are_of_the_first_token_and_per_token_after_it() -> None:
    progress = Progress(started=10.0)
    assert (progress.ttft_s, progress.tpot_s, progress.own_s_per_step) == (None, None, None)

    for now in (12.0, 12.5, 13.5):
        progress.on_token(now, own_s=0.25)

    assert progress.ttft_s == 2.0
    assert progress.tpot_s == 0.75
    assert progress.own_s_per_step == 0.25

"""The model as users hold it: patience, options, prompts; `connect` and what it raises."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from p2pllm.client.client import ModelParts, client_config, connect
from p2pllm.client.model import GenerateOptions, SwarmModel
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import (
    Busy,
    CacheFull,
    ConfigError,
    LookupFailed,
    NoRoute,
    OpenFailed,
    PeerUnreachable,
)
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.sim.fake_model import FakeEdges
from p2pllm.sim.loop import LoopClock, run
from p2pllm.sim.swarm import LAB_SERVER, BytesTokenizer, InlineExecutor, SimSwarm
from p2pllm.spans import Span

ONE_PAGE = replace(LAB_SERVER, cache_tokens=PAGE_TOKENS)
PATIENT = ClientConfig(patience_s=60.0)
Use = Callable[[SimSwarm, SwarmModel], Awaitable[None]]


def with_model(
    use: Use,
    *servers: ServerConfig,
    client: ClientConfig = PATIENT,
    eos_ids: frozenset[int] = frozenset(),
) -> None:
    """Run `use` with servers of the whole model of two blocks."""

    async def main() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            for settings in servers or (LAB_SERVER,):
                await swarm.add_server(Span(0, 2), settings)
            async with swarm.client(client, eos_ids=eos_ids) as model:
                await use(swarm, model)

    run(main())


def now() -> float:
    return asyncio.get_running_loop().time()


# --- options and prompts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"stop": ""},
        {"stop": ("a", "")},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any]) -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        with pytest.raises(ConfigError):
            model.generate("hello", **options)

    with_model(use)


def test_one_stop_string_may_be_given_as_it_is() -> None:
    assert GenerateOptions(stop="end").stops == ("end",)
    assert GenerateOptions(stop=["a", "b"]).stops == ("a", "b")


def test_an_unknown_option_is_a_type_error() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        with pytest.raises(TypeError, match="temprature"):
            model.generate("hello", temprature=1.0)

    with_model(use)


def test_a_prompt_is_text_or_ids_of_any_integer_type_or_messages() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        assert model.encode("ab") == (97, 98)
        assert model.encode(np.array([97, 98])) == (97, 98)  # type: ignore[arg-type]
        assert model.encode([{"role": "user", "content": "a"}]) == tuple(b"user: a\n")
        assert model.encode([]) == ()

    with_model(use)


@pytest.mark.parametrize("token_ids", [[256], [-1], [1, 2, 10**12]])
def test_token_ids_that_the_model_does_not_have_are_refused(token_ids: list[int]) -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        with pytest.raises(ConfigError, match="0 to 255"):
            model.generate(token_ids)
        with pytest.raises(ConfigError):
            await model.forward(token_ids)

    with_model(use)


def test_a_batch_of_nothing_is_nothing_and_a_huge_one_is_refused() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        assert await model.generate_batch([]) == []
        with pytest.raises(ConfigError, match="1024"):
            await model.generate_batch(["x"] * 1025)

    with_model(use)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_session_of_no_tokens_is_refused(max_tokens: int) -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        with pytest.raises(ConfigError):
            async with model.session(max_tokens=max_tokens):
                pass
        with pytest.raises(ConfigError):
            await model.forward([])

    with_model(use)


def test_without_a_seed_texts_differ() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 5000.0}
        first = await model.generate_batch(["one"], **options)
        second = await model.generate_batch(["one"], **options)
        assert first[0].token_ids != second[0].token_ids

    with_model(use)


def test_a_result_says_how_long_it_took_and_which_way_it_went() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        generation = model.generate("hello", max_new_tokens=5)
        assert generation.results()[0].ttft_s is None
        (result,) = await generation.finish()
        (hop,) = result.route
        assert hop.blocks == Span(0, 2)
        assert hop.rtt_s == pytest.approx(0.01, rel=0.1)
        assert hop.compute_s == pytest.approx(0.001, rel=0.1)
        assert hop.bytes_per_token == 2 * 16 * 4
        assert result.tpot_s == pytest.approx(0.012, rel=0.1)
        assert result.ttft_s is not None
        assert result.tokens_per_s == pytest.approx(1 / 0.012, rel=0.1)
        assert generation.route is not None

    with_model(use)


# --- patience ----------------------------------------------------------------------------------


def test_a_full_server_is_waited_for_and_answers_as_soon_as_it_has_room() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=60):
            waiting = asyncio.ensure_future(model.generate("x", max_new_tokens=2).finish())
            await asyncio.sleep(14.0)
            left = now()
        await waiting
        assert now() - left < 0.5, "the server called us; we did not just try again"

    with_model(use, ONE_PAGE)


def test_patience_ends_with_what_the_server_said() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=60):
            started = now()
            with pytest.raises(CacheFull):
                await model.generate("x", max_new_tokens=2).finish()
            assert 5.0 <= now() - started <= 7.5

    with_model(use, ONE_PAGE, client=ClientConfig(patience_s=7.0))


def test_without_patience_the_first_refusal_counts() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=60):
            started = now()
            with pytest.raises(CacheFull):
                await model.generate("x", max_new_tokens=2).finish()
            assert now() - started < 0.5

    with_model(use, ONE_PAGE, client=ClientConfig(patience_s=0.0))


def test_a_server_with_too_many_sessions_is_asked_again_but_not_hammered() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        opened: list[float] = []
        request = model.endpoint.request

        async def counted(*args: Any, **options: Any) -> Any:
            if type(args[1]).__name__ == "Open":
                opened.append(now())
            return await request(*args, **options)

        async with model.session(max_tokens=60):
            model.endpoint.request = counted  # type: ignore[method-assign]
            with pytest.raises(Busy):
                await model.generate("x", max_new_tokens=2).finish()
            model.endpoint.request = request  # type: ignore[method-assign]
        assert 5 <= len(opened) <= 20

    with_model(use, replace(LAB_SERVER, max_sessions=1), client=ClientConfig(patience_s=20.0))


def test_a_batch_that_does_not_fit_together_leaves_nothing_open_while_it_waits() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        with pytest.raises((CacheFull, NoRoute, OpenFailed)):
            await model.generate_batch(["x"] * 5, max_new_tokens=2)
        results = await model.generate_batch(["x"] * 4, max_new_tokens=2)
        assert len(results) == 4

    four = replace(LAB_SERVER, cache_tokens=4 * PAGE_TOKENS)
    with_model(use, four, client=ClientConfig(patience_s=5.0))


def test_a_dht_that_does_not_answer_for_a_moment_is_waited_for() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        get, failures = model.tracker._records.get, 3

        async def flaky(namespace: str, name: str) -> Any:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise LookupFailed("nobody answers")
            return await get(namespace, name)

        model.tracker._records.get = flaky  # type: ignore[method-assign]
        await asyncio.sleep(60.0)
        model.tracker._refreshed_at = float("-inf")
        failures = 3
        (result,) = await model.generate("x", max_new_tokens=2).finish()
        assert result.token_ids == swarm.expected("x", 2)

    with_model(use)


# --- connect -----------------------------------------------------------------------------------


def test_an_error_of_the_users_own_comes_out_of_connect_as_it_is() -> None:
    error = CacheFull("mine")

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=60):
            raise error

    with pytest.raises(CacheFull) as caught:
        with_model(use)
    assert caught.value is error


def test_nobody_there_is_a_peer_unreachable_and_not_a_group() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            with pytest.raises(PeerUnreachable):
                async with connect(
                    ["10.9.9.9:31337"],
                    config=client_config("sim"),
                    network=swarm.internet.host("10.0.0.200"),
                    clock=LoopClock(),
                    executor=InlineExecutor(),
                ):
                    pass

    run(main())


def test_without_peers_or_with_a_wrong_codec_connect_says_so() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="no peers"):
            async with connect():
                pass
        with pytest.raises(ConfigError, match="int8"):
            async with connect(["127.0.0.1:1"], wire_codec="int7"):
                pass
        with pytest.raises(ConfigError):
            async with connect(["nowhere"]):
                pass

    run(main())


def test_the_codec_of_the_configuration_counts_if_no_other_is_named() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            for named, found in ((None, "int8"), ("bf16", "bf16")):
                config = replace(
                    client_config("sim"), client=ClientConfig(wire_codec="int8", dtype="float32")
                )
                async with connect(
                    [str(swarm.entry)],
                    wire_codec=named,
                    config=config,
                    network=swarm.internet.host("10.0.0.200"),
                    clock=LoopClock(),
                    executor=InlineExecutor(),
                ) as joined:
                    assert joined.node.config.client.wire_codec == found
                    assert joined.node.config.client.dtype == "float32"

    run(main())


def test_a_model_asked_for_again_is_followed_and_computed_once() -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            await swarm.add_server(Span(0, 2))
            parts = ModelParts(
                swarm.source.model_id,
                swarm.source.config,
                BytesTokenizer(frozenset()),
                FakeEdges(swarm.source.config),
            )
            async with connect(
                [str(swarm.entry)],
                config=client_config("sim"),
                network=swarm.internet.host("10.0.0.200"),
                clock=LoopClock(),
                executor=InlineExecutor(),
            ) as joined:
                first, second = await joined.use(parts), await joined.use(parts)
                assert first.tracker is second.tracker
                assert first.compute is second.compute
                assert len(joined._serving) == 2

    run(main())

"""Servers and clients together, on virtual time: the swarm answers what the whole model answers."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from p2pllm.client.model import SwarmModel
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import CacheFull, ConfigError, LocalProtocolError, NoRoute
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import LAB_SERVER, SimSwarm
from p2pllm.spans import Span

THIRDS = (Span(0, 2), Span(2, 4), Span(4, 6))
IMPATIENT = ClientConfig(patience_s=3.0)
IS_CHAINED = True


@pytest.fixture(autouse=True, params=[True, False], ids=["chained", "relayed"])
def is_chained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test twice: servers that push to each other, and a client that relays."""
    chosen = bool(request.param)
    monkeypatch.setattr(sys.modules[__name__], "IS_CHAINED", chosen)
    return chosen


def with_model(
    use: Callable[[SimSwarm, SwarmModel], Awaitable[None]],
    spans: tuple[Span, ...] = THIRDS,
    *,
    server: ServerConfig = LAB_SERVER,
    client: ClientConfig = IMPATIENT,
    wire_codec: str = "raw",
) -> None:
    """Run `use` on a swarm of six blocks with servers for these spans and one client."""

    async def scenario() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            for span in spans:
                await swarm.add_server(span, server)
            settings = replace(client, is_chained=IS_CHAINED)
            async with swarm.client(settings, wire_codec=wire_codec) as model:
                await use(swarm, model)

    run(scenario())


async def answer(model: SwarmModel, prompt: str, num_tokens: int) -> tuple[int, ...]:
    generation = model.generate(prompt, max_new_tokens=num_tokens)
    (result,) = await generation.finish()
    return result.token_ids


@pytest.mark.parametrize(
    "spans",
    [
        (Span(0, 6),),
        THIRDS,
        (Span(0, 4), Span(1, 6), Span(2, 5)),  # overlapping: entered and left inside
        (Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4), Span(4, 5), Span(5, 6)),
    ],
    ids=str,
)
def test_any_chain_gives_the_tokens_of_the_whole_model(spans: tuple[Span, ...]) -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        assert await answer(model, "hello", 16) == swarm.expected("hello", 16)

    with_model(use, spans)


@pytest.mark.parametrize("wire_codec", ["raw", "bf16", "int8"])
def test_every_codec_carries_the_fake_model_exactly(wire_codec: str) -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        assert await answer(model, "hello", 8) == swarm.expected("hello", 8)

    with_model(use, wire_codec=wire_codec)


def test_a_long_prompt_is_sent_in_chunks_and_gives_the_same_tokens() -> None:
    prompt = "a long prompt, " * 60  # 900 tokens

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        assert await answer(model, prompt, 4) == swarm.expected(prompt, 4)

    with_model(use)


@pytest.mark.parametrize("num_tokens", [257, 258, 513, 600])
def test_a_short_last_chunk_does_not_overtake_the_others(num_tokens: int) -> None:
    prompt = "x" * num_tokens

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        assert await answer(model, prompt, 3) == swarm.expected(prompt, 3)

    with_model(use)


def test_chunks_overlap_between_hops() -> None:
    """Four chunks over three hops take much less than four times one chunk's way."""

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        loop = asyncio.get_running_loop()
        times = []
        for num_chunks in (1, 4):
            started = loop.time()
            await answer(model, "x" * 256 * num_chunks, 1)
            times.append(loop.time() - started)
        assert times[1] < 2 * times[0]

    with_model(use)


def test_many_clients_at_once_do_not_disturb_each_other() -> None:
    prompts = [f"prompt number {number}" * (number + 1) for number in range(8)]

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        answers = await asyncio.gather(*(answer(model, prompt, 12) for prompt in prompts))
        assert answers == [swarm.expected(prompt, 12) for prompt in prompts]

    with_model(use)


def test_a_batch_shares_messages_and_gives_each_its_own_tokens() -> None:
    prompts = ["short", "a somewhat longer prompt", "x"]

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        results = await model.generate_batch(prompts, max_new_tokens=10)
        assert [result.token_ids for result in results] == [
            swarm.expected(prompt, 10) for prompt in prompts
        ]

    with_model(use)


def test_sampling_depends_on_the_seed_and_not_on_the_batch() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        options = {"max_new_tokens": 12, "temperature": 5000.0, "seed": 7}
        alone = await model.generate_batch(["one"], **options)
        together = await model.generate_batch(["one", "two"], **options)
        other = await model.generate_batch(["one"], **{**options, "seed": 8})
        assert alone[0].token_ids == together[0].token_ids
        assert alone[0].token_ids != other[0].token_ids

    with_model(use)


def test_a_stop_string_ends_the_text_before_it() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        text = bytes(swarm.expected("hello", 16)).decode("latin-1")
        generation = model.generate("hello", max_new_tokens=16, stop=(text[5:7],))
        pieces = [piece async for piece in generation]
        assert "".join(pieces) == text[:5]
        assert generation.results()[0].finish == "stop"

    with_model(use)


def test_the_end_of_text_ends_the_generation_unless_it_is_ignored() -> None:
    async def scenario() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            await swarm.add_server(Span(0, 2))
            tokens = swarm.expected("hello", 16)
            async with swarm.client(eos_ids=frozenset({tokens[4]})) as model:
                ended = model.generate("hello", max_new_tokens=16)
                (result,) = await ended.finish()
                assert result.token_ids == tokens[: tokens.index(tokens[4])]
                assert result.finish == "eos"
                going_on = model.generate("hello", max_new_tokens=16, ignore_eos=True)
                (result,) = await going_on.finish()
                assert len(result.token_ids) == 16
                assert tokens[4] not in result.token_ids

    run(scenario())


def test_a_session_steps_rolls_back_and_forks() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=200) as session:
            first = await session.step(list(b"abcdef"))
            session.rollback(3)
            again = await session.step(list(b"def"))
            assert again.equal(first[3:])
            fork = await session.fork()
            ours, theirs = await session.step(list(b"gh")), await fork.step(list(b"gh"))
            assert ours.equal(theirs)
            changed = await fork.step(list(b"!"))
            assert not changed.equal(await session.step(list(b"?")))
            assert fork.position == session.position == 9
            await fork.close()

    with_model(use)


def test_rolling_back_past_the_start_is_our_own_error() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            with pytest.raises(LocalProtocolError):
                session.rollback(1)

    with_model(use)


def test_forward_gives_logits_of_every_position() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        logits = await model.forward(list(b"hello"))
        assert logits.shape == (5, 256)
        assert int(logits[-1].argmax()) == swarm.expected("hello", 1)[0]

    with_model(use)


def test_a_conversation_computes_only_what_is_new() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=400) as session:
            first = model.generate("hello", session=session, max_new_tokens=8)
            (result,) = await first.finish()
            prompt = [*result.prompt_token_ids, *result.token_ids, *b" and then?"]
            before = session.position
            second = model.generate(prompt, session=session, max_new_tokens=8)
            (result,) = await second.finish()
            assert before == len("hello") + 7
            assert result.token_ids == swarm.expected(prompt, 8)

    with_model(use)


def test_missing_blocks_are_named() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        with pytest.raises(NoRoute, match="2:4") as caught:
            await answer(model, "hello", 4)
        assert caught.value.missing == ((2, 4),)

    with_model(use, (Span(0, 2), Span(4, 6)))


def test_a_block_that_appears_in_time_is_used() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        waiting = asyncio.ensure_future(answer(model, "hello", 4))
        await asyncio.sleep(5.0)
        assert not waiting.done()
        await swarm.add_server(Span(2, 4))
        assert await waiting == swarm.expected("hello", 4)

    with_model(use, (Span(0, 2), Span(4, 6)), client=ClientConfig(patience_s=60.0))


def test_a_server_that_leaves_is_not_found_any_more() -> None:
    async def scenario() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            await swarm.add_server(Span(0, 2))
            leaving = await swarm.add_server(Span(0, 2))
            async with swarm.client() as model:
                assert len((await model.view()).servers) == 2
                leaving.task.cancel()
                await asyncio.sleep(2.0)
                view = await model.view()
                assert [server.peer_id for server in view.servers] != []
                assert leaving.server.node.peer_id not in view.by_peer

    run(scenario())


def test_a_full_cache_is_waited_for() -> None:
    one_session = ServerConfig(cache_tokens=PAGE_TOKENS, throughput=1e4)

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=60):
            waiting = asyncio.ensure_future(answer(model, "hello", 4))
            await asyncio.sleep(3.0)
            assert not waiting.done()
        assert await waiting == swarm.expected("hello", 4)

    with_model(use, server=one_session, client=ClientConfig(patience_s=60.0))


def test_a_full_cache_is_avoided_if_another_server_has_room() -> None:
    async def scenario() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            small = ServerConfig(cache_tokens=PAGE_TOKENS, throughput=1e6)
            await swarm.add_server(Span(0, 2), small)
            await swarm.add_server(Span(0, 2), LAB_SERVER)
            async with swarm.client(ClientConfig(patience_s=5.0)) as model:
                async with model.session(max_tokens=60), model.session(max_tokens=60) as second:
                    logits = await second.step(list(b"hello"))
                    assert int(logits[-1].argmax()) == swarm.expected("hello", 1)[0]

    run(scenario())


def test_a_cache_that_stays_full_ends_in_cache_full() -> None:
    one_session = ServerConfig(cache_tokens=PAGE_TOKENS, throughput=1e4)

    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=60):
            with pytest.raises(CacheFull):
                await answer(model, "hello", 4)

    with_model(use, (Span(0, 6),), server=one_session, client=IMPATIENT)


def test_a_vanished_clients_pages_are_freed_when_the_lease_ends() -> None:
    async def scenario() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            server = await swarm.add_server(Span(0, 2), LAB_SERVER)
            async with swarm.client() as model:
                session = model.session(max_tokens=200)
                await session.__aenter__()
                assert server.num_free_pages < server.num_pages
                await asyncio.sleep(LAB_SERVER.lease_s + 2)
                assert server.num_free_pages == server.num_pages
                await session.__aexit__(None, None, None)

    run(scenario())


def test_leaving_a_generation_early_frees_the_pages_at_once() -> None:
    async def scenario() -> None:
        async with SimSwarm(num_blocks=2) as swarm:
            server = await swarm.add_server(Span(0, 2), LAB_SERVER)
            async with swarm.client() as model:
                async with model.generate("hello", max_new_tokens=50) as pieces:
                    async for _ in pieces:
                        break
                assert server.num_free_pages == server.num_pages

    run(scenario())


def test_an_empty_prompt_is_refused_with_words() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        with pytest.raises(ConfigError, match="prompt"):
            model.generate("")

    with_model(use)


def test_a_session_that_is_too_short_says_so() -> None:
    async def use(swarm: SimSwarm, model: SwarmModel) -> None:
        async with model.session(max_tokens=16) as session:
            generation = model.generate("hello", session=session, max_new_tokens=100)
            with pytest.raises(ConfigError, match="16"):
                await generation.finish()

    with_model(use)


@pytest.mark.parametrize("seed", range(8))
def test_all_servers_of_a_swarm_that_has_just_begun_are_found(seed: int) -> None:
    async def scenario() -> None:
        async with SimSwarm(num_blocks=6, seed=seed) as swarm:
            for block in range(6):
                await swarm.add_server(Span(block, block + 1))
            async with swarm.client() as model:
                assert len((await model.view()).servers) == 6

    run(scenario())

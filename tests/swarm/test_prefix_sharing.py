"""Prompts that begin alike are computed once: whole swarms on virtual time."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from p2pllm.client.model import SwarmModel
from p2pllm.client.results import GenerationResult
from p2pllm.client.session import Chain
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import BadRequest
from p2pllm.ids import SessionId
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import LAB_SERVER, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.wire.messages import MAX_PREFIX_KEYS, Opened, Row
from tests.swarm.failover_lab import Crash, FailoverLab, with_lab
from tests.swarm.raw_client import ONE, TWO, expected, raw_client, states
from tests.swarm.turns import cancelled_after

THIRDS = (Span(0, 2), Span(2, 4), Span(4, 6))
NUM_PAGES = 5
SHARED = NUM_PAGES * PAGE_TOKENS
SYSTEM = "".join(chr(33 + (7 * number) % 90) for number in range(SHARED))
PROMPT = SYSTEM + "what is the capital of France?"
OTHER = SYSTEM + "and of Spain?"
NUM_TOKENS = 6
TAIL = len(OTHER) - SHARED + NUM_TOKENS - 1  # the last token that is drawn is sent nowhere
SETTINGS = ClientConfig(patience_s=3.0)
KEYS = tuple(bytes([number]) * 16 for number in range(3))


@dataclass
class Lab:
    """Servers for the thirds of a model, and one client."""

    swarm: SimSwarm
    servers: list[SimServer]
    model: SwarmModel = field(init=False)

    @property
    def computed(self) -> list[int]:
        """Tokens that each server has computed so far."""
        return [server.server.worker.tokens_computed for server in self.servers]

    async def newly_computed(self, work: Awaitable[object]) -> list[int]:
        before = self.computed
        await work
        return [after - one for after, one in zip(self.computed, before, strict=True)]

    async def answer(self, prompt: str, model: SwarmModel | None = None) -> GenerationResult:
        """Generate, and see that the tokens are right."""
        model = model or self.model
        (result,) = await model.generate(prompt, max_new_tokens=NUM_TOKENS).finish()
        assert result.token_ids == self.swarm.expected(prompt, NUM_TOKENS)
        return result

    def assert_all_pages_are_free(self) -> None:
        for server in self.servers:
            assert server.num_free_pages == server.num_pages


def with_thirds(
    use: Callable[[Lab], Awaitable[None]],
    *,
    server: ServerConfig = LAB_SERVER,
    client: ClientConfig = SETTINGS,
    wire_codec: str = "raw",
) -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            lab = Lab(swarm, [await swarm.add_server(span, server) for span in THIRDS])
            async with swarm.client(client, wire_codec=wire_codec) as model:
                lab.model = model
                await use(lab)
                lab.assert_all_pages_are_free()

    run(main())


# --- one after the other --------------------------------------------------------------------------


@pytest.mark.parametrize("is_chained", [True, False])
@pytest.mark.parametrize("wire_codec", ["raw", "bf16", "int8"])
def test_a_second_prompt_that_begins_alike_computes_only_its_end_at_every_hop(
    wire_codec: str, is_chained: bool
) -> None:
    async def use(lab: Lab) -> None:
        first = await lab.answer(PROMPT)
        before = lab.computed
        second = await lab.answer(OTHER)

        assert [n - b for n, b in zip(lab.computed, before, strict=True)] == [TAIL] * 3
        assert (first.cached_prompt_tokens, second.cached_prompt_tokens) == (0, SHARED)

    with_thirds(use, wire_codec=wire_codec, client=replace(SETTINGS, is_chained=is_chained))


def test_a_prompt_shares_with_a_generation_that_is_not_over() -> None:
    async def use(lab: Lab) -> None:
        async with lab.model.generate(PROMPT, max_new_tokens=NUM_TOKENS) as generation:
            pieces = [await anext(generation)]
            assert (await lab.answer(OTHER)).cached_prompt_tokens == SHARED
            pieces += [piece async for piece in generation]
        wanted = bytes(lab.swarm.expected(PROMPT, NUM_TOKENS)).decode("latin-1")
        assert "".join(pieces) == wanted

    with_thirds(use)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    async def use(lab: Lab) -> None:
        for _ in range(2):
            result = await lab.answer(SYSTEM)
        assert result.cached_prompt_tokens == SHARED - PAGE_TOKENS

    with_thirds(use)


def test_only_what_is_alike_is_shared() -> None:
    async def use(lab: Lab) -> None:
        await lab.answer(PROMPT)
        other_start = await lab.answer("~" + PROMPT[1:])
        other_middle = await lab.answer(PROMPT[: 2 * PAGE_TOKENS + 5] + "~" * 200)

        assert other_start.cached_prompt_tokens == 0
        assert other_middle.cached_prompt_tokens == 2 * PAGE_TOKENS

    with_thirds(use)


def test_another_client_shares_nothing() -> None:
    async def use(lab: Lab) -> None:
        await lab.answer(PROMPT)
        async with lab.swarm.client(SETTINGS) as stranger:
            result = await lab.answer(PROMPT, stranger)
        assert result.cached_prompt_tokens == 0

    with_thirds(use)


def test_who_does_not_want_it_shares_nothing() -> None:
    async def use(lab: Lab) -> None:
        for _ in range(2):
            result = await lab.answer(PROMPT)
            assert result.cached_prompt_tokens == 0
        assert [server.server.pages.num_cached for server in lab.servers] == [0, 0, 0]

    with_thirds(use, client=replace(SETTINGS, is_prefix_shared=False))


def test_hops_agree_on_what_all_of_them_hold_and_all_hold_it_the_next_time() -> None:
    async def use(lab: Lab) -> None:
        await lab.answer(PROMPT)
        pool = lab.servers[1].server.pages
        for page in list(pool._cached)[:-2]:  # all but the first two pages of the prompt
            pool._evict(page)

        assert (await lab.answer(OTHER)).cached_prompt_tokens == 2 * PAGE_TOKENS
        assert (await lab.answer(PROMPT)).cached_prompt_tokens == SHARED

    with_thirds(use)


def test_cached_pages_make_room_for_whoever_needs_it() -> None:
    """Caches of 16 pages, in which each generation takes 6."""

    async def use(lab: Lab) -> None:
        async with lab.swarm.client(SETTINGS) as stranger:
            for number in range(6):
                await lab.answer(f"{number}" + PROMPT)
                await lab.answer(f"{number}" + PROMPT, stranger)
                lab.assert_all_pages_are_free()
            again = await lab.answer("5" + OTHER)
        assert again.cached_prompt_tokens == SHARED

    with_thirds(use, server=replace(LAB_SERVER, cache_tokens=16 * PAGE_TOKENS))


def test_sessions_that_share_need_room_for_what_they_do_not_share() -> None:
    """Ten pages: two generations of six would not fit side by side."""

    async def use(lab: Lab) -> None:
        first = lab.model.generate(PROMPT, max_new_tokens=NUM_TOKENS)
        await anext(first)
        second = await lab.answer(OTHER)
        assert second.cached_prompt_tokens == SHARED
        await first.finish()

    with_thirds(use, server=replace(LAB_SERVER, cache_tokens=10 * PAGE_TOKENS))


# --- together -------------------------------------------------------------------------------------


def test_prompts_of_a_batch_that_begin_alike_are_computed_once() -> None:
    prompts = [PROMPT, OTHER, PROMPT, "something else"]

    async def use(lab: Lab) -> None:
        before = lab.computed
        results = await lab.model.generate_batch(prompts, max_new_tokens=NUM_TOKENS)

        for prompt, result in zip(prompts, results, strict=True):
            assert result.token_ids == lab.swarm.expected(prompt, NUM_TOKENS)
        assert [result.cached_prompt_tokens for result in results] == [0, SHARED, SHARED, 0]
        total = sum(map(len, prompts)) - 2 * SHARED + 4 * (NUM_TOKENS - 1)
        assert [n - b for n, b in zip(lab.computed, before, strict=True)] == [total] * 3

    with_thirds(use)


# --- sessions by hand -----------------------------------------------------------------------------


def test_a_session_that_is_opened_again_has_what_was_there() -> None:
    async def use(lab: Lab) -> None:
        async with lab.model.session(max_tokens=512) as session:
            await lab.model.generate(PROMPT, session=session, max_new_tokens=NUM_TOKENS).finish()
            saved = session.export()
        before = lab.computed
        async with lab.model.resume(saved) as session:
            rest = [n - b for n, b in zip(lab.computed, before, strict=True)]
            assert rest == [len(saved.token_ids) - SHARED] * 3
            logits = await session.step(list(b"x"))
            wanted = lab.swarm.expected([*saved.token_ids, *b"x"], 1)
            assert int(logits[-1].argmax()) == wanted[0]

    with_thirds(use)


def test_a_session_that_generates_begins_with_what_is_there() -> None:
    async def use(lab: Lab) -> None:
        await lab.answer(PROMPT)
        async with lab.model.session(max_tokens=512) as session:
            cached = []
            for prompt in (OTHER, OTHER + " or Portugal", PROMPT):
                generation = lab.model.generate(prompt, session=session, max_new_tokens=3)
                (result,) = await generation.finish()
                assert result.token_ids == lab.swarm.expected(prompt, 3)
                cached.append(result.cached_prompt_tokens)
        assert cached == [SHARED, len(OTHER), SHARED]

    with_thirds(use)


def test_sessions_that_share_may_be_forked_and_rolled_back() -> None:
    async def use(lab: Lab) -> None:
        await lab.answer(PROMPT)
        async with lab.model.session(max_tokens=512) as session:
            await session.feed(list(OTHER.encode()))
            fork = await session.fork()
            try:
                fork.rollback(100)
                for each, text in ((fork, b"another way"), (session, b"on"), (fork, b"!")):
                    logits = await each.step(list(text))
                    wanted = lab.swarm.expected(each.token_ids, 1)
                    assert int(logits[-1].argmax()) == wanted[0]
            finally:
                await fork.close()
        assert (await lab.answer(OTHER)).cached_prompt_tokens == SHARED

    with_thirds(use)


@pytest.mark.parametrize("offset", range(4))
def test_a_promise_that_was_not_kept_misleads_nobody(offset: int) -> None:
    """What is fed is cancelled at some moment, and other tokens are fed instead."""
    texts = [PROMPT.encode(), ("~" + PROMPT[1:]).encode()]

    async def use(lab: Lab) -> None:
        for turn in range(1 + 13 * offset, 200, 52):
            async with lab.model.session(max_tokens=512) as session:
                if await cancelled_after(turn, session.feed(list(texts[0]))):
                    assert session.position == len(session.token_ids) == 0
                    await session.feed(list(texts[1]))
                logits = await session.step(list(b"x"))
                wanted = lab.swarm.expected(session.token_ids, 1)
                assert int(logits[-1].argmax()) == wanted[0]
            await lab.answer(PROMPT)
            await lab.answer("~" + PROMPT[1:])
            for server in lab.servers:
                pool = server.server.pages
                for page in list(pool._cached):
                    pool._evict(page)

    with_thirds(use, client=replace(SETTINGS, prefill_chunk_tokens=PAGE_TOKENS))


def test_a_generation_that_ends_before_its_prompt_is_sent_has_promised_nothing() -> None:
    async def use(lab: Lab) -> None:
        for turn in range(2, 60, 12):
            async with lab.model.session(max_tokens=512) as session:
                generation = lab.model.generate(PROMPT, session=session, max_new_tokens=1)
                assert await cancelled_after(turn, generation.finish())
                await session.step(list(("~" + PROMPT[session.position + 1 :]).encode()))
            assert (await lab.answer(PROMPT)).cached_prompt_tokens == 0
            for server in lab.servers:
                for page in list(server.server.pages._cached):
                    server.server.pages._evict(page)

    with_thirds(use)


# --- when servers fail ----------------------------------------------------------------------------

CHUNKS = ClientConfig(prefill_chunk_tokens=PAGE_TOKENS)
TURNS = 280  # of an undisturbed generation that shares, about


async def warm(lab: FailoverLab) -> None:
    await lab.generate(prompts=(PROMPT,))


@pytest.mark.parametrize("index", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", [Crash.KILL, Crash.VANISH, Crash.FORGET, Crash.RESET])
def test_whenever_a_hop_of_a_session_that_shares_fails_the_tokens_are_the_same(
    kind: Crash, index: int
) -> None:
    async def use(lab: FailoverLab) -> None:
        number = 4 * index + list(Crash).index(kind)
        for turn in range(1 + 17 * number % 90, TURNS, 90):
            await warm(lab)
            await lab.generate((turn, partial(lab.crash_hop, kind, index)), prompts=(OTHER,))
            await lab.heal()
            await lab.replace_dead()

    with_lab(use, settings=CHUNKS)


@pytest.mark.parametrize("wire_codec", ["int8", "bf16"])
def test_all_hops_but_the_first_may_fail_at_once_whatever_the_coding(wire_codec: str) -> None:
    async def use(lab: FailoverLab) -> None:
        def crash() -> None:
            for index in (1, 2):
                lab.crash_hop(Crash.KILL, index)

        await warm(lab)
        _, turns = await lab.generate(prompts=(OTHER,))
        (result,), _ = await lab.generate((turns * 3 // 4, crash), prompts=(OTHER,))
        assert result.cached_prompt_tokens == SHARED
        assert result.recoveries

    with_lab(use, settings=CHUNKS, wire_codec=wire_codec)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_batch_that_shares_survives(index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        for turn in range(150 + 31 * index, 900, 250):
            crash = partial(lab.crash_hop, Crash.KILL, index)
            await lab.generate((turn, crash), prompts=(PROMPT, OTHER, PROMPT))
            await lab.heal()
            await lab.replace_dead()

    with_lab(use, settings=CHUNKS)


def test_hops_need_room_for_the_shared_part_only_to_compute_it_for_a_new_one() -> None:
    """Eleven pages: a generation of six, and five for what it shares."""
    small = replace(LAB_SERVER, cache_tokens=11 * PAGE_TOKENS)

    async def use(lab: Lab) -> None:
        lab.servers.append(await lab.swarm.add_server(THIRDS[1], small))
        await lab.model.tracker.refresh()
        await lab.answer(PROMPT)
        generation = lab.model.generate(OTHER, max_new_tokens=NUM_TOKENS)
        await anext(generation)
        chain = generation._record.chain
        assert chain is not None
        (lost,) = [s for s in lab.servers if s.server.node.peer_id == chain.hops[1].peer]
        lab.swarm.internet.kill(lost.host)
        lab.servers.remove(lost)
        (result,) = await generation.finish()

        assert result.token_ids == lab.swarm.expected(OTHER, NUM_TOKENS)
        assert result.cached_prompt_tokens == SHARED
        (recovered,) = result.recoveries
        assert recovered.lost == ((lost.server.node.peer_id, THIRDS[1]),)

    with_thirds(use, server=small)


def test_a_chain_that_is_repaired_while_it_asks_what_is_there_goes_on_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = Chain._begin_with

    async def use(lab: Lab) -> None:
        await lab.answer(PROMPT)

        async def late(
            self: Chain, state: object, prompt: Sequence[int], num_held: int, version: int
        ) -> None:
            await begin(self, state, prompt, num_held, version - 1)  # type: ignore[arg-type]

        monkeypatch.setattr(Chain, "_begin_with", late)
        assert (await lab.answer(OTHER)).cached_prompt_tokens == 0

    with_thirds(use)


# --- clients that break the rules -----------------------------------------------------------------


def with_raw(use: Callable[[SimSwarm, SimServer], Awaitable[None]]) -> None:
    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            await use(swarm, await swarm.add_server(Span(0, 4)))

    run(main())


def test_who_lies_about_its_tokens_gets_its_own_wrong_cache_and_nobody_else_does() -> None:
    whole = Span(0, 4)

    async def use(swarm: SimSwarm, server: SimServer) -> None:
        async with raw_client(swarm, server) as liar, raw_client(swarm, server, 2) as honest:
            opening = replace(liar.opening(ONE, max_tokens=256), prefix_keys=KEYS)
            await liar.ask(opening)
            await liar.step(Row(ONE, 0, 0, 0, 200), hidden=states(200, start=99))

            opened = await liar.ask(replace(opening, session=TWO))
            assert isinstance(opened, Opened)
            assert opened.position == 3 * PAGE_TOKENS

            opened = await honest.ask(
                replace(opening, session=SessionId(b"h" * 16), client=honest.peer_id)
            )
            assert isinstance(opened, Opened)
            assert opened.position == 0
            await honest.step(Row(SessionId(b"h" * 16), 0, 0, 0, 200))
            assert (honest.tensor() == expected(whole, states(200))).all()

    with_raw(use)


@pytest.mark.parametrize("keys", [(b"short",), KEYS * MAX_PREFIX_KEYS])
def test_keys_that_are_none_are_refused(keys: tuple[bytes, ...]) -> None:
    async def use(swarm: SimSwarm, server: SimServer) -> None:
        async with raw_client(swarm, server) as client:
            with pytest.raises(BadRequest):
                await client.ask(replace(client.opening(), prefix_keys=keys))
            await asyncio.sleep(1.0)
        assert server.num_free_pages == server.num_pages

    with_raw(use)

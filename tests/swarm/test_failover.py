"""A generation survives any server: the tokens are those of an undisturbed run, whatever fails."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pllm.client.replacement import Replacer
from p2pllm.client.results import ChainEvent, Recovered, WaitingForBlocks
from p2pllm.client.state import SessionState
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import NoRoute
from p2pllm.net.rpc import Request
from p2pllm.sim.swarm import SimServer
from p2pllm.spans import Span
from p2pllm.wire.messages import Output
from tests.swarm.failover_lab import (
    LEASE_S,
    PROMPT,
    SETTINGS,
    STALL_S,
    THIRDS,
    Crash,
    FailoverLab,
    hang,
    lie,
    not_a_number,
    refuse_steps,
    too_wide,
    with_lab,
)
from tests.swarm.turns import acting_at, cancelled_after

FIRST, MIDDLE, LAST = 0, 1, 2
HOPS = (FIRST, MIDDLE, LAST)
HOP_NAMES = ["first", "middle", "last"]
TURNS = 250  # of an undisturbed generation, about
# Every so many turns, with another offset for each kind of crash and each hop. With 1, which takes
# half an hour, a generation is disturbed at every await: P2PLLM_TEST_STRIDE=1 … -o timeout=0.
STRIDE = int(os.environ.get("P2PLLM_TEST_STRIDE", "131"))
BATCH = ("hello world", "a", "some other text")
HURRIED = replace(SETTINGS, step_timeout_s=5.0)
SLOW = ServerConfig(cache_tokens=4096, throughput=1e3, lease_s=LEASE_S)  # a last resort
CODECS = ("int8", "bf16")


def crash_points(offset: int, *, stride: int = STRIDE, turns: int = TURNS) -> range:
    """Turns of the event loop, spread over a generation."""
    return range(1 + offset % stride, turns, stride)


async def crash_everywhere(
    lab: FailoverLab,
    kind: Crash,
    index: int,
    turns: range,
    *,
    prompts: tuple[str, ...] = (PROMPT,),
) -> None:
    """One generation for every turn, with a crash at it; who is gone is replaced afterwards."""
    for turn in turns:
        await lab.generate((turn, partial(lab.crash_hop, kind, index)), prompts=prompts)
        if kind in (Crash.KILL, Crash.VANISH):
            lab.assert_only_faulty_are_penalised()
        await lab.heal()
        await lab.replace_dead()


# --- one crash at any moment -------------------------------------------------------------------


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
@pytest.mark.parametrize("kind", Crash, ids=[kind.name.lower() for kind in Crash])
def test_whenever_a_hop_fails_the_tokens_are_the_same(kind: Crash, index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        number = list(Crash).index(kind) * len(HOPS) + index
        await crash_everywhere(lab, kind, index, crash_points(7 * number))

    with_lab(use)


def test_an_undisturbed_generation_takes_about_as_many_turns_as_are_tried() -> None:
    async def use(lab: FailoverLab) -> None:
        turns = [(await lab.generate())[1] for _ in range(4)]
        assert min(turns) < TURNS < max(turns)

    with_lab(use)


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
def test_sequences_that_are_generated_together_survive_together(index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        await crash_everywhere(
            lab, Crash.KILL, index, crash_points(37 * index, stride=110, turns=290), prompts=BATCH
        )

    with_lab(use)


@pytest.mark.parametrize("wire_codec", CODECS)
def test_what_is_coded_is_replayed_as_it_was_sent(wire_codec: str) -> None:
    async def use(lab: FailoverLab) -> None:
        for index in HOPS:
            await crash_everywhere(lab, Crash.KILL, index, crash_points(43 * index, stride=150))

    with_lab(use, wire_codec=wire_codec)


@pytest.mark.parametrize("kind", [Crash.KILL, Crash.VANISH, Crash.RESET])
def test_a_client_that_relays_all_links_replaces_hops_too(kind: Crash) -> None:
    async def use(lab: FailoverLab) -> None:
        for index in HOPS:
            await crash_everywhere(lab, kind, index, crash_points(47 * index, stride=150))

    with_lab(use, settings=ClientConfig(prefill_chunk_tokens=4, is_chained=False))


# --- several crashes ---------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_several_hops_may_fail_at_once(pair: tuple[int, ...]) -> None:
    async def use(lab: FailoverLab) -> None:
        for number, kind in enumerate((Crash.KILL, Crash.VANISH) * 2):
            turn = 1 + (41 * sum(pair) + 97 * number) % TURNS

            def crash(kind: Crash = kind) -> None:
                for server in [lab.hops()[index] for index in pair]:
                    lab.crash(kind, server)

            await lab.generate((turn, crash))
            lab.assert_only_faulty_are_penalised()
            await lab.replace_dead()

    with_lab(use)


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
def test_the_replacement_may_fail_while_it_is_filled(index: int) -> None:
    kinds = (Crash.KILL, Crash.VANISH, Crash.RESET, Crash.FORGET)

    async def use(lab: FailoverLab) -> None:
        for kind, later in zip(kinds * 3, range(1 + 3 * index, 120, 10), strict=True):
            await lab.generate(
                (137, partial(lab.crash_hop, Crash.KILL, index)),
                (190 + later, partial(lab.crash_replacement, kind)),
            )
            await lab.replace_dead()

    with_lab(use, THIRDS * 3)


def test_hops_may_fail_one_after_the_other() -> None:
    async def use(lab: FailoverLab) -> None:
        order = (FIRST, LAST, MIDDLE, FIRST, MIDDLE, LAST)
        faults = [
            (200 + 150 * number, partial(lab.crash_hop, Crash.KILL, index))
            for number, index in enumerate(order)
        ]
        results, _ = await lab.generate(*faults, num_tokens=24)
        assert len(lab.dead) >= 4
        assert len(results[0].recoveries) >= 2

    with_lab(use, THIRDS * 3)


def test_hops_that_lose_a_sequence_at_once_are_filled_at_once() -> None:
    async def use(lab: FailoverLab) -> None:
        def forget() -> None:
            for index in (FIRST, LAST):
                lab.crash_hop(Crash.FORGET, index)

        started = lab.now
        results, _ = await lab.generate((185, forget), num_tokens=8)
        assert lab.now - started < 1.0
        assert not any(event.lost for event in results[0].recoveries)
        lab.faulty.clear()
        lab.assert_only_faulty_are_penalised()

    with_lab(use)


# --- echoes that are lost ----------------------------------------------------------------------


@contextmanager
def losing_echoes(lab: FailoverLab, is_lost: Callable[[int], bool]) -> Iterator[None]:
    """Let the client not hear the n-th echo, for some n."""
    endpoint, number = lab.model.endpoint, 0
    hear = endpoint.instant_handlers[Output]

    def on_output(request: Request[Output]) -> None:
        nonlocal number
        if request.message.is_echo:
            number += 1
            if is_lost(number):
                return
        hear(request)

    endpoint.handle_at_once(Output, on_output)
    yield
    endpoint.handle_at_once(Output, hear)


def counted_fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By hop, the stretches of journals that had to be computed again."""
    fills: list[int] = []
    fill = Replacer._fill

    async def counted(self: Replacer, state: SessionState, hop: int, start: int, stop: int) -> None:
        fills.append(hop)
        await fill(self, state, hop, start, stop)

    monkeypatch.setattr(Replacer, "_fill", counted)
    return fills


@pytest.mark.parametrize("index", [MIDDLE, LAST], ids=["middle", "last"])
def test_an_echo_that_is_lost_is_computed_again(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fills = counted_fills(monkeypatch)

    async def use(lab: FailoverLab) -> None:
        for lost in range(1, 13, 3):
            with losing_echoes(lab, lambda number: number == lost):  # noqa: B023
                crash = partial(lab.crash_hop, Crash.KILL, index)
                await lab.generate((215, crash), num_tokens=8)
            await lab.replace_dead()

    with_lab(use)
    assert set(fills) == {index}
    assert fills, "half of the echoes are those of the hop before"


@pytest.mark.parametrize("victims", [(MIDDLE,), (LAST,), (MIDDLE, LAST), HOPS])
@pytest.mark.parametrize("turn", [180, 300])
def test_without_any_echo_everything_is_computed_again(
    victims: tuple[int, ...], turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fills = counted_fills(monkeypatch)

    async def use(lab: FailoverLab) -> None:
        def crash() -> None:
            for server in [lab.hops()[index] for index in victims]:
                lab.crash(Crash.KILL, server)

        with losing_echoes(lab, lambda _: True):
            await lab.generate((turn, crash), num_tokens=8)

    with_lab(use)
    assert fills or FIRST in victims, "else nothing is left of what they were sent"


# --- other boundaries --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "index"),
    [
        ((Span(2, 3), Span(3, 4)), MIDDLE),
        ((Span(1, 5),), MIDDLE),
        ((Span(0, 1), Span(1, 2)), FIRST),
        ((Span(4, 5), Span(5, 6)), LAST),
        ((Span(0, 6),), FIRST),
        ((Span(0, 6),), LAST),
    ],
)
def test_replacements_may_have_other_boundaries(spans: tuple[Span, ...], index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        for span in spans:
            await lab.add(span, SLOW)
        await lab.model.tracker.refresh()
        results, _ = await lab.generate(
            (145, partial(lab.crash_hop, Crash.KILL, index)), num_tokens=8
        )
        assert {hop.blocks for hop in results[0].route} - set(THIRDS) or len(spans) == 1

    with_lab(use, THIRDS)


def test_neighbours_that_fail_together_may_be_replaced_by_one() -> None:
    async def use(lab: FailoverLab) -> None:
        await lab.add(Span(0, 4), SLOW)

        def crash() -> None:
            for server in lab.hops()[:2]:
                lab.crash(Crash.KILL, server)

        await lab.generate((145, crash), num_tokens=8)

    with_lab(use, THIRDS)


# --- servers that do wrong ---------------------------------------------------------------------

Fault = Callable[[SimServer], None]
LIES: dict[str, Fault] = {
    "nan": partial(lie, change=not_a_number, echoes_only=False),
    "shape": partial(lie, change=too_wide, echoes_only=False),
    "echo nan": partial(lie, change=not_a_number, echoes_only=True),
    "echo shape": partial(lie, change=too_wide, echoes_only=True),
    "refuses": refuse_steps,
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_does_wrong_is_replaced(name: str) -> None:
    async def use(lab: FailoverLab) -> None:
        for index in HOPS:
            turn = 1 + (80 * index + 37 * list(LIES).index(name)) % 280
            victims: list[SimServer] = []

            def begin(victims: list[SimServer] = victims, index: int = index) -> None:
                victims.append(lab.hops()[index])
                LIES[name](victims[0])

            results, _ = await lab.generate((turn, begin), num_tokens=8)
            if not (name.startswith("echo") and index == LAST):
                assert victims[0].server.node.peer_id not in {h.peer_id for h in results[0].route}
            for server in victims:
                lab.dead.add(server.host)
            await lab.replace_dead()

    with_lab(use, settings=HURRIED)


# --- when it is noticed -------------------------------------------------------------------------


async def began_after_s(lab: FailoverLab, kind: Crash, index: int, turn: int) -> float | None:
    """How long after a crash its repair began; None if there was nothing to repair."""
    crashed_at, began_at = 0.0, None

    def crash() -> None:
        nonlocal crashed_at
        crashed_at = lab.now
        lab.crash_hop(kind, index)

    def on_event(event: ChainEvent) -> None:
        nonlocal began_at
        if began_at is None and isinstance(event, Recovered):
            began_at = lab.now - event.stall_s

    await lab.generate((turn, crash), num_tokens=8, on_event=on_event)
    return None if began_at is None else began_at - crashed_at


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
@pytest.mark.parametrize(
    ("kind", "limit_s"), [(Crash.KILL, 1.0), (Crash.VANISH, 2.1)], ids=["process", "machine"]
)
def test_death_is_noticed_soon(kind: Crash, limit_s: float, index: int) -> None:
    """A machine that is gone: a ping after a second of silence, and a second to answer."""

    async def use(lab: FailoverLab) -> None:
        for turn in (180 + 20 * index, 300):
            after_s = await began_after_s(lab, kind, index, turn)
            assert after_s is not None
            assert after_s <= limit_s
            lab.assert_only_faulty_are_penalised()
            view = lab.model.tracker.view()
            assert all(
                view.is_penalised(server)
                for server in view.servers
                if lab.known[server.peer_id].host in lab.dead
            )
            await lab.replace_dead()

    with_lab(use)


# --- hanging, frozen, late ---------------------------------------------------------------------


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
def test_a_hop_that_hangs_is_hedged_once_steps_are_known(index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        def begin() -> None:
            server = lab.hops()[index]
            hang(server)
            lab.dead.add(server.host)

        started = lab.now
        results, _ = await lab.generate((1300, begin), num_tokens=48)
        assert results[0].recoveries
        assert lab.now - started < 5.0

    with_lab(use)


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
def test_a_hop_that_hangs_early_is_replaced_at_the_deadline(index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        for turn in crash_points(53 * index, stride=150):

            def begin() -> None:
                server = lab.hops()[index]
                hang(server)
                lab.dead.add(server.host)

            await lab.generate((turn, begin))
            await lab.replace_dead()

    with_lab(use, settings=HURRIED)


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
def test_a_frozen_server_that_wakes_up_after_it_was_replaced_does_no_harm(index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        started = lab.now
        results, _ = await lab.generate(
            (215, partial(lab.crash_hop, Crash.FREEZE, index)), num_tokens=24
        )
        assert lab.now - started > STALL_S + 3.0, "it woke up long before the end"
        assert len(results[0].recoveries) == 1

    with_lab(use, device_s=0.1)


def test_a_server_that_comes_back_with_its_identity_gets_its_place_again() -> None:
    events: list[ChainEvent] = []

    async def use(lab: FailoverLab) -> None:
        async def crash_and_return(victim: SimServer) -> None:
            lab.crash(Crash.KILL, victim)
            victim.task.cancel()
            await asyncio.sleep(3.0)
            await lab.add(victim.server.offer.span, again=victim)
            lab.dead.discard(victim.host)
            lab.servers.remove(victim)

        returning: list[asyncio.Task[None]] = []

        def crash() -> None:
            returning.append(asyncio.ensure_future(crash_and_return(lab.hops()[MIDDLE])))

        await lab.generate((180, crash), num_tokens=8, on_event=events.append)
        await asyncio.gather(*returning)

    with_lab(use, THIRDS)
    assert [type(event) for event in events] == [WaitingForBlocks, Recovered]


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
def test_who_stops_waiting_while_a_hop_is_replaced_leaves_nothing(index: int) -> None:
    async def use(lab: FailoverLab) -> None:
        for later in range(1 + 13 * index, 200, 43):
            work = lab.generate(num_tokens=8)
            crash = partial(lab.crash_hop, Crash.KILL, index)
            with acting_at(145, crash):
                assert await cancelled_after(200 + later, work)
            lab.assert_client_is_quiet()
            await lab.replace_dead()

    with_lab(use)


# --- patience ----------------------------------------------------------------------------------


def test_a_client_waits_for_missing_blocks_and_says_so_once() -> None:
    events: list[ChainEvent] = []

    async def use(lab: FailoverLab) -> None:
        async def join() -> None:
            await asyncio.sleep(10.0)
            await lab.add(THIRDS[1])

        joining = asyncio.ensure_future(join())
        started = lab.now
        await lab.generate(
            (145, partial(lab.crash_hop, Crash.KILL, MIDDLE)),
            num_tokens=8,
            on_event=events.append,
        )
        await joining
        assert lab.now - started < 10.0 + 4.0

    with_lab(use, THIRDS)
    waiting, recovered = events
    assert waiting == WaitingForBlocks((THIRDS[1],), SETTINGS.patience_s)
    assert isinstance(recovered, Recovered)


def test_past_its_patience_a_client_says_what_is_missing_and_can_go_on_later() -> None:
    async def use(lab: FailoverLab) -> None:
        model = lab.model
        generation = model.generate(PROMPT, max_new_tokens=12)
        await anext(generation)
        lab.generation = generation
        lab.crash_hop(Crash.KILL, MIDDLE)
        started = lab.now
        with pytest.raises(NoRoute) as caught:
            await generation.finish()
        assert caught.value.missing == ((2, 4),)
        assert 3.0 <= lab.now - started < 8.0
        lab.assert_client_is_quiet()
        saved = generation.export()
        count = len(saved.token_ids) - len(PROMPT)
        assert saved.token_ids[len(PROMPT) :] == lab.swarm.expected(PROMPT, 12)[:count]
        await lab.add(THIRDS[1])
        async with model.resume(saved) as session:
            rest = model.generate(saved.token_ids, session=session, max_new_tokens=12 - count)
            (result,) = await rest.finish()
        assert saved.token_ids[len(PROMPT) :] + result.token_ids == lab.swarm.expected(PROMPT, 12)

    with_lab(use, THIRDS, ClientConfig(prefill_chunk_tokens=4, patience_s=5.0))


# --- sessions by hand --------------------------------------------------------------------------


async def converse(lab: FailoverLab) -> None:
    """Steps, a fork, a rollback: each answer is checked."""

    def check(tokens: list[int], answer: int) -> None:
        assert lab.swarm.expected(tokens, 1) == (answer,)

    async with lab.model.session(max_tokens=64) as session:
        logits = await session.step(list(b"some words"))
        check(session.token_ids, int(logits[-1].argmax()))
        fork = await session.fork()
        try:
            for each, text in ((session, b"abc"), (fork, b"xyzw"), (session, b"d")):
                logits = await each.step(list(text))
                check(each.token_ids, int(logits[-1].argmax()))
            session.rollback(7)
            logits = await session.step(list(b"other"))
            check(session.token_ids, int(logits[-1].argmax()))
            logits = await fork.step(list(b"!"))
            check(fork.token_ids, int(logits[-1].argmax()))
        finally:
            await fork.close()


@pytest.mark.parametrize("index", HOPS, ids=HOP_NAMES)
def test_sessions_that_fork_and_step_back_survive(index: int) -> None:
    kinds = (Crash.KILL, Crash.VANISH, Crash.RESET, Crash.FORGET)

    async def use(lab: FailoverLab) -> None:
        for kind, turn in zip(kinds * 2, range(1 + 23 * index, 561, 70), strict=True):
            with acting_at(turn, partial(lab.crash_hop, kind, index)):
                await converse(lab)
            lab.assert_client_is_quiet()
            await lab.replace_dead()

    with_lab(use)


# --- whatever happens --------------------------------------------------------------------------

PASSING = (
    Crash.STALL_CLIENT,
    Crash.STALL_NEXT,
    Crash.RESET,
    Crash.FREEZE,
    Crash.FORGET,
    Crash.CUT_NEXT,
)
FATAL = (Crash.KILL, Crash.VANISH, Crash.BREAK_DOWN)


@dataclass(frozen=True)
class Happening:
    """At a turn, something befalls a hop; if that is fatal, a replica joins a while later."""

    turn: int
    kind: Crash
    index: int
    joins_after_s: float


happenings = st.lists(
    st.builds(
        Happening,
        turn=st.integers(1, 600),
        kind=st.sampled_from((*PASSING, *FATAL)),
        index=st.sampled_from(HOPS),
        joins_after_s=st.sampled_from((0.0, 0.3, 4.0)),
    ),
    min_size=2,
    max_size=6,
)


async def live_through(lab: FailoverLab, schedule: list[Happening]) -> None:
    """Generate for three prompts while all of it happens."""
    joining: list[asyncio.Task[SimServer]] = []

    async def join(span: Span, after_s: float) -> SimServer:
        await asyncio.sleep(after_s)
        return await lab.add(span)

    def happen(what: Happening) -> None:
        victim = lab.hops()[min(what.index, len(lab.hops()) - 1)]
        lab.crash_hop(what.kind, what.index)
        if what.kind in FATAL:
            span = victim.server.offer.span
            joining.append(asyncio.ensure_future(join(span, what.joins_after_s)))

    faults = [(what.turn, partial(happen, what)) for what in schedule]
    await lab.generate(*faults, prompts=BATCH, num_tokens=8)
    await asyncio.gather(*joining)


TOO_MANY = [  # a hop comes back to its place while another, new one is filled beside it
    Happening(192, Crash.STALL_CLIENT, FIRST, 0.0),
    Happening(632, Crash.FREEZE, FIRST, 0.3),
    Happening(325, Crash.STALL_NEXT, FIRST, 0.3),
    Happening(152, Crash.STALL_CLIENT, LAST, 0.0),
    Happening(684, Crash.STALL_NEXT, MIDDLE, 0.0),
    Happening(208, Crash.STALL_CLIENT, FIRST, 4.0),
    Happening(515, Crash.VANISH, MIDDLE, 4.0),
]


@settings(max_examples=8, derandomize=True)
@given(happenings)
@example(TOO_MANY)
def test_whatever_happens_the_tokens_are_the_same(schedule: list[Happening]) -> None:
    with_lab(partial(live_through, schedule=schedule))

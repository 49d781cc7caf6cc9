"""Servers that push to each other: what a token costs, and what happens where a link is missing."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

import pytest

from p2pllm.client.generation import Generation
from p2pllm.client.model import SwarmModel
from p2pllm.client.results import GenerationResult, Recovered
from p2pllm.client.session import CLOSE_TIMEOUT_S
from p2pllm.config import ClientConfig, ShaperConfig
from p2pllm.errors import (
    BadRequest,
    Busy,
    LookupFailed,
    NoRoute,
)
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.server import outbox
from p2pllm.server.handlers import MAX_HOPS
from p2pllm.server.outbox import SEND_TIMEOUT_S, Asked, Outbox
from p2pllm.server.successors import BROKEN_S, DIALS_AT_ONCE, NO_NEXT_HOP, REACH_TIMEOUT_S
from p2pllm.sim.fake_model import WIDTH
from p2pllm.sim.loop import WALL_EPOCH, run
from p2pllm.sim.swarm import DEVICE_S, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.wire.messages import (
    Close,
    Echo,
    Fork,
    Message,
    Opened,
    Output,
    Rewire,
    Row,
)
from p2pllm.wire.records import PEER_NAMESPACE, PRESENCE_NAMESPACE, make_record
from tests.swarm.raw_client import (
    ONE,
    TIMEOUT_S,
    TWO,
    RawClient,
    assert_nothing_left,
    expected,
    raw_client,
    states,
)

THIRDS = (Span(0, 2), Span(2, 4), Span(4, 6))
HALVES = (Span(0, 2), Span(2, 4))
WHOLE = Span(0, 4)
ONE_WAY_S = 0.05
RECORDS_SPREAD_S = 2.0  # a server begins to serve before all have its peer record
PROMPT = "hello"
TOKENS = (b"1" * 16, b"2" * 16)  # push tokens of the first and the second hop

Use = Callable[[SimSwarm, list[SimServer], SwarmModel], Awaitable[None]]
RawUse = Callable[[list[SimServer], RawClient], Awaitable[None]]


def with_model(
    use: Use,
    settings: ClientConfig | None = None,
    *,
    device_s: float = DEVICE_S,
    spans: Sequence[Span] = THIRDS,
    prepare: Callable[[SimSwarm, list[SimServer]], None] = lambda swarm, servers: None,
) -> None:
    """Run `use` with servers of these spans and a client that joins after `prepare`."""

    async def main() -> None:
        async with SimSwarm(num_blocks=6) as swarm:
            servers = [await swarm.add_server(span, device_s=device_s) for span in spans]
            await asyncio.sleep(RECORDS_SPREAD_S)
            prepare(swarm, servers)
            async with swarm.client(settings) as model:
                await use(swarm, servers, model)

    run(main())


async def answer(model: SwarmModel, num_tokens: int = 8) -> tuple[tuple[int, ...], list[int]]:
    """The tokens, and how many hops each segment of the chain had."""
    generation = model.generate(PROMPT, max_new_tokens=num_tokens)
    (result,) = await generation.finish()
    chain = generation._record.chain
    assert chain is not None
    return result.token_ids, [len(segment) for segment in chain.segments]


async def seconds_per_token(is_chained: bool) -> float:
    async with SimSwarm(num_blocks=6, line=ShaperConfig(delay_s=ONE_WAY_S)) as swarm:
        for span in THIRDS:
            await swarm.add_server(span)
        await asyncio.sleep(RECORDS_SPREAD_S)
        async with swarm.client(ClientConfig(is_chained=is_chained)) as model:
            (result,) = await model.generate(PROMPT, max_new_tokens=16).finish()
            assert result.token_ids == swarm.expected(PROMPT, 16)
            assert result.tpot_s is not None
            return result.tpot_s


# --- what a token costs ------------------------------------------------------------------------


def test_a_token_costs_each_link_once_and_the_computation() -> None:
    """Four links, three servers, and the client's own part."""
    tpot_s = run(seconds_per_token(is_chained=True))

    least_s = 4 * ONE_WAY_S + 4 * DEVICE_S
    assert least_s <= tpot_s <= 1.10 * least_s


def test_a_client_that_relays_pays_two_more_links_for_three_servers() -> None:
    chained_s, relayed_s = (run(seconds_per_token(is_chained)) for is_chained in (True, False))

    assert relayed_s - chained_s == pytest.approx(2 * ONE_WAY_S, abs=0.1 * ONE_WAY_S)


# --- links that are missing --------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "segments"), [((0, 1), [1, 2]), ((1, 2), [2, 1]), ((0, 2), [3])])
def test_only_a_link_that_is_missing_is_relayed(cut: tuple[int, int], segments: list[int]) -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        assert await answer(model) == (swarm.expected(PROMPT, 8), segments)
        await asyncio.sleep(SEND_TIMEOUT_S)
        for server in servers:
            assert_nothing_left(server)

    def prepare(swarm: SimSwarm, servers: list[SimServer]) -> None:
        swarm.internet.partition(servers[cut[0]].host, servers[cut[1]].host)

    with_model(use, prepare=prepare)


def test_a_session_with_a_relayed_link_forks_steps_back_and_goes_on() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            first = await session.step(list(b"abcdef"))
            session.rollback(3)
            fork = await session.fork()
            for each in (session, fork):
                assert (await each.step(list(b"def"))).equal(first[3:])
            await fork.close()

    def prepare(swarm: SimSwarm, servers: list[SimServer]) -> None:
        swarm.internet.partition(servers[0].host, servers[1].host)

    with_model(use, prepare=prepare)


@pytest.mark.parametrize("error", [None, LookupFailed("nobody answers")])
def test_a_server_without_a_known_record_is_relayed_to(error: LookupFailed | None) -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        find = model.routes._find_record

        async def find_others(peer: PeerId) -> object:
            if peer != servers[1].server.node.peer_id:
                return await find(peer)
            if error is not None:
                raise error
            return None

        model.routes._find_record = find_others  # type: ignore[assignment]
        assert await answer(model) == (swarm.expected(PROMPT, 8), [1, 2])

    with_model(use)


def test_a_record_that_was_not_found_is_looked_for_again_for_the_next_route() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        find = model.routes._find_record

        async def find_none(peer: PeerId) -> None:
            return None

        model.routes._find_record = find_none
        assert await answer(model) == (swarm.expected(PROMPT, 8), [1, 1, 1])
        model.routes._find_record = find
        assert await answer(model) == (swarm.expected(PROMPT, 8), [3])

    with_model(use)


def test_no_record_at_all_is_a_relaying_client() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async def find_none(peer: PeerId) -> None:
            return None

        model.routes._find_record = find_none
        assert await answer(model) == (swarm.expected(PROMPT, 8), [1, 1, 1])

    with_model(use)


def test_a_link_that_breaks_is_relayed_from_then_on() -> None:
    """Both of its ends are there, so nobody is replaced, and nobody is to blame."""

    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            await session.step(list(b"abc"))
            swarm.internet.partition(servers[0].host, servers[1].host)
            hops, started = session.chain.hops, asyncio.get_running_loop().time()
            logits = await session.step(list(b"lo"))
            assert asyncio.get_running_loop().time() - started <= SEND_TIMEOUT_S + 1.0
            assert int(logits[-1].argmax()) == swarm.expected(list(b"abclo"), 1)[0]
            assert session.chain.hops == hops
            assert list(map(len, session.chain.segments)) == [1, 2]
            view = model.tracker.view()
            assert not any(map(view.is_penalised, view.servers))
            assert session.token_ids == list(b"abclo")

    with_model(use)


# --- servers that die --------------------------------------------------------------------------

PATIENCE_S = 4.0
NOTICED_S = 3.0  # a machine that dies: one second of silence, one of suspicion, and a probe
OPEN_S = 3.0  # the attempt that is under way when patience ends may take so long
MIDDLE_TWICE = (*THIRDS, THIRDS[1])
NUM_TOKENS = 30


async def killed_while_decoding(
    swarm: SimSwarm, servers: list[SimServer], model: SwarmModel, after_s: float, *, is_silent: bool
) -> tuple[Generation, "asyncio.Task[list[GenerationResult]]", SimServer]:
    """Kill the middle hop that long after a decode step began; the generation goes on."""
    generation = model.generate(PROMPT, max_new_tokens=NUM_TOKENS)
    await anext(generation)
    ending = asyncio.ensure_future(generation.finish())
    await asyncio.sleep(after_s)
    assert not ending.done()
    assert generation.route is not None
    middle = generation.route.hops[1].peer_id
    (dying,) = (server for server in servers if server.server.node.peer_id == middle)
    swarm.internet.kill(dying.host, is_silent=is_silent)
    return generation, ending, dying


async def assert_all_freed(servers: list[SimServer], dead: SimServer) -> None:
    """Nothing is left at those that live, a moment later."""
    await asyncio.sleep(SEND_TIMEOUT_S + 1.0)
    for server in servers:
        if server is not dead:
            assert_nothing_left(server)


@pytest.mark.parametrize("is_silent", [False, True], ids=["process", "machine"])
@pytest.mark.parametrize("after_ms", range(0, 26, 2))  # a token takes 24 ms
def test_a_generation_survives_a_middle_hop_that_dies(is_silent: bool, after_ms: int) -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        now = asyncio.get_running_loop().time
        killed = now() + after_ms / 1000
        _, ending, dead = await killed_while_decoding(
            swarm, servers, model, after_ms / 1000, is_silent=is_silent
        )
        (result,) = await ending
        assert result.token_ids == swarm.expected(PROMPT, NUM_TOKENS)
        (recovery,) = result.recoveries
        (replica,) = {servers[1], servers[3]} - {dead}
        assert recovery.lost == ((dead.server.node.peer_id, THIRDS[1]),)
        assert recovery.by == ((replica.server.node.peer_id, THIRDS[1]),)
        assert now() - killed <= NOTICED_S + NUM_TOKENS * 0.03
        await assert_all_freed(servers, dead)

    with_model(use, spans=MIDDLE_TWICE)


@pytest.mark.parametrize("is_silent", [False, True], ids=["process", "machine"])
def test_a_middle_hop_that_dies_with_a_token_in_hand_is_noticed_all_the_same(
    is_silent: bool,
) -> None:
    """It has acknowledged the step, so the hop before knows nothing of it."""

    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        _, ending, dead = await killed_while_decoding(
            swarm, servers, model, 0.2 + 0.15, is_silent=is_silent
        )
        (result,) = await ending
        assert result.token_ids == swarm.expected(PROMPT, NUM_TOKENS)
        (recovery,) = result.recoveries
        assert recovery.stall_s <= NOTICED_S
        assert recovery.replayed_tokens <= len(PROMPT) + 2
        await assert_all_freed(servers, dead)

    with_model(use, spans=MIDDLE_TWICE, device_s=0.2)


@pytest.mark.parametrize("is_silent", [False, True], ids=["process", "machine"])
@pytest.mark.parametrize("after_ms", range(0, 26, 6))
def test_without_a_replica_the_missing_blocks_are_waited_for_and_named(
    is_silent: bool, after_ms: int
) -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        now = asyncio.get_running_loop().time
        generation, ending, dead = await killed_while_decoding(
            swarm, servers, model, after_ms / 1000, is_silent=is_silent
        )
        killed = now()
        with pytest.raises(NoRoute, match="2:4") as caught:
            await ending
        assert caught.value.missing == ((2, 4),)
        assert now() - killed <= NOTICED_S + PATIENCE_S + OPEN_S + CLOSE_TIMEOUT_S
        saved = generation.export()
        made = saved.token_ids[len(PROMPT) :]
        assert made == swarm.expected(PROMPT, NUM_TOKENS)[: len(made)]
        await assert_all_freed(servers, dead)

    with_model(use, ClientConfig(patience_s=PATIENCE_S, open_timeout_s=OPEN_S))


def test_a_server_that_comes_in_time_takes_over_and_what_was_saved_goes_on_elsewhere() -> None:
    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        generation, ending, dead = await killed_while_decoding(
            swarm, servers, model, 0.01, is_silent=False
        )
        waited: list[object] = []
        generation.on_event = waited.append
        await asyncio.sleep(5.0)
        assert not ending.done()
        servers.append(await swarm.add_server(THIRDS[1]))
        (result,) = await ending
        assert result.token_ids == swarm.expected(PROMPT, NUM_TOKENS)
        assert [type(event) for event in waited][-1:] == [Recovered]
        async with model.resume(generation.export()) as session:
            assert session.token_ids == list(PROMPT.encode()) + list(result.token_ids)
        await assert_all_freed(servers, dead)

    with_model(use, ClientConfig(patience_s=60.0))


def test_a_hop_that_forgot_the_session_is_given_it_again_at_once() -> None:
    """Its own client it does not know any more: the hop before tells it."""

    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        async with model.session(max_tokens=64) as session:
            await session.step(list(b"abc"))
            service = servers[1].server.service
            (held,) = service.sessions
            service._close(held, held.client, held.epoch)
            started, hops = asyncio.get_running_loop().time(), session.chain.hops
            logits = await session.step(list(b"lo"))
            assert asyncio.get_running_loop().time() - started < 1.0
            assert int(logits[-1].argmax()) == swarm.expected(list(b"abclo"), 1)[0]
            assert session.chain.hops == hops

    with_model(use)


# --- by hand -----------------------------------------------------------------------------------


def with_raw_client(use: RawUse) -> None:
    """Run `use` with servers of both halves and a client that sends what it likes."""

    async def main() -> None:
        async with SimSwarm(num_blocks=4) as swarm:
            servers = [await swarm.add_server(span) for span in HALVES]
            async with AsyncExitStack() as stack:
                alice = await stack.enter_async_context(raw_client(swarm, servers[0]))
                second = servers[1].server.node
                alice.endpoint.learn(second.peer_id, second.addresses)
                await use(servers, alice)
                for server in servers:
                    held = tuple(session.id for session in server.server.service.sessions)
                    await ask(alice, server, Close(held, 2**31 - 1))
            await asyncio.sleep(SEND_TIMEOUT_S + 1.0)
            for server in servers:
                assert_nothing_left(server)

    run(main())


async def ask(client: RawClient, server: SimServer, message: Message) -> Message:
    return await client.endpoint.request(server.server.node.peer_id, message, timeout_s=TIMEOUT_S)


async def record_of(server: SimServer, seen_by: SimServer) -> bytes:
    record = await seen_by.server.node.dht.find_peer_record(server.server.node.peer_id)
    assert record is not None
    return record.to_bytes()


async def open_chain(
    servers: list[SimServer],
    alice: RawClient,
    *,
    echo: Echo = Echo.NONE,
    is_ring: bool = False,
) -> Opened:
    """Open session ONE at both hops, the first pushing to the second (and in a ring back)."""
    first, second = servers
    base = alice.opening()
    here = replace(
        base,
        span=HALVES[0],
        push_token=TOKENS[0],
        next_hop=await record_of(second, first),
        next_token=TOKENS[1],
        echo=echo,
    )
    there = replace(base, span=HALVES[1], push_token=TOKENS[1])
    if is_ring:
        back = await record_of(first, second)
        there = replace(there, next_hop=back, next_token=TOKENS[0])
    opened = await ask(alice, first, here)
    await ask(alice, second, there)
    assert isinstance(opened, Opened)
    return opened


def row(step: int, position: int, num_tokens: int = 1, *, epoch: int = 0) -> Row:
    return Row(ONE, epoch, step, position, num_tokens)


def test_opening_says_how_far_the_next_hop_is() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        opened = await open_chain(servers, alice)
        assert opened.next_rtt_s == pytest.approx(0.010, abs=0.005)
        alone = await alice.open(TWO, span=HALVES[0])
        assert isinstance(alone, Opened)
        assert alone.next_rtt_s == NO_NEXT_HOP

    with_raw_client(use)


def test_a_step_of_many_tokens_comes_out_of_the_last_hop_with_the_time_at_each() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice)
        await alice.step(replace(row(0, 0, 5), tail=2))
        assert alice.tensor().equal(expected(WHOLE, states(5))[-2:])
        assert len(alice.outputs[0].timings) == 2
        await alice.step(row(1, 5, 1, epoch=3))  # only the first hop hears of the epoch from us
        second = servers[1].server.service.sessions.get(ONE)
        assert second is not None
        assert second.epoch == 3

    with_raw_client(use)


@pytest.mark.parametrize(
    ("echo", "echoed"), [(Echo.NONE, []), (Echo.DECODE_ONLY, [1]), (Echo.ALL, [0, 1])]
)
def test_echoes_of_earlier_hops_are_marked_and_hold_their_outputs(
    echo: Echo, echoed: list[int]
) -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice, echo=echo)
        await alice.push([row(0, 0, 40)])
        await alice.answered(1 + (0 in echoed))
        await alice.push([row(1, 40)])
        await alice.answered(2 + len(echoed))
        await asyncio.sleep(1.0)
        echoes = [output for output in alice.outputs if output.is_echo]
        assert [output.rows[0].step for output in echoes] == echoed
        assert len(alice.outputs) == 2 + len(echoes)
        after_first = expected(HALVES[0], states(41))
        for output in echoes:
            (each,) = output.rows
            index = alice.outputs.index(output)
            stop = each.position + each.num_tokens
            assert alice.tensor(index).equal(after_first[each.position : stop])

    with_raw_client(use)


@pytest.mark.parametrize("echo", list(Echo))
def test_a_generation_gives_the_same_tokens_whatever_is_echoed(
    echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers may echo less than they are asked to; all goes on, with holes in the journals."""
    emit = Outbox.emit
    echoes: list[Output] = []

    def emitting(self: Outbox, asked: Sequence[Asked], output: Output, deadline: float) -> None:
        for session, _ in asked:
            assert session.request.echo is Echo.ALL or session.request.echo is echo
            session.request = replace(session.request, echo=echo)
            if session.next_peer is not None:
                echoes.append(output)
        emit(self, asked, output, deadline)

    monkeypatch.setattr(Outbox, "emit", emitting)

    async def use(swarm: SimSwarm, servers: list[SimServer], model: SwarmModel) -> None:
        assert await answer(model) == (swarm.expected(PROMPT, 8), [3])
        assert len(echoes) == 16

    with_model(use)


def test_a_fork_goes_the_same_way_with_its_own_tokens() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice)
        await alice.step(row(0, 0, 3))
        tokens = (b"3" * 16, b"4" * 16)
        await ask(alice, servers[0], Fork(ONE, 0, TWO, 3, tokens[0], tokens[1]))
        await ask(alice, servers[1], Fork(ONE, 0, TWO, 3, tokens[1]))
        await alice.step(replace(row(0, 3, 2), session=TWO))
        assert alice.tensor().equal(expected(WHOLE, states(5))[3:])

    with_raw_client(use)


def test_rewiring_changes_where_outputs_go() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice)
        await alice.step(row(0, 0, 3))
        opened = await ask(alice, servers[0], Rewire(ONE, 1))
        assert isinstance(opened, Opened)
        assert (opened.position, opened.next_rtt_s) == (3, NO_NEXT_HOP)
        await alice.step(row(1, 3, 1, epoch=1))
        assert alice.tensor().equal(expected(HALVES[0], states(4))[3:])
        back = Rewire(ONE, 2, await record_of(servers[1], servers[0]), TOKENS[1])
        opened = await ask(alice, servers[0], back)
        assert isinstance(opened, Opened)
        assert opened.next_rtt_s > 0
        await alice.step(row(2, 3, 1, epoch=2))
        assert alice.tensor().equal(expected(WHOLE, states(4))[3:])

    with_raw_client(use)


def test_what_cannot_be_sent_on_now_is_busy_and_can_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "MAX_UNSENT_BYTES", 4 * WIDTH)  # one token of float32

    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice)
        endpoint = servers[0].server.node.endpoint
        post, held = endpoint.post, list[partial[None]]()

        def held_back(peer: PeerId, *args: object, **options: object) -> None:
            posting = partial(post, peer, *args, **options)  # type: ignore[arg-type]
            if peer != alice.peer_id:
                held.append(posting)
            else:
                posting()

        monkeypatch.setattr(endpoint, "post", held_back)
        steps = [row(step, step) for step in range(2)]
        for each in steps:
            await alice.push([each])
            await asyncio.sleep(0.1)
        monkeypatch.setattr(endpoint, "post", post)
        for posting in held:
            posting()
        await alice.answered(2)
        assert [(failed.error, failed.rows) for failed in alice.failures] == [
            (Busy.code, (steps[1],))
        ]
        assert alice.failures[0].retry_after_s > 0
        await asyncio.sleep(alice.failures[0].retry_after_s)  # the first is acknowledged by then
        await alice.step(steps[1])
        assert alice.tensor().equal(expected(WHOLE, states(2))[1:])

    with_raw_client(use)


def test_a_repeated_step_of_several_sessions_travels_on_in_one_message() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice)
        for server, following in ((servers[0], TOKENS[1]), (servers[1], b"")):
            token = TOKENS[servers.index(server)]
            await ask(alice, server, Fork(ONE, 0, TWO, 0, token, following))
        rows = (row(0, 0, 2), replace(row(0, 0, 3), session=TWO))
        await alice.step(*rows)
        await alice.step(*rows)
        await asyncio.sleep(1.0)
        assert [output.rows for output in alice.outputs] == [rows, rows]

    with_raw_client(use)


def test_a_ring_of_hops_comes_to_an_end() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice, is_ring=True)
        await alice.push([row(0, 0, 3)])
        await alice.answered(1)
        await asyncio.sleep(10.0)
        assert [failed.error for failed in alice.failures] == [BadRequest.code]
        assert f"{MAX_HOPS + 1} hops" in alice.failures[0].text
        assert not alice.outputs

    with_raw_client(use)


# --- records that prove nothing ----------------------------------------------------------------

MALLORY = Identity.from_seed(b"m" * 32)


def forged(
    namespace: str = PEER_NAMESPACE,
    *,
    signer: Identity = MALLORY,
    whose: Identity = MALLORY,
    age_s: float = 0.0,
    **body: object,
) -> bytes:
    """Mallory's peer record, as somebody signed it, that long before the test begins."""
    return make_record(
        namespace,
        b"k" * 32,
        whose.peer_id,
        seq=1,
        issued=WALL_EPOCH - age_s,
        expires=2.0**39,
        body={"addresses": ["10.0.0.99:31337"], "public": True, **body},
        sign=signer.sign,
    ).to_bytes()


@pytest.mark.parametrize(
    "record",
    [
        b"x",
        forged()[:-1],
        forged() + b"\x00",
        forged(signer=Identity.from_seed(b"o" * 32)),
        forged(age_s=1000.0),
        forged(age_s=-1000.0),
        forged(PRESENCE_NAMESPACE),
        forged(addresses="10.0.0.99:31337"),
        forged(addresses=["nowhere"]),
        forged(addresses=[f"10.0.0.{number}:1" for number in range(9)]),
        b"\x00" * 5000,
    ],
    ids=[
        "noise",
        "cut",
        "longer",
        "signature",
        "expired",
        "future",
        "namespace",
        "text",
        "address",
        "addresses",
        "large",
    ],
)
def test_a_record_that_proves_nothing_is_refused_and_nobody_is_dialled(record: bytes) -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        endpoint = servers[0].server.node.endpoint
        await alice.open(TWO, span=HALVES[0])
        request = replace(alice.opening(), span=HALVES[0], next_hop=record)
        for message in (request, Rewire(TWO, 5, record)):
            with pytest.raises(BadRequest):
                await ask(alice, servers[0], message)
        assert MALLORY.peer_id not in endpoint._known
        assert [session.id for session in servers[0].server.service.sessions] == [TWO]
        await alice.step(Row(TWO, 0, 0, 0, 2))  # the refused Rewire has changed nothing
        assert alice.tensor().equal(expected(HALVES[0], states(2)))

    with_raw_client(use)


def test_a_hop_is_not_its_own_successor() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        own = await record_of(servers[0], servers[1])
        with pytest.raises(BadRequest):
            await ask(alice, servers[0], replace(alice.opening(), span=HALVES[0], next_hop=own))

    with_raw_client(use)


def test_a_successor_that_never_answers_costs_a_bounded_time_and_is_said_so() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        started = asyncio.get_running_loop().time()
        request = replace(alice.opening(), span=HALVES[0], next_hop=forged())
        opened = await ask(alice, servers[0], request)
        assert isinstance(opened, Opened)
        assert opened.next_rtt_s == NO_NEXT_HOP
        assert asyncio.get_running_loop().time() - started <= REACH_TIMEOUT_S + 0.1
        await alice.push([row(0, 0)])
        await alice.answered(1)
        assert alice.failures[0].next_hop == MALLORY.peer_id.key

    with_raw_client(use)


def test_a_successor_that_was_not_reached_is_not_waited_for_again_soon() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        now = asyncio.get_running_loop().time
        request = replace(alice.opening(), span=HALVES[0], next_hop=forged())
        for pause_s, costs in ((0.0, True), (0.0, False), (BROKEN_S, True)):
            await asyncio.sleep(pause_s)
            started = now()
            opened = await ask(alice, servers[0], request)
            assert isinstance(opened, Opened)
            assert opened.next_rtt_s == NO_NEXT_HOP
            assert (now() - started > REACH_TIMEOUT_S / 2) is costs

    with_raw_client(use)


def test_a_client_makes_a_server_dial_so_many_peers_and_no_more() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice)
        endpoint = servers[0].server.node.endpoint
        dialled: list[PeerId] = []
        ping = endpoint.ping

        async def counted(peer: PeerId, *, timeout_s: float) -> float:
            dialled.append(peer)
            return await ping(peer, timeout_s=0.01)

        endpoint.ping = counted  # type: ignore[method-assign,assignment]
        for number in range(DIALS_AT_ONCE + 5):
            someone = Identity.from_seed(bytes([number, 200]) * 16)
            record = forged(signer=someone, whose=someone)
            request = replace(alice.opening(), span=HALVES[0], next_hop=record)
            await ask(alice, servers[0], request)
        assert len(dialled) == DIALS_AT_ONCE
        endpoint.ping = ping  # type: ignore[method-assign]
        connected = Rewire(ONE, 0, await record_of(servers[1], servers[0]), TOKENS[1])
        opened = await ask(alice, servers[0], connected)
        assert isinstance(opened, Opened)
        assert opened.next_rtt_s > 0

    with_raw_client(use)


def test_an_old_record_of_a_peer_that_is_connected_will_do() -> None:
    async def use(servers: list[SimServer], alice: RawClient) -> None:
        await open_chain(servers, alice)
        record = await record_of(servers[1], servers[0])
        await asyncio.sleep(900.0)
        assert servers[0].server.node.endpoint.is_connected(servers[1].server.node.peer_id)
        base = alice.opening(TWO)
        opened = await ask(
            alice, servers[0], replace(base, span=HALVES[0], next_hop=record, next_token=TOKENS[1])
        )
        assert isinstance(opened, Opened)
        assert opened.next_rtt_s > 0

    with_raw_client(use)

"""What happens to a chain while it is repaired or moved, and servers that lie or never get ready.

All tests ask for the same: the next tokens are right, it does not take for ever, and nobody is
penalised who did nothing wrong.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest

from p2pllm.client.exchange import Interrupted
from p2pllm.client.generation import Session
from p2pllm.client.moves import MAX_LEAVING_S
from p2pllm.client.recovery import Gap, Recovery
from p2pllm.client.replacement import Replacement
from p2pllm.client.session import REPLAY_STEP_S, Chain
from p2pllm.client.state import FIRST_STEP, Hop
from p2pllm.errors import BadRequest, Busy, NotServed
from p2pllm.ids import PeerId
from p2pllm.net.frames import Priority
from p2pllm.server.outbox import Asked
from p2pllm.sim.swarm import SimServer
from p2pllm.spans import Span
from p2pllm.swarm.announcements import ServerState
from p2pllm.wire.messages import HopFailed, Leaving, Opened, Output
from p2pllm.wire.tensors import WireTensor
from tests.swarm.failover_lab import SETTINGS, THIRDS, Crash, FailoverLab, hang, with_lab

TEXT = "the quick brown fox jumps over the lazy dog"
SOON_S = 5.0  # more than a repair without a deadline in it takes
LEAVING_S = 8.0
ALL = Span(0, 6)
MIDDLE = Span(2, 4)
LONGER = (*THIRDS, Span(2, 3), Span(3, 4))  # two servers that could do the middle one's part


async def say(lab: FailoverLab, session: Session, text: str) -> None:
    """Send the next tokens; what comes back must be what the whole model says."""
    logits = await session.step(list(text.encode()))
    for count in range(len(text), max(0, len(text) - 2), -1):
        before = session.token_ids[: len(session.token_ids) - len(text) + count]
        assert lab.swarm.expected(before, 1) == (int(logits[count - 1].argmax()),)


@asynccontextmanager
async def talk(lab: FailoverLab, text: str = TEXT) -> AsyncIterator[Session]:
    """A session that has gone through all hops once; nothing is left of it afterwards."""
    async with lab.model.session(max_tokens=256) as session:
        await say(lab, session, text)
        yield session
    await asyncio.sleep(SOON_S)  # for what the client does by itself to end
    lab.assert_client_is_quiet()


async def know_all(lab: FailoverLab, *spans: Span) -> list[SimServer]:
    """More servers, which the client knows."""
    servers = [await lab.add(span) for span in spans]
    added = {server.server.node.peer_id for server in servers}

    is_known = False
    while not is_known:
        await lab.model.tracker.wait_for_change(SOON_S)
        view = await lab.model.view()
        online = {s.peer_id for s in view.servers if s.presence.state is ServerState.ONLINE}
        is_known = added <= online
    return servers


def server_at(lab: FailoverLab, session: Session, index: int) -> SimServer:
    return lab.server_of(session.chain.hops[index].peer)


def leave(lab: FailoverLab, session: Session, index: int, deadline_s: float = LEAVING_S) -> PeerId:
    """The client hears that a hop is about to leave."""
    peer = session.chain.hops[index].peer
    lab.model._mover.on_leaving(session.chain, peer, deadline_s)
    return peer


async def moved(session: Session, *peers: PeerId) -> None:
    """Wait until they had to be gone; they are in the chain no more."""
    await asyncio.sleep(1.0)
    assert not {hop.peer for hop in session.chain.hops} & set(peers)


def never_pull(lab: FailoverLab) -> None:
    """Journals are replayed, as for a hop that is far away."""
    lab.model.routes.is_pull_cheaper = lambda *_: False  # type: ignore[method-assign]


def slow_records(lab: FailoverLab) -> None:
    """The chain's records are old, so that the DHT is asked before they are shown to others."""
    fresh = lab.model.routes.fresh

    async def slow(hops: Sequence[Hop]) -> tuple[Hop, ...]:
        await asyncio.sleep(0.05)
        return await fresh(hops)

    lab.model.routes.fresh = slow  # type: ignore[method-assign]


def penalised(lab: FailoverLab) -> set[PeerId]:
    view = lab.model.tracker.view()
    return {server.peer_id for server in view.servers if view.is_penalised(server)}


def on_first_plan(lab: FailoverLab, act: Callable[[], object]) -> None:
    """Do something when a gap was planned for the first time, before anything is opened."""
    replan, is_first = lab.model.routes.replan, True

    async def acting(gap: Gap) -> tuple[Hop, ...]:
        nonlocal is_first
        hops = await replan(gap)
        if is_first:
            is_first = False
            act()
        return hops

    lab.model.routes.replan = acting  # type: ignore[method-assign]


# --- a rollback while another server is filled -------------------------------------------------


@pytest.mark.parametrize("again", ["THE", "THE SLOW GREEN CAT SLEEPS UNDER THE BUSY BIRD"])
@pytest.mark.parametrize("is_pulled", [True, False], ids=["pulled", "replayed"])
def test_what_is_rolled_back_is_not_in_a_replacement(is_pulled: bool, again: str) -> None:
    async def use(lab: FailoverLab) -> None:
        if not is_pulled:
            never_pull(lab)
        slow_records(lab)  # between what was filled and its place in the chain
        for delay_s in (0.0, 0.02, 0.03, 0.05, 0.07, 0.1):
            async with talk(lab) as session:
                peer = leave(lab, session, 1)
                await asyncio.sleep(delay_s)
                session.rollback(8)
                await say(lab, session, again)
                await moved(session, peer)
                await say(lab, session, "!?")

    with_lab(use)


def test_a_server_that_comes_back_with_an_old_session_forgets_it() -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            old = server_at(lab, session, 1)
            others = [host for host in lab.hosts if host != old.host]
            lab.cut(old.host, others, None)
            await say(lab, session, "ab")
            assert server_at(lab, session, 1) is not old
            session.rollback(8)
            await say(lab, session, "THE SLOW")
            await lab.heal()
            held = old.server.service.sessions.get(session.state.id)
            assert held is not None
            assert held.length > session.position - 2
            lab.crash(Crash.KILL, server_at(lab, session, 1))

            await say(lab, session, "!?")

            assert server_at(lab, session, 1) is old

    with_lab(use)


# --- moves, and what comes between -------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.04, 0.055, 0.06, 0.09])
def test_a_hop_dies_while_another_one_is_moved(delay_s: float) -> None:
    async def use(lab: FailoverLab) -> None:
        never_pull(lab)
        async with talk(lab) as session:
            await know_all(lab, ALL)
            leave(lab, session, 0)
            dying = server_at(lab, session, 1)
            await asyncio.sleep(delay_s)
            lab.crash(Crash.KILL, dying)
            async with asyncio.timeout(SOON_S):
                await say(lab, session, "!?")
        assert penalised(lab) <= {dying.server.node.peer_id}

    with_lab(use, THIRDS)


@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.06])
def test_of_two_hops_that_leave_at_once_as_many_are_moved_as_there_is_room(
    delay_s: float, num_new: int
) -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            await know_all(lab, *[ALL] * num_new)
            first = leave(lab, session, 0, 3.0)
            await asyncio.sleep(delay_s)
            second = leave(lab, session, 1, 3.0)
            await asyncio.sleep(2.5)
            left = {first, second} - {hop.peer for hop in session.chain.hops}
            assert len(left) == num_new
            async with asyncio.timeout(SOON_S):
                await say(lab, session, "!?")
        assert not penalised(lab)

    with_lab(use, THIRDS)


def test_a_spare_for_an_older_chain_is_not_put_in() -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            await know_all(lab, Span(0, 1), Span(1, 2), Span(4, 6))
            chain, mover = session.chain, lab.model._mover
            await mover.prepare_hedge(chain, 2)
            spare = mover._spares[chain]
            await chain.change(chain.version, partial(asyncio.sleep, 0))  # as a move does

            await chain._mend(chain.version, Interrupted("the spare is ready"))
            await say(lab, session, "!?")

            assert not {hop.peer for hop in chain.hops} & set(spare.peers)
            assert not spare.copies

    with_lab(use, THIRDS)


# --- more than one stretch is lost -------------------------------------------------------------


@pytest.mark.parametrize("spans", [(ALL,), (ALL, MIDDLE)], ids=["one", "two"])
def test_one_server_does_all_if_it_is_the_only_one_for_two_stretches(
    spans: tuple[Span, ...],
) -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            await know_all(lab, *spans)
            for index in (0, 2):
                lab.crash(Crash.KILL, server_at(lab, session, index))
            async with asyncio.timeout(SOON_S):
                await say(lab, session, "!?")
            assert [hop.span for hop in session.chain.hops] == [ALL]
        lab.assert_only_faulty_are_penalised()

    with_lab(use, THIRDS)


@pytest.mark.parametrize("is_first_step", [True, False], ids=["prompt", "later"])
def test_the_other_hops_die_while_one_is_replaced(is_first_step: bool) -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab, "t" if is_first_step else TEXT) as session:
            await know_all(lab, MIDDLE, ALL)
            hops = [server_at(lab, session, index) for index in range(3)]

            def kill_the_others() -> None:
                lab.crash(Crash.KILL, hops[0])
                lab.crash(Crash.KILL, hops[2])

            on_first_plan(lab, kill_the_others)
            lab.crash(Crash.KILL, hops[1])
            async with asyncio.timeout(10.0):
                await say(lab, session, "!?" * 10)
            lab.assert_only_faulty_are_penalised()

    with_lab(use, THIRDS)


# --- siblings ----------------------------------------------------------------------------------


def test_a_sequence_may_be_forked_while_a_hop_is_moved() -> None:
    async def use(lab: FailoverLab) -> None:
        never_pull(lab)
        slow_records(lab)
        for delay_s in (0.0, 0.04, 0.06, 0.08, 0.12, 0.15):
            async with talk(lab) as session:
                peer = leave(lab, session, 1)
                await asyncio.sleep(delay_s)
                fork = await session.fork()
                await say(lab, fork, "!?")
                await moved(session, peer)
                await say(lab, fork, "no")
                await fork.close()
                await say(lab, session, "yes")

    with_lab(use)


def test_a_sequence_may_be_forked_while_a_hop_is_replaced() -> None:
    async def use(lab: FailoverLab) -> None:
        slow_records(lab)
        for delay_s in (0.02, 0.06, 0.09, 0.12):
            async with talk(lab) as session:
                fork = await session.fork()
                lab.crash(Crash.KILL, server_at(lab, session, 1))
                going_on = asyncio.ensure_future(say(lab, fork, "!?"))
                await asyncio.sleep(delay_s)
                other = await session.fork()
                await going_on
                for each, text in ((other, "ab"), (session, "cd"), (fork, "ef")):
                    await say(lab, each, text)
                await other.close()
                await fork.close()
            await lab.replace_dead()
            await lab.model.view()

    with_lab(use)


def test_a_sibling_may_be_closed_while_a_hop_is_replaced() -> None:
    async def use(lab: FailoverLab) -> None:
        for delay_s in (0.0, 0.03, 0.04, 0.05, 0.06):
            async with talk(lab) as session:
                fork = await session.fork()
                await say(lab, fork, "ab")
                lab.crash(Crash.KILL, server_at(lab, session, 1))
                going_on = asyncio.ensure_future(say(lab, session, "!?"))
                await asyncio.sleep(delay_s)
                await fork.close()
                async with asyncio.timeout(SOON_S):
                    await going_on
            await asyncio.sleep(1.0)
            assert not any(len(server.server.service.sessions) for server in lab.living)
            await lab.replace_dead()
            await lab.model.view()

    with_lab(use)


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.01, 0.015, 0.02])
def test_who_is_cancelled_while_hops_take_their_places_leaves_nothing(
    delay_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt, loop = Recovery.adopt, asyncio.get_running_loop
    tasks: list[asyncio.Task[None]] = []

    async def adopting(self: Recovery, chain: Chain, ready: Sequence[Replacement]) -> None:
        loop().call_later(delay_s, tasks[-1].cancel)
        await adopt(self, chain, ready)

    monkeypatch.setattr(Recovery, "adopt", adopting)

    async def use(lab: FailoverLab) -> None:
        slow_records(lab)
        async with talk(lab) as session:
            lab.crash(Crash.KILL, server_at(lab, session, 1))
            tasks.append(asyncio.ensure_future(say(lab, session, "!?")))
            await asyncio.wait(tasks)
            await say(lab, session, "or else")
        await asyncio.sleep(1.0)  # far less than a lease
        assert not any(len(server.server.service.sessions) for server in lab.living)

    with_lab(use, LONGER)


# --- replacements that never get ready ---------------------------------------------------------


def be_busy(server: SimServer, retry_after_s: float) -> None:
    """Let it refuse all that is to be computed, for ever."""

    def refuse(*_: object) -> object:
        raise Busy("later", retry_after_s=retry_after_s)

    server.server.service.sessions.on_row = refuse  # type: ignore[method-assign,assignment]


NEVER_READY: dict[str, Callable[[SimServer], None]] = {
    "it hangs": hang,
    "it is busy for a while": partial(be_busy, retry_after_s=0.1),
    "it is busy for ever": partial(be_busy, retry_after_s=1e6),
}


@pytest.mark.parametrize("name", NEVER_READY)
def test_another_server_is_tried_if_one_never_gets_ready(name: str) -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            dying = server_at(lab, session, 1)
            chosen = await lab.model.routes.replan(
                lab.model._mover._recovery.gap(session.chain, 1, 2, may_return=False)
            )
            chosen_server = lab.server_of(chosen[0].peer)
            NEVER_READY[name](chosen_server)
            lab.dead.add(chosen_server.host)  # what its device never gives back stays there
            (third,) = await know_all(lab, MIDDLE)
            lab.crash(Crash.KILL, dying)
            async with asyncio.timeout(REPLAY_STEP_S + SOON_S):
                await say(lab, session, "!?")
            assert server_at(lab, session, 1) is third
            lab.assert_only_faulty_are_penalised()

    with_lab(use)


# --- servers that lie --------------------------------------------------------------------------


def accuse(lab: FailoverLab, liar: SimServer, victim: PeerId) -> None:
    """Let it say that the hop after it does not serve us."""
    outbox = liar.server.service._outbox

    def emit(asked: Iterable[Asked], output: Output, deadline: float) -> None:
        pairs = list(asked)
        rows = [row for _, row in pairs]
        outbox.report(pairs[0][0].client, rows, NotServed("no"), next_hop=victim.key)

    outbox.emit = emit  # type: ignore[method-assign]


def complain(lab: FailoverLab, liar: SimServer, victim: PeerId) -> None:
    """Let it say that the input from the hop before it is wrong."""
    outbox = liar.server.service._outbox

    def emit(asked: Iterable[Asked], output: Output, deadline: float) -> None:
        for session, row in asked:
            failed = HopFailed((row,), BadRequest("").code, "NaN", is_input=True)
            outbox.send(session.client, failed, Priority.CONTROL)

    outbox.emit = emit  # type: ignore[method-assign]


def swallow(lab: FailoverLab, liar: SimServer, victim: PeerId) -> None:
    """Let it echo its outputs to us, and not push them on."""

    liar.server.service._outbox._push_on = lambda *_: None  # type: ignore[method-assign]


def flatten(lab: FailoverLab, liar: SimServer, victim: PeerId) -> None:
    """Let its outputs have no dimensions."""
    outbox = liar.server.service._outbox
    send = outbox.send

    def sending(client: PeerId, message: Output | HopFailed, priority: Priority) -> None:
        if isinstance(message, Output) and not message.is_echo:
            header = replace(message.tensor.header, shape=())
            flat = WireTensor(header, bytes(header.dtype.itemsize))
            message = replace(message, tensor=flat)
        send(client, message, priority)

    outbox.send = sending  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("lie", "index", "of", "limit_s"),
    [
        (accuse, 0, 1, SOON_S),
        (accuse, 0, 2, SOON_S),
        (complain, 1, 0, SOON_S),
        (complain, 2, 1, SOON_S),
        (flatten, 2, 1, SOON_S),
        (swallow, 0, 1, 2 * SETTINGS.step_timeout_s),
        (swallow, 1, 2, 2 * SETTINGS.step_timeout_s),
    ],
)
def test_who_lies_about_others_is_replaced_and_they_are_not_penalised(
    lie: Callable[[FailoverLab, SimServer, PeerId], None], index: int, of: int, limit_s: float
) -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            liar, victim = server_at(lab, session, index), session.chain.hops[of].peer
            lie(lab, liar, victim)
            async with asyncio.timeout(limit_s):
                await say(lab, session, "!?")
            assert penalised(lab) <= {liar.server.node.peer_id}

    with_lab(use)


@pytest.mark.parametrize("next_step", [FIRST_STEP + 5000, 2**31 - 1])
def test_a_replacement_that_lies_about_what_it_has_computed_is_not_taken(next_step: int) -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            dying = server_at(lab, session, 1)
            (hop,) = await lab.model.routes.replan(
                lab.model._mover._recovery.gap(session.chain, 1, 2, may_return=False)
            )
            service = lab.server_of(hop.peer).server.service
            opened = service._opened

            def lying(*args: object) -> Opened:
                return replace(opened(*args), next_step=next_step)  # type: ignore[arg-type]

            service._opened = lying  # type: ignore[method-assign,assignment]
            (honest,) = await know_all(lab, MIDDLE)
            lab.crash(Crash.KILL, dying)
            async with asyncio.timeout(SOON_S):
                await say(lab, session, "!?")
            assert server_at(lab, session, 1) is honest
            assert penalised(lab) <= {hop.peer, dying.server.node.peer_id}

    with_lab(use)


@pytest.mark.parametrize("epoch", [1024, 2**31 - 1])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_epoch_that_somebody_has_raised_is_survived(index: int, epoch: int) -> None:
    async def use(lab: FailoverLab) -> None:
        async with talk(lab) as session:
            raised = server_at(lab, session, index)
            held = raised.server.service.sessions.get(session.state.id)
            assert held is not None
            held.epoch = epoch  # who has its push token could do that with a row of its own
            async with asyncio.timeout(SOON_S):
                await say(lab, session, "!?")
            assert (server_at(lab, session, index) is raised) == (epoch == 1024)
            assert not penalised(lab)

    with_lab(use)


@pytest.mark.parametrize("deadline_s", [0.0, 1e14])
def test_however_long_a_leaving_server_says_that_it_stays_its_client_tries_for_a_while(
    deadline_s: float,
) -> None:
    async def use(lab: FailoverLab) -> None:
        mover = lab.model._mover
        async with talk(lab) as session:
            node = server_at(lab, session, 1).server.node
            leaving = Leaving((session.state.id,), deadline_s)
            await node.endpoint.push(lab.model.endpoint.peer_id, leaving, timeout_s=1.0)
            await say(lab, session, "!?")
            assert node.peer_id in {hop.peer for hop in session.chain.hops}
            await asyncio.sleep(MAX_LEAVING_S)
            assert not mover._leaving
            await say(lab, session, "!?")
        assert not penalised(lab)

    with_lab(use, THIRDS)

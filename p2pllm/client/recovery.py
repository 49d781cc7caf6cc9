"""Repairing a chain: who is lost, who does their part, and how the steps under way go on.

The failover of PETALS (arXiv 2209.01188 and 2312.08361, section 3.2): hops that are lost are
replaced, and nothing else. What they had in their caches is computed again from the client's
journals, as one prefill in chunks, and the steps under way are sent again.

    1. blame      who failed, by what came (`p2pllm.client.blame`); whoever is only doubted is asked
    2. replace    for every lost stretch of hops: plan it anew, open sessions there, replay
                  (`p2pllm.client.replacement`)
    3. adopt      the new hops take their place; they and their neighbours are told of each other
                  under a higher epoch, which fences off the old ones

Anything that goes wrong on the way is blamed in its turn, and the repair goes on from where it is:
what was adopted stays. Pauses grow, and after the client's patience `NoRoute` says which blocks
nobody serves.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from p2pllm.client.blame import blame
from p2pllm.client.exchange import Interrupted
from p2pllm.client.replacement import Replacement, Replacer
from p2pllm.client.results import Recovered, WaitingForBlocks
from p2pllm.client.retry import Patience
from p2pllm.client.session import Chain, Prospect
from p2pllm.client.state import Hop, SessionState, latest_known_hop
from p2pllm.errors import (
    BadRequest,
    LookupFailed,
    NoRoute,
    OpenFailed,
    P2PLLMError,
    SessionLost,
    StepFailed,
    TransportError,
)
from p2pllm.ids import PeerId
from p2pllm.routing.planner import Route
from p2pllm.spans import Span
from p2pllm.tasks import to_the_end, together
from p2pllm.wire.messages import Numerics

logger = logging.getLogger(__name__)

PROBE_S = 0.5  # for a doubted hop to say that it is there; a LAN needs a hundredth of it
PROBE_RTTS = 6.0  # or so many round trips
MAX_DOUBTS = 2  # of a hop that says it is there, before a step went through
MAX_REPAIRS = 20  # before a step goes through
MISSING_POLL_S = 1.0  # between two looks at the swarm while blocks are missing

MAX_ATTEMPTS = 12  # of one repair for which there were servers to try
EPOCHS_SKIPPED = 4096  # somebody who has a push token may have raised the epoch, by 1024 at once

RETRIED = (NoRoute, LookupFailed, OpenFailed, StepFailed, TransportError, Interrupted)


@dataclass(frozen=True, slots=True)
class Gap:
    """What a stretch of lost hops leaves to be planned.

    `before` and `after`: the hops around it (None: this client). `excluded`: the chain's others.
    `replay_tokens` is what each of `batch` sequences must be given again, `max_tokens` what each
    may grow to.
    """

    span: Span
    before: PeerId | None
    after: PeerId | None
    excluded: frozenset[PeerId]
    numerics: Numerics
    batch: int
    replay_tokens: int
    max_tokens: int


class Routes(Protocol):
    """What a repair needs to know of the swarm: the model's tracker and planner."""

    async def replan(self, gap: Gap) -> tuple[Hop, ...]:
        """Servers for a gap; raises NoRoute or LookupFailed."""
        ...

    def is_pull_cheaper(self, source: Hop, hops: Sequence[Hop], num_tokens: int) -> bool:
        """Do these hops get a sequence's keys and values sooner from `source` than by computing
        them again?"""
        ...

    def reconsider(
        self, prospect: Prospect, measured_s: float, states: Sequence[SessionState]
    ) -> Prospect | None:
        """A better route for what is left of some sequences, or None to stay. `measured_s`: what
        a step took lately."""
        ...

    async def hops_of(self, route: Route) -> tuple[Hop, ...]:
        """A route's hops."""
        ...

    async def fresh(self, hops: Sequence[Hop]) -> tuple[Hop, ...]:
        """The same hops, with records that servers will believe for a while."""
        ...

    def on_failure(self, peer: PeerId) -> None:
        """A server has failed us."""
        ...

    def on_full(self, peer: PeerId, retry_after_s: float) -> None:
        """A server has no room for us; no failure."""
        ...

    def on_link_broken(self, source: PeerId, target: PeerId) -> None:
        """One server could not reach another one, and we can reach both."""
        ...

    async def wait(self, seconds: float) -> None:
        """Let time go by, less if the swarm changes."""
        ...


@dataclass(eq=False)
class _Case:
    """One chain's trouble since its last step that went through."""

    lost: set[PeerId] = field(default_factory=set)
    behind: set[PeerId] = field(default_factory=set)
    failed: set[PeerId] = field(default_factory=set)  # lost lately, replacements too
    missing: tuple[Span, ...] = ()  # served by nobody else, at the last attempt
    doubts: dict[PeerId, int] = field(default_factory=dict)  # hops that are there, and yet failed
    num_repairs: int = 0
    num_objections: int = 0  # of first hops to what we sent
    tell_all: bool = False  # not all hops know what the chain is


class Recovery:
    """Repairs the chains of one client.

    `start` runs what nobody waits for, in a task of the client's. `claimed` says which peers are
    being prepared beside a chain: a server has one session of a sequence, so nobody else may
    choose them meanwhile.
    """

    def __init__(
        self,
        routes: Routes,
        *,
        patience_s: float,
        rng: random.Random,
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self.routes = routes
        self._patience_s = patience_s
        self._rng = rng
        self._start = start
        self._cases: dict[Chain, _Case] = {}
        self._claims: dict[Chain, set[PeerId]] = {}

    @contextmanager
    def claimed(self, chain: Chain, hops: Sequence[Hop]) -> Iterator[None]:
        """Keep these peers for what the caller prepares."""
        claims = self._claims.setdefault(chain, set())
        peers = {hop.peer for hop in hops} - claims
        claims |= peers
        try:
            yield
        finally:
            claims -= peers
            if not claims and self._claims.get(chain) is claims:
                del self._claims[chain]

    def release(self, chain: Chain) -> None:
        """Whoever has claimed peers for a chain does not need them any more."""
        self._claims.pop(chain, None)

    def gap(self, chain: Chain, first: int, stop: int, *, may_return: bool) -> Gap:
        """What is to be planned for hops [first, stop); `may_return`: they may be chosen again."""
        hops = chain.hops
        others = hops[:first] + hops[stop:] if may_return else hops
        states = list(chain.states.values())
        claims = self._claims.get(chain, set())
        return Gap(
            span=_span(chain, first, stop),
            before=hops[first - 1].peer if first else None,
            after=hops[stop].peer if stop < len(hops) else None,
            excluded=frozenset(hop.peer for hop in others) | claims,
            numerics=hops[first].numerics,
            batch=max(1, len(states)),
            replay_tokens=max((state.position for state in states), default=1),
            max_tokens=max((state.max_tokens for state in states), default=1),
        )

    def forget(self, chain: Chain) -> None:
        """All is well with a chain, or it is over."""
        if self._cases:
            self._cases.pop(chain, None)

    async def repair(
        self, chain: Chain, failure: P2PLLMError, spare: Replacement | None = None
    ) -> None:
        """Make a chain whole again after a failure. `spare` is ready to take its place in it.

        Raises NoRoute with the missing blocks, or SessionLost, when patience is over: that counts
        while nobody serves some block; while there are servers to try, they are tried.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        case = self._cases.setdefault(chain, _Case())
        patience = Patience(began + self._patience_s, self._rng, case.num_repairs)
        case.num_repairs += 1
        before, has_said = chain.hops, False
        objection = _objection(chain, failure)
        if objection is not None:
            case.num_objections += 1
            if case.num_objections > 1:
                raise objection
        for attempt in itertools.count():
            pause_s = patience.pause_s(loop.time())
            if case.missing and not has_said:
                has_said = True
                chain.on_event(WaitingForBlocks(case.missing, self._patience_s))
            is_over = attempt >= MAX_ATTEMPTS and not case.missing
            if is_over or case.num_repairs > MAX_REPAIRS or (pause_s is None and case.missing):
                raise self._verdict(chain, case, failure) from failure
            if attempt and case.missing:
                pause_s = max(pause_s or 0.0, MISSING_POLL_S)
            if pause_s:
                await self.routes.wait(pause_s)
            try:
                await self._examine(chain, case, failure)
                replayed = await self._mend(chain, case, spare)
            except RETRIED as exc:
                logger.info("repair failed reason=%s", exc)
                failure = exc
            else:
                break
            spare = None
        self.report(chain, before, failure, loop.time() - began, replayed)

    # --- one attempt -------------------------------------------------------------------------

    async def _examine(self, chain: Chain, case: _Case, failure: P2PLLMError) -> None:
        """Find out who is to be replaced."""
        peers = [hop.peer for hop in chain.hops]
        oldest = next(iter(chain.flights()), None)
        reached = 0
        if oldest is not None:
            rows = [(chain.states[row.session], row) for row in oldest.rows]
            reached = latest_known_hop(rows, len(peers))
        found = blame(failure, peers, reached)
        if found.has_stale_epoch:
            for state in chain.states.values():
                state.new_epoch(EPOCHS_SKIPPED)
        alive = await self._alive(chain, found.doubted)
        found.lost |= found.doubted - alive
        for source, target in found.links:
            if target in alive:
                logger.info("link broken from=%s to=%s", source.short, target.short)
                chain.broken_links.add((source, target))
                self.routes.on_link_broken(source, target)
        for peer in alive | found.behind:
            case.doubts[peer] = case.doubts.get(peer, 0) + 1
            if case.doubts[peer] > MAX_DOUBTS:
                found.moved.add(peer)
        case.failed |= found.lost | found.moved
        for peer in found.lost:
            self.routes.on_failure(peer)
        for peer, retry_after_s in found.full.items():
            self.routes.on_full(peer, retry_after_s)
        case.lost |= (found.lost | found.moved | set(found.full)) & set(peers)
        case.behind = (case.behind | found.behind) & set(peers) - case.lost

    async def _alive(self, chain: Chain, doubted: set[PeerId]) -> set[PeerId]:
        """Which of them answer a ping."""

        async def probe(peer: PeerId) -> bool:
            timeout_s = max(PROBE_S, PROBE_RTTS * (chain.endpoint.rtt_s(peer) or 0.0))
            try:
                # Where else it might be, after a new start, is of no use: its caches are gone.
                await chain.endpoint.ping(peer, timeout_s=timeout_s, is_patient=False)
            except P2PLLMError as exc:
                logger.info("hop lost peer=%s reason=%s", peer.short, exc)
                return False
            return True

        asked = list(doubted)
        answers = await together(map(probe, asked))
        return {peer for peer, is_there in zip(asked, answers, strict=True) if is_there}

    async def _mend(self, chain: Chain, case: _Case, spare: Replacement | None) -> int:
        """Replace who is lost, fill who is behind, tell whom it concerns; tokens replayed."""
        replacer = Replacer(chain)
        ready = [spare] if spare is not None else []
        failures: list[P2PLLMError] = []

        async def prepare(first: int, stop: int, hops: Sequence[Hop]) -> None:
            try:
                ready.append(await replacer.prepare(first, stop, hops))
            except RETRIED as exc:
                failures.append(exc)

        try:
            stretches = [
                (first, stop)
                for first, stop in _stretches(chain, case.lost | case.behind)
                if spare is None or not first <= spare.first < stop
            ]
            plans = await self._plans(chain, case, stretches)
            with self.claimed(chain, [hop for _, _, hops in plans for hop in hops]):
                await together(prepare(*plan) for plan in plans)
                chain.hops = await self.routes.fresh(chain.hops)
                for replacement in ready:
                    await replacer.catch_up(replacement)
        except BaseException:
            await to_the_end(replacer.discard(ready))
            raise
        if ready or not failures:  # one may be needed to fill another's journal
            await self.adopt(chain, ready)
        if failures:
            raise failures[0]
        return sum(replacement.replayed for replacement in ready)

    async def _plans(
        self, chain: Chain, case: _Case, stretches: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int, Sequence[Hop]]]:
        """Hops for each stretch: the same ones if they are only behind, else as planned anew.

        A hop that is left may be the only one that has more blocks of a gap, and then gives its
        part up to do a longer one: so the gap is widened before we say that there is no route.
        Those that have failed are asked last of all, for they may have come back. They are
        announced for a while after their death, so not to know of others is to miss the blocks.
        """
        case.missing = ()
        try:
            return await self._plan_each(chain, case, stretches, case.failed)
        except NoRoute as exc:
            hull = stretches[0][0], stretches[-1][1]
            for first, stop in (hull, *_wider(*hull, len(chain.hops))):
                with suppress(NoRoute):
                    return [(first, stop, await self._replan(chain, first, stop, case.failed))]
            case.missing = _spans(exc)
            case.failed.clear()  # the next attempt leaves out whom this one finds dead
        return await self._plan_each(chain, case, stretches, set())

    async def _plan_each(
        self,
        chain: Chain,
        case: _Case,
        stretches: Sequence[tuple[int, int]],
        excluded: set[PeerId],
    ) -> list[tuple[int, int, Sequence[Hop]]]:
        """One after the other: who was chosen for one stretch is not there for the next."""
        plans: list[tuple[int, int, Sequence[Hop]]] = []
        for first, stop in stretches:
            chosen = {hop.peer for _, _, hops in plans for hop in hops}
            hops = await self._hops_for(chain, case, first, stop, excluded | chosen)
            plans.append((first, stop, hops))
        return plans

    async def _hops_for(
        self, chain: Chain, case: _Case, first: int, stop: int, excluded: set[PeerId]
    ) -> Sequence[Hop]:
        hops = chain.hops[first:stop]
        if not any(hop.peer in case.lost for hop in hops):
            return hops
        return await self._replan(chain, first, stop, excluded)

    async def _replan(
        self, chain: Chain, first: int, stop: int, excluded: set[PeerId]
    ) -> Sequence[Hop]:
        """Servers for hops [first, stop), which may be among them; raises NoRoute."""
        gap = self.gap(chain, first, stop, may_return=True)
        return await self.routes.replan(replace(gap, excluded=gap.excluded | excluded))

    async def adopt(self, chain: Chain, ready: Sequence[Replacement]) -> None:
        """Let replacements take their places; the chain must be locked, and its steps interrupted.

        Raises OpenFailed; they are in their places then all the same.
        """
        case = self._cases.setdefault(chain, _Case())
        gone = [hop.peer for r in ready for hop in chain.hops[r.first : r.stop]]
        tell_all = case.tell_all or not ready
        case.tell_all = True  # until they know
        replacer = Replacer(chain)
        replacer.splice(ready, renew_all=tell_all)
        case.lost -= set(gone)
        case.behind -= set(gone)
        self._start(replacer.discard(ready))  # of what was closed meanwhile
        await replacer.tell(ready, tell_all=tell_all, besides=case.lost | case.behind)
        case.tell_all = False
        self._let_go(chain, gone)
        if not chain.states:
            self.forget(chain)

    def _let_go(self, chain: Chain, peers: Sequence[PeerId]) -> None:
        """Tell hops that were replaced, if they live, to free their memory."""
        gone = set(peers) - {hop.peer for hop in chain.hops}
        if gone and chain.states:
            epoch = max(state.epoch for state in chain.states.values())
            self._start(chain.close_at(gone, tuple(chain.states), epoch))

    # --- words -------------------------------------------------------------------------------

    def _verdict(self, chain: Chain, case: _Case, failure: P2PLLMError) -> P2PLLMError:
        """What to say when patience is over."""
        if isinstance(failure, NoRoute):
            return failure
        missing = case.missing or tuple(
            _span(chain, first, stop) for first, stop in _stretches(chain, case.lost)
        )
        if not missing:
            return SessionLost(f"the route could not be repaired: {failure}")
        blocks = ", ".join(map(str, missing))
        return NoRoute(
            f"no server could take over blocks {blocks}: {failure}",
            [(span.start, span.stop) for span in missing],
        )

    def report(
        self,
        chain: Chain,
        before: Sequence[Hop],
        reason: P2PLLMError | str,
        stall_s: float,
        replayed: int,
    ) -> None:
        gone = [hop for hop in before if hop not in chain.hops]
        came = [hop for hop in chain.hops if hop not in before]
        event = Recovered(
            lost=tuple((hop.peer, hop.span) for hop in gone),
            by=tuple((hop.peer, hop.span) for hop in came),
            reason=str(reason),
            stall_s=stall_s,
            replayed_tokens=replayed,
        )
        logger.info(
            "chain repaired lost=%s by=%s stall_s=%.3f replayed=%d reason=%s",
            ",".join(hop.peer.short for hop in gone),
            ",".join(hop.peer.short for hop in came),
            stall_s,
            replayed,
            reason,
        )
        chain.on_event(event)


def _objection(chain: Chain, failure: P2PLLMError) -> P2PLLMError | None:
    """What the first hop finds wrong with our own input. If another one says so, too, it is."""
    if isinstance(failure, StepFailed) and isinstance(failure.cause, BadRequest):
        is_first = failure.peer == chain.hops[0].peer and failure.next_hop is None
        return failure.cause if is_first else None
    return None


def _span(chain: Chain, first: int, stop: int) -> Span:
    return Span(chain.hops[first].span.start, chain.hops[stop - 1].span.stop)


def _stretches(chain: Chain, peers: set[PeerId]) -> list[tuple[int, int]]:
    """Where these hops are, neighbours together: [first, stop) of each."""
    found: list[tuple[int, int]] = []
    for index, hop in enumerate(chain.hops):
        if hop.peer in peers:
            if found and found[-1][1] == index:
                found[-1] = (found[-1][0], index + 1)
            else:
                found.append((index, index + 1))
    return found


def _wider(first: int, stop: int, num_hops: int) -> Iterator[tuple[int, int]]:
    """Stretches around [first, stop), each with a hop more, up to all hops."""
    while first > 0 or stop < num_hops:
        if first > 0:
            yield first - 1, stop
        if stop < num_hops:
            yield first, stop + 1
        first, stop = max(0, first - 1), min(num_hops, stop + 1)
        yield first, stop


def _spans(failure: NoRoute) -> tuple[Span, ...]:
    return tuple(Span(start, stop) for start, stop in failure.missing)

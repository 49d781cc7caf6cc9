"""Other hops for a chain that works: because one leaves, or is slow, or another route is faster.

One replacement at a time is prepared beside a chain, while its steps go on. When it is ready, it
takes its place between two steps. A failure goes before all of that: it is repaired at once, with
the replacement if that is ready and of use, and else without it.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from p2pllm.client.exchange import Interrupted
from p2pllm.client.recovery import RETRIED, Recovery
from p2pllm.client.replacement import Replacement, Replacer
from p2pllm.client.retry import Patience
from p2pllm.client.session import Chain, Prospect
from p2pllm.client.state import Hop
from p2pllm.errors import P2PLLMError
from p2pllm.ids import PeerId
from p2pllm.tasks import to_the_end

logger = logging.getLogger(__name__)

LEFT = "it was about to leave"
FASTER = "another route is faster"
MAX_LEAVING_S = 600.0  # whatever a server says
LOOK_STEPS = 32  # between two comparisons of a route with what was predicted
MEDIAN_STEPS = 16


class Mover:
    """Looks after the chains of one client (`session.Repairer`).

    `start` runs what nobody waits for, in a task of the client's.
    """

    def __init__(
        self,
        recovery: Recovery,
        rng: random.Random,
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._recovery = recovery
        self._routes = recovery.routes
        self._rng = rng
        self._start = start
        self._spares: dict[Chain, Replacement] = {}  # hedges that are ready
        self._busy: set[Chain] = set()  # something is prepared beside them, or ready
        self._moves: dict[Chain, asyncio.Task[None]] = {}
        self._leaving: set[tuple[Chain, PeerId]] = set()

    # --- what chains call --------------------------------------------------------------------

    def on_progress(self, chain: Chain) -> None:
        """A step is through: all is well."""
        self._recovery.forget(chain)
        if self._spares:
            self._drop_spare(chain)
        prospect = chain.prospect
        if prospect is not None and chain.step_s.num_added >= prospect.look_at:
            prospect.look_at = chain.step_s.num_added + LOOK_STEPS
            self._reconsider(chain, prospect)

    def on_closed(self, chain: Chain) -> None:
        """Sequences were closed, perhaps the last ones."""
        if not chain.states:
            self._recovery.forget(chain)
            self._drop_spare(chain)

    def on_leaving(self, chain: Chain, peer: PeerId, deadline_s: float) -> None:
        """A hop is about to go away: move its part before it does."""
        if (chain, peer) not in self._leaving:
            self._leaving.add((chain, peer))
            self._start(self._leave(chain, peer, min(deadline_s, MAX_LEAVING_S)))

    async def repair(self, chain: Chain, failure: P2PLLMError) -> None:
        """Make a chain whole again after a failure, with the spare if that fits.

        A move under way is given up: the servers that it has chosen may be needed here.
        """
        if chain in self._moves:
            self._moves[chain].cancel()
            self._recovery.release(chain)
        spare = self._spares.pop(chain, None)
        if spare is not None:
            self._busy.discard(chain)
            if spare.version != chain.version or not isinstance(failure, Interrupted):
                self._start(Replacer(chain).discard([spare]))
                spare = None
        await self._recovery.repair(chain, failure, spare)

    # --- hedges ------------------------------------------------------------------------------

    async def prepare_hedge(self, chain: Chain, index: int) -> None:
        """Prepare another server for a slow hop; returns when it is ready to take over."""
        if chain in self._busy:
            await _for_ever()
        self._busy.add(chain)
        hop, is_ready = chain.hops[index], False
        logger.info("hop is slow, preparing another peer=%s", hop.peer.short)
        try:
            gap = self._recovery.gap(chain, index, index + 1, may_return=False)
            hops = await self._routes.replan(gap)
            with self._recovery.claimed(chain, hops):
                self._spares[chain] = await Replacer(chain).prepare(index, index + 1, hops)
            is_ready = True
        except P2PLLMError as exc:
            logger.info("no hedge reason=%s", exc)
        finally:
            if not is_ready:
                self._busy.discard(chain)
                chain.step_s.on_needless_hedge()
        if not is_ready:
            await _for_ever()

    def _drop_spare(self, chain: Chain) -> None:
        spare = self._spares.pop(chain, None)
        if spare is not None:
            self._busy.discard(chain)
            self._start(Replacer(chain).discard([spare]))

    # --- moves -------------------------------------------------------------------------------

    async def _leave(self, chain: Chain, peer: PeerId, deadline_s: float) -> None:
        """Move to other servers in time; if there is none, it will be a failure like others."""
        loop = asyncio.get_running_loop()
        patience = Patience(loop.time() + deadline_s, self._rng)
        try:
            while (pause_s := patience.pause_s(loop.time())) is not None:
                if pause_s:
                    await self._routes.wait(pause_s)
                if not chain.states or chain.index_of(peer) is None:
                    return
                if chain not in self._busy:
                    await self._try(chain, self._move_away(chain, peer))
        finally:
            self._leaving.discard((chain, peer))

    async def _move_away(self, chain: Chain, peer: PeerId) -> None:
        """Let other servers do the part of a hop that still works, and let it go."""
        index = chain.index_of(peer)
        assert index is not None, "the caller has looked"
        hop = chain.hops[index]
        gap = self._recovery.gap(chain, index, index + 1, may_return=False)
        hops, source = await self._routes.replan(gap), None
        if self._routes.is_pull_cheaper(hop, hops, gap.replay_tokens):
            (source,) = await self._routes.fresh([hop])
        await self._move(chain, hop, index + 1, hops, LEFT, source)

    def _reconsider(self, chain: Chain, prospect: Prospect) -> None:
        """Take another route if this one is slower than was thought, and that pays."""
        hops = [(hop.peer, hop.span) for hop in chain.hops]
        if chain in self._busy or chain.step_s.num_added < LOOK_STEPS:
            return
        if hops != [(hop.peer_id, hop.span) for hop in prospect.route.hops]:
            chain.prospect = None  # repaired meanwhile, and nothing was promised for that
            return
        measured_s = chain.step_s.median_s(MEDIAN_STEPS)
        better = self._routes.reconsider(prospect, measured_s, list(chain.states.values()))
        if better is not None:
            self._start(self._try(chain, self._change(chain, better)))

    async def _change(self, chain: Chain, prospect: Prospect) -> None:
        """Move to another route, as far as it differs from this one."""
        planned = await self._routes.hops_of(prospect.route)
        first, stop, hops = _difference(chain.hops, planned)
        if first == stop or {hop.peer for hop in hops} & {hop.peer for hop in chain.hops}:
            return  # a server has one session of a sequence, and needs it for what it does now
        await self._move(chain, chain.hops[first], stop, hops, FASTER, None)
        chain.prospect = prospect

    async def _try(self, chain: Chain, moving: Coroutine[Any, Any, None]) -> None:
        """Move, alone beside the chain. What goes wrong costs the move, and nothing else."""
        if chain in self._busy:
            moving.close()
            return
        self._busy.add(chain)
        task = self._moves[chain] = asyncio.ensure_future(moving)  # this call is its owner
        try:
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
        except P2PLLMError as exc:
            logger.info("not moved reason=%s", exc)
        except Exception:
            logger.exception("move broke")
        finally:
            task.cancel()
            await asyncio.wait([task])
            del self._moves[chain]
            self._busy.discard(chain)

    async def _move(
        self,
        chain: Chain,
        hop: Hop,
        stop: int,
        hops: Sequence[Hop],
        reason: str,
        source: Hop | None,
    ) -> None:
        """Let `hops` do the part from `hop` up to hop `stop`, which goes on until they are ready.

        Raises P2PLLMError; the chain goes on as it was then.
        """
        first, version, replacer = chain.hops.index(hop), chain.version, Replacer(chain)
        with self._recovery.claimed(chain, hops):
            replacement = await replacer.prepare(first, stop, hops, source=source)
            async with _discarded_on_error(replacer, replacement):
                await replacer.catch_up(replacement)  # what came meanwhile; little is left then
                fresh = await self._routes.fresh(chain.hops)
                began = asyncio.get_running_loop().time()
                before = chain.hops

                async def put_in() -> None:
                    chain.hops = fresh
                    await replacer.catch_up(replacement)
                    try:
                        await self._recovery.adopt(chain, [replacement])
                    except RETRIED as exc:
                        self._recovery.release(chain)  # they are hops now, and may do more
                        await self._recovery.repair(chain, exc)

                await chain.change(version, put_in)
        stall_s = asyncio.get_running_loop().time() - began
        self._recovery.report(chain, before, reason, stall_s, replacement.replayed)


@asynccontextmanager
async def _discarded_on_error(replacer: Replacer, replacement: Replacement) -> AsyncIterator[None]:
    """Free a replacement if it does not come to its place."""
    try:
        yield
    except BaseException:
        await to_the_end(replacer.discard([replacement]))
        raise


def _difference(old: Sequence[Hop], new: Sequence[Hop]) -> tuple[int, int, Sequence[Hop]]:
    """Which hops [first, stop) of a chain another route replaces, and with what."""
    first = 0
    while first < min(len(old), len(new)) and _is_same(old[first], new[first]):
        first += 1
    end = 0
    while end < min(len(old), len(new)) - first and _is_same(old[-1 - end], new[-1 - end]):
        end += 1
    return first, len(old) - end, new[first : len(new) - end]


def _is_same(one: Hop, other: Hop) -> bool:
    return (one.peer, one.span) == (other.peer, other.span)


async def _for_ever() -> None:
    await asyncio.get_running_loop().create_future()

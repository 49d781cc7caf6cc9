"""Other hops for a part of a chain: opened, filled from the journals, and put into their place.

A `Replacement` is prepared beside the chain, which may go on working meanwhile: its hops get the
sequences' inputs from the journals, as one prefill in chunks that follow each other closely. Then
`splice` changes the chain, at once, and `tell` takes a round trip to the hops around the gap. So
the same steps serve a hop that died, one that is about to leave, one that is slow and one that has
lost its cache.

A journal may have a hole, where an echo was lost on its way, or where the sequence began with what
the hops held already. The hop before the hole is then asked to compute that stretch once more, in
a copy of its session, and the copy is thrown away.
"""

import asyncio
import logging
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from p2pllm.client.session import PUSH_TOKEN_BYTES, Chain, new_tokens
from p2pllm.client.state import FIRST_STEP, Copy, Hop, SessionState, latest_known_hop
from p2pllm.errors import (
    LocalProtocolError,
    OpenFailed,
    OutOfOrder,
    P2PLLMError,
    RemoteProtocolError,
    SessionLost,
    StepFailed,
)
from p2pllm.ids import SESSION_ID_BYTES, PeerId, SessionId
from p2pllm.tasks import to_the_end, together
from p2pllm.wire.messages import Fork, HandOver, Rewire, Row
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

CHUNKS_IN_FLIGHT = 8  # below the server's window of 16 steps per session
REOPEN_S = 5.0  # somebody waits for it, and there may be others
HAND_OVER_S = 60.0  # for keys and values to be pulled; half a gigabyte at 100 Mbit/s


@dataclass(eq=False)
class Replacement:
    """`hops` for the hops [first, stop) of a chain, as it was at `version`."""

    first: int
    stop: int
    hops: tuple[Hop, ...]
    version: int
    source: Hop | None = None  # has the keys and values that the hops need
    copies: dict[SessionId, Copy] = field(default_factory=dict)
    replayed: int = 0  # tokens, over all sequences and hops

    @property
    def growth(self) -> int:
        """By how many hops the chain becomes longer."""
        return len(self.hops) - (self.stop - self.first)

    @property
    def peers(self) -> list[PeerId]:
        """Its servers."""
        return [hop.peer for hop in self.hops]


class Replacer:
    """Makes replacements for one chain."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    # --- beside the chain --------------------------------------------------------------------

    async def prepare(
        self, first: int, stop: int, hops: Sequence[Hop], *, source: Hop | None = None
    ) -> Replacement:
        """Open the chain's sequences at `hops` and give them what the journals have.

        With a `source`, the hop that is replaced and still works, they pull its keys and values
        instead, as far as they can. Raises OpenFailed or StepFailed, with nothing left open.
        """
        replacement = Replacement(first, stop, tuple(hops), self._chain.version, source)
        try:
            await self.catch_up(replacement)
        except BaseException:
            await to_the_end(self.discard([replacement]))
            raise
        return replacement

    async def catch_up(self, replacement: Replacement) -> None:
        """Let the hops of a replacement hold all that they will not be sent as steps."""
        states = list(self._chain.states.values())
        await self._open(replacement, [s for s in states if s.id not in replacement.copies])
        await together(self._replay(replacement, state) for state in states)

    async def discard(self, replacements: Iterable[Replacement]) -> None:
        """Free what replacements have opened."""
        for replacement in replacements:
            ids = list(replacement.copies)
            epochs = [self._drop(replacement, session) for session in ids]
            if ids:
                await self._chain.close_at(replacement.peers, ids, max(epochs))
            for session in ids if replacement.source is not None else ():
                state = self._chain.states.get(session)
                if state is not None and replacement.source is not None:
                    await self._allow_pull(replacement.source, state)  # nobody, from now on

    def _drop(self, replacement: Replacement, session: SessionId) -> int:
        """Forget a sequence's copy; returns its epoch."""
        copy = replacement.copies.pop(session)
        for journal in copy.journals:
            journal.close()
        state = self._chain.states.get(session)
        if state is not None:
            state.copies.remove(copy)
        return copy.epoch

    async def _open(self, replacement: Replacement, states: Sequence[SessionState]) -> None:
        hops, store = replacement.hops, self._chain.store
        for state in states:
            copy = Copy(
                epoch=state.new_epoch(),
                push_tokens=new_tokens(hops),
                journals=[store.journal() for _ in hops[1:]],
                held=[0] * len(hops),
            )
            replacement.copies[state.id] = copy
            state.copies.append(copy)
        failures: dict[PeerId, P2PLLMError] = {}

        async def open_for(state: SessionState) -> None:
            copy, token, source = replacement.copies[state.id], b"", replacement.source
            if source is not None and state.position:
                token = await self._allow_pull(source, state)
            copy.lowest_cut = math.inf
            await together(
                open_at(state, copy, index, token) for index in range(len(replacement.hops))
            )

        async def open_at(state: SessionState, copy: Copy, index: int, token: bytes) -> None:
            try:
                copy.hold(index, await self._open_at(replacement, state, copy, index, token))
            except P2PLLMError as exc:
                failures[hops[index].peer] = exc

        await together(map(open_for, states))
        if failures:
            raise OpenFailed(failures)

    async def _allow_pull(self, source: Hop, state: SessionState) -> bytes:
        """Let whoever has this token read a sequence's keys and values; nothing if that fails."""
        token = os.urandom(PUSH_TOKEN_BYTES)
        try:
            await self._chain.ask(source.peer, HandOver(state.id, state.epoch, token))
        except P2PLLMError as exc:  # then the journals must do
            logger.info("no hand-over from=%s reason=%s", source.peer.short, exc)
            return b""
        return token

    async def _open_at(
        self, replacement: Replacement, state: SessionState, copy: Copy, index: int, token: bytes
    ) -> int:
        """Open a sequence at a hop that answers us for the time being; tokens that it has.

        A server that did this part before may hold something of the sequence still. Nobody knows
        how it differs from what we have now, so it is told to forget it first.
        """
        chain, hop = self._chain, replacement.hops[index]
        needed = state.target(replacement.stop - 1)
        timeout_s = HAND_OVER_S if token else min(REOPEN_S, chain.config.open_timeout_s)
        request = chain.opening(state, hop, copy.epoch, copy.push_tokens[index])
        if token:
            assert replacement.source is not None, "who else could have given it?"
            request = replace(
                request,
                source=replacement.source.record,
                source_token=token,
                source_position=needed,
            )
        opened = await chain.ask(hop.peer, request, timeout_s=timeout_s)
        if opened.next_step or opened.position > request.source_position:
            await chain.close_at([hop.peer], [state.id], copy.epoch)
            opened = await chain.ask(hop.peer, request, timeout_s=timeout_s)
        if opened.next_step or opened.position > request.source_position:
            raise RemoteProtocolError(f"{hop.peer.short} has kept what it should forget")
        if token:
            logger.info(
                "handed over to=%s tokens=%d of=%d", hop.peer.short, opened.position, needed
            )
        return opened.position

    async def _replay(self, replacement: Replacement, state: SessionState) -> None:
        """One sequence's inputs for the new hops, from what they hold to what they need."""
        copy = replacement.copies[state.id]
        try:
            while min(copy.held) < (stop := state.target(replacement.stop - 1)):
                start, copy.lowest_cut = min(copy.held), math.inf
                try:
                    await self._replay_range(replacement, state, copy, start, stop)
                except LocalProtocolError:  # a hole: is it one because of a rollback?
                    if copy.lowest_cut >= stop:
                        raise
                for index in range(len(copy.held)):
                    copy.hold(index, stop)
        except LocalProtocolError:
            if state.id in self._chain.states:
                raise
            # It was closed meanwhile, and its journals with it: nobody needs the rest.

    async def _replay_range(
        self, replacement: Replacement, state: SessionState, copy: Copy, start: int, stop: int
    ) -> None:
        first, chunk_tokens = replacement.first, self._chain.config.prefill_chunk_tokens
        await self._fill_holes(state, first, start, stop)
        parts = state.journals[first].parts(start, stop, chunk_tokens)
        if copy.next_step:  # steps of an earlier replay may never have been sent
            copy.epoch = state.new_epoch()
        first_step, copy.next_step = copy.next_step, copy.next_step + len(parts)
        if copy.next_step > FIRST_STEP:
            raise SessionLost("the sequence was rolled back too often while it was moved")
        gate = asyncio.Semaphore(CHUNKS_IN_FLIGHT)  # FIFO: chunks leave in order

        async def send(step: int, part: tuple[int, int]) -> None:
            async with gate:
                (tensor,) = state.journals[first].read(*part, chunk_tokens)
                row = _row(state.id, copy.epoch, step, part[0], tensor, first_step)
                await self._send(replacement, copy, row, tensor)

        await together(send(step, part) for step, part in enumerate(parts, first_step))
        replacement.replayed += (stop - start) * len(replacement.hops)

    async def _send(
        self, replacement: Replacement, copy: Copy, row: Row, tensor: WireTensor
    ) -> None:
        """One chunk through all new hops; of the last one we need nothing but that it is done."""
        for index, hop in enumerate(replacement.hops):
            is_last = index + 1 == len(replacement.hops)
            asked = replace(row, tail=1) if is_last else row
            tensor = await self._chain.step_at(hop.peer, asked, tensor)
            if not is_last and row.position < copy.lowest_cut:
                copy.journals[index].put(row.position, tensor)

    async def _fill_holes(self, state: SessionState, hop: int, start: int, stop: int) -> None:
        """Have all inputs [start, stop) of `hop` in its journal.

        What the hops held when the sequence began is one hole, and usually the only one.
        """
        for end in (min(state.num_shared, stop), stop):
            hole = state.journals[hop].first_hole(start, end)
            if hole is not None:
                await self._fill(state, hop, hole, end)

    async def _fill(self, state: SessionState, hop: int, start: int, stop: int) -> None:
        """Have the hop before compute the inputs [start, stop) of `hop` again."""
        before, journal = self._chain.hops[hop - 1], state.journals[hop - 1]
        await self._fill_holes(state, hop - 1, start, stop)
        logger.info("journal filled hop=%s tokens=%d:%d", before.peer.short, start, stop)
        copy, epoch = SessionId(os.urandom(SESSION_ID_BYTES)), state.epoch
        chunk_tokens = self._chain.config.prefill_chunk_tokens
        try:
            if start:
                await self._copy(state, before.peer, copy, start)
            else:
                await self._begin(state, before, copy, stop)
            position = start
            for number, chunk in enumerate(journal.read(start, stop, chunk_tokens)):
                row = _row(copy, epoch, number, position, chunk, 0)
                output = await self._chain.step_at(before.peer, row, chunk)
                state.journals[hop].put(position, output)
                position += row.num_tokens
        finally:
            await to_the_end(self._chain.close_at([before.peer], [copy], epoch))

    async def _copy(self, state: SessionState, peer: PeerId, copy: SessionId, length: int) -> None:
        """Fork a session at one hop, answering us. Raises StepFailed."""
        fork = Fork(state.id, state.epoch, copy, length, os.urandom(PUSH_TOKEN_BYTES))
        try:
            await self._chain.fork_at(peer, fork)
            await self._chain.ask(peer, Rewire(copy, state.epoch))
        except P2PLLMError as exc:
            raise StepFailed(peer, exc) from exc

    async def _begin(self, state: SessionState, hop: Hop, copy: SessionId, num_tokens: int) -> None:
        """Open a session at one hop to compute a sequence's beginning. Raises StepFailed.

        It needs less room than a fork, and the sequence need not be between steps.
        """
        request = self._chain.opening(state, hop, state.epoch, os.urandom(PUSH_TOKEN_BYTES))
        request = replace(request, session=copy, max_tokens=num_tokens, wait_s=REOPEN_S)
        try:
            await self._chain.ask(hop.peer, request)
        except P2PLLMError as exc:
            raise StepFailed(hop.peer, exc) from exc

    # --- in the chain ------------------------------------------------------------------------

    def splice(self, replacements: Sequence[Replacement], *, renew_all: bool) -> None:
        """Put replacements into their places; the steps under way must have been interrupted.

        Everything gets a higher epoch. The hop after a gap gets a new push token, so that the old
        one before it cannot reach it any more; `renew_all`: all hops do.
        """
        chain = self._chain
        _check(chain, replacements)
        for replacement in sorted(replacements, key=lambda each: -each.first):
            self._splice(replacement)
        afters = {hop.peer for r in replacements for hop in self._around(r)[1]}
        for state in chain.states.values():
            for index, hop in enumerate(chain.hops):
                if renew_all or hop.peer in afters:
                    state.push_tokens[index] = os.urandom(PUSH_TOKEN_BYTES)
            state.epoch = state.new_epoch()

    def _splice(self, replacement: Replacement) -> None:
        chain, first, stop = self._chain, replacement.first, replacement.stop
        chain.hops = (*chain.hops[:first], *replacement.hops, *chain.hops[stop:])
        for flight in chain.flights():
            if flight.start >= stop:
                flight.start += replacement.growth
            elif flight.start > first:
                pairs = [(chain.states[row.session], row) for row in flight.rows]
                flight.start = latest_known_hop(pairs, first + 1)
        for state in chain.states.values():
            copy = replacement.copies.pop(state.id)
            state.copies.remove(copy)
            state.splice(first, stop, copy.journals, copy.push_tokens)

    def _around(self, replacement: Replacement) -> tuple[tuple[Hop, ...], tuple[Hop, ...]]:
        """The hop before and the one after it, if there is one, once it is in its place."""
        hops = self._chain.hops
        first = hops.index(replacement.hops[0])
        end = first + len(replacement.hops)
        return hops[max(0, first - 1) : first], hops[end : end + 1]

    async def tell(
        self, replacements: Sequence[Replacement], *, tell_all: bool, besides: Collection[PeerId]
    ) -> None:
        """Tell new hops and those around them of each other; `tell_all`: every hop.

        Not those `besides`, which are to be replaced, too.

        Raises OpenFailed, also for hops that do not hold what they should; the chain is then as
        it is to be, but not all hops know.
        """
        chain, told = self._chain, set[PeerId]()
        for replacement in replacements:
            before, after = self._around(replacement)
            told.update(hop.peer for hop in (*before, *replacement.hops, *after))
        peers = [hop.peer for hop in chain.hops]
        wanted = (set(peers) if tell_all else told) - set(besides)
        states = list(chain.states.values())

        async def tell_one(index: int) -> None:
            opened = await together(chain.open_at(state, index) for state in states)
            for state, reply in zip(states, opened, strict=True):
                needed = state.target(index)
                if state.id not in chain.states:  # closed meanwhile, and opened again by this
                    await chain.close_at([peers[index]], [state.id], state.epoch)
                elif reply.position < needed:
                    raise OutOfOrder(
                        f"{reply.position} of {needed} tokens are there", expected=reply.position
                    )

        failures = await chain.at_hops([i for i, p in enumerate(peers) if p in wanted], tell_one)
        if failures:
            raise OpenFailed(failures)
        await chain.relay_broken_links(states)


def _row(
    session: SessionId, epoch: int, step: int, position: int, tensor: WireTensor, first_step: int
) -> Row:
    """The row of a chunk of a replay."""
    return Row(
        session,
        epoch,
        step,
        position,
        num_tokens=tensor.header.shape[0],
        acked=max(-1, step - CHUNKS_IN_FLIGHT - 1),
        first_step=first_step,
    )


def _check(chain: Chain, replacements: Sequence[Replacement]) -> None:
    """Raise LocalProtocolError for what would be no chain: planning must not let it come to that.

    A server has one session of a sequence, and so one part of a chain.
    """
    hops = list(chain.hops)
    for replacement in sorted(replacements, key=lambda each: -each.first):
        hops[replacement.first : replacement.stop] = replacement.hops
    is_whole = all(one.span.stop == other.span.start for one, other in pairwise(hops))
    ends = (hops[0].span.start, hops[-1].span.stop)
    is_same = ends == (chain.hops[0].span.start, chain.hops[-1].span.stop)
    if len({hop.peer for hop in hops}) < len(hops) or not is_whole or not is_same:
        parts = ", ".join(f"{hop.peer.short} {hop.span}" for hop in hops)
        raise LocalProtocolError(f"no chain: {parts}")

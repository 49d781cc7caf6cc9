"""Sessions: sequences whose keys and values live along a route, and the steps through it.

A `Chain` is a route in use. It opens sessions on every hop, carries steps through the hops, and
closes what it opened, whatever cancels it meanwhile. Several sequences of one client go through the
chain in the same messages.

Hops push to each other where they can: the client hands a step to the first hop of a *segment* and
gets the output of its last. Where one hop cannot reach the next, a segment ends, and the client
relays that link: it hands on the output as the bytes that came.

A step that fails or is cancelled half way has gone through some hops and not through others. Its
sequences then continue under a higher epoch from where all hops stand: that fences off what is
still under way, and lets the hops that never saw the step go on without it (docs/protocol.md).
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from p2pllm.client.exchange import Exchange, Part
from p2pllm.config import ClientConfig
from p2pllm.errors import Busy, OpenFailed, P2PLLMError, RemoteProtocolError
from p2pllm.ids import SESSION_ID_BYTES, ModelId, PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.spans import Span
from p2pllm.tasks import to_the_end, together
from p2pllm.wire.messages import (
    Close,
    Fork,
    HopTiming,
    Message,
    Numerics,
    Open,
    Opened,
    Rewire,
    Row,
    Step,
)
from p2pllm.wire.tensors import TensorCodec, WireTensor

logger = logging.getLogger(__name__)

PUSH_TOKEN_BYTES = 16
CLOSE_TIMEOUT_S = 2.0
BUSY_PAUSE_S = 0.05  # at least, before a full queue is asked again


@dataclass(frozen=True, slots=True)
class Hop:
    """One server's part of a chain."""

    peer: PeerId
    span: Span
    numerics: Numerics
    record: bytes = b""  # its signed peer record; empty: others are not told how to reach it


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How hidden states are asked to be coded."""

    codec: TensorCodec
    is_compressed: bool


@dataclass
class SessionState:
    """Where one sequence stands. `position` counts the tokens that all hops hold."""

    id: SessionId
    max_tokens: int
    position: int = 0
    epoch: int = 0
    next_step: int = 0
    acked: int = -1
    broken: set[int] = field(default_factory=set)  # hops that could not reach the next one

    def next_row(self, num_tokens: int, tail: int) -> Row:
        """The row for the next tokens; the state moves on as if they were through."""
        row = Row(self.id, self.epoch, self.next_step, self.position, num_tokens, self.acked, tail)
        self.next_step += 1
        self.position += num_tokens
        return row

    def give_up(self, row: Row) -> None:
        """The row's step failed somewhere: what it, and steps after it, left does not count."""
        self.position = min(self.position, row.position)
        self.epoch = max(self.epoch, row.epoch + 1)


@dataclass(frozen=True, slots=True)
class HopMeasure:
    """What one step cost at one hop: `timing` as the hop said, `link_s` its share of the rest."""

    peer: PeerId
    span: Span
    batch: int  # sequences
    num_tokens: int
    num_bytes: int
    link_s: float
    is_relayed: bool  # then `link_s` is our own link to it, both ways
    timing: HopTiming


Repack = Callable[[Sequence[Row], Sequence[Part]], Awaitable[WireTensor]]


@dataclass(eq=False)
class Chain:
    """A route in use: hops in order that cover all blocks.

    `repack` joins the parts of an answer that came in several messages, in the order of rows.
    `on_measure` is told what each step cost at each hop.
    """

    endpoint: Endpoint
    exchange: Exchange
    config: ClientConfig
    model: ModelId
    hops: tuple[Hop, ...]
    wire: WireFormat
    repack: Repack
    on_measure: Callable[[HopMeasure], None]
    _relayed: set[int] = field(init=False)  # hops whose output comes back to us

    def __post_init__(self) -> None:
        last = len(self.hops) - 1
        self._relayed = {i for i in range(last) if not self.hops[i + 1].record} | {last}

    @property
    def segments(self) -> list[tuple[Hop, ...]]:
        """The hops, cut where the client relays."""
        cuts = [0, *(index + 1 for index in sorted(self._relayed))]
        return [self.hops[start:stop] for start, stop in pairwise(cuts)]

    async def open(self, max_tokens: Sequence[int], *, wait_s: float = 0.0) -> list[SessionState]:
        """Reserve room for sequences of these lengths on every hop, all at once.

        Servers without free cache may let us wait for `wait_s`. Raises OpenFailed, with nothing
        left open.
        """
        opened: list[SessionState] = []

        async def open_one(count: int) -> SessionState:
            state = await self._open_one(count, wait_s)
            opened.append(state)
            return state

        try:
            states = await together(map(open_one, max_tokens))
            await self._relay_broken_links(states)
            return states
        except BaseException:
            await self.close(opened)
            raise

    async def _open_one(self, max_tokens: int, wait_s: float) -> SessionState:
        state = SessionState(_new_session_id(), max_tokens)
        tokens = [os.urandom(PUSH_TOKEN_BYTES) for _ in self.hops]

        async def open_at(hop: Hop) -> None:
            index = self.hops.index(hop)
            is_pushing = index not in self._relayed
            request = Open(
                session=state.id,
                epoch=state.epoch,
                span=hop.span,
                max_tokens=max_tokens,
                model=self.model,
                numerics=hop.numerics,
                push_token=tokens[index],
                client=self.endpoint.peer_id,
                next_hop=self.hops[index + 1].record if is_pushing else b"",
                next_token=tokens[index + 1] if is_pushing else b"",
                codec=self.wire.codec,
                is_compressed=self.wire.is_compressed,
                wait_s=wait_s,
            )
            opened = await self._ask(hop, request, timeout_s=self.config.open_timeout_s + wait_s)
            if is_pushing and opened.next_rtt_s < 0:
                state.broken.add(index)

        await self._open_at_every_hop(state, open_at)
        return state

    async def _relay_broken_links(self, states: Sequence[SessionState]) -> None:
        """Where a hop cannot reach the next one, all sequences come back to us from there.

        Raises OpenFailed.
        """
        broken = set().union(*(state.broken for state in states))
        if not broken:
            return
        self._relayed |= broken
        failures: dict[PeerId, P2PLLMError] = {}

        async def rewire(state: SessionState, index: int) -> None:
            hop = self.hops[index]
            logger.info("link relayed after=%s span=%s", hop.peer.short, hop.span)
            request = Rewire(state.id, state.epoch)
            try:
                await self._ask(hop, request, timeout_s=self.config.open_timeout_s)
            except P2PLLMError as exc:
                failures[hop.peer] = exc

        await together(rewire(state, index) for state in states for index in broken)
        if failures:
            raise OpenFailed(failures)

    async def fork(self, source: SessionState) -> SessionState:
        """Copy a sequence at every hop; it must be between steps. Raises OpenFailed."""
        state = replace(source, id=_new_session_id(), acked=-1, broken=set())

        tokens = [os.urandom(PUSH_TOKEN_BYTES) for _ in self.hops]

        async def fork_at(hop: Hop) -> None:
            index = self.hops.index(hop)
            following = b"" if index in self._relayed else tokens[index + 1]
            request = Fork(
                source.id, source.epoch, state.id, source.position, tokens[index], following
            )
            await self._ask(hop, request, timeout_s=self.config.open_timeout_s)

        await self._open_at_every_hop(state, fork_at)
        return state

    async def _open_at_every_hop(
        self, state: SessionState, action: Callable[[Hop], Awaitable[None]]
    ) -> None:
        """Open a session at all hops, or at none."""
        try:
            failures = await self._at_every_hop(action)
            if failures:
                raise OpenFailed(failures)
        except BaseException:
            await self.close([state])
            raise

    async def step(
        self,
        states: Sequence[SessionState],
        counts: Sequence[int],
        tensor: WireTensor,
        tail: int,
        *,
        priority: Priority = Priority.DECODE,
    ) -> WireTensor:
        """Send the next tokens of some sequences through all hops.

        `counts` says how many tokens each has; `tensor` packs their hidden states in that order,
        (sum of counts, D). Returns the last hop's, of the last `tail` tokens of each (0: all).
        Raises RequestFailed or TransportError; the sequences are then where they were before.
        """
        rows = [state.next_row(count, tail) for state, count in zip(states, counts, strict=True)]
        try:
            segments = self.segments
            for segment in segments:
                asked = rows if segment is segments[-1] else _whole(rows)
                tensor = await self._step_through(segment, asked, tensor, priority)
        except BaseException:
            for state, row in zip(states, rows, strict=True):
                state.give_up(row)
            raise
        for state, row in zip(states, rows, strict=True):
            state.acked = max(state.acked, row.step)
        return tensor

    async def close(self, states: Sequence[SessionState]) -> None:
        """Free sequences at every hop, also if we are cancelled meanwhile.

        A hop that cannot be reached forgets them by itself.
        """
        if not states:
            return
        request = Close(tuple(state.id for state in states), max(state.epoch for state in states))

        async def close_at(hop: Hop) -> None:
            await self.endpoint.request(hop.peer, request, timeout_s=CLOSE_TIMEOUT_S)

        await to_the_end(self._at_every_hop(close_at))

    async def _step_through(
        self, segment: Sequence[Hop], rows: Sequence[Row], tensor: WireTensor, priority: Priority
    ) -> WireTensor:
        """One segment's part. A hop whose queue is full is asked again when it says."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.step_timeout_s
        peers = [hop.peer for hop in segment]
        while True:
            started = loop.time()
            budget_s = deadline - started
            step = Step(tuple(rows), tensor, budget_s=budget_s)
            try:
                parts = await self.exchange.step(peers, step, timeout_s=budget_s, priority=priority)
            except Busy as exc:
                pause_s = max(exc.retry_after_s, BUSY_PAUSE_S)
                if started + pause_s >= deadline:
                    raise
                await asyncio.sleep(pause_s)
            else:
                self._measure(segment, step, parts, loop.time() - started)
                return await self._joined(segment[-1], step, parts)

    async def _joined(self, hop: Hop, step: Step, parts: Sequence[Part]) -> WireTensor:
        """The answer in the order of the step's rows. Raises RemoteProtocolError."""
        rows = {(row.session, row.step): row for row in step.rows}
        width = step.tensor.header.shape[1:]
        for part in parts:
            is_ours = all(_is_alike(rows[row.session, row.step], row) for row in part.rows)
            if not is_ours or part.tensor.header.shape != (_num_outputs(part), *width):
                raise RemoteProtocolError(f"{hop.peer.short} answered something else than asked")
        if len(parts) == 1 and parts[0].rows == step.rows:
            return parts[0].tensor
        return await self.repack(step.rows, parts)

    def _measure(
        self, segment: Sequence[Hop], step: Step, parts: Sequence[Part], total_s: float
    ) -> None:
        """Tell what each hop said of its part; what is left of the time went on the links."""
        timings = max((part.timings for part in parts), key=_busy_s)
        if len(timings) != len(segment):
            return  # a hop that does not follow the protocol; the step is good all the same
        link_s = max(0.0, total_s - _busy_s(timings)) / len(segment)
        num_tokens = sum(row.num_tokens for row in step.rows)
        num_bytes = len(step.tensor.data) + sum(len(part.tensor.data) for part in parts)
        for hop, timing in zip(segment, timings, strict=True):
            self.on_measure(
                HopMeasure(
                    hop.peer,
                    hop.span,
                    batch=len(step.rows),
                    num_tokens=num_tokens,
                    num_bytes=num_bytes,
                    link_s=link_s,
                    is_relayed=len(segment) == 1,
                    timing=timing,
                )
            )

    async def _at_every_hop(
        self, action: Callable[[Hop], Awaitable[None]]
    ) -> dict[PeerId, P2PLLMError]:
        """Do it at all hops at once; returns the errors by peer."""
        results = await asyncio.gather(*map(action, self.hops), return_exceptions=True)
        failures: dict[PeerId, P2PLLMError] = {}
        for hop, result in zip(self.hops, results, strict=True):
            if isinstance(result, P2PLLMError):
                logger.info(
                    "hop refused peer=%s span=%s error=%s", hop.peer.short, hop.span, result
                )
                failures[hop.peer] = result
            elif result is not None:
                raise result
        return failures

    async def _ask(self, hop: Hop, request: Message, *, timeout_s: float) -> Opened:
        reply = await self.endpoint.request(hop.peer, request, timeout_s=timeout_s)
        if not isinstance(reply, Opened):
            raise RemoteProtocolError(f"{hop.peer.short} answered with {type(reply).__name__}")
        return reply


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rows with all their outputs asked for: the next hop needs every token."""
    return [replace(row, tail=0) if row.tail else row for row in rows]


def _is_alike(asked: Row, answered: Row) -> bool:
    """Is it the answer to that? An output may have been kept since we asked first."""
    return (asked.position, asked.num_tokens, asked.num_outputs) == (
        answered.position,
        answered.num_tokens,
        answered.num_outputs,
    )


def _busy_s(timings: Sequence[HopTiming]) -> float:
    """How long the hops had a step, together."""
    return sum(timing.queue_s + timing.compute_s for timing in timings)


def _num_outputs(part: Part) -> int:
    return sum(row.num_outputs for row in part.rows)


def _new_session_id() -> SessionId:
    return SessionId(os.urandom(SESSION_ID_BYTES))

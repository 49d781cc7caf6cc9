"""Sessions: sequences whose keys and values live along a route, and the steps through it.

A `Chain` is a route in use. It opens sessions on every hop, carries steps through the hops, and
closes what it opened. Here the client relays: it hands each hop's output, as the bytes that came,
to the next hop. Several sequences of one client go through the chain in the same messages.

The public face of one sequence is `Session`: `step`, `rollback`, `fork`, `close`.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from p2pllm.client.exchange import Exchange, Part
from p2pllm.config import ClientConfig
from p2pllm.errors import OpenFailed, P2PLLMError, RemoteProtocolError
from p2pllm.ids import SESSION_ID_BYTES, ModelId, PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.spans import Span
from p2pllm.wire.messages import Close, Fork, HopTiming, Message, Numerics, Open, Opened, Row, Step
from p2pllm.wire.tensors import TensorCodec, WireTensor

logger = logging.getLogger(__name__)

PUSH_TOKEN_BYTES = 16
CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Hop:
    """One server's part of a chain."""

    peer: PeerId
    span: Span
    numerics: Numerics


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
    next_step: int = 0
    acked: int = -1

    def next_row(self, num_tokens: int, tail: int) -> Row:
        """The row for the next tokens; the state moves on as if they were through."""
        row = Row(self.id, 0, self.next_step, self.position, num_tokens, self.acked, tail)
        self.next_step += 1
        self.position += num_tokens
        return row


@dataclass(frozen=True, slots=True)
class HopMeasure:
    """What one step cost at one hop, as the client saw it (`total_s`) and as the hop said."""

    peer: PeerId
    span: Span
    batch: int  # sequences
    num_tokens: int
    num_bytes: int
    total_s: float
    timing: HopTiming


Repack = Callable[[Sequence[Row], Sequence[Part]], WireTensor]


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
    _sessions: dict[SessionId, SessionState] = field(default_factory=dict)

    async def open(self, max_tokens: int, *, wait_s: float = 0.0) -> SessionState:
        """Reserve room for a sequence of `max_tokens` on every hop, all at once.

        Raises OpenFailed after having closed what could be opened.
        """
        state = SessionState(_new_session_id(), max_tokens)

        async def open_at(hop: Hop) -> None:
            request = Open(
                session=state.id,
                epoch=0,
                span=hop.span,
                max_tokens=max_tokens,
                model=self.model,
                numerics=hop.numerics,
                push_token=os.urandom(PUSH_TOKEN_BYTES),
                client=self.endpoint.peer_id,
                codec=self.wire.codec,
                is_compressed=self.wire.is_compressed,
                wait_s=wait_s,
            )
            await self._ask(hop, request, timeout_s=self.config.open_timeout_s + wait_s)

        failures = await self._at_every_hop(open_at)
        if failures:
            await self._close([state.id])
            raise OpenFailed(failures)
        self._sessions[state.id] = state
        return state

    async def fork(self, source: SessionState) -> SessionState:
        """Copy a sequence at every hop; it must be between steps. Raises OpenFailed."""
        state = SessionState(
            _new_session_id(), source.max_tokens, source.position, source.next_step
        )

        async def fork_at(hop: Hop) -> None:
            token = os.urandom(PUSH_TOKEN_BYTES)
            request = Fork(source.id, 0, state.id, source.position, token)
            await self._ask(hop, request, timeout_s=self.config.open_timeout_s)

        failures = await self._at_every_hop(fork_at)
        if failures:
            await self._close([state.id])
            raise OpenFailed(failures)
        self._sessions[state.id] = state
        return state

    async def step(
        self, states: Sequence[SessionState], counts: Sequence[int], tensor: WireTensor, tail: int
    ) -> WireTensor:
        """Send the next tokens of some sequences through all hops.

        `counts` says how many tokens each has; `tensor` packs their hidden states in that order,
        (sum of counts, D). Returns the last hop's, of the last `tail` tokens of each (0: all).
        Raises RequestFailed or TransportError; the sequences' caches are then undefined.
        """
        rows = [state.next_row(count, tail) for state, count in zip(states, counts, strict=True)]
        is_decode = max(counts) == 1
        priority = Priority.DECODE if is_decode else Priority.PREFILL
        for index, hop in enumerate(self.hops):
            is_last = index == len(self.hops) - 1
            tensor = await self._step_at(hop, rows if is_last else _whole(rows), tensor, priority)
        for state, row in zip(states, rows, strict=True):
            state.acked = max(state.acked, row.step)
        return tensor

    async def close(self, states: Sequence[SessionState]) -> None:
        """Free sequences at every hop; a hop that cannot be reached forgets them by itself."""
        for state in states:
            self._sessions.pop(state.id, None)
        await self._close([state.id for state in states])

    async def _step_at(
        self, hop: Hop, rows: Sequence[Row], tensor: WireTensor, priority: Priority
    ) -> WireTensor:
        loop = asyncio.get_running_loop()
        started, timeout_s = loop.time(), self.config.step_timeout_s
        step = Step(tuple(rows), tensor, budget_s=timeout_s)
        parts = await self.exchange.step(hop.peer, step, timeout_s=timeout_s, priority=priority)
        self._measure(hop, step, parts, loop.time() - started)
        expected = sum(row.num_outputs for row in rows)
        if any(part.tensor.header.shape[:1] != (_num_outputs(part),) for part in parts):
            raise RemoteProtocolError(f"{hop.peer.short} answered with a tensor of a wrong shape")
        if len(parts) == 1 and parts[0].rows == step.rows:
            result = parts[0].tensor
        else:
            result = self.repack(rows, parts)
        if result.header.shape != (expected, *tensor.header.shape[1:]):
            raise RemoteProtocolError(f"{hop.peer.short} answered with a tensor of a wrong shape")
        return result

    def _measure(self, hop: Hop, step: Step, parts: Sequence[Part], total_s: float) -> None:
        timings = [part.timings[-1] for part in parts if part.timings]
        if timings:
            slowest = max(timings, key=lambda timing: timing.queue_s + timing.compute_s)
            num_tokens = sum(row.num_tokens for row in step.rows)
            num_bytes = len(step.tensor.data) + sum(len(part.tensor.data) for part in parts)
            self.on_measure(
                HopMeasure(
                    hop.peer, hop.span, len(step.rows), num_tokens, num_bytes, total_s, slowest
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

    async def _close(self, sessions: Sequence[SessionId]) -> None:
        async def close_at(hop: Hop) -> None:
            request = Close(tuple(sessions), 0)
            await self.endpoint.request(hop.peer, request, timeout_s=CLOSE_TIMEOUT_S)

        await self._at_every_hop(close_at)


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rows with all their outputs asked for: the next hop needs every token."""
    return [replace(row, tail=0) if row.tail else row for row in rows]


def _num_outputs(part: Part) -> int:
    return sum(row.num_outputs for row in part.rows)


def _new_session_id() -> SessionId:
    return SessionId(os.urandom(SESSION_ID_BYTES))

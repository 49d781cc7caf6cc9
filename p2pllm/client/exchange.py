"""Where the answers to a client's steps arrive.

A `Step` and its `Output` are two messages, each pushed: the output may come over another
connection than the step left by, twice, or in parts (a server computes some rows in one batch
and the rest in the next). `Exchange` matches them by (peer, session, step) and hides all of it
behind one awaitable call.

While a step is under way its hops are watched: one that dies, or falls silent, ends the wait at
once (`StepFailed`) and not at the step's deadline. Echoes, the outputs that hops have passed to
each other, go to whoever listens for the session.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from p2pllm.client.state import FIRST_STEP
from p2pllm.errors import (
    REQUEST_ERRORS,
    ConnectionLost,
    DeadlineExceeded,
    P2PLLMError,
    RequestFailed,
    StepFailed,
    TransportError,
)
from p2pllm.ids import PEER_ID_BYTES, PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.tasks import task_group, together
from p2pllm.wire.messages import Ack, HopFailed, HopTiming, Leaving, Message, Output, Row, Step
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0  # to a hop that we were connected to a while ago

StepKey = tuple[SessionId, int]  # with the step's number


class Interrupted(P2PLLMError):
    """Nobody waits for the step on this route any more; never leaves the client's chain."""


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs of some rows of a step, packed into one tensor."""

    rows: tuple[Row, ...]
    tensor: WireTensor
    timings: tuple[HopTiming, ...]


@dataclass(frozen=True, slots=True)
class Hedge:
    """What to do if a step takes longer than `after_s`: `prepare` something else meanwhile.

    If that is done before the step is, the wait ends with `Interrupted`.
    """

    after_s: float
    prepare: Callable[[], Awaitable[None]]


class SessionListener(Protocol):
    """Whoever owns a session."""

    def on_leaving(self, peer: PeerId, deadline_s: float) -> None:
        """`peer` is about to go away; the session should be elsewhere by then."""
        ...

    def on_echo(self, peer: PeerId, output: Output) -> None:
        """`peer` has passed this on to the next hop."""
        ...


@dataclass(eq=False)
class _Waiter:
    """One step under way: who may answer, the rows still missing and what has come."""

    answerer: PeerId
    hops: frozenset[PeerId]  # any of them may say that it failed
    epochs: dict[StepKey, int]  # what an older route says of a step does not count
    missing: set[StepKey]
    done: asyncio.Future[tuple[Part, ...]]
    parts: list[Part] = field(default_factory=list)

    def wants(self, row: Row) -> bool:
        """Is an output of that row an answer? Numbers of replays are used again, under other
        epochs; those of steps are not, and whenever one was computed, it is the step."""
        return row.step >= FIRST_STEP or row.epoch == self.epochs[row.session, row.step]

    def fail(self, error: P2PLLMError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Exchange:
    """All steps under way of one client."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # Several by one key: a sequence may be rebuilt on two hops at once.
        self._waiters: dict[StepKey, list[_Waiter]] = {}
        self._listeners: dict[SessionId, SessionListener] = {}
        endpoint.handle(Output, self._on_output)
        endpoint.handle(HopFailed, self._on_failed)
        endpoint.handle(Leaving, self._on_leaving)

    def listen(self, session: SessionId, listener: SessionListener) -> None:
        """Tell `listener` what comes for a session besides the outputs of its steps."""
        self._listeners[session] = listener

    def forget(self, session: SessionId) -> None:
        """Nobody listens for the session any more."""
        self._listeners.pop(session, None)

    def fail(self, keys: Iterable[StepKey], error: P2PLLMError) -> None:
        """End the waits for some steps."""
        for waiter in {waiter for key in keys for waiter in self._waiters.get(key, ())}:
            waiter.fail(error)

    async def step(
        self,
        hops: Sequence[PeerId],
        step: Step,
        *,
        timeout_s: float,
        priority: Priority,
        hedge: Hedge | None = None,
    ) -> tuple[Part, ...]:
        """Push a step to the first of some hops and await the outputs of all rows from the last.

        Between them the hops pass it on themselves. Raises StepFailed, which names the hop that
        has reported a failure or was lost; DeadlineExceeded; or what `fail` was told.
        """
        loop = asyncio.get_running_loop()
        keys = {(row.session, row.step): row.epoch for row in step.rows}
        done: asyncio.Future[tuple[Part, ...]] = loop.create_future()
        waiter = _Waiter(hops[-1], frozenset(hops), keys, set(keys), done)
        for key in keys:
            self._waiters.setdefault(key, []).append(waiter)
        try:
            with ExitStack() as watches:
                for hop in hops:
                    watches.enter_context(self._endpoint.watch(hop, _loses(waiter, hop)))
                return await self._until_done(waiter, hops, step, timeout_s, priority, hedge)
        except TimeoutError as exc:
            names = ", ".join(hop.short for hop in hops)
            raise DeadlineExceeded(f"{names} gave no output within {timeout_s:g} s") from exc
        finally:
            for key in keys:
                self._waiters[key].remove(waiter)
                if not self._waiters[key]:
                    del self._waiters[key]
            if not waiter.done.cancel() and not waiter.done.cancelled():
                waiter.done.exception()  # it may have failed while the push was under way

    async def _reach(self, hops: Sequence[PeerId]) -> None:
        """Be connected to them: they answer over connections that we have opened.

        Raises StepFailed.
        """

        async def connect(hop: PeerId) -> None:
            try:
                await self._endpoint.connect(hop, timeout_s=CONNECT_TIMEOUT_S)
            except P2PLLMError as exc:
                raise StepFailed(hop, exc) from exc

        missing = [hop for hop in hops if not self._endpoint.is_connected(hop)]
        if missing:
            await together(map(connect, missing))

    async def _until_done(
        self,
        waiter: _Waiter,
        hops: Sequence[PeerId],
        step: Step,
        timeout_s: float,
        priority: Priority,
        hedge: Hedge | None,
    ) -> tuple[Part, ...]:
        async with asyncio.timeout(timeout_s):
            async with task_group() as tasks:
                running = [tasks.create_task(self._push(waiter, hops, step, timeout_s, priority))]

                def start_hedge() -> None:
                    if hedge is not None:
                        running.append(tasks.create_task(_hedged(waiter, hedge.prepare)))

                after_s = hedge.after_s if hedge is not None else timeout_s
                timer = asyncio.get_running_loop().call_later(after_s, start_hedge)
                try:
                    return await waiter.done
                finally:
                    timer.cancel()
                    for task in running:  # the output says more than an acknowledgement
                        task.cancel()

    async def _push(
        self,
        waiter: _Waiter,
        hops: Sequence[PeerId],
        step: Step,
        timeout_s: float,
        priority: Priority,
    ) -> None:
        try:
            for hop in hops:  # it was before we began to watch: nobody would tell us
                if self._endpoint.is_suspected(hop):
                    raise StepFailed(hop, ConnectionLost(f"{hop.short} has fallen silent"))
            await self._reach(hops[1:])
            await self._endpoint.push(
                hops[0], step, timeout_s=timeout_s, priority=priority, is_patient=False
            )
        except StepFailed as exc:
            waiter.fail(exc)
        except P2PLLMError as exc:
            waiter.fail(StepFailed(hops[0], exc))

    async def _on_output(self, request: Request[Output]) -> Message:
        output = request.message
        if output.is_echo:
            for listener in self._listening(row.session for row in output.rows):
                listener.on_echo(request.peer, output)
            return Ack()
        found = {
            waiter: None
            for row in output.rows
            for waiter in self._waiters.get((row.session, row.step), ())
            if waiter.answerer == request.peer and waiter.wants(row)
        }
        for waiter in found:  # seldom two: a server never mixes the rows of two steps
            _take(waiter, Part(output.rows, output.tensor, output.timings))
        return Ack()

    async def _on_leaving(self, request: Request[Leaving]) -> Message:
        for listener in self._listening(request.message.sessions):
            listener.on_leaving(request.peer, request.message.deadline_s)
        return Ack()

    def _listening(self, sessions: Iterable[SessionId]) -> set[SessionListener]:
        """Who owns any of these sessions."""
        return {self._listeners[session] for session in sessions if session in self._listeners}

    async def _on_failed(self, request: Request[HopFailed]) -> Message:
        failed = request.message
        cls = REQUEST_ERRORS.get(failed.error, RequestFailed)
        cause = cls(
            f"{request.peer.short}: {failed.text}",
            retry_after_s=failed.retry_after_s,
            expected=failed.expected,
        )
        next_hop = PeerId(failed.next_hop) if len(failed.next_hop) == PEER_ID_BYTES else None
        error = StepFailed(request.peer, cause, next_hop, is_input=failed.is_input)
        for row in failed.rows:
            key = (row.session, row.step)
            for waiter in self._waiters.get(key, ()):
                if request.peer in waiter.hops and row.epoch >= waiter.epochs[key]:
                    waiter.fail(error)
        return Ack()


def _loses(waiter: _Waiter, hop: PeerId) -> Callable[[TransportError], None]:
    return lambda exc: waiter.fail(StepFailed(hop, exc))


async def _hedged(waiter: _Waiter, prepare: Callable[[], Awaitable[None]]) -> None:
    await prepare()
    waiter.fail(Interrupted("another server is ready to do it"))


def _take(waiter: _Waiter, part: Part) -> None:
    keys = {(row.session, row.step) for row in part.rows}
    if not keys <= waiter.missing:  # a repeated output, or one that mixes steps
        logger.debug("output ignored hop=%s rows=%d", waiter.answerer.short, len(part.rows))
        return
    waiter.missing -= keys
    waiter.parts.append(part)
    if not waiter.missing and not waiter.done.done():
        waiter.done.set_result(tuple(waiter.parts))

"""Where the answers to a client's steps arrive.

A `Step` and its `Output` are two messages, each pushed: the output may come over another
connection than the step left by, twice, or in parts (a server computes some rows in one batch
and the rest in the next). `Exchange` matches them by (peer, session, step) and hides all of it
behind one awaitable call.

Decode steps that several generations hand in within one turn of the event loop and that begin at
the same hop leave as one message: the hops then compute and pass on one message too, and what comes
back is divided here again.

While a step is under way its hops are watched: one that dies, or falls silent, ends the wait at
once (`StepFailed`) and not at the step's deadline. Echoes, the outputs that hops have passed to
each other, go to whoever listens for the session.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

from p2pllm.client.state import FIRST_STEP
from p2pllm.errors import (
    REQUEST_ERRORS,
    CodecError,
    ConnectionLost,
    DeadlineExceeded,
    P2PLLMError,
    RemoteProtocolError,
    RequestFailed,
    StepFailed,
    TransportError,
)
from p2pllm.ids import PEER_ID_BYTES, PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.tasks import task_group, together
from p2pllm.wire.messages import (
    MIN_BUDGET_S,
    HopFailed,
    HopTiming,
    Leaving,
    Output,
    Row,
    Step,
)
from p2pllm.wire.rows import (
    RowCoding,
    assembled,
    joined,
    may_join_others,
    messages_of,
    row_coding,
    split,
)
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0  # to a hop that we were connected to a while ago

OwnerT = TypeVar("OwnerT")

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
    parts: list[Part] = field(default_factory=list)
    error: P2PLLMError | None = None
    is_slow: bool = False  # it takes so long that something else should be prepared
    wake: "asyncio.Future[None] | None" = None  # of the one who waits

    def wants(self, row: Row) -> bool:
        """Is an output of that row an answer that is missing? Numbers of replays are used again,
        under other epochs; those of steps are not, and whenever computed, it is the step."""
        key = (row.session, row.step)
        return key in self.missing and (row.step >= FIRST_STEP or row.epoch == self.epochs[key])

    def fail(self, error: P2PLLMError) -> None:
        if self.missing and self.error is None:
            self.error = error
            self._wake_up()

    def take(self, part: Part) -> None:
        self.missing -= {(row.session, row.step) for row in part.rows}
        self.parts.append(part)
        if not self.missing:
            self._wake_up()

    def become_slow(self) -> None:
        self.is_slow = True
        self._wake_up()

    def _wake_up(self) -> None:
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)

    async def done(self, *, until_slow: bool = False) -> bool:
        """Wait for the answer; False if it has become slow before. Raises what it failed by."""
        while self.missing and self.error is None and not (until_slow and self.is_slow):
            self.wake = asyncio.get_running_loop().create_future()
            await self.wake
        if self.missing and self.error is not None:
            raise self.error
        return not self.missing


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A step that leaves with others."""

    waiter: _Waiter
    step: Step
    deadline: float

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.step.rows)


class Exchange:
    """All steps under way of one client."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # Several by one key: a sequence may be rebuilt on two hops at once.
        self._waiters: dict[StepKey, list[_Waiter]] = {}
        self._listeners: dict[SessionId, SessionListener] = {}
        # Decode steps that leave at the end of this turn of the loop, by first hop and coding.
        self._leaving: dict[tuple[PeerId, RowCoding], list[_Leaving]] = {}
        endpoint.handle_at_once(Output, self._on_output)
        endpoint.handle_at_once(HopFailed, self._on_failed)
        endpoint.handle_at_once(Leaving, self._on_leaving)

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
        waiter = _Waiter(hops[-1], frozenset(hops), keys, set(keys))
        for key in keys:
            self._waiters.setdefault(key, []).append(waiter)
        timers = [loop.call_later(timeout_s, _fail_late, waiter, hops, timeout_s)]
        if hedge is not None:
            timers.append(loop.call_later(hedge.after_s, waiter.become_slow))
        try:
            with ExitStack() as watches:
                for hop in hops:
                    watches.enter_context(self._endpoint.watch(hop, _loses(waiter, hop)))
                await self._send(waiter, hops, step, loop.time() + timeout_s, priority)
                if not await waiter.done(until_slow=hedge is not None):
                    assert hedge is not None
                    await self._until_hedged(waiter, hedge)
            return tuple(waiter.parts)
        finally:
            for timer in timers:
                timer.cancel()
            for key in keys:
                self._waiters[key].remove(waiter)
                if not self._waiters[key]:
                    del self._waiters[key]

    async def _until_hedged(self, waiter: _Waiter, hedge: Hedge) -> None:
        """Prepare something else while we go on waiting."""

        async def prepare() -> None:
            await hedge.prepare()
            waiter.fail(Interrupted("another server is ready to do it"))

        async with task_group() as tasks:
            preparing = tasks.create_task(prepare())
            await waiter.done()
            preparing.cancel()

    async def _send(
        self,
        waiter: _Waiter,
        hops: Sequence[PeerId],
        step: Step,
        deadline: float,
        priority: Priority,
    ) -> None:
        """Let a step leave; whatever becomes of it, the waiter is told."""
        for hop in hops:  # it was before we began to watch: nobody would tell us
            if self._endpoint.is_suspected(hop):
                waiter.fail(StepFailed(hop, ConnectionLost(f"{hop.short} has fallen silent")))
                return
        if not all(map(self._endpoint.is_connected, hops[1:])):
            async with task_group() as tasks:
                reaching = tasks.create_task(self._reach(waiter, hops[1:]))
                losing = tasks.create_task(waiter.done())
                await asyncio.wait([reaching, losing], return_when=asyncio.FIRST_COMPLETED)
                reaching.cancel()
                losing.cancel()
        leaving, header = _Leaving(waiter, step, deadline), step.tensor.header
        if priority is not Priority.DECODE or not may_join_others(header):
            self._post(hops[0], [leaving], priority)
            return
        if not self._leaving:
            asyncio.get_running_loop().call_soon(self._flush)
        self._leaving.setdefault((hops[0], row_coding(header)), []).append(leaving)

    def _flush(self) -> None:
        """The turn is over: what begins at the same hop leaves together."""
        leaving, self._leaving = self._leaving, {}
        for (peer, _), steps in leaving.items():
            for some in messages_of(steps, lambda each: each.num_tokens):
                self._post(peer, some, Priority.DECODE)

    def _post(self, peer: PeerId, steps: Sequence[_Leaving], priority: Priority) -> None:
        steps = [each for each in steps if each.waiter.error is None]
        if not steps:
            return
        now = asyncio.get_running_loop().time()
        deadline = max(each.deadline for each in steps)
        step = steps[0].step
        if len(steps) > 1:
            rows = tuple(row for each in steps for row in each.step.rows)
            step = Step(rows, joined([each.step.tensor for each in steps]))
        budget_s = max(deadline - now, MIN_BUDGET_S)

        def on_end(exc: P2PLLMError | None) -> None:
            if exc is not None:
                for each in steps:
                    each.waiter.fail(StepFailed(peer, exc))

        self._endpoint.post(
            peer,
            replace(step, budget_s=budget_s),
            on_end,
            timeout_s=budget_s,
            priority=priority,
            is_patient=False,
        )

    async def _reach(self, waiter: _Waiter, hops: Sequence[PeerId]) -> None:
        """Be connected to them: they answer over connections that we have opened."""

        async def connect(hop: PeerId) -> None:
            try:
                await self._endpoint.connect(hop, timeout_s=CONNECT_TIMEOUT_S)
            except P2PLLMError as exc:
                waiter.fail(StepFailed(hop, exc))

        await together(connect(hop) for hop in hops if not self._endpoint.is_connected(hop))

    def _on_output(self, request: Request[Output]) -> None:
        output = request.message
        if output.is_echo:
            owners = {row.session: self._listeners.get(row.session) for row in output.rows}
            for listener, part in _divided(output, lambda row: owners[row.session]):
                listener.on_echo(request.peer, part)
            return
        for number in range(self._most_waiters(output)):  # seldom more than one
            for waiter, part in _divided(output, partial(self._waiter_of, request.peer, number)):
                if not all(map(waiter.wants, part.rows)):  # it could not be divided
                    cause = RemoteProtocolError(f"{request.peer.short} answered with no such rows")
                    waiter.fail(StepFailed(request.peer, cause))
                else:
                    waiter.take(Part(part.rows, part.tensor, part.timings))

    def _most_waiters(self, output: Output) -> int:
        keys = ((row.session, row.step) for row in output.rows)
        return max((len(self._waiters.get(key, ())) for key in keys), default=0)

    def _waiter_of(self, peer: PeerId, number: int, row: Row) -> _Waiter | None:
        """The `number`-th of those who wait for a row, if it wants this one."""
        waiters = self._waiters.get((row.session, row.step), ())
        if number >= len(waiters):
            return None
        waiter = waiters[number]
        return waiter if waiter.answerer == peer and waiter.wants(row) else None

    def _on_leaving(self, request: Request[Leaving]) -> None:
        for listener in self._listening(request.message.sessions):
            listener.on_leaving(request.peer, request.message.deadline_s)

    def _listening(self, sessions: Iterable[SessionId]) -> set[SessionListener]:
        """Who owns any of these sessions."""
        return {self._listeners[session] for session in sessions if session in self._listeners}

    def _on_failed(self, request: Request[HopFailed]) -> None:
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


def _fail_late(waiter: _Waiter, hops: Sequence[PeerId], timeout_s: float) -> None:
    names = ", ".join(hop.short for hop in hops)
    waiter.fail(DeadlineExceeded(f"{names} gave no output within {timeout_s:g} s"))


def _loses(waiter: _Waiter, hop: PeerId) -> Callable[[TransportError], None]:
    return lambda exc: waiter.fail(StepFailed(hop, exc))


def _divided(
    output: Output, owner_of: Callable[[Row], OwnerT | None]
) -> Iterator[tuple[OwnerT, Output]]:
    """The parts of an output by whose they are; rows of nobody are left out.

    If the tensor cannot be divided, everyone gets all of it, and will find fault with it.
    """
    owners = [owner_of(row) for row in output.rows]
    found = dict.fromkeys(owner for owner in owners if owner is not None)
    if len(found) == 1 and None not in owners:
        yield next(iter(found)), output
        return
    try:
        rows, counts = split(output.tensor), _counts(output)
    except CodecError:
        for owner in found:
            yield owner, output
        return
    stops = list(itertools.accumulate(counts))
    for owner in found:
        own = [index for index, each in enumerate(owners) if each is owner]
        tensor = assembled([rows.cut(stops[i] - counts[i], stops[i]) for i in own])
        yield owner, replace(output, rows=tuple(output.rows[i] for i in own), tensor=tensor)


def _counts(output: Output) -> list[int]:
    """How many tokens each row has in the tensor. Raises CodecError if there is no telling."""
    num_rows = output.tensor.header.shape[0]
    for counts in (
        [row.num_outputs for row in output.rows],
        [row.num_tokens for row in output.rows],
    ):
        if num_rows == sum(counts):
            return counts
    raise CodecError(f"{num_rows} rows of hidden states for {len(output.rows)} rows of a step")

"""What a server answers: Open, Step, Fork, Rewire, Close; and how outputs leave it.

Handlers decide with the pure modules (`sessions`, `scheduler`) and hand rows to the worker; what
the worker has computed comes back to `deliver`, which pushes it on: to the session's next hop, as
a `Step`, or at the end of the chain to the client, as an `Output`. A step is acknowledged when it
has been taken in; whatever goes wrong with it later reaches the client as `HopFailed`.
"""

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from p2pllm.config import ServerConfig
from p2pllm.errors import (
    BadRequest,
    BadSignature,
    Busy,
    CacheFull,
    CodecError,
    Forbidden,
    NotServed,
    OutOfOrder,
    P2PLLMError,
    RemoteProtocolError,
    RequestFailed,
    SessionUnknown,
    TransportError,
)
from p2pllm.identity import verify
from p2pllm.ids import ModelId, PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.server.pages import pages_for
from p2pllm.server.scheduler import DECODE_TOKENS, Task
from p2pllm.server.sessions import Accepted, Session, SessionTable
from p2pllm.server.worker import Failed, Finished, StepInput, Worker
from p2pllm.spans import Span
from p2pllm.tasks import task_group
from p2pllm.wire.messages import (
    MAX_TEXT,
    Ack,
    Close,
    Echo,
    Fork,
    HopFailed,
    Message,
    Numerics,
    Open,
    Opened,
    Output,
    Rewire,
    Row,
    Step,
)
from p2pllm.wire.records import RECORD_DOMAIN, PeerRecord, parse_record

logger = logging.getLogger(__name__)

EXPIRY_CHECK_S = 1.0  # leases are tens of seconds
SEND_TIMEOUT_S = 15.0  # the transport gives a peer up after as long
MAX_UNSENT = 256  # messages on their way to one client; beyond, outputs are only kept
MAX_UNSENT_BYTES = 64 * 2**20  # of their tensors, beyond the first
MAX_WAIT_S = 60.0  # the longest that an Open may wait for pages
NO_NEXT_HOP = -1.0  # in `Opened.next_rtt_s`
REACH_TIMEOUT_S = 3.0  # for the next hop to be dialled; else the client relays that link
CONGESTED_S = 0.5  # before an output that could not be sent on is asked for again
MIN_BUDGET_S = 0.001  # 0 would mean "no deadline"
MAX_HOPS = 64  # that a step may have come through
HOLD_S = 10.0  # of early steps; a chunk of 2 MiB takes half as long on a link of 4 Mbit/s
MAX_WAITING = 256  # Opens that wait for pages
MAX_WAITING_PER_PEER = 32
ROWS_PER_REPORT = 512  # a body has room for 1024


@dataclass(frozen=True, slots=True)
class Offer:
    """What this server serves."""

    model: ModelId
    numerics: Numerics
    span: Span
    hidden_size: int


@dataclass(frozen=True, slots=True)
class _Arrived:
    """One row of a step as it came: from whom, with which token, where in the tensor."""

    step: Step
    row: Row
    token: bytes
    sender: PeerId
    offset: int

    def deadline(self, now: float) -> float:
        """When nobody waits for its output any more."""
        return now + self.step.budget_s if self.step.budget_s else math.inf


@dataclass(eq=False, slots=True)
class _Waiting:
    """A place in the line for pages."""

    peer: PeerId
    num_pages: int


class Service:
    """A server's side of all sessions. `run` owns its tasks; `bind` makes it answer."""

    def __init__(
        self,
        endpoint: Endpoint,
        offer: Offer,
        sessions: SessionTable[Output],
        worker: Worker,
        config: ServerConfig,
    ) -> None:
        self.offer = offer
        self.sessions = sessions
        self._endpoint = endpoint
        self._worker = worker
        self._config = config
        self._waiting: list[_Waiting] = []  # in the order in which they came
        self._freed = asyncio.Event()
        self._unsent: Counter[PeerId] = Counter()  # messages on their way
        self._unsent_bytes: Counter[PeerId] = Counter()
        self._tasks: asyncio.TaskGroup | None = None

    def bind(self) -> None:
        """Answer from now on."""
        self._worker.on_results = self.deliver
        self._endpoint.handle(Open, self._on_open)
        self._endpoint.handle(Step, self._on_step)
        self._endpoint.handle(HopFailed, self._on_next_failed)
        self._endpoint.handle(Fork, self._on_fork)
        self._endpoint.handle(Close, self._on_close)
        self._endpoint.handle(Rewire, self._on_rewire)

    async def run(self) -> None:
        """Send outputs and end leases until cancelled."""
        async with task_group() as tasks:
            self._tasks = tasks
            try:
                while True:
                    await asyncio.sleep(EXPIRY_CHECK_S)
                    self._expire(self._now())
            finally:
                self._tasks = None  # the group takes no more

    def _expire(self, now: float) -> None:
        for session in self.sessions.expire(now):
            logger.info("session expired id=%s", session.id)
            self._release(session)
        if self._waiting:
            reclaimed = self.sessions.reclaim(now, {place.peer for place in self._waiting})
            if reclaimed is not None:
                logger.info("idle session reclaimed id=%s", reclaimed.id)
                self._release(reclaimed)
        for session in self.sessions:
            overdue = self.sessions.take_held(session, now)
            if overdue:
                exc = OutOfOrder("the steps before it did not come", expected=session.length)
                self._report(session.client, overdue, exc)

    # --- sessions ------------------------------------------------------------------------

    async def _on_open(self, request: Request[Open]) -> Message:
        opening, peer = request.message, request.peer
        self._check_offer(opening, peer)
        next_peer = self._read_next(opening.next_hop)
        wait_s = min(opening.wait_s, MAX_WAIT_S, request.remaining_s(self._now()))
        session = await self._reserve(opening, wait_s)
        session.next_peer = next_peer
        logger.info(
            "session opened id=%s client=%s span=%s tokens=%d epoch=%d",
            session.id,
            peer.short,
            session.span,
            session.max_tokens,
            session.epoch,
        )
        return self._opened(session, await self._reach(next_peer))

    def _read_next(self, next_hop: bytes) -> PeerId | None:
        """Who comes next, by its signed peer record: nobody else's word makes us dial."""
        if not next_hop:
            return None
        try:
            record = parse_record(next_hop)
            verify(record.subkey, RECORD_DOMAIN, record.payload, record.signature)
            addresses = PeerRecord.from_record(record).addresses
        except (CodecError, BadSignature) as exc:
            raise BadRequest(f"the next hop's record: {exc}") from exc
        if record.subkey == self._endpoint.peer_id:
            raise BadRequest("a hop cannot be its own successor")
        self._endpoint.learn(record.subkey, addresses)
        return record.subkey

    async def _reach(self, next_peer: PeerId | None) -> float:
        """The round trip to the next hop in seconds; negative if there is none or no way."""
        if next_peer is None:
            return NO_NEXT_HOP
        try:
            return await self._endpoint.ping(next_peer, timeout_s=REACH_TIMEOUT_S)
        except (TransportError, RemoteProtocolError) as exc:
            logger.info("next hop not reached peer=%s reason=%s", next_peer.short, exc)
            return NO_NEXT_HOP

    def _check_offer(self, opening: Open, peer: PeerId) -> None:
        name = str(peer)
        if name in self._config.block or (self._config.allow and name not in self._config.allow):
            raise Forbidden("this server does not serve you")
        if opening.client != peer:
            raise Forbidden("a session is opened by its client")
        if opening.model != self.offer.model:
            raise NotServed(f"this server holds {self.offer.model}, not {opening.model}")
        if not self.offer.span.covers(opening.span):
            raise NotServed(f"this server holds blocks {self.offer.span}, not {opening.span}")
        if opening.numerics != self.offer.numerics:
            raise NotServed(f"this server computes in {self.offer.numerics}")
        if not 0 < opening.max_tokens <= self._config.max_tokens_per_session:
            raise BadRequest(
                f"{opening.max_tokens} tokens asked; a session here has 1 to "
                f"{self._config.max_tokens_per_session}"
            )

    async def _reserve(self, opening: Open, wait_s: float) -> Session[Output]:
        """Open the session, waiting in turn for pages if there are none."""
        deadline = self._now() + wait_s
        place = _Waiting(opening.client, pages_for(opening.max_tokens))
        self._waiting.append(place)
        try:
            while True:
                try:
                    return self._open_now(opening, place)
                except CacheFull:
                    if self._now() >= deadline:
                        raise
                self._check_queue(place)
                await self._wait_for_pages(deadline)
        finally:
            self._waiting.remove(place)
            self._freed.set()  # others may have waited for this place only

    def _next_in_turn(self) -> _Waiting | None:
        """Who gets the next free pages: the first, but nobody over quota before others."""
        return next(filter(self._is_within_quota, self._waiting), next(iter(self._waiting), None))

    def _is_within_quota(self, place: _Waiting) -> bool:
        return self.sessions.is_within_quota(place.peer, place.num_pages)

    def _check_queue(self, place: _Waiting) -> None:
        of_peer = sum(other.peer == place.peer for other in self._waiting)
        if len(self._waiting) > MAX_WAITING or of_peer > MAX_WAITING_PER_PEER:
            raise Busy("too many wait for cache here", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        return self.sessions.next_expiry_s(self._now())

    def _open_now(self, opening: Open, place: _Waiting) -> Session[Output]:
        """Open, and if that replaces a session, forget what is queued for the old pages."""
        known = self.sessions.get(opening.session)
        if not self.sessions.needs_no_pages(opening) and self._next_in_turn() is not place:
            raise CacheFull("others wait for cache here", retry_after_s=self._retry_after_s())
        session = self.sessions.open(opening, self._now())
        if session is not known:
            self._endpoint.protect(opening.client)
            if known is not None:
                self._release(known)
        return session

    async def _wait_for_pages(self, deadline: float) -> None:
        self._freed.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await self._freed.wait()
        except TimeoutError:
            return

    async def _on_fork(self, request: Request[Fork]) -> Message:
        fork = request.message
        source = self.sessions.get(fork.session)
        if source is None:
            raise SessionUnknown(f"session {fork.session} is not open here")
        opening = Open(
            session=fork.new_session,
            epoch=fork.epoch,
            span=source.span,
            max_tokens=source.max_tokens,
            model=self.offer.model,
            numerics=self.offer.numerics,
            push_token=fork.push_token,
            client=request.peer,
            codec=source.request.codec,
            is_compressed=source.request.is_compressed,
            next_hop=source.request.next_hop,
            next_token=fork.next_token,
            echo=source.request.echo,
        )
        first = self._next_in_turn()
        others_wait = first is not None and first.peer != request.peer
        held, new = self.sessions.fork(
            opening, fork.session, fork.position, self._now(), others_wait=others_wait
        )
        new.next_peer = held.next_peer
        self._endpoint.protect(request.peer)
        try:
            await self._worker.copy_pages(held.pages, new.pages, fork.position)
        except BaseException:  # perhaps nobody waits any more: half a copy is no session
            if self.sessions.get(new.id) is new:
                self._close(new, request.peer, new.epoch)
            raise
        return self._opened(new)

    async def _on_rewire(self, request: Request[Rewire]) -> Message:
        next_peer = self._read_next(request.message.next_hop)
        session = self.sessions.rewire(request.message, request.peer, self._now())
        session.next_peer = next_peer
        return self._opened(session, await self._reach(next_peer))

    async def _on_close(self, request: Request[Close]) -> Message:
        error: RequestFailed | None = None
        for session_id in request.message.sessions:
            session = self.sessions.get(session_id)
            if session is not None:
                try:
                    self._close(session, request.peer, request.message.epoch)
                except RequestFailed as exc:  # the others are closed all the same
                    error = exc
        if error is not None:
            raise error
        return Ack()

    def _close(self, session: Session[Output], client: PeerId, epoch: int) -> None:
        self.sessions.close(session.id, client, epoch)
        self._release(session)
        logger.info("session closed id=%s tokens=%d", session.id, session.length)

    def _release(self, session: Session[Output]) -> None:
        """What must follow when a session is gone from the table."""
        self._worker.cancel(session.id)
        self._endpoint.unprotect(session.client)
        self._freed.set()

    def _opened(self, session: Session[Output], next_rtt_s: float = NO_NEXT_HOP) -> Opened:
        numerics = self.offer.numerics
        return Opened(self._config.lease_s, session.length, next_rtt_s, numerics)

    # --- steps ---------------------------------------------------------------------------

    async def _on_step(self, request: Request[Step]) -> Message:
        step, peer, now = request.message, request.peer, self._now()
        tokens = step.tokens if len(step.tokens) == len(step.rows) else (b"",) * len(step.rows)
        rows = list(zip(step.rows, tokens, strict=True))
        wrong = self._what_is_wrong(step)
        if wrong is not None:
            whole = [_Arrived(step, row, token, peer, 0) for row, token in rows]
            self._report_alike([(self._whom_to_tell(item), item.row, wrong) for item in whole])
            return Ack()
        arrived, offset = [], 0
        for row, token in rows:
            arrived.append(_Arrived(step, row, token, peer, offset))
            offset += row.num_tokens
        self._take_in(arrived, now)
        return Ack()

    def _take_in(self, arrived: Sequence[_Arrived], now: float) -> None:
        """Judge rows, queue those that are to be computed, and the held ones whose turn it is."""
        sources: dict[object, StepInput] = {}  # one, unless rows were held
        repeated: dict[int, tuple[Session[Output], Output, float]] = {}  # one message of many rows
        refused: list[tuple[PeerId, Row, RequestFailed]] = []
        waiting = deque(arrived)
        while waiting:
            item = waiting.popleft()
            row = item.row
            try:
                seen = self.sessions.on_row(row, item.sender, item.token, now)
            except OutOfOrder as exc:
                if not self._hold(item, now):
                    refused.append((self._whom_to_tell(item), row, exc))
                continue
            except RequestFailed as exc:
                refused.append((self._whom_to_tell(item), row, exc))
                continue
            session = self.sessions.get(row.session)
            assert session is not None, "on_row raises for unknown sessions"
            if isinstance(seen, Accepted):
                # Rows that go the same way in the same coding can travel on in one message.
                key = (id(item.step), session.client, session.next_peer, session.request.codec)
                source = sources.get(key) or _source(item.step, session, now)
                sources[key] = source
                task = Task(row, session.client, session.span, now)
                source.add(task, item.offset, session.pages)
                following = self.sessions.next_held(session)
                if isinstance(following, _Arrived):
                    waiting.append(following)
            elif seen.output is not None:
                # Its way here goes before our own part, so that no ring of hops goes on for ever.
                timings = (*item.step.timings, *seen.output.timings[-1:])
                output = replace(seen.output, timings=timings)
                repeated[id(seen.output)] = session, output, item.deadline(now)
        for source in sources.values():
            self._queue(source)
        for again in repeated.values():
            self._emit(*again)
        self._report_alike(refused)

    async def _on_next_failed(self, request: Request[HopFailed]) -> Message:
        """The next hop knows no client to tell, after a restart perhaps: we tell ours."""
        failed = request.message
        lost: dict[PeerId, list[Row]] = {}
        for row in failed.rows:
            session = self.sessions.get(row.session)
            if session is not None and session.next_peer == request.peer:
                lost.setdefault(session.client, []).append(row)
        for client, rows in lost.items():
            told = replace(failed, rows=tuple(rows), next_hop=request.peer.key)
            self._send(client, told, Priority.CONTROL)
        return Ack()

    def _hold(self, item: _Arrived, now: float) -> bool:
        """Keep a row that may only be early; the client is told before it gives the step up."""
        wait_s = min(HOLD_S, item.step.budget_s / 2) if item.step.budget_s else HOLD_S
        num_bytes = item.step.tensor.header.coded_bytes
        return self.sessions.hold(item.row, item, num_bytes, until=now + wait_s)

    def _what_is_wrong(self, step: Step) -> BadRequest | None:
        """Why no row of the step can be computed; None if they can."""
        num_tokens = sum(row.num_tokens for row in step.rows)
        expected = (num_tokens, self.offer.hidden_size)
        if step.tensor.header.shape != expected:
            return BadRequest(f"a tensor of shape {step.tensor.header.shape}, not {expected}")
        if num_tokens > self._config.max_tokens_per_session:
            return BadRequest(
                f"a step of {num_tokens} tokens; {self._config.max_tokens_per_session} are allowed"
            )
        if len(step.timings) > MAX_HOPS:
            return BadRequest(f"a step through {len(step.timings)} hops")
        if step.tokens and len(step.tokens) != len(step.rows):
            return BadRequest("a step has one token per row, or none")
        return None

    def _whom_to_tell(self, item: _Arrived) -> PeerId:
        """The session's client if the sender may speak for it, else the sender itself."""
        session = self.sessions.get(item.row.session)
        if session is not None and self.sessions.may_push(session, item.sender, item.token):
            return session.client
        return item.sender

    def _queue(self, source: StepInput) -> None:
        try:
            self._worker.add(source)
        except RequestFailed as exc:
            self._forget(source.client, tuple(task.row for task in source.inputs), exc)

    def deliver(self, finished: Sequence[Finished], failed: Sequence[Failed]) -> None:
        """Take in what a batch has computed, and send it."""
        now = self._now()
        for result in finished:
            source = result.source
            output = Output(result.rows, result.tensor, (*source.timings, result.timing))
            num_bytes = len(result.tensor.data)
            wanted = [self.sessions.on_output(row, output, now, num_bytes) for row in result.rows]
            session = next((each for each in wanted if each is not None), None)
            if session is not None:
                self._emit(session, output, source.deadline)
        for failure in failed:
            self._forget(failure.client, (failure.row,), failure.error)

    def _forget(self, client: PeerId, rows: tuple[Row, ...], exc: RequestFailed) -> None:
        """Rows that were accepted will not be computed: undo, and tell the client.

        With a row falls what its session has queued behind it.
        """
        lost = dict.fromkeys(rows)
        for row in rows:
            session = self.sessions.on_failed(row)
            if session is not None:
                lost.update(dict.fromkeys(self._worker.cancel(row.session, row.step)))
                lost.update(dict.fromkeys(self.sessions.take_held(session)))
        self._report(client, lost, exc)

    def _report_alike(self, refused: Sequence[tuple[PeerId, Row, RequestFailed]]) -> None:
        """Report rows that were refused for like reasons together."""
        groups: dict[object, list[tuple[PeerId, Row, RequestFailed]]] = {}
        for client, row, exc in refused:
            reason = (client, exc.code, exc.retry_after_s, exc.expected)
            groups.setdefault(reason, []).append((client, row, exc))
        for group in groups.values():
            client, _, exc = group[0]
            self._report(client, [row for _, row, _ in group], exc)

    def _report(self, client: PeerId, rows: Iterable[Row], exc: RequestFailed) -> None:
        rows = tuple(rows)
        for start in range(0, len(rows), ROWS_PER_REPORT):
            some = rows[start : start + ROWS_PER_REPORT]
            logger.info("step refused client=%s rows=%d error=%s", client.short, len(some), exc)
            message = HopFailed(
                some,
                exc.code,
                exc.message[:MAX_TEXT],
                retry_after_s=exc.retry_after_s,
                expected=exc.expected,
            )
            self._send(client, message, Priority.CONTROL)

    def _emit(self, session: Session[Output], output: Output, deadline: float) -> None:
        """Pass an output on: to the next hop, or at the chain's end to the client."""
        client, priority = session.client, _priority(output.rows[0])
        if session.next_peer is None:
            self._send(client, output, priority)
            return
        pass_on = partial(self._pass_on, session, output, deadline, priority)
        if not self._start(client, output, pass_on):
            busy = Busy("too much is on its way to the next hop", retry_after_s=CONGESTED_S)
            self._report(client, output.rows, busy)
        echo = session.request.echo
        if echo is Echo.ALL or (echo is Echo.DECODE_ONLY and priority is Priority.DECODE):
            self._send(client, replace(output, is_echo=True), Priority.BULK)

    async def _pass_on(
        self, session: Session[Output], output: Output, deadline: float, priority: Priority
    ) -> None:
        """Push an output to the next hop as its step; the client hears of it if that fails."""
        next_peer = session.next_peer
        assert next_peer is not None, "the caller has seen it"
        budget_s = 0.0 if deadline == math.inf else max(deadline - self._now(), MIN_BUDGET_S)
        tokens = tuple(self._next_token(row) for row in output.rows)
        step = Step(output.rows, output.tensor, tokens, output.timings, budget_s)
        try:
            await self._endpoint.push(next_peer, step, timeout_s=SEND_TIMEOUT_S, priority=priority)
        except P2PLLMError as exc:
            logger.info("next hop lost peer=%s reason=%s", next_peer.short, exc)
            code = exc.code if isinstance(exc, RequestFailed) else RequestFailed.code
            text = f"the next hop {next_peer.short}: {exc}"[:MAX_TEXT]
            failed = HopFailed(output.rows, code, text, next_peer.key)
            self._send(session.client, failed, Priority.CONTROL)

    def _next_token(self, row: Row) -> bytes:
        session = self.sessions.get(row.session)
        return session.request.next_token if session is not None else b""

    def _send(self, client: PeerId, message: Output | HopFailed, priority: Priority) -> None:
        """Push a message to the client."""
        self._start(client, message, partial(self._push, client, message, priority))

    def _start(
        self, client: PeerId, message: Output | HopFailed, send: Callable[[], Awaitable[None]]
    ) -> bool:
        """Send in a task of its own, if not too much of this client's is on its way already.

        An output that is left out is still kept: the client may ask for it again.
        """
        num_bytes = len(message.tensor.data) if isinstance(message, Output) else 0
        unsent_bytes = self._unsent_bytes[client]
        is_full = unsent_bytes and unsent_bytes + num_bytes > MAX_UNSENT_BYTES
        if self._tasks is None or is_full or self._unsent[client] >= MAX_UNSENT:
            logger.warning("message not sent client=%s bytes=%d", client.short, num_bytes)
            return False
        self._unsent[client] += 1
        self._unsent_bytes[client] += num_bytes
        self._tasks.create_task(self._counted(client, num_bytes, send))
        return True

    async def _counted(
        self, client: PeerId, num_bytes: int, send: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await send()
        finally:
            self._unsent[client] -= 1
            self._unsent_bytes[client] -= num_bytes
            if not self._unsent[client]:
                del self._unsent[client], self._unsent_bytes[client]

    async def _push(self, client: PeerId, message: Message, priority: Priority) -> None:
        try:
            await self._endpoint.push(client, message, timeout_s=SEND_TIMEOUT_S, priority=priority)
        except P2PLLMError as exc:
            logger.info("message lost client=%s reason=%s", client.short, exc)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _source(step: Step, session: Session[Output], now: float) -> StepInput:
    """The rows of a step that are the session's client's."""
    deadline = now + step.budget_s if step.budget_s else math.inf
    return StepInput(step.tensor, session.client, session.request, deadline, step.timings)


def _priority(row: Row) -> Priority:
    """What the outputs of a row, and of those that came with it, travel with."""
    return Priority.DECODE if row.num_tokens <= DECODE_TOKENS else Priority.PREFILL

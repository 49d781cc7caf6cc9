"""What a server answers: Open, Step, Fork, Close; and how outputs leave it.

Handlers decide with the pure modules (`sessions`, `scheduler`) and hand rows to the worker; what
the worker has computed comes back to `deliver`, which pushes one `Output` per step and batch to
the client. A step is acknowledged when it has been taken in; whatever goes wrong with it later
reaches the client as `HopFailed`.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from p2pllm.config import ServerConfig
from p2pllm.errors import (
    BadRequest,
    CacheFull,
    Forbidden,
    NotServed,
    P2PLLMError,
    RequestFailed,
)
from p2pllm.ids import ModelId, PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.server.scheduler import Task
from p2pllm.server.sessions import Accepted, Session, SessionTable
from p2pllm.server.worker import Failed, Finished, StepInput, Worker
from p2pllm.spans import Span
from p2pllm.wire.messages import (
    Ack,
    Close,
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

logger = logging.getLogger(__name__)

EXPIRY_CHECK_S = 1.0  # leases are tens of seconds
SEND_TIMEOUT_S = 15.0  # the transport gives a peer up after as long
MAX_UNSENT = 64  # outputs on their way to one client; beyond, they are only kept
MAX_WAIT_S = 60.0  # the longest that an Open may wait for pages


@dataclass(frozen=True, slots=True)
class Offer:
    """What this server serves."""

    model: ModelId
    numerics: Numerics
    span: Span
    hidden_size: int


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
        self._waiting: deque[PeerId] = deque()  # clients whose Open waits for pages
        self._freed = asyncio.Event()
        self._unsent: Counter[PeerId] = Counter()
        self._tasks: asyncio.TaskGroup | None = None

    def bind(self) -> None:
        """Answer from now on."""
        self._worker.on_results = self.deliver
        self._endpoint.handle(Open, self._on_open)
        self._endpoint.handle(Step, self._on_step)
        self._endpoint.handle(Fork, self._on_fork)
        self._endpoint.handle(Close, self._on_close)
        self._endpoint.handle(Rewire, self._on_rewire)

    async def run(self) -> None:
        """Send outputs and end leases until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            while True:
                await asyncio.sleep(EXPIRY_CHECK_S)
                expired = self.sessions.expire(self._now())
                for session in expired:
                    logger.info("session expired id=%s", session.id)
                    self._release(session)

    # --- sessions ------------------------------------------------------------------------

    async def _on_open(self, request: Request[Open]) -> Message:
        opening, peer = request.message, request.peer
        self._check_offer(opening, peer)
        wait_s = min(opening.wait_s, MAX_WAIT_S, request.remaining_s(self._now()))
        session = await self._reserve(opening, wait_s)
        logger.info(
            "session opened id=%s client=%s span=%s tokens=%d epoch=%d",
            session.id,
            peer.short,
            session.span,
            session.max_tokens,
            session.epoch,
        )
        return self._opened(session)

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
        if opening.next_hop:
            raise NotServed("this server does not push to other servers")
        if not 0 < opening.max_tokens <= self._config.max_tokens_per_session:
            raise BadRequest(
                f"{opening.max_tokens} tokens asked; a session here has 1 to "
                f"{self._config.max_tokens_per_session}"
            )

    async def _reserve(self, opening: Open, wait_s: float) -> Session[Output]:
        """Open the session, waiting in turn for pages if there are none."""
        deadline = self._now() + wait_s
        peer = opening.client
        self._waiting.append(peer)
        try:
            while True:
                others_wait = any(other != peer for other in self._waiting)
                try:
                    return self._open_now(opening, others_wait=others_wait)
                except CacheFull:
                    if self._now() >= deadline:
                        raise
                await self._wait_for_pages(deadline)
        finally:
            self._waiting.remove(peer)

    def _open_now(self, opening: Open, *, others_wait: bool) -> Session[Output]:
        """Open, and if that replaces a session, forget what is queued for the old pages."""
        known = self.sessions.get(opening.session)
        session = self.sessions.open(opening, self._now(), others_wait=others_wait)
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
            raise BadRequest(f"session {fork.session} is not open here")
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
        )
        others_wait = any(other != request.peer for other in self._waiting)
        held, new = self.sessions.fork(
            opening, fork.session, fork.position, self._now(), others_wait=others_wait
        )
        self._endpoint.protect(request.peer)
        await self._worker.copy_pages(held.pages, new.pages, fork.position)
        return self._opened(new)

    async def _on_rewire(self, request: Request[Rewire]) -> Message:
        raise NotServed("this server does not push to other servers")

    async def _on_close(self, request: Request[Close]) -> Message:
        for session_id in request.message.sessions:
            session = self.sessions.get(session_id)
            if session is not None:
                self.sessions.close(session_id, request.peer, request.message.epoch)
                self._release(session)
                logger.info("session closed id=%s tokens=%d", session_id, session.length)
        return Ack()

    def _release(self, session: Session[Output]) -> None:
        """What must follow when a session is gone from the table."""
        self._worker.cancel(session.id)
        self._endpoint.unprotect(session.client)
        self._freed.set()

    def _opened(self, session: Session[Output]) -> Opened:
        return Opened(self._config.lease_s, session.length, numerics=self.offer.numerics)

    # --- steps ---------------------------------------------------------------------------

    async def _on_step(self, request: Request[Step]) -> Message:
        step, peer, now = request.message, request.peer, self._now()
        self._check_tensor(step)
        source, tasks = StepInput(step.tensor), []
        tokens = step.tokens or (b"",) * len(step.rows)
        offset = 0
        for row, token in zip(step.rows, tokens, strict=True):
            try:
                seen = self.sessions.on_row(row, peer, token, now)
            except RequestFailed as exc:
                self._report(peer, (row,), exc)
            else:
                session = self.sessions.get(row.session)
                assert session is not None, "on_row raises for unknown sessions"
                if isinstance(seen, Accepted):
                    task = Task(row, session.client, session.span, now)
                    source.add(task, offset, session.pages, session.request)
                    tasks.append(task)
                elif seen.output is not None:
                    self._send(session.client, seen.output, Priority.DECODE)
            offset += row.num_tokens
        self._queue(peer, source, tasks)
        return Ack()

    def _check_tensor(self, step: Step) -> None:
        num_tokens = sum(row.num_tokens for row in step.rows)
        expected = (num_tokens, self.offer.hidden_size)
        if step.tensor.header.shape != expected:
            raise BadRequest(f"a tensor of shape {step.tensor.header.shape}, not {expected}")
        if step.tokens and len(step.tokens) != len(step.rows):
            raise BadRequest("a step has one token per row, or none")

    def _queue(self, peer: PeerId, source: StepInput, tasks: Sequence[Task]) -> None:
        try:
            self._worker.add(source, tasks)
        except RequestFailed as exc:
            self._forget(peer, tuple(task.row for task in tasks), exc)

    def deliver(self, finished: Sequence[Finished], failed: Sequence[Failed]) -> None:
        """Take in what a batch has computed, and send it."""
        for result in finished:
            output = Output(result.rows, result.tensor, (result.timing,))
            wanted = [self.sessions.on_output(row, output, self._now()) for row in result.rows]
            if any(wanted):
                priority = Priority.DECODE if result.is_decode else Priority.PREFILL
                self._send(result.client, output, priority)
        for failure in failed:
            self._forget(failure.client, (failure.row,), failure.error)

    def _forget(self, client: PeerId, rows: tuple[Row, ...], exc: RequestFailed) -> None:
        """Rows that were accepted will not be computed: undo, and tell the client.

        With a row falls what its session has queued behind it.
        """
        lost = dict.fromkeys(rows)
        for row in rows:
            if self.sessions.on_failed(row) is not None:
                lost.update(dict.fromkeys(self._worker.cancel(row.session)))
        if lost:
            self._report(client, tuple(lost), exc)

    def _report(self, client: PeerId, rows: tuple[Row, ...], exc: RequestFailed) -> None:
        logger.info("step refused client=%s rows=%d error=%s", client.short, len(rows), exc)
        message = HopFailed(
            rows, exc.code, exc.message, b"", exc.retry_after_s, expected=exc.expected
        )
        self._send(client, message, Priority.CONTROL)

    def _send(self, client: PeerId, message: Message, priority: Priority) -> None:
        if self._tasks is None or self._unsent[client] >= MAX_UNSENT:
            logger.warning("output not sent client=%s unsent=%d", client.short, MAX_UNSENT)
            return
        self._unsent[client] += 1
        self._tasks.create_task(self._push(client, message, priority))

    async def _push(self, client: PeerId, message: Message, priority: Priority) -> None:
        try:
            await self._endpoint.push(client, message, timeout_s=SEND_TIMEOUT_S, priority=priority)
        except P2PLLMError as exc:
            logger.info("output lost client=%s reason=%s", client.short, exc)
        finally:
            self._unsent[client] -= 1
            if not self._unsent[client]:
                del self._unsent[client]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

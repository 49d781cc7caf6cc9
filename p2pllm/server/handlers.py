"""What a server answers: Open, Step, Fork, Rewire, HandOver, Close; and how it takes its leave.

Handlers decide with the pure modules (`sessions`, `scheduler`) and hand rows to the worker; what
the worker has computed comes back to `deliver`, which gives it to the outbox: to be pushed to the
session's next hop, as a `Step`, or at the end of the chain to the client, as an `Output`. A step is
acknowledged when it has been taken in; whatever goes wrong with it later reaches the client as
`HopFailed`.
"""

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2pllm.config import ServerConfig
from p2pllm.errors import (
    BadRequest,
    Forbidden,
    OutOfOrder,
    P2PLLMError,
    RemoteFault,
    RequestFailed,
    SessionUnknown,
)
from p2pllm.ids import PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.server.admission import Admission
from p2pllm.server.forwarding import Forwarding
from p2pllm.server.handover import Giver, Taker
from p2pllm.server.offer import Offer, check_peer
from p2pllm.server.outbox import SEND_TIMEOUT_S, Asked, Outbox
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.server.scheduler import Task
from p2pllm.server.sessions import Accepted, Session, SessionTable
from p2pllm.server.successors import NO_NEXT_HOP, Successors
from p2pllm.server.worker import BadInput, Failed, Finished, StepInput, Worker
from p2pllm.tasks import task_group
from p2pllm.wire.messages import (
    MAX_PREFIX_KEYS,
    PREFIX_KEY_BYTES,
    Ack,
    Close,
    Fork,
    Forward,
    HandOver,
    HopFailed,
    Leaving,
    Message,
    Open,
    Opened,
    Output,
    Pull,
    Rewire,
    Row,
    Step,
)
from p2pllm.wire.rows import TOKENS_TOGETHER

logger = logging.getLogger(__name__)

EXPIRY_CHECK_S = 1.0  # leases are tens of seconds
MAX_TOKEN_BYTES = 64  # of a push token
MAX_WAIT_S = 60.0  # the longest that an Open may wait for pages
MAX_HOPS = 64  # that a step may have come through
HOLD_S = 10.0  # of early steps; a chunk of 2 MiB takes half as long on a link of 4 Mbit/s
ANSWER_S = 0.5  # of an Open's time are kept for its answer while pages are pulled
TELL_AGAIN_S = 1.0  # who could not be told that we leave
SESSIONS_PER_NOTICE = 512  # a body has room for 1024


@dataclass(frozen=True, slots=True)
class _Arrived:
    """One row of a step as it came: from whom, with which token, where in the tensor."""

    step: Step
    row: Row
    token: bytes
    sender: PeerId
    offset: int


class Service:
    """A server's side of all sessions. `run` owns its tasks; `bind` makes it answer."""

    def __init__(
        self,
        endpoint: Endpoint,
        offer: Offer,
        sessions: SessionTable[Output],
        worker: Worker,
        forwarding: Forwarding,
        config: ServerConfig,
    ) -> None:
        self.offer = offer
        self.sessions = sessions
        self._endpoint = endpoint
        self._worker = worker
        self._forwarding = forwarding
        self._config = config
        self._admission = Admission(sessions, self._on_new_session, self._release)
        self._successors = Successors(endpoint, worker.clock)
        self._outbox = Outbox(endpoint, self._successors)
        self._giver = Giver(offer.model, offer.numerics, sessions, worker)
        self._taker = Taker(endpoint, sessions, worker, self._successors)

    def bind(self) -> None:
        """Answer from now on."""
        self._worker.on_results = self.deliver
        self._endpoint.handle(Open, self._on_open)
        self._endpoint.handle_at_once(Step, self._on_step)
        self._endpoint.handle_at_once(HopFailed, self._on_next_failed)
        self._endpoint.handle(Fork, self._on_fork)
        self._endpoint.handle(Close, self._on_close)
        self._endpoint.handle(Rewire, self._on_rewire)
        self._endpoint.handle(HandOver, self._on_hand_over)
        self._endpoint.handle_stream(Pull, self._giver.serve)
        self._endpoint.handle(Forward, self._forwarding.answer)

    async def run(self) -> None:
        """Send outputs and end leases until cancelled; then all sessions are over."""
        self._outbox.is_open = True
        try:
            while True:
                await asyncio.sleep(EXPIRY_CHECK_S)
                self._expire(self._now())
        finally:
            self._outbox.is_open = False
            for session in list(self.sessions):
                self.sessions.close(session.id, session.client, session.epoch)
                self._release(session)

    async def drain(self, timeout_s: float) -> None:
        """Take no new sessions any more, and let the clients move those that are here.

        Steps are served as ever, and passes that have come are computed. Returns when nothing is
        left, or after `timeout_s`.
        """
        deadline = self._now() + timeout_s
        self._admission.is_leaving = self._forwarding.is_leaving = True
        self._admission.on_freed()  # who waits for pages hears of it
        async with task_group() as tasks:
            clients = {session.client for session in self.sessions}
            telling = [tasks.create_task(self._say_leaving(each, deadline)) for each in clients]
            while len(self.sessions) and self._now() < deadline:
                await self._admission.wait_for_pages(deadline)
            for task in telling:
                task.cancel()
        await self._forwarding.drain(deadline)
        logger.info("drained sessions_left=%d", len(self.sessions))

    async def _say_leaving(self, client: PeerId, deadline: float) -> None:
        """Tell one client of its sessions, over and over until it has heard."""
        while held := [session.id for session in self.sessions if session.client == client]:
            left_s = deadline - self._now()
            starts = range(0, len(held), SESSIONS_PER_NOTICE)
            try:
                for sessions in (held[start : start + SESSIONS_PER_NOTICE] for start in starts):
                    await self._endpoint.push(
                        client,
                        Leaving(tuple(sessions), max(0.0, left_s)),
                        timeout_s=SEND_TIMEOUT_S,
                        priority=Priority.CONTROL,
                        is_patient=False,
                    )
            except RequestFailed:  # an older program, which does not know the message
                return
            except P2PLLMError as exc:
                logger.info("leaving not told client=%s reason=%s", client.short, exc)
                await asyncio.sleep(TELL_AGAIN_S)
            else:
                return

    def _expire(self, now: float) -> None:
        for session in self.sessions.expire(now):
            logger.info("session expired id=%s", session.id)
            self._release(session)
        self._admission.evict(now)
        for session in self.sessions:
            overdue = self.sessions.take_held(session, now)
            if overdue:
                exc = OutOfOrder("the steps before it did not come", expected=session.length)
                self._outbox.report(session.client, overdue, exc)

    # --- sessions ------------------------------------------------------------------------

    async def _on_open(self, request: Request[Open]) -> Message:
        opening, peer = request.message, request.peer
        self._check_offer(opening, peer)
        next_peer = self._successors.read(opening.next_hop)
        source = self._successors.read(opening.source)
        wait_s = min(opening.wait_s, MAX_WAIT_S, request.remaining_s(self._now()))
        session = await self._admission.open(opening, wait_s)
        self._wire(session, next_peer)
        logger.info(
            "session opened id=%s client=%s span=%s tokens=%d epoch=%d shared=%d",
            session.id,
            peer.short,
            session.span,
            session.max_tokens,
            session.epoch,
            session.num_shared,
        )
        async with task_group() as tasks:
            reaching = tasks.create_task(self._reach(session))
            if source is not None:
                deadline = request.deadline - ANSWER_S
                await self._taker.fetch(session, opening, source, deadline)
        return self._opened(session, reaching.result())

    def _wire(self, session: Session[Output], next_peer: PeerId | None) -> None:
        """Send the session's outputs there from now on; its connection stays open meanwhile."""
        if next_peer is not None:
            self._endpoint.protect(next_peer)
        if session.next_peer is not None:
            self._endpoint.unprotect(session.next_peer)
        session.next_peer = next_peer

    async def _reach(self, session: Session[Output]) -> float:
        return await self._successors.reach(session.client, session.next_peer, self._now())

    def _check_offer(self, opening: Open, peer: PeerId) -> None:
        check_peer(peer, self._config)
        if opening.client != peer:
            raise Forbidden("a session is opened by its client")
        _check_tokens(opening.push_token, opening.next_token)
        self.offer.check(opening.model, opening.numerics, opening.span)
        if not 0 < opening.max_tokens <= self._config.max_tokens_per_session:
            raise BadRequest(
                f"{opening.max_tokens} tokens asked; a session here has 1 to "
                f"{self._config.max_tokens_per_session}"
            )
        if opening.source_position > opening.max_tokens:
            raise BadRequest(
                f"{opening.source_position} tokens to pull into room for {opening.max_tokens}"
            )
        keys = opening.prefix_keys
        if len(keys) > MAX_PREFIX_KEYS or any(len(key) != PREFIX_KEY_BYTES for key in keys):
            raise BadRequest(
                f"a session has at most {MAX_PREFIX_KEYS} prefix keys of {PREFIX_KEY_BYTES} bytes"
            )
        if keys and opening.source:
            raise BadRequest("a session begins with a prefix or with what is pulled, not with both")

    async def _on_fork(self, request: Request[Fork]) -> Message:
        fork = request.message
        _check_tokens(fork.push_token, fork.next_token)
        source = self.sessions.get(fork.session)
        if source is None:
            raise SessionUnknown(f"session {fork.session} is not open here")
        self._admission.check_is_staying()
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
        others_wait = self._admission.has_others(request.peer)
        held, new = self.sessions.fork(
            opening, fork.session, fork.position, self._now(), others_wait=others_wait
        )
        self._wire(new, held.next_peer)
        self._on_new_session(new)
        num_full, num_tokens = divmod(fork.position, PAGE_TOKENS)  # full pages are shared
        try:
            if num_tokens:
                await self._worker.copy_pages(
                    held.pages[num_full:], new.pages[num_full:], num_tokens
                )
        except BaseException:  # perhaps nobody waits any more: half a copy is no session
            if self.sessions.get(new.id) is new:
                self._close(new, request.peer, new.epoch)
            raise
        return self._opened(new)

    async def _on_rewire(self, request: Request[Rewire]) -> Message:
        _check_tokens(request.message.next_token)
        next_peer = self._successors.read(request.message.next_hop)
        session = self.sessions.rewire(request.message, request.peer, self._now())
        self._wire(session, next_peer)
        return self._opened(session, await self._reach(session))

    async def _on_hand_over(self, request: Request[HandOver]) -> Message:
        return self._opened(self.sessions.lend(request.message, request.peer, self._now()))

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

    def _on_new_session(self, session: Session[Output]) -> None:
        self._endpoint.protect(session.client)

    def _release(self, session: Session[Output]) -> None:
        """What must follow when a session is gone from the table."""
        self._worker.cancel(session.id)
        self._wire(session, None)
        self._endpoint.unprotect(session.client)
        self._admission.on_freed()

    def _opened(self, session: Session[Output], next_rtt_s: float = NO_NEXT_HOP) -> Opened:
        return Opened(
            self._config.lease_s,
            session.length,
            next_rtt_s,
            self.offer.numerics,
            session.next_step,
        )

    # --- steps ---------------------------------------------------------------------------

    def _on_step(self, request: Request[Step]) -> None:
        step, peer, now = request.message, request.peer, self._now()
        tokens = step.tokens if len(step.tokens) == len(step.rows) else (b"",) * len(step.rows)
        rows = list(zip(step.rows, tokens, strict=True))
        wrong = self._what_is_wrong(step)
        if wrong is not None:
            whole = [_Arrived(step, row, token, peer, 0) for row, token in rows]
            self._outbox.report_alike(
                [(self._whom_to_tell(item), item.row, wrong) for item in whole]
            )
            return
        arrived, offset = [], 0
        for row, token in rows:
            arrived.append(_Arrived(step, row, token, peer, offset))
            offset += row.num_tokens
        try:
            self._take_in(arrived, now)
        except Exception:  # a bug of ours; without a word the client would wait for its deadline
            logger.exception("step not taken in client=%s rows=%d", peer.short, len(rows))
            fault = RemoteFault("the step could not be taken in; the server's log has more")
            told = [(self._whom_to_tell(item), item.row, fault) for item in arrived]
            self._outbox.report_alike(told)

    def _take_in(self, arrived: Sequence[_Arrived], now: float) -> None:
        """Judge rows, queue those that are to be computed, and the held ones whose turn it is."""
        sources: dict[object, StepInput] = {}  # one, unless rows were held
        repeated: dict[object, tuple[Step, Output, list[Asked]]] = {}  # by step and output
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
                key = (id(item.step), *_likeness(session))
                source = sources.get(key) or _source(item.step, session, now)
                sources[key] = source
                task = Task(row, session.client, session.span, now)
                source.add(task, item.offset, session.pages, session.table.copies(row.step))
                following = self.sessions.next_held(session)
                if isinstance(following, _Arrived):
                    waiting.append(following)
            elif seen.output is None:
                self._worker.prolong(row.session, row.step, _deadline(item.step, now))
            elif _is_same(seen.output, row):
                key = (id(item.step), id(seen.output))
                repeated.setdefault(key, (item.step, seen.output, []))[2].append((session, row))
            else:
                other = BadRequest(f"step {row.step} came before with other tokens")
                refused.append((self._whom_to_tell(item), row, other))
        sharing = Counter(id(source.tensor) for source in sources.values())
        for source in sources.values():
            source.num_sharing = sharing[id(source.tensor)]
            self._queue(source)
        for step, output, asked in repeated.values():
            # Its way here goes before our own part, so that no ring of hops goes on for ever.
            timings = (*step.timings, *output.timings[-1:])
            self._outbox.emit(asked, replace(output, timings=timings), _deadline(step, now))
        self._outbox.flush()
        self._outbox.report_alike(refused)

    def _on_next_failed(self, request: Request[HopFailed]) -> None:
        """The next hop knows no client to tell, after a restart perhaps: we tell ours."""
        failed = request.message
        lost: dict[PeerId, list[Row]] = {}
        for row in failed.rows:
            session = self.sessions.get(row.session)
            is_ours = session is not None and session.next_peer == request.peer
            if session is not None and is_ours and row.epoch >= session.epoch:
                lost.setdefault(session.client, []).append(row)
        for client, rows in lost.items():
            told = replace(failed, rows=tuple(rows), next_hop=request.peer.key)
            self._outbox.send(client, told, Priority.CONTROL)

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
            return BadInput(f"a tensor of shape {step.tensor.header.shape}, not {expected}")
        # Hops join several clients' rows, whatever the next one's sessions may have.
        most = max(self._config.max_tokens_per_session, TOKENS_TOGETHER)
        if num_tokens > most:
            return BadRequest(f"a step of {num_tokens} tokens; {most} are allowed")
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
            # Kept rows say of how many tokens there is an output, whoever asks for it later.
            rows = tuple(replace(row, tail=source.num_outputs(row)) for row in result.rows)
            output = Output(rows, result.tensor, (*source.timings, result.timing))
            num_bytes = len(result.tensor.data)
            wanted = [self.sessions.on_output(row, output, now, num_bytes) for row in result.rows]
            asked = [each for each in wanted if each is not None]
            self._outbox.emit(asked, output, source.deadline)
        self._outbox.flush()
        for failure in failed:
            self._forget(failure.client, (failure.row,), failure.error)

    def _forget(self, client: PeerId, rows: tuple[Row, ...], exc: RequestFailed) -> None:
        """Rows that were accepted will not be computed: undo, and tell the client.

        With a row falls what its session has queued behind it.
        """
        lost: dict[Row, None] = {}
        for row in rows:
            failure = self.sessions.on_failed(row)
            if failure is None:  # with one before it, or the session is gone
                continue
            session, fallen = failure
            self._worker.cancel(row.session, row.step)
            lost.update(dict.fromkeys([*fallen, *self.sessions.take_held(session)]))
        self._outbox.report(client, lost, exc)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _check_tokens(*tokens: bytes) -> None:
    """Push tokens travel in messages with those of other clients, so they have a bound."""
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_BYTES:
        raise BadRequest(f"a push token of {longest} bytes; {MAX_TOKEN_BYTES} are allowed")


def _source(step: Step, session: Session[Output], now: float) -> StepInput:
    """The rows of a step that are the session's client's."""
    client, deadline = session.client, _deadline(step, now)
    return StepInput(step.tensor, client, session.request, deadline, step.timings)


def _deadline(step: Step, now: float) -> float:
    """When nobody waits for the outputs of a step any more."""
    return now + step.budget_s if step.budget_s else math.inf


def _likeness(session: Session[Output]) -> tuple[object, ...]:
    """What rows of one message must share to be coded together, and to travel on together."""
    request = session.request
    coding = (request.codec, request.is_compressed)
    return session.client, session.next_peer, request.echo, bool(request.next_hop), *coding


def _is_same(output: Output, row: Row) -> bool:
    """Is a kept output of the very tokens of the row that comes again?"""
    asked = (row.session, row.step, row.position, row.num_tokens)
    return asked in [(r.session, r.step, r.position, r.num_tokens) for r in output.rows]

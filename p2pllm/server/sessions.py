"""Sessions of a server: who may do what to which cache, in which order.

A session is one sequence's keys and values in this server's blocks, reserved by `Open` and kept
while it is used within its lease. Three rules keep it right whatever the network does
(docs/architecture.md, "Fencing and order"):

- **Epochs.** Every change of route raises the epoch, and so does a client that gave a step up. A
  request with an older one comes from what was given up, and is refused. In a chain only the first
  hop hears of a new one from the client: the others see it in the rows that are passed on, so
  whoever has the push token may raise it too. A predecessor that was left out has old epochs only,
  and a take-over changes the token.
- **Steps apply once.** Step numbers rise by one; only the first of an epoch may leave some out,
  those that were given up before they came here. A repeated step is not computed again: its kept
  output is sent again, under the epoch that asks for it. Outputs are kept until the client
  acknowledges them, at most `WINDOW` of a session and `MAX_KEPT_BYTES` in all.
- **Position says where.** A new step at `position < length` truncates first (a rollback); one at
  `position > length`, or whose number is not the next, is `OutOfOrder`. The chunks of a prompt
  follow each other closely and may overtake: a step that is only early is held for a while.

Sessions of one client share the pages of equal beginnings: forks, and those whose Opens bring the
same prefix keys (`p2pllm.server.page_table`). The keys hold in the epoch of their Open, until a
step rolls back; only the first one may begin before the end of what is shared.

Who waits for pages may have those of idle sessions (`reclaim`), and their clients build them again.
The longest idle goes first, and first of all one of a client that holds more than its share, after
`RECLAIM_IDLE_S`. A client within its share loses a session only to one that stays within its own,
and after `EVICT_IDLE_S`; one that keeps stepping loses none.

Pure: no clock, no tensors. Outputs are opaque to it.
"""

import hmac
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from p2pllm.errors import (
    BadRequest,
    Busy,
    CacheFull,
    Forbidden,
    NotServed,
    OutOfOrder,
    SessionUnknown,
    StaleEpoch,
)
from p2pllm.ids import PeerId, SessionId
from p2pllm.server.page_table import PageTable, names_of
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator, pages_for
from p2pllm.spans import Span
from p2pllm.wire.messages import HandOver, Open, Pull, Rewire, Row

WINDOW = 16  # steps of one session under way or kept: a pipelined prefill needs hops + 2
MAX_KEPT_BYTES = 256 * 2**20  # of outputs not acknowledged; beyond, the oldest are dropped
MAX_EPOCHS_PUSHED = 1024  # by which a predecessor may raise an epoch at once
RECLAIM_IDLE_S = 5.0  # a person who types is slower, and their client tells it all again
EVICT_IDLE_S = 10.0  # of a client within its share; a pause in a chat, not one between two steps
MIN_TOKEN_BYTES = 16  # of a token that lets others read
RUNNING_GRACE_S = 600.0  # a step that runs longer than its lease and this was lost by a bug
MAX_HELD_BYTES = 128 * 2**20  # of early steps' messages, over all sessions

OutputT = TypeVar("OutputT")


@dataclass(frozen=True, slots=True)
class _Held:
    """An early row: its message as the shell keeps it, what that weighs, and until when."""

    row: Row
    message: object
    num_bytes: int
    until: float


@dataclass
class Session(Generic[OutputT]):
    """One sequence's state. `length` counts tokens of accepted steps, computed or queued."""

    id: SessionId
    client: PeerId
    epoch: int
    span: Span
    max_tokens: int
    table: PageTable
    request: Open  # what it was opened with: codec, tokens, successor
    expires: float
    next_peer: PeerId | None = None  # the successor, as `request.next_hop` proves; None: the client
    length: int = 0
    num_shared: int = 0  # tokens that were here when it was opened
    last_step: int | None = None
    may_skip: bool = False  # no step of this epoch was accepted yet: numbers may be left out
    running: dict[int, Row] = field(default_factory=dict)  # accepted, output not there yet
    asked_again: dict[int, Row] = field(default_factory=dict)  # running steps that came once more
    kept: OrderedDict[int, OutputT] = field(default_factory=OrderedDict)
    held: dict[int, _Held] = field(default_factory=dict)  # early steps
    reader_token: bytes = b""  # who presents it may read the pages; empty: nobody

    @property
    def pages(self) -> tuple[int, ...]:
        """Where its tokens lie, as the cache takes it."""
        return self.table.pages

    @property
    def next_step(self) -> int:
        """The number of the step whose turn it is, if none is left out."""
        return 0 if self.last_step is None else self.last_step + 1

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the cache for good, unless there is a rollback."""
        there = min([self.length, *(row.position for row in self.running.values())])
        return self.table.num_settled(there)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Compute this row."""

    row: Row


@dataclass(frozen=True, slots=True)
class Repeated(Generic[OutputT]):
    """The row was seen before; `output` is its kept result, None while it is being computed."""

    row: Row
    output: OutputT | None


class SessionTable(Generic[OutputT]):
    """All sessions of a server, with their pages and leases."""

    def __init__(self, pages: PageAllocator, *, max_sessions: int, lease_s: float) -> None:
        self._pages = pages
        self._max_sessions = max_sessions
        self._lease_s = lease_s
        self._sessions: dict[SessionId, Session[OutputT]] = {}
        self._kept: OrderedDict[tuple[SessionId, int], int] = OrderedDict()  # bytes, oldest first
        self._kept_bytes = 0
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session[OutputT]]:
        return iter(self._sessions.values())

    def get(self, session: SessionId) -> Session[OutputT] | None:
        """The session, if it is held."""
        return self._sessions.get(session)

    # --- opening and closing -------------------------------------------------------------

    def open(self, request: Open, now: float, *, others_wait: bool = False) -> Session[OutputT]:
        """Reserve a session, or take one over under a higher epoch.

        Raises StaleEpoch, Forbidden (another client's session), Busy (too many sessions),
        CacheFull or BadRequest, and has then changed nothing. Taking over with the same span
        keeps the cache; with another one, or for more tokens than were reserved, the cache starts
        again from nothing: a new Session is returned, and the caller forgets what the old one had
        queued before anything else is opened.

        With prefix keys, a session that has no step yet begins with the tokens that are here.
        """
        held = self._sessions.get(request.session)
        if held is not None:
            self._authorise(held, request.client, request.epoch)
            if _fits(held, request):
                self._raise_epoch(held, request.epoch)
                held.request = request
                held.expires = now + self._lease_s
                self._share(held, request)
                return held
        shared = self._shared(request) if held is None else ()
        session = self._reserve(request, shared, now, held=held, others_wait=others_wait)
        session.length = session.num_shared = len(shared) * PAGE_TOKENS
        session.table.promise(request)
        return session

    def pages_needed(self, request: Open) -> int:
        """Pages that the session would take of those that are free or cached."""
        shared = self._shared(request)
        return pages_for(request.max_tokens) - len(shared) + self._pages.num_unheld(shared)

    def _shared(self, request: Open) -> tuple[int, ...]:
        """The pages that a new session would begin with."""
        return self._pages.find(names_of(request))[: pages_for(request.max_tokens)]

    def _share(self, session: Session[OutputT], request: Open) -> None:
        """Take in which tokens are promised; those that are here already count as computed."""
        if not request.prefix_keys or session.last_step is not None:
            return
        session.table.promise(request)
        if session.length == session.num_shared:
            num_pages = session.table.adopt(session.length // PAGE_TOKENS)
            session.length = session.num_shared = num_pages * PAGE_TOKENS

    def _reserve(
        self,
        request: Open,
        shared: Sequence[int],
        now: float,
        *,
        held: Session[OutputT] | None = None,
        others_wait: bool,
    ) -> Session[OutputT]:
        """A new, empty session whose first pages are `shared`, in the place of `held`."""
        pool, client = self._pages, request.client
        num_fresh = pages_for(request.max_tokens) - len(shared)
        wanted = num_fresh + pool.num_unheld(shared)
        self._check_room(request, held, wanted, now, others_wait=others_wait)
        if held is not None:
            self._drop(held)
        pool.share(client, shared)
        after = shared[-1] if shared else None
        fresh = pool.allocate(client, num_fresh, after=after) if num_fresh else ()
        session: Session[OutputT] = Session(
            id=request.session,
            client=client,
            epoch=request.epoch,
            span=request.span,
            max_tokens=(len(shared) + num_fresh) * PAGE_TOKENS,
            table=PageTable(pool, client, (*shared, *fresh)),
            request=request,
            expires=now + self._lease_s,
        )
        self._sessions[session.id] = session
        return session

    def _check_room(
        self,
        request: Open,
        held: Session[OutputT] | None,
        wanted: int,
        now: float,
        *,
        others_wait: bool,
    ) -> None:
        """Raise unless the request fits once `held`, which it replaces, is gone.

        `wanted`: pages that it needs and that nobody holds.
        """
        others = len(self._sessions) - (held is not None)
        if others >= self._max_sessions:
            raise Busy(
                f"{self._max_sessions} sessions are open here",
                retry_after_s=self.next_expiry_s(now),
            )
        returned = self._pages.num_returned(held.pages) if held else 0
        if request.max_tokens < 1:
            raise BadRequest("a session has at least one token")
        if pages_for(request.max_tokens) > self._pages.num_pages:
            raise BadRequest(
                f"{request.max_tokens} tokens; the whole cache here holds "
                f"{self._pages.num_pages * PAGE_TOKENS}"
            )
        if not self._pages.may_hold(
            request.client, wanted, others_wait=others_wait, returned=returned
        ):
            raise CacheFull(
                f"{self._pages.num_free * PAGE_TOKENS} cache tokens are free, "
                f"{request.max_tokens} asked",
                retry_after_s=self.next_expiry_s(now),
            )

    def rewire(self, request: Rewire, client: PeerId, now: float) -> Session[OutputT]:
        """Change a session's successor, perhaps under a new epoch; the caller sets `next_peer`."""
        held = self._sessions.get(request.session)
        if held is None:
            raise SessionUnknown(f"session {request.session} is not open here")
        self._authorise(held, client, request.epoch)
        self._raise_epoch(held, request.epoch)
        held.request = replace(
            held.request, next_hop=request.next_hop, next_token=request.next_token
        )
        held.expires = now + self._lease_s
        return held

    def close(self, session: SessionId, client: PeerId, epoch: int) -> None:
        """Free a session's pages; unknown ones are fine, others' and fenced ones raise."""
        held = self._sessions.get(session)
        if held is not None:
            self._authorise(held, client, epoch)
            self._drop(held)

    def needs_no_pages(self, request: Open) -> bool:
        """Is it a session that is held already, with the same blocks and room enough?"""
        held = self._sessions.get(request.session)
        return held is not None and _fits(held, request)

    def is_within_quota(self, peer: PeerId, num_pages: int) -> bool:
        """Could `peer` hold that many more pages while others wait?"""
        return self._pages.is_within_quota(peer, num_pages)

    def expire(self, now: float) -> list[Session[OutputT]]:
        """Drop the sessions whose lease is over; returns which."""
        over = [
            session
            for session in self._sessions.values()
            if session.expires + (RUNNING_GRACE_S if session.running else 0.0) <= now
        ]
        for session in over:
            self._drop(session)
        return over

    def reclaim(self, now: float, waiting: Sequence[tuple[PeerId, int]]) -> Session[OutputT] | None:
        """Drop one idle session for those who wait for pages: its client can build it again.

        `waiting`: (client, pages), whose turn it is first. The module's text has the rule. None
        is dropped if the first has room already, or would have none without all that may go.
        """
        if not waiting:
            return None
        spare = [
            session for session in self._sessions.values() if self._may_go(session, now, waiting)
        ]
        num_free, wanted = self._pages.num_free, waiting[0][1]
        held = [page for session in spare for page in session.pages]
        if not num_free < wanted <= num_free + self._pages.num_returned(held):
            return None
        longest = min(spare, key=lambda s: (not self._is_over_share(s.client), s.expires))
        self._drop(longest)
        return longest

    def _may_go(
        self, session: Session[OutputT], now: float, waiting: Sequence[tuple[PeerId, int]]
    ) -> bool:
        if session.running:
            return False
        idle_s = now - (session.expires - self._lease_s)
        if self._is_over_share(session.client) and any(p != session.client for p, _ in waiting):
            return idle_s >= RECLAIM_IDLE_S
        first, num_pages = waiting[0]
        is_fair = first == session.client or self._pages.is_within_quota(first, num_pages)
        return is_fair and idle_s >= EVICT_IDLE_S

    def _is_over_share(self, client: PeerId) -> bool:
        return not self._pages.is_within_quota(client, 0)

    def next_expiry_s(self, now: float) -> float:
        """Seconds until the first lease may end: how long a refused client should wait."""
        soonest = min((s.expires for s in self._sessions.values()), default=now)
        return min(max(soonest - now, 0.5), 10.0)  # a session may also be closed any time

    def _drop(self, session: Session[OutputT]) -> None:
        del self._sessions[session.id]
        for step in list(session.kept):
            self._let_go(session, step)
        self.take_held(session)
        session.table.release()

    # --- steps ---------------------------------------------------------------------------

    def on_row(
        self, row: Row, sender: PeerId, token: bytes, now: float
    ) -> Accepted | Repeated[OutputT]:
        """Judge one row of a step that `sender` pushed with `token` (empty from the client).

        Raises the RequestFailed that the sender should know about.
        """
        session = self._sessions.get(row.session)
        if session is None:
            raise SessionUnknown(f"session {row.session} is not open here")
        self._authorise_push(session, row, sender, token)
        session.expires = now + self._lease_s
        while session.kept and next(iter(session.kept)) <= row.acked:
            self._let_go(session, next(iter(session.kept)))
        last = session.last_step
        if last is not None and row.step <= last:
            return self._repeat(session, row)
        self._check_order(session, row)
        stop = row.position + row.num_tokens
        session.table.write(row.step, row.position, stop)
        if last is not None and row.position < session.length:
            session.table.keep_promised(row.position)
        session.last_step, session.length = row.step, stop
        session.may_skip = False
        session.running[row.step] = row
        return Accepted(row)

    def hold(self, row: Row, message: object, num_bytes: int, *, until: float) -> bool:
        """Keep a row that was OutOfOrder because it is early, until the ones before it are here.

        False if it is not early, or there is no room. One that comes again only waits longer.
        `next_held` gives `message` back; `take_held` says when `until` is over.
        """
        session = self._sessions.get(row.session)
        if session is None or row.epoch != session.epoch:
            return False
        again = session.held.get(row.step)
        if again is not None:
            session.held[row.step] = replace(again, until=max(until, again.until))
            return True
        no_room = self._held_bytes + num_bytes > MAX_HELD_BYTES or len(session.held) >= WINDOW
        if no_room or row.step <= session.next_step:  # whose turn it is, and is wrong, stays wrong
            return False
        session.held[row.step] = _Held(row, message, num_bytes, until)
        self._held_bytes += num_bytes
        return True

    def next_held(self, session: Session[OutputT]) -> object | None:
        """The held row whose turn has come, as it was given to `hold`; None if there is none."""
        held = session.held.pop(session.next_step, None)
        if held is None:
            return None
        self._held_bytes -= held.num_bytes
        return held.message

    def take_held(self, session: Session[OutputT], overdue_at: float | None = None) -> list[Row]:
        """Stop holding a session's early rows (only those overdue at a time, if given)."""
        gone = [
            held for held in session.held.values() if overdue_at is None or held.until <= overdue_at
        ]
        for held in gone:
            del session.held[held.row.step]
            self._held_bytes -= held.num_bytes
        return [held.row for held in gone]

    def on_output(
        self, row: Row, output: OutputT, now: float, num_bytes: int = 0
    ) -> tuple[Session[OutputT], Row] | None:
        """Keep a computed row's output; returns (session, row) if the output should be sent.

        That row is the one which asked for it last. `num_bytes` is the output's size. None: the
        session is gone, or its newer epoch has not asked for this step.
        """
        session = self._sessions.get(row.session)
        if session is None or session.running.get(row.step) != row:
            return None
        asked = session.asked_again.pop(row.step, row)
        del session.running[row.step]
        session.table.on_computed(row.step)
        session.table.publish(session.num_computed)
        self._keep(session, row.step, output, num_bytes)
        session.expires = now + self._lease_s
        return (session, asked) if asked.epoch == session.epoch else None

    def _keep(self, session: Session[OutputT], step: int, output: OutputT, num_bytes: int) -> None:
        session.kept[step] = output
        self._kept[session.id, step] = num_bytes
        self._kept_bytes += num_bytes
        if len(session.kept) > WINDOW:
            self._let_go(session, next(iter(session.kept)))
        while self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            oldest, old_step = next(iter(self._kept))
            self._let_go(self._sessions[oldest], old_step)

    def _let_go(self, session: Session[OutputT], step: int) -> None:
        del session.kept[step]
        self._kept_bytes -= self._kept.pop((session.id, step))

    def on_failed(self, row: Row) -> tuple[Session[OutputT], list[Row]] | None:
        """A row could not be computed: the cache ends before it, and later steps are off.

        Returns the session and the rows that are lost, each as it was asked for last.
        """
        session = self._sessions.get(row.session)
        if session is None or session.running.get(row.step) != row:
            return None
        lost = [step for step in session.running if step >= row.step]
        running = {step: session.running.pop(step) for step in lost}
        session.table.on_failed(lost)
        session.length = min(session.length, row.position)
        session.last_step = row.step - 1
        return session, [session.asked_again.pop(step, running[step]) for step in lost]

    def fork(
        self, request: Open, source: SessionId, position: int, now: float, *, others_wait: bool
    ) -> tuple[Session[OutputT], Session[OutputT]]:
        """Open `request` as a copy of the first `position` tokens of `source`.

        Returns (source, new). They share the pages that are full; the caller copies the tokens in
        the last one. `source` must be idle.
        """
        held = self._sessions.get(source)
        if held is None:
            raise SessionUnknown(f"session {source} is not open here")
        self._authorise(held, request.client, request.epoch)
        if held.running:
            raise Busy("a session can be forked between steps only", retry_after_s=0.05)
        if not 0 <= position <= held.length:
            raise BadRequest(f"position {position} of a session of {held.length} tokens")
        if position > request.max_tokens or request.span != held.span:
            raise BadRequest("a fork has its source's blocks, and room for what it copies")
        if request.session in self._sessions:
            raise BadRequest(f"session {request.session} exists already")
        held.expires = now + self._lease_s
        shared = held.pages[: position // PAGE_TOKENS]
        new = self._reserve(request, shared, now, others_wait=others_wait)
        new.length = position
        return held, new

    # --- handing over --------------------------------------------------------------------

    def lend(self, request: HandOver, client: PeerId, now: float) -> Session[OutputT]:
        """From now on, whoever presents the token may read the session's pages."""
        held = self._sessions.get(request.session)
        if held is None:
            raise SessionUnknown(f"session {request.session} is not open here")
        self._authorise(held, client, request.epoch)
        if len(request.token) < MIN_TOKEN_BYTES:
            raise BadRequest(f"a token of {len(request.token)} bytes; {MIN_TOKEN_BYTES} are needed")
        held.reader_token = request.token
        held.expires = now + self._lease_s
        return held

    def on_pull(self, request: Pull) -> Session[OutputT]:
        """The session that is to be read, if it may be."""
        held = self._sessions.get(request.session)
        if held is None:
            raise SessionUnknown(f"session {request.session} is not open here")
        expected = held.reader_token
        if not (expected and hmac.compare_digest(request.token, expected)):
            raise Forbidden(f"a wrong token for the pages of session {request.session}")
        if not held.span.covers(request.span):
            raise NotServed(f"session {request.session} has blocks {held.span}, not {request.span}")
        return held

    def may_pull(self, session: Session[OutputT], position: int) -> bool:
        """Is it still there, ends at that position, and has not begun to compute?"""
        is_here = self._sessions.get(session.id) is session
        return is_here and session.last_step is None and session.length == position

    def on_pulled(self, session: Session[OutputT], num_tokens: int, now: float) -> None:
        """That many more tokens are in the pages, as another server had them."""
        session.length += num_tokens
        session.expires = now + self._lease_s

    # --- rules ---------------------------------------------------------------------------

    def _authorise(self, session: Session[OutputT], client: PeerId, epoch: int) -> None:
        if client != session.client:
            raise Forbidden(f"session {session.id} belongs to another client")
        if epoch < session.epoch:
            raise StaleEpoch(
                f"epoch {epoch} of session {session.id}; it is at {session.epoch}",
                expected=session.epoch,
            )

    def may_push(self, session: Session[OutputT], sender: PeerId, token: bytes) -> bool:
        """Is it the session's client, or somebody with its push token?"""
        expected = session.request.push_token  # empty: nobody but the client pushes
        is_trusted = bool(expected) and hmac.compare_digest(token, expected)
        return sender == session.client or is_trusted

    def _authorise_push(
        self, session: Session[OutputT], row: Row, sender: PeerId, token: bytes
    ) -> None:
        """The client may step its own session; anyone else needs the session's push token.

        Either may raise the epoch: the predecessor passes on what the client has told the first.
        It may do so by `MAX_EPOCHS_PUSHED` only, or it could keep the client out for ever.
        """
        if not self.may_push(session, sender, token):
            raise Forbidden(f"a wrong push token for session {row.session}")
        if row.epoch < session.epoch:
            raise StaleEpoch(
                f"epoch {row.epoch} of session {row.session}; it is at {session.epoch}",
                expected=session.epoch,
            )
        if sender != session.client and row.epoch > session.epoch + MAX_EPOCHS_PUSHED:
            raise BadRequest(f"epoch {row.epoch} of session {row.session}, at {session.epoch} now")
        self._raise_epoch(session, row.epoch)

    def _check_order(self, session: Session[OutputT], row: Row) -> None:
        last = session.last_step
        if row.num_tokens < 1 or row.position < 0 or row.step < 0:
            raise BadRequest("a row needs tokens, a position and a step number")
        may_skip = (last is None or session.may_skip) and row.first_step in (-1, row.step)
        is_next = may_skip or row.step == session.next_step
        if row.position > session.length or not is_next:
            raise OutOfOrder(
                f"step {row.step} at position {row.position}; step {session.next_step} "
                f"at {session.length} is next",
                expected=session.length,
            )
        if row.position + row.num_tokens > session.max_tokens:
            raise BadRequest(
                f"position {row.position + row.num_tokens} is past the "
                f"{session.max_tokens} tokens that the session reserved"
            )
        if len(session.running) >= WINDOW:
            raise Busy(f"{WINDOW} steps of this session are under way", retry_after_s=0.05)

    def _repeat(self, session: Session[OutputT], row: Row) -> Repeated[OutputT]:
        output, running = session.kept.get(row.step), session.running.get(row.step)
        if output is None and running is None:
            raise OutOfOrder(
                f"step {row.step} was acknowledged and its output dropped",
                expected=session.length,
            )
        if running is not None:
            if (row.position, row.num_tokens) != (running.position, running.num_tokens):
                raise BadRequest(f"step {row.step} came before with other tokens")
            session.asked_again[row.step] = row
        return Repeated(row, output)

    def _raise_epoch(self, session: Session[OutputT], epoch: int) -> None:
        if epoch > session.epoch:
            session.epoch = epoch
            session.may_skip = True
            session.table.keep_promised(0)  # of the tokens that come now
            session.asked_again.clear()  # that was an older route asking
            self.take_held(session)  # and those were its steps


def _fits(held: Session[OutputT], request: Open) -> bool:
    return held.span == request.span and held.max_tokens >= request.max_tokens

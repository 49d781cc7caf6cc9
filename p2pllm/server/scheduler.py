"""Which rows are computed together next: continuous batching with chunked prefill.

Rows of different sessions and clients share a batch if they run through the same blocks. Decode
rows go first, all that wait at once, for a batch of eight costs little more than one row; then,
by turns, one chunk of one prefill, so that a long prompt delays the others' tokens by a chunk's
time at most and is never starved itself (Sarathi, arXiv 2308.16369).

A session's rows stay in order, whatever their lengths: only its oldest is in line, for each needs
the cache that the one before leaves. Fairness: peers take turns at the prefills, a chunk each.
Bounded: beyond `max_rows` waiting, `Busy` says when to come back; to a client that has rows waiting
already, beyond a quarter of them, so that nobody fills the queue alone.

Pure: it orders values; `p2pllm.server.worker` computes.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pllm.errors import Busy, ConfigError
from p2pllm.ids import PeerId, SessionId
from p2pllm.metrics import MovingAverage
from p2pllm.spans import Span
from p2pllm.wire.messages import Row

DECODE_TOKENS = 8  # rows up to this long count as decode: one token, or a few drafted ones
FORGET_S = 10.0  # an idle server has no queue, whatever the last one was like


@dataclass(eq=False)
class Task:
    """One row waiting for computation. `done_tokens` of it are through already (chunks)."""

    row: Row
    client: PeerId
    span: Span
    queued_at: float
    done_tokens: int = 0
    started_at: float = 0.0

    @property
    def left_tokens(self) -> int:
        """Tokens still to be computed."""
        return self.row.num_tokens - self.done_tokens

    @property
    def is_decode(self) -> bool:
        """Does it belong to the class that goes first?"""
        return self.row.num_tokens <= DECODE_TOKENS


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `[start, start + num_tokens)` of a task's row."""

    task: Task
    start: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Does the row end with this piece?"""
        return self.start + self.num_tokens == self.task.row.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """What to compute in one go: all pieces run through `span`."""

    span: Span
    pieces: tuple[Piece, ...]


@dataclass
class Scheduler:
    """The waiting rows of a server. `add`, then `next_batch` whenever the device is idle.

    `batch_tokens` bounds what is computed in one go, `chunk_tokens` a prefill's share of it.
    """

    batch_tokens: int
    chunk_tokens: int
    max_rows: int
    # All waiting rows by session. The first of each is in line: in `_decode`, or in `_prefill`
    # under its peer.
    _rows: dict[SessionId, deque[Task]] = field(default_factory=dict)
    _decode: OrderedDict[SessionId, None] = field(default_factory=OrderedDict)
    _prefill: OrderedDict[PeerId, OrderedDict[SessionId, None]] = field(default_factory=OrderedDict)
    _num_rows: Counter[PeerId] = field(default_factory=Counter)  # waiting, by client
    _prefill_is_due: bool = False
    _wait_s: MovingAverage = field(default_factory=MovingAverage)
    _served_at: float = float("-inf")

    def __post_init__(self) -> None:
        if self.batch_tokens < DECODE_TOKENS or self.chunk_tokens < 1:
            raise ConfigError(
                f"a batch of {self.batch_tokens} tokens and a chunk of {self.chunk_tokens}; "
                f"at least {DECODE_TOKENS} and 1 are needed"
            )

    def __len__(self) -> int:
        return self._num_rows.total()

    def queue_s(self, now: float) -> float:
        """How long rows have waited lately; 0 once nobody has waited for `FORGET_S`."""
        is_idle = not self._rows and now - self._served_at > FORGET_S
        return 0.0 if is_idle else self._wait_s.get(0.0)

    def add(self, tasks: Iterable[Task]) -> None:
        """Queue rows; raises Busy, with none of them queued, if there are too many."""
        tasks = list(tasks)
        self._check_room(Counter(task.client for task in tasks))
        for task in tasks:
            self._num_rows[task.client] += 1
            session = task.row.session
            self._rows.setdefault(session, deque()).append(task)
            if len(self._rows[session]) == 1:
                self._line_up(session)

    def _check_room(self, added: Counter[PeerId]) -> None:
        for client, count in added.items():
            waiting = self._num_rows[client]
            if waiting and waiting + count > self.max_rows // 4:
                raise Busy(f"{waiting} rows of yours wait here", retry_after_s=self._retry_after_s)
        if len(self) + added.total() > self.max_rows:
            raise Busy(f"{len(self)} rows wait here", retry_after_s=self._retry_after_s)

    @property
    def _retry_after_s(self) -> float:
        return max(self._wait_s.get(0.0), 0.05)

    def cancel(self, session: SessionId, from_step: int = 0) -> list[Task]:
        """Take a session's waiting rows out, those of `from_step` and later; returns them."""
        waiting = self._rows.get(session)
        if waiting is None:
            return []
        client, cancelled = waiting[0].client, deque[Task]()
        while waiting and waiting[-1].row.step >= from_step:
            cancelled.appendleft(waiting.pop())
        self._count_down(client, len(cancelled))
        if not waiting:
            del self._rows[session]
            self._step_out(session, client)
        return list(cancelled)

    def next_batch(self, now: float) -> Batch | None:
        """The rows to compute now, or None if none wait."""
        if not self._rows:
            return None
        is_prefill = bool(self._prefill) and (self._prefill_is_due or not self._decode)
        batch = self._prefill_batch() if is_prefill else self._decode_batch()
        self._prefill_is_due = not is_prefill
        for piece in batch.pieces:
            if piece.start == 0:
                piece.task.started_at = now
                self._wait_s.add(now - piece.task.queued_at)
                self._served_at = now
        return batch

    def _decode_batch(self) -> Batch:
        """All decode rows in line through the same blocks as the oldest, within the budget."""
        span = self._rows[next(iter(self._decode))][0].span
        budget, pieces = self.batch_tokens, []
        for session in self._decode:
            task = self._rows[session][0]
            size = task.left_tokens
            if task.span == span and size <= budget:
                pieces.append(self._take(task, size))
                budget -= size
        for piece in pieces:  # only now, so that no session is in the batch twice
            self._finish(piece.task)
        return Batch(span, tuple(pieces))

    def _prefill_batch(self) -> Batch:
        """One chunk of the first row of the peer whose turn it is."""
        client, sessions = next(iter(self._prefill.items()))
        task = self._rows[next(iter(sessions))][0]
        size = min(task.left_tokens, self.chunk_tokens, self.batch_tokens)
        piece = self._take(task, size)
        self._prefill.move_to_end(client)
        if piece.is_last:
            self._finish(task)
        return Batch(task.span, (piece,))

    def _take(self, task: Task, size: int) -> Piece:
        piece = Piece(task, task.done_tokens, size)
        task.done_tokens += size
        return piece

    def _finish(self, task: Task) -> None:
        """A row is handed out wholly: the session's next one, if any, gets in line, at the end."""
        session = task.row.session
        self._step_out(session, task.client)
        self._count_down(task.client, 1)
        self._rows[session].popleft()
        if self._rows[session]:
            self._line_up(session)
        else:
            del self._rows[session]

    def _count_down(self, client: PeerId, count: int) -> None:
        self._num_rows[client] -= count
        if not self._num_rows[client]:
            del self._num_rows[client]

    def _line_up(self, session: SessionId) -> None:
        task = self._rows[session][0]
        if task.is_decode:
            self._decode[session] = None
        else:
            self._prefill.setdefault(task.client, OrderedDict())[session] = None

    def _step_out(self, session: SessionId, client: PeerId) -> None:
        self._decode.pop(session, None)
        sessions = self._prefill.get(client)
        if sessions is not None:
            sessions.pop(session, None)
            if not sessions:
                del self._prefill[client]

"""Which rows are computed together next: continuous batching with chunked prefill.

Rows of different sessions and clients share a batch if they run through the same blocks. Decode
rows go first, all that wait at once, for a batch of eight costs little more than one row; then,
by turns, one chunk of one prefill, so that a long prompt delays the others' tokens by a chunk's
time at most and is never starved itself (Sarathi, arXiv 2308.16369).

Fairness: among prefills the peer that was served least recently goes first. Bounded: beyond
`max_rows` waiting, `Busy` says when to come back.

Pure: it orders values; `p2pllm.server.worker` computes.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pllm.errors import Busy
from p2pllm.ids import PeerId, SessionId
from p2pllm.metrics import MovingAverage
from p2pllm.spans import Span
from p2pllm.wire.messages import Row

DECODE_TOKENS = 8  # rows up to this long count as decode: one token, or a few drafted ones


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
    """The waiting rows of a server. `add`, then `next_batch` whenever the device is idle."""

    batch_tokens: int
    chunk_tokens: int
    max_rows: int
    _decode: OrderedDict[Task, None] = field(default_factory=OrderedDict)
    _prefill: OrderedDict[PeerId, deque[Task]] = field(default_factory=OrderedDict)
    _prefill_is_due: bool = False
    _wait_s: MovingAverage = field(default_factory=MovingAverage)

    def __len__(self) -> int:
        return len(self._decode) + sum(len(tasks) for tasks in self._prefill.values())

    @property
    def queue_s(self) -> float:
        """How long rows have waited lately."""
        return self._wait_s.get(0.0)

    def add(self, tasks: Iterable[Task]) -> None:
        """Queue rows; raises Busy, with none of them queued, if there are too many."""
        tasks = list(tasks)
        if len(self) + len(tasks) > self.max_rows:
            raise Busy(f"{len(self)} rows wait here", retry_after_s=max(self.queue_s, 0.05))
        for task in tasks:
            waiting = self._prefill.get(task.client, ())
            if task.is_decode and all(task.row.session != other.row.session for other in waiting):
                self._decode[task] = None
            else:  # also the short last chunk of a prompt, which must not overtake the others
                self._prefill.setdefault(task.client, deque()).append(task)

    def cancel(self, session: SessionId) -> list[Task]:
        """Take a session's waiting rows out; returns them."""
        gone = [task for task in self._decode if task.row.session == session]
        for task in gone:
            del self._decode[task]
        for client, tasks in list(self._prefill.items()):
            gone += [task for task in tasks if task.row.session == session]
            left = deque(task for task in tasks if task.row.session != session)
            self._set_prefill(client, left)
        return gone

    def next_batch(self, now: float) -> Batch | None:
        """The rows to compute now, or None if none wait."""
        if not self._decode and not self._prefill:
            return None
        is_prefill = bool(self._prefill) and (self._prefill_is_due or not self._decode)
        batch = self._prefill_batch() if is_prefill else self._decode_batch()
        self._prefill_is_due = not is_prefill
        for piece in batch.pieces:
            if piece.start == 0:
                piece.task.started_at = now
                self._wait_s.add(now - piece.task.queued_at)
        return batch

    def _decode_batch(self) -> Batch:
        """All decode rows through the same blocks as the oldest, within the token budget.

        Of one session only the first waiting row: the next one needs its cache.
        """
        span = next(iter(self._decode)).span
        budget, sessions, pieces = self.batch_tokens, set[SessionId](), []
        for task in list(self._decode):
            size, session = task.row.num_tokens, task.row.session
            is_blocked = session in sessions
            sessions.add(session)
            if is_blocked or task.span != span or size > budget:
                continue
            del self._decode[task]
            pieces.append(Piece(task, 0, size))
            budget -= size
        return Batch(span, tuple(pieces))

    def _prefill_batch(self) -> Batch:
        """One chunk of the first row of the peer whose turn it is."""
        client, tasks = next(iter(self._prefill.items()))
        task = tasks[0]
        size = min(task.left_tokens, self.chunk_tokens)
        piece = Piece(task, task.done_tokens, size)
        task.done_tokens += size
        if not task.left_tokens:
            tasks.popleft()
        self._set_prefill(client, tasks)
        if client in self._prefill:
            self._prefill.move_to_end(client)
        return Batch(task.span, (piece,))

    def _set_prefill(self, client: PeerId, tasks: deque[Task]) -> None:
        if tasks:
            self._prefill[client] = tasks
        else:
            del self._prefill[client]

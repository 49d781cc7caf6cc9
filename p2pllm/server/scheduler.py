"""Which rows are computed together next: continuous batching with chunked prefill.

Rows of different sessions and clients share a batch if they run through the same blocks. Decode
rows go first, all that wait at once, for a batch of eight costs little more than one row. A piece
of a prompt goes with them, and shares their reading of the weights (Sarathi, arXiv 2308.16369),
cut so that it costs the others about one decode step (`p2pllm.server.pace`); what a short prompt
leaves over of that is the next one's. So that prompts are not starved, of two batches one has a
piece, of whatever length.

While decode rows are merely away, at other hops or their clients, pieces stay small: a row that
comes back in the middle of one waits for its end. What it has waited counts as part of its one
step. When nobody has been decoding for a moment, prompts go in whole chunks.

A session's rows stay in order, whatever their lengths: only its oldest is in line, for each needs
the cache that the one before leaves. Fairness: peers take turns at the prefills, a piece each.
Bounded: beyond `max_rows` waiting, `Busy` says when to come back; to a client that has rows waiting
already, beyond a quarter of them, so that nobody fills the queue alone.

Pure: it orders values; `p2pllm.server.worker` computes, and tells how long that took.
"""

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from p2pllm.errors import Busy, ConfigError
from p2pllm.ids import PeerId, SessionId
from p2pllm.metrics import MovingAverage
from p2pllm.server.pace import LEAST_TOKENS, Pace
from p2pllm.spans import Span
from p2pllm.wire.messages import Row

DECODE_TOKENS = 8  # rows up to this long count as decode: one token, or a few drafted ones
FORGET_S = 10.0  # an idle server has no queue, whatever the last one was like
# A session that has decoded so lately comes back: the longest way of a token round a chain that is
# of any use. One that is closed does not.
AWAY_S = 1.0
# Times a decode batch: what a batch with a piece takes, beside decode rows and while they are away.
# The latter a row meets by chance, and then waits for half of it on the average. More of either is
# paid for by the streams, less by the prompt (tests/swarm/test_disturbance.py).
WITH_DECODE = 2.0
WHILE_AWAY = 1.5


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

    `on_computed` tells what a batch has taken. `batch_tokens` bounds what is computed in one go,
    `chunk_tokens` a prefill's share of it.
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
    # Sessions that have decoded lately, and when they last did; the longest away first.
    _decoding: OrderedDict[SessionId, float] = field(default_factory=OrderedDict)
    _pace: Pace = field(init=False)
    _had_piece: bool = False  # the last batch
    _is_due: bool = False  # a prompt waited in vain for the last batch
    _wait_s: MovingAverage = field(default_factory=MovingAverage)
    _served_at: float = float("-inf")

    def __post_init__(self) -> None:
        if self.batch_tokens < DECODE_TOKENS or self.chunk_tokens < 1:
            raise ConfigError(
                f"a batch of {self.batch_tokens} tokens and a chunk of {self.chunk_tokens}; "
                f"at least {DECODE_TOKENS} and 1 are needed"
            )
        self._pace = Pace(self.chunk_tokens)

    def __len__(self) -> int:
        return self._num_rows.total()

    def queue_s(self, now: float) -> float:
        """How long rows have waited lately; 0 once nobody has waited for `FORGET_S`."""
        is_idle = not self._rows and now - self._served_at > FORGET_S
        return 0.0 if is_idle else self._wait_s.get(0.0)

    def prefill_slowdown(self, now: float) -> float:
        """How many times as long prompts take, for others decode; 1 if nobody does."""
        self._forget_gone(now)
        return self._pace.slowdown(WITH_DECODE) if self._decoding else 1.0

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
        self._decoding.pop(session, None)
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
        self._forget_gone(now)
        decode = self._decode_tasks()
        prompt = self._next_prompt()
        if prompt is not None and decode and not self._is_shared(decode, prompt):
            if self._had_piece:
                prompt = None
            else:
                decode = []
        room = self.batch_tokens - sum(task.left_tokens for task in decode)
        most = min(self.chunk_tokens, room)
        budget = 0 if prompt is None else self._prompt_tokens(prompt, decode, most, now)
        pieces = [self._take(task, task.left_tokens) for task in decode]
        if prompt is not None and budget:
            pieces += self._prompt_pieces(prompt.span, budget, most)
        self._had_piece, self._is_due = bool(budget), bool(self._prefill) and not budget
        self._note(pieces, now)
        for piece in pieces:  # only now, so that no session is in the batch twice
            if piece.is_last:
                self._finish(piece.task)
        return Batch(pieces[0].task.span, tuple(pieces))

    def on_computed(self, batch: Batch, seconds: float) -> None:
        """A batch has taken so long."""
        num_tokens = sum(piece.num_tokens for piece in batch.pieces if not piece.task.is_decode)
        self._pace.on_batch(seconds, len(batch.span), num_tokens)

    def _decode_tasks(self) -> list[Task]:
        """All decode rows in line through the same blocks as the oldest, within the budget."""
        budget, tasks = self.batch_tokens, list[Task]()
        for session in self._decode:
            task = self._rows[session][0]
            if task.left_tokens <= budget and (not tasks or task.span == tasks[0].span):
                tasks.append(task)
                budget -= task.left_tokens
        return tasks

    def _next_prompt(self) -> Task | None:
        """The first prefill of the peer whose turn it is."""
        for sessions in self._prefill.values():
            return self._rows[next(iter(sessions))][0]
        return None

    def _is_shared(self, decode: list[Task], prompt: Task) -> bool:
        """Can these be one batch? If not they take turns."""
        room = self.batch_tokens - sum(task.left_tokens for task in decode)
        fits = room >= min(LEAST_TOKENS, self.chunk_tokens, prompt.left_tokens)
        return fits and decode[0].span == prompt.span

    def _prompt_tokens(self, prompt: Task, decode: list[Task], most: int, now: float) -> int:
        """How many tokens of prompts go into the next batch, with these decode rows; 0: none."""
        pace, num_blocks = self._pace, len(prompt.span)
        decode_s = pace.decode_s(num_blocks)
        within_s = WHILE_AWAY * decode_s
        if decode:
            within_s = WITH_DECODE * decode_s
            if self._had_piece:  # they have waited for that already
                within_s -= now - min(task.queued_at for task in decode)
                if within_s < pace.least_s(num_blocks):
                    return 0
            elif not pace.knows_decode and not self._is_due:
                return 0  # alone for once, to learn what they take
        elif not self._decoding:
            return most
        return pace.piece_tokens(within_s, num_blocks, most)

    def _prompt_pieces(self, span: Span, budget: int, most: int) -> list[Piece]:
        """Pieces of prompts through the same blocks while `budget` tokens allow; peers take turns.

        For the rest of a prompt that would be a small batch, the budget is exceeded, up to `most`.
        """
        pieces: list[Piece] = []
        for task in self._prompts_by_turns():
            if pieces and (task.span != span or budget < min(LEAST_TOKENS, task.left_tokens)):
                break
            size = min(budget, task.left_tokens)
            if task.left_tokens - size < size // 4:
                size = min(task.left_tokens, most)
            pieces.append(self._take(task, size))
            budget, most = budget - size, most - size
        for piece in pieces:
            self._prefill.move_to_end(piece.task.client)
        return pieces

    def _prompts_by_turns(self) -> Iterator[Task]:
        """The first row of each session with a prefill: one of each peer, then the second ones."""
        lines = [iter(list(sessions)) for sessions in self._prefill.values()]
        for sessions in itertools.zip_longest(*lines):
            for session in sessions:
                if session is not None:
                    yield self._rows[session][0]

    def _forget_gone(self, now: float) -> None:
        """Sessions that have not decoded for a while are not expected back."""
        while self._decoding:
            session, decoded_at = next(iter(self._decoding.items()))
            if now - decoded_at <= AWAY_S:
                return
            del self._decoding[session]

    def _note(self, pieces: list[Piece], now: float) -> None:
        """Rows are handed out: when, and after how long a wait."""
        for piece in pieces:
            task = piece.task
            if piece.start == 0:
                task.started_at = now
                self._wait_s.add(now - task.queued_at)
                self._served_at = now
            if task.is_decode:
                self._decoding[task.row.session] = now
                self._decoding.move_to_end(task.row.session)

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

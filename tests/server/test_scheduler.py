from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from p2pllm.errors import Busy, ConfigError
from p2pllm.ids import PeerId, SessionId
from p2pllm.server.pace import LEAST_TOKENS
from p2pllm.server.scheduler import (
    AWAY_S,
    DECODE_TOKENS,
    FORGET_S,
    WHILE_AWAY,
    WITH_DECODE,
    Batch,
    Scheduler,
    Task,
)
from p2pllm.spans import Span
from p2pllm.wire.messages import Row

ALICE, BOB, CAROL = (PeerId(letter * 32) for letter in (b"a", b"b", b"c"))
WHOLE, PART = Span(0, 8), Span(0, 4)


def task(
    session: int,
    num_tokens: int = 1,
    *,
    client: PeerId = ALICE,
    span: Span = WHOLE,
    step: int = 0,
    queued_at: float = 0.0,
) -> Task:
    row = Row(SessionId(session.to_bytes(16, "big")), 0, step, 0, num_tokens)
    return Task(row, client, span, queued_at)


def scheduler(
    *tasks: Task, batch_tokens: int = 64, chunk_tokens: int = 16, max_rows: int = 100
) -> Scheduler:
    made = Scheduler(batch_tokens, chunk_tokens, max_rows)
    made.add(tasks)
    return made


def tasks_of(batch: Batch | None) -> list[Task]:
    assert batch is not None
    return [piece.task for piece in batch.pieces]


def drained(made: Scheduler) -> list[Batch]:
    """All batches until nothing waits."""
    batches: list[Batch] = []
    while (batch := made.next_batch(0.0)) is not None:
        batches.append(batch)
        assert len(batches) < 1000, "it never ends"
    return batches


def test_nothing_waits_at_first() -> None:
    assert scheduler().next_batch(0.0) is None
    assert len(scheduler()) == 0


def test_decode_rows_of_all_clients_go_together() -> None:
    rows = [task(1, client=ALICE), task(2, client=BOB), task(3, 4, client=CAROL)]

    made = scheduler(*rows)

    assert tasks_of(made.next_batch(0.0)) == rows
    assert made.next_batch(0.0) is None


def test_rows_of_different_blocks_are_not_computed_together_the_oldest_goes_first() -> None:
    first, other, third = task(1, span=PART), task(2, span=WHOLE), task(3, span=PART)
    made = scheduler(first, other, third)

    batch = made.next_batch(0.0)

    assert tasks_of(batch) == [first, third]
    assert batch is not None
    assert batch.span == PART
    assert tasks_of(made.next_batch(0.0)) == [other]


def test_a_batch_keeps_to_its_budget_and_the_rest_waits() -> None:
    made = scheduler(*(task(n, 4) for n in range(5)), batch_tokens=10)

    sizes = [[piece.num_tokens for piece in batch.pieces] for batch in drained(made)]

    assert sizes == [[4, 4], [4, 4], [4]]


def test_a_row_that_was_too_long_for_the_rest_of_a_batch_is_first_in_the_next() -> None:
    rows = [task(1, 6), task(2, 8), task(3, 2)]
    made = scheduler(*rows, batch_tokens=8)

    assert [tasks_of(batch) for batch in drained(made)] == [[rows[0], rows[2]], [rows[1]]]


def test_a_session_is_in_a_batch_once() -> None:
    rows = [task(1, step=0), task(1, step=1), task(2)]
    made = scheduler(*rows)

    assert [tasks_of(batch) for batch in drained(made)] == [[rows[0], rows[2]], [rows[1]]]


@pytest.mark.parametrize("num_tokens", [1, DECODE_TOKENS])
def test_decode_goes_before_a_prefill_that_came_first(num_tokens: int) -> None:
    prefill, decode = task(1, DECODE_TOKENS + 1), task(2, num_tokens)
    made = scheduler(prefill, decode)

    assert tasks_of(made.next_batch(0.0)) == [decode]
    assert tasks_of(made.next_batch(0.0)) == [prefill]


DECODE_S, TOKEN_S = 2.0**-6, 2.0**-12  # of the device in the following tests: 64 tokens a step
CHUNK = 256


class Device:
    """Computes what a scheduler gives out, one batch after the other, and takes time for it."""

    def __init__(self, made: Scheduler) -> None:
        self.scheduler = made
        self.now = 0.0

    def compute(self) -> list[int]:
        """The next batch; returns its pieces' sizes."""
        batch = self.scheduler.next_batch(self.now)
        assert batch is not None
        prompt = sum(piece.num_tokens for piece in batch.pieces if not piece.task.is_decode)
        seconds = DECODE_S + prompt * TOKEN_S
        self.now += seconds
        self.scheduler.on_computed(batch, seconds)
        return [piece.num_tokens for piece in batch.pieces]

    def add(self, *tasks: Task) -> None:
        for each in tasks:
            each.queued_at = self.now
        self.scheduler.add(tasks)


@pytest.fixture
def device() -> Device:
    """One whose scheduler has seen batches of every kind, the last one of decode rows."""
    made = Device(scheduler(batch_tokens=512, chunk_tokens=CHUNK))
    for first in (task(97), task(98, CHUNK), task(99)):
        made.add(first)
        made.compute()
    return made


def within(times: float) -> int:
    """Tokens of a prompt that make a batch take so many times a decode batch."""
    return int((times - 1) * DECODE_S / TOKEN_S)


def test_a_piece_of_a_prompt_goes_with_decode_rows_and_doubles_their_time(device: Device) -> None:
    device.add(task(1, 2000), task(2), task(3))

    assert device.compute() == [1, 1, within(WITH_DECODE)]


def test_pieces_stay_small_while_decode_rows_are_away(device: Device) -> None:
    device.add(task(1, 2000))

    assert [device.compute(), device.compute()] == [[within(WHILE_AWAY)], [within(WHILE_AWAY)]]


def test_who_has_waited_for_a_piece_does_not_wait_for_a_whole_one_again(device: Device) -> None:
    device.add(task(1, 2000))
    device.compute()
    late = task(2)
    device.add(late)
    late.queued_at -= DECODE_S / 4  # it came towards the end of the piece, a quarter of a step ago

    assert device.compute() == [1, within(WITH_DECODE - 0.25)]


def test_who_has_waited_for_a_whole_piece_goes_alone_but_not_twice(device: Device) -> None:
    device.add(task(1, 2000))
    device.compute()
    turns = []
    for step in range(4):
        waiting = task(2, step=step)
        device.add(waiting)
        waiting.queued_at -= (WITH_DECODE - 1) * DECODE_S
        turns.append(device.compute())

    assert turns == [[1], [1, within(WITH_DECODE)]] * 2


def test_chunks_are_whole_when_nobody_has_decoded_for_a_moment(device: Device) -> None:
    device.now += AWAY_S
    device.add(task(1, 2000))

    assert device.compute() == [CHUNK]


def test_chunks_are_whole_when_the_sessions_that_decoded_have_ended(device: Device) -> None:
    device.scheduler.cancel(task(97).row.session)
    device.scheduler.cancel(task(99).row.session)
    device.add(task(1, 2000))

    assert device.compute() == [CHUNK]


def test_no_batch_is_made_for_the_small_rest_of_a_prompt(device: Device) -> None:
    device.add(task(1, within(WITH_DECODE) + LEAST_TOKENS // 2), task(2))

    assert device.compute() == [1, within(WITH_DECODE) + LEAST_TOKENS // 2]


def test_decode_rows_go_alone_once_so_that_their_time_is_known() -> None:
    made = scheduler(task(1, 32), task(2))

    sizes = [[piece.num_tokens for piece in batch.pieces] for batch in drained(made)]

    assert sizes == [[1], [16], [16]]


def test_decode_and_prefill_of_other_blocks_take_turns() -> None:
    made = scheduler(task(1, 48, span=PART))
    turns = []
    for step in range(6):
        made.add([task(2, step=step)])
        batch = made.next_batch(0.0)
        assert batch is not None
        turns.append([piece.num_tokens for piece in batch.pieces])

    assert turns == [[16], [1], [16], [1], [16], [1]]


def test_decode_rows_that_fill_a_batch_take_turns_with_prefill(device: Device) -> None:
    device.scheduler.batch_tokens = 8
    device.add(task(1, 48))
    turns = []
    for step in range(4):
        device.add(*(task(2 + n, 4, step=step) for n in range(2)))
        turns.append(device.compute())

    assert turns == [[8], [4, 4], [8], [4, 4]]


def test_a_prefill_is_cut_into_chunks_in_order() -> None:
    prompt = task(1, 40)

    pieces = [piece for batch in drained(scheduler(prompt)) for piece in batch.pieces]

    assert [(p.start, p.num_tokens, p.is_last) for p in pieces] == [
        (0, 16, False),
        (16, 16, False),
        (32, 8, True),
    ]


def test_a_chunk_is_no_larger_than_a_batch() -> None:
    made = scheduler(task(1, 20), batch_tokens=10, chunk_tokens=100)

    assert [piece.num_tokens for batch in drained(made) for piece in batch.pieces] == [10, 10]


def test_peers_take_turns_at_the_prefills() -> None:
    made = scheduler(
        task(1, 32, client=ALICE),
        task(2, 32, client=ALICE),
        task(3, 32, client=BOB),
        task(4, 16, client=CAROL),
    )

    order = [batch.pieces[0].task.client for batch in drained(made)]

    assert order == [ALICE, BOB, CAROL, ALICE, BOB, ALICE, ALICE]


def test_one_peers_many_prompts_do_not_starve_anothers() -> None:
    made = scheduler(*(task(n, 32, client=ALICE) for n in range(50)))
    made.next_batch(0.0)
    made.add([task(99, 16, client=BOB)])

    made.next_batch(0.0)

    assert tasks_of(made.next_batch(0.0))[0].client == BOB


def test_a_short_last_chunk_of_a_prompt_does_not_overtake_the_long_ones() -> None:
    rows = [task(1, 32, step=0), task(1, 32, step=1), task(1, 3, step=2)]
    made = scheduler(*rows)

    assert [tasks_of(batch)[0] for batch in drained(made)] == [
        rows[0],
        rows[0],
        rows[1],
        rows[1],
        rows[2],
    ]


def test_a_prefill_does_not_overtake_a_decode_row_of_its_session() -> None:
    made = scheduler(task(9))
    made.next_batch(0.0)  # a prefill is due next
    rows = [task(1, step=0), task(1, 32, step=1), task(2, 32, client=BOB)]
    made.add(rows)

    order = [batch.pieces[0].task for batch in drained(made)]

    assert order.index(rows[0]) < order.index(rows[1])


def test_too_many_rows_are_refused_and_none_of_them_is_queued() -> None:
    made = scheduler(task(1), task(2), max_rows=3)

    with pytest.raises(Busy) as refusal:
        made.add([task(3, client=BOB), task(4, client=BOB)])

    assert refusal.value.retry_after_s > 0
    assert len(made) == 2
    made.add([task(3, client=BOB)])
    assert len(made) == 3


def test_a_client_fills_a_quarter_of_the_queue_unless_it_comes_all_at_once() -> None:
    made = scheduler(*(task(n) for n in range(10)), max_rows=16)

    with pytest.raises(Busy):
        made.add([task(10)])
    made.add([task(11 + n, client=BOB) for n in range(4)])
    with pytest.raises(Busy):
        made.add([task(15, client=BOB)])

    assert len(made) == 14


def test_rows_that_are_computed_make_room() -> None:
    made = scheduler(task(1), task(2, 32), max_rows=2)

    made.next_batch(0.0)
    assert len(made) == 1
    made.next_batch(0.0)
    assert len(made) == 1  # its second chunk still waits
    made.next_batch(0.0)
    assert len(made) == 0


def test_cancelling_a_session_removes_all_its_rows_and_no_others() -> None:
    mine = [task(1, step=0), task(1, 32, step=1), task(1, step=2)]
    others = [task(2), task(3, 32), task(4, 32, client=BOB)]
    made = scheduler(*mine, *others)

    assert made.cancel(mine[0].row.session) == mine
    assert len(made) == 3
    assert made.cancel(mine[0].row.session) == []
    assert {t for batch in drained(made) for t in tasks_of(batch)} == set(others)


def test_cancelling_from_a_step_on_leaves_the_earlier_ones() -> None:
    mine = [task(1, step=0), task(1, 32, step=1), task(1, step=2)]
    made = scheduler(*mine)
    session = mine[0].row.session

    assert made.cancel(session, from_step=3) == []
    assert made.cancel(session, from_step=1) == mine[1:]
    assert len(made) == 1
    made.add([task(1, step=1)])
    assert [t.row.step for batch in drained(made) for t in tasks_of(batch)] == [0, 1]


def test_cancelling_in_the_middle_of_a_prompt_ends_it() -> None:
    prompt = task(1, 64)
    made = scheduler(prompt)
    made.next_batch(0.0)

    assert made.cancel(prompt.row.session) == [prompt]
    assert made.next_batch(0.0) is None


def test_how_long_rows_wait_is_measured_from_queueing_to_their_first_chunk() -> None:
    made = scheduler(task(1, 32, queued_at=10.0))
    assert made.queue_s(10.0) == 0.0

    batch = made.next_batch(12.0)
    made.next_batch(12.5)

    assert made.queue_s(13.0) == 2.0
    assert made.queue_s(13.0 + FORGET_S) == 0.0
    assert tasks_of(batch)[0].started_at == 12.0


@pytest.mark.parametrize(("batch", "chunk"), [(DECODE_TOKENS - 1, 16), (64, 0)])
def test_budgets_that_would_compute_nothing_are_refused(batch: int, chunk: int) -> None:
    with pytest.raises(ConfigError):
        Scheduler(batch, chunk, 10)


class Queueing(RuleBasedStateMachine):
    """Rows of a few sessions come, are cancelled and computed, in any order.

    The model is what each session has queued, as (task, tokens computed of it).
    """

    MAX_ROWS = 12
    CLIENTS = (ALICE, ALICE, BOB, CAROL)  # of the sessions

    @initialize(batch_tokens=st.integers(8, 20), chunk_tokens=st.integers(1, 20))
    def start(self, batch_tokens: int, chunk_tokens: int) -> None:
        self.scheduler = Scheduler(batch_tokens, chunk_tokens, self.MAX_ROWS)
        self.queued: dict[int, list[Task]] = {n: [] for n in range(len(self.CLIENTS))}
        self.done: dict[Task, int] = {}
        self.passed_over: dict[int, int] = {}  # batches since a session's turn
        self.was_without_decode = self.was_without_prompt = False  # though one waited, last time
        self.steps = 0
        self.now = 0.0

    @rule(
        rows=st.lists(
            st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 8, 9, 30])), min_size=1, max_size=5
        ),
        span=st.sampled_from([WHOLE, PART]),
    )
    def add(self, rows: list[tuple[int, int]], span: Span) -> None:
        tasks = []
        for session, num_tokens in rows:
            self.steps += 1
            client = self.CLIENTS[session]
            tasks.append(task(session, num_tokens, client=client, span=span, step=self.steps))
        waiting = Counter(row.client for queued in self.queued.values() for row in queued)
        added = Counter(new.client for new in tasks)
        is_greedy = any(
            waiting[client] and waiting[client] + added[client] > self.MAX_ROWS // 4
            for client in added
        )
        if is_greedy or waiting.total() + len(tasks) > self.MAX_ROWS:
            with pytest.raises(Busy):
                self.scheduler.add(tasks)
            return
        self.scheduler.add(tasks)
        for (session, _), new in zip(rows, tasks, strict=True):
            self.queued[session].append(new)
            self.passed_over.setdefault(session, 0)

    @rule(session=st.integers(0, 3), num_kept=st.integers(0, 2))
    def cancel(self, session: int, num_kept: int) -> None:
        kept, gone = self.queued[session][:num_kept], self.queued[session][num_kept:]
        from_step = gone[0].row.step if gone and num_kept else 0
        cancelled = self.scheduler.cancel(SessionId(session.to_bytes(16, "big")), from_step)

        if not gone and num_kept:
            gone, kept = kept, []
        assert cancelled == gone
        self.queued[session] = kept
        if not kept:
            self.passed_over.pop(session, None)

    @rule(seconds=st.sampled_from([0.0, 1e-3, 0.01, 1.0, 100.0]))
    def compute(self, seconds: float) -> None:
        has_decode = any(rows and rows[0].is_decode for rows in self.queued.values())
        has_prefill = any(rows and not rows[0].is_decode for rows in self.queued.values())
        batch = self.scheduler.next_batch(self.now)
        if batch is None:
            assert not has_decode
            assert not has_prefill
            return
        sessions = [self._take(piece.task, piece.start, piece.num_tokens) for piece in batch.pieces]
        assert 1 <= len(set(sessions)) == len(sessions)
        assert all(piece.task.span == batch.span for piece in batch.pieces)
        assert sum(piece.num_tokens for piece in batch.pieces) <= self.scheduler.batch_tokens
        prompts = [piece for piece in batch.pieces if not piece.task.is_decode]
        assert sum(piece.num_tokens for piece in prompts) <= self.scheduler.chunk_tokens
        assert all(piece.is_last for piece in prompts[:-1]), "only the last is cut"
        if has_decode and len(prompts) == len(batch.pieces):
            assert not self.was_without_decode, "decode waits for two batches"
        if has_prefill and not prompts:
            assert not self.was_without_prompt, "prefill waits for two batches"
        self.was_without_decode = has_decode and len(prompts) == len(batch.pieces)
        self.was_without_prompt = has_prefill and not prompts
        self._count_turns(set(sessions))
        self.now += seconds
        self.scheduler.on_computed(batch, seconds)

    def _take(self, taken: Task, start: int, num_tokens: int) -> int:
        """Check that the piece is the very next of its session's tokens."""
        session = int.from_bytes(taken.row.session.value, "big")
        assert self.queued[session][0] is taken
        assert start == self.done.get(taken, 0)
        self.done[taken] = start + num_tokens
        assert self.done[taken] <= taken.row.num_tokens
        if self.done[taken] == taken.row.num_tokens:
            self.queued[session].pop(0)
        return session

    def _count_turns(self, served: set[int]) -> None:
        """Nobody is starved: a session's turn comes within a few rounds of all the others'."""
        for session, rows in self.queued.items():
            if session in served or not rows:
                self.passed_over[session] = 0
            else:
                self.passed_over[session] += 1
            # A peer's other prompt of up to 30 chunks comes first, each chunk waiting for the two
            # other peers' chunks and as many decode batches.
            assert self.passed_over.get(session, 0) <= 30 * 3 * 2 + 6

    @invariant()
    def the_length_is_what_waits(self) -> None:
        assert len(self.scheduler) == sum(map(len, self.queued.values())) <= self.MAX_ROWS


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=60, stateful_step_count=40)


# --- several short prompts ---------------------------------------------------------------------


def test_short_prompts_of_several_peers_share_a_batch() -> None:
    tasks = [task(number, 20, client=(ALICE, BOB)[number % 2]) for number in range(5)]

    made = scheduler(*tasks, chunk_tokens=64)

    assert tasks_of(made.next_batch(0.0)) == [tasks[0], tasks[1], tasks[2]]
    assert tasks_of(made.next_batch(0.0)) == [tasks[3], tasks[4]]


def test_what_a_short_prompt_leaves_over_is_the_next_ones() -> None:
    short, long = task(1, 20, client=ALICE), task(2, 200, client=BOB)

    batch = scheduler(short, long, chunk_tokens=64).next_batch(0.0)

    assert batch is not None
    assert [(p.task, p.num_tokens) for p in batch.pieces] == [(short, 20), (long, 44)]

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pllm.errors import (
    BadRequest,
    Busy,
    CacheFull,
    Forbidden,
    NotServed,
    OutOfOrder,
    RequestFailed,
    SessionUnknown,
    StaleEpoch,
)
from p2pllm.ids import ModelId, PeerId, SessionId
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator
from p2pllm.server.sessions import (
    EVICT_IDLE_S,
    MAX_HELD_BYTES,
    RECLAIM_IDLE_S,
    RUNNING_GRACE_S,
    WINDOW,
    Accepted,
    Repeated,
    Session,
    SessionTable,
)
from p2pllm.spans import Span
from p2pllm.wire.messages import HandOver, Numerics, Open, Pull, Row

ALICE, BOB, CAROL, HOP = (PeerId(letter * 32) for letter in (b"a", b"b", b"c", b"h"))
ONE, TWO, THREE = (SessionId(letter * 16) for letter in (b"1", b"2", b"3"))
TOKEN = b"p" * 16
WHOLE = Span(0, 10)
LEASE_S = 10.0
NUM_PAGES = 8

Table = SessionTable[str]


def opening(
    session: SessionId = ONE,
    *,
    epoch: int = 0,
    max_tokens: int = 2 * PAGE_TOKENS,
    client: PeerId = ALICE,
    span: Span = WHOLE,
    push_token: bytes = TOKEN,
) -> Open:
    return Open(
        session=session,
        epoch=epoch,
        span=span,
        max_tokens=max_tokens,
        model=ModelId(b"m" * 32),
        numerics=Numerics("float32"),
        push_token=push_token,
        client=client,
    )


def row(
    step: int = 0, position: int = 0, num_tokens: int = 1, *, epoch: int = 0, acked: int = -1
) -> Row:
    return Row(ONE, epoch, step, position, num_tokens, acked)


def table(*, max_sessions: int = 4, quota_pages: int = 4) -> tuple[Table, PageAllocator]:
    pages = PageAllocator(NUM_PAGES, quota_pages=quota_pages)
    return SessionTable(pages, max_sessions=max_sessions, lease_s=LEASE_S), pages


def opened(request: Open | None = None) -> Table:
    made, _ = table()
    made.open(request or opening(), 0.0)
    return made


def length_of(made: Table, session: SessionId = ONE) -> int:
    held = made.get(session)
    assert held is not None
    return held.length


def computed(made: Table, *rows: Row) -> None:
    """Take rows in and give each its output, "out STEP"."""
    for each in rows:
        assert isinstance(made.on_row(each, ALICE, b"", 0.0), Accepted)
        made.on_output(each, f"out {each.step}", 0.0)


# --- opening, taking over, closing --------------------------------------------------------------


@pytest.mark.parametrize(("max_tokens", "num_pages"), [(1, 1), (64, 1), (65, 2), (512, 8)])
def test_opening_reserves_pages_for_the_whole_length(max_tokens: int, num_pages: int) -> None:
    made, pages = table()

    session = made.open(opening(max_tokens=max_tokens), 0.0)

    assert len(session.pages) == num_pages
    assert session.max_tokens == num_pages * PAGE_TOKENS
    assert pages.num_free == NUM_PAGES - num_pages
    assert (session.length, session.expires) == (0, LEASE_S)


@pytest.mark.parametrize("max_tokens", [0, -1, -64, NUM_PAGES * PAGE_TOKENS + 1])
def test_a_length_that_can_never_be_held_is_a_bad_request(max_tokens: int) -> None:
    made, pages = table()

    with pytest.raises(BadRequest):
        made.open(opening(max_tokens=max_tokens), 0.0)
    assert (len(made), pages.num_free) == (0, NUM_PAGES)


def test_without_free_pages_the_cache_is_full_until_a_lease_may_end() -> None:
    made, _ = table()
    made.open(opening(max_tokens=NUM_PAGES * PAGE_TOKENS), 0.0)

    with pytest.raises(CacheFull) as refusal:
        made.open(opening(TWO, client=BOB), 4.0)

    assert refusal.value.retry_after_s == LEASE_S - 4.0


def test_a_peer_over_its_quota_is_refused_only_while_others_wait() -> None:
    made, _ = table(quota_pages=1)

    with pytest.raises(CacheFull):
        made.open(opening(), 0.0, others_wait=True)
    made.open(opening(), 0.0, others_wait=False)

    assert len(made) == 1


def test_too_many_sessions_are_busy() -> None:
    made, pages = table(max_sessions=1)
    made.open(opening(), 0.0)

    with pytest.raises(Busy) as refusal:
        made.open(opening(TWO), 1.0)

    assert refusal.value.retry_after_s == LEASE_S - 1.0
    assert pages.num_free == NUM_PAGES - 2


@pytest.mark.parametrize(("now", "expected"), [(0.0, 10.0), (7.0, 3.0), (9.9, 0.5), (50.0, 0.5)])
def test_a_refused_client_waits_until_the_first_lease_may_end_within_reason(
    now: float, expected: float
) -> None:
    assert opened().next_expiry_s(now) == expected


def test_an_open_that_is_repeated_changes_nothing() -> None:
    made = opened()
    first = made.get(ONE)

    assert made.open(opening(), 1.0) is first
    assert len(made) == 1


def test_taking_over_with_the_same_span_keeps_the_cache_and_raises_the_epoch() -> None:
    made = opened()
    computed(made, row(num_tokens=5))

    session = made.open(opening(epoch=3, max_tokens=1), 4.0)

    assert (session.epoch, session.length, session.last_step) == (3, 5, 0)
    assert session.expires == 4.0 + LEASE_S
    with pytest.raises(StaleEpoch):
        made.on_row(row(1, 5), ALICE, b"", 4.0)


@pytest.mark.parametrize("changes", [{"span": Span(0, 5)}, {"max_tokens": 3 * PAGE_TOKENS}])
def test_taking_over_for_other_blocks_or_more_tokens_starts_from_nothing(
    changes: dict[str, object],
) -> None:
    made, pages = table()
    old = made.open(opening(), 0.0)
    computed(made, row(num_tokens=5))

    new = made.open(replace(opening(epoch=1), **changes), 0.0)  # type: ignore[arg-type]

    assert new is not old
    assert (new.length, new.last_step, len(new.kept)) == (0, None, 0)
    assert pages.num_free == NUM_PAGES - len(new.pages)


def test_a_take_over_may_use_the_pages_that_it_gives_back() -> None:
    made, pages = table(max_sessions=1)
    made.open(opening(max_tokens=6 * PAGE_TOKENS), 0.0)

    made.open(opening(epoch=1, max_tokens=7 * PAGE_TOKENS), 0.0)

    assert pages.num_free == 1


def test_a_take_over_that_is_refused_leaves_the_session_as_it_was() -> None:
    made, pages = table()
    old = made.open(opening(), 0.0)
    made.open(opening(TWO, client=BOB, max_tokens=5 * PAGE_TOKENS), 0.0)
    computed(made, row(num_tokens=5))

    for max_tokens, error in ((4 * PAGE_TOKENS, CacheFull), (99 * PAGE_TOKENS, BadRequest)):
        with pytest.raises(error):
            made.open(opening(epoch=1, max_tokens=max_tokens), 1.0)

    assert made.get(ONE) is old
    assert (old.epoch, old.length, old.expires) == (0, 5, LEASE_S)
    assert pages.num_free == 1


def test_a_session_is_taken_over_by_its_client_and_under_no_older_epoch() -> None:
    made = opened(opening(epoch=2))

    with pytest.raises(Forbidden):
        made.open(opening(epoch=3, client=BOB), 0.0)
    with pytest.raises(StaleEpoch):
        made.open(opening(epoch=1), 0.0)


def test_closing_frees_the_pages_once() -> None:
    made, pages = table()
    made.open(opening(), 0.0)

    made.close(ONE, ALICE, 0)
    made.close(ONE, ALICE, 0)

    assert (len(made), pages.num_free) == (0, NUM_PAGES)
    with pytest.raises(SessionUnknown):
        made.on_row(row(), ALICE, b"", 0.0)


def test_a_session_is_closed_by_its_client_and_under_no_older_epoch() -> None:
    made = opened(opening(epoch=2))

    with pytest.raises(Forbidden):
        made.close(ONE, BOB, 2)
    with pytest.raises(StaleEpoch):
        made.close(ONE, ALICE, 1)
    assert len(made) == 1


# --- leases -------------------------------------------------------------------------------------


def test_a_session_is_dropped_when_its_lease_is_over() -> None:
    made, pages = table()
    session = made.open(opening(), 0.0)

    assert made.expire(LEASE_S - 0.1) == []
    assert made.expire(LEASE_S) == [session]
    assert (len(made), pages.num_free) == (0, NUM_PAGES)


def test_every_step_and_every_output_renews_the_lease() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 5.0)
    made.on_output(row(), "out", 8.0)

    assert made.expire(8.0 + LEASE_S - 0.1) == []
    assert len(made.expire(8.0 + LEASE_S)) == 1


def test_a_stranger_does_not_renew_a_lease() -> None:
    made = opened()
    with pytest.raises(Forbidden):
        made.on_row(row(), BOB, b"guess", 5.0)

    assert len(made.expire(LEASE_S)) == 1


def test_a_session_with_a_step_under_way_expires_only_when_that_must_be_lost() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 0.0)

    assert made.expire(RUNNING_GRACE_S) == []
    made.on_output(row(), "out", RUNNING_GRACE_S)
    assert made.expire(RUNNING_GRACE_S) == []
    made.on_row(row(step=1, position=1), ALICE, b"", RUNNING_GRACE_S)
    assert made.expire(2 * RUNNING_GRACE_S) == []
    assert len(made.expire(2 * RUNNING_GRACE_S + LEASE_S)) == 1


def reclaimed(made: Table, now: float, *waiting: tuple[PeerId, int]) -> SessionId | None:
    session = made.reclaim(now, waiting)
    return session.id if session is not None else None


def test_an_idle_session_of_who_holds_more_than_its_share_goes_first_and_soon() -> None:
    made, pages = table(quota_pages=2)
    made.open(opening(THREE, client=BOB), 0.0)
    made.open(opening(ONE), 1.0)
    made.open(opening(TWO, max_tokens=4 * PAGE_TOKENS), 2.0)
    soon = 1.0 + RECLAIM_IDLE_S

    assert reclaimed(made, soon - 0.1, (BOB, 1)) is None
    assert reclaimed(made, soon, (ALICE, 1)) is None
    assert reclaimed(made, soon, (BOB, 1)) == ONE
    assert pages.num_free == 2
    assert reclaimed(made, soon, (BOB, 1)) is None  # there is room


def test_whoever_it_is_the_longest_idle_session_goes_after_a_longer_while() -> None:
    made, _ = table(quota_pages=4)
    made.open(opening(ONE, max_tokens=4 * PAGE_TOKENS), 0.0)
    made.open(opening(TWO, client=BOB, max_tokens=4 * PAGE_TOKENS), 1.0)

    assert reclaimed(made, EVICT_IDLE_S - 0.1, (CAROL, 1)) is None
    assert reclaimed(made, EVICT_IDLE_S + 1.0, (CAROL, 1)) == ONE


def test_who_would_hold_more_than_its_share_evicts_only_itself() -> None:
    made, _ = table(quota_pages=4)
    made.open(opening(ONE, max_tokens=4 * PAGE_TOKENS), 0.0)
    made.open(opening(TWO, client=BOB, max_tokens=4 * PAGE_TOKENS), 0.0)

    assert reclaimed(made, 2 * EVICT_IDLE_S, (CAROL, 5)) is None
    assert reclaimed(made, 2 * EVICT_IDLE_S, (BOB, 4), (CAROL, 5)) == TWO


def test_a_session_that_is_used_or_computes_is_never_evicted() -> None:
    made, _ = table(quota_pages=8)
    made.open(opening(ONE, max_tokens=4 * PAGE_TOKENS), 0.0)
    made.open(opening(TWO, client=BOB, max_tokens=4 * PAGE_TOKENS), 0.0)
    made.on_row(row(), ALICE, b"", 0.0)
    made.on_row(replace(row(), session=TWO), BOB, b"", EVICT_IDLE_S)
    made.on_output(replace(row(), session=TWO), "out", EVICT_IDLE_S)

    assert reclaimed(made, 2 * EVICT_IDLE_S - 0.1, (CAROL, 1)) is None
    assert reclaimed(made, 2 * EVICT_IDLE_S, (CAROL, 1)) == TWO


def test_nobody_is_evicted_in_vain() -> None:
    made, _ = table(quota_pages=8)
    made.open(opening(ONE, max_tokens=4 * PAGE_TOKENS), 0.0)
    made.open(opening(TWO, client=BOB, max_tokens=3 * PAGE_TOKENS), 0.0)
    made.on_row(row(), ALICE, b"", 0.0)

    assert reclaimed(made, EVICT_IDLE_S, (CAROL, 5)) is None
    assert reclaimed(made, EVICT_IDLE_S, (CAROL, 4)) == TWO
    assert reclaimed(made, EVICT_IDLE_S) is None


# --- who may push -------------------------------------------------------------------------------


def test_the_client_pushes_without_a_token_and_others_with_the_sessions() -> None:
    made = opened()

    assert made.on_row(row(0), ALICE, b"", 0.0) == Accepted(row(0))
    assert made.on_row(row(1, 1), HOP, TOKEN, 0.0) == Accepted(row(1, 1))


@pytest.mark.parametrize("token", [b"", b"p" * 15, b"q" * 16])
def test_a_wrong_token_is_forbidden(token: bytes) -> None:
    with pytest.raises(Forbidden):
        opened().on_row(row(), HOP, token, 0.0)


def test_without_a_push_token_nobody_but_the_client_pushes() -> None:
    made = opened(opening(push_token=b""))

    with pytest.raises(Forbidden):
        made.on_row(row(), HOP, b"", 0.0)


def test_a_session_that_is_not_held_is_unknown() -> None:
    made, _ = table()

    with pytest.raises(SessionUnknown):
        made.on_row(row(), ALICE, b"", 0.0)


def test_the_clients_row_raises_the_epoch_and_fences_older_ones() -> None:
    made = opened()

    made.on_row(row(0, epoch=4), ALICE, b"", 0.0)

    with pytest.raises(StaleEpoch):
        made.on_row(row(1, 1, epoch=3), ALICE, b"", 0.0)
    with pytest.raises(StaleEpoch):
        made.on_row(row(1, 1, epoch=3), HOP, TOKEN, 0.0)
    with pytest.raises(StaleEpoch):
        made.close(ONE, ALICE, 3)


def test_a_hop_with_the_push_token_raises_the_epoch() -> None:
    made = opened()

    assert isinstance(made.on_row(row(epoch=1), HOP, TOKEN, 0.0), Accepted)
    with pytest.raises(StaleEpoch):
        made.on_row(row(1, 1, epoch=0), ALICE, b"", 0.0)


@pytest.mark.parametrize("token", [b"", b"q" * 16])
def test_a_hop_without_the_push_token_does_not_raise_the_epoch(token: bytes) -> None:
    made = opened()

    with pytest.raises(Forbidden):
        made.on_row(row(epoch=1), HOP, token, 0.0)
    assert isinstance(made.on_row(row(epoch=0), ALICE, b"", 0.0), Accepted)


def test_a_take_over_shuts_the_old_predecessor_out() -> None:
    made = opened()

    made.open(replace(opening(epoch=1), push_token=b"n" * 16), 0.0)

    with pytest.raises(Forbidden):
        made.on_row(row(epoch=2), HOP, TOKEN, 0.0)
    assert isinstance(made.on_row(row(epoch=1), HOP, b"n" * 16, 0.0), Accepted)


# --- steps --------------------------------------------------------------------------------------


def test_steps_are_taken_in_order_and_the_length_grows() -> None:
    made = opened()

    computed(made, row(0, 0, 5), row(1, 5, 1), row(2, 6, 3))

    assert length_of(made) == 9


@pytest.mark.parametrize(("step", "position"), [(2, 5), (1, 6), (7, 0), (1, 1000)])
def test_a_step_that_does_not_follow_is_out_of_order_and_says_what_would(
    step: int, position: int
) -> None:
    made = opened()
    computed(made, row(0, 0, 5))

    with pytest.raises(OutOfOrder) as refusal:
        made.on_row(row(step, position), ALICE, b"", 0.0)

    assert refusal.value.expected == 5
    assert length_of(made) == 5


def test_the_first_step_may_have_any_number_but_begins_at_the_length() -> None:
    with pytest.raises(OutOfOrder) as refusal:
        opened().on_row(row(9, 1), ALICE, b"", 0.0)
    assert refusal.value.expected == 0
    assert isinstance(opened().on_row(row(9, 0), ALICE, b"", 0.0), Accepted)


def test_a_new_step_at_an_earlier_position_truncates_first() -> None:
    made = opened()
    computed(made, row(0, 0, 20))

    computed(made, row(1, 8, 2))

    assert length_of(made) == 10


@pytest.mark.parametrize(
    "wrong",
    [row(0, 0, 0), row(0, 0, -1), row(0, -1, 1), row(-1, 0, 1), row(0, 0, 2 * PAGE_TOKENS + 1)],
)
def test_a_row_that_cannot_be_computed_is_a_bad_request(wrong: Row) -> None:
    made = opened()

    with pytest.raises(BadRequest):
        made.on_row(wrong, ALICE, b"", 0.0)
    assert length_of(made) == 0


def test_a_session_can_be_filled_to_its_last_token() -> None:
    made = opened()

    computed(made, row(0, 0, 2 * PAGE_TOKENS))

    with pytest.raises(BadRequest):
        made.on_row(row(1, 2 * PAGE_TOKENS), ALICE, b"", 0.0)


def test_no_more_steps_than_the_window_are_under_way() -> None:
    made = opened()
    for step in range(WINDOW):
        made.on_row(row(step, step), ALICE, b"", 0.0)

    with pytest.raises(Busy):
        made.on_row(row(WINDOW, WINDOW), ALICE, b"", 0.0)
    made.on_output(row(0, 0), "out", 0.0)
    assert isinstance(made.on_row(row(WINDOW, WINDOW), ALICE, b"", 0.0), Accepted)


def test_a_repeated_step_is_not_computed_again_but_its_output_is_there() -> None:
    made = opened()

    first = made.on_row(row(), ALICE, b"", 0.0)
    while_running = made.on_row(row(), ALICE, b"", 0.0)
    made.on_output(row(), "out", 0.0)
    after = made.on_row(row(), ALICE, b"", 0.0)

    assert first == Accepted(row())
    assert while_running == Repeated(row(), None)
    assert after == Repeated(row(), "out")
    assert length_of(made) == 1


def test_acknowledged_outputs_are_dropped_and_later_ones_kept() -> None:
    made = opened()
    computed(made, row(0, 0), row(1, 1), row(2, 2))

    made.on_row(row(3, 3, acked=1), ALICE, b"", 0.0)

    with pytest.raises(OutOfOrder):
        made.on_row(row(1, 1), ALICE, b"", 0.0)
    assert made.on_row(row(2, 2), ALICE, b"", 0.0) == Repeated(row(2, 2), "out 2")


def test_kept_outputs_are_bounded_by_the_window_whether_acknowledged_or_not() -> None:
    made = opened()

    computed(made, *(row(step, step) for step in range(WINDOW + 3)))

    session = made.get(ONE)
    assert session is not None
    assert list(session.kept) == list(range(3, WINDOW + 3))


def test_an_output_is_sent_unless_its_session_is_gone() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 0.0)
    assert made.on_output(row(), "out", 0.0) == (made.get(ONE), row())

    assert made.on_output(row(), "again", 0.0) is None
    made.on_row(row(1, 1), ALICE, b"", 0.0)
    made.close(ONE, ALICE, 0)
    assert made.on_output(row(1, 1), "out", 0.0) is None


def test_an_output_that_a_newer_epoch_has_not_asked_for_is_kept_only() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 0.0)
    made.open(opening(epoch=1), 0.0)

    assert made.on_output(row(), "out", 0.0) is None
    assert made.on_row(row(epoch=1), ALICE, b"", 0.0) == Repeated(row(epoch=1), "out")


def test_an_output_that_a_newer_epoch_has_asked_for_while_it_ran_is_sent_under_it() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 0.0)
    made.open(opening(epoch=1), 0.0)

    assert made.on_row(row(epoch=1), ALICE, b"", 0.0) == Repeated(row(epoch=1), None)
    assert made.on_output(row(), "out", 0.0) == (made.get(ONE), row(epoch=1))


def test_what_an_older_epoch_asked_for_again_is_not_wanted_by_the_next() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 0.0)
    made.on_row(row(epoch=1), ALICE, b"", 0.0)
    made.open(opening(epoch=2), 0.0)

    assert made.on_output(row(), "out", 0.0) is None


def test_an_output_of_a_replaced_session_is_not_taken_for_the_new_ones() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 0.0)
    made.open(opening(epoch=1, span=Span(0, 5)), 0.0)
    made.on_row(row(epoch=1), ALICE, b"", 0.0)

    assert made.on_output(row(), "of the old blocks", 0.0) is None
    assert made.on_failed(row()) is None
    assert made.on_row(row(epoch=1), ALICE, b"", 0.0) == Repeated(row(epoch=1), None)


def test_a_step_that_failed_is_undone_with_all_after_it() -> None:
    made = opened()
    computed(made, row(0, 0, 5))
    for later in (row(1, 5, 2), row(2, 7, 2), row(3, 9, 2)):
        made.on_row(later, ALICE, b"", 0.0)

    lost = [row(2, 7, 2), row(3, 9, 2)]
    assert made.on_failed(row(2, 7, 2)) == (made.get(ONE), lost)

    assert length_of(made) == 7
    assert made.on_output(row(3, 9, 2), "out", 0.0) is None
    assert made.on_output(row(1, 5, 2), "out 1", 0.0) is not None
    assert made.on_row(row(2, 7, 4), ALICE, b"", 0.0) == Accepted(row(2, 7, 4))


def test_a_failure_of_what_is_not_under_way_changes_nothing() -> None:
    made = opened()
    computed(made, row(0, 0, 5))

    assert made.on_failed(row(0, 0, 5)) is None
    assert made.on_failed(replace(row(), session=TWO)) is None
    assert length_of(made) == 5


def test_a_rollback_that_failed_leaves_no_tokens_that_are_not_there() -> None:
    made = opened()
    computed(made, row(0, 0, 20))
    made.on_row(row(1, 8, 2), ALICE, b"", 0.0)

    made.on_failed(row(1, 8, 2))

    assert length_of(made) == 8


# --- taking over, with steps that are sent again -----------------------------------------------


def test_only_the_first_step_of_an_epoch_leaves_numbers_out_if_it_is_said_which() -> None:
    made = opened()
    computed(made, row(0, 0, 20))
    rows = [replace(row(step, step, 1, epoch=1), first_step=5) for step in (5, 6, 7)]

    with pytest.raises(OutOfOrder):
        made.on_row(rows[1], ALICE, b"", 0.0)
    assert made.hold(rows[1], "6", 0, until=9.0)
    assert made.on_row(rows[0], ALICE, b"", 0.0) == Accepted(rows[0])
    session = made.get(ONE)
    assert session is not None
    assert made.next_held(session) == "6"


@given(
    seen=st.integers(0, 5),
    arrivals=st.lists(st.integers(0, 5), max_size=12),
    last=st.permutations(range(6)),
    position=st.sampled_from([0, 10, 50]),
)
def test_chunks_sent_again_in_any_order_are_each_computed_once_and_in_order(
    seen: int, arrivals: list[int], last: list[int], position: int
) -> None:
    """Six chunks of ten tokens, of which the hop has computed some, over 100 older tokens."""
    made = opened()
    chunks = [row(7 + index, position + 10 * index, 10) for index in range(6)]
    computed(made, row(0, 0, 100))
    made.open(opening(epoch=1), 0.0)
    computed(made, *(replace(chunk, epoch=1, first_step=7) for chunk in chunks[:seen]))
    made.open(opening(epoch=2), 0.0)
    session, accepted = made.get(ONE), list[int]()
    assert session is not None
    for index in [*arrivals, *last]:
        queue: list[object] = [replace(chunks[index], epoch=2, first_step=7)]
        for each in queue:
            assert isinstance(each, Row)
            try:
                judged = made.on_row(each, ALICE, b"", 0.0)
            except OutOfOrder:
                assert made.hold(each, each, 1, until=9.0)
                continue
            if isinstance(judged, Accepted):
                accepted.append(each.step)
                queue += [held for held in [made.next_held(session)] if held is not None]

    assert accepted == [chunk.step for chunk in chunks[seen:]]
    assert session.length == position + 60


def test_an_early_step_that_comes_again_is_held_for_longer() -> None:
    made = opened()
    session = made.get(ONE)
    assert session is not None
    assert made.hold(row(1, 5), "first", 10, until=3.0)
    assert made.hold(row(1, 5), "second", 10, until=5.0)
    assert made.hold(row(1, 5), "third", 10, until=4.0)

    assert made.take_held(session, 4.9) == []
    assert made.take_held(session, 5.0) == [row(1, 5)]
    assert made._held_bytes == 0


@pytest.mark.parametrize("change", [{"position": 1}, {"num_tokens": 4}])
def test_a_running_step_does_not_come_again_with_other_tokens(change: dict[str, int]) -> None:
    made = opened()
    made.on_row(row(0, 0, 5), ALICE, b"", 0.0)

    again = replace(row(0, 0, 5, epoch=1), **change)  # type: ignore[arg-type]
    with pytest.raises(BadRequest):
        made.on_row(again, ALICE, b"", 0.0)


def test_what_fails_is_lost_as_it_was_asked_for_last() -> None:
    made = opened()
    made.on_row(row(0, 0, 5), ALICE, b"", 0.0)
    made.on_row(row(1, 5, 5), ALICE, b"", 0.0)
    made.on_row(row(1, 5, 5, epoch=1), ALICE, b"", 0.0)

    failure = made.on_failed(row(0, 0, 5))

    assert failure is not None
    assert failure[1] == [row(0, 0, 5), row(1, 5, 5, epoch=1)]


def test_the_next_step_is_one_more_than_the_newest() -> None:
    made = opened()
    session = made.get(ONE)
    assert session is not None
    assert session.next_step == 0
    computed(made, row(7, 0, 5))
    assert session.next_step == 8


# --- handing over -------------------------------------------------------------------------------

READER = b"r" * 16


def pull(**change: object) -> Pull:
    asked = Pull(ONE, READER, ModelId(b"m" * 32), Numerics("float32"), Span(2, 5), 0, 100)
    return replace(asked, **change)  # type: ignore[arg-type]


def test_who_has_the_token_reads_the_sessions_blocks_until_it_is_replaced() -> None:
    made = opened(opening(span=Span(2, 5)))
    with pytest.raises(Forbidden):
        made.on_pull(pull(token=b""))
    made.lend(HandOver(ONE, 0, READER), ALICE, 0.0)

    assert made.on_pull(pull()) is made.get(ONE)
    assert made.on_pull(pull(span=Span(3, 4))) is made.get(ONE)
    for change, error in (
        ({"token": b"x" * 16}, Forbidden),
        ({"span": Span(1, 5)}, NotServed),
        ({"session": TWO}, SessionUnknown),
    ):
        with pytest.raises(error):
            made.on_pull(pull(**change))
    made.lend(HandOver(ONE, 3, b"s" * 16), ALICE, 0.0)
    with pytest.raises(Forbidden):
        made.on_pull(pull())
    made.close(ONE, ALICE, 0)  # its epoch is what it was
    with pytest.raises(SessionUnknown):
        made.on_pull(pull(token=b"s" * 16))


@pytest.mark.parametrize(
    ("request_", "client", "error"),
    [
        (HandOver(TWO, 1, READER), ALICE, SessionUnknown),
        (HandOver(ONE, 0, READER), ALICE, StaleEpoch),
        (HandOver(ONE, 1, READER), BOB, Forbidden),
        (HandOver(ONE, 1, b"r" * 15), ALICE, BadRequest),
    ],
    ids=["unknown", "epoch", "client", "token"],
)
def test_a_hand_over_that_may_not_be_changes_nothing(
    request_: HandOver, client: PeerId, error: type[RequestFailed]
) -> None:
    made = opened(opening(epoch=1))

    with pytest.raises(error):
        made.lend(request_, client, 0.0)
    with pytest.raises(Forbidden):
        made.on_pull(pull())


def test_only_what_has_been_computed_is_there_to_be_read() -> None:
    made = opened()
    session = made.get(ONE)
    assert session is not None
    computed(made, row(0, 0, 20))
    made.on_row(row(1, 20, 5), ALICE, b"", 0.0)
    assert (session.num_computed, session.length) == (20, 25)
    made.on_row(row(2, 8, 2), ALICE, b"", 0.0)  # rolls back
    assert session.num_computed == 8
    for step, position, count in ((1, 20, 5), (2, 8, 2)):
        made.on_output(row(step, position, count), "out", 0.0)
    assert session.num_computed == 10


def test_tokens_are_pulled_in_order_and_not_into_what_was_computed() -> None:
    made = opened()
    session = made.get(ONE)
    assert session is not None
    assert not made.may_pull(session, 1)
    assert made.may_pull(session, 0)
    made.on_pulled(session, 30, 7.0)
    assert (session.length, session.expires) == (30, 7.0 + LEASE_S)
    assert made.may_pull(session, 30)
    made.on_row(row(0, 30, 1), ALICE, b"", 8.0)
    assert not made.may_pull(session, 31)
    fresh = made.open(opening(epoch=1, span=Span(0, 5)), 8.0)
    assert made.may_pull(fresh, 0)
    assert not made.may_pull(session, 31)


# --- forks --------------------------------------------------------------------------------------


def test_a_fork_begins_with_its_sources_first_tokens_in_pages_of_its_own() -> None:
    made = opened()
    computed(made, row(0, 0, 20))

    source, new = made.fork(opening(TWO), ONE, 12, 3.0, others_wait=False)

    assert source is made.get(ONE)
    assert new is made.get(TWO)
    assert (source.length, new.length, new.last_step) == (20, 12, None)
    assert set(source.pages).isdisjoint(new.pages)
    assert source.expires == new.expires == 3.0 + LEASE_S


def test_a_fork_goes_on_from_its_position_with_any_step_number() -> None:
    made = opened()
    computed(made, row(0, 0, 20))
    made.fork(opening(TWO), ONE, 12, 0.0, others_wait=False)

    next_row = Row(TWO, 0, 1, 12, 1)

    assert made.on_row(next_row, ALICE, b"", 0.0) == Accepted(next_row)
    with pytest.raises(OutOfOrder):
        made.on_row(Row(TWO, 0, 2, 14, 1), ALICE, b"", 0.0)


@pytest.mark.parametrize("position", [-1, 21, 1000])
def test_a_fork_copies_no_tokens_that_are_not_there(position: int) -> None:
    made = opened()
    computed(made, row(0, 0, 20))

    with pytest.raises(BadRequest):
        made.fork(opening(TWO), ONE, position, 0.0, others_wait=False)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (opening(ONE), BadRequest),
        (opening(TWO, span=Span(0, 5)), BadRequest),
        (opening(TWO, max_tokens=11), BadRequest),
        (opening(TWO, client=BOB), Forbidden),
        (opening(TWO, max_tokens=7 * PAGE_TOKENS), CacheFull),
    ],
)
def test_a_fork_that_does_not_fit_its_source_is_refused(
    request_: Open, error: type[RequestFailed]
) -> None:
    made = opened()
    computed(made, row(0, 0, 20))

    with pytest.raises(error):
        made.fork(request_, ONE, 12, 0.0, others_wait=False)
    assert len(made) == 1


def test_a_fork_of_nothing_or_under_an_older_epoch_is_refused() -> None:
    made = opened(opening(epoch=1))

    with pytest.raises(StaleEpoch):
        made.fork(opening(TWO), ONE, 0, 0.0, others_wait=False)
    with pytest.raises(SessionUnknown):
        made.fork(opening(TWO), THREE, 0, 0.0, others_wait=False)


def test_a_session_is_forked_between_steps_only() -> None:
    made = opened()
    made.on_row(row(), ALICE, b"", 0.0)

    with pytest.raises(Busy):
        made.fork(opening(TWO), ONE, 0, 0.0, others_wait=False)


# --- whatever the network does ------------------------------------------------------------------


class Network(RuleBasedStateMachine):
    """One client's rows reach a server in any order and any number of times.

    `sent` are all rows the client ever made, in its order; each may arrive at any time. The model
    is a cache, written by a worker that computes accepted rows one by one: `cache[i]` is the step
    that wrote token i. An output is (step, the cache as that step left it).
    """

    @initialize()
    def start(self) -> None:
        self.pages = PageAllocator(NUM_PAGES, quota_pages=NUM_PAGES)
        self.table: SessionTable[tuple[int, list[int]]] = SessionTable(
            self.pages, max_sessions=2, lease_s=LEASE_S
        )
        self.now = 0.0
        self.epoch = 0
        self.sent: list[Row] = []
        self._begin()

    def _begin(self) -> None:
        """The server's side when a session starts from nothing."""
        self.table.open(opening(epoch=self.epoch), self.now)
        self.accepted: list[Row] = []  # and not undone
        self.running: list[Row] = []
        self.outputs: dict[int, tuple[int, list[int]]] = {}
        self.cache: list[int] = []
        self.acked = -1
        self.may_skip = False  # no step of this epoch was accepted
        self.first: int | None = None  # the number of this epoch's first step
        self.undone: set[int] = set()  # what failures left out is not asked for again

    @property
    def length(self) -> int:
        last = self.accepted[-1] if self.accepted else None
        return last.position + last.num_tokens if last else 0

    @rule(
        skip=st.sampled_from([0, 0, 0, 0, 1]),
        move=st.sampled_from([0, 0, 0, -1, -4, 1]),
        num_tokens=st.integers(1, 6),
        ack=st.booleans(),
        is_lost=st.booleans(),
        says_first=st.booleans(),
    )
    def send(
        self, skip: int, move: int, num_tokens: int, ack: bool, is_lost: bool, says_first: bool
    ) -> None:
        """The client makes the next row, perhaps rolling back, or leaves a gap by mistake."""
        last = self.accepted[-1].step if self.accepted else -1
        position = max(0, self.length + move)
        acked = max(self.outputs, default=-1) if ack else self.acked
        made = Row(ONE, self.epoch, last + 1 + skip, position, num_tokens, acked)
        self.first = made.step if self.first is None else self.first
        self.sent.append(replace(made, first_step=self.first) if says_first else made)
        if not is_lost:
            self._arrive(self.sent[-1], by_hop=False)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), by_hop=st.booleans())
    def arrive(self, data: st.DataObject, by_hop: bool) -> None:
        """Any row ever sent arrives, from the client or pushed by the hop before."""
        self._arrive(data.draw(st.sampled_from(self.sent[-8:])), by_hop=by_hop)

    def _arrive(self, arrived: Row, *, by_hop: bool) -> None:
        sender, token = (HOP, TOKEN) if by_hop else (ALICE, b"")
        try:
            seen = self.table.on_row(arrived, sender, token, self.now)
        except StaleEpoch:
            assert arrived.epoch < self.epoch
            return
        except OutOfOrder as exc:
            self.acked = max(self.acked, arrived.acked)
            self._on_out_of_order(arrived, exc.expected)
            return
        except Busy:
            self.acked = max(self.acked, arrived.acked)
            assert len(self.running) == WINDOW
            return
        except BadRequest:
            self.acked = max(self.acked, arrived.acked)
            is_another = arrived.step in [row.step for row in self.running]
            assert is_another or arrived.position + arrived.num_tokens > 2 * PAGE_TOKENS
            return
        assert arrived.epoch == self.epoch
        self.acked = max(self.acked, arrived.acked)
        if isinstance(seen, Accepted):
            self._on_accepted(arrived)
        else:
            assert arrived.step in [row.step for row in self.accepted]
            assert seen.output == self.outputs.get(arrived.step)
            assert (seen.output is None) == (arrived.step in [row.step for row in self.running])

    def _on_out_of_order(self, arrived: Row, expected: int) -> None:
        steps = [row.step for row in self.accepted]
        assert expected == self.length
        if arrived.step in steps:  # its output is gone
            is_old = sum(step > arrived.step for step in self.outputs) >= WINDOW
            assert arrived.step <= self.acked or is_old or arrived.step in self.undone
        elif not steps or self.may_skip:
            is_late = arrived.first_step not in (-1, arrived.step)
            is_old = bool(steps) and arrived.step < steps[-1]
            assert arrived.position > self.length or is_old or is_late
        else:
            assert arrived.position > self.length or (steps and arrived.step != steps[-1] + 1)

    def _on_accepted(self, arrived: Row) -> None:
        assert arrived.step not in [row.step for row in self.accepted], "a step applies once"
        assert (
            not self.accepted
            or arrived.step == self.accepted[-1].step + 1
            or (self.may_skip and arrived.step > self.accepted[-1].step)
        )
        last = self.accepted[-1].step if self.accepted else -1
        assert arrived.step == last + 1 or arrived.first_step in (-1, arrived.step)
        assert arrived.position <= self.length
        self.may_skip = False
        self.accepted.append(arrived)
        self.running.append(arrived)

    @precondition(lambda self: self.running)
    @rule()
    def compute(self) -> None:
        """The worker is done with the oldest row."""
        row = self.running.pop(0)
        assert row.position <= len(self.cache), "no step is computed over a hole"
        self.cache[row.position :] = [row.step] * row.num_tokens
        self.outputs[row.step] = (row.step, list(self.cache))
        asked = self.table.on_output(row, self.outputs[row.step], self.now)
        assert asked is not None or row.epoch < self.epoch

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A row cannot be computed; with it fall the later ones."""
        row, before = data.draw(st.sampled_from(self.running)), self.length
        failure = self.table.on_failed(row)
        assert failure is not None
        session, _ = failure
        self.running = [other for other in self.running if other.step < row.step]
        self.accepted = [other for other in self.accepted if other.step < row.step]
        length = session.length
        assert length == min(before, row.position)
        # Go on from the shorter length, as the client does that is told `expected`.
        self.accepted.append(Row(ONE, 0, row.step - 1, 0, length))
        self.undone.add(row.step - 1)

    @rule()
    def take_over(self) -> None:
        """The client changes its route; this hop and its cache stay."""
        self.epoch += 1
        before = self.table.get(ONE)
        assert self.table.open(opening(epoch=self.epoch), self.now) is before
        self.may_skip = True
        self.first = None

    @precondition(lambda self: len(self.accepted) > 4)
    @rule()
    def replace_it(self) -> None:
        """The client gives this hop another span: everything begins again."""
        self.epoch += 1
        self.table.open(opening(epoch=self.epoch, span=Span(0, 5)), self.now)
        self.epoch += 1
        self._begin()

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        session = self.table.get(ONE)
        assert session is not None
        is_over = session.expires <= self.now
        expired = self.table.expire(self.now)
        assert expired == ([session] if is_over and not self.running else [])
        if expired:
            self.epoch += 1
            self._begin()

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        session = self.table.get(ONE)
        assert session is not None
        assert session.epoch == self.epoch
        assert session.length == self.length
        assert list(session.running) == [row.step for row in self.running]
        assert len(session.kept) <= WINDOW
        assert all(step > self.acked for step in session.kept)
        assert all(session.kept[step] == self.outputs[step] for step in session.kept)
        assert self.pages.num_free == NUM_PAGES - len(session.pages)


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=150, stateful_step_count=40)


# --- early steps ------------------------------------------------------------------------------


def held_session(made: Table) -> Session[str]:
    session = made.get(ONE)
    assert session is not None
    return session


def test_an_early_row_is_held_until_its_turn() -> None:
    made = opened()
    early = row(step=1, position=10)
    with pytest.raises(OutOfOrder):
        made.on_row(early, ALICE, b"", 0.0)
    assert made.hold(early, "the message", 100, until=5.0)
    made.on_row(row(step=0, num_tokens=10), ALICE, b"", 0.0)
    assert made.next_held(held_session(made)) == "the message"
    assert made.next_held(held_session(made)) is None


def test_late_rows_are_not_held() -> None:
    made = opened()
    made.on_row(row(step=0, num_tokens=10), ALICE, b"", 0.0)
    assert not made.hold(row(step=0), "late", 1, until=5.0)
    assert made.hold(row(step=2, position=11), "early", 1, until=5.0)


def test_held_rows_are_bounded_in_number() -> None:
    made = opened()
    for step in range(1, WINDOW + 1):
        assert made.hold(row(step=step, position=9 + step), "", 1, until=5.0)
    assert not made.hold(row(step=WINDOW + 1, position=99), "", 1, until=5.0)


def test_held_rows_are_bounded_in_bytes_which_come_back() -> None:
    made = opened()
    assert not made.hold(row(step=1, position=9), "", MAX_HELD_BYTES + 1, until=5.0)
    assert made.hold(row(step=1, position=9), "", MAX_HELD_BYTES, until=5.0)
    assert not made.hold(row(step=2, position=10), "", 1, until=5.0)
    made.close(ONE, ALICE, 0)
    made.open(opening(), 0.0)
    assert made.hold(row(step=1, position=9), "", MAX_HELD_BYTES, until=5.0)


def test_overdue_rows_are_let_go() -> None:
    made = opened()
    for step, until in ((1, 5.0), (2, 7.0)):
        assert made.hold(row(step=step, position=9 + step), "", 1, until=until)
    assert [gone.step for gone in made.take_held(held_session(made), 6.0)] == [1]
    assert [gone.step for gone in made.take_held(held_session(made))] == [2]


def test_rows_of_an_older_epoch_are_let_go() -> None:
    made = opened()
    assert made.hold(row(step=1, position=9), "", 1, until=5.0)
    made.open(opening(epoch=1), 0.0)
    assert held_session(made).held == {}

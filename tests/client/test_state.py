"""What a client knows of a sequence: steps under way, journals, and where it goes back to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pllm.client.journal import JournalStore
from p2pllm.client.spill import SpillFile
from p2pllm.client.state import (
    ECHOES_AWAITED,
    FIRST_STEP,
    Copy,
    Flight,
    SessionState,
    latest_known_hop,
    part_of,
    set_starts,
)
from p2pllm.ids import SessionId
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.wire.messages import Row
from p2pllm.wire.tensors import TensorCodec, WireTensor

NUM_HOPS = 3


def new_state(number: int = 1, num_hops: int = NUM_HOPS) -> SessionState:
    store = JournalStore(2**20, SpillFile)
    journals = [store.journal() for _ in range(num_hops)]
    tokens = [bytes([hop]) * 16 for hop in range(num_hops)]
    return SessionState(SessionId(bytes([number]) * 16), 64, journals, tokens)


def tensor(*values: float) -> WireTensor:
    """Hidden states of width 2, one per token."""
    return encode_tensor(torch.tensor([[float(v), 0.0] for v in values]), TensorCodec.RAW)


def values(state: SessionState, hop: int, start: int = 0, stop: int | None = None) -> list[float]:
    """What a journal holds of these tokens; by default, all from the first on."""
    journal = state.journals[hop]
    parts = journal.read(start, journal.known if stop is None else stop, 1000)
    return [float(value) for part in parts for value in decode_tensor(part)[:, 0]]


def depart(state: SessionState, *tokens: float, tail: int = 0) -> Row:
    """Send a step with the next tokens."""
    row = state.next_row(len(tokens), tail)
    state.depart(Flight((row,), tensor(*tokens)), row)
    return row


# --- steps -------------------------------------------------------------------------------------


def test_a_step_that_leaves_moves_the_state_on_and_is_in_the_first_journal() -> None:
    state = new_state()

    first, second = depart(state, 1, 2, 3), depart(state, 4, tail=1)

    assert first == Row(state.id, 0, FIRST_STEP, 0, 3, FIRST_STEP - 1, 0)
    assert second == Row(state.id, 0, FIRST_STEP + 1, 3, 1, FIRST_STEP - 1, 1)
    assert (state.position, list(state.flights)) == (4, [FIRST_STEP, FIRST_STEP + 1])
    assert values(state, 0) == [1, 2, 3, 4]
    assert state.journals[1].known == 0


def test_of_a_step_of_several_sequences_each_keeps_its_own_part() -> None:
    one, two = new_state(1), new_state(2)
    rows = (one.next_row(2, 0), two.next_row(3, 0))
    flight = Flight(rows, tensor(1, 2, 7, 8, 9))

    one.depart(flight, rows[0])
    two.depart(flight, rows[1])

    assert (values(one, 0), values(two, 0)) == ([1, 2], [7, 8, 9])
    assert decode_tensor(part_of(rows, flight.tensor, rows[1]))[:, 0].tolist() == [7, 8, 9]
    assert flight.num_tokens == 5


def test_steps_are_acknowledged_up_to_the_oldest_under_way() -> None:
    state = new_state()
    assert state.acked == FIRST_STEP - 1

    first, second, third = (depart(state, number) for number in range(3))
    state.arrive(second)
    assert state.acked == FIRST_STEP - 1
    state.arrive(first)
    assert state.acked == FIRST_STEP + 1
    state.arrive(third)
    assert state.acked == FIRST_STEP + 2


def test_a_row_is_sent_again_under_its_number_with_what_is_new() -> None:
    state = new_state()
    first, second = depart(state, 1, 2), depart(state, 3, tail=1)
    state.arrive(first)
    state.epoch = 5

    assert state.current(second) == Row(
        state.id, 5, FIRST_STEP + 1, 2, 1, FIRST_STEP, 1, first_step=FIRST_STEP + 1
    )


def test_giving_up_goes_back_to_the_earliest_row_and_fences_it_off() -> None:
    state = new_state()
    rows = [depart(state, 1, 2, 3, 4), depart(state, 5, 6, 7, 8), depart(state, 9)]
    state.arrive(rows[0])

    for row in (rows[1], rows[2]):
        state.give_up(row)

    assert (state.position, state.epoch, state.next_step) == (4, 2, FIRST_STEP + 3)
    assert not state.flights
    assert values(state, 0) == [1, 2, 3, 4]
    following = Row(state.id, 2, FIRST_STEP + 3, 4, 2, FIRST_STEP + 2, 0)
    assert state.next_row(2, 0) == following


def test_rolling_back_forgets_the_tokens_in_every_journal() -> None:
    state = new_state()
    row = depart(state, 1, 2, 3)
    for hop in range(NUM_HOPS - 1):
        state.on_echo(hop, row, tensor(10, 20, 30))
    state.arrive(row)

    state.rollback(1)

    assert state.position == 1
    assert [values(state, hop) for hop in range(NUM_HOPS)] == [[1], [10], [10]]


def test_closing_a_state_frees_its_journals() -> None:
    store = JournalStore(2**20, SpillFile)
    state = SessionState(SessionId(b"1" * 16), 64, [store.journal()], [b""])
    depart(state, 1, 2, 3)

    state.close()

    assert store.memory_bytes == 0


# --- echoes ------------------------------------------------------------------------------------


def test_a_hops_echo_is_the_next_ones_input() -> None:
    state = new_state()
    row = depart(state, 1, 2)

    assert state.on_echo(0, row, tensor(10, 20))
    assert state.on_echo(2, row, tensor(5, 5))  # the last hop's: nobody's input

    assert [values(state, hop) for hop in range(NUM_HOPS)] == [[1, 2], [10, 20], []]


def test_the_first_echo_of_a_token_counts() -> None:
    state = new_state()
    row = depart(state, 1, 2)
    for value in (10, 99):
        state.on_echo(0, row, tensor(value, value))
    assert values(state, 1) == [10, 10]


@pytest.mark.parametrize(
    "changes", [{"step": FIRST_STEP + 7}, {"position": 1}, {"num_tokens": 3}, {"step": 0}]
)
def test_an_echo_of_something_else_is_not_ours(changes: dict[str, int]) -> None:
    state = new_state()
    row = depart(state, 1, 2)
    told = {"step": row.step, "position": 0, "num_tokens": 2, **changes}
    other = Row(state.id, 0, told["step"], told["position"], told["num_tokens"])

    assert not state.on_echo(0, other, tensor(*range(told["num_tokens"])))

    assert state.journals[1].known == 0


def test_an_echo_may_come_after_the_output_but_not_much_later() -> None:
    state = new_state()
    rows = [depart(state, number) for number in range(ECHOES_AWAITED + 1)]
    for row in rows:
        state.arrive(row)

    assert not state.on_echo(0, rows[0], tensor(10))
    assert state.on_echo(0, rows[1], tensor(11))


def test_an_echo_of_a_step_that_was_given_up_is_not_ours() -> None:
    state = new_state()
    row = depart(state, 1, 2)
    state.give_up(row)
    assert not state.on_echo(0, row, tensor(10, 20))
    assert state.journals[1].known == 0


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_late_echo_does_not_bring_back_what_was_rolled_back(position: int) -> None:
    state = new_state()
    row = depart(state, 1, 2, 3)
    state.arrive(row)
    state.rollback(position)
    other = depart(state, *range(7, 10 - position))

    state.on_echo(0, row, tensor(10, 20, 30))
    state.on_echo(0, other, tensor(*range(70, 73 - position)))

    assert values(state, 1, position, 3) == list(range(70, 73 - position))


# --- what hops must hold -----------------------------------------------------------------------


def test_hops_need_what_the_steps_under_way_do_not_bring() -> None:
    state = new_state()
    rows = [depart(state, 1, 2), depart(state, 3, 4, 5), depart(state, 6)]
    state.arrive(rows[0])
    assert [state.target(hop) for hop in range(NUM_HOPS)] == [2, 2, 2]

    state.flights[rows[1].step].start = 2
    state.flights[rows[2].step].start = 1

    assert [state.target(hop) for hop in range(NUM_HOPS)] == [6, 5, 2]


def test_without_steps_under_way_hops_need_all() -> None:
    state = new_state()
    state.arrive(depart(state, 1, 2))
    assert [state.target(hop) for hop in range(NUM_HOPS)] == [2, 2, 2]


def test_steps_are_sent_again_to_the_latest_hop_whose_input_is_known_of_all_rows() -> None:
    one, two = new_state(1), new_state(2)
    pairs = [(one, depart(one, 1, 2)), (two, depart(two, 3))]
    assert latest_known_hop(pairs, NUM_HOPS) == 0

    one.on_echo(0, pairs[0][1], tensor(10, 20))
    assert latest_known_hop(pairs, NUM_HOPS) == 0
    two.on_echo(0, pairs[1][1], tensor(30))
    assert latest_known_hop(pairs, NUM_HOPS) == 1

    for hop, (state, row) in enumerate(pairs):
        state.on_echo(1, row, tensor(*range(row.num_tokens)))
        assert latest_known_hop(pairs, NUM_HOPS) == 1 + hop
    assert latest_known_hop(pairs, 2) == 1


def starts_of(*states: SessionState) -> list[int]:
    """From which hop on each step under way is to be sent again, oldest first."""
    by_id = {state.id: state for state in states}
    flights = list(dict.fromkeys(flight for state in states for flight in state.flights.values()))
    set_starts(
        [(flight, [by_id[row.session] for row in flight.rows]) for flight in flights], NUM_HOPS
    )
    return [flight.start for flight in flights]


def test_each_step_is_sent_again_to_the_latest_hop_that_lets_older_ones_go_first() -> None:
    state = new_state()
    rows = [depart(state, 1, 2), depart(state, 3), depart(state, 4)]
    assert starts_of(state) == [0, 0, 0]

    state.on_echo(0, rows[0], tensor(10, 20))
    state.on_echo(1, rows[0], tensor(100, 200))
    assert starts_of(state) == [0, 0, 0]  # the second one's echo is lost, or still to come

    state.on_echo(0, rows[1], tensor(30))
    assert starts_of(state) == [0, 0, 0]

    state.on_echo(0, rows[2], tensor(40))
    assert starts_of(state) == [1, 1, 1]
    assert [state.current(row).first_step for row in rows] == [FIRST_STEP] * 3


def test_a_younger_step_may_begin_later_than_an_older_one() -> None:
    state = new_state()
    rows = [depart(state, 1), depart(state, 2)]
    state.on_echo(0, rows[1], tensor(20))
    assert starts_of(state) == [0, 1]
    assert [state.current(row).first_step for row in rows] == [FIRST_STEP] * 2


def test_a_step_of_several_sequences_waits_for_the_younger_ones_of_each() -> None:
    one, two = new_state(1), new_state(2)
    rows = (one.next_row(1, 0), two.next_row(1, 0))
    flight = Flight(rows, tensor(1, 2))
    for state, row in zip((one, two), rows, strict=True):
        state.depart(flight, row)
        state.on_echo(0, row, tensor(10))
        state.on_echo(1, row, tensor(100))
    assert starts_of(one, two) == [2]

    younger = depart(two, 3)
    assert starts_of(one, two) == [0, 0]

    two.on_echo(0, younger, tensor(30))
    assert starts_of(one, two) == [1, 1]


@given(st.lists(st.integers(0, NUM_HOPS - 1), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_whatever_echoes_came_no_step_begins_after_a_younger_one(known: list[int]) -> None:
    state = new_state()
    for number, hops in enumerate(known):
        row = depart(state, number)
        for hop in range(hops):
            state.on_echo(hop, row, tensor(number))

    starts = starts_of(state)

    assert starts == sorted(starts)
    latest = [min(known[index:]) for index in range(len(known))]
    assert starts == latest


def test_an_input_is_known_if_all_of_its_tokens_are() -> None:
    state = new_state()
    row = depart(state, 1, 2, 3)
    state.journals[1].put(0, tensor(10, 20))
    assert not state.knows_input(1, row)
    state.journals[1].put(2, tensor(30))
    assert state.knows_input(1, row)
    assert not state.knows_input(2, row)


# --- other hops --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "stop", "num_new", "inputs"),
    [
        (0, 1, 1, [[1], [10], [20]]),
        (1, 2, 1, [[1], [10], [20]]),
        (2, 3, 1, [[1], [10], [20]]),
        (1, 2, 2, [[1], [10], [91], [20]]),
        (0, 1, 3, [[1], [91], [92], [10], [20]]),
        (2, 3, 2, [[1], [10], [20], [91]]),
        (0, 3, 1, [[1]]),
        (0, 2, 1, [[1], [20]]),
        (1, 3, 2, [[1], [10], [91]]),
    ],
)
def test_hops_that_take_over_have_the_inputs_of_those_they_replace(
    first: int, stop: int, num_new: int, inputs: list[list[float]]
) -> None:
    state = new_state()
    row = depart(state, 1)
    state.on_echo(0, row, tensor(10))
    state.on_echo(1, row, tensor(20))
    store = JournalStore(2**20, SpillFile)
    journals = [store.journal() for _ in range(num_new - 1)]
    for number, journal in enumerate(journals, 91):
        journal.put(0, tensor(number))
    tokens = [bytes([90 + number]) for number in range(num_new)]
    old = list(state.push_tokens)

    state.splice(first, stop, journals, tokens)

    assert [values(state, hop) for hop in range(len(state.journals))] == inputs
    assert state.push_tokens == [*old[:first], *tokens, *old[stop:]]


def test_the_journals_of_hops_that_are_gone_are_freed() -> None:
    store = JournalStore(2**20, SpillFile)
    journals = [store.journal() for _ in range(NUM_HOPS)]
    state = SessionState(SessionId(b"1" * 16), 64, journals, [b""] * NUM_HOPS)
    for journal in journals:
        journal.put(0, tensor(1, 2))

    state.splice(0, 3, [], [b"new"])

    assert store.memory_bytes == 2 * 2 * 4


# --- whatever happens --------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """A sequence whose tokens are numbers that never come twice; a hop adds 1000 to its input.

    `text` is what the sequence is; echoes come in any order, late, twice, or never.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = new_state()
        self.text: list[float] = []
        self.sent: list[tuple[Row, list[float]]] = []  # all that was ever sent
        self.under_way: list[Row] = []
        self.last_epoch = 0

    @rule(num_tokens=st.integers(1, 4))
    def depart(self, num_tokens: int) -> None:
        first = 1 + sum(len(tokens) for _, tokens in self.sent)
        tokens = [float(number) for number in range(first, first + num_tokens)]
        row = depart(self.state, *tokens)
        self.sent.append((row, tokens))
        self.under_way.append(row)
        self.text += tokens

    @precondition(lambda self: self.under_way)
    @rule(choice=st.integers(0, 10))
    def arrive(self, choice: int) -> None:
        row = self.under_way.pop(choice % len(self.under_way))
        self.state.arrive(row)

    @precondition(lambda self: self.under_way)
    @rule(choice=st.integers(0, 10))
    def give_up(self, choice: int) -> None:
        """As a chain does it: with a step fall those after it."""
        choice %= len(self.under_way)
        first = min(row.position for row in self.under_way[choice:])
        for row in self.under_way[choice:]:
            self.state.give_up(row)
        del self.under_way[choice:]
        del self.text[first:]

    @precondition(lambda self: not self.under_way)
    @rule(share=st.floats(0, 1))
    def rollback(self, share: float) -> None:
        position = int(share * len(self.text))
        self.state.rollback(position)
        del self.text[position:]

    @precondition(lambda self: self.sent)
    @rule(age=st.integers(0, 6), hop=st.integers(0, NUM_HOPS - 1))
    def echo(self, age: int, hop: int) -> None:
        row, tokens = self.sent[-1 - age % len(self.sent)]
        self.state.on_echo(hop, row, tensor(*(1000 * (hop + 1) + token for token in tokens)))

    @invariant()
    def the_first_journal_is_the_text(self) -> None:
        assert self.state.position == len(self.text)
        assert values(self.state, 0) == self.text

    @invariant()
    def the_others_hold_nothing_that_is_not_of_the_text(self) -> None:
        for hop in range(1, NUM_HOPS):
            journal = self.state.journals[hop]
            for position in range(len(self.text) + 5):
                if journal.first_hole(position, position + 1) is None:
                    wanted = [1000 * hop + self.text[position]]
                    assert values(self.state, hop, position, position + 1) == wanted

    @invariant()
    def numbers_and_epochs_rise(self) -> None:
        state = self.state
        assert state.epoch >= self.last_epoch
        self.last_epoch = state.epoch
        assert list(state.flights) == sorted(state.flights)
        assert state.acked < min((row.step for row in self.under_way), default=state.next_step)
        assert state.next_step == FIRST_STEP + len(self.sent)
        for hop in range(NUM_HOPS):
            assert state.target(hop) <= state.position


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# --- copies at hops that may take over ---------------------------------------------------------


def new_copy(held: list[int]) -> Copy:
    """A copy at so many hops; the second one and those after it have journals, as far."""
    store = JournalStore(2**20, SpillFile)
    journals = [store.journal() for _ in held[1:]]
    for journal, count in zip(journals, held[1:], strict=True):
        journal.put(0, tensor(*range(count)))
    return Copy(epoch=1, push_tokens=[b"t" * 16] * len(held), journals=journals, held=held)


def test_what_a_sequence_forgets_its_copies_forget() -> None:
    state, copy = new_state(), new_copy([5, 3])
    state.copies.append(copy)
    state.arrive(depart(state, 1, 2, 3, 4, 5))

    state.rollback(4)
    assert (copy.held, copy.lowest_cut, copy.journals[0].known) == ([4, 3], 4, 3)
    state.rollback(2)
    assert (copy.held, copy.lowest_cut, copy.journals[0].known) == ([2, 2], 2, 2)


def test_what_is_given_up_is_forgotten_by_copies_too() -> None:
    state, copy = new_state(), new_copy([3])
    state.copies.append(copy)
    depart(state, 1, 2)
    state.give_up(depart(state, 3))
    assert copy.held == [2]


def test_a_hop_holds_no_more_of_what_it_got_than_was_left_meanwhile() -> None:
    copy = new_copy([1, 1])
    copy.hold(0, 7)
    assert copy.held == [7, 1]

    copy.cut(4)
    copy.cut(6)  # what came after the first cut is something else
    copy.hold(1, 7)

    assert copy.held == [4, 4]


# --- epochs ------------------------------------------------------------------------------------


def test_no_epoch_is_used_twice_by_the_chain_and_its_copies() -> None:
    state = new_state()
    of_a_copy = state.new_epoch()
    state.give_up(depart(state, 1))
    of_another = state.new_epoch()
    assert [of_a_copy, state.epoch, of_another] == [1, 2, 3]


def test_an_epoch_may_leap_over_those_that_somebody_else_has_used() -> None:
    state = new_state()
    assert [state.new_epoch(), state.new_epoch(1000), state.new_epoch()] == [1, 1002, 1003]
    assert state.epoch == 0  # until the chain has changed


# --- what the hops hold already ------------------------------------------------------------------


def test_tokens_that_the_hops_hold_are_in_the_first_journal_and_holes_in_the_others() -> None:
    state = new_state()

    state.assume(tensor(1, 2, 3))

    assert state.position == 3
    assert not state.has_begun
    assert values(state, 0) == [1, 2, 3]
    assert [journal.first_hole(0, 3) for journal in state.journals] == [None, 0, 0]
    assert [state.target(hop) for hop in range(NUM_HOPS)] == [3] * NUM_HOPS
    row = depart(state, 4)
    assert (row.position, row.step) == (3, FIRST_STEP)
    assert state.has_begun


@pytest.mark.parametrize(("position", "is_broken"), [(4, False), (3, False), (2, True), (0, True)])
def test_going_back_into_what_was_promised_breaks_the_promise(
    position: int, is_broken: bool
) -> None:
    state = new_state()
    state.promise(3)
    state.assume(tensor(1, 2, 3, 4))

    state.rollback(position)

    assert (state.num_promised, state.epoch) == ((0, 1) if is_broken else (3, 0))


def test_a_promise_is_broken_once_and_where_there_was_none_nothing_happens() -> None:
    state = new_state()

    state.break_promise()
    assert state.epoch == 0
    state.promise(3)
    state.break_promise()
    state.break_promise()
    assert state.epoch == 1

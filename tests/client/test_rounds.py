"""Who goes together to the client's compute thread."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.client.rounds import Rounds


@dataclass(frozen=True)
class Asked:
    name: str
    num_rows: int


def waiting(*works: Asked, max_rows: int = 8) -> Rounds[Asked]:
    rounds: Rounds[Asked] = Rounds(max_rows)
    for work in works:
        rounds.on_work(work)
    return rounds


def names(works: tuple[Asked, ...]) -> str:
    return "".join(work.name for work in works)


def all_rounds(rounds: Rounds[Asked]) -> list[str]:
    taken = []
    while works := rounds.next_round():
        taken.append(names(works))
    return taken


def test_nothing_waits_at_first() -> None:
    assert waiting().next_round() == ()


def test_a_step_alone_does_not_wait_for_others() -> None:
    assert all_rounds(waiting(Asked("a", 1))) == ["a"]


def test_steps_that_wait_go_together_in_order() -> None:
    assert all_rounds(waiting(Asked("a", 1), Asked("b", 3), Asked("c", 1))) == ["abc"]


def test_a_round_ends_before_it_has_too_many_rows() -> None:
    works = [Asked("a", 5), Asked("b", 3), Asked("c", 1), Asked("d", 8)]
    assert all_rounds(waiting(*works)) == ["ab", "c", "d"]


def test_a_step_too_large_for_a_round_is_one_by_itself() -> None:
    assert all_rounds(waiting(Asked("a", 1), Asked("b", 9), Asked("c", 1))) == ["a", "b", "c"]


def test_steps_go_first_and_other_work_takes_turns_with_rounds() -> None:
    rounds = waiting(Asked("p", 0), Asked("q", 0), Asked("a", 8), Asked("b", 8), Asked("c", 8))
    assert all_rounds(rounds) == ["a", "p", "b", "q", "c"]


def test_what_nobody_waits_for_is_not_done() -> None:
    step, other, taken = Asked("a", 1), Asked("p", 0), Asked("b", 1)
    rounds = waiting(taken)
    rounds.next_round()
    rounds.on_work(step)
    rounds.on_work(other)

    for work in (step, other, taken):
        rounds.discard(work)

    assert rounds.snapshot() == () == rounds.next_round()


@settings(max_examples=200)
@given(st.lists(st.one_of(st.integers(0, 12), st.none()), max_size=60))
def test_all_is_done_once_in_order_and_nothing_starves(events: list[int | None]) -> None:
    """Numbers ask for so many rows, None takes a round."""
    rounds: Rounds[Asked] = Rounds(8)
    asked: list[Asked] = []
    taken: list[tuple[Asked, ...]] = []
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            asked.append(Asked(str(len(asked)), event))
            rounds.on_work(asked[-1])
            continue
        both_wait = len({work.num_rows > 0 for work in rounds.snapshot()}) == 2
        taken.append(rounds.next_round())
        if both_wait and len(taken) > 1 and taken[-2]:  # they take turns
            assert (taken[-1][0].num_rows > 0) != (taken[-2][0].num_rows > 0)

    for is_step in (True, False):
        done = [work for works in taken for work in works if (work.num_rows > 0) == is_step]
        assert done == [work for work in asked if (work.num_rows > 0) == is_step]
    for works in taken:
        assert len(works) <= 1 or sum(work.num_rows for work in works) <= 8
        assert len(works) <= 1 or all(work.num_rows for work in works)

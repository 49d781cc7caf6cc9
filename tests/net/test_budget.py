import pytest

from p2pllm.errors import LocalProtocolError
from p2pllm.net.budget import SMALL_MESSAGE, MemoryBudget

MIB = 2**20


def test_windows_take_at_most_a_quarter() -> None:
    budget = MemoryBudget(16 * MIB)
    assert budget.reserve_window(4 * MIB)
    assert not budget.reserve_window(1)
    budget.release_window(MIB)
    assert budget.reserve_window(MIB)


def test_large_messages_leave_an_eighth_for_small_ones() -> None:
    budget = MemoryBudget(16 * MIB)
    assert budget.reserve_message(14 * MIB)
    assert not budget.reserve_message(SMALL_MESSAGE + 1)
    for _ in range(2 * MIB // SMALL_MESSAGE):
        assert budget.reserve_message(SMALL_MESSAGE)
    assert not budget.reserve_message(1)


def test_giving_back_more_than_was_taken_is_a_bug_that_shows() -> None:
    budget = MemoryBudget(MIB)
    with pytest.raises(LocalProtocolError):
        budget.release_message(1)

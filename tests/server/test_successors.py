"""The budget of peers that are dialled for a client; the rest is in tests/swarm/test_chains.py."""

from p2pllm.ids import PeerId
from p2pllm.server.successors import (
    DIALS_AT_ONCE,
    DIALS_PER_S,
    REMEMBERED,
    SAME_DIAL_S,
    DialBudget,
)

ALICE, BOB = PeerId(b"a" * 32), PeerId(b"b" * 32)


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def test_so_many_peers_are_dialled_at_once_and_then_one_by_one() -> None:
    budget = DialBudget()

    allowed = [budget.allows(ALICE, peer(number), 0.0) for number in range(DIALS_AT_ONCE + 3)]

    assert allowed == [True] * DIALS_AT_ONCE + [False] * 3
    assert budget.allows(BOB, peer(0), 0.0)
    assert not budget.allows(ALICE, peer(100), 0.9 / DIALS_PER_S)
    assert budget.allows(ALICE, peer(101), 1.9 / DIALS_PER_S)


def test_the_same_peer_costs_once_in_a_while() -> None:
    budget = DialBudget()
    for number in range(DIALS_AT_ONCE):
        budget.allows(ALICE, peer(number), 0.0)

    assert budget.allows(ALICE, peer(0), 0.5)
    assert budget.allows(ALICE, peer(0), SAME_DIAL_S - 0.1)
    for number in range(1000, 1000 + DIALS_AT_ONCE):
        budget.allows(ALICE, peer(number), SAME_DIAL_S)
    assert not budget.allows(ALICE, peer(0), SAME_DIAL_S)


def test_the_tables_are_bounded() -> None:
    budget = DialBudget()

    for number in range(2 * REMEMBERED):
        budget.allows(peer(number), peer(number), 0.0)

    assert len(budget._budgets) == len(budget._recent) == REMEMBERED

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import Busy
from p2pllm.ids import PeerId
from p2pllm.server.forward_queue import (
    CLIENTS_SHARE,
    MAX_BYTES,
    MAX_REQUESTS,
    MAX_RETRY_S,
    MIN_RETRY_S,
    ForwardQueue,
)

ALICE, BOB, CAROL = (PeerId(letter * 32) for letter in (b"a", b"b", b"c"))
MIB = 2**20


@dataclass(eq=False)
class Asked:
    client: PeerId
    num_bytes: int = 1
    cost: int = 100


def queue_of(*works: Asked) -> ForwardQueue[Asked]:
    queue: ForwardQueue[Asked] = ForwardQueue()
    for work in works:
        queue.add(work)
    return queue


def test_nothing_comes_next_at_first() -> None:
    assert queue_of().next() is None


def test_a_clients_requests_go_in_order_and_each_until_it_is_done() -> None:
    first, second = Asked(ALICE), Asked(ALICE)
    queue = queue_of(first, second)
    assert [queue.next(), queue.next()] == [first, first]
    queue.remove(first)
    assert queue.next() is second


def test_clients_take_turns_however_many_requests_one_has() -> None:
    a, b = Asked(ALICE), Asked(BOB)
    queue = queue_of(a, Asked(ALICE), Asked(ALICE), b)
    assert [queue.next() for _ in range(4)] == [a, b, a, b]


def test_a_client_may_fill_a_part_of_the_line_only() -> None:
    queue = queue_of(*(Asked(ALICE) for _ in range(MAX_REQUESTS // CLIENTS_SHARE)))
    with pytest.raises(Busy):
        queue.add(Asked(ALICE))
    queue.add(Asked(BOB))
    assert len(queue) == MAX_REQUESTS // CLIENTS_SHARE + 1


def test_all_clients_together_fill_it() -> None:
    queue = queue_of(*(Asked(PeerId(bytes([n]) * 32)) for n in range(MAX_REQUESTS)))
    with pytest.raises(Busy):
        queue.add(Asked(ALICE))


def test_bytes_are_bounded_for_one_client_and_for_all() -> None:
    queue = queue_of(Asked(ALICE, 60 * MIB))
    with pytest.raises(Busy):
        queue.add(Asked(ALICE, 60 * MIB))
    queue.add(Asked(BOB, 150 * MIB))
    with pytest.raises(Busy):
        queue.add(Asked(CAROL, 60 * MIB))
    queue.remove(next(iter(queue._line[BOB])))
    queue.add(Asked(CAROL, 60 * MIB))


def test_one_request_of_any_size_has_room_in_an_empty_line() -> None:
    assert len(queue_of(Asked(ALICE, 2 * MAX_BYTES))) == 1


def test_removing_twice_is_removing_once() -> None:
    work = Asked(ALICE)
    queue = queue_of(work, Asked(ALICE))
    queue.remove(work)
    queue.remove(work)
    assert len(queue) == 1


def test_busy_says_when_what_waits_will_be_done() -> None:
    queue = queue_of(Asked(ALICE, cost=2000))
    queue.on_done(cost=1000, seconds=0.5)
    assert queue.wait_s == pytest.approx(1.0)
    assert queue_of().wait_s == MIN_RETRY_S
    assert queue_of(Asked(ALICE, cost=10**9)).wait_s == MAX_RETRY_S


def test_taking_all_leaves_nothing() -> None:
    works = [Asked(ALICE), Asked(BOB), Asked(ALICE)]
    queue = queue_of(*works)
    assert set(queue.take_all()) == set(works)
    assert (len(queue), queue._cost, queue._bytes.total()) == (0, 0, 0)


@given(st.lists(st.tuples(st.sampled_from("ABCr"), st.integers(1, 80 * MIB)), max_size=120))
def test_counts_are_those_of_what_is_there(actions: list[tuple[str, int]]) -> None:
    queue: ForwardQueue[Asked] = ForwardQueue()
    there: list[Asked] = []
    for action, num_bytes in actions:
        if action == "r":
            work = queue.next()
            if work is not None:
                queue.remove(work)
                there.remove(work)
        else:
            work = Asked(PeerId(action.encode() * 32), num_bytes)
            try:
                queue.add(work)
            except Busy:
                continue
            there.append(work)
        assert len(queue) == len(there) <= MAX_REQUESTS
        assert queue._bytes.total() == sum(w.num_bytes for w in there)
        assert queue._cost == sum(w.cost for w in there)
        assert (queue.next() is None) == (not there)

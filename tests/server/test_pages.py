import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pllm.errors import LocalProtocolError
from p2pllm.ids import PeerId
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator, pages_for

ALICE, BOB = PeerId(b"a" * 32), PeerId(b"b" * 32)
PEERS = (ALICE, BOB)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0), (1, 1), (PAGE_TOKENS, 1), (PAGE_TOKENS + 1, 2), (10 * PAGE_TOKENS, 10)],
)
def test_pages_hold_a_whole_number_of_tokens_rounded_up(num_tokens: int, expected: int) -> None:
    assert pages_for(num_tokens) == expected


def test_a_run_of_neighbours_is_preferred_and_the_shortest_that_is_enough() -> None:
    pages = PageAllocator(num_pages=10, quota_pages=10)
    held = [pages.allocate(ALICE, 1)[0] for _ in range(10)]
    pages.release(ALICE, [held[0], held[2], held[3], held[5], held[6], held[7]])

    assert pages.allocate(ALICE, 2) == (2, 3)
    assert pages.allocate(ALICE, 2) == (5, 6)


def test_without_a_run_that_is_enough_any_free_pages_will_do() -> None:
    pages = PageAllocator(num_pages=6, quota_pages=6)
    pages.allocate(ALICE, 6)
    pages.release(ALICE, [0, 2, 4, 5])

    assert pages.allocate(BOB, 3) == (0, 2, 4)


def test_a_peer_may_hold_its_quota_while_others_wait_and_all_pages_else() -> None:
    pages = PageAllocator(num_pages=8, quota_pages=2)

    assert pages.may_hold(ALICE, 2, others_wait=True)
    assert not pages.may_hold(ALICE, 3, others_wait=True)
    assert pages.may_hold(ALICE, 8, others_wait=False)


def test_the_quota_counts_all_of_a_peers_sessions_and_nobody_elses() -> None:
    pages = PageAllocator(num_pages=8, quota_pages=2)
    pages.allocate(ALICE, 1)
    pages.allocate(ALICE, 1)

    assert not pages.may_hold(ALICE, 1, others_wait=True)
    assert pages.may_hold(BOB, 2, others_wait=True)


def test_nobody_may_hold_more_than_is_free() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)
    pages.allocate(ALICE, 3)

    assert not pages.may_hold(BOB, 2, others_wait=False)
    with pytest.raises(LocalProtocolError):
        pages.allocate(BOB, 2)


def test_pages_to_be_given_back_count_as_free_and_as_not_held() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=3)
    pages.allocate(ALICE, 3)

    assert pages.may_hold(ALICE, 3, others_wait=True, returned=3)
    assert not pages.may_hold(ALICE, 4, others_wait=True, returned=3)
    assert pages.may_hold(ALICE, 4, others_wait=False, returned=3)
    assert not pages.may_hold(ALICE, 5, others_wait=False, returned=3)


@pytest.mark.parametrize("num_pages", [0, -1, -4])
def test_no_pages_and_fewer_cannot_be_allocated(num_pages: int) -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)

    with pytest.raises(LocalProtocolError):
        pages.allocate(ALICE, num_pages)
    assert pages.num_free == 4


def test_a_page_is_released_once_and_by_its_holder() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)
    held = pages.allocate(ALICE, 2)

    with pytest.raises(LocalProtocolError):
        pages.release(ALICE, [held[0], held[0]])
    with pytest.raises(LocalProtocolError):
        pages.release(BOB, held)
    pages.release(ALICE, held)
    with pytest.raises(LocalProtocolError):
        pages.release(ALICE, held)
    assert pages.num_free == 4


def test_pages_that_follow_a_given_one_are_preferred() -> None:
    pages = PageAllocator(num_pages=8, quota_pages=8)
    (first, *rest) = pages.allocate(ALICE, 8)
    pages.release(ALICE, rest)

    assert pages.allocate(ALICE, 2, after=4) == (5, 6)
    assert pages.allocate(ALICE, 2, after=first) == (1, 2)


# --- names and sharing ---------------------------------------------------------------------------


def test_a_shared_page_counts_once_and_is_free_when_the_last_one_gives_it_back() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)
    held = pages.allocate(ALICE, 2)

    pages.share(ALICE, held[:1])
    assert (pages.held_by(ALICE), pages.num_free) == (2, 2)
    assert [pages.is_shared(page) for page in held] == [True, False]
    assert (pages.num_returned(held), pages.num_returned([*held, held[0]])) == (1, 2)
    pages.release(ALICE, held)
    assert (pages.held_by(ALICE), pages.num_free) == (1, 3)
    pages.release(ALICE, held[:1])
    assert (pages.held_by(ALICE), pages.num_free) == (0, 4)


def test_nobody_shares_a_page_that_is_free_or_anothers() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)
    held = pages.allocate(ALICE, 1)

    for page in (held[0], 3):
        with pytest.raises(LocalProtocolError):
            pages.share(BOB, [page])
    with pytest.raises(LocalProtocolError):
        pages.share(ALICE, [3])
    assert not pages.is_shared(held[0])


def test_a_named_page_that_nobody_holds_is_found_until_it_is_needed() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)
    held = pages.allocate(ALICE, 2)
    pages.publish(held[0], "a name")
    pages.release(ALICE, held)

    assert (pages.num_free, pages.num_cached, pages.find(["a name"])) == (4, 1, held[:1])
    pages.allocate(BOB, 3)
    assert pages.find(["a name"]) == held[:1]
    pages.allocate(BOB, 1)
    assert (pages.num_free, pages.num_cached, pages.find(["a name"])) == (0, 0, ())


def test_pages_are_found_up_to_the_first_name_that_is_missing() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)
    held = pages.allocate(ALICE, 4)
    for page, name in zip(held, "abcd", strict=True):
        pages.publish(page, name)
    pages.withdraw(held[2])

    assert pages.find("abcd") == held[:2]
    assert pages.find("xbcd") == ()


def test_the_first_page_of_a_name_keeps_it_and_the_first_name_of_a_page() -> None:
    pages = PageAllocator(num_pages=4, quota_pages=4)
    one, other = pages.allocate(ALICE, 2)
    pages.publish(one, "a")
    pages.publish(other, "a")
    pages.publish(one, "b")

    assert pages.find("a") == (one,)
    assert pages.find("b") == ()


def test_neighbours_are_taken_from_the_cache_before_pages_that_lie_apart_unless_they_are_new() -> (
    None
):
    pages = PageAllocator(num_pages=8, quota_pages=8)
    held = pages.allocate(ALICE, 8)
    for page in (5, 1, 3, 7):  # in this order they are given back
        pages.publish(held[page], page)
        pages.release(ALICE, [held[page]])
    pages.release(ALICE, [0, 2, 4, 6])

    assert pages.allocate(BOB, 3) == (4, 5, 6)
    assert pages.allocate(BOB, 3) == (0, 1, 2)
    assert pages.num_cached == 2


class Allocation(RuleBasedStateMachine):
    """Sessions come and go; the model is the list of what each holds."""

    @initialize(num_pages=st.integers(1, 24), quota=st.integers(0, 24))
    def start(self, num_pages: int, quota: int) -> None:
        self.pages = PageAllocator(num_pages, quota_pages=quota)
        self.held: list[tuple[PeerId, tuple[int, ...]]] = []

    @rule(peer=st.sampled_from(PEERS), wanted=st.integers(1, 10), others_wait=st.booleans())
    def allocate(self, peer: PeerId, wanted: int, others_wait: bool) -> None:
        held = sum(len(pages) for owner, pages in self.held if owner == peer)
        free = self.pages.num_free
        may = wanted <= free and (not others_wait or held + wanted <= self.pages.quota_pages)
        assert self.pages.may_hold(peer, wanted, others_wait=others_wait) == may
        if may:
            self.held.append((peer, self.pages.allocate(peer, wanted)))
            assert len(self.held[-1][1]) == wanted

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        peer, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pages.release(peer, pages)

    @invariant()
    def no_page_is_in_two_hands(self) -> None:
        held = [page for _, pages in self.held for page in pages]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(self.pages.num_pages))
        assert self.pages.num_free == self.pages.num_pages - len(held)

    @invariant()
    def each_peer_holds_what_it_was_given(self) -> None:
        for peer in PEERS:
            mine = sum(len(pages) for owner, pages in self.held if owner == peer)
            assert self.pages.held_by(peer) == mine


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=40, stateful_step_count=30)

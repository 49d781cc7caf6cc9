"""Who is to blame for a failed step: each rule of the table in `p2pllm.client.blame`."""

import pytest

from p2pllm.client.blame import Blame, blame
from p2pllm.errors import (
    BadRequest,
    Busy,
    CacheFull,
    CodecError,
    ConnectionLost,
    DeadlineExceeded,
    Forbidden,
    LookupFailed,
    NoRoute,
    NotServed,
    OpenFailed,
    OutOfOrder,
    P2PLLMError,
    PeerUnreachable,
    Refused,
    RemoteFault,
    RemoteProtocolError,
    RequestFailed,
    SessionUnknown,
    StaleEpoch,
    StepFailed,
)
from p2pllm.ids import PeerId

FIRST, MIDDLE, LAST, STRANGER = (PeerId(letter * 32) for letter in (b"a", b"b", b"c", b"d"))
HOPS = (FIRST, MIDDLE, LAST)

TRANSPORT = [ConnectionLost, PeerUnreachable, DeadlineExceeded, Refused]
BEHIND = [SessionUnknown, OutOfOrder]
FULL = [CacheFull, Busy]
LOST = [RemoteProtocolError, CodecError, RemoteFault, RequestFailed, BadRequest, NotServed]


@pytest.mark.parametrize("cause", TRANSPORT)
@pytest.mark.parametrize("peer", HOPS)
def test_a_hop_whose_connection_was_lost_is_doubted(peer: PeerId, cause: type[P2PLLMError]) -> None:
    assert blame(StepFailed(peer, cause("gone")), HOPS) == Blame(doubted={peer})


@pytest.mark.parametrize(("peer", "following"), [(FIRST, MIDDLE), (MIDDLE, LAST)])
def test_a_hop_that_was_not_reached_by_the_one_before_is_doubted_and_so_is_their_link(
    peer: PeerId, following: PeerId
) -> None:
    failure = StepFailed(peer, RequestFailed("no answer"), following)
    assert blame(failure, HOPS) == Blame(doubted={following}, links={(peer, following)})


@pytest.mark.parametrize("cause", BEHIND)
def test_a_hop_that_has_lost_the_session_or_its_place_is_behind(cause: type[P2PLLMError]) -> None:
    assert blame(StepFailed(MIDDLE, cause("what?")), HOPS) == Blame(behind={MIDDLE})


def test_a_replacement_that_does_not_get_ready_is_not_tried_again_before_others() -> None:
    failure = StepFailed(STRANGER, DeadlineExceeded("no output within 20 s"))
    assert blame(failure, HOPS) == Blame(moved={STRANGER})


def test_what_the_next_hop_said_counts_as_if_it_had_told_us_itself() -> None:
    failure = StepFailed(FIRST, SessionUnknown("not open here"), MIDDLE)
    assert blame(failure, HOPS) == Blame(behind={MIDDLE})


@pytest.mark.parametrize(("peer", "before"), [(MIDDLE, FIRST), (LAST, MIDDLE)])
def test_an_input_that_is_wrong_and_was_not_seen_moves_both_who_may_be_lying(
    peer: PeerId, before: PeerId
) -> None:
    failure = StepFailed(peer, BadRequest("NaN"), is_input=True)
    assert blame(failure, HOPS) == Blame(moved={before, peer})


@pytest.mark.parametrize("reached", [1, 2])
def test_who_finds_an_input_wrong_that_we_have_seen_to_be_good_is_lost(reached: int) -> None:
    failure = StepFailed(MIDDLE, BadRequest("NaN"), is_input=True)
    assert blame(failure, HOPS, reached) == Blame(lost={MIDDLE})


def test_an_input_that_is_wrong_is_so_whoever_tells_of_it() -> None:
    failure = StepFailed(FIRST, BadRequest("a tensor of shape"), MIDDLE, is_input=True)
    assert blame(failure, HOPS, 2) == Blame(moved={FIRST, MIDDLE})


@pytest.mark.parametrize("cause", [RemoteFault, CacheFull, Busy, NotServed])
def test_nobody_is_lost_or_left_out_by_what_another_one_says(cause: type[P2PLLMError]) -> None:
    assert blame(StepFailed(FIRST, cause("that one!"), MIDDLE), HOPS) == Blame(doubted={MIDDLE})


@pytest.mark.parametrize("peer", [FIRST, STRANGER])
def test_who_finds_the_input_wrong_that_we_gave_it_is_lost(peer: PeerId) -> None:
    """We send what is good: the first hop's is checked before, a new hop's is from the journal."""
    failure = StepFailed(peer, BadRequest("NaN"), is_input=True)
    assert blame(failure, HOPS) == Blame(lost={peer})


@pytest.mark.parametrize("cause", LOST)
def test_a_hop_that_answers_nonsense_or_breaks_down_is_lost(cause: type[P2PLLMError]) -> None:
    assert blame(StepFailed(LAST, cause("oh")), HOPS) == Blame(lost={LAST})


@pytest.mark.parametrize(
    ("peer", "named"), [(FIRST, LAST), (FIRST, STRANGER), (LAST, FIRST), (MIDDLE, MIDDLE)]
)
@pytest.mark.parametrize("cause", [RequestFailed, SessionUnknown, RemoteFault])
def test_a_hop_that_speaks_of_one_it_does_not_push_to_answers_nonsense(
    peer: PeerId, named: PeerId, cause: type[P2PLLMError]
) -> None:
    assert blame(StepFailed(peer, cause("that one!"), named), HOPS) == Blame(lost={peer})


@pytest.mark.parametrize("cause", FULL)
def test_a_hop_without_room_has_not_failed(cause: type[RequestFailed]) -> None:
    failure = StepFailed(MIDDLE, cause("full", retry_after_s=3.0))
    assert blame(failure, HOPS) == Blame(full={MIDDLE: 3.0})


def test_a_hop_whose_push_token_does_not_fit_is_doubted() -> None:
    assert blame(StepFailed(MIDDLE, Forbidden("who?")), HOPS) == Blame(doubted={MIDDLE})


def test_an_epoch_that_does_not_fit_is_told_apart_for_there_is_a_remedy() -> None:
    found = blame(StepFailed(MIDDLE, StaleEpoch("old")), HOPS)
    assert found == Blame(doubted={MIDDLE}, has_stale_epoch=True)


@pytest.mark.parametrize(
    ("reached", "links"), [(0, set()), (1, {(FIRST, MIDDLE)}), (2, {(MIDDLE, LAST)})]
)
def test_after_a_deadline_the_hop_that_the_step_has_come_to_is_doubted_and_the_link_to_it(
    reached: int, links: set[tuple[PeerId, PeerId]]
) -> None:
    found = blame(DeadlineExceeded("late"), HOPS, reached)
    assert found == Blame(doubted={HOPS[reached]}, links=links)


def test_of_hops_that_could_not_be_opened_each_has_its_own_reason() -> None:
    failure = OpenFailed(
        {
            FIRST: ConnectionLost("gone"),
            MIDDLE: CacheFull("full", retry_after_s=2.0),
            LAST: NotServed("other blocks"),
            STRANGER: OutOfOrder("3 of 5 tokens are there"),
        }
    )
    assert blame(failure, HOPS) == Blame(
        lost={LAST}, doubted={FIRST}, behind={STRANGER}, full={MIDDLE: 2.0}
    )


@pytest.mark.parametrize("failure", [NoRoute("nobody"), LookupFailed("nobody"), P2PLLMError("?")])
def test_a_failure_that_names_nobody_blames_nobody(failure: P2PLLMError) -> None:
    assert blame(failure, HOPS) == Blame()

"""Dividing a step's time among hops that may lie."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.swarm.timings import HopShare, divide
from p2pllm.wire.messages import HopTiming


def links(shares: tuple[HopShare, ...]) -> list[float]:
    return [*(share.link_s for share in shares), shares[-1].return_s]


def test_links_get_half_their_round_trips_and_what_is_left_in_equal_parts() -> None:
    timings = HopTiming(0.1, 0.2, 9e9, 0.4), HopTiming(0.0, 0.1, 0.0, 0.6)
    shares = divide(timings, 1.06, first_rtt_s=0.2)
    assert links(shares) == pytest.approx([0.12, 0.22, 0.32])
    assert (shares[0].queue_s, shares[0].compute_s) == (0.1, 0.2)


def test_what_is_left_goes_to_links_of_which_nothing_is_known() -> None:
    timings = HopTiming(0.1, 0.2, 0.0), HopTiming(0.0, 0.1, 0.0, 0.6)
    assert links(divide(timings, 1.06, first_rtt_s=0.2)) == pytest.approx([0.1, 0.26, 0.3])


def test_round_trips_that_do_not_fit_are_scaled_down() -> None:
    timings = HopTiming(0.0, 0.1, 0.0, 0.4), HopTiming(0.0, 0.1, 0.0, 0.4)
    assert links(divide(timings, 0.5, first_rtt_s=0.2)) == pytest.approx([0.06, 0.12, 0.12])


def test_hops_that_claim_more_than_the_time_that_passed_give_way_alike() -> None:
    timings = HopTiming(0.0, 3.0, 0.0), HopTiming(0.0, 1.0, 0.0)
    shares = divide(timings, 1.0)
    assert [share.compute_s for share in shares] == [0.75, 0.25]
    assert links(shares) == [0.0, 0.0, 0.0]


def test_no_round_trip_is_above_twice_the_time_of_the_step() -> None:
    (share,) = divide([HopTiming(0.0, 0.1, 0.0, 1e12)], 0.5)
    assert share.next_rtt_s == 1.0


SECONDS = st.floats(0.0, 1e15)
TIMINGS = st.lists(st.builds(HopTiming, SECONDS, SECONDS, SECONDS, SECONDS), min_size=1, max_size=5)


@settings(max_examples=200)
@given(TIMINGS, st.floats(0.0, 100.0), st.floats(0.0, 10.0))
def test_whatever_hops_claim_the_parts_make_up_the_step(
    timings: list[HopTiming], total_s: float, first_rtt_s: float
) -> None:
    shares = divide(timings, total_s, first_rtt_s)
    parts = [part for s in shares for part in (s.link_s, s.queue_s, s.compute_s, s.return_s)]
    assert all(part >= 0 for part in parts)
    busy_s = sum(timing.queue_s + timing.compute_s for timing in timings)
    if busy_s > 0 or first_rtt_s > 0 or any(timing.next_rtt_s for timing in timings):
        assert sum(parts) == pytest.approx(total_s)

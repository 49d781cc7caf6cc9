"""The estimate by itself; over simulated lines it is tested with the mux."""

import pytest

from p2pllm.errors import RemoteProtocolError
from p2pllm.net.path import FIRST_IN_FLIGHT, MAX_BANDWIDTH, MIN_IN_FLIGHT, Path


def test_before_any_measurement_little_may_be_under_way() -> None:
    path = Path()
    assert path.allowed == FIRST_IN_FLIGHT
    path.on_sent(1000, 0.0, is_last=True)
    assert path.in_flight == 1000


def test_a_report_gives_rate_and_round_trip() -> None:
    path = Path()
    for index in range(10):
        path.on_sent(10_000, index * 0.001, is_last=False)
    for index in range(10):
        path.on_received(10_000 * (index + 1), 0.050 + index * 0.001)
    assert path.rtt_s == pytest.approx(0.050)
    assert path.in_flight == 0
    assert path.rate is not None
    assert 1e6 < path.rate <= 10e6


def test_a_pause_of_ours_does_not_lower_the_rate() -> None:
    path = Path()
    path.on_sent(100_000, 0.0, is_last=False)
    path.on_received(100_000, 0.01)
    rate = path.rate
    for now in (1.0, 2.0, 3.0):
        path.on_sent(100, now, is_last=True)
        path.on_received(path.sent, now + 0.01)
    assert path.rate == rate


def test_there_is_always_room_for_two_frames() -> None:
    path = Path()
    path.on_sent(100, 0.0, is_last=True)
    path.on_received(100, 1.0)
    assert path.allowed == MIN_IN_FLIGHT


def test_the_smallest_round_trip_is_forgotten_after_ten_seconds() -> None:
    path = Path()
    path.on_rtt(0.010, now=0.0)
    path.on_rtt(0.030, now=5.0)
    assert path.rtt_s == 0.010
    path.on_rtt(0.030, now=11.0)
    assert path.rtt_s == 0.030


# --- bandwidth: how long a message takes beyond the round trip ---------------------------------


def test_a_burst_on_an_idle_path_shows_the_bandwidth_without_the_round_trip() -> None:
    """16 KiB in 50 ms is a rate of 330 kB/s, on a path that carries ten times as much."""
    path = Path()
    path.on_rtt(0.045, now=0.0)
    path.on_sent(16_384, 1.0, is_last=True)
    path.on_received(16_384, 1.05)
    assert path.rate is not None
    assert path.rate < 400_000
    assert path.bandwidth == pytest.approx(16_384 / 0.005)


def test_small_messages_say_nothing_of_the_bandwidth() -> None:
    path = Path()
    path.on_rtt(0.045, now=0.0)
    path.on_sent(500, 1.0, is_last=True)
    path.on_received(500, 1.05)
    assert path.bandwidth is None


def test_a_burst_that_takes_no_time_has_a_large_but_finite_bandwidth() -> None:
    path = Path()
    path.on_rtt(0.05, now=0.0)
    path.on_sent(16_384, 1.0, is_last=True)
    path.on_received(16_384, 1.05)
    assert path.bandwidth == pytest.approx(MAX_BANDWIDTH)


def test_later_bursts_count_more_than_earlier_ones() -> None:
    path = Path()
    path.on_rtt(0.01, now=0.0)
    for number, seconds in enumerate([0.01] * 10 + [0.1] * 30):
        path.on_sent(100_000, 10.0 * number, is_last=True)
        path.on_rtt(0.01, 10.0 * number)
        path.on_received(path.sent, 10.0 * number + 0.01 + seconds)
    assert path.bandwidth == pytest.approx(1e6, rel=0.01)


@pytest.mark.parametrize("total", [501, 2000])
def test_a_report_of_what_was_never_sent_is_refused(total: int) -> None:
    path = Path()
    path.on_sent(500, 0.0, is_last=True)
    with pytest.raises(RemoteProtocolError):
        path.on_received(total, 0.1)


def test_a_report_may_not_go_backwards() -> None:
    path = Path()
    path.on_sent(500, 0.0, is_last=True)
    path.on_received(400, 0.1)
    with pytest.raises(RemoteProtocolError):
        path.on_received(300, 0.2)

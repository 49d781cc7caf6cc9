"""The estimate by itself; over simulated lines it is tested with the mux."""

import pytest

from p2pllm.errors import RemoteProtocolError
from p2pllm.net.path import FIRST_IN_FLIGHT, MIN_IN_FLIGHT, Path


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

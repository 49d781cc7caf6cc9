from p2pllm.config import NetConfig
from p2pllm.net.heartbeat import Heartbeat, Verdict

CONFIG = NetConfig()


def heartbeat() -> Heartbeat:
    return Heartbeat(CONFIG, now=100.0)


def test_an_idle_peer_is_pinged_after_five_seconds_and_a_waited_for_one_after_one() -> None:
    assert heartbeat().due(is_waiting=False, rtt_s=0.0) == 105.0
    assert heartbeat().due(is_waiting=True, rtt_s=0.0) == 101.0


def test_a_timeout_first_asks_for_a_ping_and_then_judges() -> None:
    beat = heartbeat()
    assert beat.on_timeout(101.0, is_waiting=True, rtt_s=0.0) is None
    assert beat.is_ping_due
    beat.ping_to_send(101.0)
    assert beat.due(is_waiting=True, rtt_s=0.0) == 102.0
    assert beat.on_timeout(102.0, is_waiting=True, rtt_s=0.0) is Verdict.SUSPECTED
    assert beat.due(is_waiting=True, rtt_s=0.0) == 115.0
    assert beat.on_timeout(115.0, is_waiting=True, rtt_s=0.0) is Verdict.DEAD


def test_a_peer_far_away_has_four_round_trips() -> None:
    beat = heartbeat()
    beat.ask(100.0)
    assert beat.due(is_waiting=True, rtt_s=0.7) == 102.8


def test_a_timeout_that_comes_early_does_nothing() -> None:
    beat = heartbeat()
    assert beat.on_timeout(100.5, is_waiting=True, rtt_s=0.0) is None
    assert not beat.is_ping_due


def test_any_byte_puts_suspicion_off_and_ends_it() -> None:
    beat = heartbeat()
    beat.ask(101.0)
    beat.on_bytes(101.9)
    assert beat.on_timeout(102.0, is_waiting=True, rtt_s=0.0) is None
    assert beat.on_timeout(102.9, is_waiting=True, rtt_s=0.0) is Verdict.SUSPECTED
    assert beat.on_bytes(103.0)
    assert not beat.is_suspect


def test_a_pong_measures_only_the_ping_that_it_answers() -> None:
    beat = heartbeat()
    beat.ask(101.0)
    nonce = beat.ping_to_send(101.5)
    assert beat.on_pong(nonce + 1, 101.6) is None
    assert beat.on_pong(nonce, 102.0) == 0.5
    assert beat.on_pong(nonce, 103.0) is None


def test_the_time_that_we_slept_is_not_held_against_the_peer() -> None:
    beat = heartbeat()
    beat.ask(101.0)
    beat.on_late(60.0, now=162.0)
    assert beat.on_timeout(161.5, is_waiting=True, rtt_s=0.0) is None

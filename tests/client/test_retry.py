"""How often and how long to try again, and when a step is slow."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.client.retry import (
    FIRST_PAUSE_S,
    HEDGE_FACTOR,
    MAX_PAUSE_S,
    MIN_HEDGE_S,
    MIN_STEPS,
    RECOUNT_STEPS,
    WINDOW_STEPS,
    LatencyWindow,
    Patience,
)


def pauses(patience: Patience, now: float, most: int = 100) -> list[float]:
    """What it says until it is over, each pause being kept and each attempt taking no time."""
    found: list[float] = []
    while len(found) < most and (pause_s := patience.pause_s(now)) is not None:
        found.append(pause_s)
        now += pause_s
    return found


# --- patience ----------------------------------------------------------------------------------


def test_the_first_attempt_follows_at_once() -> None:
    assert Patience(10.0, random.Random(1)).pause_s(0.0) == 0.0


def test_pauses_double_up_to_a_limit_and_are_drawn_at_random() -> None:
    found = pauses(Patience(1000.0, random.Random(1)), 0.0, most=12)

    ceilings = [min(FIRST_PAUSE_S * 2**attempt, MAX_PAUSE_S) for attempt in range(11)]
    assert ceilings[-1] == MAX_PAUSE_S
    for pause_s, ceiling_s in zip(found[1:], ceilings, strict=True):
        assert ceiling_s / 2 <= pause_s <= ceiling_s
    assert found != pauses(Patience(1000.0, random.Random(2)), 0.0, most=12)


def test_who_has_tried_before_pauses_at_once_and_longer() -> None:
    pause_s = Patience(1000.0, random.Random(1), attempts=5).pause_s(0.0)
    assert pause_s is not None
    assert pause_s >= FIRST_PAUSE_S * 2**4 / 2


def test_the_time_is_over_when_the_next_attempt_would_come_too_late() -> None:
    patience = Patience(10.0, random.Random(1))
    patience.pause_s(9.0)
    assert patience.pause_s(9.99) is None


def test_without_time_there_is_still_one_attempt() -> None:
    assert pauses(Patience(5.0, random.Random(1)), 5.0) == [0.0]


@given(patience_s=st.floats(0.0, 300.0), began=st.floats(0.0, 1e6), seed=st.integers(0, 100))
@settings(max_examples=100)
def test_attempts_never_outlast_the_deadline_and_come_to_an_end(
    patience_s: float, began: float, seed: int
) -> None:
    found = pauses(Patience(began + patience_s, random.Random(seed)), began, most=10_000)

    assert sum(found) <= patience_s * (1 + 1e-9) + 1e-6
    assert len(found) < 2 + patience_s / (MAX_PAUSE_S / 2) + 10


# --- latencies ---------------------------------------------------------------------------------


def window(*seconds: float) -> LatencyWindow:
    found = LatencyWindow()
    for each in seconds:
        found.add(each)
    return found


def test_nothing_is_slow_before_enough_steps_were_seen() -> None:
    assert window(*[1.0] * (MIN_STEPS - 1)).hedge_after_s() is None
    assert window(*[1.0] * MIN_STEPS).hedge_after_s() == HEDGE_FACTOR


def test_a_step_is_slow_at_a_multiple_of_what_99_of_100_take() -> None:
    one_in_two_hundred = [2.0] * 127 + [50.0]
    assert window(*one_in_two_hundred).hedge_after_s() == HEDGE_FACTOR * 2.0
    one_in_fifty = [2.0] * 125 + [50.0] * 3
    assert window(*one_in_fifty).hedge_after_s() == HEDGE_FACTOR * 50.0


def test_quick_steps_are_not_hedged_sooner_than_a_hedge_takes() -> None:
    assert window(*[0.001] * 64).hedge_after_s() == MIN_HEDGE_S


def test_what_was_usual_long_ago_does_not_count() -> None:
    found = window(*[9.0] * 64, *[1.0] * WINDOW_STEPS)
    assert found.hedge_after_s() == HEDGE_FACTOR


def test_a_needless_hedge_doubles_the_wait_for_the_next() -> None:
    found = window(*[1.0] * MIN_STEPS)
    found.on_needless_hedge()
    assert found.hedge_after_s() == 2 * HEDGE_FACTOR


@given(st.lists(st.floats(0.0, 100.0), min_size=MIN_STEPS, max_size=300))
@settings(max_examples=100)
def test_the_wait_is_of_steps_in_the_window(seconds: list[float]) -> None:
    after_s = window(*seconds).hedge_after_s()

    recounted = len(seconds) - len(seconds) % RECOUNT_STEPS
    recent = seconds[max(0, recounted - WINDOW_STEPS) : recounted]
    assert after_s is not None
    assert after_s == pytest.approx(MIN_HEDGE_S) or after_s in [HEDGE_FACTOR * s for s in recent]
    assert sum(HEDGE_FACTOR * each > after_s for each in recent) <= 0.01 * len(recent)

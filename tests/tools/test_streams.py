"""Figures of load tests: percentiles, arrivals, and what happens at the same time."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.benchmarks._streams import (
    Request,
    gaps_beside,
    latencies,
    percentile,
    poisson_arrivals,
    rate_in_all,
    rate_when_all_decode,
    when_at_least,
)


def stream(client: int, arrived: float, *tokens: float) -> Request:
    return Request(client, arrived, tokens)


# --- percentiles -------------------------------------------------------------------------------


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([40.0, 10.0, 20.0, 30.0], 0.5) == 25.0
    assert percentile([40.0, 10.0, 20.0, 30.0], 0.95) == pytest.approx(38.5)


def test_the_outermost_percentiles_are_the_extremes() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.0) == 1.0
    assert percentile([3.0, 1.0, 2.0], 1.0) == 3.0


def test_a_single_value_is_every_percentile() -> None:
    assert percentile([7.0], 0.99) == 7.0


def test_there_is_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_never_outside_the_values(values: list[float], share: float) -> None:
    assert min(values) <= percentile(values, share) <= max(values)


# --- Poisson arrivals --------------------------------------------------------------------------


def test_arrivals_come_at_the_rate_that_was_asked_for() -> None:
    arrivals = poisson_arrivals(2.0, 10_000.0, random.Random(1))

    assert len(arrivals) == pytest.approx(20_000, rel=0.03)


def test_arrivals_are_in_order_and_in_time() -> None:
    arrivals = poisson_arrivals(5.0, 20.0, random.Random(2))

    assert arrivals == sorted(arrivals)
    assert all(0 <= moment < 20.0 for moment in arrivals)


def test_pauses_between_arrivals_vary_as_in_a_poisson_process() -> None:
    arrivals = poisson_arrivals(1.0, 20_000.0, random.Random(3))
    pauses = [after - before for before, after in itertools.pairwise(arrivals)]
    mean = sum(pauses) / len(pauses)
    variance = sum((pause - mean) ** 2 for pause in pauses) / len(pauses)

    assert variance == pytest.approx(mean**2, rel=0.05)  # of an exponential distribution


def test_the_same_dice_give_the_same_arrivals() -> None:
    first, second = (poisson_arrivals(2.0, 30.0, random.Random(4)) for _ in range(2))

    assert first == second


# --- latencies and rates -----------------------------------------------------------------------


def test_ttft_counts_from_when_the_request_came_and_tpot_from_token_to_token() -> None:
    requests = [stream(0, 1.0, 1.5, 1.6, 1.9), stream(1, 2.0, 2.1, 2.3)]

    found = latencies(requests)

    assert found["ttft_p50_ms"] == pytest.approx(300.0)
    assert found["tpot_p50_ms"] == pytest.approx(200.0)
    assert found["tpot_p99_ms"] == pytest.approx(298.0)


def test_requests_without_tokens_have_no_latencies() -> None:
    assert latencies([stream(0, 1.0)]) == {}


def test_the_rate_in_all_counts_prompts_and_pauses() -> None:
    assert rate_in_all([stream(0, 0.0, 1.0, 1.5), stream(1, 0.0, 3.0, 4.0)]) == 1.0


def test_the_decoding_rate_counts_only_while_all_streams_decode() -> None:
    requests = [stream(0, 0.0, 1.0, 2.0, 3.0, 4.0), stream(1, 0.0, 2.0, 2.5, 3.0)]

    # Both decode from 2 to 3: tokens at 2.5, 3 and 3.
    assert rate_when_all_decode(requests, 2) == 3.0


def test_streams_that_never_decode_together_have_no_decoding_rate() -> None:
    assert rate_when_all_decode([stream(0, 0.0, 1.0, 2.0), stream(1, 0.0, 3.0, 4.0)], 2) is None


def test_windows_are_where_enough_intervals_overlap() -> None:
    intervals = [(0.0, 4.0), (1.0, 3.0), (2.0, 6.0), (5.0, 7.0)]

    assert when_at_least(2, intervals) == [(1.0, 4.0), (5.0, 6.0)]
    assert when_at_least(3, intervals) == [(2.0, 3.0)]
    assert when_at_least(4, intervals) == []


def test_one_interval_that_ends_where_another_begins_is_no_overlap() -> None:
    assert when_at_least(2, [(0.0, 1.0), (1.0, 2.0)]) == []


def test_tokens_beside_a_disturbance_are_those_that_were_waited_for_during_it() -> None:
    requests = [stream(0, 0.0, 1.0, 2.0, 5.0, 6.0)]

    assert gaps_beside(requests, [(1.5, 2.5)]) == [1.0, 3.0]
    assert gaps_beside(requests, [(5.2, 5.4)]) == [1.0]
    assert gaps_beside(requests, [(7.0, 8.0)]) == []


def test_a_request_survives_its_line_of_json() -> None:
    request = Request(3, 1.5, (2.0, 2.5), 0.1, 2304.0, (0.01, 0.02), "Busy: later")

    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request

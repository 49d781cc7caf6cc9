import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.metrics import Histogram, MovingAverage

DURATIONS = st.floats(1e-4, 80.0)


def test_the_first_sample_is_taken_whole_and_later_ones_by_their_weight() -> None:
    average = MovingAverage(weight=0.25)

    assert average.add(8.0) == 8.0
    assert average.add(4.0) == 7.0
    assert average.get(0.0) == 7.0


def test_before_the_first_sample_the_default_holds() -> None:
    assert MovingAverage().get(3.0) == 3.0


@given(st.lists(DURATIONS, min_size=1))
def test_an_average_stays_between_the_least_and_the_largest_sample(samples: list[float]) -> None:
    average = MovingAverage()
    for sample in samples:
        average.add(sample)

    assert min(samples) * 0.999 <= average.get(0.0) <= max(samples) * 1.001


@given(st.lists(DURATIONS, min_size=1), st.floats(0.0, 1.0))
def test_a_quantile_is_exact_to_the_width_of_a_bucket(samples: list[float], q: float) -> None:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)

    exact = sorted(samples)[int(q * (len(samples) - 1))]
    assert exact <= histogram.quantile(q) <= exact * 1.2501


def test_an_empty_histogram_has_quantile_0() -> None:
    assert Histogram().quantile(0.5) == 0.0


@pytest.mark.parametrize(("sample", "bound"), [(0.0, 1e-4), (-1.0, 1e-4), (1e9, 81.5)])
def test_durations_past_the_bounds_fall_into_the_outermost_buckets(
    sample: float, bound: float
) -> None:
    histogram = Histogram()

    histogram.add(sample)

    assert histogram.quantile(1.0) == pytest.approx(bound, rel=0.01)
    assert histogram.total == 1


@given(st.lists(st.floats(0, 1e6)))
def test_memory_does_not_grow_with_the_number_of_samples(samples: list[float]) -> None:
    histogram = Histogram()
    for sample in samples * 3:
        histogram.add(sample)

    assert len(histogram.counts) <= 63

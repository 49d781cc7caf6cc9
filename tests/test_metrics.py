from hypothesis import given
from hypothesis import strategies as st

from p2pllm.metrics import MovingAverage

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

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import ConfigError
from p2pllm.spans import Span, cut, uncovered

SPANS = st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda s: Span(s[0], s[0] + s[1]))


@given(SPANS)
def test_a_span_reads_what_it_writes(span: Span) -> None:
    assert Span.parse(str(span)) == span


@given(st.text(max_size=30))
def test_any_text_is_a_span_or_a_config_error(text: str) -> None:
    try:
        span = Span.parse(text)
    except ConfigError:
        return
    assert 0 <= span.start < span.stop


@pytest.mark.parametrize(
    "text", ["", ":", "1", "1:", ":2", "2:1", "1:1", "-1:2", "1:2:3", "a:b", "1.0:2", "²:3"]
)
def test_what_is_not_a_span_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="0:10"):
        Span.parse(text)


def test_a_number_of_thousands_of_digits_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        Span.parse("0:" + "9" * 5000)


def test_spaces_around_the_numbers_are_allowed() -> None:
    assert Span.parse(" 1 : 2 ") == Span(1, 2)


@given(SPANS)
def test_a_span_is_the_range_of_its_blocks(span: Span) -> None:
    assert list(span) == list(range(span.start, span.stop))
    assert len(span) == len(list(span))
    assert all(block in span for block in span)
    assert span.start - 1 not in span
    assert span.stop not in span
    assert "0" not in span


@given(SPANS, SPANS)
def test_covering_and_overlapping_are_those_of_sets(one: Span, other: Span) -> None:
    overlap = one.overlap(other)

    assert set(overlap or ()) == set(one) & set(other)
    assert one.covers(other) == (set(other) <= set(one))


@given(SPANS, st.lists(SPANS, max_size=6))
def test_uncovered_is_what_is_left_in_maximal_spans(whole: Span, parts: list[Span]) -> None:
    missing = uncovered(whole, parts)

    assert [b for span in missing for b in span] == sorted(set(whole).difference(*parts))
    assert all(a.stop < b.start for a, b in pairwise(missing))


@given(st.integers(0, 50), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_span_is_cut_into_consecutive_ones(start: int, sizes: list[int]) -> None:
    span = Span(start, start + sum(sizes))

    parts = cut(span, sizes)

    assert [len(part) for part in parts] == sizes
    assert [block for part in parts for block in part] == list(span)

"""Option values: text in, values out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.cli.params import parse_shape, parse_size, parse_throughput
from p2pllm.config import ShaperConfig
from p2pllm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("4 GB", 4_000_000_000),
        ("1.5KiB", 1536),
        ("500M", 500_000_000),
        ("1000", 1000),
    ],
)
def test_sizes_are_bytes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "4 giga", "1e9", "GiB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_size(text)


def test_a_shape_gives_delay_bandwidth_and_jitter() -> None:
    assert parse_shape("delay=15ms, bandwidth=100mbit, jitter=0.002s") == ShaperConfig(
        delay_s=0.015, bandwidth_bytes_s=12.5e6, jitter_s=0.002
    )


def test_an_empty_shape_changes_nothing() -> None:
    assert not parse_shape("").is_active


@pytest.mark.parametrize("text", ["delay=15", "bandwidth=0mbit", "loss=1%", "delay", "=", "fast"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_shape(text)


def test_a_throughput_is_a_number_or_auto() -> None:
    assert (parse_throughput("auto"), parse_throughput("1500.5")) == (0.0, 1500.5)


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "fast"])
def test_what_is_no_throughput_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_throughput(text)


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    for parse in (parse_shape, parse_size, parse_throughput):
        try:
            parse(text)
        except ConfigError:
            continue

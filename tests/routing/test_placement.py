"""Which span a new server takes."""

import pytest

from p2pllm.errors import ConfigError
from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.placement import block_throughputs, choose_span
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.view import ServerView, SwarmView
from p2pllm.wire.messages import Numerics


def a_view(*servers: tuple[str, float], state: ServerState = ServerState.ONLINE) -> SwarmView:
    """Ten blocks; each server as its span and its tokens × blocks per second."""
    views = [
        ServerView(
            Presence(
                PeerId(bytes([number]) * 32),
                Span.parse(span),
                Numerics("float32"),
                state,
                prefill_tokens_s=rate,
            )
        )
        for number, (span, rate) in enumerate(servers)
    ]
    return SwarmView(ModelId(bytes(32)), 10, tuple(views))


def test_the_first_server_starts_at_the_first_block() -> None:
    assert choose_span(a_view(), 4) == Span(0, 4)


def test_blocks_that_nobody_serves_come_first() -> None:
    assert choose_span(a_view(("0:4", 100.0), ("6:10", 1.0)), 2) == Span(4, 6)


def test_a_window_with_the_weakest_block_wins_over_one_that_is_weak_on_average() -> None:
    view = a_view(("0:1", 1.0), ("1:4", 1000.0), ("4:10", 20.0))
    assert choose_span(view, 2) == Span(0, 2)


def test_the_second_weakest_block_decides_where_the_weakest_are_equal() -> None:
    view = a_view(("0:4", 50.0), ("5:10", 30.0))  # 4 is empty; 20 tokens/s before it, 10 after
    assert choose_span(view, 2) == Span(4, 6)


def test_three_servers_of_a_third_each_cover_the_model() -> None:
    first = choose_span(a_view(), 4)
    second = choose_span(a_view((str(first), 10.0)), 4)
    third = choose_span(a_view((str(first), 10.0), (str(second), 10.0)), 4)
    assert {block for span in (first, second, third) for block in span} == set(range(10))


def test_joining_servers_count_and_leaving_ones_do_not() -> None:
    joining = a_view(("0:5", 1.0), state=ServerState.JOINING)
    draining = a_view(("0:5", 1.0), state=ServerState.DRAINING)
    assert choose_span(joining, 5) == Span(5, 10)
    assert choose_span(draining, 5) == Span(0, 5)


def test_what_the_server_itself_announced_before_does_not_count() -> None:
    view = a_view(("0:5", 1.0))
    assert choose_span(view, 5, own=PeerId(bytes(32))) == Span(0, 5)


def test_a_server_offers_its_rate_over_half_its_blocks() -> None:
    assert block_throughputs(a_view(("2:5", 100.0)))[1:6] == [0.0, 50.0, 50.0, 50.0, 0.0]


@pytest.mark.parametrize("num_blocks", [0, -1, 11])
def test_impossible_numbers_of_blocks_are_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match="the model has 10"):
        choose_span(a_view(), num_blocks)

"""Who may be used, what is preferred, and what a planned route says of itself."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import ConfigError, LocalProtocolError, NoRoute
from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.costs import CostModel, RouteCost
from p2pllm.routing.planner import Route, plan
from p2pllm.routing.policies import Choice, RoutingProblem
from p2pllm.routing.request import RouteRequest
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.view import LinkSource, ServerView, SwarmView
from p2pllm.wire.messages import Numerics

FLOAT32, BFLOAT16 = Numerics("float32"), Numerics("bfloat16")
REQUEST = RouteRequest(prompt_tokens=10, new_tokens=10)


def a_server(
    number: int,
    span: str,
    *,
    rtt_s: float | None = 0.05,
    block_s: float = 0.01,
    numerics: Numerics = FLOAT32,
    state: ServerState = ServerState.ONLINE,
    penalty_until: float = 0.0,
    max_tokens: int = 4096,
) -> ServerView:
    presence = Presence(
        PeerId(bytes([number]) * 32),
        Span.parse(span),
        numerics,
        state,
        seconds_per_block_1=block_s,
        seconds_per_block_8=block_s,
        free_tokens=10_000,
        max_tokens_per_session=max_tokens,
    )
    return ServerView(presence, rtt_s, penalty_until=penalty_until)


def a_view(*servers: ServerView, num_blocks: int = 20) -> SwarmView:
    return SwarmView(ModelId(bytes(32)), num_blocks, servers, taken_at=100.0)


def hops(route: Route) -> list[tuple[int, str]]:
    return [(hop.peer_id.key[0], str(hop.span)) for hop in route.hops]


# --- which route -----------------------------------------------------------------------------


def test_overlapping_spans_are_joined_where_it_is_cheapest() -> None:
    view = a_view(a_server(1, "0:15", block_s=0.01), a_server(2, "5:20", block_s=0.02))
    assert hops(plan(view, REQUEST)) == [(1, "0:15"), (2, "15:20")]


def test_a_fast_server_is_entered_as_early_as_its_span_allows() -> None:
    view = a_view(a_server(1, "0:15", block_s=0.02), a_server(2, "5:20", block_s=0.01))
    assert hops(plan(view, REQUEST)) == [(1, "0:5"), (2, "5:20")]


def test_one_slow_hop_may_be_better_than_two_fast_ones() -> None:
    view = a_view(
        a_server(1, "0:10", block_s=0.001, rtt_s=0.5),
        a_server(2, "10:20", block_s=0.001, rtt_s=0.5),
        a_server(3, "0:20"),
    )
    assert hops(plan(view, REQUEST)) == [(3, "0:20")]


def test_only_the_asked_span_is_covered() -> None:
    view = a_view(a_server(1, "0:12"), a_server(2, "12:20"))
    assert hops(plan(view, replace(REQUEST, span=Span(10, 14)))) == [(1, "10:12"), (2, "12:14")]


def test_a_server_is_not_returned_to_though_that_would_be_fastest() -> None:
    slow, fast = a_server(1, "0:20", block_s=0.5), a_server(2, "5:15", block_s=0.01)
    assert hops(plan(a_view(slow, fast), REQUEST)) == [(1, "0:20")]


def test_a_second_slow_server_makes_the_fast_one_in_the_middle_usable() -> None:
    view = a_view(
        a_server(1, "0:20", block_s=0.5),
        a_server(2, "5:15", block_s=0.01),
        a_server(3, "0:20", block_s=0.6),
    )
    assert hops(plan(view, REQUEST)) == [(1, "0:5"), (2, "5:15"), (3, "15:20")]


def test_a_policy_that_returns_to_a_server_has_its_detour_cut_out() -> None:
    def back_and_forth(problem: RoutingProblem) -> list[Choice]:
        one, other = problem.candidates
        return [(one, Span(0, 5)), (other, Span(5, 15)), (one, Span(15, 20))]

    view = a_view(a_server(1, "0:20"), a_server(2, "0:20"))
    assert hops(plan(view, REQUEST, back_and_forth)) == [(1, "0:20")]


@st.composite
def small_swarms(draw: st.DrawFn) -> SwarmView:
    seconds = st.integers(0, 20).map(lambda tenths: tenths / 10)
    servers = [a_server(0, "0:5", block_s=draw(seconds) + 0.1, rtt_s=draw(seconds))]
    for number in range(1, draw(st.integers(1, 4))):
        start = draw(st.integers(0, 4))
        span = f"{start}:{draw(st.integers(start + 1, 5))}"
        servers.append(a_server(number, span, block_s=draw(seconds) + 0.1, rtt_s=draw(seconds)))
    return a_view(*servers, num_blocks=5)


def all_routes(view: SwarmView) -> list[list[tuple[ServerView, Span]]]:
    """Every way to give every block to a server that has it."""
    holders = [[s for s in view.servers if block in s.span] for block in range(view.num_blocks)]
    routes = []
    for assignment in product(*holders):
        route, at = [], 0
        for _, group in groupby(assignment, key=lambda server: server.peer_id):
            members = list(group)
            route.append((members[0], Span(at, at + len(members))))
            at += len(members)
        routes.append(route)
    return routes


def has_repeats(route: Sequence[tuple[ServerView, Span]]) -> bool:
    return max(Counter(server.peer_id for server, _ in route).values()) > 1


def without_opening(cost: RouteCost) -> float:
    """All sessions are opened at once, so no single hop decides how long that takes."""
    return cost.total_s - cost.open_s


@settings(max_examples=200, deadline=None)
@given(small_swarms(), st.booleans())
def test_the_route_is_the_best_of_all(view: SwarmView, relayed: bool) -> None:
    request = RouteRequest(prompt_tokens=5, new_tokens=3, relayed=relayed)
    costs = CostModel(view, request)
    valid = [route for route in all_routes(view) if not has_repeats(route)]
    best = min(without_opening(costs.total(route)) for route in valid)
    assert without_opening(plan(view, request).cost) == pytest.approx(best)


# --- who may be used -------------------------------------------------------------------------


def test_missing_blocks_are_named() -> None:
    view = a_view(a_server(1, "0:10"), a_server(2, "15:18"))
    with pytest.raises(NoRoute, match="no server for blocks 10:15, 18:20") as caught:
        plan(view, REQUEST)
    assert caught.value.missing == ((10, 15), (18, 20))


def test_servers_that_join_or_drain_are_not_used_and_the_error_says_so() -> None:
    view = a_view(
        a_server(1, "0:20", state=ServerState.DRAINING),
        a_server(2, "0:20", state=ServerState.JOINING),
    )
    with pytest.raises(NoRoute, match="1 draining, 1 joining"):
        plan(view, REQUEST)


def test_excluded_servers_are_not_used() -> None:
    view = a_view(a_server(1, "0:20", rtt_s=0.01), a_server(2, "0:20"))
    route = plan(view, replace(REQUEST, excluded=frozenset({PeerId(b"\x01" * 32)})))
    assert hops(route) == [(2, "0:20")]


def test_servers_with_too_short_sessions_are_not_used() -> None:
    view = a_view(a_server(1, "0:20", max_tokens=100), a_server(2, "0:20", block_s=3.0))
    assert hops(plan(view, replace(REQUEST, max_tokens=101))) == [(2, "0:20")]


def test_a_request_that_no_server_could_ever_hold_is_told_the_limit() -> None:
    view = a_view(a_server(1, "0:20", max_tokens=100), a_server(2, "5:9", max_tokens=4096))
    with pytest.raises(ConfigError, match=r"101 tokens are asked .* at most 100"):
        plan(view, replace(REQUEST, max_tokens=101))


def test_missing_blocks_go_before_too_short_sessions() -> None:
    view = a_view(a_server(1, "0:10", max_tokens=100))
    with pytest.raises(NoRoute, match="unable to hold 101 tokens"):
        plan(view, replace(REQUEST, max_tokens=101))


def test_a_penalised_server_is_avoided_even_if_others_are_slow() -> None:
    view = a_view(a_server(1, "0:20", penalty_until=101.0), a_server(2, "0:20", block_s=3.0))
    assert hops(plan(view, REQUEST)) == [(2, "0:20")]


def test_a_penalty_ends() -> None:
    view = a_view(a_server(1, "0:20", penalty_until=99.0), a_server(2, "0:20", block_s=3.0))
    assert hops(plan(view, REQUEST)) == [(1, "0:20")]


def test_a_penalised_server_is_used_for_blocks_that_nobody_else_has_and_only_for_these() -> None:
    view = a_view(a_server(1, "0:20", penalty_until=101.0), a_server(2, "0:12", block_s=3.0))
    route = plan(view, REQUEST)
    assert hops(route) == [(2, "0:12"), (1, "12:20")]
    assert route.notes == ("blocks 12:20: only servers failing lately",)


def test_equal_numerics_are_preferred() -> None:
    view = a_view(
        a_server(1, "0:20", numerics=BFLOAT16), a_server(2, "0:12", block_s=3.0, numerics=FLOAT32)
    )
    route = plan(view, replace(REQUEST, numerics=FLOAT32))
    assert hops(route) == [(2, "0:12"), (1, "12:20")]
    assert route.notes == ("blocks 12:20: only servers other than float32",)


def test_other_numerics_come_before_servers_that_fail() -> None:
    view = a_view(
        a_server(1, "0:20", numerics=FLOAT32, penalty_until=101.0),
        a_server(2, "0:20", numerics=BFLOAT16),
    )
    assert hops(plan(view, replace(REQUEST, numerics=FLOAT32))) == [(2, "0:20")]


def test_strict_numerics_are_demanded() -> None:
    view = a_view(a_server(1, "0:20", numerics=BFLOAT16))
    with pytest.raises(NoRoute, match="1 not float32"):
        plan(view, replace(REQUEST, numerics=FLOAT32, is_strict=True))


def test_blocks_beyond_the_model_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(LocalProtocolError):
        plan(a_view(a_server(1, "0:20")), replace(REQUEST, span=Span(0, 21)))


# --- spreading load --------------------------------------------------------------------------


def test_clients_with_different_seeds_share_equal_servers() -> None:
    view = a_view(*(a_server(number, "0:20") for number in range(4)))
    chosen = Counter(hops(plan(view, replace(REQUEST, seed=seed)))[0][0] for seed in range(200))
    assert len(chosen) == 4
    assert min(chosen.values()) > 25  # 50 expected; 25 is four standard deviations below


def test_a_client_with_one_seed_stays_with_its_choice() -> None:
    view = a_view(*(a_server(number, "0:20") for number in range(4)))
    request = replace(REQUEST, seed=5)
    assert plan(view, request) == plan(view, request)


def test_the_spread_never_makes_a_route_much_longer() -> None:
    view = a_view(a_server(1, "0:20", block_s=0.010), a_server(2, "0:20", block_s=0.012))
    for seed in range(50):
        assert hops(plan(view, replace(REQUEST, seed=seed, spread=0.05))) == [(1, "0:20")]


# --- what a route says -----------------------------------------------------------------------


def test_a_route_is_priced_without_the_spread_and_says_how_links_are_known() -> None:
    view = a_view(a_server(1, "0:10"), a_server(2, "10:20", rtt_s=None))
    route = plan(view, replace(REQUEST, seed=3))
    exact = plan(view, REQUEST)
    assert route.cost == exact.cost
    assert [hop.rtt_source for hop in route.hops] == [LinkSource.MEASURED, LinkSource.ESTIMATED]
    assert route.cost.tpot_s == pytest.approx(sum(hop.decode.total_s for hop in route.hops))


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: latency, petals, random"):
        plan(a_view(a_server(1, "0:20")), REQUEST, "fastest")


def test_a_policy_may_be_passed_as_a_function() -> None:
    def second(problem: RoutingProblem) -> list[Choice]:
        return [(problem.candidates[1], problem.span)]

    route = plan(a_view(a_server(1, "0:20"), a_server(2, "0:20")), REQUEST, second)
    assert (hops(route), route.policy) == ([(2, "0:20")], "second")


@pytest.mark.parametrize("parts", [["0:10"], ["0:10", "11:20"], ["0:10", "10:25"]])
def test_a_policy_that_covers_badly_is_refused(parts: list[str]) -> None:
    view = a_view(*(a_server(number, "0:20") for number in range(len(parts))))

    def bad(problem: RoutingProblem) -> list[Choice]:
        return list(zip(problem.candidates, map(Span.parse, parts), strict=True))

    with pytest.raises(LocalProtocolError):
        plan(view, REQUEST, bad)

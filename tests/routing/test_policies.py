"""The policies that come with p2pllm, beside each other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import LocalProtocolError
from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.planner import Route, plan
from p2pllm.routing.policies import Choice, RoutingProblem, policy_names, register
from p2pllm.routing.request import RouteRequest
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence
from p2pllm.swarm.view import ServerView, SwarmView
from p2pllm.wire.messages import Numerics


def a_server(
    number: int,
    span: str,
    *,
    rtt_s: float | None = 0.05,
    block_s: float = 0.01,
    free_tokens: int = 10_000,
    rtts: tuple[tuple[PeerId, float], ...] = (),
) -> ServerView:
    presence = Presence(
        a_peer(number),
        Span.parse(span),
        Numerics("float32"),
        seconds_per_block_1=block_s,
        seconds_per_block_8=block_s,
        free_tokens=free_tokens,
        max_tokens_per_session=4096,
        rtts=rtts,
    )
    return ServerView(presence, rtt_s)


def a_peer(number: int) -> PeerId:
    return PeerId(bytes([number]) * 32)


def a_view(*servers: ServerView) -> SwarmView:
    return SwarmView(ModelId(bytes(32)), 20, servers)


def hops(route: Route) -> list[tuple[int, str]]:
    return [(hop.peer_id.key[0], str(hop.span)) for hop in route.hops]


def test_petals_leaves_a_server_only_at_the_end_of_its_span() -> None:
    view = a_view(a_server(1, "0:15", block_s=0.02), a_server(2, "5:20", block_s=0.01))
    assert hops(plan(view, RouteRequest(), "petals")) == [(1, "0:15"), (2, "15:20")]
    assert hops(plan(view, RouteRequest(), "latency")) == [(1, "0:5"), (2, "5:20")]


def test_petals_pays_ten_seconds_for_a_full_cache() -> None:
    view = a_view(a_server(1, "0:20", free_tokens=0), a_server(2, "0:20", block_s=0.4))
    assert hops(plan(view, RouteRequest(), "petals")) == [(2, "0:20")]


def test_petals_knows_only_announced_round_trips_between_servers() -> None:
    view = a_view(
        a_server(1, "0:10", rtts=((a_peer(3), 0.01),)),
        a_server(2, "10:20", rtt_s=0.001),
        a_server(3, "10:20", rtt_s=0.05),
    )
    assert hops(plan(view, RouteRequest(), "petals")) == [(1, "0:10"), (3, "10:20")]


def test_random_routes_differ_by_seed_and_repeat_with_the_same() -> None:
    view = a_view(*(a_server(number, "0:20") for number in range(8)))
    routes = [hops(plan(view, RouteRequest(seed=seed), "random"))[0][0] for seed in range(50)]
    again = [hops(plan(view, RouteRequest(seed=seed), "random"))[0][0] for seed in range(50)]
    assert len(set(routes)) == 8
    assert routes == again


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(1, 20)), max_size=6),
    st.sampled_from(["latency", "petals", "random"]),
    st.booleans(),
)
def test_every_policy_covers_all_blocks_whatever_the_spans(
    spans: list[tuple[int, int]], policy: str, relayed: bool
) -> None:
    servers = [a_server(0, "0:11"), a_server(1, "11:20")]
    for start, length in spans:
        servers.append(a_server(len(servers), f"{start}:{min(20, start + length)}"))
    route = plan(a_view(*servers), RouteRequest(relayed=relayed), policy)
    assert [block for hop in route.hops for block in hop.span] == list(range(20))


def test_a_name_is_registered_once() -> None:
    def mine(problem: RoutingProblem) -> list[Choice]:
        return []

    assert policy_names() == ["latency", "petals", "random"]
    with pytest.raises(LocalProtocolError):
        register("latency")(mine)

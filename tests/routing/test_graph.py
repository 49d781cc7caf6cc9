"""The layered graph: its optimum is that of all routes, reduced or not."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.costs import Candidate, CostModel
from p2pllm.routing.dijkstra import shortest_path
from p2pllm.routing.graph import CLIENT, LayeredGraph, Node
from p2pllm.routing.request import RouteRequest
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence
from p2pllm.swarm.view import End, LinkSource, LinkView, ServerView, SwarmView
from p2pllm.wire.messages import Numerics

NUM_BLOCKS = 5
WHOLE = Span(0, NUM_BLOCKS)
SECONDS = st.integers(0, 20).map(lambda tenths: tenths / 10)


def a_server(
    number: int, span: Span, *, block_s: float, rtt_s: float, queue_s: float = 0.0
) -> ServerView:
    presence = Presence(
        PeerId(bytes([number]) * 32),
        span,
        Numerics("float32"),
        seconds_per_block_1=block_s,
        seconds_per_block_8=block_s,
        prefill_tokens_s=100.0,
        queue_s=queue_s,
        free_tokens=10_000,
        max_tokens_per_session=10_000,
    )
    return ServerView(presence, rtt_s)


@st.composite
def swarms(draw: st.DrawFn, *, is_metric: bool) -> SwarmView:
    """Up to four servers that cover all blocks; between them either any round trips, or those of
    places on a line with the client in the middle, which obey the triangle inequality."""
    servers = [a_server(0, WHOLE, block_s=draw(SECONDS) + 0.1, rtt_s=draw(SECONDS))]
    for number in range(1, draw(st.integers(1, 4))):
        start = draw(st.integers(0, NUM_BLOCKS - 1))
        span = Span(start, draw(st.integers(start + 1, NUM_BLOCKS)))
        block_s, rtt_s, queue_s = draw(SECONDS) + 0.1, draw(SECONDS), draw(SECONDS)
        servers.append(a_server(number, span, block_s=block_s, rtt_s=rtt_s, queue_s=queue_s))
    places = {s.peer_id: (s.rtt_s or 0.0) * draw(st.sampled_from([-1, 1])) for s in servers}
    links: dict[tuple[End, End], LinkView] = {}
    for one, other in product(servers, servers):
        rtt_s = abs(places[one.peer_id] - places[other.peer_id]) if is_metric else draw(SECONDS)
        links[one.peer_id, other.peer_id] = LinkView(rtt_s, 1e9, LinkSource.MEASURED)
    return SwarmView(ModelId(bytes(32)), NUM_BLOCKS, tuple(servers), links)


def best_of_all(costs: CostModel) -> float:
    """The cost of the best of all ways to give every block to a server that has it.

    Sessions are opened at all hops at once, which a search over edges leaves out.
    """
    holders = [[s for s in costs.view.servers if block in s.span] for block in range(NUM_BLOCKS)]
    best = float("inf")
    for assignment in product(*holders):
        hops, at = [], 0
        for _, group in groupby(assignment, key=lambda server: server.peer_id):
            members = list(group)
            hops.append((members[0], Span(at, at + len(members))))
            at += len(members)
        cost = costs.total(hops)
        best = min(best, cost.total_s - cost.open_s)
    return best


def best_in_graph(costs: CostModel, *, is_reduced: bool) -> float:
    candidates = [Candidate(server, server.span) for server in costs.view.servers]
    graph = LayeredGraph(costs, candidates, WHOLE, is_reduced=is_reduced)
    found = shortest_path(graph.source, graph.target, graph.edges)
    assert found is not None
    return found[0]


@settings(max_examples=200, deadline=None)
@given(swarms(is_metric=False))
def test_the_whole_graph_has_the_optimum_of_all_chains(view: SwarmView) -> None:
    costs = CostModel(view, RouteRequest(prompt_tokens=5, new_tokens=3, relayed=False))
    assert best_in_graph(costs, is_reduced=False) == pytest.approx(best_of_all(costs))


@settings(max_examples=200, deadline=None)
@given(swarms(is_metric=True))
def test_the_reduced_graph_has_the_optimum_of_all_chains(view: SwarmView) -> None:
    costs = CostModel(view, RouteRequest(prompt_tokens=5, new_tokens=3, relayed=False))
    assert best_in_graph(costs, is_reduced=True) == pytest.approx(best_of_all(costs))


@settings(max_examples=200, deadline=None)
@given(swarms(is_metric=True))
def test_the_reduced_graph_has_the_optimum_of_all_relayed_routes(view: SwarmView) -> None:
    costs = CostModel(view, RouteRequest(prompt_tokens=5, new_tokens=3, relayed=True))
    assert best_in_graph(costs, is_reduced=True) == pytest.approx(best_of_all(costs))


@settings(max_examples=200, deadline=None)
@given(swarms(is_metric=False))
def test_merging_boundaries_of_relayed_routes_keeps_the_optimum(view: SwarmView) -> None:
    costs = CostModel(view, RouteRequest(prompt_tokens=5, new_tokens=3, relayed=True))
    whole, reduced = (best_in_graph(costs, is_reduced=flag) for flag in (False, True))
    assert reduced == pytest.approx(whole)


def test_estimated_links_cost_the_same_in_the_graph_and_in_the_price() -> None:
    servers = (
        a_server(0, Span(0, 2), block_s=0.1, rtt_s=0.3),
        a_server(1, Span(2, 5), block_s=0.1, rtt_s=0.7),
    )
    view = SwarmView(ModelId(bytes(32)), NUM_BLOCKS, servers)
    costs = CostModel(view, RouteRequest(relayed=False, seed=7))
    path_cost = best_in_graph(costs, is_reduced=True)
    weights = costs.move_weight(None, servers[0].peer_id)
    weights += costs.move_weight(servers[0].peer_id, servers[1].peer_id)
    weights += costs.leave_weight(servers[1].peer_id, None)
    weights += costs.stay_weight(servers[0]) + costs.stay_weight(servers[1])
    weights += 2 * costs.block_weight(servers[0]) + 3 * costs.block_weight(servers[1])
    assert path_cost == pytest.approx(weights)


def test_a_path_is_read_as_hops() -> None:
    servers = [a_server(n, WHOLE, block_s=0.1, rtt_s=0.1) for n in range(2)]
    view = SwarmView(ModelId(bytes(32)), NUM_BLOCKS, tuple(servers))
    costs = CostModel(view, RouteRequest())
    graph = LayeredGraph(costs, [Candidate(s, WHOLE) for s in servers], WHOLE)
    path = [(CLIENT, 0), (1, 1), (1, 2), (CLIENT, 2), (0, 4), (0, 5), (CLIENT, 5)]
    assert graph.hops(path) == [(1, Span(0, 2)), (0, Span(2, 5))]


def test_boundaries_where_no_span_starts_or_ends_are_merged() -> None:
    servers = [a_server(0, Span(0, 100), block_s=0.1, rtt_s=0.1)]
    view = SwarmView(ModelId(bytes(32)), 100, tuple(servers))
    graph = LayeredGraph(
        CostModel(view, RouteRequest()), [Candidate(servers[0], Span(0, 100))], Span(0, 100)
    )
    assert [node for node, _ in graph.edges(graph.source)] == [(0, 100)]


@pytest.mark.parametrize(("relayed", "max_edges"), [(True, 20_000), (False, 60_000)])
def test_a_large_swarm_makes_a_small_graph(relayed: bool, max_edges: int) -> None:
    """500 servers of 5 to 15 blocks of 100: all changes at all boundaries would be 300,000."""
    rng = Random(0)
    servers = []
    for number in range(500):
        start = rng.randint(0, 95)
        span = Span(start, min(100, start + rng.randint(5, 15)))
        server = a_server(0, span, block_s=rng.uniform(0.001, 0.02), rtt_s=rng.uniform(0, 0.2))
        peer = PeerId(number.to_bytes(32, "big"))
        servers.append(replace(server, presence=replace(server.presence, peer_id=peer)))
    view = SwarmView(ModelId(bytes(32)), 100, tuple(servers))
    candidates = [Candidate(server, server.span) for server in servers]
    costs = CostModel(view, RouteRequest(relayed=relayed))
    graph = LayeredGraph(costs, candidates, Span(0, 100))
    num_edges = 0

    def counted(node: Node) -> Iterator[tuple[Node, float]]:
        nonlocal num_edges
        for edge in graph.edges(node):
            num_edges += 1
            yield edge

    assert shortest_path(graph.source, graph.target, counted) is not None
    assert num_edges < max_edges

"""What routes cost, term by term, and that weights and prices agree."""

from dataclasses import replace

import pytest

from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.costs import CACHE_WAIT_S, MESSAGE_BYTES, CostModel, RouteCost
from p2pllm.routing.request import Objective, RouteRequest
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence
from p2pllm.swarm.view import End, LinkSource, LinkView, ServerView, SwarmView
from p2pllm.wire.messages import Numerics

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)
BANDWIDTH = 1e6


def a_server(peer: PeerId, *, rtt_s: float = 0.1) -> ServerView:
    presence = Presence(
        peer,
        Span(0, 10),
        Numerics("float32"),
        seconds_per_block_1=0.01,
        seconds_per_block_8=0.08,
        prefill_tokens_s=1000.0,
        free_tokens=1000,
        queue_s=0.005,
        max_tokens_per_session=4096,
    )
    return ServerView(presence, rtt_s)


def a_view(*servers: ServerView, between_s: float = 0.06) -> SwarmView:
    """Both servers at their distance from the client, and `between_s` from each other."""
    links: dict[tuple[End, End], LinkView] = {
        (A, B): LinkView(between_s, BANDWIDTH, LinkSource.MEASURED)
    }
    for server in servers:
        link = LinkView(server.rtt_s or 0.0, BANDWIDTH, LinkSource.MEASURED)
        links[None, server.peer_id] = links[server.peer_id, None] = link
    return SwarmView(ModelId(bytes(32)), 20, servers, links)


REQUEST = RouteRequest(
    prompt_tokens=100, new_tokens=10, activation_bytes_per_token=1000, batch=1, max_tokens=200
)


def test_each_term_of_a_relayed_hop_is_as_the_formula_says() -> None:
    server = a_server(A)
    prefill, decode = CostModel(a_view(server), REQUEST).price([(server, Span(0, 4))])[0]
    assert prefill.rtt_s == pytest.approx(0.1)  # to the server and back
    # All tokens there, and only the last one's output back.
    assert prefill.transfer_s == pytest.approx((101 * 1000 + 2 * MESSAGE_BYTES) / BANDWIDTH)
    assert prefill.compute_s == pytest.approx(4 * server.prefill_block_s(100))
    assert decode.rtt_s == pytest.approx(0.1)
    assert decode.transfer_s == pytest.approx(2 * (1000 + MESSAGE_BYTES) / BANDWIDTH)
    assert decode.compute_s == pytest.approx(4 * 0.01)
    assert decode.queue_s == prefill.queue_s == 0.005
    assert decode.cache_wait_s == prefill.cache_wait_s == 0


def test_a_batch_costs_what_the_announced_curve_says() -> None:
    server = a_server(A)
    costs = CostModel(a_view(server), replace(REQUEST, batch=8))
    hops = [(server, Span(0, 4))]
    _, decode = costs.price(hops)[0]
    assert decode.compute_s == pytest.approx(4 * 0.08)
    assert costs.total(hops).num_chunks == 8


def test_a_prompt_of_one_token_takes_as_long_as_a_decode_step() -> None:
    server = a_server(A)
    costs = CostModel(a_view(server), replace(REQUEST, prompt_tokens=1))
    prefill, decode = costs.price([(server, Span(0, 4))])[0]
    assert prefill.compute_s == decode.compute_s


def test_waiting_for_cache_is_paid_once() -> None:
    full = a_server(A)
    full = replace(full, presence=replace(full.presence, free_tokens=199))
    prefill, decode = CostModel(a_view(full), REQUEST).price([(full, Span(0, 4))])[0]
    assert (prefill.cache_wait_s, decode.cache_wait_s) == (CACHE_WAIT_S, 0)


def test_a_server_that_said_how_long_to_wait_is_taken_at_its_word() -> None:
    busy = replace(a_server(A), cache_wait_s=3.0)
    prefill, _ = CostModel(a_view(busy), REQUEST).price([(busy, Span(0, 4))])[0]
    assert prefill.cache_wait_s == 3.0


def test_in_a_chain_only_the_last_hop_returns_to_the_client() -> None:
    first, second = a_server(A, rtt_s=0.1), a_server(B, rtt_s=0.2)
    costs = CostModel(a_view(first, second), replace(REQUEST, relayed=False))
    prices = costs.price([(first, Span(0, 4)), (second, Span(4, 10))])
    assert prices[0][1].rtt_s == pytest.approx(0.05)
    assert prices[1][1].rtt_s == pytest.approx(0.03 + 0.1)


def test_a_repair_in_a_chain_is_priced_between_the_hops_around_it() -> None:
    first, second = a_server(A), a_server(B)
    request = replace(REQUEST, relayed=False, before=A, after=A, span=Span(4, 10))
    view = a_view(first, second)
    decode = CostModel(view, request).price([(second, Span(4, 10))])[0][1]
    assert decode.rtt_s == pytest.approx((view.link(A, B).rtt_s + view.link(B, A).rtt_s) / 2)


@pytest.mark.parametrize("relayed", [True, False])
def test_the_weights_of_a_route_add_up_to_its_price_but_for_the_opening(relayed: bool) -> None:
    first, second = a_server(A, rtt_s=0.1), a_server(B, rtt_s=0.2)
    costs = CostModel(a_view(first, second), replace(REQUEST, relayed=relayed))
    total = costs.total([(first, Span(0, 4)), (second, Span(4, 10))])
    moves = [(None, A), (A, None), (None, B)] if relayed else [(None, A), (A, B)]
    weight = sum(costs.move_weight(*ends) for ends in moves) + costs.leave_weight(B, None)
    weight += costs.stay_weight(first) + costs.stay_weight(second)
    weight += 4 * costs.block_weight(first) + 6 * costs.block_weight(second)
    assert weight == pytest.approx(total.total_s - total.open_s)
    assert total.total_s == pytest.approx(total.ttft_s + 10 * total.tpot_s)


# --- the first token -------------------------------------------------------------------------

LONG = replace(REQUEST, prompt_tokens=400, chunk_tokens=100, max_tokens=500, relayed=False)
BOTH = [(a_server(A), Span(0, 5)), (a_server(B), Span(5, 10))]


def test_the_terms_of_the_first_token_add_up() -> None:
    request = replace(LONG, own_step_s=0.02, own_chunk_s=0.01)
    costs = CostModel(a_view(a_server(A), a_server(B)), request)
    cost, prices = costs.total(BOTH), costs.price(BOTH)
    terms = cost.open_s + cost.cache_wait_s + cost.own_first_s + cost.pipeline_s
    assert cost.ttft_s == pytest.approx(terms + sum(first.step_s for first, _ in prices))
    assert cost.tpot_s == pytest.approx(0.02 + sum(each.total_s for _, each in prices))


def test_the_chunks_of_a_prompt_overlap_between_the_hops() -> None:
    """Two equal hops: a chunk's way through both, and then one chunk after the other comes out."""
    costs = CostModel(a_view(a_server(A), a_server(B)), LONG)
    cost = costs.total(BOTH)
    hop_s = 0.005 + 5 * a_server(A).prefill_block_s(100)
    assert cost.num_chunks == 4
    assert cost.pipeline_s == pytest.approx(3 * hop_s)


def test_the_slowest_link_sets_the_pace_where_it_is_slower_than_the_servers() -> None:
    slow = LinkView(0.06, 1e5, LinkSource.MEASURED)
    view = a_view(a_server(A), a_server(B))
    view = replace(view, measured_links={**view.measured_links, (A, B): slow})
    cost = CostModel(view, LONG).total(BOTH)
    assert cost.pipeline_s == pytest.approx(3 * (100 * 1000 + MESSAGE_BYTES) / 1e5)


def test_on_a_long_way_the_chunks_in_flight_set_the_pace() -> None:
    """The ninth chunk leaves when the first has come back."""
    far = a_server(A, rtt_s=10.0)
    request = replace(LONG, prompt_tokens=900, max_tokens=1000)
    cost = CostModel(a_view(far), request).total([(far, Span(0, 10))])
    one_s = CostModel(a_view(far), request).price([(far, Span(0, 10))])[0][0].step_s
    assert cost.pipeline_s == pytest.approx(one_s)


def test_a_route_waits_for_the_longest_of_its_caches_only() -> None:
    busy, busier = (replace(a_server(p), cache_wait_s=s) for p, s in ((A, 3.0), (B, 5.0)))
    cost = CostModel(a_view(busy, busier), LONG).total([(busy, Span(0, 5)), (busier, Span(5, 10))])
    assert cost.cache_wait_s == 5.0


def test_sessions_are_opened_at_all_hops_at_once_and_each_asks_the_next() -> None:
    near, far = a_server(A, rtt_s=0.1), a_server(B, rtt_s=0.12)
    hops = [(near, Span(0, 5)), (far, Span(5, 10))]
    chained = CostModel(a_view(near, far), LONG).total(hops)
    relayed = CostModel(a_view(near, far), replace(LONG, relayed=True)).total(hops)
    assert chained.open_s == pytest.approx(0.1 + 0.06)
    assert relayed.open_s == pytest.approx(0.12)


def test_the_weights_of_one_chunk_are_less_than_those_of_all() -> None:
    costs = CostModel(a_view(a_server(A)), LONG)
    overlapped = costs.overlapped()
    assert overlapped is not None
    assert overlapped.block_weight(a_server(A)) < costs.block_weight(a_server(A))
    assert CostModel(a_view(a_server(A)), REQUEST).overlapped() is None


# --- what else may happen --------------------------------------------------------------------


def test_a_broken_link_is_priced_by_way_of_the_client() -> None:
    first, second = a_server(A, rtt_s=0.1), a_server(B, rtt_s=0.2)
    view = replace(a_view(first, second), broken_links=frozenset({(A, B)}))
    hops = [(first, Span(0, 5)), (second, Span(5, 10))]
    costs = CostModel(view, LONG)
    (_, one), (_, other) = costs.price(hops)
    assert one.rtt_s == pytest.approx(0.05)
    assert other.rtt_s == pytest.approx(0.05 + 0.1 + 0.1)
    assert costs.move_weight(A, B) == pytest.approx(
        costs.move_weight(A, None) + costs.move_weight(None, B)
    )
    assert costs.total(hops).open_s == pytest.approx(0.2)


def test_the_measured_overhead_of_hops_is_paid_in_every_step() -> None:
    view = replace(a_view(a_server(A)), overhead_s=0.001)
    first, each = CostModel(view, REQUEST).price([(a_server(A), Span(0, 4))])[0]
    assert first.overhead_s == each.overhead_s == 0.001


@pytest.mark.parametrize(
    ("objective", "is_first"), [(Objective.FIRST_TOKEN, True), (Objective.EACH_TOKEN, False)]
)
def test_an_objective_weighs_the_other_part_next_to_nothing(
    objective: Objective, is_first: bool
) -> None:
    costs = CostModel(a_view(a_server(A)), replace(LONG, objective=objective))
    one, other = (costs.objective_s(RouteCost(*each, 0.0)) for each in ((1.0, 0.0), (0.0, 0.1)))
    assert (one > 100 * other) is is_first
    assert (other > 100 * one) is not is_first


def test_the_factor_depends_on_seed_and_server_and_stays_within_the_spread() -> None:
    def factor(seed: int, peer: PeerId) -> float:
        return CostModel(a_view(), replace(REQUEST, seed=seed, spread=0.05)).factor(peer)

    assert factor(1, A) == factor(1, A)
    assert len({factor(1, A), factor(1, B), factor(2, A), factor(2, B)}) == 4
    assert all(1 <= factor(seed, A) <= 1.05 for seed in range(-20, 20))


def test_without_a_seed_nothing_is_spread() -> None:
    assert CostModel(a_view(), REQUEST).factor(A) == 1.0

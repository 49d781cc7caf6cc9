"""What routes cost, term by term, and that weights and prices agree."""

from dataclasses import replace

import pytest

from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.costs import CACHE_WAIT_S, CostModel
from p2pllm.routing.request import RouteRequest
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
    assert prefill.transfer_s == pytest.approx(2 * 100 * 1000 / BANDWIDTH)
    assert prefill.compute_s == pytest.approx(100 * 4 / 1000)
    assert decode.rtt_s == pytest.approx(0.1)
    assert decode.transfer_s == pytest.approx(2 * 1000 / BANDWIDTH)
    assert decode.compute_s == pytest.approx(4 * 0.01)
    assert decode.queue_s == prefill.queue_s == 0.005
    assert decode.cache_wait_s == prefill.cache_wait_s == 0


def test_a_batch_costs_what_the_announced_curve_says() -> None:
    server = a_server(A)
    costs = CostModel(a_view(server), replace(REQUEST, batch=8))
    prefill, decode = costs.price([(server, Span(0, 4))])[0]
    assert decode.compute_s == pytest.approx(4 * 0.08)
    assert prefill.compute_s == pytest.approx(8 * 100 * 4 / 1000)


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
def test_the_weights_of_a_route_add_up_to_its_price(relayed: bool) -> None:
    first, second = a_server(A, rtt_s=0.1), a_server(B, rtt_s=0.2)
    costs = CostModel(a_view(first, second), replace(REQUEST, relayed=relayed))
    total = costs.total(costs.price([(first, Span(0, 4)), (second, Span(4, 10))]))
    moves = (
        [(None, A), (A, None), (None, B), (B, None)] if relayed else [(None, A), (A, B), (B, None)]
    )
    weight = sum(costs.move_weight(*ends) for ends in moves)
    weight += costs.stay_weight(first) + costs.stay_weight(second)
    weight += 4 * costs.block_weight(first) + 6 * costs.block_weight(second)
    assert weight == pytest.approx(total.total_s)
    assert total.total_s == pytest.approx(total.ttft_s + 10 * total.tpot_s)


def test_the_factor_depends_on_seed_and_server_and_stays_within_the_spread() -> None:
    def factor(seed: int, peer: PeerId) -> float:
        return CostModel(a_view(), replace(REQUEST, seed=seed, spread=0.05)).factor(peer)

    assert factor(1, A) == factor(1, A)
    assert len({factor(1, A), factor(1, B), factor(2, A), factor(2, B)}) == 4
    assert all(1 <= factor(seed, A) <= 1.05 for seed in range(-20, 20))


def test_without_a_seed_nothing_is_spread() -> None:
    assert CostModel(a_view(), REQUEST).factor(A) == 1.0

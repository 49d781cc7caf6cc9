"""When a generation that is under way moves to another route, and when it stays."""

from dataclasses import replace

import pytest

from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.moving import GAIN, SLOWER, should_move
from p2pllm.routing.planner import Route, RouteRequest, plan
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.view import ServerView, SwarmView
from p2pllm.wire.messages import Numerics

A, B, C = (PeerId(letter * 32) for letter in (b"a", b"b", b"c"))
REQUEST = RouteRequest(
    prompt_tokens=100, new_tokens=100, activation_bytes_per_token=1000, relayed=False
)


def a_server(peer: PeerId, span: str, *, queue_s: float = 0.0, block_s: float = 0.01) -> ServerView:
    presence = Presence(
        peer,
        Span.parse(span),
        Numerics("float32"),
        seconds_per_block_1=block_s,
        seconds_per_block_8=block_s,
        prefill_tokens_s=1000.0,
        free_tokens=10_000,
        max_tokens_per_session=4096,
    )
    return ServerView(presence, rtt_s=0.02, queue_s=queue_s)


def a_view(*servers: ServerView) -> SwarmView:
    return SwarmView(ModelId(bytes(32)), 10, servers)


QUIET = a_view(a_server(A, "0:5"), a_server(B, "5:10"), a_server(C, "5:10", queue_s=0.01))
BUSY = a_view(a_server(A, "0:5"), a_server(B, "5:10", queue_s=0.2), a_server(C, "5:10"))
ROUTE = plan(QUIET, REQUEST)
PREDICTED_S = ROUTE.cost.tpot_s


def peers(route: Route | None) -> list[PeerId]:
    return [] if route is None else [hop.peer_id for hop in route.hops]


def test_a_route_that_became_slow_is_left_when_another_is_better() -> None:
    assert peers(ROUTE) == [A, B]
    assert peers(should_move(ROUTE, PREDICTED_S + 0.2, BUSY, REQUEST)) == [A, C]


def test_nothing_is_planned_while_tokens_come_about_as_predicted() -> None:
    assert should_move(ROUTE, PREDICTED_S * (1 + SLOWER) - 1e-6, BUSY, REQUEST) is None


def test_a_route_that_is_slow_for_unknown_reasons_is_kept() -> None:
    """The other one is no better by what is known, and what is not known may follow us."""
    assert should_move(ROUTE, 3 * PREDICTED_S, QUIET, REQUEST) is None


def test_a_slowness_that_the_view_does_not_explain_is_not_saved() -> None:
    slightly = a_view(a_server(A, "0:5"), a_server(B, "5:10", queue_s=0.01), a_server(C, "5:10"))
    assert peers(plan(slightly, REQUEST)) == [A, C]
    assert should_move(ROUTE, 5 * PREDICTED_S, slightly, REQUEST) is None


def test_the_last_tokens_are_not_worth_a_replay() -> None:
    last = replace(REQUEST, prompt_tokens=2000, new_tokens=5)
    assert should_move(ROUTE, PREDICTED_S + 0.2, BUSY, last) is None


def test_a_replay_that_costs_more_than_it_saves_is_not_made() -> None:
    saved_s = REQUEST.new_tokens * 0.2
    measured_s = PREDICTED_S + 0.2
    left_s = REQUEST.new_tokens * measured_s
    for replay_s, is_made in ((saved_s - (GAIN + 0.01) * left_s, True), (saved_s, False)):
        found = should_move(ROUTE, measured_s, BUSY, REQUEST, replay_s=replay_s)
        assert (found is not None) is is_made


def test_the_new_route_is_not_left_again_at_once() -> None:
    moved = should_move(ROUTE, PREDICTED_S + 0.2, BUSY, REQUEST)
    assert moved is not None
    assert should_move(moved, moved.cost.tpot_s * 1.2, QUIET, REQUEST) is None
    assert should_move(moved, moved.cost.tpot_s * 2, QUIET, REQUEST) is None


@pytest.mark.parametrize(
    "servers", [(a_server(A, "0:5"),), (a_server(A, "0:5"), a_server(B, "6:10"))]
)
def test_a_hop_that_is_gone_is_none_of_its_business(servers: tuple[ServerView, ...]) -> None:
    assert should_move(ROUTE, 1.0, a_view(*servers), REQUEST) is None


def test_without_any_route_one_stays() -> None:
    draining = a_server(B, "5:10")
    presence = replace(draining.presence, state=ServerState.DRAINING)
    view = a_view(a_server(A, "0:5"), replace(draining, presence=presence))
    assert should_move(ROUTE, 1.0, view, REQUEST) is None

"""Should a generation that is under way move to another route?

A plan is a guess on what was known when it was made. Later a server gets busy, or a link slow, and
the time per token leaves the prediction. Then the route is planned again for what is left of the
generation, and moved if the time saved pays for the replay of what the new hops do not hold.

Two things keep it from going back and forth. Nothing is planned before the measured time is above
the prediction by `SLOWER`, and nothing moved unless `GAIN` of the remaining time is saved beyond
the replay. And predictions are compared with predictions: what the present route is measured to
take beyond its own price on the same view may have its cause in what we do not know, and would
follow us to the other one.
"""

from collections.abc import Sequence

from p2pllm.errors import NoRoute
from p2pllm.routing.costs import CostModel
from p2pllm.routing.planner import Route, RouteRequest, plan
from p2pllm.spans import Span
from p2pllm.swarm.view import ServerView, SwarmView

SLOWER = 0.25  # above the prediction: tokens vary by about a tenth on a quiet swarm
LEAST_S = 0.002  # and by so much per token: below, it is the noise of timers
GAIN = 0.15  # of the remaining time, that a move has to save


def should_move(
    route: Route,
    measured_s: float,
    view: SwarmView,
    request: RouteRequest,
    replay_s: float | None = None,
) -> Route | None:
    """The better route for the rest of a generation, or None to stay.

    `measured_s` is the time per token lately (a median of some ten), and `route.cost.tpot_s` what
    was predicted. `request` is what is left: `prompt_tokens` are those that the hops hold,
    `new_tokens` those to come. `replay_s` is what moving costs; None: as predicted for the spans
    that change servers. A whole route is planned, so `request.span` and `excluded` stay empty.
    """
    if measured_s <= max(route.cost.tpot_s * (1 + SLOWER), route.cost.tpot_s + LEAST_S):
        return None
    hops = _on(view, route)
    if hops is None:
        return None  # a hop is not announced any more: it drains or is gone, which others handle
    try:
        better = plan(view, request)
    except NoRoute:
        return None
    changed = _changed(route, better)
    if not changed:
        return None
    present_s = CostModel(view, request).total(hops).tpot_s
    # What the view does not explain would not be saved.
    expected_s = better.cost.tpot_s * max(1.0, measured_s / present_s)
    if replay_s is None:
        replay_s = _replay_s(view, request, better, changed)
    left_s = request.new_tokens * measured_s
    saved_s = left_s - request.new_tokens * expected_s - replay_s
    return better if saved_s > GAIN * left_s else None


def _on(view: SwarmView, route: Route) -> list[tuple[ServerView, Span]] | None:
    """The route's hops as the view sees them now; None if one is not there."""
    hops = []
    for hop in route.hops:
        server = view.by_peer.get(hop.peer_id)
        if server is None or not server.span.covers(hop.span):
            return None
        hops.append((server, hop.span))
    return hops


def _changed(route: Route, better: Route) -> Sequence[int]:
    """The indices of the better route's hops whose cache the present route does not give."""
    held = {(hop.peer_id, hop.span) for hop in route.hops}
    return [i for i, hop in enumerate(better.hops) if (hop.peer_id, hop.span) not in held]


def _replay_s(
    view: SwarmView, request: RouteRequest, better: Route, changed: Sequence[int]
) -> float:
    """To open and replay the changed hops, one after the other as the slower case."""
    costs = CostModel(view, request)
    hops = [(view.by_peer[better.hops[i].peer_id], better.hops[i].span) for i in changed]
    return sum(costs.total([hop]).ttft_s for hop in hops)

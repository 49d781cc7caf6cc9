"""From a view and a request to a route.

The planner decides who may be used; a policy (`p2pllm.routing.policies`) chooses among these; the
planner prices the choice. Servers come in tiers: first the healthy ones of the preferred
numerics, then healthy ones of others, then those that failed us lately, again in that order. A
later tier is let in only for blocks that the earlier ones do not cover, so a poor server is used
where it must be and nowhere else, whatever the policy.

A server appears at most once in a route, since it holds one state per session. Where a policy
does not see to that and comes back to one, the detour is cut out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from p2pllm.errors import ConfigError, LocalProtocolError, NoRoute
from p2pllm.ids import PeerId
from p2pllm.routing.costs import Candidate, CostModel, HopCost, RouteCost
from p2pllm.routing.policies import Choice, Policy, RoutingProblem, get_policy
from p2pllm.routing.request import RouteRequest
from p2pllm.spans import Span, uncovered
from p2pllm.swarm.announcements import ServerState
from p2pllm.swarm.view import LinkSource, ServerView, SwarmView

__all__ = ["Route", "RouteHop", "RouteRequest", "plan"]

DEFAULT_POLICY = "latency"


@dataclass(frozen=True, slots=True)
class RouteHop:
    """These blocks at that server, with what they add to the prefill and to a decode step.

    `rtt_source` says how the round trip to it from this client is known.
    """

    peer_id: PeerId
    span: Span
    prefill: HopCost
    decode: HopCost
    rtt_source: LinkSource


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that cover the asked span in order; `notes` say in words what is unusual about it."""

    hops: tuple[RouteHop, ...]
    cost: RouteCost
    policy: str = DEFAULT_POLICY
    notes: tuple[str, ...] = ()


def plan(view: SwarmView, request: RouteRequest, policy: str | Policy = DEFAULT_POLICY) -> Route:
    """Choose a route for the request; 10 to 100 ms over 500 servers and 100 blocks.

    Raises NoRoute with the spans that no usable server covers, ConfigError for an unknown policy
    or more tokens than any server holds.
    """
    choose = get_policy(policy) if isinstance(policy, str) else policy
    span = request.span or Span(0, view.num_blocks)
    if span.stop > view.num_blocks:
        raise LocalProtocolError(f"blocks {span} of a model with {view.num_blocks}")
    candidates, notes = _candidates(view, request, span)
    costs = CostModel(view, request)
    problem = RoutingProblem(view, request, span, tuple(candidates), costs)
    choices = _without_detours(choose(problem))
    _check(choices, span)
    chosen = [(candidate.server, part) for candidate, part in choices]
    prices = costs.price(chosen)
    hops = tuple(
        RouteHop(
            candidate.server.peer_id,
            part,
            prefill,
            decode,
            view.link(None, candidate.server.peer_id).source,
        )
        for (candidate, part), (prefill, decode) in zip(choices, prices, strict=True)
    )
    name = policy if isinstance(policy, str) else getattr(policy, "__name__", "custom")
    notes += _relayed_links(view, request, hops)
    return Route(hops, costs.total(chosen), name, tuple(notes))


def _relayed_links(
    view: SwarmView, request: RouteRequest, hops: Sequence[RouteHop]
) -> Iterator[str]:
    """What is to be said of links that servers lately failed to use."""
    if request.relayed:
        return
    for hop, after in pairwise(hops):
        if view.is_broken(hop.peer_id, after.peer_id):
            yield f"{hop.peer_id.short} cannot reach {after.peer_id.short}: relayed by the client"


def _candidates(
    view: SwarmView, request: RouteRequest, span: Span
) -> tuple[list[Candidate], list[str]]:
    """Who may be used, for which blocks, and what is to be said about it."""
    tiers: dict[tuple[bool, bool], list[ServerView]] = {}  # (penalised, other numerics)
    refused: Counter[str] = Counter()
    for server in view.servers:
        reason = _why_not(server, request)
        if reason:
            refused[reason] += 1
            continue
        is_other = request.numerics not in (None, server.presence.numerics)
        tiers.setdefault((view.is_penalised(server), is_other), []).append(server)
    candidates: list[Candidate] = []
    notes: list[str] = []
    for (is_penalised, is_other), servers in sorted(tiers.items()):
        gaps = uncovered(span, (candidate.span for candidate in candidates))
        added = [
            Candidate(server, part)
            for server in servers
            for gap in gaps
            if (part := server.span.overlap(gap)) is not None
        ]
        candidates += added
        if added and (is_penalised or is_other):
            what = "failing lately" if is_penalised else f"other than {request.numerics}"
            notes.append(f"blocks {_listed(gaps)}: only servers {what}")
    missing = uncovered(span, (candidate.span for candidate in candidates))
    if missing:
        _check_size(view, request, missing)
        raise NoRoute(_no_route(missing, refused), [(gap.start, gap.stop) for gap in missing])
    return candidates, notes


def _check_size(view: SwarmView, request: RouteRequest, missing: Sequence[Span]) -> None:
    """Raise ConfigError if only the request's length stands between it and a route."""
    blocks = view.by_block()
    limit = min(
        max((server.presence.max_tokens_per_session for server in blocks[block]), default=0)
        for gap in missing
        for block in gap
    )
    if 0 < limit < request.cache_tokens:
        raise ConfigError(
            f"{request.cache_tokens} tokens are asked for (prompt and answer), and the servers "
            f"here hold at most {limit}; ask for fewer new tokens or give a shorter prompt"
        )


def _why_not(server: ServerView, request: RouteRequest) -> str:
    """Why a server cannot be used at all, in words; empty if it can."""
    presence = server.presence
    if presence.state is not ServerState.ONLINE:
        return presence.state.name.lower()
    if presence.peer_id in request.excluded:
        return "excluded"
    if request.is_strict and request.numerics not in (None, presence.numerics):
        return f"not {request.numerics}"
    if request.cache_tokens > presence.max_tokens_per_session:
        return f"unable to hold {request.cache_tokens} tokens"
    return ""


def _without_detours(choices: Sequence[Choice]) -> list[Choice]:
    """The same route with every server at most once, and neighbouring parts of one joined."""
    route: list[Choice] = []
    for candidate, part in choices:
        peer = candidate.server.peer_id
        for index, (earlier, earlier_part) in enumerate(route):
            if earlier.server.peer_id == peer:
                part = Span(earlier_part.start, part.stop)
                del route[index:]
                break
        route.append((candidate, part))
    return route


def _check(choices: Sequence[Choice], span: Span) -> None:
    """A policy may be anyone's experiment: what it chose must be a route all the same."""
    at = span.start
    for candidate, part in choices:
        if part.start != at or not candidate.server.span.covers(part):
            raise LocalProtocolError(f"the policy chose blocks {part} where {at} comes next")
        at = part.stop
    if at != span.stop:
        raise LocalProtocolError(f"the policy stopped at block {at} of {span}")


def _no_route(missing: Sequence[Span], refused: Counter[str]) -> str:
    text = f"no server for blocks {_listed(missing)}"
    if refused:
        others = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
        text += f" (not usable: {others})"
    return text


def _listed(spans: Sequence[Span]) -> str:
    return ", ".join(str(span) for span in spans)

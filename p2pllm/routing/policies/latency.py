"""The default policy: the route of least TTFT + new_tokens × TPOT.

That is a cheapest path in the layered graph, but for two things. The chunks of a long prompt
overlap between hops, which no sum over edges expresses: the search is made with weights that
count all chunks and with such that count one (`CostModel.overlapped`), and the route with the
shorter predicted time is taken. And a server holds one state per
session, so it may stand in a route once, and a path may come back to it: out of a slow server
with many blocks, into a fast one that has some of them, and back. Then the search branches. If A
is left after block i and entered again at block j, a valid route uses A only before j, or only
after i, or for all of i … j. Each is a graph with fewer blocks for some candidate; the branches
are explored cheapest first, so the first path without a return is the best route there is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from p2pllm.errors import LocalProtocolError
from p2pllm.ids import PeerId
from p2pllm.routing.costs import Candidate, CostModel
from p2pllm.routing.dijkstra import shortest_path
from p2pllm.routing.graph import LayeredGraph
from p2pllm.routing.policies.registry import Choice, RoutingProblem, register
from p2pllm.spans import Span

MAX_SEARCHES = 32  # then the planner cuts out what returns are left; see `plan`


@dataclass(frozen=True, slots=True)
class _Return:
    """A path leaves `peer` after block `left_after` and enters it again at `entered_at`."""

    peer: PeerId
    left_after: int
    entered_at: int


@register("latency")
def choose_fastest(problem: RoutingProblem) -> list[Choice]:
    """The hops of the best route: of the two that the two kinds of weights lead to."""
    routes = [_cheapest(problem, problem.costs)]
    overlapped = problem.costs.overlapped()
    if overlapped is not None:
        routes.append(_cheapest(problem, overlapped))

    def predicted_s(choices: Sequence[Choice]) -> float:
        hops = [(candidate.server, part) for candidate, part in choices]
        return problem.costs.objective_s(problem.costs.total(hops))

    return min(routes, key=predicted_s)


def _cheapest(problem: RoutingProblem, costs: CostModel) -> list[Choice]:
    """The hops of a cheapest path by these weights."""
    found: list[tuple[float, int, Sequence[Candidate], list[Choice]]] = []
    branches: Iterator[Sequence[Candidate]] = iter([problem.candidates])
    num_searches = 0  # also orders the heap where costs are equal
    while True:
        for candidates in branches:
            num_searches += 1
            graph = LayeredGraph(costs, candidates, problem.span)
            path = shortest_path(graph.source, graph.target, graph.edges)
            if path is not None:
                choices = [(candidates[index], span) for index, span in graph.hops(path[1])]
                heappush(found, (path[0], num_searches, candidates, choices))
        if not found:
            raise LocalProtocolError(f"the candidates do not cover blocks {problem.span}")
        _, _, candidates, choices = heappop(found)
        again = _first_return(choices)
        if again is None or num_searches >= MAX_SEARCHES:
            return choices
        branches = _branches(candidates, again)


def _first_return(choices: Sequence[Choice]) -> _Return | None:
    left_after: dict[PeerId, int] = {}
    for candidate, part in choices:
        peer = candidate.server.peer_id
        if peer in left_after:
            return _Return(peer, left_after[peer], part.start)
        left_after[peer] = part.stop - 1
    return None


def _branches(candidates: Sequence[Candidate], again: _Return) -> Iterator[Sequence[Candidate]]:
    """The three ways not to return, as in the module's text."""
    own = [c for c in candidates if c.server.peer_id == again.peer]
    others = [c for c in candidates if c.server.peer_id != again.peer]
    stop = max(c.span.stop for c in own)
    yield [*_outside(own, Span(again.entered_at, stop)), *others]
    yield [*_outside(own, Span(0, again.left_after + 1)), *others]
    yield [*own, *_outside(others, Span(again.left_after, again.entered_at + 1))]


def _outside(candidates: Sequence[Candidate], hole: Span) -> Iterator[Candidate]:
    """The candidates without the blocks of `hole`."""
    for candidate in candidates:
        start, stop = candidate.span.start, candidate.span.stop
        if start < hole.start:
            yield Candidate(candidate.server, Span(start, min(stop, hole.start)))
        if stop > hole.stop:
            yield Candidate(candidate.server, Span(max(start, hole.stop), stop))

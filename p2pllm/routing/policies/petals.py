"""Petals' "min_latency" routing, to compare with.

After `RemoteSequenceManager._build_inference_graph` of bigscience-workshop/petals at its last
commit, constants included: a server may be entered inside its span and left only at its end, the
price of a hop is half a round trip, 18 ms of overhead and 10 s where the cache looks full, a
block costs the inverse of the announced steps per second, and servers are priced as if they
pushed to each other, whether or not they do. Queues, bandwidth, batch and prefill have no term.
"""

from collections.abc import Iterator

from p2pllm.errors import LocalProtocolError
from p2pllm.routing.costs import Candidate
from p2pllm.routing.dijkstra import shortest_path
from p2pllm.routing.policies.registry import Choice, RoutingProblem, register
from p2pllm.spans import Span
from p2pllm.swarm.view import SwarmView

OVERHEAD_S = 0.018  # per server, "empirically measured"
ALLOC_DELAY_S = 10.0
UNKNOWN_DELAY_S = 0.15  # one way
MAX_DELAY_S = 5.0

_START, _END = -1, -2
_Node = tuple[int, int]  # (candidate, _START or _END; block)


@register("petals")
def choose_as_petals(problem: RoutingProblem) -> list[Choice]:
    """The hops of a cheapest path by Petals' price list."""
    span = problem.span
    found = shortest_path(
        (_START, span.start), (_END, span.stop), lambda node: _edges(problem, node)
    )
    if found is None:
        raise LocalProtocolError(f"the candidates do not cover blocks {span}")
    entries = [node for node in found[1] if node[0] >= 0]
    return [
        (problem.candidates[index], Span(start, problem.candidates[index].span.stop))
        for index, start in entries
    ]


def _edges(problem: RoutingProblem, node: _Node) -> Iterator[tuple[_Node, float]]:
    """A node (server, block) stands for having entered the server there."""
    index, block = node
    if index == _START:
        for other, candidate in enumerate(problem.candidates):
            if block in candidate.span:
                yield (other, block), _delay(candidate.server.rtt_s) + _entry(problem, candidate)
        return
    source = problem.candidates[index]
    stop = source.span.stop
    compute_s = (stop - block) * source.server.presence.seconds_per_block_1
    if stop == problem.span.stop:
        yield (_END, stop), compute_s + _delay(source.server.rtt_s)
        return
    for other, candidate in enumerate(problem.candidates):
        if stop in candidate.span:
            delay_s = _delay(_next_ping(problem.view, source, candidate))
            yield (other, stop), compute_s + delay_s + _entry(problem, candidate)


def _entry(problem: RoutingProblem, candidate: Candidate) -> float:
    """Petals' room check counts keys and values of every block of the span; per token of the
    whole span, as we announce it, that is this comparison."""
    needed = problem.request.batch * problem.request.cache_tokens
    has_room = needed <= candidate.server.presence.free_tokens
    return OVERHEAD_S if has_room else OVERHEAD_S + ALLOC_DELAY_S


def _next_ping(view: SwarmView, source: Candidate, target: Candidate) -> float | None:
    """What `source` announced of `target`; Petals knows no other distance between servers."""
    return view.announced_rtts.get((source.server.peer_id, target.server.peer_id))


def _delay(rtt_s: float | None) -> float:
    return UNKNOWN_DELAY_S if rtt_s is None else min(rtt_s / 2, MAX_DELAY_S)

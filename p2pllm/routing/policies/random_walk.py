"""Random routes, as Petals draws them for forward and backward ("max_throughput").

From left to right: at each block a server is drawn with a probability proportional to the length
of its span, and used to its end. It spreads load evenly and knows nothing of distance.
"""

from random import Random

from p2pllm.routing.policies.registry import Choice, RoutingProblem, register
from p2pllm.spans import Span


@register("random")
def choose_at_random(problem: RoutingProblem) -> list[Choice]:
    """Hops drawn with the request's seed (None: as 0)."""
    rng = Random(problem.request.seed or 0)
    choices: list[Choice] = []
    block = problem.span.start
    while block < problem.span.stop:
        holders = [candidate for candidate in problem.candidates if block in candidate.span]
        drawn = rng.choices(holders, [len(holder.span) for holder in holders])[0]
        choices.append((drawn, Span(block, drawn.span.stop)))
        block = drawn.span.stop
    return choices

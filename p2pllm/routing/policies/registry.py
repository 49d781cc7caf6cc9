"""The place where a policy makes itself known, and what one has to be.

A policy chooses among candidates that the planner has already sifted (online, able to hold the
session, not excluded, of the preferred numerics, not penalised, as far as the blocks can be
covered that way); the planner prices what it chose. To try another one:

    @register("mine")
    def choose(problem: RoutingProblem) -> list[Choice]: ...

    plan(view, request, "mine")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from p2pllm.errors import ConfigError, LocalProtocolError
from p2pllm.routing.costs import Candidate, CostModel
from p2pllm.routing.request import RouteRequest
from p2pllm.spans import Span
from p2pllm.swarm.view import SwarmView

Choice = tuple[Candidate, Span]  # these blocks at that server


@dataclass(frozen=True, slots=True)
class RoutingProblem:
    """Cover `span` with blocks of `candidates`, every block of it held by at least one."""

    view: SwarmView
    request: RouteRequest
    span: Span
    candidates: tuple[Candidate, ...]
    costs: CostModel


class Policy(Protocol):
    """Chooses the hops, in order, that cover the problem's span exactly."""

    def __call__(self, problem: RoutingProblem) -> Sequence[Choice]: ...


P = TypeVar("P", bound=Policy)
_POLICIES: dict[str, Policy] = {}


def register(name: str) -> Callable[[P], P]:
    """Make a policy known under a name, which must be free."""

    def enter(policy: P) -> P:
        if name in _POLICIES:
            raise LocalProtocolError(f"a policy named {name!r} is registered already")
        _POLICIES[name] = policy
        return policy

    return enter


def policy_names() -> list[str]:
    """The names of all known policies."""
    return sorted(_POLICIES)


def get_policy(name: str) -> Policy:
    """The policy of that name; raises ConfigError with the known ones."""
    if name not in _POLICIES:
        raise ConfigError(f"unknown routing policy {name!r}; known: {', '.join(policy_names())}")
    return _POLICIES[name]

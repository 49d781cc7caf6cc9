"""Ways to choose a route. Importing the package registers those that come with p2pllm."""

from p2pllm.routing.policies import latency, petals, random_walk
from p2pllm.routing.policies.registry import (
    Choice,
    Policy,
    RoutingProblem,
    get_policy,
    policy_names,
    register,
)

__all__ = [
    "Choice",
    "Policy",
    "RoutingProblem",
    "get_policy",
    "latency",
    "petals",
    "policy_names",
    "random_walk",
    "register",
]

"""Dijkstra's shortest path (1959), over any graph that can name a node's edges.

Nodes are any hashable values and edges are produced when a node is reached, so only the part of
the graph that is nearer than the target is ever built. Equal costs are settled in the order in
which they were found: the same graph always gives the same path.
"""

from collections.abc import Callable, Hashable, Iterable
from heapq import heappop, heappush
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def shortest_path(
    source: Node, target: Node, edges: Callable[[Node], Iterable[tuple[Node, float]]]
) -> tuple[float, list[Node]] | None:
    """The cost and the nodes of a cheapest path from `source` to `target`, or None.

    `edges(node)` gives (neighbour, cost) pairs; costs must not be negative.
    """
    costs: dict[Node, float] = {source: 0.0}
    came_from: dict[Node, Node] = {}
    frontier: list[tuple[float, int, Node]] = [(0.0, 0, source)]
    num_found = 0  # the second key of the heap: nodes themselves are never compared
    unreached = float("inf")
    while frontier:
        cost, _, node = heappop(frontier)
        if cost > costs[node]:
            continue  # a cheaper way here was found after this entry was pushed
        if node == target:
            return cost, _walk_back(source, target, came_from)
        for neighbour, step in edges(node):
            reached = cost + step
            if reached < costs.get(neighbour, unreached):
                costs[neighbour] = reached
                came_from[neighbour] = node
                num_found += 1
                heappush(frontier, (reached, num_found, neighbour))
    return None


def _walk_back(source: Node, target: Node, came_from: dict[Node, Node]) -> list[Node]:
    path = [target]
    while path[-1] != source:
        path.append(came_from[path[-1]])
    return path[::-1]

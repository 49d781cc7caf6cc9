"""Dijkstra's search on small graphs, and against brute force."""

from collections.abc import Iterator
from itertools import pairwise, permutations

from hypothesis import given
from hypothesis import strategies as st

from p2pllm.routing.dijkstra import shortest_path

Weights = dict[tuple[int, int], float]


def edges_of(weights: Weights, node: int) -> list[tuple[int, float]]:
    return [(target, cost) for (source, target), cost in weights.items() if source == node]


def search(weights: Weights, source: int, target: int) -> tuple[float, list[int]] | None:
    return shortest_path(source, target, lambda node: edges_of(weights, node))


def test_the_cheapest_path_is_found_though_it_has_more_edges() -> None:
    weights = {(0, 3): 10.0, (0, 1): 1.0, (1, 2): 1.0, (2, 3): 1.0}
    assert search(weights, 0, 3) == (3.0, [0, 1, 2, 3])


def test_an_unreachable_target_gives_none() -> None:
    assert search({(0, 1): 1.0, (2, 3): 1.0}, 0, 3) is None


def test_a_path_from_a_node_to_itself_is_empty() -> None:
    assert search({(0, 1): 1.0}, 0, 0) == (0.0, [0])


def test_of_equal_paths_the_one_found_first_is_taken() -> None:
    weights = {(0, 2): 1.0, (0, 1): 1.0, (1, 3): 1.0, (2, 3): 1.0}
    assert search(weights, 0, 3) == (2.0, [0, 2, 3])


def test_nodes_farther_than_the_target_are_never_expanded() -> None:
    expanded = []

    def edges(node: int) -> Iterator[tuple[int, float]]:
        expanded.append(node)
        yield from edges_of({(0, 1): 1.0, (0, 2): 5.0, (2, 3): 1.0}, node)

    shortest_path(0, 1, edges)
    assert expanded == [0]


NODES = range(5)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)),
        st.integers(0, 9).map(float),
        max_size=20,
    )
)
def test_the_cost_is_that_of_the_best_of_all_paths(weights: Weights) -> None:
    inner = [node for node in NODES if node not in (0, 4)]
    paths = [
        (0, *middle, 4)
        for length in range(len(inner) + 1)
        for middle in permutations(inner, length)
    ]
    infinity = float("inf")
    best = min(sum(weights.get(step, infinity) for step in pairwise(path)) for path in paths)
    found = search(weights, 0, 4)
    assert (infinity if found is None else found[0]) == best

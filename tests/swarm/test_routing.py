"""The router tells the truth: on shaped swarms its predictions are what is measured afterwards.

All topologies with all their chains: `tools/bench routing`.
"""

import pytest

from p2pllm.sim.loop import run
from p2pllm.sim.topologies import TOPOLOGIES, Chain, Run, Topology, examine

WITHIN = 0.20  # of the measured time
AS_GOOD = 0.05  # as the best chain
BY_NAME = {topology.name: topology for topology in TOPOLOGIES}

# Of each topology one chain that ought to be good and one that ought not.
TRIED: list[tuple[str, tuple[Chain, ...]]] = [
    ("LAN", (("a1", "a2", "a3"), ("b1", "b2", "b3"))),
    ("two continents", (("a1", "a2", "a3"), ("b1", "b2", "b3"))),
    ("one slow link", (("a1", "b2", "a3"), ("a1", "a2", "a3"))),
    ("one slow server", (("a1", "b2", "a3"), ("a1", "a2", "a3"))),
    ("one busy server", (("a1", "b2", "a3"), ("a1", "a2", "a3"))),
]


def assert_is_true(measured: Run) -> None:
    assert abs(measured.ttft_error) <= WITHIN
    assert abs(measured.tpot_error) <= WITHIN


@pytest.mark.parametrize(("name", "chains"), TRIED)
def test_predictions_hold_and_the_chosen_chain_is_as_good_as_the_best(
    name: str, chains: tuple[Chain, ...]
) -> None:
    topology: Topology = BY_NAME[name]
    report = run(examine(topology, chains))

    assert_is_true(report.first)
    assert_is_true(report.second)
    assert report.regret <= AS_GOOD

"""Placement with real processes: servers that choose their blocks, are killed, and come back."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

import pytest

import p2pllm.sync
from p2pllm.spans import Span, uncovered
from tests.real.conftest import Launch, NodeProcess

NUM_BLOCKS = 30
COVERED_WITHIN_S = 15.0  # after the last one has loaded its blocks
MOVED_WITHIN_S = 60.0
POLL_S = 0.1
HALF = ["--num-blocks", "15", "--dtype", "float32", "--cache-sessions", "2"]

pytestmark = pytest.mark.slow(240)


@pytest.fixture(scope="module")
def entry(launch: Launch) -> str:
    node = launch("bootstrap")
    node.wait_until_ready()
    return node.address


@pytest.fixture(scope="module")
def halves(launch: Launch, entry: str) -> list[NodeProcess]:
    """Four servers of half the model each, started at once."""
    nodes = [launch("serve", *HALF, "--peers", entry) for _ in range(4)]
    for node in nodes:
        node.wait_until_ready()
    return nodes


def blocks(node: NodeProcess) -> Span:
    """What it serves now: the ready file is written anew after a move."""
    node.wait_until_ready()
    return Span.parse(node.ready["blocks"])


def missing(nodes: list[NodeProcess]) -> tuple[Span, ...]:
    return uncovered(Span(0, NUM_BLOCKS), [blocks(node) for node in nodes if not node.is_dead])


def seconds_until(is_so: Callable[[], bool], limit_s: float) -> float:
    """How long it takes until something holds that other processes bring about.

    They tell of it by a file, so it is looked at again and again; what is asserted is the limit.
    """
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < limit_s
        time.sleep(POLL_S)
    return time.monotonic() - started


def test_four_that_start_at_once_cover_the_model(
    halves: list[NodeProcess], entry: str, record_property: Callable[[str, object], None]
) -> None:
    took_s = seconds_until(lambda: not missing(halves), COVERED_WITHIN_S)
    record_property("covered_after_s", took_s)
    status = [sys.executable, "-m", "p2pllm", "status", "--peers", entry, "--json"]
    shown = subprocess.run(status, capture_output=True, text=True, check=True)
    (model,) = json.loads(shown.stdout)["models"]
    assert model["missing"] == []


def test_a_server_that_is_killed_and_started_again_has_its_place(
    halves: list[NodeProcess], entry: str
) -> None:
    place = blocks(halves[0])
    halves[0].kill()
    halves[0].launch()
    halves[0].wait_until_ready()
    assert blocks(halves[0]) == place


def test_another_moves_where_all_servers_of_a_span_were_killed(
    halves: list[NodeProcess], entry: str, record_property: Callable[[str, object], None]
) -> None:
    counts = Counter(blocks(node) for node in halves)
    rarest = min(counts, key=lambda span: (counts[span], span))
    for node in halves:
        if blocks(node) == rarest:
            node.kill()
    assert missing(halves)
    took_s = seconds_until(lambda: not missing(halves), MOVED_WITHIN_S)
    record_property("moved_after_s", took_s)
    with p2pllm.sync.connect([entry], dtype="float32", wire_codec="raw") as swarm:
        pieces = swarm.model().generate("The capital of France is", max_new_tokens=4)
        assert "Paris" in "".join(pieces)


def test_a_server_that_is_told_to_stop_waits_for_its_sessions(launch: Launch) -> None:
    """Nobody else has the blocks, so that the session cannot move: a second signal ends it."""
    lonely = launch("serve", "--new-swarm", *HALF[2:], "--swarm", "alone", "--blocks", "0:30")
    lonely.wait_until_ready()
    options = ["--swarm", "alone", "--max-new-tokens", "2000", "--ignore-eos", "--peers"]
    command = [sys.executable, "-m", "p2pllm", "generate", "Once", *options, lonely.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        assert client.stdout.read(1)  # it has a session
        lonely.interrupt()
        seconds_until(lambda: "waiting for 1 session to move" in lonely.said, 10.0)
        assert not lonely.is_dead
        lonely.interrupt()
        seconds_until(lambda: lonely.is_dead, 5.0)
        client.send_signal(signal.SIGINT)

"""Servers of real processes die or hang while eight texts are generated: no token changes."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import p2pllm
from p2pllm.client.generation import Generation
from p2pllm.client.model import SwarmModel
from p2pllm.client.results import GenerationResult
from p2pllm.ids import PeerId

Case = dict[str, Any]
VECTORS = Path(__file__).parent.parent / "vectors" / "smollm2_135m_greedy.json"
CASES: list[Case] = json.loads(VECTORS.read_text())["cases"]
EXPECTED = [case["greedy_ids"] for case in CASES]
NUM_TOKENS = 48

SPANS = ("0:10", "10:20", "20:30")
# Their speed is stated: six processes that start at once cannot measure it.
SETTINGS = ("--dtype", "float32", "--throughput", "1e4")

Act = Callable[["Strikes"], None]

pytestmark = pytest.mark.slow(240)


@pytest.fixture(scope="module")
def swarm(launch: Any) -> list[Any]:
    """Two servers for every span; the first one begins the swarm."""
    first = launch("serve", "--new-swarm", "--blocks", SPANS[0], *SETTINGS)
    first.wait_until_ready()
    others = [
        launch("serve", "--peers", first.address, "--blocks", span, *SETTINGS)
        for span in (*SPANS[1:], *SPANS)
    ]
    for other in others:
        other.wait_until_ready()
    return [first, *others]


@pytest.fixture
def servers(swarm: list[Any]) -> list[Any]:
    """All of them, alive, whatever another test has done."""
    dead = [server for server in swarm if server.is_dead]
    for server in dead:
        server.launch()
    for server in dead:
        server.wait_until_ready()
    return swarm


@dataclass
class Strikes:
    """What happens to the servers when the first text has so many tokens."""

    servers: list[Any]
    acts: dict[int, Act]
    victims: list[Any] = field(default_factory=list)
    hops: list[Any] = field(default_factory=list)  # of the first text, when it was last struck

    def on_token(self, generation: Generation, num_tokens: int) -> None:
        if num_tokens in self.acts:
            hops = generation.results()[0].route
            self.hops = [self._server_of(hop.peer_id) for hop in hops]
            self.acts[num_tokens](self)

    def _server_of(self, peer: PeerId) -> Any:
        return next(server for server in self.servers if server.peer == peer)


def kill(index: int) -> Act:
    """kill -9 of a hop."""

    def act(strikes: Strikes) -> None:
        strikes.victims.append(strikes.hops[index])
        strikes.hops[index].kill()

    return act


def pause(index: int) -> Act:
    """SIGSTOP of a hop."""

    def act(strikes: Strikes) -> None:
        strikes.victims.append(strikes.hops[index])
        strikes.hops[index].pause()

    return act


def wake(strikes: Strikes) -> None:
    """SIGCONT of the last one that was stopped."""
    strikes.victims[-1].resume()


async def _answers(model: SwarmModel, strikes: Strikes) -> list[GenerationResult]:
    """All reference texts at once."""

    async def answer(case: Case) -> GenerationResult:
        prompt = case["messages"] or case["prompt"]
        async with model.generate(prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True) as generation:
            num_tokens = 0
            async for _ in generation:
                num_tokens += 1
                if case is CASES[0]:
                    strikes.on_token(generation, num_tokens)
            return generation.results()[0]

    return await asyncio.gather(*map(answer, CASES))


def _assert_exact_under(strikes: Strikes) -> None:
    """The texts are the reference's, and the first one noticed every strike."""

    async def main() -> list[GenerationResult]:
        addresses = [server.address for server in strikes.servers]
        async with p2pllm.connect(addresses, dtype="float32", wire_codec="raw") as swarm:
            return await _answers(await swarm.model(), strikes)

    results = asyncio.run(main())
    assert [list(result.token_ids) for result in results] == EXPECTED
    lost = [peer for recovery in results[0].recoveries for peer, _ in recovery.lost]
    assert lost == [victim.peer for victim in strikes.victims]


def test_hops_that_hang_are_replaced_and_do_no_harm_when_they_wake_up(servers: list[Any]) -> None:
    acts = {4: pause(0), 16: wake, 20: pause(2), 32: wake}
    _assert_exact_under(Strikes(servers, acts))


def test_every_hop_is_killed_in_turn_and_no_token_of_eight_texts_changes(
    servers: list[Any],
) -> None:
    _assert_exact_under(Strikes(servers, {4: kill(0), 16: kill(1), 28: kill(2)}))

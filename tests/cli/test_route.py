"""Showing a route, for people and for programs."""

import json

import pytest

from p2pllm.cli import route
from p2pllm.cli.looking import SeenModel
from p2pllm.ids import ModelId, PeerId
from p2pllm.routing.planner import Route, RouteRequest, plan
from p2pllm.routing.request import Objective
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence
from p2pllm.swarm.view import ServerView, SwarmView
from p2pllm.wire.messages import Numerics
from tests.cli.conftest import Terminal

SEEN = SeenModel(ModelId(bytes(32), "tiny"), 4, 8)
SERVER = ServerView(
    Presence(
        PeerId(bytes(32)),
        Span(0, 4),
        Numerics("float32"),
        seconds_per_block_1=0.01,
        free_tokens=10_000,
        max_tokens_per_session=1000,
    ),
    rtt_s=0.02,
)


def show(
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    *more: str,
    asked: list[RouteRequest] | None = None,
) -> str:
    async def planned(
        _config: object, _network: object, _model: str, request: RouteRequest, _itemsize: int
    ) -> tuple[SeenModel, Route]:
        if asked is not None:
            asked.append(request)
        return SEEN, plan(SwarmView(SEEN.model, 4, (SERVER,)), request)

    monkeypatch.setattr(route, "_plan", planned)
    result = terminal.type("route", "--peers", "127.0.0.1:4", *more)
    assert result.exit_code == 0
    return result.stdout


def test_each_term_of_the_cost_is_shown(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = show(terminal, monkeypatch)
    for name in ("rtt", "transfer", "queue", "compute", "overhead", "cache wait", "total"):
        assert name in shown
    assert "0:4" in shown
    assert "policy: latency" in shown


def test_the_times_are_explained_and_the_explanation_adds_up(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--prompt-tokens", "600", "--own-ms", "4")
    shown = show(terminal, monkeypatch, *flags)
    assert "a chunk of 256 tokens through the chain" in shown
    assert "2 more that overlap with it" in shown
    assert "this computer 4.0" in shown
    described = json.loads(show(terminal, monkeypatch, *flags, "--json"))
    assert sum(described["ttft_ms"].values()) == pytest.approx(described["ttft_s"] * 1e3)


def test_the_objective_is_asked_for(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RouteRequest] = []
    show(terminal, monkeypatch, "--objective", "first-token", asked=asked)
    assert asked[0].objective is Objective.FIRST_TOKEN


def test_json_has_the_terms_in_milliseconds(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hop,) = json.loads(show(terminal, monkeypatch, "--json"))["hops"]
    assert hop["blocks"] == "0:4"
    assert hop["decode_ms"]["rtt"] == pytest.approx(20.0)
    assert hop["decode_ms"]["compute"] == pytest.approx(40.0)
    terms = ("rtt", "transfer", "queue", "compute", "overhead", "cache_wait")
    assert sum(hop["decode_ms"][term] for term in terms) == pytest.approx(hop["decode_ms"]["total"])


@pytest.mark.parametrize(("flags", "is_relayed"), [([], False), (["--no-chain"], True)])
def test_a_chain_is_priced_unless_it_is_switched_off(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, flags: list[str], is_relayed: bool
) -> None:
    asked: list[RouteRequest] = []
    show(terminal, monkeypatch, *flags, asked=asked)
    assert [request.relayed for request in asked] == [is_relayed]

"""Drawing a swarm, for people and for programs."""

import json
from dataclasses import replace

import pytest

from p2pllm.cli import status
from p2pllm.cli.looking import SeenModel, matching, only_one
from p2pllm.errors import ConfigError, NoRoute
from p2pllm.ids import ModelId, PeerId
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence
from p2pllm.swarm.view import ServerView, SwarmView
from p2pllm.wire.messages import Numerics
from tests.cli.conftest import Terminal

MODEL = ModelId(bytes(32), "tiny")


def a_view(*spans: str) -> SwarmView:
    servers = [
        ServerView(
            Presence(PeerId(bytes([number]) * 32), Span.parse(span), Numerics("float32")),
            rtt_s=0.01,
        )
        for number, span in enumerate(spans)
    ]
    return SwarmView(MODEL, 6, tuple(servers))


def show(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, views: list[SwarmView], *more: str
) -> str:
    async def look(*_: object) -> list[SwarmView]:
        return views

    monkeypatch.setattr(status, "_look", look)
    result = terminal.type("status", "--peers", "127.0.0.1:4", *more)
    assert result.exit_code == 0
    return result.stdout


def test_missing_blocks_are_named(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = show(terminal, monkeypatch, [a_view("0:2", "4:6")])
    assert "Nobody serves blocks 2:4" in shown


def test_a_whole_model_says_how_often_each_block_is_served(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = show(terminal, monkeypatch, [a_view("0:6", "0:3", "3:6")])
    assert "each by 2 servers or more" in shown


def test_a_server_that_does_not_answer_does_not_count(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = a_view("0:3", "3:6")
    dead = replace(view.servers[1], penalty_until=view.taken_at + 1)
    shown = show(terminal, monkeypatch, [replace(view, servers=(view.servers[0], dead))])
    assert "no answer" in shown
    assert "Nobody serves blocks 3:6" in shown


def test_an_empty_swarm_says_how_to_begin(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "p2pllm serve" in show(terminal, monkeypatch, [])


def test_json_has_every_server_and_what_is_missing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = json.loads(show(terminal, monkeypatch, [a_view("2:4", "0:2")], "--json"))["models"]
    assert (model["model"], model["num_blocks"], model["missing"]) == ("tiny", 6, ["4:6"])
    assert [server["blocks"] for server in model["servers"]] == ["0:2", "2:4"]
    assert model["servers"][0]["rtt_s"] == 0.01


@pytest.mark.parametrize(
    ("span", "num_blocks", "bar"),
    [("1:3", 4, "·██·"), ("0:1", 80, "█" + "·" * 39), ("0:4", 4, "████")],
)
def test_a_bar_shows_where_a_span_lies(span: str, num_blocks: int, bar: str) -> None:
    assert status._bar(Span.parse(span), num_blocks) == bar


# --- which model is meant --------------------------------------------------------------------

SMALL = SeenModel(ModelId(b"\xaa" * 32, "small"), 4, 8)
LARGE = SeenModel(ModelId(b"\xbb" * 32, "owner/large"), 40, 8)


@pytest.mark.parametrize("wanted", ["small", "./models/small.gguf", "aaaa", "small@aaaaaaaa"])
def test_a_model_is_found_by_name_path_or_digest(wanted: str) -> None:
    assert matching([SMALL, LARGE], wanted) == [SMALL]


def test_a_model_that_nobody_serves_is_an_error_that_lists_the_others() -> None:
    with pytest.raises(ConfigError, match="small@aaaaaaaa, owner/large@bbbbbbbb"):
        matching([SMALL, LARGE], "medium")


def test_the_only_model_needs_no_name_and_the_default_goes_before_others() -> None:
    assert only_one([LARGE], "", "small") == LARGE
    assert only_one([SMALL, LARGE], "", "small") == SMALL


def test_of_several_models_one_must_be_named() -> None:
    with pytest.raises(ConfigError, match="--model"):
        only_one([SMALL, LARGE], "", "default")


def test_a_swarm_without_any_model_has_no_route() -> None:
    with pytest.raises(NoRoute):
        only_one([], "", "default")

"""What nodes are made of: identity, saved table, ready file."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import pytest

from p2pllm.addresses import Address
from p2pllm.cli.nodes import (
    identity_of,
    join_line,
    listening_node,
    prepare_ready_file,
    span_memory,
    write_ready_file,
)
from p2pllm.cli.options import NodeOptions
from p2pllm.config import ShaperConfig
from p2pllm.errors import ConfigError
from p2pllm.ids import ModelId, PeerId
from p2pllm.spans import Span
from p2pllm.swarm.node import Node

CONTEXT = click.Context(click.Command("serve"))
PEER = PeerId(bytes(32))
OPTIONS = NodeOptions(
    swarm="main",
    peers=((Address("203.0.113.7", 1),),),
    new_swarm=False,
    listen=("0.0.0.0", 31337),
    announce=(),
    identity=None,
    ready_file=None,
    shape=ShaperConfig(),
)
A_NODE = cast(Node, SimpleNamespace(peer_id=PEER, addresses=(Address("127.0.0.1", 5, PEER),)))


def test_a_node_keeps_its_identity_where_it_listens() -> None:
    assert identity_of(OPTIONS).peer_id == identity_of(OPTIONS).peer_id


@pytest.mark.parametrize(
    "other", [replace(OPTIONS, swarm="home"), replace(OPTIONS, listen=("0.0.0.0", 31338))]
)
def test_nodes_of_one_computer_do_not_share_an_identity(other: NodeOptions) -> None:
    assert identity_of(OPTIONS).peer_id != identity_of(other).peer_id


def test_a_node_on_any_free_port_is_new_each_time_and_leaves_nothing(home: Path) -> None:
    options = replace(OPTIONS, listen=("127.0.0.1", 0))
    assert identity_of(options).peer_id != identity_of(options).peer_id
    assert listening_node(CONTEXT, options).table_path == ""
    assert list(home.iterdir()) == []


def test_an_identity_file_is_made_and_used_again(home: Path) -> None:
    options = replace(OPTIONS, identity=home / "my.key")
    assert identity_of(options).peer_id == identity_of(options).peer_id
    assert (home / "my.key").stat().st_mode & 0o077 == 0


def test_a_server_remembers_its_span_per_model_beside_its_key(home: Path) -> None:
    options = replace(OPTIONS, identity=home / "my.key")
    model, other = ModelId(b"m" * 32, "one name"), ModelId(b"o" * 32)
    span_memory(options).write(model, Span(10, 20))
    assert span_memory(options).read(replace(model, name="another")) == Span(10, 20)
    assert span_memory(options).read(other) is None
    assert [path.name for path in home.iterdir()] == ["my.key.span"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "6d", "blocks": "1:2"}', "\xff"])
def test_a_memory_that_is_none_is_as_good_as_none(home: Path, text: str) -> None:
    (home / "my.key.span").write_text(text)
    assert span_memory(replace(OPTIONS, identity=home / "my.key")).read(ModelId(b"m" * 32)) is None


def test_a_span_that_does_not_parse_is_not_remembered(home: Path) -> None:
    content = {"model": (b"m" * 32).hex(), "blocks": "7"}
    (home / "my.key.span").write_text(json.dumps(content))
    assert span_memory(replace(OPTIONS, identity=home / "my.key")).read(ModelId(b"m" * 32)) is None


def test_a_node_without_a_place_remembers_nothing(home: Path) -> None:
    memory = span_memory(replace(OPTIONS, listen=("127.0.0.1", 0)))
    memory.write(ModelId(b"m" * 32), Span(0, 1))
    assert memory.read(ModelId(b"m" * 32)) is None
    assert list(home.iterdir()) == []


def test_the_table_is_kept_per_swarm_and_a_new_swarm_reads_none() -> None:
    table = listening_node(CONTEXT, OPTIONS).table_path
    assert table.endswith(".table")
    assert listening_node(CONTEXT, replace(OPTIONS, swarm="a/b")).table_path != table
    new = replace(OPTIONS, peers=(), new_swarm=True)
    assert listening_node(CONTEXT, new).table_path == ""


def test_the_ready_file_says_where_who_and_what(home: Path) -> None:
    path = home / "ready.json"
    write_ready_file(path, A_NODE, "smollm2-135m", Span(10, 20))
    content = json.loads(path.read_text())
    assert content == {
        "peer_id": str(PEER),
        "addresses": [f"{PEER}@127.0.0.1:5"],
        "model": "smollm2-135m",
        "blocks": "10:20",
    }
    assert Address.parse(content["addresses"][0]).peer_id == PEER
    assert list(home.iterdir()) == [path]  # nothing half written is left


def test_an_old_ready_file_is_taken_away(home: Path) -> None:
    path = home / "ready.json"
    path.write_text("{}")
    prepare_ready_file(path)
    assert not path.exists()


def test_a_ready_file_that_cannot_be_written_is_an_error_that_names_it(home: Path) -> None:
    path = home / "nowhere" / "ready.json"
    with pytest.raises(ConfigError, match="nowhere"):
        write_ready_file(path, A_NODE)


def test_the_join_line_can_be_pasted() -> None:
    assert join_line([Address("h", 1), Address("::1", 2)], "main") == "--peers h:1,[::1]:2"
    assert join_line([Address("h", 1)], "home") == "--swarm home --peers h:1"

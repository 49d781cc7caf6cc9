"""From options to what a node is made of: its configuration, its identity, its ready file."""

import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from p2pllm.addresses import Address
from p2pllm.cli.options import ClientOptions, NodeOptions, chosen_peers
from p2pllm.config import ClientConfig, DhtConfig, NetConfig, NodeConfig, ServerConfig
from p2pllm.errors import ConfigError

if TYPE_CHECKING:
    from p2pllm.identity import Identity
    from p2pllm.ids import ModelId
    from p2pllm.spans import Span
    from p2pllm.swarm.node import Node

logger = logging.getLogger(__name__)


def listening_node(
    ctx: click.Context, options: NodeOptions, server: ServerConfig | None = None
) -> NodeConfig:
    """The configuration of a server or bootstrap node."""
    host, port = options.listen
    net = NetConfig(
        network_id=options.swarm,
        listen_host=host,
        listen_port=port,
        announce=tuple(address for group in options.announce for address in group),
        shaper=options.shape,
    )
    if options.new_swarm and options.peers:
        raise click.UsageError("--new-swarm begins a swarm and --peers joins one: give one", ctx)
    peers = () if options.new_swarm else tuple(chosen_peers(ctx, options.peers))
    # A new swarm must not find back to an old one of that name; a node on any free port leaves
    # nothing behind.
    is_kept = port and not options.new_swarm
    table = str(_cache_path() / "tables" / f"{_place(options)}.table") if is_kept else ""
    return NodeConfig(net, DhtConfig(), peers, table, server or ServerConfig())


def asking_node(
    ctx: click.Context, options: ClientOptions, client: ClientConfig | None = None
) -> NodeConfig:
    """The configuration of a client."""
    net = NetConfig(network_id=options.swarm, is_listening=False, shaper=options.shape)
    peers = tuple(chosen_peers(ctx, options.peers))
    return NodeConfig(net, DhtConfig(is_client=True), peers, client=client or ClientConfig())


def identity_of(options: NodeOptions | ClientOptions) -> "Identity":
    """The node's key: from the file given, from its own place, or new.

    Two nodes at once must not share a key. A listening address belongs to one process of a
    computer, and the file's name has both (home directories may be shared between computers).
    """
    from p2pllm.identity import Identity

    path = _key_path(options)
    return Identity.generate() if path is None else Identity.load_or_create(path)


def _key_path(options: NodeOptions | ClientOptions) -> Path | None:
    """Where the node's key is kept; None for a key that is new each time."""
    if options.identity is not None:
        return options.identity
    if isinstance(options, NodeOptions) and options.listen[1]:
        return _data_path() / "identities" / f"{_place(options)}.key"
    return None


class SpanMemory:
    """Which blocks a server served last, in a file beside its key: it comes back into its place."""

    def __init__(self, path: Path | None) -> None:
        self._path = path  # None: a node with a new key each time has no place

    def read(self, model: "ModelId") -> "Span | None":
        """The span of this model that was served last, if that is known."""
        from p2pllm.spans import Span

        try:
            content = json.loads(self._path.read_text()) if self._path is not None else {}
            if content.get("model") == model.digest.hex():
                return Span.parse(content["blocks"])
        except (OSError, ValueError, AttributeError, KeyError, TypeError, ConfigError):
            return None  # as if it were not there: it says where we were, and no more
        return None

    def write(self, model: "ModelId", span: "Span") -> None:
        """Remember it; whether that works is no reason to stop."""
        if self._path is None:
            return
        content = {"model": model.digest.hex(), "blocks": str(span)}
        try:
            self._path.write_text(json.dumps(content) + "\n")
        except OSError as exc:
            logger.warning("span not remembered path=%s reason=%s", self._path, exc.strerror)


def span_memory(options: NodeOptions) -> SpanMemory:
    """Where the node's span is remembered: beside its key, if it keeps one."""
    key = _key_path(options)
    return SpanMemory(key.with_name(key.name + ".span") if key is not None else None)


def prepare_ready_file(path: Path | None) -> None:
    """Take away what an earlier run left, so that nobody takes it for this one's."""
    if path is None:
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)
        raise ConfigError(f"cannot write the ready file {path}: {exc.strerror}") from exc


def write_ready_file(
    path: Path | None, node: "Node", model: str | None = None, blocks: "Span | None" = None
) -> None:
    """Say that the node is ready, if there is a file to say it in."""
    if path is not None:
        content = {
            "peer_id": str(node.peer_id),
            "addresses": [str(address) for address in node.addresses],
            "model": model,
            "blocks": None if blocks is None else str(blocks),
        }
        write_ready(path, content)


def write_ready(path: Path, content: Mapping[str, object]) -> None:
    """Write it as JSON into a file that appears whole."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(json.dumps(content) + "\n")
        os.replace(file.name, path)
    except OSError as exc:
        raise ConfigError(f"cannot write the ready file {path}: {exc.strerror}") from exc


def join_line(addresses: Sequence[Address], swarm: str) -> str:
    """What to give other commands so that they come here."""
    named = "" if swarm == NetConfig().network_id else f"--swarm {swarm} "
    return named + "--peers " + ",".join(str(address) for address in addresses)


def _place(options: NodeOptions) -> str:
    """A file name for what belongs to this swarm, computer and listening address."""
    host, port = options.listen
    return quote(f"{options.swarm}-{platform.node()}-{host}-{port}", safe="")


def _cache_path() -> Path:
    from p2pllm.model.hub import cache_directory

    return cache_directory()


def _data_path() -> Path:
    import platformdirs

    return platformdirs.user_data_path("p2pllm")

"""What `status` and `route` share: a look at the swarm without loading any model.

The swarm itself says which models it has, how deep they are and who serves what, so this needs
neither torch nor a download.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p2pllm.cli.nodes import identity_of
from p2pllm.cli.options import ClientOptions
from p2pllm.config import NodeConfig
from p2pllm.errors import ConfigError, NoRoute
from p2pllm.ids import ModelId

if TYPE_CHECKING:
    from p2pllm.swarm.node import Node
    from p2pllm.swarm.view import SwarmView


@dataclass(frozen=True, slots=True)
class SeenModel:
    """A model that some server of the swarm says it serves."""

    model: ModelId
    num_blocks: int
    hidden_size: int


@asynccontextmanager
async def joined(config: NodeConfig, network: ClientOptions) -> AsyncIterator["Node"]:
    """A node that has joined as a client."""
    from p2pllm.net.tcp import TcpNetwork
    from p2pllm.swarm.node import Node

    async with Node.open(config, identity_of(network), network=TcpNetwork()) as node:
        await node.join()
        yield node


async def seen_models(node: "Node") -> list[SeenModel]:
    """The models of the swarm, by name. Of what the servers say of one, most of them decide."""
    from p2pllm.swarm.tracker import read_models

    votes: dict[ModelId, Counter[SeenModel]] = {}
    for listing in await read_models(node.dht):
        seen = SeenModel(listing.model, listing.num_blocks, listing.hidden_size)
        votes.setdefault(listing.model, Counter())[seen] += 1
    models = [counter.most_common(1)[0][0] for counter in votes.values()]
    return sorted(models, key=lambda seen: str(seen.model))


async def view_of(node: "Node", seen: SeenModel) -> "SwarmView":
    """The servers of a model, with round trips as measured now."""
    from p2pllm.swarm.tracker import SwarmTracker

    tracker = SwarmTracker(
        seen.model, seen.num_blocks, node.dht, node.endpoint.ping, node.config.client
    )
    await tracker.refresh()
    return tracker.view()


async def views_of(node: "Node", models: Sequence[SeenModel]) -> list["SwarmView"]:
    """The same of several."""
    return list(await asyncio.gather(*(view_of(node, seen) for seen in models)))


def matching(models: Sequence[SeenModel], wanted: str) -> list[SeenModel]:
    """Those that the user means by --model: all of them if nothing was said.

    A name as servers show it, a path that ends in it, or the beginning of the digest. Raises
    ConfigError if there is none.
    """
    if not wanted:
        return list(models)
    name = Path(wanted).name.removesuffix(".gguf")
    _, _, digest = wanted.rpartition("@")
    found = [
        seen
        for seen in models
        if seen.model.name in (wanted, name)
        or (len(digest) >= 4 and seen.model.digest.hex().startswith(digest))
    ]
    if not found:
        raise ConfigError(f"no server has {wanted!r}; the swarm has {_listed(models)}")
    return found


def only_one(models: Sequence[SeenModel], wanted: str, default: str) -> SeenModel:
    """The one model that the user means; the default one if there are several.

    Raises ConfigError or NoRoute if that is not clear.
    """
    if not models:
        raise NoRoute("no server of any model is here; serve one with `p2pllm serve`")
    found = matching(models, wanted)
    if len(found) > 1 and not wanted:
        found = [seen for seen in found if seen.model.name == default] or found
    if len(found) > 1:
        raise ConfigError(f"which model? give one with --model: {_listed(found)}")
    return found[0]


def _listed(models: Sequence[SeenModel]) -> str:
    return ", ".join(str(seen.model) for seen in models) or "no model"

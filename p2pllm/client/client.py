"""Joining a swarm as a client.

async with p2pllm.connect(peers=["203.0.113.7:31337"]) as swarm:
    model = await swarm.model()
    async for piece in model.generate("The capital of France is", max_new_tokens=32):
        print(piece, end="", flush=True)
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2pllm.addresses import Address, parse_many
from p2pllm.client.compute import ClientCompute
from p2pllm.client.exchange import Exchange
from p2pllm.client.journal import JournalStore
from p2pllm.client.model import SwarmModel, TextTokenizer
from p2pllm.client.prefixes import SECRET_BYTES
from p2pllm.client.routes import ModelRoutes
from p2pllm.client.spill import SpillFile
from p2pllm.clock import Clock
from p2pllm.config import DEFAULT_NETWORK, ClientConfig, DhtConfig, NetConfig, NodeConfig
from p2pllm.errors import ConfigError
from p2pllm.identity import Identity
from p2pllm.ids import ModelId
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.config import ModelConfig
from p2pllm.model.device import Compute, choose_device, choose_dtype, wire_dtype_of
from p2pllm.model.dummy import TokenIds, dummy_edges, dummy_model_id, read_config
from p2pllm.model.edges import EdgeCompute, Edges
from p2pllm.model.executor import Executor, executor_or_thread
from p2pllm.model.hub import DEFAULT_MODEL, resolve_model
from p2pllm.model.quantize import Scheme
from p2pllm.net.link import Network
from p2pllm.net.tcp import TcpNetwork
from p2pllm.swarm.announcements import ModelListing
from p2pllm.swarm.node import Node
from p2pllm.swarm.tracker import SwarmTracker, read_models
from p2pllm.tasks import task_group
from p2pllm.wire.tensors import TensorCodec

Progress = Callable[[int, int], None]  # bytes fetched, bytes in all


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a client needs of a model."""

    model_id: ModelId
    config: ModelConfig
    tokenizer: TextTokenizer
    edges: EdgeCompute


def _load_parts(
    name: str | None, settings: ClientConfig, on_progress: Progress | None
) -> ModelParts:
    """Fetch and load them; runs in the compute thread."""
    compute, is_dummy = _compute_of(settings), settings.load == "dummy"
    path = resolve_model(name or "", edges=not is_dummy, progress=on_progress)
    if is_dummy:
        return _dummy_parts(path, compute)
    checkpoint = open_checkpoint(path, name or DEFAULT_MODEL)
    edges = Edges.load(
        checkpoint.config,
        checkpoint.edge_weights(compute.dtype),
        dtype=compute.dtype,
        device=compute.device,
    )
    return ModelParts(checkpoint.model_id, checkpoint.config, checkpoint.tokenizer(), edges)


def _dummy_parts(path: Path, compute: Compute) -> ModelParts:
    """Random ones, of the shape that the config in a directory names."""
    config = read_config(path)
    edges = Edges.load(
        config,
        dummy_edges(config, compute.dtype, compute.device),
        dtype=compute.dtype,
        device=compute.device,
    )
    return ModelParts(dummy_model_id(config, path.name), config, TokenIds(config), edges)


def _compute_of(settings: ClientConfig) -> Compute:
    device = choose_device("cpu" if settings.device == "auto" else settings.device)
    return Compute(device, choose_dtype(settings.dtype, device), Scheme.NONE)


class Swarm:
    """A swarm joined as a client. Made by `connect`."""

    def __init__(
        self, node: Node, executor: Executor, tasks: asyncio.TaskGroup, rng: random.Random
    ) -> None:
        self.node = node
        self._executor = executor
        self._tasks = tasks
        self._rng = rng
        self._exchange = Exchange(node.endpoint)
        self._store = JournalStore(node.config.client.journal_bytes, SpillFile)
        self._prefix_secret = os.urandom(SECRET_BYTES)
        self._trackers: dict[ModelId, SwarmTracker] = {}
        self._computes: dict[ModelId, ClientCompute] = {}
        self._serving: list[asyncio.Task[None]] = []  # one of each tracker and compute

    async def models(self) -> list[ModelListing]:
        """What the swarm's servers say they serve, one entry per server."""
        return await read_models(self.node.dht)

    async def model(
        self, name: str | None = None, *, on_progress: Progress | None = None
    ) -> SwarmModel:
        """A model of the swarm, by name, directory, `.gguf` file or Hub repo (default: built in).

        Fetches and loads what the client needs: tokenizer, embeddings and head. Raises
        ConfigError (unknown model) or CheckpointError.
        """
        settings = self.node.config.client
        parts = await self._executor.run(lambda: _load_parts(name, settings, on_progress))
        return await self.use(parts)

    async def use(self, parts: ModelParts) -> SwarmModel:
        """The model of parts that are loaded already.

        All generations with one model compute together, whoever has asked for it first: so its
        first parts are the ones that count.
        """
        settings = self.node.config.client
        tracker = self._trackers.get(parts.model_id)
        if tracker is None:
            tracker = self._trackers[parts.model_id] = SwarmTracker(
                parts.model_id,
                parts.config.num_blocks,
                self.node.dht,
                self.node.endpoint.ping,
                settings,
                self._rng,
            )
            compute = self._computes[parts.model_id] = ClientCompute(parts.edges, self._executor)
            self._serving += map(self._tasks.create_task, (tracker.run(), compute.run()))
        await tracker.refresh()
        wire_dtype = wire_dtype_of(parts.edges.dtype)
        routes = ModelRoutes(
            self.node.endpoint,
            tracker,
            self.node.dht.find_peer_record,
            settings,
            parts.config.hidden_size * wire_dtype.itemsize,
            2 * parts.config.num_kv_heads * parts.config.head_dim * wire_dtype.itemsize,
        )
        return SwarmModel(
            endpoint=self.node.endpoint,
            exchange=self._exchange,
            routes=routes,
            store=self._store,
            start=self._start,
            model_id=parts.model_id,
            config=parts.config,
            tokenizer=parts.tokenizer,
            compute=self._computes[parts.model_id],
            settings=settings,
            wire_dtype=wire_dtype,
            rng=self._rng,
            prefix_secret=self._prefix_secret,
        )

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that nobody waits for, unless we are about to leave."""
        try:
            self._tasks.create_task(work)
        except RuntimeError:  # the group takes no more
            work.close()

    def close(self) -> None:
        """Stop following the models and computing, and forget the journals."""
        for task in self._serving:
            task.cancel()
        self._store.close()


@asynccontextmanager
async def connect(
    peers: str | Iterable[str | Address] = (),
    *,
    swarm: str = DEFAULT_NETWORK,
    dtype: str | None = None,
    device: str | None = None,
    load: str | None = None,
    wire_codec: str | None = None,
    config: NodeConfig | None = None,
    identity: Identity | None = None,
    network: Network | None = None,
    clock: Clock | None = None,
    executor: Executor | None = None,
    rng: random.Random | None = None,
) -> AsyncIterator[Swarm]:
    """Join the swarm that `peers` (any members of it) belong to, as a client.

    `dtype` is what the client computes in, `device` where it computes ("auto" is the CPU), `load`
    what ("checkpoint", or "dummy": the random model of a directory's config), `wire_codec` how
    hidden states travel ("raw", "bf16", "int8" or "auto"). `config` gives everything else; without
    one, a client that is not listening and has a new identity; where both name one of these, the
    argument counts. Raises ConfigError for a wrong address or no peer, PeerUnreachable if none
    answers. An error of the body is raised as it is.
    """
    config = config or client_config(swarm)
    given = parse_many([peers] if isinstance(peers, str) else map(str, peers))
    settings = replace(
        config.client,
        dtype=dtype or config.client.dtype,
        device=device or config.client.device,
        load=load or config.client.load,
        wire_codec=wire_codec or config.client.wire_codec,
    )
    config = replace(config, peers=config.peers + given, client=settings)
    _check(config)
    with executor_or_thread(executor, "p2pllm-client") as compute:
        async with Node.open(
            config,
            identity or Identity.generate(),
            network=network or TcpNetwork(),
            clock=clock,
            rng=rng,
        ) as node:
            await node.join()
            async with task_group() as tasks:
                joined = Swarm(node, compute, tasks, rng or random.Random())
                try:
                    yield joined
                finally:
                    joined.close()


def _check(config: NodeConfig) -> None:
    _compute_of(config.client)
    codecs = ["auto", *(codec.name.lower() for codec in TensorCodec)]
    if config.client.wire_codec not in codecs:
        raise ConfigError(
            f"no wire codec {config.client.wire_codec!r}; there are {', '.join(codecs)}"
        )
    if config.client.load not in ("checkpoint", "dummy"):
        raise ConfigError(f"no load {config.client.load!r}; there are checkpoint, dummy")
    if not config.peers and not (config.table_path and Path(config.table_path).exists()):
        raise ConfigError(
            "no peers given: name at least one member of the swarm, as HOST:PORT "
            "(a server or bootstrap node prints its addresses when it starts)"
        )


def client_config(network_id: str) -> NodeConfig:
    """A node that only asks: it listens nowhere, and the DHT never sends anybody to it."""
    return NodeConfig(
        net=NetConfig(network_id=network_id, is_listening=False),
        dht=DhtConfig(is_client=True),
    )

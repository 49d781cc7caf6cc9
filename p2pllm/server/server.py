"""A server: a node that serves a span of blocks.

    source = CheckpointSource(open_checkpoint(path))
    async with Server.open(config, identity, source, choice, network=TcpNetwork()) as server:
        ...   # serving; leaving the block says goodbye to the swarm

Opening joins the swarm, chooses the span if the user left that to us, loads the blocks, measures
them, and only then announces itself: whoever finds a server in the DHT can use it.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from p2pllm.clock import Clock, SystemClock
from p2pllm.config import NodeConfig, ServerConfig
from p2pllm.errors import ConfigError
from p2pllm.identity import Identity
from p2pllm.ids import ModelId
from p2pllm.model.checkpoint import Checkpoint, open_checkpoint
from p2pllm.model.config import ModelConfig
from p2pllm.model.device import choose_device, choose_dtype, numerics_of
from p2pllm.model.executor import Executor, executor_or_thread
from p2pllm.model.families.family import Weights
from p2pllm.model.hub import resolve_model
from p2pllm.model.span_model import SpanCompute, SpanModel
from p2pllm.net.link import Network
from p2pllm.routing.placement import choose_span
from p2pllm.server.announcer import Announcer
from p2pllm.server.handlers import Offer, Service
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator, pages_for
from p2pllm.server.scheduler import Scheduler
from p2pllm.server.sessions import SessionTable
from p2pllm.server.throughput import Throughput, measure
from p2pllm.server.worker import Worker
from p2pllm.spans import Span
from p2pllm.swarm.node import Node
from p2pllm.swarm.tracker import read_presences
from p2pllm.swarm.view import Measurements, build_view
from p2pllm.tasks import task_group, to_the_end
from p2pllm.version import __version__
from p2pllm.wire.messages import Output

logger = logging.getLogger(__name__)

LoadProgress = Callable[[int, int], None]  # blocks loaded, blocks in all
FetchProgress = Callable[[int, int], None]  # bytes fetched, bytes in all


class ModelSource(Protocol):
    """What a server must know of a model: a `Checkpoint`, or the simulator's stand-in."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def model_id(self) -> ModelId: ...

    @property
    def block_parameters(self) -> int:
        """How many numbers one block holds."""
        ...

    def load_span(
        self, span: Span, settings: ServerConfig, on_progress: LoadProgress | None
    ) -> SpanCompute:
        """Read the blocks of a span into memory; runs in the device thread."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """The blocks of an open checkpoint.

    With a `name` (what `resolve_model` takes), the files that hold a span are fetched when the
    span is known: of a large Hub repo only its shards.
    """

    checkpoint: Checkpoint
    name: str = ""
    on_fetch: FetchProgress | None = None

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def model_id(self) -> ModelId:
        return self.checkpoint.model_id

    @property
    def block_parameters(self) -> int:
        return self.checkpoint.block_parameters

    def load_span(
        self, span: Span, settings: ServerConfig, on_progress: LoadProgress | None
    ) -> SpanCompute:
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        checkpoint = self.checkpoint
        if self.name:
            path = resolve_model(self.name, span=span, progress=self.on_fetch)
            checkpoint = open_checkpoint(path, self.model_id.name)

        def weights() -> Iterator[Weights]:
            for index in span:
                yield checkpoint.block_weights(index, dtype)
                if on_progress is not None:
                    on_progress(index + 1 - span.start, len(span))

        return SpanModel.load(self.config, span, weights(), dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """Which blocks to serve: exactly `span`, or the `num_blocks` that the swarm needs most.

    Neither: as many as fit into `memory_bytes` (0: all blocks), which more may not exceed.
    """

    span: Span | None = None
    num_blocks: int = 0
    memory_bytes: int = 0


class Server:
    """A node that serves `offer.span`. Use `Server.open`."""

    def __init__(
        self,
        node: Node,
        service: Service,
        worker: Worker,
        announcer: Announcer,
        pages: PageAllocator,
    ) -> None:
        self.node = node
        self.pages = pages
        self.service = service
        self.worker = worker
        self.announcer = announcer

    @property
    def offer(self) -> Offer:
        """What is served."""
        return self.service.offer

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: NodeConfig,
        identity: Identity,
        source: ModelSource,
        choice: BlockChoice,
        *,
        network: Network,
        clock: Clock | None = None,
        executor: Executor | None = None,
        rng: random.Random | None = None,
        on_progress: LoadProgress | None = None,
    ) -> AsyncIterator["Server"]:
        """Join, load, measure and announce; serves until the block is left.

        Without an `executor` it computes in a thread of its own. An error of the body is raised
        as it is.

        Raises ConfigError (a span that the model does not have), CheckpointError, or
        TransportError (the port is taken, no peer answers).
        """
        settings, clock = config.server, clock or SystemClock()
        check_choice(choice, source.config.num_blocks)
        with executor_or_thread(executor, "p2pllm-device") as device:
            async with Node.open(config, identity, network=network, clock=clock, rng=rng) as node:
                await node.join()
                span = await _choose(node, source, choice, settings)
                model = await device.run(lambda: source.load_span(span, settings, on_progress))
                server = await cls._prepare(node, source, model, settings, device, clock)
                async with server._running():
                    yield server

    @classmethod
    async def _prepare(
        cls,
        node: Node,
        source: ModelSource,
        model: SpanCompute,
        settings: ServerConfig,
        executor: Executor,
        clock: Clock,
    ) -> "Server":
        """Everything that stands between loaded blocks and the first session."""
        num_pages = pages_for(settings.cache_tokens)
        try:
            cache = await executor.run(lambda: model.make_cache(num_pages, PAGE_TOKENS))
        except RuntimeError as exc:  # torch has no class of its own for this on every device
            raise ConfigError(
                f"no memory for a cache of {settings.cache_tokens} tokens; choose fewer "
                "--cache-tokens or fewer blocks"
            ) from exc
        if settings.throughput:
            throughput = Throughput.stated(settings.throughput)
        else:
            throughput = await executor.run(
                lambda: measure(model, cache, chunk_tokens=settings.prefill_chunk_tokens)
            )
        logger.info("measured throughput=%s", throughput)
        pages = PageAllocator(num_pages, quota_pages=_quota_pages(settings, num_pages))
        scheduler = Scheduler(
            batch_tokens=settings.batch_tokens,
            chunk_tokens=settings.prefill_chunk_tokens,
            max_rows=settings.max_queue_steps,
        )
        worker = Worker(model, cache, scheduler, executor, clock)
        offer = Offer(
            source.model_id,
            numerics_of(model.dtype),
            model.span,
            source.config.hidden_size,
        )
        sessions: SessionTable[Output] = SessionTable(
            pages, max_sessions=settings.max_sessions, lease_s=settings.lease_s
        )
        service = Service(node.endpoint, offer, sessions, worker, settings)
        service.bind()
        announcer = Announcer(
            node,
            offer,
            source.config.num_blocks,
            pages=pages,
            worker=worker,
            throughput=throughput,
            max_tokens_per_session=min(settings.max_tokens_per_session, num_pages * PAGE_TOKENS),
            public_name=settings.public_name,
            version=__version__,
        )
        return cls(node, service, worker, announcer, pages)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """Serve; on leaving, withdraw the announcement before the transport closes."""
        async with task_group() as tasks:
            running = [
                tasks.create_task(self.worker.run()),
                tasks.create_task(self.service.run()),
                tasks.create_task(self.announcer.run()),
            ]
            try:
                yield
            finally:
                await to_the_end(self.announcer.withdraw())
                for task in running:
                    task.cancel()


def check_choice(choice: BlockChoice, num_blocks: int) -> None:
    """Raise ConfigError unless the model has these blocks."""
    stop = choice.span.stop if choice.span else choice.num_blocks
    if stop > num_blocks:
        raise ConfigError(
            f"the model has {num_blocks} blocks; choose within 0:{num_blocks} "
            f"(asked: {choice.span or choice.num_blocks})"
        )


async def _choose(
    node: Node, source: ModelSource, choice: BlockChoice, settings: ServerConfig
) -> Span:
    total = source.config.num_blocks
    fitting = _blocks_that_fit(source, choice, settings)
    asked = len(choice.span) if choice.span else choice.num_blocks
    if asked > fitting:
        raise ConfigError(
            f"{fitting} blocks fit into the memory allowed, and {asked} are asked; allow more "
            "--memory, or serve fewer blocks or --cache-tokens"
        )
    if choice.span is not None:
        return choice.span
    num_blocks = choice.num_blocks or fitting
    if num_blocks >= total:
        return Span(0, total)
    presences = await read_presences(node.dht, source.model_id)
    now = asyncio.get_running_loop().time()
    view = build_view(source.model_id, total, presences, Measurements(), now)
    return choose_span(view, num_blocks, own=node.peer_id)


def _blocks_that_fit(source: ModelSource, choice: BlockChoice, settings: ServerConfig) -> int:
    """How many blocks with their share of the cache fit into the memory allowed."""
    config = source.config
    if not choice.memory_bytes:
        return config.num_blocks
    itemsize = choose_dtype(settings.dtype, choose_device(settings.device)).itemsize
    block = source.block_parameters * itemsize
    cache = 2 * config.num_kv_heads * config.head_dim * settings.cache_tokens * itemsize
    fitting = choice.memory_bytes // (block + cache)
    if not fitting:
        raise ConfigError(
            f"not one block fits: it takes {(block + cache) / 2**20:.0f} MiB with its part of the "
            "cache; allow more --memory or fewer --cache-tokens"
        )
    return int(min(fitting, config.num_blocks))


def _quota_pages(settings: ServerConfig, num_pages: int) -> int:
    """What one peer may hold while others wait: a quarter, if the user does not say."""
    asked = settings.max_tokens_per_peer
    return pages_for(asked) if asked else max(1, num_pages // 4)

"""A server: a node that serves a span of blocks.

    source = CheckpointSource(open_checkpoint(path))
    async with Server.open(config, identity, source, choice, network=TcpNetwork()) as server:
        ...   # serving; leaving the block says goodbye to the swarm

Opening joins the swarm, chooses the span if the user left that to us and says so, loads the blocks,
measures them, and only then announces itself as a server that takes sessions. One that chose its
span itself goes on looking at the swarm (`p2pllm.server.balancer`), and moves when that helps:

    load what we lack beside what we serve ── drain ── serve the new span with the old cache

Blocks that both spans have stay where they are. Where memory does not allow to load beside the old
blocks, sessions are drained and the blocks that go are forgotten first.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from p2pllm.clock import Clock, SystemClock
from p2pllm.config import NodeConfig, ServerConfig
from p2pllm.errors import ConfigError, P2PLLMError
from p2pllm.identity import Identity
from p2pllm.model.device import Compute
from p2pllm.model.executor import Executor, executor_or_thread
from p2pllm.model.kv_cache import KVCache
from p2pllm.model.memory import free_memories
from p2pllm.model.span_model import SpanCompute
from p2pllm.model.split_span import sizes_of
from p2pllm.net.link import Network
from p2pllm.server.announcer import Announcer
from p2pllm.server.balancer import GUESSED_RATE, Balancer, MayLeave
from p2pllm.server.capacity import Capacity, divide, fit_devices, share, usable_of
from p2pllm.server.forwarding import Forwarding
from p2pllm.server.handlers import Service
from p2pllm.server.offer import Offer
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator, pages_for
from p2pllm.server.serving import Serving
from p2pllm.server.source import LoadProgress, ModelSource, cost_of
from p2pllm.server.throughput import Throughput, measure
from p2pllm.server.worker import Worker
from p2pllm.spans import Span, cut
from p2pllm.swarm.announcements import ModelListing, Presence, ServerState
from p2pllm.swarm.node import Node
from p2pllm.tasks import task_group, to_the_end
from p2pllm.version import __version__

logger = logging.getLogger(__name__)

MOVE_DRAIN_S = 15.0  # for sessions to go elsewhere before a move: a replay takes a second or two
ABOUT_AS_MANY = 0.9  # of the blocks that fit: a server that comes back serves as many as before
MAX_RELOADS = 2  # when others took our span while we loaded it; later the balancer sees to it


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """Which blocks to serve: exactly `span`, or the `num_blocks` that the swarm needs most.

    Neither: as many as fit into `memory_bytes` (0: into what is free). With `memory_bytes` also
    blocks that were asked for must fit. `kept` is where the server was before it was restarted.
    """

    span: Span | None = None
    num_blocks: int = 0
    memory_bytes: int = 0
    kept: Span | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """What a server works with, and a test may replace."""

    device: Executor  # computes
    loader: Executor | None  # reads weights while the device computes; None: a new thread each time
    clock: Clock
    rng: random.Random


class Server:
    """A node that serves `offer.span`. Use `Server.open`."""

    def __init__(
        self,
        node: Node,
        source: ModelSource,
        settings: ServerConfig,
        capacity: Capacity,
        tools: Tools,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.node = node
        self.capacity = capacity
        self.on_moved: Callable[[Span], None] | None = None
        self._source = source
        self._settings = settings
        self._tools = tools
        self._tasks = tasks
        self.announcer = Announcer(node, source.model_id, *_introduction(node, source, settings))
        self._balancer = Balancer(
            node, self.announcer, source.model_id, source.config.num_blocks, tools.rng
        )
        self._serving: Serving  # from `_begin` on
        self._throughput: Throughput
        self._is_movable = False
        self._running: set[asyncio.Task[None]] = set()
        self._serves: asyncio.Task[None]
        self._balances: asyncio.Task[None] | None = None

    # --- what is served ------------------------------------------------------------------------

    @property
    def offer(self) -> Offer:
        """What is served."""
        return self._serving.service.offer

    @property
    def parts(self) -> tuple[tuple[str, Span], ...]:
        """Which blocks are on which device."""
        names = map(str, Compute.of(self._settings).devices)
        return tuple(zip(names, cut(self.offer.span, sizes_of(self._serving.model)), strict=True))

    @property
    def pages(self) -> PageAllocator:
        """Who holds the cache."""
        return self._serving.pages

    @property
    def service(self) -> Service:
        """Who answers."""
        return self._serving.service

    @property
    def worker(self) -> Worker:
        """Who computes."""
        return self._serving.worker

    @property
    def forwarding(self) -> Forwarding:
        """Who answers passes without a session."""
        return self._serving.forwarding

    # --- life ----------------------------------------------------------------------------------

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

        Raises ConfigError (a span that the model does not have, too little memory),
        CheckpointError, or TransportError (the port is taken, no peer answers).
        """
        settings, clock, rng = config.server, clock or SystemClock(), rng or random.Random()
        check_choice(choice, source.config.num_blocks)
        with executor_or_thread(executor, "p2pllm-device") as device:
            tools = Tools(device, executor, clock, rng)
            async with Node.open(config, identity, network=network, clock=clock, rng=rng) as node:
                await node.join()
                capacity = _capacity(source, choice, settings)
                async with task_group() as tasks:
                    server = cls(node, source, settings, capacity, tools, tasks)
                    try:
                        await server._begin(choice, on_progress)
                        yield server
                    finally:
                        await to_the_end(server.announcer.withdraw())
                        for task in server._running:
                            task.cancel()

    async def _begin(self, choice: BlockChoice, on_progress: LoadProgress | None) -> None:
        """From the choice of a span to the first session."""
        num_blocks, total = self.capacity.num_blocks, self._source.config.num_blocks
        is_free = choice.span is None and num_blocks < total
        self._is_movable = is_free and self._settings.is_balanced
        if is_free:
            span = await self._balancer.take_place(num_blocks, choice.kept)
        else:
            span = choice.span or Span(0, total)
            rate = self._settings.throughput or GUESSED_RATE
            self.announcer.join(span, rate, is_movable=False)
        model = await self._load(span, None, on_progress)
        if is_free:
            for _ in range(MAX_RELOADS):
                span = await self._balancer.look_again()
                if span == model.span:
                    break
                model = await self._load(span, model, on_progress)
        cache = await self._make_cache(model)
        await self._prepare(model, cache)
        self._throughput = await self._measure(model, cache)
        self._serve(model, cache)
        self._running.add(self._tasks.create_task(self.announcer.run()))
        self._balancer.bind()
        if self._is_movable:
            self._balances = self._tasks.create_task(self._balancer.run(self.move))
            self._running.add(self._balances)

    async def drain(self, timeout_s: float) -> None:
        """Take no new sessions, and wait until all that are here have gone, or the time is over.

        The swarm and the sessions' clients are told at once. Leave the server's block after it.
        """
        self.announcer.leave()
        if self._balances is not None:
            self._balances.cancel()
            await asyncio.wait([self._balances])
        await self.service.drain(timeout_s)

    async def move(self, span: Span, may_leave: MayLeave) -> None:
        """Serve other blocks, as many as before, if `may_leave` says so when they are loaded.

        The caller has told the swarm. Raises P2PLLMError if they cannot be loaded; the server
        then serves what it did.
        """
        old = self._serving
        has_room = self._has_room_beside(old.model, span)
        if has_room:
            model = await self._load(span, old.model)
        if not await may_leave():
            logger.info("not moved, others leave too from=%s to=%s", old.span, span)
            return
        self.announcer.drain_to(span)
        await old.service.drain(MOVE_DRAIN_S)
        self._serves.cancel()
        await asyncio.wait([self._serves])
        self._running.remove(self._serves)
        if not has_room:
            old.model.forget_all_but(old.span.overlap(span))
            try:
                model = await self._load(span, old.model)
            except P2PLLMError:
                model = await self._load(old.span, old.model)
                await self._prepare(model, old.cache)
                self._serve(model, old.cache)
                raise
        await self._prepare(model, old.cache)
        self._serve(model, old.cache)
        logger.info("moved from=%s to=%s", old.span, span)
        if self.on_moved is not None:
            self.on_moved(span)

    # --- steps of these ------------------------------------------------------------------------

    def _serve(self, model: SpanCompute, cache: KVCache) -> None:
        """Answer for these blocks from now on."""
        self._serving = Serving.of(
            model,
            cache,
            self._source.model_id,
            self.node.endpoint,
            self._settings,
            self._tools.device,
            self._tools.clock,
        )
        self._serving.service.bind()
        self._serves = self._tasks.create_task(self._serving.run())
        self._running.add(self._serves)
        self.announcer.serve(self._serving, self._throughput, is_movable=self._is_movable)

    async def _load(
        self, span: Span, loaded: SpanCompute | None, on_progress: LoadProgress | None = None
    ) -> SpanCompute:
        source, settings = self._source, self._settings
        # A thread that has ended takes its OpenMP team along: with two teams in the process,
        # libgomp stops spinning between products and wakes its threads hundreds of times a pass.
        with executor_or_thread(self._tools.loader, "p2pllm-loader") as loader:
            return await loader.run(lambda: source.load_span(span, settings, on_progress, loaded))

    async def _make_cache(self, model: SpanCompute) -> KVCache:
        num_pages = pages_for(self._settings.cache_tokens)
        try:
            return await self._tools.device.run(lambda: model.make_cache(num_pages, PAGE_TOKENS))
        except RuntimeError as exc:  # torch has no class of its own for this on every device
            raise ConfigError(
                f"no memory for a cache of {self._settings.cache_tokens} tokens; choose fewer "
                "--cache-tokens or fewer blocks"
            ) from exc

    async def _prepare(self, model: SpanCompute, cache: KVCache) -> None:
        """Whatever takes long the first time is done before there are sessions."""
        settings = self._settings
        max_batch = min(settings.batch_tokens, settings.max_sessions)
        await self._tools.device.run(lambda: model.prepare(cache, max_batch))

    async def _measure(self, model: SpanCompute, cache: KVCache) -> Throughput:
        settings = self._settings
        if settings.throughput:
            return Throughput.stated(settings.throughput)
        device, chunk_tokens = self._tools.device, settings.prefill_chunk_tokens
        throughput = await device.run(
            lambda: measure(model, cache, chunk_tokens=chunk_tokens, timer=device.timer)
        )
        logger.info("measured throughput=%s", throughput)
        return throughput

    def _has_room_beside(self, model: SpanCompute, span: Span) -> bool:
        """Is there memory on each device for its new blocks while the old ones are still there?"""
        sizes, devices = sizes_of(model), Compute.of(self._settings).devices
        parts = zip(cut(model.span, sizes), cut(span, sizes), free_memories(devices), strict=True)
        return all(
            sum(block not in here for block in there) * self.capacity.cost.weight_bytes
            <= usable_of(free)
            for here, there, free in parts
        )


def check_choice(choice: BlockChoice, num_blocks: int) -> None:
    """Raise ConfigError unless the model has these blocks."""
    stop = choice.span.stop if choice.span else choice.num_blocks
    if stop > num_blocks:
        raise ConfigError(
            f"the model has {num_blocks} blocks; choose within 0:{num_blocks} "
            f"(asked: {choice.span or choice.num_blocks})"
        )


def _capacity(source: ModelSource, choice: BlockChoice, settings: ServerConfig) -> Capacity:
    """How many blocks we serve, and what they take."""
    cost, devices = cost_of(source, settings), Compute.of(settings).devices
    limits = tuple(map(usable_of, free_memories(devices)))
    if choice.memory_bytes:
        limits = share(choice.memory_bytes, limits) if devices[1:] else (choice.memory_bytes,)
    asked = len(choice.span) if choice.span else choice.num_blocks
    if asked:
        divide(asked, [1] * len(devices))  # before anything is loaded: enough for all devices?
    if asked and not choice.memory_bytes:
        return Capacity(asked, cost, sum(limits))  # at the user's own risk
    fitting = fit_devices(
        limits, [str(device) for device in devices], cost, source.config.num_blocks
    )
    if asked > fitting.num_blocks:
        raise ConfigError(
            f"{fitting.num_blocks} blocks fit into the memory allowed, and {asked} are asked; "
            "allow more --memory, or serve fewer blocks or --cache-tokens"
        )
    before = len(choice.kept) if choice.kept else 0
    if not asked and ABOUT_AS_MANY * fitting.num_blocks <= before <= fitting.num_blocks:
        asked = before  # what is free varies a little: no reason to lose our place
    return replace(fitting, num_blocks=asked or fitting.num_blocks)


def _introduction(
    node: Node, source: ModelSource, settings: ServerConfig
) -> tuple[ModelListing, Presence]:
    """What never changes of the announcements."""
    config, cache_tokens = source.config, pages_for(settings.cache_tokens) * PAGE_TOKENS
    presence = Presence(
        peer_id=node.peer_id,
        span=Span(0, config.num_blocks),
        numerics=Compute.of(settings).numerics,
        state=ServerState.JOINING,
        max_tokens_per_session=min(settings.max_tokens_per_session, cache_tokens),
        public_name=settings.public_name,
        version=__version__,
    )
    listing = ModelListing(node.peer_id, source.model_id, config.num_blocks, config.hidden_size)
    return listing, presence

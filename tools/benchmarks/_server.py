"""One server in a process of its own, as benchmarks need it: real blocks, or identities.

    python -m benchmarks._server '{"span": "0:15", "weights": "int4", ...}'      (see `_setups`)

It greets with its address when it serves. `usage` tells what it has taken of the machine, `step`
what a decode step through its blocks takes without the network. With identities the blocks return
what they are given and everything else is real: what is then left of a step's time is what the
software costs per hop.
"""

import asyncio
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import _machine
from benchmarks._program import answer_async
from benchmarks._setups import SWARM, ServerSetup
from p2pllm.addresses import parse_many
from p2pllm.config import DhtConfig, NetConfig, NodeConfig, ServerConfig, ShaperConfig
from p2pllm.identity import Identity
from p2pllm.loops import new_event_loop
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.config import ModelConfig
from p2pllm.model.device import Compute
from p2pllm.model.forward_pass import Pass
from p2pllm.model.hub import DEFAULT_MODEL, resolve_model
from p2pllm.model.kv_cache import CacheRow, KVCache, Rows
from p2pllm.model.span_model import SpanCompute
from p2pllm.net.tcp import TcpNetwork
from p2pllm.server.pages import PAGE_TOKENS, pages_for
from p2pllm.server.server import BlockChoice, Server
from p2pllm.server.source import CheckpointSource, LoadProgress
from p2pllm.spans import Span

# Everything is on one host, which real swarms do not allow to fill a routing table.
LAB_DHT = DhtConfig(max_per_group_in_bucket=0, max_per_group_in_table=0)


def settings_of(name: str) -> ServerConfig:
    """A server's settings by the name of a dtype or of a quantization scheme."""
    if name in ("int8", "int4"):
        return ServerConfig(quantize=name, device="cpu")
    return ServerConfig(dtype=name, device="cpu")


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """The loop to measure with: asyncio's own, or uvloop's as the programs use it."""
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop  # noqa: F401 - without it p2pllm would take asyncio's and say nothing

    return new_event_loop


def shaped(rtt_s: float) -> ShaperConfig:
    """This end of links with that round trip."""
    return ShaperConfig(delay_s=rtt_s / 2)


class IdentitySpan:
    """Blocks that do nothing; the cache is a real one of one block, and stays empty."""

    def __init__(self, config: ModelConfig, span: Span, settings: ServerConfig) -> None:
        self.config = config
        self.span = span
        compute = Compute.of(settings)
        self.device, self.dtype = compute.device, compute.dtype

    def make_cache(self, num_pages: int, page_tokens: int) -> KVCache:
        return KVCache(
            self.config,
            num_blocks=1,
            num_pages=num_pages,
            page_tokens=page_tokens,
            dtype=self.dtype,
            device=self.device,
        )

    def prepare(self, cache: KVCache, max_batch: int) -> None:
        pass  # there is nothing to prepare

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        return hidden.clone()

    def forward_pass(
        self, hidden: Tensor, lengths: Sequence[int], span: Span | None = None
    ) -> Pass:
        yield len(hidden)
        return hidden.clone()

    def forget_all_but(self, kept: Span | None) -> None:
        pass  # there is nothing to forget


class IdentitySource(CheckpointSource):
    """A checkpoint's identity without its blocks."""

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        return IdentitySpan(self.config, span, settings)


class Bench:
    """What can be asked of a server that runs here."""

    def __init__(self, server: Server, weight_bytes: int) -> None:
        # The device thread's own, past the worker's face: a benchmark looks inside.
        self._model: SpanCompute = server.worker._model
        self._cache: KVCache = server.worker._cache
        self._run = server.worker._executor.run
        self._server = server
        self._weight_bytes = weight_bytes
        self._spare: KVCache | None = None  # for `step`, so that no session is disturbed

    async def usage(self) -> dict[str, Any]:
        """CPU time so far, and memory. `cache` is what of it has been touched: pages that no
        session has used yet take no memory; `beyond` what is neither weights nor cache."""
        memory = _machine.own_memory()
        cache = sum(_machine.resident_bytes(t.data_ptr(), t.nbytes) for t in self._cache.tensors)
        return {
            "cpu_s": time.process_time(),
            **memory,
            "weights": self._weight_bytes,
            "cache": cache,
            "beyond": memory["rss"] - self._weight_bytes - cache,
            "processes": 1 + _machine.num_children(os.getpid()),
            "threads": torch.get_num_threads(),
            "pages": self._server.pages.num_pages,
            "free_pages": self._server.pages.num_free,
            "sessions": len(self._server.service.sessions),
        }

    async def step(self, *, cached: int) -> float:
        """Seconds of one decode step behind so many tokens, in the device thread."""
        if self._spare is None or self._spare.num_pages < pages_for(cached + 1):
            self._spare = self._model.make_cache(pages_for(cached + 1), PAGE_TOKENS)
        cache, model = self._spare, self._model
        row = CacheRow(tuple(range(pages_for(cached + 1))), cached, 1)
        hidden = torch.randn(1, model.config.hidden_size).to(model.dtype)

        def work() -> float:
            started = time.perf_counter()
            model.forward(hidden, [row], cache)
            return time.perf_counter() - started

        return await self._run(work)


async def serve(setup: ServerSetup) -> None:
    """Until standard input ends."""
    checkpoint = open_checkpoint(resolve_model(), DEFAULT_MODEL)
    source = (IdentitySource if setup.is_identity else CheckpointSource)(checkpoint)
    settings, span = settings_of(setup.weights), Span.parse(setup.span)
    config = NodeConfig(
        net=NetConfig(SWARM, listen_host="127.0.0.1", listen_port=0, shaper=shaped(setup.rtt_s)),
        dht=LAB_DHT,
        peers=parse_many(setup.peers),
        server=replace(settings, cache_tokens=setup.cache_tokens),
    )
    weight_bytes = 0 if setup.is_identity else source.block_bytes(settings) * len(span)
    async with Server.open(
        config, Identity.generate(), source, BlockChoice(span), network=TcpNetwork()
    ) as server:
        gc.collect()
        gc.freeze()  # as `p2pllm serve` does
        bench = Bench(server, weight_bytes)
        greeting = {"address": str(server.node.addresses[0])}
        await answer_async(greeting, {"usage": bench.usage, "step": bench.step})


def main() -> None:
    setup = ServerSetup.parse(sys.argv[1])
    with asyncio.Runner(loop_factory=loop_factory(setup.loop)) as runner:
        runner.run(serve(setup))


if __name__ == "__main__":
    main()

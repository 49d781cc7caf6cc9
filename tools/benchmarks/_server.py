"""One server in a process of its own, as benchmarks need it: real blocks, or identities.

    python _server.py SPAN DTYPE KIND [PEER]      KIND: real or identity; DTYPE also int8, int4

Prints one line with its address when it serves, and ends when its standard input closes.
With KIND identity the blocks return what they are given and everything else is real: what is then
left of a step's time is what the software costs per hop.
"""

import asyncio
import sys
from dataclasses import replace

from torch import Tensor

from p2pllm.addresses import parse_many
from p2pllm.config import DhtConfig, NetConfig, NodeConfig, ServerConfig
from p2pllm.identity import Identity
from p2pllm.loops import new_event_loop
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.config import ModelConfig
from p2pllm.model.device import Compute
from p2pllm.model.hub import DEFAULT_MODEL, resolve_model
from p2pllm.model.kv_cache import KVCache, Rows
from p2pllm.model.span_model import SpanCompute
from p2pllm.net.tcp import TcpNetwork
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

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
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


async def serve(span: Span, dtype: str, kind: str, peers: list[str]) -> None:
    checkpoint = open_checkpoint(resolve_model(), DEFAULT_MODEL)
    source = IdentitySource(checkpoint) if kind == "identity" else CheckpointSource(checkpoint)
    config = NodeConfig(
        net=NetConfig(network_id="bench", listen_host="127.0.0.1", listen_port=0),
        dht=LAB_DHT,
        peers=parse_many(peers),
        server=replace(settings_of(dtype), cache_tokens=16_384),
    )
    async with Server.open(
        config, Identity.generate(), source, BlockChoice(span), network=TcpNetwork()
    ) as server:
        print(server.node.addresses[0], flush=True)
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    span, dtype, kind, *peers = sys.argv[1:]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(Span.parse(span), dtype, kind, peers))


if __name__ == "__main__":
    main()

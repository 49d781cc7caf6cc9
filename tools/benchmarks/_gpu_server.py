"""A server of random blocks of a model's shape, in a process of its own.

    python -m benchmarks._gpu_server '{"shape": DIRECTORY, "span": "0:27", ...}'

`open` makes it serve, and says its address; a second `open` serves the same blocks anew, over
links of another round trip, without making them again.
"""

import asyncio
import gc
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks._program import answer_async
from benchmarks._server import LAB_DHT, shaped
from benchmarks._setups import SWARM
from p2pllm.addresses import parse_many
from p2pllm.config import NetConfig, NodeConfig, ServerConfig
from p2pllm.identity import Identity
from p2pllm.loops import new_event_loop
from p2pllm.model.dummy import read_config
from p2pllm.model.span_model import SpanCompute
from p2pllm.net.tcp import TcpNetwork
from p2pllm.server.server import BlockChoice, Server
from p2pllm.server.source import DummySource, LoadProgress
from p2pllm.spans import Span


class KeptSource(DummySource):
    """Makes its blocks once."""

    kept: SpanCompute | None = None

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        if self.kept is None:
            self.kept = super().load_span(span, settings, on_progress, loaded)
        return self.kept


async def serve(shape: str, span: str, settings: dict[str, Any]) -> None:
    """Until standard input ends."""
    directory = Path(shape)
    source = KeptSource(read_config(directory), directory.name)
    async with AsyncExitStack() as stack:

        async def open_(peers: list[str], rtt_s: float) -> dict[str, Any]:
            await stack.aclose()
            config = NodeConfig(
                net=NetConfig(SWARM, listen_host="127.0.0.1", listen_port=0, shaper=shaped(rtt_s)),
                dht=LAB_DHT,
                peers=parse_many(peers),
                server=ServerConfig(**settings),
            )
            server = await stack.enter_async_context(
                Server.open(
                    config,
                    Identity.generate(),
                    source,
                    BlockChoice(Span.parse(span)),
                    network=TcpNetwork(),
                )
            )
            gc.collect()
            gc.freeze()  # as `p2pllm serve` does
            presence = server.announcer.presence()
            return {
                "address": str(server.node.addresses[0]),
                "ms_per_block_1": 1e3 * presence.seconds_per_block_1,
                "ms_per_block_8": 1e3 * presence.seconds_per_block_8,
            }

        await answer_async({}, {"open": open_})


def main() -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()

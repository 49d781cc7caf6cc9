"""A server of the whole default model whose event loop is measured: `python measured_server.py`.

Prints its address as soon as it serves, and, when its standard input ends, as JSON: the callbacks
that used the most CPU time of the loop's thread, and how late a timer of 10 ms came.
"""

import asyncio
import json
import sys
import threading
import time
from asyncio.events import Handle

from p2pllm.config import NetConfig, NodeConfig, ServerConfig
from p2pllm.identity import Identity
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.hub import DEFAULT_MODEL, resolve_model
from p2pllm.net.tcp import TcpNetwork
from p2pllm.server.server import BlockChoice, Server
from p2pllm.server.source import CheckpointSource
from p2pllm.spans import Span

TICK_S = 0.01
NUM_SLOWEST = 5


class Meter:
    """Times every callback of the loop, by replacing what asyncio runs them with."""

    def __init__(self) -> None:
        self.slowest: list[tuple[float, str]] = []
        self.num_callbacks = 0
        self.lags: list[float] = []
        self.is_on = False

    def install(self) -> None:
        run_handle = Handle._run

        def measured(handle: Handle) -> None:
            if not self.is_on:
                run_handle(handle)
                return
            started = time.thread_time()
            run_handle(handle)
            used = time.thread_time() - started
            self.num_callbacks += 1
            if len(self.slowest) < NUM_SLOWEST or used > self.slowest[-1][0]:
                self.slowest.append((used, repr(handle)))
                self.slowest = sorted(self.slowest, reverse=True)[:NUM_SLOWEST]

        Handle._run = measured  # type: ignore[method-assign,assignment]

    async def tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            if self.is_on:
                self.lags.append(loop.time() - due)

    def report(self) -> dict[str, object]:
        lags = sorted(self.lags)
        return {
            "slowest": self.slowest,
            "num_callbacks": self.num_callbacks,
            "lag_p50_s": lags[len(lags) // 2],
            "lag_p99_s": lags[int(0.99 * (len(lags) - 1))],
            "lag_max_s": lags[-1],
        }


async def serve(meter: Meter) -> None:
    checkpoint = open_checkpoint(resolve_model(""), DEFAULT_MODEL)
    whole = BlockChoice(Span(0, checkpoint.config.num_blocks))
    config = NodeConfig(
        net=NetConfig(listen_host="127.0.0.1", listen_port=0),
        server=ServerConfig(dtype="float32", throughput=1e4),
    )
    source = CheckpointSource(checkpoint)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    network = TcpNetwork()
    async with Server.open(config, Identity.generate(), source, whole, network=network) as server:
        print(server.node.addresses[0], flush=True)  # noqa: T201 - what the test reads
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(meter.tick())
            meter.is_on = True
            await ended.wait()
            meter.is_on = False
            ticking.cancel()
    print(json.dumps(meter.report()), flush=True)  # noqa: T201


if __name__ == "__main__":
    the_meter = Meter()
    the_meter.install()
    asyncio.run(serve(the_meter))

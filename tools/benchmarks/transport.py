"""Transport: bulk rate, round trip, and a decode message's delay beside bulk, over loopback.

Two processes, each with an endpoint. The second one echoes small tensors and acknowledges large
ones. Three measurements:

    bulk            one 64 MiB tensor in a request of bulk priority, until it is answered
    request_reply   4 KiB there and 4 KiB back, decode priority, nothing else going on
    beside_bulk     the same while bulk saturates a link shaped to 100 Mbit/s and 30 ms RTT
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

from p2pllm.addresses import Address
from p2pllm.config import NetConfig, ShaperConfig
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.net.tcp import TcpNetwork
from p2pllm.wire.messages import Ack, Message, Output
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

QUICK = {"bulk_repeats": 1, "repeats": 50}
BULK_BYTES = 64 * 2**20
SMALL_BYTES = 4 * 2**10
ECHO_LIMIT = 64 * 2**10
WAN = ShaperConfig(delay_s=0.015, bandwidth_bytes_s=100e6 / 8)
PACE_S = 0.02  # between decode messages beside bulk: 50 tokens/s
TIMEOUT_S = 120.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--bulk-repeats", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=2000, help="of the small request")
    parser.add_argument("--uvloop", action="store_true", help="instead of asyncio's own loop")
    parser.add_argument("--serve", metavar="SHAPER_JSON", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, or (in the second process) serve."""
    work = serve(args.serve) if args.serve else measure(args)
    if not args.uvloop:
        return asyncio.run(work)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All three measurements as one object."""
    loop = "uvloop" if args.uvloop else "asyncio"

    async def plain(endpoint: Endpoint, peer: PeerId) -> dict[str, Any]:
        return {
            "request_reply": await small_requests(endpoint, peer, args.repeats),
            "bulk": await bulk_rate(endpoint, peer, args.bulk_repeats),
        }

    results = await with_peer(ShaperConfig(), args, plain)
    beside = await with_peer(WAN, args, beside_bulk)
    return {"loop": loop, **results, "beside_bulk": beside}


async def with_peer(
    shaper: ShaperConfig,
    args: argparse.Namespace,
    work: Callable[[Endpoint, PeerId], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    """Start the second process, connect to it, and run `work`."""
    command = [sys.executable, sys.argv[0], "transport", "--serve", json.dumps(asdict(shaper))]
    process = await asyncio.create_subprocess_exec(
        *command,
        *(["--uvloop"] if args.uvloop else []),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = Address.parse((await process.stdout.readline()).decode().strip())
        endpoint = await Endpoint.bind(config(shaper), Identity.generate(), TcpNetwork())
        async with asyncio.TaskGroup() as group:
            running = group.create_task(endpoint.run())
            peer = await endpoint.connect(address, timeout_s=10.0)
            result = await work(endpoint, peer)
            running.cancel()
        return result
    finally:
        process.stdin.close()
        await process.wait()


async def serve(shaper: str) -> dict[str, Any]:
    """The second process: say where we are, and go on until standard input ends."""
    endpoint = await Endpoint.bind(
        config(ShaperConfig(**json.loads(shaper))), Identity.generate(), TcpNetwork()
    )

    async def answer(request: Request[Output]) -> Message:
        tensor = request.message.tensor
        return Ack() if len(tensor.data) > ECHO_LIMIT else Output((), tensor)

    endpoint.handle(Output, answer)
    print(endpoint.addresses[0], flush=True)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(endpoint.run())
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()
        running.cancel()
    return {}


def config(shaper: ShaperConfig) -> NetConfig:
    """An endpoint of one side."""
    return replace(NetConfig(), listen_host="127.0.0.1", listen_port=0, shaper=shaper)


async def bulk_rate(endpoint: Endpoint, peer: PeerId, repeats: int) -> dict[str, Any]:
    """How fast one 64 MiB tensor arrives, in MB/s (10^6 bytes)."""
    message = tensor_of(BULK_BYTES)
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        await endpoint.request(peer, message, timeout_s=TIMEOUT_S, priority=Priority.BULK)
        rates.append(BULK_BYTES / 1e6 / (time.perf_counter() - began))
    return {"mb_per_s_median": round(statistics.median(rates)), "mb_per_s_min": round(min(rates))}


async def small_requests(endpoint: Endpoint, peer: PeerId, repeats: int) -> dict[str, Any]:
    """4 KiB there and back, in milliseconds."""
    return in_ms([await one_request(endpoint, peer) for _ in range(repeats)])


async def beside_bulk(endpoint: Endpoint, peer: PeerId) -> dict[str, Any]:
    """4 KiB there and back, alone and while 64 MiB are on their way in the same direction."""
    alone = [await one_request(endpoint, peer) for _ in range(20)]
    beside: list[float] = []

    async def bulk() -> float:
        began = time.perf_counter()
        await endpoint.request(
            peer, tensor_of(BULK_BYTES), timeout_s=TIMEOUT_S, priority=Priority.BULK
        )
        return time.perf_counter() - began

    async with asyncio.TaskGroup() as group:
        transfer = group.create_task(bulk())
        while not transfer.done():
            await asyncio.sleep(PACE_S)
            beside.append(await one_request(endpoint, peer))
    seconds = transfer.result()
    return {
        "rtt_ms": 2e3 * WAN.delay_s,
        "alone": in_ms(alone),
        "with_bulk": in_ms(beside),
        "bulk_mb_per_s": round(BULK_BYTES / 1e6 / seconds, 2),
    }


async def one_request(endpoint: Endpoint, peer: PeerId) -> float:
    """The seconds that one small request takes."""
    began = time.perf_counter()
    await endpoint.request(
        peer, tensor_of(SMALL_BYTES), timeout_s=TIMEOUT_S, priority=Priority.DECODE
    )
    return time.perf_counter() - began


def tensor_of(num_bytes: int) -> Output:
    """A message with a tensor of so many bytes."""
    shape = (num_bytes // DType.BFLOAT16.itemsize,)
    header = TensorHeader(TensorCodec.RAW, Compression.NONE, DType.BFLOAT16, shape)
    return Output((), WireTensor(header, bytes(num_bytes)))


def in_ms(seconds: list[float]) -> dict[str, Any]:
    """Median and 95th percentile."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "p95_ms": round(1e3 * cuts[18], 3),
        "samples": len(seconds),
    }

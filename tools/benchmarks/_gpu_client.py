"""A client of the random model of a shape, in a process of its own: see `_gpu_server`.

    python -m benchmarks._gpu_client '{"shape": DIRECTORY, "peers": [...], ...}'

It answers as `_client` does.
"""

import asyncio
import json
import sys
from dataclasses import replace

import p2pllm
from benchmarks._client import Bench
from benchmarks._program import answer_async
from benchmarks._server import LAB_DHT, shaped
from benchmarks._setups import SWARM
from p2pllm.client.client import client_config
from p2pllm.config import NodeConfig
from p2pllm.loops import new_event_loop


async def take_part(shape: str, peers: list[str], device: str, rtt_s: float) -> None:
    """Until standard input ends."""
    net = replace(client_config(SWARM).net, shaper=shaped(rtt_s))
    config = NodeConfig(net=net, dht=replace(LAB_DHT, is_client=True))
    async with p2pllm.connect(
        peers, config=config, dtype="bfloat16", wire_codec="raw", device=device, load="dummy"
    ) as swarm:
        bench = Bench(await swarm.model(shape))
        await answer_async({}, {"closed": bench.closed, "usage": bench.usage})


def main() -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(take_part(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()

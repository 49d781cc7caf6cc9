"""A peer in a process of its own, to be killed and stopped: `python peer_process.py`.

Prints its address once it listens. It answers FindNode, is never done with FindValue, takes pushes
of Nodes, and runs until it is killed.
"""

import asyncio
import sys
from dataclasses import replace

from p2pllm.config import NetConfig
from p2pllm.identity import Identity
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.rpc import Request
from p2pllm.net.tcp import TcpNetwork
from p2pllm.wire.messages import FindNode, FindValue, Message, Nodes


async def echo(request: Request[FindNode]) -> Message:
    return Nodes((request.message.target,))


async def never(request: Request[FindValue]) -> Message:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable: nobody sets that future")


async def take(request: Request[Nodes]) -> None:
    pass


async def main() -> None:
    config = replace(NetConfig(), listen_host="127.0.0.1", listen_port=0)
    endpoint = await Endpoint.bind(config, Identity.from_seed(bytes([99]) * 32), TcpNetwork())
    endpoint.handle(FindNode, echo)
    endpoint.handle(FindValue, never)
    endpoint.handle(Nodes, take)
    sys.stdout.write(f"{endpoint.addresses[0]}\n")
    sys.stdout.flush()
    await endpoint.run()


if __name__ == "__main__":
    asyncio.run(main())

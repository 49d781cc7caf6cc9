"""`p2pllm bootstrap`: a DHT node without blocks."""

import asyncio
from dataclasses import replace

import click

from p2pllm.cli.nodes import (
    identity_of,
    join_line,
    listening_node,
    prepare_ready_file,
    write_ready_file,
)
from p2pllm.cli.options import NodeOptions, common_options, node_options
from p2pllm.cli.runner import serve_until_stopped
from p2pllm.config import NodeConfig


@click.command("bootstrap")
@node_options
@common_options
@click.pass_context
def command(ctx: click.Context, network: NodeOptions) -> None:
    """Run a node that only helps others to find each other.

    It holds no blocks and needs next to nothing: a place that is always on, so that servers and
    clients have an address to begin with. Without --peers it begins a new swarm.

    \b
    On a computer that others can reach:
      p2pllm bootstrap --announce 203.0.113.7:31337
    Then, anywhere:
      p2pllm serve --peers 203.0.113.7:31337 --num-blocks 10
    """
    if not network.peers:
        network = replace(network, new_swarm=True)
    config = listening_node(ctx, network)
    prepare_ready_file(network.ready_file)
    serve_until_stopped(_run(config, network))


async def _run(config: NodeConfig, network: NodeOptions) -> None:
    from p2pllm.net.tcp import TcpNetwork
    from p2pllm.swarm.node import Node

    async with Node.open(config, identity_of(network), network=TcpNetwork()) as node:
        await node.join()
        click.echo(f"Bootstrap node of the swarm {network.swarm!r}")
        click.echo(f"  peer     {node.peer_id}")
        click.echo(f"  join     {join_line(node.addresses, network.swarm)}")
        click.echo("Ctrl-C stops.")
        write_ready_file(network.ready_file, node)
        await asyncio.Event().wait()

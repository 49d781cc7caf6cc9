"""`p2pllm serve`: a server of some blocks."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from p2pllm.cli.nodes import (
    identity_of,
    join_line,
    listening_node,
    prepare_ready_file,
    write_ready_file,
)
from p2pllm.cli.options import (
    DTYPES,
    NodeOptions,
    common_options,
    model_option,
    node_options,
    option,
)
from p2pllm.cli.params import PEER_ID, SIZE, SPAN, THROUGHPUT
from p2pllm.cli.runner import serve_until_stopped
from p2pllm.cli.terminal import Activity
from p2pllm.config import NodeConfig, ServerConfig
from p2pllm.ids import PeerId
from p2pllm.spans import Span

if TYPE_CHECKING:
    from p2pllm.identity import Identity
    from p2pllm.server.server import CheckpointSource, Server

DEFAULTS = ServerConfig()


@click.command("serve")
@model_option
@option(
    "--blocks",
    type=SPAN,
    metavar="START:STOP",
    help="Serve these blocks, as in 10:20 (the second number is not included).",
)
@option(
    "--num-blocks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Serve the N blocks that the swarm needs most.  [default: as many as --memory allows]",
)
@node_options
@option(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:1 …",
)
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="What to compute in; auto is bfloat16 where that is fast.",
)
@option(
    "--memory",
    type=SIZE,
    metavar="SIZE",
    default=0,
    help="For blocks and cache together, as in 4GiB.  [default: no limit]",
)
@option(
    "--cache-tokens",
    type=click.IntRange(min=64),
    metavar="N",
    default=DEFAULTS.cache_tokens,
    show_default=True,
    help="How many tokens all sessions together may hold.",
)
@option(
    "--max-sessions",
    type=click.IntRange(min=1),
    metavar="N",
    default=DEFAULTS.max_sessions,
    show_default=True,
    help="How many sessions at once.",
)
@option(
    "--max-tokens-per-peer",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    help="What one peer may hold while others wait.  [default: a quarter of --cache-tokens]",
)
@option(
    "--throughput",
    type=THROUGHPUT,
    metavar="auto|X",
    default="auto",
    help="Speed to announce, in tokens × blocks per second.  [default: auto, measured at start]",
)
@option("--public-name", metavar="NAME", default="", help="A name to show to others.")
@option("--allow", type=PEER_ID, metavar="PEERID", multiple=True, help="Serve only these peers.")
@option("--block", type=PEER_ID, metavar="PEERID", multiple=True, help="Never serve these peers.")
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    blocks: Span | None,
    num_blocks: int | None,
    network: NodeOptions,
    device: str,
    dtype: str,
    memory: int,
    cache_tokens: int,
    max_sessions: int,
    max_tokens_per_peer: int,
    throughput: float,
    public_name: str,
    allow: tuple[PeerId, ...],
    block: tuple[PeerId, ...],
) -> None:
    """Serve blocks of a model to the swarm.

    Loads the blocks, measures how fast they are here, tells the swarm, and serves until Ctrl-C.

    \b
    Begin a swarm with the whole default model:
      p2pllm serve --new-swarm --blocks 0:30
    Join one with the ten blocks that it needs most:
      p2pllm serve --peers 203.0.113.7:31337 --num-blocks 10
    """
    if blocks is not None and num_blocks is not None:
        raise click.UsageError("--blocks names blocks and --num-blocks counts them: give one", ctx)
    settings = ServerConfig(
        dtype=dtype,
        device=device,
        cache_tokens=cache_tokens,
        max_sessions=max_sessions,
        max_tokens_per_peer=max_tokens_per_peer,
        throughput=throughput,
        public_name=public_name,
        allow=frozenset(map(str, allow)),
        block=frozenset(map(str, block)),
    )
    config = _peers_explained(ctx, network, settings)
    prepare_ready_file(network.ready_file)
    offer = _Wanted(model, blocks, num_blocks or 0, memory)
    with Activity() as activity:
        activity.say("starting")
        serve_until_stopped(_serve(config, identity_of(network), offer, network, activity))


def _peers_explained(
    ctx: click.Context, network: NodeOptions, settings: ServerConfig
) -> NodeConfig:
    if not network.peers and not network.new_swarm:
        raise click.UsageError(
            "neither --peers nor --new-swarm: join a swarm with --peers HOST:PORT (any member of "
            "it; it prints its address when it starts), or begin one with --new-swarm",
            ctx,
        )
    return listening_node(ctx, network, settings)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the user asked to serve."""

    model: str
    blocks: Span | None
    num_blocks: int
    memory_bytes: int


async def _serve(
    config: NodeConfig,
    identity: "Identity",
    wanted: _Wanted,
    network: NodeOptions,
    activity: Activity,
) -> None:
    from p2pllm.net.tcp import TcpNetwork
    from p2pllm.server.server import BlockChoice, Server, check_choice

    source = await asyncio.to_thread(_open_source, wanted.model, activity)
    choice = BlockChoice(wanted.blocks, wanted.num_blocks, wanted.memory_bytes)
    check_choice(choice, source.config.num_blocks)  # before the network is bothered
    activity.say("joining the swarm" if config.peers else "starting a swarm")

    def on_progress(done: int, total: int) -> None:
        activity.on_blocks("loading blocks", done, total)
        if done == total:
            activity.say("measuring the speed")

    async with Server.open(
        config, identity, source, choice, network=TcpNetwork(), on_progress=on_progress
    ) as server:
        activity.clear()
        _describe(server, network)
        write_ready_file(
            network.ready_file, server.node, server.offer.model.name, server.offer.span
        )
        await asyncio.Event().wait()


def _describe(server: "Server", network: NodeOptions) -> None:
    offer, presence = server.offer, server.announcer.presence()
    node = server.node
    click.echo(f"Serving blocks {offer.span} of {offer.model} in {offer.numerics.dtype}")
    click.echo(f"  peer     {node.peer_id}")
    click.echo(f"  join     {join_line(node.addresses, network.swarm)}")
    per_token_s = presence.seconds_per_block_1 * len(offer.span)
    click.echo(
        f"  speed    {1 / per_token_s:.1f} tokens/s through these blocks, "
        f"{presence.prefill_tokens_s / len(offer.span):.0f} while reading a prompt"
    )
    click.echo(f"  cache    {presence.free_tokens} tokens")
    click.echo("Ctrl-C stops.")


def _open_source(name: str, activity: Activity) -> "CheckpointSource":
    from p2pllm.model.checkpoint import open_checkpoint
    from p2pllm.model.hub import DEFAULT_MODEL, resolve_model
    from p2pllm.server.server import CheckpointSource

    def on_bytes(done: int, total: int) -> None:
        activity.on_bytes("fetching the model", done, total)

    name = name or DEFAULT_MODEL
    checkpoint = open_checkpoint(resolve_model(name, progress=on_bytes))
    return CheckpointSource(checkpoint, name, on_bytes)

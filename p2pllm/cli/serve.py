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
    span_memory,
    write_ready_file,
)
from p2pllm.cli.options import (
    DTYPES,
    SCHEMES,
    NodeOptions,
    common_options,
    model_option,
    node_options,
    option,
)
from p2pllm.cli.params import PEER_ID, SIZE, SPAN, THROUGHPUT
from p2pllm.cli.runner import GentleStop, serve_until_stopped
from p2pllm.cli.terminal import Activity, binary_size, tell
from p2pllm.config import NodeConfig, ServerConfig
from p2pllm.ids import PeerId
from p2pllm.spans import Span

if TYPE_CHECKING:
    from p2pllm.identity import Identity
    from p2pllm.server.capacity import Capacity
    from p2pllm.server.server import Server
    from p2pllm.server.source import CheckpointSource

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
    help="Serve the N blocks that the swarm needs most.  [default: as many as fit]",
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
    "--quantize",
    type=click.Choice(SCHEMES),
    default=DEFAULTS.quantize,
    show_default=True,
    help="Hold the blocks in 8 or 4 bits: less memory, more tokens per second, less exact.",
)
@option(
    "--memory",
    type=SIZE,
    metavar="SIZE",
    default=0,
    help="For blocks and cache together, as in 4GiB.  [default: nine tenths of what is free]",
)
@option(
    "--cache-sessions",
    type=click.IntRange(min=1),
    metavar="N",
    default=8,
    show_default=True,
    help="Keep room for so many sessions at once, before any block gets memory.",
)
@option(
    "--session-tokens",
    type=click.IntRange(min=64),
    metavar="N",
    default=DEFAULTS.cache_tokens // 8,
    show_default=True,
    help="How long the sessions are that room is kept for; real ones may be longer or shorter.",
)
@option(
    "--cache-tokens",
    type=click.IntRange(min=64),
    metavar="N",
    help="How many tokens all sessions together may hold.  [default: the two above, multiplied]",
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
@option(
    "--balance/--no-balance",
    "is_balanced",
    default=True,
    show_default=True,
    help="Move to other blocks when the swarm needs them more; never with --blocks.",
)
@option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="How long sessions have to move elsewhere when the server is told to stop.",
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
    quantize: str,
    memory: int,
    cache_sessions: int,
    session_tokens: int,
    cache_tokens: int | None,
    max_sessions: int,
    max_tokens_per_peer: int,
    throughput: float,
    is_balanced: bool,
    drain_timeout: float,
    public_name: str,
    allow: tuple[PeerId, ...],
    block: tuple[PeerId, ...],
) -> None:
    """Serve blocks of a model to the swarm.

    Loads the blocks, measures how fast they are here, tells the swarm, and serves until Ctrl-C;
    then sessions have time to move elsewhere.

    \b
    Begin a swarm with the whole default model:
      p2pllm serve --new-swarm --blocks 0:30
    Join one with the ten blocks that it needs most:
      p2pllm serve --peers 203.0.113.7:31337 --num-blocks 10
    """
    if blocks is not None and num_blocks is not None:
        raise click.UsageError("--blocks names blocks and --num-blocks counts them: give one", ctx)
    if quantize != "none" and dtype not in ("auto", "bfloat16"):
        raise click.UsageError(f"{quantize} weights are computed with in bfloat16 only", ctx)
    settings = ServerConfig(
        dtype=dtype,
        quantize=quantize,
        device=device,
        cache_tokens=cache_tokens or cache_sessions * session_tokens,
        max_sessions=max_sessions,
        max_tokens_per_peer=max_tokens_per_peer,
        throughput=throughput,
        is_balanced=is_balanced,
        public_name=public_name,
        allow=frozenset(map(str, allow)),
        block=frozenset(map(str, block)),
    )
    config = _peers_explained(ctx, network, settings)
    prepare_ready_file(network.ready_file)
    wanted = _Wanted(model, blocks, num_blocks or 0, memory, session_tokens)
    stopping = GentleStop(drain_timeout)
    with Activity() as activity:
        activity.say("starting")
        serve_until_stopped(
            _serve(config, identity_of(network), wanted, network, activity, stopping),
            gently=stopping,
        )


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
    """What the user asked for, beside what is the server's business."""

    model: str
    blocks: Span | None
    num_blocks: int
    memory_bytes: int
    session_tokens: int


async def _serve(
    config: NodeConfig,
    identity: "Identity",
    wanted: _Wanted,
    network: NodeOptions,
    activity: Activity,
    stopping: GentleStop,
) -> None:
    from p2pllm.net.tcp import TcpNetwork
    from p2pllm.server.server import BlockChoice, Server, check_choice

    source = await asyncio.to_thread(_open_source, wanted.model, activity)
    memory = span_memory(network)
    choice = BlockChoice(
        wanted.blocks, wanted.num_blocks, wanted.memory_bytes, memory.read(source.model_id)
    )
    check_choice(choice, source.config.num_blocks)  # before the network is bothered
    activity.say("joining the swarm" if config.peers else "starting a swarm")

    def on_progress(done: int, total: int) -> None:
        activity.on_blocks("loading blocks", done, total)
        if done == total:
            activity.say("measuring the speed")

    def note(server: "Server") -> None:
        memory.write(source.model_id, server.offer.span)
        write_ready_file(
            network.ready_file, server.node, server.offer.model.name, server.offer.span
        )

    def on_moved(span: Span) -> None:
        click.echo(f"Moved to blocks {span}, which the swarm needs more")
        note(server)

    async with Server.open(
        config, identity, source, choice, network=TcpNetwork(), on_progress=on_progress
    ) as server:
        activity.clear()
        server.on_moved = on_moved
        _describe(server, network, wanted.session_tokens)
        note(server)
        await stopping.wait()
        await _drain(server, stopping.within_s, activity)


async def _drain(server: "Server", timeout_s: float, activity: Activity) -> None:
    """Let the sessions go elsewhere, and say what we wait for."""
    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(_tell_what_drains(server, timeout_s, activity))
        await server.drain(timeout_s)
        telling.cancel()
    activity.clear()


async def _tell_what_drains(server: "Server", timeout_s: float, activity: Activity) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    has_told = False
    while num_sessions := len(server.service.sessions):
        noun = "session" if num_sessions == 1 else "sessions"
        left_s = max(0.0, deadline - loop.time())
        text = f"waiting for {num_sessions} {noun} to move ({left_s:.0f} s left)"
        if not has_told:
            tell(f"{text}, Ctrl-C again to leave now")
            has_told = True
        activity.say(text)
        await asyncio.sleep(1.0)


def _describe(server: "Server", network: NodeOptions, session_tokens: int) -> None:
    offer, presence = server.offer, server.announcer.presence()
    node = server.node
    click.echo(f"Serving blocks {offer.span} of {offer.model} in {offer.numerics}")
    click.echo(f"  peer     {node.peer_id}")
    click.echo(f"  join     {join_line(node.addresses, network.swarm)}")
    per_token_s = presence.seconds_per_block_1 * len(offer.span)
    click.echo(
        f"  speed    {1 / per_token_s:.1f} tokens/s through these blocks, "
        f"{presence.prefill_tokens_s / len(offer.span):.0f} while reading a prompt"
    )
    click.echo(f"  cache    {presence.free_tokens} tokens")
    click.echo(f"  memory   {_memory_line(server.capacity, presence.free_tokens, session_tokens)}")
    click.echo("Ctrl-C stops.")


def _memory_line(capacity: "Capacity", cache_tokens: int, session_tokens: int) -> str:
    """What was decided and why: "30 blocks: 5.1 GiB weights + 0.8 GiB cache for 8 sessions …"."""
    return (
        f"{capacity.num_blocks} blocks: {binary_size(capacity.weight_bytes)} weights + "
        f"{binary_size(capacity.cache_bytes)} cache for {cache_tokens / session_tokens:.3g} "
        f"sessions of {session_tokens} tokens, of {binary_size(capacity.limit_bytes)}"
    )


def _open_source(name: str, activity: Activity) -> "CheckpointSource":
    from p2pllm.model.checkpoint import open_checkpoint
    from p2pllm.model.hub import DEFAULT_MODEL, resolve_model
    from p2pllm.server.source import CheckpointSource

    def on_bytes(done: int, total: int) -> None:
        activity.on_bytes("fetching the model", done, total)

    name = name or DEFAULT_MODEL
    checkpoint = open_checkpoint(resolve_model(name, progress=on_bytes))
    return CheckpointSource(checkpoint, name, on_bytes)

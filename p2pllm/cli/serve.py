"""`p2pllm serve`: a server of some blocks."""

import asyncio
import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
from p2pllm.cli.runner import STOP_WITHIN_S, GentleStop, serve_until_stopped
from p2pllm.cli.terminal import Activity, binary_size, tell
from p2pllm.config import NodeConfig, ServerConfig, device_names
from p2pllm.ids import PeerId
from p2pllm.spans import Span

if TYPE_CHECKING:
    from p2pllm.identity import Identity
    from p2pllm.server.capacity import Capacity
    from p2pllm.server.server import Server
    from p2pllm.server.source import ModelSource

DEFAULTS = ServerConfig()


GIVEN = f"{__name__}.given"  # where a context has the arguments as they were typed


class _RemembersArguments(click.Command):
    """So that they can be given to other processes of the same command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[GIVEN] = tuple(args)
        return super().parse_args(ctx, args)


@click.command("serve", cls=_RemembersArguments)
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
    help="Where to compute: cpu, cuda, cuda:1 …  Several with commas between, or all (GPUs), "
    "hold a part of the blocks each.",
)
@option(
    "--per-device/--no-per-device",
    default=False,
    help="A server in a process of its own for each device (ports count up, blocks and --memory "
    "are shared out) instead of one over all of them.",
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
    "--kv-bits",
    type=click.Choice(("16", "8")),
    default=str(DEFAULTS.kv_bits),
    show_default=True,
    help="Hold keys and values as they are computed, or in 8 bits: half the memory of bfloat16.",
)
@option(
    "--load",
    type=click.Choice(("checkpoint", "dummy")),
    default=DEFAULTS.load,
    show_default=True,
    help="dummy: random weights of the shape in MODEL's config.json, to measure speed without "
    "files; no swarm mixes them with the real model.",
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
    per_device: bool,
    dtype: str,
    quantize: str,
    kv_bits: str,
    load: str,
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
    All GPUs as one server, or as one server each:
      p2pllm serve --peers 203.0.113.7:31337 --device all
      p2pllm serve --peers 203.0.113.7:31337 --device all --per-device
    """
    if blocks is not None and num_blocks is not None:
        raise click.UsageError("--blocks names blocks and --num-blocks counts them: give one", ctx)
    if quantize != "none" and dtype not in ("auto", "bfloat16"):
        raise click.UsageError(f"{quantize} weights are computed with in bfloat16 only", ctx)
    settings = ServerConfig(
        dtype=dtype,
        quantize=quantize,
        kv_bits=int(kv_bits),
        load=load,
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
    if per_device:
        _serve_per_device(ctx, device, wanted, network, drain_timeout)
        return
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


def _serve_per_device(
    ctx: click.Context, device: str, wanted: _Wanted, network: NodeOptions, drain_timeout: float
) -> None:
    """Start this command again for each device, and look after them."""
    from p2pllm.cli.supervisor import Supervisor, share_out

    if network.announce:
        raise click.UsageError(
            "--announce is one address and --per-device makes several servers: start one for each "
            "device, with a --listen and --announce of its own",
            ctx,
        )
    shares = share_out(
        _names_of(device),
        network,
        blocks=wanted.blocks,
        num_blocks=wanted.num_blocks,
        memory_bytes=wanted.memory_bytes,
    )
    stopping = GentleStop(drain_timeout + STOP_WITHIN_S)  # they take that long after draining
    with tempfile.TemporaryDirectory(prefix="p2pllm-serve-") as directory:
        supervisor = Supervisor(shares, ctx.meta[GIVEN], network, stopping, Path(directory))
        serve_until_stopped(supervisor.run(), gently=stopping)


def _names_of(device: str) -> Sequence[str]:
    """The devices meant: all, if nobody says. Torch is only needed here to count GPUs."""
    if device not in ("auto", "all"):
        return device_names(device)
    from p2pllm.model.device import all_device_names

    return all_device_names()


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

    source = await asyncio.to_thread(_open_source, wanted.model, config.server, activity)
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
        # What is there now stays: looking through all of it for garbage takes 50 ms, in which a
        # token waits.
        gc.collect()
        gc.freeze()
        server.on_moved = on_moved
        _describe(server, network, config.server, wanted.session_tokens)
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


def _describe(
    server: "Server", network: NodeOptions, config: ServerConfig, session_tokens: int
) -> None:
    offer, presence = server.offer, server.announcer.presence()
    node = server.node
    click.echo(f"Serving blocks {offer.span} of {offer.model} in {offer.numerics}")
    if config.load == "dummy":
        click.echo("  RANDOM WEIGHTS: only the speed means something, not the answers")
    click.echo(f"  peer     {node.peer_id}")
    click.echo(f"  join     {join_line(node.addresses, network.swarm)}")
    per_token_s = presence.seconds_per_block_1 * len(offer.span)
    click.echo(
        f"  speed    {1 / per_token_s:.1f} tokens/s through these blocks, "
        f"{presence.prefill_tokens_s / len(offer.span):.0f} while reading a prompt"
    )
    if len(server.parts) > 1:
        parts = ", ".join(f"{blocks} on {device}" for device, blocks in server.parts)
        click.echo(f"  devices  {parts}")
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


def _open_source(name: str, settings: ServerConfig, activity: Activity) -> "ModelSource":
    from p2pllm.model.device import Compute
    from p2pllm.model.hub import DEFAULT_MODEL, resolve_model
    from p2pllm.server.source import source_of

    def on_bytes(done: int, total: int) -> None:
        activity.on_bytes("fetching the model", done, total)

    Compute.of(settings)  # a device that is not there is told of before anything is fetched
    name = name or DEFAULT_MODEL
    return source_of(name, resolve_model(name, progress=on_bytes), settings, on_bytes)

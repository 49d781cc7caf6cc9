"""`p2pllm status`: who serves which blocks, drawn."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from p2pllm.cli.looking import joined, matching, seen_models, views_of
from p2pllm.cli.nodes import asking_node
from p2pllm.cli.options import ClientOptions, client_options, common_options, option
from p2pllm.cli.runner import run
from p2pllm.cli.terminal import Activity, milliseconds
from p2pllm.config import NodeConfig
from p2pllm.spans import Span, uncovered

if TYPE_CHECKING:
    from p2pllm.swarm.view import ServerView, SwarmView

COLUMNS = ("server", "name", "blocks", "state", "type", "rtt ms", "tok/s", "queue ms", "free")
BAR_WIDTH = 40  # characters that all blocks of a model take, at most


@click.command("status")
@option("--model", metavar="MODEL", default="", help="Only this model.  [default: all of them]")
@client_options
@option("--json", "as_object", is_flag=True, help="Print one JSON object.")
@common_options
@click.pass_context
def command(ctx: click.Context, model: str, network: ClientOptions, as_object: bool) -> None:
    """Show who serves which blocks.

    For every model of the swarm its servers, the part of the model that each holds, how far away
    and how fast they are, and which blocks nobody has.

    \b
    Example:
      p2pllm status --peers HOST:PORT
    """
    with Activity() as activity:
        activity.say("asking the swarm")
        views = run(_look(asking_node(ctx, network), network, model))
    if as_object:
        click.echo(json.dumps({"models": [_as_json(view) for view in views]}))
    elif not views:
        click.echo("No model is served here; begin with `p2pllm serve`.")
    elif sys.stdout.isatty():
        _draw(views)
    else:
        click.echo("\n\n".join(_plain(view) for view in views))


async def _look(config: NodeConfig, network: ClientOptions, wanted: str) -> list["SwarmView"]:
    async with joined(config, network) as node:
        return await views_of(node, matching(await seen_models(node), wanted))


# --- for people -------------------------------------------------------------------------------


def _draw(views: Sequence["SwarmView"]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for view in views:
        complete = not _missing(view)
        table = Table(title=_title(view), title_justify="left", title_style="bold", box=None)
        table.add_column(f"0 … {view.num_blocks}", no_wrap=True)
        for name in COLUMNS:
            table.add_column(name, justify="right" if name in COLUMNS[5:] else "left")
        for server in _in_order(view):
            bar = Text(_bar(server.span, view.num_blocks), style="green")
            table.add_row(bar, *map(Text, _cells(view, server)))
        console.print(table)
        console.print(Text(_summary(view), style="green" if complete else "bold red"))


def _plain(view: "SwarmView") -> str:
    rows = [COLUMNS, *(_cells(view, server) for server in _in_order(view))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([_title(view), *lines, _summary(view)])


def _title(view: "SwarmView") -> str:
    return f"{view.model}, {view.num_blocks} blocks"


def _summary(view: "SwarmView") -> str:
    missing = _missing(view)
    if missing:
        spans = ", ".join(missing)
        return f"Nobody serves blocks {spans}: the model cannot answer."
    fewest = min(
        sum(not view.is_penalised(server) for server in servers) for servers in view.by_block()
    )
    servers = "server" if fewest == 1 else "servers"
    return f"All blocks are served, each by {fewest} {servers} or more."


def _missing(view: "SwarmView") -> list[str]:
    """The blocks of which no server is online and answers."""
    from p2pllm.swarm.announcements import ServerState

    here = (
        server.span
        for server in view.servers
        if server.presence.state is ServerState.ONLINE and not view.is_penalised(server)
    )
    return [str(span) for span in uncovered(Span(0, view.num_blocks), here)]


def _state(view: "SwarmView", server: "ServerView") -> str:
    """Its own word, unless it did not answer just now: who is killed says no goodbye."""
    return "no answer" if view.is_penalised(server) else server.presence.state.name.lower()


def _in_order(view: "SwarmView") -> list["ServerView"]:
    return sorted(view.servers, key=lambda server: (server.span, server.peer_id))


def _bar(span: Span, num_blocks: int) -> str:
    """The span's place among all blocks, one character for a block or a few of them."""
    per_cell = -(-num_blocks // BAR_WIDTH)
    cells = range(0, num_blocks, per_cell)
    return "".join(
        "█" if span.overlap(Span(at, min(at + per_cell, num_blocks))) else "·" for at in cells
    )


def _cells(view: "SwarmView", server: "ServerView") -> tuple[str, ...]:
    presence = server.presence
    per_token_s = server.seconds_per_block(1) * len(server.span)
    return (
        server.peer_id.short,
        presence.public_name or "-",
        str(server.span),
        _state(view, server),
        str(presence.numerics),
        milliseconds(server.rtt_s),
        f"{1 / per_token_s:.1f}",
        milliseconds(server.expected_queue_s),
        str(presence.free_tokens),
    )


# --- for programs -----------------------------------------------------------------------------


def _as_json(view: "SwarmView") -> dict[str, Any]:
    return {
        "model": view.model.name,
        "digest": view.model.digest.hex(),
        "num_blocks": view.num_blocks,
        "missing": _missing(view),
        "servers": [
            {
                "peer_id": str(server.peer_id),
                "public_name": server.presence.public_name,
                "blocks": str(server.span),
                "state": _state(view, server),
                "dtype": server.presence.numerics.dtype,
                "quantization": server.presence.numerics.quantization,
                "rtt_s": server.rtt_s,
                "seconds_per_block": server.seconds_per_block(1),
                "prefill_tokens_s": server.expected_prefill_tokens_s,
                "queue_s": server.expected_queue_s,
                "free_tokens": server.presence.free_tokens,
                "max_tokens_per_session": server.presence.max_tokens_per_session,
                "version": server.presence.version,
            }
            for server in _in_order(view)
        ],
    }

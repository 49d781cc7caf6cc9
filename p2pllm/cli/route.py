"""`p2pllm route`: the chosen chain, and why."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from p2pllm.cli.looking import SeenModel, joined, only_one, seen_models, view_of
from p2pllm.cli.nodes import asking_node
from p2pllm.cli.options import (
    ClientOptions,
    chain_option,
    client_options,
    common_options,
    model_option,
    option,
)
from p2pllm.cli.runner import run
from p2pllm.cli.terminal import Activity, milliseconds
from p2pllm.config import NodeConfig

if TYPE_CHECKING:
    from p2pllm.routing.costs import HopCost
    from p2pllm.routing.planner import Route, RouteHop, RouteRequest

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
OBJECTIVES = ("total", "first-token", "each-token")
COLUMNS = (
    "server",
    "blocks",
    "step",
    "rtt",
    "transfer",
    "queue",
    "compute",
    "overhead",
    "cache wait",
    "total",
)


@click.command("route")
@model_option
@client_options
@option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    default=128,
    show_default=True,
    help="Length of the prompt.",
)
@option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    default=128,
    show_default=True,
    help="How many tokens are generated.",
)
@option(
    "--dtype",
    type=click.Choice(tuple(ITEMSIZE)),
    default="bfloat16",
    show_default=True,
    help="What hidden states travel in.",
)
@option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default=OBJECTIVES[0],
    show_default=True,
    help="What is to be short: all of it, the time to the first token, or that of each token.",
)
@option(
    "--own-ms",
    type=click.FloatRange(min=0.0),
    metavar="MS",
    default=0.0,
    show_default=True,
    help="This computer's own work per token (embeddings and head), in milliseconds, as "
    '"p2pllm generate" reports it; no model is loaded here to measure it.',
)
@chain_option
@option("--json", "as_object", is_flag=True, help="Print one JSON object.")
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    network: ClientOptions,
    prompt_tokens: int,
    max_new_tokens: int,
    dtype: str,
    objective: str,
    own_ms: float,
    is_chained: bool,
    as_object: bool,
) -> None:
    """Show the chain of servers that a request would take, and why.

    For each server of the chain what it adds to a chunk of the prompt and to every new token,
    term by term in milliseconds; then the times that are expected, and what they are made of. The
    chunks of a long prompt overlap: one server works on a chunk while the next one works on the
    chunk before.

    \b
    Example:
      p2pllm route --peers HOST:PORT --prompt-tokens 1000
    """
    from p2pllm.routing.planner import RouteRequest
    from p2pllm.routing.request import Objective

    request = RouteRequest(
        prompt_tokens=prompt_tokens,
        new_tokens=max_new_tokens,
        own_step_s=own_ms / 1e3,
        objective=Objective(objective),
        relayed=not is_chained,
    )
    with Activity() as activity:
        activity.say("asking the swarm")
        planning = _plan(asking_node(ctx, network), network, model, request, ITEMSIZE[dtype])
        seen, route = run(planning)
    if as_object:
        click.echo(json.dumps(_as_json(seen, route)))
    elif sys.stdout.isatty():
        _draw(seen, route, request)
    else:
        click.echo(_plain(seen, route, request))


async def _plan(
    config: NodeConfig,
    network: ClientOptions,
    wanted: str,
    request: "RouteRequest",
    itemsize: int,
) -> tuple[SeenModel, "Route"]:
    from p2pllm.model.hub import DEFAULT_MODEL
    from p2pllm.routing.planner import plan

    async with joined(config, network) as node:
        seen = only_one(await seen_models(node), wanted, DEFAULT_MODEL)
        sized = replace(request, activation_bytes_per_token=seen.hidden_size * itemsize)
        return seen, plan(await view_of(node, seen), sized)


def _draw(seen: SeenModel, route: "Route", request: "RouteRequest") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(seen), title_justify="left", title_style="bold", box=None)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in COLUMNS[3:] else "left")
    for cells in _rows(route):
        table.add_row(*map(Text, cells))
    console = Console()
    console.print(table)
    for line in _summary(route, request):
        console.print(Text(line))


def _plain(seen: SeenModel, route: "Route", request: "RouteRequest") -> str:
    rows = [COLUMNS, *_rows(route)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([_title(seen), *lines, *_summary(route, request)])


def _title(seen: SeenModel) -> str:
    return f"Route through {seen.model}, {seen.num_blocks} blocks (milliseconds)"


def _rows(route: "Route") -> Iterator[tuple[str, ...]]:
    for hop in route.hops:
        yield hop.peer_id.short, str(hop.span), "chunk", *_terms(hop.prefill)
        yield "", "", "token", *_terms(hop.decode)


def _terms(cost: "HopCost") -> tuple[str, ...]:
    terms = (
        cost.rtt_s,
        cost.transfer_s,
        cost.queue_s,
        cost.compute_s,
        cost.overhead_s,
        cost.cache_wait_s,
        cost.total_s,
    )
    return tuple(milliseconds(term) for term in terms)


def _summary(route: "Route", request: "RouteRequest") -> Iterator[str]:
    cost = route.cost
    yield (
        f"Expected: first token after {cost.ttft_s * 1e3:.0f} ms, then {1 / cost.tpot_s:.1f} "
        f"tokens/s; {cost.total_s:.1f} s in all (policy: {route.policy})"
    )
    chunk_s = sum(hop.prefill.step_s for hop in route.hops)
    terms = [("opening sessions", cost.open_s), ("waiting for cache", cost.cache_wait_s)]
    terms += [(f"a chunk of {request.chunks[0]} tokens through the chain", chunk_s)]
    if cost.num_chunks > 1:
        terms += [(f"{cost.num_chunks - 1} more that overlap with it", cost.pipeline_s)]
    terms += [("this computer", cost.own_first_s)]
    yield f"First token: {_sum_of(terms)}"
    servers_s = sum(hop.decode.total_s for hop in route.hops)
    yield f"Each token: {_sum_of([('the chain', servers_s), ('this computer', cost.own_token_s)])}"
    unsure = [hop.peer_id.short for hop in route.hops if hop.rtt_source.value != "measured"]
    if unsure:
        yield f"Not measured, so estimated: the round trip to {', '.join(unsure)}"
    yield from (f"Note: {note}" for note in route.notes)


def _sum_of(terms: Sequence[tuple[str, float]]) -> str:
    """Those that are not nothing, in milliseconds."""
    return " + ".join(f"{name} {milliseconds(term)}" for name, term in terms if term >= 5e-5)


def _as_json(seen: SeenModel, route: "Route") -> dict[str, Any]:
    return {
        "model": seen.model.name,
        "digest": seen.model.digest.hex(),
        "num_blocks": seen.num_blocks,
        "policy": route.policy,
        "ttft_s": route.cost.ttft_s,
        "tpot_s": route.cost.tpot_s,
        "total_s": route.cost.total_s,
        "ttft_ms": {
            "open": route.cost.open_s * 1e3,
            "cache_wait": route.cost.cache_wait_s * 1e3,
            "chunk": sum(hop.prefill.step_s for hop in route.hops) * 1e3,
            "pipeline": route.cost.pipeline_s * 1e3,
            "own": route.cost.own_first_s * 1e3,
        },
        "own_token_ms": route.cost.own_token_s * 1e3,
        "num_chunks": route.cost.num_chunks,
        "hops": [_hop_as_json(hop) for hop in route.hops],
        "notes": list(route.notes),
    }


def _hop_as_json(hop: "RouteHop") -> dict[str, Any]:
    return {
        "peer_id": str(hop.peer_id),
        "blocks": str(hop.span),
        "rtt_source": hop.rtt_source.value,
        "prefill_ms": _terms_as_json(hop.prefill),
        "decode_ms": _terms_as_json(hop.decode),
    }


def _terms_as_json(cost: "HopCost") -> dict[str, float]:
    return {
        "rtt": cost.rtt_s * 1e3,
        "transfer": cost.transfer_s * 1e3,
        "queue": cost.queue_s * 1e3,
        "compute": cost.compute_s * 1e3,
        "overhead": cost.overhead_s * 1e3,
        "cache_wait": cost.cache_wait_s * 1e3,
        "total": cost.total_s * 1e3,
    }

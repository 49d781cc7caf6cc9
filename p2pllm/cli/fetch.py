"""`p2pllm fetch`: a model onto this computer."""

import click

from p2pllm.cli.options import common_options
from p2pllm.cli.terminal import Activity
from p2pllm.spans import Span

ALL_BLOCKS = Span(0, 2**31)  # of any model


@click.command("fetch")
@click.argument("model", default="")
@common_options
def command(model: str) -> None:
    """Download a model to this computer.

    MODEL is a built-in name or a Hub repo as OWNER/NAME; left out, the default model, which needs
    no account. Prints where it is now. Servers and clients fetch the parts that they need by
    themselves; this fetches all of it, ahead of time.

    \b
    Examples:
      p2pllm fetch
      p2pllm fetch HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from p2pllm.model.hub import DEFAULT_MODEL, resolve_model

    name = model or DEFAULT_MODEL
    with Activity() as activity:
        activity.say(f"looking for {name}")

        def on_bytes(done: int, total: int) -> None:
            activity.on_bytes(f"fetching {name}", done, total)

        path = resolve_model(name, span=ALL_BLOCKS, edges=True, progress=on_bytes)
    click.echo(path)

"""`p2pllm trace`: where the time of every token went, drawn in the terminal."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pllm.cli.options import common_options, option

if TYPE_CHECKING:
    from p2pllm.routing.trace import Trace

SHOWN_TOKENS = 12  # if nobody says which: a screen of them
LEGEND = "legend: ─ link  ▒ queue  █ compute   * relayed by this computer"


class TokenRange(click.ParamType[range]):
    """Tokens A up to B, half open, as in blocks: 0:20, 30: or 7."""

    name = "A:B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> range:
        if isinstance(value, range):
            return value
        found = re.fullmatch(r"(\d{1,9})(?:(:)(\d{0,9}))?", str(value))
        if found is None:
            self.fail(f"{value!r} is no range of tokens; write 0:20, 30: or 7", param, ctx)
        first, colon, last = found.groups()
        start = int(first)
        stop = (int(last) if last else 10**9) if colon else start + 1
        if stop <= start:
            self.fail(
                f"{value!r} holds no token; the first number must be the lower one", param, ctx
            )
        return range(start, stop)


@click.command("trace")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option("--tokens", type=TokenRange(), help="Which new tokens, counted from 0.  [default: 0:12]")
@option(
    "--width",
    type=click.IntRange(min=60, max=1000),
    metavar="N",
    help="Columns to draw in.  [default: those of the terminal, or 100]",
)
@option("--json", "as_object", is_flag=True, help="Print medians per hop, as one JSON object.")
@common_options
def command(file: Path, tokens: range | None, width: int | None, as_object: bool) -> None:
    """Draw where the time of every token went.

    FILE is what "p2pllm generate --trace FILE" writes. Each token (and each chunk of the prompt,
    as +TOKENS) has a line per server: on the link to it, in its queue, computing, and for the last
    one the way back. Lost servers and what replaced them are marked with >>>.

    \b
    Example:
      p2pllm generate --peers HOST:PORT --trace trace.jsonl "Hello!"
      p2pllm trace trace.jsonl --tokens 0:5
    """
    from p2pllm.errors import ConfigError
    from p2pllm.routing.trace import read_trace, summary

    try:
        with file.open(encoding="utf-8") as lines:
            trace = read_trace(lines)
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file} is no text; a trace is lines of JSON") from exc
    last = max(record.token for record in trace.records)
    if tokens is not None and tokens.start > last:
        raise ConfigError(f"the trace ends with token {last}; choose --tokens within 0:{last + 1}")
    if as_object:
        click.echo(json.dumps(summary(trace, tokens)))
        return
    _draw(trace, tokens, width or shutil.get_terminal_size((100, 24)).columns)


def _draw(trace: "Trace", tokens: range | None, width: int) -> None:
    from p2pllm.routing.trace import PLAIN, summary, waterfall

    is_plain = not _can_draw()
    shown = tokens or range(SHOWN_TOKENS)
    for line in waterfall(trace, width=width, tokens=shown, is_plain=is_plain):
        click.echo(click.style(line, fg="yellow") if line.startswith("   >>>") else line)
    click.echo("\nmedians per token, in ms:")
    for hop in summary(trace, tokens)["hops"]:
        click.echo(
            f"  hop {hop['hop']} {hop['peer'][:8]} {hop['blocks']}: link {hop['link_ms']:.1f}, "
            f"queue {hop['queue_ms']:.1f}, compute {hop['compute_ms']:.1f}"
        )
    click.echo(LEGEND.translate(PLAIN) if is_plain else LEGEND)
    num_tokens = 1 + max(record.token for record in trace.records)
    if tokens is None and num_tokens > SHOWN_TOKENS:
        click.echo(
            f"{num_tokens} tokens in all; --tokens {SHOWN_TOKENS}:{num_tokens} shows the rest"
        )


def _can_draw() -> bool:
    """Can what we write to hold the characters of the bars?"""
    try:
        LEGEND.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True

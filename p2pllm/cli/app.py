"""The program: its commands, each imported when it is used, and the end of every error.

`p2pllm --help` has to answer at once, and torch alone takes seconds to import. So the list of
commands stands here with one line each, their modules import click and settings at most, and what
computes or draws is imported by the function that does so.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from p2pllm.cli.errors import report
from p2pllm.version import __version__

# In the order of a newcomer's day: try it, use it, look at it, give to it.
SUMMARIES = {
    "demo": "Run a whole swarm on this computer and ask it something.",
    "generate": "Generate text with a model of the swarm.",
    "chat": "Talk with a model of the swarm.",
    "status": "Show who serves which blocks.",
    "route": "Show the chain of servers that a request would take, and why.",
    "trace": "Draw where the time of every token went.",
    "serve": "Serve blocks of a model to the swarm.",
    "bootstrap": "Run a node that only helps others to find each other.",
    "fetch": "Download a model to this computer.",
    "doctor": "Check what works here, and say what to do about the rest.",
}

EPILOG = """\b
First steps:
  p2pllm demo                                    a whole swarm on this computer
  p2pllm serve --new-swarm --blocks 0:30         begin a swarm of your own
  p2pllm generate --peers HOST:PORT "Hello!"     ask it

Every option can also be given by environment (--max-new-tokens is P2PLLM_MAX_NEW_TOKENS) or in a
TOML file (see --config of any command). Flags go before environment, that before the file.
"""


class LazyGroup(click.Group):
    """A group whose commands live in modules of this package, named like them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        command: click.Command = import_module(f"p2pllm.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but every error ends as one line and an exit code of ours."""
        try:
            result: Any = super().main(
                args,
                prog_name,
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except Exception as exc:
            if not standalone_mode:
                raise
            sys.exit(report(exc))
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)
        return result


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def program() -> None:
    """Run large language models together, on a swarm of ordinary computers.

    Servers hold some blocks of a model each; clients find them, choose the fastest chain of them,
    and generate text through it. "p2pllm COMMAND --help" explains each command with an example.
    """

"""The program as a whole: help that answers at once, and errors that end in one line."""

import subprocess
import sys
import time

import click
import pytest

from p2pllm.cli.app import SUMMARIES, program
from p2pllm.version import __version__
from tests.cli.conftest import Terminal

HELP_WITHIN_S = 0.3
HEAVY = ("torch", "aiortc", "rich", "numpy", "cryptography", "tokenizers")


def _commands() -> dict[str, click.Command]:
    ctx = click.Context(program)
    found = {name: program.get_command(ctx, name) for name in program.list_commands(ctx)}
    return {name: command for name, command in found.items() if command is not None}


def test_help_answers_at_once() -> None:
    def took_s() -> float:
        started = time.perf_counter()
        command = [sys.executable, "-m", "p2pllm", "--help"]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started

    assert min(took_s() for _ in range(5)) < HELP_WITHIN_S  # the best: others use the cores too


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["generate", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from p2pllm.cli.app import program\n"
        f"try: program({arguments!r})\n"
        f"finally: print(sorted(set({HEAVY!r}) & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_the_version_is_told(terminal: Terminal) -> None:
    assert terminal.type("--version").output == f"p2pllm {__version__}\n"


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_command_begins_its_help_with_its_summary(name: str) -> None:
    command = _commands()[name]
    assert command.name == name
    assert (command.help or "").partition("\n")[0] == SUMMARIES[name]


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_command_shows_an_example(name: str, terminal: Terminal) -> None:
    result = terminal.type(name, "--help")
    assert result.exit_code == 0
    assert f"p2pllm {name}" in result.output.replace("Usage: p2pllm", "")


def test_every_option_has_its_environment_variable() -> None:
    for command in _commands().values():
        for param in command.params:
            if isinstance(param, click.Option) and param.name != "help":
                flag = next(flag for flag in param.opts if flag.startswith("--"))
                expected = "P2PLLM_" + flag.removeprefix("--").replace("-", "_").upper()
                assert param.envvar == expected, f"{command.name} {flag}"


def test_an_unknown_command_is_a_usage_error(terminal: Terminal) -> None:
    result = terminal.type("sevre")
    assert result.exit_code == 2
    assert result.output.startswith("error: No such command 'sevre'")

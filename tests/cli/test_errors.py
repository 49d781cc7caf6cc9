"""What a new user meets: every mistake is one line that says what to do, and an exit code."""

import asyncio
import os
import signal

import click
import pytest

from p2pllm.cli import generate, status
from p2pllm.cli.errors import FAILED, INTERRUPTED, first_cause, report
from p2pllm.errors import CacheFull, ConfigError, LookupFailed, NoRoute, PeerUnreachable
from tests.cli.conftest import Terminal

NEW_SWARM = ["--new-swarm", "--listen", "127.0.0.1:0"]
PEERS = ["--peers", "127.0.0.1:4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "hi"], "no peers given"),
        (["status"], "--peers HOST:PORT"),
        (["serve", "--blocks", "0:10"], "begin one with --new-swarm"),
        (["serve", "--new-swarm", *PEERS], "give one"),
        (["serve", *NEW_SWARM, "--blocks", "20:10"], "START < STOP"),
        (["serve", *NEW_SWARM, "--blocks", "ten"], "for example 0:10"),
        (["serve", *NEW_SWARM, "--blocks", "0:10", "--num-blocks", "3"], "give one"),
        (["serve", *NEW_SWARM, "--allow", "me"], "not a PeerId"),
        (["serve", *NEW_SWARM, "--memory", "much"], "4GiB"),
        (["serve", *NEW_SWARM, "--quantize", "int3"], "'int4'"),
        (["serve", *NEW_SWARM, "--quantize", "int4", "--dtype", "float32"], "in bfloat16"),
        (["serve", "--new-swarm", "--listen", "31337"], "HOST:PORT"),
        (["generate", "hi", "--peers", "203.0.113.7"], "[PEERID@]HOST:PORT"),
        (["generate", "hi", "--peers", "203.0.113.7:99999"], "not a port"),
        (["generate", "hi", "--peers", "x@203.0.113.7:1"], "not a PeerId"),
        (["generate", "", *PEERS], "PROMPT is empty"),
        (["generate", "hi", *PEERS, "--dtype", "int4"], "'float32'"),
    ],
)
def test_wrong_usage_says_what_is_right(
    terminal: Terminal, arguments: list[str], said: str
) -> None:
    result = terminal.type(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert f"`p2pllm {arguments[0]} --help`" in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoRoute("no server for blocks 10:15", [(10, 15)]), "serve --blocks 10:15"),
        (PeerUnreachable("no answer"), "check --peers"),
        (LookupFailed("none of 3 peers answered"), "the swarm does not answer"),
        (CacheFull("no room"), "try again later"),
        (ConfigError("unknown model: 'x'; give a name"), "give a name"),
    ],
)
def test_an_error_of_ours_is_one_line_with_what_to_do(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == FAILED
    line = capsys.readouterr().err
    assert line.startswith(f"error: {error}")
    assert said in line
    assert line.count("\n") == 1


def test_an_unforeseen_error_names_its_class_and_vv(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ZeroDivisionError("by zero")) == FAILED
    assert "unexpected ZeroDivisionError: by zero; run again with -vv" in capsys.readouterr().err


def test_the_error_is_found_in_the_groups_around_it() -> None:
    error = NoRoute("no server")
    group = ExceptionGroup("", [ValueError(), ExceptionGroup("", [error])])
    assert first_cause(group) is error


def test_a_traceback_is_shown_with_vv_only(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise NoRoute("no server for blocks 1:2", [(1, 2)])

    monkeypatch.setattr(generate, "_generate", fail)
    brief = terminal.type("generate", "hi", *PEERS)
    verbose = terminal.type("generate", "hi", *PEERS, "-vv")
    assert "Traceback" not in brief.stderr
    assert "Traceback" in verbose.stderr
    assert verbose.stderr.splitlines()[-1] == brief.stderr.strip()


def test_ctrl_c_ends_quietly_with_130(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "_look", interrupt)
    result = terminal.type("status", *PEERS)
    assert result.exit_code == INTERRUPTED
    assert "error" not in result.output


def test_sigterm_cancels_and_ends_with_143(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned_up = []

    async def wait(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            cleaned_up.append(True)

    monkeypatch.setattr(status, "_look", wait)
    assert terminal.type("status", *PEERS).exit_code == 143
    assert cleaned_up == [True]


def test_abort_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(click.Abort()) == INTERRUPTED
    assert capsys.readouterr().err == ""

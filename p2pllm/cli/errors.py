"""How errors end: one line that says what happened and what to do next, and an exit code.

    1      it could not be done             2      it was asked for wrongly
    130    Ctrl-C                           143    SIGTERM

A traceback is shown only with -vv, when debug logging is on.
"""

import logging
import traceback

import click
from click.core import ParameterSource

from p2pllm.errors import (
    BadSignature,
    CacheFull,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    Forbidden,
    LocalProtocolError,
    LookupFailed,
    NoRoute,
    OpenFailed,
    P2PLLMError,
    PeerUnreachable,
)

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells count
TERMINATED = 143  # 128 + SIGTERM

_ASK_STATUS = "`p2pllm status` shows who is there"
_HINTS: dict[type[P2PLLMError], str] = {
    PeerUnreachable: "check --peers, and that a node of the same --swarm runs there",
    BadSignature: "somebody else answers there; take the address without PEERID@, or a new one",
    DeadlineExceeded: f"try again; {_ASK_STATUS}",
    ConnectionLost: f"try again; {_ASK_STATUS}",
    LookupFailed: "the swarm does not answer; check --peers and this computer's network",
    CacheFull: "the servers are full; try again later or with fewer --max-new-tokens",
    OpenFailed: f"try again; {_ASK_STATUS}",
    Forbidden: "ask the server's owner to --allow your PeerId, and use it with --identity",
    LocalProtocolError: "this is a bug in p2pllm; please report it with the output of -vv",
}


def report(exc: Exception) -> int:
    """Tell the user, on stderr; returns the exit code."""
    exc = first_cause(exc)
    if isinstance(exc, click.Abort):  # click's name for KeyboardInterrupt
        return INTERRUPTED
    if logging.getLogger("p2pllm").isEnabledFor(logging.DEBUG):
        click.echo("".join(traceback.format_exception(exc)), err=True, nl=False)
    click.echo(f"error: {_message(exc)}", err=True)
    if isinstance(exc, click.UsageError) and exc.ctx is not None:
        click.echo(f"`{exc.ctx.command_path} --help` explains the options", err=True)
    return exc.exit_code if isinstance(exc, click.ClickException) else FAILED


def first_cause(exc: Exception) -> Exception:
    """The error behind the groups that task groups wrap around it: ours, if one is there."""
    if not isinstance(exc, ExceptionGroup):
        return exc
    causes = [first_cause(cause) for cause in exc.exceptions]
    return next((cause for cause in causes if isinstance(cause, P2PLLMError)), causes[0])


def _message(exc: Exception) -> str:
    if isinstance(exc, click.BadParameter):
        return exc.format_message() + _origin(exc)
    if isinstance(exc, click.ClickException):
        return exc.format_message()
    if isinstance(exc, P2PLLMError):
        return _with_hint(str(exc) or type(exc).__name__, _hint(exc))
    if isinstance(exc, OSError) and exc.filename and exc.strerror:
        return f"{exc.filename}: {exc.strerror}"
    text = f"unexpected {type(exc).__name__}: {exc}".rstrip(": ")
    return _with_hint(text, "run again with -vv to see where, and please report it")


def _hint(exc: P2PLLMError) -> str:
    if isinstance(exc, NoRoute) and exc.missing:
        start, stop = exc.missing[0]
        return f"serve them (`p2pllm serve --blocks {start}:{stop} …`) or wait; {_ASK_STATUS}"
    if isinstance(exc, ConfigError):  # its text says what can be done
        return ""
    return next((hint for kind, hint in _HINTS.items() if isinstance(exc, kind)), "")


def _with_hint(text: str, hint: str) -> str:
    # Where the one who raised it knew better what to do, that stands there already.
    return text if not hint or ";" in text else f"{text}; {hint}"


def _origin(exc: click.BadParameter) -> str:
    """Where a bad value came from, if it was not typed."""
    if exc.ctx is None or exc.param is None or exc.param.name is None:
        return ""
    source = exc.ctx.get_parameter_source(exc.param.name)
    if source is ParameterSource.ENVIRONMENT:
        return f" (from the environment: {exc.param.envvar})"
    if source is ParameterSource.DEFAULT_MAP:
        return " (from the configuration file)"
    return ""

"""The configuration file: values for options, below flags and environment.

    swarm = "home"                        # for every command that has the option
    peers = ["203.0.113.7:31337"]

    [serve]                               # for one command, before the ones above
    num-blocks = 8
    memory = "4GiB"

Keys are the long names of options, with "-" or "_". A key that no command has is an error, so
that a misspelt one does not go unnoticed.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from p2pllm.errors import ConfigError


def default_path() -> Path:
    """Where the file is looked for if nobody says: ~/.config/p2pllm/config.toml on Linux."""
    import platformdirs

    return platformdirs.user_config_path("p2pllm") / "config.toml"


def read_defaults(path: Path, group: click.Group, ctx: click.Context) -> dict[str, Any]:
    """The values of a file for the command of `ctx`, as click's `default_map` wants them.

    Raises ConfigError for a file that cannot be read, unknown keys and values of a wrong kind.
    """
    tables = _read(path)
    options = {name: _options(group, ctx, name) for name in group.list_commands(ctx)}
    everyone = {key: option for table in options.values() for key, option in table.items()}
    shared: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            if key not in options:
                raise ConfigError(_unknown(path, f"[{key}]", key, options))
            checked = _checked(path, f"[{key}] ", value, options[key])
            own |= checked if key == ctx.info_name else {}
        else:
            shared |= _checked(path, "", {key: value}, everyone)
    known = {option.name for option in ctx.command.params}
    return {name: value for name, value in (shared | own).items() if name in known}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from exc


def _options(group: click.Group, ctx: click.Context, name: str) -> dict[str, click.Option]:
    """A command's options by the key that sets them; those that a file cannot set are left out."""
    command = group.get_command(ctx, name)
    assert command is not None
    return {
        flag.lstrip("-"): param
        for param in command.params
        if isinstance(param, click.Option) and not param.is_eager
        for flag in param.opts
        if flag.startswith("--")
    }


def _checked(
    path: Path, where: str, table: Mapping[str, Any], options: Mapping[str, click.Option]
) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        option = options.get(key.replace("_", "-"))
        if option is None or option.name is None:
            raise ConfigError(_unknown(path, f"{where}{key}", key, options))
        if (isinstance(value, list) and not option.multiple) or isinstance(value, dict):
            raise ConfigError(f"{path}: {where}{key} takes one value, not {value!r}")
        values[option.name] = [value] if option.multiple and not isinstance(value, list) else value
    return values


def _unknown(path: Path, shown: str, key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    guess = f"did you mean {close[0]!r}?" if close else "keys are long options, tables commands"
    return f"{path}: unknown key {shown}; {guess}"

"""Options that several commands share, as decorators that hand over one value each.

Every option made with `option` can also be set by environment: `--max-new-tokens` is
P2PLLM_MAX_NEW_TOKENS, for all commands alike. The order is flag, environment, file, default.
"""

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from p2pllm.addresses import Address
from p2pllm.cli.config_file import default_path, read_defaults
from p2pllm.cli.params import ADDRESSES, LISTEN, SHAPE, SIZE
from p2pllm.config import DEFAULT_NETWORK, DEFAULT_PORT, ClientConfig, ShaperConfig

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEMES = ("none", "int8", "int4")
CODECS = ("auto", "raw", "bf16", "int8")
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)  # by the number of -v


def option(*names: str, **settings: Any) -> Decorator:
    """`click.option`, with the environment variable that belongs to its long name."""
    flag = next(name for name in names if name.startswith("--")).partition("/")[0]
    variable = "P2PLLM_" + flag.lstrip("-").replace("-", "_").upper()
    return click.option(*names, envvar=variable, **settings)


def _together(kind: type[Any], name: str, *options: Decorator) -> Decorator:
    """Give a command these options as one value of `kind`, whose fields they are."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_options(**values: Any) -> Any:
            taken = {field.name: values.pop(field.name) for field in fields(kind)}
            return command(**values, **{name: kind(**taken)})

        wrapped: Callable[..., Any] = with_options
        for add in reversed(options):
            wrapped = add(wrapped)
        return wrapped

    return decorate


# --- every command ----------------------------------------------------------------------------


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config and -v."""
    command = click.option(
        "-v",
        "--verbose",
        count=True,
        envvar="P2PLLM_VERBOSE",
        expose_value=False,
        callback=_configure_logging,
        help="Say more: -v what happens, -vv everything, with tracebacks.",
    )(command)
    return click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="P2PLLM_CONFIG",
        is_eager=True,  # before the options whose values it gives
        expose_value=False,
        callback=_read_config,
        help="TOML file with values for options; tables like [serve] are for one command.  "
        "[default: config.toml in the user's configuration directory, if there]",
    )(command)


def _configure_logging(ctx: click.Context, _: click.Parameter, verbosity: int) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING,
        force=True,
    )
    logging.getLogger("p2pllm").setLevel(_LEVELS[min(verbosity, len(_LEVELS) - 1)])


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        path = default_path()
        if not path.exists():
            return
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    from p2pllm.errors import ConfigError

    try:
        ctx.default_map = read_defaults(path, group, ctx)
    except ConfigError as exc:
        raise click.UsageError(str(exc), ctx) from exc


# --- the network ------------------------------------------------------------------------------

_SWARM = option(
    "--swarm",
    metavar="NAME",
    default=DEFAULT_NETWORK,
    show_default=True,
    help="Name of the swarm; nodes of other names are refused.",
)
_PEERS = option(
    "--peers",
    metavar="ADDR",
    type=ADDRESSES,
    multiple=True,
    help="Members of the swarm to begin with, as [PEERID@]HOST:PORT; may be repeated, or hold "
    "several with commas between them.",
)
_IDENTITY_HELP = "File with this node's key, made if it is not there.  [default: {}]"
_SHAPE = option(
    "--shape",
    type=SHAPE,
    metavar="SHAPE",
    default=ShaperConfig(),
    help="For experiments: make the network slower, as in delay=15ms,bandwidth=100mbit,jitter=2ms.",
)


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """The network options of a node that listens."""

    swarm: str
    peers: tuple[tuple[Address, ...], ...]
    new_swarm: bool
    listen: tuple[str, int]
    announce: tuple[tuple[Address, ...], ...]
    identity: Path | None
    ready_file: Path | None
    shape: ShaperConfig


node_options = _together(
    NodeOptions,
    "network",
    _SWARM,
    _PEERS,
    option(
        "--new-swarm/--no-new-swarm", default=False, help="Begin a new swarm, as its first node."
    ),
    option(
        "--listen",
        type=LISTEN,
        metavar="HOST:PORT",
        default=("0.0.0.0", DEFAULT_PORT),
        help=f"Where to listen; port 0 takes any free one.  [default: 0.0.0.0:{DEFAULT_PORT}]",
    ),
    option(
        "--announce",
        metavar="HOST:PORT",
        type=ADDRESSES,
        multiple=True,
        help="Where others reach this node, if not where it listens: behind port forwarding.",
    ),
    option(
        "--identity",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help=_IDENTITY_HELP.format(
            "one per swarm and listening address in the user's data directory; with port 0 a new "
            "key each time"
        ),
    ),
    option(
        "--ready-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write peer_id, addresses, model and blocks there, as JSON, once all is ready.",
    ),
    _SHAPE,
)


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """The network options of a node that only asks."""

    swarm: str
    peers: tuple[tuple[Address, ...], ...]
    identity: Path | None
    shape: ShaperConfig


client_options = _together(
    ClientOptions,
    "network",
    _SWARM,
    _PEERS,
    option(
        "--identity",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help=_IDENTITY_HELP.format("a new key each time"),
    ),
    _SHAPE,
)


# --- models -----------------------------------------------------------------------------------

chain_option = option(
    "--chain/--no-chain",
    "is_chained",
    default=True,
    show_default=True,
    help="Servers push to each other where they can; or all goes through this computer.",
)

model_option = option(
    "--model",
    metavar="MODEL",
    default="",
    help="A built-in name, a directory, a .gguf file, or a Hub repo as OWNER/NAME.  "
    "[default: smollm2-135m]",
)


DEFAULT_JOURNAL_BYTES = ClientConfig().journal_bytes


@dataclass(frozen=True, slots=True)
class UseOptions:
    """How a client uses a model."""

    model: str
    dtype: str
    wire_codec: str
    patience: float
    is_chained: bool
    journal_bytes: int = DEFAULT_JOURNAL_BYTES


use_options = _together(
    UseOptions,
    "use",
    model_option,
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="What this computer's part (embeddings and head) computes in.",
    ),
    option(
        "--wire-codec",
        type=click.Choice(CODECS),
        default="auto",
        show_default=True,
        help="How hidden states travel: raw is exact, bf16 and int8 are smaller.",
    ),
    option(
        "--patience",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        default=60.0,
        show_default=True,
        help="How long to wait for missing blocks or free cache.",
    ),
    chain_option,
    option(
        "--journal-bytes",
        type=SIZE,
        metavar="SIZE",
        default=DEFAULT_JOURNAL_BYTES,
        help="Memory for what lost servers would have to be told again; more goes to a temporary "
        "file.  [default: 512MiB]",
    ),
)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None


def sampling_options(*, max_new_tokens: int, temperature: float, top_p: float) -> Decorator:
    """The options of `SamplingOptions`, with a command's own defaults."""
    return _together(
        SamplingOptions,
        "sampling",
        option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            default=max_new_tokens,
            show_default=True,
            help="Stop after so many tokens.",
        ),
        option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=temperature,
            show_default=True,
            help="0 always takes the most probable token; higher is more varied.",
        ),
        option(
            "--top-k",
            type=click.IntRange(min=0),
            metavar="N",
            default=0,
            help="Choose among the N most probable tokens only.  [default: all]",
        ),
        option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            default=top_p,
            show_default=True,
            help="Choose among the most probable tokens that reach this probability together.",
        ),
        option(
            "--seed",
            type=click.IntRange(min=0),
            metavar="N",
            help="Same seed, same text.  [default: a random one]",
        ),
    )


def chosen_peers(ctx: click.Context, peers: tuple[tuple[Address, ...], ...]) -> list[Address]:
    """The addresses of all --peers; a usage error if there is none."""
    addresses = [address for group in peers for address in group]
    if not addresses:
        raise click.UsageError(
            "no peers given: name a member of the swarm with --peers HOST:PORT (a server prints "
            "its address when it starts), or try `p2pllm demo` for a swarm on this computer",
            ctx,
        )
    return addresses

"""Types of option values: text in, values of the program out, and a clear sentence if not."""

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import click

from p2pllm.addresses import Address, parse_host_port, parse_many
from p2pllm.config import ShaperConfig
from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId
from p2pllm.spans import Span

T = TypeVar("T")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class Parsed(click.ParamType[Any], Generic[T]):
    """A value that `parse` makes of a text; its ConfigError becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str | int | float):  # a default, which is parsed already
            return value
        try:
            return self._parse(str(value))
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)


def parse_size(text: str) -> int:
    """Bytes of "4GiB", "500MB" or "1000000"; raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"not a size: {text!r}; write for example 4GiB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])


def parse_throughput(text: str) -> float:
    """Tokens × blocks per second; 0 for "auto"; raises ConfigError."""
    if text == "auto":
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"not a throughput: {text!r}; write auto, or tokens × blocks per second")
    return value


def parse_shape(text: str) -> ShaperConfig:
    """An artificial link: "delay=15ms,bandwidth=100mbit,jitter=2ms"; raises ConfigError."""
    values: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name in ("delay", "jitter"):
            values[f"{name}_s"] = _duration_s(value)
        elif name == "bandwidth":
            values["bandwidth_bytes_s"] = _rate_bytes_s(value)
        else:
            raise ConfigError(
                f"not part of a link's shape: {part!r}; "
                "write for example delay=15ms,bandwidth=100mbit,jitter=2ms"
            )
    return ShaperConfig(**values)


def _duration_s(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if not match:
        raise ConfigError(f"not a duration: {text!r}; write for example 15ms or 0.2s")
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)


def _rate_bytes_s(text: str) -> float:
    match = _RATE.fullmatch(text)
    if not match or not float(match[1]):
        raise ConfigError(f"not a bandwidth: {text!r}; write for example 100mbit")
    return float(match[1]) * 1000.0 ** _POWERS[match[2].lower()] / 8


def _listen_place(text: str) -> tuple[str, int]:
    return parse_host_port(text, allow_zero=True)


def _addresses(text: str) -> tuple[Address, ...]:
    return parse_many([text])


ADDRESSES = Parsed("addr", _addresses)
LISTEN = Parsed("host:port", _listen_place)
PEER_ID = Parsed("peerid", PeerId.parse)
SPAN = Parsed("start:stop", Span.parse)
SIZE = Parsed("size", parse_size)
SHAPE = Parsed("shape", parse_shape)
THROUGHPUT = Parsed("auto|number", parse_throughput)

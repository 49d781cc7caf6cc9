"""Addresses: where a peer can be dialled.

    [PEERID@]HOST:PORT                  direct, over IPv4 or a host name
    [PEERID@][v6]:PORT                  direct, over IPv6
    PEERID@relay:RELAYID@HOST:PORT      through the relay RELAYID, which is at HOST:PORT

A PeerId in front means: refuse whoever answers there as somebody else. Without one, whoever
answers is taken (trust on first use), which only bootstrapping does.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId

_FORM = "write [PEERID@]HOST:PORT, for example 203.0.113.7:31337"
_MAX_HOST = 255  # the longest DNS name (RFC 1035 §2.3.4)
_PORT_DIGITS = 5
_NOT_IN_HOST = frozenset("@[],")  # what stands between the parts of addresses and of lists


@dataclass(frozen=True, slots=True)
class Address:
    """One way to dial a peer. `host` is a name or an IP literal without brackets."""

    host: str
    port: int
    peer_id: PeerId | None = None
    relay: PeerId | None = None  # if set, host and port are the relay's, and peer_id is known

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"port {self.port} is not in 1 … 65535")
        if not _is_host(self.host):
            raise ConfigError(f"not a host: {self.host!r}; {_FORM}")
        if self.relay is not None and self.peer_id is None:
            raise ConfigError("an address through a relay must say whose it is")

    @property
    def endpoint(self) -> str:
        """HOST:PORT, with brackets around an IPv6 literal."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        who = f"{self.peer_id}@" if self.peer_id else ""
        return f"{who}relay:{self.relay}@{self.endpoint}" if self.relay else who + self.endpoint

    def of(self, peer_id: PeerId) -> "Address":
        """The same place, said to be `peer_id`'s."""
        return Address(self.host, self.port, peer_id, self.relay)

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read any of the three forms; raises ConfigError with an example otherwise."""
        who, at, rest = text.strip().partition("@")
        if not at:
            who, rest = "", who
        peer_id = PeerId.parse(who) if at else None
        if not rest.startswith("relay:"):
            host, port = parse_host_port(rest)
            return cls(host, port, peer_id)
        relay, _, place = rest.removeprefix("relay:").partition("@")
        host, port = parse_host_port(place)
        return cls(host, port, peer_id, PeerId.parse(relay))


def parse_host_port(text: str, *, allow_zero: bool = False) -> tuple[str, int]:
    """Split "HOST:PORT" or "[v6]:PORT". Port 0 (any free port) only if `allow_zero`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    plain = host[1:-1] if bracketed else host
    if not colon or not _is_host(plain) or (":" in plain and not bracketed):
        raise ConfigError(f"not an address: {text!r}; {_FORM}")
    number = int(port) if port.isdecimal() and len(port) <= _PORT_DIGITS else -1
    if number not in range(0 if allow_zero else 1, 65536):
        raise ConfigError(f"not a port: {port!r}; {_FORM}")
    return plain, number


def _is_host(text: str) -> bool:
    """Could it be a name or a literal? Whether it resolves is found out by dialling."""
    if not 0 < len(text) <= _MAX_HOST or not text.isprintable():
        return False
    return not any(char.isspace() or char in _NOT_IN_HOST for char in text)


def parse_many(values: Iterable[str]) -> tuple[Address, ...]:
    """Read addresses given one by one or as comma-separated lists."""
    return tuple(
        Address.parse(part) for value in values for part in value.split(",") if part.strip()
    )

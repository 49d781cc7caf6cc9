"""How the servers and clients of a benchmark are to be set up, as their command lines carry it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

SWARM = "bench"


@dataclass(frozen=True, slots=True)
class ServerSetup:
    """`weights` is a dtype, int8 or int4; `rtt_s` the round trip of every link."""

    span: str
    weights: str
    is_identity: bool = False
    peers: tuple[str, ...] = ()
    loop: str = "uvloop"
    rtt_s: float = 0.0
    cache_tokens: int = 16_384

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, text: str) -> "ServerSetup":
        """The opposite, of the argument."""
        value = json.loads(text)
        return cls(**{**value, "peers": tuple(value["peers"])})


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """`rtt_s`: the round trip of every link."""

    peers: tuple[str, ...]
    dtype: str
    loop: str = "uvloop"
    rtt_s: float = 0.0
    wire_codec: str = "raw"
    micro_batch_tokens: int = 512

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, text: str) -> "ClientSetup":
        """The opposite, of the argument."""
        value = json.loads(text)
        return cls(**{**value, "peers": tuple(value["peers"])})

"""Identifiers: PeerId, ModelId, SessionId.

A PeerId *is* an Ed25519 public key, so whoever holds the id can verify the peer's signatures
and there is no registry to trust. It is shown in base32, lower case, without padding.
A ModelId is a digest of what makes two servers interchangeable (see `ModelId`).
"""

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property

from p2pllm.errors import ConfigError

PEER_ID_BYTES = 32  # an Ed25519 public key (RFC 8032 §5.1.5)
SESSION_ID_BYTES = 16
_PEER_ID_TEXT = 52  # base32 characters of 32 bytes, without padding


@dataclass(frozen=True, order=True)
class PeerId:
    """The Ed25519 public key of a peer, which is its name. Order is that of the bytes."""

    key: bytes

    def __post_init__(self) -> None:
        if len(self.key) != PEER_ID_BYTES:
            raise ConfigError(f"a PeerId has {PEER_ID_BYTES} bytes, not {len(self.key)}")

    @cached_property
    def dht_id(self) -> int:
        """The peer's place in the DHT: SHA-256 of the key, as a 256-bit integer."""
        return int.from_bytes(hashlib.sha256(self.key).digest(), "big")

    @property
    def short(self) -> str:
        """The first eight characters, enough to tell peers apart in a table."""
        return str(self)[:8]

    def __str__(self) -> str:
        return base64.b32encode(self.key).decode().rstrip("=").lower()

    def __repr__(self) -> str:
        return f"PeerId({self.short}…)"

    @classmethod
    def parse(cls, text: str) -> "PeerId":
        """Read what `str` writes, in either case; raises ConfigError for anything else."""
        if len(text) != _PEER_ID_TEXT:
            raise ConfigError(f"not a PeerId: {text!r} (expected {_PEER_ID_TEXT} characters)")
        try:
            peer_id = cls(base64.b32decode(text.upper() + "===="))
        except ValueError as exc:  # binascii.Error, or what it says of text beyond ASCII
            raise ConfigError(f"not a PeerId: {text!r} ({exc})") from None
        if str(peer_id) != text.lower():  # 52 characters hold 4 bits more than a key
            raise ConfigError(f"not a PeerId: {text!r} (its last character is not one)")
        return peer_id


@dataclass(frozen=True)
class ModelId:
    """What two servers must share to stand in one chain.

    `digest` is the SHA-256 over the canonical config, the source tensors' index (names, shapes,
    types) and the tokenizer's hash; `name` is for people and may differ for equal models.
    Only the digest counts in comparisons.
    """

    digest: bytes
    name: str = ""

    def __post_init__(self) -> None:
        if len(self.digest) != 32:
            raise ConfigError(f"a ModelId digest has 32 bytes, not {len(self.digest)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelId) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest.hex()[:8]}"


@dataclass(frozen=True, slots=True)
class SessionId:
    """A random 128-bit name of one sequence's state along a route."""

    value: bytes

    def __post_init__(self) -> None:
        if len(self.value) != SESSION_ID_BYTES:
            raise ConfigError(f"a SessionId has {SESSION_ID_BYTES} bytes, not {len(self.value)}")

    def __str__(self) -> str:
        return self.value.hex()[:12]

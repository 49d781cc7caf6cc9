"""Keys and signatures: who a peer is.

A peer is an Ed25519 key pair; its public key is its PeerId (`p2pllm.ids`). Every signature is
made over a *domain* string and the message, so that a signature given for one purpose can never
be used for another.
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pllm.errors import BadSignature, ConfigError
from p2pllm.ids import PeerId

SIGNATURE_BYTES = 64
SEED_BYTES = 32


@dataclass(frozen=True)
class Identity:
    """A peer's key pair. The private half never leaves this object."""

    peer_id: PeerId
    _key: Ed25519PrivateKey = field(repr=False, compare=False)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """64 bytes that prove that this peer said `message` for the purpose `domain`."""
        return self._key.sign(_framed(domain, message))

    @classmethod
    def generate(cls) -> "Identity":
        """A new random identity."""
        return cls.from_seed(os.urandom(SEED_BYTES))

    @classmethod
    def from_seed(cls, seed: bytes) -> "Identity":
        """The identity with this 32-byte private seed (RFC 8032 §5.1.5)."""
        key = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(PeerId(key.public_key().public_bytes_raw()), key)

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Read the seed from `path`, or make one there that only its owner may read.

        Raises ConfigError if the file exists but is not a seed, or cannot be written.
        """
        try:
            if not path.exists():
                _create_seed(path)
            seed = bytes.fromhex(path.read_text().strip())
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot read or make the identity in {path}: {exc}") from exc
        if len(seed) != SEED_BYTES:
            raise ConfigError(f"{path} does not hold an identity (32 bytes in hex)")
        return cls.from_seed(seed)


def verify(peer_id: PeerId, domain: bytes, message: bytes, signature: bytes) -> None:
    """Raise BadSignature unless `peer_id` signed `message` for `domain`. About 150 µs."""
    try:
        Ed25519PublicKey.from_public_bytes(peer_id.key).verify(signature, _framed(domain, message))
    except (InvalidSignature, ValueError) as exc:
        raise BadSignature(f"not signed by {peer_id.short}") from exc


def _framed(domain: bytes, message: bytes) -> bytes:
    return len(domain).to_bytes(1, "big") + domain + message


def _create_seed(path: Path) -> None:
    """Write a random seed, whole or not at all; one that another process wrote first stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # for its owner's eyes only
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(os.urandom(SEED_BYTES).hex() + "\n")
        os.link(name, path)
    except FileExistsError:
        return
    finally:
        os.unlink(name)

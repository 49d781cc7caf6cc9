"""Noise_XX: two peers who know nothing of each other agree on keys and show their static keys.

The Noise Protocol Framework, revision 34 (https://noiseprotocol.org/noise.html), for the one
pattern and the two suites that we use:

    XX:   -> e        <- e, ee, s, es        -> s, se

    Noise_XX_25519_AESGCM_SHA256 and Noise_XX_25519_ChaChaPoly_SHA256

The objects are the specification's own (§5): a CipherState encrypts under one key and counts, a
SymmetricState hashes the transcript and derives keys, a handshake walks through the pattern.
Whatever a peer sends ends in a payload or in `RemoteProtocolError`.

Not here: who the peer *is* (`p2pllm.net.handshake` ties the static key to an identity), other
patterns, pre-shared keys, and fallback.
"""

import enum
import hashlib
import hmac
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from p2pllm.errors import LocalProtocolError, RemoteProtocolError

Buffer = bytes | bytearray | memoryview

MAX_MESSAGE_BYTES = 65_535  # of any Noise message, tag included (§3)
KEY_BYTES = 32
TAG_BYTES = 16
# Both sides rekey after so many messages in one direction. With AES-GCM the distance to an ideal
# cipher after q messages of b blocks is about (q·b)² / 2^129; full frames have b = 2^12, so 2^30
# messages stay within 2^-45. A connection at 1 GB/s gets there after 18 hours.
REKEY_AFTER_MESSAGES = 2**30
# §5.1 ends a key's life at 2^64 - 1. Nobody sends half of that: a bug or an attack got us there.
MAX_NONCE = 2**63


class Aead(Protocol):
    """What `cryptography`'s AESGCM and ChaCha20Poly1305 have in common."""

    def encrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None) -> bytes: ...

    def decrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None) -> bytes: ...

    def encrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int: ...

    def decrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int: ...


class Cipher(enum.Enum):
    """The two suites; the value is the cipher's name in the protocol's name (§8)."""

    AESGCM = "AESGCM"
    CHACHAPOLY = "ChaChaPoly"

    @property
    def protocol_name(self) -> bytes:
        return f"Noise_XX_25519_{self.value}_SHA256".encode()

    def aead(self, key: bytes) -> Aead:
        return AESGCM(key) if self is Cipher.AESGCM else ChaCha20Poly1305(key)

    def nonce(self, counter: int) -> bytes:
        """96 bits: four zero bytes, then the counter in the suite's byte order (§12.3, §12.4)."""
        if self is Cipher.AESGCM:
            return counter.to_bytes(12, "big")
        return b"\0\0\0\0" + counter.to_bytes(8, "little")


class Role(enum.Enum):
    """Who speaks first."""

    INITIATOR = "initiator"
    RESPONDER = "responder"

    @property
    def other(self) -> "Role":
        return Role.RESPONDER if self is Role.INITIATOR else Role.INITIATOR


class CipherState:
    """One direction's key and its message counter (§5.1).

    Both ends of a direction count alike and rekey (§11.3) after every `rekey_after` messages, so
    nothing about it travels. The counter goes on over a rekey, as the specification has it.
    """

    __slots__ = ("_aead", "_cipher", "_key", "_next_rekey", "_rekey_after", "counter")

    def __init__(
        self, cipher: Cipher, key: bytes, *, rekey_after: int = REKEY_AFTER_MESSAGES
    ) -> None:
        self._cipher = cipher
        self._key = key
        self._aead = cipher.aead(key)
        self._rekey_after = rekey_after
        self._next_rekey = rekey_after
        self.counter = 0  # messages so far; the next one's nonce

    def encrypt(self, plaintext: Buffer, ad: bytes = b"") -> bytes:
        """The next message, `TAG_BYTES` longer than `plaintext`. The length is not checked."""
        if self.counter >= MAX_NONCE:
            raise LocalProtocolError("a key's messages are used up; open a new connection")
        nonce = self._advance()
        return self._aead.encrypt(nonce, plaintext, ad)

    def encrypt_into(self, plaintext: Buffer, out: memoryview, ad: bytes = b"") -> None:
        """`encrypt` to `out`, which is exactly `TAG_BYTES` longer than `plaintext`."""
        if self.counter >= MAX_NONCE:
            raise LocalProtocolError("a key's messages are used up; open a new connection")
        nonce = self._advance()
        self._aead.encrypt_into(nonce, plaintext, ad, out)

    def decrypt(self, ciphertext: Buffer, ad: bytes = b"") -> bytes:
        """The plaintext of the next message; RemoteProtocolError if it is not authentic.

        After an error the direction is dead: the counters no longer agree.
        """
        self._check_foreign(len(ciphertext))
        nonce = self._advance()
        try:
            return self._aead.decrypt(nonce, ciphertext, ad)
        except InvalidTag:
            raise RemoteProtocolError("a message that does not decrypt") from None

    def decrypt_into(self, ciphertext: Buffer, out: memoryview, ad: bytes = b"") -> None:
        """`decrypt` to `out`, which is exactly `TAG_BYTES` shorter than `ciphertext`."""
        self._check_foreign(len(ciphertext))
        nonce = self._advance()
        try:
            self._aead.decrypt_into(nonce, ciphertext, ad, out)
        except InvalidTag:
            raise RemoteProtocolError("a message that does not decrypt") from None

    def rekey(self) -> None:
        """Replace the key by a one-way function of itself (§4.2 REKEY): old messages stay safe."""
        nonce = self._cipher.nonce(2**64 - 1)
        self._key = self._aead.encrypt(nonce, bytes(KEY_BYTES), b"")[:KEY_BYTES]
        self._aead = self._cipher.aead(self._key)

    def _check_foreign(self, num_bytes: int) -> None:
        if num_bytes < TAG_BYTES:
            raise RemoteProtocolError(f"a message of {num_bytes} bytes has no room for its tag")
        if self.counter >= MAX_NONCE:
            raise RemoteProtocolError("the peer goes on after its key's messages are used up")

    def _advance(self) -> bytes:
        """The next message's nonce; rekeys before the first message past the limit."""
        if self.counter == self._next_rekey:
            self.rekey()
            self._next_rekey += self._rekey_after
        nonce = self._cipher.nonce(self.counter)
        self.counter += 1
        return nonce


class SymmetricState:
    """The chaining key, the transcript hash and the current handshake cipher (§5.2)."""

    def __init__(self, cipher: Cipher) -> None:
        name = cipher.protocol_name
        self._cipher_suite = cipher
        self.hash = name.ljust(32, b"\0") if len(name) <= 32 else hashlib.sha256(name).digest()
        self._chaining_key = self.hash
        self._cipher: CipherState | None = None

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self._chaining_key, key = _hkdf(self._chaining_key, material)
        self._cipher = CipherState(self._cipher_suite, key)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = (
            plaintext if self._cipher is None else self._cipher.encrypt(plaintext, self.hash)
        )
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        before = self.hash
        plaintext = ciphertext if self._cipher is None else self._cipher.decrypt(ciphertext, before)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self, rekey_after: int) -> tuple[CipherState, CipherState]:
        """The initiator's sending and the responder's sending cipher."""
        first, second = _hkdf(self._chaining_key, b"")
        suite = self._cipher_suite
        return (
            CipherState(suite, first, rekey_after=rekey_after),
            CipherState(suite, second, rekey_after=rekey_after),
        )


def _hkdf(chaining_key: bytes, material: bytes) -> tuple[bytes, bytes]:
    """Two 32-byte outputs of HKDF as in §4.3."""
    temp = hmac.digest(chaining_key, material, "sha256")
    first = hmac.digest(temp, b"\x01", "sha256")
    return first, hmac.digest(temp, first + b"\x02", "sha256")


# What each message carries before its payload (§7.5), by whose turn it is.
_PATTERN = (("e",), ("e", "ee", "s", "es"), ("s", "se"))


class NoiseHandshake:
    """One side of one XX handshake (§5.3): write and read in turn, three messages in all.

    `static_key` is this side's X25519 key; both sides must give the same `prologue`. `ephemeral`
    is drawn at random; only tests with published vectors set it.
    """

    def __init__(
        self,
        role: Role,
        static_key: X25519PrivateKey,
        prologue: bytes,
        cipher: Cipher = Cipher.AESGCM,
        ephemeral: X25519PrivateKey | None = None,
        rekey_after: int = REKEY_AFTER_MESSAGES,
    ) -> None:
        self.role = role
        self.remote_static: bytes | None = None  # 32 bytes, once the peer has shown it
        self._static = static_key
        self._ephemeral = ephemeral or X25519PrivateKey.generate()
        self._remote_ephemeral = b""
        self._rekey_after = rekey_after
        self._state = SymmetricState(cipher)
        self._state.mix_hash(prologue)
        self._turn = 0  # index of the next message in _PATTERN

    @property
    def is_complete(self) -> bool:
        """Have all three messages passed?"""
        return self._turn == len(_PATTERN)

    @property
    def is_my_turn(self) -> bool:
        """Is the next message ours to write?"""
        writer = Role.INITIATOR if self._turn % 2 == 0 else Role.RESPONDER
        return not self.is_complete and writer is self.role

    @property
    def handshake_hash(self) -> bytes:
        """32 bytes that only these two peers in this handshake have in common (§11.2)."""
        return self._state.hash

    def write_message(self, payload: bytes = b"") -> bytes:
        """Our next handshake message around `payload`; LocalProtocolError out of turn."""
        if not self.is_my_turn:
            raise LocalProtocolError(f"it is not the {self.role.value}'s turn to write")
        parts = [self._write_token(token) for token in _PATTERN[self._turn]]
        parts.append(self._state.encrypt_and_hash(payload))
        self._turn += 1
        message = b"".join(parts)
        if len(message) > MAX_MESSAGE_BYTES:
            raise LocalProtocolError(f"a handshake message of {len(message)} bytes is too long")
        return message

    def read_message(self, message: Buffer) -> bytes:
        """The payload of the peer's next message; RemoteProtocolError if anything is wrong."""
        if self.is_complete or self.is_my_turn:
            raise LocalProtocolError(f"it is not the {self.role.value}'s turn to read")
        if len(message) > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(f"a handshake message of {len(message)} bytes is too long")
        rest = bytes(message)
        for token in _PATTERN[self._turn]:
            rest = self._read_token(token, rest)
        payload = self._state.decrypt_and_hash(rest)
        self._turn += 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """The ciphers of the transport phase: (for sending, for receiving)."""
        if not self.is_complete:
            raise LocalProtocolError("the handshake is not complete")
        first, second = self._state.split(self._rekey_after)
        return (first, second) if self.role is Role.INITIATOR else (second, first)

    def _write_token(self, token: str) -> bytes:
        if token == "e":
            public = self._ephemeral.public_key().public_bytes_raw()
            self._state.mix_hash(public)
            return public
        if token == "s":
            return self._state.encrypt_and_hash(self._static.public_key().public_bytes_raw())
        self._mix_dh(token)
        return b""

    def _read_token(self, token: str, rest: bytes) -> bytes:
        """Take the token's bytes off the front of `rest` and return what is left."""
        if token == "e":
            self._remote_ephemeral, rest = _take(rest, KEY_BYTES)
            self._state.mix_hash(self._remote_ephemeral)
        elif token == "s":
            sealed, rest = _take(rest, KEY_BYTES + TAG_BYTES)
            self.remote_static = self._state.decrypt_and_hash(sealed)
        else:
            self._mix_dh(token)
        return rest

    def _mix_dh(self, token: str) -> None:
        """Mix in one Diffie-Hellman result: `es` is initiator's e with responder's s, and so on."""
        initiators, responders = token[0], token[1]
        is_initiator = self.role is Role.INITIATOR
        own, remote = (initiators, responders) if is_initiator else (responders, initiators)
        secret = self._ephemeral if own == "e" else self._static
        public = self._remote_ephemeral if remote == "e" else self.remote_static
        assert public is not None  # the pattern shows every key before it is used
        try:
            self._state.mix_key(secret.exchange(X25519PublicKey.from_public_bytes(public)))
        except ValueError:  # a point of small order: the shared secret is zero (RFC 7748 §6.1)
            raise RemoteProtocolError("the peer's key is not a usable X25519 key") from None


def _take(data: bytes, num_bytes: int) -> tuple[bytes, bytes]:
    if len(data) < num_bytes:
        raise RemoteProtocolError(
            f"a handshake message cut short: {len(data)} of {num_bytes} bytes"
        )
    return data[:num_bytes], data[num_bytes:]

"""The handshake of a connection: Noise_XX with our prologue, and who the peer is.

Noise shows each side the other's X25519 *static key*, which lives as long as the process. A peer
is its Ed25519 *identity*, so each side also sends a signature of its identity over its static
key: whoever holds the session's keys is the peer (the same binding as libp2p's noise spec).

    initiator                                          responder
    u8 suite   u16 length   e                    ->
               u16 length   e, ee, s, es, hello  <-
               u16 length   s, se, hello         ->

The first byte chooses the cipher; it is safe in the clear because the suite's name is hashed into
the transcript. The prologue holds the major version and the network id, so peers of different
ones cannot even decrypt each other's greeting. A *hello* is a msgpack map (keys below, unknown
ones ignored) and is encrypted in both directions.

    identity    32 bytes, the PeerId             minor      [lowest, highest] spoken
    signature   64 bytes, see SIGNATURE_DOMAIN   features   names of optional features
    observed    HOST:PORT at which the sender    agent      program and version, for logs
                sees the receiver, or ""         membership reserved for private swarms

The initiator is done when it has written message 3; the responder when it has read it. Not here:
sockets, time limits and counts of half-open handshakes (`p2pllm.net.endpoint`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2pllm import identity
from p2pllm.addresses import parse_host_port
from p2pllm.errors import (
    BadSignature,
    CodecError,
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
)
from p2pllm.identity import Identity
from p2pllm.ids import PEER_ID_BYTES, PeerId
from p2pllm.net.noise import (
    REKEY_AFTER_MESSAGES,
    Buffer,
    Cipher,
    CipherState,
    NoiseHandshake,
    Role,
)
from p2pllm.wire.codec import pack, unpack_map

MAJOR = 1  # peers of different majors cannot talk
MINOR_VERSIONS = (0, 0)  # lowest and highest minor version that this program speaks
SIGNATURE_DOMAIN = b"p2pllm/noise-static/1"
AGENT = "p2pllm"

MAX_HELLO_BYTES = 2048
MAX_FEATURES = 32
MAX_NAME = 64  # characters of a feature or an agent
MAX_OBSERVED = 300  # the longest DNS name, brackets and a port
MAX_MEMBERSHIP_BYTES = 1024
SIGNATURE_BYTES = identity.SIGNATURE_BYTES

_SUITES = {1: Cipher.AESGCM, 2: Cipher.CHACHAPOLY}
_SUITE_BYTES = {cipher: bytes([number]) for number, cipher in _SUITES.items()}
_NOISE_OVERHEAD = 32 + (32 + 16) + 16  # keys and tags of the longest message, the second
_MAX_BUFFERED = 1 + 2 + _NOISE_OVERHEAD + MAX_HELLO_BYTES

Verify = Callable[[PeerId, bytes, bytes, bytes], None]


@dataclass(frozen=True, slots=True)
class Hello:
    """What we say of ourselves; the identity and its signature are added by `Handshake`.

    `observed` is where we see the peer ("HOST:PORT"), empty if that means nothing.
    """

    minor: tuple[int, int] = MINOR_VERSIONS
    features: frozenset[str] = frozenset()
    observed: str = ""
    membership: bytes = b""
    agent: str = AGENT


@dataclass(frozen=True, slots=True)
class PeerHello:
    """Who the peer proved to be, and what it said of itself.

    `minor` is the highest minor version that both speak, `features` those that both offer,
    `observed` the address at which the peer sees us ("" if it did not say). `handshake_hash`
    names this handshake for both sides (channel binding).
    """

    peer_id: PeerId
    minor: int
    features: frozenset[str]
    observed: str
    membership: bytes
    agent: str
    handshake_hash: bytes


class Handshake:
    """One side of one handshake: feed it bytes, send what it has, then take the ciphers.

    `expected` is who must answer; None takes anyone. `verify(peer_id, domain, message,
    signature)` checks the peer's signature and raises `BadSignature`: an endpoint passes one
    that is rate-limited and raises `Refused` where too many were asked for.
    """

    def __init__(
        self,
        role: Role,
        keys: "StaticKeys",
        *,
        network_id: str,
        hello: Hello,
        expected: PeerId | None = None,
        cipher: Cipher = Cipher.AESGCM,
        verify: Verify = identity.verify,
        rekey_after: int = REKEY_AFTER_MESSAGES,
    ) -> None:
        self.role = role
        self.result: PeerHello | None = None  # set once the handshake is complete
        self._keys = keys
        self._hello = hello
        self._prologue = prologue(network_id)
        self._expected = expected
        self._verify = verify
        self._rekey_after = rekey_after
        self._received = bytearray()
        self._outgoing = bytearray()
        self._is_failed = False
        self._noise: NoiseHandshake | None = None  # a responder's waits for the suite
        if role is Role.INITIATOR:
            self._noise = self._new_noise(cipher)
            self._outgoing += _SUITE_BYTES[cipher]
            self._send(self._noise, b"")

    @property
    def is_complete(self) -> bool:
        """Is the peer known? What is left to send must still be sent."""
        return self.result is not None

    @property
    def leftover(self) -> bytes:
        """Bytes received after the handshake's end: the first of the encrypted stream."""
        return bytes(self._received) if self.is_complete else b""

    def bytes_to_send(self) -> bytes:
        """What is to be sent now; empty if nothing is."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def receive(self, data: Buffer) -> None:
        """Take bytes from the peer; RemoteProtocolError or BadSignature end this handshake."""
        if self._is_failed or self.is_complete:
            raise LocalProtocolError("this handshake is over")
        self._received += data
        try:
            self._advance()
        except Exception:
            self._is_failed = True
            raise

    def split(self) -> tuple[CipherState, CipherState]:
        """The ciphers of the connection: (for sending, for receiving). Once, after completion."""
        if self._noise is None or not self.is_complete:
            raise LocalProtocolError("the handshake is not complete")
        return self._noise.split()

    def _advance(self) -> None:
        if self._noise is None:
            if not self._received:
                return
            self._noise = self._choose_suite(self._received[0])
            del self._received[:1]
        while not self.is_complete and (message := self._next_message()) is not None:
            self._on_message(self._noise, message)
        if not self.is_complete and len(self._received) > _MAX_BUFFERED:
            raise RemoteProtocolError("more bytes than a handshake has")

    def _choose_suite(self, number: int) -> NoiseHandshake:
        cipher = _SUITES.get(number)
        if cipher is None:
            raise RemoteProtocolError(f"not a p2pllm peer, or a newer one (cipher {number})")
        return self._new_noise(cipher)

    def _new_noise(self, cipher: Cipher) -> NoiseHandshake:
        return NoiseHandshake(
            self.role, self._keys.private, self._prologue, cipher, rekey_after=self._rekey_after
        )

    def _next_message(self) -> bytes | None:
        """The next whole message off the buffer. Its bounds are checked before it is waited for."""
        if len(self._received) < 2:
            return None
        length = int.from_bytes(self._received[:2], "big")
        if length > _NOISE_OVERHEAD + MAX_HELLO_BYTES:
            raise RemoteProtocolError(f"not a p2pllm peer (a handshake message of {length} bytes)")
        if len(self._received) < 2 + length:
            return None
        message = bytes(self._received[2 : 2 + length])
        del self._received[: 2 + length]
        return message

    def _on_message(self, noise: NoiseHandshake, message: bytes) -> None:
        if self.role is Role.INITIATOR:  # message 2: the last that we read, the first encrypted
            try:
                payload = noise.read_message(message)
            except RemoteProtocolError as exc:
                # Unequal prologues show here and nowhere earlier.
                raise RemoteProtocolError(
                    f"the peer is of another network or version of p2pllm ({exc})"
                ) from exc
            self.result = self._check_hello(noise, payload)
            self._send(noise, self._own_hello())
            self.result = replace(self.result, handshake_hash=noise.handshake_hash)
            return
        payload = noise.read_message(message)
        if noise.is_my_turn:
            self._send(noise, self._own_hello())
        else:
            self.result = self._check_hello(noise, payload)

    def _send(self, noise: NoiseHandshake, payload: bytes) -> None:
        message = noise.write_message(payload)
        self._outgoing += len(message).to_bytes(2, "big") + message

    def _own_hello(self) -> bytes:
        hello = self._hello
        payload = pack(
            {
                "identity": self._keys.peer_id.key,
                "signature": self._keys.signature,
                "minor": list(hello.minor),
                "features": sorted(hello.features),
                "observed": hello.observed,
                "membership": hello.membership,
                "agent": hello.agent,
            }
        )
        if len(payload) > MAX_HELLO_BYTES:
            raise LocalProtocolError(f"a hello of {len(payload)} bytes is too long")
        return payload

    def _check_hello(self, noise: NoiseHandshake, payload: bytes) -> PeerHello:
        """Who the peer is: first what costs nothing to check, then the signature."""
        fields = unpack_map(payload, max_bytes=MAX_HELLO_BYTES)
        peer_id = PeerId(_bytes(fields, "identity", PEER_ID_BYTES, PEER_ID_BYTES))
        signature = _bytes(fields, "signature", SIGNATURE_BYTES, SIGNATURE_BYTES)
        if self._expected is not None and peer_id != self._expected:
            raise BadSignature(
                f"expected peer {self._expected.short}, but {peer_id.short} answered there"
            )
        minor = _common_minor(self._hello.minor, fields.get("minor"))
        features = _names(fields, "features")
        hello = PeerHello(
            peer_id=peer_id,
            minor=minor,
            features=features & self._hello.features,
            observed=_observed(fields),
            membership=_bytes(fields, "membership", 0, MAX_MEMBERSHIP_BYTES),
            agent=_text(fields.get("agent", ""), "agent", MAX_NAME),
            handshake_hash=noise.handshake_hash,
        )
        assert noise.remote_static is not None  # shown in the message that carried this hello
        self._verify(peer_id, SIGNATURE_DOMAIN, noise.remote_static, signature)
        return hello


@dataclass(frozen=True, slots=True)
class StaticKeys:
    """A process's X25519 key, and the identity's signature over its public half."""

    peer_id: PeerId
    private: X25519PrivateKey
    signature: bytes

    @classmethod
    def generate(cls, identity: Identity) -> "StaticKeys":
        """A new random key, signed once for all handshakes of the process."""
        return cls.of(identity, X25519PrivateKey.generate())

    @classmethod
    def of(cls, identity: Identity, private: X25519PrivateKey) -> "StaticKeys":
        """This key, signed."""
        public = private.public_key().public_bytes_raw()
        return cls(identity.peer_id, private, identity.sign(SIGNATURE_DOMAIN, public))


def prologue(network_id: str) -> bytes:
    """What both sides must hash alike to understand each other."""
    return b"p2pllm/" + str(MAJOR).encode() + b"\0" + network_id.encode()


def _common_minor(own: tuple[int, int], theirs: Any) -> int:
    if not (
        isinstance(theirs, list)
        and len(theirs) == 2
        and all(type(number) is int for number in theirs)
        and 0 <= theirs[0] <= theirs[1]
    ):
        raise CodecError("a hello's minor versions are [lowest, highest]")
    lowest, highest = int(theirs[0]), int(theirs[1])
    common = min(own[1], highest)
    if common < max(own[0], lowest):
        raise RemoteProtocolError(
            f"the peer speaks versions {MAJOR}.{lowest} to {MAJOR}.{highest}, "
            f"we speak {MAJOR}.{own[0]} to {MAJOR}.{own[1]}"
        )
    return common


def _bytes(fields: dict[str, object], name: str, shortest: int, longest: int) -> bytes:
    value = fields.get(name, b"")
    if type(value) is not bytes or not shortest <= len(value) <= longest:
        raise CodecError(f"a hello's {name!r} must be {shortest} to {longest} bytes")
    return value


def _text(value: object, name: str, longest: int) -> str:
    # Printable, because logs show it.
    if type(value) is not str or len(value) > longest or not value.isprintable():
        raise CodecError(f"a hello's {name!r} must be printable text of at most {longest}")
    return value


def _names(fields: dict[str, object], name: str) -> frozenset[str]:
    value = fields.get(name, [])
    if not isinstance(value, list) or len(value) > MAX_FEATURES:
        raise CodecError(f"a hello's {name!r} must be at most {MAX_FEATURES} names")
    return frozenset(_text(item, name, MAX_NAME) for item in value)


def _observed(fields: dict[str, object]) -> str:
    text = _text(fields.get("observed", ""), "observed", MAX_OBSERVED)
    try:
        if text:
            parse_host_port(text)
    except ConfigError as exc:
        raise CodecError(f"a hello's 'observed': {exc}") from exc
    return text

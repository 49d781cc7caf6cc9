"""Signed records: the values of the DHT, as bytes.

    {v, ns, key, subkey, seq, issued, expires, body}      msgpack, canonical; at most 1 KiB

A record lives at `key` (32 bytes) in namespace `ns`, in the slot `subkey`, which *is* the PeerId
of its signer: a writer owns its own slot and no other. Of two records for a slot the higher `seq`
wins. `issued` and `expires` are wall time in seconds. An empty `body` is a tombstone: "I left".

This module knows the format only. Signing is `p2pllm.identity`'s, the rules of acceptance are
`p2pllm.dht.records`'. The bytes that were signed are kept as they came (`payload`), so that a
record is passed on with keys that this version does not know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p2pllm.addresses import Address
from p2pllm.errors import CodecError, ConfigError, LocalProtocolError
from p2pllm.ids import PeerId
from p2pllm.wire.codec import pack, unpack, unpack_map

RECORD_DOMAIN = b"p2pllm/record/1"  # what a record's signature is made for
RECORD_VERSION = 1
MAX_RECORD_BYTES = 1024  # payload and signature; a page of 16 KiB then holds at least 15
MAX_ADDRESSES = 8  # per peer record, relays counted in
MAX_ADDRESS_BYTES = 768  # of these together; the rest of a record takes less than 256
_MAX_NAMESPACE = 32

PEER_NAMESPACE = "peer"
PRESENCE_NAMESPACE = "presence"


@dataclass(frozen=True, slots=True)
class Record:
    """One signed value of the DHT; see the module's docstring for the fields."""

    namespace: str
    key: bytes
    subkey: PeerId
    seq: int
    issued: float
    expires: float
    body: dict[str, Any]
    payload: bytes
    signature: bytes

    @property
    def is_tombstone(self) -> bool:
        """Does it say that its writer left?"""
        return not self.body

    def to_bytes(self) -> bytes:
        """As it travels: a msgpack array of payload and signature."""
        return pack([self.payload, self.signature])


def make_record(
    namespace: str,
    key: bytes,
    subkey: PeerId,
    *,
    seq: int,
    issued: float,
    expires: float,
    body: dict[str, Any],
    sign: Callable[[bytes, bytes], bytes],
) -> Record:
    """Build and sign a record; `sign(domain, message)` is `Identity.sign`.

    Raises LocalProtocolError if it would be over `MAX_RECORD_BYTES`.
    """
    payload = pack(
        {
            "v": RECORD_VERSION,
            "ns": namespace,
            "key": key,
            "subkey": subkey.key,
            "seq": seq,
            "issued": float(issued),
            "expires": float(expires),
            "body": body,
        }
    )
    signature = sign(RECORD_DOMAIN, payload)
    record = Record(namespace, key, subkey, seq, issued, expires, body, payload, signature)
    if len(record.to_bytes()) > MAX_RECORD_BYTES:
        raise LocalProtocolError(f"a record of {len(payload)} bytes; {MAX_RECORD_BYTES} allowed")
    return record


def parse_record(data: bytes | memoryview) -> Record:
    """Read a record's bytes without judging its signature or its times; raises CodecError."""
    parts = unpack(data, max_bytes=MAX_RECORD_BYTES)
    if not isinstance(parts, list) or len(parts) != 2 or not all(type(p) is bytes for p in parts):
        raise CodecError("a record is an array of payload and signature")
    payload, signature = parts
    fields = unpack_map(payload, max_bytes=MAX_RECORD_BYTES)
    if fields.get("v") != RECORD_VERSION:
        raise CodecError(f"a record of version {fields.get('v')!r}")
    namespace = _field(fields, "ns", str)
    key, subkey = _field(fields, "key", bytes), _field(fields, "subkey", bytes)
    if len(namespace) > _MAX_NAMESPACE or len(key) != 32 or len(subkey) != 32:
        raise CodecError("a record's namespace, key or subkey has a wrong length")
    seq = _field(fields, "seq", int)
    issued, expires = _field(fields, "issued", float), _field(fields, "expires", float)
    if not (0 <= seq < 2**63 and 0 <= issued < 2**40 and 0 <= expires < 2**40):
        raise CodecError("a record's sequence number or times are out of range")
    body = _field(fields, "body", dict)
    return Record(namespace, key, PeerId(subkey), seq, issued, expires, body, payload, signature)


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:  # bool is an int, and must not pass for one
        raise CodecError(f"a record's {name!r} must be {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """The body of a peer's own record: where it can be dialled.

    `addresses` are direct ones and circuits through relays, best first. `is_public` says whether
    the peer believes that it is reachable from anywhere (only those serve the DHT).
    """

    peer_id: PeerId
    addresses: tuple[Address, ...]
    is_public: bool = True

    def to_body(self) -> dict[str, Any]:
        """The record's body, with as many of the addresses, best first, as a record has room for.

        They go without the PeerId, which the record's slot says.
        """
        own, texts, room = f"{self.peer_id}@", [], MAX_ADDRESS_BYTES
        for address in self.addresses[:MAX_ADDRESSES]:
            text = str(address.of(self.peer_id)).removeprefix(own)
            room -= len(pack(text))
            if room >= 0:
                texts.append(text)
        return {"addresses": texts, "public": self.is_public}

    @classmethod
    def from_record(cls, record: Record) -> "PeerRecord":
        """Read a record of namespace "peer"; raises CodecError if its body is not one."""
        if record.namespace != PEER_NAMESPACE:
            raise CodecError(f"a record of namespace {record.namespace!r} is not a peer's")
        texts = record.body.get("addresses", [])
        if type(texts) is not list or len(texts) > MAX_ADDRESSES:
            raise CodecError(f"a peer record has a list of at most {MAX_ADDRESSES} addresses")
        if not all(type(text) is str for text in texts):
            raise CodecError("a peer record's address must be a text")
        try:
            addresses = tuple(Address.parse(f"{record.subkey}@{text}") for text in texts)
        except ConfigError as exc:
            raise CodecError(f"a peer record's address: {exc}") from exc
        return cls(record.subkey, addresses, record.body.get("public") is True)

"""Keys and distances: where a record or a peer lies in the DHT's 256-bit space.

A record lies at SHA-256 of its network, namespace and name; a peer at SHA-256 of its PeerId
(`PeerId.dht_id`). The distance of two places is their bitwise exclusive or, read as a number
(Maymounkov & Mazières 2002, §2.1).
"""

import hashlib
import random

ID_BITS = 256
KEY_BYTES = ID_BITS // 8
_DOMAIN = b"p2pllm/dht/1"


def key_of(network_id: str, namespace: str, name: str | bytes) -> bytes:
    """The key of a name: 32 bytes.

    Each part is preceded by its length, so that no two triples are hashed as the same bytes.
    """
    digest = hashlib.sha256()
    name = name.encode() if isinstance(name, str) else name
    for part in (_DOMAIN, network_id.encode(), namespace.encode(), name):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def to_id(key: bytes) -> int:
    """A key as a place in the id space."""
    return int.from_bytes(key, "big")


def to_key(place: int) -> bytes:
    """A place as it travels in messages."""
    return place.to_bytes(KEY_BYTES, "big")


def distance(a: int, b: int) -> int:
    """Kademlia's metric: symmetric, and for each a and d there is exactly one b at distance d."""
    return a ^ b


def shared_prefix_bits(a: int, b: int) -> int:
    """How many leading bits two places share; 256 for equal ones."""
    return ID_BITS - (a ^ b).bit_length()


def random_id_sharing(place: int, prefix_bits: int, rng: random.Random) -> int:
    """A random place that shares exactly `prefix_bits` (< 256) leading bits with `place`."""
    tail_bits = ID_BITS - prefix_bits - 1
    flipped = place ^ (1 << tail_bits)
    return (flipped >> tail_bits << tail_bits) | rng.getrandbits(tail_bits)

"""Which records are accepted, which of two wins, and how long one lives.

A record is believed because of its signature, never because of who passed it on. Two clocks take
part: the writer dated the record by its own, which may be off, and we count its life down on our
monotonic one, from the moment we received it. So a record lives at most

    lifetime - age                                 lifetime = min(expires - issued, max_ttl)
    issued + lifetime + tolerance - our wall time

whichever is less. `age` is how long the peer that passed it on had it; the second line bounds what
a liar's age of 0 could gain. A storer can hide a record or shorten its life, but neither forge it
nor make it last.

What this does not do: decide whether there is room (`p2pllm.dht.storage`), or understand bodies.
"""

import enum
from collections import Counter, OrderedDict
from collections.abc import Callable

from p2pllm.config import DhtConfig
from p2pllm.dht.keys import key_of
from p2pllm.errors import BadSignature, CodecError
from p2pllm.identity import verify
from p2pllm.ids import PeerId
from p2pllm.wire.records import (
    MAX_RECORD_BYTES,
    PEER_NAMESPACE,
    RECORD_DOMAIN,
    Record,
    parse_record,
)

MAX_VERIFIED = 4096  # records remembered as verified: 4 MiB, some tables' and keys' worth

Verify = Callable[[PeerId, bytes, bytes, bytes], None]


class Refusal(enum.StrEnum):
    """Why a record was not taken; the text is what `Stored` tells the writer."""

    OVERSIZE = "oversize"
    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad signature"
    WRONG_SUBKEY = "wrong subkey"  # stored by another peer than its writer
    WRONG_KEY = "wrong key"  # not where this namespace's records belong, or not what was asked
    EXPIRED = "expired"
    FAR_FUTURE = "far future"
    STALE = "stale"  # a newer one is known
    FULL = "full"  # a bound is reached and everything there expires later


class RecordReader:
    """Parses and verifies records, each distinct sequence of bytes once.

    A check costs about 150 µs, which makes signatures the DHT's surface for denial of service:
    the same record comes from several storers and again with every read, and only new bytes are
    checked. `num_checks` counts the checks made, for budgets and tests.
    """

    def __init__(self, *, capacity: int = MAX_VERIFIED, verify: Verify = verify) -> None:
        self._capacity = capacity
        self._verify = verify
        self._verified: OrderedDict[bytes, Record] = OrderedDict()
        self.num_checks = 0

    def is_known(self, data: bytes) -> bool:
        """Would reading these bytes cost no signature check?"""
        return data in self._verified

    def read(self, data: bytes) -> Record | Refusal:
        """The record in `data`, signed by the owner of its slot; or why it is none."""
        record = self._verified.get(data)
        if record is not None:
            self._verified.move_to_end(data)
            return record
        if len(data) > MAX_RECORD_BYTES:
            return Refusal.OVERSIZE
        try:
            record = parse_record(data)
            self.num_checks += 1
            self._verify(record.subkey, RECORD_DOMAIN, record.payload, record.signature)
        except BadSignature:
            return Refusal.BAD_SIGNATURE
        except CodecError:
            return Refusal.MALFORMED
        self.remember(data, record)
        return record

    def remember(self, data: bytes, record: Record) -> None:
        """Take a record that needs no check: one of our own."""
        self._verified[data] = record
        if len(self._verified) > self._capacity:
            self._verified.popitem(last=False)


class RecordRules:
    """The rules that a well signed record must keep, and a count of those that did not.

    `max_skew_s` bounds how far any clock is off the true time, so that two clocks may differ by
    twice as much: that is the tolerance.
    """

    def __init__(self, network_id: str, config: DhtConfig) -> None:
        self._network_id = network_id
        self._max_ttl_s = config.max_ttl_s
        self._tolerance_s = 2 * config.max_skew_s
        self.refused: Counter[Refusal] = Counter()

    def remaining_s(self, record: Record, wall: float, *, age_s: float = 0.0) -> float | Refusal:
        """Seconds that the record has left from now on, or why it has none.

        `wall` is our wall time, `age_s` what the peer that passed it on says of how long it has
        had the record (0: it came from the writer).
        """
        if record.issued > wall + self._tolerance_s:
            return Refusal.FAR_FUTURE
        lifetime_s = min(record.expires - record.issued, self._max_ttl_s)
        left_s = min(
            lifetime_s - max(0.0, age_s),
            record.issued + lifetime_s + self._tolerance_s - wall,
        )
        return left_s if left_s > 0 else Refusal.EXPIRED

    def is_misplaced(self, record: Record) -> bool:
        """Is it at a key where its namespace does not allow it?

        A peer's own record has exactly one place. Of other namespaces only the readers know
        the names, and they ask by key.
        """
        if record.namespace != PEER_NAMESPACE:
            return False
        return record.key != peer_key(self._network_id, record.subkey)

    def count(self, refusal: Refusal) -> Refusal:
        """Count a refusal and hand it back."""
        self.refused[refusal] += 1
        return refusal


def peer_key(network_id: str, peer: PeerId) -> bytes:
    """Where a peer's own record lies."""
    return key_of(network_id, PEER_NAMESPACE, peer.key)


def supersedes(new: Record, old: Record) -> bool:
    """Does `new` win over `old` for their slot? The higher seq, then the larger bytes.

    Equal seq with another body is a writer's fault (two processes with one identity); any fixed
    order makes all readers agree.
    """
    return (new.seq, new.payload) > (old.seq, old.payload)

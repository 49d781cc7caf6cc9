"""Contacts: peers as the routing table and lookups see them.

A contact is read from a peer's own signed record. That record's age does not matter here: it is a
hint where to dial, the handshake proves who answers there, and a bucket takes only peers that
answered. Contacts fall into address *groups* (/16 of IPv4, /48 of IPv6), of which only a few may
stand in one bucket, table or shortlist: who owns one network must not become all of our peers.
"""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

from p2pllm.addresses import Address
from p2pllm.dht.records import RecordReader, Refusal
from p2pllm.errors import CodecError
from p2pllm.ids import PeerId
from p2pllm.wire.records import PeerRecord

MAX_CONTACTS = 4096  # remembered as parsed
_V4_GROUP_BITS, _V6_GROUP_BITS = 16, 48  # what one owner is commonly given


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer that can be asked.

    `id` is its place in the DHT, `record` its signed record ("" if we only know its name), `seq`
    that record's, `group` the address group that it claims to be in (None: a private network).
    """

    peer_id: PeerId
    id: int
    addresses: tuple[Address, ...] = ()
    record: bytes = b""
    seq: int = -1
    group: str | None = None

    @classmethod
    def of(cls, peer_id: PeerId) -> "Contact":
        """A peer of which we know nothing but the name; the transport knows where it is."""
        return cls(peer_id, peer_id.dht_id)


class ContactReader:
    """Reads contacts from signed peer records, each distinct record once."""

    def __init__(self, records: RecordReader, *, capacity: int = MAX_CONTACTS) -> None:
        self._records = records
        self._capacity = capacity
        self._read: OrderedDict[bytes, Contact] = OrderedDict()

    def read(self, data: bytes) -> Contact | Refusal:
        """The contact in a peer record; or why it is none (a peer that asks only is none)."""
        contact = self._read.get(data)
        if contact is not None:
            self._read.move_to_end(data)
            return contact
        record = self._records.read(data)
        if isinstance(record, Refusal):
            return record
        try:
            peer = PeerRecord.from_record(record)
        except CodecError:
            return Refusal.MALFORMED
        if not peer.is_public or not peer.addresses:
            return Refusal.MALFORMED
        who, group = peer.peer_id, group_of_addresses(peer.addresses)
        contact = Contact(who, who.dht_id, peer.addresses, data, record.seq, group)
        self._read[data] = contact
        if len(self._read) > self._capacity:
            self._read.popitem(last=False)
        return contact


def group_of_addresses(addresses: tuple[Address, ...]) -> str | None:
    """The group of the first direct address that is in any."""
    groups = (group_of(address.host) for address in addresses if address.relay is None)
    return next((group for group in groups if group is not None), None)


@lru_cache(maxsize=4096)
def group_of(host: str) -> str | None:
    """The address group of a host: its network, or a host name as it is.

    None for addresses that are not global: there is nothing to be diverse in on a LAN.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower()
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_global:
        return None
    bits = _V4_GROUP_BITS if address.version == 4 else _V6_GROUP_BITS
    return str(ipaddress.ip_network((address, bits), strict=False))

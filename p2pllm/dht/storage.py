"""The records that a node keeps for the swarm, within bounds.

A key holds one slot per writer. Four bounds keep one party from taking the room of others: slots
per key, bytes per writer, bytes per address group, records in all. Where a bound is reached, the
record that would expire first makes room, and always one of the party that fills the bound: under
a crowded key one of the address group with most slots there, so that whoever makes a thousand
identities in one network displaces its own records and not the swarm's.

Tombstones are records like any other and stay until they expire: an older copy cannot return.
Times are monotonic; nothing lives longer than it was given when it came.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from p2pllm.config import DhtConfig
from p2pllm.dht.records import Refusal, supersedes
from p2pllm.wire.records import Record

RECORD_OVERHEAD_BYTES = 12  # of a record and its age in a page: msgpack heads and a float


@dataclass(slots=True, eq=False)
class _Slot:
    record: Record
    data: bytes
    group: str
    received_at: float
    expires_at: float
    number: int  # of the slot, rising: the cursor of pages
    serial: int  # of this content, rising: breaks ties


@dataclass(slots=True, eq=False)
class _Share:
    """What one party (a writer, a group, or all) has stored, the first to expire at hand."""

    num_bytes: int = 0
    num_slots: int = 0
    _queue: list[tuple[float, int, _Slot]] = field(default_factory=list)  # some slots are gone

    def add(self, slot: _Slot) -> None:
        self.num_bytes += len(slot.data)
        self.num_slots += 1
        heapq.heappush(self._queue, (slot.expires_at, slot.serial, slot))

    def remove(self, slot: _Slot) -> None:
        self.num_bytes -= len(slot.data)
        self.num_slots -= 1

    def first_to_expire(self, store: "RecordStore", *, but: _Slot | None = None) -> _Slot | None:
        """The slot that expires first; `but`, if given, is about to be replaced and not it."""
        held: list[tuple[float, int, _Slot]] = []
        found = None
        while self._queue and found is None:
            entry = self._queue[0]
            if not store.holds(entry[2]):
                heapq.heappop(self._queue)
            elif entry[2] is but:
                held.append(heapq.heappop(self._queue))
            else:
                found = entry[2]
        for entry in held:
            heapq.heappush(self._queue, entry)
        return found

    def compact(self, store: "RecordStore") -> None:
        """Forget slots that are gone, once they are the larger part."""
        if len(self._queue) > 2 * self.num_slots + 16:
            self._queue = [entry for entry in self._queue if store.holds(entry[2])]
            heapq.heapify(self._queue)


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a key's records, how long each has been here, and where to go on (0: nowhere)."""

    records: tuple[bytes, ...]
    ages_s: tuple[float, ...]
    cursor: int


@dataclass(frozen=True, slots=True)
class StoreSnapshot:
    """What is stored, in numbers."""

    num_keys: int
    num_records: int
    num_bytes: int
    num_evicted: int


_Key = tuple[str, bytes]  # namespace and key


class RecordStore:
    """Bounded storage of records that were already judged (`p2pllm.dht.records`)."""

    def __init__(self, config: DhtConfig) -> None:
        self._config = config
        self._keys: dict[_Key, dict[bytes, _Slot]] = {}
        self._all = _Share()
        self._writers: dict[bytes, _Share] = {}
        self._groups: dict[str, _Share] = {}
        self._last_serial = 0
        self._num_evicted = 0

    def put(
        self, record: Record, data: bytes, *, now: float, life_s: float, group: str = ""
    ) -> Refusal | None:
        """Keep a record for `life_s` seconds; returns why not, or None.

        `group` is the address group of its writer ("" for all that are in none). A record that is
        here already stays as it is: hearing it again does not make it live longer.
        """
        self.expire(now)
        slots = self._keys.get((record.namespace, record.key), {})
        old = slots.get(record.subkey.key)
        if old is not None:
            if old.record.payload == record.payload:
                return None
            if not supersedes(record, old.record):
                return Refusal.STALE
        self._last_serial += 1
        number = old.number if old else self._last_serial
        slot = _Slot(record, data, group, now, now + life_s, number, self._last_serial)
        if not self._make_room(slot, old):
            return Refusal.FULL
        self._add(slot, old)
        return None

    def page(
        self,
        namespace: str,
        key: bytes,
        *,
        now: float,
        max_bytes: int,
        cursor: int = 0,
        subkey: bytes = b"",
    ) -> Page:
        """The records at a key after `cursor`, as many as `max_bytes` hold (at least one).

        The order is that of first arrival, which updates do not change: a reader that goes
        through the pages misses none that was there all the time.
        """
        self.expire(now)
        records: list[bytes] = []
        ages: list[float] = []
        last = 0
        for slot in self._slots(namespace, key, subkey):
            if slot.number <= cursor:
                continue
            max_bytes -= len(slot.data) + RECORD_OVERHEAD_BYTES
            if max_bytes < 0 and records:
                return Page(tuple(records), tuple(ages), last)
            records.append(slot.data)
            ages.append(now - slot.received_at)
            last = slot.number
        return Page(tuple(records), tuple(ages), 0)

    def records(self, namespace: str, key: bytes, *, now: float) -> list[Record]:
        """All records at a key, tombstones too."""
        self.expire(now)
        return [slot.record for slot in self._slots(namespace, key)]

    def expire(self, now: float) -> None:
        """Drop what has lived its time."""
        while (slot := self._all.first_to_expire(self)) and slot.expires_at <= now:
            self._remove(slot)

    def holds(self, slot: _Slot) -> bool:
        """Is this very slot still here?"""
        slots = self._keys.get((slot.record.namespace, slot.record.key))
        return slots is not None and slots.get(slot.record.subkey.key) is slot

    def snapshot(self) -> StoreSnapshot:
        """What is stored, in numbers."""
        return StoreSnapshot(
            len(self._keys), self._all.num_slots, self._all.num_bytes, self._num_evicted
        )

    # --- inside -------------------------------------------------------------------------------

    def _slots(self, namespace: str, key: bytes, subkey: bytes = b"") -> Iterator[_Slot]:
        slots = self._keys.get((namespace, key), {})
        if not subkey:
            yield from slots.values()
        elif subkey in slots:
            yield slots[subkey]

    def _make_room(self, slot: _Slot, old: _Slot | None) -> bool:
        config, num_bytes = self._config, len(slot.data)
        writer, group = slot.record.subkey.key, slot.group
        bounds = [(self._writers.get(writer), config.max_bytes_per_writer)]
        bounds += [(self._groups.get(group), config.max_bytes_per_group)] if group else []
        for share, limit in bounds:
            if share is None:
                continue
            freed = len(old.data) if old and self._counts_in(old, share) else 0
            while share.num_bytes - freed + num_bytes > limit:
                if not self._evict(share.first_to_expire(self, but=old), slot):
                    return False
        if old is not None:
            return True
        slots = self._keys.get((slot.record.namespace, slot.record.key), {})
        while len(slots) >= config.max_subkeys_per_key:
            victim, is_crowded = _crowding(slots, slot)
            if not self._evict(victim, slot, is_forced=is_crowded):
                return False
        while self._all.num_slots >= config.max_records:
            if not self._evict(self._all.first_to_expire(self), slot):
                return False
        return True

    def _counts_in(self, slot: _Slot, share: _Share) -> bool:
        return share in (
            self._writers.get(slot.record.subkey.key),
            self._groups.get(slot.group),
        )

    def _evict(self, victim: _Slot | None, newcomer: _Slot, *, is_forced: bool = False) -> bool:
        if victim is None or (victim.expires_at > newcomer.expires_at and not is_forced):
            return False
        self._num_evicted += 1
        self._remove(victim)
        return True

    def _add(self, slot: _Slot, old: _Slot | None) -> None:
        record = slot.record
        # An update keeps its place in the dict's order, which is that of the numbers.
        self._keys.setdefault((record.namespace, record.key), {})[record.subkey.key] = slot
        for share in self._shares(slot):
            share.add(slot)
        if old is not None:
            self._release(old)

    def _remove(self, slot: _Slot) -> None:
        key = (slot.record.namespace, slot.record.key)
        del self._keys[key][slot.record.subkey.key]
        if not self._keys[key]:
            del self._keys[key]
        self._release(slot)

    def _release(self, slot: _Slot) -> None:
        for share in self._shares(slot):
            share.remove(slot)
            share.compact(self)
        writer = slot.record.subkey.key
        if not self._writers[writer].num_slots:
            del self._writers[writer]
        if slot.group and not self._groups[slot.group].num_slots:
            del self._groups[slot.group]

    def _shares(self, slot: _Slot) -> list[_Share]:
        shares = [self._all, self._writers.setdefault(slot.record.subkey.key, _Share())]
        return [*shares, self._groups.setdefault(slot.group, _Share())] if slot.group else shares


def _crowding(slots: dict[bytes, _Slot], newcomer: _Slot) -> tuple[_Slot, bool]:
    """Of the group with most slots the slot that expires first, and is that not the newcomer's?

    The newcomer counts too: where all groups have one slot, nobody crowds.
    """
    counts = Counter(slot.group for slot in slots.values())
    counts[newcomer.group] += 1
    most = max(counts.values())
    crowd = (slot for slot in slots.values() if counts[slot.group] == most)
    return min(crowd, key=lambda slot: slot.expires_at), counts[newcomer.group] < most

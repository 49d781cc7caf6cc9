"""The routing table: which peers we know, many of them near to us and some everywhere else.

Peers are kept in buckets by how many leading bits their ids share with ours (Maymounkov &
Mazières 2002, §2.4): bucket 0 is the other half of the id space, bucket 1 the other quarter, and so
on, each with room for k peers. Three rules keep the table honest:

- A peer enters only after *we* completed a round trip with it; what others say is a rumour.
- Long-lived peers stay, since they are the likeliest to live on: a full bucket takes nobody in, but
  asks for a ping of its least recently seen peer. Whoever fails is pinged, whoever fails twice in a
  row leaves, and a spare that has answered takes the place.
- At most a few peers of one address group per bucket and per table, else one network's owner
  could surround us with its own.

Whoever failed twice is *avoided* for a while that doubles with every further failure.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from p2pllm.config import DhtConfig
from p2pllm.dht.contacts import Contact
from p2pllm.dht.keys import shared_prefix_bits
from p2pllm.ids import PeerId

MAX_FAILURES = 2  # consecutive ones; a single lost reply is no reason to forget a peer
AVOID_S = 15.0  # after the failure that made a peer leave; doubles with each further one
MAX_AVOID_S = 600.0
MAX_AVOIDED = 1024  # peers whose failures are remembered
PING_AFTER_S = 60.0  # a peer seen more recently need not prove that it lives
MAX_PINGS = 64
THIN_BUCKET = 6  # a bucket with fewer peers is filled from rumours, which are pinged first


@dataclass(slots=True)
class _Entry:
    contact: Contact
    group: str | None
    added_at: float
    seen_at: float
    failures: int = 0
    is_verified: bool = True  # since we started; peers of a saved table are not, at first


@dataclass(slots=True)
class _Failing:
    contact: Contact
    failures: int = 0
    avoid_until: float = 0.0


@dataclass(frozen=True, slots=True)
class PeerView:
    """One peer of the table, for logs and tests. Times are monotonic."""

    peer_id: PeerId
    bucket: int
    added_at: float
    seen_at: float
    failures: int
    is_verified: bool


@dataclass(frozen=True, slots=True)
class TableSnapshot:
    """The table as a value. `contacts` is what `restore` takes."""

    peers: tuple[PeerView, ...]
    contacts: tuple[Contact, ...]


class RoutingTable:
    """The k-buckets of the peer at `own_id`."""

    def __init__(self, own_id: int, config: DhtConfig, now: float) -> None:
        self._own_id = own_id
        self._config = config
        self._entries: dict[int, _Entry] = {}
        self._buckets: dict[int, dict[int, _Entry]] = {}  # least recently seen first
        self._spares: dict[int, OrderedDict[int, tuple[Contact, str | None]]] = {}
        self._groups: Counter[str] = Counter()
        self._failing: OrderedDict[int, _Failing] = OrderedDict()
        self._pings: OrderedDict[int, Contact] = OrderedDict()
        self._touched: dict[int, float] = {}
        self._born = now

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, contact: Contact) -> bool:
        return contact.id in self._entries

    # --- what happened ------------------------------------------------------------------------

    def on_success(self, contact: Contact, now: float, *, host_group: str | None = None) -> None:
        """We asked this peer and it answered. `host_group` is where it really was, if known."""
        if contact.id == self._own_id:
            return
        self._failing.pop(contact.id, None)
        self._pings.pop(contact.id, None)
        entry = self._entries.get(contact.id)
        if entry is None:
            self._admit(contact, host_group or contact.group, now)
            return
        self.on_contact(contact)
        entry.seen_at, entry.failures, entry.is_verified = now, 0, True
        bucket = self._buckets[self._bucket_of(contact.id)]
        bucket[contact.id] = bucket.pop(contact.id)  # to the end: most recently seen

    def on_failure(self, contact: Contact, now: float) -> None:
        """We asked this peer and it did not answer, or broke the rules."""
        failing = self._failing.setdefault(contact.id, _Failing(contact))
        self._failing.move_to_end(contact.id)
        if len(self._failing) > MAX_AVOIDED:
            self._failing.popitem(last=False)
        failing.failures += 1
        excess = failing.failures - MAX_FAILURES
        if excess >= 0:
            failing.avoid_until = now + min(AVOID_S * 2 ** min(excess, 16), MAX_AVOID_S)
        self._pings.pop(contact.id, None)
        bucket = self._bucket_of(contact.id)
        self._spares.get(bucket, OrderedDict()).pop(contact.id, None)
        entry = self._entries.get(contact.id)
        if entry is None:
            return
        entry.failures += 1
        if entry.failures >= MAX_FAILURES or not entry.is_verified:
            self._remove(entry)
            self._promote_spare(bucket, now)
        else:
            # Asked again soon: a dead peer that we go on naming costs others a timeout each.
            self._want_ping(contact)

    def on_contact(self, contact: Contact) -> None:
        """A newer record of a peer that may be in the table: its addresses changed."""
        entry = self._entries.get(contact.id)
        if entry is not None and contact.seq > entry.contact.seq:
            entry.contact = contact

    def on_lookup(self, target: int, now: float) -> None:
        """A lookup of `target` is made, which freshens the bucket that it lies in."""
        self._touched[self._bucket_of(target)] = now

    def restore(self, contacts: Iterable[Contact], now: float) -> None:
        """Take the peers of a saved table in, on probation: one failure and they leave."""
        for contact in contacts:
            if contact.id not in self._entries and contact.id != self._own_id:
                self._admit(contact, contact.group, now, is_verified=False)

    # --- what is wanted -----------------------------------------------------------------------

    def closest(self, target: int, count: int, *, only_verified: bool = False) -> list[Contact]:
        """The known peers closest to `target`, closest first.

        `only_verified` leaves out those of a saved table that have not answered yet.
        """
        # All ids are sorted: a table has some hundred, and sorting those by a built-in key
        # takes 10 µs, less than walking buckets in the order of their distance.
        found: list[Contact] = []
        for place in sorted(self._entries, key=target.__xor__):
            entry = self._entries[place]
            if entry.is_verified or not only_verified:
                found.append(entry.contact)
                if len(found) == count:
                    break
        return found

    def is_avoided(self, place: int, now: float) -> bool:
        """Has the peer failed repeatedly, and so recently that it should be left alone?"""
        failing = self._failing.get(place)
        return failing is not None and now < failing.avoid_until

    def failed_contacts(self) -> list[Contact]:
        """Peers that failed, most recently first: whom to try when nobody else is left."""
        return [failing.contact for failing in reversed(self._failing.values())]

    def wants(self, contact: Contact, now: float, *, only_if_thin: bool = False) -> bool:
        """Would the peer be taken in if it answered? If so it is worth a ping.

        `only_if_thin` asks whether its bucket is in need of peers.
        """
        bucket = self._bucket_of(contact.id)
        limit = THIN_BUCKET if only_if_thin else self._config.k
        if len(self._buckets.get(bucket, ())) >= limit or contact.id == self._own_id:
            return False
        if contact.id in self._entries or self.is_avoided(contact.id, now):
            return False
        return self._is_diverse(bucket, contact.group)

    @property
    def has_pings(self) -> bool:
        """Will `next_ping` name somebody?"""
        return bool(self._pings)

    def next_ping(self) -> Contact | None:
        """A peer to be asked whether it still lives: it failed once, or others want its place."""
        return self._pings.popitem(last=False)[1] if self._pings else None

    def bucket_to_refresh(self, now: float) -> int | None:
        """The bucket that no lookup went to for longest, if that is too long ago."""
        if not self._entries:
            return None
        deepest = max(self._buckets)
        stale = min(range(deepest + 1), key=lambda bucket: self._touched.get(bucket, self._born))
        age_s = now - self._touched.get(stale, self._born)
        return stale if age_s >= self._config.refresh_bucket_s else None

    def snapshot(self) -> TableSnapshot:
        """The table as a value."""
        entries = self._entries.values()
        views = tuple(
            PeerView(
                entry.contact.peer_id,
                self._bucket_of(entry.contact.id),
                entry.added_at,
                entry.seen_at,
                entry.failures,
                entry.is_verified,
            )
            for entry in entries
        )
        return TableSnapshot(views, tuple(entry.contact for entry in entries))

    # --- inside -------------------------------------------------------------------------------

    def _bucket_of(self, place: int) -> int:
        return shared_prefix_bits(self._own_id, place)

    def _admit(
        self, contact: Contact, group: str | None, now: float, *, is_verified: bool = True
    ) -> None:
        bucket = self._bucket_of(contact.id)
        if not self._is_diverse(bucket, group):
            return
        peers = self._buckets.setdefault(bucket, {})
        if len(peers) >= self._config.k:
            if is_verified:
                self._keep_spare(bucket, contact, group, now)
            return
        entry = _Entry(contact, group, added_at=now, seen_at=now, is_verified=is_verified)
        peers[contact.id] = self._entries[contact.id] = entry
        if group is not None:
            self._groups[group] += 1
        self._spares.get(bucket, OrderedDict()).pop(contact.id, None)

    def _keep_spare(self, bucket: int, contact: Contact, group: str | None, now: float) -> None:
        spares = self._spares.setdefault(bucket, OrderedDict())
        spares[contact.id] = (contact, group)
        spares.move_to_end(contact.id)
        if len(spares) > self._config.k:
            spares.popitem(last=False)
        oldest = next(iter(self._buckets[bucket].values()))
        if now - oldest.seen_at >= PING_AFTER_S:
            self._want_ping(oldest.contact)

    def _want_ping(self, contact: Contact) -> None:
        if len(self._pings) < MAX_PINGS:
            self._pings[contact.id] = contact

    def _promote_spare(self, bucket: int, now: float) -> None:
        spares = self._spares.get(bucket)
        while spares and len(self._buckets.get(bucket, ())) < self._config.k:
            contact, group = spares.popitem(last=True)[1]
            self._admit(contact, group, now)

    def _remove(self, entry: _Entry) -> None:
        place = entry.contact.id
        del self._entries[place]
        bucket = self._bucket_of(place)
        del self._buckets[bucket][place]
        if not self._buckets[bucket]:
            del self._buckets[bucket]
        if entry.group is not None:
            self._groups[entry.group] -= 1
            if not self._groups[entry.group]:
                del self._groups[entry.group]

    def _is_diverse(self, bucket: int, group: str | None) -> bool:
        per_table = self._config.max_per_group_in_table
        per_bucket = self._config.max_per_group_in_bucket
        if group is None:
            return True
        if per_table and self._groups[group] >= per_table:
            return False
        if not per_bucket or not self._groups[group]:
            return True
        peers = self._buckets.get(bucket, {}).values()
        return sum(entry.group == group for entry in peers) < per_bucket

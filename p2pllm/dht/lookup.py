"""An iterative lookup: ask the closest peers known for closer ones, until none are left.

Kademlia's lookup (Maymounkov & Mazières 2002, §2.3) with three differences. The alpha slots are
always busy: whenever one reply is in, the next query goes out, so that a slow or dead peer takes
up one slot and not a round. At most a few peers of one address group count, so that one network's
owner cannot fill the list. And a lookup is over when the `quorum` closest peers have answered: all
k of them to know a neighbourhood, the replicas to store there or to read all slots of a key, beta
to read one slot.

Reading merges whatever records come in as a set: of each slot the newest, whoever sent it. Keys
with many records are read page by page, and a peer has answered when its last page is in.

The face: `next_query()` says whom to ask, `on_reply` and `on_failure` feed in what came of it. No
clock: timeouts are the caller's. `chain` counts the longest causal chain of queries, each sent
because of what the one before it told us; that is what a lookup's latency is made of.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from p2pllm.dht.contacts import Contact
from p2pllm.dht.records import supersedes
from p2pllm.ids import PeerId
from p2pllm.wire.records import Record

MAX_QUERIES = 200  # ten times what a lookup takes among a million peers; ends a liar's chase
MAX_PAGES = 128  # of one peer; 1000 records of 1 KiB are 67
MAX_RECORDS = 4096  # in one result: what several storers may know together


@dataclass(frozen=True, slots=True)
class Query:
    """Ask this peer, from this cursor on. `depth` is its place in its causal chain, from 1."""

    contact: Contact
    cursor: int
    depth: int


@dataclass(slots=True)
class _Candidate:
    contact: Contact
    depth: int
    is_asked: bool = False
    has_answered: bool = False
    has_failed: bool = False
    cursor: int = 0  # of the page to ask for next
    pages: int = 0

    @property
    def wants_query(self) -> bool:
        return not (self.is_asked or self.has_answered or self.has_failed)


@dataclass(frozen=True, slots=True)
class LookupSnapshot:
    """Where a lookup stands."""

    num_queries: int
    num_failures: int
    num_candidates: int
    num_records: int
    chain: int
    is_done: bool


class Lookup:
    """One lookup of `target`. `closest` and `records` hold the result once `is_done`."""

    def __init__(
        self,
        target: int,
        seeds: Iterable[Contact],
        *,
        own_id: int,
        alpha: int,
        k: int,
        quorum: int,
        max_per_group: int,
    ) -> None:
        """`seeds` are the peers to begin with; `max_per_group` (of one address group in the
        shortlist) 0 lifts that bound."""
        self.target = target
        self.records: dict[PeerId, Record] = {}
        self.chain = 0
        self._own_id = own_id
        self._alpha = alpha
        self._k = k
        self._quorum = quorum
        self._max_per_group = max_per_group
        self._in_flight = 0
        self._num_queries = 0
        self._num_failures = 0
        self._distances: list[int] = []  # ascending; parallel to _candidates
        self._candidates: list[_Candidate] = []
        self._known: dict[int, _Candidate] = {}
        for contact in seeds:
            self._add(contact, depth=1)

    def widen(self, quorum: int) -> None:
        """Go on until so many of the closest peers have answered."""
        self._quorum = quorum

    # --- out ----------------------------------------------------------------------------------

    def next_query(self) -> Query | None:
        """The next peer to ask now; None if all slots are busy or nobody is left to ask."""
        if self._in_flight >= self._alpha or self._num_queries >= MAX_QUERIES or self.is_done:
            return None
        candidate = next((c for c in self._shortlist(self._k) if c.wants_query), None)
        if candidate is None:
            return None
        candidate.is_asked = True
        self._in_flight += 1
        self._num_queries += 1
        self.chain = max(self.chain, candidate.depth)
        return Query(candidate.contact, candidate.cursor, candidate.depth)

    @property
    def is_done(self) -> bool:
        """Have the closest peers answered, or is nobody left who could?"""
        if not self._in_flight and self._num_queries >= MAX_QUERIES:
            return True
        return all(candidate.has_answered for candidate in self._shortlist(self._quorum))

    @property
    def closest(self) -> list[Contact]:
        """The closest peers that answered, closest first, at most k."""
        return [c.contact for c in self._shortlist(self._k) if c.has_answered]

    @property
    def has_answers(self) -> bool:
        """Did anybody answer?"""
        return any(candidate.has_answered for candidate in self._candidates)

    def snapshot(self) -> LookupSnapshot:
        """Where the lookup stands."""
        return LookupSnapshot(
            self._num_queries,
            self._num_failures,
            len(self._candidates),
            len(self.records),
            self.chain,
            self.is_done,
        )

    def knows(self, contact: Contact) -> bool:
        """Has the peer been heard of in this lookup?"""
        return contact.id in self._known

    # --- in -----------------------------------------------------------------------------------

    def on_reply(
        self,
        query: Query,
        contacts: Sequence[Contact],
        records: Iterable[Record] = (),
        cursor: int = 0,
    ) -> None:
        """The peer answered with closer peers, records, and the cursor of its next page (0: none).

        Records must be verified, and asked for; contacts beyond k are ignored.
        """
        candidate = self._finish(query)
        if candidate is None:
            return
        candidate.pages += 1
        for record in records:
            self._merge(record)
        # A cursor that does not move on would make us ask forever.
        if cursor > candidate.cursor and candidate.pages < MAX_PAGES:
            candidate.cursor = cursor
            candidate.depth += 1
        else:
            candidate.has_answered = True
        for contact in contacts[: self._k]:
            self._add(contact, depth=query.depth + 1)

    def on_failure(self, query: Query) -> None:
        """The peer did not answer, or broke the rules: it counts for nothing."""
        candidate = self._finish(query)
        if candidate is not None:
            candidate.has_failed = True
            self._num_failures += 1

    # --- inside -------------------------------------------------------------------------------

    def _finish(self, query: Query) -> _Candidate | None:
        candidate = self._known[query.contact.id]
        if not candidate.is_asked:
            return None
        candidate.is_asked = False
        self._in_flight -= 1
        return candidate

    def _add(self, contact: Contact, depth: int) -> None:
        if contact.id in self._known or contact.id == self._own_id:
            return
        candidate = _Candidate(contact, depth)
        self._known[contact.id] = candidate
        distance = contact.id ^ self.target
        at = bisect_left(self._distances, distance)
        self._distances.insert(at, distance)
        self._candidates.insert(at, candidate)

    def _shortlist(self, count: int) -> Iterator[_Candidate]:
        """The `count` closest candidates that have not failed and whose group is not crowded."""
        groups: dict[str, int] = {}
        for candidate in self._candidates:
            if candidate.has_failed:
                continue
            group = candidate.contact.group
            if group is not None and self._max_per_group:
                groups[group] = groups.get(group, 0) + 1
                if groups[group] > self._max_per_group:
                    continue
            yield candidate
            count -= 1
            if not count:
                return

    def _merge(self, record: Record) -> None:
        known = self.records.get(record.subkey)
        if known is None:
            if len(self.records) < MAX_RECORDS:
                self.records[record.subkey] = record
        elif supersedes(record, known):
            self.records[record.subkey] = record

"""Who holds which pages of the K/V cache.

A page is room for `PAGE_TOKENS` tokens in every block of the span, so one page table serves all
blocks. Pages are reserved for a session's whole length when it opens: a generation that has begun
never fails for want of memory. Runs of neighbouring pages are preferred, because the attention
reads a run as one view and must gather anything else (design, section 5).

Sessions of one peer may share pages: each page counts who holds it, and counts once against its
peer's quota. A page whose contents have a *name* can be found by it. When nobody holds such a page
any more it is *cached*: still found, and free for everyone who needs room; of those that nobody
holds, the longest unused go first.

While others wait, one peer may hold at most a quarter of all pages; with nobody waiting it may
have them all. This module counts; it neither allocates tensors nor waits, and what names mean is
decided by `p2pllm.server.page_table`.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from p2pllm.errors import LocalProtocolError
from p2pllm.ids import PeerId
from p2pllm.wire.messages import PREFIX_TOKENS

# Tokens per page; 16 KiB of keys per block in a 3-head, 64-wide bfloat16 model. A client that
# names prefixes names them page by page, so it is a number of the protocol.
PAGE_TOKENS = PREFIX_TOKENS


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)


@dataclass
class PageAllocator:
    """Hands out page numbers `0 … num_pages - 1`, each to sessions of one peer at a time.

    `quota_pages` is what one peer may hold while others wait.
    """

    num_pages: int
    quota_pages: int
    _free: set[int] = field(init=False)  # neither held nor cached
    _holders: Counter[int] = field(init=False, default_factory=Counter)  # sessions, by page
    _owners: dict[int, PeerId] = field(init=False, default_factory=dict)  # of held and cached ones
    _held: Counter[PeerId] = field(init=False, default_factory=Counter)
    _cached: OrderedDict[int, None] = field(init=False, default_factory=OrderedDict)  # oldest first
    _names: dict[int, Hashable] = field(init=False, default_factory=dict)
    _named: dict[Hashable, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._free = set(range(self.num_pages))

    # --- counting ------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Those of them whose contents can still be found."""
        return len(self._cached)

    def held_by(self, peer: PeerId) -> int:
        """Pages that a peer's sessions hold together; shared ones count once."""
        return self._held[peer]

    def is_shared(self, page: int) -> bool:
        """Does more than one session hold it?"""
        return self._holders[page] > 1

    def num_unheld(self, pages: Iterable[int]) -> int:
        """How many of some pages nobody holds."""
        return sum(not self._holders[page] for page in pages)

    def num_returned(self, pages: Iterable[int]) -> int:
        """How many pages would come free if these were released, each as often as it is named."""
        times = Counter(pages)
        return sum(self._holders[page] == count for page, count in times.items())

    def is_within_quota(self, peer: PeerId, num_pages: int) -> bool:
        """May `peer` hold that many more pages also while others wait?"""
        return self._held[peer] + num_pages <= self.quota_pages

    def may_hold(
        self, peer: PeerId, num_pages: int, *, others_wait: bool, returned: int = 0
    ) -> bool:
        """Could `peer` get that many more pages now, by its quota and by what is free?

        `returned` is how many of its pages it would give back first.
        """
        within_quota = self.is_within_quota(peer, num_pages - returned)
        return num_pages <= self.num_free + returned and (within_quota or not others_wait)

    # --- taking and giving back ----------------------------------------------------------

    def allocate(
        self, peer: PeerId, num_pages: int, *, after: int | None = None
    ) -> tuple[int, ...]:
        """Take pages for a session of `peer`; the caller has asked `may_hold`.

        They follow page `after` if they can.
        """
        if not 0 < num_pages <= self.num_free:
            raise LocalProtocolError(f"{num_pages} pages asked, {self.num_free} free")
        pages = self._choose(num_pages, after)
        for page in pages:
            if page in self._cached:
                self._evict(page)
        self._free.difference_update(pages)
        for page in pages:
            self._holders[page], self._owners[page] = 1, peer
        self._held[peer] += len(pages)
        return tuple(pages)

    def share(self, peer: PeerId, pages: Sequence[int]) -> None:
        """Hold pages that sessions of `peer` hold or have left in the cache."""
        for page in pages:
            if self._owners.get(page) != peer:
                raise LocalProtocolError(f"page {page} is not {peer.short}'s to share")
        for page in pages:
            if not self._holders[page]:
                del self._cached[page]
                self._held[peer] += 1
            self._holders[page] += 1

    def release(self, peer: PeerId, pages: Sequence[int]) -> None:
        """Give a session's pages back."""
        if len(set(pages)) != len(pages) or not all(self._holders[page] for page in pages):
            raise LocalProtocolError("a page was released twice")
        if any(self._owners[page] != peer for page in pages):
            raise LocalProtocolError(f"{peer.short} does not hold all of {len(pages)} pages")
        for page in reversed(pages):  # a prefix is of use without its end, and not the other way
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._held[peer] -= 1
                if page in self._names:
                    self._cached[page] = None
                else:
                    self._free.add(page)
                    del self._owners[page]
        if not self._held[peer]:
            del self._held[peer]

    # --- names ---------------------------------------------------------------------------

    def publish(self, page: int, name: Hashable) -> None:
        """Let the contents of a held page be found; who had the name, or a name, first keeps it."""
        if page not in self._names and name not in self._named:
            self._names[page], self._named[name] = name, page

    def withdraw(self, page: int) -> None:
        """A held page is about to have other contents."""
        name = self._names.pop(page, None)
        if name is not None:
            del self._named[name]

    def find(self, names: Iterable[Hashable]) -> tuple[int, ...]:
        """The pages of the first names, up to one that has none."""
        found: list[int] = []
        for name in names:
            page = self._named.get(name)
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def _evict(self, page: int) -> None:
        """Forget what a cached page holds."""
        del self._cached[page]
        del self._owners[page]
        self.withdraw(page)
        self._free.add(page)

    # --- which ones ----------------------------------------------------------------------

    def _choose(self, wanted: int, after: int | None) -> Sequence[int]:
        """Neighbours if there are any, and as few cached pages as that allows, oldest first."""
        if after is not None:
            following = range(after + 1, after + 1 + wanted)
            if self._free.issuperset(following):
                return following
        run = _best_run(sorted(self._free), wanted) or self._oldest_run(wanted)
        if run:
            return run
        missing = max(0, wanted - len(self._free))
        oldest = islice(self._cached, missing)
        return sorted([*sorted(self._free)[: wanted - missing], *oldest])

    def _oldest_run(self, wanted: int) -> Sequence[int]:
        """A run of pages that nobody holds, with the longest unused cached ones; empty if none.

        Cached pages of the newer half are left alone: to compute a prefix again takes longer than
        to gather pages that lie apart.
        """
        usable = set(self._free)
        for page in islice(self._cached, len(self._cached) // 2):
            usable.add(page)
            start = stop = page
            while start - 1 in usable and page - start < wanted:
                start -= 1
            while stop + 1 in usable and stop - start < wanted:
                stop += 1
            if stop + 1 - start >= wanted:
                return range(start, start + wanted)
        return ()


def _best_run(free: list[int], wanted: int) -> list[int] | None:
    """The shortest run of neighbours that is long enough, if there is one."""
    best: tuple[int, int] | None = None  # (length, index of its first page)
    start = 0
    for index in range(1, len(free) + 1):
        if index < len(free) and free[index] == free[index - 1] + 1:
            continue
        length = index - start
        if length >= wanted and (best is None or length < best[0]):
            best = (length, start)
        start = index
    return None if best is None else free[best[1] : best[1] + wanted]

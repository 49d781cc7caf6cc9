"""Who holds which pages of the K/V cache.

A page is room for `PAGE_TOKENS` tokens in every block of the span, so one page table serves all
blocks. Pages are reserved for a session's whole length when it opens: a generation that has begun
never fails for want of memory. Runs of neighbouring pages are preferred, because the attention
reads a run as one view and must gather anything else (design, section 5).

While others wait, one peer may hold at most a quarter of all pages; with nobody waiting it may
have them all. This module counts; it neither allocates tensors nor waits.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from p2pllm.errors import LocalProtocolError
from p2pllm.ids import PeerId

PAGE_TOKENS = 64  # tokens per page; 16 KiB of keys per block in a 3-head, 64-wide bfloat16 model


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)


@dataclass
class PageAllocator:
    """Hands out page numbers `0 … num_pages - 1`, each to one owner at a time.

    `quota_pages` is what one peer may hold while others wait.
    """

    num_pages: int
    quota_pages: int
    _free: set[int] = field(init=False)
    _held: Counter[PeerId] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self._free = set(range(self.num_pages))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def held_by(self, peer: PeerId) -> int:
        """Pages that a peer's sessions hold together."""
        return self._held[peer]

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
        return num_pages <= len(self._free) + returned and (within_quota or not others_wait)

    def allocate(self, peer: PeerId, num_pages: int) -> tuple[int, ...]:
        """Take pages for a session of `peer`; the caller has asked `may_hold`."""
        if not 0 < num_pages <= len(self._free):
            raise LocalProtocolError(f"{num_pages} pages asked, {len(self._free)} free")
        pages = _best_run(sorted(self._free), num_pages)
        self._free.difference_update(pages)
        self._held[peer] += len(pages)
        return tuple(pages)

    def release(self, peer: PeerId, pages: Sequence[int]) -> None:
        """Give a session's pages back."""
        if not self._free.isdisjoint(pages) or len(set(pages)) != len(pages):
            raise LocalProtocolError("a page was released twice")
        if len(pages) > self._held[peer]:
            raise LocalProtocolError(f"{peer.short} does not hold {len(pages)} pages")
        self._free.update(pages)
        self._held[peer] -= len(pages)
        if not self._held[peer]:
            del self._held[peer]


def _best_run(free: list[int], wanted: int) -> list[int]:
    """The shortest run of neighbours that is long enough, else the first pages free."""
    best: tuple[int, int] | None = None  # (length, index of its first page)
    start = 0
    for index in range(1, len(free) + 1):
        if index < len(free) and free[index] == free[index - 1] + 1:
            continue
        length = index - start
        if length >= wanted and (best is None or length < best[0]):
            best = (length, start)
        start = index
    first = best[1] if best else 0
    return free[first : first + wanted]

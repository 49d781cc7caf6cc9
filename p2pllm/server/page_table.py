"""The pages of one session: which are shared, under which names, and how they are written to.

The client gives *keys* for the pages of a prompt (`Open.prefix_keys`): digests of the tokens up to
each page's end, which only it can make. They promise what the session's first pages are about to
hold, in the epoch of that Open. When such a page has been computed it is published under its key,
and a later session that brings the same keys begins with the same pages. A name is scoped by
client, blocks and codec, so nobody ever gets another client's pages, and a client that lies about
its tokens deceives itself.

Nobody writes into a page that others see. A step that does (after a rollback, or where another hop
had less of a prefix) gets a page of its own in the place of the shared one; the tokens before it
are copied when the step is computed (`PageCopy`), and until then the old page is held, also in case
the step fails. A page that only this session holds is withdrawn from its name instead.

Pure: `p2pllm.server.pages` counts, `p2pllm.server.worker` copies.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from p2pllm.errors import CacheFull
from p2pllm.ids import PeerId
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator
from p2pllm.wire.messages import Open

COPY_RETRY_S = 1.0  # before a page for a copy is asked for again


@dataclass(frozen=True, slots=True)
class PageCopy:
    """The first `num_tokens` tokens of page `source` belong into page `target`, too."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Swap:
    """A step got page `new` in the place of `old`, and keeps its first tokens."""

    index: int  # in the page table
    old: int
    new: int
    num_tokens: int


def names_of(request: Open) -> Iterable[Hashable]:
    """What the pages that an Open gives keys for are called here."""
    return (_name(request, key) for key in request.prefix_keys)


def _name(request: Open, key: bytes) -> Hashable:
    return request.client, request.span, request.codec, key


class PageTable:
    """The pages of one session, in the order of its tokens."""

    def __init__(self, pool: PageAllocator, peer: PeerId, pages: Sequence[int]) -> None:
        """`pages` are held by this table from now on: `release` gives them back."""
        self.pages = tuple(pages)
        self._pool = pool
        self._peer = peer
        self._names: tuple[Hashable, ...] = ()  # promised for the first pages
        self._num_published = 0  # pages that were offered under their names
        self._swaps: dict[int, list[_Swap]] = {}  # by step, until it is computed

    # --- keys ----------------------------------------------------------------------------

    def promise(self, request: Open) -> None:
        """The session's tokens will be those that the request's keys stand for."""
        self._names = tuple(names_of(request))[: len(self.pages)]
        self._num_published = 0

    def keep_promised(self, num_tokens: int) -> None:
        """Of what was promised, only so many tokens still hold."""
        self._names = self._names[: num_tokens // PAGE_TOKENS]

    def publish(self, num_computed: int) -> None:
        """So many tokens are there for good: let others find what was promised of them."""
        stop = min(len(self._names), num_computed // PAGE_TOKENS)
        for index in range(self._num_published, stop):
            self._pool.publish(self.pages[index], self._names[index])
        self._num_published = max(self._num_published, stop)

    def adopt(self, start: int) -> int:
        """Take published pages for the promised ones from `start` on, which nobody has written to;
        returns how many pages are shared then."""
        found = self._pool.find(self._names)
        if len(found) <= start:
            return start
        spare = self.pages[start : len(found)]
        self._pool.share(self._peer, found[start:])
        self._pool.release(self._peer, spare)
        self.pages = (*self.pages[:start], *found[start:], *self.pages[len(found) :])
        return len(found)

    # --- writing -------------------------------------------------------------------------

    def write(self, step: int, start: int, stop: int) -> None:
        """Tokens [start, stop) are about to be written: no page that holds them may be shared.

        Raises CacheFull, with nothing changed, if there is no page for a copy.
        """
        first = start // PAGE_TOKENS
        touched = range(first, (stop - 1) // PAGE_TOKENS + 1)
        shared = [index for index in touched if self._pool.is_shared(self.pages[index])]
        if len(shared) > self._pool.num_free:
            raise CacheFull(
                f"{len(shared)} pages are shared, and must be copied to be changed; "
                f"{self._pool.num_free} are free",
                retry_after_s=COPY_RETRY_S,
            )
        if shared:
            fresh = self._pool.allocate(self._peer, len(shared))
            pages = list(self.pages)
            swaps = self._swaps.setdefault(step, [])
            for index, new in zip(shared, fresh, strict=True):
                num_tokens = max(0, start - index * PAGE_TOKENS)
                swaps.append(_Swap(index, pages[index], new, num_tokens))
                pages[index] = new
            self.pages = tuple(pages)
        for index in touched:
            self._pool.withdraw(self.pages[index])

    def copies(self, step: int) -> tuple[PageCopy, ...]:
        """What must be copied before a step is computed."""
        return tuple(
            PageCopy(swap.old, swap.new, swap.num_tokens)
            for swap in self._swaps.get(step, ())
            if swap.num_tokens
        )

    def num_settled(self, num_tokens: int) -> int:
        """Of so many tokens, those that lie in no page that is yet to be copied."""
        starts = [swap.index * PAGE_TOKENS for swaps in self._swaps.values() for swap in swaps]
        return min([num_tokens, *starts])

    def on_computed(self, step: int) -> None:
        """A step is through: what it got pages for is not needed any more."""
        swaps = self._swaps.pop(step, None)
        if swaps:
            self._pool.release(self._peer, [swap.old for swap in swaps])

    def on_failed(self, steps: Iterable[int]) -> None:
        """Steps were not computed: the pages are those from before them."""
        pages = list(self.pages)
        for step in sorted(steps, reverse=True):
            for swap in self._swaps.pop(step, ()):
                self._pool.release(self._peer, [swap.new])
                pages[swap.index] = swap.old
        self.pages = tuple(pages)

    def release(self) -> None:
        """The session is over."""
        for step in list(self._swaps):
            self.on_computed(step)
        self._pool.release(self._peer, self.pages)

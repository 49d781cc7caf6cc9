"""A session table and a cache together: what a server does with rows, without network and loop."""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2pllm.ids import ModelId, PeerId, SessionId
from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.span_model import SpanCompute
from p2pllm.server.page_table import PageCopy
from p2pllm.server.pages import PAGE_TOKENS, PageAllocator
from p2pllm.server.sessions import Accepted, Session, SessionTable
from p2pllm.spans import Span
from p2pllm.wire.messages import Numerics, Open, Row

ALICE, BOB = PeerId(b"a" * 32), PeerId(b"b" * 32)
LEASE_S = 60.0


def session_id(number: int) -> SessionId:
    return SessionId(number.to_bytes(16, "big"))


def keys_of(tokens: Sequence[int], num_pages: int) -> tuple[bytes, ...]:
    """What a client might send for the first pages of a prompt."""
    return tuple(
        hashlib.sha256(repr(list(tokens[: (page + 1) * PAGE_TOKENS])).encode()).digest()[:16]
        for page in range(num_pages)
    )


@dataclass
class _Queued:
    row: Row
    tokens: list[int]
    pages: tuple[int, ...]
    copies: tuple[PageCopy, ...]


@dataclass
class PageLab:
    """`embed` turns tokens into hidden states (N, D)."""

    model: SpanCompute
    embed: Callable[[Sequence[int]], Tensor]
    num_pages: int
    quota_pages: int
    queues: dict[SessionId, deque[_Queued]] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.pool = PageAllocator(self.num_pages, quota_pages=self.quota_pages)
        self.table: SessionTable[Tensor] = SessionTable(self.pool, max_sessions=16, lease_s=LEASE_S)
        self.cache = self.model.make_cache(self.num_pages, PAGE_TOKENS)

    def opening(
        self,
        number: int,
        *,
        client: PeerId = ALICE,
        max_tokens: int = 4 * PAGE_TOKENS,
        keys: tuple[bytes, ...] = (),
        epoch: int = 0,
        span: Span | None = None,
    ) -> Open:
        return Open(
            session=session_id(number),
            epoch=epoch,
            span=span or self.model.span,
            max_tokens=max_tokens,
            model=ModelId(b"m" * 32),
            numerics=Numerics("float32"),
            push_token=b"p" * 16,
            client=client,
            prefix_keys=keys,
        )

    def open(
        self,
        number: int,
        prompt: Sequence[int] = (),
        num_keys: int = 0,
        *,
        client: PeerId = ALICE,
        max_tokens: int = 4 * PAGE_TOKENS,
    ) -> Session[Tensor]:
        keys = keys_of(prompt, num_keys)
        request = self.opening(number, client=client, max_tokens=max_tokens, keys=keys)
        return self.table.open(request, self.now)

    def fork(self, source: int, number: int, position: int) -> Session[Tensor]:
        held = self.table.get(session_id(source))
        assert held is not None
        request = self.opening(
            number, client=held.client, max_tokens=held.max_tokens, epoch=held.epoch
        )
        _, new = self.table.fork(request, held.id, position, self.now, others_wait=False)
        full, rest = divmod(position, PAGE_TOKENS)
        if rest:
            self.cache.copy(held.pages[full:], new.pages[full:], rest)
        return new

    def send(
        self, session: Session[Tensor], position: int, tokens: list[int], *, epoch: int = -1
    ) -> Row:
        """A row is taken in; it waits for `compute`."""
        epoch = session.epoch if epoch < 0 else epoch
        row = Row(session.id, epoch, session.next_step, position, len(tokens))
        assert isinstance(self.table.on_row(row, session.client, b"", self.now), Accepted)
        queued = _Queued(row, tokens, session.pages, session.table.copies(row.step))
        self.queues.setdefault(session.id, deque()).append(queued)
        return row

    def compute(self, session: Session[Tensor], *, is_failing: bool = False) -> Tensor | None:
        """The oldest row that waits of a session; returns its hidden states (T, D)."""
        queued = self.queues[session.id].popleft()
        for copy in queued.copies:
            self.cache.copy((copy.source,), (copy.target,), copy.num_tokens)
        row = queued.row
        rows = [CacheRow(queued.pages, row.position, row.num_tokens)]
        with torch.inference_mode():
            output = self.model.forward(self.embed(queued.tokens), rows, self.cache)
        if is_failing:
            self.fail(session, row)
            return None
        assert self.table.on_output(row, output, self.now) is not None
        return output

    def fail(self, session: Session[Tensor], row: Row) -> None:
        assert self.table.on_failed(row) is not None
        queue = self.queues[session.id]
        self.queues[session.id] = deque(q for q in queue if q.row.step < row.step)

    def run(self, session: Session[Tensor], position: int, tokens: list[int]) -> Tensor:
        """Take a row in and compute it."""
        self.send(session, position, tokens)
        output = self.compute(session)
        assert output is not None
        return output

    def expected(self, tokens: Sequence[int]) -> Tensor:
        """What the model gives for a sequence alone, (T, D)."""
        num_pages = -(-len(tokens) // PAGE_TOKENS)
        cache = self.model.make_cache(num_pages, PAGE_TOKENS)
        rows = [CacheRow(tuple(range(num_pages)), 0, len(tokens))]
        with torch.inference_mode():
            return self.model.forward(self.embed(tokens), rows, cache)

    def close(self, session: Session[Tensor]) -> None:
        self.table.close(session.id, session.client, session.epoch)
        self.queues.pop(session.id, None)

    def assert_counts_are_right(self) -> None:
        """Pages are free, cached, or held by as many sessions of one client as have them."""
        pool, holders = self.pool, dict[int, int]()
        held: dict[PeerId, set[int]] = {}
        for session in self.table:
            swaps = [swap for swaps in session.table._swaps.values() for swap in swaps]
            mine = [*session.pages, *(swap.old for swap in swaps)]
            assert len(set(mine)) == len(mine)
            held.setdefault(session.client, set()).update(mine)
            for page in mine:
                holders[page] = holders.get(page, 0) + 1
        assert dict(pool._holders) == holders
        assert {p: len(pages) for p, pages in held.items()} == dict(pool._held)
        assert sum(map(len, held.values())) == len(holders), "no page has two clients"
        free, cached = pool._free, set(pool._cached)
        assert not free & cached
        assert not (free | cached) & set(holders)
        assert free | cached | set(holders) == set(range(pool.num_pages))
        assert pool.num_free == pool.num_pages - len(holders)
        assert {page: name for name, page in pool._named.items()} == pool._names
        assert cached <= set(pool._names)
        assert not set(pool._names) & free
        assert set(pool._owners) == cached | set(holders)

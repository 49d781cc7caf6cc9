"""The K/V cache of a span: pages of keys and values, and attention over them.

A session's tokens lie in pages of `page_tokens` tokens, in the order of its page table, and the
same page numbers hold for every block of the span. Which pages a session owns is decided
elsewhere (`p2pllm.server.pages`); this is the only module that knows what is inside.

Storage of one block is `(2 · kv_heads, pages · page_tokens, d)`, all heads' keys before all heads'
values. With the heads outermost, a run of neighbouring pages *is* the (kv_heads, S, d) operand of
a matmul, as a view, and pages that lie apart become one with a single `index_select` (with the
page outermost it takes a second copy).

Grouped-query attention (arXiv 2305.13245) folds the query heads that share a key/value head into
the rows of one matrix. Tokens of a batch are attended in

- *buckets*: several rows of one token each, of similar length, padded to the longest and batched
  as two matmuls. For decode on CPU that takes a fifth of the time of
  `scaled_dot_product_attention` with `enable_gqa`;
- *chunks*: single rows of any number of tokens, which have enough work of their own.

It does not know about rotary positions, projections or sessions.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.config import ModelConfig

# Rows are batched while they have at least this share of the longest one's pages: then less than
# half of a batched matmul is padding, and lengths up to 8192 end in seven batches at most.
MIN_FILL = 0.5

# In bfloat16 a chunk is two matmuls if it has at least this many tokens, and scores up to this
# many elements: 2.5 times as fast as scaled_dot_product_attention at 256 × 1024. The latter
# is better for few tokens, in float32, and never holds all scores at once.
MIN_MATMUL_TOKENS = 16
MAX_SCORES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class CacheRow:
    """`num_tokens` new tokens of one sequence, the first of them at `position`.

    `pages` is the sequence's page table: it covers at least position + num_tokens tokens. What
    the cache holds from `position` on is overwritten, or no longer looked at.
    """

    pages: tuple[int, ...]
    position: int
    num_tokens: int


Rows = Sequence[CacheRow]


@dataclass(frozen=True, slots=True)
class Run:
    """Cached tokens of one row that lie in slots `[start, stop)` of the storage: read as a view."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Gather:
    """Cached tokens of B rows, n pages each, that must be copied together.

    `index` (2 · Hkv · B · n,) numbers the pages of all heads' keys, then all heads' values.
    """

    num_rows: int
    index: Tensor


@dataclass(frozen=True, slots=True)
class Bucket:
    """B ≥ 2 rows of one token each.

    `tokens` (B,) are their places in the packed batch, None if they are all of it. `bias`
    (Hkv · B, 1, S) is 0 where a row may look and -inf elsewhere.
    """

    tokens: Tensor | None
    keys: Gather
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row of T tokens, from `start` to `stop` in the packed batch.

    bias: (group · T, S), the same for all query heads of a group; None if all keys are seen.
    """

    start: int
    stop: int
    keys: Run | Gather
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How to attend one batch of rows: made once per pass, used by every block.

    positions (N,): of each packed token in its sequence; slots (N,): where its K/V goes.
    """

    positions: Tensor
    slots: Tensor
    buckets: tuple[Bucket, ...]
    chunks: tuple[Chunk, ...]


class KVCache:
    """Pages for all blocks of a span, allocated once.

    Memory is 2 · num_blocks · num_pages · page_tokens · kv_heads · d elements.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._kv_heads = config.num_kv_heads
        self._group = config.group_size
        self._window = config.sliding_window
        self._scale = 1.0 / math.sqrt(config.head_dim)
        shape = (num_blocks, 2 * config.num_kv_heads, num_pages * page_tokens, config.head_dim)
        self._storage = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory that the pages take."""
        return int(self._storage.nbytes)

    def copy(self, source: Sequence[int], target: Sequence[int], num_tokens: int) -> None:
        """Copy a sequence's first `num_tokens` tokens, in all blocks, to another page table."""
        num_pages = -(-num_tokens // self.page_tokens)
        if num_pages > min(len(source), len(target)):
            raise LocalProtocolError(f"{num_tokens} tokens do not fit the page tables of a copy")
        device, storage = self._storage.device, self._storage
        pages = storage.view(*storage.shape[:2], self.num_pages, -1)
        from_pages = torch.tensor(source[:num_pages], dtype=torch.int64, device=device)
        to_pages = torch.tensor(target[:num_pages], dtype=torch.int64, device=device)
        pages.index_copy_(2, to_pages, pages.index_select(2, from_pages))

    # --- moving to another server --------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self._storage.dtype

    @property
    def token_bytes(self) -> int:
        """Memory of one token in one block."""
        return int(math.prod(self.token_shape(1)) * self.dtype.itemsize)

    def token_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """Of some tokens' keys and values in one block: (2 · Hkv, T, d), all keys come first."""
        return self._storage.shape[1], num_tokens, self._storage.shape[3]

    def export_tokens(
        self, pages: Sequence[int], first_block: int, num_blocks: int, start: int, num_tokens: int
    ) -> Tensor:
        """Copy tokens `[start, start + num_tokens)` of a sequence out of some blocks.

        Returns (num_blocks, 2 · Hkv, T, d) as the cache holds them. `first_block` counts from the
        span's first.
        """
        slots = self._slots(CacheRow(tuple(pages), start, num_tokens))
        blocks = self._storage[first_block : first_block + num_blocks]
        return blocks.index_select(2, slots)

    def import_tokens(
        self, pages: Sequence[int], first_block: int, start: int, values: Tensor
    ) -> None:
        """Put tokens from `start` on, as `export_tokens` gives them, into some blocks.

        values: (num_blocks, 2 · Hkv, T, d).
        """
        row = CacheRow(tuple(pages), start, values.shape[2])
        slots = self._slots(row)
        blocks = self._storage[first_block : first_block + values.shape[0]]
        blocks.index_copy_(2, slots, values.to(blocks.device, blocks.dtype))
        self._clear_page_after(row)  # decoding goes on inside the page

    def _slots(self, row: CacheRow) -> Tensor:
        """Where a row's tokens lie: (T,)."""
        self._check(row)
        positions = range(row.position, row.position + row.num_tokens)
        slots = [self._slot(row, position) for position in positions]
        return torch.tensor(slots, dtype=torch.int64, device=self._storage.device)

    # --- attention: once per block ---------------------------------------------------------

    def attend(self, block: int, qkv: Tensor, plan: Plan) -> Tensor:
        """Store the keys and values of a batch in `block`, then attend to all that is cached.

        qkv: (N, Hq + 2 · Hkv, d): queries, keys (both already rotated), values.
        Returns (N, Hq · d).  `block` counts from the span's first.
        """
        num_tokens, _, width = qkv.shape
        num_queries = self._kv_heads * self._group
        storage = self._storage[block]
        storage.index_copy_(1, plan.slots, qkv[:, num_queries:].transpose(0, 1))
        queries = qkv[:, :num_queries]  # (N, Hq, d)
        if len(plan.buckets) == 1 and plan.buckets[0].tokens is None:
            return self._attend_bucket(storage, queries, plan.buckets[0])
        out = qkv.new_empty(num_tokens, num_queries * width)
        for bucket in plan.buckets:
            chosen = queries.index_select(0, bucket.tokens)
            out.index_copy_(0, bucket.tokens, self._attend_bucket(storage, chosen, bucket))
        for chunk in plan.chunks:
            rows = slice(chunk.start, chunk.stop)
            out[rows] = self._attend_chunk(storage, queries[rows], chunk)
        return out

    def _attend_bucket(self, storage: Tensor, queries: Tensor, bucket: Bucket) -> Tensor:
        """queries: (B, Hq, d).  Returns (B, Hq · d)."""
        num_rows, num_queries, width = queries.shape
        keys, values = self._read(storage, bucket.keys)  # (Hkv · B, S, d) each
        q = queries.view(num_rows, self._kv_heads, self._group, width).transpose(0, 1)
        q = q.reshape(-1, self._group, width)  # (Hkv · B, group, d)
        scores = torch.baddbmm(bucket.bias, q, keys.transpose(1, 2), alpha=self._scale)
        out = torch.bmm(scores.softmax(-1), values)  # (Hkv · B, group, d)
        out = out.reshape(self._kv_heads, num_rows, self._group * width)
        return out.transpose(0, 1).reshape(num_rows, num_queries * width)

    def _attend_chunk(self, storage: Tensor, queries: Tensor, chunk: Chunk) -> Tensor:
        """queries: (T, Hq, d).  Returns (T, Hq · d)."""
        num_tokens, num_queries, width = queries.shape
        keys, values = self._read(storage, chunk.keys)  # (Hkv, S, d) each
        q = queries.transpose(0, 1).reshape(self._kv_heads, self._group * num_tokens, width)
        is_small = num_queries * num_tokens * keys.shape[1] <= MAX_SCORES
        is_half = q.dtype is not torch.float32
        if is_half and is_small and num_tokens >= MIN_MATMUL_TOKENS:
            scores = torch.baddbmm(chunk.bias, q, keys.transpose(1, 2), alpha=self._scale)
            out = torch.bmm(scores.softmax(-1), values)
        else:
            out = F.scaled_dot_product_attention(
                q[None], keys[None], values[None], attn_mask=chunk.bias, scale=self._scale
            )
        out = out.reshape(num_queries, num_tokens, width)  # kernels differ in their layout
        return out.transpose(0, 1).reshape(num_tokens, num_queries * width)

    def _read(self, storage: Tensor, where: Run | Gather) -> tuple[Tensor, Tensor]:
        """Keys and values, (Hkv · B, S, d) each: views of the storage, or copies."""
        if isinstance(where, Run):
            cached = storage[:, where.start : where.stop]
            return cached[: self._kv_heads], cached[self._kv_heads :]
        # One index over heads and pages: twice as fast as selecting pages along dimension 1.
        pages = storage.view(-1, self.page_tokens * storage.shape[-1])
        cached = pages.index_select(0, where.index)
        half = self._kv_heads * where.num_rows
        cached = cached.view(2 * half, -1, storage.shape[-1])
        return cached[:half], cached[half:]

    # --- planning: once per pass -----------------------------------------------------------

    def plan(self, rows: Rows) -> Plan:
        """Work out where a batch's tokens go and what each may look at.

        Raises LocalProtocolError for a row that does not fit its page table.
        """
        device = self._storage.device
        positions: list[int] = []
        slots: list[int] = []
        singles: list[tuple[int, CacheRow]] = []
        chunks: list[Chunk] = []
        for row in rows:
            self._check(row)
            self._clear_rest(row)
            token = len(positions)
            if row.num_tokens == 1:
                singles.append((token, row))
            else:
                chunks.append(self._plan_chunk(token, row))
            new = range(row.position, row.position + row.num_tokens)
            positions += new
            slots += [self._slot(row, position) for position in new]
        buckets: list[Bucket] = []
        for group in self._similar(singles):
            if len(group) == 1:
                chunks.append(self._plan_chunk(*group[0]))
            else:
                buckets.append(self._plan_bucket(group, len(positions)))
        return Plan(
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            buckets=tuple(buckets),
            chunks=tuple(chunks),
        )

    def _check(self, row: CacheRow) -> None:
        stop = row.position + row.num_tokens
        if row.num_tokens < 1 or row.position < 0 or stop > len(row.pages) * self.page_tokens:
            raise LocalProtocolError(
                f"tokens {row.position}:{stop} in {len(row.pages)} pages of {self.page_tokens}"
            )

    def _slot(self, row: CacheRow, position: int) -> int:
        page, offset = divmod(position, self.page_tokens)
        return row.pages[page] * self.page_tokens + offset

    def _clear_rest(self, row: CacheRow) -> None:
        """Zero what follows the row's last token in its page, if the row begins that page.

        Padding is masked, but its values are still multiplied by 0, and what an earlier session
        left there may be NaN.
        """
        last = row.position + row.num_tokens - 1
        if row.position <= last - last % self.page_tokens:
            self._clear_page_after(row)

    def _clear_page_after(self, row: CacheRow) -> None:
        """Zero what follows the row's last token in its page."""
        last = row.position + row.num_tokens - 1
        rest = self.page_tokens - 1 - last % self.page_tokens
        if rest:
            slot = self._slot(row, last) + 1
            self._storage[:, :, slot : slot + rest] = 0

    def _first_seen(self, position: int) -> int:
        """The first position that the token at `position` looks at."""
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _first_page(self, row: CacheRow) -> int:
        return self._first_seen(row.position) // self.page_tokens

    def _pages_seen(self, row: CacheRow) -> tuple[int, ...]:
        """The part of a row's page table that its tokens look at."""
        stop = -(-(row.position + row.num_tokens) // self.page_tokens)
        return row.pages[self._first_page(row) : stop]

    def _similar(self, singles: list[tuple[int, CacheRow]]) -> list[list[tuple[int, CacheRow]]]:
        """Split rows into groups of similar length; each keeps the order of the batch."""
        groups: list[list[tuple[int, CacheRow]]] = []
        longest = 0
        for item in sorted(singles, key=lambda item: -len(self._pages_seen(item[1]))):
            num_pages = len(self._pages_seen(item[1]))
            if not groups or num_pages < MIN_FILL * longest:
                groups.append([])
                longest = num_pages
            groups[-1].append(item)
        return [sorted(group, key=lambda item: item[0]) for group in groups]

    def _plan_bucket(self, group: list[tuple[int, CacheRow]], num_tokens: int) -> Bucket:
        tokens, rows = None, [row for _, row in group]
        if len(group) < num_tokens:
            tokens = torch.tensor([token for token, _ in group], device=self._storage.device)
        seen = [self._pages_seen(row) for row in rows]
        bases = [self._first_page(row) * self.page_tokens for row in rows]
        last = torch.tensor([row.position - base for row, base in zip(rows, bases, strict=True)])
        first = torch.tensor(
            [self._first_seen(row.position) - base for row, base in zip(rows, bases, strict=True)]
        )
        bias = self._bias(first, last, max(map(len, seen)) * self.page_tokens)  # (B, S)
        return Bucket(tokens, self._gather(seen), bias.repeat(self._kv_heads, 1)[:, None])

    def _plan_chunk(self, token: int, row: CacheRow) -> Chunk:
        stop = row.position + row.num_tokens
        seen = self._pages_seen(row)
        keys: Run | Gather
        if _is_run(seen):
            base = self._first_seen(row.position)
            start = self._slot(row, base)
            num_keys = stop - base
            keys = Run(start, start + num_keys)
        else:
            base = self._first_page(row) * self.page_tokens
            num_keys = len(seen) * self.page_tokens
            keys = self._gather([seen])
        bias = None
        if row.num_tokens > 1 or isinstance(keys, Gather):
            last = torch.arange(row.position, stop)
            first = torch.tensor([self._first_seen(position) for position in last.tolist()])
            bias = self._bias(first - base, last - base, num_keys).repeat(self._group, 1)
        return Chunk(token, token + row.num_tokens, keys, bias)

    def _bias(self, first: Tensor, last: Tensor, num_keys: int) -> Tensor:
        """(B, S): 0 from first[b] to last[b], -inf elsewhere."""
        key = torch.arange(num_keys)
        unseen = (key < first[:, None]) | (key > last[:, None])
        bias = torch.zeros(unseen.shape, dtype=self._storage.dtype)
        return bias.masked_fill_(unseen, -math.inf).to(self._storage.device)

    def _gather(self, seen: list[tuple[int, ...]]) -> Gather:
        width = max(map(len, seen))
        # Padding repeats the row's own last page: it is masked, and nobody else's.
        table = [page for pages in seen for page in pages + pages[-1:] * (width - len(pages))]
        heads = torch.arange(2 * self._kv_heads)[:, None] * self.num_pages
        index = (heads + torch.tensor(table)).flatten()
        return Gather(len(seen), index.to(self._storage.device))


def _is_run(pages: tuple[int, ...]) -> bool:
    return all(after == before + 1 for before, after in itertools.pairwise(pages))

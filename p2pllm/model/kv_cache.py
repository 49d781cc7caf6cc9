"""The K/V cache of a span: pages of keys and values, and attention over them.

A session's tokens lie in pages of `page_tokens` tokens, in the order of its page table, and the
same page numbers hold for every block of the span. Which pages a session owns is decided
elsewhere (`p2pllm.server.pages`); this is the only module that knows what is inside.

Storage of one block is `(2 · kv_heads, pages · page_tokens, d)`, all heads' keys before all heads'
values, in the compute type or in 8 bits (`p2pllm.model.kv_store`). With the heads outermost, a run
of neighbouring pages *is* the (kv_heads, S, d) operand of a matmul, as a view, and pages that lie
apart become one with a single `index_select` (with the page outermost it takes a second copy).

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
from p2pllm.model.kv_store import Int8Store, KVStore, PlainStore, Room, clear, copy_pages
from p2pllm.model.staging import on_device

# Rows are batched while they have at least this share of the longest one's pages: then less than
# half of a batched matmul is padding, and lengths up to 8192 end in seven batches at most.
MIN_FILL = 0.5

# In bfloat16 a chunk is two matmuls if it has at least this many tokens, and scores up to this
# many elements: 2.5 times as fast as scaled_dot_product_attention at 256 × 1024. The latter
# is better for few tokens, in float32, and never holds all scores at once.
MIN_MATMUL_TOKENS = 16
MAX_SCORES = 4 * 2**20
# On CPU, and in bfloat16, no more tokens at once: 64 behind 1500 others take 1.2 ms in a block of
# the default model, 256 take 11 ms in one go (their scores fit into no cache) and 5 ms in four.
MAX_MATMUL_TOKENS = 64


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

    Memory is 2 · num_blocks · num_pages · page_tokens · kv_heads · d elements of `dtype`, or with
    `kv_bits` 8 of a byte each, and two more for d of them. With `has_scratch` there is one page
    more, numbered `num_pages`: nobody's, for rows that only fill up a batch.
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
        has_scratch: bool = False,
        kv_bits: int = 16,
    ) -> None:
        self.num_pages = num_pages
        self.has_scratch = has_scratch
        self.page_tokens = page_tokens
        self._kv_heads = config.num_kv_heads
        self._group = config.group_size
        self._window = config.sliding_window
        self._scale = 1.0 / math.sqrt(config.head_dim)
        self._pages_in_all = num_pages + has_scratch
        num_slots = self._pages_in_all * page_tokens
        room = Room(num_blocks, 2 * config.num_kv_heads, num_slots, config.head_dim, page_tokens)
        self.dtype = dtype  # what attention is computed in
        self.kv_bits = kv_bits
        self._device = torch.device(device)
        self._moved_heads = room.num_heads
        self._store: KVStore = (Int8Store if kv_bits == 8 else PlainStore)(room, dtype, device)

    @property
    def num_bytes(self) -> int:
        """Memory that the pages take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What the pages lie in, each (blocks, 2 · Hkv, slots, anything)."""
        return self._store.arrays

    def block(self, index: int) -> Tensor:
        """The storage of one block, counted from the span's first: (2 · Hkv, slots, d).

        In the compute type; there is none in 8 bits.
        """
        assert isinstance(self._store, PlainStore)
        return self._store.values[index]

    def copy(self, source: Sequence[int], target: Sequence[int], num_tokens: int) -> None:
        """Copy a sequence's first `num_tokens` tokens, in all blocks, to another page table."""
        num_pages = -(-num_tokens // self.page_tokens)
        if num_pages > min(len(source), len(target)):
            raise LocalProtocolError(f"{num_tokens} tokens do not fit the page tables of a copy")
        from_pages = self._on_device(torch.tensor(source[:num_pages], dtype=torch.int64))
        to_pages = self._on_device(torch.tensor(target[:num_pages], dtype=torch.int64))
        copy_pages(self._store, from_pages, to_pages, self.page_tokens)

    # --- moving to another server --------------------------------------------------------

    @property
    def moved_dtype(self) -> torch.dtype:
        """Of the keys and values as they are held, and moved."""
        return self._store.moved_dtype

    @property
    def token_bytes(self) -> int:
        """Memory of one token in one block."""
        return int(math.prod(self.token_shape(1)) * self.moved_dtype.itemsize)

    def token_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """Of some tokens' keys and values in one block: (2 · Hkv, T, width), all keys come first.

        The width is d, and in 8 bits the bytes of codes and scale.
        """
        return self._moved_heads, num_tokens, self._store.moved_width

    def is_finite(self, values: Tensor) -> bool:
        """Is there neither NaN nor infinity in what `export_tokens` gave?"""
        return self._store.is_finite(values)

    def export_tokens(
        self, pages: Sequence[int], first_block: int, num_blocks: int, start: int, num_tokens: int
    ) -> Tensor:
        """Copy tokens `[start, start + num_tokens)` of a sequence out of some blocks.

        Returns (num_blocks, 2 · Hkv, T, width) as the cache holds them. `first_block` counts from
        the span's first.
        """
        slots = self._slots(CacheRow(tuple(pages), start, num_tokens))
        return self._store.export(first_block, num_blocks, slots)

    def import_tokens(
        self, pages: Sequence[int], first_block: int, start: int, values: Tensor
    ) -> None:
        """Put tokens from `start` on, as `export_tokens` gives them, into some blocks.

        values: (num_blocks, 2 · Hkv, T, width).
        """
        row = CacheRow(tuple(pages), start, values.shape[2])
        self._store.put(first_block, self._slots(row), values)
        self._clear_page_after(row)  # decoding goes on inside the page

    def _slots(self, row: CacheRow) -> Tensor:
        """Where a row's tokens lie: (T,)."""
        self._check(row)
        positions = range(row.position, row.position + row.num_tokens)
        slots = [self._slot(row, position) for position in positions]
        return self._on_device(torch.tensor(slots, dtype=torch.int64))

    def _on_device(self, planned: Tensor) -> Tensor:
        """A tensor that was made on the CPU, where the cache is. Nothing waits for the copy."""
        return on_device(planned, self._device)

    # --- attention: once per block ---------------------------------------------------------

    def attend(self, block: int, qkv: Tensor, plan: Plan) -> Tensor:
        """Store the keys and values of a batch in `block`, then attend to all that is cached.

        qkv: (N, Hq + 2 · Hkv, d): queries, keys (both already rotated), values.
        Returns (N, Hq · d).  `block` counts from the span's first.
        """
        num_tokens, _, width = qkv.shape
        num_queries = self._kv_heads * self._group
        self._store.write(block, plan.slots, qkv[:, num_queries:])
        queries = qkv[:, :num_queries]  # (N, Hq, d)
        if len(plan.buckets) == 1 and plan.buckets[0].tokens is None:
            return self._attend_bucket(block, queries, plan.buckets[0])
        out = qkv.new_empty(num_tokens, num_queries * width)
        for bucket in plan.buckets:
            chosen = queries.index_select(0, bucket.tokens)
            out.index_copy_(0, bucket.tokens, self._attend_bucket(block, chosen, bucket))
        for chunk in plan.chunks:
            rows = slice(chunk.start, chunk.stop)
            out[rows] = self._attend_chunk(block, queries[rows], chunk)
        return out

    def _attend_bucket(self, block: int, queries: Tensor, bucket: Bucket) -> Tensor:
        """queries: (B, Hq, d).  Returns (B, Hq · d)."""
        num_rows, num_queries, width = queries.shape
        keys, values = self._read(block, bucket.keys)  # (Hkv · B, S, d) each
        q = queries.view(num_rows, self._kv_heads, self._group, width).transpose(0, 1)
        q = q.reshape(-1, self._group, width)  # (Hkv · B, group, d)
        scores = torch.baddbmm(bucket.bias, q, keys.transpose(1, 2), alpha=self._scale)
        out = torch.bmm(scores.softmax(-1), values)  # (Hkv · B, group, d)
        out = out.reshape(self._kv_heads, num_rows, self._group * width)
        return out.transpose(0, 1).reshape(num_rows, num_queries * width)

    def _attend_chunk(self, block: int, queries: Tensor, chunk: Chunk) -> Tensor:
        """queries: (T, Hq, d).  Returns (T, Hq · d)."""
        num_tokens, num_queries, width = queries.shape
        keys, values = self._read(block, chunk.keys)  # (Hkv, S, d) each
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

    def _read(self, block: int, where: Run | Gather) -> tuple[Tensor, Tensor]:
        """Keys and values, (Hkv · B, S, d) each: views of the storage, or copies."""
        if isinstance(where, Run):
            cached = self._store.read_run(block, where.start, where.stop)
            return cached[: self._kv_heads], cached[self._kv_heads :]
        cached = self._store.read_pages(block, where.index)
        half = self._kv_heads * where.num_rows
        cached = cached.view(2 * half, -1, cached.shape[-1])
        return cached[:half], cached[half:]

    # --- planning: once per pass -----------------------------------------------------------

    def plan(self, rows: Rows) -> Plan:
        """Work out where a batch's tokens go and what each may look at.

        Raises LocalProtocolError for a row that does not fit its page table.
        """
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
                chunks += [self._plan_chunk(token + at, part) for at, part in self._parts(row)]
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
            positions=self._on_device(torch.tensor(positions, dtype=torch.int64)),
            slots=self._on_device(torch.tensor(slots, dtype=torch.int64)),
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
            clear(self._store, slot, slot + rest)

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
            tokens = self._on_device(torch.tensor([token for token, _ in group]))
        seen = [self._pages_seen(row) for row in rows]
        bases = [self._first_page(row) * self.page_tokens for row in rows]
        last = torch.tensor([row.position - base for row, base in zip(rows, bases, strict=True)])
        first = torch.tensor(
            [self._first_seen(row.position) - base for row, base in zip(rows, bases, strict=True)]
        )
        bias = self._bias(first, last, max(map(len, seen)) * self.page_tokens)  # (B, S)
        return Bucket(tokens, self._gather(seen), bias.repeat(self._kv_heads, 1)[:, None])

    def _parts(self, row: CacheRow) -> list[tuple[int, CacheRow]]:
        """A row in parts that are attended one by one, and where in the row each begins."""
        size = row.num_tokens
        if self._device.type == "cpu" and self.dtype is not torch.float32:
            size = MAX_MATMUL_TOKENS
        return [
            (at, CacheRow(row.pages, row.position + at, min(size, row.num_tokens - at)))
            for at in range(0, row.num_tokens, size)
        ]

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
        bias = torch.zeros(unseen.shape, dtype=self.dtype)
        return self._on_device(bias.masked_fill_(unseen, -math.inf))

    def _gather(self, seen: list[tuple[int, ...]]) -> Gather:
        width = max(map(len, seen))
        # Padding repeats the row's own last page: it is masked, and nobody else's.
        table = [page for pages in seen for page in pages + pages[-1:] * (width - len(pages))]
        heads = torch.arange(2 * self._kv_heads)[:, None] * self._pages_in_all
        index = (heads + torch.tensor(table)).flatten()
        return Gather(len(seen), self._on_device(index))


def _is_run(pages: tuple[int, ...]) -> bool:
    return all(after == before + 1 for before, after in itertools.pairwise(pages))

"""Decode attention over pages, for any lengths in one launch: what a decode pass on a GPU computes.

On the CPU `p2pllm.model.kv_cache` plans each batch anew and does as many products as that takes.
A GPU spends longer on starting kernels than on a decode step's work, unless all launches are
recorded once as a graph and replayed; and in a graph only the *contents* of arrays may differ. So
a batch is described by one array of small integers, its **plan**:

    plan[b] = position, slot, rest, page 0, page 1, …                   (B, 3 + W) int32

for the token at `position` of some sequence. Its key and value go to `slot` of the storage; it
looks at positions 0 … position (the last `window` of them, if there is one), which lie in the
pages that follow. `rest` slots behind it are cleared: a page that begins is clean, as
`KVCache` promises those who read it as a whole.

Several tokens of one sequence may stand in one batch, as rows of their own: all are stored before
any is attended. A batch smaller than its graph is filled up with rows that write to the scratch
page behind the last one, and look at nothing else.

The functions named `…_reference` say what is computed; where Triton is installed, the
kernels of `p2pllm.model.decode_triton` take their place on a GPU.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.kernels import decode_kernels
from p2pllm.model.kv_cache import CacheRow

HEADER = 3  # integers of a row before its pages: position, slot, rest


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where a cache's pages lie: `num_pages` of `page_tokens` slots, then one that is scratch."""

    num_pages: int
    page_tokens: int

    def fill(self, plan: NDArray[np.int32], rows: Sequence[CacheRow]) -> int:
        """Write the rows' tokens into a plan (B, 3 + W), in order, and fillers after them.

        Returns how many tokens there are. Raises LocalProtocolError for a row that does not fit
        its pages, or more pages or tokens than the plan has room for.
        """
        headers: list[tuple[int, int, int]] = []
        page_tokens, (num_tokens, width) = self.page_tokens, plan.shape
        for row in rows:
            start, stop = row.position, row.position + row.num_tokens
            if start < 0 or stop <= start or stop > len(row.pages) * page_tokens:
                raise LocalProtocolError(
                    f"tokens {start}:{stop} in {len(row.pages)} pages of {page_tokens}"
                )
            first, used = len(headers), -(-stop // page_tokens)
            if first + row.num_tokens > num_tokens or HEADER + used > width:
                raise LocalProtocolError(f"a row of {stop} tokens does not fit the plan")
            for position in range(start, stop):
                page, offset = divmod(position, page_tokens)
                # As KVCache does it: whoever begins a page clears what is left of it.
                clears = position == stop - 1 and start <= position - offset
                rest = page_tokens - 1 - offset if clears else 0
                headers.append((position, row.pages[page] * page_tokens + offset, rest))
            plan[first : len(headers), HEADER : HEADER + used] = _as_array(row.pages)[:used]
        if headers:
            plan[: len(headers), :HEADER] = headers
        self._fill_up(plan[len(headers) :])
        return len(headers)

    def _fill_up(self, plan: NDArray[np.int32]) -> None:
        scratch = self.num_pages * self.page_tokens
        plan[:, 0] = 0
        plan[:, 1] = scratch + np.arange(len(plan)) % self.page_tokens
        plan[:, 2] = 0
        plan[:, HEADER] = self.num_pages


@functools.lru_cache(maxsize=1024)
def _as_array(pages: tuple[int, ...]) -> NDArray[np.int32]:
    """A page table as an array. A session's is the same at every step."""
    return np.array(pages, dtype=np.int32)


# --- what is computed ----------------------------------------------------------------------------


def rotate_and_store_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, plan: Tensor, storage: Tensor, num_queries: int
) -> None:
    """Rotate queries in place, and put rotated keys, and values, into the cache.

    qkv: (B, Hq + 2 · Hkv, d); cos, sin: (B, d / 2) float32; storage: (2 · Hkv, S, d) of one block.
    """
    half = qkv.shape[2] // 2
    kv_heads = storage.shape[0] // 2
    rotated = qkv[:, : num_queries + kv_heads]
    first, second = rotated[..., :half].float(), rotated[..., half:].float()
    c, s = cos[:, None], sin[:, None]
    turned = torch.cat((first * c - second * s, second * c + first * s), -1)
    qkv[:, : num_queries + kv_heads] = turned.to(qkv.dtype)
    slots = plan[:, 1].long()
    storage[:, slots] = qkv[:, num_queries:].transpose(0, 1)
    for slot, rest in plan[:, 1:HEADER].tolist():
        storage[:, slot + 1 : slot + 1 + rest] = 0


def attend_reference(
    qkv: Tensor,
    plan: Tensor,
    storage: Tensor,
    num_queries: int,
    *,
    page_tokens: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of each row's token to what is cached before it, itself included.

    qkv: (B, Hq + 2 · Hkv, d), of which the queries are read.  Returns (B, Hq · d).
    """
    outputs = []
    for row, queries in zip(plan.tolist(), qkv[:, :num_queries].float(), strict=True):
        last = row[0]
        first = 0 if window is None else max(0, last - window + 1)
        key = range(first, last + 1)
        slots = [row[HEADER + p // page_tokens] * page_tokens + p % page_tokens for p in key]
        keys, values = storage[:, slots].float().chunk(2)  # (Hkv, S, d) each
        q = queries.view(keys.shape[0], -1, keys.shape[2])  # (Hkv, group, d)
        weights = (q @ keys.transpose(1, 2) * scale).softmax(-1)
        outputs.append((weights @ values).flatten())
    return torch.stack(outputs).to(qkv.dtype)


# --- how ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Attention of one model over one cache: sizes that no batch changes."""

    num_queries: int
    head_dim: int
    page_tokens: int
    window: int | None

    def attend(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, plan: Tensor, storage: Tensor
    ) -> Tensor:
        """Rotate, store, attend: the two references above. `qkv` is changed.

        Returns (B, Hq · d).
        """
        found = decode_kernels(qkv)
        store = rotate_and_store_reference if found is None else found.rotate_and_store
        attend = attend_reference if found is None else found.attend
        store(qkv, cos, sin, plan, storage, self.num_queries)
        out: Tensor = attend(
            qkv,
            plan,
            storage,
            self.num_queries,
            page_tokens=self.page_tokens,
            scale=1.0 / math.sqrt(self.head_dim),
            window=self.window,
        )
        return out

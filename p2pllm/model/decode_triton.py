"""Kernels of a decode pass on a GPU, in Triton. Imported only where Triton is installed.

What they compute, and over which arrays, is written out in plain torch in
`p2pllm.model.paged_attention`; a decode pass calls through there.

Attention is flash-decoding (https://pytorch.org/blog/flash-decoding): a program takes one row, one
key/value head with its group of queries, and a part of the keys, and goes over them once with a
running maximum (arXiv 2205.14135); a second kernel joins the parts. Programs are enough to fill
the device even for one row, and each cached key is read once for its whole group.

Lengths and page tables are read from device memory, so that one captured launch serves all of
them: grids depend on the number of rows only. Sizes that are not powers of two (heads of 80 or 96)
are padded and masked.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_DOT = 16  # the smallest edge of a matrix product in Triton
KEY_TILE = 64  # keys that a program takes at once: one page of a server's cache
# Parts that a row's keys are divided into, at most: 32 × 8 heads are two programs for each of an
# H100's 132 processors. At least 2, which measured best for many rows (32 rows of 513 keys: 32 µs,
# with 4 parts 37).
MIN_PARTS, MAX_PARTS = 2, 32
PROGRAMS = 528  # four per processor
ATTEND_WARPS, ATTEND_STAGES = 4, 2
HEAD_TILE = 8  # heads that one program rotates


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    plan,
    storage,
    plan_stride,
    head_stride,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
) -> None:
    """One program per row and some heads: see `paged_attention.rotate_and_store_reference`."""
    row = tl.program_id(0)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
    i = tl.arange(0, TILE)[None, :]
    is_query = (i < HALF) & (head < QUERIES)
    is_cached = (i < HALF) & (head >= QUERIES) & (head < HEADS)
    is_any = is_query | is_cached
    source = qkv + (row * HEADS + head) * WIDTH + i
    first = tl.load(source, mask=is_any, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=is_any, other=0.0).to(tl.float32)
    c = tl.load(cos + row * HALF + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + row * HALF + i, mask=i < HALF, other=0.0)
    is_value = head >= QUERIES + KV_HEADS
    c, s = tl.where(is_value, 1.0, c), tl.where(is_value, 0.0, s)
    first, second = first * c - second * s, second * c + first * s
    tl.store(source, first.to(qkv.dtype.element_ty), mask=is_query)
    tl.store(source + HALF, second.to(qkv.dtype.element_ty), mask=is_query)
    slot = tl.load(plan + row * plan_stride + 1).to(tl.int64)
    rest = tl.load(plan + row * plan_stride + 2)
    target = storage + (head - QUERIES) * head_stride + slot * WIDTH + i
    tl.store(target, first.to(storage.dtype.element_ty), mask=is_cached)
    tl.store(target + HALF, second.to(storage.dtype.element_ty), mask=is_cached)
    nothing = tl.zeros([HEAD_TILE, TILE], dtype=storage.dtype.element_ty)
    for after in range(1, rest + 1):
        tl.store(target + after * WIDTH, nothing, mask=is_cached)
        tl.store(target + after * WIDTH + HALF, nothing, mask=is_cached)


@triton.jit
def _attend_part(
    qkv,
    storage,
    plan,
    out,
    weights,
    plan_stride,
    head_stride,
    value_offset,
    scale,
    window,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One program per row, key/value head and part of the keys.

    out: (B, Hq, PARTS, d) float32, normalised; weights: (B, Hq, PARTS), the logarithm (base 2) of
    each part's sum, -inf for a part without keys, whose `out` is not written.
    """
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(plan + row * plan_stride) + 1
    start = tl.maximum(length - window, 0) // KEYS * KEYS
    tiles = tl.cdiv(tl.cdiv(length - start, KEYS), PARTS)
    begin = start + part * tiles * KEYS
    end = tl.minimum(begin + tiles * KEYS, length)

    g, i, k = tl.arange(0, GROUP_TILE), tl.arange(0, WIDTH_TILE), tl.arange(0, KEYS)
    query_heads = kv_head * GROUP + g
    is_head, is_wide = g < GROUP, i < WIDTH
    places = (row * QUERIES + query_heads) * PARTS + part
    if begin >= end:
        tl.store(weights + places, tl.full([GROUP_TILE], float("-inf"), tl.float32), mask=is_head)
        return
    q = tl.load(
        qkv + (row * HEADS + query_heads)[:, None] * WIDTH + i[None, :],
        mask=is_head[:, None] & is_wide[None, :],
        other=0.0,
    )
    highest = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_TILE], dtype=tl.float32)
    acc = tl.zeros([GROUP_TILE, WIDTH_TILE], dtype=tl.float32)
    head = storage + kv_head * head_stride
    for tile in range(begin, end, KEYS):
        key = tile + k
        is_seen = (key < length) & (key >= length - window)
        page = tl.load(plan + row * plan_stride + 3 + key // PAGE, mask=key < length, other=0)
        slots = page.to(tl.int64) * PAGE + key % PAGE
        where = head + slots[:, None] * WIDTH + i[None, :]
        mask = is_seen[:, None] & is_wide[None, :]
        keys = tl.load(where, mask=mask, other=0.0)
        values = tl.load(where + value_offset, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.where(highest == float("-inf"), 0.0, tl.exp2(highest - now))
        # A tile wholly outside the window has no maximum yet.
        p = tl.where(now[:, None] == float("-inf"), 0.0, tl.exp2(scores - now[:, None]))
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
        highest = now
    tl.store(
        out + places[:, None] * WIDTH + i[None, :],
        acc / total[:, None],
        mask=is_head[:, None] & is_wide[None, :],
    )
    tl.store(weights + places, highest + tl.log2(total), mask=is_head)


@triton.jit
def _join_parts(
    parts,
    weights,
    out,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
) -> None:
    """One program per row and query head: the parts, weighted by their sums. out: (B, Hq · d)."""
    head = tl.program_id(0)
    p, i = tl.arange(0, PARTS_TILE), tl.arange(0, WIDTH_TILE)
    weight = tl.load(weights + head * PARTS + p, mask=p < PARTS, other=float("-inf"))
    is_there = weight > float("-inf")
    weight = tl.exp2(weight - tl.max(weight, 0))
    part = tl.load(
        parts + (head * PARTS + p)[:, None] * WIDTH + i[None, :],
        mask=is_there[:, None] & (i < WIDTH)[None, :],
        other=0.0,
    )
    joined = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + head * WIDTH + i, joined.to(out.dtype.element_ty), mask=i < WIDTH)


@triton.jit
def _add_norm(
    hidden, delta, gain, out, eps, WIDTH: tl.constexpr, TILE: tl.constexpr, ADDS: tl.constexpr
) -> None:
    """One program per row: hidden += delta, out = its root-mean-square norm."""
    row = tl.program_id(0)
    i = tl.arange(0, TILE)
    inside = i < WIDTH
    x = tl.load(hidden + row * WIDTH + i, mask=inside, other=0.0)
    if ADDS:
        x += tl.load(delta + row * WIDTH + i, mask=inside, other=0.0)
        tl.store(hidden + row * WIDTH + i, x, mask=inside)
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    x = x * tl.load(gain + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_silu(gate_up, out, WIDTH: tl.constexpr, TILE: tl.constexpr) -> None:
    """One program per row and tile: silu(gate) · up."""
    row = tl.program_id(0)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < WIDTH
    source = gate_up + row * 2 * WIDTH + i
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + i, result.to(out.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, plan: Tensor, storage: Tensor, num_queries: int
) -> None:
    """See `paged_attention.rotate_and_store_reference`."""
    num_rows, num_heads, width = qkv.shape
    kernel: Any = _rotate_and_store
    kernel[(num_rows, triton.cdiv(num_heads, HEAD_TILE))](
        qkv,
        cos,
        sin,
        plan,
        storage,
        plan.stride(0),
        storage.stride(0),
        HEADS=num_heads,
        QUERIES=num_queries,
        KV_HEADS=storage.shape[0] // 2,
        WIDTH=width,
        HALF=width // 2,
        TILE=triton.next_power_of_2(width // 2),
        HEAD_TILE=HEAD_TILE,
        num_warps=2,
    )


def attend(
    qkv: Tensor,
    plan: Tensor,
    storage: Tensor,
    num_queries: int,
    *,
    page_tokens: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `paged_attention.attend_reference`."""
    num_rows, num_heads, width = qkv.shape
    kv_heads = storage.shape[0] // 2
    group = num_queries // kv_heads
    num_parts = parts_for(num_rows * kv_heads)
    parts = qkv.new_empty((num_rows, num_queries, num_parts, width), dtype=torch.float32)
    weights = qkv.new_empty((num_rows, num_queries, num_parts), dtype=torch.float32)
    width_tile = max(MIN_DOT, triton.next_power_of_2(width))
    kernel: Any = _attend_part
    kernel[(num_rows, kv_heads, num_parts)](
        qkv,
        storage,
        plan,
        parts,
        weights,
        plan.stride(0),
        storage.stride(0),
        kv_heads * storage.stride(0),
        scale * 1.4426950408889634,  # log2(e): exponentials are to base 2
        2**30 if window is None else window,
        HEADS=num_heads,
        QUERIES=num_queries,
        GROUP=group,
        WIDTH=width,
        PAGE=page_tokens,
        PARTS=num_parts,
        GROUP_TILE=max(MIN_DOT, triton.next_power_of_2(group)),
        WIDTH_TILE=width_tile,
        KEYS=KEY_TILE,
        PRECISION="ieee" if qkv.dtype is torch.float32 else "tf32",
        num_warps=ATTEND_WARPS,
        num_stages=ATTEND_STAGES,
    )
    out = qkv.new_empty((num_rows, num_queries * width))
    join: Any = _join_parts
    join[(num_rows * num_queries,)](
        parts,
        weights,
        out,
        WIDTH=width,
        PARTS=num_parts,
        PARTS_TILE=triton.next_power_of_2(num_parts),
        WIDTH_TILE=width_tile,
        num_warps=2,
    )
    return out


def parts_for(num_programs: int) -> int:
    """Into how many parts the keys of a row are divided, for so many rows × key/value heads."""
    return min(MAX_PARTS, max(MIN_PARTS, PROGRAMS // num_programs))


def add_norm(hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> Tensor:
    """hidden (N, D) += delta, if there is one; returns its root-mean-square norm."""
    num_rows, width = hidden.shape
    out = torch.empty_like(hidden)
    tile = triton.next_power_of_2(width)
    kernel: Any = _add_norm
    kernel[(num_rows,)](
        hidden,
        hidden if delta is None else delta,
        gain,
        out,
        eps,
        WIDTH=width,
        TILE=tile,
        ADDS=delta is not None,
        num_warps=min(16, max(1, tile // 512)),
    )
    return out


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up; gate_up: (N, 2 · I).  Returns (N, I)."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, width))
    tile = min(1024, triton.next_power_of_2(width))
    kernel: Any = _gated_silu
    kernel[(num_rows, triton.cdiv(width, tile))](gate_up, out, WIDTH=width, TILE=tile, num_warps=4)
    return out

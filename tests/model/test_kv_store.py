"""Keys and values in 8 bits, against a plain cache that is given what 8 bits leave of them."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pllm.model.config import ModelConfig
from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.kv_store import quantized, token_bytes
from p2pllm.model.split_span import SplitCache

PAGE, NUM_PAGES = 4, 40
HEADS, KV_HEADS, WIDTH = 6, 2, 8
CONFIG = ModelConfig(
    model_type="mistral",
    hidden_size=HEADS * WIDTH,
    num_blocks=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=WIDTH,
    intermediate_size=8,
    vocab_size=8,
    max_position=64,
    norm_eps=1e-5,
)


def make_cache(
    kv_bits: int,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    num_blocks: int = 2,
) -> KVCache:
    return KVCache(
        dataclasses.replace(CONFIG, sliding_window=window),
        num_blocks=num_blocks,
        num_pages=NUM_PAGES,
        page_tokens=PAGE,
        dtype=dtype,
        kv_bits=kv_bits,
    )


def leave_nan(cache: KVCache) -> None:
    """As an earlier session's keys could."""
    for tensor in cache.tensors:
        tensor.fill_(math.nan if tensor.is_floating_point() else 77)


def new_tokens(count: int) -> Tensor:
    """(N, HEADS + 2 · KV_HEADS, WIDTH), with the outliers in one channel that keys have."""
    qkv = torch.randn(count, HEADS + 2 * KV_HEADS, WIDTH)
    qkv[:, HEADS : HEADS + KV_HEADS, 3] *= 10
    return qkv


def rounded(qkv: Tensor) -> Tensor:
    """The same with keys and values as 8 bits hold them."""
    codes, scales = quantized(qkv[:, HEADS:])
    return torch.cat((qkv[:, :HEADS], codes.to(qkv.dtype) * scales.to(qkv.dtype)), 1)


def fill(cache: KVCache, pages: tuple[int, ...], count: int, block: int = 0) -> None:
    cache.attend(block, new_tokens(count), cache.plan([CacheRow(pages, 0, count)]))


# --- what is held --------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(1e-20, 1e30))
def test_a_value_is_off_by_half_a_code_at_most(seed: int, size: float) -> None:
    values = size * torch.randn(9, 4, 16, generator=torch.Generator().manual_seed(seed))

    codes, scales = quantized(values)

    assert codes.abs().max() <= 127
    off = (codes * scales.float() - values).abs()
    assert (off <= 0.501 * scales.float()).all()


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    values = torch.zeros(4, 1, 8)
    values[1, 0, 2], values[2, 0, 2], values[3, 0, 2] = math.nan, math.inf, 3e38

    codes, scales = quantized(values)

    held = codes * scales.float()
    assert not held[0].any()
    assert not held[1].isfinite().any()
    assert not held[2].isfinite().all()
    assert held[3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_byte_for_each_value_and_two_for_each_head_are_held(dtype: torch.dtype) -> None:
    cache = make_cache(8, dtype=dtype)
    assert cache.token_bytes == token_bytes(CONFIG, dtype, 8) == 2 * KV_HEADS * (WIDTH + 2)
    assert cache.num_bytes == 2 * NUM_PAGES * PAGE * cache.token_bytes
    plain = make_cache(16, dtype=dtype)
    assert plain.token_bytes == token_bytes(CONFIG, dtype, 16)


# --- what is read --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 3, 7]))
def test_any_mix_of_rows_sees_what_a_plain_cache_of_the_rounded_values_shows(
    seed: int, window: int | None
) -> None:
    """Prompts beside decode steps, rollbacks, pages of any order that held NaN before."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pages = list(range(NUM_PAGES))
    if rng.random() < 0.7:
        rng.shuffle(pages)
    tables = [tuple(pages[i * 8 : (i + 1) * 8]) for i in range(5)]
    lengths = [0] * len(tables)
    plain, cache = make_cache(16, window), make_cache(8, window)
    leave_nan(cache)
    for _ in range(5):
        rows = []
        for number in rng.sample(range(len(tables)), rng.randint(1, 5)):
            position = rng.choice([lengths[number]] * 3 + [rng.randint(0, lengths[number])])
            count = min(8 * PAGE - position, rng.choice([1, 1, 2, 9]))
            if count:
                rows.append(CacheRow(tables[number], position, count))
                lengths[number] = position + count
        if not rows:
            continue
        qkv = new_tokens(sum(row.num_tokens for row in rows))
        out = cache.attend(1, qkv.clone(), cache.plan(rows))
        expected = plain.attend(1, rounded(qkv), plain.plan(rows))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_near_that_over_exact_keys_and_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact, cache = make_cache(16), make_cache(8, dtype=dtype)
    qkv = new_tokens(30)
    qkv[:, :HEADS] *= 0.1  # so that not one key takes it all
    rows = [CacheRow(tuple(range(8)), 0, 30)]

    out = cache.attend(0, qkv.to(dtype), cache.plan(rows))

    assert out.dtype is dtype
    expected = exact.attend(0, qkv, exact.plan(rows))
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_what_is_held_of_a_token_does_not_depend_on_who_shares_its_batch() -> None:
    alone, together = make_cache(8), make_cache(8)
    qkv = new_tokens(6)
    alone.attend(0, qkv[:5].clone(), alone.plan([CacheRow((3, 9), 0, 5)]))
    both = [CacheRow((3, 9), 0, 5), CacheRow((7,), 0, 1)]
    together.attend(0, qkv.clone(), together.plan(both))
    assert torch.equal(
        alone.export_tokens((3, 9), 0, 1, 0, 5), together.export_tokens((3, 9), 0, 1, 0, 5)
    )


def test_a_copied_sequence_goes_on_by_itself() -> None:
    cache = make_cache(8)
    fill(cache, (7, 2, 9), 6)
    cache.copy((7, 2, 9), (1, 30), 6)
    assert torch.equal(
        cache.export_tokens((7, 2), 0, 2, 0, 6), cache.export_tokens((1, 30), 0, 2, 0, 6)
    )
    qkv = new_tokens(2)
    qkv[1, :HEADS] = qkv[0, :HEADS]
    out = cache.attend(0, qkv, cache.plan([CacheRow((7, 2, 9), 6, 1), CacheRow((1, 30), 6, 1)]))
    assert not torch.equal(out[0], out[1])
    before = cache.export_tokens((7, 2), 0, 2, 0, 6)
    assert torch.equal(before, cache.export_tokens((1, 30), 0, 2, 0, 6))


# --- what is moved -------------------------------------------------------------------------------


def test_codes_and_scales_are_moved_bit_for_bit() -> None:
    """Part by part, into pages of any order, in which an earlier session has left NaN."""
    first, second = make_cache(8), make_cache(8)
    leave_nan(second)
    for block in range(2):
        fill(first, (7, 2, 9), 7, block)
    for start, count in ((0, 3), (3, 4)):
        values = first.export_tokens((7, 2, 9), 0, 2, start, count)
        assert values.dtype is first.moved_dtype is torch.int8
        assert values.shape == (2, *first.token_shape(count))
        assert values.nbytes == 2 * count * first.token_bytes
        second.import_tokens((30, 1, 20), 0, start, values)
    assert torch.equal(
        first.export_tokens((7, 2), 0, 2, 0, 7), second.export_tokens((30, 1), 0, 2, 0, 7)
    )
    rows = [[CacheRow(pages, 7, 1)] for pages in ((7, 2, 9), (30, 1, 20))]
    qkv = new_tokens(1)
    torch.testing.assert_close(
        second.attend(1, qkv.clone(), second.plan(rows[1])),
        first.attend(1, qkv.clone(), first.plan(rows[0])),
    )


def test_parts_on_several_devices_move_as_one() -> None:
    whole = make_cache(8, num_blocks=3)
    parts = SplitCache(
        CONFIG, [make_cache(8, num_blocks=1), make_cache(8, num_blocks=2)], sizes=(1, 2)
    )
    for block in range(3):
        fill(whole, (5, 3), 6, block)
    values = whole.export_tokens((5, 3), 0, 3, 0, 6)

    parts.import_tokens((0, 8), 0, 0, values)

    assert torch.equal(parts.export_tokens((0, 8), 0, 3, 0, 6), values)
    assert parts.is_finite(values)
    assert (parts.token_bytes, parts.num_bytes) == (whole.token_bytes, whole.num_bytes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_is_seen(bad: float) -> None:
    cache = make_cache(8)
    fill(cache, (4, 5), 6)
    values = cache.export_tokens((4, 5), 0, 2, 0, 6)
    assert cache.is_finite(values)
    scale = torch.tensor([bad], dtype=torch.bfloat16).view(torch.int8)
    values[0, 1, 2, WIDTH:] = scale
    assert not cache.is_finite(values)

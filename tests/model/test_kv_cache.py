"""The cache by itself, against attention written out plainly over whole sequences."""

import dataclasses
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.config import ModelConfig
from p2pllm.model.kv_cache import CacheRow, KVCache

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


def make_cache(window: int | None = None, dtype: torch.dtype = torch.float32) -> KVCache:
    config = dataclasses.replace(CONFIG, sliding_window=window)
    return KVCache(config, num_blocks=2, num_pages=NUM_PAGES, page_tokens=PAGE, dtype=dtype)


@dataclass
class Sequence:
    """What a session has put into the cache: (tokens, HEADS + 2 · KV_HEADS, WIDTH)."""

    pages: tuple[int, ...]
    qkv: Tensor = field(default_factory=lambda: torch.zeros(0, HEADS + 2 * KV_HEADS, WIDTH))

    def expected(self, start: int, window: int | None) -> Tensor:
        """Outputs of the tokens from `start` on: (T, HEADS · WIDTH)."""
        q = self.qkv[start:, :HEADS].transpose(0, 1)
        k, v = self.qkv[:, HEADS:].transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0).chunk(2)
        query, key = torch.arange(start, len(self.qkv))[:, None], torch.arange(len(self.qkv))
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        scores = (q @ k.transpose(1, 2) / math.sqrt(WIDTH)).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def attend(
    cache: KVCache, parts: list[tuple[Sequence, int, Tensor]], block: int = 1
) -> list[Tensor]:
    """Put new tokens of sequences at positions, as one batch; returns each one's outputs."""
    for sequence, position, new in parts:
        sequence.qkv = torch.cat([sequence.qkv[:position], new])
    rows = [CacheRow(s.pages, position, len(new)) for s, position, new in parts]
    packed = torch.cat([new for _, _, new in parts])
    out = cache.attend(block, packed.clone(), cache.plan(rows))
    return list(out.split([len(new) for _, _, new in parts]))


def new_tokens(count: int) -> Tensor:
    return torch.randn(count, HEADS + 2 * KV_HEADS, WIDTH)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 3, 7]))
def test_any_mix_of_rows_gives_plain_attention(seed: int, window: int | None) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pages = list(range(NUM_PAGES))
    if rng.random() < 0.7:
        rng.shuffle(pages)
    cache = make_cache(window)
    sequences = [Sequence(tuple(pages[i * 8 : (i + 1) * 8])) for i in range(5)]
    for _ in range(6):
        parts = []
        for sequence in rng.sample(sequences, rng.randint(1, 5)):
            # Mostly go on at the end, sometimes roll back.
            position = rng.choice([len(sequence.qkv)] * 3 + [rng.randint(0, len(sequence.qkv))])
            room = 8 * PAGE - position
            if room:
                parts.append((sequence, position, new_tokens(min(room, rng.choice([1, 1, 2, 9])))))
        for (sequence, position, _), out in zip(parts, attend(cache, parts), strict=True):
            torch.testing.assert_close(
                out, sequence.expected(position, window), atol=2e-6, rtol=1e-5
            )


@pytest.mark.parametrize("at_once", [16, 64])
def test_a_long_prefill_in_bfloat16_agrees_with_float32(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pllm.model.kv_cache.MAX_MATMUL_TOKENS", at_once)  # in one, or in parts
    torch.manual_seed(0)
    cache, sequence = make_cache(dtype=torch.bfloat16), Sequence(tuple(range(20, 30)))
    sequence.qkv = new_tokens(40).bfloat16()
    out = cache.attend(0, sequence.qkv.clone(), cache.plan([CacheRow(sequence.pages, 0, 40)]))
    sequence.qkv = sequence.qkv.float()
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), sequence.expected(0, None), atol=0.02, rtol=0.02)


def test_blocks_do_not_share_what_they_hold() -> None:
    cache = make_cache()
    in_block = [Sequence((3, 1)), Sequence((3, 1))]  # one session's pages, as every block has them
    for position, count in ((0, 5), (5, 1), (6, 1)):
        for block, sequence in enumerate(in_block):
            (out,) = attend(cache, [(sequence, position, new_tokens(count))], block)
            torch.testing.assert_close(out, sequence.expected(position, None))


def test_a_copy_goes_on_by_itself() -> None:
    cache, first = make_cache(), Sequence((7, 2, 9))
    attend(cache, [(first, 0, new_tokens(6))])
    cache.copy(first.pages, (1, 30), 6)
    second = Sequence((1, 30), first.qkv.clone())
    parts = [(first, 6, new_tokens(1)), (second, 6, new_tokens(1))]
    for (sequence, position, _), out in zip(parts, attend(cache, parts), strict=True):
        torch.testing.assert_close(out, sequence.expected(position, None))


def test_a_copy_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="9 tokens do not fit"):
        make_cache().copy((1, 2, 3), (4, 5), 9)


def test_tokens_go_on_in_another_cache_as_if_they_had_been_computed_there() -> None:
    """Part by part, into pages of any order, in which an earlier session has left NaN."""
    first, second = make_cache(), make_cache()
    second.tensors[0].fill_(math.nan)
    sequence = Sequence((7, 2, 9))
    attend(first, [(sequence, 0, new_tokens(6))], block=0)
    attend(first, [(sequence, 6, new_tokens(1))], block=0)
    moved = Sequence((30, 1, 20), sequence.qkv.clone())
    for start, count in ((0, 3), (3, 2), (5, 2)):
        values = first.export_tokens(sequence.pages, 0, 2, start, count)
        assert values.shape == (2, *first.token_shape(count))
        second.import_tokens(moved.pages, 0, start, values)
    others = Sequence((5, 6, 8))
    second.import_tokens(others.pages, 0, 0, values)
    others.qkv = sequence.qkv[5:]
    parts = [(moved, 7, new_tokens(1)), (others, 2, new_tokens(1))]
    for (each, position, _), out in zip(parts, attend(second, parts, block=0), strict=True):
        torch.testing.assert_close(out, each.expected(position, None))


def test_some_blocks_of_a_cache_are_exported_and_no_other_changes() -> None:
    cache = make_cache()
    in_block = [Sequence((3, 1)), Sequence((3, 1))]
    for block, sequence in enumerate(in_block):
        attend(cache, [(sequence, 0, new_tokens(5))], block)
    target = make_cache()

    target.import_tokens((0, 4), 1, 0, cache.export_tokens((3, 1), 1, 1, 0, 5))

    assert not target.tensors[0][0].any()
    moved = Sequence((0, 4), in_block[1].qkv.clone())
    (out,) = attend(target, [(moved, 5, new_tokens(1))], block=1)
    torch.testing.assert_close(out, moved.expected(5, None))


def test_an_export_keeps_the_type_and_is_a_copy() -> None:
    cache = make_cache(dtype=torch.bfloat16)
    values = cache.export_tokens((0, 1), 0, 2, 0, 5)
    cache.tensors[0].fill_(1.0)

    assert values.dtype is cache.dtype is torch.bfloat16
    assert not values.any()
    assert cache.token_bytes * 2 * 5 == values.nbytes


def test_tokens_that_do_not_fit_their_pages_are_not_moved() -> None:
    cache = make_cache()
    with pytest.raises(LocalProtocolError):
        cache.export_tokens((0, 1), 0, 2, 5, 4)
    with pytest.raises(LocalProtocolError):
        cache.import_tokens((0, 1), 0, 5, torch.zeros(2, *cache.token_shape(4)))


def test_memory_is_what_the_pages_hold() -> None:
    assert make_cache().num_bytes == 2 * 2 * NUM_PAGES * PAGE * KV_HEADS * WIDTH * 4


@pytest.mark.parametrize(
    "row", [CacheRow((0, 1), 0, 0), CacheRow((0,), -1, 2), CacheRow((0,), 4, 1)]
)
def test_a_row_that_does_not_fit_its_pages_is_refused(row: CacheRow) -> None:
    with pytest.raises(LocalProtocolError):
        make_cache().plan([row])

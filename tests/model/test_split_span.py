"""A span in parts gives what the whole span gives, bit for bit; all parts are on one CPU here.

On a computer with GPUs, P2PLLM_TEST_DEVICES=cuda:0,cuda:1,cuda:0 lays the parts there, and what is
compared is one SpanModel on the first of them.
"""

import os
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.config import ModelConfig
from p2pllm.model.device import choose_devices
from p2pllm.model.dummy import dummy_weights
from p2pllm.model.families.family import Weights
from p2pllm.model.kv_cache import CacheRow, KVCache, Rows
from p2pllm.model.quantize import Scheme
from p2pllm.model.span_model import SpanCompute, SpanModel
from p2pllm.model.split_span import SplitCache, SplitSpan, sizes_of
from p2pllm.spans import Span, cut

DEVICES = choose_devices(os.environ.get("P2PLLM_TEST_DEVICES", "cpu,cpu,cpu"))
CPU = torch.device("cpu")
PAGE, NUM_PAGES, LENGTH = 8, 40, 29
CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=48,
    num_blocks=12,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=80,
    vocab_size=97,
    max_position=512,
    norm_eps=1e-5,
)
SPAN = Span(2, 8)
SIZES = (1, 3, 2)  # blocks 2, 3:6 and 6:8
PAGES = (7, 3, 4, 20)
OTHER_PAGES = (30, 8, 1, 2)


def weights(index: int, device: torch.device) -> Weights:
    """The same on any device."""
    tensors = dummy_weights(CONFIG, index, torch.float32, Scheme.NONE, CPU)
    return {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}


def whole(span: Span = SPAN) -> SpanModel:
    tensors = (weights(index, CPU) for index in span)
    return SpanModel.load(CONFIG, span, tensors, dtype=torch.float32, device=DEVICES[0])


class Reading:
    """Splits spans, and notes which blocks were read for which device."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def split(
        self, span: Span = SPAN, sizes: Sequence[int] = SIZES, loaded: SplitSpan | None = None
    ) -> SplitSpan:
        return SplitSpan.load(
            CONFIG,
            span,
            self._read,
            sizes=sizes,
            devices=DEVICES[: len(sizes)],
            dtype=torch.float32,
            loaded=loaded,
        )

    def _read(self, index: int, device: torch.device) -> Weights:
        self.blocks.append(index)
        return weights(index, device)


@pytest.fixture
def reading() -> Reading:
    return Reading()


@pytest.fixture
def split(reading: Reading) -> SplitSpan:
    return reading.split()


def hidden_states(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 48, generator=torch.Generator().manual_seed(seed))


def run(
    model: SpanCompute, cache: KVCache, rows: Rows, span: Span | None = None, seed: int = 0
) -> Tensor:
    num_tokens = sum(row.num_tokens for row in rows)
    return model.forward(hidden_states(num_tokens, seed), rows, cache, span).cpu()


def answers(model: SpanCompute, span: Span | None = None) -> list[Tensor]:
    """A prompt, a batch of a decode step and a chunk, and another decode step."""
    cache = model.make_cache(NUM_PAGES, PAGE)
    batches = [
        [CacheRow(PAGES, 0, LENGTH)],
        [CacheRow(PAGES, LENGTH, 1), CacheRow(OTHER_PAGES, 0, 5)],
        [CacheRow(OTHER_PAGES, 5, 1), CacheRow(PAGES, LENGTH + 1, 1)],
    ]
    return [run(model, cache, rows, span, seed) for seed, rows in enumerate(batches)]


def all_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (1, 3, 2), (6,)])
def test_parts_of_any_size_compute_what_the_whole_span_does(
    reading: Reading, sizes: tuple[int, ...]
) -> None:
    split = reading.split(sizes=sizes)

    assert sizes_of(split) == sizes
    assert all_equal(answers(split), answers(whole()))


@pytest.mark.parametrize("span", [Span(2, 3), Span(3, 5), Span(5, 7), Span(2, 7), Span(6, 8)])
def test_a_session_may_use_some_of_the_blocks(split: SplitSpan, span: Span) -> None:
    assert all_equal(answers(split, span), answers(whole(), span))


def test_other_blocks_are_refused(split: SplitSpan) -> None:
    cache = split.make_cache(NUM_PAGES, PAGE)

    with pytest.raises(LocalProtocolError, match=r"blocks 1:4 of 2:8"):
        run(split, cache, [CacheRow(PAGES, 0, 3)], Span(1, 4))


def test_the_caches_of_the_parts_hold_what_one_cache_would(split: SplitSpan) -> None:
    parts, one = split.make_cache(NUM_PAGES, PAGE), whole().make_cache(NUM_PAGES, PAGE)
    run(split, parts, [CacheRow(PAGES, 0, LENGTH)])
    run(whole(), one, [CacheRow(PAGES, 0, LENGTH)])

    scratch_pages = NUM_PAGES + one.has_scratch
    assert parts.num_bytes == one.num_bytes == 6 * scratch_pages * PAGE * one.token_bytes
    assert (parts.dtype, parts.token_bytes) == (one.dtype, one.token_bytes)
    assert parts.token_shape(5) == one.token_shape(5)
    for index in range(len(SPAN)):
        assert torch.equal(parts.block(index).cpu(), one.block(index).cpu())


def test_a_copied_sequence_goes_on_like_the_first(split: SplitSpan) -> None:
    cache = split.make_cache(NUM_PAGES, PAGE)
    run(split, cache, [CacheRow(PAGES, 0, LENGTH)])

    cache.copy(PAGES, OTHER_PAGES, LENGTH)

    first = run(split, cache, [CacheRow(PAGES, LENGTH, 1)])
    assert torch.equal(first, run(split, cache, [CacheRow(OTHER_PAGES, LENGTH, 1)]))


@pytest.mark.parametrize(("first", "num_blocks"), [(0, 6), (0, 1), (2, 3), (3, 2), (5, 1)])
def test_keys_and_values_are_handed_over_across_the_borders_of_parts(
    split: SplitSpan, first: int, num_blocks: int
) -> None:
    parts, one = split.make_cache(NUM_PAGES, PAGE), whole().make_cache(NUM_PAGES, PAGE)
    run(split, parts, [CacheRow(PAGES, 0, LENGTH)])
    run(whole(), one, [CacheRow(PAGES, 0, LENGTH)])

    exported = parts.export_tokens(PAGES, first, num_blocks, 3, LENGTH - 3)
    assert exported.device == CPU
    assert torch.equal(exported, one.export_tokens(PAGES, first, num_blocks, 3, LENGTH - 3).cpu())

    for cache in (parts, one):
        cache.import_tokens(OTHER_PAGES, first, 3, exported)
    for index in range(len(SPAN)):
        assert torch.equal(parts.block(index).cpu(), one.block(index).cpu())


def test_a_session_goes_on_with_what_another_server_computed(split: SplitSpan) -> None:
    one, cache = whole(), split.make_cache(NUM_PAGES, PAGE)
    giving = one.make_cache(NUM_PAGES, PAGE)
    run(one, giving, [CacheRow(PAGES, 0, LENGTH)])

    cache.import_tokens(OTHER_PAGES, 0, 0, giving.export_tokens(PAGES, 0, 6, 0, LENGTH))

    expected = run(one, giving, [CacheRow(PAGES, LENGTH, 1)])
    assert torch.equal(expected, run(split, cache, [CacheRow(OTHER_PAGES, LENGTH, 1)]))


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5])
def test_a_move_reads_only_what_is_not_on_the_right_device(
    reading: Reading, split: SplitSpan, start: int
) -> None:
    there = Span(start, start + len(SPAN))
    stay = [
        index
        for old, new in zip(cut(SPAN, SIZES), cut(there, SIZES), strict=True)
        for index in new
        if index in old
    ]
    missing, cache = split.missing(there), split.make_cache(NUM_PAGES, PAGE)
    reading.blocks.clear()

    moved = reading.split(there, loaded=split)

    assert reading.blocks == missing == [index for index in there if index not in stay]
    rows = [CacheRow(PAGES, 0, LENGTH)]
    expected = run(whole(there), whole(there).make_cache(NUM_PAGES, PAGE), rows)
    assert torch.equal(run(moved, cache, rows), expected)  # in the old cache, as a server does it


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6])
def test_what_is_forgotten_before_a_move_is_what_the_move_must_read(
    reading: Reading, split: SplitSpan, start: int
) -> None:
    there = Span(start, start + len(SPAN))
    needed = split.missing(there)

    split.forget_all_but(SPAN.overlap(there))

    assert split.missing(there) == needed
    kept = len(SPAN) - len(split.missing(SPAN))
    assert kept == len(SPAN) - len(needed)
    assert all_equal(answers(reading.split(loaded=split)), answers(whole()))  # and back again


def test_everything_is_forgotten_where_no_block_stays(split: SplitSpan) -> None:
    split.forget_all_but(None)

    assert split.missing(SPAN) == list(SPAN)


def test_random_sessions_are_computed_as_by_the_whole_span(split: SplitSpan) -> None:
    rng, one = random.Random(3), whole()
    caches = split.make_cache(NUM_PAGES, PAGE), one.make_cache(NUM_PAGES, PAGE)
    lengths = [0] * 5
    for turn in range(12):
        rows = []
        for number in rng.sample(range(5), 3):
            size = rng.choice((1, 1, 3)) if lengths[number] else rng.randint(1, 20)
            pages = tuple(range(8 * number, 8 * number + 8))
            rows.append(CacheRow(pages, lengths[number], size))
            lengths[number] += size
        got, expected = run(split, caches[0], rows, seed=turn), run(one, caches[1], rows, seed=turn)
        assert torch.equal(got, expected)


def test_preparing_a_split_prepares_every_part(split: SplitSpan) -> None:
    cache = split.make_cache(NUM_PAGES, PAGE)
    assert isinstance(cache, SplitCache)

    split.prepare(cache, 4)

    rows = [CacheRow(PAGES, 0, 1), CacheRow(OTHER_PAGES, 0, 1)]
    one = whole()
    other = one.make_cache(NUM_PAGES, PAGE)
    one.prepare(other, 4)
    assert torch.equal(run(split, cache, rows), run(one, other, rows))

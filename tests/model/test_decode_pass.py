"""Recorded decode passes against the same blocks planned anew for each batch.

On the CPU what is recorded is called again; with P2PLLM_TEST_DEVICE=cuda it is a CUDA graph.
"""

import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.config import ModelConfig
from p2pllm.model.decode_pass import MAX_ROW_TOKENS, CudaRecorder, Recorder, Work, batch_sizes
from p2pllm.model.dummy import dummy_weights
from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.quantize import Scheme
from p2pllm.model.span_model import SpanModel
from p2pllm.spans import Span

DEVICE = torch.device(os.environ.get("P2PLLM_TEST_DEVICE", "cpu"))
PAGE, NUM_PAGES, MAX_BATCH = 8, 40, 12
CONFIG = ModelConfig(
    model_type="mistral",
    hidden_size=48,
    num_blocks=6,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=80,
    vocab_size=97,
    max_position=512,
    norm_eps=1e-5,
)
SPAN = Span(2, 5)


class EagerRecorder:
    """Calls again what it is given, and counts."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def record(self, work: Work) -> Work:
        work()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


def make_model(window: int | None = None) -> SpanModel:
    import dataclasses

    config = dataclasses.replace(CONFIG, sliding_window=window)
    weights = (dummy_weights(config, i, torch.float32, Scheme.NONE, DEVICE) for i in SPAN)
    return SpanModel.load(config, SPAN, weights, dtype=torch.float32, device=DEVICE)


def make_cache(model: SpanModel) -> KVCache:
    return KVCache(
        model.config,
        num_blocks=len(SPAN),
        num_pages=NUM_PAGES,
        page_tokens=PAGE,
        dtype=torch.float32,
        device=DEVICE,
        has_scratch=True,
    )


def recorder() -> Recorder:
    return EagerRecorder() if DEVICE.type == "cpu" else CudaRecorder(DEVICE)


def hidden_states(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 48, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (16, (1, 2, 4, 8, 16)),
        (100, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)),
    ],
)
def test_sizes_grow_up_to_the_largest_batch(max_batch: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(max_batch) == sizes


# --- passes ----------------------------------------------------------------------------------


def ragged_batches(rng: random.Random) -> Iterator[list[tuple[int, int]]]:
    """Batches of (sequence, tokens) until each of five sequences has 60 tokens."""
    left = dict.fromkeys(range(5), 60)
    while left:
        chosen = rng.sample(sorted(left), rng.randint(1, len(left)))
        batch = [(i, min(left[i], rng.choice([1, 1, 1, 1, 3, 8, 20]))) for i in chosen]
        for sequence, count in batch:
            left[sequence] -= count
            if not left[sequence]:
                del left[sequence]
        yield batch


@pytest.mark.parametrize("window", [None, 11])
def test_batches_of_all_kinds_give_what_planned_ones_give(window: int | None) -> None:
    plain, recorded = make_model(window), make_model(window)
    plain_cache, cache = make_cache(plain), make_cache(recorded)
    recorded.prepare(cache, MAX_BATCH, recorder())
    rng = random.Random(3)
    pages = list(range(NUM_PAGES))
    rng.shuffle(pages)
    tables = [tuple(pages[8 * i : 8 * i + 8]) for i in range(5)]
    done = [0] * 5
    for number, batch in enumerate(ragged_batches(rng)):
        rows = [CacheRow(tables[i], done[i], count) for i, count in batch]
        hidden = hidden_states(sum(count for _, count in batch), number)
        expected = plain.forward(hidden, rows, plain_cache)
        assert_close(recorded.forward(hidden, rows, cache), expected)
        for sequence, count in batch:
            done[sequence] += count


def test_a_part_of_the_span_runs_its_own_blocks_only() -> None:
    plain, recorded = make_model(), make_model()
    plain_cache, cache = make_cache(plain), make_cache(recorded)
    recorded.prepare(cache, MAX_BATCH, recorder())
    hidden, rows = hidden_states(2), [CacheRow((3,), 0, 1), CacheRow((4,), 0, 1)]
    for part in (Span(2, 3), Span(4, 5), Span(3, 5)):
        expected = plain.forward(hidden, rows, plain_cache, part)
        assert_close(recorded.forward(hidden, rows, cache, part), expected)


def test_an_output_stays_what_it_was_when_the_next_batch_is_computed() -> None:
    model = make_model()
    cache = make_cache(model)
    model.prepare(cache, MAX_BATCH, recorder())
    first = model.forward(hidden_states(1), [CacheRow((0,), 0, 1)], cache)
    kept = first.clone()
    model.forward(hidden_states(1, 1), [CacheRow((0,), 1, 1)], cache)
    assert first.equal(kept)


def test_what_a_page_held_before_does_not_reach_its_next_owner() -> None:
    """Not even where the page is read as a whole, padded, in a batch that is planned."""
    plain, recorded = make_model(), make_model()
    plain_cache, cache = make_cache(plain), make_cache(recorded)
    recorded.prepare(cache, MAX_BATCH, recorder())
    cache.tensors[0].fill_(torch.nan)
    other = [CacheRow((7, 9), 0, 9)]
    hidden, long = hidden_states(4), hidden_states(9, 1)
    for model, where in ((plain, plain_cache), (recorded, cache)):
        model.forward(hidden[:1], [CacheRow((1,), 0, 1)], where)
        model.forward(long, other, where)
    rows = [CacheRow((1,), 1, 1), CacheRow((7, 9), 9, 1), CacheRow((20, 22), 0, 9)]
    batch = torch.cat([hidden[1:3], long])
    assert_close(recorded.forward(batch, rows, cache), plain.forward(batch, rows, plain_cache))


def test_recording_touches_no_page_of_a_session() -> None:
    model = make_model()
    cache = make_cache(model)
    model.prepare(cache, MAX_BATCH, recorder())
    assert not cache.tensors[0][:, :, : NUM_PAGES * PAGE].any()


def test_batches_too_large_and_chunks_and_other_caches_are_planned() -> None:
    model, counted = make_model(), EagerRecorder()
    cache, other = make_cache(model), make_cache(model)
    if DEVICE.type == "cpu":
        model.prepare(cache, 4, counted)
    else:
        model.prepare(cache, 4)
    five = [CacheRow((i,), 0, 1) for i in range(5)]
    model.forward(hidden_states(5), five, cache)
    chunk = MAX_ROW_TOKENS + 1
    model.forward(hidden_states(chunk), [CacheRow((1, 2), 0, chunk)], cache)
    model.forward(hidden_states(1), five[:1], other)
    assert counted.num_replayed == 0


def test_a_batch_between_two_sizes_is_filled_up() -> None:
    model, counted = make_model(), EagerRecorder()
    cache = make_cache(model)
    model.prepare(cache, 8, counted)
    rows = [CacheRow((i,), 0, 1) for i in range(3)]
    out = model.forward(hidden_states(3), rows, cache)
    assert out.shape == (3, 48)
    assert counted.num_recorded == 4 * (2 + len(SPAN))  # sizes 1, 2, 4, 8: all, rotation, blocks
    assert counted.num_replayed == 1
    model.forward(hidden_states(3), rows, cache, Span(2, 4))
    assert counted.num_replayed == 1 + 1 + 2


def test_a_row_that_does_not_fit_its_pages_is_refused() -> None:
    model = make_model()
    cache = make_cache(model)
    model.prepare(cache, MAX_BATCH, recorder())
    with pytest.raises(LocalProtocolError, match="tokens 8:9 in 1 pages"):
        model.forward(hidden_states(1), [CacheRow((0,), 8, 1)], cache)


def test_forgetting_blocks_forgets_what_was_recorded_of_them() -> None:
    model, counted = make_model(), EagerRecorder()
    cache = make_cache(model)
    model.prepare(cache, 4, counted)
    model.forget_all_but(Span(2, 3))
    model.forward(hidden_states(1), [CacheRow((0,), 0, 1)], cache, Span(2, 3))
    assert counted.num_replayed == 0


def test_on_the_cpu_nothing_is_recorded() -> None:
    model = make_model()
    if model.device.type == "cpu":
        cache = make_cache(model)
        model.prepare(cache, 4)
        assert model._decode_pass is None

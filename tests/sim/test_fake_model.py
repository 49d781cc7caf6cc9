import random

import pytest
import torch
from torch import Tensor

from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.sim.fake_model import WIDTH, FakeCache, FakeEdges, FakeSpanModel, fake_config, greedy
from p2pllm.spans import Span
from p2pllm.wire.tensors import TensorCodec

CONFIG = fake_config(num_blocks=6)
EDGES = FakeEdges(CONFIG)
PAGE = 8
PAGES, OTHER_PAGES = (5, 2, 9, 0), (1, 7, 3, 8)


def whole() -> tuple[FakeSpanModel, FakeCache]:
    model = FakeSpanModel(CONFIG, Span(0, 6))
    return model, model.make_cache(num_pages=12, page_tokens=PAGE)


def run(ids: list[int]) -> Tensor:
    """The last block's output for a whole sequence in one pass."""
    model, cache = whole()
    return model.forward(EDGES.embed(torch.tensor(ids)), [CacheRow(PAGES, 0, len(ids))], cache)


def test_outputs_are_whole_numbers_of_seven_bits() -> None:
    out = run(list(range(20)))
    assert out.shape == (20, WIDTH)
    assert torch.equal(out, out.round())
    assert float(out.abs().max()) <= 63


def test_steps_and_chunks_give_what_one_pass_gives() -> None:
    ids = [random.Random(3).randrange(256) for _ in range(30)]
    model, cache = whole()
    embedded, parts, position = EDGES.embed(torch.tensor(ids)), [], 0
    for size in (11, 1, 1, 9, 1, 7):
        row = CacheRow(PAGES, position, size)
        parts.append(model.forward(embedded[position : position + size], [row], cache))
        position += size
    assert torch.equal(torch.cat(parts), run(ids))


@pytest.mark.parametrize(
    "changed",
    [[1, 2, 4, 5, 6], [1, 2, 2, 3, 4, 5, 6], [2, 1, 3, 4, 5, 6], [1, 130, 3, 4, 5, 6]],
    ids=["lost", "repeated", "reordered", "replaced"],
)
def test_a_change_early_in_the_sequence_changes_the_last_output(changed: list[int]) -> None:
    assert not torch.equal(run(changed)[-1], run([1, 2, 3, 4, 5, 6])[-1])


def test_batched_sequences_do_not_see_each_other() -> None:
    model, cache = whole()
    embedded = EDGES.embed(torch.tensor([1, 2, 3, 9, 8, 7, 6]))
    out = model.forward(embedded, [CacheRow(PAGES, 0, 3), CacheRow(OTHER_PAGES, 0, 4)], cache)
    assert torch.equal(out, torch.cat([run([1, 2, 3]), run([9, 8, 7, 6])]))


def test_a_new_step_at_an_earlier_position_rolls_back() -> None:
    model, cache = whole()
    model.forward(EDGES.embed(torch.arange(20)), [CacheRow(PAGES, 0, 20)], cache)
    out = model.forward(EDGES.embed(torch.tensor([77, 78])), [CacheRow(PAGES, 9, 2)], cache)
    assert torch.equal(out, run([*range(9), 77, 78])[-2:])


def test_a_copied_sequence_goes_on_by_itself() -> None:
    model, cache = whole()
    model.forward(EDGES.embed(torch.arange(10)), [CacheRow(PAGES, 0, 10)], cache)
    cache.copy(PAGES, OTHER_PAGES, 10)
    model.forward(EDGES.embed(torch.tensor([99])), [CacheRow(PAGES, 10, 1)], cache)
    out = model.forward(EDGES.embed(torch.tensor([50])), [CacheRow(OTHER_PAGES, 10, 1)], cache)
    assert torch.equal(out, run([*range(10), 50])[-1:])


@pytest.mark.parametrize("codec", list(TensorCodec))
def test_a_chain_of_spans_gives_the_whole_models_answer_over_any_codec(codec: TensorCodec) -> None:
    models = [FakeSpanModel(CONFIG, span) for span in (Span(0, 4), Span(1, 6))]
    caches = [model.make_cache(12, PAGE) for model in models]
    new, position, answer = [3, 1, 4, 1, 5], 0, list[int]()
    while len(answer) < 12:
        hidden = EDGES.embed(torch.tensor(new))
        row = CacheRow(PAGES, position, len(new))
        for model, cache, part in zip(models, caches, (Span(0, 4), Span(4, 6)), strict=True):
            hidden = model.forward(hidden, [row], cache, span=part)
            hidden = decode_tensor(encode_tensor(hidden, codec))
        position += len(new)
        new = [int(EDGES.logits(hidden[-1:]).argmax())]
        answer += new
    assert answer == greedy(CONFIG, [3, 1, 4, 1, 5], 12)

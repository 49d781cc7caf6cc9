"""Passes without a cache, against `transformers` and against the same blocks behind sessions."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model import forward_pass as module
from p2pllm.model.forward_pass import Pass, groups_of
from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.span_model import SpanModel
from p2pllm.model.split_span import SplitSpan
from p2pllm.spans import Span
from tests.model.test_span_model import VARIANTS, Model

CHOSEN = ("llama with grouped queries", "llama 3 rope", "biases", "mistral with a window")
UNEVEN = (45, 7, 7, 1, 33, 20)
SMALL = 16  # tokens of a group, so that there are several, and long sequences


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    import transformers

    return {name: Model(transformers, VARIANTS[name]) for name in CHOSEN}


@pytest.fixture
def llama(models: dict[str, Model]) -> Model:
    return models[CHOSEN[0]]


def finished(pieces: Pass) -> tuple[Tensor, list[int]]:
    """What a pass returns, and the sizes of its pieces."""
    sizes = []
    with torch.inference_mode():
        while True:
            try:
                sizes.append(next(pieces))
            except StopIteration as end:
                return end.value, sizes


def ids_of(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (length,), generator=generator) for length in lengths]


def cached(model: SpanModel, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same sequences behind sessions."""
    cache, start, outputs = model.make_cache(8, 64), 0, []
    for length in lengths:
        row = CacheRow(tuple(range(8)), 0, length)
        outputs.append(model.forward(hidden[start : start + length], [row], cache))
        start += length
    return torch.cat(outputs)


def assert_close(ours: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert float((ours - expected).norm() / expected.norm()) < relative


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("group_tokens", [SMALL, 512], ids=["long", "grouped"])
def test_uneven_sequences_give_what_transformers_gives_each_of_them(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, name: str, group_tokens: int
) -> None:
    monkeypatch.setattr(module, "GROUP_TOKENS", group_tokens)
    model, sequences = models[name], ids_of(UNEVEN)
    hidden = model.edges.embed(torch.cat(sequences))
    output, _ = finished(model.blocks.forward_pass(hidden, UNEVEN))
    expected = torch.cat([model.reference_outputs(ids)[0][-1] for ids in sequences])
    assert_close(output.cpu(), expected)


def test_equal_lengths_give_what_transformers_gives(llama: Model) -> None:
    sequences = ids_of([24] * 4)
    hidden = llama.edges.embed(torch.cat(sequences))
    output, _ = finished(llama.blocks.forward_pass(hidden, [24] * 4))
    expected = torch.cat([llama.reference_outputs(ids)[0][-1] for ids in sequences])
    assert_close(output.cpu(), expected)


@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 2, 3), (0, 1, 2, 3)], ids=str)
def test_spans_one_after_the_other_are_the_whole(llama: Model, cuts: tuple[int, ...]) -> None:
    whole = hidden = llama.edges.embed(torch.cat(ids_of(UNEVEN)))
    for start, stop in pairwise(cuts):
        hidden, _ = finished(llama.blocks.forward_pass(hidden, UNEVEN, Span(start, stop)))
    assert torch.equal(hidden, finished(llama.blocks.forward_pass(whole, UNEVEN))[0])


def test_parts_on_several_devices_are_the_whole(llama: Model) -> None:
    hidden = llama.edges.embed(torch.cat(ids_of(UNEVEN)))
    split = SplitSpan([llama.span_model(Span(0, 2)), llama.span_model(Span(2, 3))])
    for span in (None, Span(1, 3), Span(2, 3)):
        ours, _ = finished(split.forward_pass(hidden, UNEVEN, span))
        assert torch.equal(ours, finished(llama.blocks.forward_pass(hidden, UNEVEN, span))[0])


@pytest.mark.parametrize("group_tokens", [SMALL, 512], ids=["long", "grouped"])
def test_bfloat16_stays_as_close_as_behind_a_cache(
    llama: Model, monkeypatch: pytest.MonkeyPatch, group_tokens: int
) -> None:
    monkeypatch.setattr(module, "GROUP_TOKENS", group_tokens)
    hidden = llama.edges.embed(torch.cat(ids_of(UNEVEN)))
    exact, _ = finished(llama.blocks.forward_pass(hidden, UNEVEN))
    model = llama.span_model(Span(0, 3), torch.bfloat16)
    error = finished(model.forward_pass(hidden, UNEVEN))[0].float() - exact
    usual = cached(model, hidden, UNEVEN).float() - exact
    assert float(error.norm()) < 1.2 * float(usual.norm())


def test_a_pass_gives_the_same_bits_again_and_does_not_change_its_input(llama: Model) -> None:
    hidden = llama.edges.embed(torch.cat(ids_of(UNEVEN)))
    before = hidden.clone()
    first, _ = finished(llama.blocks.forward_pass(hidden, UNEVEN))
    again, _ = finished(llama.blocks.forward_pass(hidden, UNEVEN))
    assert torch.equal(first, again)
    assert torch.equal(hidden, before)


def test_two_passes_that_take_turns_do_not_disturb_each_other(llama: Model) -> None:
    hidden = llama.edges.embed(torch.cat(ids_of(UNEVEN)))
    alone, _ = finished(llama.blocks.forward_pass(hidden, UNEVEN))
    other = llama.blocks.forward_pass(hidden.flip(0), UNEVEN)
    pieces = llama.blocks.forward_pass(hidden, UNEVEN)
    with torch.inference_mode():
        next(other)
        next(pieces)
        next(other)
    assert torch.equal(finished(pieces)[0], alone)


def test_no_piece_is_larger_than_a_group(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_TOKENS", SMALL)
    hidden = llama.edges.embed(torch.cat(ids_of(UNEVEN)))
    _, sizes = finished(llama.blocks.forward_pass(hidden, UNEVEN))
    assert max(sizes) <= SMALL
    assert sum(sizes) == 3 * sum(UNEVEN)


@pytest.mark.parametrize("lengths", [(), (3,), (5,), (4, 0), (5, -1)], ids=str)
def test_lengths_that_do_not_fit_are_refused(llama: Model, lengths: tuple[int, ...]) -> None:
    with pytest.raises(LocalProtocolError):
        llama.blocks.forward_pass(torch.zeros(4, 48), lengths)


def test_blocks_and_widths_that_are_not_there_are_refused(llama: Model) -> None:
    with pytest.raises(LocalProtocolError):
        llama.blocks.forward_pass(torch.zeros(4, 48), (4,), Span(2, 4))
    with pytest.raises(LocalProtocolError):
        llama.blocks.forward_pass(torch.zeros(4, 47), (4,))


@given(st.lists(st.integers(1, 40), max_size=30))
def test_groups_are_all_sequences_in_order_and_no_larger_than_they_may(lengths: list[int]) -> None:
    groups = list(groups_of(lengths, SMALL))
    assert [length for group in groups for length in group] == lengths
    assert all(sum(group) <= SMALL or len(group) == 1 for group in groups)
    assert all(sum(a) + b[0] > SMALL for a, b in pairwise(groups)), "as few as they can be"

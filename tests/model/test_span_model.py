"""Our blocks against the reference implementation in `transformers`, with random weights.

Caches have scattered pages unless a test says otherwise: that is the harder case. On a computer
with a GPU, P2PLLM_TEST_DEVICE=cuda runs our side there (the reference stays on the CPU).
"""

import os
import random
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pllm.errors import CheckpointError, LocalProtocolError
from p2pllm.model.config import ModelConfig
from p2pllm.model.edges import Edges
from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.span_model import SpanModel
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.spans import Span
from p2pllm.wire.tensors import TensorCodec

DEVICE = os.environ.get("P2PLLM_TEST_DEVICE", "cpu")
PAGE = 8  # tokens: small, so that short sequences have many pages
NUM_PAGES = 64
LENGTH = 45
BASE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama with grouped queries": {"model_type": "llama"},
    "one kv head per head": {"model_type": "llama", "num_key_value_heads": 6},
    "llama 3 rope": {"model_type": "llama", "rope_parameters": LLAMA3},
    "linear rope": {"model_type": "llama", "rope_parameters": LINEAR},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "tied embeddings": {"model_type": "llama", "tie_word_embeddings": True},
    "own head width": {"model_type": "llama", "head_dim": 16},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 11},
    "mistral without": {"model_type": "mistral", "sliding_window": None},
}


class Model:
    """A reference model with random weights, and ours with the same."""

    def __init__(self, transformers: ModuleType, variant: dict[str, Any]) -> None:
        torch.manual_seed(0)
        values = BASE | variant
        hf_config = transformers.AutoConfig.for_model(**values, attn_implementation="eager")
        self.reference = transformers.AutoModelForCausalLM.from_config(hf_config).eval()
        with torch.no_grad():
            for parameter in self.reference.parameters():  # initial biases and gains are trivial
                parameter.copy_(torch.randn_like(parameter) * 0.1 + 1.0 * (parameter == 1.0))
        self.config = ModelConfig.from_hf(hf_config.to_dict())
        self.state: dict[str, Tensor] = self.reference.state_dict()
        self.edges = Edges.load(self.config, self.state, dtype=torch.float32, device=DEVICE)
        self.blocks = self.span_model(Span(0, self.config.num_blocks))

    def block_weights(self, span: Span) -> Iterator[dict[str, Tensor]]:
        for index in span:
            prefix = f"model.layers.{index}."
            yield {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}

    def span_model(self, span: Span, dtype: torch.dtype = torch.float32) -> SpanModel:
        weights = self.block_weights(span)
        return SpanModel.load(self.config, span, weights, dtype=dtype, device=DEVICE)

    def reference_outputs(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden states before each block and after the last (no final norm), and logits."""
        after_last: list[Tensor] = []
        hook = self.reference.model.norm.register_forward_pre_hook(
            lambda _, inputs: after_last.append(inputs[0][0])
        )
        with torch.inference_mode():
            out = self.reference(ids[None], output_hidden_states=True, use_cache=False)
        hook.remove()
        return [h[0] for h in out.hidden_states[:-1]] + after_last, out.logits[0]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    import transformers  # takes seconds, so it is imported once and only here

    return {name: Model(transformers, variant) for name, variant in VARIANTS.items()}


@pytest.fixture(params=list(VARIANTS))
def model(models: dict[str, Model], request: pytest.FixtureRequest) -> Model:
    return models[request.param]


def some_ids(seed: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, BASE["vocab_size"], (length,), generator=generator)


def scattered(num_sequences: int) -> list[tuple[int, ...]]:
    """Page tables for that many sequences of LENGTH tokens, in random order."""
    pages = list(range(NUM_PAGES))
    random.Random(7).shuffle(pages)
    each = -(-LENGTH // PAGE)
    return [tuple(pages[i * each : (i + 1) * each]) for i in range(num_sequences)]


def assert_close(ours: Tensor, reference: Tensor) -> None:
    """Within 1e-5 of the output's scale."""
    ours, reference = ours.cpu(), reference.cpu()
    assert ours.shape == reference.shape
    assert float((ours - reference).abs().max()) <= 1e-5 * float(reference.abs().max())


def test_each_block_agrees_with_the_reference(model: Model) -> None:
    states, _ = model.reference_outputs(some_ids(1))
    for index in range(model.config.num_blocks):
        block = model.span_model(Span(index, index + 1))
        cache = block.make_cache(NUM_PAGES, PAGE)
        out = block.forward(states[index], [CacheRow(scattered(1)[0], 0, LENGTH)], cache)
        assert_close(out, states[index + 1])


@pytest.mark.parametrize("pages", [tuple(range(10, 20)), scattered(1)[0]], ids=["run", "scattered"])
def test_one_pass_gives_the_reference_logits(model: Model, pages: tuple[int, ...]) -> None:
    ids = some_ids(2)
    cache = model.blocks.make_cache(NUM_PAGES, PAGE)
    hidden = model.blocks.forward(model.edges.embed(ids), [CacheRow(pages, 0, LENGTH)], cache)
    states, logits = model.reference_outputs(ids)
    assert_close(hidden, states[-1])
    assert_close(model.edges.logits(hidden), logits)


@pytest.mark.parametrize("pages", [tuple(range(10, 20)), scattered(1)[0]], ids=["run", "scattered"])
def test_token_by_token_gives_the_same(model: Model, pages: tuple[int, ...]) -> None:
    ids = some_ids(3)
    cache = model.blocks.make_cache(NUM_PAGES, PAGE)
    embedded = model.edges.embed(ids)
    steps = [
        model.blocks.forward(embedded[i : i + 1], [CacheRow(pages, i, 1)], cache)
        for i in range(LENGTH)
    ]
    assert_close(torch.cat(steps), model.reference_outputs(ids)[0][-1])


def run_ragged(
    model: Model, cache: KVCache, all_ids: Sequence[Tensor], rng: random.Random
) -> list[Tensor]:
    """Run sequences to their ends in batches of random sequences and random chunk sizes."""
    tables = scattered(len(all_ids))
    outputs: list[list[Tensor]] = [[] for _ in all_ids]
    done = [0] * len(all_ids)
    while open_ones := [i for i, ids in enumerate(all_ids) if done[i] < len(ids)]:
        chosen = rng.sample(open_ones, rng.randint(1, len(open_ones)))
        sizes = [min(rng.choice([1, 1, 1, 2, 7, 19]), len(all_ids[i]) - done[i]) for i in chosen]
        ids = [all_ids[i][done[i] : done[i] + n] for i, n in zip(chosen, sizes, strict=True)]
        rows = [CacheRow(tables[i], done[i], n) for i, n in zip(chosen, sizes, strict=True)]
        out = model.blocks.forward(model.edges.embed(torch.cat(ids)), rows, cache)
        for i, part in zip(chosen, out.split(sizes), strict=True):
            outputs[i].append(part)
            done[i] += len(part)
    return [torch.cat(parts) for parts in outputs]


def test_ragged_batches_of_sessions_give_what_each_gives_alone(model: Model) -> None:
    all_ids = [some_ids(10 + i, length) for i, length in enumerate([LENGTH, 3, 17, 30, 9, LENGTH])]
    cache = model.blocks.make_cache(NUM_PAGES, PAGE)
    outputs = run_ragged(model, cache, all_ids, random.Random(5))
    for ids, out in zip(all_ids, outputs, strict=True):
        assert_close(out, model.reference_outputs(ids)[0][-1])


def test_a_batch_of_decode_steps_of_very_different_lengths_agrees(model: Model) -> None:
    all_ids = [some_ids(20 + i, length) for i, length in enumerate([LENGTH, 2, 33, 16, LENGTH, 9])]
    cache = model.blocks.make_cache(NUM_PAGES, PAGE)
    tables = scattered(len(all_ids))
    for table, ids in zip(tables, all_ids, strict=True):
        prompt = [CacheRow(table, 0, len(ids) - 1)]
        model.blocks.forward(model.edges.embed(ids[:-1]), prompt, cache)
    last = [CacheRow(table, len(ids) - 1, 1) for table, ids in zip(tables, all_ids, strict=True)]
    out = model.blocks.forward(
        model.edges.embed(torch.stack([ids[-1] for ids in all_ids])), last, cache
    )
    expected = [model.reference_outputs(ids)[0][-1][-1] for ids in all_ids]
    assert_close(out, torch.stack(expected))


@pytest.fixture
def llama(models: dict[str, Model]) -> Model:
    return models["llama with grouped queries"]


def test_a_rolled_back_session_goes_on_as_if_the_lost_tokens_had_never_been(llama: Model) -> None:
    ids = some_ids(4)
    table = scattered(1)[0]
    cache = llama.blocks.make_cache(NUM_PAGES, PAGE)
    wrong = llama.edges.embed(torch.cat([ids[:10], some_ids(99, 30)]))
    llama.blocks.forward(wrong, [CacheRow(table, 0, 40)], cache)
    rest = llama.blocks.forward(
        llama.edges.embed(ids[10:]), [CacheRow(table, 10, LENGTH - 10)], cache
    )
    assert_close(rest, llama.reference_outputs(ids)[0][-1][10:])


def test_sub_spans_one_after_the_other_are_the_whole(llama: Model) -> None:
    ids = some_ids(6)
    rows = [CacheRow(scattered(1)[0], 0, LENGTH)]
    cache = llama.blocks.make_cache(NUM_PAGES, PAGE)
    hidden = llama.blocks.forward(llama.edges.embed(ids), rows, cache, Span(0, 1))
    hidden = llama.blocks.forward(hidden, rows, cache, Span(1, 3))
    assert_close(hidden, llama.reference_outputs(ids)[0][-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_whose_cache_was_moved_goes_on_to_the_last_bit(
    llama: Model, dtype: torch.dtype
) -> None:
    """From a server of all blocks to one of some of them, over the wire's bytes."""
    whole, part = llama.span_model(Span(0, 3), dtype), llama.span_model(Span(1, 3), dtype)
    old, new = whole.make_cache(NUM_PAGES, PAGE), part.make_cache(NUM_PAGES, PAGE)
    hidden = llama.edges.embed(some_ids(8)).to(dtype)
    pages, moved = scattered(2)
    entering = whole.forward(hidden, [CacheRow(pages, 0, LENGTH)], old, span=Span(0, 1))
    whole.forward(entering[:-1], [CacheRow(pages, 0, LENGTH - 1)], old, span=Span(1, 3))
    for start in range(0, LENGTH - 1, 10):
        count = min(10, LENGTH - 1 - start)
        wire = encode_tensor(old.export_tokens(pages, 1, 2, start, count), TensorCodec.RAW)
        new.import_tokens(moved, 0, start, decode_tensor(wire))

    last = entering[-1:]
    stayed = whole.forward(last, [CacheRow(pages, LENGTH - 1, 1)], old, span=Span(1, 3))
    gone_on = part.forward(last, [CacheRow(moved, LENGTH - 1, 1)], new)

    assert gone_on.equal(stayed)


def test_the_callers_hidden_states_are_not_changed(llama: Model) -> None:
    hidden = llama.edges.embed(some_ids(6))
    before = hidden.clone()
    cache = llama.blocks.make_cache(NUM_PAGES, PAGE)
    llama.blocks.forward(hidden, [CacheRow(scattered(1)[0], 0, LENGTH)], cache)
    assert torch.equal(hidden, before)


def test_nan_of_one_row_does_not_reach_its_neighbours(llama: Model) -> None:
    ids, (mine, theirs) = some_ids(8), scattered(2)
    cache = llama.blocks.make_cache(NUM_PAGES, PAGE)
    expected = llama.reference_outputs(ids)[0][-1]
    embedded = llama.edges.embed(ids)
    poison = torch.full((7, llama.config.hidden_size), torch.nan)
    rows = [CacheRow(theirs, 0, 7), CacheRow(mine, 0, 9)]
    out = llama.blocks.forward(torch.cat([poison, embedded[:9]]), rows, cache)
    assert not out[:7].isfinite().all()
    assert_close(out[7:], expected[:9])
    rows = [CacheRow(theirs, 7, 1), CacheRow(mine, 9, 1)]
    out = llama.blocks.forward(torch.cat([poison[:1], embedded[9:10]]), rows, cache)
    assert not out[:1].isfinite().all()
    assert_close(out[1:], expected[9:10])


def test_nan_does_not_reach_the_next_owner_of_a_page(llama: Model) -> None:
    ids, (theirs, other) = some_ids(8), scattered(2)
    cache = llama.blocks.make_cache(NUM_PAGES, PAGE)
    expected = llama.reference_outputs(ids)[0][-1]
    embedded = llama.edges.embed(ids)
    poison = torch.full((LENGTH, llama.config.hidden_size), torch.nan)
    llama.blocks.forward(poison, [CacheRow(theirs, 0, LENGTH)], cache)
    llama.blocks.forward(embedded[:5], [CacheRow(theirs, 0, 5)], cache)
    llama.blocks.forward(embedded[:14], [CacheRow(other, 0, 14)], cache)
    # Batched, the shorter row is padded from its own page, behind its last token.
    rows = [CacheRow(theirs, 5, 1), CacheRow(other, 14, 1)]
    out = llama.blocks.forward(embedded[[5, 14]], rows, cache)
    assert_close(out, expected[[5, 14]])


def test_bfloat16_stays_close_to_float32(llama: Model) -> None:
    ids = some_ids(9)
    span = llama.span_model(Span(0, 3), torch.bfloat16)
    cache = span.make_cache(NUM_PAGES, PAGE)
    prompt, step = [CacheRow(scattered(1)[0], 0, 44)], [CacheRow(scattered(1)[0], 44, 1)]
    embedded = llama.edges.embed(ids)
    out = torch.cat(
        [span.forward(embedded[:44], prompt, cache), span.forward(embedded[44:], step, cache)]
    )
    expected = llama.reference_outputs(ids)[0][-1]
    assert out.dtype is torch.bfloat16
    assert float((out.cpu().float() - expected).norm() / expected.norm()) < 0.02


def test_hidden_states_that_do_not_fit_are_refused(llama: Model) -> None:
    cache = llama.blocks.make_cache(NUM_PAGES, PAGE)
    row = CacheRow((0, 1), 0, 2)
    with pytest.raises(LocalProtocolError, match="hidden states"):
        llama.blocks.forward(torch.zeros(3, 48), [row], cache)
    with pytest.raises(LocalProtocolError, match="blocks 1:4 of 0:3"):
        llama.blocks.forward(torch.zeros(2, 48), [row], cache, Span(1, 4))
    with pytest.raises(LocalProtocolError, match="tokens 15:17 in 2 pages"):
        llama.blocks.forward(torch.zeros(2, 48), [CacheRow((0, 1), 15, 2)], cache)


def test_a_missing_or_misshapen_tensor_is_named(llama: Model) -> None:
    (weights,) = llama.block_weights(Span(1, 2))
    missing = {k: v for k, v in weights.items() if k != "mlp.up_proj.weight"}
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        SpanModel.load(llama.config, Span(1, 2), [missing], dtype=torch.float32)
    wrong = weights | {"mlp.up_proj.weight": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \(2, 3\), not \(80, 48\)"):
        SpanModel.load(llama.config, Span(1, 2), [wrong], dtype=torch.float32)


def test_blocks_that_are_loaded_already_are_shared_and_not_read(llama: Model) -> None:
    ids = some_ids(9)
    front = llama.span_model(Span(0, 2))
    assert front.missing(Span(0, 3)) == [2]
    whole = SpanModel.load(
        llama.config,
        Span(0, 3),
        llama.block_weights(Span(2, 3)),
        dtype=torch.float32,
        device=DEVICE,
        loaded=front,
    )
    assert whole._blocks[1] is front._blocks[1]
    cache = whole.make_cache(NUM_PAGES, PAGE)
    out = whole.forward(llama.edges.embed(ids), [CacheRow(scattered(1)[0], 0, LENGTH)], cache)
    assert_close(out, llama.reference_outputs(ids)[0][-1])


def test_blocks_that_are_forgotten_must_be_loaded_again(llama: Model) -> None:
    blocks = llama.span_model(Span(0, 3))
    blocks.forget_all_but(Span(1, 2))
    assert blocks.missing(Span(0, 3)) == [0, 2]
    blocks.forget_all_but(None)
    assert blocks.missing(Span(0, 3)) == [0, 1, 2]

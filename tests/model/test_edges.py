"""Logits against the reference implementation are in test_span_model.py."""

import dataclasses

import pytest
import torch
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.model.config import ModelConfig
from p2pllm.model.edges import Edges

CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=6,
    num_blocks=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=6,
    intermediate_size=8,
    vocab_size=11,
    max_position=64,
    norm_eps=1e-5,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(11, 6),
        "model.norm.weight": torch.rand(6),
        "lm_head.weight": torch.randn(11, 6),
    }


def test_embedding_looks_up_rows() -> None:
    edges = Edges.load(CONFIG, weights(), dtype=torch.float32)
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(edges.embed(ids), weights()["model.embed_tokens.weight"][ids])
    assert edges.vocab_size == 11


@pytest.mark.parametrize(
    ("config", "head"), [(CONFIG, "lm_head.weight"), (TIED, "model.embed_tokens.weight")]
)
def test_a_tied_head_is_the_embedding(config: ModelConfig, head: str) -> None:
    edges = Edges.load(config, weights(), dtype=torch.float32)
    hidden = torch.randn(4, 6)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = normed * weights()["model.norm.weight"] @ weights()[head].T
    torch.testing.assert_close(edges.logits(hidden), expected)


def test_logits_are_float32_whatever_the_weights_are() -> None:
    edges = Edges.load(CONFIG, weights(), dtype=torch.bfloat16)
    assert edges.embed(torch.tensor([1])).dtype is torch.bfloat16
    assert edges.logits(torch.randn(2, 6)).dtype is torch.float32


def test_a_missing_head_is_named_unless_it_is_tied() -> None:
    without = {name: t for name, t in weights().items() if name != "lm_head.weight"}
    Edges.load(TIED, without, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        Edges.load(CONFIG, without, dtype=torch.float32)

"""Models without files: their identity, their memory, and outputs that stay in bounds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p2pllm.config import ServerConfig
from p2pllm.errors import CheckpointError, ConfigError
from p2pllm.model.config import ModelConfig
from p2pllm.model.dummy import (
    TokenIds,
    dummy_block_bytes,
    dummy_edges,
    dummy_model_id,
    dummy_weights,
    read_config,
)
from p2pllm.model.edges import Edges
from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.quantize import Codes, Scheme
from p2pllm.server.source import DummySource, source_of
from p2pllm.spans import Span

CPU = torch.device("cpu")
VALUES = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "eos_token_id": 2,
}
CONFIG = ModelConfig.from_hf(VALUES)
KINDS = [
    ServerConfig(dtype="float32", device="cpu", load="dummy"),
    ServerConfig(quantize="int8", device="cpu", load="dummy"),
    ServerConfig(quantize="int4", device="cpu", load="dummy"),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    return tmp_path


def test_a_config_is_all_that_a_directory_needs(directory: Path) -> None:
    assert read_config(directory) == CONFIG


def test_a_file_is_no_directory_with_a_config(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(CheckpointError, match=r"needs a directory with a config\.json"):
        read_config(path)


def test_the_dummy_of_a_config_is_no_other_model() -> None:
    mine = dummy_model_id(CONFIG, "some-model")
    assert mine == dummy_model_id(CONFIG, "the same under another name")
    assert mine != dummy_model_id(replace(CONFIG, num_blocks=9), "some-model")
    assert str(mine).startswith("dummy/some-model@")


@pytest.mark.parametrize("settings", KINDS, ids=["float32", "int8", "int4"])
def test_hidden_states_keep_their_size_through_all_blocks(settings: ServerConfig) -> None:
    model = DummySource(CONFIG, "").load_span(Span(0, 8), settings, None)
    hidden = torch.randn(20, 128)
    out = model.forward(hidden, [CacheRow((0,), 0, 20)], model.make_cache(1, 64)).float()
    assert 0.5 < float(out.norm() / hidden.norm()) < 2.0


def test_equal_servers_hold_equal_blocks() -> None:
    one, other = (dummy_weights(CONFIG, 3, torch.float32, Scheme.INT4, CPU) for _ in range(2))
    codes, same = one["mlp.up_proj.weight"], other["mlp.up_proj.weight"]
    assert isinstance(codes, Codes)
    assert isinstance(same, Codes)
    assert codes.codes.equal(same.codes)
    assert set(codes.codes.unique().tolist()) == set(range(-8, 8))


def test_random_codes_have_the_deviation_of_random_weights() -> None:
    for scheme in (Scheme.INT8, Scheme.INT4):
        codes = dummy_weights(CONFIG, 0, torch.float32, scheme, CPU)["mlp.up_proj.weight"]
        assert isinstance(codes, Codes)
        weights = codes.dequantized()
        assert float(weights.std()) == pytest.approx(128**-0.5, rel=0.02)
        assert abs(float(weights.mean())) < 0.01 * 128**-0.5 * 10


def test_a_shape_that_int4_cannot_have_is_refused() -> None:
    config = replace(CONFIG, intermediate_size=100)
    with pytest.raises(CheckpointError, match="no int4 for a matrix of 100 inputs"):
        dummy_weights(config, 0, torch.float32, Scheme.INT4, CPU)


def test_memory_is_known_beforehand() -> None:
    matrices, gains = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256, 2 * 128
    assert dummy_block_bytes(CONFIG, torch.bfloat16, Scheme.NONE) == 2 * (matrices + gains)
    assert dummy_block_bytes(CONFIG, torch.bfloat16, Scheme.INT4) == matrices * 5 // 8 + 2 * gains


def test_edges_embed_and_give_finite_logits() -> None:
    weights = dummy_edges(CONFIG, torch.float32, CPU)
    edges = Edges.load(CONFIG, weights, dtype=torch.float32)
    logits = edges.logits(edges.embed(torch.arange(100)))
    assert logits.shape == (100, 100)
    assert torch.isfinite(logits).all()


def test_prompts_are_token_ids() -> None:
    tokenizer = TokenIds(CONFIG)
    assert tokenizer.eos_ids == {2}
    with pytest.raises(ConfigError, match="token ids"):
        tokenizer.encode("The capital of France is")
    with pytest.raises(ConfigError, match="token ids"):
        tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    shown = tokenizer.stream([5])
    assert shown.push(17) + shown.push(3) + shown.flush() == "17 3 "


def test_the_settings_say_where_blocks_come_from(directory: Path) -> None:
    assert isinstance(source_of("", directory, KINDS[0]), DummySource)
    with pytest.raises(ConfigError, match="no load 'nothing'"):
        source_of("", directory, ServerConfig(load="nothing"))


def test_blocks_that_are_there_are_not_made_again(directory: Path) -> None:
    source, seen = DummySource(CONFIG, ""), list[tuple[int, int]]()
    first = source.load_span(Span(0, 3), KINDS[0], None)
    source.load_span(Span(2, 5), KINDS[0], lambda done, total: seen.append((done, total)), first)
    assert seen == [(1, 2), (2, 2)]

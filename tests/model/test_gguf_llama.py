"""Configs and weights of llama GGUF files, compared with the same model in safetensors."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pllm.errors import CheckpointError
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.config import RopeKind, RopeScaling

Tiny = Any  # conftest.TinyModel; a conftest cannot be imported

HALF = 8  # of a head's 16 features
ORIGINAL = 32  # tokens


def llama3_factors(factor: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As llama.cpp's converter computes them."""
    factors = []
    for i in range(HALF):
        wavelength = 2 * math.pi * 10_000.0 ** (i / HALF)
        if wavelength < ORIGINAL / 4.0:
            factors.append(1.0)
        elif wavelength > ORIGINAL / 1.0:
            factors.append(factor)
        else:
            smooth = (ORIGINAL / wavelength - 1.0) / 3.0
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_a_gguf_file_is_the_same_model_as_the_directory(tiny: Tiny, tmp_path: Path) -> None:
    directory = open_checkpoint(tiny.write_hf(tmp_path / "hf"))
    file = open_checkpoint(tiny.write_gguf(tmp_path / "tiny.gguf"))
    ours, theirs = file.config.canonical(), directory.config.canonical()
    assert math.isclose(ours.pop("norm_eps"), theirs.pop("norm_eps"), rel_tol=1e-6)  # float32
    assert ours == theirs
    for index in range(3):
        expected = directory.block_weights(index)
        weights = file.block_weights(index)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name]), name
    for name, tensor in file.edge_weights().items():
        assert torch.equal(tensor, tiny.weights[name])


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 0.01), ("Q4_0", 0.2)]
)
def test_quantized_weights_are_close(tiny: Tiny, tmp_path: Path, kind: str, error: float) -> None:
    path = tiny.write_gguf(tmp_path / "x.gguf", quantization=GGMLQuantizationType[kind])
    weights = open_checkpoint(path).block_weights(1, torch.bfloat16)
    for name in ("self_attn.k_proj.weight", "mlp.down_proj.weight"):
        expected = tiny.weights[f"model.layers.1.{name}"]
        assert weights[name].dtype is torch.bfloat16
        difference = (weights[name].float() - expected).norm() / expected.norm()
        assert float(difference) < error + 2**-8


def test_a_missing_output_matrix_means_tied_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "x.gguf", without={"output.weight"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_embeddings
    assert set(checkpoint.edge_weights()) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_biases_are_found_and_unpermuted(tiny: Tiny, tmp_path: Path) -> None:
    tiny.config["attention_bias"] = True
    for block in range(3):
        for part, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            tiny.weights[f"model.layers.{block}.self_attn.{part}.bias"] = torch.randn(size)
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "x.gguf"))
    assert checkpoint.config.attention_bias
    for name, tensor in checkpoint.block_weights(2).items():
        assert torch.equal(tensor, tiny.weights[f"model.layers.2.{name}"]), name


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_scaling_is_found_from_its_factors(
    tiny: Tiny, tmp_path: Path, factor: float
) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", llama3_factors(factor))

    scaling = open_checkpoint(tiny.write_gguf(tmp_path / "x.gguf", change=add)).config.rope_scaling
    assert scaling == RopeScaling(RopeKind.LLAMA3, factor, ORIGINAL, 1.0, 4.0)


def test_factors_of_another_kind_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 3, HALF, dtype=np.float32))

    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight holds factors that are not"):
        open_checkpoint(tiny.write_gguf(tmp_path / "x.gguf", change=add))


def test_linear_rope_scaling_is_read_and_other_kinds_are_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    def linear(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)

    config = open_checkpoint(tiny.write_gguf(tmp_path / "x.gguf", change=linear)).config
    assert config.rope_scaling == RopeScaling(RopeKind.LINEAR, 4.0)
    with pytest.raises(CheckpointError, match=r"y\.gguf: .*yarn"):
        open_checkpoint(tiny.write_gguf(tmp_path / "y.gguf", change=yarn))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.rope.dimension_count", 8, "rope.dimension_count is 8, in heads of 16"),
        ("llama.attention.value_length", 8, "value_length is 8"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused(
    tiny: Tiny, tmp_path: Path, key: str, value: int, message: str
) -> None:
    path = tiny.write_gguf(tmp_path / "x.gguf", change=lambda w: w.add_uint32(key, value))
    with pytest.raises(CheckpointError, match=rf"x\.gguf: .*{message}"):
        open_checkpoint(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'gemma3' is not supported; llama is"):
        open_checkpoint(tmp_path / "x.gguf")


def test_head_counts_per_block_must_be_equal(tiny: Tiny, tmp_path: Path) -> None:
    def differ(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop("llama.attention.head_count_kv")
        writer.add_head_count_kv([2, 2, 1])

    def equal(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop("llama.attention.head_count_kv")
        writer.add_head_count_kv([2, 2, 2])

    assert (
        open_checkpoint(tiny.write_gguf(tmp_path / "y.gguf", change=equal)).config.group_size == 2
    )
    with pytest.raises(CheckpointError, match="differs between blocks"):
        open_checkpoint(tiny.write_gguf(tmp_path / "x.gguf", change=differ))


def test_a_missing_tensor_and_an_unknown_one_are_named(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "x.gguf", without={"blk.1.ffn_up.weight"})
    with pytest.raises(CheckpointError, match=r"x\.gguf: .*layers\.1\.mlp\.up_proj\.weight is mis"):
        open_checkpoint(path)
    tiny.weights["model.layers.0.attn_q_norm.weight"] = torch.ones(16)
    path = tiny.write_gguf(tmp_path / "y.gguf")
    with pytest.raises(CheckpointError, match=r"y\.gguf: .*attn_q_norm\.weight is not one of"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj"])
def test_a_shape_that_does_not_fit_the_config_is_named(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    full_name = f"model.layers.1.{name}.weight"
    tiny.weights[full_name] = torch.ones(32, 64)
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "x.gguf"))
    checkpoint.block_weights(0)
    with pytest.raises(CheckpointError, match=rf"x\.gguf: tensor model\.layers\.1\.{name}\.weight"):
        checkpoint.block_weights(1)


def read_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for index in range(checkpoint.config.num_blocks):
        checkpoint.block_weights(index)
    checkpoint.edge_weights()
    tokenizer = checkpoint.tokenizer()
    tokenizer.decode(tokenizer.encode("the fox"))
    assert checkpoint.model_id


def test_a_model_cut_anywhere_gives_checkpoint_error_only(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "x.gguf")
    whole = path.read_bytes()
    read_everything(path)
    for length in range(0, len(whole) - 32, len(whole) // 300):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            read_everything(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_gives_checkpoint_error_only(
    tiny: Tiny, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "x.gguf"
    if not path.exists():
        tiny.write_gguf(path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    whole = bytearray((tmp_path / "whole").read_bytes())
    header = whole.index(b"blk.2.ffn_down") + 64  # the tensors' entries end about there
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header))
        whole[at] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        read_everything(path)
    except CheckpointError:
        pass  # anything else fails the test

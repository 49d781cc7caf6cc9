"""Opening checkpoints: identity, partial directories, and files that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.model.checkpoint import Checkpoint, open_checkpoint
from p2pllm.model.families import family_of
from p2pllm.model.gguf import GgufFile
from p2pllm.model.quantize import Codes, Scheme
from p2pllm.model.quantized_linear import Int4Linear, Int8Linear

CPU = torch.device("cpu")
Tiny = Any  # conftest.TinyModel; a conftest cannot be imported


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_blocks_and_edges_are_those_of_the_files(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_hf(tmp_path, num_shards=2))
    weights = checkpoint.block_weights(2, torch.bfloat16)
    assert len(weights) == 9
    for name, tensor in weights.items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, tiny.weights[f"model.layers.2.{name}"].bfloat16())
    assert set(checkpoint.edge_weights()) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_what_was_let_go_can_be_read_again(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    path = tiny.write_hf(tmp_path) if kind == "hf" else tiny.write_gguf(tmp_path / "x.gguf")
    checkpoint = open_checkpoint(path)
    weights = checkpoint.block_weights(1)
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    checkpoint.let_go()
    again = checkpoint.block_weights(1)
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


def test_a_blocks_memory_is_known_without_reading(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_hf(tmp_path))
    held = sum(tensor.nbytes for tensor in checkpoint.block_weights(0, torch.bfloat16).values())
    assert checkpoint.block_bytes(torch.bfloat16) == held


@pytest.mark.parametrize(
    ("kind", "scheme", "kept"),
    [
        ("Q4_0", Scheme.INT4, True),
        ("Q4_1", Scheme.INT4, True),
        ("Q8_0", Scheme.INT8, True),
        ("Q8_0", Scheme.INT4, False),
        ("Q4_1", Scheme.INT8, False),
        ("F32", Scheme.INT4, False),
    ],
)
def test_a_files_codes_are_kept_if_they_have_as_many_bits(
    tiny: Tiny, tmp_path: Path, kind: str, scheme: Scheme, kept: bool
) -> None:
    path = tiny.write_gguf(tmp_path / "x.gguf", quantization=GGMLQuantizationType[kind])
    checkpoint = open_checkpoint(path)
    whole = checkpoint.block_weights(1)
    for name, codes in checkpoint.quantized_block(1, torch.bfloat16, scheme, CPU).items():
        if isinstance(codes, Tensor):
            assert torch.equal(codes, whole[name].bfloat16())
            continue
        assert codes.bits == scheme.bits
        expected = whole[name]
        assert codes.shape == expected.shape
        error = float((codes.dequantized() - expected).norm() / expected.norm())
        # Kept: scales were rounded to bfloat16, else codes were chosen for this tensor.
        assert error < (2**-8 if kept else 0.01 if scheme is Scheme.INT8 else 0.1)


def test_kept_codes_are_those_of_the_file_to_the_bit(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "x.gguf", quantization=GGMLQuantizationType.Q4_1)
    weights = open_checkpoint(path).quantized_block(1, torch.bfloat16, Scheme.INT4, CPU)
    for part, name in (("ffn_down", "mlp.down_proj.weight"), ("attn_v", "self_attn.v_proj.weight")):
        in_file = GgufFile(path).codes(f"blk.1.{part}.weight")
        ours = weights[name]
        assert in_file is not None
        assert isinstance(ours, Codes)
        assert torch.equal(ours.codes, torch.from_numpy(in_file.codes))
        assert torch.equal(ours.scales, torch.from_numpy(in_file.scales).bfloat16())


@pytest.mark.parametrize("kind", ["hf", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("scheme", [Scheme.INT8, Scheme.INT4])
def test_a_quantized_blocks_memory_is_known_without_reading(
    tiny: Tiny, tmp_path: Path, kind: str, scheme: Scheme
) -> None:
    if kind == "hf":
        path = tiny.write_hf(tmp_path / "x")
    else:
        path = tiny.write_gguf(tmp_path / "x.gguf", quantization=GGMLQuantizationType[kind])
    checkpoint = open_checkpoint(path)
    weights = checkpoint.quantized_block(1, torch.bfloat16, scheme, CPU)
    block = family_of(checkpoint.config).build_block(checkpoint.config, weights)
    held = block.attention_norm.weight.nbytes + block.mlp_norm.weight.nbytes
    for layer in (block.qkv, block.out, block.gate_up, block.down):
        if isinstance(layer, Int4Linear):
            held += layer.packed.nbytes + layer.scales.nbytes
        else:
            assert isinstance(layer, Int8Linear)
            held += layer.weight.nbytes + layer.scales.nbytes
    assert checkpoint.block_bytes(torch.bfloat16, scheme) == held


def test_a_tied_head_is_not_read(tiny: Tiny, tmp_path: Path) -> None:
    tiny.config["tie_word_embeddings"] = True
    checkpoint = open_checkpoint(tiny.write_hf(tmp_path))
    assert "lm_head.weight" not in checkpoint.edge_weights()


# --- identity ---------------------------------------------------------------------------------


def test_the_identity_is_the_same_from_all_shards_and_from_some_of_them(
    tiny: Tiny, tmp_path: Path
) -> None:
    whole = open_checkpoint(tiny.write_hf(tmp_path / "whole", num_shards=3))
    partial = tiny.write_hf(tmp_path / "partial", num_shards=3)
    for number in (0, 1, 2):
        (partial / f"model-{number}.safetensors").unlink()
    assert whole.model_id == open_checkpoint(partial).model_id


def test_a_sharded_fine_tune_is_another_model_by_the_files_that_describe_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny.write_hf(tmp_path / "base", num_shards=2)
    tuned = tiny.write_hf(tmp_path / "tuned", num_shards=2)
    assert open_checkpoint(base).model_id == open_checkpoint(tuned).model_id
    edit(tuned / "config.json", _name_or_path="somebody/fine-tune")
    assert open_checkpoint(base).model_id != open_checkpoint(tuned).model_id


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_fine_tune_in_one_file_is_another_model(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    ids = set()
    for number, change in enumerate((0.0, 0.0, 1e-3)):
        tiny.weights["model.norm.weight"] += change
        if kind == "hf":
            path = tiny.write_hf(tmp_path / str(number))
        else:
            path = tiny.write_gguf(tmp_path / f"{number}.gguf")
        ids.add(open_checkpoint(path).model_id)
    assert len(ids) == 2


def test_names_of_a_model_are_for_people_only(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "some model.gguf")
    unnamed, named = open_checkpoint(path), open_checkpoint(path, "mine")
    assert unnamed.model_id == named.model_id
    assert unnamed.model_id.name == "some_model"
    assert str(named.model_id).startswith("mine@")


def test_a_snapshot_of_the_hubs_cache_is_called_after_its_repo(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path / "models--owner--name-7B" / "snapshots" / "0123abcd")
    assert open_checkpoint(path).model_id.name == "owner/name-7B"


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 20_000.0},
        {"rms_norm_eps": 1e-6},
        {"torch_dtype": "bfloat16"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_another_config_is_another_model(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tiny.write_hf(tmp_path)
    before = open_checkpoint(path).model_id
    edit(path / "config.json", **change)
    assert open_checkpoint(path).model_id != before


def test_another_tokenizer_or_template_is_another_model(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    ids = {open_checkpoint(path).model_id}
    (path / "chat_template.jinja").write_text("{{ messages }}")
    ids.add(open_checkpoint(path).model_id)
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + "\n")
    ids.add(open_checkpoint(path).model_id)
    assert len(ids) == 3


def test_another_quantization_is_another_model(tiny: Tiny, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType as Type

    ids = set()
    for kind in (Type.F32, Type.F16, Type.Q8_0, Type.Q4_0):
        path = tiny.write_gguf(tmp_path / f"{kind.name}.gguf", quantization=kind)
        ids.add(open_checkpoint(path).model_id)
    assert len(ids) == 4


# --- what does not fit ------------------------------------------------------------------------


def read_everything(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    for index in range(checkpoint.config.num_blocks):
        checkpoint.block_weights(index)
    checkpoint.edge_weights()
    checkpoint.tokenizer()
    assert checkpoint.model_id
    return checkpoint


def test_only_the_shards_that_are_read_need_to_be_there(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path, num_shards=2)
    (path / "model-1.safetensors").unlink()
    checkpoint = open_checkpoint(path)
    checkpoint.block_weights(0)
    with pytest.raises(
        CheckpointError, match=r"model-1\.safetensors is missing, which holds tensor model\.layers"
    ):
        checkpoint.block_weights(2)


def test_a_shard_that_arrives_later_is_seen(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path, num_shards=2)
    (path / "model-1.safetensors").rename(path / "elsewhere")
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError):
        checkpoint.block_weights(2)
    (path / "elsewhere").rename(path / "model-1.safetensors")
    assert len(checkpoint.block_weights(2)) == 9


def test_a_truncated_safetensors_file_is_named(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path, num_shards=2)
    shard = path / "model-0.safetensors"
    whole = shard.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model-0\.safetensors: tensor model\."):
            read_everything(path)


def test_a_truncated_single_file_is_named(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(path)


def test_a_header_that_lies_about_a_tensor_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[64,96]', b'"shape":[96,64]'))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is \(96, 64\); by the config"):
        read_everything(path)


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = tiny.write_hf(tmp_path, num_shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.input_layernorm.weight"] = "model-1.safetensors"
    edit(path / "model.safetensors.index.json", **index)
    with pytest.raises(CheckpointError, match=r"model-1.*tensor model\.layers\.0\.input_layernorm"):
        read_everything(path)


def test_integers_in_place_of_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    tiny.weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int8"):
        read_everything(tiny.write_hf(tmp_path))


def test_a_missing_and_an_unknown_tensor_are_named(tiny: Tiny, tmp_path: Path) -> None:
    kept = tiny.weights.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_checkpoint(tiny.write_hf(tmp_path / "a"))
    tiny.weights["model.layers.1.mlp.up_proj.weight"] = kept
    tiny.weights["model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)
    with pytest.raises(CheckpointError, match=r"q_norm\.weight is not one of a llama model"):
        open_checkpoint(tiny.write_hf(tmp_path / "b"))
    del tiny.weights["model.layers.1.self_attn.q_norm.weight"]
    tiny.weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    read_everything(tiny.write_hf(tmp_path / "c"))  # a buffer that old files carry


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../elsewhere.safetensors", "no file name"),
        ("/etc/passwd", "no file name"),
        ("pytorch_model.bin", "not a safetensors file"),
        (7, "no file name"),
    ],
)
def test_an_index_may_only_name_safetensors_files_beside_it(
    tiny: Tiny, tmp_path: Path, shard: object, message: str
) -> None:
    path = tiny.write_hf(tmp_path, num_shards=2)
    edit(path / "model.safetensors.index.json", weight_map={"model.norm.weight": shard})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_pickled_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tiny: Tiny, tmp_path: Path, name: str) -> None:
    path = tiny.write_hf(tmp_path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_everything(path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_file_is_named(tiny: Tiny, tmp_path: Path, name: str, content: bytes) -> None:
    path = tiny.write_hf(tmp_path)
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_everything(path)


def test_a_config_that_promises_too_much_is_refused_at_once(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    edit(path / "config.json", num_hidden_layers=2**30)
    with pytest.raises(CheckpointError, match="30 tensors for 1073741824 blocks"):
        open_checkpoint(path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    edit(path / "config.json", vocab_size=200)
    with pytest.raises(CheckpointError, match="the tokenizer has 300 tokens, the model 200"):
        open_checkpoint(path).tokenizer()


def test_what_is_neither_directory_nor_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint(tmp_path / "x.txt")
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf"):
        open_checkpoint(tmp_path / "nowhere.gguf")

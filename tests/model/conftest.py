"""A tiny llama, written as a Hugging Face directory and as a GGUF file with the same weights."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

# Triton's kernels are tested on a GPU, or by its interpreter if one asks for that.
if os.environ.get("P2PLLM_TEST_DEVICE", "cpu") == "cpu" and "TRITON_INTERPRET" not in os.environ:
    collect_ignore = ["test_int4_triton.py"]

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = ["the quick brown fox jumps over the lazy dog 1234 times", "def f(x): return x + 1"] * 4


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE of 300 tokens, cut into words as SmolLM does."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def make_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = hidden // 2  # two of four heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (CONFIG["vocab_size"], hidden),
    }
    for block in range(CONFIG["num_hidden_layers"]):
        in_block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{block}.{k}.weight": v for k, v in in_block.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class TinyModel:
    """Writes the model's files; tests change what they are about."""

    def __init__(self) -> None:
        self.config = dict(CONFIG)
        self.weights = make_weights()
        self.tokenizer = make_tokenizer()
        self.template = TEMPLATE

    def write_hf(self, path: Path, num_shards: int = 1) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        self.tokenizer.save(str(path / "tokenizer.json"))
        settings = {"eos_token": "<|im_end|>", "chat_template": self.template}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        if num_shards == 1:
            save_file(self.weights, path / "model.safetensors")
            return path
        shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
        weight_map = {}
        for number, (name, tensor) in enumerate(self.weights.items()):
            shard = number * num_shards // len(self.weights)
            shards[shard][name] = tensor
            weight_map[name] = f"model-{shard}.safetensors"
        for number, tensors in enumerate(shards):
            save_file(tensors, path / f"model-{number}.safetensors")
        index = {"metadata": {"total_size": 400_000}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    def write_gguf(
        self,
        path: Path,
        *,
        quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
        without: Iterable[str] = (),
    ) -> Path:
        """`without`: GGUF names of tensors to leave out; `change` may add to the metadata."""
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_block_count(self.config["num_hidden_layers"])
        writer.add_context_length(self.config["max_position_embeddings"])
        writer.add_embedding_length(self.config["hidden_size"])
        writer.add_feed_forward_length(self.config["intermediate_size"])
        writer.add_head_count(self.config["num_attention_heads"])
        writer.add_head_count_kv(self.config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(self.config["rms_norm_eps"])
        writer.add_rope_freq_base(self.config["rope_theta"])
        self._add_tokenizer(writer)
        change(writer)
        for name, tensor in self.weights.items():
            if gguf_name(name) not in without:
                add_tensor(writer, name, tensor, quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_tokenizer(self, writer: gguf.GGUFWriter) -> None:
        state = json.loads(self.tokenizer.to_str())["model"]
        tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(self.template)


def gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for hf, ours in names.items():
        name = name.replace(hf, ours)
    return name


def add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: Tensor, quantization: gguf.GGMLQuantizationType
) -> None:
    """As llama.cpp's converter writes it: queries and keys permuted, norms in float32."""
    values: np.ndarray[Any, np.dtype[np.float32]] = tensor.numpy()
    if "q_proj" in name or "k_proj" in name:
        heads = 4 if "q_proj" in name else 2
        shape = values.shape
        values = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
        values = np.ascontiguousarray(values.swapaxes(1, 2).reshape(shape))
    kind = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)


@pytest.fixture
def tiny() -> TinyModel:
    return TinyModel()

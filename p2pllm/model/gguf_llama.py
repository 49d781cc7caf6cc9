"""A GGUF file of architecture "llama" as a source of tensors under their Hugging Face names.

llama.cpp's converter renames tensors, keeps few of the config's fields, and changes two things in
the data, which are turned back here:

- It permutes the rows of the query and key projections, because its rotation pairs feature 2i
  with 2i + 1, and that of the original files pairs i with i + d/2.
- Llama 3's rope scaling becomes one factor per frequency, in a tensor, and the parameters are
  gone. They are found again from the factors, and the factors computed from them must agree.

Mistral's files are of architecture "llama" too; they do not tell the sliding window of its first
version, which llama.cpp ignores as well: such a model is right up to 4,096 tokens.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.model.config import ModelConfig, RopeKind
from p2pllm.model.files import sample
from p2pllm.model.gguf import GgufFile
from p2pllm.model.gguf_tokenizer import build_tokenizer, eos_ids, hash_tokenizer
from p2pllm.model.quantize import Codes
from p2pllm.model.tokenizer import Tokenizer

ROPE_FACTORS = "rope_freqs.weight"
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0  # of every Llama from 3.1 to 3.3

_EDGES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tables that can be computed from the config, and are.
_NOT_WEIGHTS = ("rope_freqs.", "rope_factors_", ".attn_rot_embd")


class GgufLlama:
    """A TensorSource (`p2pllm.model.checkpoint`) over a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self._names = {
            hf_name(name): name
            for name in self._file.tensors
            if not any(part in name for part in _NOT_WEIGHTS)
        }
        self.config = read_config(self._file)

    @property
    def types(self) -> Mapping[str, str]:
        """Types of all tensors, by their HF names."""
        return {hf: self._file.tensors[name].type.name for hf, name in self._names.items()}

    def let_go(self) -> None:
        """Keep none of the file's pages."""
        self._file.let_go()

    def sample(self) -> bytes:
        """A digest of bytes of all tensors."""
        entries = {hf: self._file.tensors[name] for hf, name in self._names.items()}
        return sample(
            self.path, {hf: (e.start, e.start + e.num_bytes) for hf, e in entries.items()}
        )

    def read(self, name: str) -> Tensor:
        """The tensor of that HF name, in float32."""
        values = self._file.read(self._name(name))
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
        return self._in_order(name, tensor)

    def codes(self, name: str) -> Codes | None:
        """The matrix of that HF name as the file holds it, scales rounded to bfloat16.

        None if its type is not of groups with one scale (Q4_0, Q4_1, Q8_0 are).
        """
        groups = self._file.codes(self._name(name))
        if groups is None:
            return None
        codes, scales, centres = (
            self._in_order(name, torch.from_numpy(values.copy()))
            for values in (groups.codes, groups.scales, groups.centres)
        )
        return Codes(groups.bits, codes, scales.bfloat16(), centres.bfloat16())

    def _name(self, hf_name: str) -> str:
        if hf_name not in self._names:
            raise CheckpointError(f"{self.path}: tensor {hf_name} is missing")
        return self._names[hf_name]

    def _in_order(self, name: str, tensor: Tensor) -> Tensor:
        """Rows (one per output) as the original files have them."""
        if ".q_proj." in name:
            return self._unpermute(name, tensor, self.config.num_heads)
        if ".k_proj." in name:
            return self._unpermute(name, tensor, self.config.num_kv_heads)
        return tensor

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the file's metadata describes."""
        return build_tokenizer(self._file)

    def tokenizer_hash(self) -> bytes:
        """A digest of all that it is built from."""
        return hash_tokenizer(self._file)

    def _unpermute(self, name: str, tensor: Tensor, num_heads: int) -> Tensor:
        """Undo llama.cpp's permutation of rows: (H, d/2, 2) back to (H, 2, d/2)."""
        if tensor.shape[0] != num_heads * self.config.head_dim:
            raise CheckpointError(
                f"{self.path}: tensor {name} has {tensor.shape[0]} rows, not {num_heads} heads "
                f"of {self.config.head_dim}"
            )
        pairs = tensor.view(num_heads, self.config.head_dim // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(tensor.shape)


def hf_name(name: str) -> str:
    """The Hugging Face name of a llama tensor; one that we do not know stays as it is."""
    if name in _EDGES:
        return _EDGES[name]
    match name.split("."):
        case ["blk", number, part, kind] if number.isdecimal():
            return f"model.layers.{number}.{_IN_BLOCK.get(part, part)}.{kind}"
    return name


def read_config(file: GgufFile) -> ModelConfig:
    """Bring the metadata into the form of a `config.json`, which ModelConfig checks."""
    architecture = file.scalar("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; llama is "
            "(Llama, Mistral, SmolLM)"
        )
    if file.scalar("llama.expert_count"):
        raise CheckpointError(f"{file.path}: a mixture of experts is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    values: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": file.scalar("llama.embedding_length"),
        "num_hidden_layers": file.scalar("llama.block_count"),
        "num_attention_heads": _same_everywhere(file, "llama.attention.head_count"),
        "num_key_value_heads": _same_everywhere(file, "llama.attention.head_count_kv"),
        "head_dim": file.scalar("llama.attention.key_length"),
        "intermediate_size": _same_everywhere(file, "llama.feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": file.scalar("llama.context_length"),
        "rms_norm_eps": file.scalar("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.scalar("llama.rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": file.scalar("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted(eos_ids(file)),
        "pad_token_id": file.scalar("tokenizer.ggml.padding_token_id"),
    }
    try:
        config = ModelConfig.from_hf(values)
        _check_rotation(file, config)
        scaling = _linear_scaling(file) or _llama3_scaling(file, config)
        if scaling is not None:
            config = ModelConfig.from_hf(values | {"rope_scaling": scaling})
    except CheckpointError as exc:
        raise CheckpointError(f"{file.path}: {exc}") from exc
    return config


def _same_everywhere(file: GgufFile, key: str) -> Any:
    """A number that may be given per block, where all of ours must be equal."""
    value = file.scalar(key)
    if value is not None or key not in file:
        return value
    each = set(file.numbers(key))
    if len(each) != 1:
        raise CheckpointError(f"{file.path}: {key} differs between blocks, which is not supported")
    return each.pop()


def _check_rotation(file: GgufFile, config: ModelConfig) -> None:
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        size = file.scalar(key)
        if size is not None and size != config.head_dim:
            raise CheckpointError(f"{key} is {size}, in heads of {config.head_dim}")


def _linear_scaling(file: GgufFile) -> dict[str, Any] | None:
    kind = file.scalar("llama.rope.scaling.type")
    factor = file.scalar("llama.rope.scaling.factor")
    if kind is None and (old := file.scalar("llama.rope.scale_linear")) is not None:
        kind, factor = "linear", old  # the key's name until 2023
    if kind in (None, "none") or (kind == "linear" and factor == 1.0):
        return None
    return {"rope_type": kind, "factor": factor}  # ModelConfig refuses the kinds we do not have


def _llama3_scaling(file: GgufFile, config: ModelConfig) -> dict[str, Any] | None:
    """Find the parameters from the factors (d/2,) by which frequencies are divided.

    In the transition f = 1 / ((1 - s) / factor + s) with s = (original / wavelength - low) /
    (high - low), so that one frequency there gives `original`; `factor` is the largest f.
    """
    if ROPE_FACTORS not in file.tensors:
        return None
    factors = file.read(ROPE_FACTORS).astype(np.float64)
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    wavelengths = 2 * math.pi * config.rope_theta**exponents
    finite = np.isfinite(factors).all() and np.isfinite(wavelengths).all()
    if factors.shape != wavelengths.shape or not finite:
        raise CheckpointError(f"tensor {ROPE_FACTORS} is not a factor for each frequency")
    if (factors == 1.0).all():
        return None
    factor = float(factors.max())
    between = np.flatnonzero((factors > 1.0) & (factors < factor))
    if factor > 1.0 and between.size:
        at = between[0]
        share = (1 / factors[at] - 1 / factor) / (1 - 1 / factor)
        turns = share * (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR) + LOW_FREQ_FACTOR
        original = round(turns * wavelengths[at])
        expected = _llama3_factors(wavelengths, factor, original)
        if np.allclose(factors, expected, rtol=1e-4):  # they are float32
            return {
                "rope_type": RopeKind.LLAMA3,
                "factor": factor,
                "low_freq_factor": LOW_FREQ_FACTOR,
                "high_freq_factor": HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(f"tensor {ROPE_FACTORS} holds factors that are not Llama 3's")


def _llama3_factors(
    wavelengths: npt.NDArray[np.float64], factor: float, original: int
) -> npt.NDArray[np.float64]:
    turns = original / wavelengths
    share = (turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    kept = np.clip(share, 0.0, 1.0)  # 1: unchanged, 0: divided
    return np.asarray(1 / ((1 - kept) / factor + kept))

"""Shapes of models that nobody needs to download to be measured: their `config.json`."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p2pllm.model.config import ModelConfig

# What the models' authors publish; `tiny` tries the programs out on a CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
    },
}


def config_of(name: str) -> ModelConfig:
    """The config of a shape."""
    return ModelConfig.from_hf(SHAPES[name])


@contextmanager
def directory_of(name: str) -> Iterator[Path]:
    """A directory with nothing but the shape's config.json, named as the shape."""
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(SHAPES[name]))
        yield directory

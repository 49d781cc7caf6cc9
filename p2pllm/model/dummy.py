"""Models without files: random weights of a config's shape, made where they are used.

To measure how fast a model would be, one needs its shapes and not its 140 GB. A directory with a
`config.json` is enough. Weights come from a generator seeded with the block's number, so that two
servers with one kind of device, one type and one quantization hold the same blocks; they are
scaled so that hidden states keep their size however many blocks there are. Quantized
matrices are random codes from the start, never full-precision ones: 43 GB of int4 take seconds.

A dummy has a ModelId of its own: no route mixes it with the real model, or with a dummy of
another config. What it says means nothing, so it has no tokenizer: prompts are token ids.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from p2pllm.errors import CheckpointError, ConfigError
from p2pllm.ids import ModelId
from p2pllm.model.config import ModelConfig
from p2pllm.model.families import family_of
from p2pllm.model.families.family import Weights
from p2pllm.model.files import read_json
from p2pllm.model.quantize import GROUP, Codes, Scheme, num_bytes


def read_config(path: Path) -> ModelConfig:
    """The config of a directory, of which nothing else is read. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: a dummy model needs a directory with a config.json")
    return ModelConfig.from_hf(read_json(path / "config.json"))


def dummy_model_id(config: ModelConfig, name: str) -> ModelId:
    """The identity of the dummy of a config; `name` is that of the model it stands for."""
    text = json.dumps({"dummy": config.canonical()}, sort_keys=True, separators=(",", ":"))
    return ModelId(hashlib.sha256(text.encode()).digest(), f"dummy/{name}"[:128])


def dummy_block_bytes(config: ModelConfig, dtype: torch.dtype, scheme: Scheme) -> int:
    """What one block takes in memory."""
    return sum(
        math.prod(shape) * dtype.itemsize
        if scheme is Scheme.NONE or len(shape) == 1
        else num_bytes(shape, scheme)
        for shape in family_of(config).block_shapes(config).values()
    )


def dummy_weights(
    config: ModelConfig, index: int, dtype: torch.dtype, scheme: Scheme, device: torch.device
) -> Weights:
    """Random tensors of block `index`, by their local names, matrices as codes if `scheme` is one.

    Raises CheckpointError for a shape that the scheme cannot have.
    """
    generator = torch.Generator(device).manual_seed(index)
    # What each block adds to the hidden states is small, so that all of them together add once.
    share = 1 / math.sqrt(2 * config.num_blocks)
    weights: dict[str, Tensor | Codes] = {}
    for name, shape in family_of(config).block_shapes(config).items():
        if len(shape) == 1:
            fill = 0.0 if name.endswith("bias") else 1.0
            weights[name] = torch.full(shape, fill, dtype=dtype, device=device)
            continue
        is_output = name.startswith(("self_attn.o_proj", "mlp.down_proj"))
        deviation = (share if is_output else 1.0) / math.sqrt(shape[1])
        if scheme is Scheme.NONE:
            weights[name] = _normal((shape[0], shape[1]), deviation, dtype, generator)
        else:
            weights[name] = _codes((shape[0], shape[1]), deviation, scheme, generator)
    return weights


def dummy_edges(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Tensor]:
    """Random embedding, final norm and head, by their full names."""
    generator = torch.Generator(device).manual_seed(config.num_blocks)
    family, weights = family_of(config), {}
    for name, shape in family.edge_shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=dtype, device=device)
        else:
            deviation = 1.0 if name == family.embedding else 1 / math.sqrt(shape[1])
            weights[name] = _normal((shape[0], shape[1]), deviation, dtype, generator)
    return weights


class TokenIds:
    """The tokenizer of a model that means nothing: tokens are shown as their numbers."""

    def __init__(self, config: ModelConfig) -> None:
        self._eos_ids = frozenset(config.eos_ids)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Any of these ends a text."""
        return self._eos_ids

    def encode(self, text: str) -> list[int]:
        """There is no text: raises ConfigError."""
        raise ConfigError("a dummy model has no tokenizer: give the prompt as token ids")

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """There is no text: raises ConfigError."""
        return self.encode("")

    def stream(self, prompt_ids: Sequence[int]) -> "TokenNumbers":
        """Shows what follows a prompt."""
        return TokenNumbers()


class TokenNumbers:
    """Token ids as numbers with a space behind each."""

    def push(self, token: int) -> str:
        """The token's number."""
        return f"{token} "

    def flush(self) -> str:
        """Nothing is held back."""
        return ""


def _normal(
    shape: tuple[int, int], deviation: float, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    values = torch.empty(shape, dtype=dtype, device=generator.device)
    return values.normal_(0.0, deviation, generator=generator)


def _codes(
    shape: tuple[int, int], deviation: float, scheme: Scheme, generator: torch.Generator
) -> Codes:
    """Codes with equal probabilities, scales that give the deviation asked, centres for mean 0."""
    num_outputs, num_inputs = shape
    if scheme is Scheme.INT4 and num_inputs % GROUP:
        raise CheckpointError(f"no int4 for a matrix of {num_inputs} inputs: groups are of {GROUP}")
    limit = 2 ** (scheme.bits - 1)
    # int8's codes are symmetric; int4's are not, and their mean of -1/2 goes into the centre.
    lowest = -limit if scheme is Scheme.INT4 else 1 - limit
    codes = torch.empty(shape, dtype=torch.int8, device=generator.device)
    codes.random_(lowest, limit, generator=generator)
    step = deviation / math.sqrt(((limit - lowest) ** 2 - 1) / 12)
    groups = num_inputs // GROUP if scheme is Scheme.INT4 else 1
    scales = torch.full((num_outputs, groups), step, device=generator.device).bfloat16()
    centres = scales / 2 if scheme is Scheme.INT4 else torch.zeros_like(scales)
    return Codes(scheme.bits, codes, scales, centres)

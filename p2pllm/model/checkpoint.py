"""Checkpoint: a model's files, opened: its config, its identity, and its weights on demand.

Two kinds of source give tensors under Hugging Face names: a directory with safetensors
(`hf_directory`) and a GGUF file (`gguf_llama`). A server reads the blocks of its span, a client
the embedding, the final norm and the head; nothing else is touched.

**Identity.** All who hold the same source must compute the same ModelId, also those who have
downloaded two shards of thirty: so it depends on what everyone has. It hashes the config, the
names, shapes and types of the tensors that the model uses, the tokenizer with its chat template,
and, where the weights are one file, a few bytes of each tensor, else the files that describe it.
Names come from the source's index, and all that the model needs must be there; shapes follow from
the config, and each tensor's real shape is compared when it is read; types are those of the GGUF
file, or the one that `config.json` declares. Sharded fine-tunes whose config and index are equal
to the letter are not told apart.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.ids import ModelId
from p2pllm.model.config import ModelConfig
from p2pllm.model.families import family_of
from p2pllm.model.families.family import Weights
from p2pllm.model.gguf_llama import GgufLlama
from p2pllm.model.hf_directory import HfDirectory
from p2pllm.model.quantize import Codes, Scheme, num_bytes, quantize
from p2pllm.model.tokenizer import Tokenizer

MAX_NAME_CHARS = 128  # what a model listing in the DHT takes
# Buffers of old checkpoints, which follow from the config.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


class TensorSource(Protocol):
    """Where a checkpoint's tensors come from; all names are those of Hugging Face files."""

    path: Path
    config: ModelConfig

    @property
    def types(self) -> Mapping[str, str]:
        """The type of every tensor of the whole model, whether it is here or not."""

    def sample(self) -> bytes:
        """A digest that tells apart models which differ in their tensors' values."""

    def read(self, name: str) -> Tensor:
        """One tensor, in any float type; raises CheckpointError naming file and tensor."""

    def codes(self, name: str) -> Codes | None:
        """A matrix as quantized codes, if that is how the source holds it."""

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    def tokenizer_hash(self) -> bytes:
        """A digest of everything that decides what it does."""

    def let_go(self) -> None:
        """Keep nothing in memory of what was read; it can be read again."""


def open_checkpoint(path: Path, name: str = "") -> "Checkpoint":
    """Open a Hugging Face directory or a `.gguf` file.

    `name` is what people call the model; left out, it follows from the path. Raises
    CheckpointError for what is missing, damaged, not supported or does not fit together.
    """
    if path.is_dir():
        return Checkpoint(HfDirectory(path), name)
    if path.suffix == ".gguf":
        return Checkpoint(GgufLlama(path), name)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    raise CheckpointError(f"{path}: neither a model directory nor a .gguf file")


class Checkpoint:
    """An open model. Its methods may be called from any one thread at a time."""

    def __init__(self, source: TensorSource, name: str = "") -> None:
        self.path = source.path
        self.config = source.config
        self._source = source
        self._name = name or _name_of(source.path)
        self._family = family_of(source.config)
        self._check_names()

    @cached_property
    def model_id(self) -> ModelId:
        """The model's identity; reads no whole tensor."""
        types = self._source.types
        index = {name: [types[name], list(shape)] for name, shape in self._shapes.items()}
        # Fields that a later version adds are absent from today's models: None or False. They
        # must not give them another identity.
        values = self.config.canonical().items()
        config = {key: value for key, value in values if value is not None and value is not False}
        identity = {
            "config": config,
            "tensors": index,
            "tokenizer": self._source.tokenizer_hash().hex(),
            "sample": self._source.sample().hex(),
        }
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return ModelId(hashlib.sha256(text.encode()).digest(), self._name)

    def block_bytes(self, dtype: torch.dtype, scheme: Scheme = Scheme.NONE) -> int:
        """What one block takes in memory; known without reading it.

        In int8, if any of the model's matrices has groups, all are counted so: blocks of a file
        may differ, and the largest counts.
        """
        types = self._source.types.items()
        in_groups = any(kind == "Q8_0" for name, kind in types if ".layers." in name)
        total = 0
        for shape in self._family.block_shapes(self.config).values():
            if scheme is Scheme.NONE or len(shape) == 1:
                total += math.prod(shape) * dtype.itemsize
            else:
                total += num_bytes(shape, scheme, in_groups=in_groups)
        return total

    def block_weights(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors of block `index` by their local names ("self_attn.q_proj.weight", …)."""
        prefix = self._family.block_prefix.format(index)
        return self._read(prefix, self._family.block_shapes(self.config), dtype)

    def quantized_block(
        self, index: int, dtype: torch.dtype, scheme: Scheme, device: torch.device
    ) -> Weights:
        """The same with matrices as codes: the source's own if they have as many bits.

        One matrix at a time is in full precision, while its codes are chosen on `device`.
        """
        prefix = self._family.block_prefix.format(index)
        weights: dict[str, Tensor | Codes] = {}
        for name, shape in self._family.block_shapes(self.config).items():
            if len(shape) == 1:
                weights |= self._read(prefix, {name: shape}, dtype)
                continue
            codes = self._source.codes(prefix + name)
            if codes is None or codes.bits != scheme.bits:
                whole = self._read(prefix, {name: shape}, torch.float32)
                codes = quantize(whole[name].to(device), scheme)
            self._check_shape(prefix + name, codes, shape)
            weights[name] = codes
        return weights

    def edge_weights(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Embedding, final norm and, unless it is tied, the head, by their full names."""
        return self._read("", self._family.edge_shapes(self.config), dtype)

    def let_go(self) -> None:
        """Nobody reads for a while: keep nothing of the files in memory."""
        self._source.let_go()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; takes a moment to build, so keep it."""
        tokenizer = self._source.tokenizer()
        if tokenizer.base_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {tokenizer.base_size} tokens, the model "
                f"{self.config.vocab_size}"
            )
        return tokenizer

    def _read(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        weights = {}
        for name, shape in shapes.items():
            tensor = self._source.read(prefix + name)
            self._check_shape(prefix + name, tensor, shape)
            weights[name] = tensor.to(dtype)
        return weights

    def _check_shape(self, name: str, tensor: Tensor | Codes, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {tuple(tensor.shape)}; by the config it is {shape}"
            )

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors that the model uses, by their full names."""
        shapes = self._family.edge_shapes(self.config)
        in_block = self._family.block_shapes(self.config)
        for index in range(self.config.num_blocks):
            prefix = self._family.block_prefix.format(index)
            shapes |= {prefix + name: shape for name, shape in in_block.items()}
        return shapes

    def _check_names(self) -> None:
        """The source has all tensors of the config, and no further ones in its blocks."""
        present = self._source.types
        # The first block of a config that promises a billion is enough to refuse it.
        if self.config.num_blocks > len(present):
            raise CheckpointError(
                f"{self.path}: {len(present)} tensors for {self.config.num_blocks} blocks"
            )
        if missing := self._shapes.keys() - present.keys():
            raise CheckpointError(f"{self.path}: tensor {_first(missing)} is missing")
        # An unknown tensor in a block, say a norm of the queries, would change every result.
        unknown = {name for name in present.keys() - self._shapes.keys() if _matters(name)}
        if unknown:
            raise CheckpointError(
                f"{self.path}: tensor {_first(unknown)} is not one of a "
                f"{self.config.model_type} model as its config describes it"
            )


def _matters(name: str) -> bool:
    return ".layers." in name and not _IGNORED.search(name)


def _first(names: Iterable[str]) -> str:
    return min(names, key=lambda name: (len(name), name))


def _name_of(path: Path) -> str:
    """A name for people: the Hub repo of a snapshot in its cache, else that of the file."""
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--"):
        name = repo.removeprefix("models--").replace("--", "/")
    else:
        name = path.resolve().name.removesuffix(".gguf")
    return re.sub(r"[^\w./-]", "_", name, flags=re.ASCII)[:MAX_NAME_CHARS]

"""A Hugging Face model directory as a source of tensors: config.json and safetensors files.

Tensors lie in `model.safetensors`, or in shards that `model.safetensors.index.json` lists. A
server of ten blocks needs only the shards that hold them, so absent shards are no error until a
tensor of theirs is asked for, and then it names both.

Files are memory-mapped: reading a tensor touches its pages only. Pickled checkpoints
(`pytorch_model.bin`) are refused, because loading one runs whatever code it holds.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.model.config import ModelConfig
from p2pllm.model.files import (
    INDEX,
    SINGLE,
    read_index,
    read_json,
    safetensors_places,
    sample,
)
from p2pllm.model.tokenizer import Tokenizer, hash_directory, load_tokenizer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HfDirectory:
    """A TensorSource (`p2pllm.model.checkpoint`) over a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path / "config.json")
        try:
            self.config = ModelConfig.from_hf(values)
        except CheckpointError as exc:
            raise CheckpointError(f"{path / 'config.json'}: {exc}") from exc
        self._declared_type = str(values.get("dtype", values.get("torch_dtype")))
        self._open: dict[str, Any] = {}  # shard -> its safe_open handle
        self._shards = self._locate()  # tensor -> shard

    @property
    def types(self) -> Mapping[str, str]:
        """Types of all tensors: the one that the config declares.

        A file's header would say it for each tensor, but only to those who have the file, and
        all servers must see the same.
        """
        return dict.fromkeys(self._shards, self._declared_type)

    def let_go(self) -> None:
        """Close the shards: they are mapped into memory while they are open."""
        self._open.clear()

    def sample(self) -> bytes:
        """A digest of bytes of all tensors, or of what tells sharded models apart without them.

        Not everyone has all shards, but everyone has the config and the index as they were
        written: two fine-tunes seldom share both to the letter.
        """
        path = self.path / SINGLE
        if path.is_file():
            return sample(path, safetensors_places(path))
        digest = hashlib.sha256()
        for name in ("config.json", INDEX):
            try:
                digest.update((self.path / name).read_bytes())
            except OSError as exc:
                raise CheckpointError(f"{self.path / name}: cannot be read ({exc})") from exc
        return digest.digest()

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in the file's type and perhaps a view of the file."""
        shard = self._shards.get(name)
        if shard is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        try:
            tensor: Tensor = self._handle(shard).get_tensor(name)
        except FileNotFoundError as exc:
            raise CheckpointError(
                f"{self.path / shard} is missing, which holds tensor {name}"
            ) from exc
        except (SafetensorError, OSError, RuntimeError, ValueError) as exc:
            raise CheckpointError(f"{self.path / shard}: tensor {name}: {exc}") from exc
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.path / shard}: tensor {name} is {tensor.dtype}, which is not supported"
            )
        return tensor

    def codes(self, name: str) -> None:
        """There are none: quantized checkpoints are refused."""

    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer."""
        return load_tokenizer(self.path)

    def tokenizer_hash(self) -> bytes:
        """A digest of all that it is built from."""
        return hash_directory(self.path)

    def _locate(self) -> dict[str, str]:
        # A single file is whole; an index beside it would be a leftover. So does `transformers`.
        if (self.path / SINGLE).is_file():
            try:
                return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
            except (SafetensorError, OSError) as exc:
                raise CheckpointError(f"{self.path / SINGLE}: {exc}") from exc
        if (self.path / INDEX).is_file():
            return read_index(self.path / INDEX)
        if list(self.path.glob("pytorch_model*.bin*")):
            raise CheckpointError(
                f"{self.path}: holds pickled weights only, which can run any code when loaded; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{self.path}: neither {SINGLE} nor {INDEX} is there")

    def _handle(self, shard: str) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.path / shard, framework="pt")
        return self._open[shard]

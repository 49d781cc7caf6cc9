"""Model files without their tensors: where those are, and a sample of their bytes.

Imports no torch.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pllm.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SAMPLE_BYTES = 64  # of each tensor: two fine-tunes differ in some of a few hundred such places
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


def read_index(path: Path) -> dict[str, str]:
    """Which shard holds each tensor, by a `model.safetensors.index.json`."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path}: weight_map is missing")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path}: tensor {tensor} is in {shard!r}, which is no file name")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {shard} is not a safetensors file")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror})") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: not JSON ({exc})") from exc
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


def sample(path: Path, places: Mapping[str, tuple[int, int]]) -> bytes:
    """A digest of a few bytes from the middle of each tensor, at (start, stop) of a file.

    Enough to tell apart models that differ in their values only, for a few milliseconds.
    Raises CheckpointError if the file ends before a tensor does.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for name, (start, stop) in sorted(places.items()):
                size = min(SAMPLE_BYTES, stop - start)
                file.seek(start + (stop - start - size) // 2)
                data = file.read(size)
                if len(data) < size:
                    raise CheckpointError(f"{path}: truncated inside tensor {name}")
                digest.update(name.encode() + b"\0" + data)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc
    return digest.digest()


def safetensors_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: (start, stop) in bytes of the file."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, _MAX_HEADER_BYTES)))
        base = 8 + size
        return {
            name: (base + int(entry["data_offsets"][0]), base + int(entry["data_offsets"][1]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError) as exc:
        raise CheckpointError(f"{path}: the header is damaged ({exc})") from exc

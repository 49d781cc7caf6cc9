"""Files of a Hugging Face model directory that say where its tensors are. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from p2pllm.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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

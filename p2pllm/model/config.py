"""ModelConfig: what must be known about a model before any of its tensors is read.

It is a Hugging Face `config.json` reduced to the fields that change a result, checked once, so
that whoever holds a ModelConfig need not ask again whether it makes sense. GGUF metadata is first
brought into the same form (`p2pllm.model.gguf`). A setting that we do not compute exactly as
the reference does is refused here: a model that answers slightly wrong is worse than none.

Imports no torch: the command line and the DHT need to name models, not to run them.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from p2pllm.errors import CheckpointError

# Each has an entry in `p2pllm.model.families`; the list stands here, because that imports torch.
MODEL_TYPES = frozenset({"llama", "mistral"})

_MAX_SIZE = 2**31  # of any dimension: far past all models, and far from overflowing anything


class RopeKind(enum.StrEnum):
    """How rotary frequencies are stretched to reach past the pretraining length."""

    LINEAR = "linear"  # positions divided by the factor (arXiv 2306.15595)
    LLAMA3 = "llama3"  # only long wavelengths are divided (Llama 3.1's release notes)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A stretching of the rotary embedding's frequencies.

    `original_max_position`, `low_freq_factor` and `high_freq_factor` matter to LLAMA3 only.
    """

    kind: RopeKind
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of `num_blocks` equal blocks; field names are the literature's."""

    model_type: str
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    sliding_window: int | None = None  # tokens that one can see, itself included
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # any of them ends a text
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not 0 < getattr(self, name) < _MAX_SIZE:
                raise CheckpointError(f"config: {name} is {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config: {self.num_heads} heads do not divide among {self.num_kv_heads} "
                "key/value heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim {self.head_dim} is odd, rotation needs pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise CheckpointError(f"config: sliding_window is {self.sliding_window}")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def canonical(self) -> dict[str, Any]:
        """What a ModelId hashes of the config: every field that changes a block's result.

        Token ids are left out: they belong to the tokenizer, and servers never see them.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TOKEN_IDS}
        scaling = self.rope_scaling
        if scaling is not None:
            values["rope_scaling"] = {
                "kind": scaling.kind.value,
                **{f.name: getattr(scaling, f.name) for f in fields(scaling) if f.name != "kind"},
            }
        return values

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a `config.json`.

        Raises CheckpointError for a missing or senseless field, and for what is not supported.
        """
        model_type = _get(values, "model_type", str)
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config: model_type {model_type!r} is not supported; "
                f"{', '.join(sorted(MODEL_TYPES))} are"
            )
        if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise CheckpointError(f"config: hidden_act {activation!r} is not supported; silu is")
        if values.get("quantization_config"):
            raise CheckpointError("config: a quantized checkpoint; use the original or a GGUF file")
        hidden_size, num_heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
        is_mistral = model_type == "mistral"
        rope_theta, rope_scaling = _rope(values)
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            num_blocks=_size(values, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_size(values, "num_key_value_heads", num_heads),
            head_dim=_size(values, "head_dim", hidden_size // num_heads),
            intermediate_size=_size(values, "intermediate_size"),
            vocab_size=_size(values, "vocab_size"),
            max_position=_size(values, "max_position_embeddings", 2048),
            norm_eps=_number(values, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=_flag(values, "tie_word_embeddings"),
            attention_bias=not is_mistral and _flag(values, "attention_bias"),
            mlp_bias=not is_mistral and _flag(values, "mlp_bias"),
            # Llama's files may carry the field, and the reference ignores it there.
            sliding_window=_optional_size(values, "sliding_window") if is_mistral else None,
            bos_id=next(iter(_ids(values, "bos_token_id")), None),
            eos_ids=_ids(values, "eos_token_id"),
            pad_id=next(iter(_ids(values, "pad_token_id")), None),
        )


_SIZES = (
    "hidden_size",
    "num_blocks",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position",
)
_TOKEN_IDS = ("bos_id", "eos_ids", "pad_id")


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling; `rope_parameters` (transformers 5) holds both, older files split them."""
    nested = values.get("rope_parameters") or {}
    scaling = nested or values.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError("config: the rotary embedding's parameters are not a mapping")
    theta = _number(values, "rope_theta", 10_000.0)
    if "rope_theta" in scaling:
        theta = _number(scaling, "rope_theta", theta)
    if _number(scaling, "partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config: a partial rotary embedding is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in (RopeKind.LINEAR, RopeKind.LLAMA3):
        raise CheckpointError(f"config: rope scaling {kind!r} is not supported; linear, llama3 are")
    factor = _number(scaling, "factor")
    if kind == RopeKind.LINEAR:
        return theta, RopeScaling(RopeKind.LINEAR, factor)
    result = RopeScaling(
        RopeKind.LLAMA3,
        factor,
        original_max_position=_size(scaling, "original_max_position_embeddings"),
        low_freq_factor=_number(scaling, "low_freq_factor"),
        high_freq_factor=_number(scaling, "high_freq_factor"),
    )
    if not result.low_freq_factor < result.high_freq_factor:
        raise CheckpointError("config: llama3 rope scaling needs low_freq < high_freq factors")
    return theta, result


def _get(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if not isinstance(value, kind):
        raise CheckpointError(f"config: {name} is {value!r}, {kind.__name__} expected")
    return value


def _size(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value < _MAX_SIZE:
        raise CheckpointError(f"config: {name} is {value!r}, a positive integer is expected")
    return value


def _optional_size(values: Mapping[str, Any], name: str) -> int | None:
    return None if values.get(name) is None else _size(values, name)


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config: {name} is {value!r}, a positive number is expected")
    return float(value)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    return bool(values.get(name, False))


def _ids(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"config: {name} is {value!r}, token ids are expected")
    return tuple(ids)

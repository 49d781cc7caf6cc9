from typing import Any

import pytest

from p2pllm.errors import CheckpointError
from p2pllm.model.config import MODEL_TYPES, ModelConfig, RopeKind, RopeScaling
from p2pllm.model.families import family_of

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = RopeScaling(RopeKind.LLAMA3, 8.0, 8192, 1.0, 4.0)


def test_a_config_json_is_read() -> None:
    config = ModelConfig.from_hf(SMOLLM2)
    assert (config.hidden_size, config.num_blocks, config.head_dim) == (576, 30, 64)
    assert (config.num_heads, config.num_kv_heads, config.group_size) == (9, 3, 3)
    assert (config.rope_theta, config.rope_scaling) == (100000.0, None)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), None)
    assert config.tie_embeddings


def test_several_end_tokens_are_kept() -> None:
    assert ModelConfig.from_hf(SMOLLM2 | {"eos_token_id": [2, 7]}).eos_ids == (2, 7)


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_scaling": LLAMA3_ROPE}, 100000.0, LLAMA3),
        ({"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}, 5e5, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e5, RopeScaling(RopeKind.LINEAR, 2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7}}, 7.0, None),
    ],
)
def test_rope_is_read_in_the_forms_of_all_versions(
    fields: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    config = ModelConfig.from_hf(SMOLLM2 | fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_only_mistral_has_a_sliding_window() -> None:
    window = {"sliding_window": 4096}
    assert ModelConfig.from_hf(SMOLLM2 | window).sliding_window is None
    assert ModelConfig.from_hf(SMOLLM2 | window | {"model_type": "mistral"}).sliding_window == 4096


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; llama, mistral are"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": "576"}, "hidden_size is '576'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_key_value_heads": 4}, "9 heads do not divide among 4"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq < high_freq"),
        ({"rope_scaling": [1]}, "not a mapping"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_what_is_not_supported_or_senseless_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(SMOLLM2 | fields)


def test_the_canonical_form_tells_results_apart_and_nothing_else() -> None:
    config = ModelConfig.from_hf(SMOLLM2)
    same = ModelConfig.from_hf(SMOLLM2 | {"eos_token_id": 5, "torch_dtype": "bfloat16"})
    other = ModelConfig.from_hf(SMOLLM2 | {"rope_scaling": LLAMA3_ROPE})
    assert config.canonical() == same.canonical()
    assert config.canonical() != other.canonical()
    assert other.canonical()["rope_scaling"]["kind"] == "llama3"


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_every_model_type_has_a_family(model_type: str) -> None:
    config = ModelConfig.from_hf(SMOLLM2 | {"model_type": model_type})
    assert "self_attn.q_proj.weight" in family_of(config).block_shapes(config)

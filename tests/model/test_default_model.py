"""The default model itself, as everybody gets it: config, identity, tokenizer.

`tests/vectors/smollm2_135m_greedy.json` was made with transformers from the same file, all
weights dequantized to float32.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from p2pllm.model.checkpoint import Checkpoint, open_checkpoint
from p2pllm.model.config import ModelConfig
from p2pllm.model.hub import BUILT_IN, DEFAULT_MODEL, resolve_model
from p2pllm.model.tokenizer import Tokenizer

VECTORS = Path(__file__).parent.parent / "vectors" / "smollm2_135m_greedy.json"
CASES: list[dict[str, Any]] = json.loads(VECTORS.read_text())["cases"]

# Fetching may take minutes the first time; afterwards these tests take under a second.
pytestmark = pytest.mark.slow(300)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(resolve_model())


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return checkpoint.tokenizer()


def test_the_file_is_the_one_that_was_published(checkpoint: Checkpoint) -> None:
    model = BUILT_IN[DEFAULT_MODEL]
    content = checkpoint.path.read_bytes()
    assert len(content) == model.num_bytes
    assert hashlib.sha256(content).hexdigest() == model.sha256


def test_its_config_is_that_of_smollm2(checkpoint: Checkpoint) -> None:
    assert checkpoint.config == ModelConfig(
        model_type="llama",
        hidden_size=576,
        num_blocks=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49_152,
        max_position=8192,
        norm_eps=9.999999747378752e-06,  # 1e-5 in float32, as GGUF holds it
        rope_theta=100_000.0,
        tie_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
        pad_id=2,
    )


def test_its_identity_never_changes(checkpoint: Checkpoint) -> None:
    # Servers and clients of all versions must agree on it, or they do not find each other.
    assert checkpoint.model_id.digest.hex() == (
        "e1ad52583462a8d90437f9a66eec5d6943af6f0a2a56f35527ad41934f0c3408"
    )
    assert checkpoint.model_id.name == "smollm2-135m"


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["prompt"][:20]))
def test_prompts_give_the_reference_ids(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
    assert tokenizer.decode(case["prompt_ids"], skip_special=False) == case["prompt"]
    assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]


@pytest.mark.parametrize("case", [case for case in CASES if case["messages"]])
def test_chats_give_the_reference_ids(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.render_chat(case["messages"]) == case["prompt"]
    assert tokenizer.encode_chat(case["messages"]) == case["prompt_ids"]


def test_its_end_of_text_is_known(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {2}
    assert tokenizer.decode([2], skip_special=False) == "<|im_end|>"

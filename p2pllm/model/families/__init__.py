"""Model families: what a `model_type` calls its tensors, and how they become a block.

A family is one small file with a `Family` value. To add one: write the file, list it in
`_FAMILIES`, and its model types in `p2pllm.model.config.MODEL_TYPES`.
"""

from p2pllm.errors import CheckpointError
from p2pllm.model.config import ModelConfig
from p2pllm.model.families.family import Family
from p2pllm.model.families.llama import LLAMA

_FAMILIES = {"llama": LLAMA, "mistral": LLAMA}


def family_of(config: ModelConfig) -> Family:
    """The family of a model; raises CheckpointError for one that we have no code for."""
    try:
        return _FAMILIES[config.model_type]
    except KeyError:
        raise CheckpointError(f"no code for models of type {config.model_type!r}") from None

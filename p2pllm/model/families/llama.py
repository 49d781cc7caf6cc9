"""Llama 1 to 3.x (arXiv 2302.13971, 2407.21783), SmolLM, and Mistral (arXiv 2310.06825).

They share tensor names and blocks; rope scaling, biases, grouping of heads and Mistral's sliding
window are settings of the config.
"""

import torch
from torch import Tensor

from p2pllm.model.block import Block
from p2pllm.model.config import ModelConfig
from p2pllm.model.families.family import Family, Shapes, Weights
from p2pllm.model.layers import RmsNorm
from p2pllm.model.quantized_linear import Projection, projection


def _block_shapes(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    biased = "qkvo" * config.attention_bias
    names = [f"self_attn.{letter}_proj" for letter in biased]
    names += [f"mlp.{name}_proj" for name in ("gate", "up", "down") if config.mlp_bias]
    shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in names}
    return shapes


def _build_block(config: ModelConfig, weights: Weights) -> Block:
    return Block(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        attention_norm=RmsNorm(_vector(weights, "input_layernorm.weight"), config.norm_eps),
        qkv=_fused(weights, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=_fused(weights, "self_attn.o_proj"),
        mlp_norm=RmsNorm(_vector(weights, "post_attention_layernorm.weight"), config.norm_eps),
        gate_up=_fused(weights, "mlp.gate_proj", "mlp.up_proj"),
        down=_fused(weights, "mlp.down_proj"),
    )


def _fused(weights: Weights, *names: str) -> Projection:
    """Layers that read the same input, as one. They have biases all or none."""
    bias = None
    if f"{names[0]}.bias" in weights:
        bias = torch.cat([_vector(weights, f"{name}.bias") for name in names])
    return projection([weights[f"{name}.weight"] for name in names], bias)


def _vector(weights: Weights, name: str) -> Tensor:
    """A gain or a bias, which nobody quantizes."""
    vector = weights[name]
    assert isinstance(vector, Tensor)
    return vector


LLAMA = Family(
    block_prefix="model.layers.{}.",
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    block_shapes=_block_shapes,
    build_block=_build_block,
)

"""The baseline in a process of its own: the same model, whole, in `transformers`.

    python _local.py DTYPE

Prints "ready"; then for every line "NUM_TOKENS" on standard input, the seconds per token of a
greedy generation of so many tokens (the prompt not counted in).
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.hub import resolve_model

PROMPT = "The capital of France is"


def load(dtype: torch.dtype) -> tuple[LlamaForCausalLM, torch.Tensor]:
    checkpoint = open_checkpoint(resolve_model())
    config = checkpoint.config
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_blocks,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    weights = dict(checkpoint.edge_weights(dtype))
    for index in range(config.num_blocks):
        for name, tensor in checkpoint.block_weights(index, dtype).items():
            weights[f"model.layers.{index}.{name}"] = tensor
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval(), torch.tensor([checkpoint.tokenizer().encode(PROMPT)])


@torch.inference_mode()
def seconds_per_token(model: LlamaForCausalLM, prompt: torch.Tensor, num_tokens: int) -> float:
    """The time of num_tokens + 1 tokens less that of 1 token, per token."""
    times = []
    for count in (1, num_tokens + 1):
        started = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
        times.append(time.perf_counter() - started)
    return (times[1] - times[0]) / num_tokens


def main() -> None:
    model, prompt = load(getattr(torch, sys.argv[1]))
    seconds_per_token(model, prompt, 4)
    print("ready", flush=True)
    for line in sys.stdin:
        print(seconds_per_token(model, prompt, int(line)), flush=True)


if __name__ == "__main__":
    main()

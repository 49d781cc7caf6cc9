"""The baseline in a process of its own: the same model, whole, in `transformers`.

    python -m benchmarks._local '"bfloat16"'

`decode` is a greedy generation, `prefill` a prompt up to its last token's logits, `forward` what
training reads: all blocks over a batch, without a cache.
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._program import answer
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


class Clock:
    """A streamer, as `generate` calls them, that notes when each token came."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        """The prompt, then every token."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """There is nothing to do."""


@torch.inference_mode()
def seconds_per_token(model: LlamaForCausalLM, prompt: torch.Tensor, num_tokens: int) -> float:
    """Of so many tokens after the first one."""
    clock = Clock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=num_tokens + 1,
        max_new_tokens=num_tokens + 1,
        streamer=clock,
    )
    return (clock.moments[-1] - clock.moments[1]) / num_tokens


def random_ids(model: LlamaForCausalLM, batch: int, num_tokens: int) -> torch.Tensor:
    """Prompts (B, T) for which only their length counts."""
    return torch.randint(100, model.config.vocab_size, (batch, num_tokens))


@torch.inference_mode()
def seconds_of_prefill(model: LlamaForCausalLM, prompt_tokens: int) -> float:
    """A prompt into a new cache, and the logits of its last token."""
    ids = random_ids(model, 1, prompt_tokens)
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


@torch.inference_mode()
def seconds_of_forward(model: LlamaForCausalLM, batch: int, prompt_tokens: int) -> float:
    """All blocks over a batch, without cache and head."""
    ids = random_ids(model, batch, prompt_tokens)
    started = time.perf_counter()
    model.model(ids, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    model, prompt = load(getattr(torch, json.loads(sys.argv[1])))
    seconds_per_token(model, prompt, 4)

    def decode(tokens: int, prompt_tokens: int) -> float:
        return seconds_per_token(model, random_ids(model, 1, prompt_tokens), tokens)

    def prefill(prompt_tokens: int) -> float:
        return seconds_of_prefill(model, prompt_tokens)

    def forward(batch: int, prompt_tokens: int) -> float:
        return seconds_of_forward(model, batch, prompt_tokens)

    answer({}, {"decode": decode, "prefill": prefill, "forward": forward})


if __name__ == "__main__":
    main()

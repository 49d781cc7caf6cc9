"""From logits to a token: greedy, top-k, top-p, with draws that depend on nothing else.

A sampled token is a function of (seed, sequence, position) and the logits. The uniform number of a
draw is a hash of those three, not the next output of a generator, so it does not matter in which
batch, in which order or how often a position is computed: after a recovery, a rollback or a
resumed session the same token comes out.

Order of filters as in `transformers`: banned ids, temperature, top-k, top-p. Penalties and biases
are not this module's business; they change logits before it is asked.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pllm.errors import ConfigError

_DRAW_BITS = 53  # what a float64 in [0, 1) holds
# A nucleus is first looked for among this many tokens: sorting a vocabulary takes 10 ms, this 0.1.
_NUCLEUS_GUESS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy."""

    temperature: float = 0.0  # 0: the most probable token
    top_k: int = 0  # only that many most probable ones; 0: all
    top_p: float = 1.0  # only the fewest whose probabilities reach this
    seed: int = 0
    banned_ids: tuple[int, ...] = ()  # never chosen: the end of text, where it is to be ignored

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature}; 0 (greedy) or more is possible")
        if self.top_k < 0:
            raise ConfigError(f"top-k {self.top_k}; 1 or more is possible, or 0 for all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top-p {self.top_p}; above 0 and up to 1 is possible")


@dataclass(frozen=True, slots=True)
class Draw:
    """Which choice is made: of the token at `position` of sequence number `sequence`."""

    sequence: int
    position: int


def sample(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[Draw]) -> list[int]:
    """Choose one token for each row of logits (B, V), float32; each row by its own params.

    Greedy takes the lowest id of equal logits. What a row draws does not depend on the others.
    """
    assert len(logits) == len(params) == len(draws)
    logits = _without_banned(logits, params)
    greedy = [row for row, each in enumerate(params) if each.temperature == 0.0]
    best = _argmax(logits if len(greedy) == len(params) else logits[greedy])
    tokens = dict(zip(greedy, best, strict=True))
    return [
        tokens[row] if row in tokens else _draw(_probabilities(logits[row], each), each, draw)
        for row, (each, draw) in enumerate(zip(params, draws, strict=True))
    ]


def uniform(seed: int, draw: Draw) -> float:
    """The number in [0, 1) that belongs to one draw."""
    text = f"{seed}/{draw.sequence}/{draw.position}".encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"p2pllm/draw").digest()
    return (int.from_bytes(digest, "big") >> (64 - _DRAW_BITS)) / (1 << _DRAW_BITS)


def _argmax(logits: Tensor) -> list[int]:
    """Of each row; both torch and numpy promise the first of equal maxima."""
    # A vocabulary takes numpy 3 µs, torch 26 (and 160 in bfloat16, from which float32 costs 4).
    best = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)
    tokens: list[int] = best.tolist()
    return tokens


def _without_banned(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    rows = [row for row, each in enumerate(params) for _ in each.banned_ids]
    if not rows:
        return logits
    ids = [token for each in params for token in each.banned_ids]
    banned = logits.new_full((), -math.inf)
    return logits.index_put((torch.tensor(rows), torch.tensor(ids)), banned)


def _probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Of one row (V,), in float64."""
    # The maximum is taken off first: a small temperature would make the logits infinite.
    logits = logits.double()
    return ((logits - logits.amax()) / params.temperature).softmax(-1)


def _draw(probs: Tensor, params: SamplingParams, draw: Draw) -> int:
    """The token whose part of the cumulative distribution the draw's number falls in."""
    kept, ids = _filter(probs, params)
    reached = kept.cumsum(-1)
    point = uniform(params.seed, draw) * float(reached[-1])
    index = int(torch.searchsorted(reached, point, right=True))
    return int(ids[min(index, len(ids) - 1)])


def _filter(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn: probabilities (not normalised again) and ids."""
    vocabulary = len(probs)
    if params.top_k == 0 and params.top_p == 1.0:
        return probs, torch.arange(vocabulary, device=probs.device)
    if params.top_k:
        kept, ids = probs.topk(min(params.top_k, vocabulary))
    else:
        kept, ids = probs.topk(min(_NUCLEUS_GUESS, vocabulary))
        if float(kept.sum()) < params.top_p:
            kept, ids = probs.sort(descending=True)
    if params.top_p < 1.0:
        # The nucleus ends with the first token that reaches top_p (arXiv 1904.09751), of what
        # top-k has left.
        total = kept.sum() if params.top_k else 1.0
        stop = int(torch.searchsorted(kept.cumsum(-1), params.top_p * float(total))) + 1
        kept, ids = kept[:stop], ids[:stop]
    return kept, ids

"""Whole sequences through some blocks, without a cache: what training and scoring ask for.

The blocks are those that serve sessions. The sequences of a batch lie packed, one behind the other
and without padding, as (sum of lengths, D); each begins at position 0 and looks at itself only.
Nothing is kept afterwards.

A pass is a generator, which goes on by one *piece* (some tokens through one block) each time, and
yields how many tokens that were: whoever drives it can let the device do something else in
between, and nobody waits longer than for a piece. How a batch is divided follows from its lengths
alone, never from what else there is to do: the same batch gives the same bits on like hardware.

    group     neighbouring sequences, GROUP_TOKENS together at most, go through all blocks before
              the next group does
    stretch   of a sequence that is longer: in each block GROUP_TOKENS of its queries at a time,
              over all keys and values up to there

Not here: gradients. Whoever wants them computes this again with autograd.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.block import Block
from p2pllm.model.config import ModelConfig
from p2pllm.model.kv_cache import MAX_SCORES
from p2pllm.model.layers import RotaryEmbedding

# Products of more tokens are quicker: SmolLM2-135M's blocks on two busy cores, in tokens/s for
# groups of 256, 512 and 1024: 641, 730, 840 in float32; 920, 1002, 1272 in bfloat16. A block of
# this many takes about 40 ms in float32.
GROUP_TOKENS = 1024

Pass = Generator[int, None, Tensor]
"""Yields the tokens of each piece; returns the outputs (N, D)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a block's heads are divided, and how far they look back."""

    kv_heads: int
    group: int  # query heads that share one of keys and values
    window: int | None

    @classmethod
    def of(cls, config: ModelConfig) -> "Shape":
        """That of a model."""
        return cls(config.num_kv_heads, config.group_size, config.sliding_window)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring sequences of one length in a group: attention takes them together.

    `bias` (T, T): 0 where a token may look, -inf elsewhere; None: at all before it.
    """

    rows: slice
    count: int
    length: int
    bias: Tensor | None


def forward_pass(
    blocks: Sequence[Block],
    rotary: RotaryEmbedding,
    shape: Shape,
    hidden: Tensor,
    lengths: Sequence[int],
) -> Pass:
    """Run packed sequences through blocks; hidden: (sum of lengths, D), not changed.

    Raises LocalProtocolError, at once, for lengths that do not fit.
    """
    if sum(lengths) != len(hidden) or min(lengths, default=0) < 1:
        raise LocalProtocolError(f"{len(hidden)} tokens in sequences of {list(lengths)}")
    return _run(blocks, rotary, shape, hidden, lengths)


def groups_of(lengths: Sequence[int], limit: int) -> Iterator[Sequence[int]]:
    """Divide sequences, in order, into groups of up to `limit` tokens; longer ones stand alone."""
    start, total = 0, 0
    for index, length in enumerate(lengths):
        if index > start and total + length > limit:
            yield lengths[start:index]
            start, total = index, 0
        total += length
    if lengths:
        yield lengths[start:]


def _run(
    blocks: Sequence[Block],
    rotary: RotaryEmbedding,
    shape: Shape,
    hidden: Tensor,
    lengths: Sequence[int],
) -> Pass:
    outputs, start = torch.empty_like(hidden), 0
    for group in groups_of(lengths, GROUP_TOKENS):
        rows = slice(start, start + sum(group))
        through = _long if rows.stop - start > GROUP_TOKENS else _group
        outputs[rows] = yield from through(blocks, rotary, shape, hidden[rows], group)
        start = rows.stop
    return outputs


def _group(
    blocks: Sequence[Block],
    rotary: RotaryEmbedding,
    shape: Shape,
    hidden: Tensor,
    lengths: Sequence[int],
) -> Pass:
    """A group of sequences through all blocks."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    rotation = rotary.at(positions.to(hidden.device), hidden.dtype)
    runs = list(_runs(lengths, shape, hidden))
    for block in blocks:
        hidden = block.forward(hidden, rotation, partial(_attend_runs, runs, shape))
        yield _done(hidden)
    return hidden


def _long(
    blocks: Sequence[Block],
    rotary: RotaryEmbedding,
    shape: Shape,
    hidden: Tensor,
    lengths: Sequence[int],
) -> Pass:
    """One long sequence through all blocks, stretch by stretch in each."""
    (length,) = lengths
    starts = range(0, length, GROUP_TOKENS)
    stretches = [slice(start, min(start + GROUP_TOKENS, length)) for start in starts]
    positions = torch.arange(length, device=hidden.device)
    rotations = [rotary.at(positions[rows], hidden.dtype) for rows in stretches]
    biases = [_bias(rows, shape.window, hidden) for rows in stretches]
    for block in blocks:
        cached: list[Tensor] = []  # (t, 2 · Hkv, d) of the stretches so far
        outputs = torch.empty_like(hidden)
        for rows, rotation, bias in zip(stretches, rotations, biases, strict=True):
            attend = partial(_attend_stretch, cached, bias, shape)
            outputs[rows] = block.forward(hidden[rows], rotation, attend)
            yield _done(outputs[rows])
        hidden = outputs
    return hidden


def _done(piece: Tensor) -> int:
    """The tokens of a piece, when it is computed: a GPU's queue would hold up who comes next."""
    if piece.is_cuda:
        torch.cuda.current_stream(piece.device).synchronize()
    return len(piece)


# --- attention -----------------------------------------------------------------------------


def _runs(lengths: Sequence[int], shape: Shape, like: Tensor) -> Iterator[_Run]:
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        rows = slice(start, start + count * length)
        is_limited = shape.window is not None and length > shape.window
        is_product = _is_product(shape, length, like)
        bias = None
        if is_limited or is_product:
            bias = _bias(slice(0, length), shape.window, like)
        yield _Run(rows, count, length, bias)
        start = rows.stop


def _bias(rows: slice, window: int | None, like: Tensor) -> Tensor:
    """(t, S): which of the tokens 0 to rows.stop those of `rows` may look at, as numbers to add."""
    queries = torch.arange(rows.start, rows.stop)[:, None]
    keys = torch.arange(rows.stop)
    unseen = keys > queries
    if window is not None:
        unseen |= keys <= queries - window
    bias = torch.zeros(unseen.shape, dtype=like.dtype)
    return bias.masked_fill_(unseen, -math.inf).to(like.device)


def _is_product(shape: Shape, length: int, like: Tensor) -> bool:
    """Are two plain products faster than torch's fused attention?

    On the CPU in 16 bits, for scores that fit into a core's cache: 0.9 µs a token instead of 3.9,
    for 8 sequences of 128 and the default model's heads.
    """
    is_half = like.dtype is not torch.float32 and like.device.type == "cpu"
    return is_half and shape.kv_heads * shape.group * length * length <= MAX_SCORES


def _attend_runs(runs: Sequence[_Run], shape: Shape, qkv: Tensor) -> Tensor:
    """qkv: (N, Hq + 2 · Hkv, d) of a group.  Returns (N, Hq · d)."""
    if len(runs) == 1:
        return _attend_run(qkv, runs[0], shape)
    num_queries = shape.kv_heads * shape.group
    out = qkv.new_empty(len(qkv), num_queries * qkv.shape[-1])
    for run in runs:
        out[run.rows] = _attend_run(qkv[run.rows], run, shape)
    return out


def _attend_run(qkv: Tensor, run: _Run, shape: Shape) -> Tensor:
    """qkv: (B · T, Hq + 2 · Hkv, d).  Returns (B · T, Hq · d)."""
    by_head = qkv.view(run.count, run.length, -1, qkv.shape[-1]).transpose(1, 2)  # (B, H, T, d)
    sizes = [shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads]
    queries, keys, values = by_head.split(sizes, dim=1)
    if run.bias is not None and _is_product(shape, run.length, qkv):
        out = _product(queries, keys, values, run.bias, shape)
    else:
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=run.bias, is_causal=run.bias is None, enable_gqa=True
        )
    return out.transpose(1, 2).reshape(len(qkv), -1)


def _product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shape: Shape) -> Tensor:
    """q: (B, Hq, T, d); k, v: (B, Hkv, T, d); bias: (T, T).  Returns (B, Hq, T, d)."""
    batch, _, length, width = q.shape
    folded = q.reshape(batch * shape.kv_heads, shape.group * length, width)
    keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
    seen = bias.repeat(shape.group, 1)  # (group · T, T)
    scores = torch.baddbmm(seen, folded, keys.transpose(1, 2), alpha=1 / math.sqrt(width))
    return torch.bmm(scores.softmax(-1), values).view(q.shape)


def _attend_stretch(cached: list[Tensor], bias: Tensor, shape: Shape, qkv: Tensor) -> Tensor:
    """Attend from the next stretch to all so far; qkv: (t, Hq + 2 · Hkv, d), added to `cached`."""
    num_queries = shape.kv_heads * shape.group
    cached.append(qkv[:, num_queries:])
    if len(cached) > 1:
        cached[:] = [torch.cat(cached)]
    keys, values = cached[0].transpose(0, 1)[None].chunk(2, dim=1)  # (1, Hkv, S, d) each
    queries = qkv[:, :num_queries].transpose(0, 1)[None]  # (1, Hq, t, d)
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=bias, enable_gqa=True
    )  # (1, Hq, t, d)
    return out[0].transpose(0, 1).reshape(len(qkv), -1)

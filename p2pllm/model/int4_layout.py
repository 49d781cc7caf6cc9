"""How the fused int4 product lays out its weights, and how its work is divided.

Tensors and numbers only; the kernels are those of `p2pllm.model.int4_triton`.

**Codes.** Inputs are cut into runs of 128, four groups of 32. One int16 holds four codes: input i
of each of the four groups of a run, the first group's in the lowest bits. So the codes of a group
are one nibble of 32 words side by side: a shift and a mask of a tile of words give the tile of one
group, inputs in order, in which every row has one scale. Nothing is interleaved, and no input
permuted. The words of a run are (out, 32), one run after the other: a program that takes some
outputs of a run reads one piece of memory.

Nibbles are unsigned, code + 8: OR-ed into the low bits of bfloat16's 128.0 they are 128 + nibble.

**Scales.** Scale and centre of a group, two bfloat16, are one int32: (in / 32, out).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pllm.model.quantize import GROUP

RUN = 128  # inputs: the four nibbles of a word, times a group
NARROWEST = 128  # outputs of the narrowest tile
PACKED_AT_ONCE = 2**24  # codes, a byte each: packing takes a few times that beside them
MIN_RUNS = 4  # that a program should sum, or starting it takes longer
# Rows up to which the fused product is the faster one on an H100; beyond, weights in bfloat16.
MAX_ROWS = 512
# Products of so many rows compile all that any number of rows needs: each tiling, with its inputs
# divided and, where that depends on the number, not.
WARM_UP_ROWS = (8, 16, 32, 64, 128, MAX_ROWS, MAX_ROWS + 1)


def fits(num_outputs: int, num_inputs: int) -> bool:
    """Whether a matrix of this size can be laid out so."""
    return num_outputs % NARROWEST == 0 and num_inputs % RUN == 0


def pack_codes(codes: Tensor) -> Tensor:
    """(out, in) int8, -8 … 7, as (in / 128, out, 32) int16."""
    num_outputs, num_inputs = codes.shape
    packed = codes.new_empty((num_inputs // RUN, num_outputs, GROUP), dtype=torch.int16)
    at_once = max(1, PACKED_AT_ONCE // num_inputs)
    for part, target in zip(codes.split(at_once), packed.split(at_once, dim=1), strict=True):
        groups = (part.view(-1, num_inputs // RUN, 4, GROUP) + 8).view(torch.uint8)
        a, b, c, d = groups.unbind(2)  # (n, in / 128, 32) each
        words = torch.stack((a | b << 4, c | d << 4), dim=-1).view(torch.int16)  # little-endian
        target.copy_(words.squeeze(-1).transpose(0, 1))
    return packed


def unpack_codes(packed: Tensor) -> Tensor:
    """What `pack_codes` packed: (out, in) int8."""
    num_runs, num_outputs, _ = packed.shape
    nibbles = torch.stack([packed >> shift & 15 for shift in (0, 4, 8, 12)], dim=2) - 8
    return nibbles.permute(1, 0, 2, 3).reshape(num_outputs, num_runs * RUN).to(torch.int8)


def pack_scales(scales: Tensor, centres: Tensor) -> Tensor:
    """(out, G) bfloat16 each, as (G, out) int32: the scale in the low half."""
    pairs = torch.stack((scales.T, centres.T), dim=-1).contiguous()
    return pairs.view(torch.int32).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut: a program computes `rows` × `outputs`, over `runs` of the inputs' runs.

    warps, stages: Triton's num_warps, and for how many runs weights are on their way at a time.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    runs: int


def tiles_for(num_rows: int, num_outputs: int, num_runs: int, num_processors: int) -> Tiles:
    """The tiling of a product, by a fixed table: the best of a sweep on an H100.

    Where tiles are too few for the device, inputs are divided as well, into as many parts as run
    at once, `programs` on each processor: one program more than that, and all wait for it.
    """
    if num_rows <= 16:  # two warps: the tensor cores' older instructions, which wait less
        rows, outputs, warps, stages, programs = 8 if num_rows <= 8 else 16, 128, 2, 4, 2
    elif num_rows <= 64:
        rows, outputs, warps, stages, programs = 32 if num_rows <= 32 else 64, 128, 4, 3, 3
        if rows == 64 and num_outputs > outputs * programs * num_processors:
            stages = 2  # smaller programs, of which more run at once
    else:  # wide tiles read the input less often
        rows, outputs, warps, stages, programs = 128, 256, 8, 3, 1
    if num_outputs % outputs:
        outputs, warps = outputs // 2, warps // 2
    num_tiles = -(-num_rows // rows) * (num_outputs // outputs)
    num_splits = max(1, min(programs * num_processors // num_tiles, num_runs // MIN_RUNS))
    return Tiles(rows, outputs, warps, stages, -(-num_runs // num_splits))

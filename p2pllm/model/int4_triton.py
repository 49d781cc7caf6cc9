"""The fused int4 product on a GPU, in Triton. Imported only where Triton is installed.

Torch's own kernel for it, tinygemm, is made for few rows: of 64 it takes 14 times as long as of
one. This one reads the weights once for up to 128 rows, and takes about the time of reading them
for up to 32. What it reads is described in `p2pllm.model.int4_layout`.

A program computes outputs × rows, that is, the product's transpose: the tensor cores take their
first operand from registers, which is where weights are when they have been dequantized, and the
input is the second, which comes from shared memory as it is. Weights are rounded to bfloat16, sums
are float32. Where outputs are too few to occupy the device, several programs divide the inputs
among them, and a second kernel adds up what they found, always in the same order: no atomics, so
the same product gives the same bits.

Beyond `MAX_ROWS` the arithmetic is what takes time, and cuBLAS is better at that: some outputs at a
time, weights are expanded to bfloat16 for the moment of the product.

Nothing waits for the device and all memory is torch's, so that calls can be captured in a graph.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2pllm.model.int4_layout import (
    MAX_ROWS,
    RUN,
    WARM_UP_ROWS,
    Tiles,
    pack_codes,
    pack_scales,
    tiles_for,
)
from p2pllm.model.quantize import Codes

ADDED_AT_ONCE = 1024  # outputs of a program that adds up
EXPANDED_BYTES = 256 * 2**20  # of weights at a time
EXPANDED_OUTPUTS = 64  # of a program that expands

# Two words to four pairs of bfloat16: (128 + nibble) - 136, exact, times scale, plus centre.
# 15 instructions for 8 weights; with Triton's own conversions `_expand` has twice as many in all.
# (fma, not sub: before sm_90 there is no sub of pairs.)
DEQUANTIZE = tl.constexpr(
    """{
    .reg .b32 word, one, offset;
    mov.b32 one, 0x3f803f80;
    mov.b32 offset, 0xc308c308;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
    shr.b32 word, $4, 4;
    lop3.b32 $1, word, 0x000f000f, 0x43004300, 0xea;
    shr.b32 word, $4, 8;
    lop3.b32 $2, word, 0x000f000f, 0x43004300, 0xea;
    shr.b32 word, $4, 12;
    lop3.b32 $3, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, $0, one, offset;
    fma.rn.bf16x2 $1, $1, one, offset;
    fma.rn.bf16x2 $2, $2, one, offset;
    fma.rn.bf16x2 $3, $3, one, offset;
    fma.rn.bf16x2 $0, $0, $5, $9;
    fma.rn.bf16x2 $1, $1, $6, $10;
    fma.rn.bf16x2 $2, $2, $7, $11;
    fma.rn.bf16x2 $3, $3, $8, $12;
    }"""
)
REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r")


@dataclass(frozen=True, slots=True)
class FusedInt4Linear:
    """`packed`, `scales` as in `int4_layout`; with `num_planes` 2, (2 · in) of them: see `pack`."""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    num_planes: int

    @classmethod
    def pack(cls, codes: Codes, bias: Tensor | None, num_inputs: int) -> "FusedInt4Linear":
        """Lay out 4-bit codes in groups of 32, and compile the kernels: never in a request.

        Codes may have as many inputs as several planes side by side. Sizes have to fit.
        """
        packed, scales = pack_codes(codes.codes), pack_scales(codes.scales, codes.centres)
        layer = cls(packed, scales, bias, codes.shape[1] // num_inputs)
        if packed.is_cuda:
            for num_rows in WARM_UP_ROWS:
                layer(codes.scales.new_zeros((num_rows, num_inputs)))
        return layer

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, in) bfloat16.  Returns (N, out)."""
        num_rows, x = x.shape[0], x.contiguous()
        with torch.cuda.device_of(x):
            if num_rows > MAX_ROWS:
                return self._expanded(x)
            num_runs, num_outputs, _ = self.packed.shape
            return self.multiply(
                x, tiles_for(num_rows, num_outputs, num_runs, _num_processors(x.device))
            )

    def multiply(self, x: Tensor, tiles: Tiles) -> Tensor:
        """The fused product, with any tiling."""
        (num_rows, num_inputs), (num_runs, num_outputs, _) = x.shape, self.packed.shape
        num_splits = triton.cdiv(num_runs, tiles.runs)
        y = x.new_empty((num_rows, num_outputs))
        sums = y if num_splits == 1 else y.new_empty((num_splits, *y.shape), dtype=torch.float32)
        num_tiles = triton.cdiv(num_rows, tiles.rows), num_outputs // tiles.outputs
        _multiply[(*num_tiles, num_splits)](  # rows first: they share what they read
            x,
            self.packed,
            self.scales,
            self.bias if num_splits == 1 else None,
            sums,
            num_rows,
            num_inputs,
            num_outputs,
            num_runs,
            num_runs // self.num_planes,
            tiles.runs,
            ROWS=tiles.rows,
            OUTPUTS=tiles.outputs,
            INTERPRETED=not x.is_cuda,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if num_splits > 1:
            _add_up[(triton.cdiv(y.numel(), ADDED_AT_ONCE),)](
                sums, self.bias, y, num_splits, y.numel(), num_outputs, SIZE=ADDED_AT_ONCE
            )
        return y

    def _expanded(self, x: Tensor) -> Tensor:
        num_outputs = self.packed.shape[1]
        y = x.new_empty((x.shape[0], num_outputs))
        x = x.repeat(1, self.num_planes)
        at_once = max(1, EXPANDED_BYTES // (2 * x.shape[1] * RUN)) * RUN
        for start in range(0, num_outputs, at_once):
            stop = min(start + at_once, num_outputs)
            torch.mm(x, self.dequantized(start, stop).T, out=y[:, start:stop])
        return y if self.bias is None else y.add_(self.bias)

    def dequantized(self, start: int, stop: int) -> Tensor:
        """Weights of all planes of outputs start … stop - 1, multiples of 128, in bfloat16."""
        num_runs, num_outputs, _ = self.packed.shape
        weights = self.packed.new_empty((stop - start, num_runs * RUN), dtype=torch.bfloat16)
        _expand[(num_runs, (stop - start) // EXPANDED_OUTPUTS)](
            self.packed[:, start:],
            self.scales[:, start:],
            weights,
            num_outputs,
            num_runs * RUN,
            OUTPUTS=EXPANDED_OUTPUTS,
            INTERPRETED=not weights.is_cuda,
        )
        return weights


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- kernels --------------------------------------------------------------------------------------

# Integers that change from call to call are not specialized on: 1, or a multiple of 16, would be
# a kernel of its own, compiled when it first occurs.


@triton.jit(do_not_specialize=["num_rows", "num_runs", "runs_per_plane", "runs_per_split"])
def _multiply(
    x: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor | None,
    y: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    num_runs: tl.tensor,
    runs_per_plane: tl.tensor,
    runs_per_split: tl.tensor,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """y (splits, rows, outputs): the sums over each split's runs, plus bias, if it is given."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    i = tl.arange(0, 32)
    is_row = (m < num_rows)[None, :]
    x_at = x + m[None, :] * num_inputs + i[:, None]  # (32, ROWS)
    words_at = packed + n[:, None] * 32 + i[None, :]  # (OUTPUTS, 32)
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for run in range(split * runs_per_split, tl.minimum((split + 1) * runs_per_split, num_runs)):
        w0, w1, w2, w3 = _dequantized(
            tl.load(words_at + run * num_outputs * 32),
            scales + run * 4 * num_outputs + n,
            num_outputs,
            INTERPRETED,
        )
        x_run = x_at + run % runs_per_plane * 128
        x0 = tl.load(x_run, mask=is_row, other=0.0)
        x1 = tl.load(x_run + 32, mask=is_row, other=0.0)
        x2 = tl.load(x_run + 64, mask=is_row, other=0.0)
        x3 = tl.load(x_run + 96, mask=is_row, other=0.0)
        acc = _add_product(acc, w0, x0, INTERPRETED)
        acc = _add_product(acc, w1, x1, INTERPRETED)
        acc = _add_product(acc, w2, x2, INTERPRETED)
        acc = _add_product(acc, w3, x3, INTERPRETED)
    if bias is not None:
        acc += tl.load(bias + n)[:, None].to(tl.float32)
    y_at = y + (split * num_rows + m[None, :]) * num_outputs + n[:, None]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["num_splits", "num_values"])
def _add_up(
    sums: tl.tensor,
    bias: tl.tensor | None,
    y: tl.tensor,
    num_splits: tl.tensor,
    num_values: tl.tensor,
    num_outputs: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """y (rows, outputs): the splits of sums (splits, rows, outputs), in order, plus bias."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_value = at < num_values
    total = tl.zeros((SIZE,), tl.float32)
    for split in range(num_splits):
        total += tl.load(sums + split * num_values + at, mask=is_value, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % num_outputs).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=is_value)


@triton.jit
def _expand(
    packed: tl.tensor,
    scales: tl.tensor,
    weights: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    OUTPUTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """weights (some outputs, inputs) from codes and scales of which there are num_outputs a run."""
    run = tl.program_id(0)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    i = tl.arange(0, 32)
    w0, w1, w2, w3 = _dequantized(
        tl.load(packed + (run * num_outputs + n[:, None]) * 32 + i[None, :]),
        scales + run * 4 * num_outputs + n,
        num_outputs,
        INTERPRETED,
    )
    at = weights + n[:, None] * num_inputs + run * 128 + i[None, :]
    tl.store(at, w0)
    tl.store(at + 32, w1)
    tl.store(at + 64, w2)
    tl.store(at + 96, w3)


@triton.jit
def _dequantized(
    words: tl.tensor, scales_at: tl.tensor, stride: tl.tensor, INTERPRETED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The weights of a run's four groups, (outputs, 32) each, from its words (outputs, 32)."""
    s0, c0 = _scale_and_centre(tl.load(scales_at))
    s1, c1 = _scale_and_centre(tl.load(scales_at + stride))
    s2, c2 = _scale_and_centre(tl.load(scales_at + 2 * stride))
    s3, c3 = _scale_and_centre(tl.load(scales_at + 3 * stride))
    if INTERPRETED:
        w0 = _weights(words, s0, c0)
        w1 = _weights(words >> 4, s1, c1)
        w2 = _weights(words >> 8, s2, c2)
        w3 = _weights(words >> 12, s3, c3)
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            DEQUANTIZE,
            REGISTERS,
            [words, s0, s1, s2, s3, c0, c1, c2, c3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return w0, w1, w2, w3


@triton.jit
def _scale_and_centre(pairs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    scale = (pairs & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    centre = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return scale[:, None], centre[:, None]


@triton.jit
def _weights(words: tl.tensor, scale: tl.tensor, centre: tl.tensor) -> tl.tensor:
    """What DEQUANTIZE computes of one nibble, for the interpreter."""
    codes = ((words & 15) - 8).to(tl.float32)
    return (codes * scale.to(tl.float32) + centre.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_product(
    acc: tl.tensor, weights: tl.tensor, x: tl.tensor, INTERPRETED: tl.constexpr
) -> tl.tensor:
    if INTERPRETED:  # it cannot multiply bfloat16
        acc = tl.dot(weights.to(tl.float32), x.to(tl.float32), acc)
    else:
        acc = tl.dot(weights, x, acc)
    return acc

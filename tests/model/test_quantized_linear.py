"""Quantized layers against the float32 product with the weights that their codes stand for."""

import pytest
import torch
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.model.quantize import Codes, Scheme, quantize
from p2pllm.model.quantized_linear import (
    MAX_ROWS_INT4,
    MAX_ROWS_INT8,
    MAX_ROWS_TWO_PLANES,
    Int4Linear,
    Int8Linear,
    projection,
)

ROWS = [1, 5, MAX_ROWS_INT8, MAX_ROWS_TWO_PLANES + 1, MAX_ROWS_INT4, MAX_ROWS_INT4 + 1, 200]
KINDS = ["int4", "int8", "int8 in groups"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(kind: str, num_outputs: int = 128, num_inputs: int = 96) -> Codes:
    weight = random(num_outputs, num_inputs)
    if kind != "int8 in groups":
        return quantize(weight, Scheme(kind))
    codes = torch.randint(-128, 128, weight.shape, generator=torch.Generator().manual_seed(1))
    scales = (random(num_outputs, num_inputs // 32).abs() * 0.01).bfloat16()
    return Codes(8, codes.to(torch.int8), scales, torch.zeros_like(scales))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_weights(kind: str, rows: int) -> None:
    codes, x, bias = codes_of(kind), random(rows, 96, seed=2).bfloat16(), random(128).bfloat16()
    y = projection([codes], bias)(x)
    expected = x.float() @ codes.dequantized().T + bias.float()
    assert (y.shape, y.dtype) == (expected.shape, torch.bfloat16)
    # Rounding of the weights (of many rows) and of the result to bfloat16, 2^-9 each.
    assert float((y.float() - expected).norm() / expected.norm()) < 2**-8


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_that_read_the_same_input_are_one_product(kind: str, rows: int) -> None:
    first, second = codes_of(kind), codes_of(kind, num_outputs=64)
    x = random(rows, 96, seed=2).bfloat16()
    both = projection([first, second], None)(x)
    expected = torch.cat([projection([part], None)(x) for part in (first, second)], dim=1)
    torch.testing.assert_close(both, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_gives_the_same_bits_as_among_others(kind: str) -> None:
    layer, x = projection([codes_of(kind)], None), random(16, 96, seed=2).bfloat16()
    together = layer(x)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("kind", ["int4", "int8 in groups"])
def test_packed_weights_can_be_read_back(kind: str) -> None:
    codes = codes_of(kind)
    layer = projection([codes], None)
    assert isinstance(layer, Int4Linear)
    exact = codes.dequantized().T
    if layer.can_unpack:
        error = (layer.dequantized().float() - exact).abs()
        assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())


@pytest.mark.parametrize("rows", [3, 200])
def test_outputs_that_do_not_fill_a_packed_block_are_left_to_the_kernel(rows: int) -> None:
    codes, x = codes_of("int4", num_outputs=48), random(rows, 96, seed=2).bfloat16()
    layer = projection([codes], None)
    assert isinstance(layer, Int4Linear)
    assert not layer.can_unpack
    expected = x.float() @ codes.dequantized().T
    assert float((layer(x).float() - expected).norm() / expected.norm()) < 2**-8


def test_one_scale_per_output_takes_the_8_bit_kernel_and_groups_take_two_planes() -> None:
    assert isinstance(projection([codes_of("int8")], None), Int8Linear)
    layer = projection([codes_of("int8 in groups")], None)
    assert isinstance(layer, Int4Linear)
    assert layer.num_planes == 2


def test_sizes_without_a_kernel_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no int4 kernel for a matrix of 24 × 96"):
        projection([codes_of("int4", num_outputs=24)], None)


def test_tensors_are_joined_in_full_precision() -> None:
    first, second, x = random(8, 6), random(4, 6, seed=1), random(3, 6, seed=2)
    y = projection([first, second], None)(x)
    torch.testing.assert_close(y, x @ torch.cat([first, second]).T)

"""Codes chosen for full-precision weights: how near they come, and what they weigh."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pllm.errors import CheckpointError
from p2pllm.model.quantize import GROUP, Codes, Scheme, concatenated, num_bytes, quantize
from p2pllm.model.quantized_linear import Int4Linear, Int8Linear, projection

BOTH = [Scheme.INT8, Scheme.INT4]


def normal(num_outputs: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_outputs, num_inputs, generator=generator) * 0.02


def error(codes: Codes, weight: Tensor) -> float:
    return float((codes.dequantized() - weight).norm() / weight.norm())


@pytest.mark.parametrize(("scheme", "bound"), [(Scheme.INT8, 0.01), (Scheme.INT4, 0.077)])
def test_codes_come_near_to_normal_weights(scheme: Scheme, bound: float) -> None:
    weight = normal(64, 512)
    assert error(quantize(weight, scheme), weight) < bound


def test_least_squares_are_better_than_the_range_of_a_group() -> None:
    weight = normal(64, 512)
    groups = weight.view(64, -1, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    by_range = ((groups - low) / step).round() * step + low
    of_range = float((by_range.view(64, 512) - weight).norm() / weight.norm())
    assert error(quantize(weight, Scheme.INT4), weight) < 0.98 * of_range


@pytest.mark.parametrize("scheme", BOTH)
def test_the_largest_weight_of_an_output_is_kept(scheme: Scheme) -> None:
    weight = torch.zeros(4, 64)
    weight[:, 5] = torch.tensor([1.0, -1.0, 1e-3, -777.0])
    kept = quantize(weight, scheme).dequantized()[:, 5]
    torch.testing.assert_close(kept, weight[:, 5], rtol=0.01, atol=0.0)


@pytest.mark.parametrize("scheme", BOTH)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    assert not quantize(torch.zeros(8, 64), scheme).dequantized().any()


def test_equal_weights_are_a_centre() -> None:
    codes = quantize(torch.full((8, 64), 0.75), Scheme.INT4)
    assert torch.equal(codes.dequantized(), torch.full((8, 64), 0.75))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64), st.sampled_from(BOTH))
@settings(max_examples=60, deadline=None)
def test_any_weights_give_codes_in_range_and_finite_values(
    values: list[float], scheme: Scheme
) -> None:
    weight = torch.tensor(values).view(2, 32)
    codes = quantize(weight, scheme)
    limit = 2 ** (scheme.bits - 1)
    assert -limit <= int(codes.codes.min()) <= int(codes.codes.max()) < limit
    step = codes.scales.float().repeat_interleave(32 // codes.scales.shape[1], 1)
    # Half a step by rounding; and the ends of a group may lie outside of the range chosen.
    assert bool(((codes.dequantized() - weight).abs() <= 3 * step + 1e-6).all())


def test_parts_are_joined_as_they_are_and_scales_repeated_to_the_finest_groups() -> None:
    coarse = quantize(normal(16, 64), Scheme.INT8)
    fine = Codes(
        8, coarse.codes.flip(0), normal(16, 2).abs().bfloat16(), torch.zeros(16, 2).bfloat16()
    )
    joined = concatenated([coarse, fine])
    assert joined.scales.shape == (32, 2)
    expected = torch.cat([coarse.dequantized(), fine.dequantized()])
    assert torch.equal(joined.dequantized(), expected)


def test_groups_that_do_not_fill_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no int4 for a matrix of 48 inputs"):
        quantize(normal(64, 48), Scheme.INT4)


@pytest.mark.parametrize("scheme", BOTH)
@pytest.mark.parametrize("in_groups", [False, True])
def test_the_memory_of_a_layer_is_known_beforehand(scheme: Scheme, in_groups: bool) -> None:
    codes = quantize(normal(64, 128), scheme)
    if in_groups and scheme is Scheme.INT8:
        scales = codes.scales.repeat(1, 4)
        codes = Codes(8, codes.codes, scales, torch.zeros_like(scales))
    layer = projection([codes], None)
    if isinstance(layer, Int8Linear):
        held = layer.weight.nbytes + layer.scales.nbytes
    else:
        assert isinstance(layer, Int4Linear)
        held = layer.packed.nbytes + layer.scales.nbytes
    assert num_bytes((64, 128), scheme, in_groups=in_groups) == held

"""Weights in the CPU kernel's own layout compute what plain ones do."""

import pytest
import torch
import torch.nn.functional as F

from p2pllm.model.layers import Linear
from p2pllm.model.packed_linear import PackedLinear, linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(11, 6), (48, 32), (192, 576)])
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 100])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_the_same_product(
    dtype: torch.dtype, num_outputs: int, num_inputs: int, num_tokens: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    x = torch.randn(num_tokens, num_inputs).to(dtype)

    with torch.inference_mode():
        y = linear(weight, bias)(x)

    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (y.dtype, y.shape) == (dtype, (num_tokens, num_outputs))
    assert float((y - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = linear(torch.randn(64, 96).to(dtype))
    x = torch.randn(40, 96).to(dtype)
    together = layer(x)
    apart = torch.cat([layer(x[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(
        together, apart, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4
    )


def test_a_slice_of_a_wider_tensor_is_read_right() -> None:
    torch.manual_seed(0)
    weight, wide = torch.randn(32, 16), torch.randn(3, 64)
    layer = linear(weight[:, :8])
    torch.testing.assert_close(layer(wide[:, 4:12]), wide[:, 4:12] @ weight[:, :8].T)


def test_float32_is_packed_where_there_is_a_kernel_and_float16_is_not() -> None:
    kind = PackedLinear if torch.backends.mkldnn.is_available() else Linear
    assert type(linear(torch.ones(4, 4))) is kind
    assert type(linear(torch.ones(4, 4, dtype=torch.float16))) is Linear

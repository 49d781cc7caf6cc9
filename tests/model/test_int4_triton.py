"""The fused int4 product against the float32 product with the weights that its codes stand for.

With P2PLLM_TEST_DEVICE=cuda on a GPU, or with TRITON_INTERPRET=1 by Triton's interpreter on the CPU
(that of Triton 3.6 needs numpy below 2.4). Otherwise this file is not collected (conftest.py).
"""

import os

import pytest
import torch
from torch import Tensor

from p2pllm.model.int4_layout import MAX_ROWS, Tiles
from p2pllm.model.int4_triton import FusedInt4Linear
from p2pllm.model.quantize import Codes, Scheme, quantize
from p2pllm.model.quantized_linear import projection, two_planes

DEVICE = os.environ.get("P2PLLM_TEST_DEVICE", "cpu")
ROWS = [1, 5, 8, 16, 17, 64, 65, 200, MAX_ROWS + 1]
KINDS = ["int4", "int8 in groups"]
# Rounding of weights and result to bfloat16, 2^-9 each; the interpreter cuts off instead.
TOLERANCE = 2**-7 if DEVICE == "cpu" else 2**-8

# The interpreter's use of numpy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes_of(kind: str, num_outputs: int = 256, num_inputs: int = 1024) -> Codes:
    weight = random(num_outputs, num_inputs)
    if kind == "int4":
        return quantize(weight, Scheme.INT4)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, weight.shape, generator=generator).to(torch.int8)
    scales = (random(num_outputs, num_inputs // 32).abs() * 0.01).bfloat16()
    return Codes(8, codes.to(DEVICE), scales, torch.zeros_like(scales))


def fused(codes: Codes, bias: Tensor | None = None) -> FusedInt4Linear:
    planes = codes if codes.bits == 4 else two_planes(codes)
    return FusedInt4Linear.pack(planes, bias, codes.shape[1])


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_weights(kind: str, rows: int) -> None:
    codes, x, bias = codes_of(kind), random(rows, 1024, seed=2).bfloat16(), random(256).bfloat16()
    y = fused(codes, bias)(x)
    expected = x.float() @ codes.dequantized().T + bias.float()
    assert (y.shape, y.dtype) == (expected.shape, torch.bfloat16)
    assert error(y, expected) < TOLERANCE


@pytest.mark.parametrize("runs", [8, 3, 1])
@pytest.mark.parametrize(
    ("rows", "outputs", "warps"), [(8, 128, 2), (32, 128, 4), (64, 256, 8), (128, 128, 4)]
)
def test_any_tiling_gives_the_same_product(rows: int, outputs: int, warps: int, runs: int) -> None:
    codes, x, bias = codes_of("int4"), random(70, 1024, seed=2).bfloat16(), random(256).bfloat16()
    y = fused(codes, bias).multiply(x, Tiles(rows, outputs, warps, 3, runs))
    assert error(y, x.float() @ codes.dequantized().T + bias.float()) < TOLERANCE


def test_a_row_alone_gives_the_same_bits_as_among_others() -> None:
    layer, x = fused(codes_of("int4")), random(8, 1024, seed=2).bfloat16()
    together = layer(x)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)


def test_a_product_does_not_read_behind_its_rows() -> None:
    layer, x = fused(codes_of("int4")), random(16, 1024, seed=2).bfloat16()
    expected = layer(x[:5].clone())
    x[5:] = torch.nan
    assert torch.equal(layer(x[:5]), expected)


def test_packed_weights_can_be_read_back() -> None:
    codes = codes_of("int4")
    assert error(fused(codes).dequantized(128, 256), codes.dequantized()[128:]) < TOLERANCE


def test_an_expanded_product_in_parts_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = fused(codes_of("int4")), random(MAX_ROWS + 1, 1024, seed=2).bfloat16()
    whole = layer(x)
    monkeypatch.setattr("p2pllm.model.int4_triton.EXPANDED_BYTES", 2 * 1024 * 128)
    assert error(layer(x), whole.float()) < TOLERANCE


if DEVICE == "cuda":

    @pytest.mark.parametrize("kind", KINDS)
    def test_on_a_gpu_it_is_the_product_of_int4(kind: str) -> None:
        assert isinstance(projection([codes_of(kind)], None), FusedInt4Linear)

    def test_sizes_that_do_not_fit_are_left_to_torch() -> None:
        codes, x = codes_of("int4", 64, 96), random(3, 96, seed=2).bfloat16()
        layer = projection([codes], None)
        assert not isinstance(layer, FusedInt4Linear)
        assert error(layer(x), x.float() @ codes.dequantized().T) < TOLERANCE

    @pytest.mark.parametrize("rows", [1, 32, 100, MAX_ROWS + 1])
    def test_a_product_can_be_captured_and_replayed(rows: int) -> None:
        layer = fused(codes_of("int4"), random(256).bfloat16())
        x = torch.zeros(rows, 1024, dtype=torch.bfloat16, device=DEVICE)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(random(rows, 1024, seed=3))
        graph.replay()
        assert torch.equal(y, layer(x))

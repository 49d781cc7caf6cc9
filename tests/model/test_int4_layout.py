"""The layout of the fused int4 product, and its table of tilings: no GPU is needed for these."""

import pytest
import torch
from torch import Tensor

from p2pllm.model.int4_layout import (
    MAX_ROWS,
    RUN,
    WARM_UP_ROWS,
    Tiles,
    fits,
    pack_codes,
    pack_scales,
    tiles_for,
    unpack_codes,
)
from p2pllm.model.quantize import Scheme, quantize
from p2pllm.model.quantized_linear import Int4Linear, projection

H100 = 132  # processors
# (out, in) of a Llama 2 70B's blocks, two of smaller models, and a small one
SIZES = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (4096, 4096), (1152, 384)]


def random_codes(num_outputs: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (num_outputs, num_inputs), generator=generator)
    return codes.to(torch.int8)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(128, 128), (256, 384), (3, 256)])
def test_packed_codes_can_be_read_back(num_outputs: int, num_inputs: int) -> None:
    codes = random_codes(num_outputs, num_inputs)
    packed = pack_codes(codes)
    assert packed.nbytes * 2 == codes.nbytes
    assert torch.equal(unpack_codes(packed), codes)


def test_codes_packed_in_slices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(256, 256)
    whole = pack_codes(codes)
    monkeypatch.setattr("p2pllm.model.int4_layout.PACKED_AT_ONCE", 100 * 256)
    assert torch.equal(pack_codes(codes), whole)


def test_a_word_holds_one_input_of_each_group_of_a_run() -> None:
    codes = torch.full((2, 2 * RUN), -8, dtype=torch.int8)  # all nibbles zero
    codes[1, RUN + 5], codes[1, RUN + 3 * 32 + 5] = -7, 7
    packed = pack_codes(codes)
    assert packed.shape == (2, 2, 32)
    assert int(packed[1, 1, 5]) & 0xFFFF == 0xF001
    assert int(packed.count_nonzero()) == 1


def test_scale_and_centre_are_the_halves_of_an_integer() -> None:
    scales, centres = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 0.0]])
    pairs = pack_scales(scales.bfloat16(), centres.bfloat16())
    assert pairs.tolist() == [[0xBF803F80 - 2**32], [0x00004000]]  # (G, out)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 33, 64, 65, 200, MAX_ROWS])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SIZES)
def test_tiles_cover_a_product_without_an_idle_program(
    num_outputs: int, num_inputs: int, num_rows: int
) -> None:
    num_runs = num_inputs // RUN
    tiles = tiles_for(num_rows, num_outputs, num_runs, H100)
    num_splits = -(-num_runs // tiles.runs)
    assert num_outputs % tiles.outputs == 0
    assert tiles.rows >= min(num_rows, 128)
    assert (num_splits - 1) * tiles.runs < num_runs <= num_splits * tiles.runs


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SIZES)
def test_the_warm_up_meets_every_kernel(num_outputs: int, num_inputs: int) -> None:
    def kernel(num_rows: int) -> tuple[int, int, int, int, bool]:
        tiles = tiles_for(num_rows, num_outputs, num_inputs // RUN, H100)
        is_whole = tiles.runs == num_inputs // RUN
        return tiles.rows, tiles.outputs, tiles.warps, tiles.stages, is_whole

    compiled = {kernel(num_rows) for num_rows in WARM_UP_ROWS[:-1]}
    assert {kernel(num_rows) for num_rows in range(1, MAX_ROWS + 1)} == compiled


def test_few_outputs_are_divided_among_programs_by_input() -> None:
    for num_rows, tiles in {
        1: Tiles(8, 128, 2, 4, 16),  # 64 tiles × 4 splits: 2 programs for each processor
        16: Tiles(16, 128, 2, 4, 16),
        32: Tiles(32, 128, 4, 3, 11),
        64: Tiles(64, 128, 4, 3, 11),
        128: Tiles(128, 256, 8, 3, 16),
    }.items():
        assert tiles_for(num_rows, 8192, 64, H100) == tiles


@pytest.mark.parametrize("num_rows", [1, 16, 32, 64, 128, MAX_ROWS])
def test_many_outputs_are_not_divided(num_rows: int) -> None:
    assert tiles_for(num_rows, 57344, 64, H100).runs == 64


def test_outputs_of_an_odd_number_of_tiles_take_narrower_ones() -> None:
    assert tiles_for(128, 1152, 3, H100) == Tiles(128, 128, 4, 3, 3)


def test_sizes_that_are_not_multiples_of_a_tile_do_not_fit() -> None:
    assert all(fits(*size) for size in SIZES)
    assert not fits(64, 128)
    assert not fits(128, 576)


def test_on_a_cpu_the_product_is_torchs_own() -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    assert isinstance(projection([quantize(weight, Scheme.INT4)], None), Int4Linear)

"""Blocks of a checkpoint as a server loads them."""

from pathlib import Path

import pytest
import torch

from p2pllm.config import ServerConfig
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.hub import resolve_model
from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.split_span import sizes_of
from p2pllm.server.source import CheckpointSource
from p2pllm.spans import Span

pytestmark = pytest.mark.slow(300)  # fetching the model the first time


@pytest.fixture(scope="module")
def source() -> CheckpointSource:
    path: Path = resolve_model()
    return CheckpointSource(open_checkpoint(path))


def output(source: CheckpointSource, settings: ServerConfig) -> torch.Tensor:
    model = source.load_span(Span(3, 5), settings, None)
    hidden = torch.randn(20, 576, generator=torch.Generator().manual_seed(0))
    cache = model.make_cache(1, 64)
    return model.forward(hidden, [CacheRow((0,), 0, 20)], cache).float()


# int4 is what the file holds, and so only rounded; int8 are other codes than the file's.
@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.06), ("int4", 0.03)])
def test_quantized_blocks_give_about_what_exact_ones_give(
    source: CheckpointSource, scheme: str, bound: float
) -> None:
    exact = output(source, ServerConfig(dtype="float32", device="cpu"))
    quantized = output(source, ServerConfig(quantize=scheme, device="cpu"))
    assert 0.0 < float((quantized - exact).norm() / exact.norm()) < bound


def test_a_block_takes_as_much_memory_as_its_weights_are_held_in(source: CheckpointSource) -> None:
    def mib(settings: ServerConfig) -> float:
        return source.block_bytes(settings) / 2**20

    whole = mib(ServerConfig(dtype="bfloat16", device="cpu"))
    assert mib(ServerConfig(dtype="float32", device="cpu")) == 2 * whole
    assert mib(ServerConfig(quantize="int4", device="cpu")) / whole == pytest.approx(
        5 / 16, abs=0.001
    )
    # A byte each: the file has groups of 8 bits in its embedding only.
    assert mib(ServerConfig(quantize="int8", device="cpu")) / whole == pytest.approx(
        8 / 16, abs=0.003
    )


def test_blocks_are_quantized_one_after_the_other(source: CheckpointSource) -> None:
    seen: list[tuple[int, int]] = []
    settings = ServerConfig(quantize="int4", device="cpu")
    source.load_span(Span(0, 3), settings, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("scheme", ["none", "int4"])
def test_blocks_on_several_devices_give_what_they_give_on_one(
    source: CheckpointSource, scheme: str
) -> None:
    exact = "float32" if scheme == "none" else "auto"
    outputs = [
        output(source, ServerConfig(dtype=exact, quantize=scheme, device=device))
        for device in ("cpu", "cpu,cpu")
    ]
    assert torch.equal(*outputs)


def test_a_split_span_is_loaded_in_parts_and_shares_blocks_on_a_move(
    source: CheckpointSource,
) -> None:
    seen: list[tuple[int, int]] = []
    settings = ServerConfig(dtype="float32", device="cpu,cpu")
    model = source.load_span(Span(0, 4), settings, lambda done, total: seen.append((done, total)))
    assert sizes_of(model) == (2, 2)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    seen.clear()
    moved = source.load_span(Span(1, 5), settings, lambda *each: seen.append(each), model)

    assert (moved.span, sizes_of(moved)) == (Span(1, 5), (2, 2))
    assert seen == [(1, 2), (2, 2)]  # block 2, which lay on the second device, and block 4

"""Servers with keys and values in 8 bits: what they move, declare, and have room for."""

import asyncio
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import replace

import pytest
import torch

from p2pllm.clock import SystemClock
from p2pllm.config import ServerConfig
from p2pllm.errors import CodecError
from p2pllm.model.config import ModelConfig
from p2pllm.model.dummy import dummy_weights
from p2pllm.model.executor import DeviceThread
from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.quantize import Scheme
from p2pllm.model.span_model import SpanModel
from p2pllm.server.scheduler import Scheduler
from p2pllm.server.source import DummySource, cost_of
from p2pllm.server.worker import Worker
from p2pllm.spans import Span
from p2pllm.wire.messages import Pages, decode_message, encode_message

PAGE = 16
SPAN = Span(0, 2)
CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=64,
    num_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=32,
    max_position=256,
    norm_eps=1e-5,
)
CPU = torch.device("cpu")


class Lab:
    """A worker over real blocks, and a cache that others have left NaN in."""

    def __init__(self, kv_bits: int) -> None:
        weights = (dummy_weights(CONFIG, index, torch.float32, Scheme.NONE, CPU) for index in SPAN)
        self.model = SpanModel.load(CONFIG, SPAN, weights, dtype=torch.float32, kv_bits=kv_bits)
        self.cache = self.model.make_cache(8, PAGE)
        self.worker = Worker(
            self.model, self.cache, Scheduler(64, 32, 64), DeviceThread("test"), SystemClock()
        )

    def compute(self, pages: tuple[int, ...], position: int, count: int) -> torch.Tensor:
        hidden = torch.randn(count, 64, generator=torch.Generator().manual_seed(position))
        return self.model.forward(hidden, [CacheRow(pages, position, count)], self.cache)


def sent(part: Pages) -> Pages:
    """As it comes out of the network."""
    received = decode_message(b"".join(bytes(buffer) for buffer in encode_message(part)))
    assert isinstance(received, Pages)
    return received


def run(work: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(work())


def test_a_session_goes_on_with_the_very_codes_of_another_server() -> None:
    async def work() -> None:
        old, new = Lab(8), Lab(8)
        old.compute((3, 1), 0, 20)
        part = sent(await old.worker.export_pages((3, 1), SPAN, 0, 20))
        await new.worker.import_pages((6, 2), SPAN, part)
        again = await new.worker.export_pages((6, 2), SPAN, 0, 20)
        assert bytes(again.tensor.data) == bytes(part.tensor.data)
        assert len(part.tensor.data) == 20 * len(SPAN) * 2 * 2 * (16 + 2)
        torch.testing.assert_close(new.compute((6, 2), 20, 1), old.compute((3, 1), 20, 1))

    run(work)


def test_pages_of_another_width_are_refused() -> None:
    async def work() -> None:
        plain, eight = Lab(16), Lab(8)
        for giver, taker in ((plain, eight), (eight, plain)):
            giver.compute((0,), 0, 5)
            part = sent(await giver.worker.export_pages((0,), SPAN, 0, 5))
            with pytest.raises(CodecError, match="pages of shape"):
                await taker.worker.import_pages((0,), SPAN, part)

    run(work)


def test_pages_with_a_scale_that_is_no_number_are_refused() -> None:
    async def work() -> None:
        old, new = Lab(8), Lab(8)
        old.compute((0,), 0, 5)
        part = await old.worker.export_pages((0,), SPAN, 0, 5)
        data = bytearray(part.tensor.data)
        data[16:18] = b"\xc0\x7f"  # the first token's scale: bfloat16's NaN
        damaged = replace(
            part, checksum=zlib.crc32(data), tensor=replace(part.tensor, data=bytes(data))
        )
        with pytest.raises(CodecError, match="NaN"):
            await new.worker.import_pages((0,), SPAN, sent(damaged))
        assert not new.cache.tensors[0].any()

    run(work)


def test_answers_are_near_those_over_exact_keys_and_values() -> None:
    plain, eight = Lab(16), Lab(8)
    for lab in (plain, eight):
        lab.compute((5, 0), 0, 20)
    exact, near = plain.compute((5, 0), 20, 3), eight.compute((5, 0), 20, 3)
    assert 0 < float((exact - near).norm() / exact.norm()) < 0.01


def test_nothing_is_recorded_for_8_bits() -> None:
    lab = Lab(8)
    lab.model.prepare(lab.cache, 4)
    assert not any(tensor.any() for tensor in lab.cache.tensors)


@pytest.mark.parametrize(("dtype", "plain_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_a_block_costs_less_cache_in_8_bits(dtype: str, plain_bytes: int) -> None:
    source = DummySource(CONFIG, "small")
    costs = [
        cost_of(source, ServerConfig(dtype=dtype, kv_bits=bits, cache_tokens=100, device="cpu"))
        for bits in (16, 8)
    ]
    heads = 2 * 2 * 100
    assert [cost.cache_bytes for cost in costs] == [heads * 16 * plain_bytes, heads * (16 + 2)]


def test_a_source_gives_blocks_whose_caches_have_that_width() -> None:
    source = DummySource(CONFIG, "small")
    settings = ServerConfig(dtype="float32", kv_bits=8, cache_tokens=100, device="cpu")
    model = source.load_span(SPAN, settings, None)
    assert model.make_cache(2, PAGE).kv_bits == 8

"""How a server measures itself, on a device whose speed is known."""

import pytest

from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.server.throughput import Throughput, measure
from p2pllm.sim.fake_model import FakeDevice, FakeSpanModel, fake_config
from p2pllm.spans import Span


def test_what_is_measured_is_what_the_device_takes_by_its_own_timer() -> None:
    device = FakeDevice(block_s=0.01, token_s=0.001)
    model = FakeSpanModel(fake_config(6), Span(2, 6), device)
    cache = model.make_cache(16, PAGE_TOKENS)

    found = measure(model, cache, chunk_tokens=256, timer=lambda: device.spent_s)

    assert found.seconds_per_block_1 == pytest.approx(0.011)
    assert found.seconds_per_block_8 == pytest.approx(0.018)
    assert found.prefill_tokens_s == pytest.approx(256 / (0.01 + 256 * 0.001))


def test_one_stated_figure_counts_for_all() -> None:
    assert Throughput.stated(100.0) == Throughput(0.01, 0.01, 100.0)

"""The plan of a decode pass, what it computes, and its kernels where there is a Triton."""

import dataclasses
import importlib.util
import math
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pllm.errors import LocalProtocolError
from p2pllm.model.config import ModelConfig
from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.layers import RotaryEmbedding
from p2pllm.model.paged_attention import (
    HEADER,
    PagedAttention,
    PageLayout,
    attend_reference,
    rotate_and_store_reference,
)

PAGE, NUM_PAGES = 8, 24
DEVICE = os.environ.get("P2PLLM_TEST_DEVICE", "cpu")
CONFIG = ModelConfig(
    model_type="mistral",
    hidden_size=48,
    num_blocks=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=8,
    vocab_size=8,
    max_position=64,
    norm_eps=1e-5,
)


def plan_of(rows: list[CacheRow], size: int, num_pages: int = NUM_PAGES) -> Tensor:
    plan = np.full((size, HEADER + num_pages), -1, dtype=np.int32)
    PageLayout(num_pages, PAGE).fill(plan, rows)
    return torch.from_numpy(plan)


# --- plans -----------------------------------------------------------------------------------


def test_a_row_becomes_position_slot_and_pages() -> None:
    (first, *_) = plan_of([CacheRow((5, 3, 9), 10, 1)], 1).tolist()
    assert first[:5] == [10, 3 * PAGE + 2, 0, 5, 3]


def test_a_row_that_begins_a_page_clears_the_rest_of_it() -> None:
    plan = plan_of([CacheRow((5, 3), 8, 1), CacheRow((4,), 2, 1)], 2)
    assert plan[:, 2].tolist() == [PAGE - 1, 0]


def test_tokens_of_one_row_are_rows_of_their_own_and_the_last_one_clears() -> None:
    plan = plan_of([CacheRow((5, 3), 6, 4)], 4)
    assert plan[:, 0].tolist() == [6, 7, 8, 9]
    assert plan[:, 1].tolist() == [46, 47, 24, 25]
    assert plan[:, 2].tolist() == [0, 0, 0, 6]


def test_a_batch_is_filled_up_with_rows_of_the_scratch_page() -> None:
    plan = plan_of([CacheRow((5,), 2, 1)], 4)
    assert plan[1:, : HEADER + 1].tolist() == [
        [0, NUM_PAGES * PAGE + i, 0, NUM_PAGES] for i in range(3)
    ]


@pytest.mark.parametrize(
    "row",
    [
        CacheRow((0, 1), 0, 0),
        CacheRow((0,), -1, 2),
        CacheRow((0,), 8, 1),
        CacheRow((0, 1), 0, 3),  # more tokens than the plan has rows
        CacheRow(tuple(range(NUM_PAGES + 1)), NUM_PAGES * PAGE, 1),  # more pages
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: CacheRow) -> None:
    with pytest.raises(LocalProtocolError):
        plan_of([row], 2)


# --- what is computed --------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A batch of random rows over a cache that already holds something everywhere."""

    config: ModelConfig
    rows: list[CacheRow]
    qkv: Tensor
    storage: Tensor
    plan: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def random(cls, seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> "Case":
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        config = dataclasses.replace(CONFIG, **sizes)
        pages = list(range(NUM_PAGES))
        rng.shuffle(pages)
        rows: list[CacheRow] = []
        while len(pages) > 4 and len(rows) < 6:
            table = tuple(pages.pop() for _ in range(rng.randint(1, 4)))
            num_tokens = rng.choice([1, 1, 1, 3])
            position = rng.randint(0, len(table) * PAGE - num_tokens)
            rows.append(CacheRow(table, position, num_tokens))
        size = sum(row.num_tokens for row in rows) + rng.randint(0, 3)
        heads = config.num_heads + 2 * config.num_kv_heads
        slots = (NUM_PAGES + 1) * PAGE
        storage = torch.randn(2 * config.num_kv_heads, slots, config.head_dim, generator=generator)
        plan = plan_of(rows, size)
        cos, sin = RotaryEmbedding(config, torch.device("cpu")).cos_sin(plan[:, 0])
        return cls(
            config,
            rows,
            torch.randn(size, heads, config.head_dim, generator=generator).to(device, dtype),
            storage.to(device, dtype),
            plan.to(device),
            cos.to(device),
            sin.to(device),
        )

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "page_tokens": PAGE,
            "scale": 1 / math.sqrt(self.config.head_dim),
            "window": self.config.sliding_window,
        }


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 5, 11]))
def test_it_is_what_the_cache_computes_for_planned_rows(seed: int, window: int | None) -> None:
    case = Case.random(seed, torch.float32, "cpu", sliding_window=window)
    cache = KVCache(
        case.config,
        num_blocks=1,
        num_pages=NUM_PAGES,
        page_tokens=PAGE,
        dtype=torch.float32,
        has_scratch=True,
    )
    cache.block(0).copy_(case.storage)
    rotated = case.qkv.clone()[: sum(row.num_tokens for row in case.rows)]
    planned = cache.plan(case.rows)
    rotation = RotaryEmbedding(case.config, torch.device("cpu")).at(
        planned.positions, torch.float32
    )
    rotation.rotate_(rotated[:, : case.config.num_heads + case.config.num_kv_heads])
    expected = cache.attend(0, rotated, planned)

    attention = PagedAttention(case.config.num_heads, case.config.head_dim, PAGE, window)
    out = attention.attend(case.qkv, case.cos, case.sin, case.plan, case.storage)

    assert torch.allclose(out[: len(expected)], expected, atol=1e-5)
    kept = NUM_PAGES * PAGE  # fillers write behind them
    assert torch.allclose(case.storage[:, :kept], cache.block(0)[:, :kept], atol=1e-6)


# --- kernels: on a GPU, or with TRITON_INTERPRET=1 on the CPU ----------------------------------

HAS_KERNELS = importlib.util.find_spec("triton") is not None and (
    DEVICE != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
)
if HAS_KERNELS:
    from p2pllm.model import decode_triton

    SIZES: list[dict[str, Any]] = [
        {},
        {"sliding_window": 5},
        {"head_dim": 64, "num_heads": 4, "num_kv_heads": 4},
        {"head_dim": 80, "num_heads": 8, "num_kv_heads": 1},
        {"head_dim": 96, "num_heads": 3, "num_kv_heads": 1, "sliding_window": 13},
        {"head_dim": 128, "num_heads": 16, "num_kv_heads": 2},
    ]
    DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE != "cpu")

    def assert_close(ours: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
        bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        difference = (ours.float() - reference.float()).norm()
        assert float(difference) <= bound * float(reference.float().norm())

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kernels_compute_the_reference(sizes: dict[str, Any], dtype: torch.dtype) -> None:
        for seed in range(3):
            case = Case.random(seed, dtype, DEVICE, **sizes)
            qkv, storage = case.qkv.clone(), case.storage.clone()
            heads = case.config.num_heads
            rotate_and_store_reference(qkv, case.cos, case.sin, case.plan, storage, heads)
            expected = attend_reference(qkv, case.plan, storage, heads, **case.arguments)
            decode_triton.rotate_and_store(
                case.qkv, case.cos, case.sin, case.plan, case.storage, heads
            )
            out = decode_triton.attend(case.qkv, case.plan, case.storage, heads, **case.arguments)
            assert_close(case.qkv[:, :heads], qkv[:, :heads], dtype)
            assert_close(case.storage, storage, dtype)
            assert_close(out, expected, dtype)

    @pytest.mark.parametrize("num_parts", [1, 2, 3, 32])
    def test_keys_may_be_divided_into_any_number_of_parts(
        num_parts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decode_triton, "parts_for", lambda _: num_parts)
        monkeypatch.setattr(decode_triton, "KEY_TILE", 16)  # so that short rows have several
        case = Case.random(7, torch.float32, DEVICE, sliding_window=20)
        qkv, plan, storage = case.qkv, case.plan, case.storage
        expected = attend_reference(qkv, plan, storage, 6, **case.arguments)
        out = decode_triton.attend(qkv, plan, storage, 6, **case.arguments)
        assert_close(out, expected, torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_norm_after_an_addition(dtype: torch.dtype) -> None:
        hidden, delta, gain = (
            torch.randn(shape, device=DEVICE).to(dtype) for shape in ((5, 72), (5, 72), (72,))
        )
        for added in (delta, None):
            expected_sum = hidden if added is None else hidden + added
            expected = torch.nn.functional.rms_norm(expected_sum.float(), (72,), gain.float(), 1e-5)
            ours = hidden.clone()
            normed = decode_triton.add_norm(ours, added, gain, 1e-5)
            assert_close(ours, expected_sum, dtype)
            assert_close(normed, expected, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_gated_product(dtype: torch.dtype) -> None:
        gate_up = torch.randn(3, 2 * 1100, device=DEVICE).to(dtype)
        gate, up = gate_up.float().chunk(2, -1)
        assert_close(decode_triton.gated_silu(gate_up), torch.nn.functional.silu(gate) * up, dtype)

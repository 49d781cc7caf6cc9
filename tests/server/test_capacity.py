"""How many blocks fit beside the cache of the sessions that room is kept for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import ConfigError
from p2pllm.server.capacity import BlockCost, block_cost, fit, usable_of

MIB = 2**20


def test_a_block_costs_its_weights_and_its_part_of_the_cache() -> None:
    cost = block_cost(
        weight_bytes=2000, kv_values_per_token=2 * 3 * 64, cache_tokens=16, itemsize=2
    )
    assert cost == BlockCost(weight_bytes=2000, cache_bytes=2 * 3 * 64 * 16 * 2)


def test_room_for_the_cache_is_kept_before_blocks_get_memory() -> None:
    weights_only = fit(100 * MIB, BlockCost(10 * MIB, 0), 30)
    with_cache = fit(100 * MIB, BlockCost(10 * MIB, 10 * MIB), 30)
    assert (weights_only.num_blocks, with_cache.num_blocks) == (10, 5)
    assert (with_cache.weight_bytes, with_cache.cache_bytes) == (50 * MIB, 50 * MIB)


def test_no_more_blocks_than_the_model_has() -> None:
    assert fit(100 * MIB, BlockCost(MIB, MIB), 30).num_blocks == 30


def test_less_than_a_block_is_refused_with_what_it_takes() -> None:
    with pytest.raises(ConfigError, match="not one block fits into 15 MiB: it takes 20 MiB"):
        fit(15 * MIB, BlockCost(10 * MIB, 10 * MIB), 30)


def test_some_of_the_free_memory_is_left_to_others() -> None:
    assert usable_of(10 * 2**30) < 9 * 2**30
    assert usable_of(MIB) == 0


@given(st.integers(1, 2**40), st.integers(1, 2**34), st.integers(0, 2**34), st.integers(1, 200))
@settings(max_examples=100)
def test_what_is_chosen_fits_and_one_more_would_not(
    limit: int, weights: int, cache: int, num_blocks: int
) -> None:
    cost = BlockCost(weights, cache)
    if limit < cost.num_bytes:
        with pytest.raises(ConfigError):
            fit(limit, cost, num_blocks)
        return
    chosen = fit(limit, cost, num_blocks)
    assert chosen.weight_bytes + chosen.cache_bytes <= limit
    is_all = chosen.num_blocks == num_blocks
    assert is_all or (chosen.num_blocks + 1) * cost.num_bytes > limit

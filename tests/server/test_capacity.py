"""How many blocks fit beside the cache of the sessions that room is kept for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import ConfigError
from p2pllm.server.capacity import (
    BlockCost,
    block_cost,
    divide,
    fit,
    fit_devices,
    rooms_of,
    share,
    usable_of,
)

MIB = 2**20


def test_a_block_costs_its_weights_and_its_part_of_the_cache() -> None:
    cost = block_cost(weight_bytes=2000, kv_bytes_per_token=2 * 3 * 64 * 2, cache_tokens=16)
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


def test_on_several_devices_whole_blocks_fit_on_each() -> None:
    cost = BlockCost(8 * MIB, 2 * MIB)  # 1.9 and 3.9 of them
    capacity = fit_devices((19 * MIB, 39 * MIB), ("cuda:0", "cuda:1"), cost, 30)
    assert (capacity.num_blocks, capacity.limit_bytes) == (4, 58 * MIB)


def test_a_device_without_room_for_a_block_is_named() -> None:
    with pytest.raises(ConfigError, match="leave cuda:1 out"):
        fit_devices((90 * MIB, 9 * MIB), ("cuda:0", "cuda:1"), BlockCost(10 * MIB, 0), 30)


def test_a_model_of_fewer_blocks_than_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 devices are named for 1 blocks"):
        fit_devices((90 * MIB, 90 * MIB), ("cuda:0", "cuda:1"), BlockCost(10 * MIB, 0), 1)


def test_blocks_are_divided_in_proportion_to_the_room_for_them() -> None:
    assert divide(12, (20, 40)) == (4, 8)
    assert divide(30, (50, 50, 50)) == (10, 10, 10)


def test_every_device_gets_a_block() -> None:
    assert divide(4, (1000, 1, 0)) == (2, 1, 1)


def test_more_blocks_than_room_are_divided_all_the_same() -> None:
    assert divide(30, (1, 1)) == (15, 15)
    assert sum(divide(31, (3, 1, 0))) == 31


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.data())
@settings(max_examples=100)
def test_no_device_gets_more_than_it_has_room_for(rooms: list[int], data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(len(rooms), sum(rooms)))
    sizes = divide(num_blocks, rooms)
    assert sum(sizes) == num_blocks
    assert all(1 <= size <= room for size, room in zip(sizes, rooms, strict=True))


def test_a_limit_for_all_devices_is_shared_by_what_is_free() -> None:
    limits = share(30 * MIB, (20 * MIB, 40 * MIB))
    assert limits == (10 * MIB, 20 * MIB)
    assert rooms_of(limits, BlockCost(3 * MIB, MIB)) == (2, 5)

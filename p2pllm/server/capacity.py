"""How many blocks a server should have: what fits beside the attention cache.

Petals fills the memory with blocks and gives the cache what is left. With many users sessions then
wait for cache, longer than any hop takes; to reserve the cache first explains most of what a better
placement gains (arXiv 2512.21884, which calls the number of sessions R). So here the cache of a
stated number of sessions comes first, and blocks get what remains. Each block has its own part of
the cache, so n blocks take n × (weights + cache) bytes.

On several devices as many blocks fit as on each of them, added up: a block is on one.

Pure: what is free is measured elsewhere (`p2pllm.model.memory`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from p2pllm.errors import ConfigError

KEPT_FREE = 0.1  # of free memory: activations, connections, and what others start meanwhile
RUNTIME_BYTES = 256 * 2**20  # torch's own buffers and the interpreter's objects while it serves


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What one block takes, in bytes: its weights, and its part of the cache."""

    weight_bytes: int
    cache_bytes: int

    @property
    def num_bytes(self) -> int:
        """Both together."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True, slots=True)
class Capacity:
    """`num_blocks` of `cost` each, within `limit_bytes`."""

    num_blocks: int
    cost: BlockCost
    limit_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Of all blocks' weights."""
        return self.num_blocks * self.cost.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """Of all blocks' caches."""
        return self.num_blocks * self.cost.cache_bytes


def block_cost(*, weight_bytes: int, kv_bytes_per_token: int, cache_tokens: int) -> BlockCost:
    """The cost of a block with so many bytes of weights.

    `kv_bytes_per_token`: what keys and values of all its key/value heads take.
    """
    return BlockCost(weight_bytes, kv_bytes_per_token * cache_tokens)


def usable_of(free_bytes: int) -> int:
    """What a server may take of so much free memory."""
    return max(0, int(free_bytes * (1 - KEPT_FREE)) - RUNTIME_BYTES)


def fit(limit_bytes: int, cost: BlockCost, num_blocks: int) -> Capacity:
    """As many of a model's `num_blocks` blocks as fit; raises ConfigError if that is none."""
    fitting = limit_bytes // cost.num_bytes
    if fitting < 1:
        raise ConfigError(
            f"not one block fits into {limit_bytes / 2**20:.0f} MiB: it takes "
            f"{cost.num_bytes / 2**20:.0f} MiB with its part of the cache; allow more --memory, or "
            "fewer --cache-sessions or --session-tokens"
        )
    return Capacity(min(fitting, num_blocks), cost, limit_bytes)


def fit_devices(
    limits: Sequence[int], names: Sequence[str], cost: BlockCost, num_blocks: int
) -> Capacity:
    """As many of a model's blocks as fit on several devices, each with a limit of its own.

    Raises ConfigError if one has no room for a block.
    """
    if len(limits) == 1:
        return fit(limits[0], cost, num_blocks)
    rooms = rooms_of(limits, cost)
    for name, room, limit in zip(names, rooms, limits, strict=True):
        if room < 1:
            raise ConfigError(
                f"not one block fits into the {limit / 2**20:.0f} MiB that {name} has for it: it "
                f"takes {cost.num_bytes / 2**20:.0f} MiB with its part of the cache; leave {name} "
                "out of --device, or allow more --memory or fewer --cache-sessions"
            )
    divide(num_blocks, rooms)  # a device must not be left over
    return Capacity(min(sum(rooms), num_blocks), cost, sum(limits))


def rooms_of(limits: Sequence[int], cost: BlockCost) -> tuple[int, ...]:
    """How many blocks fit on each of several devices."""
    return tuple(limit // cost.num_bytes for limit in limits)


def share(limit_bytes: int, free: Sequence[int]) -> tuple[int, ...]:
    """A limit for all devices together, cut in proportion to the free memory of each."""
    in_all = max(1, sum(free))
    return tuple(limit_bytes * free_bytes // in_all for free_bytes in free)


def divide(num_blocks: int, rooms: Sequence[int]) -> tuple[int, ...]:
    """How many of the blocks each device gets, in proportion to how many it has room for.

    Each gets one at least; none more than it has room for, unless there are more blocks than
    room. Raises ConfigError for more devices than blocks.
    """
    num_devices = len(rooms)
    if num_blocks < num_devices:
        raise ConfigError(
            f"{num_devices} devices are named for {num_blocks} blocks, and each holds one at "
            "least; name fewer with --device, or serve more blocks"
        )
    # One each, and the rest by largest remainder, which rounds nobody up past his room.
    rest, weights = num_blocks - num_devices, [max(0, room - 1) for room in rooms]
    if not sum(weights):
        weights = [1] * num_devices
    quotas = [divmod(rest * weight, sum(weights)) for weight in weights]
    num_left = rest - sum(whole for whole, _ in quotas)
    by_remainder = sorted(range(num_devices), key=lambda i: -quotas[i][1])
    rounded_up = set(by_remainder[:num_left])
    return tuple(1 + whole + (i in rounded_up) for i, (whole, _) in enumerate(quotas))

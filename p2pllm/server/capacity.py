"""How many blocks a server should have: what fits beside the attention cache.

Petals fills the memory with blocks and gives the cache what is left. With many users sessions then
wait for cache, longer than any hop takes; to reserve the cache first explains most of what a better
placement gains (arXiv 2512.21884, which calls the number of sessions R). So here the cache of a
stated number of sessions comes first, and blocks get what remains. Each block has its own part of
the cache, so n blocks take n × (weights + cache) bytes.

Pure: what is free is measured elsewhere (`p2pllm.model.memory`).
"""

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


def block_cost(
    *, weight_bytes: int, kv_values_per_token: int, cache_tokens: int, itemsize: int
) -> BlockCost:
    """The cost of a block with so many bytes of weights.

    `kv_values_per_token`: keys and values of all its key/value heads, of `itemsize` bytes each.
    """
    return BlockCost(weight_bytes, kv_values_per_token * cache_tokens * itemsize)


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

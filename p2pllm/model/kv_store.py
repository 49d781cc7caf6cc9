"""What keys and values are held in: the compute type, or 8 bits and a scale.

A store has room for the tokens of some blocks, as arrays (blocks, 2 · kv_heads, slots, width), all
heads' keys before all heads' values. `p2pllm.model.kv_cache` decides which slots are whose, and
attends; here values are put into slots and read out of them again. There are two stores:

- `PlainStore`: as they are;
- `Int8Store`: signed bytes, with a scale for each token and head. That is half of bfloat16 and
  a quarter of float32, so twice and four times as many tokens fit into the same memory.

Keys have outliers in fixed channels, which is why some hold them with a scale per channel (KIVI,
arXiv 2402.02750). Those scales are known only when many tokens are there, and tokens come one by
one, are rolled back and copied. In 8 bits a scale per token does: see docs/how-to/serve.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from p2pllm.model.config import ModelConfig

MAX_CODE = 127
MIN_SCALE = 1e-30  # of a head of zeros, which is divided by it

# bfloat16 has float32's range, so that no key is too large for it. Rounded to 8 binary digits, a
# scale is never so small that a code would be above 127.49.
SCALE_DTYPE = torch.bfloat16
SCALE_BYTES = SCALE_DTYPE.itemsize


@dataclass(frozen=True, slots=True)
class Room:
    """How large a store is: of `num_blocks` blocks, (heads, num_slots, width) each.

    `num_heads`: of keys and of values, together. Pages are `page_tokens` slots each.
    """

    num_blocks: int
    num_heads: int
    num_slots: int
    width: int
    page_tokens: int


class KVStore(Protocol):
    """Where keys and values lie. Blocks count from the span's first, slots from 0."""

    moved_dtype: torch.dtype
    moved_width: int
    """Of a token's keys or values in one head, as they go to another server."""

    @property
    def arrays(self) -> Sequence[Tensor]:
        """What they lie in, each (blocks, heads, slots, anything)."""

    def write(self, block: int, slots: Tensor, values: Tensor) -> None:
        """Put the keys and values of N tokens into slots (N,) of a block; values: (N, heads, d)."""

    def read_run(self, block: int, start: int, stop: int) -> Tensor:
        """What lies in slots `[start, stop)`: (heads, S, d), perhaps as a view."""

    def read_pages(self, block: int, index: Tensor) -> Tensor:
        """Copy pages together: (len(index) · page_tokens, d). Pages count on from head to head."""

    def export(self, first_block: int, num_blocks: int, slots: Tensor) -> Tensor:
        """Copy T slots of some blocks, as they are held: (blocks, heads, T, moved_width)."""

    def put(self, first_block: int, slots: Tensor, values: Tensor) -> None:
        """Put what `export` gave, of any device, into slots."""

    def is_finite(self, values: Tensor) -> bool:
        """Is there neither NaN nor infinity in what `export` gave?"""


def copy_pages(store: KVStore, source: Tensor, target: Tensor, page_tokens: int) -> None:
    """Copy pages, by number, to others, in all blocks."""
    for array in store.arrays:
        pages = array.view(*array.shape[:2], array.shape[2] // page_tokens, -1)
        pages.index_copy_(2, target, pages.index_select(2, source))


def clear(store: KVStore, start: int, stop: int) -> None:
    """Zero slots `[start, stop)` of all blocks."""
    for array in store.arrays:
        array[:, :, start:stop] = 0


class PlainStore:
    """Keys and values as they are computed."""

    def __init__(self, room: Room, dtype: torch.dtype, device: torch.device | str) -> None:
        self.values = _zeros(room, room.width, dtype, device)
        self.arrays = (self.values,)
        self.moved_dtype = dtype
        self.moved_width = room.width
        self._page_values = room.page_tokens * room.width

    def write(self, block: int, slots: Tensor, values: Tensor) -> None:
        self.values[block].index_copy_(1, slots, values.transpose(0, 1))

    def read_run(self, block: int, start: int, stop: int) -> Tensor:
        return self.values[block, :, start:stop]

    def read_pages(self, block: int, index: Tensor) -> Tensor:
        # One index over heads and pages: twice as fast as selecting pages along dimension 1.
        pages = self.values[block].view(-1, self._page_values)
        return pages.index_select(0, index).view(-1, self.moved_width)

    def export(self, first_block: int, num_blocks: int, slots: Tensor) -> Tensor:
        return self.values[first_block : first_block + num_blocks].index_select(2, slots)

    def put(self, first_block: int, slots: Tensor, values: Tensor) -> None:
        blocks = self.values[first_block : first_block + values.shape[0]]
        blocks.index_copy_(2, slots, values.to(blocks.device, blocks.dtype))

    def is_finite(self, values: Tensor) -> bool:
        return bool(torch.isfinite(values).all())


class Int8Store:
    """Keys and values as signed bytes: value = scale · code, a scale for each token and head.

    What is not finite stays so: the scale is NaN or infinite then.
    """

    def __init__(self, room: Room, dtype: torch.dtype, device: torch.device | str) -> None:
        self.codes = _zeros(room, room.width, torch.int8, device)
        self.scales = _zeros(room, 1, SCALE_DTYPE, device)
        self.arrays = (self.codes, self.scales)
        self.moved_dtype = torch.int8
        self.moved_width = room.width + SCALE_BYTES  # the codes, then the bytes of the scale
        self._dtype = dtype
        self._width = room.width
        self._page_tokens = room.page_tokens

    def write(self, block: int, slots: Tensor, values: Tensor) -> None:
        codes, scales = quantized(values)
        self.codes[block].index_copy_(1, slots, codes.transpose(0, 1))
        self.scales[block].index_copy_(1, slots, scales.transpose(0, 1))

    def read_run(self, block: int, start: int, stop: int) -> Tensor:
        return self._values(self.codes[block, :, start:stop], self.scales[block, :, start:stop])

    def read_pages(self, block: int, index: Tensor) -> Tensor:
        codes = self.codes[block].view(-1, self._page_tokens * self._width)
        scales = self.scales[block].view(-1, self._page_tokens)
        return self._values(
            codes.index_select(0, index).view(-1, self._width),
            scales.index_select(0, index).view(-1, 1),
        )

    def _values(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes.to(self._dtype).mul_(scales)

    def export(self, first_block: int, num_blocks: int, slots: Tensor) -> Tensor:
        blocks = slice(first_block, first_block + num_blocks)
        codes = self.codes[blocks].index_select(2, slots)
        scales = self.scales[blocks].index_select(2, slots)
        return torch.cat((codes, scales.view(torch.int8)), -1)

    def put(self, first_block: int, slots: Tensor, values: Tensor) -> None:
        blocks = slice(first_block, first_block + values.shape[0])
        values = values.to(self.codes.device)
        self.codes[blocks].index_copy_(2, slots, values[..., : self._width])
        self.scales[blocks].index_copy_(2, slots, self._scales(values))

    def is_finite(self, values: Tensor) -> bool:
        return bool(torch.isfinite(self._scales(values)).all())

    def _scales(self, values: Tensor) -> Tensor:
        return values[..., self._width :].contiguous().view(SCALE_DTYPE)


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and scales with a last dimension of 1, of what shares a scale along the last one."""
    values = values.float()
    scales = values.abs().amax(-1, keepdim=True).div_(MAX_CODE).to(SCALE_DTYPE)
    scales.clamp_(min=MIN_SCALE)
    return values.div(scales).round_().to(torch.int8), scales


def token_bytes(config: ModelConfig, dtype: torch.dtype, kv_bits: int) -> int:
    """Memory of one token's keys and values in one block."""
    plain_bytes = config.head_dim * dtype.itemsize
    head_bytes = int(config.head_dim + SCALE_BYTES if kv_bits == 8 else plain_bytes)
    return 2 * config.num_kv_heads * head_bytes


def _zeros(room: Room, width: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    shape = (room.num_blocks, room.num_heads, room.num_slots, width)
    return torch.zeros(shape, dtype=dtype, device=device)

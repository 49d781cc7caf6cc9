"""Reading and writing bytes, with every bound checked.

`Reader` is how all foreign bytes are parsed: whatever is short, long or out of range ends in
`CodecError` and nothing else. `pack` and `unpack` are msgpack with the settings of the protocol:
maps have text keys, each once, there are no extension types, and size and depth are bounded.
"""

import struct
from typing import Any

import msgpack

from p2pllm.errors import CodecError, LocalProtocolError

MAX_DEPTH = 16  # arrays and maps within each other; a message's body needs 3

# What a value may be, besides arrays and maps. Extension types (also msgpack's timestamp) are not.
_ATOMS = frozenset({int, float, str, bytes, bool, type(None)})


class Reader:
    """A cursor over bytes that never reads past their end."""

    __slots__ = ("_at", "_view")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(data)
        self._at = 0

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._view) - self._at

    def take(self, num_bytes: int) -> memoryview:
        """The next `num_bytes` bytes, not copied."""
        if num_bytes < 0 or num_bytes > self.remaining:
            raise CodecError(f"{num_bytes} bytes expected, {self.remaining} left")
        start, self._at = self._at, self._at + num_bytes
        return self._view[start : self._at]

    def fields(self, layout: struct.Struct) -> tuple[int, ...]:
        """Numbers that stand one after the other."""
        return layout.unpack(self.take(layout.size))

    def finish(self) -> None:
        """Raise CodecError unless everything has been read."""
        if self.remaining:
            raise CodecError(f"{self.remaining} bytes too many")


def pack(value: object) -> bytes:
    """Encode maps, arrays, text, bytes, numbers, None and booleans in msgpack."""
    try:
        return bytes(msgpack.packb(value, use_bin_type=True))
    except (TypeError, ValueError, OverflowError) as exc:
        raise LocalProtocolError(f"cannot be packed: {exc}") from exc


def unpack(data: bytes | memoryview, *, max_bytes: int) -> Any:
    """Decode what `pack` wrote; raises CodecError for anything else or anything larger."""
    if len(data) > max_bytes:
        raise CodecError(f"{len(data)} bytes where {max_bytes} are allowed")
    try:
        # The unpacker bounds every length by the buffer's, and the depth at 1024.
        value = msgpack.unpackb(data, raw=False, object_pairs_hook=_map)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise CodecError(f"not msgpack: {exc}") from exc
    _check(value, MAX_DEPTH)
    return value


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """A map of the pairs; two readers must never see two values under one key."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CodecError("a map has a key twice")
    return result


def _check(value: Any, depth: int) -> None:
    """Refuse keys that are not text, extension types, and what is nested too deeply."""
    if type(value) in _ATOMS:
        return
    if depth == 0:
        raise CodecError(f"more than {MAX_DEPTH} arrays and maps within each other")
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            raise CodecError("a map's key is not a text")
        value = value.values()
    elif type(value) is not list:
        raise CodecError("an extension type")
    for item in value:
        _check(item, depth - 1)


def unpack_map(data: bytes | memoryview, *, max_bytes: int) -> dict[str, Any]:
    """Decode a map with text keys."""
    value = unpack(data, max_bytes=max_bytes)
    if type(value) is not dict:
        raise CodecError("a map is expected")
    return value

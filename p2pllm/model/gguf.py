"""GgufFile: a GGUF file as metadata and tensors, read by memory map.

The layout is that of the GGUF specification, versions 2 and 3 (ggml's docs/gguf.md): a header,
key-value metadata, the tensors' names, shapes, types and offsets, then their data. The `gguf`
library knows the types and turns quantized blocks into float32, but its reader makes an array
of every string: 1.4 s for the 49,152 tokens and the merges of SmolLM2, at every start of a server
or client. So the header is walked here (20 ms), and an array becomes Python values only when
somebody asks for it.

A file may come from anywhere. Every length in it is checked against the file's end before it is
used, and whatever is wrong with it ends in CheckpointError. What the tensors *mean* is decided in
`p2pllm.model.gguf_llama`.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from p2pllm.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes; of the data, where general.alignment says nothing else
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 65_535  # of a metadata key, by the specification

SUPPORTED = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
)

# One group of 32 weights of the types whose codes we take as they are.
_GROUPS = {
    GGMLQuantizationType.Q4_0: np.dtype([("d", "<f2"), ("q", "u1", 16)]),
    GGMLQuantizationType.Q4_1: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    GGMLQuantizationType.Q8_0: np.dtype([("d", "<f2"), ("q", "i1", 32)]),
}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file: shape as torch has it (outermost dimension first), place, type."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GroupCodes:
    """A quantized matrix (out, in) as the file holds it: weight = scale · code + centre.

    `codes` (out, in) int8, signed; `scales`, `centres` (out, in / 32) float32.
    """

    bits: int
    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    centres: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Value:
    """Where a metadata value lies; an array has `count` elements of `kind`, a scalar None."""

    kind: GGUFValueType
    count: int | None
    start: int
    stop: int


class GgufFile:
    """An open GGUF file. Raises CheckpointError, at opening and at any access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorEntry] = {}
        self._values: dict[str, _Value] = {}
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path}: cannot be read ({exc})") from exc
        self._cursor = _Cursor(self._data, path)
        try:
            self._read_header()
        except (struct.error, OverflowError, UnicodeDecodeError) as exc:
            raise CheckpointError(f"{path}: the header is truncated or damaged ({exc})") from exc

    def let_go(self) -> None:
        """Give the pages that were read back to the system, where it can be told; they are read
        again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    # --- metadata ------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """The keys of all metadata."""
        return iter(self._values)

    def scalar(self, key: str) -> Any:
        """The value of `key`: bool, int, float or str; None if it is absent or an array."""
        value = self._values.get(key)
        if value is None or value.count is not None:
            return None
        if value.kind is GGUFValueType.STRING:
            return self._text(value.start, key)
        return struct.unpack_from(_SCALARS[value.kind], self._data, value.start)[0]

    def strings(self, key: str) -> list[str]:
        """The array of strings `key`; empty if absent."""
        value = self._array(key, {GGUFValueType.STRING})
        if value is None:
            return []
        data, at, texts = self._data, value.start, []
        try:
            for _ in range(value.count or 0):
                stop = at + 8 + _U64.unpack_from(data, at)[0]
                texts.append(data[at + 8 : stop].decode())
                at = stop
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{self.path}: {key} is not text ({exc})") from exc
        return texts

    def numbers(self, key: str) -> list[int] | list[float] | list[bool]:
        """The array of numbers `key`; empty if absent."""
        value = self._array(key, set(_SCALARS))
        if value is None or not value.count:
            return []
        dtype = np.dtype(_SCALARS[value.kind])
        numbers: list[Any] = np.frombuffer(self._data, dtype, value.count, value.start).tolist()
        return numbers

    def raw(self, key: str) -> bytes:
        """The value of `key` as the file encodes it, for hashing."""
        value = self._values[key]
        return bytes(self._data[value.start : value.stop])

    def _array(self, key: str, kinds: set[GGUFValueType]) -> _Value | None:
        value = self._values.get(key)
        if value is not None and (value.count is None or value.kind not in kinds):
            raise CheckpointError(f"{self.path}: {key} is of an unexpected type")
        return value

    def _text(self, start: int, what: str) -> str:
        length = _U64.unpack_from(self._data, start)[0]
        try:
            return self._data[start + 8 : start + 8 + length].decode()
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{self.path}: {what} is not text ({exc})") from exc

    # --- tensors -------------------------------------------------------------------------

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor `name`, dequantized. The array may be a read-only view of the file."""
        entry = self._entry(name)
        if entry.type not in SUPPORTED:
            supported = ", ".join(sorted(kind.name for kind in SUPPORTED))
            raise CheckpointError(
                f"{self.path}: tensor {name} is {entry.type.name}, which is not supported; "
                f"{supported} are"
            )
        rows = self._raw(entry).reshape(*entry.shape[:-1], -1)
        values: npt.NDArray[np.float32] = gguf.dequantize(rows, entry.type)
        assert values.shape == entry.shape
        return values

    def codes(self, name: str) -> GroupCodes | None:
        """The matrix `name` without dequantizing it; None if its type is not a simple one.

        The types of groups of 32 with one float16 scale: Q4_0 (weight = d · (q - 8)), Q4_1
        (d · q + m, so the centre of the signed code is m + 8 · d) and Q8_0 (d · q).
        """
        entry = self._entry(name)
        layout = _GROUPS.get(entry.type)
        if layout is None or len(entry.shape) != 2:
            return None
        groups = self._raw(entry).view(layout).reshape(entry.shape[0], -1)  # (out, in / 32)
        scales = groups["d"].astype(np.float32)
        centres = np.zeros_like(scales)
        if entry.type is GGMLQuantizationType.Q8_0:
            return GroupCodes(8, groups["q"].reshape(entry.shape), scales, centres)
        if entry.type is GGMLQuantizationType.Q4_1:
            centres = groups["m"].astype(np.float32) + 8 * scales
        packed = groups["q"]  # (out, in / 32, 16): weights 0 to 15 in the low halves
        unsigned = np.concatenate((packed & 15, packed >> 4), axis=-1)
        codes = unsigned.view(np.int8) - np.int8(8)
        return GroupCodes(4, codes.reshape(entry.shape), scales, centres)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return entry

    def _raw(self, entry: TensorEntry) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._data, np.uint8, entry.num_bytes, entry.start)

    # --- reading the header --------------------------------------------------------------

    def _read_header(self) -> None:
        cursor = self._cursor
        if cursor.take(4) != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file")
        version = cursor.unpack(_U32)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "a big-endian file" if swapped in VERSIONS else f"version {version}"
            raise CheckpointError(f"{self.path}: {why} is not supported; GGUF 2 and 3 are")
        num_tensors, num_values = cursor.unpack(_U64), cursor.unpack(_U64)
        for _ in range(num_values):
            key = cursor.text()
            if key in self._values:
                raise CheckpointError(f"{self.path}: {key} appears twice")
            self._values[key] = self._read_value(key)
        entries = [self._read_entry() for _ in range(num_tensors)]
        self._place(entries, self._alignment())

    def _read_value(self, key: str) -> _Value:
        cursor = self._cursor
        kind, count = self._kind(key), None
        if kind is GGUFValueType.ARRAY:
            kind, count = self._kind(key), cursor.unpack(_U64)
        start, number = cursor.at, 1 if count is None else count
        if kind is GGUFValueType.STRING:
            cursor.skip_strings(number)
        elif kind in _SCALARS:
            cursor.skip(number * struct.calcsize(_SCALARS[kind]))
        else:  # no known key is one
            raise CheckpointError(f"{self.path}: {key} is an array of arrays")
        return _Value(kind, count, start, cursor.at)

    def _kind(self, key: str) -> GGUFValueType:
        number = self._cursor.unpack(_U32)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise CheckpointError(f"{self.path}: {key} is of unknown type {number}") from None

    def _read_entry(self) -> TensorEntry:
        """One tensor's entry, `start` still counted from the beginning of the data."""
        cursor = self._cursor
        name = cursor.text()
        num_dimensions = cursor.unpack(_U32)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: tensor {name} has {num_dimensions} dimensions")
        shape = tuple(cursor.unpack(_U64) for _ in range(num_dimensions))[::-1]
        number, start = cursor.unpack(_U32), cursor.unpack(_U64)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of unknown type {number}"
            ) from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {shape} in blocks of {block}"
            )
        num_bytes = block_bytes
        for size in (*shape[:-1], shape[-1] // block):
            num_bytes *= size
        return TensorEntry(name, kind, shape, start, num_bytes)

    def _alignment(self) -> int:
        alignment = self.scalar("general.alignment")
        if alignment is None:
            return DEFAULT_ALIGNMENT
        if type(alignment) is not int or alignment < 1:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}")
        return alignment

    def _place(self, entries: list[TensorEntry], alignment: int) -> None:
        data_start = -(-self._cursor.at // alignment) * alignment
        for entry in entries:
            start = data_start + entry.start
            if start + entry.num_bytes > len(self._data):
                raise CheckpointError(
                    f"{self.path}: truncated: tensor {entry.name} ends at byte "
                    f"{start + entry.num_bytes} of {len(self._data)}"
                )
            if entry.name in self.tensors:
                raise CheckpointError(f"{self.path}: tensor {entry.name} appears twice")
            self.tensors[entry.name] = TensorEntry(
                entry.name, entry.type, entry.shape, start, entry.num_bytes
            )


class _Cursor:
    """A place in the file that moves on and never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def take(self, num_bytes: int) -> bytes:
        start = self.at
        self.skip(num_bytes)
        return self.data[start : self.at]

    def skip(self, num_bytes: int) -> None:
        self.at += num_bytes
        self._check()

    def unpack(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return int(value)

    def text(self) -> str:
        """A key or a tensor's name."""
        length = self.unpack(_U64)
        if length > MAX_NAME_BYTES:
            raise CheckpointError(f"{self.path}: the header is damaged: a name of {length} bytes")
        return self.take(length).decode()

    def skip_strings(self, count: int) -> None:
        data, at, unpack = self.data, self.at, _U64.unpack_from  # 400,000 times for Llama 3
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at
        self._check()

    def _check(self) -> None:
        if self.at > len(self.data):
            raise CheckpointError(f"{self.path}: truncated inside the header")

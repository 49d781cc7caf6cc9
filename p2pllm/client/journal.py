"""What each hop has been sent, so that another server can be sent the same.

PETALS keeps two caches of a generation (arXiv 2312.08361 §3.1): servers hold keys and values, the
client the inputs of every hop. When a server dies, its successor is given those inputs as one
prefill. They are kept as they lay on the wire: decoding and coding them once more would give the
successor other inputs than its predecessor had, and other tokens in the end.

A `Journal` belongs to one sequence at one hop. It is a list of *runs*, stretches of tokens that
follow each other and are coded alike, each a view of the first rows of a *piece*: up to 1 MiB of
rows in two buffers (INT8 scales apart from codes, see `p2pllm.wire.rows`). Decoding adds one row at
a time to the last piece, so a token costs its bytes and no object. Forks share pieces. There may be
holes: what servers sent each other arrives here as echoes, and an echo may be lost.

The `JournalStore` accounts for all pieces of a client and moves the oldest into a `Spill` when
memory runs out: those that are full first; should they not suffice, the largest others, but never
the one that is being added to. So at most `max_bytes` and one piece are in memory.

Not here: the file (`p2pllm.client.spill`), and when to replay or to fill a hole (the session).
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Protocol

from p2pllm.errors import LocalProtocolError
from p2pllm.wire.rows import RowCoding, Rows, assembled, split
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**20  # written and freed at once: few per journal, and each soon written
# What is spilled when no piece is full. Such pieces are searched through and may be tiny, so that
# is done once in a while rather than for every token.
_SPARE_SHARE = 1 / 8


class Spill(Protocol):
    """Room for bytes outside of memory; raises P2PLLMError when it has none left."""

    def write(self, data: bytes | bytearray) -> int:
        """Keep `data`; returns the offset to read it from."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Any part of what was written."""
        ...

    def free(self, offset: int, length: int) -> None:
        """Forget a written range, or a part of it."""
        ...

    def close(self) -> None:
        """Forget everything."""
        ...


class _Piece:
    """Rows of one coding, in memory or spilled, seen by one or more runs."""

    __slots__ = ("coding", "num_rows", "num_runs", "scales", "scales_at", "values", "values_at")

    def __init__(self, coding: RowCoding) -> None:
        self.coding = coding
        self.num_rows = 0
        self.num_runs = 1
        self.scales = bytearray()
        self.values = bytearray()
        self.scales_at = 0  # where they are in the spill,
        self.values_at: int | None = None  # None: in memory

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.coding.row_bytes


class _Run:
    """Tokens [start, stop): the first stop - start rows of a piece."""

    __slots__ = ("piece", "start", "stop")

    def __init__(self, start: int, stop: int, piece: _Piece) -> None:
        self.start = start
        self.stop = stop
        self.piece = piece


class JournalStore:
    """All journals of a client: accounts for their bytes, and spills the oldest if need be."""

    def __init__(
        self, max_bytes: int, open_spill: Callable[[], Spill], *, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """Nothing is kept yet, and no spill opened before it is needed.

        `max_bytes`: of rows in memory; exceeded by one piece at most, which is of `piece_bytes`,
        or one row if that is larger.
        """
        self.memory_bytes = 0
        self.spilled_bytes = 0
        self.peak_bytes = 0  # the most that was in memory
        self.is_closed = False
        self._max_bytes = max_bytes
        self._piece_bytes = piece_bytes
        self._open_spill = open_spill
        self._spill: Spill | None = None
        # Pieces in memory, as ordered sets. A piece that is full has done its growing.
        self._full: dict[_Piece, None] = {}
        self._growing: dict[_Piece, None] = {}

    def journal(self) -> "Journal":
        """A new, empty journal. Whoever asks for it closes it."""
        return Journal(self)

    def close(self) -> None:
        """Forget everything, and end all journals."""
        self.is_closed = True
        self.memory_bytes = self.spilled_bytes = 0
        self._full.clear()
        self._growing.clear()
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    # For journals only.

    def new_piece(self, coding: RowCoding) -> _Piece:
        """An empty piece, for one run."""
        piece = _Piece(coding)
        self._growing[piece] = None
        return piece

    def room(self, piece: _Piece) -> int:
        """How many more rows the piece may take; one at least if it is empty, however large."""
        if piece.values_at is not None:
            return 0
        max_rows = self._piece_bytes // piece.coding.row_bytes or 1
        return max_rows - piece.num_rows

    def append(self, piece: _Piece, rows: Rows) -> None:
        """Copy rows to the piece's end; there must be room."""
        # Copies: a received message is a view of a much larger buffer, which must not be kept.
        piece.values += rows.values
        if rows.coding.scale_bytes:
            piece.scales += rows.scales
        piece.num_rows += rows.num_rows
        self.memory_bytes += rows.num_rows * rows.coding.row_bytes
        if self.memory_bytes > self.peak_bytes:
            self.peak_bytes = self.memory_bytes
        if self.room(piece) == 0:
            del self._growing[piece]
            self._full[piece] = None
        if self.memory_bytes > self._max_bytes:
            self._make_room(piece)

    def read(self, piece: _Piece, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the piece, copied."""
        coding = piece.coding
        scales = slice(start * coding.scale_bytes, stop * coding.scale_bytes)
        values = slice(start * coding.value_bytes, stop * coding.value_bytes)
        if piece.values_at is None:
            return Rows(coding, stop - start, piece.scales[scales], piece.values[values])
        assert self._spill is not None
        scale_part = b""
        if coding.scale_bytes:
            scale_part = self._spill.read(
                piece.scales_at + scales.start, scales.stop - scales.start
            )
        value_part = self._spill.read(piece.values_at + values.start, values.stop - values.start)
        return Rows(coding, stop - start, scale_part, value_part)

    def cut(self, piece: _Piece, num_rows: int) -> None:
        """Forget all rows of an unshared piece but the first `num_rows`."""
        coding, gone = piece.coding, piece.num_rows - num_rows
        piece.num_rows = num_rows
        if piece.values_at is None:
            del piece.scales[num_rows * coding.scale_bytes :]
            del piece.values[num_rows * coding.value_bytes :]
            self.memory_bytes -= gone * coding.row_bytes
            self._full.pop(piece, None)
            if num_rows:
                self._growing[piece] = None
            else:
                self._growing.pop(piece, None)
            return
        assert self._spill is not None
        self.spilled_bytes -= gone * coding.row_bytes
        offset = piece.values_at + num_rows * coding.value_bytes
        self._spill.free(offset, gone * coding.value_bytes)
        if coding.scale_bytes:
            offset = piece.scales_at + num_rows * coding.scale_bytes
            self._spill.free(offset, gone * coding.scale_bytes)

    def release(self, piece: _Piece) -> None:
        """One run less sees the piece; the last one takes it along."""
        piece.num_runs -= 1
        if piece.num_runs == 0:
            self.cut(piece, 0)

    def _make_room(self, keep: _Piece) -> None:
        """Spill until `max_bytes` hold what is left; not `keep`, unless nothing fits there now."""
        while self._full and self.memory_bytes > self._max_bytes:
            self._spill_out(next(iter(self._full)))
        if self.memory_bytes <= self._max_bytes:
            return
        target = self._max_bytes - int(self._max_bytes * _SPARE_SHARE)
        for piece in sorted(self._growing, key=lambda piece: piece.num_bytes, reverse=True):
            if self.memory_bytes <= target:
                return
            if piece is not keep:
                self._spill_out(piece)

    def _spill_out(self, piece: _Piece) -> None:
        """Move a piece from memory to the spill; if that raises, it is still in memory."""
        if self._spill is None:
            self._spill = self._open_spill()
            logger.info("journal spilling max_bytes=%d", self._max_bytes)
        scales_at = self._spill.write(piece.scales) if piece.coding.scale_bytes else 0
        try:
            piece.values_at = self._spill.write(piece.values)
        except BaseException:
            self._spill.free(scales_at, len(piece.scales))
            raise
        piece.scales_at = scales_at
        piece.scales, piece.values = bytearray(), bytearray()
        self.memory_bytes -= piece.num_bytes
        self.spilled_bytes += piece.num_bytes
        self._full.pop(piece, None)
        self._growing.pop(piece, None)


class Journal:
    """The inputs of one sequence at one hop, by token position.

    All methods but `close` raise LocalProtocolError once it or its store is closed. `put` and
    `read` may raise what the store's spill raises.
    """

    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self._runs: list[_Run] = []  # sorted, not overlapping, none empty
        self._starts: list[int] = []  # of the runs, for bisect
        self._known = 0  # tokens [0, _known) are all there, and perhaps more
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, wherever they are; those shared with forks count in each."""
        return sum((run.stop - run.start) * run.piece.coding.row_bytes for run in self._runs)

    @property
    def known(self) -> int:
        """Tokens [0, known) are all there."""
        self._check_open()
        self._known = self._covered_from(self._known)
        return self._known

    def first_hole(self, start: int, stop: int) -> int | None:
        """The first token in [start, stop) that is missing."""
        self._check_open()
        hole = self._covered_from(start)
        return hole if hole < stop else None

    def put(self, position: int, tensor: WireTensor) -> None:
        """Keep (n, D) as the inputs of tokens [position, position + n).

        Tokens that are there already stay as they are: the hop computed with what came first.
        If the spill is full the rows put so far stay, and putting again adds the others.
        Raises CodecError if `tensor` is malformed.
        """
        self._check_open()
        if position < 0:
            raise LocalProtocolError(f"a token at position {position}")
        rows = split(tensor)
        runs, stop = self._runs, position + rows.num_rows
        if not runs or runs[-1].stop <= position:  # nearly always
            self._insert(len(runs), position, rows)
            return
        start = self._covered_from(position)
        while start < stop:
            index = bisect_left(self._starts, start)
            hole_stop = min(stop, self._starts[index]) if index < len(runs) else stop
            self._insert(index, start, rows.cut(start - position, hole_stop - position))
            start = self._covered_from(hole_stop)

    def truncate(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        self._check_open()
        if position < 0:
            raise LocalProtocolError(f"a journal cut at {position}")
        self._known = min(self._known, position)
        index = bisect_left(self._starts, position)
        gone = self._runs[index:]
        del self._runs[index:], self._starts[index:]
        for run in gone:
            self._store.release(run.piece)
        if index and self._runs[-1].stop > position:
            run = self._runs[-1]
            run.stop = position
            if run.piece.num_runs == 1:
                self._store.cut(run.piece, run.stop - run.start)

    def parts(self, start: int, stop: int, max_tokens: int) -> list[tuple[int, int]]:
        """How `read` divides tokens [start, stop): into few parts of at most `max_tokens`, each
        of one coding. Raises LocalProtocolError if a token is missing."""
        self._check_open()
        if not 0 <= start <= stop or max_tokens < 1:
            raise LocalProtocolError(f"tokens [{start}, {stop}) in parts of {max_tokens}")
        hole = self.first_hole(start, stop)
        if hole is not None:
            raise LocalProtocolError(f"token {hole} is not in the journal")
        parts: list[tuple[int, int]] = []
        begin, coding = start, None
        for run in self._runs[bisect_right(self._starts, start) - 1 :] if start < stop else ():
            if run.start >= stop:
                break
            if coding not in (None, run.piece.coding) and begin < run.start:
                parts.append((begin, run.start))
                begin = run.start
            coding = run.piece.coding
            while min(run.stop, stop) - begin >= max_tokens:
                parts.append((begin, begin + max_tokens))
                begin += max_tokens
        return [*parts, (begin, stop)] if begin < stop else parts

    def read(self, start: int, stop: int, max_tokens: int) -> list[WireTensor]:
        """The inputs of tokens [start, stop), in order, one tensor for each of `parts`.

        All of them are in memory then, so a long replay is better read a part at a time.
        Raises LocalProtocolError if a token is missing.
        """
        return [self._read(*part) for part in self.parts(start, stop, max_tokens)]

    def _read(self, start: int, stop: int) -> WireTensor:
        rows: list[Rows] = []
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            run = self._runs[index]
            end = min(run.stop, stop)
            rows.append(self._store.read(run.piece, start - run.start, end - run.start))
            start, index = end, index + 1
        return assembled(rows)

    def copy(self) -> "Journal":
        """A journal of a forked sequence, with the same tokens; shares their bytes."""
        self._check_open()
        fork = Journal(self._store)
        for run in self._runs:
            run.piece.num_runs += 1
            fork._runs.append(_Run(run.start, run.stop, run.piece))
        fork._starts = self._starts.copy()
        fork._known = self._known
        return fork

    def close(self) -> None:
        """Forget everything. Closing twice, or after the store, does nothing."""
        if not self._is_closed and not self._store.is_closed:
            self.truncate(0)
        self._runs, self._starts = [], []
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed or self._store.is_closed:
            raise LocalProtocolError("the journal is closed")

    def _covered_from(self, position: int) -> int:
        """The first missing token at or after `position`."""
        index = bisect_right(self._starts, position) - 1
        if index < 0 or self._runs[index].stop <= position:
            return position
        covered = self._runs[index].stop
        for run in self._runs[index + 1 :]:
            if run.start != covered:
                break
            covered = run.stop
        return covered

    def _insert(self, index: int, start: int, rows: Rows) -> None:
        """Put rows that fit the hole before run `index`."""
        store, coding, done = self._store, rows.coding, 0
        while done < rows.num_rows:
            run = self._runs[index - 1] if index else None
            if run is None or not self._can_grow(run, start + done, coding):
                run = _Run(start + done, start + done, store.new_piece(coding))
                self._runs.insert(index, run)
                self._starts.insert(index, run.start)
                index += 1
            count = min(rows.num_rows - done, store.room(run.piece))
            run.stop += count
            store.append(
                run.piece, rows if count == rows.num_rows else rows.cut(done, done + count)
            )
            done += count

    def _can_grow(self, run: _Run, stop: int, coding: RowCoding) -> bool:
        """Whether rows at `stop` may follow those of `run` in its piece.

        Not if a fork of this journal, or this one before it was truncated, has put others there.
        """
        piece = run.piece
        return (
            run.stop == stop
            and piece.num_rows == stop - run.start
            and piece.coding == coding
            and self._store.room(piece) > 0
        )

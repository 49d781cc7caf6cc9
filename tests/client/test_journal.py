import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from p2pllm.client.journal import PIECE_BYTES, Journal, JournalStore
from p2pllm.client.spill import SpillFile
from p2pllm.errors import CodecError, LocalProtocolError, SessionLost
from p2pllm.wire.rows import rows_of
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor

PLENTY = 2**30


class MemorySpill:
    """Ranges of a growing bytearray; knows which bytes are in use."""

    def __init__(self, room: int = PLENTY) -> None:
        self.data = bytearray()
        self.used = bytearray()
        self.room = room
        self.is_closed = False

    @property
    def used_bytes(self) -> int:
        return sum(self.used)

    def write(self, data: bytes | bytearray) -> int:
        if self.used_bytes + len(data) > self.room:
            raise SessionLost("no room")
        self.data += data
        self.used += b"\x01" * len(data)
        return len(self.data) - len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert length
        assert self.used[offset : offset + length] == b"\x01" * length
        return bytes(self.data[offset : offset + length])

    def free(self, offset: int, length: int) -> None:
        assert self.used[offset : offset + length] == b"\x01" * length
        self.used[offset : offset + length] = bytes(length)

    def close(self) -> None:
        self.is_closed = True


def store(max_bytes: int = PLENTY, *, piece_bytes: int = PIECE_BYTES) -> JournalStore:
    return JournalStore(max_bytes, MemorySpill, piece_bytes=piece_bytes)


def floats(num_rows: int, first: int = 0, width: int = 2) -> WireTensor:
    """Rows of float32 (so 4 * width bytes) that hold nothing but `first`, `first + 1`, ..."""
    header = TensorHeader(TensorCodec.RAW, Compression.NONE, DType.FLOAT32, (num_rows, width))
    data = b"".join(bytes([first + row]) * (4 * width) for row in range(num_rows))
    return WireTensor(header, data)


def marks(tensors: list[WireTensor]) -> list[list[int]]:
    """What `floats` put into each row of each tensor."""
    return [
        [rows_of(tensor, row, row + 1).data[-1] for row in range(tensor.header.shape[0])]
        for tensor in tensors
    ]


def test_tokens_put_one_by_one_are_read_as_one_tensor() -> None:
    journal = store().journal()
    for position in range(5):
        journal.put(position, floats(1, first=position))

    (tensor,) = journal.read(0, 5, max_tokens=8)

    assert tensor == floats(5)
    assert journal.known == 5
    assert journal.num_bytes == 5 * 8


def test_read_cuts_tensors_at_max_tokens_wherever_they_were_put() -> None:
    journal = store(piece_bytes=24).journal()  # 3 rows
    journal.put(0, floats(4))
    journal.put(4, floats(4, first=4))

    assert marks(journal.read(1, 8, max_tokens=3)) == [[1, 2, 3], [4, 5, 6], [7]]


def test_rows_of_other_coding_begin_another_tensor() -> None:
    journal = store().journal()
    journal.put(0, floats(2))
    journal.put(2, floats(1, first=2, width=3))
    journal.put(3, floats(2, first=3))

    assert marks(journal.read(0, 5, max_tokens=8)) == [[0, 1], [2], [3, 4]]


def test_known_tokens_keep_what_was_put_first() -> None:
    journal = store().journal()
    journal.put(1, floats(2, first=1))

    journal.put(0, floats(5, first=50))

    assert marks(journal.read(0, 5, max_tokens=8)) == [[50, 1, 2, 53, 54]]


def test_what_lies_beyond_a_hole_is_kept_until_the_hole_is_filled() -> None:
    journal = store().journal()
    journal.put(0, floats(2))
    journal.put(4, floats(2, first=4))

    assert journal.known == 2
    assert journal.first_hole(0, 6) == 2
    assert journal.first_hole(3, 6) == 3
    assert journal.first_hole(4, 6) is None
    assert journal.first_hole(0, 2) is None
    with pytest.raises(LocalProtocolError, match="token 2"):
        journal.read(0, 6, max_tokens=8)
    journal.put(2, floats(2, first=2))
    assert journal.known == 6
    assert marks(journal.read(0, 6, max_tokens=8)) == [[0, 1, 2, 3, 4, 5]]


def test_truncated_tokens_are_put_anew() -> None:
    journals = store()
    journal = journals.journal()
    journal.put(0, floats(4))
    journal.put(6, floats(4, first=6))

    journal.truncate(2)

    assert journal.known == 2
    assert journals.memory_bytes == journal.num_bytes == 2 * 8
    journal.put(2, floats(1, first=90))
    assert marks(journal.read(0, 3, max_tokens=8)) == [[0, 1, 90]]


def test_a_fork_shares_bytes_and_goes_its_own_way() -> None:
    journals = store()
    journal = journals.journal()
    journal.put(0, floats(4))

    fork = journal.copy()
    assert journals.memory_bytes == 4 * 8
    journal.put(4, floats(1, first=10))
    fork.put(4, floats(1, first=20))
    journal.truncate(3)
    journal.put(3, floats(1, first=30))

    assert marks(journal.read(0, 4, max_tokens=8)) == [[0, 1, 2, 30]]
    assert marks(fork.read(0, 5, max_tokens=8)) == [[0, 1, 2, 3, 20]]
    journal.close()
    assert marks(fork.read(0, 5, max_tokens=8)) == [[0, 1, 2, 3, 20]]
    fork.close()
    assert journals.memory_bytes == 0


def test_the_head_of_a_long_run_is_spilled_and_its_tail_is_not() -> None:
    spill = MemorySpill()
    journals = JournalStore(64, lambda: spill, piece_bytes=32)  # 8 rows, pieces of 4
    journal = journals.journal()

    for position in range(22):
        journal.put(position, floats(1, first=position))

    assert journals.spilled_bytes == spill.used_bytes == 16 * 8
    assert bytes(spill.data) == b"".join(bytes([row]) * 8 for row in range(16))
    assert journals.memory_bytes == 6 * 8
    assert marks(journal.read(0, 22, max_tokens=30)) == [list(range(22))]


def test_the_piece_that_is_added_to_stays_even_if_it_alone_is_too_much() -> None:
    journals = store(max_bytes=8, piece_bytes=32)
    journal, other = journals.journal(), journals.journal()
    other.put(0, floats(1))

    for position in range(3):
        journal.put(position, floats(1, first=position))

    assert journals.memory_bytes == 3 * 8
    assert journals.spilled_bytes == other.num_bytes


def test_a_long_prefill_never_takes_more_memory_than_the_budget_and_a_piece() -> None:
    journals = store(max_bytes=64, piece_bytes=32)

    journals.journal().put(0, floats(200))

    assert journals.peak_bytes <= 64 + 32


def test_many_short_journals_are_spilled_too() -> None:
    journals = store(max_bytes=64)
    several = [journals.journal() for _ in range(30)]

    for position in range(4):
        for journal in several:
            journal.put(position, floats(1, first=position))

    assert journals.memory_bytes <= 64
    for journal in several:
        assert marks(journal.read(0, 4, max_tokens=4)) == [[0, 1, 2, 3]]


def test_truncating_and_closing_give_spilled_bytes_back() -> None:
    spill = MemorySpill()
    journals = JournalStore(0, lambda: spill, piece_bytes=32)
    journal = journals.journal()
    journal.put(0, floats(12))
    assert spill.used_bytes == 12 * 8

    journal.truncate(6)
    assert journals.spilled_bytes == spill.used_bytes == 6 * 8
    journal.close()

    assert journals.spilled_bytes == spill.used_bytes == 0


def test_no_spill_is_opened_while_memory_suffices() -> None:
    opened: list[MemorySpill] = []

    def open_spill() -> MemorySpill:
        opened.append(MemorySpill())
        return opened[-1]

    journals = JournalStore(80, open_spill)
    journals.journal().put(0, floats(10))
    assert opened == []
    journals.journal().put(0, floats(1))

    assert len(opened) == 1
    journals.close()
    assert opened[0].is_closed


def test_a_full_spill_is_said_and_loses_nothing() -> None:
    spill = MemorySpill(room=40)
    journals = JournalStore(0, lambda: spill, piece_bytes=32)
    journal = journals.journal()

    with pytest.raises(SessionLost):
        journal.put(0, floats(12))

    assert journal.known == 8
    assert marks(journal.read(0, 8, max_tokens=8)) == [list(range(8))]
    spill.room = PLENTY
    journal.put(0, floats(12))
    assert marks(journal.read(0, 12, max_tokens=12)) == [list(range(12))]


def test_a_spill_that_takes_scales_but_no_codes_keeps_neither() -> None:
    spill = MemorySpill(room=40)
    journal = JournalStore(0, lambda: spill, piece_bytes=66).journal()
    header = TensorHeader(TensorCodec.INT8, Compression.NONE, DType.FLOAT32, (1, 64))

    with pytest.raises(SessionLost):
        journal.put(0, WireTensor(header, bytes(range(66))))

    assert spill.used_bytes == 0
    (tensor,) = journal.read(0, 1, max_tokens=1)
    assert tensor.data == bytes(range(66))


def test_a_received_buffer_is_not_kept() -> None:
    journal = store().journal()
    message = bytearray(1000)
    tensor = floats(1)
    message[500:508] = tensor.data

    journal.put(0, WireTensor(tensor.header, memoryview(message)[500:508]))

    message.clear()  # BufferError if a view of it were left
    assert journal.read(0, 1, max_tokens=1) == [tensor]


def test_a_malformed_tensor_is_refused_and_changes_nothing() -> None:
    journal = store().journal()
    tensor = floats(2)

    with pytest.raises(CodecError):
        journal.put(0, WireTensor(tensor.header, tensor.data[:-1]))

    assert journal.known == 0


CALLS: list[Callable[[Journal], object]] = [
    lambda journal: journal.put(0, floats(1)),
    lambda journal: journal.known,
    lambda journal: journal.first_hole(0, 1),
    lambda journal: journal.truncate(0),
    lambda journal: journal.read(0, 0, 1),
    lambda journal: journal.copy(),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("closes", ["journal", "store"])
def test_a_closed_journal_is_not_used(call: Callable[[Journal], object], closes: str) -> None:
    journals = store()
    journal = journals.journal()
    journal.put(0, floats(1))
    if closes == "journal":
        journal.close()
    else:
        journals.close()

    with pytest.raises(LocalProtocolError, match="closed"):
        call(journal)

    journal.close()  # again: nothing
    assert journals.memory_bytes == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda journal: journal.put(-1, floats(1)),
        lambda journal: journal.truncate(-1),
        lambda journal: journal.read(-1, 0, 1),
        lambda journal: journal.read(1, 0, 1),
        lambda journal: journal.read(0, 1, 0),
    ],
)
def test_impossible_positions_are_our_mistake(call: Callable[[Journal], object]) -> None:
    journal = store().journal()
    journal.put(0, floats(2))

    with pytest.raises(LocalProtocolError):
        call(journal)


def test_a_token_costs_its_bytes_and_no_object() -> None:
    journal = store().journal()

    for position in range(20_000):
        journal.put(position, floats(1))

    pieces = [run.piece for run in journal._runs]
    assert len(pieces) == 1
    # A bytearray that grows is an eighth larger than its contents at most.
    assert sys.getsizeof(pieces[0].values) <= 1.13 * 20_000 * 8 + 100


WIDTH = 64
CODINGS = st.sampled_from(
    [
        (TensorCodec.RAW, DType.FLOAT16, WIDTH),
        (TensorCodec.BF16, DType.FLOAT32, WIDTH),
        (TensorCodec.INT8, DType.FLOAT32, 2 * WIDTH),
        (TensorCodec.INT8, DType.BFLOAT16, 5),  # straddles, so becomes float32
    ]
)
ROW_BYTES = 132  # of the largest
PIECE = 4 * ROW_BYTES
BUDGET = 10 * ROW_BYTES
POSITIONS = st.integers(0, 30)

Kept = dict[int, WireTensor]  # what is known of each token


class JournalMachine(RuleBasedStateMachine):
    """Journals of one store against a dict of single rows each."""

    journals: Bundle[tuple[Journal, Kept]] = Bundle("journals")

    def __init__(self) -> None:
        super().__init__()
        self.spill = self.open_spill()
        self.store = JournalStore(BUDGET, lambda: self.spill, piece_bytes=PIECE)
        self.live: list[tuple[Journal, Kept]] = []
        self.count = 0

    def open_spill(self) -> MemorySpill | SpillFile:
        return MemorySpill()

    def spilled(self) -> int:
        assert isinstance(self.spill, MemorySpill)
        return self.spill.used_bytes

    def teardown(self) -> None:
        for journal, kept in self.live:
            self.check(journal, kept, 0, 40, 3)
            journal.close()
        assert self.store.memory_bytes == self.store.spilled_bytes == self.spilled() == 0
        self.store.close()
        self.spill.close()  # which the store may not have come to open

    @initialize(target=journals)
    def first(self) -> tuple[Journal, Kept]:
        return self.added(self.store.journal(), {})

    @rule(target=journals)
    def another(self) -> tuple[Journal, Kept]:
        return self.added(self.store.journal(), {})

    @rule(one=journals, position=POSITIONS, num_rows=st.integers(1, 12), coding=CODINGS)
    def put(
        self,
        one: tuple[Journal, Kept],
        position: int,
        num_rows: int,
        coding: tuple[TensorCodec, DType, int],
    ) -> None:
        journal, kept = one
        tensor = self.tensor(num_rows, coding)
        journal.put(position, tensor)
        for row in range(num_rows):
            kept.setdefault(position + row, rows_of(tensor, row, row + 1))

    @rule(one=journals, num_tokens=st.integers(1, 20), coding=CODINGS)
    def decode(
        self, one: tuple[Journal, Kept], num_tokens: int, coding: tuple[TensorCodec, DType, int]
    ) -> None:
        for _ in range(num_tokens):
            self.put(one, one[0].known, 1, coding)

    @rule(one=journals, position=st.integers(0, 45))
    def truncate(self, one: tuple[Journal, Kept], position: int) -> None:
        journal, kept = one
        journal.truncate(position)
        for gone in [token for token in kept if token >= position]:
            del kept[gone]

    @rule(
        one=journals, start=POSITIONS, num_tokens=st.integers(0, 20), max_tokens=st.integers(1, 9)
    )
    def read(self, one: tuple[Journal, Kept], start: int, num_tokens: int, max_tokens: int) -> None:
        self.check(*one, start, start + num_tokens, max_tokens)

    @rule(target=journals, one=journals)
    def copy(self, one: tuple[Journal, Kept]) -> tuple[Journal, Kept]:
        journal, kept = one
        return self.added(journal.copy(), kept.copy())

    @rule(one=consumes(journals))
    def close(self, one: tuple[Journal, Kept]) -> None:
        self.live = [other for other in self.live if other[0] is not one[0]]
        one[0].close()

    @invariant()
    def what_is_known_is_known(self) -> None:
        for journal, kept in self.live:
            assert journal.known == next(at for at in range(len(kept) + 1) if at not in kept)
            assert journal.num_bytes == sum(len(row.data) for row in kept.values())

    @invariant()
    def memory_is_bounded_and_accounted(self) -> None:
        pieces = {run.piece for journal, _ in self.live for run in journal._runs}
        spillable = {*self.store._full, *self.store._growing}
        assert spillable == {piece for piece in pieces if piece.values_at is None}
        in_memory = sum(len(piece.scales) + len(piece.values) for piece in pieces)
        assert self.store.memory_bytes == in_memory <= BUDGET + PIECE
        assert self.store.peak_bytes <= BUDGET + PIECE
        assert self.store.spilled_bytes == self.spilled()

    def added(self, journal: Journal, kept: Kept) -> tuple[Journal, Kept]:
        self.live.append((journal, kept))
        return journal, kept

    def check(self, journal: Journal, kept: Kept, start: int, stop: int, max_tokens: int) -> None:
        hole = next((token for token in range(start, stop) if token not in kept), None)
        assert journal.first_hole(start, stop) == hole
        if hole is not None:
            with pytest.raises(LocalProtocolError):
                journal.read(start, stop, max_tokens)
            stop = hole
        tensors = journal.read(start, stop, max_tokens)
        rows = [
            rows_of(tensor, row, row + 1)
            for tensor in tensors
            for row in range(tensor.header.shape[0])
        ]
        assert rows == [kept[token] for token in range(start, stop)]
        assert all(tensor.header.shape[0] <= max_tokens for tensor in tensors)
        for one, following in pairwise(tensors):
            is_like = (one.header.codec, one.header.dtype, one.header.shape[1]) == (
                following.header.codec,
                following.header.dtype,
                following.header.shape[1],
            )
            assert not is_like or one.header.shape[0] == max_tokens

    def tensor(self, num_rows: int, coding: tuple[TensorCodec, DType, int]) -> WireTensor:
        """Every one with other bytes: small scales, then any codes."""
        codec, dtype, width = coding
        header = TensorHeader(codec, Compression.NONE, dtype, (num_rows, width))
        self.count += 1
        return WireTensor(
            header, bytes((self.count * 31 + at * 7) % 120 for at in range(header.coded_bytes))
        )


class SpillFileMachine(JournalMachine):
    """The same over a real file, whose length is bounded by what was ever in it at once."""

    def open_spill(self) -> MemorySpill | SpillFile:
        return SpillFile()

    def spilled(self) -> int:
        assert isinstance(self.spill, SpillFile)
        assert self.spill.num_bytes >= self.store.spilled_bytes
        return self.store.spilled_bytes


TestJournals = JournalMachine.TestCase
TestJournals.settings = settings(max_examples=60, stateful_step_count=30)
TestJournalsInAFile = SpillFileMachine.TestCase
TestJournalsInAFile.settings = settings(max_examples=20, stateful_step_count=30)

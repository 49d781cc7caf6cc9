import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pllm.client.spill import SpillFile
from p2pllm.errors import LocalProtocolError, SessionLost


@pytest.fixture
def spill() -> Iterator[SpillFile]:
    file = SpillFile()
    yield file
    file.close()


class FullDisk:
    """A raw file on a disk with room for `room` bytes, where writes are short."""

    def __init__(self, room: int) -> None:
        self.data = bytearray()
        self.room = room
        self.at = 0

    def seek(self, offset: int) -> None:
        self.at = offset

    def write(self, data: memoryview) -> int:
        part = bytes(data[: min(2, self.room - self.at)])
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.data[self.at : self.at + len(part)] = part
        self.at += len(part)
        return len(part)

    def read(self, length: int) -> bytes:
        part = bytes(self.data[self.at : self.at + min(3, length)])
        self.at += len(part)
        return part

    def truncate(self, length: int) -> None:
        del self.data[length:]

    def close(self) -> None: ...


def on_disk(monkeypatch: pytest.MonkeyPatch, disk: FullDisk) -> SpillFile:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: disk)
    return SpillFile()


def test_what_was_written_is_read_in_any_part(spill: SpillFile) -> None:
    spill.write(b"other")
    offset = spill.write(memoryview(b"0123456789"))

    assert spill.read(offset, 10) == b"0123456789"
    assert spill.read(offset + 3, 4) == b"3456"


def test_a_freed_range_is_used_again(spill: SpillFile) -> None:
    first, second = spill.write(b"aaaa"), spill.write(b"bbbb")

    spill.free(first, 4)

    assert spill.write(b"cc") == first
    assert spill.write(b"dd") == first + 2
    assert spill.read(second, 4) == b"bbbb"
    assert spill.num_bytes == 8


def test_freed_neighbours_become_one_range(spill: SpillFile) -> None:
    offsets = [spill.write(b"abcd") for _ in range(4)]

    for at in (0, 2, 1):
        spill.free(offsets[at], 4)

    assert spill.write(bytes(12)) == 0


def test_the_file_shrinks_when_its_end_is_free(spill: SpillFile) -> None:
    first, second = spill.write(bytes(1000)), spill.write(bytes(3000))

    spill.free(first + 500, 500)
    assert spill.num_bytes == 4000
    spill.free(second, 3000)

    assert spill.num_bytes == 500


def test_bytes_that_are_not_in_use_cannot_be_freed(spill: SpillFile) -> None:
    first = spill.write(b"abcd")
    spill.write(b"efgh")
    spill.free(first, 4)

    for offset, length in [(0, 4), (0, 1), (2, 4), (6, 3), (-1, 1)]:
        with pytest.raises(LocalProtocolError):
            spill.free(offset, length)


def test_bytes_past_the_end_cannot_be_read(spill: SpillFile) -> None:
    spill.write(b"abcd")

    with pytest.raises(LocalProtocolError):
        spill.read(2, 3)


def test_the_file_has_no_name_and_is_its_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    spill = SpillFile()
    spill.write(b"secret")

    assert list(tmp_path.iterdir()) == []
    status = os.fstat(spill._file.fileno())
    assert status.st_nlink == 0
    assert stat.S_IMODE(status.st_mode) == 0o600
    spill.close()


def test_short_writes_and_reads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    spill = on_disk(monkeypatch, FullDisk(room=100))

    offset = spill.write(b"0123456789")

    assert spill.read(offset, 10) == b"0123456789"


def test_a_full_disk_is_said_and_what_was_written_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    spill = on_disk(monkeypatch, FullDisk(room=10))
    kept = spill.write(b"abcdefgh")

    with pytest.raises(SessionLost, match="No space left"):
        spill.write(b"ijkl")

    assert spill.read(kept, 8) == b"abcdefgh"
    assert spill.num_bytes == 8
    assert spill.write(b"ij") == 8


def test_a_directory_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: int) -> FullDisk:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)

    with pytest.raises(SessionLost, match="temporary directory"):
        SpillFile()


def test_a_file_that_lost_bytes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(room=100)
    spill = on_disk(monkeypatch, disk)
    offset = spill.write(b"0123456789")
    disk.truncate(4)

    with pytest.raises(SessionLost, match="shorter"):
        spill.read(offset, 10)


class SpillMachine(RuleBasedStateMachine):
    """Ranges in a file against the same ranges in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.spill = SpillFile()
        self.kept: dict[int, bytes] = {}

    def teardown(self) -> None:
        self.spill.close()

    @rule(data=st.binary(min_size=1, max_size=40))
    def write(self, data: bytes) -> None:
        self.kept[self.spill.write(data)] = data

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.kept)))
        kept = self.kept.pop(offset)
        keep = data.draw(st.integers(0, len(kept) - 1))
        self.spill.free(offset + keep, len(kept) - keep)
        if keep:
            self.kept[offset] = kept[:keep]

    @invariant()
    def everything_is_as_it_was_written(self) -> None:
        for offset, kept in self.kept.items():
            assert self.spill.read(offset, len(kept)) == kept

    @invariant()
    def the_file_ends_with_the_last_range(self) -> None:
        end = max((offset + len(kept) for offset, kept in self.kept.items()), default=0)
        assert self.spill.num_bytes == end == os.fstat(self.spill._file.fileno()).st_size


TestRanges = SpillMachine.TestCase
TestRanges.settings = settings(max_examples=30, stateful_step_count=30)

"""Assemblies fed by a mux: messages out of chunks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import NetConfig
from p2pllm.errors import CodecError
from p2pllm.net.assembly import PREFIX_BYTES, Assembly
from p2pllm.net.budget import MemoryBudget
from p2pllm.net.frames import CREDIT, DATA, GRANTED, OPEN, FrameType, Priority
from p2pllm.net.mux import Mux
from p2pllm.net.streams import Stream, StreamData, StreamOpened

LIMIT = 10_000_000


class Receiver:
    """A mux with one stream of the peer's, and its assembly."""

    def __init__(self, budget: int = 2**30) -> None:
        self.budget = MemoryBudget(budget)
        self.mux = Mux(NetConfig(), is_client=False, budget=self.budget, now=0.0)
        self.mux.on_frame(OPEN.pack(FrameType.OPEN, 1, 0, Priority.BULK, 0, 1000), 0.0)
        opened = self.mux.next_event()
        assert isinstance(opened, StreamOpened)
        self.stream: Stream = opened.stream
        self.mux.next_event()
        self.assembly = Assembly(self.mux, self.stream, self.budget, max_message_bytes=LIMIT)

    def feed(self, data: bytes, *, is_end: bool = False) -> list[bytes]:
        self.mux.on_frame(DATA.pack(FrameType.DATA, 1, int(is_end)) + data, 0.0)
        event = self.mux.next_event()
        assert isinstance(event, StreamData)
        messages = self.assembly.on_data(event.data, event.is_end)
        return [bytes(message.data) for message in messages]

    def frames(self) -> list[bytes]:
        frames = []
        while (frame := self.mux.next_frame(0.0)) is not None:
            frames.append(frame)
        return frames


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(PREFIX_BYTES, "big") + message


def test_a_message_in_one_chunk_is_not_copied() -> None:
    receiver = Receiver()
    receiver.mux.on_frame(DATA.pack(FrameType.DATA, 1, 1) + framed(b"hello"), 0.0)
    event = receiver.mux.next_event()
    assert isinstance(event, StreamData)
    (message,) = receiver.assembly.on_data(event.data, event.is_end)
    assert bytes(message.data) == b"hello"
    assert message.data.obj is event.data.obj
    assert receiver.assembly.is_ended


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(1, 200), max_size=20))
def test_messages_come_out_whole_however_they_are_cut(
    messages: list[bytes], cuts: list[int]
) -> None:
    receiver = Receiver()
    data = b"".join(map(framed, messages))
    received = []
    for size in cuts:
        received += receiver.feed(data[:size])
        data = data[size:]
    received += receiver.feed(data, is_end=True)
    assert received == messages
    assert receiver.assembly.is_ended
    assert receiver.budget.messages == sum(map(len, messages))
    assert receiver.mux.snapshot().unconsumed == (0, 0)


def test_the_peer_is_granted_the_whole_message() -> None:
    receiver = Receiver()
    receiver.frames()
    receiver.feed(framed(bytes(3_000_000))[:1000])
    grant = CREDIT.pack(FrameType.CREDIT, 1, GRANTED, PREFIX_BYTES + 3_000_000)
    assert grant in receiver.frames()


def test_without_memory_chunks_wait_and_count_as_unread() -> None:
    receiver = Receiver(budget=2 * 2**20)
    assert receiver.budget.reserve_message(1_500_000)
    assert receiver.feed(framed(bytes(1_000_000))[:10_000]) == []
    assert receiver.assembly.lacks_memory
    assert receiver.mux.snapshot().unconsumed == (0, 10_000)

    receiver.budget.release_message(1_500_000)
    receiver.assembly.resume()
    assert not receiver.assembly.lacks_memory
    assert receiver.mux.snapshot().unconsumed == (0, 0)


def test_a_paused_reader_leaves_messages_where_they_are() -> None:
    receiver = Receiver()
    assert receiver.feed(framed(b"one")) == [b"one"]
    receiver.assembly.is_paused = True
    assert receiver.feed(framed(b"two"), is_end=True) == []
    assert not receiver.assembly.is_ended
    receiver.assembly.is_paused = False
    assert [bytes(message.data) for message in receiver.assembly.resume()] == [b"two"]
    assert receiver.assembly.is_ended


def test_closing_gives_back_what_a_half_message_holds() -> None:
    receiver = Receiver()
    receiver.feed(framed(bytes(1_000_000))[:10_000])
    assert receiver.budget.messages == 1_000_000
    receiver.assembly.close()
    assert receiver.budget.messages == 0


@pytest.mark.parametrize(
    "data", [framed(bytes(1000))[:-1], b"\x00\x00", (LIMIT + 1).to_bytes(4, "big")]
)
def test_messages_that_are_cut_off_or_too_large_are_refused(data: bytes) -> None:
    receiver = Receiver()
    with pytest.raises(CodecError):
        receiver.feed(data, is_end=True)

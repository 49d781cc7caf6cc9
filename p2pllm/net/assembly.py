"""Messages out of a stream's chunks, without a join and within the process's memory.

On a stream, each message stands behind its length: `u32 num_bytes, message`. Once the length is
known, memory for all of it is reserved from the process's budget and the peer is allowed to send
all of it; chunks are then copied to their place as they come. A message that came whole in one
chunk is not copied at all. While there is no memory, or the reader of a streaming call is behind,
chunks are parked: they count as not consumed, and the peer stops at its credit.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from p2pllm.errors import CodecError
from p2pllm.net.budget import MemoryBudget
from p2pllm.net.mux import Mux
from p2pllm.net.streams import Stream

PREFIX_BYTES = 4
MIN_PROGRESS = 64 * 2**10  # bytes between two looks, where others wait for memory


@dataclass(frozen=True, slots=True)
class Assembled:
    """One whole message. `release` its bytes to the budget when it has been worked on."""

    data: memoryview
    num_bytes: int


class Assembly:
    """The receiving half of one stream."""

    def __init__(
        self, mux: Mux, stream: Stream, budget: MemoryBudget, *, max_message_bytes: int
    ) -> None:
        self.is_paused = False  # set while the reader has enough
        self.is_ended = False  # every byte up to the peer's end has been taken
        self.lacks_memory = False  # call `resume` when the budget has some again
        self._mux = mux
        self._stream = stream
        self._budget = budget
        self._max_message_bytes = max_message_bytes
        self._parked: deque[memoryview] = deque()
        self._has_end = False
        self._offset = 0  # of the stream, where what is taken next begins
        self._prefix = b""  # of a length that was cut by a frame's border
        self._total = 0
        self._buffer: memoryview | None = None
        self._filled = 0
        self._filled_before = 0  # at the last `is_stalled`

    def on_data(self, data: memoryview, is_end: bool) -> list[Assembled]:
        """Take a chunk; returns the messages that it completes.

        Raises CodecError for a message that is too large, or cut off by the stream's end.
        """
        self._parked.append(data)
        self._has_end = is_end
        return self.resume()

    def resume(self) -> list[Assembled]:
        """Go on with parked chunks as far as memory and the reader allow."""
        messages: list[Assembled] = []
        self.lacks_memory = False
        while self._parked and not self.is_paused and not self.lacks_memory:
            chunk = self._parked[0]
            taken, message = self._take(chunk)
            self._offset += taken
            self._mux.consume(self._stream, taken)
            if taken == len(chunk):
                self._parked.popleft()
            else:
                self._parked[0] = chunk[taken:]
            if message is not None:
                messages.append(message)
        if self._has_end and not self._parked:
            if self._prefix or self._buffer is not None:
                raise CodecError("a message that is cut off")
            self.is_ended = True
        return messages

    def is_stalled(self) -> bool:
        """Has less than `MIN_PROGRESS` of a large message come since the last time asked?

        Memory that is reserved and not filled is kept from others; see `Endpoint`.
        """
        progress = self._filled - self._filled_before
        self._filled_before = self._filled
        return self._buffer is not None and progress < MIN_PROGRESS

    def close(self) -> None:
        """Give up: what is half received is given back."""
        self._parked.clear()
        if self._buffer is not None:
            self._buffer = None
            self._budget.release_message(self._total)

    def _take(self, chunk: memoryview) -> tuple[int, Assembled | None]:
        """How many bytes of `chunk` were taken, and the message that they complete."""
        if self._buffer is not None:
            return self._fill(self._buffer, chunk)
        missing = PREFIX_BYTES - len(self._prefix)
        prefix = self._prefix + bytes(chunk[:missing])
        if len(prefix) < PREFIX_BYTES:
            self._prefix = prefix
            return len(chunk), None
        total = int.from_bytes(prefix, "big")
        if total > self._max_message_bytes:
            raise CodecError(f"a message of {total} bytes; {self._max_message_bytes} are allowed")
        if not self._budget.reserve_message(total):
            self.lacks_memory = True
            return 0, None
        self._prefix = b""
        rest = chunk[missing:]
        if len(rest) >= total:
            return missing + total, Assembled(rest[:total], total)
        self._total = total
        self._filled = self._filled_before = 0
        # Not a bytearray: that would write zeros to all pages first, 15 ms for 64 MiB.
        self._buffer = np.empty(total, np.uint8).data
        self._mux.expect(self._stream, self._offset + missing + total)
        taken, message = self._fill(self._buffer, rest)
        return missing + taken, message

    def _fill(self, buffer: memoryview, chunk: memoryview) -> tuple[int, Assembled | None]:
        size = min(len(chunk), self._total - self._filled)
        buffer[self._filled : self._filled + size] = chunk[:size]
        self._filled += size
        if self._filled < self._total:
            return size, None
        self._buffer = None
        return size, Assembled(buffer, self._total)

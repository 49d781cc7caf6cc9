"""One secured connection over a link: bytes in, events and bytes out.

First the handshake (`p2pllm.net.handshake`), then frames of the multiplexer (`p2pllm.net.mux`),
each as one Noise message behind its length:

    u16 length   Noise message of that length (a frame and a tag of 16 bytes)

Not here: the link itself, timers, tasks, and what the events mean (`p2pllm.net.rpc`).
"""

from dataclasses import dataclass

from p2pllm.config import NetConfig
from p2pllm.errors import RemoteProtocolError
from p2pllm.net.budget import MemoryBudget
from p2pllm.net.frames import HEAD
from p2pllm.net.handshake import Handshake, PeerHello
from p2pllm.net.link import Buffer
from p2pllm.net.mux import Mux
from p2pllm.net.noise import TAG_BYTES, CipherState, Role
from p2pllm.net.streams import Event

LENGTH_BYTES = 2
MIN_MESSAGE = HEAD.size + TAG_BYTES
COALESCE_BYTES = 2048  # small frames are written together: a system call costs more than a copy


@dataclass(frozen=True, slots=True)
class Established:
    """The handshake is complete and the peer is known; streams may be opened."""

    hello: PeerHello


class Connection:
    """One side of a connection. `mux` is there once the handshake is complete."""

    def __init__(self, handshake: Handshake, config: NetConfig, budget: MemoryBudget) -> None:
        self.hello: PeerHello | None = None
        self.mux: Mux | None = None
        self._handshake = handshake
        self._config = config
        self._budget = budget
        self._greeting: Established | None = None
        self._asked_at: float | None = None  # when our last message of the handshake left
        self._partial = bytearray()  # the beginning of a message whose rest has not come
        self._sending: CipherState
        self._receiving: CipherState

    def receive(self, data: Buffer, now: float) -> None:
        """Take in bytes as they came. Raises RemoteProtocolError (BadSignature, CodecError)…

        … after which the connection is of no use, or Refused from the handshake's `verify`.
        `data` may be reused after the call.
        """
        if self.mux is not None:
            self._read(self.mux, memoryview(data), now)
            return
        self._handshake.receive(data)
        if self._handshake.result is not None:
            self._establish(self._handshake.result, now)

    def bytes_to_send(self, now: float) -> Buffer | None:
        """The next bytes to be written, about one frame at a time; None if there are none.

        Whoever takes them must write them: the ciphers have moved on.
        """
        greeting = self._handshake.bytes_to_send()
        if greeting:
            self._asked_at = now
            return greeting
        if self.mux is None:
            return None
        frame = self.mux.next_frame(now)
        if frame is None:
            return None
        data = self._seal(frame)
        if len(data) >= COALESCE_BYTES:
            return data
        while len(data) < COALESCE_BYTES and (frame := self.mux.next_frame(now)) is not None:
            data += self._seal(frame)
        return data

    def next_event(self) -> Event | Established | None:
        """What happened next, or None."""
        if self._greeting is not None:
            greeting, self._greeting = self._greeting, None
            return greeting
        return self.mux.next_event() if self.mux is not None else None

    def next_timeout(self) -> float | None:
        """When to call `on_timeout`; None during the handshake, whose time its owner limits."""
        return self.mux.next_timeout() if self.mux is not None else None

    def on_timer_set(self, due: float) -> None:
        """`on_timeout` will be called at that time, later than `next_timeout` has asked for."""
        if self.mux is not None:
            self.mux.on_timer_set(due)

    def on_timeout(self, now: float) -> None:
        """Carry out what is due."""
        if self.mux is not None:
            self.mux.on_timeout(now)

    def close(self) -> None:
        """The link is gone: give back what the connection holds."""
        self._partial.clear()
        if self.mux is not None:
            self.mux.close()

    def _establish(self, hello: PeerHello, now: float) -> None:
        self.hello = hello
        self._greeting = Established(hello)
        self._sending, self._receiving = self._handshake.split()
        is_client = self._handshake.role is Role.INITIATOR
        self.mux = Mux(self._config, is_client=is_client, budget=self._budget, now=now)
        if self._asked_at is not None:
            self.mux.path.on_rtt(now - self._asked_at, now)  # the handshake's was the first
        if leftover := self._handshake.leftover:
            self._read(self.mux, memoryview(leftover), now)

    def _read(self, mux: Mux, view: memoryview, now: float) -> None:
        mux.on_bytes(now)
        at = self._complete_partial(mux, view, now) if self._partial else 0
        end = len(view)
        while end - at >= LENGTH_BYTES:
            length = _message_length(view[at], view[at + 1])
            stop = at + LENGTH_BYTES + length
            if stop > end:
                break
            mux.on_frame(self._receiving.decrypt(view[at + LENGTH_BYTES : stop]), now)
            at = stop
        if at < end:
            self._partial += view[at:]

    def _complete_partial(self, mux: Mux, view: memoryview, now: float) -> int:
        """Finish the message begun in an earlier read; returns how many bytes of `view` it took."""
        partial, at = self._partial, 0
        if len(partial) < LENGTH_BYTES:
            at = min(LENGTH_BYTES - len(partial), len(view))
            partial += view[:at]
            if len(partial) < LENGTH_BYTES:
                return at
        missing = LENGTH_BYTES + _message_length(partial[0], partial[1]) - len(partial)
        partial += view[at : at + missing]
        if len(view) - at < missing:
            return len(view)
        self._partial = bytearray()
        mux.on_frame(self._receiving.decrypt(memoryview(partial)[LENGTH_BYTES:]), now)
        return at + missing

    def _seal(self, frame: bytes) -> bytearray:
        length = len(frame) + TAG_BYTES
        message = bytearray(LENGTH_BYTES + length)
        message[:LENGTH_BYTES] = length.to_bytes(LENGTH_BYTES, "big")
        with memoryview(message) as view:
            self._sending.encrypt_into(frame, view[LENGTH_BYTES:])
        return message


def _message_length(high: int, low: int) -> int:
    length = high << 8 | low
    if length < MIN_MESSAGE:
        raise RemoteProtocolError(f"a message of {length} bytes is too short to hold a frame")
    return length

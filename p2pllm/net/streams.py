"""Streams, and what a multiplexer tells of them: the vocabulary of `p2pllm.net.mux`.

A stream carries bytes in order, both ways, until each side has said its end, or one has reset it.
"""

from collections import deque
from dataclasses import dataclass

from p2pllm.net.frames import Priority, StreamKind

STREAM_WINDOW = 1 * 2**20  # bytes of a stream before any CREDIT: 84 ms of a 100 Mbit/s link


class Stream:
    """One stream as the mux sees it; a handle for its user."""

    __slots__ = (
        "consumed",
        "deadline",
        "end_queued",
        "end_received",
        "end_sent",
        "id",
        "is_admitted",
        "is_closed",
        "is_opened",
        "is_ours",
        "is_stopped",
        "kind",
        "priority",
        "queue",
        "queued",
        "received",
        "recv_granted",
        "recv_limit",
        "send_granted",
        "send_limit",
        "sent",
        "turn",
        "unasked",
        "waits_for_credit",
        "wants_drained",
    )

    def __init__(
        self, kind: StreamKind, priority: Priority, *, is_ours: bool, deadline: float
    ) -> None:
        self.id = 0  # given when its OPEN is sent
        self.kind = kind
        self.priority = priority
        self.is_ours = is_ours
        self.deadline = deadline
        self.is_admitted = not is_ours  # within the bound on open streams
        self.is_opened = not is_ours  # has its OPEN been sent or received?
        self.is_closed = False
        self.queue: deque[memoryview] = deque()
        self.queued = 0  # bytes in `queue`
        self.end_queued = False
        self.end_sent = False
        self.sent = 0
        self.send_limit = STREAM_WINDOW
        self.send_granted = 0  # bytes up to here need no credit of the connection
        self.waits_for_credit = False
        self.turn = 0  # bytes sent in this turn
        self.received = 0
        self.consumed = 0
        self.unasked = 0  # bytes received within the connection's window, not consumed yet
        self.recv_limit = STREAM_WINDOW
        self.recv_granted = 0
        self.end_received = False
        self.is_stopped = False  # we asked the peer to send no more
        self.wants_drained = False

    def __repr__(self) -> str:
        side = "ours" if self.is_ours else "theirs"
        return f"Stream({self.id} {self.kind.name.lower()} {self.priority.name.lower()} {side})"


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer has opened a stream; its data follows in `StreamData`."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamData:
    """Bytes arrived on a stream, in order. Call `consume` when they are worked on."""

    stream: Stream
    data: memoryview
    is_end: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """A stream is over before its end, by the peer or (`is_local`) by its deadline."""

    stream: Stream
    code: int
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class StreamStopped:
    """The peer wants nothing more on a stream; what was queued is dropped."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamDrained:
    """All bytes of a stream with `wants_drained` have left; more may be queued."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class PushDone:
    """The peer's application has taken over what we pushed on a stream."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Pong:
    """The peer answered a ping, `rtt_s` after it was sent."""

    rtt_s: float


@dataclass(frozen=True, slots=True)
class Suspected:
    """The peer has been silent for too long after a ping: use another connection if there is."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """A suspected peer has spoken again."""


@dataclass(frozen=True, slots=True)
class PeerDead:
    """The peer has been silent for `dead_s`: the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class PeerLeaving:
    """The peer wants no new streams; those that are open go on."""

    code: int


Event = (
    StreamOpened | StreamData | StreamReset | StreamStopped | StreamDrained | PushDone
    | Pong | Suspected | Recovered | PeerDead | PeerLeaving
)  # fmt: skip

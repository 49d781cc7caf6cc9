"""Link: a reliable, ordered byte pipe to one peer, and where links come from.

A link knows nothing of frames, keys or peers. It is driven by callbacks rather than awaits,
because a decode step crosses it twice per hop and each task switch would cost as much as the
step's encryption. Four kinds carry traffic (see `LinkKind`); `memory` is for tests.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class LinkKind(enum.Enum):
    """How a link came to be. One connection per pair of peers and kind."""

    TCP = "tcp"  # dialled or accepted
    TCP_PUNCHED = "tcp-punched"  # simultaneous open through two NATs
    WEBRTC = "webrtc"  # an aiortc data channel
    RELAY = "relay"  # a circuit through a third peer
    MEMORY = "memory"  # tests and simulation


Buffer = bytes | bytearray | memoryview


class LinkUser(Protocol):
    """Who is told what happens on a link; called on the event loop, must not block."""

    def link_received(self, data: Buffer) -> None:
        """Bytes arrived, any number of them. `data` is valid during the call only."""
        ...

    def link_writable(self) -> None:
        """`can_write` has become true again."""
        ...

    def link_closed(self, reason: str) -> None:
        """The link is gone, for this reason; called exactly once, whoever closed it."""
        ...


class Link(Protocol):
    """A byte pipe. `local` and `remote` are (host, port), or None where there is no such thing."""

    kind: LinkKind
    local: tuple[str, int] | None
    remote: tuple[str, int] | None

    def start(self, user: LinkUser) -> None:
        """Deliver to `user` from now on; nothing is delivered before."""
        ...

    @property
    def can_write(self) -> bool:
        """May one more frame be written? False while bytes wait that could not be overtaken."""
        ...

    def write(self, data: Buffer) -> None:
        """Send bytes in order. Never blocks; a caller that ignores `can_write` uses memory."""
        ...

    def pause_reading(self) -> None:
        """Deliver nothing until `resume_reading` (backpressure to the peer)."""
        ...

    def resume_reading(self) -> None:
        """Deliver again."""
        ...

    def close(self) -> None:
        """Send what is written, then close; `link_closed` follows."""
        ...

    def abort(self) -> None:
        """Close at once and drop what is not sent; `link_closed` follows."""
        ...


@dataclass(frozen=True, slots=True)
class Listener:
    """An open listening port. `port` is the real one where any free port was asked for."""

    host: str
    port: int
    close: Callable[[], None]


class Network(Protocol):
    """Where links come from: the operating system's TCP, or a simulated network."""

    async def listen(self, host: str, port: int, on_link: Callable[[Link], None]) -> Listener:
        """Accept links at host and port (0: any free one). Raises TransportError."""
        ...

    async def dial(self, host: str, port: int, *, local_port: int = 0) -> Link:
        """Open a link to host and port, from `local_port` where that is possible (0: any).

        Raises PeerUnreachable. The caller sets the deadline.
        """
        ...

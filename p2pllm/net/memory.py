"""A pair of links in memory: what one end writes, the other receives.

For tests and the simulated network. Delivery is by the event loop, never from inside `write`, so
the order of events is that of real links and it works on virtual time. It costs no time; a
`ShapedLink` around each end adds delay and bandwidth.
"""

import asyncio
from collections import deque

from p2pllm.net.link import Buffer, LinkKind, LinkUser

HIGH_WATER = 256 * 2**10  # bytes on their way before `can_write` says no; a kernel's buffers


def memory_pair(
    first: tuple[str, int] | None = None, second: tuple[str, int] | None = None
) -> "tuple[MemoryLink, MemoryLink]":
    """Two links that are each other's far end, at the addresses `first` and `second`."""
    left, right = MemoryLink(first, second), MemoryLink(second, first)
    left._peer, right._peer = right, left
    return left, right


class MemoryLink:
    """One end of a pair; made by `memory_pair`. Keeps the contract of `p2pllm.net.link.Link`."""

    kind = LinkKind.MEMORY

    def __init__(self, local: tuple[str, int] | None, remote: tuple[str, int] | None) -> None:
        self.local = local
        self.remote = remote
        self._peer: MemoryLink
        self._loop = asyncio.get_running_loop()
        self._user: LinkUser | None = None
        self._inbox: deque[bytes] = deque()  # written by the peer, not delivered yet
        self._inbox_bytes = 0
        self._end_reason = ""  # the peer has closed; told once the inbox is empty
        self.is_closed = False  # nothing more is sent or received
        self._is_paused = False
        self._is_scheduled = False
        self._is_blocked = False  # our user has seen `can_write` false
        self._untold_reason = ""  # closed before anybody listened

    def start(self, user: LinkUser) -> None:
        self._user = user
        if self._untold_reason:
            self._loop.call_soon(user.link_closed, self._untold_reason)
        self._schedule()

    @property
    def can_write(self) -> bool:
        is_full = self._peer._inbox_bytes >= HIGH_WATER
        self._is_blocked = self._is_blocked or is_full
        return not (self.is_closed or is_full)

    def write(self, data: Buffer) -> None:
        if self.is_closed or not data:
            return
        self._peer._inbox.append(bytes(data))
        self._peer._inbox_bytes += len(data)
        self._peer._schedule()

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False
        self._schedule()

    def close(self) -> None:
        if not self.is_closed:
            self._end("closed")
            self._peer._end_reason = "closed by the peer"
            self._peer._schedule()

    def abort(self) -> None:
        if not self.is_closed:
            self._end("aborted")
            if not self._peer.is_closed:
                self._peer._end("reset by the peer")

    def _schedule(self) -> None:
        if not self._is_scheduled and self._user is not None:
            self._is_scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._is_scheduled = False
        assert self._user is not None
        while self._inbox and not (self._is_paused or self.is_closed):
            data = self._inbox.popleft()
            self._inbox_bytes -= len(data)
            self._user.link_received(data)
        if self._peer._is_blocked and self._inbox_bytes < HIGH_WATER:
            self._peer._is_blocked = False
            self._loop.call_soon(self._peer._tell_writable)
        if self._end_reason and not (self._inbox or self._is_paused or self.is_closed):
            self._end(self._end_reason)

    def _tell_writable(self) -> None:
        if self._user is not None and not self.is_closed:
            self._user.link_writable()

    def _end(self, reason: str) -> None:
        self.is_closed = True
        self._inbox.clear()
        self._inbox_bytes = 0
        if self._user is None:
            self._untold_reason = reason
        else:
            self._loop.call_soon(self._user.link_closed, reason)

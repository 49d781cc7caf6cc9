"""Who waits for which peer, and is told when it is lost.

A step that goes through a chain of servers comes back from the last one: of the others its client
hears nothing, though it waits for each. A `Watch` says so. While a peer is watched its connections
are pinged like those with a request under way, and whoever watches is told once when the last
good one goes, and again only after there was a good one in between.

Not here: which connections are good, and what ends them (`p2pllm.net.endpoint`).
"""

from collections.abc import Callable, Iterator
from types import TracebackType

from p2pllm.errors import TransportError
from p2pllm.ids import PeerId

OnLost = Callable[[TransportError], None]


class Watch:
    """One caller's interest in a peer, until `close` or the end of a `with` block."""

    __slots__ = ("_forget", "_is_closed", "_on_lost", "is_told", "peer")

    def __init__(self, peer: PeerId, on_lost: OnLost, forget: "Callable[[Watch], None]") -> None:
        self.peer = peer
        self.is_told = False  # of the loss that there is now
        self._on_lost = on_lost
        self._forget = forget
        self._is_closed = False

    def close(self) -> None:
        """Hear nothing more; may be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._forget(self)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def tell(self, error: TransportError) -> None:
        """Call back, unless closed meanwhile."""
        if not self._is_closed:
            self._on_lost(error)


class Watches:
    """All watches of an endpoint, by peer."""

    def __init__(self) -> None:
        self._watches: dict[PeerId, dict[Watch, None]] = {}  # in the order in which they began

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._watches

    def add(self, watch: Watch) -> bool:
        """Begin a watch; returns whether it is the peer's first."""
        of_peer = self._watches.get(watch.peer)
        if of_peer is None:
            self._watches[watch.peer] = {watch: None}
            return True
        of_peer[watch] = None
        return False

    def remove(self, watch: Watch) -> bool:
        """End a watch; returns whether it was the peer's last."""
        of_peer = self._watches[watch.peer]
        del of_peer[watch]
        if of_peer:
            return False
        del self._watches[watch.peer]
        return True

    def on_found(self, peer: PeerId) -> None:
        """There is a good connection: the next loss is a new one."""
        for watch in self._watches.get(peer, ()):
            watch.is_told = False

    def on_lost(self, peer: PeerId) -> Iterator[Watch]:
        """The last good connection has gone: the watches that have to be told."""
        for watch in self._watches.get(peer, ()):
            if not watch.is_told:
                watch.is_told = True
                yield watch

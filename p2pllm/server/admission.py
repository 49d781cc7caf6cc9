"""Who gets pages of the cache, and when: the line in which Opens wait.

Pages are given in the order in which the Opens came, but nobody gets more than a client's share
while somebody waits who would not. Whoever is first in line may have the pages of idle sessions
(`SessionTable.reclaim` has the rule). The line is bounded, in all and for each client. A server
that is leaving gives no new pages.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from p2pllm.errors import Busy, CacheFull, NotServed
from p2pllm.ids import PeerId
from p2pllm.server.sessions import Session, SessionTable
from p2pllm.wire.messages import Open, Output

logger = logging.getLogger(__name__)

MAX_WAITING = 256  # Opens that wait for pages
MAX_WAITING_PER_PEER = 32


@dataclass(eq=False, slots=True)
class _Waiting:
    """A place in the line for pages."""

    peer: PeerId
    num_pages: int = 0  # besides those that other sessions of the peer hold


class Admission:
    """Opens sessions, each in its turn.

    `on_new` is told of each session that is made, `on_gone` of each that went for another one:
    replaced by its client, or evicted.
    """

    def __init__(
        self,
        sessions: SessionTable[Output],
        on_new: Callable[[Session[Output]], None],
        on_gone: Callable[[Session[Output]], None],
    ) -> None:
        self.is_leaving = False
        self._sessions = sessions
        self._on_new = on_new
        self._on_gone = on_gone
        self._line: list[_Waiting] = []  # in the order in which they came
        self._freed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._line)

    async def open(self, opening: Open, wait_s: float) -> Session[Output]:
        """Open or take over the session, waiting in turn for pages if there are none.

        Raises what `SessionTable.open` does, and Busy or NotServed.
        """
        deadline = _now() + wait_s
        place = _Waiting(opening.client)
        self._line.append(place)
        try:
            while True:
                place.num_pages = self._sessions.pages_needed(opening)
                try:
                    return self._open_now(opening, place)
                except CacheFull:
                    if _now() >= deadline:
                        raise
                self._check_length(place)
                await self.wait_for_pages(deadline)
        finally:
            self._line.remove(place)
            self.on_freed()  # others may have waited for this place only

    def on_freed(self) -> None:
        """Pages have come free, or something else has changed for those who wait."""
        self._freed.set()

    async def wait_for_pages(self, deadline: float) -> None:
        """Return when some have come free, or at the deadline."""
        self._freed.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await self._freed.wait()
        except TimeoutError:
            return

    def check_is_staying(self) -> None:
        """Raise NotServed if the server is leaving."""
        if self.is_leaving:
            raise NotServed("this server is leaving and takes no new sessions")

    def has_others(self, peer: PeerId) -> bool:
        """Does somebody else wait who has the next turn?"""
        first = self._first()
        return first is not None and first.peer != peer

    def evict(self, now: float) -> None:
        """Drop idle sessions until whoever is first in line has room."""
        first = self._first()
        if first is None:
            return
        places = [first, *(place for place in self._line if place is not first)]
        waiting = [(place.peer, place.num_pages) for place in places]
        while (session := self._sessions.reclaim(now, waiting)) is not None:
            logger.info("idle session evicted id=%s client=%s", session.id, session.client.short)
            self._on_gone(session)

    def _first(self) -> _Waiting | None:
        """Who gets the next free pages: the first, but nobody over quota before others."""
        return next(filter(self._is_within_quota, self._line), next(iter(self._line), None))

    def _is_within_quota(self, place: _Waiting) -> bool:
        return self._sessions.is_within_quota(place.peer, place.num_pages)

    def _check_length(self, place: _Waiting) -> None:
        of_peer = sum(other.peer == place.peer for other in self._line)
        if len(self._line) > MAX_WAITING or of_peer > MAX_WAITING_PER_PEER:
            raise Busy("too many wait for cache here", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        return self._sessions.next_expiry_s(_now())

    def _open_now(self, opening: Open, place: _Waiting) -> Session[Output]:
        """Open, and if that replaces a session, say so before anything else is opened."""
        known = self._sessions.get(opening.session)
        if not self._sessions.needs_no_pages(opening):
            self.check_is_staying()
            if self._first() is not place:
                raise CacheFull("others wait for cache here", retry_after_s=self._retry_after_s())
        session = self._sessions.open(opening, _now())
        if session is not known:
            self._on_new(session)
            if known is not None:
                self._on_gone(known)
        return session


def _now() -> float:
    return asyncio.get_running_loop().time()

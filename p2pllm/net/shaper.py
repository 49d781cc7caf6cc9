"""An artificial wide-area link: one-way delay, bandwidth, jitter and stalls around any link.

The model is a serialiser and a pipe. Frames wait in a queue for the serialiser, which puts them
on the line one after the other at the bandwidth; each arrives `delay_s` (and up to `jitter_s`)
after its last byte has left, never before the frame ahead of it. At most one frame may wait:
`can_write` is False meanwhile, so what is urgent is chosen as late as on a real link whose socket
holds little (TCP_NOTSENT_LOWAT). Only what is written is shaped: each end wraps its own.

Timers of the event loop are coarse (1 ms with epoll) and a frame at 100 MB/s lasts 0.2 ms, so a
late timer is made up for: frames start when they would have on time, and the user is asked for
more until the line is busy again. On average the bandwidth is exact; single arrivals are late by
the timer's error and never early. On virtual time all is exact.

Not here: loss (links are reliable) and reordering.
"""

import asyncio
import random
from collections import deque

from p2pllm.config import ShaperConfig
from p2pllm.net.link import Buffer, Link, LinkUser

# How late a timer may be and still be made up for. Longer pauses are the process's own, during
# which a real line would have run dry.
MAX_CATCH_UP_S = 0.02
# uvloop rounds timers to the nearest millisecond, so half of them fire early and would be set again
# and again until they are due. Half a millisecond more makes them round up, as asyncio's do.
ROUNDING_S = 0.0005
# Bytes on the line, whatever the bandwidth: a real sender's window ends somewhere too.
MAX_IN_FLIGHT_BYTES = 64 * 2**20


class ShapedLink:
    """`link` seen through the shaper; keeps the contract of `p2pllm.net.link.Link`."""

    def __init__(self, link: Link, config: ShaperConfig, rng: random.Random) -> None:
        self.kind = link.kind
        self.local = link.local
        self.remote = link.remote
        self.config = config  # may be replaced: it holds for frames that have not left
        self._link = link
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._user: LinkUser | None = None
        self._waiting: deque[tuple[float, bytes]] = deque()  # (written at, frame)
        self._free_at = 0.0  # when the serialiser has put its last frame on the line
        self._in_flight: deque[tuple[float, bytes]] = deque()  # (arrives at, frame)
        self._in_flight_bytes = 0
        self._last_arrival = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_margin_s = 0.0  # see ROUNDING_S
        self._asked_at: float | None = None  # while the user is asked for more: since when
        self._is_blocked = False  # the user has to be told when it can write again
        self._is_stalled = False
        self._is_closing = False

    def start(self, user: LinkUser) -> None:
        self._user = user
        self._link.start(self)

    @property
    def can_write(self) -> bool:
        is_full = bool(self._waiting) or self._in_flight_bytes >= MAX_IN_FLIGHT_BYTES
        self._is_blocked = self._is_blocked or is_full
        return not (self._is_closing or is_full)

    def write(self, data: Buffer) -> None:
        if self._is_closing or not data:
            return
        if self._asked_at is not None:
            self._waiting.append((self._asked_at, bytes(data)))  # `_on_timer` goes on with it
            return
        self._waiting.append((self._loop.time(), bytes(data)))
        self._serialise(self._loop.time())
        self._deliver()
        self._settle()

    def pause_reading(self) -> None:
        self._link.pause_reading()

    def resume_reading(self) -> None:
        self._link.resume_reading()

    def close(self) -> None:
        self._is_closing = True
        self._settle()

    def abort(self) -> None:
        self._drop()
        self._link.abort()

    # --- faults --------------------------------------------------------------------------------

    def stall(self) -> None:
        """Let nothing leave or arrive until `resume`; what is on its way stays there."""
        self._is_stalled = True
        self._arm()

    def resume(self) -> None:
        """End a stall: what is overdue arrives at once, in order."""
        self._is_stalled = False
        self._free_at = max(self._free_at, self._loop.time())
        self._on_timer()

    # --- the wrapped link's callbacks ----------------------------------------------------------

    def link_received(self, data: Buffer) -> None:
        assert self._user is not None
        self._user.link_received(data)

    def link_writable(self) -> None:
        self._on_timer()

    def link_closed(self, reason: str) -> None:
        self._drop()
        assert self._user is not None
        self._user.link_closed(reason)

    # --- the line ------------------------------------------------------------------------------

    def _on_timer(self) -> None:
        """Serialise what may start by now, asking the user for more; deliver what has arrived."""
        now = self._loop.time()
        self._deliver()
        while True:
            began = self._serialise(now)
            if not (self._is_blocked and self.can_write) or self._user is None:
                break
            # The last waiting frame left at `began`; an exact timer would have asked then.
            self._is_blocked = False
            self._asked_at = now if began is None else max(began, now - MAX_CATCH_UP_S)
            try:
                self._user.link_writable()
            finally:
                self._asked_at = None
        self._deliver()
        self._settle()

    def _serialise(self, now: float) -> float | None:
        """Put waiting frames on the line as far as it is free; when did the last one begin?"""
        began = None
        while self._waiting and self._free_at <= now and not self._is_stalled:
            written_at, data = self._waiting.popleft()
            began = max(self._free_at, written_at)
            self._free_at = began + len(data) / self.config.bandwidth_bytes_s
            arrival = self._free_at + self.config.delay_s
            if self.config.jitter_s:
                arrival += self._rng.uniform(0.0, self.config.jitter_s)
            self._last_arrival = max(self._last_arrival, arrival)
            self._in_flight.append((self._last_arrival, data))
            self._in_flight_bytes += len(data)
        return began

    def _deliver(self) -> None:
        now = self._loop.time()
        while (
            self._in_flight
            and self._in_flight[0][0] <= now
            and self._link.can_write
            and not self._is_stalled
        ):
            _, data = self._in_flight.popleft()
            self._in_flight_bytes -= len(data)
            self._link.write(data)

    def _settle(self) -> None:
        """Close the link if that is all that is left to do, and set the timer for the rest."""
        if self._is_closing and not (self._waiting or self._in_flight):
            self._link.close()
        self._arm()

    def _arm(self) -> None:
        """Set the timer to when the next frame starts or arrives."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = [self._free_at] if self._waiting else []
        if self._in_flight and self._link.can_write:  # else `link_writable` wakes us
            due.append(self._in_flight[0][0])
        if due and not self._is_stalled:
            when = min(due)
            self._timer = self._loop.call_at(when + self._timer_margin_s, self._on_due, when)

    def _on_due(self, when: float) -> None:
        if self._loop.time() < when:
            self._timer_margin_s = ROUNDING_S
        self._on_timer()

    def _drop(self) -> None:
        self._is_closing = True
        self._waiting.clear()
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._arm()

"""Is the peer still there? Pings when it is silent, suspicion when they stay unanswered.

An idle peer is pinged every `heartbeat_s`, which also keeps NATs from forgetting the link. While
we wait for something, a ping follows one second of silence. If then not one byte comes within a
second or four round trips, the peer is *suspected*: others may be asked instead. After `dead_s`
of silence it is given up. Any byte counts as a sign of life, not only the pong: a slow line may
be busy with a large frame.
"""

import enum

from p2pllm.config import NetConfig


class Verdict(enum.Enum):
    """What a timeout has found."""

    SUSPECTED = "suspected"
    DEAD = "dead"


class Heartbeat:
    """One connection's signs of life. Times are the caller's `now`."""

    def __init__(self, config: NetConfig, now: float) -> None:
        self.is_suspect = False
        self.is_ping_due = False  # call `ping_to_send`
        self.heard_at = now
        self._config = config
        self._nonce = 0
        self._asked_at: float | None = None  # a ping is wanted or under way since then
        self._sent_at: float | None = None

    def on_bytes(self, now: float) -> bool:
        """Something arrived; has a suspected peer recovered by it?"""
        self.heard_at = now
        has_recovered, self.is_suspect = self.is_suspect, False
        return has_recovered

    def ask(self, now: float) -> None:
        """Ping soon, unless a ping is under way."""
        if self._asked_at is None:
            self._asked_at = now
            self.is_ping_due = True

    def ping_to_send(self, now: float) -> int:
        """The nonce of the ping that leaves now."""
        self.is_ping_due = False
        self._sent_at = now
        self._nonce += 1
        return self._nonce

    def on_pong(self, nonce: int, now: float) -> float | None:
        """The round trip that a pong shows; None if it answers nothing."""
        if self._sent_at is None or nonce != self._nonce:
            return None
        rtt_s = now - self._sent_at
        self._sent_at = self._asked_at = None
        return rtt_s

    def due(self, *, is_waiting: bool, rtt_s: float) -> float:
        """When `on_timeout` has something to do; `is_waiting` for something from the peer."""
        config = self._config
        if self._asked_at is None:
            patience_s = config.ping_after_silence_s if is_waiting else config.heartbeat_s
            return self.heard_at + patience_s
        dead_at = self.heard_at + config.dead_s
        if self.is_suspect:
            return dead_at
        patience_s = max(config.suspect_min_s, 4 * rtt_s)
        return min(dead_at, max(self._asked_at, self.heard_at) + patience_s)

    def on_timeout(self, now: float, *, is_waiting: bool, rtt_s: float) -> Verdict | None:
        """Ask for a ping, or judge; None if there is nothing to judge."""
        if now < self.due(is_waiting=is_waiting, rtt_s=rtt_s):
            return None
        if self._asked_at is None:
            self.ask(now)
            return None
        if now >= self.heard_at + self._config.dead_s:
            return Verdict.DEAD
        if self.is_suspect:
            return None
        self.is_suspect = True
        return Verdict.SUSPECTED

    def on_late(self, late_s: float, now: float) -> None:
        """We slept for so long: that was our silence, and the peer's bytes may be unread yet."""
        self.heard_at = min(now, self.heard_at + late_s)
        if self._asked_at is not None:
            self._asked_at += late_s

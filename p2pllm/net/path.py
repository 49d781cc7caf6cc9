"""What a path can carry: delivery rate and round trip, and how much may be under way.

Bytes that have been handed to the kernel, or lie in a queue on the way, cannot be overtaken by a
decode step. So bulk is sent only as fast as it arrives: the receiver reports how many bytes have
come in, and at most 1.25 × rate × round trip may be under way. The model is BBR's (Cardwell et
al., draft-ietf-ccwg-bbr §5): the rate is the largest of recent measurements, and rounds with a
little more under way, which show whether the path has become faster, alternate with rounds with
less, in which the queue drains. At the start, up to twice the product is allowed until the rate
stops growing.

The *base round trip* of the product is the mean in the draining rounds, when no queue can be
ours. BBR takes the smallest of the last ten seconds, which serves it because it paces. A window
from a smallest round trip below the usual one would starve us on a path with jitter, or one that
has become longer: less under way, a lower rate, still less under way. A mean corrects itself:
too low, it is found higher in the next draining round; too high, it falls by 15 % each time.

For others, who want to know how long a message will take, this rate is too low where little is sent
at once: a burst that leaves an idle path is reported one round trip later, however fast the path.
`bandwidth` leaves that round trip out.

Not here: losses and retransmission, which stay TCP's.
"""

from collections import deque
from dataclasses import dataclass

from p2pllm.errors import RemoteProtocolError

# How much of the product may be under way, round by round. What two rounds with a quarter more
# have achieved is known after the second; of the two with less, the second is free of our queue.
GAINS = (1.25, 1.25, 0.85, 0.85, 1.0, 1.0, 1.0, 1.0)
_PROBED, _DRAINED = 1, 3  # indices of those second rounds
STARTUP_GAIN = 2.0
STARTUP_FLAT_ROUNDS = 3  # rounds without 25 % growth that end the start
PROBE_GROWTH = 1.1  # a probe that brought so much is gone on with
FIRST_IN_FLIGHT = 64 * 2**10  # before anything is measured
MIN_IN_FLIGHT = 32 * 2**10  # two frames, so that the path never idles between reports
MIN_IN_FLIGHT_S = 0.002  # … or this much at the measured rate: reports come late from a busy loop
RATE_ROUNDS = 10  # rounds that a measured rate counts: more than a cycle of GAINS
RTT_WINDOW_S = 10.0  # how long the smallest round trip is remembered
BURST_BYTES = 8 * 2**10  # less says more about timers than about bandwidth
KEPT = 0.8  # of what earlier bursts say, when another one has been measured
MAX_BANDWIDTH = 1e10  # bytes/s; what takes no measurable time
ALPHA = 0.125  # weight of a new sample in the smoothed round trip (RFC 6298 §2)


@dataclass(slots=True)
class _Sent:
    """One frame under way, and the state when it left (BBR §4.1.1.2)."""

    end: int  # total bytes sent, this frame included
    at: float
    delivered: int
    delivered_at: float
    first_sent_at: float
    is_app_limited: bool


class Path:
    """The estimate for one connection's direction towards the peer."""

    def __init__(self) -> None:
        self.sent = 0
        self.delivered = 0
        self.rtt_s: float | None = None  # smallest of the last seconds
        self.smoothed_rtt_s: float | None = None
        self.rate: float | None = None  # bytes/s
        self.bandwidth: float | None = None  # bytes/s; None: nothing large enough was sent
        self._carried = 0.0  # bytes of recent bursts, and the seconds that they took
        self._carried_s = 0.0
        self._burst_at = 0.0  # when the path was idle last, and something was sent
        self._burst_delivered = 0
        self._rtt_at = 0.0
        self._base_rtt_s: float | None = None  # mean while draining; None before the first time
        self._drain_sum_s = 0.0
        self._drain_count = 0
        self._under_way: deque[_Sent] = deque()
        self._rates: deque[tuple[int, float]] = deque()  # (round, rate), rates falling
        self._delivered_at = 0.0
        self._first_sent_at = 0.0
        self._app_limited_until = 0  # samples of bytes up to here only prove "at least"
        self._round = 0  # rises when what was sent last in the previous round has arrived
        self._round_end = 0
        self._is_starting = True
        self._flat_rounds = 0
        self._plateau = 0.0  # the rate when it last grew
        self._phase = 0  # index into GAINS

    @property
    def in_flight(self) -> int:
        """Bytes sent and not yet reported as received."""
        return self.sent - self.delivered

    @property
    def allowed(self) -> int:
        """How many bytes may be in flight now."""
        base_s = self._base_rtt_s or self.rtt_s
        if self.rate is None or base_s is None:
            return FIRST_IN_FLIGHT
        gain = STARTUP_GAIN if self._is_starting else GAINS[self._phase]
        return int(max(gain * self.rate * base_s, self.rate * MIN_IN_FLIGHT_S, MIN_IN_FLIGHT))

    def on_sent(self, num_bytes: int, now: float, *, is_last: bool) -> None:
        """A frame leaves; `is_last` if nothing more waits behind it."""
        if not self._under_way:
            self._first_sent_at = self._delivered_at = self._burst_at = now
            self._burst_delivered = self.delivered
        self.sent += num_bytes
        if is_last:
            self._app_limited_until = self.sent
        self._under_way.append(
            _Sent(
                self.sent,
                now,
                self.delivered,
                self._delivered_at,
                self._first_sent_at,
                self.sent <= self._app_limited_until,
            )
        )

    def on_received(self, total: int, now: float) -> None:
        """The peer says that `total` bytes have arrived; raises RemoteProtocolError on nonsense."""
        if not self.delivered <= total <= self.sent:
            raise RemoteProtocolError(f"{total} of {self.sent} bytes reported as received")
        newest: _Sent | None = None
        while self._under_way and self._under_way[0].end <= total:
            newest = self._under_way.popleft()
        self.delivered = total
        self._delivered_at = now
        if newest is None:
            return
        self._first_sent_at = newest.at
        self._on_carried(newest, total, now)
        self.on_rtt(now - newest.at, now)
        self._drain_sum_s += now - newest.at
        self._drain_count += 1
        interval = max(now - newest.delivered_at, newest.at - newest.first_sent_at)
        if self.rtt_s is not None and interval >= self.rtt_s > 0:
            self._add_rate((total - newest.delivered) / interval, newest.is_app_limited)
        if total >= self._round_end:
            self._round += 1
            self._round_end = self.sent
            if not newest.is_app_limited and self.rate is not None:
                self._end_round(self.rate)
            self._drain_sum_s, self._drain_count = 0.0, 0

    def _on_carried(self, newest: _Sent, total: int, now: float) -> None:
        """Learn the bandwidth from a burst, or from a path that is kept busy."""
        if newest.delivered == self._burst_delivered:  # it left before anything was reported
            num_bytes = total - self._burst_delivered
            seconds = now - self._burst_at - (self.rtt_s or 0.0)
            is_telling = self.rtt_s is not None and num_bytes >= BURST_BYTES
        else:
            num_bytes = total - newest.delivered
            seconds = now - newest.delivered_at
            is_telling = not (newest.is_app_limited or self._is_starting)
        if is_telling:
            self._carried = KEPT * self._carried + num_bytes
            self._carried_s = KEPT * self._carried_s + max(seconds, num_bytes / MAX_BANDWIDTH)
            self.bandwidth = self._carried / self._carried_s

    def on_rtt(self, sample_s: float, now: float) -> None:
        """A round trip was measured, by a report or by a ping."""
        smooth = self.smoothed_rtt_s
        self.smoothed_rtt_s = sample_s if smooth is None else smooth + ALPHA * (sample_s - smooth)
        if self.rtt_s is None or sample_s <= self.rtt_s or now - self._rtt_at > RTT_WINDOW_S:
            self.rtt_s, self._rtt_at = sample_s, now

    def _end_round(self, rate: float) -> None:
        """A round is over in which we always had something to send."""
        if self._is_starting:
            if rate >= GAINS[0] * self._plateau:
                self._plateau, self._flat_rounds = rate, 0
                return
            self._flat_rounds += 1
            if self._flat_rounds == STARTUP_FLAT_ROUNDS:
                self._is_starting = False
                self._phase = _PROBED + 1
            return
        if self._phase == _PROBED and rate >= PROBE_GROWTH * self._plateau:
            self._plateau = rate
            return
        if self._phase == _DRAINED:
            self._base_rtt_s = self._drain_sum_s / self._drain_count
            self._plateau = rate
        self._phase = (self._phase + 1) % len(GAINS)

    def _add_rate(self, rate: float, is_app_limited: bool) -> None:
        if is_app_limited and self.rate is not None and rate < self.rate:
            return  # slow because there was little to send says nothing about the path
        rates = self._rates
        while rates and rates[-1][1] <= rate:
            rates.pop()
        rates.append((self._round, rate))
        while rates[0][0] < self._round - RATE_ROUNDS:
            rates.popleft()
        self.rate = rates[0][1]

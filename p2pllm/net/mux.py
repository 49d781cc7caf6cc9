"""Streams over one ordered pipe of frames: priorities, credit, cancellation, deadlines, heartbeats.

The multiplexer takes frames of the peer (`on_frame`) and gives frames to send (`next_frame`), one
at a time and only while the link can take one, so that what goes next is decided as late as
possible. It knows nothing of keys, sockets, messages or tasks; `p2pllm.net.frames` has the layout.

*Priorities.* Control goes first. Decode goes before prefill and prefill before bulk, except that
each lets those below it through once per four frames' worth of its own, and that nothing of the
others goes twice while decode waits. Prefill and bulk together also stay within what the path
holds (`p2pllm.net.path`).

*Credit.* A stream may carry `STREAM_WINDOW` bytes unasked, within the connection's window. There
are two of those, one for control and decode and one for the rest, so that bulk nobody reads cannot
block a decode step. Unasked bytes count until the application has consumed them; those of a stream
that ended early are consumed at once. A message for which the application has reserved memory
(`expect`) needs the connection's window no more, so that messages which still wait for memory
cannot keep it from arriving.

*Time.* `on_timeout` is called when `next_timeout` is over: it ends streams whose deadline passed,
and looks for signs of life (`p2pllm.net.heartbeat`).

Not here: resending. A connection that dies takes its streams along; whoever used them uses
another one (`p2pllm.net.rpc`).
"""

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from p2pllm.config import NetConfig
from p2pllm.errors import LocalProtocolError, Refused, RemoteProtocolError
from p2pllm.net.budget import MemoryBudget
from p2pllm.net.frames import (
    CODE,
    CREDIT,
    DATA,
    FLAG_END,
    FLAG_GRANTED,
    FLAG_HEAVY,
    GRANTED,
    HEAD,
    IGNORABLE,
    MAX_REMAINING_S,
    MAX_STREAM_ID,
    NUMBER,
    OPEN,
    STREAM_ID,
    Code,
    FrameType,
    Priority,
    StreamKind,
    parse,
    parse_head,
)
from p2pllm.net.heartbeat import Heartbeat, Verdict
from p2pllm.net.link import Buffer
from p2pllm.net.path import Path
from p2pllm.net.streams import (
    STREAM_WINDOW,
    Event,
    PeerDead,
    PeerLeaving,
    Pong,
    PushDone,
    Recovered,
    Stream,
    StreamData,
    StreamDrained,
    StreamOpened,
    StreamReset,
    StreamStopped,
    Suspected,
)

FIRST_WINDOW = 64 * 2**10  # bytes of a group of priorities before any CREDIT
USUAL_WINDOW = 1 * 2**20  # what a connection allows from the start if memory is there
TURN_BYTES = 1 * 2**20  # of one stream, before another of its priority has a turn
LET_THROUGH = 4  # frames of a priority per frame of lower ones that wait: 16:4:1 in all
# How long an acknowledgement waits for something to travel with. Nobody waits for that of a small
# message, and alone it would cost both sides a wake-up; behind a large one memory is held.
DONE_DELAY_S = 0.025
LARGE_DONE_DELAY_S = 0.002
LARGE_BYTES = 64 * 2**10
DONE_SHARE = 4  # it waits no longer once one in so many of the peer's streams does
LATE_S = 1.0  # a timer that fires later than this: we slept, not the peer
MAX_CONTROL = 64  # answers waiting, above one per stream; a peer that reads none is dropped
RESERVED_STREAMS = 8  # one in so many streams is kept for control


@dataclass(frozen=True, slots=True)
class MuxSnapshot:
    """The state of a mux, for logs, metrics and tests."""

    streams_ours: int
    streams_theirs: int
    rtt_s: float | None
    rate_bytes_s: float | None
    in_flight: int
    in_flight_allowed: int
    unconsumed: tuple[int, int]
    windows: tuple[int, int]
    is_suspect: bool


class _Group:
    """The connection's credit for control and decode, or for prefill and bulk."""

    __slots__ = (
        "consumed",
        "credited_at",
        "is_due",
        "received",
        "recv_limit",
        "send_limit",
        "sent",
        "window",
    )

    def __init__(self) -> None:
        self.sent = 0
        self.send_limit = FIRST_WINDOW
        self.received = 0
        self.consumed = 0
        self.recv_limit = FIRST_WINDOW
        self.window = FIRST_WINDOW
        self.is_due = False  # is there a CREDIT to be sent?
        self.credited_at = float("-inf")  # when the last one was due


_GROUP_OF = (0, 0, 1, 1)  # by priority
# The order of service by (has decode, has prefill let the others wait for long enough?).
_ORDERS = {
    (False, False): (0, 1, 2, 3),
    (False, True): (0, 1, 3, 2),
    (True, False): (0, 2, 3, 1),
    (True, True): (0, 3, 2, 1),
}


class Mux:
    """Both directions of one connection, between the ciphers and the application."""

    def __init__(
        self, config: NetConfig, *, is_client: bool, budget: MemoryBudget, now: float
    ) -> None:
        self.path = Path()
        self.is_draining = False  # either side wants no new streams
        self.is_watched = False  # does somebody wait for the peer, without a stream?
        self.has_said_goaway = False
        self.has_heard_goaway = False
        self._config = config
        self._budget = budget
        self._next_id = 1 if is_client else 2
        self._streams: dict[int, Stream] = {}
        self._newest_theirs = 0
        self._parity = 0 if is_client else 1  # of the peer's ids
        self._num_ours = 0
        self._num_theirs = 0
        self._is_closed = False
        self._events: deque[Event] = deque()
        # sending
        # By priority, streams with something to send, and those that may not be opened yet.
        self._ready = tuple(OrderedDict[Stream, None]() for _ in Priority)
        self._blocked = tuple(OrderedDict[Stream, None]() for _ in Priority)  # by the connection
        self._unopened = tuple(OrderedDict[Stream, None]() for _ in Priority)
        self._num_unopened = 0
        self._served = [0, 0, 0, 0]  # bytes since lower priorities last had their turn
        self._groups = (_Group(), _Group())
        self._has_control = False
        self._control: deque[bytes] = deque()
        self._credit_due: dict[Stream, None] = {}  # an ordered set
        self._pong: int | None = None
        self._heavy_received = 0  # bytes of prefill and bulk, ever
        self._is_received_due = False
        self._done: list[int] = []
        self._done_at = 0.0
        # time
        self._deadlines: list[tuple[float, int, Stream]] = []
        self._sequence = 0  # keeps streams with equal deadlines apart in the heap
        self._heartbeat = Heartbeat(config, now)
        self._wants_pong = False  # has somebody asked for the ping?
        self._timer_due = now + config.heartbeat_s
        for group in range(2):
            self._grow(group, USUAL_WINDOW - FIRST_WINDOW)

    # --- the application's side ---------------------------------------------------------------

    def open(
        self,
        kind: StreamKind,
        priority: Priority,
        buffers: Iterable[Buffer],
        *,
        deadline: float,
    ) -> Stream:
        """Open a stream and send these bytes and the end. `deadline` is in `now`'s time.

        Raises Refused if the peer is leaving or too many streams wait to be opened.
        """
        if self.is_draining or self._num_unopened >= self._config.max_streams:
            raise Refused("the connection takes no more streams")
        stream = Stream(kind, priority, is_ours=True, deadline=deadline)
        self._enqueue(stream, buffers, is_end=True)
        self._watch_deadline(stream)
        self._num_unopened += 1
        self._unopened[priority][stream] = None
        self._admit(priority)
        return stream

    def send(self, stream: Stream, buffers: Iterable[Buffer], *, is_end: bool) -> None:
        """Queue bytes on an open stream. They are not copied: leave them as they are.

        On a stream that is over, or whose reader wants no more, they are dropped.
        """
        if stream.is_closed or stream.end_sent:
            return
        if stream.end_queued:
            raise LocalProtocolError(f"{stream} has ended")
        self._enqueue(stream, buffers, is_end=is_end)
        if not stream.waits_for_credit and stream not in self._blocked[stream.priority]:
            self._ready[stream.priority][stream] = None

    def consume(self, stream: Stream, num_bytes: int) -> None:
        """The application is done with so many bytes of a stream: the peer may send as many.

        Those of a stream that was reset count as consumed already.
        """
        num_bytes = min(num_bytes, stream.received - stream.consumed)
        stream.consumed += num_bytes
        unasked = min(num_bytes, stream.unasked)  # they came before those that were granted
        stream.unasked -= unasked
        self._consume_group(_GROUP_OF[stream.priority], unasked)
        if not (stream.end_received or stream.is_closed):
            limit = stream.consumed + STREAM_WINDOW
            if limit - stream.recv_limit >= STREAM_WINDOW // 2:
                self._raise_limit(stream, limit)

    def expect(self, stream: Stream, total: int) -> None:
        """There is memory for `total` bytes of a stream, counted from its first: grant them all."""
        if not stream.is_closed and not stream.end_received and total > stream.received:
            stream.recv_granted = total
            self._raise_limit(stream, max(total, stream.recv_limit))

    def reset(self, stream: Stream, code: int) -> None:
        """End both directions of a stream and drop what is queued."""
        if stream.is_closed:
            return
        if stream.is_opened:
            self._answer(CODE.pack(FrameType.RESET, stream.id, code))
        self._close(stream)
        self._discard(stream)

    def stop(self, stream: Stream) -> None:
        """Ask the peer to send no more on a stream; what still comes is dropped."""
        if stream.is_closed or stream.end_received or stream.is_stopped:
            return
        stream.is_stopped = True
        self._discard(stream)
        self._answer(HEAD.pack(FrameType.STOP, stream.id))

    def done(self, stream: Stream, now: float) -> None:
        """The application has taken over the push on a stream; tell the peer, soon."""
        if stream.is_closed:
            return
        is_large = stream.received > LARGE_BYTES
        due = now + (LARGE_DONE_DELAY_S if is_large else DONE_DELAY_S)
        if len(self._done) >= self._config.max_streams // DONE_SHARE:
            due = now  # it may be all that keeps the peer from opening more
        self._done_at = min(due, self._done_at) if self._done else due
        self._done.append(stream.id)
        self._has_control = True
        self._close(stream)
        self._discard(stream)

    def ping(self, now: float) -> None:
        """Measure the round trip: a `Pong` event will follow."""
        self._wants_pong = self._has_control = True
        self._heartbeat.ask(now)

    def goaway(self, code: int) -> None:
        """Tell the peer to open no more streams; open ones go on."""
        self.is_draining = self.has_said_goaway = True
        self._answer(CODE.pack(FrameType.GOAWAY, 0, code))

    def close(self) -> None:
        """Forget all streams and give the windows' memory back; the pipe is gone."""
        if self._is_closed:
            return
        self._is_closed = self.is_draining = True
        for group in self._groups:
            self._budget.release_window(group.window - FIRST_WINDOW)
        for stream in [
            *self._streams.values(),
            *itertools.chain(*self._ready, *self._unopened, *self._blocked),
        ]:
            stream.is_closed = True
            stream.queue.clear()
        for queue in (*self._ready, *self._unopened, *self._blocked):
            queue.clear()
        for pending in (self._streams, self._deadlines, self._control, self._events):
            pending.clear()

    @property
    def is_suspect(self) -> bool:
        """Has the peer been silent for too long after a ping?"""
        return self._heartbeat.is_suspect

    @property
    def is_idle(self) -> bool:
        """Is no stream open in either direction?"""
        return not (self._num_ours or self._num_theirs or self._num_unopened)

    def next_event(self) -> Event | None:
        """What happened next, or None."""
        return self._events.popleft() if self._events else None

    def snapshot(self) -> MuxSnapshot:
        """The state as a value."""
        light, heavy = self._groups
        return MuxSnapshot(
            self._num_ours + self._num_unopened,
            self._num_theirs,
            self.path.rtt_s,
            self.path.rate,
            self.path.in_flight,
            self.path.allowed,
            (light.received - light.consumed, heavy.received - heavy.consumed),
            (light.window, heavy.window),
            self.is_suspect,
        )

    # --- what comes in ------------------------------------------------------------------------

    def on_bytes(self, now: float) -> None:
        """Some bytes of the peer arrived, perhaps not a whole frame: it lives."""
        if self._heartbeat.on_bytes(now):
            self._events.append(Recovered())

    def on_frame(self, frame: bytes | memoryview, now: float) -> None:
        """Take in one frame. Raises RemoteProtocolError, after which the connection is of no use.

        The frame's data is handed on as views of `frame`, so it must not change afterwards.
        """
        if len(frame) < HEAD.size:
            raise RemoteProtocolError(f"a frame of {len(frame)} bytes")
        kind = frame[0]
        if kind == FrameType.DATA:
            _, number, flags = parse_head(DATA, frame)
            self._on_data(number, flags, memoryview(frame)[DATA.size :])
        elif kind == FrameType.OPEN:
            self._on_open(frame, now)
        elif kind == FrameType.RECEIVED:
            self.path.on_received(parse(NUMBER, frame)[2], now)
        elif kind == FrameType.CREDIT:
            self._on_credit(*parse(CREDIT, frame)[1:])
        elif kind == FrameType.DONE:
            self._on_done(memoryview(frame)[HEAD.size :])
        elif kind == FrameType.RESET:
            _, number, code = parse(CODE, frame)
            stream = self._find(number)
            if stream is not None:
                self._close(stream)
                self._discard(stream)
                self._events.append(StreamReset(stream, code))
        elif kind == FrameType.STOP:
            self._on_stop(parse(HEAD, frame)[1])
        elif kind == FrameType.PING:
            self._pong = parse(NUMBER, frame)[2]  # only the newest is worth an answer
            self._has_control = True
        elif kind == FrameType.PONG:
            self._on_pong(parse(NUMBER, frame)[2], now)
        elif kind == FrameType.GOAWAY:
            code = parse(CODE, frame)[2]
            self.is_draining = self.has_heard_goaway = True
            self._events.append(PeerLeaving(code))
        elif not kind & IGNORABLE:
            raise RemoteProtocolError(f"an unknown frame of type {kind}")

    def _on_open(self, frame: bytes | memoryview, now: float) -> None:
        _, number, flags, priority, kind, remaining_ms = parse_head(OPEN, frame)
        if number & 1 != self._parity or number <= self._newest_theirs:
            raise RemoteProtocolError(f"stream {number} may not be opened")
        if priority >= len(Priority) or kind >= len(StreamKind):
            raise RemoteProtocolError(f"a stream of priority {priority} and kind {kind}")
        self._newest_theirs = number
        data = memoryview(frame)[OPEN.size :]
        if self.is_draining or self._num_theirs >= self._config.max_streams:
            self._count_heavy(priority >= Priority.PREFILL, len(data))
            self._count_dropped(_GROUP_OF[priority], len(data))
            if len(self._control) >= MAX_CONTROL + self._config.max_streams:
                raise RemoteProtocolError("the peer opens streams and does not read our answers")
            code = Code.CLOSING if self.is_draining else Code.REFUSED
            self._answer(CODE.pack(FrameType.RESET, number, code))
            return
        remaining_s = min(remaining_ms / 1000, MAX_REMAINING_S)
        stream = Stream(
            StreamKind(kind), Priority(priority), is_ours=False, deadline=now + remaining_s
        )
        stream.id = number
        self._streams[number] = stream
        self._num_theirs += 1
        self._watch_deadline(stream)
        self._events.append(StreamOpened(stream))
        self._take(stream, data, flags & FLAG_END)

    def _on_data(self, number: int, flags: int, data: memoryview) -> None:
        stream = self._find(number)
        if stream is None:
            # It was over here before the peer knew.
            self._count_heavy(flags & FLAG_HEAVY, len(data))
            if not flags & FLAG_GRANTED:
                self._count_dropped(1 if flags & FLAG_HEAVY else 0, len(data))
            return
        self._take(stream, data, flags)

    def _take(self, stream: Stream, data: memoryview, flags: int) -> None:
        if stream.end_received:
            raise RemoteProtocolError(f"{stream}: bytes after the end")
        num_bytes = len(data)
        stream.received += num_bytes
        if stream.received > stream.recv_limit:
            raise RemoteProtocolError(f"{stream}: more than its credit")
        group = _GROUP_OF[stream.priority]
        if not flags & FLAG_GRANTED:
            stream.unasked += num_bytes
            self._count_received(group, num_bytes)
        elif stream.received > stream.recv_granted:
            raise RemoteProtocolError(f"{stream}: more than was granted")
        self._count_heavy(group, num_bytes)
        is_end = stream.end_received = bool(flags & FLAG_END)
        if stream.is_stopped:
            self._discard(stream)
        else:
            self._events.append(StreamData(stream, data, is_end))
        if is_end and stream.end_sent and stream.kind is not StreamKind.PUSH:
            self._close(stream)  # the application still holds its bytes, and will consume them

    def _count_received(self, index: int, num_bytes: int) -> None:
        group = self._groups[index]
        group.received += num_bytes
        if group.received > group.recv_limit:
            raise RemoteProtocolError("more than the connection's credit")

    def _count_heavy(self, is_heavy: int, num_bytes: int) -> None:
        if is_heavy:
            self._heavy_received += num_bytes
            self._is_received_due = self._has_control = True

    def _count_dropped(self, index: int, num_bytes: int) -> None:
        self._count_received(index, num_bytes)
        self._consume_group(index, num_bytes)

    def _on_credit(self, number: int, group: int, limit: int) -> None:
        if group >= len(self._groups):
            raise RemoteProtocolError(f"credit for group {group}")
        if number:
            stream = self._find(number)
            if stream is not None:
                stream.send_limit = max(stream.send_limit, limit)
                if group == GRANTED:
                    stream.send_granted = max(stream.send_granted, limit)
                self._unblock(stream)
        else:
            self._groups[group].send_limit = max(self._groups[group].send_limit, limit)
            for priority in Priority:
                if _GROUP_OF[priority] == group:
                    self._unblock_all(priority)

    def _unblock(self, stream: Stream) -> None:
        """The stream's own credit has grown."""
        if stream.waits_for_credit:
            stream.waits_for_credit = False
            self._ready[stream.priority][stream] = None
        elif self._blocked[stream.priority].pop(stream, self) is None:
            self._ready[stream.priority][stream] = None

    def _unblock_all(self, priority: Priority) -> None:
        """The connection's credit has grown: whoever waited for it is first in turn."""
        blocked, ready = self._blocked[priority], self._ready[priority]
        while blocked:
            stream, _ = blocked.popitem()
            ready[stream] = None
            ready.move_to_end(stream, last=False)

    def _on_done(self, numbers: memoryview) -> None:
        if len(numbers) % STREAM_ID.size:
            raise RemoteProtocolError("an acknowledgement that is cut off")
        for (number,) in STREAM_ID.iter_unpack(numbers):
            stream = self._find(number)
            if stream is None:
                continue
            if not stream.is_ours or stream.kind is not StreamKind.PUSH or not stream.end_sent:
                raise RemoteProtocolError(f"{stream} is not a push to be acknowledged")
            self._close(stream)
            self._events.append(PushDone(stream))

    def _on_stop(self, number: int) -> None:
        stream = self._find(number)
        if stream is None or stream.end_sent:
            return
        stream.queue.clear()
        stream.queued = 0
        stream.end_queued = True
        stream.waits_for_credit = False
        self._blocked[stream.priority].pop(stream, None)
        self._ready[stream.priority][stream] = None
        self._events.append(StreamStopped(stream))

    def _on_pong(self, nonce: int, now: float) -> None:
        rtt_s = self._heartbeat.on_pong(nonce, now)
        if rtt_s is None:
            return
        self.path.on_rtt(rtt_s, now)
        if self._wants_pong:
            self._wants_pong = False
            self._events.append(Pong(rtt_s))

    def _find(self, number: int) -> Stream | None:
        """The open stream `number`, None if it is over; raises if it was never opened."""
        stream = self._streams.get(number)
        if stream is None:
            is_theirs = number & 1 == self._parity
            if not number or number > (self._newest_theirs if is_theirs else self._next_id - 2):
                raise RemoteProtocolError(f"stream {number} was never opened")
        return stream

    # --- what goes out ------------------------------------------------------------------------

    def next_frame(self, now: float) -> bytes | None:
        """The frame to send next, or None if nothing may be sent. Sending it is then certain."""
        if self._has_control:
            frame = self._next_control(now)
            if frame is not None:
                return frame
        for index in _ORDERS[self._has_waited(1), self._has_waited(2)]:
            ready = self._ready[index]
            while ready:
                stream = next(iter(ready))
                size = self._allowed_size(stream)
                if size is None:
                    del ready[stream]  # others may be granted what it still lacks
                    self._blocked[index][stream] = None
                elif size or not stream.queued:
                    return self._data_frame(stream, size, now)
                else:
                    break  # the path is full, for all of this priority
        return None

    def next_timeout(self) -> float:
        """When to call `on_timeout`; never later than a heartbeat from now."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][2].is_closed:
            heapq.heappop(deadlines)
        due = self._heartbeat.due(is_waiting=self._is_waiting, rtt_s=self._usual_rtt_s)
        if deadlines and deadlines[0][0] < due:
            due = deadlines[0][0]
        if self._done and self._done_at < due:
            due = self._done_at
        self._timer_due = due
        return due

    def on_timer_set(self, due: float) -> None:
        """`on_timeout` will be called at that time, later than `next_timeout` has asked for."""
        self._timer_due = due

    def on_timeout(self, now: float) -> None:
        """Carry out whatever is due; then look for frames and events. Early calls do no harm."""
        late_s = now - self._timer_due
        if late_s > LATE_S:
            # This process slept or was busy; the peer's bytes may lie unread in the kernel.
            self._heartbeat.on_late(late_s, now)
        if self._done and now >= self._done_at:
            self._has_control = True
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            stream = heapq.heappop(deadlines)[2]
            if not stream.is_closed:
                self.reset(stream, Code.DEADLINE)
                self._events.append(StreamReset(stream, Code.DEADLINE, is_local=True))
        self._beat(now)
        self._timer_due = now + self._config.heartbeat_s

    def _beat(self, now: float) -> None:
        rtt_s = self._usual_rtt_s
        match self._heartbeat.on_timeout(now, is_waiting=self._is_waiting, rtt_s=rtt_s):
            case Verdict.SUSPECTED:
                self._events.append(Suspected())
            case Verdict.DEAD:
                self._events.append(PeerDead())
        self._has_control |= self._heartbeat.is_ping_due

    @property
    def _is_waiting(self) -> bool:
        """Do we wait for something of the peer?"""
        return bool(self._num_ours or self._num_unopened or self.is_watched)

    @property
    def _usual_rtt_s(self) -> float:
        return self.path.smoothed_rtt_s or 0.0

    def _next_control(self, now: float) -> bytes | None:
        if self._control:
            return self._control.popleft()
        if self._pong is not None:
            frame, self._pong = NUMBER.pack(FrameType.PONG, 0, self._pong), None
            return frame
        if self._heartbeat.is_ping_due:
            return NUMBER.pack(FrameType.PING, 0, self._heartbeat.ping_to_send(now))
        for index, group in enumerate(self._groups):
            if group.is_due:
                group.is_due = False
                return CREDIT.pack(FrameType.CREDIT, 0, index, group.recv_limit)
        while self._credit_due:
            stream, _ = self._credit_due.popitem()
            if not stream.is_closed:
                return self._stream_credit(stream)
        if self._is_received_due:
            self._is_received_due = False
            return NUMBER.pack(FrameType.RECEIVED, 0, self._heavy_received)
        if self._done and (now >= self._done_at or any(self._ready) or self.is_draining):
            numbers, self._done = self._done, []
            frame = b"".join(map(STREAM_ID.pack, numbers))
            return HEAD.pack(FrameType.DONE, 0) + frame
        self._has_control = bool(self._done)
        return None

    def _stream_credit(self, stream: Stream) -> bytes:
        window = CREDIT.pack(FrameType.CREDIT, stream.id, 0, stream.recv_limit)
        if stream.recv_granted <= stream.received:
            return window
        if stream.recv_limit > stream.recv_granted:
            self._answer(window)
        return CREDIT.pack(FrameType.CREDIT, stream.id, GRANTED, stream.recv_granted)

    def _has_waited(self, index: int) -> bool:
        """Has this priority sent so much that a lower one may go first?"""
        return self._served[index] >= LET_THROUGH * self._frame_bytes

    @property
    def _frame_bytes(self) -> int:
        config = self._config
        rate = self.path.rate
        is_fast = rate is not None and rate * 0.001 >= config.large_frame_bytes
        return config.large_frame_bytes if is_fast else config.frame_bytes

    def _allowed_size(self, stream: Stream) -> int | None:
        """How many bytes of a stream may go now; None if the connection's credit is used up."""
        if not stream.queued:
            return 0
        size = min(stream.queued, self._frame_bytes, stream.send_limit - stream.sent)
        if stream.sent < stream.send_granted:
            size = min(size, stream.send_granted - stream.sent)
        else:
            group = self._groups[_GROUP_OF[stream.priority]]
            size = min(size, group.send_limit - group.sent)
            if size <= 0:
                return None
        if stream.priority >= Priority.PREFILL:
            path = self.path
            if path.in_flight and path.in_flight + size > path.allowed:
                return 0
        return size

    def _data_frame(self, stream: Stream, size: int, now: float) -> bytes:
        index = stream.priority
        parts: list[Buffer] = [b""]
        left = size
        while left:
            head = stream.queue[0]
            if len(head) <= left:
                parts.append(head)
                left -= len(head)
                stream.queue.popleft()
            else:
                parts.append(head[:left])
                stream.queue[0] = head[left:]
                left = 0
        stream.queued -= size
        is_end = stream.end_queued and not stream.queued
        parts[0] = self._data_head(stream, size, is_end, now)
        self._after_data(stream, size, is_end)
        if index >= Priority.PREFILL:
            waiting = self._ready[Priority.PREFILL] or self._ready[Priority.BULK]
            self.path.on_sent(size, now, is_last=not waiting)
        return b"".join(parts)

    def _data_head(self, stream: Stream, size: int, is_end: bool, now: float) -> bytes:
        flags = FLAG_END if is_end else 0
        if stream.sent < stream.send_granted:
            flags |= FLAG_GRANTED
        else:
            self._groups[_GROUP_OF[stream.priority]].sent += size
        stream.sent += size
        if stream.is_opened:
            if stream.priority >= Priority.PREFILL:
                flags |= FLAG_HEAVY
            return DATA.pack(FrameType.DATA, stream.id, flags)
        stream.is_opened = True
        stream.id = self._next_id
        self._next_id += 2
        self._streams[stream.id] = stream
        self.is_draining |= self._next_id > MAX_STREAM_ID  # no number is ever used twice
        remaining_s = min(max(0.0, stream.deadline - now), MAX_REMAINING_S)
        return OPEN.pack(
            FrameType.OPEN,
            stream.id,
            flags,
            stream.priority,
            stream.kind,
            int(remaining_s * 1000),
        )

    def _after_data(self, stream: Stream, size: int, is_end: bool) -> None:
        index = stream.priority
        self._served[index] += size
        if index > Priority.DECODE:
            self._served[Priority.DECODE] = 0
            if index > Priority.PREFILL:
                self._served[Priority.PREFILL] = 0
        ready = self._ready[index]
        stream.turn += size
        if stream.queued and stream.sent < stream.send_limit:
            if stream.turn >= TURN_BYTES:
                stream.turn = 0
                ready.move_to_end(stream)
        else:
            stream.turn = 0
            del ready[stream]
            stream.waits_for_credit = bool(stream.queued)
        if is_end:
            stream.end_sent = True
            if stream.end_received and stream.kind is not StreamKind.PUSH:
                self._close(stream)
        if stream.wants_drained and not stream.queued:
            self._events.append(StreamDrained(stream))

    # --- bookkeeping --------------------------------------------------------------------------

    def _enqueue(self, stream: Stream, buffers: Iterable[Buffer], *, is_end: bool) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            if view.nbytes:
                stream.queue.append(view if view.format == "B" else view.cast("B"))
                stream.queued += view.nbytes
        stream.end_queued = is_end

    def _admit(self, priority: int) -> None:
        """Let waiting streams of a priority open, as far as the bound on open ones allows."""
        limit = self._config.max_streams
        if priority != Priority.CONTROL:
            limit -= limit // RESERVED_STREAMS
        waiting = self._unopened[priority]
        while waiting and self._num_ours < limit:
            stream, _ = waiting.popitem(last=False)
            stream.is_admitted = True
            self._num_unopened -= 1
            self._num_ours += 1
            self._ready[priority][stream] = None

    def _raise_limit(self, stream: Stream, limit: int) -> None:
        stream.recv_limit = limit
        self._credit_due[stream] = None
        self._has_control = True

    def _consume_group(self, index: int, num_bytes: int) -> None:
        group = self._groups[index]
        group.consumed += num_bytes
        limit = group.consumed + group.window
        if limit - group.recv_limit < group.window // 4:
            return
        group.recv_limit = limit
        group.is_due = self._has_control = True
        now, rtt_s = self._heartbeat.heard_at, self.path.rtt_s
        if rtt_s is not None and now - group.credited_at < rtt_s / 2:
            # More than half of the window per round trip: the window holds the sender up.
            most = self._config.connection_window_bytes - group.window
            self._grow(index, min(group.window, most))
        group.credited_at = now

    def _grow(self, index: int, num_bytes: int) -> None:
        if num_bytes > 0 and not self._is_closed and self._budget.reserve_window(num_bytes):
            group = self._groups[index]
            group.window += num_bytes
            group.recv_limit = group.consumed + group.window
            group.is_due = self._has_control = True

    def _watch_deadline(self, stream: Stream) -> None:
        deadlines = self._deadlines
        if len(deadlines) > 64 + 2 * (self._num_ours + self._num_theirs + self._num_unopened):
            # Streams usually end long before their deadline and are left in the heap until here.
            deadlines[:] = [entry for entry in deadlines if not entry[2].is_closed]
            heapq.heapify(deadlines)
        heapq.heappush(deadlines, (stream.deadline, self._sequence, stream))
        self._sequence += 1

    def _answer(self, frame: bytes) -> None:
        self._control.append(frame)
        self._has_control = True

    def _discard(self, stream: Stream) -> None:
        """Count what a stream has received as consumed: the application will not see it."""
        stream.consumed = stream.received
        unasked, stream.unasked = stream.unasked, 0
        self._consume_group(_GROUP_OF[stream.priority], unasked)

    def _close(self, stream: Stream) -> None:
        """Forget a stream and what is queued on it; whatever waited for its place may open."""
        stream.is_closed = True
        stream.queue.clear()
        stream.queued = 0
        self._ready[stream.priority].pop(stream, None)
        self._blocked[stream.priority].pop(stream, None)
        self._credit_due.pop(stream, None)
        self._streams.pop(stream.id, None)
        if not stream.is_ours:
            self._num_theirs -= 1
        elif not stream.is_admitted:
            self._num_unopened -= 1
            del self._unopened[stream.priority][stream]
        else:
            self._num_ours -= 1
            for priority in Priority:
                self._admit(priority)

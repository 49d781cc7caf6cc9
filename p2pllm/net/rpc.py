"""RPC over one connection: requests and their answers, pushes, streams of replies.

A `Channel` is a connection on its link. The link calls it with bytes, it feeds the connection,
and the connection's events end in futures of callers or in handlers' tasks. Whatever is to be sent
is written before the callback returns, so that no task switch lies between a link and a caller.

    unary      OPEN request END  ->   <- reply END              or an ErrorReply
    streaming  OPEN request END  ->   <- reply, reply, … END    an ErrorReply ends it
    push       OPEN id message END -> <- DONE                   once a handler has it

Each message stands behind its length (`p2pllm.net.assembly`). A push begins with a 64-bit id by
which the receiver knows one that it had before: the sender repeats it until it is acknowledged.

A handler that never awaits (`Host.instant_handlers`) is called at once, from the link's callback,
and a push that nobody awaits (`post`) needs no task either: on the way of a decode step there is
then none between one socket and the other but the worker's own.

Not here: which connection to a peer is used, and how it came to be (`p2pllm.net.endpoint`).
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from p2pllm.config import NetConfig
from p2pllm.errors import (
    BadRequest,
    CodecError,
    ConnectionLost,
    DeadlineExceeded,
    P2PLLMError,
    Refused,
    RemoteFault,
    RemoteProtocolError,
    RequestFailed,
    TransportError,
)
from p2pllm.ids import PeerId
from p2pllm.net.assembly import PREFIX_BYTES, Assembled, Assembly
from p2pllm.net.budget import MemoryBudget
from p2pllm.net.connection import Connection, Established
from p2pllm.net.frames import Code, Priority, StreamKind
from p2pllm.net.handshake import PeerHello
from p2pllm.net.link import Buffer, Link
from p2pllm.net.streams import (
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
from p2pllm.wire.messages import Ack, ErrorReply, Message, decode_message, encode_message

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

PUSH_ID_BYTES = 8
REPLIES_AHEAD = 4  # of a streaming call, before its reader has taken them
SEND_AHEAD_BYTES = 256 * 2**10  # of a streaming reply, before its handler has to wait
WRITES_PER_TURN = 64  # before others on the event loop have a turn
# uvloop counts whole milliseconds: a nearer timer would fire early, and again and again until the
# clock has moved on, with the whole loop spinning.
MIN_TIMER_S = 0.001


@dataclass(frozen=True, slots=True)
class Request(Generic[M]):
    """What a handler is called with.

    `deadline` is in the event loop's time: whoever asked has given up by then. `remote` is the
    (host, port) that the peer's connection comes from.
    """

    peer: PeerId
    message: M
    deadline: float
    remote: tuple[str, int] | None

    def remaining_s(self, now: float) -> float:
        """Seconds left to answer (never negative): the budget of what is asked of others."""
        return max(0.0, self.deadline - now)


UnaryHandler = Callable[[Request[M]], Awaitable[Message | None]]
InstantHandler = Callable[[Request[M]], None]
StreamHandler = Callable[[Request[M]], AsyncGenerator[Message, None]]


OnEnd = Callable[[P2PLLMError | None], None]
"""Told how a posted push has ended: None when the peer's application has it."""


class Host(Protocol):
    """What a channel needs of the endpoint that it belongs to."""

    config: NetConfig
    budget: MemoryBudget
    unary_handlers: dict[type[Message], UnaryHandler[Any]]
    instant_handlers: dict[type[Message], InstantHandler[Any]]
    stream_handlers: dict[type[Message], StreamHandler[Any]]

    def start_task(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a handler in the endpoint's task group."""
        ...

    def is_new_push(self, peer: PeerId, number: int) -> bool:
        """Has this push not been seen yet? Remembers it."""
        ...

    def on_established(self, channel: "Channel") -> None:
        """The handshake is complete."""
        ...

    def on_closed(self, channel: "Channel", error: Exception) -> None:
        """The connection is over; `error` is what its waiting calls were given."""
        ...

    def on_suspected(self, channel: "Channel", error: ConnectionLost) -> None:
        """The peer has been silent for too long, though it may speak again."""
        ...

    def on_recovered(self, channel: "Channel") -> None:
        """A suspected peer has spoken."""
        ...

    def on_leaving(self, channel: "Channel", code: int) -> None:
        """The peer opens and takes no new streams here; `code` says why."""
        ...

    def on_memory_lacking(self, channel: "Channel") -> None:
        """Call `resume_lacking` once there is memory again."""
        ...

    def on_memory_freed(self) -> None:
        """The budget has some again; called often."""
        ...


class _Call:
    """One request or push of ours: what its caller waits for. A push ends with None."""

    __slots__ = ("assembly", "future")

    def __init__(self, future: "asyncio.Future[Message | None]", assembly: Assembly) -> None:
        self.future = future
        self.assembly = assembly

    def fail(self, error: Exception) -> None:
        self.assembly.close()
        if not self.future.done():
            self.future.set_exception(error)


class _Post:
    """A push of ours that nobody awaits: `on_end` is called once, with what it failed by."""

    __slots__ = ("assembly", "on_end")

    def __init__(self, on_end: OnEnd, assembly: Assembly) -> None:
        self.on_end = on_end
        self.assembly = assembly

    def fail(self, error: Exception) -> None:
        self.assembly.close()
        self.on_end(error if isinstance(error, P2PLLMError) else ConnectionLost(str(error)))


class _Replies:
    """A streaming request of ours: replies that its reader has not taken."""

    __slots__ = ("assembly", "error", "queue", "waiter")

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.queue: deque[tuple[Message, int]] = deque()  # with its bytes in the budget
        self.waiter: asyncio.Future[None] | None = None
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.assembly.close()
        self.error = error
        self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _Served:
    """One request of the peer: its handler's task, once the message is whole."""

    __slots__ = ("assembly", "drained", "message", "task")

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.message: Assembled | None = None
        self.task: asyncio.Task[None] | None = None
        self.drained: asyncio.Future[None] | None = None  # while the handler waits for room

    def wake(self) -> None:
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(None)


_Entry = _Call | _Post | _Replies | _Served


class Channel:
    """One connection on its link, and the calls that run over it."""

    def __init__(self, link: Link, connection: Connection, host: Host, *, is_dialled: bool) -> None:
        self.link = link
        self.connection = connection
        self.is_dialled = is_dialled
        self.is_closed = False
        self.is_left = False  # no new streams, by our wish or the peer's
        self.established: asyncio.Future[PeerHello] = asyncio.get_running_loop().create_future()
        self.last_used_at = 0.0
        self.since = 0.0  # when the handshake was completed
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._entries: dict[Stream, _Entry] = {}
        self._lacking: dict[Stream, Assembly] = {}  # those that wait for memory, oldest first
        self._waiting_pushes: deque[tuple[Stream, Assembled, Message]] = deque()
        self._num_push_handlers = 0
        self._pings: list[asyncio.Future[float]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._is_flush_scheduled = False
        self._is_flushing = False

    def start(self) -> None:
        """Begin: send the first bytes of the handshake if it is ours to do so."""
        self.link.start(self)
        self.flush()

    @property
    def peer(self) -> PeerId:
        """Who is there; only once established."""
        assert self.connection.hello is not None
        return self.connection.hello.peer_id

    @property
    def is_usable(self) -> bool:
        """May new streams be opened?"""
        mux = self.connection.mux
        return mux is not None and not (self.is_closed or mux.is_draining)

    @property
    def is_suspect(self) -> bool:
        """Has the peer been silent for too long?"""
        return self.connection.mux is not None and self.connection.mux.is_suspect

    @property
    def is_idle(self) -> bool:
        """Is nothing under way?"""
        mux = self.connection.mux
        return mux is not None and mux.is_idle

    @property
    def rtt_s(self) -> float | None:
        """The smallest round trip of the last seconds, None before the first measurement."""
        return self.connection.mux.path.rtt_s if self.connection.mux is not None else None

    @property
    def rate_bytes_s(self) -> float | None:
        """What the path towards the peer has been measured to carry."""
        return self.connection.mux.path.bandwidth if self.connection.mux is not None else None

    def set_watched(self, is_watched: bool) -> None:
        """Look for signs of life as if a request were under way, or no more."""
        mux = self.connection.mux
        assert mux is not None, "only established connections are watched"
        mux.is_watched = is_watched
        if is_watched:
            self._arm()

    # --- calls of ours ------------------------------------------------------------------------

    async def request(self, buffers: list[Buffer], deadline: float, priority: Priority) -> Message:
        """Ask and await the one reply, which may be an ErrorReply.

        Raises TransportError, RequestFailed if the peer could not read the request, and
        RemoteProtocolError if we cannot read the reply. After `Refused` nothing has been done.
        """
        reply = await self._call(StreamKind.UNARY, buffers, deadline, priority)
        assert reply is not None  # only pushes end with None
        return reply

    async def push(self, buffers: list[Buffer], deadline: float, priority: Priority) -> None:
        """Deliver over this connection; returns when the peer's application has the message."""
        await self._call(StreamKind.PUSH, buffers, deadline, priority)

    def post(
        self, buffers: list[Buffer], deadline: float, priority: Priority, on_end: OnEnd
    ) -> None:
        """Push without waiting. `on_end` must not raise.

        Raises Refused, with `on_end` never called, if it cannot leave.
        """
        stream = self._open(StreamKind.PUSH, buffers, deadline, priority)
        self._entries[stream] = _Post(on_end, self._assembly(stream))
        self.flush()

    async def _call(
        self, kind: StreamKind, buffers: list[Buffer], deadline: float, priority: Priority
    ) -> Message | None:
        stream = self._open(kind, buffers, deadline, priority)
        future: asyncio.Future[Message | None] = self._loop.create_future()
        self._entries[stream] = _Call(future, self._assembly(stream))
        self.flush()
        try:
            return await future
        finally:
            self._abandon(stream)  # if cancelled: the peer need not go on

    async def stream(
        self, buffers: list[Buffer], deadline: float, priority: Priority
    ) -> AsyncGenerator[Message, None]:
        """Ask and yield the replies as they come; closing the generator cancels at the peer."""
        stream = self._open(StreamKind.STREAMING, buffers, deadline, priority)
        assembly = self._assembly(stream)
        replies = self._entries[stream] = _Replies(assembly)
        self.flush()
        try:
            while True:
                while replies.queue:
                    message, num_bytes = replies.queue.popleft()
                    self._release(num_bytes)
                    if assembly.is_paused and not replies.queue:
                        assembly.is_paused = False
                        self._resume(stream, replies)
                        self.flush()
                    yield message
                if replies.error is not None:
                    raise replies.error
                if stream not in self._entries:
                    return
                replies.waiter = self._loop.create_future()
                await replies.waiter
        finally:
            self._release(sum(num_bytes for _, num_bytes in replies.queue))
            self._abandon(stream)

    async def ping(self) -> float:
        """Measure a round trip, in seconds."""
        mux = self.connection.mux
        if mux is None or self.is_closed:
            raise ConnectionLost("the connection is closed")
        future: asyncio.Future[float] = self._loop.create_future()
        self._pings.append(future)
        mux.ping(self._loop.time())
        self.flush()
        return await future

    def _open(
        self, kind: StreamKind, buffers: list[Buffer], deadline: float, priority: Priority
    ) -> Stream:
        mux = self.connection.mux
        if mux is None or self.is_closed:
            raise Refused("the connection is closed")
        self.last_used_at = self._loop.time()
        return mux.open(kind, priority, buffers, deadline=deadline)

    def _assembly(self, stream: Stream) -> Assembly:
        mux, host = self.connection.mux, self._host
        assert mux is not None
        limit = host.config.max_message_bytes + PUSH_ID_BYTES
        return Assembly(mux, stream, host.budget, max_message_bytes=limit)

    def _abandon(self, stream: Stream) -> None:
        entry = self._entries.pop(stream, None)
        if entry is None:
            return  # it came to its end
        self._forget(stream, entry)
        if self.connection.mux is not None:
            self.connection.mux.reset(stream, Code.CANCELLED)
        self.flush()

    def _forget(self, stream: Stream, entry: _Entry) -> None:
        entry.assembly.close()
        self._lacking.pop(stream, None)
        self._host.on_memory_freed()

    def _release(self, num_bytes: int) -> None:
        self._host.budget.release_message(num_bytes)
        self._host.on_memory_freed()

    # --- the link's callbacks -----------------------------------------------------------------

    def link_received(self, data: Buffer) -> None:
        if self.is_closed:
            return
        try:
            self.connection.receive(data, self._loop.time())
        except (RemoteProtocolError, TransportError) as exc:
            self.fail(exc)
        self.flush()

    def link_writable(self) -> None:
        self.flush()

    def link_closed(self, reason: str) -> None:
        self._end(ConnectionLost(f"the connection ended: {reason}"))

    def flush(self) -> None:
        """Act on events, write what may be written, and set the timer for what is due later.

        Called from inside itself (an event's answer), it leaves the work to the outer call.
        """
        if self.is_closed or self._is_flushing:
            return
        self._is_flushing = True
        try:
            event = self.connection.next_event()
            while True:
                while event is not None:
                    self._on_event(event)
                    event = self.connection.next_event()
                self._write()
                event = self.connection.next_event()  # writing may have drained a stream
                if event is None:
                    break
        except RemoteProtocolError as exc:
            self.fail(exc)
        finally:
            self._is_flushing = False
        self._arm()

    def _write(self) -> None:
        now = self._loop.time()
        link, connection = self.link, self.connection
        for _ in range(WRITES_PER_TURN):
            if not link.can_write:
                return
            data = connection.bytes_to_send(now)
            if data is None:
                return
            link.write(data)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._on_turn)

    def _on_turn(self) -> None:
        self._is_flush_scheduled = False
        self.flush()

    def _arm(self) -> None:
        due = self.connection.next_timeout()
        if due is None or self.is_closed:
            return
        if self._timer is not None:
            if self._timer_due <= due:
                return  # it looks again when it fires: cheaper than a new timer for every frame
            self._timer.cancel()
        soonest = self._loop.time() + MIN_TIMER_S
        if due < soonest:  # we have only now begun to wait: it is not the timer that is late
            due = soonest
            self.connection.on_timer_set(due)
        self._timer = self._loop.call_at(due, self._on_timer)
        self._timer_due = due  # uvloop's handles do not say when

    def _on_timer(self) -> None:
        self._timer = None
        self.connection.on_timeout(self._loop.time())
        self.flush()

    # --- ends ---------------------------------------------------------------------------------

    def leave(self, code: Code) -> None:
        """Open no new streams, ask the peer for the same, and close once nothing is under way."""
        mux = self.connection.mux
        self.is_left = True
        if mux is None:
            self.fail(Refused("the connection is not needed any more"))
        elif not (self.is_closed or mux.has_said_goaway):
            mux.goaway(code)
            self.flush()
            self._close_if_left()

    def close(self, code: Code) -> None:
        """Say goodbye and close at once; what is under way is lost."""
        if self.connection.mux is not None and not self.is_closed:
            if not self.connection.mux.has_said_goaway:
                self.connection.mux.goaway(code)
            self._write()
        if not self.is_closed:
            self.link.close()
            self._end(ConnectionLost("we closed the connection"))

    def _close_if_left(self) -> None:
        mux = self.connection.mux
        if mux is None or self._entries:  # what has ended for the mux may wait to be told of here
            return
        if mux.has_said_goaway and mux.has_heard_goaway and mux.is_idle and not self.is_closed:
            self._write()  # acknowledgements that have waited, or pushes would be repeated
            self.link.close()
            self._end(ConnectionLost("the connection was replaced or not needed any more"))

    def fail(self, error: Exception) -> None:
        """Close at once, for a reason that those who wait are told."""
        if not self.is_closed:
            self.link.abort()
            self._end(error)

    def _end(self, error: Exception) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if not self.established.done():
            self.established.set_exception(error)
            self.established.exception()  # nobody may be waiting
        lost = error if isinstance(error, TransportError) else ConnectionLost(str(error))
        entries, self._entries = self._entries, {}
        for stream, entry in entries.items():
            if isinstance(entry, _Served):
                entry.assembly.close()
                if entry.task is not None:
                    entry.task.cancel()
            else:
                # What never left may be asked again elsewhere without harm.
                entry.fail(lost if stream.is_opened else Refused(str(lost)))
        for waiter in self._pings:
            if not waiter.done():
                waiter.set_exception(lost)
        self._pings.clear()
        self._lacking.clear()
        while self._waiting_pushes:
            _, assembled, _ = self._waiting_pushes.popleft()
            self._release(assembled.num_bytes)
        self.connection.close()
        self._host.on_closed(self, error)
        self._host.on_memory_freed()

    # --- events -------------------------------------------------------------------------------

    def _on_event(self, event: Event | Established) -> None:
        match event:
            case StreamData(stream, data, is_end):
                self._on_data(stream, data, is_end=is_end)
            case StreamOpened(stream):
                self.last_used_at = self._loop.time()
                self._entries[stream] = _Served(self._assembly(stream))
            case PushDone(stream):
                call = self._entries.pop(stream, None)
                if isinstance(call, _Post):
                    call.on_end(None)
                elif isinstance(call, _Call) and not call.future.done():
                    call.future.set_result(None)
                self._close_if_left()
            case StreamReset(stream, code):
                self._on_reset(stream, code)
                self._close_if_left()
            case StreamDrained(stream) | StreamStopped(stream):
                served = self._entries.get(stream)
                if isinstance(served, _Served):
                    served.wake()
            case Pong(rtt_s):
                for waiter in self._pings:
                    if not waiter.done():
                        waiter.set_result(rtt_s)
                self._pings.clear()
            case Established(hello):
                self.since = self.last_used_at = self._loop.time()
                self._host.on_established(self)
                if not self.established.done():
                    self.established.set_result(hello)
            case Suspected():
                logger.debug("peer suspected peer=%s", self.peer.short)
                error = ConnectionLost("the peer has been silent for too long")
                self._give_back_pushes(error)
                self._host.on_suspected(self, error)
            case Recovered():
                logger.debug("peer recovered peer=%s", self.peer.short)
                self._host.on_recovered(self)
            case PeerDead():
                self.fail(ConnectionLost("the peer has been silent for too long"))
            case PeerLeaving(code):
                self.leave(Code.CLOSING)
                self._host.on_leaving(self, code)
                self._close_if_left()

    def _give_back_pushes(self, error: ConnectionLost) -> None:
        """Pushes may be repeated, so they need not wait until a suspected peer counts as dead."""
        for stream, entry in list(self._entries.items()):
            if isinstance(entry, _Call | _Post) and stream.kind is StreamKind.PUSH:
                self._abandon(stream)
                entry.fail(error)

    def _on_data(self, stream: Stream, data: memoryview, *, is_end: bool) -> None:
        entry = self._entries.get(stream)
        if entry is None:
            return  # answered or abandoned meanwhile: its credit ends with it
        if stream.is_ours and stream.kind is StreamKind.PUSH:
            raise RemoteProtocolError("an answer to a push")
        try:
            messages = entry.assembly.on_data(data, is_end)
            self._take(stream, entry, messages)
        except CodecError as exc:
            self._on_malformed(stream, entry, exc)

    def _resume(self, stream: Stream, entry: _Entry) -> None:
        """Go on with a stream whose chunks were parked."""
        try:
            self._take(stream, entry, entry.assembly.resume())
        except CodecError as exc:
            self._on_malformed(stream, entry, exc)

    def resume_lacking(self) -> None:
        """Memory has become free: go on with the streams that waited for it, oldest first."""
        waiting, self._lacking = self._lacking, {}
        for stream in waiting:
            entry = self._entries.get(stream)
            if entry is not None:
                self._resume(stream, entry)
        self.flush()

    def drop_stalled(self) -> None:
        """Others wait for memory: end what holds some for a message that does not come."""
        for stream, entry in list(self._entries.items()):
            if entry.assembly.is_stalled():
                self._entries.pop(stream)
                self._forget(stream, entry)
                if not isinstance(entry, _Served):
                    entry.fail(ConnectionLost("the reply comes too slowly"))
                if self.connection.mux is not None:
                    self.connection.mux.reset(stream, Code.REFUSED)
        self.flush()

    def _take(self, stream: Stream, entry: _Entry, messages: list[Assembled]) -> None:
        """Hand whole messages on. Raises CodecError, with all memory given back or in `entry`."""
        for index, assembled in enumerate(messages):
            try:
                self._take_one(stream, entry, assembled)
            except CodecError:
                self._release(sum(message.num_bytes for message in messages[index:]))
                raise
        if entry.assembly.lacks_memory:
            self._lacking[stream] = entry.assembly
            self._host.on_memory_lacking(self)
        if entry.assembly.is_ended:
            self._on_message_end(stream, entry)

    def _on_message_end(self, stream: Stream, entry: _Entry) -> None:
        if isinstance(entry, _Served):
            if entry.message is None:
                raise CodecError("a request without a message")
            return  # its handler answers
        if isinstance(entry, _Call) and stream in self._entries:
            raise CodecError("a reply without a message")
        self._entries.pop(stream, None)
        if isinstance(entry, _Replies):
            entry.wake()
        self._close_if_left()

    def _take_one(self, stream: Stream, entry: _Entry, assembled: Assembled) -> None:
        if isinstance(entry, _Served):
            self._serve(stream, entry, assembled)
        elif isinstance(entry, _Replies):
            entry.queue.append((decode_message(assembled.data), assembled.num_bytes))
            entry.assembly.is_paused = len(entry.queue) >= REPLIES_AHEAD
            entry.wake()
        elif isinstance(entry, _Post) or stream not in self._entries:
            raise CodecError("a second reply")
        else:
            message = decode_message(assembled.data)
            del self._entries[stream]
            self._release(assembled.num_bytes)  # it is the caller's from here on
            if not entry.future.done():
                entry.future.set_result(message)

    def _on_malformed(self, stream: Stream, entry: _Entry, error: CodecError) -> None:
        """Something that does not parse ends its stream, not the connection: it may be newer."""
        self._entries.pop(stream, None)
        self._forget(stream, entry)
        if isinstance(entry, _Served):
            if entry.task is not None:
                entry.task.cancel()
            if stream.kind is not StreamKind.PUSH and entry.message is None:
                self._answer(stream, ErrorReply.from_exception(BadRequest(str(error))))
                return
        else:
            entry.fail(error)
        if self.connection.mux is not None:
            self.connection.mux.reset(stream, Code.MALFORMED)

    def _on_reset(self, stream: Stream, code: int) -> None:
        entry = self._entries.pop(stream, None)
        if entry is None:
            return
        self._forget(stream, entry)
        if not isinstance(entry, _Served):
            entry.fail(_reset_error(code))
        elif entry.task is not None:
            entry.task.cancel()

    # --- requests of the peer -----------------------------------------------------------------

    def _serve(self, stream: Stream, served: _Served, assembled: Assembled) -> None:
        """Start the handler of a request that is whole; raises CodecError if it is not one."""
        if served.message is not None:
            raise CodecError("a second request on one stream")
        if stream.kind is StreamKind.PUSH:
            message = decode_message(assembled.data[PUSH_ID_BYTES:])
            served.message = assembled
            self._waiting_pushes.append((stream, assembled, message))
            self._start_pushes()
            return
        message = decode_message(assembled.data)
        served.message = assembled
        request = Request(self.peer, message, stream.deadline, self.link.remote)
        work: Coroutine[Any, Any, None]
        if stream.kind is StreamKind.UNARY:
            instant = self._host.instant_handlers.get(type(message))
            if instant is not None:
                self._entries.pop(stream, None)
                self._answer(stream, _run_instant(instant, request) or Ack())
                self._release(assembled.num_bytes)
                return
            work = self._run_unary(stream, request)
        else:
            work = self._run_streaming(stream, served, request)
        served.task = self._host.start_task(work)
        served.task.add_done_callback(partial(self._on_served, stream, assembled.num_bytes))

    def _on_served(self, stream: Stream, num_bytes: int, task: "asyncio.Task[None]") -> None:
        self._entries.pop(stream, None)
        self._release(num_bytes)
        self._close_if_left()

    async def _run_unary(self, stream: Stream, request: Request[Message]) -> None:
        handler = self._host.unary_handlers.get(type(request.message))
        try:
            if handler is None:
                raise BadRequest(f"nobody here answers {type(request.message).__name__}")
            reply: Message = await handler(request) or Ack()
        except Exception as exc:
            reply = _error_reply(exc, request)
        self._answer(stream, reply)

    async def _run_streaming(
        self, stream: Stream, served: _Served, request: Request[Message]
    ) -> None:
        handler = self._host.stream_handlers.get(type(request.message))
        try:
            if handler is None:
                raise BadRequest(f"nobody here streams for {type(request.message).__name__}")
            async with aclosing(handler(request)) as replies:
                async for reply in replies:
                    self._send(stream, framed(reply), is_end=False)
                    await self._wait_for_room(stream, served)
        except Exception as exc:
            self._answer(stream, _error_reply(exc, request))
        else:
            self._send(stream, [], is_end=True)

    async def _wait_for_room(self, stream: Stream, served: _Served) -> None:
        if stream.queued <= SEND_AHEAD_BYTES:
            return
        served.drained = self._loop.create_future()
        stream.wants_drained = True
        try:
            await served.drained
        finally:
            stream.wants_drained = False

    def _answer(self, stream: Stream, reply: Message) -> None:
        """Send the last message of a stream; whatever is left of the request is not wanted."""
        self._send(stream, framed(reply), is_end=True)
        if self.connection.mux is not None and not stream.end_received:
            self.connection.mux.stop(stream)
            self.flush()

    def _send(self, stream: Stream, buffers: list[Buffer], *, is_end: bool) -> None:
        if self.connection.mux is not None and not self.is_closed:
            self.connection.mux.send(stream, buffers, is_end=is_end)
            self.flush()

    def _start_pushes(self) -> None:
        """Run the handlers of pushes in order, at most as many at once as streams are allowed.

        A push is acknowledged when its handler starts; one that waits keeps its stream, so that
        a peer cannot pile up more than its streams hold.
        """
        mux = self.connection.mux
        while self._waiting_pushes and self._num_push_handlers < self._host.config.max_streams:
            stream, assembled, message = self._waiting_pushes.popleft()
            self._entries.pop(stream, None)
            instant = self._host.instant_handlers.get(type(message))
            handler = self._host.unary_handlers.get(type(message))
            number = int.from_bytes(assembled.data[:PUSH_ID_BYTES], "big")
            if stream.is_closed or mux is None:  # its deadline has passed meanwhile
                self._release(assembled.num_bytes)
            elif instant is None and handler is None:
                self._release(assembled.num_bytes)
                mux.reset(stream, Code.UNHANDLED)
            elif not self._host.is_new_push(self.peer, number):
                self._release(assembled.num_bytes)
                mux.done(stream, self._loop.time())
            else:
                mux.done(stream, self._loop.time())
                request = Request(self.peer, message, stream.deadline, self.link.remote)
                if instant is not None:
                    _run_instant(instant, request)
                    self._release(assembled.num_bytes)
                else:
                    assert handler is not None, "one of the two is there"
                    self._num_push_handlers += 1
                    task = self._host.start_task(_run_push(handler, request))
                    task.add_done_callback(partial(self._on_push_handled, assembled.num_bytes))

    def _on_push_handled(self, num_bytes: int, task: "asyncio.Task[None]") -> None:
        self._num_push_handlers -= 1
        self._release(num_bytes)
        if self._waiting_pushes:
            self._start_pushes()
            self.flush()


def _run_instant(handler: InstantHandler[Any], request: Request[Any]) -> ErrorReply | None:
    """Call a handler that never awaits; what it raises is logged as for any other."""
    try:
        handler(request)
    except Exception as exc:
        return _error_reply(exc, request)
    return None


async def _run_push(handler: UnaryHandler[Any], request: Request[Message]) -> None:
    try:
        await handler(request)
    except Exception as exc:
        _error_reply(exc, request)  # logged; nobody waits for it


def framed(message: Message, push_id: int | None = None) -> list[Buffer]:
    """A message behind its length, as buffers to be sent one after the other."""
    buffers: list[Buffer] = list(encode_message(message))
    head = b"" if push_id is None else push_id.to_bytes(PUSH_ID_BYTES, "big")
    total = len(head) + sum(memoryview(buffer).nbytes for buffer in buffers)
    buffers[0] = b"".join([total.to_bytes(PREFIX_BYTES, "big"), head, buffers[0]])
    return buffers


def _error_reply(exc: Exception, request: Request[Message]) -> ErrorReply:
    """What a handler's error becomes on the wire; errors that nobody foresaw are logged."""
    if isinstance(exc, RequestFailed):
        return ErrorReply.from_exception(exc)
    name = type(request.message).__name__
    if isinstance(exc, P2PLLMError):
        logger.info("request failed message=%s peer=%s error=%s", name, request.peer.short, exc)
        return ErrorReply.from_exception(RemoteFault(f"{type(exc).__name__}: {exc}"))
    logger.error("handler broke message=%s peer=%s", name, request.peer.short, exc_info=exc)
    return ErrorReply.from_exception(RemoteFault("an internal error; the server's log has more"))


def _reset_error(code: int) -> P2PLLMError:
    """What the caller of a stream that was reset is told."""
    match code:
        case Code.DEADLINE:
            return DeadlineExceeded("no answer within the time allowed")
        case Code.REFUSED | Code.CLOSING:
            return Refused("the peer takes no more requests now")
        case Code.UNHANDLED:
            return BadRequest("the peer does not take messages of this type")
        case Code.MALFORMED:
            return BadRequest("the peer could not read our message")
    return ConnectionLost(f"the peer dropped the request (code {code})")

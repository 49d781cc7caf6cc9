"""The mux by handing frames between two of them; time is a number."""

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import NetConfig
from p2pllm.errors import LocalProtocolError, Refused, RemoteProtocolError
from p2pllm.net.budget import MemoryBudget
from p2pllm.net.frames import (
    CODE,
    CREDIT,
    DATA,
    HEAD,
    NUMBER,
    OPEN,
    Code,
    FrameType,
    Priority,
    StreamKind,
)
from p2pllm.net.mux import FIRST_WINDOW, MAX_CONTROL, Mux
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

CONFIG = NetConfig()
DEADLINE = 1000.0


class Side:
    """A mux, what it was told, and the application that reads."""

    def __init__(self, config: NetConfig, *, is_client: bool, limit: int = 2**30) -> None:
        self.budget = MemoryBudget(limit)
        self.mux = Mux(config, is_client=is_client, budget=self.budget, now=0.0)
        self.events: list[Event] = []
        self.read: dict[Stream, bytearray] = {}
        self.ended: set[Stream] = set()
        self.consumes = True
        self.expects = 0  # bytes of each stream, from its beginning

    def take(self, frame: bytes, now: float) -> None:
        self.mux.on_bytes(now)
        self.mux.on_frame(frame, now)
        self.drain()

    def drain(self) -> None:
        while (event := self.mux.next_event()) is not None:
            self.events.append(event)
            if isinstance(event, StreamOpened) and self.expects:
                self.mux.expect(event.stream, self.expects)
            if isinstance(event, StreamData):
                self.read.setdefault(event.stream, bytearray()).extend(event.data)
                if event.is_end:
                    self.ended.add(event.stream)
                if self.consumes:
                    self.mux.consume(event.stream, len(event.data))

    def open(
        self,
        data: bytes = b"hello",
        kind: StreamKind = StreamKind.UNARY,
        priority: Priority = Priority.CONTROL,
        deadline: float = DEADLINE,
    ) -> Stream:
        return self.mux.open(kind, priority, [data], deadline=deadline)

    def only(self) -> Stream:
        (stream,) = self.read
        return stream

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def pair(config: NetConfig = CONFIG) -> tuple[Side, Side]:
    return Side(config, is_client=True), Side(config, is_client=False)


def roundtrip(
    first: Side, second: Side, now: float = 0.0, on_frame: Callable[[bytes], None] | None = None
) -> None:
    """Hand frames over until both have nothing more to say."""
    is_quiet = False
    while not is_quiet:
        is_quiet = True
        for sender, receiver in ((first, second), (second, first)):
            while (frame := sender.mux.next_frame(now)) is not None:
                is_quiet = False
                if on_frame is not None:
                    on_frame(frame)
                receiver.take(frame, now)
            sender.drain()


def travel(
    client: Side,
    server: Side,
    *,
    rate: float,
    rtt_s: float,
    until: float,
    since: float = 0.0,
    jitter_s: float = 0.0,
    on_frame: Callable[[bytes], None] | None = None,
    on_time: Callable[[float], None] | None = None,
) -> list[tuple[float, int]]:
    """Run over a path with a rate towards the server and a queue that holds anything.

    Returns how much of prefill and bulk was under way, with the time.
    """
    in_flight: list[tuple[float, int]] = []
    there: deque[tuple[float, bytes]] = deque()
    back: deque[tuple[float, bytes]] = deque()
    now = free_at = since
    rng = random.Random(7)
    while now < until:
        if on_time is not None:
            on_time(now)
        while (frame := client.mux.next_frame(now)) is not None:
            if on_frame is not None:
                on_frame(frame)
            free_at = max(free_at, now) + len(frame) / rate
            there.append((free_at + rtt_s / 2, frame))
        in_flight.append((now, client.mux.path.in_flight))
        while (frame := server.mux.next_frame(now)) is not None:
            arrival = now + rtt_s / 2 + rng.uniform(0, jitter_s)
            back.append((max(arrival, back[-1][0]) if back else arrival, frame))
        if not there and not back:
            break
        if there and (not back or there[0][0] <= back[0][0]):
            now, frame = there.popleft()
            server.take(frame, now)
        else:
            now, frame = back.popleft()
            client.take(frame, now)
    while there or back:  # what is on its way arrives
        wire, receiver = (there, server) if there else (back, client)
        receiver.take(wire.popleft()[1], now)
    return in_flight


def frames_of(side: Side, now: float = 0.0) -> list[bytes]:
    frames = []
    while (frame := side.mux.next_frame(now)) is not None:
        frames.append(frame)
    return frames


def data_frames(frames: list[bytes]) -> list[bytes]:
    return [frame for frame in frames if frame[0] in (FrameType.OPEN, FrameType.DATA)]


# --- streams ---------------------------------------------------------------------------------


def test_a_request_and_its_reply_cross_and_the_stream_is_forgotten() -> None:
    client, server = pair()
    client.open(b"question")
    roundtrip(client, server)
    stream = server.only()
    server.mux.send(stream, [b"ans", memoryview(b"wer")], is_end=True)
    roundtrip(client, server)

    assert server.read[stream] == b"question"
    assert client.read[client.only()] == b"answer"
    assert client.only() in client.ended
    assert client.mux.is_idle
    assert server.mux.is_idle


def test_a_small_request_is_a_single_frame() -> None:
    client, _ = pair()
    frames_of(client)  # the windows
    client.open(bytes(4096))
    assert len(frames_of(client)) == 1


def test_both_sides_open_streams_without_clashing() -> None:
    client, server = pair()
    ours, theirs = client.open(b"a"), server.open(b"b")
    roundtrip(client, server)
    assert ours.id % 2 == 1
    assert theirs.id % 2 == 0
    assert client.read[client.only()] == b"b"
    assert server.read[server.only()] == b"a"


def test_the_openers_remaining_time_travels() -> None:
    client, server = pair()
    client.open(deadline=12.5)
    for frame in frames_of(client, now=10.0):
        server.take(frame, 500.0)
    assert server.only().deadline == pytest.approx(502.5)


def test_a_deadline_that_passes_resets_the_stream_on_both_sides() -> None:
    client, server = pair()
    stream = client.open(deadline=2.0)
    roundtrip(client, server)

    assert client.mux.next_timeout() == 1.0  # silence while a request is pending
    client.mux.on_timeout(1.0)
    roundtrip(client, server, now=1.0)
    assert client.mux.next_timeout() == 2.0
    client.mux.on_timeout(2.0)
    roundtrip(client, server, now=2.0)

    assert client.of(StreamReset) == [StreamReset(stream, Code.DEADLINE, is_local=True)]
    assert server.of(StreamReset) == [StreamReset(server.only(), Code.DEADLINE)]
    assert client.mux.is_idle
    assert server.mux.is_idle


def test_a_reset_drops_what_is_queued_and_ends_the_peers_stream() -> None:
    client, server = pair()
    stream = client.open(bytes(500_000), priority=Priority.BULK)
    first = client.mux.next_frame(0.0)
    while first is not None and first[0] != FrameType.OPEN:
        server.take(first, 0.0)
        first = client.mux.next_frame(0.0)
    assert first is not None
    server.take(first, 0.0)
    client.mux.reset(stream, Code.CANCELLED)
    roundtrip(client, server)

    assert server.of(StreamReset) == [StreamReset(server.only(), Code.CANCELLED)]
    assert len(server.read[server.only()]) == CONFIG.frame_bytes
    assert client.mux.is_idle


def test_a_reset_before_anything_was_sent_says_nothing() -> None:
    client, server = pair()
    roundtrip(client, server)
    client.mux.reset(client.open(), Code.CANCELLED)
    assert frames_of(client) == []


def test_stop_makes_the_peer_end_its_side() -> None:
    client, server = pair()
    client.open(bytes(STREAM_WINDOW * 2), priority=Priority.CONTROL)
    server.consumes = False
    roundtrip(client, server)
    stream = server.only()
    server.mux.send(stream, [b"no, thanks"], is_end=True)
    server.mux.stop(stream)
    roundtrip(client, server)

    assert client.of(StreamStopped)
    assert client.read[client.only()] == b"no, thanks"
    assert client.mux.is_idle
    assert server.mux.is_idle
    assert server.mux.snapshot().unconsumed == (0, 0)


def test_a_stream_that_is_stopped_while_it_lacks_credit_ends_once() -> None:
    client, server = pair()
    server.consumes = False
    first = client.open(bytes(700_000), priority=Priority.DECODE)
    second = client.open(bytes(700_000), priority=Priority.DECODE)
    roundtrip(client, server)
    theirs = {stream.id: stream for stream in server.read}
    server.mux.stop(theirs[second.id])
    stop, *credit = frames_of(server)
    client.take(stop, 0.0)
    for end in frames_of(client):
        server.take(end, 0.0)
    for frame in credit:
        client.take(frame, 0.0)
    server.mux.consume(theirs[first.id], 700_000)
    roundtrip(client, server)  # an end too many would be an error
    for stream in theirs.values():
        server.mux.send(stream, [b"ok"], is_end=True)
    roundtrip(client, server)
    assert client.mux.is_idle
    assert server.mux.is_idle


def test_a_push_is_over_when_the_application_has_taken_it() -> None:
    client, server = pair()
    stream = client.open(b"news", kind=StreamKind.PUSH)
    roundtrip(client, server)
    assert not client.mux.is_idle
    server.mux.done(server.only(), now=0.0)
    assert frames_of(server) == []  # it waits for something to travel with
    server.mux.on_timeout(server.mux.next_timeout())
    roundtrip(client, server, now=0.1)

    assert client.of(PushDone) == [PushDone(stream)]
    assert client.mux.is_idle
    assert server.mux.is_idle


def test_acknowledgements_travel_with_the_next_data_in_one_frame() -> None:
    client, server = pair()
    for _ in range(3):
        client.open(kind=StreamKind.PUSH)
    roundtrip(client, server)
    for stream in list(server.read):
        server.mux.done(stream, now=0.0)
    server.open(b"output")
    kinds = [frame[0] for frame in frames_of(server)]
    assert kinds == [FrameType.DONE, FrameType.OPEN]


def test_a_stream_tells_when_its_bytes_have_left() -> None:
    client, server = pair()
    client.open(kind=StreamKind.STREAMING)
    roundtrip(client, server)
    stream = server.only()
    stream.wants_drained = True
    server.mux.send(stream, [bytes(100_000)], is_end=False)
    roundtrip(client, server)
    assert server.of(StreamDrained) == [StreamDrained(stream)]


def test_sending_after_the_end_is_our_own_mistake() -> None:
    client, server = pair()
    client.open(kind=StreamKind.STREAMING)
    roundtrip(client, server)
    stream = server.only()
    server.mux.send(stream, [b"x"], is_end=True)
    with pytest.raises(LocalProtocolError):
        server.mux.send(stream, [b"y"], is_end=True)


# --- priorities ------------------------------------------------------------------------------


def served(frames: list[bytes], streams: dict[int, Priority]) -> list[Priority]:
    return [streams[HEAD.unpack_from(frame)[1]] for frame in data_frames(frames)]


def test_control_goes_before_decode_before_prefill_before_bulk() -> None:
    client, server = pair()
    roundtrip(client, server)
    opened = [client.open(bytes(100), priority=priority) for priority in reversed(Priority)]
    frames = frames_of(client)
    order = served(frames, {stream.id: stream.priority for stream in opened})
    assert order == list(Priority)


def test_a_decode_step_waits_for_at_most_one_frame_of_bulk() -> None:
    client, server = pair()
    roundtrip(client, server)
    client.open(bytes(1_000_000), priority=Priority.BULK)
    for _ in range(3):
        client.mux.next_frame(0.0)
    client.open(bytes(4096), priority=Priority.DECODE)
    frame = client.mux.next_frame(0.0)
    assert frame is not None
    assert OPEN.unpack_from(frame)[3] == Priority.DECODE


def test_lower_priorities_are_not_starved_and_decode_gets_most() -> None:
    client, server = pair()
    roundtrip(client, server)
    opened = [client.open(bytes(STREAM_WINDOW), priority=p) for p in list(Priority)[1:]]
    frames: list[bytes] = []
    for tick in range(42):
        frame = client.mux.next_frame(tick / 1000)
        assert frame is not None
        frames.append(frame)
        server.take(frame, tick / 1000)
        for answer in frames_of(server, tick / 1000):
            client.take(answer, tick / 1000)

    order = served(frames, {stream.id: stream.priority for stream in opened})
    assert [order.count(p) for p in list(Priority)[1:]] == [34, 7, 1]
    lower = [index for index, p in enumerate(order) if p is not Priority.DECODE]
    assert all(after - before > 1 for before, after in itertools.pairwise(lower))


def test_large_messages_of_a_priority_take_turns() -> None:
    client, server = pair()
    first = client.open(bytes(3 * 2**20), priority=Priority.DECODE)
    second = client.open(bytes(3 * 2**20), priority=Priority.DECODE)
    third = client.open(bytes(1000), priority=Priority.DECODE)
    sent: list[int] = []
    roundtrip(client, server, on_frame=lambda frame: sent.append(HEAD.unpack_from(frame)[1]))
    ends = [len(sent) - sent[::-1].index(stream.id) for stream in (third, first, second)]
    assert ends == sorted(ends)
    assert sent.index(second.id) < ends[1]  # the second began before the first had ended


# --- credit ----------------------------------------------------------------------------------


def test_a_stream_stops_at_its_window_until_the_application_consumes() -> None:
    client, server = pair()
    server.consumes = False
    data = random.Random(1).randbytes(STREAM_WINDOW + 300_000)
    client.open(data, priority=Priority.DECODE)
    roundtrip(client, server)
    stream = server.only()
    assert len(server.read[stream]) == STREAM_WINDOW

    server.mux.consume(stream, STREAM_WINDOW)
    roundtrip(client, server)
    assert server.read[stream] == data


def test_a_message_that_is_expected_may_come_whole() -> None:
    client, server = pair()
    server.consumes = False
    client.open(bytes(2 * STREAM_WINDOW), priority=Priority.PREFILL)
    server_window = server.mux.snapshot().windows[1]
    roundtrip(client, server)
    stream = server.only()
    server.mux.expect(stream, 2 * STREAM_WINDOW)
    server.mux.consume(stream, STREAM_WINDOW)
    roundtrip(client, server)
    assert server_window == STREAM_WINDOW
    assert len(server.read[stream]) == 2 * STREAM_WINDOW


def test_bulk_that_nobody_reads_does_not_hold_up_decode() -> None:
    client, server = pair()
    server.consumes = False
    for _ in range(8):
        client.open(bytes(STREAM_WINDOW), priority=Priority.BULK)
    roundtrip(client, server)
    assert server.mux.snapshot().unconsumed[1] == server.mux.snapshot().windows[1]

    client.open(b"step", priority=Priority.DECODE)
    roundtrip(client, server)
    assert b"step" in [bytes(data) for data in server.read.values()]


def test_unread_bytes_never_exceed_the_windows() -> None:
    client, server = pair()
    server.consumes = False
    for priority in Priority:
        for _ in range(20):
            client.open(bytes(STREAM_WINDOW), priority=priority)
    roundtrip(client, server)
    held = sum(len(data) for data in server.read.values())
    assert held <= sum(server.mux.snapshot().windows)
    assert server.budget.windows == sum(server.mux.snapshot().windows) - 2 * FIRST_WINDOW


def test_a_window_grows_for_a_reader_that_keeps_up() -> None:
    client, server = pair()
    server.mux.path.on_rtt(0.1, now=0.0)
    for _ in range(32):
        client.open(bytes(2**20), priority=Priority.CONTROL)
    travel(client, server, rate=100e6, rtt_s=0.1, until=2.0)
    window = server.mux.snapshot().windows[0]
    assert 8 * 2**20 <= window <= CONFIG.connection_window_bytes
    assert sum(len(data) for data in server.read.values()) == 32 * 2**20


def test_windows_stay_within_their_quarter_of_the_budget() -> None:
    client = Side(CONFIG, is_client=True)
    server = Side(CONFIG, is_client=False, limit=8 * 2**20)
    server.mux.path.on_rtt(0.1, now=0.0)
    client.open(bytes(8 * 2**20), priority=Priority.CONTROL)
    server.expects = 8 * 2**20
    travel(client, server, rate=100e6, rtt_s=0.1, until=2.0)
    assert server.budget.windows <= 2 * 2**20
    assert len(server.read[server.only()]) == 8 * 2**20


def test_credit_of_reset_streams_comes_back() -> None:
    client, server = pair()
    server.consumes = False
    for _ in range(50):
        stream = client.open(bytes(STREAM_WINDOW // 2), priority=Priority.BULK)
        roundtrip(client, server)
        client.mux.reset(stream, Code.CANCELLED)
        roundtrip(client, server)
    assert server.mux.snapshot().unconsumed == (0, 0)
    server.consumes = True
    client.open(b"still alive" * 1000, priority=Priority.BULK)
    roundtrip(client, server)
    assert b"still alive" * 1000 in [bytes(data) for data in server.read.values()]


def test_bytes_that_cross_our_reset_are_counted_as_consumed() -> None:
    client, server = pair()
    client.open(bytes(600_000), priority=Priority.BULK)
    roundtrip_frames = deque[bytes]()
    while (frame := client.mux.next_frame(0.0)) is not None:
        roundtrip_frames.append(frame)
    server.take(roundtrip_frames.popleft(), 0.0)
    while not server.read:
        server.take(roundtrip_frames.popleft(), 0.0)
    server.mux.reset(server.only(), Code.CANCELLED)
    while roundtrip_frames:
        server.take(roundtrip_frames.popleft(), 0.0)
    assert server.mux.snapshot().unconsumed == (0, 0)


def test_closing_gives_the_windows_memory_back() -> None:
    client, server = pair()
    client.open(bytes(8 * 2**20), priority=Priority.CONTROL)
    roundtrip(client, server)
    assert server.budget.windows > 0
    server.mux.close()
    assert server.budget.windows == 0


# --- bounds ----------------------------------------------------------------------------------


def test_streams_above_the_bound_wait_for_a_place() -> None:
    config = replace(CONFIG, max_streams=8)
    client, server = pair(config)
    for _ in range(12):
        client.open(priority=Priority.DECODE)
    roundtrip(client, server)
    assert len(server.read) == 7  # one place in eight is control's
    client.open(b"control")
    roundtrip(client, server)
    assert len(server.read) == 8

    for stream in list(server.read):
        server.mux.send(stream, [b"ok"], is_end=True)
    roundtrip(client, server)
    assert len(server.read) == 13


def test_too_many_waiting_streams_are_refused_here() -> None:
    config = replace(CONFIG, max_streams=8)
    client, _ = pair(config)
    for _ in range(16):
        client.open()
    with pytest.raises(Refused):
        client.open()


def test_a_cancelled_waiting_stream_leaves_no_trace() -> None:
    config = replace(CONFIG, max_streams=8)
    client, server = pair(config)
    for _ in range(1000):
        streams = [client.open() for _ in range(10)]
        for stream in streams:
            client.mux.reset(stream, Code.CANCELLED)
    roundtrip(client, server)
    assert client.mux.is_idle
    assert server.mux.is_idle


def test_streams_above_the_peers_bound_are_refused_there() -> None:
    client = Side(CONFIG, is_client=True)
    server = Side(replace(CONFIG, max_streams=2), is_client=False)
    streams = [client.open() for _ in range(3)]
    roundtrip(client, server)
    assert client.of(StreamReset) == [StreamReset(streams[2], Code.REFUSED)]


def test_after_goaway_no_stream_is_opened_and_open_ones_go_on() -> None:
    client, server = pair()
    client.open()
    roundtrip(client, server)
    server.mux.goaway(Code.CLOSING)
    roundtrip(client, server)
    assert client.of(PeerLeaving) == [PeerLeaving(Code.CLOSING)]
    with pytest.raises(Refused):
        client.open()

    server.mux.send(server.only(), [b"answer"], is_end=True)
    roundtrip(client, server)
    assert client.read[client.only()] == b"answer"


def test_a_stream_that_crosses_a_goaway_is_told_to_go_elsewhere() -> None:
    client, server = pair()
    roundtrip(client, server)
    server.mux.goaway(Code.CLOSING)
    stream = client.open()
    for frame in frames_of(client):
        server.take(frame, 0.0)
    roundtrip(client, server)
    assert StreamReset(stream, Code.CLOSING) in client.events


# --- the path --------------------------------------------------------------------------------


def test_bulk_under_way_stays_within_what_the_path_holds() -> None:
    """A path of 12.5 MB/s and 30 ms: 1.25 × 375 kB may be in flight once that is known."""
    client, server = pair()
    rate, rtt_s = 12.5e6, 0.030
    client.open(bytes(12 * 2**20), priority=Priority.BULK)
    server.expects = 12 * 2**20
    in_flight = travel(client, server, rate=rate, rtt_s=rtt_s, until=0.8)
    settled = [num_bytes for now, num_bytes in in_flight if now > 0.5]

    assert client.mux.path.rate == pytest.approx(rate, rel=0.1)
    assert 0.9 * rate * rtt_s < max(settled) <= 1.3 * rate * rtt_s
    assert len(server.read[server.only()]) > 0.85 * rate * (0.8 - rtt_s)


def test_a_path_that_becomes_faster_is_discovered() -> None:
    client, server = pair()
    server.mux.path.on_rtt(0.02, now=0.0)
    client.open(bytes(40 * 2**20), priority=Priority.BULK)
    server.expects = 40 * 2**20
    travel(client, server, rate=5e6, rtt_s=0.02, until=0.5)
    travel(client, server, rate=50e6, rtt_s=0.02, until=1.3, since=0.5)
    assert client.mux.path.rate == pytest.approx(50e6, rel=0.1)


def test_a_path_that_becomes_longer_does_not_starve() -> None:
    client, server = pair()
    server.expects = 40 * 2**20
    client.open(bytes(40 * 2**20), priority=Priority.BULK)
    travel(client, server, rate=12.5e6, rtt_s=0.010, until=0.5)
    travel(client, server, rate=12.5e6, rtt_s=0.060, until=2.5, since=0.5)
    assert client.mux.path.rate == pytest.approx(12.5e6, rel=0.1)


def test_jitter_does_not_starve() -> None:
    client, server = pair()
    server.expects = 40 * 2**20
    client.open(bytes(40 * 2**20), priority=Priority.BULK)
    travel(client, server, rate=12.5e6, rtt_s=0.02, jitter_s=0.03, until=3.0)
    assert len(server.read[server.only()]) > 0.8 * 12.5e6 * 3.0


def test_a_decode_step_behind_a_slow_line_far_away_waits_less_than_ten_milliseconds() -> None:
    """The queue is in a router, where nothing overtakes: so there must be none."""
    client, server = pair()
    server.expects = 40 * 2**20
    client.open(bytes(40 * 2**20), priority=Priority.BULK)
    opened: dict[bytes, float] = {}
    delays: list[float] = []

    def on_time(now: float) -> None:
        arrived = {bytes(data) for data in server.read.values() if len(data) < 100}
        delays.extend(now - opened.pop(name) for name in arrived & opened.keys())
        if not opened and now > 0.5:  # the start looks for the path's limit, and passes it
            name = f"step at {now}".encode()
            opened[name] = now
            client.open(name, priority=Priority.DECODE)

    travel(client, server, rate=12.5e6, rtt_s=0.030, until=2.5, on_time=on_time)
    assert len(delays) > 60
    assert sorted(delays)[len(delays) * 95 // 100] < 0.015 + 0.010


def test_frames_are_large_only_where_the_path_is_fast() -> None:
    sizes = {}
    for rate in (12.5e6, 400e6):
        client, server = pair()
        client.open(bytes(8 * 2**20), priority=Priority.BULK)
        server.expects = 8 * 2**20
        frames: list[bytes] = []
        travel(client, server, rate=rate, rtt_s=0.002, until=0.3, on_frame=frames.append)
        sizes[rate] = max(len(frame) for frame in frames)
    assert sizes[12.5e6] < CONFIG.frame_bytes + 100
    assert CONFIG.large_frame_bytes < sizes[400e6] < CONFIG.large_frame_bytes + 100


# --- heartbeats ------------------------------------------------------------------------------


def test_an_idle_peer_is_pinged_after_five_seconds_and_its_pong_measures_the_round_trip() -> None:
    client, server = pair()
    roundtrip(client, server)
    assert client.mux.next_timeout() == CONFIG.heartbeat_s
    client.mux.on_timeout(5.0)
    (ping,) = frames_of(client, now=5.0)
    server.take(ping, 5.1)
    (pong,) = frames_of(server, now=5.1)
    client.take(pong, 5.2)
    assert client.mux.path.rtt_s == pytest.approx(0.2)
    assert client.of(Pong) == []  # nobody asked
    assert client.mux.next_timeout() == pytest.approx(10.2)


def test_a_ping_that_was_asked_for_is_reported() -> None:
    client, server = pair()
    client.mux.ping(now=1.0)
    for frame in frames_of(client, now=1.0):
        server.take(frame, 1.0)
    for frame in frames_of(server, now=1.0):
        client.take(frame, 1.25)
    assert client.of(Pong) == [Pong(0.25)]


def test_a_silent_peer_is_suspected_within_two_seconds_of_a_request_and_dead_after_fifteen() -> (
    None
):
    client, _ = pair()
    client.open(deadline=100.0)
    frames_of(client)
    times = []
    while not client.of(PeerDead):
        now = client.mux.next_timeout()
        client.mux.on_timeout(now)
        client.drain()
        frames_of(client, now)
        times.append((now, [type(event) for event in client.events]))
        client.events = client.of(PeerDead)
    assert times[0][0] == CONFIG.ping_after_silence_s
    assert (2.0, [Suspected]) in times
    assert times[-1] == (CONFIG.dead_s, [PeerDead])


def test_a_watched_peer_is_asked_for_signs_of_life_as_if_a_request_were_under_way() -> None:
    client, _ = pair()
    frames_of(client)
    assert client.mux.next_timeout() == CONFIG.heartbeat_s
    client.mux.is_watched = True
    assert client.mux.next_timeout() == CONFIG.ping_after_silence_s
    client.mux.on_timeout(1.0)
    client.mux.on_timeout(2.0)
    client.drain()
    assert client.of(Suspected) == [Suspected()]
    client.mux.is_watched = False
    assert client.mux.next_timeout() == CONFIG.dead_s


def test_a_suspected_peer_that_speaks_again_has_recovered() -> None:
    client, server = pair()
    client.open(deadline=100.0)
    roundtrip(client, server)
    client.mux.on_timeout(1.0)
    client.mux.on_timeout(2.0)
    assert client.mux.is_suspect
    server.mux.ping(3.0)
    for frame in frames_of(server, 3.0):
        client.take(frame, 3.0)
    assert not client.mux.is_suspect
    assert client.of(Recovered) == [Recovered()]


def test_our_own_sleep_is_not_taken_for_the_peers_silence() -> None:
    client, _ = pair()
    client.open(deadline=1000.0)
    client.mux.next_timeout()
    client.mux.on_timeout(60.0)  # a laptop's lid was closed for a minute
    client.drain()
    assert client.of(PeerDead) == []
    assert client.of(Suspected) == []


# --- hostile peers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x02\x00",
        HEAD.pack(0x77, 0),
        DATA.pack(FrameType.DATA, 1, 0) + b"never opened",
        DATA.pack(FrameType.DATA, 2, 0) + b"never opened by us",
        OPEN.pack(FrameType.OPEN, 1, 0, 0, 0, 1000),  # not its parity
        OPEN.pack(FrameType.OPEN, 0, 0, 0, 0, 1000),
        OPEN.pack(FrameType.OPEN, 2, 0, 4, 0, 1000),  # no such priority
        OPEN.pack(FrameType.OPEN, 2, 0, 0, 3, 1000),  # no such kind
        OPEN.pack(FrameType.OPEN, 2, 0, 0, 0, 1000)[:-1],
        CREDIT.pack(FrameType.CREDIT, 0, 7, 1),
        CREDIT.pack(FrameType.CREDIT, 1, 2, 1),
        NUMBER.pack(FrameType.RECEIVED, 0, 1),  # we have sent nothing
        HEAD.pack(FrameType.DONE, 0) + b"\x00\x00",
        HEAD.pack(FrameType.STOP, 0),
        CODE.pack(FrameType.RESET, 3, 1),
        HEAD.pack(FrameType.PING, 0),
    ],
)
def test_what_breaks_the_rules_ends_in_a_remote_protocol_error(frame: bytes) -> None:
    client, _ = pair()
    with pytest.raises(RemoteProtocolError):
        client.take(frame, 0.0)


def test_an_unknown_frame_with_the_high_bit_is_ignored() -> None:
    client, _ = pair()
    client.take(HEAD.pack(0xF7, 9) + b"of a newer version", 0.0)
    assert client.events == []


def test_more_than_a_streams_credit_is_an_error() -> None:
    _, server = pair()
    server.consumes = False
    server.take(OPEN.pack(FrameType.OPEN, 1, 0, 1, 0, 1000), 0.0)
    for _ in range(16):
        server.take(DATA.pack(FrameType.DATA, 1, 0) + bytes(65_000), 0.0)
    with pytest.raises(RemoteProtocolError, match="credit"):
        server.take(DATA.pack(FrameType.DATA, 1, 0) + bytes(65_000), 0.0)


def test_more_than_the_connections_credit_is_an_error() -> None:
    _, server = pair()
    server.consumes = False
    for number in range(1, 33, 2):
        server.take(OPEN.pack(FrameType.OPEN, number, 0, 1, 0, 1000) + bytes(65_000), 0.0)
    with pytest.raises(RemoteProtocolError, match="credit"):
        server.take(OPEN.pack(FrameType.OPEN, 33, 0, 1, 0, 1000) + bytes(65_000), 0.0)


def test_a_stream_number_is_never_opened_twice() -> None:
    client, server = pair()
    client.open()
    roundtrip(client, server)
    with pytest.raises(RemoteProtocolError):
        server.take(OPEN.pack(FrameType.OPEN, 1, 0, 0, 0, 1000), 0.0)


def test_data_after_the_end_is_an_error() -> None:
    client, server = pair()
    client.open()
    roundtrip(client, server)
    with pytest.raises(RemoteProtocolError):
        server.take(DATA.pack(FrameType.DATA, 1, 0) + b"more", 0.0)


def test_a_peer_that_opens_streams_and_reads_nothing_is_dropped() -> None:
    server = Side(replace(CONFIG, max_streams=4), is_client=False)
    for number in range(1, 2 * (4 + 4 + MAX_CONTROL), 2):
        server.take(OPEN.pack(FrameType.OPEN, number, 1, 0, 0, 1000), 0.0)
    with pytest.raises(RemoteProtocolError, match="does not read"):
        server.take(OPEN.pack(FrameType.OPEN, 9999, 1, 0, 0, 1000), 0.0)


def test_a_flood_of_pings_queues_one_pong() -> None:
    client, server = pair()
    roundtrip(client, server)
    for nonce in range(1000):
        server.take(NUMBER.pack(FrameType.PING, 0, nonce), 0.0)
    assert frames_of(server) == [NUMBER.pack(FrameType.PONG, 0, 999)]


def test_finished_streams_do_not_pile_up_until_their_deadlines() -> None:
    client, server = pair()
    for _ in range(2000):
        client.open(deadline=1e6)
        roundtrip(client, server)
        server.mux.send(server.only(), [b"ok"], is_end=True)
        roundtrip(client, server)
        for side in (client, server):
            side.read.clear()
            side.events.clear()
    assert len(client.mux._deadlines) < 100
    assert len(server.mux._deadlines) < 100


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_garbage_frames_raise_nothing_but_remote_protocol_error(frames: list[bytes]) -> None:
    client, server = pair()
    client.open(b"x" * 1000, priority=Priority.BULK)
    server.open(b"y")
    roundtrip(client, server)
    try:
        for frame in frames:
            server.take(frame, 0.0)
            frames_of(server)
    except RemoteProtocolError:
        pass


FRAMES = st.one_of(
    st.builds(
        lambda *fields: OPEN.pack(FrameType.OPEN, *fields) + bytes(100),
        st.integers(0, 12), st.integers(0, 3), st.integers(0, 4), st.integers(0, 3),
        st.integers(0, 2000),
    ),
    st.builds(
        lambda number, flags, size: DATA.pack(FrameType.DATA, number, flags) + bytes(size),
        st.integers(0, 12), st.integers(0, 3), st.integers(0, 65_000),
    ),
    st.builds(lambda *fields: CREDIT.pack(FrameType.CREDIT, *fields),
              st.integers(0, 12), st.integers(0, 2), st.integers(0, 2**64 - 1)),
    st.builds(lambda *fields: CODE.pack(FrameType.RESET, *fields),
              st.integers(0, 12), st.integers(0, 20)),
    st.builds(lambda number: HEAD.pack(FrameType.STOP, number), st.integers(0, 12)),
    st.builds(lambda kind, number: NUMBER.pack(kind, 0, number),
              st.sampled_from([FrameType.PING, FrameType.PONG, FrameType.RECEIVED]),
              st.integers(0, 300)),
    st.builds(lambda number: HEAD.pack(FrameType.DONE, 0) + number.to_bytes(4, "big"),
              st.integers(0, 12)),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(FRAMES, max_size=30), st.integers(0, 2**32))
def test_well_formed_nonsense_in_any_order_keeps_the_books_straight(
    frames: list[bytes], seed: int
) -> None:
    rng = random.Random(seed)
    side = Side(CONFIG, is_client=True)
    side.consumes = False
    held: list[Stream] = []
    try:
        for frame in frames:
            side.take(frame, 0.0)
            action = rng.random()
            if action < 0.3:
                held.append(side.open(bytes(500), priority=rng.choice(list(Priority))))
            elif action < 0.5 and held:
                side.mux.reset(rng.choice(held), Code.CANCELLED)
            elif action < 0.7:
                side.mux.next_frame(0.0)
    except RemoteProtocolError:
        pass
    except Refused:
        assert side.mux.is_draining
    snapshot = side.mux.snapshot()
    assert all(unread >= 0 for unread in snapshot.unconsumed)
    assert sum(snapshot.unconsumed) <= sum(snapshot.windows) + 65_000
    for stream in list(side.read):
        side.mux.reset(stream, Code.CANCELLED)
    for stream in held:
        side.mux.reset(stream, Code.CANCELLED)
    assert side.mux._num_ours == side.mux._num_unopened == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.sampled_from(Priority)), max_size=8),
    st.integers(0, 2**32),
)
def test_whatever_the_order_of_calls_every_byte_arrives_once_and_in_order(
    messages: list[tuple[int, Priority]], seed: int
) -> None:
    rng = random.Random(seed)
    client, server = pair()
    expected = {}
    for size, priority in messages:
        data = rng.randbytes(size)
        expected[client.open(data, priority=priority)] = data
    wires: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
    sides = (client, server)
    for _ in range(5000):
        index = rng.randrange(2)
        if rng.random() < 0.5:
            if (frame := sides[index].mux.next_frame(0.0)) is not None:
                wires[index].append(frame)
        elif wires[index]:
            sides[1 - index].take(wires[index].popleft(), 0.0)
    for index in (0, 1):
        while wires[index]:
            sides[1 - index].take(wires[index].popleft(), 0.0)
    roundtrip(client, server)
    by_id = {stream.id: data for stream, data in expected.items()}
    assert {stream.id: bytes(data) for stream, data in server.read.items()} == by_id
    assert {stream.id for stream in server.ended} == set(by_id)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_with_slow_readers_and_replies_in_pieces_nothing_is_lost_and_nothing_gets_stuck(
    seed: int,
) -> None:
    rng = random.Random(seed)
    sides = pair()
    for side in sides:
        side.consumes = False
    client, server = sides
    wires: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
    requests = {
        client.open(rng.randbytes(rng.choice([10, 5000, 1_500_000])), priority=priority): None
        for priority in rng.choices(list(Priority), k=6)
    }
    replies: dict[int, bytes] = {}
    unsaid: dict[Stream, deque[bytes]] = {}

    def act(index: int) -> None:
        side = sides[index]
        match rng.randrange(4):
            case 0:
                for stream, data in side.read.items():
                    side.mux.consume(stream, rng.randint(0, len(data)))
            case 1:
                for stream in side.read:
                    if rng.random() < 0.3:
                        side.mux.expect(stream, len(side.read[stream]) + 200_000)
            case 2 if index == 1:
                for stream in server.read:
                    if stream not in unsaid:
                        pieces = [rng.randbytes(rng.choice([1, 70_000, 600_000])) for _ in "123"]
                        unsaid[stream] = deque(pieces)
                        replies[stream.id] = b"".join(pieces)
                    if unsaid[stream]:
                        piece = unsaid[stream].popleft()
                        server.mux.send(stream, [piece], is_end=not unsaid[stream])
            case _:
                for _ in range(20):
                    if (frame := side.mux.next_frame(0.0)) is not None:
                        wires[index].append(frame)
                    if wires[1 - index] and rng.random() < 0.8:
                        side.take(wires[1 - index].popleft(), 0.0)

    for _ in range(20_000):
        act(rng.randrange(2))
        if client.mux.is_idle and server.mux.is_idle and not any(wires):
            break
    assert client.mux.is_idle
    assert server.mux.is_idle
    assert {stream.id: bytes(data) for stream, data in client.read.items()} == replies
    assert len(replies) == len(requests)


def test_opened_streams_are_announced_before_their_data() -> None:
    client, server = pair()
    client.open()
    roundtrip(client, server)
    kinds = [type(event) for event in server.events]
    assert kinds == [StreamOpened, StreamData]

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import ShaperConfig
from p2pllm.net.link import Buffer, Link
from p2pllm.net.memory import MemoryLink, memory_pair
from p2pllm.net.shaper import ShapedLink
from p2pllm.sim.loop import run


class Recorder:
    """A link's user that writes down what it is told, and when."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, bytes]] = []
        self.events: list[tuple[float, str]] = []

    def link_received(self, data: Buffer) -> None:
        self.arrivals.append((now(), bytes(data)))

    def link_writable(self) -> None:
        self.events.append((now(), "writable"))

    def link_closed(self, reason: str) -> None:
        self.events.append((now(), reason))


class Greedy(Recorder):
    """Writes frames whenever it can, as a bulk transfer does."""

    def __init__(self, link: Link, num_frames: int, frame: bytes) -> None:
        super().__init__()
        self.link, self.num_left, self.frame = link, num_frames, frame

    def link_writable(self) -> None:
        while self.num_left and self.link.can_write:
            self.num_left -= 1
            self.link.write(self.frame)


def now() -> float:
    return asyncio.get_running_loop().time()


def shaped_pair(
    config: ShaperConfig, seed: int = 0
) -> tuple[ShapedLink, Recorder, MemoryLink, Recorder]:
    left, right = memory_pair(("10.0.0.1", 1), ("10.0.0.2", 2))
    shaped = ShapedLink(left, config, random.Random(seed))
    left_user, right_user = Recorder(), Recorder()
    shaped.start(left_user)
    right.start(right_user)
    return shaped, left_user, right, right_user


def test_delay_is_one_way_and_exact_on_virtual_time() -> None:
    async def scenario() -> None:
        shaped, left_user, right, right_user = shaped_pair(ShaperConfig(delay_s=0.015))

        shaped.write(b"there")
        right.write(b"back")
        await asyncio.sleep(1)

        assert right_user.arrivals == [(0.015, b"there")]
        assert left_user.arrivals == [(0.0, b"back")]

    run(scenario())


def test_a_frame_arrives_when_its_last_byte_does() -> None:
    async def scenario() -> None:
        shaped, _, _, right_user = shaped_pair(ShaperConfig(0.5, bandwidth_bytes_s=1000.0))

        shaped.write(bytes(100))
        shaped.write(bytes(200))
        await asyncio.sleep(2)

        times = [at for at, _ in right_user.arrivals]
        assert times == pytest.approx([0.6, 0.8])

    run(scenario())


def test_one_frame_may_wait_and_then_the_writer_is_told() -> None:
    async def scenario() -> None:
        shaped, left_user, _, _ = shaped_pair(ShaperConfig(bandwidth_bytes_s=1000.0))

        shaped.write(bytes(100))
        assert shaped.can_write  # on the line; none waits
        shaped.write(bytes(100))
        assert not shaped.can_write
        await asyncio.sleep(1)

        assert left_user.events == [(0.1, "writable")]
        assert shaped.can_write

    run(scenario())


def test_an_urgent_frame_waits_behind_at_most_two_of_a_greedy_writer() -> None:
    async def scenario() -> None:
        left, right = memory_pair()
        shaped = ShapedLink(left, ShaperConfig(bandwidth_bytes_s=1000.0), random.Random(0))
        greedy, arrived = Greedy(shaped, 50, bytes(100)), Recorder()
        shaped.start(greedy)
        right.start(arrived)
        greedy.link_writable()
        await asyncio.sleep(1.05)  # in the middle of a frame; one more waits

        shaped.write(b"urgent")
        await asyncio.sleep(10)

        at = next(at for at, data in arrived.arrivals if data == b"urgent")
        assert at <= 1.05 + 0.05 + 0.1 + 0.006 + 1e-9

    run(scenario())


def test_bandwidth_is_exact_over_many_frames() -> None:
    async def scenario() -> None:
        left, right = memory_pair()
        config = ShaperConfig(delay_s=0.015, bandwidth_bytes_s=12.5e6)
        shaped = ShapedLink(left, config, random.Random(0))
        greedy, arrived = Greedy(shaped, 640, bytes(16_384)), Recorder()
        shaped.start(greedy)
        right.start(arrived)

        greedy.link_writable()
        await asyncio.sleep(10)

        assert sum(len(data) for _, data in arrived.arrivals) == 640 * 16_384
        assert arrived.arrivals[-1][0] == pytest.approx(0.015 + 640 * 16_384 / 12.5e6)

    run(scenario())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.floats(0.0, 0.01), min_size=1, max_size=30),
)
def test_jitter_delays_and_never_reorders(seed: int, gaps: list[float]) -> None:
    config = ShaperConfig(delay_s=0.01, jitter_s=0.02)

    async def scenario() -> None:
        shaped, _, _, right_user = shaped_pair(config, seed)
        sent = []
        for number, gap in enumerate(gaps):
            await asyncio.sleep(gap)
            sent.append(now())
            shaped.write(bytes([number]))
        await asyncio.sleep(1)

        assert [data[0] for _, data in right_user.arrivals] == list(range(len(gaps)))
        for (at, _), left_at in zip(right_user.arrivals, sent, strict=True):
            assert left_at + 0.01 - 1e-9 <= at <= left_at + 0.03 + 1e-9

    run(scenario())


def test_jitter_is_the_same_for_the_same_seed() -> None:
    async def scenario() -> list[tuple[float, bytes]]:
        shaped, _, _, right_user = shaped_pair(ShaperConfig(jitter_s=0.02), seed=5)
        for number in range(10):
            shaped.write(bytes([number]))
            await asyncio.sleep(0.005)
        await asyncio.sleep(1)
        return right_user.arrivals

    assert run(scenario()) == run(scenario())


def test_a_stall_holds_everything_and_then_lets_it_go_in_order() -> None:
    async def scenario() -> None:
        shaped, _, _, right_user = shaped_pair(ShaperConfig(0.1, bandwidth_bytes_s=1000.0))
        shaped.write(b"a")  # on the line
        shaped.stall()
        shaped.write(b"b")  # waits for it
        assert not shaped.can_write
        await asyncio.sleep(5)
        assert right_user.arrivals == []

        shaped.resume()
        await asyncio.sleep(5)

        assert [data for _, data in right_user.arrivals] == [b"a", b"b"]
        assert [at for at, _ in right_user.arrivals] == pytest.approx([5.0, 5.101])

    run(scenario())


def test_a_reader_that_pauses_stops_the_writer_in_the_end() -> None:
    async def scenario() -> None:
        left, right = memory_pair()
        shaped = ShapedLink(left, ShaperConfig(delay_s=0.01), random.Random(0))
        greedy, reader = Greedy(shaped, 10_000, bytes(16_384)), Recorder()
        shaped.start(greedy)
        right.start(reader)
        right.pause_reading()
        greedy.link_writable()
        await asyncio.sleep(100)
        assert greedy.num_left > 0

        right.resume_reading()
        await asyncio.sleep(100)

        assert greedy.num_left == 0
        assert len(reader.arrivals) == 10_000

    run(scenario())


def test_close_sends_what_is_on_its_way_first() -> None:
    async def scenario() -> None:
        shaped, left_user, _, right_user = shaped_pair(ShaperConfig(0.1, 1000.0))
        shaped.write(bytes(100))
        shaped.write(bytes(100))

        shaped.close()
        shaped.write(b"too late")
        await asyncio.sleep(5)

        assert [len(data) for _, data in right_user.arrivals] == [100, 100]
        assert [event for _, event in right_user.events] == ["closed by the peer"]
        assert [event for _, event in left_user.events] == ["closed"]
        assert right_user.events[0][0] == pytest.approx(0.3)

    run(scenario())


def test_abort_drops_what_is_on_its_way() -> None:
    async def scenario() -> None:
        shaped, left_user, _, right_user = shaped_pair(ShaperConfig(delay_s=0.1))
        shaped.write(b"lost")

        shaped.abort()
        await asyncio.sleep(5)

        assert right_user.arrivals == []
        assert [event for _, event in left_user.events] == ["aborted"]
        assert [event for _, event in right_user.events] == ["reset by the peer"]

    run(scenario())


def test_the_peers_end_is_passed_on_and_stops_the_timers() -> None:
    async def scenario() -> None:
        shaped, left_user, right, _ = shaped_pair(ShaperConfig(delay_s=0.1))
        shaped.write(b"never arrives")

        right.abort()
        await asyncio.sleep(5)

        assert [event for _, event in left_user.events] == ["reset by the peer"]
        assert not shaped.can_write

    run(scenario())


def test_reading_is_paused_on_the_link_inside() -> None:
    async def scenario() -> None:
        shaped, left_user, right, _ = shaped_pair(ShaperConfig(delay_s=0.1))
        shaped.pause_reading()
        right.write(b"x")
        await asyncio.sleep(1)
        assert left_user.arrivals == []

        shaped.resume_reading()
        await asyncio.sleep(1)

        assert [data for _, data in left_user.arrivals] == [b"x"]

    run(scenario())


def test_late_timers_do_not_cost_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        left, right = memory_pair()
        config = ShaperConfig(bandwidth_bytes_s=100e6)  # a frame lasts 0.16 ms
        shaped = ShapedLink(left, config, random.Random(0))
        greedy, arrived = Greedy(shaped, 2000, bytes(16_384)), Recorder()
        shaped.start(greedy)
        right.start(arrived)
        exact_call_at = asyncio.get_running_loop().call_at

        def coarse_call_at(
            when: float, callback: Callable[..., object], *args: object, context: Any = None
        ) -> asyncio.TimerHandle:
            return exact_call_at(
                math.ceil(when * 1e3) * 1e-3, callback, *args, context=context
            )  # as epoll rounds

        with monkeypatch.context() as patch:
            patch.setattr(shaped._loop, "call_at", coarse_call_at)
            greedy.link_writable()
            await asyncio.sleep(1)

        took = arrived.arrivals[-1][0]
        assert took == pytest.approx(2000 * 16_384 / 100e6, rel=0.01)

    run(scenario())

import asyncio

from p2pllm.net.link import Buffer, Link
from p2pllm.net.memory import HIGH_WATER, MemoryLink, memory_pair
from p2pllm.sim.loop import run


class Recorder:
    """A link's user that writes down what it is told."""

    def __init__(self) -> None:
        self.received = b""
        self.events: list[str] = []

    def link_received(self, data: Buffer) -> None:
        self.received += data

    def link_writable(self) -> None:
        self.events.append("writable")

    def link_closed(self, reason: str) -> None:
        self.events.append(reason)


def started_pair() -> tuple[MemoryLink, Recorder, MemoryLink, Recorder]:
    left, right = memory_pair(("10.0.0.1", 1), ("10.0.0.2", 2))
    left_user, right_user = Recorder(), Recorder()
    left.start(left_user)
    right.start(right_user)
    return left, left_user, right, right_user


async def settle() -> None:
    """Let the loop deliver everything that is on its way."""
    await asyncio.sleep(0.001)


def test_a_memory_link_is_a_link() -> None:
    async def scenario() -> None:
        link: Link = memory_pair()[0]
        assert link.can_write

    run(scenario())


def test_bytes_arrive_in_order_and_not_from_inside_write() -> None:
    async def scenario() -> None:
        left, _, _, right_user = started_pair()

        left.write(b"one ")
        left.write(bytearray(b"two"))

        assert right_user.received == b""
        await settle()
        assert right_user.received == b"one two"

    run(scenario())


def test_each_end_knows_both_addresses() -> None:
    async def scenario() -> None:
        left, _, right, _ = started_pair()
        assert left.local == right.remote == ("10.0.0.1", 1)
        assert left.remote == right.local == ("10.0.0.2", 2)

    run(scenario())


def test_nothing_is_delivered_before_start() -> None:
    async def scenario() -> None:
        left, right = memory_pair()
        left.write(b"early")
        left.close()
        await settle()
        user = Recorder()

        right.start(user)
        await settle()

        assert user.received == b"early"
        assert user.events == ["closed by the peer"]

    run(scenario())


def test_an_abort_before_start_is_told_at_start() -> None:
    async def scenario() -> None:
        left, right = memory_pair()
        left.abort()
        user = Recorder()

        right.start(user)
        await settle()

        assert user.events == ["reset by the peer"]

    run(scenario())


def test_paused_reading_holds_bytes_back_until_resumed() -> None:
    async def scenario() -> None:
        left, _, right, right_user = started_pair()
        right.pause_reading()
        left.write(b"later")
        await settle()
        assert right_user.received == b""

        right.resume_reading()
        await settle()

        assert right_user.received == b"later"

    run(scenario())


def test_a_paused_reader_stops_the_writer_which_is_told_when_it_may_go_on() -> None:
    async def scenario() -> None:
        left, left_user, right, right_user = started_pair()
        right.pause_reading()
        assert left.can_write
        left.write(bytes(HIGH_WATER))
        await settle()
        assert not left.can_write
        assert left_user.events == []

        right.resume_reading()
        await settle()

        assert left_user.events == ["writable"]
        assert left.can_write
        assert len(right_user.received) == HIGH_WATER

    run(scenario())


def test_a_user_may_pause_from_inside_a_delivery() -> None:
    async def scenario() -> None:
        left, right = memory_pair()

        class PausesAfterOne(Recorder):
            def link_received(self, data: Buffer) -> None:
                super().link_received(data)
                right.pause_reading()

        user = PausesAfterOne()
        right.start(user)
        left.start(Recorder())
        left.write(b"a")
        left.write(b"b")
        await settle()
        assert user.received == b"a"

        right.resume_reading()
        await settle()

        assert user.received == b"ab"

    run(scenario())


def test_close_sends_what_is_written_and_ends_both_sides_once() -> None:
    async def scenario() -> None:
        left, left_user, right, right_user = started_pair()
        left.write(b"last words")

        left.close()
        left.close()
        left.write(b"too late")
        await settle()
        right.close()
        await settle()

        assert right_user.received == b"last words"
        assert left_user.events == ["closed"]
        assert right_user.events == ["closed by the peer"]
        assert not left.can_write

    run(scenario())


def test_abort_drops_what_is_on_its_way() -> None:
    async def scenario() -> None:
        left, left_user, _, right_user = started_pair()
        left.write(b"lost")

        left.abort()
        await settle()

        assert right_user.received == b""
        assert left_user.events == ["aborted"]
        assert right_user.events == ["reset by the peer"]

    run(scenario())

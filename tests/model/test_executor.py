"""The device thread carries out one piece of work after the other, and leaves nobody waiting."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from p2pllm.model.executor import DeviceThread


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    thread = DeviceThread("test-device")
    yield thread
    thread.close()


def thread_named(name: str) -> threading.Thread | None:
    return next((each for each in threading.enumerate() if each.name == name), None)


def fail() -> None:
    raise ValueError("no")


def test_work_is_done_in_order_in_a_thread_of_that_name(device: DeviceThread) -> None:
    done: list[tuple[int, str]] = []

    async def main() -> list[int]:
        def work(number: int) -> int:
            done.append((number, threading.current_thread().name))
            return number

        jobs = [device.run(partial(work, number)) for number in range(5)]
        return await asyncio.gather(*jobs)

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]
    assert done == [(number, "test-device") for number in range(5)]


def test_what_work_raises_is_the_callers_and_the_thread_goes_on(device: DeviceThread) -> None:
    async def main() -> int:
        with pytest.raises(ValueError, match="no"):
            await device.run(fail)
        return await device.run(lambda: 7)

    assert asyncio.run(main()) == 7


def test_work_whose_caller_is_gone_before_its_turn_is_left_out(device: DeviceThread) -> None:
    done: list[str] = []

    async def main() -> None:
        is_free = threading.Event()
        first = asyncio.ensure_future(device.run(is_free.wait))
        second = asyncio.ensure_future(device.run(lambda: done.append("second")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        is_free.set()
        await first
        await device.run(lambda: done.append("third"))

    asyncio.run(main())
    assert done == ["third"]


def test_what_waits_when_it_is_closed_is_cancelled_and_what_runs_is_finished() -> None:
    async def main() -> None:
        device = DeviceThread("test-closing")
        has_begun, is_free = threading.Event(), threading.Event()

        def work() -> bool:
            has_begun.set()
            return is_free.wait()

        running = asyncio.ensure_future(device.run(work))
        waiting = asyncio.ensure_future(device.run(fail))
        await asyncio.to_thread(has_begun.wait)
        device.close()
        is_free.set()
        assert await running
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())


def test_work_for_a_thread_that_has_been_closed_is_refused_and_nobody_waits_for_ever() -> None:
    async def main() -> None:
        device = DeviceThread("test-closed")
        device.close()
        async with asyncio.timeout(5):
            with pytest.raises(RuntimeError, match="closed"):
                await device.run(lambda: 1)

    asyncio.run(main())


def test_a_loop_that_ends_meanwhile_does_not_end_the_thread(device: DeviceThread) -> None:
    is_free = threading.Event()

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await device.run(is_free.wait)

    async def come_back() -> int:
        return await device.run(lambda: 3)

    asyncio.run(leave())
    is_free.set()
    assert asyncio.run(come_back()) == 3


def test_closing_ends_the_thread() -> None:
    device = DeviceThread("test-ends")
    thread = thread_named("test-ends")
    assert thread is not None
    device.close()
    thread.join(5)
    assert not thread.is_alive()


def test_an_interpreter_ends_though_nobody_closed_the_thread() -> None:
    program = """
import asyncio
from p2pllm.model.executor import DeviceThread
device = DeviceThread("forgotten")
print(asyncio.run(device.run(lambda: 5)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=15, check=True
    )
    assert ended.stdout == "5\n"

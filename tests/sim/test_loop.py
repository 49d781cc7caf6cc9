import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator

import pytest

from p2pllm.errors import LocalProtocolError
from p2pllm.sim.loop import WALL_EPOCH, LoopClock, run


def test_an_hour_passes_at_once_and_to_the_bit() -> None:
    async def scenario() -> float:
        await asyncio.sleep(3600.25)
        return asyncio.get_running_loop().time()

    before = time.process_time()

    assert run(scenario()) == 3600.25
    assert time.process_time() - before < 1.0


def test_timers_fire_in_order_and_not_early() -> None:
    fired: list[tuple[str, float]] = []

    async def waiter(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        fired.append((name, asyncio.get_running_loop().time()))

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            for name, delay_s in [("c", 3.0), ("a", 0.1), ("b", 0.2)]:
                group.create_task(waiter(name, delay_s))

    run(scenario())

    assert fired == [("a", 0.1), ("b", 0.2), ("c", 3.0)]


def test_many_small_steps_add_up() -> None:
    async def scenario() -> float:
        for _ in range(1000):
            await asyncio.sleep(0.001)
        return asyncio.get_running_loop().time()

    assert run(scenario()) == pytest.approx(1.0, abs=1e-6)


def test_deadlines_work() -> None:
    async def scenario() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(scenario()) == 5.0


def test_a_deadlock_is_an_error_that_says_where_each_task_waits() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(forever(), name="the stuck one")

    with pytest.raises(LocalProtocolError, match=r"deadlock.*the stuck one at Event\.wait:"):
        run(scenario())


def test_running_past_the_limit_is_an_error_too() -> None:
    async def scenario() -> None:
        for _ in itertools.count():
            await asyncio.sleep(5)

    with pytest.raises(LocalProtocolError, match="still running after 60 s"):
        run(scenario(), limit_s=60)


def test_a_task_left_running_is_an_error_and_is_cancelled() -> None:
    ended: list[str] = []

    async def leftover() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("cleaned up")

    async def scenario() -> None:
        task = asyncio.create_task(leftover(), name="the leftover")
        await asyncio.sleep(0)
        assert not task.done()

    with pytest.raises(LocalProtocolError, match="the leftover"):
        run(scenario())

    assert ended == ["cleaned up"]


def test_an_error_of_the_scenario_comes_before_its_leftovers() -> None:
    async def scenario() -> None:
        asyncio.create_task(asyncio.sleep(1000))  # noqa: RUF006
        await asyncio.sleep(0)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        run(scenario())


def test_an_error_in_a_callback_fails_the_run() -> None:
    def callback() -> None:
        raise KeyError("in a callback")

    async def scenario() -> None:
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(1)

    with pytest.raises(KeyError):
        run(scenario())


def test_threads_are_refused() -> None:
    async def scenario() -> None:
        await asyncio.to_thread(time.monotonic)

    with pytest.raises(LocalProtocolError, match="no threads on virtual time"):
        run(scenario())


def test_looking_up_names_is_refused_as_it_needs_a_thread() -> None:
    async def scenario() -> None:
        await asyncio.get_running_loop().getaddrinfo("localhost", 1)

    with pytest.raises(LocalProtocolError, match="no threads on virtual time"):
        run(scenario())


def test_randomness_follows_the_seed_and_is_put_back() -> None:
    async def scenario() -> float:
        return random.random()

    before = random.getstate()

    assert run(scenario(), seed=7) == run(scenario(), seed=7)
    assert run(scenario(), seed=7) != run(scenario(), seed=8)
    assert random.getstate() == before


def test_the_wall_clock_follows_virtual_time_with_its_skew() -> None:
    async def scenario() -> tuple[float, float]:
        right, fast = LoopClock(), LoopClock(skew_s=60.0)
        await asyncio.sleep(10.0)
        return right.wall() - WALL_EPOCH, fast.wall() - WALL_EPOCH

    assert run(scenario()) == (10.0, 70.0)


def test_open_generators_are_closed_at_the_end() -> None:
    ended: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            ended.append("closed")

    async def scenario() -> AsyncIterator[int]:
        generator = numbers()
        assert await anext(generator) == 1
        return generator  # kept alive past the loop's end

    run(scenario())

    assert ended == ["closed"]

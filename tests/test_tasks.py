"""Task groups that raise what went wrong, and not a group of it."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import pytest

from p2pllm.errors import CacheFull, P2PLLMError
from p2pllm.sim.loop import run
from p2pllm.tasks import task_group, to_the_end, together


async def forever() -> None:
    await asyncio.Event().wait()


async def fail(exc: BaseException, after_s: float = 1.0) -> None:
    await asyncio.sleep(after_s)
    raise exc


@pytest.mark.parametrize(
    "error",
    [CacheFull("full"), KeyError("x"), StopAsyncIteration(), ExceptionGroup("own", [KeyError()])],
)
def test_an_error_of_the_body_is_raised_as_it_is(error: Exception) -> None:
    async def main() -> None:
        async with task_group() as outer, task_group() as tasks:
            outer.create_task(forever())
            tasks.create_task(forever())
            raise error

    with pytest.raises(type(error)) as caught:
        run(main())
    assert caught.value is error
    assert error.__context__ is None


def test_what_tasks_say_to_their_cancellation_does_not_hide_the_bodys_error() -> None:
    async def bad_loser() -> None:
        try:
            await forever()
        finally:
            raise KeyError("in the clean-up")

    async def main() -> None:
        async with task_group() as tasks:
            tasks.create_task(bad_loser())
            await asyncio.sleep(0)
            raise CacheFull("full")

    with pytest.raises(CacheFull):
        run(main())


def test_a_tasks_error_cancels_the_body_and_is_raised_as_it_is() -> None:
    was_cancelled = False

    async def main() -> None:
        nonlocal was_cancelled
        async with task_group() as outer, task_group() as tasks:
            outer.create_task(forever())
            tasks.create_task(fail(CacheFull("full")))
            try:
                await forever()
            except asyncio.CancelledError:
                was_cancelled = True
                raise

    with pytest.raises(CacheFull):
        run(main())
    assert was_cancelled


def test_several_tasks_errors_stay_a_group() -> None:
    async def main() -> None:
        async with task_group() as tasks:
            tasks.create_task(fail(KeyError()))
            tasks.create_task(fail(ValueError()))

    with pytest.raises(ExceptionGroup) as caught:
        run(main())
    assert len(caught.value.exceptions) == 2


def test_cancelling_cancels_and_stays_a_cancellation() -> None:
    async def main() -> None:
        async def work() -> None:
            async with task_group() as tasks:
                tasks.create_task(forever())
                await forever()

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await work()

    run(main())


def test_a_generator_can_be_closed_inside_the_group() -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        async with task_group() as tasks:
            tasks.create_task(forever())
            yield 1
            yield 2

    async def main() -> None:
        async with aclosing(numbers()) as made:
            async for _ in made:
                break

    run(main())


def test_things_done_together_give_their_results_in_order() -> None:
    async def late(number: int) -> int:
        await asyncio.sleep(10 - number)
        return number

    async def main() -> None:
        assert await together(map(late, [3, 1, 2])) == [3, 1, 2]
        assert await together([]) == []

    run(main())


def test_the_first_error_of_things_done_together_is_raised_and_ends_the_others() -> None:
    async def main() -> None:
        with pytest.raises(P2PLLMError) as caught:
            await together([forever(), fail(CacheFull("full")), fail(KeyError(), 2.0)])
        assert isinstance(caught.value, CacheFull)

    run(main())


def test_clean_up_is_done_before_a_cancellation_takes_effect() -> None:
    done: list[str] = []

    async def work() -> str:
        await asyncio.sleep(5.0)
        done.append("work")
        return "result"

    async def main() -> None:
        assert await to_the_end(work()) == "result"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await to_the_end(work())
        assert done == ["work", "work"]
        assert asyncio.get_running_loop().time() == 10.0

    run(main())


def test_an_error_of_the_clean_up_is_raised() -> None:
    async def main() -> None:
        with pytest.raises(CacheFull):
            await to_the_end(fail(CacheFull("full")))

    run(main())


async def failing_group() -> None:
    async with task_group() as tasks:
        tasks.create_task(fail(CacheFull("full"), 0.01))


async def failing_together() -> None:
    await together([fail(CacheFull("full"), 0.01)])


@pytest.mark.parametrize("failing", [failing_group, failing_together])
def test_who_waited_for_a_task_that_failed_does_not_count_as_cancelled(
    failing: Callable[[], Awaitable[None]],
) -> None:
    """Or its timeouts would not end with a TimeoutError."""

    async def main() -> None:
        with pytest.raises(CacheFull):
            await failing()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(1.0)

    run(main())

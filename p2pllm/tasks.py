"""Task groups that raise one error as itself.

`asyncio.TaskGroup` wraps whatever goes wrong into an ExceptionGroup, also what the body of its own
`async with` raised. A user of the library who catches CacheFull should not have to look for it
three groups deep, so all groups that a user's code runs inside of are made here.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup without the wrapping.

    An error of the body is raised as it is, whatever the tasks say when they are cancelled for
    it. A task's error cancels the body and the other tasks, and is raised as it is if it is alone.
    """
    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            try:
                yield tasks
            except asyncio.CancelledError:
                raise
            except BaseException as exc:
                error = exc
                raise
    except BaseExceptionGroup as group:
        if error is None:
            error = group.exceptions[0] if len(group.exceptions) == 1 else group
    if error is not None:  # raised here, so that the group is not shown as its context
        raise error


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await clean-up that must not be left half done; it should take seconds at most.

    If we are cancelled meanwhile, that takes effect when it is done.
    """
    task = asyncio.create_task(work)  # its owner is this call, which does not end before it
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run them side by side; the results in order.

    The first to fail cancels the others, and its error is raised as it is.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise first

"""Task groups that raise one error as itself.

`asyncio.TaskGroup` wraps whatever goes wrong into an ExceptionGroup, also what the body of its own
`async with` raised. A user of the library who catches CacheFull should not have to look for it
three groups deep, so all groups that a user's code runs inside of are made here.

It has a fault, too: if a task fails while the group is waited for at its end, the parent stays
counted as cancelled (`Task.cancelling`), and in early versions of Python 3.11 no `asyncio.timeout`
in it ever ends with a TimeoutError again. So here tasks are waited for inside the body.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class _Group(asyncio.TaskGroup):
    """A TaskGroup that says which of its tasks are not done."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: set[asyncio.Task[Any]] = set()

    def create_task(self, *args: Any, **kwargs: Any) -> "asyncio.Task[Any]":
        task = super().create_task(*args, **kwargs)
        self.pending.add(task)
        task.add_done_callback(self.pending.discard)
        return task


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup without the wrapping.

    An error of the body is raised as it is, whatever the tasks say when they are cancelled for
    it. A task's error cancels the body and the other tasks, and is raised as it is if it is alone.
    """
    error: BaseException | None = None
    try:
        async with _Group() as tasks:
            try:
                yield tasks
                while tasks.pending:
                    await asyncio.wait(tasks.pending)
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
    work = list(coroutines)
    tasks = [asyncio.create_task(coroutine) for coroutine in work]  # this call owns them
    done: set[asyncio.Task[T]] = set()
    try:
        if tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await _all_done(tasks)
    for task in tasks:
        if task in done and not task.cancelled():
            task.result()  # raises what the first one raised
    return [task.result() for task in tasks]


async def _all_done(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Wait for cancelled tasks, however often we are cancelled meanwhile."""
    pending, is_cancelled = set(tasks), False
    while pending:
        try:
            done, pending = await asyncio.wait(pending)
        except asyncio.CancelledError:
            is_cancelled = True
            done, pending = pending, {task for task in pending if not task.done()}
        for task in done - pending:
            if not task.cancelled():
                task.exception()  # the caller raises one, and the others are not left unread
    if is_cancelled:
        raise asyncio.CancelledError

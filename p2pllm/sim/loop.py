"""Virtual time: an event loop whose clock jumps to the next timer when nothing is ready.

A swarm that runs for an hour is tested in a second, and twice alike: callbacks run in the order
in which they became due, nothing reads the computer's clock, and nothing waits for the outside.
There is no outside: no sockets, no threads. Work that would go to a thread runs inline and its
cost is an awaited sleep, else the jumping clock would take a busy thread for idleness.

    def test_something() -> None:
        async def scenario() -> None:
            ...
        run(scenario())
"""

import asyncio
import inspect
import random
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, NoReturn, TypeVar

from p2pllm.errors import LocalProtocolError

T = TypeVar("T")

LIMIT_S = 100_000.0  # virtual: more than a day; who is still running then, waits for nothing
WALL_EPOCH = 1_800_000_000.0  # wall time when virtual time is 0; any date would do


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop on virtual time, starting at 0 seconds.

    Built on asyncio's own scheduler, which takes its time from `time()` and its events from
    `_selector.select(timeout)`, called with the time until the next timer: the one place where a
    loop waits. Good for 90 days, after which a float no longer resolves asyncio's nanosecond.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        super().__init__()
        self._now = 0.0
        self.limit_s = limit_s  # how far time may go
        self._selector = self  # asked by the scheduler for events; we have none but time
        self.errors: list[BaseException] = []  # raised by callbacks, which nobody awaits
        self.set_exception_handler(_collect_error)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def select(self, timeout: float | None) -> list[NoReturn]:
        """No events, and time passes: the scheduler's wait."""
        if timeout is None:
            raise LocalProtocolError(
                f"deadlock at {self._now:.6f} s, all tasks wait and no timer is set: {_tasks(self)}"
            )
        self._now += timeout
        if timeout and self._now > self.limit_s:
            raise LocalProtocolError(f"still running after {self.limit_s} s: {_tasks(self)}")
        return []

    def run_in_executor(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: see the module's text."""
        raise LocalProtocolError(
            "no threads on virtual time: run the work inline and await a sleep of what it costs"
        )

    def call_soon_threadsafe(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: there is no other thread."""
        raise LocalProtocolError("no threads on virtual time: use call_soon")

    def _asyncgen_finalizer_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        """Close a generator that was dropped; the scheduler's own comes from any thread."""
        if not self.is_closed():
            self.call_soon(self.create_task, agen.aclose())

    def _process_events(self, events: list[NoReturn]) -> None:
        """Part of the scheduler's contract; there are never any events."""


class LoopClock:
    """A wall clock that follows the running loop's time, off by `skew_s` seconds."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self._skew_s = skew_s

    def wall(self) -> float:
        return WALL_EPOCH + self._skew_s + asyncio.get_running_loop().time()


def run(main: Coroutine[Any, Any, T], *, seed: int = 0, limit_s: float = LIMIT_S) -> T:
    """Run `main` on virtual time and return its result; `random` starts from `seed`.

    Raises what `main` raises; else what a callback raised; LocalProtocolError for a deadlock, for
    running past `limit_s` virtual seconds, and for tasks left running, which are cancelled.
    """
    state = random.getstate()
    random.seed(seed)
    loop = VirtualLoop(limit_s)
    try:
        result = loop.run_until_complete(main)
        leaked = [_describe(task) for task in asyncio.all_tasks(loop)]
    finally:
        try:
            _cancel_all(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
            random.setstate(state)
    if loop.errors:
        raise loop.errors[0]
    if leaked:
        raise LocalProtocolError("tasks left running: " + "; ".join(leaked))
    return result


def _cancel_all(loop: VirtualLoop) -> None:
    loop.limit_s = float("inf")  # cleaning up may take its time
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(_gather(tasks))


async def _gather(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _collect_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop)
    error = context.get("exception")
    loop.errors.append(error or LocalProtocolError(str(context.get("message"))))


def _tasks(loop: VirtualLoop) -> str:
    return "; ".join(sorted(_describe(task) for task in asyncio.all_tasks(loop)))


def _describe(task: asyncio.Task[Any]) -> str:
    """The task's name and the line of the innermost coroutine that it waits in."""
    inner: Any = task.get_coro()
    while inspect.iscoroutine(inner.cr_await):
        inner = inner.cr_await
    frame = inner.cr_frame
    where = f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame is not None else "its end"
    return f"{task.get_name()} at {where}"

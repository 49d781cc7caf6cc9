"""Where torch computes: one named thread per device, or inline on virtual time.

The event loop must not multiply matrices, and a device wants its work one piece after the other.
"""

import asyncio
import atexit
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Executor(Protocol):
    """Carries out work one piece at a time, in the order of the calls."""

    async def run(self, work: Callable[[], T]) -> T:
        """Do it and return its result. Cancelling the caller does not stop what has begun."""
        ...

    def timer(self) -> float:
        """Seconds, to be read within the work: how long its parts take."""
        ...


class DeviceThread:
    """An executor with one thread of its own, named so that profiles can be read.

    A plain queue there and `call_soon_threadsafe` back take two thirds of the time of asyncio's
    own executors. The queue has no bound of its own: a worker hands in one batch at a time, and
    what else comes (copies for forks, loading) is bounded by the streams that ask for it.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._is_closed = False
        # A daemon, so that an interpreter whose user never closed us comes to its end; but then
        # what the thread is doing is waited for, since torch must not be torn down under it.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._join)

    async def run(self, work: Callable[[], T]) -> T:
        if self._is_closed:
            raise RuntimeError(f"the thread {self._thread.name} has been closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put((loop, future, work))
        return await future

    def timer(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        """End the thread after what it is doing; what waits is dropped."""
        # Not waited for: it may be loading a model, and whoever closes is the event loop.
        self._is_closed = True
        self._jobs.put(None)

    def _join(self) -> None:
        self.close()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, future, work = job
            result: object = None
            error: BaseException | None = None
            if self._is_closed:
                error = asyncio.CancelledError()
            elif not future.cancelled():
                try:
                    result = work()
                except BaseException as exc:
                    error = exc
            with suppress(RuntimeError):  # the loop has been closed: nobody waits
                loop.call_soon_threadsafe(_settle, future, result, error)
            del job, future, work, result, error  # or they would stay until the next job
        atexit.unregister(self._join)


_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


def _settle(future: "asyncio.Future[Any]", result: object, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)


@contextmanager
def executor_or_thread(executor: Executor | None, name: str) -> Iterator[Executor]:
    """The executor given, which stays its owner's, or a new thread that is closed in the end."""
    if executor is not None:
        yield executor
        return
    thread = DeviceThread(name)
    try:
        yield thread
    finally:
        thread.close()

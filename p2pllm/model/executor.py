"""Where torch computes: one named thread per device, or inline on virtual time.

The event loop must not multiply matrices, and a device wants its work one piece after the other.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

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

    Its queue has no bound of its own: a worker hands in one batch at a time, and what else comes
    (copies for forks, loading) is bounded by the streams that ask for it.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def timer(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        """End the thread after what it is doing; what waits is dropped."""
        # Not waited for: it may be loading a model, and whoever closes is the event loop.
        self._pool.shutdown(wait=False, cancel_futures=True)


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

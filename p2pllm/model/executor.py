"""Where torch computes: one named thread per device, or inline on virtual time.

The event loop must not multiply matrices, and a device wants its work one piece after the other.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Executor(Protocol):
    """Carries out work one piece at a time, in the order of the calls."""

    async def run(self, work: Callable[[], T]) -> T:
        """Do it and return its result. Cancelling the caller does not stop what has begun."""
        ...


class DeviceThread:
    """An executor with one thread of its own, named so that profiles can be read."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """End the thread after what it is doing; what waits is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

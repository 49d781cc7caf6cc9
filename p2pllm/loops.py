"""The event loop that programs of this project run on: uvloop's where it is installed.

uvloop halves the time per message, but its clock is cached in whole milliseconds, which is as long
as a whole hop takes. Here it tells the time exactly; its timers keep a resolution of 1 ms.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new loop, for `asyncio.Runner(loop_factory=new_event_loop)`."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()

    class ExactLoop(uvloop.Loop):  # type: ignore[misc]  # uvloop may not be there to be checked
        def time(self) -> float:
            return time.monotonic()  # the clock that libuv counts its milliseconds on

    return ExactLoop()


class LoopThread:
    """An event loop in a thread of its own, while the main thread reads lines from a person."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="p2pllm", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run it there and wait; Ctrl-C here cancels it, waits for its end, and goes on."""
        ended: Future[None] = Future()

        async def marked() -> T:
            try:
                return await main
            finally:
                ended.set_result(None)

        future = asyncio.run_coroutine_threadsafe(marked(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            ended.result()
            raise

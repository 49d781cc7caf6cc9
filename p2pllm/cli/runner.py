"""Event loops for commands, and what signals mean to them.

`run` is for commands that end by themselves: Ctrl-C and SIGTERM cancel them, so that sessions are
freed on the way out. `serve_until_stopped` is for nodes, which end when they are told to.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

import click

from p2pllm.cli.errors import TERMINATED
from p2pllm.loops import new_event_loop

T = TypeVar("T")

STOP_WITHIN_S = 2.5  # after a signal; a device that computes cannot be interrupted


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run it to its end. Raises KeyboardInterrupt after Ctrl-C, click's Exit after SIGTERM."""
    is_terminated = False

    async def supervised() -> T:
        nonlocal is_terminated
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def terminate() -> None:
            nonlocal is_terminated
            is_terminated = True
            task.cancel()

        with _restored(signal.SIGTERM, _HANGUP):
            _install(loop, terminate, signal.SIGTERM, _HANGUP)
            return await main

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(supervised())
    except asyncio.CancelledError:
        if not is_terminated:
            raise
        raise click.exceptions.Exit(TERMINATED) from None


class GentleStop:
    """Asked for by the first signal, if somebody waits for it: who does ends `within_s` later."""

    def __init__(self, within_s: float) -> None:
        self.within_s = within_s
        self._asked = asyncio.Event()
        self._is_awaited = False

    async def wait(self) -> None:
        """Until we are asked to stop."""
        self._is_awaited = True
        await self._asked.wait()

    def ask(self) -> bool:
        """Ask; False if nobody waits, or was asked before."""
        if not self._is_awaited or self._asked.is_set():
            return False
        self._asked.set()
        return True


def serve_until_stopped(
    main: Coroutine[Any, Any, None],
    *,
    gently: "GentleStop | None" = None,
) -> None:
    """Run it until SIGINT or SIGTERM, which cancel it; further signals change nothing.

    While `main` waits for `gently`, the first signal only asks it to end by itself, and the second
    one cancels it. Should leaving take `STOP_WITHIN_S` longer than it may, the process ends
    without it.
    """
    is_stopped = False

    async def supervised() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def stop() -> None:
            nonlocal is_stopped
            if gently is not None and gently.ask():
                _exit_after(gently.within_s + STOP_WITHIN_S)
            elif not is_stopped:
                is_stopped = True
                _exit_after(STOP_WITHIN_S)
                task.cancel()

        # Left in place when the loop is closed: a second signal may come as late as that.
        _install(loop, stop, signal.SIGINT, signal.SIGTERM, _HANGUP)
        await main

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(supervised())
    except asyncio.CancelledError:
        if not is_stopped:
            raise


@contextlib.contextmanager
def exit_when_terminated() -> Iterator[None]:
    """SIGTERM and a closed terminal raise click's Exit here, so that clean-up is not left out."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise click.exceptions.Exit(TERMINATED)

    with _restored(signal.SIGTERM, _HANGUP):
        _handle(leave, signal.SIGTERM, _HANGUP)
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C is ignored meanwhile: for clean-up that is short and must not be left half done."""
    with _restored(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield


_HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal was closed; not on Windows


def _install(
    loop: asyncio.AbstractEventLoop, call: Callable[[], None], *signals: signal.Signals
) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nothing to stop
            loop.call_soon_threadsafe(call)

    _handle(on_signal, *signals)


def _handle(handler: Callable[[int, FrameType | None], None], *signals: signal.Signals) -> None:
    for number in signals:
        # `nohup` asks to outlive the terminal. That scripts start background jobs with SIGINT
        # ignored is another matter: who sends one to a node wants it to stop.
        if number != _HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def _restored(*signals: signal.Signals) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_after(seconds: float) -> None:
    def leave() -> None:
        sys.stdout.flush()
        os._exit(0)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()

"""Acting at each turn of the event loop: at every await, whatever runs meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from p2pllm.sim.loop import VirtualLoop


@dataclass
class Turns:
    """How many turns the loop has taken since the count began."""

    count: int = 0


@contextmanager
def acting_at(num_turns: int, act: Callable[[], object]) -> Iterator[Turns]:
    """Within the block, call `act` after so many turns of the loop (0: never)."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    turns, turn = Turns(), loop._run_once  # type: ignore[attr-defined]
    is_over = False  # the block may end in the midst of a turn

    def counted() -> None:
        turn()
        turns.count += 1
        if turns.count == num_turns and not is_over:
            act()

    loop._run_once = counted  # type: ignore[attr-defined]
    try:
        yield turns
    finally:
        is_over = True
        loop._run_once = turn  # type: ignore[attr-defined]


async def cancelled_after(num_steps: int, work: Coroutine[Any, Any, object]) -> bool:
    """Run `work` and cancel it after as many turns of the loop; was it still running?"""
    task = asyncio.ensure_future(work)
    with acting_at(num_steps, task.cancel):
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return task.cancelled()

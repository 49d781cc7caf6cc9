"""Cancelling something at each turn of the event loop: at every await, whatever runs meanwhile."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from p2pllm.sim.loop import VirtualLoop


async def cancelled_after(num_steps: int, work: Coroutine[Any, Any, object]) -> bool:
    """Run `work` and cancel it after as many turns of the loop; was it still running?"""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    task = asyncio.ensure_future(work)
    left = num_steps
    turn = loop._run_once  # type: ignore[attr-defined]

    def counted() -> None:
        nonlocal left
        turn()
        left -= 1
        if left == 0:
            task.cancel()

    loop._run_once = counted  # type: ignore[attr-defined]
    try:
        await asyncio.wait([task])
    finally:
        loop._run_once = turn  # type: ignore[attr-defined]
    if not task.cancelled():
        task.result()
    return task.cancelled()

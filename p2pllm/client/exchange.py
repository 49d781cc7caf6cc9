"""Where the answers to a client's steps arrive.

A `Step` and its `Output` are two messages, each pushed: the output may come over another
connection than the step left by, twice, or in parts (a server computes some rows in one batch
and the rest in the next). `Exchange` matches them by (peer, session, step) and hides all of it
behind one awaitable call.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from p2pllm.errors import REQUEST_ERRORS, DeadlineExceeded, RequestFailed
from p2pllm.ids import PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.tasks import task_group
from p2pllm.wire.messages import Ack, HopFailed, HopTiming, Message, Output, Row, Step
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

_Key = tuple[SessionId, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs of some rows of a step, packed into one tensor."""

    rows: tuple[Row, ...]
    tensor: WireTensor
    timings: tuple[HopTiming, ...]


@dataclass(eq=False)
class _Waiter:
    """One step under way: who may answer, the rows still missing and what has come."""

    answerer: PeerId
    hops: frozenset[PeerId]  # any of them may say that it failed
    missing: set[_Key]
    done: asyncio.Future[tuple[Part, ...]]
    parts: list[Part] = field(default_factory=list)


class Exchange:
    """All steps under way of one client."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._waiters: dict[_Key, _Waiter] = {}
        endpoint.handle(Output, self._on_output)
        endpoint.handle(HopFailed, self._on_failed)

    async def step(
        self, hops: Sequence[PeerId], step: Step, *, timeout_s: float, priority: Priority
    ) -> tuple[Part, ...]:
        """Push a step to the first of some hops and await the outputs of all rows from the last.

        Between them the hops pass it on themselves. Raises the RequestFailed that one of them
        reports, or TransportError.
        """
        keys = {(row.session, row.step) for row in step.rows}
        done: asyncio.Future[tuple[Part, ...]] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(hops[-1], frozenset(hops), set(keys), done)
        self._waiters.update(dict.fromkeys(keys, waiter))
        try:
            async with asyncio.timeout(timeout_s):
                async with task_group() as tasks:
                    pushing = tasks.create_task(
                        self._endpoint.push(hops[0], step, timeout_s=timeout_s, priority=priority)
                    )
                    answer = await done
                    pushing.cancel()  # the output says more than an acknowledgement
                    return answer
        except TimeoutError as exc:
            names = ", ".join(hop.short for hop in hops)
            raise DeadlineExceeded(f"{names} gave no output within {timeout_s:g} s") from exc
        finally:
            for key in keys:
                if self._waiters.get(key) is waiter:
                    del self._waiters[key]
            if not waiter.done.cancel() and not waiter.done.cancelled():
                waiter.done.exception()  # it may have failed while the push was under way

    async def _on_output(self, request: Request[Output]) -> Message:
        output = request.message
        if output.is_echo:
            return Ack()
        found = {
            waiter: None
            for row in output.rows
            if (waiter := self._waiters.get((row.session, row.step)))
            and waiter.answerer == request.peer
        }
        for waiter in found:  # one: a server never mixes the rows of two steps
            _take(waiter, Part(output.rows, output.tensor, output.timings))
        return Ack()

    async def _on_failed(self, request: Request[HopFailed]) -> Message:
        failed = request.message
        cls = REQUEST_ERRORS.get(failed.error, RequestFailed)
        exc = cls(
            f"{request.peer.short}: {failed.text}",
            retry_after_s=failed.retry_after_s,
            expected=failed.expected,
        )
        for row in failed.rows:
            waiter = self._waiters.get((row.session, row.step))
            if waiter is not None and request.peer in waiter.hops and not waiter.done.done():
                waiter.done.set_exception(exc)
        return Ack()


def _take(waiter: _Waiter, part: Part) -> None:
    keys = {(row.session, row.step) for row in part.rows}
    if not keys <= waiter.missing:  # a repeated output, or one that mixes steps
        logger.debug("output ignored hop=%s rows=%d", waiter.answerer.short, len(part.rows))
        return
    waiter.missing -= keys
    waiter.parts.append(part)
    if not waiter.missing and not waiter.done.done():
        waiter.done.set_result(tuple(waiter.parts))

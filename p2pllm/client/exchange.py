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

from p2pllm.errors import REQUEST_ERRORS, DeadlineExceeded, P2PLLMError, RequestFailed
from p2pllm.ids import PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.wire.messages import Ack, HopFailed, HopTiming, Message, Output, Row, Step
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

_Key = tuple[PeerId, SessionId, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs of some rows of a step, packed into one tensor."""

    rows: tuple[Row, ...]
    tensor: WireTensor
    timings: tuple[HopTiming, ...]


@dataclass(eq=False)
class _Waiter:
    """One step under way: the rows still missing and what has come."""

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
        self, peer: PeerId, step: Step, *, timeout_s: float, priority: Priority
    ) -> tuple[Part, ...]:
        """Push a step to a hop and await the outputs of all its rows.

        Raises the RequestFailed that the hop reports, or TransportError.
        """
        keys = {(peer, row.session, row.step) for row in step.rows}
        waiter = _Waiter(set(keys), asyncio.get_running_loop().create_future())
        self._waiters.update(dict.fromkeys(keys, waiter))
        try:
            async with asyncio.timeout(timeout_s):
                await self._endpoint.push(peer, step, timeout_s=timeout_s, priority=priority)
                return await waiter.done
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{peer.short} gave no output within {timeout_s:g} s") from exc
        finally:
            for key in keys:
                if self._waiters.get(key) is waiter:
                    del self._waiters[key]
            if not waiter.done.cancel() and not waiter.done.cancelled():
                waiter.done.exception()  # it may have failed while the push was under way

    async def _on_output(self, request: Request[Output]) -> Message:
        output = request.message
        found = {
            waiter: None
            for row in output.rows
            if (waiter := self._waiters.get((request.peer, row.session, row.step)))
        }
        for waiter in found:  # one: a server never mixes the rows of two steps
            _take(waiter, request.peer, Part(output.rows, output.tensor, output.timings))
        return Ack()

    async def _on_failed(self, request: Request[HopFailed]) -> Message:
        failed = request.message
        cls = REQUEST_ERRORS.get(failed.error, RequestFailed)
        exc = cls(
            f"{request.peer.short}: {failed.text}",
            retry_after_s=failed.retry_after_s,
            expected=failed.expected,
        )
        self._fail([(request.peer, row.session, row.step) for row in failed.rows], exc)
        return Ack()

    def _fail(self, keys: Sequence[_Key], exc: P2PLLMError) -> None:
        for key in keys:
            waiter = self._waiters.get(key)
            if waiter is not None and not waiter.done.done():
                waiter.done.set_exception(exc)


def _take(waiter: _Waiter, peer: PeerId, part: Part) -> None:
    keys = {(peer, row.session, row.step) for row in part.rows}
    if not keys <= waiter.missing:  # a repeated output, or one that mixes steps
        logger.debug("output ignored peer=%s rows=%d", peer.short, len(part.rows))
        return
    waiter.missing -= keys
    waiter.parts.append(part)
    if not waiter.missing and not waiter.done.done():
        waiter.done.set_result(tuple(waiter.parts))

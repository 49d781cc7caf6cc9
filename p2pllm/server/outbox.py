"""How a server's outputs and failures leave it: to the next hop, or to the client.

Each send is a task of its own, so that a slow peer delays nobody, and what is on its way for one
client is bounded. An output that is left out is not lost: it is kept, and can be asked for again.

Rows that were computed together leave together as long as they go the same way. Where they go is
decided when they leave: between coming and leaving, and before an output is asked for again, a
session may have got another successor.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from p2pllm.errors import Busy, OutOfOrder, P2PLLMError, RequestFailed
from p2pllm.ids import PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.server.scheduler import DECODE_TOKENS
from p2pllm.server.sessions import Session
from p2pllm.server.successors import Successors
from p2pllm.server.worker import BadInput
from p2pllm.wire.messages import MAX_TEXT, Echo, HopFailed, HopTiming, Message, Output, Row, Step
from p2pllm.wire.rows import assembled, split
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 15.0  # the transport gives a peer up after as long
MAX_UNSENT = 256  # messages on their way to one client; beyond, outputs are only kept
MAX_UNSENT_BYTES = 64 * 2**20  # of their tensors, beyond the first
CONGESTED_S = 0.5  # before an output that could not be sent on is asked for again
MIN_BUDGET_S = 0.001  # 0 would mean "no deadline"
ROWS_PER_REPORT = 512  # a body has room for 1024

Asked = tuple[Session[Output], Row]  # a row as it was asked for last


@dataclass(frozen=True, slots=True)
class _Way:
    """Where outputs go: what rows must share to travel in one message."""

    client: PeerId
    next_peer: PeerId | None
    echo: Echo


class Outbox:
    """Sends outputs and failures. Its owner lends it a task group in `tasks`."""

    def __init__(self, endpoint: Endpoint, successors: Successors) -> None:
        self.tasks: asyncio.TaskGroup | None = None
        self._endpoint = endpoint
        self._successors = successors
        self._unsent: Counter[PeerId] = Counter()  # messages on their way, by client
        self._unsent_bytes: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return self._unsent.total()

    # --- outputs -------------------------------------------------------------------------

    def emit(self, asked: Iterable[Asked], output: Output, deadline: float) -> None:
        """Pass rows of an output on: to the next hop, or at the chain's end to the client.

        `output` holds for each of its rows as many tokens as the row's `num_outputs` says.
        """
        ways: dict[_Way, dict[tuple[SessionId, int], Asked]] = {}
        for session, row in asked:
            way = _Way(session.client, session.next_peer, session.request.echo)
            ways.setdefault(way, {})[session.id, row.step] = session, row
        for way, some in ways.items():
            self._emit_one_way(way, some, output, deadline)

    def _emit_one_way(
        self,
        way: _Way,
        asked: dict[tuple[SessionId, int], Asked],
        output: Output,
        deadline: float,
    ) -> None:
        is_last = way.next_peer is None
        sessions, rows, cuts, start = [], [], [], 0
        for kept in output.rows:
            stop = start + kept.num_outputs
            session, row = asked.get((kept.session, kept.step), (None, kept))
            if session is not None:
                wanted = row.num_outputs if is_last else row.num_tokens
                if wanted <= kept.num_outputs:
                    sessions.append(session)
                    rows.append(row)
                    cuts.append((stop - wanted, stop))
                else:
                    gone = OutOfOrder("only a part of that output was kept")
                    self.report(way.client, [row], gone)
            start = stop
        if not rows:
            return
        tensor = _cut(output.tensor, cuts)
        timings = (*output.timings[:-1], self._with_link(way, output.timings[-1]))
        result = Output(tuple(rows), tensor, timings)
        if is_last:
            self.send(way.client, result, _priority(rows[0]))
        else:
            tokens = tuple(session.request.next_token for session in sessions)
            self._hand_on(way, result, tokens, deadline)

    def _with_link(self, way: _Way, timing: HopTiming) -> HopTiming:
        """The hop's own timing, with what the transport knows of the way that comes now."""
        peer = way.next_peer or way.client
        return replace(
            timing,
            next_rtt_s=self._endpoint.rtt_s(peer) or 0.0,
            next_rate_bytes_s=self._endpoint.rate_bytes_s(peer) or 0.0,
        )

    def _hand_on(
        self, way: _Way, output: Output, tokens: tuple[bytes, ...], deadline: float
    ) -> None:
        assert way.next_peer is not None, "the caller has looked"
        priority = _priority(output.rows[0])
        step = Step(output.rows, output.tensor, tokens, output.timings)
        push = partial(self._push_on, way.client, way.next_peer, step, deadline, priority)
        if not self._start(way.client, output, push):
            busy = Busy("too much is on its way to the next hop", retry_after_s=CONGESTED_S)
            self.report(way.client, output.rows, busy)
        if way.echo is Echo.ALL or (way.echo is Echo.DECODE_ONLY and priority is Priority.DECODE):
            self.send(way.client, replace(output, is_echo=True), Priority.BULK)

    async def _push_on(
        self, client: PeerId, next_peer: PeerId, step: Step, deadline: float, priority: Priority
    ) -> None:
        """Push an output to the next hop as its step; the client hears of it if that fails."""
        now = self._now()
        budget_s = 0.0 if deadline == math.inf else max(deadline - now, MIN_BUDGET_S)
        try:
            if not self._successors.may_use(client, next_peer, now):
                raise Busy("too many peers were dialled for you", retry_after_s=1.0)
            await self._endpoint.push(
                next_peer,
                replace(step, budget_s=budget_s),
                timeout_s=SEND_TIMEOUT_S,
                priority=priority,
                is_patient=False,
            )
        except P2PLLMError as exc:
            logger.info("next hop lost peer=%s reason=%s", next_peer.short, exc)
            kind = type(exc) if isinstance(exc, RequestFailed) else RequestFailed
            failure = kind(f"the next hop {next_peer.short}: {exc}")
            self.report(client, step.rows, failure, next_hop=next_peer.key)

    # --- failures ------------------------------------------------------------------------

    def report_alike(self, refused: Sequence[tuple[PeerId, Row, RequestFailed]]) -> None:
        """Report rows that were refused for like reasons together."""
        groups: dict[object, list[tuple[PeerId, Row, RequestFailed]]] = {}
        for client, row, exc in refused:
            reason = (client, type(exc), exc.retry_after_s, exc.expected)
            groups.setdefault(reason, []).append((client, row, exc))
        for group in groups.values():
            client, _, exc = group[0]
            self.report(client, [row for _, row, _ in group], exc)

    def report(
        self, client: PeerId, rows: Iterable[Row], exc: RequestFailed, *, next_hop: bytes = b""
    ) -> None:
        """Tell a client that these rows went no further."""
        rows = tuple(rows)
        for start in range(0, len(rows), ROWS_PER_REPORT):
            some = rows[start : start + ROWS_PER_REPORT]
            logger.info("step refused client=%s rows=%d error=%s", client.short, len(some), exc)
            message = HopFailed(
                some,
                exc.code,
                exc.message[:MAX_TEXT],
                next_hop=next_hop,
                retry_after_s=exc.retry_after_s,
                expected=exc.expected,
                is_input=isinstance(exc, BadInput),
            )
            self.send(client, message, Priority.CONTROL)

    # --- sending -------------------------------------------------------------------------

    def send(self, client: PeerId, message: Output | HopFailed, priority: Priority) -> None:
        """Push a message to a client."""
        self._start(client, message, partial(self._push, client, message, priority))

    def _start(
        self, client: PeerId, message: Output | HopFailed, send: Callable[[], Awaitable[None]]
    ) -> bool:
        """Send in a task of its own, if not too much of this client's is on its way already."""
        num_bytes = len(message.tensor.data) if isinstance(message, Output) else 0
        unsent_bytes = self._unsent_bytes[client]
        is_full = unsent_bytes and unsent_bytes + num_bytes > MAX_UNSENT_BYTES
        if self.tasks is None or is_full or self._unsent[client] >= MAX_UNSENT:
            logger.warning("message not sent client=%s bytes=%d", client.short, num_bytes)
            return False
        self._unsent[client] += 1
        self._unsent_bytes[client] += num_bytes
        self.tasks.create_task(self._counted(client, num_bytes, send))
        return True

    async def _counted(
        self, client: PeerId, num_bytes: int, send: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await send()
        finally:
            self._unsent[client] -= 1
            self._unsent_bytes[client] -= num_bytes
            if not self._unsent[client]:
                del self._unsent[client], self._unsent_bytes[client]

    async def _push(self, client: PeerId, message: Message, priority: Priority) -> None:
        try:
            await self._endpoint.push(client, message, timeout_s=SEND_TIMEOUT_S, priority=priority)
        except P2PLLMError as exc:
            logger.info("message lost client=%s reason=%s", client.short, exc)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _priority(row: Row) -> Priority:
    """What the outputs of a row, and of those that came with it, travel with."""
    return Priority.DECODE if row.num_tokens <= DECODE_TOKENS else Priority.PREFILL


def _cut(tensor: WireTensor, cuts: Sequence[tuple[int, int]]) -> WireTensor:
    """The tokens `[start, stop)` of each cut, with the very values; the tensor itself if all."""
    total = tensor.header.shape[0]
    if sum(stop - start for start, stop in cuts) == total:
        return tensor
    rows = split(tensor)
    return assembled([rows.cut(start, stop) for start, stop in cuts])

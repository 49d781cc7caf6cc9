"""How a server's outputs and failures leave it: to the next hop, or to the client.

Nothing here waits: a message is posted and leaves at once, a slow peer delays nobody, and what is
on its way for one client is bounded. An output that is left out is not lost: it is kept, and can be
asked for again.

Rows that were computed together leave together as long as they go the same way, whoever's they are:
one message to the next hop costs as much as one row does. Where they go is decided when they leave:
between coming and leaving, and before an output is asked for again, a session may have got another
successor. Echoes leave after everything that somebody waits for.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from p2pllm.errors import (
    BadRequest,
    Busy,
    LocalProtocolError,
    OutOfOrder,
    P2PLLMError,
    RequestFailed,
)
from p2pllm.ids import PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.server.scheduler import DECODE_TOKENS
from p2pllm.server.sessions import Session
from p2pllm.server.successors import Successors
from p2pllm.server.worker import BadInput
from p2pllm.wire.messages import (
    MAX_TEXT,
    MIN_BUDGET_S,
    Echo,
    HopFailed,
    HopTiming,
    Output,
    Row,
    Step,
)
from p2pllm.wire.rows import (
    RowCoding,
    assembled,
    joined,
    may_join_others,
    messages_of,
    row_coding,
    split,
)
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 15.0  # the transport gives a peer up after as long
MAX_UNSENT = 256  # messages on their way to one client; beyond, outputs are only kept
MAX_UNSENT_BYTES = 64 * 2**20  # of their tensors, beyond the first
CONGESTED_S = 0.5  # before an output that could not be sent on is asked for again
ROWS_PER_REPORT = 512  # a body has room for 1024

_DIALS = "too many peers were dialled for you"

Asked = tuple[Session[Output], Row]  # a row as it was asked for last


@dataclass(frozen=True, slots=True)
class _Way:
    """Where outputs go: what rows must share to travel in one message."""

    client: PeerId
    next_peer: PeerId | None
    echo: Echo


@dataclass(frozen=True, slots=True)
class _Onward:
    """One client's outputs for the next hop, and who is told if they do not get there."""

    client: PeerId
    output: Output
    tokens: tuple[bytes, ...]  # by row
    deadline: float

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.output.rows)


@dataclass(frozen=True, slots=True)
class _Company:
    """What outputs must share to be one message to the next hop."""

    next_peer: PeerId
    coding: RowCoding
    timings: tuple[HopTiming, ...]  # of the hops before
    number: int = 0  # of what travels alone


class Outbox:
    """Sends outputs and failures while it `is_open`. Call `flush` when all is emitted."""

    def __init__(self, endpoint: Endpoint, successors: Successors) -> None:
        self.is_open = False
        self._endpoint = endpoint
        self._successors = successors
        self._onward: dict[_Company, list[_Onward]] = {}  # emitted
        self._echoes: list[tuple[PeerId, Output]] = []
        self._unsent: Counter[PeerId] = Counter()  # messages on their way, by client
        self._unsent_bytes: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return self._unsent.total()

    # --- outputs -------------------------------------------------------------------------

    def emit(self, asked: Iterable[Asked], output: Output, deadline: float) -> None:
        """Pass rows of an output on: to the next hop, or at the chain's end to the client.

        `output` holds for each of its rows as many tokens as the row's `num_outputs` says. What
        goes to the next hop leaves with `flush`.
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
        priority, header = _priority(output.rows[0]), output.tensor.header
        company = _Company(way.next_peer, row_coding(header), output.timings[:-1])
        if priority is not Priority.DECODE or not may_join_others(header):  # a prompt's chunk, say
            company = replace(company, number=len(self._onward) + 1)
        onward = _Onward(way.client, output, tokens, deadline)
        self._onward.setdefault(company, []).append(onward)
        if way.echo is Echo.ALL or (way.echo is Echo.DECODE_ONLY and priority is Priority.DECODE):
            self._echoes.append((way.client, replace(output, is_echo=True)))

    def flush(self) -> None:
        """Send what was emitted for next hops, and then the echoes of it."""
        onward, self._onward = self._onward, {}
        echoes, self._echoes = self._echoes, []
        for company, parts in onward.items():
            for some in messages_of(parts, lambda part: part.num_tokens):
                self._push_on(company.next_peer, some)
        for client, echo in echoes:
            self.send(client, echo, Priority.BULK)

    def _push_on(self, next_peer: PeerId, parts: Sequence[_Onward]) -> None:
        """Push outputs to the next hop as its step; their clients hear of it if that fails."""
        now = self._now()
        sent: list[_Onward] = []
        for part in parts:
            if not self._successors.may_use(part.client, next_peer, now):
                self.report(part.client, part.output.rows, Busy(_DIALS, retry_after_s=1.0))
            elif not self._admit(part.client, len(part.output.tensor.data)):
                busy = Busy("too much is on its way to the next hop", retry_after_s=CONGESTED_S)
                self.report(part.client, part.output.rows, busy)
            else:
                sent.append(part)
        if sent:
            self._endpoint.post(
                next_peer,
                _step_of(sent, now),
                partial(self._on_pushed, next_peer, sent),
                timeout_s=SEND_TIMEOUT_S,
                priority=_priority(sent[0].output.rows[0]),
                is_patient=False,
            )

    def _on_pushed(
        self, next_peer: PeerId, parts: Sequence[_Onward], exc: P2PLLMError | None
    ) -> None:
        for part in parts:
            self._let_go(part.client, len(part.output.tensor.data))
        if exc is None:
            return
        logger.info("next hop lost peer=%s reason=%s", next_peer.short, exc)
        kind = type(exc) if isinstance(exc, RequestFailed) else RequestFailed
        failure, next_hop = kind(f"the next hop {next_peer.short}: {exc}"), next_peer.key
        if isinstance(exc, LocalProtocolError):  # too many rows: no other hop would get them either
            failure, next_hop = BadRequest(f"the step cannot be passed on: {exc}"), b""
        for part in parts:
            self.report(part.client, part.output.rows, failure, next_hop=next_hop)

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
        num_bytes = len(message.tensor.data) if isinstance(message, Output) else 0
        if self._admit(client, num_bytes):
            self._endpoint.post(
                client,
                message,
                partial(self._on_sent, client, num_bytes),
                timeout_s=SEND_TIMEOUT_S,
                priority=priority,
            )

    def _on_sent(self, client: PeerId, num_bytes: int, exc: P2PLLMError | None) -> None:
        self._let_go(client, num_bytes)
        if exc is not None:
            logger.info("message lost client=%s reason=%s", client.short, exc)

    def _admit(self, client: PeerId, num_bytes: int) -> bool:
        """Count a message as on its way, unless too much of this client's is already."""
        unsent_bytes = self._unsent_bytes[client]
        is_full = unsent_bytes and unsent_bytes + num_bytes > MAX_UNSENT_BYTES
        if not self.is_open or is_full or self._unsent[client] >= MAX_UNSENT:
            logger.warning("message not sent client=%s bytes=%d", client.short, num_bytes)
            return False
        self._unsent[client] += 1
        self._unsent_bytes[client] += num_bytes
        return True

    def _let_go(self, client: PeerId, num_bytes: int) -> None:
        self._unsent[client] -= 1
        self._unsent_bytes[client] -= num_bytes
        if not self._unsent[client]:
            del self._unsent[client], self._unsent_bytes[client]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _step_of(parts: Sequence[_Onward], now: float) -> Step:
    """The next hop's step. Its time is that of whoever waits longest."""
    deadline = max(part.deadline for part in parts)
    budget_s = 0.0 if deadline == math.inf else max(deadline - now, MIN_BUDGET_S)
    first = parts[0]
    if len(parts) == 1:
        output = first.output
        return Step(output.rows, output.tensor, first.tokens, output.timings, budget_s)
    tensor = joined([part.output.tensor for part in parts])
    rows = tuple(row for part in parts for row in part.output.rows)
    tokens = tuple(token for part in parts for token in part.tokens)
    longest = max((part.output.timings for part in parts), key=lambda each: each[-1].queue_s)
    return Step(rows, tensor, tokens, longest, budget_s)


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

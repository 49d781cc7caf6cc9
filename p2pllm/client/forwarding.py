"""Batches of whole sequences through the swarm's blocks, without sessions: forward passes.

The batch is divided, by its lengths alone, into micro-batches. Each goes from hop to hop, carried
by the client, and several are under way: the second hop works on one while the first works on the
next. What a micro-batch consists of at any moment is its latest input and the block that it is the
input of; so when a server is lost, only its span is computed again, by others, for the
micro-batches that it had, and nothing else changes. Servers never join what belongs to different
requests, so a repetition gives the same bits on like hardware.

    lost, breaks down, nonsense, NaN   penalised; others do its part, of the same numerics first
    busy                               asked again when it says
    does not serve that, not us        others do its part, without a penalty

After `patience_s` without progress of a micro-batch its last error is raised.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence

from torch import Tensor

from p2pllm.client.compute import ClientCompute
from p2pllm.client.retry import Patience
from p2pllm.client.routes import ModelRoutes
from p2pllm.client.state import Hop, WireFormat
from p2pllm.config import ClientConfig
from p2pllm.errors import (
    BadRequest,
    Busy,
    Forbidden,
    LookupFailed,
    NoRoute,
    NotServed,
    P2PLLMError,
    RemoteProtocolError,
    RequestFailed,
    TransportError,
)
from p2pllm.ids import ModelId, PeerId
from p2pllm.model.forward_pass import groups_of
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.spans import Span
from p2pllm.tasks import together
from p2pllm.wire.messages import Forward, Forwarded
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

AHEAD = 2  # micro-batches under way for each hop: one computed, one on its way or in line

RETRIED = (RequestFailed, TransportError, RemoteProtocolError, NoRoute, LookupFailed)
NOT_ITS_FAULT = (BadRequest, Forbidden, NotServed)  # others may do what it does not

MakeInput = Callable[[int, int, WireFormat], Awaitable[WireTensor]]
"""Codes the hidden states of sequences `[start, stop)` of the batch, packed: (tokens, D)."""


class Forwarder:
    """Runs batches through the blocks of one model."""

    def __init__(
        self,
        endpoint: Endpoint,
        routes: ModelRoutes,
        compute: ClientCompute,
        model: ModelId,
        settings: ClientConfig,
        rng: random.Random,
        wire_format: Callable[[Sequence[Hop]], WireFormat],
    ) -> None:
        self.endpoint = endpoint
        self.routes = routes
        self.compute = compute
        self.model = model
        self.settings = settings
        self.rng = rng
        self._wire_format = wire_format

    async def forward(
        self, lengths: Sequence[int], make_input: MakeInput, span: Span
    ) -> list[Tensor]:
        """The outputs of the last block of `span`, (T, D) of each sequence, in order.

        Raises NoRoute with the missing blocks, LookupFailed, or what the servers said.
        """
        batches = list(_micro_batches(lengths, self.settings.micro_batch_tokens))
        if not batches:
            return []
        chain = _Chain(self, span, sum(lengths))
        await chain.begin()
        wire = self._wire_format(chain.hops)
        outputs: dict[int, Sequence[Tensor]] = {}
        waiting = iter(batches)

        async def carry() -> None:
            for start, stop in waiting:  # shared: each takes the next one
                mine = tuple(lengths[start:stop])
                tensor = await make_input(start, stop, wire)
                hidden = await chain.carry(tensor, mine, wire)
                outputs[start] = hidden.split(mine)

        await together(carry() for _ in range(min(AHEAD * len(chain.hops), len(batches))))
        return [output for start, _ in batches for output in outputs[start]]


class _Chain:
    """The hops that one batch goes through, as they are now."""

    def __init__(self, forwarder: Forwarder, span: Span, num_tokens: int) -> None:
        self.hops: list[Hop] = []
        self._forwarder = forwarder
        self._span = span
        self._num_tokens = num_tokens
        self._excluded: set[PeerId] = set()
        self._replacing = asyncio.Lock()

    async def begin(self) -> None:
        """Plan, waiting for missing blocks as long as the client's patience lasts."""
        patience = self._patience()
        while not self.hops:
            try:
                self.hops += await self._plan(self._span)
            except (NoRoute, LookupFailed) as exc:
                await self._pause(patience, exc)

    async def carry(self, tensor: WireTensor, lengths: tuple[int, ...], wire: WireFormat) -> Tensor:
        """One micro-batch through all hops; `tensor` is its input of the first block."""
        at, patience = self._span.start, self._patience()
        while True:
            hop = self._hop_at(at)
            try:
                forwarded, hidden = await self._ask(hop, at, tensor, lengths, wire)
            except RETRIED as exc:
                await self._recover(hop, exc, patience)
                continue
            tensor, at, patience = forwarded.tensor, hop.span.stop, self._patience()
            if at == self._span.stop:
                return hidden

    def _hop_at(self, block: int) -> Hop:
        return next(hop for hop in self.hops if block in hop.span)

    async def _ask(
        self,
        hop: Hop,
        start: int,
        tensor: WireTensor,
        lengths: tuple[int, ...],
        wire: WireFormat,
    ) -> tuple[Forwarded, Tensor]:
        """The answer of a hop for its blocks from `start` on, and what it holds, (N, D)."""
        forwarder = self._forwarder
        request = Forward(
            forwarder.model,
            hop.numerics,
            Span(start, hop.span.stop),
            lengths,
            tensor,
            wire.codec,
            wire.is_compressed,
        )
        reply = await forwarder.endpoint.request(
            hop.peer,
            request,
            timeout_s=forwarder.settings.step_timeout_s,
            priority=Priority.PREFILL,
        )
        if not isinstance(reply, Forwarded):
            raise RemoteProtocolError(f"a Forward answered with {type(reply).__name__}")
        if reply.tensor.header.shape != tensor.header.shape:
            raise RemoteProtocolError(f"an answer of shape {reply.tensor.header.shape}")
        return reply, await forwarder.compute.decode(reply.tensor)

    # --- recovery --------------------------------------------------------------------------

    async def _recover(self, hop: Hop, exc: P2PLLMError, patience: Patience) -> None:
        """Do what makes another attempt worthwhile; raises `exc` when patience is over."""
        if isinstance(exc, Busy):
            await self._pause(patience, exc, exc.retry_after_s)
            return
        if patience.attempts:
            await self._pause(patience, exc)
        else:
            patience.attempts = 1  # the first one is made at once
        try:
            await self._replace(hop, exc)
        except (NoRoute, LookupFailed) as missing:
            await self._pause(patience, missing)

    async def _replace(self, hop: Hop, exc: P2PLLMError) -> None:
        """Have others do a hop's part, unless that has been seen to."""
        async with self._replacing:
            if hop not in self.hops:
                return
            logger.warning("hop lost peer=%s span=%s reason=%r", hop.peer.short, hop.span, exc)
            self._excluded.add(hop.peer)
            if not isinstance(exc, NOT_ITS_FAULT):
                self._forwarder.routes.on_failure(hop.peer)
            try:
                others = await self._plan(hop.span, hop)
            except NoRoute:
                if isinstance(exc, BadRequest | Forbidden):  # nor will it do later
                    raise exc from None
                self._excluded.clear()  # who failed may be back
                await self._forwarder.routes.tracker.refresh()
                others = await self._plan(hop.span, hop)
            index = self.hops.index(hop)
            self.hops[index : index + 1] = others

    async def _plan(self, span: Span, lost: Hop | None = None) -> tuple[Hop, ...]:
        return await self._forwarder.routes.without_sessions(
            span,
            num_tokens=self._num_tokens,
            excluded=frozenset(self._excluded),
            numerics=lost.numerics if lost is not None else None,
        )

    def _patience(self) -> Patience:
        forwarder = self._forwarder
        now = asyncio.get_running_loop().time()
        return Patience(now + forwarder.settings.patience_s, forwarder.rng)

    async def _pause(self, patience: Patience, exc: P2PLLMError, at_least_s: float = 0.0) -> None:
        """Let some time go by before another attempt, or raise what has failed."""
        now = asyncio.get_running_loop().time()
        pause_s = patience.pause_s(now)
        if pause_s is None or now + at_least_s > patience.deadline:
            raise exc
        await self._forwarder.routes.wait(max(pause_s, at_least_s))


def _micro_batches(lengths: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Neighbouring sequences that go together, as [start, stop) of the batch."""
    start = 0
    for group in groups_of(lengths, limit):
        yield start, start + len(group)
        start += len(group)

"""A client that obeys no rules: it sends hand-made messages and collects what comes back."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2pllm.config import NetConfig
from p2pllm.identity import Identity
from p2pllm.ids import PeerId, SessionId
from p2pllm.model.kv_cache import CacheRow
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.rpc import Request
from p2pllm.sim.fake_model import WIDTH, FakeSpanModel
from p2pllm.sim.swarm import PORT, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.tasks import task_group
from p2pllm.wire.messages import (
    Ack,
    HopFailed,
    Leaving,
    Message,
    Numerics,
    Open,
    Output,
    Row,
    Step,
)
from p2pllm.wire.tensors import TensorCodec, WireTensor

TIMEOUT_S = 20.0
TOKEN = b"p" * 16


def session_id(number: int) -> SessionId:
    return SessionId(number.to_bytes(16, "big"))


ONE, TWO, THREE = map(session_id, (1, 2, 3))


def states(num_tokens: int, *, start: int = 0) -> Tensor:
    """Hidden states of made-up tokens, (num_tokens, WIDTH) of small whole numbers."""
    tokens = torch.arange(start, start + num_tokens)[:, None]
    return ((tokens * 7 + torch.arange(WIDTH) * 3) % 50).float() - 25


def expected(span: Span, hidden: Tensor, num_blocks: int = 4) -> Tensor:
    """What the blocks of a span make of a sequence that begins with these states."""
    model = FakeSpanModel(SimSwarm(num_blocks).source.config, span)
    num_tokens = len(hidden)
    cache = model.make_cache(1, num_tokens)
    return model.forward(hidden, [CacheRow((0,), 0, num_tokens)], cache)


@dataclass
class RawClient:
    """An endpoint and what it was sent: outputs, failures and notices, each in order."""

    endpoint: Endpoint
    server: PeerId
    swarm: SimSwarm
    outputs: list[Output] = field(default_factory=list)
    failures: list[HopFailed] = field(default_factory=list)
    notices: list[Leaving] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def peer_id(self) -> PeerId:
        return self.endpoint.peer_id

    async def ask(self, message: Message, *, timeout_s: float = TIMEOUT_S) -> Message:
        return await self.endpoint.request(self.server, message, timeout_s=timeout_s)

    async def open(
        self,
        session: SessionId = ONE,
        *,
        epoch: int = 0,
        max_tokens: int = 64,
        span: Span = Span(0, 4),
        wait_s: float = 0.0,
        push_token: bytes = TOKEN,
    ) -> Message:
        return await self.ask(
            self.opening(session, epoch, max_tokens, span, wait_s, push_token),
            timeout_s=TIMEOUT_S + wait_s,
        )

    def opening(
        self,
        session: SessionId = ONE,
        epoch: int = 0,
        max_tokens: int = 64,
        span: Span = Span(0, 4),
        wait_s: float = 0.0,
        push_token: bytes = TOKEN,
    ) -> Open:
        return Open(
            session=session,
            epoch=epoch,
            span=span,
            max_tokens=max_tokens,
            model=self.swarm.source.model_id,
            numerics=Numerics("float32", kv_dtype="float32"),
            push_token=push_token,
            client=self.peer_id,
            wait_s=wait_s,
        )

    async def push(
        self,
        rows: Sequence[Row],
        hidden: Tensor | WireTensor | None = None,
        *,
        tokens: tuple[bytes, ...] = (),
        budget_s: float = 0.0,
    ) -> None:
        """Push a step; without `hidden`, the states that belong to the rows' positions."""
        if hidden is None:
            parts = [states(row.num_tokens, start=row.position) for row in rows]
            hidden = torch.cat(parts)
        tensor = hidden
        if isinstance(tensor, Tensor):
            tensor = encode_tensor(tensor, TensorCodec.RAW)
        step = Step(tuple(rows), tensor, tokens=tokens, budget_s=budget_s)
        await self.endpoint.push(self.server, step, timeout_s=TIMEOUT_S)

    async def step(self, *rows: Row, hidden: Tensor | WireTensor | None = None) -> None:
        """Push a step and wait until all of its rows are answered."""
        before = self.num_answered
        await self.push(rows, hidden)
        await self.answered(before + len(rows))

    @property
    def num_answered(self) -> int:
        """Rows that came back, in one way or the other."""
        outputs = sum(len(output.rows) for output in self.outputs)
        return outputs + sum(len(failed.rows) for failed in self.failures)

    async def answered(self, num_rows: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.num_answered < num_rows:
                self.arrived.clear()
                await self.arrived.wait()

    def tensor(self, index: int = -1) -> Tensor:
        """What an output holds."""
        return decode_tensor(self.outputs[index].tensor)

    async def on_output(self, request: Request[Output]) -> Message:
        self.outputs.append(request.message)
        self.arrived.set()
        return Ack()

    async def on_failed(self, request: Request[HopFailed]) -> Message:
        self.failures.append(request.message)
        self.arrived.set()
        return Ack()

    async def on_leaving(self, request: Request[Leaving]) -> Message:
        self.notices.append(request.message)
        return Ack()


@asynccontextmanager
async def raw_client(
    swarm: SimSwarm, server: SimServer, number: int = 1
) -> AsyncIterator[RawClient]:
    """A raw client on a host of its own; two with one number are one peer."""
    host = swarm.internet.host(f"10.1.0.{number}")
    config = NetConfig(network_id="sim", listen_host=host.address, listen_port=PORT)
    identity = Identity.from_seed(bytes([number]) * 32)
    endpoint = await Endpoint.bind(config, identity, host)
    client = RawClient(endpoint, server.server.node.peer_id, swarm)
    endpoint.handle(Output, client.on_output)
    endpoint.handle(HopFailed, client.on_failed)
    endpoint.handle(Leaving, client.on_leaving)
    endpoint.learn(client.server, server.server.node.addresses)
    async with task_group() as tasks:
        running = tasks.create_task(endpoint.run())
        try:
            yield client
        finally:
            running.cancel()


def assert_nothing_left(server: SimServer) -> None:
    """No session, page, protected connection, waiting row or waiting client is left."""
    service, worker = server.server.service, server.server.worker
    assert len(service.sessions) == 0
    assert server.num_free_pages == server.num_pages
    assert (len(service.sessions._kept), service.sessions._kept_bytes) == (0, 0)
    assert (len(worker._inputs), len(worker._scheduler), len(worker._held_bytes)) == (0, 0, 0)
    outbox = service._outbox
    assert (len(service._admission), len(outbox), len(outbox._unsent_bytes)) == (0, 0, 0)
    assert not server.server.node.endpoint._protected

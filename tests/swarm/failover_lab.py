"""A swarm whose servers fail in every way, at a chosen turn of the event loop.

A lab has some servers for every span, and one client. `Fault`s name a hop of the chain in use (or,
before there is one, of the route that would be planned) and do something to it. What must hold
afterwards is checked here: the tokens, what is in every cache, what the client still holds, and
what is left on the servers that live.
"""

import asyncio
import enum
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch

from p2pllm.client.generation import GenerateOptions, Generation
from p2pllm.client.model import SwarmModel
from p2pllm.client.recovery import Gap
from p2pllm.client.results import ChainEvent, GenerationResult
from p2pllm.client.state import Hop
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.errors import RemoteFault
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.routing.planner import plan
from p2pllm.server.outbox import Asked
from p2pllm.server.sessions import Session, SessionTable
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import DEVICE_S, LAB_SERVER, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.wire.messages import HopFailed, Message, Output, Row, Step
from p2pllm.wire.tensors import TensorCodec
from tests.swarm.raw_client import assert_nothing_left
from tests.swarm.turns import acting_at

THIRDS = (Span(0, 2), Span(2, 4), Span(4, 6))
NUM_BLOCKS = 6
PROMPT = "hello world"
NUM_TOKENS = 4
SETTINGS = ClientConfig(prefill_chunk_tokens=4)  # the prompt goes in three chunks
LEASE_S = 30.0  # after which a server forgets what nobody closed
STALL_S = 4.0
LIMIT_S = 200.0  # for a generation, whatever happens to it

SERVER = replace(LAB_SERVER, lease_s=LEASE_S)

Ledger = dict[int, tuple[Session[Output], list[int]]]  # by id: positions in order of computation


class Crash(enum.Enum):
    """What may happen to a hop."""

    KILL = "its process is killed"
    VANISH = "its machine is gone without a word"
    CUT_CLIENT = "the link to the client is cut"
    CUT_NEXT = "the link to the next hop is cut (of the last hop: to the one before)"
    STALL_CLIENT = "the link to the client stalls for a while"
    STALL_NEXT = "the link to the next hop stalls for a while"
    RESET = "all its connections are reset"
    FREEZE = "its process is stopped for a while"
    FORGET = "it loses all sessions"
    BREAK_DOWN = "its computation fails from now on"


@dataclass(eq=False)
class FailoverLab:
    """See the module's text. Made by `failover_lab`."""

    swarm: SimSwarm
    ledger: Ledger
    model: SwarmModel = field(init=False)
    client_host: str = field(init=False)
    servers: list[SimServer] = field(default_factory=list)
    known: dict[PeerId, SimServer] = field(default_factory=dict)  # also who is not there any more
    device_s: float = DEVICE_S
    dead: set[str] = field(default_factory=set)  # hosts that do not come back
    faulty: set[PeerId] = field(default_factory=set)  # who was ever made to fail
    generation: Generation | None = None
    replanned: list[tuple[Hop, ...]] = field(default_factory=list)  # what gaps were planned with
    healing: list[asyncio.Task[None]] = field(default_factory=list)
    cuts: list[tuple[str, str]] = field(default_factory=list)  # of lines
    _identities: dict[PeerId, Identity] = field(default_factory=dict)
    _adding: asyncio.Lock = field(default_factory=asyncio.Lock)

    # --- who is who ---------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def hosts(self) -> list[str]:
        return [self.client_host, *(server.host for server in self.servers)]

    @property
    def living(self) -> list[SimServer]:
        return [server for server in self.servers if server.host not in self.dead]

    def server_of(self, peer: PeerId) -> SimServer:
        return self.known[peer]

    def hops(self) -> list[SimServer]:
        """The chain in use, or the one that would be."""
        chain = self.generation._record.chain if self.generation is not None else None
        if chain is not None:
            return [self.server_of(hop.peer) for hop in chain.hops]
        request = self.model.routes.request(len(PROMPT), NUM_TOKENS, 1)
        route = plan(self.model.tracker.view(), request)
        return [self.server_of(hop.peer_id) for hop in route.hops]

    # --- faults -------------------------------------------------------------------------------

    async def add(
        self, span: Span, settings: ServerConfig = SERVER, *, again: SimServer | None = None
    ) -> SimServer:
        """A new server; `again`: one that was killed, with its identity and address."""
        swarm = self.swarm
        async with self._adding:  # what is patched holds for one at a time
            with pytest.MonkeyPatch.context() as patch:
                if again is not None:
                    identity = self._identities[again.server.node.peer_id]
                    config = partial(replace, again.server.node.config, server=settings)
                    patch.setattr(swarm, "_identity", lambda: identity)
                    patch.setattr(swarm, "_config", lambda **_: config())
                else:
                    identity = swarm._identity()
                    patch.setattr(swarm, "_identity", lambda: identity)
                server = await swarm.add_server(span, settings, device_s=self.device_s)
        self._identities[identity.peer_id] = identity
        self.servers.append(server)
        self.known[server.server.node.peer_id] = server
        server.server.node.endpoint._rng = random.Random(len(self.known))  # else from the system
        return server

    def crash(self, kind: Crash, server: SimServer, neighbour: SimServer | None = None) -> None:
        """Do it; what ends by itself is ended by a task of `healing`."""
        internet, host = self.swarm.internet, server.host
        self.faulty.add(server.server.node.peer_id)
        others = [other for other in self.hosts if other != host]
        if kind in (Crash.KILL, Crash.VANISH):
            internet.kill(host, is_silent=kind is Crash.VANISH)
            self.dead.add(host)
        elif kind in (Crash.CUT_CLIENT, Crash.STALL_CLIENT):
            self.cut(host, [self.client_host], None if kind is Crash.CUT_CLIENT else STALL_S)
        elif kind in (Crash.CUT_NEXT, Crash.STALL_NEXT):
            assert neighbour is not None
            self.cut(host, [neighbour.host], None if kind is Crash.CUT_NEXT else STALL_S)
        elif kind is Crash.RESET:
            for pair in [pair for pair in internet._ends if host in pair]:
                for end in internet._live(pair):
                    end.shaped.abort()
        elif kind is Crash.FREEZE:
            self.cut(host, others, STALL_S)
            freeze_device(server, until_s=self.now + STALL_S)
        elif kind is Crash.FORGET:
            forget_sessions(server)
        elif kind is Crash.BREAK_DOWN:
            break_down(server)
            self.dead.add(host)

    def crash_hop(self, kind: Crash, index: int) -> None:
        """The same to a hop by its place."""
        hops = self.hops()
        index = min(index, len(hops) - 1)
        neighbour = hops[index + 1] if index + 1 < len(hops) else hops[index - 1]
        self.crash(kind, hops[index], neighbour)

    def crash_replacement(self, kind: Crash) -> None:
        """The same to who was planned for a gap last, if anybody was."""
        if self.replanned:
            for hop in self.replanned[-1]:
                self.crash(kind, self.server_of(hop.peer))

    def cut(self, host: str, others: Sequence[str], for_s: float | None) -> None:
        for other in others:
            self.swarm.internet.partition(host, other)
            self.cuts.append((host, other))
        self.healing.append(asyncio.ensure_future(self._heal(host, others, for_s)))

    async def _heal(self, host: str, others: Sequence[str], after_s: float | None) -> None:
        try:
            await (asyncio.sleep(after_s) if after_s is not None else asyncio.Event().wait())
        finally:
            for other in others:
                self.swarm.internet.heal(host, other)

    async def replace_dead(self) -> None:
        """A new server for everyone who does not come back."""
        for server in [server for server in self.servers if server.host in self.dead]:
            server.task.cancel()
            self.servers.remove(server)
            self.dead.discard(server.host)
            await self.add(server.server.offer.span)

    async def heal(self) -> None:
        """Undo what can be undone, and end what goes on."""
        for task in self.healing:
            task.cancel()
        await asyncio.gather(*self.healing, return_exceptions=True)
        self.healing.clear()
        for host, other in self.cuts:  # also those whose task was cancelled before it began
            self.swarm.internet.heal(host, other)
        self.cuts.clear()

    # --- generations --------------------------------------------------------------------------

    async def generate(
        self,
        *faults: tuple[int, Callable[[], object]],
        prompts: Sequence[str] = (PROMPT,),
        num_tokens: int = NUM_TOKENS,
        on_event: Callable[[ChainEvent], None] | None = None,
    ) -> tuple[list[GenerationResult], int]:
        """Generate while faults happen at the turns that are given; (results, turns taken).

        The tokens, the caches and the client's memory are checked.
        """
        options = GenerateOptions(max_new_tokens=num_tokens)
        generation = Generation(self.model, self.model._record(prompts, options), None)
        self.generation = generation
        generation.on_event = on_event
        self.replanned.clear()
        with ExitStack() as stack:
            counts = [stack.enter_context(acting_at(turn, act)) for turn, act in faults]
            counts.append(stack.enter_context(acting_at(0, lambda: None)))
            async with asyncio.timeout(LIMIT_S):
                results = await generation.finish()
        for prompt, result in zip(prompts, results, strict=True):
            assert result.token_ids == self.swarm.expected(prompt, num_tokens)
        self.assert_caches_are_right()
        self.assert_client_is_quiet()
        return results, counts[-1].count

    # --- what must hold -----------------------------------------------------------------------

    def assert_caches_are_right(self) -> None:
        """Nothing was computed twice into a cache, and nothing skipped (without rollbacks).

        A copy, which is made to compute a part again, begins where that part does.
        """
        for session, positions in self.ledger.values():
            start = positions[0]
            assert positions == list(range(start, start + len(positions))), str(session.id)

    def assert_client_is_quiet(self) -> None:
        """No journal, no step, no listener and no case is left."""
        model, mover = self.model, self.model._mover
        assert (model._store.memory_bytes, model._store.spilled_bytes) == (0, 0)
        assert not model._exchange._waiters
        assert not model._exchange._listeners
        assert not mover._recovery._cases
        assert not mover._spares
        assert not mover._busy
        assert not mover._leaving

    def assert_only_faulty_are_penalised(self) -> None:
        view = self.model.tracker.view()
        penalised = {s.peer_id for s in view.servers if view.is_penalised(s)}
        assert penalised <= self.faulty, [peer.short for peer in penalised - self.faulty]

    async def assert_nothing_left(self) -> None:
        """Once leases are over, no server that lives holds anything."""
        await self.heal()
        await asyncio.sleep(LEASE_S + 20.0)
        for server in self.living:
            assert_nothing_left(server)


# --- servers that do not do as they should -----------------------------------------------------


def lie(server: SimServer, change: Callable[[Output], Output], *, echoes_only: bool) -> None:
    """Let it send other outputs than it has computed."""
    outbox = server.server.service._outbox
    emit, send = outbox.emit, outbox.send

    def lying_emit(asked: Iterable[Asked], output: Output, deadline: float) -> None:
        emit(asked, change(output), deadline)

    def lying_send(client: PeerId, message: Output | HopFailed, priority: Priority) -> None:
        if isinstance(message, Output) and message.is_echo:
            message = change(message)
        send(client, message, priority)

    if echoes_only:
        outbox.send = lying_send  # type: ignore[method-assign]
    else:
        outbox.emit = lying_emit  # type: ignore[method-assign]


def not_a_number(output: Output) -> Output:
    """The same with NaN in all places."""
    tensor = replace(output.tensor, data=b"\xff" * len(output.tensor.data))
    return replace(output, tensor=tensor)


def too_wide(output: Output) -> Output:
    """The same with twice as many features."""
    values = decode_tensor(output.tensor)
    tensor = encode_tensor(torch.cat([values, values], dim=1), TensorCodec.RAW)
    return replace(output, tensor=tensor)


def refuse_steps(server: SimServer) -> None:
    """Let it answer every step with an error."""

    async def refuse(request: Request[Step]) -> Message:
        raise RemoteFault("out of order, please use another lift")

    server.server.node.endpoint.handle(Step, refuse)


def hang(server: SimServer) -> None:
    """Let its device never come back; its event loop lives."""

    async def run(task: Callable[[], object]) -> object:
        await asyncio.Event().wait()
        return None

    server.server.worker._executor.run = run  # type: ignore[assignment,method-assign]


def freeze_device(server: SimServer, *, until_s: float) -> None:
    """What is computed now, or will be, ends after that time."""
    executor = server.server.worker._executor
    work = executor.run
    loop = asyncio.get_running_loop()

    async def run(task: Callable[[], object]) -> object:
        result = await work(task)
        if loop.time() < until_s:
            await asyncio.sleep(until_s - loop.time())
        return result

    executor.run = run  # type: ignore[assignment,method-assign]


def forget_sessions(server: SimServer) -> None:
    service = server.server.service
    for session in list(service.sessions):
        service._close(session, session.client, session.epoch)


def break_down(server: SimServer) -> None:
    model = server.server.worker._model

    def forward(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the device has fallen off the bus")

    model.forward = forward  # type: ignore[method-assign]


# --- making labs -------------------------------------------------------------------------------


@contextmanager
def recorded() -> Iterator[Ledger]:
    """Notes every position that is computed into a session's cache, at all servers."""
    ledger: Ledger = {}
    on_output = SessionTable.on_output

    def noting(
        self: SessionTable[Output], row: Row, output: Output, now: float, num_bytes: int = 0
    ) -> object:
        session = self.get(row.session)
        if session is not None and session.running.get(row.step) == row:
            noted = ledger.setdefault(id(session), (session, []))
            noted[1].extend(range(row.position, row.position + row.num_tokens))
        return on_output(self, row, output, now, num_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionTable, "on_output", noting)
        yield ledger


@asynccontextmanager
async def failover_lab(
    spans: Sequence[Span] = THIRDS * 2,
    settings: ClientConfig = SETTINGS,
    *,
    device_s: float = DEVICE_S,
    wire_codec: str = "raw",
) -> AsyncIterator[FailoverLab]:
    """A lab with a server for each of the spans."""
    with recorded() as ledger:
        async with SimSwarm(num_blocks=NUM_BLOCKS) as swarm:
            lab = FailoverLab(swarm, ledger, device_s=device_s)
            for span in spans:
                await lab.add(span)
            lab.client_host = swarm.next_host
            async with swarm.client(settings, wire_codec=wire_codec) as model:
                model.endpoint._rng = random.Random(0)
                lab.model = model
                _note_plans(lab)
                try:
                    yield lab
                finally:
                    await lab.heal()


def _note_plans(lab: FailoverLab) -> None:
    replan = lab.model.routes.replan

    async def noting(gap: Gap) -> tuple[Hop, ...]:
        hops = await replan(gap)
        lab.replanned.append(hops)
        return hops

    lab.model.routes.replan = noting  # type: ignore[method-assign]


def with_lab(
    use: Callable[[FailoverLab], Awaitable[None]],
    spans: Sequence[Span] = THIRDS * 2,
    settings: ClientConfig = SETTINGS,
    *,
    device_s: float = DEVICE_S,
    wire_codec: str = "raw",
) -> None:
    """Run `use` in a lab, and see that nothing is left on its servers afterwards."""

    async def main() -> None:
        async with failover_lab(spans, settings, device_s=device_s, wire_codec=wire_codec) as lab:
            await use(lab)
            await lab.assert_nothing_left()

    run(main())

"""Chains: routes in use, and the steps that go through them.

A `Chain` opens sessions on every hop, carries steps through the hops, and closes what it opened,
whatever cancels it meanwhile. Several sequences of one client go through the chain in the same
messages.

Hops push to each other where they can: the client hands a step to the first hop of a *segment* and
gets the output of its last. Where one hop cannot reach the next, a segment ends, and the client
relays that link: it hands on the output as the bytes that came. Either way it sees every hop's
output, as an answer or as an echo, and keeps it in the next hop's journal.

A step that fails is not lost. The chain asks for its `repair` (`p2pllm.client.recovery`), which
gives it other hops or other links, and sends the step again under its old number. Only a step that
is cancelled, or that cannot be repaired, is given up: its sequences continue under a higher epoch
from where they stood before it.
"""

import asyncio
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from p2pllm.client.exchange import Exchange, Hedge, Interrupted, Part
from p2pllm.client.journal import JournalStore
from p2pllm.client.prefixes import PrefixKeys, num_shareable
from p2pllm.client.results import ChainEvent
from p2pllm.client.retry import LatencyWindow
from p2pllm.client.state import (
    Flight,
    Hop,
    SessionState,
    WireFormat,
    latest_known_hop,
    part_of,
    set_starts,
)
from p2pllm.config import ClientConfig
from p2pllm.errors import (
    Busy,
    CacheFull,
    CodecError,
    ConfigError,
    DeadlineExceeded,
    OpenFailed,
    P2PLLMError,
    RemoteProtocolError,
    StepFailed,
    TransportError,
)
from p2pllm.ids import SESSION_ID_BYTES, ModelId, PeerId, SessionId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.routing.planner import Route, RouteRequest
from p2pllm.swarm.timings import SegmentStep
from p2pllm.tasks import task_group, to_the_end, together
from p2pllm.wire.messages import (
    PREFIX_TOKENS,
    Close,
    Echo,
    Fork,
    HopTiming,
    Message,
    Open,
    Opened,
    Output,
    Rewire,
    Row,
    Step,
)
from p2pllm.wire.rows import can_join, is_finite, joined, rows_of
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

PUSH_TOKEN_BYTES = 16
CLOSE_TIMEOUT_S = 2.0
BUSY_PAUSE_S = 0.05  # at least, before a full queue is asked again
MAX_BUSY_PAUSE_S = 2.0  # whatever it says
FORK_WAIT_S = 10.0  # for a hop to finish what it computes, chunks of a prompt perhaps
REPLAY_STEP_S = 20.0  # for a chunk of a replay, and those before it; then others are tried
MAX_HEDGED_TOKENS = 8  # per sequence; longer steps differ too much for "slower than usual"

Repack = Callable[[Sequence[Row], Sequence[Part]], Awaitable[WireTensor]]


@dataclass(frozen=True, slots=True)
class Sharing:
    """What it takes to begin with what hops hold of a prompt.

    `keys` name its pages. `embed` gives what the first hop would be sent of some tokens.
    """

    keys: PrefixKeys
    embed: Callable[[Sequence[int]], Awaitable[WireTensor]]


@dataclass
class Prospect:
    """What a chain was planned for: `route`, as it was priced for `request`.

    `look_at`: after so many steps it is compared with what they take.
    """

    route: Route
    request: RouteRequest
    look_at: int = 0


class Repairer(Protocol):
    """What a chain asks when a step has failed: `p2pllm.client.recovery`."""

    async def repair(self, chain: "Chain", failure: P2PLLMError) -> None:
        """Make the chain whole again; raises what is to be told if that cannot be."""
        ...

    async def prepare_hedge(self, chain: "Chain", index: int) -> None:
        """Prepare another server for what hop `index` is slow at; returns when it could take
        over, and never if there is none."""
        ...

    def on_progress(self, chain: "Chain") -> None:
        """A step is through."""
        ...

    def on_leaving(self, chain: "Chain", peer: PeerId, deadline_s: float) -> None:
        """A hop is about to go away."""
        ...

    def on_closed(self, chain: "Chain") -> None:
        """Sequences were closed, perhaps the last ones."""
        ...


@dataclass(eq=False)
class Chain:
    """A route in use: hops in order that cover all blocks.

    `repack` joins the parts of an answer that came in several messages, in the order of rows.
    `on_segment` is told what each step took in each segment. `version` rises with every repair.
    """

    endpoint: Endpoint
    exchange: Exchange
    config: ClientConfig
    model: ModelId
    hops: tuple[Hop, ...]
    width: int  # of a hidden state
    wire: WireFormat
    repack: Repack
    store: JournalStore
    repairer: Repairer
    on_segment: Callable[[SegmentStep], None] = lambda _: None
    on_event: Callable[[ChainEvent], None] = lambda _: None
    prospect: Prospect | None = None  # what was planned for it
    sharing: Sharing | None = None  # None: every sequence is computed from its beginning
    version: int = 0
    states: dict[SessionId, SessionState] = field(default_factory=dict)
    broken_links: set[tuple[PeerId, PeerId]] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while the chain is repaired
    _gave_up: tuple[int, P2PLLMError] | None = None  # version that could not be repaired, and why
    step_s: LatencyWindow = field(default_factory=LatencyWindow)

    def index_of(self, peer: PeerId) -> int | None:
        """Which hop a peer is, if it is one."""
        return next((i for i, hop in enumerate(self.hops) if hop.peer == peer), None)

    def is_relayed(self, index: int) -> bool:
        """Does this hop's output come back to us, and not go to the next one?"""
        if index + 1 >= len(self.hops):
            return True
        link = (self.hops[index].peer, self.hops[index + 1].peer)
        return not self.hops[index + 1].record or link in self.broken_links

    @property
    def segments(self) -> list[range]:
        """The hops' indices, cut where the client relays."""
        return self.segments_from(0)

    def segments_from(self, first: int) -> list[range]:
        """The segments of the hops from `first` on."""
        segments, start = [], first
        for index in range(first, len(self.hops)):
            if self.is_relayed(index):
                segments.append(range(start, index + 1))
                start = index + 1
        return segments

    # --- sessions --------------------------------------------------------------------------

    async def open(
        self,
        max_tokens: Sequence[int],
        *,
        wait_s: float = 0.0,
        prompts: Sequence[Sequence[int]] = (),
    ) -> list[SessionState]:
        """Reserve room for sequences of these lengths on every hop, all at once.

        Servers without free cache may let us wait for `wait_s`. What all of them hold of a prompt
        already, of other sequences of ours, the state begins with; the caller sends the rest of it
        next. Raises OpenFailed, with nothing left open.
        """
        opened: list[SessionState] = []

        async def open_one(count: int, prompt: Sequence[int]) -> SessionState:
            state = self._new_state(count)
            opened.append(state)
            keys = self._promise(state, prompt)
            version, held = self.version, [0] * len(self.hops)

            async def open_hop(index: int) -> None:
                reply = await self.open_at(state, index, wait_s=wait_s, prefix_keys=keys[index])
                held[index] = reply.position

            failures = await self.at_hops(range(len(self.hops)), open_hop)
            if failures:
                raise OpenFailed(failures)
            await self._begin_with(state, prompt, min(held), version)
            return state

        prompts = prompts or [()] * len(max_tokens)
        try:
            states = await together(map(open_one, max_tokens, prompts))
            await self.relay_broken_links(states)
        except BaseException:
            await self.close(opened)
            raise
        return states

    def _new_state(self, max_tokens: int) -> SessionState:
        journals = [self.store.journal() for _ in self.hops]
        state = SessionState(
            SessionId(os.urandom(SESSION_ID_BYTES)), max_tokens, journals, new_tokens(self.hops)
        )
        self._keep(state)
        return state

    def _keep(self, state: SessionState) -> None:
        self.states[state.id] = state
        self.exchange.listen(state.id, self)

    async def open_at(
        self,
        state: SessionState,
        index: int,
        *,
        wait_s: float = 0.0,
        prefix_keys: tuple[bytes, ...] = (),
    ) -> Opened:
        """Open a session at a hop, or take it over there with what the state says now.

        A link that turns out to be broken is noted. Raises RequestFailed or TransportError.
        """
        hop, request = self.hops[index], self._opening_at(state, index)
        request = replace(request, wait_s=wait_s, prefix_keys=prefix_keys)
        timeout_s = self.config.open_timeout_s + wait_s
        opened = await self.ask(hop.peer, request, timeout_s=timeout_s)
        if request.next_hop and opened.next_rtt_s < 0:
            self.broken_links.add((hop.peer, self.hops[index + 1].peer))
        return opened

    def _opening_at(self, state: SessionState, index: int) -> Open:
        hop, is_pushing = self.hops[index], not self.is_relayed(index)
        return replace(
            self.opening(state, hop, state.epoch, state.push_tokens[index]),
            next_hop=self.hops[index + 1].record if is_pushing else b"",
            next_token=state.push_tokens[index + 1] if is_pushing else b"",
        )

    def opening(self, state: SessionState, hop: Hop, epoch: int, push_token: bytes) -> Open:
        """What opens a sequence at a hop, or takes it over; its outputs come back to us."""
        return Open(
            session=state.id,
            epoch=epoch,
            span=hop.span,
            max_tokens=state.max_tokens,
            model=self.model,
            numerics=hop.numerics,
            push_token=push_token,
            client=self.endpoint.peer_id,
            codec=self.wire.codec,
            is_compressed=self.wire.is_compressed,
            echo=Echo.ALL,
        )

    # --- prefixes that hops hold -------------------------------------------------------------

    async def share(self, state: SessionState, prompt: Sequence[int]) -> None:
        """Ask the hops what they hold by now of the prompt that is to be sent next.

        Nothing is asked once a step was sent. A hop that does not answer, and a chain that is
        repaired meanwhile, leave the sequence as it is: to share is never necessary.
        """
        keys = [] if state.has_begun else self._promise(state, prompt)
        if not any(keys):
            return
        version, held = self.version, [state.position] * len(self.hops)

        async def ask(index: int) -> None:
            request = replace(self._opening_at(state, index), prefix_keys=keys[index])
            held[index] = (await self.ask(self.hops[index].peer, request)).position

        try:
            await self.at_hops(range(len(self.hops)), ask)
            await self._begin_with(state, prompt, min(held), version)
        except BaseException:
            state.break_promise()
            raise

    def _promise(self, state: SessionState, prompt: Sequence[int]) -> list[tuple[bytes, ...]]:
        """The keys for each hop of what the sequence is about to begin with."""
        if self.sharing is None:
            return [()] * len(self.hops)
        state.promise(num_shareable(prompt))
        return self.sharing.keys.of(prompt, self.wire.codec, self.hops)

    async def _begin_with(
        self, state: SessionState, prompt: Sequence[int], num_held: int, version: int
    ) -> None:
        """Skip what all hops hold of a prompt, unless the chain has been repaired since."""
        stop = min(num_held, state.num_promised) // PREFIX_TOKENS * PREFIX_TOKENS
        if self.sharing is None or stop <= state.position:
            return
        tensor = await self.sharing.embed(prompt[state.position : stop])
        if self.version == version and not self.lock.locked():
            state.assume(tensor)

    async def relay_broken_links(self, states: Iterable[SessionState]) -> None:
        """Where a hop cannot reach the next one, all sequences come back to us from there.

        Raises OpenFailed.
        """
        states = list(states)
        links = [(a.peer, b.peer) for a, b in zip(self.hops, self.hops[1:], strict=False)]
        cuts = [index for index, link in enumerate(links) if link in self.broken_links]

        async def cut(index: int) -> None:
            hop = self.hops[index]
            logger.info("link relayed after=%s span=%s", hop.peer.short, hop.span)
            await together(self.ask(hop.peer, Rewire(state.id, state.epoch)) for state in states)

        failures = await self.at_hops(cuts, cut)
        if failures:
            raise OpenFailed(failures)

    async def fork(self, source: SessionState) -> SessionState:
        """Copy a sequence at every hop; it must be between steps. Raises OpenFailed."""
        while True:
            async with self.lock:  # a sequence more, in the middle of a repair, would be left out
                version = self.version
                try:
                    return await self._fork(source)
                except OpenFailed as exc:
                    failure = exc
            if all(isinstance(each, CacheFull | Busy) for each in failure.failures.values()):
                raise failure
            await self._mend(version, failure)

    async def _fork(self, source: SessionState) -> SessionState:
        state = replace(
            source,
            id=SessionId(os.urandom(SESSION_ID_BYTES)),
            journals=[journal.copy() for journal in source.journals],
            push_tokens=new_tokens(self.hops),
            num_promised=0,
            copies=[],
            flights={},
            _rows={},
            _echoing=OrderedDict(),
        )
        self._keep(state)

        async def fork_at(index: int) -> None:
            following = b"" if self.is_relayed(index) else state.push_tokens[index + 1]
            token = state.push_tokens[index]
            request = Fork(source.id, source.epoch, state.id, source.position, token, following)
            await self.fork_at(self.hops[index].peer, request)

        try:
            failures = await self.at_hops(range(len(self.hops)), fork_at)
            if failures:
                raise OpenFailed(failures)
        except BaseException:
            await self.close([state])
            raise
        return state

    async def fork_at(self, peer: PeerId, request: Fork) -> None:
        """Copy a session at one hop. Raises RequestFailed or TransportError.

        A hop that still computes what was given up is busy for so long, and is asked again.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FORK_WAIT_S
        while True:
            try:
                await self.ask(peer, request)
            except Busy as exc:
                if loop.time() >= deadline:
                    raise
                await asyncio.sleep(_pause_s(exc))
            else:
                return

    async def close(self, states: Sequence[SessionState]) -> None:
        """Free sequences at every hop, also if we are cancelled meanwhile.

        A hop that cannot be reached forgets them by itself.
        """
        for state in states:
            if self.states.pop(state.id, None) is not None:
                self.exchange.forget(state.id)
                state.close()
        if states:
            ids = tuple(state.id for state in states)
            epoch = max(state.epoch for state in states)
            await to_the_end(self.close_at({hop.peer for hop in self.hops}, ids, epoch))
        self.repairer.on_closed(self)

    async def close_at(
        self, peers: Iterable[PeerId], sessions: Sequence[SessionId], epoch: int
    ) -> None:
        """Tell some peers that sequences are over; what they say to that does not matter."""
        request = Close(tuple(sessions), epoch)

        async def close_one(peer: PeerId) -> None:
            try:
                await self.endpoint.request(peer, request, timeout_s=CLOSE_TIMEOUT_S)
            except P2PLLMError as exc:
                logger.debug("session not closed peer=%s reason=%s", peer.short, exc)

        await together(map(close_one, peers))

    # --- steps -----------------------------------------------------------------------------

    async def step(
        self,
        states: Sequence[SessionState],
        counts: Sequence[int],
        tensor: WireTensor,
        tail: int,
        *,
        priority: Priority = Priority.DECODE,
    ) -> WireTensor:
        """Send the next tokens of some sequences through all hops.

        `counts` says how many tokens each has; `tensor` packs their hidden states in that order,
        (sum of counts, D). Returns the last hop's, of the last `tail` tokens of each (0: all).
        Raises what the repair of the chain raised, or ConfigError for more tokens than a sequence
        has room for; the sequences are then where they were before.
        """
        for state, count in zip(states, counts, strict=True):
            if state.position + count > state.max_tokens:
                raise ConfigError(
                    f"the session has room for {state.max_tokens} tokens and holds "
                    f"{state.position}; {count} more do not fit"
                )
        rows = tuple(
            state.next_row(count, tail) for state, count in zip(states, counts, strict=True)
        )
        flight = Flight(rows, tensor)
        for state, row in zip(states, rows, strict=True):
            state.depart(flight, row)
        try:
            output = await self._fly(flight, priority)
        except BaseException:
            for state, row in zip(states, rows, strict=True):
                state.give_up(row)
            raise
        for state, row in zip(states, rows, strict=True):
            state.arrive(row)
        self.repairer.on_progress(self)
        return output

    async def _fly(self, flight: Flight, priority: Priority) -> WireTensor:
        """Send a step until it is through, over whatever hops the chain has by then."""
        while True:
            if self.lock.locked():
                async with self.lock:
                    pass  # the repair is done
            version = self.version
            try:
                return await self._attempt(flight, version, priority)
            except (StepFailed, Interrupted, TransportError) as exc:
                await self._mend(version, exc)

    async def _mend(self, version: int, failure: P2PLLMError) -> None:
        """Have the chain repaired, once for all that wait for it."""
        async with self.lock:
            if self._gave_up is not None and self._gave_up[0] == version:
                raise self._gave_up[1]
            if self.version != version:
                return
            self.interrupt()
            try:
                await self.repairer.repair(self, failure)
            except P2PLLMError as exc:
                self._gave_up = (version, exc)
                raise
            finally:
                self.version += 1

    async def change(self, version: int, action: Callable[[], Awaitable[object]]) -> None:
        """Do something to a chain that works: no step is under way meanwhile. Raises
        Interrupted if it is not what it was at `version`."""
        async with self.lock:
            if self.version != version:
                raise Interrupted("the chain was repaired meanwhile")
            self.interrupt()
            try:
                await action()
            finally:
                self.version += 1

    def interrupt(self) -> None:
        """Let nobody wait for steps any longer; note from which hop on they must be sent again."""
        flights = self.flights()
        set_starts(
            [(each, [self.states[row.session] for row in each.rows]) for each in flights],
            len(self.hops),
        )
        for flight in flights:
            flight.was_interrupted = True
            self._end_wait(flight, Interrupted("the chain is being repaired"))

    def flights(self) -> list[Flight]:
        """All steps under way, each once."""
        flights = (flight for state in self.states.values() for flight in state.flights.values())
        return list(dict.fromkeys(flights))

    def _end_wait(self, flight: Flight, error: P2PLLMError) -> None:
        self.exchange.fail([(row.session, row.step) for row in flight.rows], error)

    async def _attempt(self, flight: Flight, version: int, priority: Priority) -> WireTensor:
        """Send a step once, from the hop that it has come to."""
        first, tensor = self._input_of(flight)
        flight.start = first
        rows = [self.states[row.session].current(row) for row in flight.rows]
        started = asyncio.get_running_loop().time()
        for segment in self.segments_from(first):
            is_last = segment.stop == len(self.hops)
            asked = rows if is_last else _whole(rows)
            hedge = self._hedge_for(flight) if first == 0 else None
            tensor = await self._step_through(
                segment, asked, tensor, flight, version, priority, hedge
            )
            self._check(version)
            if not is_last:
                self._note(segment.stop, rows, tensor)
        if first == 0 and flight.num_tokens <= MAX_HEDGED_TOKENS * len(rows):
            self.step_s.add(asyncio.get_running_loop().time() - started)
        return tensor

    def _check(self, version: int) -> None:
        """Raise Interrupted if the chain is not what it was."""
        if self.version != version or self.lock.locked():
            raise Interrupted("the chain is being repaired")

    def _input_of(self, flight: Flight) -> tuple[int, WireTensor]:
        """The hop to send a step to, and its input there, as it was sent before."""
        for hop in range(flight.start, 0, -1):
            parts = [
                part
                for row in flight.rows
                for part in self.states[row.session]
                .journals[hop]
                .read(row.position, row.position + row.num_tokens, row.num_tokens)
            ]
            if all(can_join(parts[0], part) for part in parts[1:]):
                return hop, joined(parts)
        return 0, flight.tensor

    def _hedge_for(self, flight: Flight) -> Hedge | None:
        """When a decode step counts as too slow to be waited for, and what to do then."""
        after_s = self.step_s.hedge_after_s()
        if after_s is None or flight.num_tokens > MAX_HEDGED_TOKENS * len(flight.rows):
            return None

        async def prepare() -> None:
            pairs = [(self.states[row.session], row) for row in flight.rows]
            slowest = latest_known_hop(pairs, len(self.hops))
            await self.repairer.prepare_hedge(self, slowest)

        return Hedge(after_s, prepare)

    def _note(self, hop: int, rows: Sequence[Row], tensor: WireTensor) -> None:
        """Keep the input of a hop in the journals."""
        for row in rows:
            self.states[row.session].journals[hop].put(row.position, part_of(rows, tensor, row))

    def on_echo(self, peer: PeerId, output: Output) -> None:
        """A hop has passed this on: the next hop's input (`SessionListener`)."""
        index = self.index_of(peer)
        if index is None or index + 1 >= len(self.hops):
            return  # of a hop that was replaced
        num_tokens = sum(row.num_tokens for row in output.rows)
        shape = output.tensor.header.shape
        try:
            is_good = shape == (num_tokens, self.width) and is_finite(output.tensor)
        except CodecError:
            is_good = False
        if not is_good:
            self._blame(peer, "it has passed on something that is no hidden state")
            return
        start = 0
        for row in output.rows:
            stop = start + row.num_tokens
            state = self.states.get(row.session)
            if state is not None:
                whole = len(output.rows) == 1
                state.on_echo(
                    index, row, output.tensor if whole else rows_of(output.tensor, start, stop)
                )
            start = stop

    def on_leaving(self, peer: PeerId, deadline_s: float) -> None:
        """A hop is about to go away (`SessionListener`)."""
        if self.index_of(peer) is not None:
            self.repairer.on_leaving(self, peer, deadline_s)

    def _blame(self, peer: PeerId, text: str) -> None:
        for flight in self.flights():
            self._end_wait(flight, StepFailed(peer, RemoteProtocolError(f"{peer.short}: {text}")))

    async def _step_through(
        self,
        segment: range,
        rows: Sequence[Row],
        tensor: WireTensor,
        flight: Flight,
        version: int,
        priority: Priority,
        hedge: Hedge | None,
    ) -> WireTensor:
        """One segment's part. A hop whose queue is full is asked again when it says."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.step_timeout_s
        peers = [self.hops[index].peer for index in segment]
        while True:
            started = loop.time()
            budget_s = deadline - started
            step = Step(tuple(rows), tensor, budget_s=budget_s)
            try:
                parts = await self.exchange.step(
                    peers, step, timeout_s=budget_s, priority=priority, hedge=hedge
                )
            except StepFailed as exc:
                if not isinstance(exc.cause, Busy):
                    raise
                pause_s = _pause_s(exc.cause)
                if started + pause_s >= deadline:
                    raise
                await asyncio.sleep(pause_s)
                self._check(version)
            else:
                self._measure(segment, step, parts, started, is_replay=flight.was_interrupted)
                return await self._joined(peers[-1], step, parts)

    async def _joined(self, peer: PeerId, step: Step, parts: Sequence[Part]) -> WireTensor:
        """The answer in the order of the step's rows. Raises StepFailed if it cannot be one."""
        asked = {(row.session, row.step): row for row in step.rows}
        width = step.tensor.header.shape[1:]
        trimmed: list[Part] = []
        for part in parts:
            wanted = [asked[row.session, row.step] for row in part.rows]
            try:
                tensor = _trimmed(part, wanted, width)
            except CodecError as exc:
                cause = RemoteProtocolError(f"{peer.short} answered wrongly: {exc}")
                raise StepFailed(peer, cause) from exc
            trimmed.append(Part(tuple(wanted), tensor, part.timings))
        if len(trimmed) == 1 and trimmed[0].rows == step.rows:
            return trimmed[0].tensor
        return await self.repack(step.rows, trimmed)

    def _measure(
        self, segment: range, step: Step, parts: Sequence[Part], started: float, *, is_replay: bool
    ) -> None:
        """Tell what a step took, and what the hops said of their parts."""
        hops, row = [self.hops[index] for index in segment], step.rows[0]
        self.on_segment(
            SegmentStep(
                peers=tuple(hop.peer for hop in hops),
                spans=tuple(hop.span for hop in hops),
                batch=len(step.rows),
                num_tokens=sum(row.num_tokens for row in step.rows),
                sent_at=started,
                received_at=asyncio.get_running_loop().time(),
                timings=max((part.timings for part in parts), key=_busy_s),
                sent_bytes=len(step.tensor.data),
                received_bytes=sum(len(part.tensor.data) for part in parts),
                rtt_s=self.endpoint.rtt_s(hops[0].peer) or 0.0,
                rate_bytes_s=self.endpoint.rate_bytes_s(hops[0].peer) or 0.0,
                first_hop=segment.start,
                position=row.position,
                epoch=row.epoch,
                is_replay=is_replay,
                is_relayed=segment.stop < len(self.hops),
            )
        )

    async def step_at(self, peer: PeerId, row: Row, tensor: WireTensor) -> WireTensor:
        """One row at one hop that answers us, outside of the chain. Raises StepFailed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(REPLAY_STEP_S, self.config.step_timeout_s)
        while True:
            budget_s = max(0.001, deadline - loop.time())
            step = Step((row,), tensor, budget_s=budget_s)
            try:
                parts = await self.exchange.step(
                    [peer], step, timeout_s=budget_s, priority=Priority.PREFILL
                )
            except StepFailed as exc:
                if not isinstance(exc.cause, Busy) or loop.time() >= deadline:
                    raise
                await asyncio.sleep(_pause_s(exc.cause))
            except DeadlineExceeded as exc:
                raise StepFailed(peer, exc) from exc
            else:
                return await self._joined(peer, step, parts)

    # --- asking hops -----------------------------------------------------------------------

    async def at_hops(
        self, indices: Iterable[int], action: Callable[[int], Awaitable[object]]
    ) -> dict[PeerId, P2PLLMError]:
        """Do it at some hops at once; returns the errors by peer."""
        indices = list(indices)
        hops = [self.hops[index] for index in indices]
        results = await asyncio.gather(*map(action, indices), return_exceptions=True)
        failures: dict[PeerId, P2PLLMError] = {}
        for hop, result in zip(hops, results, strict=True):
            if isinstance(result, P2PLLMError):
                logger.info(
                    "hop refused peer=%s span=%s error=%s", hop.peer.short, hop.span, result
                )
                failures[hop.peer] = result
            elif isinstance(result, BaseException):
                raise result
        return failures

    async def ask(
        self, peer: PeerId, request: Message, *, timeout_s: float | None = None
    ) -> Opened:
        """Ask a hop about a session; ends at once if the hop is lost. Raises RequestFailed,
        RemoteProtocolError or TransportError."""
        timeout_s = self.config.open_timeout_s if timeout_s is None else timeout_s
        lost: asyncio.Future[TransportError] = asyncio.get_running_loop().create_future()

        def on_lost(exc: TransportError) -> None:
            if not lost.done():
                lost.set_result(exc)

        async def end_if_lost() -> None:
            raise await lost

        with self.endpoint.watch(peer, on_lost):
            async with task_group() as tasks:
                ending = tasks.create_task(end_if_lost())
                reply = await self.endpoint.request(peer, request, timeout_s=timeout_s)
                ending.cancel()
        if not isinstance(reply, Opened):
            raise RemoteProtocolError(f"{peer.short} answered with {type(reply).__name__}")
        return reply


def new_tokens(hops: Sequence[Hop]) -> list[bytes]:
    """Push tokens for a session at some hops."""
    return [os.urandom(PUSH_TOKEN_BYTES) for _ in hops]


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rows with all their outputs asked for: the next hop needs every token."""
    return [replace(row, tail=0) if row.tail else row for row in rows]


def _trimmed(part: Part, wanted: Sequence[Row], width: tuple[int, ...]) -> WireTensor:
    """The outputs that were asked for. A step may have been computed for another wiring of the
    hops, and hold more. Raises CodecError if it is not what was asked for at all."""
    for row, answered in zip(wanted, part.rows, strict=True):
        if (row.position, row.num_tokens) != (answered.position, answered.num_tokens):
            raise CodecError("another step")
    shape = part.tensor.header.shape
    if len(shape) != 2:
        raise CodecError(f"a tensor of shape {shape}")
    num_rows = shape[0]
    counts = [row.num_outputs for row in part.rows]
    if num_rows != sum(counts):
        counts = [row.num_tokens for row in part.rows]
    too_few = any(count < row.num_outputs for count, row in zip(counts, wanted, strict=True))
    if shape != (sum(counts), *width) or too_few:
        raise CodecError(f"a tensor of shape {shape}")
    if not is_finite(part.tensor):
        raise CodecError("NaN or infinity")
    if num_rows == sum(row.num_outputs for row in wanted):
        return part.tensor
    ends = itertools.accumulate(counts)
    return joined(
        [
            rows_of(part.tensor, end - row.num_outputs, end)
            for end, row in zip(ends, wanted, strict=True)
        ]
    )


def _pause_s(busy: Busy) -> float:
    """How long to leave a busy hop alone."""
    return min(max(busy.retry_after_s, BUSY_PAUSE_S), MAX_BUSY_PAUSE_S)


def _busy_s(timings: Sequence[HopTiming]) -> float:
    """How long the hops had a step, together."""
    return sum(timing.queue_s + timing.compute_s for timing in timings)

"""A model that the swarm serves, as the library's user holds it.

    model = await swarm.model()
    async for piece in model.generate("The capital of France is", max_new_tokens=32):
        print(piece, end="")

The client keeps the tokenizer, the embeddings and the head; hidden states go through the servers
of a route. A route is planned for each generation on the swarm as it is then. Where a server has
no cache left, the client waits as long as it says, or goes elsewhere if that is sooner.
"""

import asyncio
import itertools
import logging
import operator
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from torch import Tensor

from p2pllm.client.compute import ClientCompute, Drawing
from p2pllm.client.exchange import Exchange
from p2pllm.client.generate import Progress, generate, prefill
from p2pllm.client.results import GenerationResult, HopReport
from p2pllm.client.sequence import Detokenizer
from p2pllm.client.sequence import Sequence as TextSequence
from p2pllm.client.session import Chain, Hop, HopMeasure, SessionState, WireFormat
from p2pllm.config import ClientConfig
from p2pllm.errors import (
    Busy,
    CacheFull,
    ConfigError,
    LocalProtocolError,
    LookupFailed,
    NoRoute,
    OpenFailed,
    P2PLLMError,
)
from p2pllm.ids import ModelId, PeerId
from p2pllm.metrics import MovingAverage
from p2pllm.model.config import ModelConfig
from p2pllm.model.sampling import SamplingParams
from p2pllm.model.tensor_io import choose_codec
from p2pllm.net.endpoint import Endpoint
from p2pllm.routing.planner import Route, RouteRequest, plan
from p2pllm.swarm.tracker import SwarmTracker
from p2pllm.swarm.view import SwarmView
from p2pllm.wire.messages import MAX_ITEMS
from p2pllm.wire.records import Record
from p2pllm.wire.tensors import DType, TensorCodec

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # text, token ids, or chat messages

DEFAULT_SESSION_TOKENS = 2048
RECORD_FRESH_S = 60.0  # a peer record lives ten minutes, and addresses change seldom
MAX_RECORDS = 1024
RETRY_S = 0.1  # before trying elsewhere, doubled each time
MAX_RETRY_S = 2.0
MISSING_BLOCKS_POLL_S = 1.0  # how often the DHT is asked again while blocks are missing


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer: `p2pllm.model.tokenizer`, or a stand-in."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Any of these ends a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        ...

    def stream(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A detokenizer for what follows a prompt."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to generate; the defaults are greedy.

    `seed` None: a random one. `stop`: a string, or several, that ends the text and is not included
    in it. `ignore_eos`: the tokens that end a text are never chosen.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens must be at least 1")
        if not all(self.stops):
            raise ConfigError("a stop string must not be empty")

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Session:
    """One sequence's cache along a route, to step through by hand. Made by `SwarmModel.session`.

    It may be given to `SwarmModel.generate`, which then computes only what the session does not
    hold yet: that is how a conversation goes on.
    """

    def __init__(self, model: "SwarmModel", chain: Chain, state: SessionState) -> None:
        self._model = model
        self.chain = chain
        self.state = state
        self.token_ids: list[int] = []  # what the cache holds, in order

    @property
    def position(self) -> int:
        """How many tokens the session holds."""
        return self.state.position

    @property
    def max_tokens(self) -> int:
        """How many it can hold."""
        return self.state.max_tokens

    async def step(self, token_ids: Sequence[int]) -> Tensor:
        """Send the next tokens; returns their logits (T, V), float32.

        After an error, or when cancelled, the session is where it was before.
        """
        token_ids = self._model.encode(token_ids)
        before = self.position
        try:
            outputs = await prefill(
                self.chain,
                self._model.compute,
                self.state,
                token_ids,
                tail=0,
                chunk_tokens=self._model.settings.prefill_chunk_tokens,
            )
            logits = await self._model.compute.logits(outputs)
        except BaseException:
            self.rollback(before)
            raise
        self.token_ids += token_ids
        return logits

    def rollback(self, position: int) -> None:
        """Forget all tokens from `position` on; costs nothing until the next step."""
        if not 0 <= position <= self.state.position:
            raise LocalProtocolError(f"position {position} of a session of {self.position} tokens")
        self.state.position = position
        del self.token_ids[position:]

    async def fork(self) -> "Session":
        """A second session with the same tokens; the caller closes it."""
        forked = Session(self._model, self.chain, await self.chain.fork(self.state))
        forked.token_ids = list(self.token_ids)
        return forked

    async def close(self) -> None:
        """Free the servers' memory."""
        await self.chain.close([self.state])


class Generation:
    """Texts being generated: iterate for the pieces of the first (`async for piece in …`).

    Leaving the loop early and `aclose` free the servers' memory at once.
    """

    def __init__(self, model: "SwarmModel", record: "GenerationRecord", session: Session | None):
        self._record = record
        # It must not refer to us: then it ends, and frees the servers, when we are dropped.
        self._steps = model.run(record, session)
        self._endpoint = model.endpoint

    @property
    def route(self) -> Route | None:
        """The route that was planned, once it is; None with a session, which has its own."""
        return self._record.route

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while True:
            pieces = await anext(self._steps)
            if pieces.get(0):
                return pieces[0]

    async def finish(self) -> list[GenerationResult]:
        """Generate to the end; the results in the order of the prompts."""
        async for _ in self._steps:
            pass
        return self.results()

    async def aclose(self) -> None:
        """Stop here."""
        await self._steps.aclose()

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def results(self) -> list[GenerationResult]:
        """What there is so far, finished or not."""
        return [self._result(drawing.sequence) for drawing in self._record.drawings]

    def _result(self, sequence: TextSequence) -> GenerationResult:
        progress, chain = self._record.progress, self._record.chain
        tpot_s = progress.tpot_s if progress else None
        return GenerationResult(
            text=sequence.text,
            token_ids=tuple(sequence.token_ids),
            prompt_token_ids=sequence.prompt_ids,
            finish=sequence.finish,
            ttft_s=progress.ttft_s if progress else None,
            tpot_s=tpot_s,
            tokens_per_s=1 / tpot_s if tpot_s else None,
            own_s_per_token=progress.own_s_per_step if progress else None,
            route=tuple(map(self._report, chain.hops)) if chain else (),
        )

    def _report(self, hop: Hop) -> HopReport:
        averages = self._record.measures.get(hop.peer, HopAverages())
        return HopReport(
            peer_id=hop.peer,
            blocks=hop.span,
            rtt_s=self._endpoint.rtt_s(hop.peer),
            queue_s=averages.queue_s.get(0.0),
            compute_s=averages.compute_s.get(0.0),
            bytes_per_token=averages.bytes_per_token.get(0.0),
        )


@dataclass(eq=False)
class GenerationRecord:
    """What a generation is to do, and what came of it so far."""

    drawings: tuple[Drawing, ...]
    params: SamplingParams
    chain: Chain | None = None
    progress: Progress | None = None
    route: Route | None = None
    measures: "dict[PeerId, HopAverages]" = field(default_factory=dict)

    def on_measure(self, measure: HopMeasure) -> None:
        """A step came back from a hop; decode steps count for the report."""
        if measure.num_tokens > len(self.drawings):
            return
        averages = self.measures.setdefault(measure.peer, HopAverages())
        averages.queue_s.add(measure.timing.queue_s)
        averages.compute_s.add(measure.timing.compute_s)
        averages.bytes_per_token.add(measure.num_bytes / measure.num_tokens)


class HopAverages:
    """Moving averages of one hop's decode steps."""

    def __init__(self) -> None:
        self.queue_s = MovingAverage()
        self.compute_s = MovingAverage()
        self.bytes_per_token = MovingAverage()


class SwarmModel:
    """A model served by the swarm. Made by `Swarm.model`."""

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        exchange: Exchange,
        find_record: Callable[[PeerId], Awaitable[Record | None]],
        model_id: ModelId,
        config: ModelConfig,
        tokenizer: TextTokenizer,
        compute: ClientCompute,
        tracker: SwarmTracker,
        settings: ClientConfig,
        wire_dtype: DType,
        rng: random.Random,
    ) -> None:
        self.endpoint = endpoint
        self.model_id = model_id
        self.config = config
        self.tokenizer = tokenizer
        self.compute = compute
        self.tracker = tracker
        self.settings = settings
        self._exchange = exchange
        self._find_record = find_record
        self._records: dict[PeerId, tuple[bytes, float]] = {}  # signed, and when it was read
        self._wire_dtype = wire_dtype
        self._rng = rng

    # --- text ----------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text, of chat messages (through the model's template), or themselves.

        Raises ConfigError for ids that the model does not have.
        """
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if messages:
            return tuple(self.tokenizer.encode_chat(messages))
        token_ids = tuple(operator.index(item) for item in prompt if not isinstance(item, Mapping))
        if not all(0 <= token < self.config.vocab_size for token in token_ids):
            raise ConfigError(f"token ids of this model are from 0 to {self.config.vocab_size - 1}")
        return token_ids

    def generate(
        self, prompt: Prompt, *, session: Session | None = None, **options: object
    ) -> Generation:
        """Generate text after a prompt; iterate over the result for its pieces.

        `options` are those of `GenerateOptions`. With a `session` only what it does not hold yet
        of the prompt is computed, and it holds the whole text afterwards.
        """
        return self._generation([prompt], GenerateOptions(**options), session)  # type: ignore[arg-type]

    async def generate_batch(
        self, prompts: Sequence[Prompt], **options: object
    ) -> list[GenerationResult]:
        """Generate for several prompts at once, sharing the messages to the servers.

        A sampled text depends on the seed and its place in the list, not on the others.
        """
        if not prompts:
            return []
        generation = self._generation(prompts, GenerateOptions(**options), None)  # type: ignore[arg-type]
        async with generation:
            return await generation.finish()

    def _generation(
        self, prompts: Sequence[Prompt], options: GenerateOptions, session: Session | None
    ) -> Generation:
        if len(prompts) > MAX_ITEMS:
            raise ConfigError(f"at most {MAX_ITEMS} prompts share a batch")
        seed = self._rng.getrandbits(63) if options.seed is None else options.seed
        eos_ids = self.tokenizer.eos_ids
        banned = tuple(sorted(eos_ids)) if options.ignore_eos else ()
        params = SamplingParams(options.temperature, options.top_k, options.top_p, seed, banned)
        drawings = []
        for number, prompt in enumerate(prompts):
            prompt_ids = self.encode(prompt)
            if not prompt_ids:
                raise ConfigError("the prompt is empty; give at least one token")
            sequence = TextSequence(
                prompt_ids,
                options.max_new_tokens,
                self.tokenizer.stream(prompt_ids),
                eos_ids,
                options.stops,
            )
            drawings.append(Drawing(sequence, number))
        return Generation(self, GenerationRecord(tuple(drawings), params), session)

    async def run(
        self, record: GenerationRecord, session: Session | None
    ) -> AsyncGenerator[dict[int, str], None]:
        """Carry a generation out: route, sessions, steps; used by `Generation` only."""
        progress = Progress(asyncio.get_running_loop().time())
        record.progress = progress
        sequences = [drawing.sequence for drawing in record.drawings]
        if session is not None:
            chain, states = session.chain, [session.state]
            self._reuse(session, sequences[0])
        else:
            chain, states, record.route = await self._open_for(sequences)
        record.chain = chain
        chain.on_measure = self._measured(record)
        try:
            steps = generate(
                chain,
                self.compute,
                states,
                record.drawings,
                record.params,
                progress,
                chunk_tokens=self.settings.prefill_chunk_tokens,
            )
            async with aclosing(steps):
                async for pieces in steps:
                    yield pieces
        finally:
            if session is None:
                await chain.close(states)
            else:
                text = [*sequences[0].prompt_ids, *sequences[0].token_ids]
                session.token_ids = text[: session.position]

    async def _open_for(
        self, sequences: Sequence[TextSequence]
    ) -> tuple[Chain, list[SessionState], Route]:
        longest = max(len(sequence.prompt_ids) for sequence in sequences)
        new_tokens = max(sequence.max_new_tokens for sequence in sequences)
        request = self._route_request(longest, new_tokens, len(sequences))
        counts = [len(s.prompt_ids) + s.max_new_tokens for s in sequences]
        return await self.open(request, counts)

    def _reuse(self, session: Session, sequence: TextSequence) -> None:
        """Roll a session back to what it shares with a prompt; at least one token is left over."""
        needed = len(sequence.prompt_ids) + sequence.max_new_tokens
        if needed > session.max_tokens:
            raise ConfigError(
                f"the session holds {session.max_tokens} tokens and {needed} are needed; "
                "open a longer one"
            )
        shared = 0
        for held, wanted in zip(session.token_ids, sequence.prompt_ids[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        session.rollback(shared)

    # --- by hand -------------------------------------------------------------------------

    @asynccontextmanager
    async def session(self, *, max_tokens: int = DEFAULT_SESSION_TOKENS) -> AsyncIterator[Session]:
        """A session of up to `max_tokens` tokens, to step through by hand or generate with."""
        if max_tokens < 1:
            raise ConfigError("a session has room for at least one token")
        request = self._route_request(max_tokens // 2, max_tokens - max_tokens // 2, 1)
        chain, (state,), _ = await self.open(request, [max_tokens])
        chain.on_measure = self._measured(None)
        session = Session(self, chain, state)
        try:
            yield session
        finally:
            await session.close()

    async def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Logits (T, V) in float32 of a token sequence, in one pass."""
        token_ids = self.encode(token_ids)
        async with self.session(max_tokens=len(token_ids)) as session:
            return await session.step(token_ids)

    # --- routes --------------------------------------------------------------------------

    async def route(self, *, prompt_tokens: int = 128, new_tokens: int = 128) -> Route:
        """The route that a generation of this size would take now; raises NoRoute."""
        return plan(await self.view(), self._route_request(prompt_tokens, new_tokens, 1))

    async def view(self) -> SwarmView:
        """The servers of this model as they are now."""
        await self.tracker.refresh()
        return self.tracker.view()

    async def open(
        self, request: RouteRequest, max_tokens: Sequence[int]
    ) -> tuple[Chain, list[SessionState], Route]:
        """Plan a route and open sessions of these sizes on it.

        Where that fails it tries elsewhere, and again for `patience_s`; then the last error is
        raised: NoRoute with the missing blocks, LookupFailed, or what the servers said.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.patience_s
        for attempt in itertools.count():
            try:
                view = await self._fresh_view(is_first=not attempt)
                route = plan(view, request)
                chain = await self._chain(view, route)
                # If it goes to servers without free cache, there are no better ones: we wait there.
                wait_s = max(view.by_peer[hop.peer_id].cache_wait_s for hop in route.hops)
                patience_s = max(0.0, deadline - loop.time())
                states = await chain.open(max_tokens, wait_s=min(wait_s, patience_s))
            except (NoRoute, OpenFailed, LookupFailed) as exc:
                pause_s = self._pause_after(exc, attempt)
                if loop.time() + pause_s > deadline:
                    reason = _only_failure(exc)
                    if reason is None:
                        raise
                    raise reason from exc
                logger.info("no route yet reason=%s pause_s=%.2f", exc, pause_s)
                if isinstance(exc, NoRoute):
                    await self.tracker.wait_for_change(pause_s)
                else:
                    await asyncio.sleep(pause_s)
            else:
                return chain, states, route
        raise AssertionError("unreachable: it returns or raises")

    async def _fresh_view(self, *, is_first: bool) -> SwarmView:
        if not is_first:
            await self.tracker.refresh()
        return await self.tracker.fresh_view()

    async def _chain(self, view: SwarmView, route: Route) -> Chain:
        """The route with what its hops need to reach each other."""
        records = await asyncio.gather(*(self._record_of(hop.peer_id) for hop in route.hops))
        hops = tuple(
            Hop(hop.peer_id, hop.span, view.by_peer[hop.peer_id].presence.numerics, record)
            for hop, record in zip(route.hops, records, strict=True)
        )
        wire = self._wire_format(hops)
        return Chain(
            endpoint=self.endpoint,
            exchange=self._exchange,
            config=self.settings,
            model=self.model_id,
            hops=hops,
            wire=wire,
            repack=lambda rows, parts: self.compute.repack(rows, parts, wire),
            on_measure=lambda _: None,
        )

    async def _record_of(self, peer: PeerId) -> bytes:
        """A server's signed peer record, for its predecessor; empty if we relay that link."""
        if not self.settings.is_chained:
            return b""
        now = asyncio.get_running_loop().time()
        known = self._records.get(peer)
        if known is not None and now - known[1] < RECORD_FRESH_S:
            return known[0]
        try:
            record = await self._find_record(peer)
        except LookupFailed as exc:
            logger.info("peer record not found peer=%s reason=%s", peer.short, exc)
            return b""
        found = record.to_bytes() if record is not None else b""
        if len(self._records) >= MAX_RECORDS:
            self._records.clear()
        self._records[peer] = (found, now)
        return found

    def _wire_format(self, hops: Sequence[Hop]) -> WireFormat:
        """The coding that the settings ask for; "auto" looks at size and slowest link."""
        name = self.settings.wire_codec
        if name != "auto":
            return WireFormat(TensorCodec[name.upper()], is_compressed=False)
        rates = [self.endpoint.rate_bytes_s(hop.peer) for hop in hops]
        slowest = min((rate for rate in rates if rate is not None), default=None)
        num_bytes = self.config.hidden_size * self._wire_dtype.itemsize
        return WireFormat(*choose_codec(num_bytes, self._wire_dtype, slowest))

    def _route_request(self, prompt_tokens: int, new_tokens: int, batch: int) -> RouteRequest:
        return RouteRequest(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            max_tokens=prompt_tokens + new_tokens,
            activation_bytes_per_token=self.config.hidden_size * self._wire_dtype.itemsize,
            relayed=not self.settings.is_chained,
            seed=int.from_bytes(self.endpoint.peer_id.key[:7], "big"),
        )

    def _pause_after(self, exc: P2PLLMError, attempt: int) -> float:
        """Take a failure into account for the next plan; returns how long to wait before it."""
        if not isinstance(exc, OpenFailed):
            return MISSING_BLOCKS_POLL_S
        now = asyncio.get_running_loop().time()
        for peer, error in exc.failures.items():
            if isinstance(error, CacheFull | Busy):
                self.tracker.measurements.on_cache_full(peer, error.retry_after_s, now)
            else:
                self.tracker.measurements.on_failure(peer, now)
        return min(RETRY_S * 2.0 ** min(attempt, 8), MAX_RETRY_S)

    def _measured(self, record: GenerationRecord | None) -> Callable[[HopMeasure], None]:
        """What is to be done with each measured step: it teaches the router, and the report."""

        def on_measure(measure: HopMeasure) -> None:
            self._learn(measure)
            if record is not None:
                record.on_measure(measure)

        return on_measure

    def _learn(self, measure: HopMeasure) -> None:
        """Let a measured step teach the router: queue and compute, and the link's bandwidth."""
        peer, timing = measure.peer, measure.timing
        now = asyncio.get_running_loop().time()
        measurements = self.tracker.measurements
        measurements.on_step(
            peer,
            num_blocks=len(measure.span),
            batch=measure.batch,
            num_tokens=measure.num_tokens,
            queue_s=timing.queue_s,
            compute_s=timing.compute_s,
            now=now,
        )
        if measure.is_relayed:
            transfer_s = measure.link_s - (self.endpoint.rtt_s(peer) or 0.0)
            measurements.on_transfer(None, peer, measure.num_bytes, transfer_s, now)
            measurements.on_transfer(peer, None, measure.num_bytes, transfer_s, now)


def _only_failure(exc: P2PLLMError) -> P2PLLMError | None:
    """What the one server said that did not open: that is what the user should see."""
    if not isinstance(exc, OpenFailed) or len(exc.failures) > 1:
        return None
    error: P2PLLMError = next(iter(exc.failures.values()))
    return error

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from p2pllm.client.compute import ClientCompute, Drawing
from p2pllm.client.exchange import Exchange
from p2pllm.client.forwarding import Forwarder, MakeInput
from p2pllm.client.generate import Progress, generate
from p2pllm.client.generation import (
    GenerateOptions,
    Generation,
    GenerationRecord,
    Prompt,
    SavedSession,
    Session,
)
from p2pllm.client.journal import JournalStore
from p2pllm.client.moves import Mover
from p2pllm.client.prefixes import PrefixKeys
from p2pllm.client.recovery import Recovery
from p2pllm.client.results import ChainEvent, GenerationResult
from p2pllm.client.routes import ModelRoutes
from p2pllm.client.sequence import Detokenizer
from p2pllm.client.sequence import Sequence as TextSequence
from p2pllm.client.session import Chain, Prospect, Sharing
from p2pllm.client.state import Hop, SessionState, WireFormat
from p2pllm.config import ClientConfig
from p2pllm.errors import (
    Busy,
    CacheFull,
    ConfigError,
    LookupFailed,
    NoRoute,
    OpenFailed,
    P2PLLMError,
)
from p2pllm.ids import ModelId, PeerId
from p2pllm.model.config import ModelConfig
from p2pllm.model.sampling import SamplingParams
from p2pllm.model.tensor_io import choose_codec
from p2pllm.net.endpoint import Endpoint
from p2pllm.routing.planner import Route, RouteRequest, plan
from p2pllm.routing.trace import TraceWriter
from p2pllm.spans import Span
from p2pllm.swarm.timings import SegmentStep
from p2pllm.swarm.tracker import SwarmTracker
from p2pllm.swarm.view import SwarmView
from p2pllm.wire.messages import MAX_ITEMS
from p2pllm.wire.tensors import DType, TensorCodec, WireTensor

__all__ = ["GenerateOptions", "Generation", "Prompt", "SavedSession", "Session", "SwarmModel"]

logger = logging.getLogger(__name__)

DEFAULT_SESSION_TOKENS = 2048
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


class SwarmModel:
    """A model served by the swarm. Made by `Swarm.model`."""

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        exchange: Exchange,
        routes: ModelRoutes,
        store: JournalStore,
        start: Callable[[Coroutine[Any, Any, None]], object],
        model_id: ModelId,
        config: ModelConfig,
        tokenizer: TextTokenizer,
        compute: ClientCompute,
        settings: ClientConfig,
        wire_dtype: DType,
        rng: random.Random,
        prefix_secret: bytes,
    ) -> None:
        """`start` runs what nobody waits for in a task that somebody owns. `prefix_secret` is for
        `p2pllm.client.prefixes`."""
        self.endpoint = endpoint
        self.model_id = model_id
        self.config = config
        self.tokenizer = tokenizer
        self.compute = compute
        self.routes = routes
        self.settings = settings
        self._exchange = exchange
        self._store = store
        recovery = Recovery(routes, patience_s=settings.patience_s, rng=rng, start=start)
        self._mover = Mover(recovery, rng, start)
        self._forwarder = Forwarder(
            endpoint, routes, compute, model_id, settings, rng, self._wire_format
        )
        self._wire_dtype = wire_dtype
        self._prefix_keys = PrefixKeys(prefix_secret, model_id)
        self._rng = rng

    @property
    def tracker(self) -> SwarmTracker:
        """What follows the swarm's servers."""
        return self.routes.tracker

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
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        on_event: Callable[[ChainEvent], None] | None = None,
        write_trace: Callable[[str], object] | None = None,
        **options: object,
    ) -> Generation:
        """Generate text after a prompt; iterate over the result for its pieces.

        `options` are those of `GenerateOptions`. With a `session` only what it does not hold yet
        of the prompt is computed, and it holds the whole text afterwards. `on_event` is told when
        servers are lost and replaced, or waited for; `write_trace` gets the lines of a trace
        (`p2pllm.routing.trace`).
        """
        record = self._record([prompt], GenerateOptions(**options))  # type: ignore[arg-type]
        record.tell, record.write_trace = on_event, write_trace
        return Generation(self, record, session)

    async def generate_batch(
        self, prompts: Sequence[Prompt], **options: object
    ) -> list[GenerationResult]:
        """Generate for several prompts at once, sharing the messages to the servers.

        A sampled text depends on the seed and its place in the list, not on the others.
        """
        if not prompts:
            return []
        record = self._record(prompts, GenerateOptions(**options))  # type: ignore[arg-type]
        async with Generation(self, record, None) as generation:
            return await generation.finish()

    def _record(self, prompts: Sequence[Prompt], options: GenerateOptions) -> GenerationRecord:
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
        return GenerationRecord(tuple(drawings), params)

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
        if record.write_trace is not None:
            record.trace = TraceWriter(
                record.write_trace,
                started=progress.started,
                prompt_tokens=max(len(sequence.prompt_ids) for sequence in sequences),
                model=str(self.model_id),
            )
        self._listen(chain, record)
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
            if progress.own_s_per_step is not None:
                self.routes.on_own_step(progress.own_s_per_step)
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
        request = self.routes.request(longest, new_tokens, len(sequences))
        counts = [len(s.prompt_ids) + s.max_new_tokens for s in sequences]
        return await self.open(request, counts, [s.prompt_ids for s in sequences])

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
        request = self.routes.request(max_tokens // 2, max_tokens - max_tokens // 2, 1)
        chain, (state,), _ = await self.open(request, [max_tokens])
        self._listen(chain, None)
        session = Session(self, chain, state)
        try:
            yield session
        finally:
            await session.close()

    @asynccontextmanager
    async def resume(self, saved: SavedSession) -> AsyncIterator[Session]:
        """A session that holds what was saved, on whatever servers there are now.

        Raises ConfigError if it was saved with another model.
        """
        if saved.model_id != self.model_id:
            raise ConfigError(f"the session was saved with {saved.model_id}, not {self.model_id}")
        async with self.session(max_tokens=saved.max_tokens) as session:
            if saved.token_ids:
                await session.feed(saved.token_ids)
            yield session

    async def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Logits (T, V) in float32 of a token sequence, in one pass."""
        token_ids = self.encode(token_ids)
        async with self.session(max_tokens=len(token_ids)) as session:
            return await session.step(token_ids)

    # --- without a session -----------------------------------------------------------------

    async def hidden_states(
        self, prompts: Sequence[Prompt], *, span: Span | None = None
    ) -> list[Tensor]:
        """The last block's outputs (T, D) of whole sequences, each as if it were alone.

        The blocks of `span` (None: all) see each sequence once and keep nothing: much quicker
        than sessions where many texts are read and none is continued. Raises ConfigError,
        NoRoute, LookupFailed, or what the servers said.
        """
        sequences = [self.encode(prompt) for prompt in prompts]

        async def make(start: int, stop: int, wire: WireFormat) -> WireTensor:
            packed = itertools.chain.from_iterable(sequences[start:stop])
            return await self.compute.embed(list(packed), wire)

        return await self._forward(list(map(len, sequences)), make, span)

    async def forward_hidden(
        self, hidden: Sequence[Tensor], *, span: Span | None = None
    ) -> list[Tensor]:
        """The same from hidden states: (T, D) of each sequence at the first block of `span`."""
        width = self.config.hidden_size
        if any(tensor.shape[1:] != (width,) for tensor in hidden):
            raise ConfigError(f"hidden states of this model are (tokens, {width}) a sequence")

        async def make(start: int, stop: int, wire: WireFormat) -> WireTensor:
            return await self.compute.encode(hidden[start:stop], wire)

        return await self._forward(list(map(len, hidden)), make, span)

    async def _forward(
        self, lengths: Sequence[int], make: MakeInput, span: Span | None
    ) -> list[Tensor]:
        whole = Span(0, self.config.num_blocks)
        if not whole.covers(span or whole):
            raise ConfigError(f"this model has blocks {whole}, not {span}")
        if not all(lengths):
            raise ConfigError("a sequence is empty; give at least one token")
        return await self._forwarder.forward(lengths, make, span or whole)

    # --- routes --------------------------------------------------------------------------

    async def route(self, *, prompt_tokens: int = 128, new_tokens: int = 128) -> Route:
        """The route that a generation of this size would take now; raises NoRoute."""
        return plan(await self.view(), self.routes.request(prompt_tokens, new_tokens, 1))

    async def view(self) -> SwarmView:
        """The servers of this model as they are now."""
        await self.tracker.refresh()
        return self.tracker.view()

    async def open(
        self,
        request: RouteRequest,
        max_tokens: Sequence[int],
        prompts: Sequence[Sequence[int]] = (),
    ) -> tuple[Chain, list[SessionState], Route]:
        """Plan a route and open sessions of these sizes on it, for these prompts (`Chain.open`).

        Where that fails it tries elsewhere, and again for `patience_s`; then the last error is
        raised: NoRoute with the missing blocks, LookupFailed, or what the servers said.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.patience_s
        failed: set[PeerId] = set()
        for attempt in itertools.count():
            try:
                view = await self._fresh_view(is_first=not attempt)
                route = _plan_without(failed, view, request)
                chain = self._chain(await self.routes.hops(view, route))
                # If it goes to servers without free cache, there are no better ones: we wait there.
                wait_s = max(view.by_peer[hop.peer_id].cache_wait_s for hop in route.hops)
                patience_s = max(0.0, deadline - loop.time())
                states = await chain.open(
                    max_tokens, wait_s=min(wait_s, patience_s), prompts=prompts
                )
            except (NoRoute, OpenFailed, LookupFailed) as exc:
                pause_s = self._pause_after(exc, attempt, failed)
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
                chain.prospect = Prospect(route, request)
                return chain, states, route
        raise AssertionError("unreachable: it returns or raises")

    async def _fresh_view(self, *, is_first: bool) -> SwarmView:
        if not is_first:
            await self.tracker.refresh()
        return await self.tracker.fresh_view()

    def _chain(self, hops: tuple[Hop, ...]) -> Chain:
        wire = self._wire_format(hops)
        return Chain(
            endpoint=self.endpoint,
            exchange=self._exchange,
            config=self.settings,
            model=self.model_id,
            hops=hops,
            width=self.config.hidden_size,
            wire=wire,
            repack=lambda rows, parts: self.compute.repack(rows, parts, wire),
            store=self._store,
            repairer=self._mover,
            sharing=self._sharing(wire) if self.settings.is_prefix_shared else None,
        )

    def _sharing(self, wire: WireFormat) -> Sharing:
        return Sharing(self._prefix_keys, lambda token_ids: self.compute.embed(token_ids, wire))

    def _wire_format(self, hops: Sequence[Hop]) -> WireFormat:
        """The coding that the settings ask for; "auto" looks at size and slowest link."""
        name = self.settings.wire_codec
        if name != "auto":
            return WireFormat(TensorCodec[name.upper()], is_compressed=False)
        num_bytes = self.config.hidden_size * self._wire_dtype.itemsize
        slowest = self.routes.slowest_rate(hops)
        return WireFormat(*choose_codec(num_bytes, self._wire_dtype, slowest))

    def _pause_after(self, exc: P2PLLMError, attempt: int, failed: set[PeerId]) -> float:
        """Take a failure into account for the next plan; returns how long to wait before it.

        Who has failed is added to `failed`.
        """
        if not isinstance(exc, OpenFailed):
            return MISSING_BLOCKS_POLL_S
        for peer, error in exc.failures.items():
            if isinstance(error, CacheFull | Busy):
                self.routes.on_full(peer, error.retry_after_s)
            else:
                failed.add(peer)
                self.routes.on_failure(peer)
        return min(RETRY_S * 2.0 ** min(attempt, 8), MAX_RETRY_S)

    def _listen(self, chain: Chain, record: GenerationRecord | None) -> None:
        """Each measured step teaches the router, and goes into the report."""

        def on_segment(step: SegmentStep) -> None:
            self.routes.on_segment(step)
            if record is not None:
                record.on_segment(step)

        chain.on_segment = on_segment
        if record is not None:
            chain.on_event = record.on_event


def _plan_without(failed: set[PeerId], view: SwarmView, request: RouteRequest) -> Route:
    """A route past those that have just failed; if there is none, they are forgiven.

    Their penalty alone would not do where all servers of some blocks are under one: the best of
    them might be chosen again and again, though it is dead.
    """
    if failed:
        try:
            return plan(view, replace(request, excluded=request.excluded | failed))
        except NoRoute:
            failed.clear()
    return plan(view, request)


def _only_failure(exc: P2PLLMError) -> P2PLLMError | None:
    """What the one server said that did not open: that is what the user should see."""
    if not isinstance(exc, OpenFailed) or len(exc.failures) > 1:
        return None
    error: P2PLLMError = next(iter(exc.failures.values()))
    return error

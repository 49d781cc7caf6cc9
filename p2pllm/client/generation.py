"""What a user holds while text is generated: options, sessions, generations.

A `Session` is one sequence on the servers; a `Generation` is one call of `SwarmModel.generate`,
from which text comes as it is made. What both have come to can be saved as token ids (`export`)
and taken up again later, on any servers (`SwarmModel.resume`).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from p2pllm.client.compute import Drawing
from p2pllm.client.generate import Progress, prefill
from p2pllm.client.results import (
    ChainEvent,
    GenerationResult,
    HopReport,
    Recovered,
    event_words,
)
from p2pllm.client.sequence import Sequence as TextSequence
from p2pllm.client.session import Chain
from p2pllm.client.state import Hop, SessionState
from p2pllm.errors import ConfigError, LocalProtocolError
from p2pllm.ids import ModelId, PeerId
from p2pllm.metrics import MovingAverage
from p2pllm.model.sampling import SamplingParams
from p2pllm.routing.planner import Route
from p2pllm.routing.trace import TraceWriter
from p2pllm.swarm.timings import SegmentStep

if TYPE_CHECKING:
    from p2pllm.client.model import SwarmModel

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # text, token ids, or chat messages

MAX_EVENTS = 1000  # of one generation, that are remembered


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


@dataclass(frozen=True, slots=True)
class SavedSession:
    """All that is needed to go on with a sequence elsewhere or later: its tokens.

    `max_tokens`: how long it may become.
    """

    model_id: ModelId
    token_ids: tuple[int, ...]
    max_tokens: int

    def to_json(self) -> str:
        """One JSON object, for a file."""
        return json.dumps(
            {
                "model": self.model_id.name,
                "digest": self.model_id.digest.hex(),
                "max_tokens": self.max_tokens,
                "token_ids": list(self.token_ids),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "SavedSession":
        """Raises ConfigError for anything that `to_json` has not written."""
        try:
            value = json.loads(text)
            model = ModelId(bytes.fromhex(value["digest"]), str(value["model"]))
            tokens = tuple(int(token) for token in value["token_ids"])
            return cls(model, tokens, int(value["max_tokens"]))
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(
                "this is no saved session; `p2pllm generate --save FILE` makes one "
                f"({type(exc).__name__}: {exc})"
            ) from exc


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

    async def feed(self, token_ids: Sequence[int]) -> None:
        """Send the next tokens without asking what follows them.

        After an error, or when cancelled, the session is where it was before.
        """
        token_ids = self._model.encode(token_ids)
        before = self.position
        try:
            await self.chain.share(self.state, token_ids)
            await prefill(
                self.chain,
                self._model.compute,
                self.state,
                token_ids[self.position - before :],
                tail=1,
                chunk_tokens=self._model.settings.prefill_chunk_tokens,
            )
        except BaseException:
            self.rollback(before)
            raise
        self.token_ids += token_ids

    def rollback(self, position: int) -> None:
        """Forget all tokens from `position` on; costs nothing until the next step."""
        if not 0 <= position <= self.state.position:
            raise LocalProtocolError(f"position {position} of a session of {self.position} tokens")
        self.state.rollback(position)
        del self.token_ids[position:]

    def export(self) -> SavedSession:
        """What `SwarmModel.resume` needs to open such a session again."""
        tokens = tuple(self.token_ids)
        return SavedSession(self._model.model_id, tokens, self.max_tokens)

    async def fork(self) -> "Session":
        """A second session with the same tokens; the caller closes it."""
        forked = Session(self._model, self.chain, await self.chain.fork(self.state))
        forked.token_ids = list(self.token_ids)
        return forked

    async def close(self) -> None:
        """Free the servers' memory."""
        await self.chain.close([self.state])


class HopAverages:
    """Moving averages of one hop's decode steps."""

    def __init__(self) -> None:
        self.queue_s = MovingAverage()
        self.compute_s = MovingAverage()
        self.bytes_per_token = MovingAverage()


@dataclass(eq=False)
class GenerationRecord:
    """What a generation is to do, and what came of it so far."""

    drawings: tuple[Drawing, ...]
    params: SamplingParams
    chain: Chain | None = None
    progress: Progress | None = None
    route: Route | None = None
    measures: dict[PeerId, HopAverages] = field(default_factory=dict)
    events: list[ChainEvent] = field(default_factory=list)
    tell: Callable[[ChainEvent], None] | None = None  # the user would like to know
    write_trace: Callable[[str], object] | None = None
    trace: TraceWriter | None = None

    def on_segment(self, step: SegmentStep) -> None:
        """A step came back from some hops; decode steps count for the report."""
        if self.trace is not None:
            self.trace.on_segment(step)
        if not step.is_decode or step.is_replay:
            return
        num_bytes = (step.sent_bytes + step.received_bytes) / step.num_tokens
        for peer, share in zip(step.peers, step.shares(), strict=False):
            averages = self.measures.setdefault(peer, HopAverages())
            averages.queue_s.add(share.queue_s)
            averages.compute_s.add(share.compute_s)
            averages.bytes_per_token.add(num_bytes)

    def on_event(self, event: ChainEvent) -> None:
        """Something happened to the route."""
        if len(self.events) < MAX_EVENTS:
            self.events.append(event)
        if self.trace is not None:
            what, text = event_words(event)
            self.trace.on_mark(what, text, asyncio.get_running_loop().time())
        if self.tell is not None:
            self.tell(event)


class Generation:
    """Texts being generated: iterate for the pieces of the first (`async for piece in …`).

    Leaving the loop early and `aclose` free the servers' memory at once.
    """

    def __init__(
        self, model: "SwarmModel", record: GenerationRecord, session: Session | None
    ) -> None:
        self._record = record
        self._model_id = model.model_id
        # It must not refer to us: then it ends, and frees the servers, when we are dropped.
        self._steps = model.run(record, session)
        self._endpoint = model.endpoint

    @property
    def on_event(self) -> Callable[[ChainEvent], None] | None:
        """Who is told when servers are lost and replaced, or waited for."""
        return self._record.tell

    @on_event.setter
    def on_event(self, tell: Callable[[ChainEvent], None] | None) -> None:
        self._record.tell = tell

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

    def export(self, index: int = 0) -> SavedSession:
        """A prompt and what was generated after it so far: `SwarmModel.resume` goes on from there,
        and so does `SwarmModel.generate` with its `token_ids` as the prompt."""
        sequence = self._record.drawings[index].sequence
        tokens = (*sequence.prompt_ids, *sequence.token_ids)
        longest = len(sequence.prompt_ids) + sequence.max_new_tokens
        return SavedSession(self._model_id, tokens, longest)

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
            recoveries=tuple(
                event for event in self._record.events if isinstance(event, Recovered)
            ),
            journal_peak_bytes=chain.store.peak_bytes if chain else 0,
            cached_prompt_tokens=sequence.num_cached,
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

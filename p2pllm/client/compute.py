"""The client's own computation: embeddings in, logits and tokens out.

One call to the compute thread per round: it decodes the last hop's outputs of all generations
that wait, applies head and sampling to them in one product, and embeds and codes the next tokens,
so that a generated token costs one hop to the thread and back. `p2pllm.client.rounds` says who
goes together; a generation alone goes at once. All generations of a round hear of it in the same
turn of the event loop, in the order in which they came. Where the sequences stand is in `Sequence`
objects, which the thread changes while their owner waits for it.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from p2pllm.client.exchange import Part
from p2pllm.client.rounds import Rounds
from p2pllm.client.sequence import Sequence as TextSequence
from p2pllm.client.state import WireFormat
from p2pllm.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from p2pllm.model.edges import EdgeCompute
from p2pllm.model.executor import Executor
from p2pllm.model.sampling import Draw, SamplingParams, sample
from p2pllm.model.tensor_io import decode_tensor, encode_tensor, is_finite
from p2pllm.wire.messages import Row
from p2pllm.wire.tensors import WireTensor

T = TypeVar("T")

MAX_ROUND_ROWS = 256  # what others may have to wait for: 45 ms on one core, for 49,152 tokens
# Rows of one product of the head, 10 ms on one core: so much of a prompt's logits goes before a
# round, and so many float32 logits are in memory at once (13 MB of 49,152 tokens).
PRODUCT_ROWS = 64


@dataclass(eq=False)
class Drawing:
    """A sequence whose tokens are drawn; `number` tells sequences of one seed apart."""

    sequence: TextSequence
    number: int = 0

    def next_draw(self) -> Draw:
        """Which choice comes next."""
        position = len(self.sequence.prompt_ids) + len(self.sequence.token_ids)
        return Draw(self.number, position)


@dataclass(frozen=True, slots=True)
class Advance:
    """What one step brought: the text of each sequence, and the input of those that go on."""

    pieces: tuple[str, ...]
    going_on: tuple[int, ...]  # indices of the sequences that are not finished
    tensor: WireTensor | None  # their embedded tokens, (len(going_on), D); None if none goes on


@dataclass(eq=False)
class _Step:
    """One generation's part of a round, and what came of it."""

    tensors: Sequence[WireTensor]  # (len(drawings), D) together, in order
    drawings: Sequence[Drawing]
    params: SamplingParams
    wire: WireFormat
    advance: Advance | None = None


@dataclass(eq=False)
class _Waiting:
    """Somebody waits until this is done in the thread."""

    work: _Step | Callable[[], None]
    done: asyncio.Future[None]

    @property
    def num_rows(self) -> int:
        """Rows that it adds to a round."""
        return len(self.work.drawings) if isinstance(self.work, _Step) else 0

    def end(self, error: Exception | None) -> None:
        """Tell who waits, unless that one has gone."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class ClientCompute:
    """Embedding, LM head and sampling of one model, in a thread.

    Calls are answered while `run` runs.
    """

    def __init__(self, edges: EdgeCompute, executor: Executor) -> None:
        self._edges = edges
        self._executor = executor
        self._rounds: Rounds[_Waiting] = Rounds(MAX_ROUND_ROWS)
        self._is_wanted = asyncio.Event()
        self._is_over = False

    async def run(self) -> None:
        """Do what is asked for, until cancelled; whoever waits then is cancelled as well."""
        under_way: tuple[_Waiting, ...] = ()
        try:
            while True:
                await self._is_wanted.wait()
                self._is_wanted.clear()
                while under_way := self._rounds.next_round():
                    errors = await self._carry_out([waiting.work for waiting in under_way])
                    for waiting, error in zip(under_way, errors, strict=True):
                        waiting.end(error)
        finally:
            self._is_over = True
            for waiting in (*under_way, *self._rounds.snapshot()):
                waiting.done.cancel()

    async def embed(self, token_ids: Sequence[int], wire: WireFormat) -> WireTensor:
        """Hidden states of tokens, (N, D), coded."""
        return await self._do(lambda: self._embed(token_ids, wire))

    async def encode(self, hidden: Sequence[Tensor], wire: WireFormat) -> WireTensor:
        """Code the hidden states of sequences, (T, D) each, packed.

        Raises ConfigError for NaN or infinity in them.
        """
        return await self._do(lambda: self._encode(hidden, wire))

    async def decode(self, tensor: WireTensor) -> Tensor:
        """What a server has answered. Raises RemoteProtocolError if it is damaged or not finite."""
        return await self._do(lambda: self._decode_to_keep(tensor))

    async def advance(
        self,
        tensors: Sequence[WireTensor],
        drawings: Sequence[Drawing],
        params: SamplingParams,
        wire: WireFormat,
    ) -> Advance:
        """Draw each sequence's next token from its last hidden state, in the next round.

        The tensors hold (len(drawings), D) together, in order.
        """
        step = _Step(tensors, drawings, params, wire)
        await self._wait_for(step)
        assert step.advance is not None
        return step.advance

    async def logits(self, tensors: Sequence[WireTensor]) -> Tensor:
        """Logits (N, V) in float32 of coded hidden states, (N, D) together."""
        hidden = await self._do(lambda: self._decode(tensors))
        logits = torch.empty(len(hidden), self._edges.vocab_size)
        for start in range(0, len(hidden), PRODUCT_ROWS):
            await self._do(partial(self._fill, logits, hidden, start))
        return logits

    async def repack(
        self, rows: Sequence[Row], parts: Sequence[Part], wire: WireFormat
    ) -> WireTensor:
        """Join an answer that came in parts, in the order of `rows`."""
        return await self._do(lambda: self._repack(rows, parts, wire))

    # --- waiting for the thread ------------------------------------------------------------

    async def _do(self, work: Callable[[], T]) -> T:
        """Work that is no part of a round."""
        results: list[T] = []
        await self._wait_for(lambda: results.append(work()))
        return results[0]

    async def _wait_for(self, work: _Step | Callable[[], None]) -> None:
        if self._is_over:
            raise LocalProtocolError("the swarm has been left: its models compute no more")
        waiting = _Waiting(work, asyncio.get_running_loop().create_future())
        self._rounds.on_work(waiting)
        self._is_wanted.set()
        try:
            await waiting.done
        finally:
            self._rounds.discard(waiting)

    async def _carry_out(
        self, works: Sequence[_Step | Callable[[], None]]
    ) -> Sequence[Exception | None]:
        """What has failed of a round; an error that nobody expects is everybody's."""
        try:
            return await self._executor.run(lambda: self._work(works))
        except Exception as exc:  # whoever waits raises it, with its traceback
            return [exc] * len(works)

    # --- in the thread ---------------------------------------------------------------------

    @torch.inference_mode()
    def _work(self, works: Sequence[_Step | Callable[[], None]]) -> Sequence[Exception | None]:
        steps = [work for work in works if isinstance(work, _Step)]
        if steps:
            return self._round(steps)
        for work in works:
            assert not isinstance(work, _Step)
            work()
        return [None] * len(works)

    def _round(self, steps: Sequence[_Step]) -> Sequence[RemoteProtocolError | None]:
        """Carry steps out. A generation whose server has answered nonsense fails alone."""
        good, hidden = [], []
        errors: list[RemoteProtocolError | None] = []
        for step in steps:
            try:
                hidden.append(self._decode(step.tensors))
            except RemoteProtocolError as exc:
                errors.append(exc)
            else:
                errors.append(None)
                good.append(step)
        if good:
            tokens = iter(self._draw(good, _joined(hidden)))
            for step in good:
                step.advance = self._advance(step, islice(tokens, len(step.drawings)))
        return errors

    def _draw(self, steps: Sequence[_Step], hidden: Tensor) -> list[int]:
        """The next tokens of all sequences of some steps; hidden: their last states, (N, D)."""
        params = [step.params for step in steps for _ in step.drawings]
        draws = [drawing.next_draw() for step in steps for drawing in step.drawings]
        tokens: list[int] = []
        for start in range(0, len(draws), PRODUCT_ROWS):
            here = slice(start, start + PRODUCT_ROWS)
            tokens += sample(self._edges.logits(hidden[here]), params[here], draws[here])
        return tokens

    def _advance(self, step: _Step, tokens: Iterable[int]) -> Advance:
        pieces, going_on, next_ids = [], [], []
        for index, (drawing, token) in enumerate(zip(step.drawings, tokens, strict=True)):
            pieces.append(drawing.sequence.push(token))
            if drawing.sequence.finish is None:
                going_on.append(index)
                next_ids.append(token)
        # A lookup for each step and not for the round: journals keep the bytes for as long as
        # their own generation lives, and would keep those of the others with them.
        following = self._embed(next_ids, step.wire) if next_ids else None
        return Advance(tuple(pieces), tuple(going_on), following)

    def _repack(self, rows: Sequence[Row], parts: Sequence[Part], wire: WireFormat) -> WireTensor:
        found: dict[tuple[object, int], Tensor] = {}
        for part in parts:
            tensor, start = self._decode([part.tensor]), 0
            for row in part.rows:
                found[row.session, row.step] = tensor[start : start + row.num_outputs]
                start += row.num_outputs
        return _encode(torch.cat([found[row.session, row.step] for row in rows]), wire)

    def _embed(self, token_ids: Sequence[int], wire: WireFormat) -> WireTensor:
        return _encode(self._edges.embed(torch.tensor(token_ids)), wire)

    def _decode_to_keep(self, tensor: WireTensor) -> Tensor:
        with torch.inference_mode(False):  # its user may want to compute gradients with it
            return self._decode([tensor])

    def _encode(self, hidden: Sequence[Tensor], wire: WireFormat) -> WireTensor:
        packed = torch.cat([sequence.to("cpu", self._edges.dtype) for sequence in hidden])
        if not is_finite(packed):
            raise ConfigError("hidden states that hold NaN or infinity")
        return _encode(packed, wire)

    def _fill(self, logits: Tensor, hidden: Tensor, start: int) -> None:
        """Those of some rows, as many as one product takes."""
        here = slice(start, start + PRODUCT_ROWS)
        logits[here] = self._edges.logits(hidden[here])

    def _decode(self, tensors: Sequence[WireTensor]) -> Tensor:
        hidden = _joined([decode_tensor(tensor, dtype=self._edges.dtype) for tensor in tensors])
        if not torch.isfinite(hidden).all():
            raise RemoteProtocolError("a server answered with NaN or infinity")
        return hidden


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _encode(hidden: Tensor, wire: WireFormat) -> WireTensor:
    return encode_tensor(hidden, wire.codec, compress=wire.is_compressed)

"""The device thread: computes batches of rows, one after the other.

The event loop asks the scheduler for a batch, the device thread decodes its inputs, runs the
blocks over the K/V cache and codes the outputs, and the loop sends them. One hop to the thread
and one back per batch; torch releases the interpreter lock while it multiplies. Batches never
overlap, so the order in which the scheduler gives a session's rows is the order in which its
cache is written.

A row with NaN or infinity in it fails alone, before its batch is computed; so does one whose
client has given up waiting. What waits is bounded in bytes, and a client's share of it too.
"""

import asyncio
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2pllm.clock import Clock
from p2pllm.errors import BadRequest, Busy, CodecError, RemoteFault, RequestFailed
from p2pllm.ids import PeerId, SessionId
from p2pllm.model.executor import Executor
from p2pllm.model.kv_cache import CacheRow, KVCache
from p2pllm.model.span_model import SpanCompute
from p2pllm.model.staging import for_device, on_cpu
from p2pllm.model.tensor_io import (
    bytes_of,
    decode_tensor,
    encode_tensor,
    is_finite,
    is_plain,
    plain_tensor,
)
from p2pllm.server.page_table import PageCopy
from p2pllm.server.scheduler import Batch, Piece, Scheduler, Task
from p2pllm.spans import Span
from p2pllm.wire.messages import HopTiming, Open, Pages, Row
from p2pllm.wire.tensors import TensorCodec, WireTensor

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 512 * 2**20  # of coded inputs that wait
MAX_WAITING_BYTES_PER_CLIENT = MAX_WAITING_BYTES // 4  # beyond its first message
RETRY_AFTER_S = 0.5


class BadInput(BadRequest):
    """The hidden states of a step are no good: the fault of whoever sent it."""


@dataclass(eq=False)
class _RowInput:
    """Where a task's hidden states lie, and where its keys and values go."""

    source: "StepInput"
    offset: int  # of its first token in the step's tensor
    pages: tuple[int, ...]
    copies: tuple[PageCopy, ...] = ()  # before its first piece
    outputs: list[Tensor] = field(default_factory=list)  # of the pieces computed so far


@dataclass(eq=False)
class StepInput:
    """One client's rows of a step message: its tensor, coded, and the tasks made of its rows."""

    tensor: WireTensor
    client: PeerId
    opening: Open  # how the outputs are to be coded, and where they go
    deadline: float  # nobody waits for the outputs after it
    timings: tuple[HopTiming, ...] = ()  # of the hops before
    num_sharing: int = 1  # inputs, of this and other clients, made of the same message
    inputs: dict[Task, _RowInput] = field(default_factory=dict)
    decoded: Tensor | None = None  # by the device thread, when first needed
    error: str = ""  # why it could not be

    def add(
        self, task: Task, offset: int, pages: tuple[int, ...], copies: tuple[PageCopy, ...] = ()
    ) -> None:
        """Say that `task` is the rows of the tensor from `offset` on, and where they are cached."""
        self.inputs[task] = _RowInput(self, offset, pages, copies)

    @property
    def num_bytes(self) -> int:
        """Its share of what the message keeps in memory."""
        return self.tensor.header.coded_bytes // self.num_sharing

    def num_outputs(self, row: Row) -> int:
        """Tokens of a row whose outputs are wanted: of its last ones only at the chain's end."""
        return row.num_tokens if self.opening.next_hop else row.num_outputs

    def decode(self, dtype: torch.dtype) -> None:
        """Decode the tensor, once, if it needs that; raises BadInput, each time, if that fails."""
        if self.error:
            raise BadInput(self.error)
        if self.decoded is None and not is_plain(self.tensor, dtype):
            try:
                self.decoded = decode_tensor(self.tensor, dtype=dtype)
            except CodecError as exc:
                self.error = str(exc)
                raise BadInput(self.error) from exc

    def put(self, start: int, stop: int, target: memoryview) -> None:
        """Write rows `[start, stop)` of the tensor, as bytes. It is decoded, or plain."""
        data = self.tensor.data if self.decoded is None else bytes_of(self.decoded)
        row_bytes = len(target) // (stop - start)
        target[:] = memoryview(data)[start * row_bytes : stop * row_bytes]


_PieceInput = tuple[Piece, _RowInput]
"""A piece to compute, and where it comes from."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Rows of one step that one batch completed, and their packed output."""

    source: StepInput
    rows: tuple[Row, ...]
    tensor: WireTensor
    timing: HopTiming


@dataclass(frozen=True, slots=True)
class Failed:
    """A row that could not be computed."""

    client: PeerId
    row: Row
    error: RequestFailed


@dataclass(frozen=True, slots=True)
class _Done:
    """What the device thread hands back: coded outputs by step, failures by task."""

    coded: list[tuple[StepInput, list[Task], WireTensor]]
    failed: list[tuple[Task, RequestFailed]]


class Worker:
    """Computes what the scheduler gives out. `run` until cancelled; results go to `on_results`."""

    def __init__(
        self,
        model: SpanCompute,
        cache: KVCache,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
    ) -> None:
        self._model = model
        self._cache = cache
        self._scheduler = scheduler
        self._executor = executor
        self.clock = clock
        self._inputs: dict[Task, _RowInput] = {}
        self._held_bytes: Counter[PeerId] = Counter()  # of what waits, by client
        self._wake = asyncio.Event()
        self.on_results: Callable[[Sequence[Finished], Sequence[Failed]], None] | None = None
        self.tokens_computed = 0

    @property
    def queue_s(self) -> float:
        """How long rows wait lately."""
        return self._scheduler.queue_s(self._now())

    @property
    def prefill_slowdown(self) -> float:
        """How many times as long prompts take now as on an idle server."""
        return self._scheduler.prefill_slowdown(self._now())

    def add(self, source: StepInput) -> None:
        """Queue the rows of a step; raises Busy, with none queued, if too much waits."""
        num_bytes, held = source.num_bytes, self._held_bytes[source.client]
        in_all = self._held_bytes.total()
        if held and held + num_bytes > MAX_WAITING_BYTES_PER_CLIENT:
            raise Busy(f"{held} bytes of yours wait here", retry_after_s=RETRY_AFTER_S)
        if in_all and in_all + num_bytes > MAX_WAITING_BYTES:
            raise Busy(f"{in_all} bytes wait here", retry_after_s=RETRY_AFTER_S)
        self._scheduler.add(source.inputs)
        self._inputs.update(source.inputs)
        self._held_bytes[source.client] += num_bytes
        self._wake.set()

    def cancel(self, session: SessionId, from_step: int = 0) -> list[Row]:
        """Forget a session's waiting rows from a step on; returns them."""
        tasks = self._scheduler.cancel(session, from_step)
        for task in tasks:
            self._forget(task)
        return [task.row for task in tasks]

    def prolong(self, session: SessionId, step: int, deadline: float) -> None:
        """Somebody waits until `deadline` for a row that waits or is being computed."""
        for task, row_input in self._inputs.items():
            if (task.row.session, task.row.step) == (session, step):
                source = row_input.source
                source.deadline = max(source.deadline, deadline)

    def _forget(self, task: Task) -> None:
        row_input = self._inputs.pop(task, None)
        if row_input is None:
            return
        source = row_input.source
        del source.inputs[task]
        if not source.inputs:
            self._held_bytes[source.client] -= source.num_bytes
            if not self._held_bytes[source.client]:
                del self._held_bytes[source.client]

    async def copy_pages(
        self, source: Sequence[int], target: Sequence[int], num_tokens: int
    ) -> None:
        """Copy the first `num_tokens` tokens of one page table to another."""
        await self._executor.run(lambda: self._cache.copy(source, target, num_tokens))

    def tokens_in(self, num_bytes: int, span: Span) -> int:
        """How many tokens' keys and values in these blocks have that many bytes; at least one."""
        return max(1, num_bytes // (len(span) * self._cache.token_bytes))

    async def export_pages(
        self, pages: tuple[int, ...], span: Span, start: int, num_tokens: int
    ) -> Pages:
        """A copy of the keys and values of some tokens in some blocks, ready to be sent.

        The caller makes sure that `pages` still are who they were, when it has the copy.
        """
        first = span.start - self._model.span.start

        def read() -> Pages:
            values = self._cache.export_tokens(pages, first, len(span), start, num_tokens)
            tensor = encode_tensor(values, TensorCodec.RAW)
            return Pages(start, num_tokens, zlib.crc32(tensor.data), tensor)

        return await self._executor.run(read)

    async def import_pages(self, pages: tuple[int, ...], span: Span, part: Pages) -> None:
        """Put into a page table what `export_pages` gave at another server.

        Raises CodecError, with nothing changed, if it is no such thing, damaged, or not finite.
        The device takes one thing after the other: this one is before whatever the pages are
        used for when the caller no longer waits.
        """
        first = span.start - self._model.span.start

        def write() -> None:
            if zlib.crc32(part.tensor.data) != part.checksum:
                raise CodecError("keys and values that were damaged on the way")
            expected = (len(span), *self._cache.token_shape(part.num_tokens))
            if part.tensor.header.shape != expected:
                raise CodecError(f"pages of shape {part.tensor.header.shape}, not {expected}")
            values = decode_tensor(part.tensor)
            is_raw = part.tensor.header.codec is TensorCodec.RAW
            if values.dtype != self._cache.moved_dtype or not is_raw:
                raise CodecError(f"pages in {values.dtype}, not as the cache holds them")
            if not self._cache.is_finite(values):
                raise CodecError("pages that hold NaN or infinity")
            self._cache.import_tokens(pages, first, part.position, values)

        await self._executor.run(write)

    async def run(self) -> None:
        """Compute until cancelled."""
        while True:
            batch = self._scheduler.next_batch(self._now())
            if batch is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._run_batch(batch)

    async def _run_batch(self, batch: Batch) -> None:
        started = self._now()
        inputs = [self._inputs[piece.task] for piece in batch.pieces]
        try:
            done = await self._executor.run(lambda: self._compute(batch, inputs, started))
        except Exception:
            logger.exception("batch failed span=%s rows=%d", batch.span, len(batch.pieces))
            error = RemoteFault("the computation failed at the server")
            done = _Done([], [(piece.task, error) for piece in batch.pieces])
        now = self._now()
        self._scheduler.on_computed(batch, now - started)
        self.tokens_computed += sum(piece.num_tokens for piece in batch.pieces)
        self._hand_over(batch, done, now)

    def _hand_over(self, batch: Batch, done: _Done, now: float) -> None:
        wall = self.clock.wall()
        finished = [
            Finished(
                source=source,
                rows=tuple(task.row for task in tasks),
                tensor=tensor,
                timing=HopTiming(
                    queue_s=tasks[0].started_at - tasks[0].queued_at,
                    compute_s=now - tasks[0].started_at,
                    sent_at=wall,
                ),
            )
            for source, tasks, tensor in done.coded
        ]
        failed = [Failed(task.client, task.row, error) for task, error in done.failed]
        for piece in batch.pieces:
            if piece.is_last:
                self._forget(piece.task)
        for task, _ in done.failed:
            self._forget(task)
        assert self.on_results is not None, "the service binds itself before it runs"
        try:
            self.on_results(finished, failed)
        except Exception:  # one batch's rows are lost, and not the server
            logger.exception("results not delivered span=%s rows=%d", batch.span, len(batch.pieces))
            for failure in failed:
                self.cancel(failure.row.session, failure.row.step)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # --- in the device thread --------------------------------------------------------------

    @torch.inference_mode()
    def _compute(self, batch: Batch, inputs: Sequence[_RowInput], now: float) -> _Done:
        failed: list[tuple[Task, RequestFailed]] = []
        pieces: list[_PieceInput] = []
        for piece, row_input in zip(batch.pieces, inputs, strict=True):
            try:
                self._check(row_input.source, now)
            except RequestFailed as exc:
                failed.append((piece.task, exc))
            else:
                pieces.append((piece, row_input))
        hidden = self._packed(pieces)
        if not is_finite(hidden):  # asked of the batch once: looking takes time
            pieces = _only_finite(pieces, hidden, failed)
            hidden = self._packed(pieces)
        if not pieces:
            return _Done([], failed)  # all were late, or no good
        self._copy_shared(pieces)
        rows = [
            CacheRow(row_input.pages, piece.task.row.position + piece.start, piece.num_tokens)
            for piece, row_input in pieces
        ]
        output = self._model.forward(hidden, rows, self._cache, span=batch.span)
        return self._code(pieces, on_cpu(output), failed)

    def _copy_shared(self, pieces: Sequence[_PieceInput]) -> None:
        """Give rows that begin inside of a shared page its first tokens in one of their own."""
        for piece, row_input in pieces:
            for copy in row_input.copies if piece.start == 0 else ():
                self._cache.copy((copy.source,), (copy.target,), copy.num_tokens)

    def _check(self, source: StepInput, now: float) -> None:
        """Does somebody wait for this, and can it be decoded?"""
        if source.deadline < now:
            raise Busy("the step's time was over before its turn came", retry_after_s=RETRY_AFTER_S)
        source.decode(self._model.dtype)

    def _packed(self, pieces: Sequence[_PieceInput]) -> Tensor:
        """All pieces' hidden states, (N, D), on the CPU."""
        model, start = self._model, 0
        num_tokens = sum(piece.num_tokens for piece, _ in pieces)
        hidden = for_device((num_tokens, model.config.hidden_size), model.dtype, model.device)
        # Bytes, because making a tensor of each row takes longer than copying it.
        target, row_bytes = bytes_of(hidden), model.config.hidden_size * model.dtype.itemsize
        for piece, row_input in pieces:
            stop, first = start + piece.num_tokens, row_input.offset + piece.start
            part = target[start * row_bytes : stop * row_bytes]
            row_input.source.put(first, first + piece.num_tokens, part)
            start = stop
        return hidden

    def _code(
        self,
        pieces: Sequence[_PieceInput],
        output: Tensor,
        failed: list[tuple[Task, RequestFailed]],
    ) -> _Done:
        """Cut the output into rows, keep the unfinished, code the finished step by step.

        output: (N, D), on the CPU.
        """
        all_finite = is_finite(output)
        ready: dict[StepInput, list[tuple[Task, Tensor | slice]]] = {}
        start = 0
        for piece, row_input in pieces:
            stop, task = start + piece.num_tokens, piece.task
            whole, start = slice(start, stop), stop
            if not piece.is_last or row_input.outputs:
                row_input.outputs.append(output[whole])
            if not piece.is_last:
                continue
            wanted = row_input.source.num_outputs(task.row)
            result: Tensor | slice = slice(max(whole.start, stop - wanted), stop)
            if row_input.outputs:
                result = torch.cat(row_input.outputs)[-wanted:]
            if (all_finite and not row_input.outputs) or is_finite(_rows(output, result)):
                ready.setdefault(row_input.source, []).append((task, result))
            else:
                failed.append((task, RemoteFault("the output is not finite")))
        coder = _Coder(output)
        coded = [
            (source, [task for task, _ in results], coder.code(source, [r for _, r in results]))
            for source, results in ready.items()
        ]
        return _Done(coded, failed)


def _rows(output: Tensor, result: Tensor | slice) -> Tensor:
    return output[result] if isinstance(result, slice) else result


class _Coder:
    """Codes rows of one batch's output (N, D), or of what was kept of earlier ones."""

    def __init__(self, output: Tensor) -> None:
        self._output = output
        self._bytes = bytes_of(output.contiguous())
        self._row_bytes = output.shape[1] * output.itemsize

    def code(self, source: StepInput, results: Sequence[Tensor | slice]) -> WireTensor:
        """The results of one step, as its opener wants them.

        Copied, also a single row: what is kept for a client must not hold the whole batch. Decode
        steps are rows of one batch, and those that travel as they are become bytes at once: a
        tensor for each row takes several times as long.
        """
        opening = source.opening
        if opening.codec is TensorCodec.RAW and not opening.is_compressed:
            places = [result for result in results if isinstance(result, slice)]
            if len(places) == len(results):
                return plain_tensor(self._joined(places), self._output)
        values = torch.cat([_rows(self._output, result) for result in results])
        return encode_tensor(values, opening.codec, compress=opening.is_compressed)

    def _joined(self, places: Sequence[slice]) -> bytes:
        size = self._row_bytes
        return b"".join([self._bytes[p.start * size : p.stop * size] for p in places])


def _only_finite(
    pieces: Sequence[_PieceInput], hidden: Tensor, failed: list[tuple[Task, RequestFailed]]
) -> list[_PieceInput]:
    """The pieces without NaN and infinity, whose hidden states (N, D) these are; others fail."""
    good = []
    parts = hidden.split([piece.num_tokens for piece, _ in pieces])
    for each, part in zip(pieces, parts, strict=True):
        if is_finite(part):
            good.append(each)
        else:
            failed.append((each[0].task, BadInput("the step's tensor holds NaN or infinity")))
    return good

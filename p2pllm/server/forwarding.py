"""What a server answers without a session: `Forward`, whole sequences through some blocks.

A request is checked, waits in a bounded line (`p2pllm.server.forward_queue`) and is computed a
piece at a time (`p2pllm.model.forward_pass`). The device takes one thing after the other: between
two pieces comes whatever else was handed to it meanwhile, a batch of the worker for instance, and
behind that the next piece. So decode steps wait for one piece at most, which is less than a
prefill chunk, and passes go on however many decode steps there are.

Requests never share a product: what one is answered depends on nothing but itself.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from p2pllm.clock import Clock
from p2pllm.config import ServerConfig
from p2pllm.errors import BadRequest, CodecError, NotServed, RemoteFault, RequestFailed
from p2pllm.ids import PeerId
from p2pllm.model.executor import Executor
from p2pllm.model.forward_pass import Pass
from p2pllm.model.span_model import SpanCompute
from p2pllm.model.staging import on_cpu
from p2pllm.model.tensor_io import decode_tensor, encode_tensor, is_finite
from p2pllm.net.rpc import Request
from p2pllm.server.forward_queue import ForwardQueue
from p2pllm.server.offer import Offer, check_peer
from p2pllm.wire.messages import Forward, Forwarded, HopTiming
from p2pllm.wire.tensors import WireTensor

logger = logging.getLogger(__name__)

# Tokens × blocks that the device computes without looking up, and up to a group in one block more:
# one block of a usual micro-batch, an eighth of what a prefill chunk of 256 costs in 15 blocks.
PIECE_COST = 512


@dataclass(eq=False)
class _Work:
    """A request, and how far it has come; the device thread changes it while `run` waits."""

    message: Forward
    client: PeerId
    queued_at: float  # the event loop's time, as the next
    done: asyncio.Future[Forwarded]
    started_at: float | None = None
    compute_s: float = 0.0
    pieces: Pass | None = None  # once begun
    computed: int = 0  # tokens × blocks of its last turn
    answer: WireTensor | None = None

    num_bytes: int = field(init=False)
    cost: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = self.message.tensor.header.coded_bytes
        self.cost = sum(self.message.lengths) * len(self.message.span)

    def fail(self, error: RequestFailed) -> None:
        """Tell who waits, unless that one has gone."""
        if not self.done.done():
            self.done.set_exception(error)


class Forwarding:
    """Answers `Forward`; computes while `run` runs."""

    def __init__(
        self,
        model: SpanCompute,
        offer: Offer,
        settings: ServerConfig,
        executor: Executor,
        clock: Clock,
    ) -> None:
        self.is_leaving = False
        self._model = model
        self._offer = offer
        self._settings = settings
        self._executor = executor
        self._clock = clock
        self._queue: ForwardQueue[_Work] = ForwardQueue()
        self._wake = asyncio.Event()
        self._answered = asyncio.Event()

    def __len__(self) -> int:
        """Requests that are not answered."""
        return len(self._queue)

    async def answer(self, request: Request[Forward]) -> Forwarded:
        """The handler. It is cancelled when nobody waits any more, and then the work is dropped.

        Raises BadRequest, Forbidden, NotServed, Busy or RemoteFault.
        """
        self._check(request.message, request.peer)
        loop = asyncio.get_running_loop()
        work = _Work(request.message, request.peer, loop.time(), loop.create_future())
        self._queue.add(work)
        self._wake.set()
        try:
            return await work.done
        finally:
            self._queue.remove(work)
            self._answered.set()

    async def drain(self, deadline: float) -> None:
        """Return when nothing is left to answer, or at the deadline. New requests are refused."""
        self.is_leaving = True
        try:
            async with asyncio.timeout_at(deadline):
                while len(self):
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            return

    def _check(self, message: Forward, peer: PeerId) -> None:
        check_peer(peer, self._settings)
        if self.is_leaving:
            raise NotServed("this server is leaving and takes no new work")
        self._offer.check(message.model, message.numerics, message.span)
        num_tokens, limit = sum(message.lengths), self._settings.max_forward_tokens
        if num_tokens > limit:
            raise BadRequest(f"{num_tokens} tokens at once; this server takes {limit}")
        expected = (num_tokens, self._offer.hidden_size)
        if message.tensor.header.shape != expected:
            raise BadRequest(f"a tensor of shape {message.tensor.header.shape}, not {expected}")

    async def run(self) -> None:
        """Compute until cancelled; whoever waits then is told to go elsewhere."""
        try:
            while True:
                work = self._queue.next()
                if work is None:
                    self._wake.clear()
                    await self._wake.wait()
                else:
                    await self._go_on(work)
        finally:
            self.is_leaving = True
            for work in self._queue.take_all():
                work.fail(NotServed("this server has left these blocks"))

    async def _go_on(self, work: _Work) -> None:
        """One turn of a request; what is wrong with it is told to its client only."""
        if work.started_at is None:
            work.started_at = asyncio.get_running_loop().time()
        try:
            seconds = await self._executor.run(partial(self._turn, work))
        except RequestFailed as exc:
            self._end(work, exc)
        except Exception:
            logger.exception(
                "pass failed span=%s tokens=%d", work.message.span, sum(work.message.lengths)
            )
            self._end(work, RemoteFault("the computation failed at the server"))
        else:
            work.compute_s += seconds
            if work.computed:
                self._queue.on_done(work.computed, seconds)
            if work.answer is not None:
                self._end(work, None)

    def _end(self, work: _Work, error: RequestFailed | None) -> None:
        self._queue.remove(work)
        if error is not None:
            work.fail(error)
        elif work.answer is not None and not work.done.done():
            assert work.started_at is not None
            queue_s = work.started_at - work.queued_at
            timing = HopTiming(queue_s, work.compute_s, sent_at=self._clock.wall())
            work.done.set_result(Forwarded(work.answer, timing))

    # --- in the device thread --------------------------------------------------------------

    @torch.inference_mode()
    def _turn(self, work: _Work) -> float:
        """Decode the input; or compute a piece; or, behind the last one, code the output.

        Returns the seconds that it took.
        """
        started_at = self._executor.timer()
        work.computed = 0
        if work.pieces is None:
            work.pieces = self._begin(work.message)
            return self._executor.timer() - started_at
        while work.computed < PIECE_COST:
            try:
                work.computed += next(work.pieces)
            except StopIteration as end:
                work.answer = _coded(end.value, work.message)
                break
        return self._executor.timer() - started_at

    def _begin(self, message: Forward) -> Pass:
        try:
            hidden = decode_tensor(message.tensor, dtype=self._model.dtype)
        except CodecError as exc:
            raise BadRequest(str(exc)) from exc
        if not is_finite(hidden):
            raise BadRequest("hidden states that hold NaN or infinity")
        return self._model.forward_pass(hidden, message.lengths, message.span)


def _coded(output: Tensor, message: Forward) -> WireTensor:
    output = on_cpu(output)
    if not is_finite(output):
        raise RemoteFault("the output is not finite")
    return encode_tensor(output, message.codec, compress=message.is_compressed)

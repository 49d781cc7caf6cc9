"""What the device thread makes of a batch: decoded, computed, and coded for whoever waits."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from p2pllm.clock import SystemClock
from p2pllm.errors import Busy, RemoteFault
from p2pllm.ids import ModelId, PeerId, SessionId
from p2pllm.model.executor import DeviceThread
from p2pllm.model.kv_cache import CacheRow, KVCache, Rows
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.server.scheduler import Batch, Piece, Scheduler, Task
from p2pllm.server.worker import BadInput, StepInput, Worker
from p2pllm.sim.fake_model import WIDTH, FakeSpanModel, fake_config
from p2pllm.spans import Span
from p2pllm.wire.messages import Numerics, Open, Row
from p2pllm.wire.tensors import TensorCodec, WireTensor

SPAN = Span(0, 3)
PAGE = 64


class PlusOne(FakeSpanModel):
    """Adds one: easier to check than a hash."""

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        self.rows = list(rows)
        return hidden + 1.0


class Lab:
    """A worker, and steps of clients for it."""

    def __init__(self) -> None:
        self.model = PlusOne(fake_config(3), SPAN)
        cache = self.model.make_cache(16, PAGE)
        self.worker = Worker(
            self.model, cache, Scheduler(64, 32, 64), DeviceThread("test"), SystemClock()
        )
        self._count = 0

    def step(
        self,
        values: Tensor,
        lengths: tuple[int, ...],
        codec: TensorCodec = TensorCodec.RAW,
        *,
        deadline: float = math.inf,
        tail: int = 0,
    ) -> tuple[StepInput, list[Task]]:
        """A client's message with rows of these lengths, each of a session of its own."""
        self._count += 1
        client = PeerId(self._count.to_bytes(32))
        session = SessionId(self._count.to_bytes(16))
        model, numerics = ModelId(bytes(32)), Numerics("float32")
        opening = Open(session, 0, SPAN, 64, model, numerics, b"", client, codec=codec)
        source = StepInput(encode_tensor(values, codec), client, opening, deadline)
        tasks, offset = [], 0
        for number, length in enumerate(lengths):
            session = SessionId(bytes([self._count, number]) * 8)
            task = Task(Row(session, 0, 0, 0, length, tail=tail), client, SPAN, 0.0)
            source.add(task, offset, (self._count,))
            tasks.append(task)
            offset += length
        return source, tasks

    def compute(self, *pieces: tuple[StepInput, Piece]) -> "Result":
        batch = Batch(SPAN, tuple(piece for _, piece in pieces))
        inputs = [source.inputs[piece.task] for source, piece in pieces]
        done = self.worker._compute(batch, inputs, now=1.0)
        return Result(done.coded, dict(done.failed))


class Result:
    """What came out."""

    def __init__(
        self,
        coded: list[tuple[StepInput, list[Task], WireTensor]],
        failed: dict[Task, Exception],
    ) -> None:
        self.failed = failed
        self._coded = {id(source): (tasks, tensor) for source, tasks, tensor in coded}

    def of(self, source: StepInput) -> tuple[list[Task], Tensor]:
        tasks, tensor = self._coded[id(source)]
        return tasks, decode_tensor(tensor)

    def has(self, source: StepInput) -> bool:
        return id(source) in self._coded


@pytest.fixture
def lab() -> Lab:
    return Lab()


def whole(task: Task) -> Piece:
    return Piece(task, 0, task.row.num_tokens)


def test_each_client_gets_the_outputs_of_its_own_rows(lab: Lab) -> None:
    values = torch.randn(4, WIDTH)
    one, (a,) = lab.step(values[:1], (1,))
    two, (b, c) = lab.step(values[1:], (1, 2))
    result = lab.compute((two, whole(b)), (one, whole(a)), (two, whole(c)))
    assert result.of(one)[1].equal(values[:1] + 1)
    tasks, outputs = result.of(two)
    assert tasks == [b, c]
    assert outputs.equal(values[1:] + 1)
    assert lab.model.rows == [CacheRow((2,), 0, 1), CacheRow((1,), 0, 1), CacheRow((2,), 0, 2)]


def test_coded_inputs_are_decoded_and_outputs_coded_as_asked(lab: Lab) -> None:
    values = torch.randn(2, WIDTH)
    coded, (a,) = lab.step(values[:1], (1,), TensorCodec.BF16)
    raw, (b,) = lab.step(values[1:], (1,))
    result = lab.compute((coded, whole(a)), (raw, whole(b)))
    assert result.of(coded)[1].equal((values[:1].bfloat16().float() + 1).bfloat16().float())
    assert result.of(raw)[1].equal(values[1:] + 1)


def test_a_row_in_pieces_is_answered_with_the_last_one(lab: Lab) -> None:
    values = torch.randn(5, WIDTH)
    source, (task,) = lab.step(values, (5,))
    assert not lab.compute((source, Piece(task, 0, 3))).has(source)
    assert lab.compute((source, Piece(task, 3, 2))).of(source)[1].equal(values + 1)


@pytest.mark.parametrize("cut", [5, 4, 1])
def test_only_the_wanted_end_of_a_row_is_answered(lab: Lab, cut: int) -> None:
    values = torch.randn(5, WIDTH)
    source, (task,) = lab.step(values, (5,), tail=2)
    if cut < 5:
        lab.compute((source, Piece(task, 0, cut)))
        result = lab.compute((source, Piece(task, cut, 5 - cut)))
    else:
        result = lab.compute((source, whole(task)))
    assert result.of(source)[1].equal(values[3:] + 1)


def test_a_row_with_nan_fails_alone_and_is_not_computed(lab: Lab) -> None:
    values = torch.randn(3, WIDTH)
    values[1, 3] = math.nan
    bad, (a, b) = lab.step(values[:2], (1, 1))
    good, (c,) = lab.step(values[2:], (1,))
    result = lab.compute((bad, whole(a)), (bad, whole(b)), (good, whole(c)))
    assert isinstance(result.failed.pop(b), BadInput)
    assert not result.failed
    assert result.of(bad)[1].equal(values[:1] + 1)
    assert result.of(good)[1].equal(values[2:] + 1)
    assert len(lab.model.rows) == 2


def test_an_output_that_is_not_finite_fails_its_row_alone(lab: Lab) -> None:
    largest = torch.finfo(torch.float32).max
    lab.model.forward = lambda hidden, rows, cache, span=None: hidden * 2  # type: ignore[method-assign]
    source, (a, b) = lab.step(torch.tensor([[1.0], [largest]]).repeat(1, WIDTH), (1, 1))
    result = lab.compute((source, whole(a)), (source, whole(b)))
    assert isinstance(result.failed[b], RemoteFault)
    assert result.of(source)[1].equal(torch.full((1, WIDTH), 2.0))


def test_nobody_computes_for_those_who_have_given_up(lab: Lab) -> None:
    late, (a,) = lab.step(torch.randn(1, WIDTH), (1,), deadline=0.5)
    result = lab.compute((late, whole(a)))
    assert isinstance(result.failed[a], Busy)
    assert not result.has(late)


def test_data_that_does_not_decode_is_its_senders_fault(lab: Lab) -> None:
    source, (a, b) = lab.step(torch.randn(2, WIDTH), (1, 1))
    source.tensor = replace(source.tensor, data=bytes(source.tensor.data)[:-1])
    good, (c,) = lab.step(torch.randn(1, WIDTH), (1,))
    result = lab.compute((source, whole(a)), (source, whole(b)), (good, whole(c)))
    assert {type(error) for error in result.failed.values()} == {BadInput}
    assert result.has(good)


def test_what_is_kept_for_a_client_does_not_hold_the_batch(lab: Lab) -> None:
    sources = [lab.step(torch.randn(1, WIDTH), (1,)) for _ in range(8)]
    batch = Batch(SPAN, tuple(whole(task) for _, (task,) in sources))
    inputs = [source.inputs[task] for source, (task,) in sources]
    done = lab.worker._compute(batch, inputs, 1.0)
    for _, _, tensor in done.coded:
        assert isinstance(tensor.data, bytes)
        assert len(tensor.data) == WIDTH * 4

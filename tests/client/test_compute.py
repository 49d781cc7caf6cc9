"""The client's own part of a step: embed, join parts, draw tokens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from p2pllm.client.compute import PRODUCT_ROWS, Advance, ClientCompute, Drawing
from p2pllm.client.exchange import Part
from p2pllm.client.sequence import Finish
from p2pllm.client.sequence import Sequence as TextSequence
from p2pllm.client.state import WireFormat
from p2pllm.errors import LocalProtocolError, RemoteProtocolError
from p2pllm.ids import SessionId
from p2pllm.model.sampling import SamplingParams
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.sim.fake_model import WIDTH, FakeEdges, fake_config
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import DEVICE_S, BytesDetokenizer, InlineExecutor
from p2pllm.tasks import task_group, together
from p2pllm.wire.messages import Row
from p2pllm.wire.tensors import Compression, TensorCodec, TensorHeader, WireTensor

T = TypeVar("T")

RAW = WireFormat(TensorCodec.RAW, is_compressed=False)
INT8 = WireFormat(TensorCodec.INT8, is_compressed=False)
EDGES = FakeEdges(fake_config(4))
GREEDY = SamplingParams()


class NotedEdges(FakeEdges):
    """Keeps how many rows each product of the head has had; breaks when it is told to."""

    def __init__(self) -> None:
        super().__init__(fake_config(4))
        self.products: list[int] = []
        self.is_broken = False

    def logits(self, hidden: Tensor) -> Tensor:
        if self.is_broken:
            raise MemoryError("no logits today")
        self.products.append(len(hidden))
        return super().logits(hidden)


@asynccontextmanager
async def computing(edges: FakeEdges = EDGES) -> AsyncIterator[ClientCompute]:
    compute = ClientCompute(edges, InlineExecutor())
    async with task_group() as tasks:
        running = tasks.create_task(compute.run())
        yield compute
        running.cancel()


def ask(call: Callable[[ClientCompute], Awaitable[T]]) -> T:
    """What the client's compute answers to one call."""

    async def scenario() -> T:
        async with computing() as compute:
            return await call(compute)

    return run(scenario())


def coded(hidden: Tensor, wire: WireFormat = RAW) -> WireTensor:
    return encode_tensor(hidden, wire.codec, compress=wire.is_compressed)


def row(number: int, num_tokens: int = 1, tail: int = 0) -> Row:
    return Row(SessionId(bytes([number]) * 16), 0, 0, 0, num_tokens, -1, tail)


def part(hidden: Tensor, *rows: Row) -> Part:
    return Part(rows, coded(hidden), ())


def drawing(prompt: Sequence[int] = (1, 2), max_new_tokens: int = 9, number: int = 0) -> Drawing:
    return Drawing(TextSequence(tuple(prompt), max_new_tokens, BytesDetokenizer()), number)


def test_embedding_codes_as_asked() -> None:
    tensor = ask(lambda compute: compute.embed([5, 6, 7], INT8))

    assert tensor.header.codec is TensorCodec.INT8
    assert decode_tensor(tensor).round().equal(EDGES.embed(torch.tensor([5, 6, 7])))


def test_parts_are_joined_in_the_order_of_the_rows() -> None:
    hidden = torch.arange(7 * WIDTH).reshape(7, WIDTH).float() % 60
    rows = (row(1, 2), row(2, 4, tail=1), row(3), row(4, 3))
    parts = [part(hidden[[3]], rows[2]), part(hidden[[4, 5, 6, 0, 1]], rows[3], rows[0])]
    parts.append(part(hidden[[2]], rows[1]))

    joined = ask(lambda compute: compute.repack(rows, parts, RAW))

    assert decode_tensor(joined).equal(hidden)


def test_a_token_is_drawn_for_each_and_embedded_for_those_that_go_on() -> None:
    hidden = EDGES.embed(torch.tensor([10, 20, 30]))
    drawings = [drawing(), drawing(max_new_tokens=1), drawing()]

    step = ask(lambda compute: compute.advance([coded(hidden)], drawings, GREEDY, RAW))

    tokens = EDGES.logits(hidden).argmax(-1)
    assert [d.sequence.token_ids for d in drawings] == [[int(token)] for token in tokens]
    assert drawings[1].sequence.finish is Finish.LENGTH
    assert step.going_on == (0, 2)
    assert step.tensor is not None
    assert decode_tensor(step.tensor).equal(EDGES.embed(tokens[[0, 2]]))


def test_when_all_are_finished_nothing_is_embedded() -> None:
    tensors, drawings = [coded(torch.ones(1, WIDTH))], [drawing(max_new_tokens=1)]
    step = ask(lambda compute: compute.advance(tensors, drawings, GREEDY, RAW))
    assert (step.going_on, step.tensor) == ((), None)


def test_a_draw_depends_on_the_sequence_and_the_place_in_it() -> None:
    made = drawing((1, 2, 3), number=4)
    made.sequence.push(65)
    assert (made.next_draw().sequence, made.next_draw().position) == (4, 4)


def test_logits_of_several_tensors_come_in_one() -> None:
    hidden = EDGES.embed(torch.arange(5))
    logits = ask(lambda compute: compute.logits([coded(hidden[:2]), coded(hidden[2:])]))
    assert logits.equal(EDGES.logits(hidden))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_server_that_answers_nan_is_the_one_to_blame(poison: float) -> None:
    hidden = torch.ones(2, WIDTH)
    hidden[1, 1] = poison
    with pytest.raises(RemoteProtocolError):
        ask(lambda compute: compute.logits([coded(hidden)]))
    with pytest.raises(RemoteProtocolError):
        ask(lambda compute: compute.repack([row(1, 2)], [part(hidden, row(1, 2))], RAW))


def test_an_answer_that_does_not_decode_is_a_protocol_error() -> None:
    header = TensorHeader(
        TensorCodec.RAW, Compression.ZSTD, coded(torch.ones(1, WIDTH)).header.dtype, (1, WIDTH)
    )
    with pytest.raises(RemoteProtocolError):
        ask(lambda compute: compute.logits([WireTensor(header, b"no frame")]))


# --- rounds --------------------------------------------------------------------------------


async def advance(
    compute: ClientCompute, token: int, params: SamplingParams = GREEDY, wire: WireFormat = RAW
) -> Advance:
    """One generation's step, whose hidden state is that of a token."""
    hidden = EDGES.embed(torch.tensor([token]))
    return await compute.advance([coded(hidden)], [drawing(number=token)], params, wire)


def decoded(step: Advance) -> Tensor:
    assert step.tensor is not None
    return decode_tensor(step.tensor)


def test_a_generation_alone_goes_to_the_thread_at_once_and_only_once() -> None:
    async def scenario() -> float:
        async with computing() as compute:
            await advance(compute, 5)
            return asyncio.get_running_loop().time()

    assert run(scenario()) == DEVICE_S


def test_what_waits_while_the_thread_is_busy_shares_a_product() -> None:
    async def scenario() -> tuple[list[int], float]:
        edges = NotedEdges()
        async with computing(edges) as compute:

            async def later(token: int) -> Advance:
                await asyncio.sleep(DEVICE_S / 2)
                return await advance(compute, token)

            await together([advance(compute, 1), *(later(token) for token in (2, 3, 4))])
            return edges.products, asyncio.get_running_loop().time()

    assert run(scenario()) == ([1, 3], 2 * DEVICE_S)


def test_each_of_a_round_gets_what_it_would_get_alone() -> None:
    asked = [
        (10, GREEDY, RAW),
        (20, SamplingParams(temperature=30.0, seed=1), INT8),
        (30, SamplingParams(temperature=90.0, top_k=50, seed=2), RAW),
        (40, SamplingParams(banned_ids=tuple(range(100))), INT8),
    ]

    async def at_once() -> list[Advance]:
        async with computing() as compute:
            return await together(advance(compute, *each) for each in asked)

    steps = run(at_once())

    for step, each in zip(steps, asked, strict=True):
        alone = ask(partial(advance, token=each[0], params=each[1], wire=each[2]))
        assert (step.pieces, step.going_on) == (alone.pieces, alone.going_on)
        assert step.tensor is not None
        assert step.tensor.header.codec is each[2].codec
        assert decoded(step).equal(decoded(alone))


def test_all_of_a_round_hear_of_it_in_one_turn_of_the_loop_in_order() -> None:
    heard: list[str] = []

    async def generation(compute: ClientCompute, name: str) -> None:
        await advance(compute, ord(name))
        if not heard:
            asyncio.get_running_loop().call_soon(heard.append, "turn")
        heard.append(name)

    async def scenario() -> None:
        async with computing() as compute:
            await together(generation(compute, name) for name in "abcd")

    run(scenario())
    assert heard == ["a", "b", "c", "d", "turn"]


@pytest.mark.parametrize("is_nan", [True, False])
def test_a_server_that_answers_nonsense_fails_its_own_generation_only(is_nan: bool) -> None:
    good = coded(torch.ones(1, WIDTH))
    bad = coded(torch.full((1, WIDTH), torch.nan))
    if not is_nan:
        header = TensorHeader(TensorCodec.RAW, Compression.ZSTD, good.header.dtype, (1, WIDTH))
        bad = WireTensor(header, b"no frame")

    async def scenario() -> list[Advance | BaseException]:
        async with computing() as compute:
            steps = [
                compute.advance([tensor], [drawing()], GREEDY, RAW) for tensor in (good, bad, good)
            ]
            return await asyncio.gather(*steps, return_exceptions=True)

    first, failed, last = run(scenario())
    assert isinstance(failed, RemoteProtocolError)
    assert isinstance(first, Advance)
    assert isinstance(last, Advance)
    assert decoded(first).equal(decoded(last))


def test_an_error_that_nobody_expects_is_raised_to_all_of_the_round_and_ends_nothing() -> None:
    async def scenario() -> tuple[list[Advance | BaseException], Advance]:
        edges = NotedEdges()
        edges.is_broken = True
        async with computing(edges) as compute:
            steps = [advance(compute, token) for token in (1, 2)]
            broken = await asyncio.gather(*steps, return_exceptions=True)
            edges.is_broken = False
            return broken, await advance(compute, 3)

    broken, after = run(scenario())
    assert [type(error) for error in broken] == [MemoryError, MemoryError]
    assert decoded(after).shape == (1, WIDTH)


@pytest.mark.parametrize(
    ("after_s", "products"), [(0.0, [1, 2]), (1.5 * DEVICE_S, [1, 3])], ids=["waiting", "computing"]
)
def test_a_generation_that_gives_up_does_not_disturb_its_round(
    after_s: float, products: list[int]
) -> None:
    async def scenario() -> tuple[list[int], list[Advance]]:
        edges = NotedEdges()
        async with computing(edges) as compute, task_group() as tasks:
            first = tasks.create_task(advance(compute, 1))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # the first is under way
            others = [tasks.create_task(advance(compute, token)) for token in (2, 3, 4)]
            await asyncio.sleep(after_s)
            others[1].cancel()
            kept = [await task for task in (first, others[0], others[2])]
            return edges.products, kept

    found, kept = run(scenario())
    assert found == products
    tokens = EDGES.logits(EDGES.embed(torch.tensor([1, 2, 4]))).argmax(-1)
    assert torch.cat([decoded(step) for step in kept]).equal(EDGES.embed(tokens))


def test_a_prompts_logits_let_rounds_through() -> None:
    hidden = EDGES.embed(torch.arange(3 * PRODUCT_ROWS - 10) % 256)

    async def scenario() -> tuple[list[int], Tensor]:
        edges = NotedEdges()
        async with computing(edges) as compute:

            async def later() -> Advance:
                await asyncio.sleep(1.5 * DEVICE_S)  # the first slice is under way
                return await advance(compute, 5)

            async with task_group() as tasks:
                tasks.create_task(later())
                logits = await compute.logits([coded(hidden[:100]), coded(hidden[100:])])
            return edges.products, logits

    products, logits = run(scenario())
    assert products == [PRODUCT_ROWS, 1, PRODUCT_ROWS, PRODUCT_ROWS - 10]
    assert logits.equal(EDGES.logits(hidden))


def test_a_batch_larger_than_a_product_is_drawn_in_several() -> None:
    tokens = torch.arange(PRODUCT_ROWS + 3) % 256
    drawings = [drawing(number=number) for number in range(len(tokens))]

    async def scenario() -> tuple[list[int], Advance]:
        edges = NotedEdges()
        async with computing(edges) as compute:
            tensors = [coded(EDGES.embed(tokens))]
            return edges.products, await compute.advance(tensors, drawings, GREEDY, RAW)

    products, step = run(scenario())
    assert products == [PRODUCT_ROWS, 3]
    expected = EDGES.logits(EDGES.embed(tokens)).argmax(-1)
    assert decoded(step).equal(EDGES.embed(expected))


def test_whoever_waits_when_the_swarm_is_left_is_cancelled_and_nobody_is_let_in() -> None:
    async def scenario() -> list[Advance | BaseException]:
        async with computing() as compute:
            steps = [asyncio.ensure_future(advance(compute, token)) for token in (1, 2)]
            await asyncio.sleep(DEVICE_S / 2)
            steps.append(asyncio.ensure_future(advance(compute, 3)))
            await asyncio.sleep(0)
        steps.append(asyncio.ensure_future(advance(compute, 4)))
        return await asyncio.gather(*steps, return_exceptions=True)

    *waiting, late = run(scenario())
    assert [type(error) for error in waiting] == [asyncio.CancelledError] * 3
    assert isinstance(late, LocalProtocolError)

"""Passes without sessions through a swarm on virtual time: right, bounded, and fair to others."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pllm.client.model import SwarmModel
from p2pllm.config import ClientConfig, ServerConfig, ShaperConfig
from p2pllm.errors import (
    BadRequest,
    Busy,
    ConfigError,
    Forbidden,
    NoRoute,
    NotServed,
    P2PLLMError,
    RemoteFault,
    RequestFailed,
)
from p2pllm.ids import ModelId
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.net.rpc import Request
from p2pllm.server.forward_queue import CLIENTS_SHARE, MAX_REQUESTS
from p2pllm.server.forwarding import PIECE_COST
from p2pllm.sim.fake_model import WIDTH, FakeDevice, FakeEdges
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import LAB_SERVER, SimServer, SimSwarm
from p2pllm.spans import Span
from p2pllm.wire.messages import Ack, Forward, Forwarded, HopTiming, Message, Numerics, Row
from p2pllm.wire.tensors import Compression, DType, TensorCodec, TensorHeader, WireTensor
from tests.swarm.raw_client import ONE, RawClient, expected, raw_client, states

NUM_BLOCKS = 6
WHOLE, THIRDS = Span(0, 6), (Span(0, 2), Span(2, 4), Span(4, 6))
LENGTHS = (5, 9, 1, 30, 3, 3, 8, 12)
SETTINGS = ClientConfig(micro_batch_tokens=12, patience_s=20.0)
TOKEN_S = 1e-4  # of a device, for a token in a block

Use = Callable[["Lab"], Awaitable[None]]


@dataclass
class Lab:
    """A swarm with a server for each span, in order, and a client."""

    swarm: SimSwarm
    servers: list[SimServer]
    model: SwarmModel
    devices: list[FakeDevice]

    def prompts(self, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
        return [[(7 * i + number) % 256 for i in range(n)] for number, n in enumerate(lengths)]

    def whole(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """What one process makes of each."""
        edges = FakeEdges(self.swarm.source.config)
        hidden = [edges.embed(torch.tensor(prompt)) for prompt in prompts]
        return [expected(WHOLE, sequence, NUM_BLOCKS) for sequence in hidden]

    async def check(self, lengths: Sequence[int] = LENGTHS) -> None:
        """A batch comes out as it should."""
        prompts = self.prompts(lengths)
        outputs = await self.model.hidden_states(prompts)
        assert_same([output.round() for output in outputs], self.whole(prompts))

    def work(self) -> list[int]:
        """Tokens × blocks that each server's device has computed."""
        return [round(device.spent_s / TOKEN_S) for device in self.devices]


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(ours) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def with_lab(
    use: Use,
    spans: Sequence[Span] = THIRDS,
    *,
    server: ServerConfig = LAB_SERVER,
    client: ClientConfig = SETTINGS,
    wire_codec: str = "raw",
    line: ShaperConfig = ShaperConfig(delay_s=0.005),
) -> None:
    async def scenario() -> None:
        async with SimSwarm(NUM_BLOCKS, line=line) as swarm:
            devices = [FakeDevice(token_s=TOKEN_S) for _ in spans]
            servers = [
                await swarm.add_server(span, server, device=device)
                for span, device in zip(spans, devices, strict=True)
            ]
            async with swarm.client(client, wire_codec=wire_codec) as model:
                await use(Lab(swarm, servers, model, devices))

    run(scenario())


# --- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spans",
    [(WHOLE,), THIRDS, (Span(0, 4), Span(1, 6), Span(2, 5)), tuple(Span(n, n + 1) for n in WHOLE)],
    ids=str,
)
def test_any_chain_gives_what_the_whole_model_gives(spans: tuple[Span, ...]) -> None:
    with_lab(Lab.check, spans)


@pytest.mark.parametrize("wire_codec", ["bf16", "int8"])
def test_every_codec_carries_the_fake_model_exactly(wire_codec: str) -> None:
    with_lab(Lab.check, wire_codec=wire_codec)


@pytest.mark.parametrize("micro_batch_tokens", [1, 12, 10_000])
def test_the_size_of_micro_batches_changes_nothing(micro_batch_tokens: int) -> None:
    with_lab(Lab.check, client=replace(SETTINGS, micro_batch_tokens=micro_batch_tokens))


def test_some_blocks_may_be_asked_for_and_hidden_states_given() -> None:
    async def use(lab: Lab) -> None:
        hidden = [states(length, start=length) for length in LENGTHS]
        outputs = await lab.model.forward_hidden(hidden, span=Span(1, 5))
        assert_same(outputs, [expected(Span(1, 5), each, NUM_BLOCKS) for each in hidden])

    with_lab(use)


def test_no_sequences_give_nothing() -> None:
    async def use(lab: Lab) -> None:
        assert await lab.model.hidden_states([]) == []

    with_lab(use)


def test_outputs_may_take_part_in_autograd() -> None:
    async def use(lab: Lab) -> None:
        (output,) = await lab.model.hidden_states([[1, 2, 3]])
        weight = torch.ones(WIDTH, requires_grad=True)
        (output * weight).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, output.sum(0))

    with_lab(use)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.hidden_states([[1], []]),
        lambda model: model.hidden_states([[256]]),
        lambda model: model.hidden_states([[1]], span=Span(2, 7)),
        lambda model: model.forward_hidden([torch.zeros(3, WIDTH + 1)]),
        lambda model: model.forward_hidden([torch.full((3, WIDTH), torch.nan)]),
    ],
    ids=["empty", "no such token", "no such block", "width", "nan"],
)
def test_what_cannot_be_is_told_at_once(ask: Callable[[SwarmModel], Awaitable[Any]]) -> None:
    async def use(lab: Lab) -> None:
        with pytest.raises(ConfigError):
            await ask(lab.model)
        assert lab.work() == [0, 0, 0]

    with_lab(use)


def test_hops_work_at_the_same_time() -> None:
    """Nine micro-batches over three hops take little more than eleven turns of one hop."""

    async def use(lab: Lab) -> None:
        started = asyncio.get_running_loop().time()
        await lab.check([100] * 9)
        turn_s = 100 * 2 * TOKEN_S
        assert asyncio.get_running_loop().time() - started < 2 * 11 * turn_s
        assert lab.work() == [9 * 100 * 2] * 3

    with_lab(use, client=replace(SETTINGS, micro_batch_tokens=100))


def test_few_micro_batches_are_under_way_at_once() -> None:
    async def use(lab: Lab) -> None:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, sum(len(server.server.forwarding) for server in lab.servers))
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch())
            await lab.check([12] * 40)
            watching.cancel()
        assert 1 < most <= 6

    with_lab(use)


# --- when servers fail -------------------------------------------------------------------------


@pytest.mark.parametrize("is_silent", [False, True], ids=["reset", "silent"])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("after_s", [0.02, 0.2, 0.35])
def test_a_lost_server_costs_its_own_span_only(index: int, is_silent: bool, after_s: float) -> None:
    async def use(lab: Lab) -> None:
        async with asyncio.TaskGroup() as tasks:
            checking = tasks.create_task(lab.check([50] * 40))
            await asyncio.sleep(after_s)
            assert not checking.done()
            chosen = [n for n in (index, index + 3) if len(lab.servers[n].server.forwarding)]
            lost = chosen[0] if chosen else index
            lab.swarm.internet.kill(lab.servers[lost].host, is_silent=is_silent)
        work, needed = lab.work(), 40 * 50 * 2
        for n in range(3):
            if n != index:
                assert work[n] + work[n + 3] == needed, "nobody else computes anything twice"
        assert needed <= work[index] + work[index + 3] <= needed + 6 * 50 * 2

    with_lab(use, (*THIRDS, *THIRDS), client=replace(SETTINGS, micro_batch_tokens=50))


def test_two_servers_may_take_the_place_of_one() -> None:
    async def use(lab: Lab) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lab.check([50] * 8))
            await asyncio.sleep(0.1)
            lab.swarm.internet.kill(lab.servers[0].host)

    spans = (Span(0, 4), Span(4, 6), Span(0, 1), Span(1, 3), Span(3, 4))
    with_lab(use, spans, client=replace(SETTINGS, micro_batch_tokens=50))


def test_a_server_that_leaves_in_an_orderly_way_is_replaced() -> None:
    async def use(lab: Lab) -> None:
        async with asyncio.TaskGroup() as tasks:
            checking = tasks.create_task(lab.check([50] * 40))
            await asyncio.sleep(0.3)
            busy = [server for server in lab.servers if len(server.server.forwarding)]
            assert busy
            busy[0].task.cancel()
            await asyncio.sleep(0.05)
            assert not checking.done()

    with_lab(use, (*THIRDS, *THIRDS), client=replace(SETTINGS, micro_batch_tokens=50))


Handler = Callable[[Request[Forward]], Awaitable[Message]]


def answers(server: SimServer, handler: Handler) -> None:
    server.server.node.endpoint.handle(Forward, handler)


async def nan(request: Request[Forward]) -> Message:
    hidden = torch.full(request.message.tensor.header.shape, torch.nan)
    return Forwarded(encode_tensor(hidden, TensorCodec.RAW), HopTiming(0, 0, 0))


async def too_short(request: Request[Forward]) -> Message:
    return Forwarded(encode_tensor(states(1), TensorCodec.RAW), HopTiming(0, 0, 0))


async def something_else(request: Request[Forward]) -> Message:
    return Ack()


async def garbage(request: Request[Forward]) -> Message:
    header = request.message.tensor.header
    header = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, header.shape)
    return Forwarded(WireTensor(header, b"no zstd"), HopTiming(0, 0, 0))


async def broken(request: Request[Forward]) -> Message:
    raise RemoteFault("broken")


@pytest.mark.parametrize("handler", [nan, too_short, something_else, garbage, broken])
def test_who_answers_nonsense_is_penalised_and_others_do_its_part(handler: Handler) -> None:
    async def use(lab: Lab) -> None:
        answers(lab.servers[0], handler)
        answers(lab.servers[1], handler)
        await lab.check()
        view = lab.model.tracker.view()
        bad = {server.server.node.peer_id for server in lab.servers[:2]}
        assert {each.peer_id for each in view.servers if view.is_penalised(each)} <= bad

    with_lab(use, (Span(0, 3), Span(3, 6), Span(0, 3), Span(3, 6)))


@pytest.mark.parametrize("error", [NotServed("moved"), Forbidden("not you"), BadRequest("no")])
def test_who_refuses_is_passed_by_without_a_penalty(error: RequestFailed) -> None:
    async def refuse(request: Request[Forward]) -> Message:
        raise error

    async def use(lab: Lab) -> None:
        answers(lab.servers[0], refuse)
        await lab.check()
        view = lab.model.tracker.view()
        assert not any(view.is_penalised(server) for server in view.servers)

    with_lab(use, (WHOLE, WHOLE))


def test_who_is_busy_is_asked_again_when_it_says() -> None:
    async def use(lab: Lab) -> None:
        asked: list[float] = []
        good = lab.servers[0].server.forwarding.answer

        async def busy(request: Request[Forward]) -> Message:
            asked.append(asyncio.get_running_loop().time())
            if len(asked) <= 3:
                raise Busy("later", retry_after_s=2.0)
            return await good(request)

        answers(lab.servers[0], busy)
        await lab.check([10])
        assert [round(b - a) for a, b in pairwise(asked)] == [2, 2, 2]

    with_lab(use, (WHOLE,))


def test_what_no_server_takes_is_raised_at_once() -> None:
    async def use(lab: Lab) -> None:
        started = asyncio.get_running_loop().time()
        with pytest.raises(BadRequest, match="20 tokens at once; this server takes 16"):
            await lab.model.hidden_states(lab.prompts([20]))
        assert asyncio.get_running_loop().time() - started < 1.0
        await lab.check([16, 16])

    with_lab(use, (WHOLE, WHOLE), server=replace(LAB_SERVER, max_forward_tokens=16))


def test_missing_blocks_are_named_when_patience_is_over() -> None:
    async def use(lab: Lab) -> None:
        with pytest.raises(NoRoute) as caught:
            await lab.model.hidden_states([[1, 2]])
        assert caught.value.missing == ((2, 6),)

    with_lab(use, (Span(0, 2),))


def test_missing_blocks_may_appear_meanwhile() -> None:
    async def use(lab: Lab) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lab.check())
            await asyncio.sleep(3.0)
            await lab.swarm.add_server(Span(2, 6))

    with_lab(use, (Span(0, 2),))


def test_a_span_without_any_server_left_raises_what_was_missing() -> None:
    async def use(lab: Lab) -> None:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(raised(lab.model.hidden_states(lab.prompts([50] * 8))))
            await asyncio.sleep(0.1)
            lab.swarm.internet.kill(lab.servers[1].host)
        assert isinstance(asking.result(), P2PLLMError)

    with_lab(use, client=replace(SETTINGS, micro_batch_tokens=50))


async def raised(work: Awaitable[object]) -> P2PLLMError | None:
    try:
        await work
    except P2PLLMError as exc:
        return exc
    return None


# --- a server's own rules ----------------------------------------------------------------------


def asking(client: RawClient, lengths: tuple[int, ...] = (3, 2)) -> Forward:
    """A good request to a server of all blocks."""
    tensor = encode_tensor(states(sum(lengths)), TensorCodec.RAW)
    numerics = Numerics("float32", kv_dtype="float32")
    return Forward(client.swarm.source.model_id, numerics, WHOLE, lengths, tensor)


def with_raw_client(
    use: Callable[[RawClient, SimServer], Awaitable[None]],
    server: ServerConfig = LAB_SERVER,
    device: FakeDevice | None = None,
) -> None:
    async def scenario() -> None:
        async with SimSwarm(NUM_BLOCKS) as swarm:
            it = await swarm.add_server(WHOLE, server, device=device)
            async with raw_client(swarm, it) as client:
                await use(client, it)
                assert len(it.server.forwarding) == 0

    run(scenario())


async def assert_answers(client: RawClient) -> None:
    reply = await client.ask(asking(client))
    assert isinstance(reply, Forwarded)
    parts = states(5).split((3, 2))
    right = torch.cat([expected(WHOLE, part, NUM_BLOCKS) for part in parts])
    assert torch.equal(decode_tensor(reply.tensor), right)


def coded(hidden: Tensor) -> WireTensor:
    return encode_tensor(hidden, TensorCodec.RAW)


NAN, INF = torch.full((5, WIDTH), torch.nan), torch.full((5, WIDTH), torch.inf)
INT8 = TensorHeader(TensorCodec.INT8, Compression.NONE, DType.FLOAT32, (5, WIDTH))
ZSTD = TensorHeader(TensorCodec.RAW, Compression.ZSTD, DType.FLOAT32, (5, WIDTH))
HOSTILE: dict[str, tuple[dict[str, Any], type[P2PLLMError]]] = {
    "another model": ({"model": ModelId(b"x" * 32)}, NotServed),
    "other numerics": ({"numerics": Numerics("bfloat16")}, NotServed),
    "blocks past the end": ({"span": Span(3, 7)}, NotServed),
    "no sequences": ({"lengths": ()}, BadRequest),
    "too few tokens": ({"lengths": (3, 3)}, BadRequest),
    "too many tokens": ({"lengths": (3, 1)}, BadRequest),
    "endless": ({"lengths": (2**31 - 1,) * 100}, BadRequest),
    "no tokens in one": ({"lengths": (5, 0)}, BadRequest),
    "another width": ({"tensor": coded(torch.zeros(5, WIDTH + 1))}, BadRequest),
    "three dimensions": ({"tensor": coded(torch.zeros(1, 5, WIDTH))}, BadRequest),
    "nan": ({"tensor": coded(NAN)}, BadRequest),
    "infinity": ({"tensor": coded(INF)}, BadRequest),
    "scales of nan": ({"tensor": WireTensor(INT8, b"\xff" * INT8.coded_bytes)}, BadRequest),
    "no zstd": ({"tensor": WireTensor(ZSTD, b"no zstd")}, BadRequest),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_and_the_next_one_answered(name: str) -> None:
    changes, error = HOSTILE[name]

    async def use(client: RawClient, server: SimServer) -> None:
        with pytest.raises(error):
            await client.ask(replace(asking(client), **changes))
        await assert_answers(client)

    with_raw_client(use)


def test_more_tokens_than_the_server_takes_are_refused() -> None:
    async def use(client: RawClient, server: SimServer) -> None:
        with pytest.raises(BadRequest, match="6 tokens at once"):
            await client.ask(asking(client, (6,)))
        await assert_answers(client)

    with_raw_client(use, replace(LAB_SERVER, max_forward_tokens=5))


def test_who_is_kept_out_is_told() -> None:
    async def use(client: RawClient, server: SimServer) -> None:
        with pytest.raises(Forbidden):
            await client.ask(asking(client))

    with_raw_client(use, replace(LAB_SERVER, allow=frozenset({"somebody else"})))


def test_a_client_that_asks_too_much_at_once_is_told_when_to_come_again() -> None:
    share = MAX_REQUESTS // CLIENTS_SHARE

    async def use(client: RawClient, server: SimServer) -> None:
        results = await asyncio.gather(
            *(client.ask(asking(client)) for _ in range(share + 5)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, Busy)]
        assert len(refused) == 5
        assert all(busy.retry_after_s > 0 for busy in refused)
        await assert_answers(client)

    with_raw_client(use)


def test_work_that_nobody_waits_for_any_more_is_dropped() -> None:
    device = FakeDevice(token_s=TOKEN_S)

    async def use(client: RawClient, server: SimServer) -> None:
        with pytest.raises(P2PLLMError):
            await client.ask(asking(client, (1000,) * 4), timeout_s=0.5)
        await asyncio.sleep(0.2)
        assert len(server.server.forwarding) == 0
        spent_s = device.spent_s
        await asyncio.sleep(1.0)
        assert device.spent_s == spent_s < 1.0

    with_raw_client(use, device=device)


def test_a_leaving_server_answers_what_it_has_and_takes_nothing_new() -> None:
    async def use(client: RawClient, server: SimServer) -> None:
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(client.ask(asking(client, (1000,))))
            await asyncio.sleep(0.1)
            draining = tasks.create_task(server.server.drain(30.0))
            await asyncio.sleep(0.1)
            with pytest.raises(NotServed):
                await client.ask(asking(client))
            assert not draining.done()
        assert isinstance(asked.result(), Forwarded)

    with_raw_client(use, device=FakeDevice(token_s=TOKEN_S))


def test_decode_beside_a_large_pass_waits_for_one_piece_at_most() -> None:
    async def use(client: RawClient, server: SimServer) -> None:
        loop = asyncio.get_running_loop()
        await client.open(span=WHOLE)

        async def step_s(number: int) -> float:
            started = loop.time()
            await client.step(Row(ONE, 0, number, number, 1))
            return loop.time() - started

        alone_s = max([await step_s(number) for number in range(5)])
        async with asyncio.TaskGroup() as tasks:
            large = tasks.create_task(client.ask(asking(client, (100,) * 40)))
            await asyncio.sleep(0.2)
            beside_s = [await step_s(number) for number in range(5, 25)]
            assert not large.done()
        piece_s = (PIECE_COST + 100) * TOKEN_S
        assert max(beside_s) < alone_s + 1.1 * piece_s
        assert not client.failures

    with_raw_client(use, device=FakeDevice(token_s=TOKEN_S))


def test_a_small_pass_does_not_wait_for_a_large_one_of_another_client() -> None:
    async def use(client: RawClient, server: SimServer) -> None:
        async with (
            raw_client(client.swarm, server, number=2) as other,
            asyncio.TaskGroup() as tasks,
        ):
            large = tasks.create_task(client.ask(asking(client, (100,) * 40)))
            await asyncio.sleep(0.1)
            await assert_answers(other)
            assert not large.done()

    with_raw_client(use, device=FakeDevice(token_s=TOKEN_S))

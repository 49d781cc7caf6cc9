"""A server that leaves: it says so, and its sessions' keys and values go to the next one."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import ExitStack, aclosing
from dataclasses import replace

import pytest
import torch

from p2pllm.config import ShaperConfig
from p2pllm.errors import (
    BadRequest,
    Busy,
    Forbidden,
    NotServed,
    RequestFailed,
    SessionUnknown,
    StaleEpoch,
)
from p2pllm.identity import Identity
from p2pllm.ids import ModelId, PeerId, SessionId
from p2pllm.model.tensor_io import encode_tensor
from p2pllm.net.rpc import Request
from p2pllm.server import handover
from p2pllm.server.handlers import ANSWER_S
from p2pllm.server.handover import MAX_PULL_S, MAX_PULLS, MAX_PULLS_EACH, PLACE_WAIT_S, Places
from p2pllm.server.worker import Worker
from p2pllm.sim.fake_model import WIDTH
from p2pllm.sim.loop import WALL_EPOCH
from p2pllm.spans import Span
from p2pllm.wire.messages import (
    Close,
    Fork,
    HandOver,
    Message,
    Numerics,
    Opened,
    Pages,
    Pull,
    Row,
)
from p2pllm.wire.records import PEER_NAMESPACE, PeerRecord, make_record
from p2pllm.wire.tensors import TensorCodec, WireTensor
from tests.swarm.lab import FIRST, READER, SECOND, SLOW_S, Lab, computed, length, with_lab
from tests.swarm.raw_client import ONE, THREE, TWO, RawClient, expected, raw_client, states

TOKEN_BYTES = 2 * 2 * WIDTH * 4  # of keys and values in the second half, in float32


def inputs(num_tokens: int) -> torch.Tensor:
    """What the second half is given for a sequence."""
    return expected(FIRST, states(num_tokens))


def outputs(num_tokens: int) -> torch.Tensor:
    return expected(SECOND, inputs(num_tokens))


async def begin(lab: Lab, num_tokens: int, session: SessionId = ONE) -> None:
    """Open a session at b and compute so many tokens."""
    request = replace(lab.alice.opening(session, max_tokens=640), span=SECOND)
    await lab.at(lab.b).ask(request)
    row = Row(session, 0, 0, 0, num_tokens)
    await lab.at(lab.b).step(row, hidden=inputs(num_tokens))


async def assert_goes_on(lab: Lab, position: int, *, epoch: int = 1) -> None:
    """The next token at spare_b comes out as if it had computed all before."""
    row = Row(ONE, epoch, 9, position, 1)
    before = computed(lab.spare_b)
    await lab.at(lab.spare_b).step(row, hidden=inputs(position + 1)[-1:])
    assert lab.alice.outputs[-1].rows == (row,)
    assert lab.alice.tensor().equal(outputs(position + 1)[-1:])
    assert computed(lab.spare_b) == before + 1


# --- keys and values move ----------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 64, 150, 600])
@pytest.mark.parametrize("part_tokens", [1024, 40])
def test_a_session_goes_on_elsewhere_and_nothing_is_computed_again(
    num_tokens: int, part_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "PART_BYTES", part_tokens * TOKEN_BYTES)

    async def use(lab: Lab) -> None:
        await begin(lab, num_tokens)
        opened = await lab.hand_over(num_tokens)
        assert (opened.position, opened.next_step) == (num_tokens, 0)
        assert computed(lab.spare_b) == 0
        await assert_goes_on(lab, num_tokens)

    with_lab(use)


def test_fewer_tokens_than_there_are_may_be_moved() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 150)
        assert (await lab.hand_over(70)).position == 70
        await assert_goes_on(lab, 70)

    with_lab(use)


def test_some_of_the_blocks_may_be_moved() -> None:
    async def use(lab: Lab) -> None:
        whole = await lab.swarm.add_server(Span(0, 4))
        node = whole.server.node
        lab.alice.endpoint.learn(node.peer_id, node.addresses)
        there = lab.at(whole)
        await there.open()
        await there.step(Row(ONE, 0, 0, 0, 50))
        await there.ask(HandOver(ONE, 0, READER))
        request = replace(
            lab.alice.opening(epoch=1),
            span=SECOND,
            source=await lab.record(whole),
            source_token=READER,
            source_position=50,
        )
        opened = await lab.at(lab.spare_b).ask(request)
        assert isinstance(opened, Opened)
        assert opened.position == 50
        await assert_goes_on(lab, 50)
        await there.ask(Close((ONE,), 9))

    with_lab(use)


def test_the_old_server_computes_steps_meanwhile() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 150)
        moving = asyncio.ensure_future(lab.hand_over(150))
        await asyncio.sleep(0.02)
        row = Row(ONE, 0, 1, 150, 1)
        await lab.at(lab.b).step(row, hidden=inputs(151)[150:])
        assert lab.alice.tensor().equal(outputs(151)[150:])
        assert (await moving).position == 150
        await assert_goes_on(lab, 150)

    with_lab(use)


def test_moving_gives_way_to_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "PART_BYTES", TOKEN_BYTES)
    line = ShaperConfig(delay_s=0.005, bandwidth_bytes_s=20_000)

    async def use(lab: Lab) -> None:
        await begin(lab, 100)
        await lab.at(lab.spare_b).ask(replace(lab.alice.opening(TWO), span=SECOND))
        moving = asyncio.ensure_future(lab.hand_over(100))
        await asyncio.sleep(0.1)
        started = asyncio.get_running_loop().time()
        await lab.at(lab.spare_b).step(Row(TWO, 0, 0, 0, 1), hidden=inputs(1))
        took_s = asyncio.get_running_loop().time() - started
        assert not moving.done()
        assert took_s < 0.1
        await moving

    with_lab(use, line=line)


class Parts:
    """Parts of ten tokens, and when the fifth of them is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts: list[int] = []
        self.is_under_way = asyncio.Event()
        export = Worker.export_pages

        async def noted(
            worker: Worker, pages: tuple[int, ...], span: Span, start: int, num_tokens: int
        ) -> Pages:
            self.starts.append(start)
            if len(self.starts) == 5:
                self.is_under_way.set()
            return await export(worker, pages, span, start, num_tokens)

        monkeypatch.setattr(Worker, "export_pages", noted)
        monkeypatch.setattr(handover, "PART_BYTES", 10 * TOKEN_BYTES)


def test_an_interrupted_transfer_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(lab: Lab) -> None:
        parts = Parts(monkeypatch)
        await begin(lab, 150)
        moving = asyncio.ensure_future(lab.hand_over(150))
        await parts.is_under_way.wait()
        for channel in lab.b.server.node.endpoint._all_channels():
            if channel.peer == lab.spare_b.server.node.peer_id:
                channel.link.abort()
        assert (await moving).position == 150
        again = [s for i, s in enumerate(parts.starts) if s in parts.starts[:i]]
        assert again, "something was on its way"
        assert min(again) > 0, "and what had come was not asked for again"
        await assert_goes_on(lab, 150)

    with_lab(use, device_s=0.02)


@pytest.mark.parametrize("is_silent", [False, True], ids=["process", "machine"])
def test_a_source_that_dies_leaves_what_came_and_the_client_replays_the_rest(
    is_silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(lab: Lab) -> None:
        parts = Parts(monkeypatch)
        await begin(lab, 150)
        moving = asyncio.ensure_future(lab.hand_over(150))
        await parts.is_under_way.wait()
        lab.kill(lab.b, is_silent=is_silent)
        opened = await moving
        assert 0 < opened.position < 150
        rest = inputs(150)[opened.position :]
        replay = Row(ONE, 1, 0, opened.position, len(rest))
        await lab.at(lab.spare_b).step(replay, hidden=rest)
        assert lab.alice.tensor().equal(outputs(150)[opened.position :])

    with_lab(use, device_s=0.02)


def test_what_does_not_come_in_the_requests_time_is_asked_for_again_by_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handover, "PART_BYTES", 80 * TOKEN_BYTES)

    async def use(lab: Lab) -> None:
        await begin(lab, 600)
        started = asyncio.get_running_loop().time()
        opened = await lab.hand_over(600, timeout_s=2.0)
        took_s = asyncio.get_running_loop().time() - started
        assert took_s < 2.0 + SLOW_S - ANSWER_S + 0.1
        assert 0 < opened.position < 600
        assert (await lab.hand_over(600, epoch=2)).position == 600
        await assert_goes_on(lab, 600, epoch=2)

    with_lab(use, device_s=4 * SLOW_S)


# --- who may read ------------------------------------------------------------------------------


async def pull(client: RawClient, request: Pull, *, timeout_s: float = 10.0) -> list[Pages]:
    replies = client.endpoint.stream(client.server, request, timeout_s=timeout_s)
    parts = []
    async with aclosing(replies):
        async for part in replies:
            assert isinstance(part, Pages)
            parts.append(part)
    return parts


def request_at(lab: Lab, start: int = 0, stop: int = 100) -> Pull:
    opening = lab.alice.opening()
    return Pull(ONE, READER, opening.model, opening.numerics, SECOND, start, stop)


def test_nothing_is_read_beyond_what_has_been_computed() -> None:
    async def use(lab: Lab) -> None:
        there = lab.at(lab.b)
        await begin(lab, 30)
        await there.ask(HandOver(ONE, 0, READER))
        parts = await pull(there, request_at(lab, 10, 2**31 - 1))
        assert [(part.position, part.num_tokens) for part in parts] == [(10, 20)]
        assert parts[0].tensor.header.shape == (2, 2, 20, WIDTH)
        for start in (30, 31, 2**31 - 1):
            assert await pull(there, request_at(lab, start, 2**31 - 1)) == []
        await there.push([Row(ONE, 0, 1, 20, 40)], inputs(60)[20:])  # rolls back, and computes
        await asyncio.sleep(0.02)
        assert length(lab.b) == 60
        parts = await pull(there, request_at(lab))  # each has to wait for the device
        assert [part.num_tokens for part in parts] == [20, 40]
        after = await pull(there, request_at(lab, 0, 60))
        assert after[0].tensor.data[: 20 * WIDTH * 4] == parts[0].tensor.data[: 20 * WIDTH * 4]

    with_lab(use, device_s=SLOW_S)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"session": TWO}, SessionUnknown),
        ({"token": b""}, Forbidden),
        ({"token": b"q" * 16}, Forbidden),
        ({"token": READER + b"x"}, Forbidden),
        ({"model": ModelId(b"x" * 32)}, NotServed),
        ({"numerics": Numerics("float32", kv_dtype="bfloat16")}, NotServed),
        ({"numerics": Numerics("float32", "int8", "float32")}, NotServed),
        ({"numerics": Numerics("float32", "none", "int8")}, NotServed),
        ({"span": Span(0, 4)}, NotServed),
        ({"span": Span(1, 3)}, NotServed),
    ],
    ids=str,
)
def test_pages_are_refused_to_who_may_not_have_them(
    change: dict[str, object], error: type[RequestFailed]
) -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 30)
        async with raw_client(lab.swarm, lab.b, 2) as bob:
            request = replace(request_at(lab), **change)  # type: ignore[arg-type]
            with pytest.raises(SessionUnknown if "session" in change else RequestFailed):
                await pull(bob, request)
            await lab.at(lab.b).ask(HandOver(ONE, 0, READER))
            with pytest.raises(error):
                await pull(bob, request)
            assert len(await pull(bob, request_at(lab))) == 1

    with_lab(use)


def test_without_a_hand_over_nobody_reads() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 30)
        for token in (b"", READER):
            with pytest.raises(Forbidden):
                await pull(lab.at(lab.b), replace(request_at(lab), token=token))

    with_lab(use)


def test_only_the_client_hands_over_and_not_with_a_short_token() -> None:
    async def use(lab: Lab) -> None:
        there = lab.at(lab.b)
        await begin(lab, 30)
        await there.ask(replace(lab.alice.opening(epoch=2, max_tokens=640), span=SECOND))
        async with raw_client(lab.swarm, lab.b, 2) as bob:
            with pytest.raises(Forbidden):
                await bob.ask(HandOver(ONE, 2, READER))
        with pytest.raises(StaleEpoch):
            await there.ask(HandOver(ONE, 1, READER))
        with pytest.raises(SessionUnknown):
            await there.ask(HandOver(TWO, 2, READER))
        with pytest.raises(BadRequest):
            await there.ask(HandOver(ONE, 2, b"short"))
        opened = await there.ask(HandOver(ONE, 7, READER))
        assert isinstance(opened, Opened)
        assert opened.position == 30
        await there.step(Row(ONE, 2, 1, 30, 1), hidden=inputs(31)[30:])  # epoch 2 still holds
        assert len(lab.alice.outputs) == 2

    with_lab(use)


def test_a_session_that_is_closed_is_read_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "PART_BYTES", 10 * TOKEN_BYTES)

    async def use(lab: Lab) -> None:
        there = lab.at(lab.b)
        await begin(lab, 150)
        await there.ask(HandOver(ONE, 0, READER))
        reading = asyncio.ensure_future(pull(there, request_at(lab, 0, 150)))
        await asyncio.sleep(3.5 * SLOW_S)
        await there.ask(Close((ONE,), 0))
        with pytest.raises(SessionUnknown):
            await reading

    with_lab(use, device_s=SLOW_S)


OTHERS = [PeerId(bytes([number]) * 32) for number in range(MAX_PULLS)]


def take_all(places: Places, clients: Iterable[PeerId], stack: ExitStack) -> int:
    """Let clients, one after the other, take as many places as they get; how many are those?"""
    before = len(places)
    for client in clients:
        while places.has_one(client):
            stack.enter_context(places.taken(client))
    return len(places) - before


def test_one_client_reads_so_much_at_once_and_not_for_longer_than_allowed() -> None:
    async def use(lab: Lab) -> None:
        there = lab.at(lab.b)
        await begin(lab, 30)
        await there.ask(HandOver(ONE, 0, READER))
        readings = [pull(there, request_at(lab)) for _ in range(MAX_PULLS_EACH + 1)]
        results = await asyncio.gather(*readings, return_exceptions=True)
        assert [type(result) for result in results].count(Busy) == 1
        assert len(await pull(there, request_at(lab))) == 1
        with pytest.raises(BadRequest):
            await pull(there, request_at(lab), timeout_s=MAX_PULL_S + 10)

    with_lab(use, device_s=SLOW_S)


def test_a_clients_second_pull_leaves_a_place_for_another_client() -> None:
    places = Places()
    with ExitStack() as stack:
        assert [take_all(places, [client], stack) for client in OTHERS] == [2, 1, 1, 0]
        with pytest.raises(Busy), places.taken(OTHERS[0]):
            pass
    assert len(places) == 0
    with ExitStack() as stack:
        assert take_all(places, OTHERS[3:], stack) == MAX_PULLS_EACH


def test_a_client_that_reads_slowly_does_not_keep_others_from_reading() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 30)
        with ExitStack() as stack:
            giver, taker = lab.b.server.service._giver, lab.spare_b.server.service._taker
            for places in (giver._places, taker._places):
                assert take_all(places, OTHERS[:1], stack) == MAX_PULLS_EACH
            assert (await lab.hand_over(30)).position == 30

    with_lab(use)


@pytest.mark.parametrize("freed_after_s", [0.5, 5.0])
def test_an_open_waits_for_a_place_for_a_second_and_then_has_no_pages(freed_after_s: float) -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 30)
        loop, stack = asyncio.get_running_loop(), ExitStack()
        places = lab.spare_b.server.service._taker._places
        assert take_all(places, OTHERS, stack) == MAX_PULLS
        loop.call_later(freed_after_s, stack.close)
        began = loop.time()
        opened = await lab.hand_over(30)
        assert opened.position == (30 if freed_after_s < PLACE_WAIT_S else 0)
        assert loop.time() - began < PLACE_WAIT_S + 0.5
        await asyncio.sleep(freed_after_s)

    with_lab(use)


def test_more_sessions_than_may_move_at_once_wait_for_each_other() -> None:
    async def use(lab: Lab) -> None:
        numbers = [SessionId(bytes([number]) * 16) for number in range(1, MAX_PULLS + 3)]
        for session in numbers:
            await begin(lab, 30, session)
        moving = [lab.hand_over(30, session=session, max_tokens=64) for session in numbers]
        assert {opened.position for opened in await asyncio.gather(*moving)} == {30}

    with_lab(use, device_s=SLOW_S)


@pytest.mark.parametrize("token", [b"", b"q" * 16])
def test_pages_that_cannot_be_had_are_none_and_the_session_is_open(token: bytes) -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 150)
        assert (await lab.hand_over(150, token=token)).position == 0
        await lab.at(lab.spare_b).step(Row(ONE, 1, 0, 0, 150), hidden=inputs(150))
        assert lab.alice.tensor().equal(outputs(150))

    with_lab(use)


def test_more_pages_than_there_is_room_are_a_bad_request() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 150)
        with pytest.raises(BadRequest):
            await lab.hand_over(150, max_tokens=149)
        assert not len(lab.spare_b.server.service.sessions)

    with_lab(use)


def test_what_a_session_has_computed_itself_is_not_overwritten() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 150)
        assert (await lab.hand_over(100)).position == 100
        await assert_goes_on(lab, 100)
        opened = await lab.hand_over(150, epoch=2)
        assert (opened.position, opened.next_step) == (101, 10)

    with_lab(use)


# --- sources that lie --------------------------------------------------------------------------


def part(position: int, count: int, **change: object) -> Pages:
    """Keys and values of zeros."""
    tensor = encode_tensor(torch.zeros(2, 2, count, WIDTH), TensorCodec.RAW)
    made = Pages(position, count, zlib.crc32(tensor.data), tensor)
    return replace(made, **change)  # type: ignore[arg-type]


def coded(values: torch.Tensor, codec: TensorCodec = TensorCodec.RAW) -> dict[str, object]:
    tensor: WireTensor = encode_tensor(values, codec)
    return {"tensor": tensor, "checksum": zlib.crc32(tensor.data)}


@pytest.mark.parametrize(
    "lie",
    [
        lambda: Opened(60.0),
        lambda: part(9, 10),
        lambda: part(11, 10),
        lambda: part(10, 60),
        lambda: part(10, 10, checksum=1),
        lambda: part(10, 10, num_tokens=11),
        lambda: part(10, 10, **coded(torch.zeros(2, 2, 10, WIDTH + 1))),
        lambda: part(10, 10, **coded(torch.zeros(1, 2, 10, WIDTH))),
        lambda: part(10, 10, **coded(torch.zeros(2, 2, 10, WIDTH).half())),
        lambda: part(10, 10, **coded(torch.zeros(2, 2, 10, WIDTH), TensorCodec.BF16)),
        lambda: part(10, 10, **coded(torch.full((2, 2, 10, WIDTH), torch.nan))),
    ],
    ids=[
        "message",
        "before",
        "after",
        "more",
        "checksum",
        "count",
        "width",
        "blocks",
        "type",
        "codec",
        "nan",
    ],
)
def test_a_part_that_is_no_good_ends_the_pulling(lie: Callable[[], Message]) -> None:
    async def lying(request: Request[Pull]) -> AsyncGenerator[Message, None]:
        yield part(0, 10)
        yield lie()
        yield part(20, 10)

    async def use(lab: Lab) -> None:
        async with raw_client(lab.swarm, lab.b, 2) as mallory:
            mallory.endpoint.handle_stream(Pull, lying)
            request = replace(
                lab.alice.opening(), span=SECOND, source=record_of(mallory), source_position=64
            )
            opened = await lab.at(lab.b).ask(request)
            assert isinstance(opened, Opened)
            assert opened.position == 10
            held = lab.b.server.service.sessions.get(ONE)
            assert held is not None
            await lab.at(lab.b).step(Row(ONE, 0, 0, 0, 40), hidden=inputs(40))
            assert lab.alice.tensor().equal(outputs(40))

    with_lab(use)


def record_of(client: RawClient) -> bytes:
    identity = Identity.from_seed(bytes([2]) * 32)
    assert identity.peer_id == client.peer_id
    body = PeerRecord(client.peer_id, client.endpoint.addresses).to_body()
    return make_record(
        PEER_NAMESPACE,
        b"k" * 32,
        client.peer_id,
        seq=1,
        issued=WALL_EPOCH,
        expires=WALL_EPOCH + 600,
        body=body,
        sign=identity.sign,
    ).to_bytes()


def test_a_part_that_is_too_large_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "PART_BYTES", 10 * TOKEN_BYTES)

    async def lying(request: Request[Pull]) -> AsyncGenerator[Message, None]:
        yield part(0, 10)
        yield part(10, 11)

    async def use(lab: Lab) -> None:
        async with raw_client(lab.swarm, lab.b, 2) as mallory:
            mallory.endpoint.handle_stream(Pull, lying)
            request = replace(
                lab.alice.opening(), span=SECOND, source=record_of(mallory), source_position=64
            )
            opened = await lab.at(lab.b).ask(request)
            assert isinstance(opened, Opened)
            assert opened.position == 10

    with_lab(use)


@pytest.mark.parametrize("what", ["closed", "stepped", "replaced"])
def test_a_session_that_changes_while_pages_come_is_left_alone(what: str) -> None:
    async def use(lab: Lab) -> None:
        go_on = asyncio.Event()

        async def slowly(request: Request[Pull]) -> AsyncGenerator[Message, None]:
            yield part(0, 10)
            await go_on.wait()
            for start in range(10, 60, 10):
                yield part(start, 10)

        there = lab.at(lab.b)
        async with raw_client(lab.swarm, lab.b, 2) as mallory:
            mallory.endpoint.handle_stream(Pull, slowly)
            request = replace(
                lab.alice.opening(), span=SECOND, source=record_of(mallory), source_position=60
            )
            opening = asyncio.ensure_future(there.ask(request))
            await asyncio.sleep(0.5)
            if what == "closed":
                await there.ask(Close((ONE,), 0))
                await there.ask(replace(lab.alice.opening(TWO), span=SECOND))
            elif what == "replaced":
                span = replace(lab.alice.opening(epoch=1), span=Span(2, 3))
                await there.ask(span)
            session = TWO if what == "closed" else ONE
            blocks = Span(2, 3) if what == "replaced" else SECOND
            row = Row(session, 1 if what == "replaced" else 0, 0, 0, 40)
            await there.step(row, hidden=inputs(40))
            go_on.set()
            await opening
            await there.step(
                replace(row, step=1, position=40, num_tokens=1), hidden=inputs(41)[40:]
            )
            assert lab.alice.tensor().equal(expected(blocks, inputs(41))[40:])

    with_lab(use)


# --- a server that leaves ----------------------------------------------------------------------


def draining(lab: Lab, timeout_s: float = 30.0) -> "asyncio.Task[None]":
    return asyncio.ensure_future(lab.b.server.service.drain(timeout_s))


def test_a_server_without_sessions_leaves_at_once() -> None:
    async def use(lab: Lab) -> None:
        started = asyncio.get_running_loop().time()
        await draining(lab)
        assert asyncio.get_running_loop().time() == started

    with_lab(use)


def test_each_client_is_told_of_its_sessions_once_and_may_move_them() -> None:
    async def use(lab: Lab) -> None:
        there = lab.at(lab.b)
        await begin(lab, 30)
        await begin(lab, 30, THREE)
        async with raw_client(lab.swarm, lab.b, 2) as bob:
            await bob.ask(replace(bob.opening(TWO), span=SECOND))
            leaving = draining(lab)
            await asyncio.sleep(5.0)
            assert [set(notice.sessions) for notice in lab.alice.notices] == [{ONE, THREE}]
            assert [set(notice.sessions) for notice in bob.notices] == [{TWO}]
            assert 29.0 < bob.notices[0].deadline_s <= 30.0
            assert (await lab.hand_over(30)).position == 30
            await there.ask(Close((ONE, THREE), 5))
            await asyncio.sleep(1.0)
            assert not leaving.done()
            await bob.ask(Close((TWO,), 0))
            await asyncio.wait([leaving], timeout=0.1)
            assert leaving.done()
        await assert_goes_on(lab, 30)

    with_lab(use)


def test_a_leaving_server_takes_no_new_sessions_and_serves_those_it_has() -> None:
    async def use(lab: Lab) -> None:
        there = lab.at(lab.b)
        await begin(lab, 30)
        leaving = draining(lab)
        await asyncio.sleep(0.1)
        new = replace(lab.alice.opening(TWO), span=SECOND)
        larger = replace(lab.alice.opening(epoch=1, max_tokens=2000), span=SECOND)
        for request in (new, replace(new, wait_s=10.0), larger, Fork(ONE, 0, TWO, 10)):
            with pytest.raises(NotServed, match="leaving"):
                await there.ask(request)
        await there.step(Row(ONE, 0, 1, 30, 1), hidden=inputs(31)[30:])
        assert lab.alice.tensor().equal(outputs(31)[30:])
        opened = await there.ask(replace(lab.alice.opening(epoch=1, max_tokens=640), span=SECOND))
        assert isinstance(opened, Opened)
        assert opened.position == 31
        await there.step(Row(ONE, 1, 2, 31, 1), hidden=inputs(32)[31:])
        assert not lab.alice.failures
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()

    with_lab(use)


def test_who_waits_for_pages_of_a_leaving_server_is_sent_away_at_once() -> None:
    async def use(lab: Lab) -> None:
        whole = replace(lab.alice.opening(max_tokens=4096), span=SECOND)
        await lab.at(lab.b).ask(whole)
        waits = replace(lab.alice.opening(TWO), span=SECOND, wait_s=30.0)
        waiting = asyncio.ensure_future(lab.at(lab.b).ask(waits, timeout_s=60.0))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        leaving = draining(lab, 5.0)
        await asyncio.sleep(0.1)
        assert isinstance(waiting.exception(), NotServed)
        await leaving

    with_lab(use)


def test_draining_ends_with_its_time_whatever_the_clients_do() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 30)
        started = asyncio.get_running_loop().time()
        await draining(lab, 7.0)
        assert asyncio.get_running_loop().time() - started == pytest.approx(7.0, abs=0.01)
        assert len(lab.b.server.service.sessions) == 1

    with_lab(use)


def test_a_client_that_cannot_be_reached_is_told_when_it_can_be_again() -> None:
    async def use(lab: Lab) -> None:
        await begin(lab, 30)
        lab.swarm.internet.partition(lab.b.host, "10.1.0.1")
        leaving = draining(lab)
        await asyncio.sleep(12.0)
        assert not lab.alice.notices
        lab.swarm.internet.heal(lab.b.host, "10.1.0.1")
        await asyncio.sleep(8.0)
        assert {notice.sessions for notice in lab.alice.notices} == {(ONE,)}
        assert lab.alice.notices[-1].deadline_s < 30.0 - 10.0
        await lab.at(lab.b).ask(Close((ONE,), 0))
        await leaving

    with_lab(use)

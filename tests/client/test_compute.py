"""The client's own part of a step: embed, join parts, draw tokens."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from p2pllm.client.compute import ClientCompute, Drawing
from p2pllm.client.exchange import Part
from p2pllm.client.sequence import Finish
from p2pllm.client.sequence import Sequence as TextSequence
from p2pllm.client.state import WireFormat
from p2pllm.errors import RemoteProtocolError
from p2pllm.ids import SessionId
from p2pllm.model.sampling import SamplingParams
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.sim.fake_model import WIDTH, FakeEdges, fake_config
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import BytesDetokenizer, InlineExecutor
from p2pllm.wire.messages import Row
from p2pllm.wire.tensors import Compression, TensorCodec, TensorHeader, WireTensor

RAW = WireFormat(TensorCodec.RAW, is_compressed=False)
EDGES = FakeEdges(fake_config(4))


def compute() -> ClientCompute:
    return ClientCompute(EDGES, InlineExecutor())


def coded(hidden: Tensor, wire: WireFormat = RAW) -> WireTensor:
    return encode_tensor(hidden, wire.codec, compress=wire.is_compressed)


def row(number: int, num_tokens: int = 1, tail: int = 0) -> Row:
    return Row(SessionId(bytes([number]) * 16), 0, 0, 0, num_tokens, -1, tail)


def part(hidden: Tensor, *rows: Row) -> Part:
    return Part(rows, coded(hidden), ())


def drawing(prompt: Sequence[int] = (1, 2), max_new_tokens: int = 9, number: int = 0) -> Drawing:
    return Drawing(TextSequence(tuple(prompt), max_new_tokens, BytesDetokenizer()), number)


def test_embedding_codes_as_asked() -> None:
    tensor = run(compute().embed([5, 6, 7], WireFormat(TensorCodec.INT8, is_compressed=False)))

    assert tensor.header.codec is TensorCodec.INT8
    assert decode_tensor(tensor).round().equal(EDGES.embed(torch.tensor([5, 6, 7])))


def test_parts_are_joined_in_the_order_of_the_rows() -> None:
    hidden = torch.arange(7 * WIDTH).reshape(7, WIDTH).float() % 60
    rows = (row(1, 2), row(2, 4, tail=1), row(3), row(4, 3))
    parts = [part(hidden[[3]], rows[2]), part(hidden[[4, 5, 6, 0, 1]], rows[3], rows[0])]
    parts.append(part(hidden[[2]], rows[1]))

    joined = run(compute().repack(rows, parts, RAW))

    assert decode_tensor(joined).equal(hidden)


def test_a_token_is_drawn_for_each_and_embedded_for_those_that_go_on() -> None:
    hidden = EDGES.embed(torch.tensor([10, 20, 30]))
    drawings = [drawing(), drawing(max_new_tokens=1), drawing()]

    step = run(compute().advance([coded(hidden)], drawings, SamplingParams(), RAW))

    tokens = EDGES.logits(hidden).argmax(-1)
    assert [d.sequence.token_ids for d in drawings] == [[int(token)] for token in tokens]
    assert drawings[1].sequence.finish is Finish.LENGTH
    assert step.going_on == (0, 2)
    assert step.tensor is not None
    assert decode_tensor(step.tensor).equal(EDGES.embed(tokens[[0, 2]]))


def test_when_all_are_finished_nothing_is_embedded() -> None:
    step = run(
        compute().advance(
            [coded(torch.ones(1, WIDTH))], [drawing(max_new_tokens=1)], SamplingParams(), RAW
        )
    )
    assert (step.going_on, step.tensor) == ((), None)


def test_a_draw_depends_on_the_sequence_and_the_place_in_it() -> None:
    made = drawing((1, 2, 3), number=4)
    made.sequence.push(65)
    assert (made.next_draw().sequence, made.next_draw().position) == (4, 4)


def test_logits_of_several_tensors_come_in_one() -> None:
    hidden = EDGES.embed(torch.arange(5))
    logits = run(compute().logits([coded(hidden[:2]), coded(hidden[2:])]))
    assert logits.equal(EDGES.logits(hidden))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_server_that_answers_nan_is_the_one_to_blame(poison: float) -> None:
    hidden = torch.ones(2, WIDTH)
    hidden[1, 1] = poison
    with pytest.raises(RemoteProtocolError):
        run(compute().logits([coded(hidden)]))
    with pytest.raises(RemoteProtocolError):
        run(compute().repack([row(1, 2)], [part(hidden, row(1, 2))], RAW))


def test_an_answer_that_does_not_decode_is_a_protocol_error() -> None:
    header = TensorHeader(
        TensorCodec.RAW, Compression.ZSTD, coded(torch.ones(1, WIDTH)).header.dtype, (1, WIDTH)
    )
    with pytest.raises(RemoteProtocolError):
        run(compute().logits([WireTensor(header, b"no frame")]))

"""Golden bytes: the layout of every frame is a promise to older and newer peers."""

import pytest

from p2pllm.errors import CodecError
from p2pllm.net.frames import (
    CODE,
    CREDIT,
    DATA,
    FLAG_END,
    FLAG_GRANTED,
    FLAG_HEAVY,
    GRANTED,
    HEAD,
    NUMBER,
    OPEN,
    STREAM_ID,
    Code,
    FrameType,
    Priority,
    StreamKind,
    parse,
    parse_head,
)

GOLDEN = {
    "01 00000003 01 01 02 000005dc": OPEN.pack(
        FrameType.OPEN, 3, FLAG_END, Priority.DECODE, StreamKind.PUSH, 1500
    ),
    "02 00000004 07": DATA.pack(FrameType.DATA, 4, FLAG_END | FLAG_HEAVY | FLAG_GRANTED),
    "03 00000005 01 0000000000100000": CREDIT.pack(FrameType.CREDIT, 5, GRANTED, 2**20),
    "04 00000006 0002": CODE.pack(FrameType.RESET, 6, Code.DEADLINE),
    "05 00000007": HEAD.pack(FrameType.STOP, 7),
    "06 00000000 0000000000000009": NUMBER.pack(FrameType.PING, 0, 9),
    "07 00000000 0000000000000009": NUMBER.pack(FrameType.PONG, 0, 9),
    "08 00000000 00000000000f4240": NUMBER.pack(FrameType.RECEIVED, 0, 10**6),
    "09 00000000 00000003": HEAD.pack(FrameType.DONE, 0) + STREAM_ID.pack(3),
    "0a 00000000 0006": CODE.pack(FrameType.GOAWAY, 0, Code.CLOSING),
}


@pytest.mark.parametrize("golden", GOLDEN)
def test_frames_have_the_bytes_that_were_released(golden: str) -> None:
    assert GOLDEN[golden] == bytes.fromhex(golden)


def test_every_type_has_golden_bytes() -> None:
    assert {bytes.fromhex(golden)[0] for golden in GOLDEN} == set(FrameType)


def test_numbers_on_the_wire_do_not_change() -> None:
    assert [priority.value for priority in Priority] == [0, 1, 2, 3]
    assert [kind.value for kind in StreamKind] == [0, 1, 2]
    assert {code.name: code.value for code in Code} == {
        "CANCELLED": 1,
        "DEADLINE": 2,
        "REFUSED": 3,
        "MALFORMED": 5,
        "CLOSING": 6,
        "REPLACED": 7,
        "IDLE": 8,
        "UNHANDLED": 9,
    }


def test_a_fixed_frame_has_exactly_its_length_and_one_with_data_at_least_its_head() -> None:
    frame = NUMBER.pack(FrameType.PING, 0, 9)
    assert parse(NUMBER, frame) == (FrameType.PING, 0, 9)
    for wrong in (frame[:-1], frame + b"x"):
        with pytest.raises(CodecError):
            parse(NUMBER, wrong)
    head = DATA.pack(FrameType.DATA, 4, 0)
    assert parse_head(DATA, head + b"data") == (FrameType.DATA, 4, 0)
    with pytest.raises(CodecError):
        parse_head(DATA, head[:-1])
